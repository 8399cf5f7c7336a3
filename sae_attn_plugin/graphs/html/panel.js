/* What is known of one node: numbers, ledger, DFA, QK, neighbours, examples. */
(function (sag) {
  "use strict";

  const { el, heat, safeLink } = sag;
  const FEW = 8;
  const LEDGERS = [
    ["kind", "kind"],
    ["layer", "layer"],
    ["token", "token"],
  ];

  class Panel {
    /** `hooks`: `select(id)`, `pin(id)`, `mark(id)`, `copy(text)`, `ungroup`, `rename`, `hover`. */
    constructor(box, model, hooks) {
      this.box = box;
      this.model = model;
      this.hooks = hooks;
      this.by = "kind";
    }

    clear() {
      const keys = [
        ["click", "details of a node"],
        ["shift click", "mark nodes, to group them"],
        ["arrows", "walk through the graph"],
        ["i, o", "strongest input, strongest output"],
        ["p", "pin"],
        ["/", "search"],
        ["Esc", "let go"],
      ];
      this.box.replaceChildren(
        el("div", { class: "sag-empty" },
          el("h2", {}, "Select a node"),
          el("p", {}, "Its activation, the ledger that adds up to it, where it looks, and what it " +
            "writes to appear here."),
          el("dl", {}, keys.map(([key, what]) => [el("dt", {}, el("kbd", {}, key)), el("dd", {}, what)])))
      );
      if (this.model.asked.size) {
        const targets = [...this.model.asked].map((id) => this.model.byId.get(id)).filter(Boolean);
        this.box.append(el("section", {}, el("h3", {}, "Targets"),
          el("ul", { class: "sag-list" }, targets.map((node) => this.row(node, {
            value: node.pre_activation, part: 1 })))));
      }
      const top = this.model.nodeOrder
        .map((i) => this.model.nodes[i])
        .filter((node) => !this.model.isAsked(node))
        .slice(0, FEW);
      const most = top.length ? top[0].influence : 1;
      this.box.append(el("section", {}, el("h3", {}, "Most influential"),
        el("ul", { class: "sag-list" }, top.map((node) => this.row(node, {
          text: sag.percent(node.influence), part: node.influence / most, neutral: true })))));
    }

    // -- a node ------------------------------------------------------------------------------

    show(node, state) {
      const parts = [
        this.head(node, state),
        this.facts(node),
        this.ledgerSection(node),
        this.dfaSection(node),
        this.qkSection(node),
        this.edgesSection("Inputs", node, this.model.ins[node.index], this.model.source),
        this.edgesSection("Writes to", node, this.model.outs[node.index], this.model.target),
        this.examplesSection(node),
        this.membersSection(node),
      ];
      this.box.replaceChildren(...parts.filter(Boolean));
      this.box.scrollTop = 0;
    }

    button(name, label, act, attributes = {}) {
      return el("button", { type: "button", class: "sag-button", "aria-label": label, title: label,
        onclick: act, ...attributes }, name);
    }

    head(node, { pinned, marked }) {
      const model = this.model;
      const link = safeLink(node.neuronpedia);
      return el("header", {},
        el("h2", {}, sag.glyph(node.kind), sag.bdi(model.name(node))),
        el("p", { class: "sag-where" },
          sag.kind(node.kind)[2], node.layer === null || node.layer === undefined ? "" :
            ` · layer ${node.layer}`, " · at ", sag.bdi(sag.quoted(model.token(node.position))),
          ` · position ${node.position}`),
        el("div", { class: "sag-id" },
          el("code", { dir: "ltr" }, sag.shown(node.id)),
          this.button("Copy", "Copy the node id", () => this.hooks.copy(node.id),
            { "data-act": "copy" })),
        el("div", { class: "sag-actions" },
          this.button(pinned ? "Unpin" : "Pin", pinned ? "Unpin this node" : "Pin this node",
            () => this.hooks.pin(node.id), { "aria-pressed": String(pinned), "data-act": "pin" }),
          this.button(marked ? "Unmark" : "Mark", "Mark this node, to group it with others",
            () => this.hooks.mark(node.id), { "aria-pressed": String(marked), "data-act": "mark" }),
          link && el("a", { class: "sag-button", href: link, target: "_blank",
            rel: "noopener noreferrer" }, "Neuronpedia ↗")));
    }

    facts(node) {
      const rows = [
        ["activation", node.activation],
        [sag.isTarget(node) ? "value" : "pre-activation", node.pre_activation],
      ].filter(([, value]) => value !== null && value !== undefined);
      const cells = rows.map(([name, value]) => [name, sag.number(value, 5)]);
      if (node.probability !== undefined && node.probability !== null)
        cells.push(["probability", sag.percent(node.probability)]);
      cells.push(["influence", sag.percent(node.influence)]);
      return el("dl", { class: "sag-facts" },
        cells.map(([name, text]) => el("div", {}, el("dt", {}, name), el("dd", {}, text))));
    }

    // -- ledger ------------------------------------------------------------------------------

    ledgerSection(node) {
      const ledger = this.model.ledger(node, this.by);
      if (!ledger || !ledger.rows.length) return null;
      const what = sag.isTarget(node) ? "value" : "pre-activation";
      const section = el("section", { class: "sag-ledger", "data-part": "ledger" });
      const choice = el("div", { class: "sag-choice", role: "group", "aria-label": "Group edges by" },
        LEDGERS.map(([key, name]) =>
          el("button", { type: "button", "aria-pressed": String(this.by === key), onclick: () => {
            this.by = key;
            section.replaceWith(this.ledgerSection(node));
          } }, name)));
      section.append(el("h3", {}, "Ledger", choice), this.ledgerTable(ledger, what));
      if (ledger.residual !== null) {
        section.append(el("p", { class: "sag-note" },
          `Adds up to the ${what} within ${sag.number(Math.abs(ledger.residual), 2)}.`));
      }
      return section;
    }

    /** A waterfall: each row starts where the one above ends. */
    ledgerTable(ledger, what) {
      let low = 0;
      let high = 0;
      let sum = 0;
      for (const row of ledger.rows) {
        sum += row.value;
        low = Math.min(low, sum);
        high = Math.max(high, sum);
      }
      if (ledger.value !== null) {
        low = Math.min(low, ledger.value);
        high = Math.max(high, ledger.value);
      }
      const span = high - low || 1;
      const at = (value) => (100 * (value - low)) / span;
      const bar = (from, to, look) => {
        const inner = el("i", { class: look });
        inner.style.left = Math.min(at(from), at(to)) + "%";
        inner.style.width = Math.max(Math.abs(at(to) - at(from)), 0.6) + "%";
        const zero = el("b", {});
        zero.style.left = at(0) + "%";
        return el("span", { class: "sag-fall" }, zero, inner);
      };
      sum = 0;
      const rows = ledger.rows.map((row) => {
        const from = sum;
        sum += row.value;
        const count = row.count === null ? "" : ` (${sag.count(row.count, "edge")})`;
        return el("tr", { title: row.name + count },
          el("th", { scope: "row" }, sag.bdi(row.name)),
          el("td", {}, bar(from, sum, row.value < 0 ? "is-neg" : "is-pos")),
          el("td", { class: "sag-num" }, sag.signed(row.value)));
      });
      if (ledger.value !== null) {
        rows.push(el("tr", { class: "is-total" }, el("th", { scope: "row" }, "= " + what),
          el("td", {}, bar(0, ledger.value, "is-sum")),
          el("td", { class: "sag-num" }, sag.number(ledger.value, 5))));
      }
      return el("table", { class: "sag-table" },
        el("caption", { class: "sag-hidden" }, "What adds up to the " + what), el("tbody", {}, rows));
    }

    // -- DFA ---------------------------------------------------------------------------------

    dfaSection(node) {
      const dfa = node.dfa;
      if (!dfa) return null;
      const matrix = dfa.by_head_and_source;
      const bySource = matrix[0].map((_, p) => matrix.reduce((sum, row) => sum + row[p], 0));
      const byHead = matrix.map((row) => row.reduce((sum, value) => sum + value, 0));
      const most = Math.max(...matrix.map((row) => Math.max(...row.map(Math.abs)))) || 1;
      const text = el("p", { class: "sag-prompt" });
      const note = el("output", { class: "sag-note" });
      const words = this.model.tokens.map((token, p) => {
        const inside = p < bySource.length;
        return el("span", { class: inside ? null : "is-later", "data-position": p,
          onpointerenter: () => inside && say(p), onpointerleave: () => say(null) },
          sag.bdi(sag.shown(token)));
      });
      text.append(...words);
      let head = null;
      const paint = () => {
        const row = head === null ? bySource : matrix[head];
        const top = Math.max(...row.map(Math.abs)) || 1;
        words.forEach((word, p) => {
          if (p >= row.length) return;
          word.style.backgroundColor = heat(row[p] / top);
          word.title = `position ${p}: ${sag.signed(row[p])}`;
        });
        for (const button of heads) {
          button.setAttribute("aria-pressed", String(Number(button.dataset.head) === head));
        }
      };
      const say = (p, h = head) => {
        if (p === null) {
          note.textContent = head === null
            ? `All heads: ${sag.signed(byHead.reduce((a, b) => a + b, 0))}, and the constant ` +
              sag.signed(dfa.constant)
            : `Head ${node.layer}.${head}: ${sag.signed(byHead[head])}`;
          return;
        }
        const from = h === null ? "all heads" : `head ${node.layer}.${h}`;
        const value = h === null ? bySource[p] : matrix[h][p];
        note.textContent =
          `${sag.signed(value)} from ${sag.quoted(this.model.token(p))} at ${p}, ${from}`;
      };
      const heads = byHead.map((value, h) =>
        el("button", { type: "button", class: "sag-head", "data-head": h, "aria-pressed": "false",
          "aria-label": `Head ${node.layer}.${h}: ${sag.signed(value)}`,
          onclick: () => {
            head = head === h ? null : h;
            paint();
            say(null);
          } },
          el("span", {}, `${node.layer}.${h}`), el("span", { class: "sag-num" }, sag.signed(value, 3))));
      const cells = el("div", { class: "sag-cells", role: "img",
        "aria-label": "Heat map of the attribution, heads by source positions" },
        matrix.map((row, h) => el("div", {}, row.map((value, p) => {
          const cell = el("i", { onpointerenter: () => say(p, h), onpointerleave: () => say(null),
            "data-head": h, "data-position": p });
          cell.style.backgroundColor = heat(value / most);
          return cell;
        }))));
      paint();
      say(null);
      return el("section", { class: "sag-dfa", "data-part": "dfa" },
        el("h3", {}, "Direct feature attribution"), text,
        el("div", { class: "sag-matrix" }, el("div", { class: "sag-heads" }, heads), cells), note);
    }

    // -- QK ----------------------------------------------------------------------------------

    qkSection(node) {
      if (!node.qk || !node.qk.length) return null;
      return el("section", { "data-part": "qk" }, el("h3", {}, "Why its heads look there"),
        node.qk.map((one) => {
          const most = Math.max(...one.terms.map((term) => Math.abs(term[2]))) || 1;
          return el("details", { class: "sag-qk", open: one === node.qk[0] },
            el("summary", {}, `Head ${node.layer}.${one.head} from `,
              sag.bdi(sag.quoted(this.model.token(one.query))), ` (${one.query}) to `,
              sag.bdi(sag.quoted(this.model.token(one.key))), ` (${one.key}): `,
              el("b", { class: "sag-num" }, sag.percent(one.pattern)), " of its attention"),
            el("p", { class: "sag-note" }, 
              `Score ${sag.signed(one.score)}, the sum of these terms and all others:`),
            el("ul", { class: "sag-pairs" }, one.terms.map(([query, key, weight]) =>
              el("li", {}, this.inline(query), el("span", { class: "sag-times" }, "×"),
                this.inline(key), this.weight(weight, Math.abs(weight) / most)))),
            one.rest === undefined ? null : el("p", { class: "sag-note" },
              `All other pairs: ${sag.signed(one.rest)}`));
        }));
    }

    inline(id) {
      const node = this.model.byId.get(id);
      const text = sag.bdi(sag.shown(id));
      if (!node) return el("code", {}, text);
      return el("button", { type: "button", class: "sag-link", onclick: () => this.hooks.select(id) },
        el("code", {}, text));
    }

    // -- neighbours --------------------------------------------------------------------------

    edgesSection(title, node, edges, ends) {
      if (!edges.length) return null;
      const { weight } = this.model;
      const outgoing = ends === this.model.target;
      // weights into different targets are in different units: compare their shares
      const size = (e) => (outgoing ? this.model.share[e] : Math.abs(weight[e]));
      const order = [...edges].sort((a, b) => size(b) - size(a));
      const most = size(order[0]) || 1;
      const list = el("ul", { class: "sag-list" });
      const fill = (n) => {
        list.replaceChildren(...order.slice(0, n).map((e) => {
          const other = this.model.nodes[ends[e]];
          const head = this.model.topHead(e);
          return this.row(other, { value: weight[e], part: size(e) / most, head,
            title: this.edgeTitle(e) });
        }));
      };
      fill(FEW);
      const more = order.length > FEW &&
        el("button", { type: "button", class: "sag-more", onclick: () => {
          fill(order.length);
          more.remove();
        } }, `Show all ${order.length}`);
      return el("section", { "data-part": outgoing ? "outputs" : "inputs" },
        el("h3", {}, title, el("small", {}, sag.count(order.length, "edge"))), list, more || null);
    }

    edgeTitle(e) {
      const { weight, share, heads } = this.model;
      const lines = [`${sag.signed(weight[e], 6)}, ${sag.percent(share[e])} of the target's edges`];
      if (heads[e]) {
        for (const key of Object.keys(heads[e]).sort(sag.compareHeads))
          lines.push(`head ${key}: ${sag.signed(heads[e][key])}`);
      }
      return lines.join("\n");
    }

    /** A line that leads to a node. */
    row(node, { value, text, part, head, title, neutral }) {
      return el("li", {},
        el("button", { type: "button", class: "sag-row-button", "data-to": node.id, title,
          onclick: () => this.hooks.select(node.id),
          onpointerenter: () => this.hooks.hover(node.id),
          onpointerleave: () => this.hooks.hover(null) },
          sag.glyph(node.kind, 5.5),
          el("span", { class: "sag-name" }, sag.bdi(this.model.name(node)), " ",
            el("small", {}, node.kind === "embed" ? null : sag.bdi(sag.word(this.model.token(node.position))),
              ` ${node.position}`, head ? ` · head ${head}` : "")),
          text === undefined ? this.weight(value, part)
            : this.weight(null, part, text, neutral)));
    }

    weight(value, part, text, neutral) {
      const bar = el("i", { class: neutral ? "is-sum" : value < 0 ? "is-neg" : "is-pos" });
      bar.style.width = Math.max(2, 100 * Math.min(part, 1)) + "%";
      return el("span", { class: "sag-weight" }, el("span", { class: "sag-bar" }, bar),
        el("span", { class: "sag-num" }, text === undefined ? sag.signed(value) : text));
    }

    // -- examples ----------------------------------------------------------------------------

    examplesSection(node) {
      if (!node.examples || !node.examples.length) return null;
      const most = Math.max(...node.examples.flatMap((one) => one.activations)) || 1;
      return el("section", { "data-part": "examples" }, el("h3", {}, "Where it is active"),
        node.examples.map((one) => el("p", { class: "sag-prompt sag-example" },
          one.tokens.map((token, i) => {
            const value = one.activations[i] || 0;
            const word = el("span", { title: sag.number(value) }, sag.bdi(sag.shown(token)));
            if (value > 0) word.style.backgroundColor = heat(value / most);
            return word;
          }))));
    }

    membersSection(node) {
      if (!Array.isArray(node.members) || !node.members.length) return null;
      return el("section", { "data-part": "members" }, el("h3", {}, "Members"),
        el("ul", { class: "sag-pairs" }, node.members.map((id) => el("li", {}, this.inline(String(id))))));
    }

    // -- a group -----------------------------------------------------------------------------

    showGroup(group) {
      const { model } = this;
      const inside = new Set(group.nodes.map((node) => node.index));
      const total = group.nodes.reduce((sum, node) => sum + node.influence, 0);
      const field = el("input", { type: "text", value: group.name, "aria-label": "Name of the group",
        maxlength: 60, "data-act": "rename",
        onchange: (event) => this.hooks.rename(group.key, event.target.value) });
      const between = (list, ends, others) => {
        const sums = new Map();
        for (const node of group.nodes)
          for (const e of list[node.index])
            if (!inside.has(others[e])) {
              const sum = sums.get(others[e]) || { flow: 0, weight: 0 };
              sum.flow += model.flow[e];
              sum.weight += model.weight[e];
              sums.set(others[e], sum);
            }
        return [...sums].sort((a, b) => b[1].flow - a[1].flow);
      };
      const section = (title, sums) => {
        if (!sums.length) return null;
        const most = sums[0][1].flow || 1;
        return el("section", {}, el("h3", {}, title, el("small", {}, sag.count(sums.length, "node"))),
          el("ul", { class: "sag-list" }, sums.slice(0, 12).map(([index, sum]) =>
            this.row(model.nodes[index], { value: sum.weight, part: sum.flow / most }))));
      };
      this.box.replaceChildren(...[
        el("header", {}, el("h2", {}, sag.glyph("group"), field),
          el("p", { class: "sag-where" }, `${sag.count(group.nodes.length, "node")} · influence `,
            sag.percent(total), " in all"),
          el("div", { class: "sag-actions" },
            this.button("Ungroup", "Show the nodes of this group again",
              () => this.hooks.ungroup(group.key), { "data-act": "ungroup" }))),
        el("section", {}, el("h3", {}, "Members"),
          el("ul", { class: "sag-list" }, group.nodes.map((node) => this.row(node, {
            text: sag.percent(node.influence), part: node.influence / (total || 1),
            neutral: true })))),
        section("Inputs, added over its members", between(model.ins, null, model.source)),
        section("Writes to", between(model.outs, null, model.target)),
      ].filter(Boolean));
      this.box.scrollTop = 0;
    }

    // -- the card beside a hovered node ------------------------------------------------------

    card(item) {
      const { model } = this;
      if (item.group) {
        return [el("strong", {}, sag.bdi(sag.shown(item.group.name))),
          el("div", { class: "sag-where" }, sag.count(item.group.nodes.length, "node"))];
      }
      const node = item.node;
      const parts = [
        el("strong", {}, sag.bdi(model.name(node))),
        el("div", { class: "sag-where" }, node.label ? model.plainName(node) + " · " : "",
          "at ", sag.bdi(sag.quoted(model.token(node.position))), ` · ${node.position}`),
      ];
      const facts = [];
      if (node.activation !== undefined) facts.push(["activation", sag.number(node.activation)]);
      if (sag.isTarget(node)) facts.push(["value", sag.number(node.pre_activation)]);
      facts.push(["influence", sag.percent(node.influence)]);
      parts.push(el("div", { class: "sag-card-facts" },
        facts.map(([name, text]) => el("span", {}, name + " ", el("b", {}, text)))));
      const ledger = model.ledger(node, "kind");
      if (ledger && ledger.rows.length) parts.push(this.strip(ledger));
      const dfa = node.dfa;
      if (dfa) {
        const bySource = dfa.by_head_and_source[0].map((_, p) =>
          dfa.by_head_and_source.reduce((sum, row) => sum + row[p], 0));
        const best = bySource.reduce((a, v, p) => (Math.abs(v) > Math.abs(bySource[a]) ? p : a), 0);
        parts.push(el("div", { class: "sag-where" }, "most from ",
          sag.bdi(sag.quoted(model.token(best))), ` at ${best}: ${sag.signed(bySource[best])}`));
      }
      return parts;
    }

    /** The ledger as one bar: what adds up on the right of zero, what takes away on the left. */
    strip(ledger) {
      const size = ledger.rows.reduce((sum, row) => sum + Math.abs(row.value), 0) || 1;
      const minus = ledger.rows.filter((row) => row.value < 0);
      const plus = ledger.rows.filter((row) => row.value >= 0);
      const piece = (row) => {
        const part = el("i", { class: row.value < 0 ? "is-neg" : "is-pos",
          title: `${row.name} ${sag.signed(row.value)}` });
        part.style.width = (100 * Math.abs(row.value)) / size + "%";
        return part;
      };
      return el("div", { class: "sag-strip-box" },
        el("div", { class: "sag-strip" }, minus.map(piece), el("b", {}), plus.map(piece)),
        [...ledger.rows].sort((a, b) => Math.abs(b.value) - Math.abs(a.value)).slice(0, 3)
          .map((row) => el("div", { class: "sag-strip-row" }, el("span", {}, row.name),
            el("span", { class: "sag-num" }, sag.signed(row.value)))));
    }
  }

  sag.Panel = Panel;
})((window.SaeAttnGraph = window.SaeAttnGraph || {}));
