/* mount(element, data, options): the whole page in an element. */
(function (sag) {
  "use strict";

  const { el, recall, remember } = sag;
  const EDGES_AT_FIRST = 1200;
  const THEMES = ["auto", "light", "dark"];

  /**
   * Show a graph.
   *
   * `data`: see docs/page.md. `options`, all of them optional:
   *   onSelect(id | null)   the selected node; a group's id begins with "group:"
   *   onHover(id | null)    the node under the pointer
   *   onPin(ids)            all pinned nodes
   *   onGroup(groups)       all groups, as [{name, members}]
   *   onState(state)        anything a reader would want back; pass it as `state` to restore it
   *   state                 what `onState` gave
   *   theme                 "auto", "light" or "dark"
   *   header                false leaves out the title bar
   *   persist               true keeps the state in the page's address (after #)
   *
   * Returns a handle: `select(id)`, `pin(id)`, `group(ids, name)`, `setFilters({nodes, edges})`,
   * `setData(data)`, `setTheme(theme)`, `state()`, `fit()`, `destroy()`, and `timing` in ms.
   */
  sag.mount = function (element, data, options = {}) {
    return new Page(element, data, options).handle();
  };

  class Page {
    constructor(element, data, options) {
      this.element = element;
      this.options = options;
      this.timing = {};
      this.root = el("div", { class: "sag", "data-theme": "auto" });
      element.replaceChildren(this.root);
      this.root.addEventListener("keydown", (event) => {
        if (event.key !== "Escape" || event.defaultPrevented) return;
        const last = this.plot.current || this.plot.shownItems()[0];
        this.escape();
        this.plot.focus(last);
      });
      this.media = window.matchMedia("(prefers-color-scheme: dark)");
      this.onMedia = () => this.plot.readColours();
      this.media.addEventListener("change", this.onMedia);
      this.load(data, options.state || (options.persist ? readAddress() : null));
      this.setTheme(options.theme || recall("theme") || "auto", false);
    }

    load(data, state) {
      const started = performance.now();
      if (this.plot) this.plot.destroy();
      this.model = new sag.Model(data);
      this.pins = new Set();
      this.marks = new Set();
      this.groups = [];
      this.hiddenKinds = new Set();
      this.selected = null;
      this.compact = false;
      this.nodeShare = 1;
      this.edgeShare = this.model.shareFor(EDGES_AT_FIRST);
      this.restore(state);
      this.build();
      this.timing.prepare = performance.now() - started;
      this.plot.resize();
      painted(() => (this.timing.first = performance.now() - started));
    }

    // -- the frame ---------------------------------------------------------------------------

    build() {
      const body = el("div", { class: "sag-body" });
      this.main = el("div", { class: "sag-main" });
      this.side = el("aside", { class: "sag-side", "aria-label": "Details", tabindex: "-1" });
      this.live = el("div", { class: "sag-hidden", role: "status", "aria-live": "polite" });
      this.toast = el("div", { class: "sag-toast", role: "status", hidden: true });
      body.append(this.main, this.side);
      this.root.replaceChildren(
        ...[this.options.header === false ? null : this.header(), this.controls(), body, this.live,
          this.toast].filter(Boolean)
      );
      this.chips = el("div", { class: "sag-chips" });
      this.plot = new sag.Plot(this.main, this.model, {
        hover: (item) => this.hovered(item),
        pick: (item, event) => this.picked(item, event),
        card: (item) => this.panel.card(item),
        key: (event, item) => this.key(event, item),
        resized: () => this.arrange(),
      });
      this.main.append(this.chips);
      this.panel = new sag.Panel(this.side, this.model, {
        select: (id) => this.select(id, true),
        pin: (id) => this.pin(id),
        mark: (id) => this.mark(id),
        copy: (text) => this.copy(text),
        hover: (id) => this.hoverFromList(id),
        ungroup: (key) => this.ungroup(key),
        rename: (key, name) => this.rename(key, name),
      });
      const { nodes, edgeOrder } = this.model;
      this.plot.svg.setAttribute("aria-label",
        `Attribution graph, ${sag.count(nodes.length, "node")}, ` +
          `${sag.count(edgeOrder.length, "edge")}. Arrow keys walk through it.`);
      this.plot.setGroups(this.groups);
      this.showSide();
      this.showChips();
    }

    header() {
      const { graph } = this.model;
      const targets = (graph.targets || []).map((id) => this.model.byId.get(id)).filter(Boolean);
      const title = targets.slice(0, 2).map((node) => {
        const value = node.pre_activation;
        return el("span", {}, sag.bdi(sag.shown(node.title || this.model.name(node))),
          value === undefined || value === null ? "" : ` = ${sag.number(value)}`);
      });
      if (targets.length > 2) title.push(el("span", {}, `and ${targets.length - 2} more`));
      const facts = [graph.model, graph.backend, graph.dtype].filter((x) => typeof x === "string");
      const residual = graph.worst_ledger_residual;
      if (Number.isFinite(residual)) facts.push(`worst ledger residual ${sag.number(residual, 3)}`);
      this.themeButton = el("button", { type: "button", class: "sag-button", "data-act": "theme",
        onclick: () => this.nextTheme() });
      return el("header", { class: "sag-top" },
        el("div", { class: "sag-title" },
          el("h1", {}, title.length ? title : "Attribution graph"),
          el("p", {}, facts.map((fact, i) => [i ? " · " : "", sag.bdi(sag.shown(fact))]))),
        this.searchBox(),
        el("div", { class: "sag-tools" }, this.themeButton,
          el("button", { type: "button", class: "sag-button", "data-act": "help",
            onclick: () => this.help() }, "Keys")));
    }

    searchBox() {
      this.results = el("ul", { class: "sag-results", role: "listbox", "aria-label": "Nodes found",
        hidden: true, id: unique("results") });
      this.searchInput = el("input", { type: "search", placeholder: "Search: token, feature, id",
        "aria-label": "Search nodes", role: "combobox", "aria-expanded": "false",
        "aria-controls": this.results.id, autocomplete: "off", spellcheck: "false",
        oninput: () => this.search(), onkeydown: (event) => this.searchKey(event),
        onblur: () => setTimeout(() => (this.results.hidden = true), 150) });
      return el("div", { class: "sag-search" }, this.searchInput, this.results);
    }

    controls() {
      const slider = (name, label, value, act) => {
        const output = el("output", {});
        const input = el("input", { type: "range", min: "0", max: "100", step: "0.5",
          value: 100 * value, "data-filter": name, "aria-label": label,
          oninput: () => act(Number(input.value) / 100) });
        return { input, output, box: el("label", { class: "sag-slider" },
          el("span", {}, label), input, output) };
      };
      this.nodeSlider = slider("nodes", "Node influence", this.nodeShare, (share) => {
        this.nodeShare = share;
        this.filter();
      });
      this.edgeSlider = slider("edges", "Edge influence", this.edgeShare, (share) => {
        this.edgeShare = share;
        this.filter();
      });
      this.compactButton = el("button", { type: "button", class: "sag-button", "data-act": "compact",
        "aria-pressed": String(this.compact), title: "Close the gaps that filters leave",
        onclick: () => {
          this.compact = !this.compact;
          this.compactButton.setAttribute("aria-pressed", String(this.compact));
          this.arrange();
          this.changed();
        } }, "Compact");
      const counts = new Map();
      for (const node of this.model.nodes) counts.set(node.kind, (counts.get(node.kind) || 0) + 1);
      const legend = this.model.kinds.map((kind) =>
        el("button", { type: "button", class: "sag-kind", "data-kind": kind,
          "aria-pressed": String(!this.hiddenKinds.has(kind)),
          title: `Show or hide: ${sag.kind(kind)[3]} (${counts.get(kind)})`,
          onclick: (event) => this.toggleKind(kind, event.currentTarget) },
          sag.glyph(kind, 6), sag.kind(kind)[2]));
      return el("div", { class: "sag-controls" }, this.nodeSlider.box, this.edgeSlider.box,
        el("div", { class: "sag-tools" }, this.compactButton,
          icon("Zoom out", "−", () => this.plot.zoom(1 / 1.35)),
          icon("Zoom in", "+", () => this.plot.zoom(1.35)),
          icon("Fit the whole graph", "⤢", () => this.plot.fit())),
        el("div", { class: "sag-legend", role: "group", "aria-label": "Kinds of nodes" }, legend,
          el("span", { class: "sag-sign is-pos" }, el("i", {}), "adds"),
          el("span", { class: "sag-sign is-neg" }, el("i", {}), "takes away")),
        this.options.header === false ? this.searchBox() : null);
    }

    // -- filters -----------------------------------------------------------------------------

    computeVisible() {
      const always = new Set(this.pins);
      this.visible = this.model.visibleNodes(this.nodeShare, this.hiddenKinds, always);
      const { kept, among } = this.model.visibleEdges(this.edgeShare, this.visible);
      this.kept = kept;
      this.among = among;
    }

    arrange() {
      if (!this.plot.width) return;
      this.computeVisible();
      const all = new Uint8Array(this.model.nodes.length).fill(1);
      this.plot.arrange(this.compact ? this.visible : all);
      this.refresh();
    }

    filter() {
      const started = performance.now();
      this.computeVisible();
      if (this.compact) this.plot.arrange(this.visible);
      this.refresh();
      this.changed();
      painted(() => (this.timing.filter = performance.now() - started));
    }

    refresh() {
      this.plot.show(this.visible, this.kept);
      this.mirror();
      const shown = this.visible.reduce((sum, is) => sum + is, 0);
      const total = this.model.nodes.length;
      this.nodeSlider.output.textContent =
        `${(100 * this.nodeShare).toFixed(0)}% · ${shown.toLocaleString("en")} of ` +
        total.toLocaleString("en");
      this.edgeSlider.output.textContent =
        `${(100 * this.edgeShare).toFixed(0)}% · ${this.kept.length.toLocaleString("en")} of ` +
        this.among.toLocaleString("en");
      this.nodeSlider.input.setAttribute("aria-valuetext", this.nodeSlider.output.textContent);
      this.edgeSlider.input.setAttribute("aria-valuetext", this.edgeSlider.output.textContent);
    }

    toggleKind(kind, button) {
      if (this.hiddenKinds.has(kind)) this.hiddenKinds.delete(kind);
      else this.hiddenKinds.add(kind);
      button.setAttribute("aria-pressed", String(!this.hiddenKinds.has(kind)));
      this.filter();
    }

    // -- selection ---------------------------------------------------------------------------

    itemOf(id) {
      if (id === null || id === undefined) return null;
      const group = this.groups.find((one) => one.key === id);
      if (group) return this.plot.items.find((item) => item.group === group) || null;
      const node = this.model.byId.get(id);
      return node ? this.plot.itemOf(node) : null;
    }

    /** Classes and lit edges follow the state. */
    mirror() {
      const selected = this.itemOf(this.selected);
      for (const item of this.plot.items) {
        const { classList } = item.element;
        const pinned = !item.group && this.pins.has(item.id);
        const marked = !item.group && this.marks.has(item.id);
        classList.toggle("is-selected", item === selected);
        classList.toggle("is-pinned", pinned);
        classList.toggle("is-marked", marked);
        item.element.setAttribute("aria-pressed", String(item === selected));
      }
      if (!this.plot.current || !this.plot.current.shown) {
        const first = selected || this.plot.shownItems()[0];
        for (const other of this.plot.layer.querySelectorAll('[tabindex="0"]'))
          other.setAttribute("tabindex", "-1");
        if (first) first.element.setAttribute("tabindex", "0");
      }
      this.plot.light(this.hover || selected, this.visible);
    }

    select(id, reveal = false) {
      if (id !== null && !this.itemOf(id)) return;
      this.selected = id;
      const node = id === null ? null : this.model.byId.get(id);
      if (node && !this.visible[node.index]) {
        this.pinQuietly(id); // what was asked for is shown, whatever the filters say
        this.computeVisible();
        this.refresh();
      }
      this.hover = null;
      this.mirror();
      this.showSide();
      const item = this.itemOf(id);
      if (item && reveal) this.plot.reveal(item);
      if (this.options.onSelect) this.options.onSelect(id);
      this.changed();
      if (item) this.say(this.plot.describe(item));
    }

    pinQuietly(id) {
      this.pins.add(id);
      this.showChips();
      if (this.options.onPin) this.options.onPin([...this.pins]);
    }

    showSide() {
      const group = this.groups.find((one) => one.key === this.selected);
      const node = this.selected === null ? null : this.model.byId.get(this.selected);
      this.root.classList.toggle("has-selection", Boolean(group || node));
      if (group) this.panel.showGroup(group);
      else if (node) {
        this.panel.show(node, { pinned: this.pins.has(node.id), marked: this.marks.has(node.id) });
      } else this.panel.clear();
    }

    hovered(item) {
      this.hover = item;
      this.plot.litPosition = item && item.node ? item.node.position : null;
      this.plot.light(item || this.itemOf(this.selected), this.visible);
      if (this.options.onHover) this.options.onHover(item ? item.id : null);
    }

    hoverFromList(id) {
      for (const other of this.plot.layer.querySelectorAll(".is-pointed"))
        other.classList.remove("is-pointed");
      const item = this.itemOf(id);
      if (item) item.element.classList.add("is-pointed");
    }

    picked(item, event) {
      if (!item) {
        if (!event.shiftKey) this.select(null);
        return;
      }
      if (event.shiftKey && !item.group) this.mark(item.id);
      else this.select(item.id === this.selected ? null : item.id);
    }

    // -- pins, marks, groups -----------------------------------------------------------------

    pin(id) {
      if (!this.model.byId.has(id)) return;
      if (this.pins.has(id)) this.pins.delete(id);
      else this.pins.add(id);
      this.afterPins();
    }

    afterPins() {
      this.computeVisible();
      this.refresh();
      this.showSide();
      this.showChips();
      if (this.options.onPin) this.options.onPin([...this.pins]);
      this.changed();
    }

    mark(id) {
      if (!this.model.byId.has(id)) return;
      if (this.marks.has(id)) this.marks.delete(id);
      else this.marks.add(id);
      this.mirror();
      this.showSide();
      this.showChips();
    }

    group(ids, name) {
      const nodes = ids
        .map((id) => this.model.byId.get(id))
        .filter((node) => node && !this.groups.some((group) => group.nodes.includes(node)));
      if (nodes.length < 2) {
        this.tell("Mark at least two nodes that are in no group yet.");
        return null;
      }
      nodes.sort((a, b) => b.influence - a.influence);
      const key = "group:" + nodes[0].id;
      const label = (name || "").trim() || `Group ${this.groups.length + 1}`;
      this.groups.push({ key, name: label.slice(0, 60), nodes });
      this.marks.clear();
      this.afterGroups();
      this.select(key);
      this.plot.focus(this.itemOf(key)); // what had the focus may be inside now
      return key;
    }

    ungroup(key) {
      this.groups = this.groups.filter((group) => group.key !== key);
      if (this.selected === key) this.selected = null;
      this.afterGroups();
      this.showSide();
    }

    rename(key, name) {
      const group = this.groups.find((one) => one.key === key);
      if (group && name.trim()) group.name = name.trim().slice(0, 60);
      this.afterGroups();
    }

    afterGroups() {
      this.hover = null;
      this.plot.setGroups(this.groups);
      this.refresh();
      this.showChips();
      if (this.options.onGroup) this.options.onGroup(this.state().groups);
      this.changed();
    }

    showChips() {
      const chip = (label, kind, title, open, close) =>
        el("span", { class: "sag-chip", title },
          el("button", { type: "button", class: "sag-chip-name", onclick: open },
            sag.glyph(kind, 5), sag.bdi(label)),
          el("button", { type: "button", class: "sag-chip-x", "aria-label": "Remove " + title,
            onclick: close }, "×"));
      const parts = [];
      const nodes = (ids) => [...ids].map((id) => this.model.byId.get(id)).filter(Boolean);
      if (this.pins.size) {
        parts.push(el("div", { class: "sag-chip-row", "data-part": "pins" }, el("b", {}, "Pinned"),
          nodes(this.pins).map((node) => chip(this.model.name(node), node.kind,
            "pin " + sag.shown(node.id), () => this.select(node.id, true),
            () => this.pin(node.id)))));
      }
      if (this.groups.length) {
        parts.push(el("div", { class: "sag-chip-row", "data-part": "groups" }, el("b", {}, "Groups"),
          this.groups.map((group) => chip(sag.shown(group.name), "group",
            "group " + sag.shown(group.name), () => this.select(group.key, true),
            () => this.ungroup(group.key)))));
      }
      if (this.marks.size) {
        const field = el("input", { type: "text", placeholder: "name", maxlength: 60,
          "aria-label": "Name of the new group", "data-act": "group-name",
          onkeydown: (event) => {
            if (event.key === "Enter") this.group([...this.marks], field.value);
          } });
        parts.push(el("div", { class: "sag-chip-row", "data-part": "marks" }, el("b", {}, "Marked"),
          nodes(this.marks).map((node) => chip(this.model.name(node), node.kind,
            "mark " + sag.shown(node.id), () => this.select(node.id, true),
            () => this.mark(node.id))),
          field,
          el("button", { type: "button", class: "sag-button", "data-act": "group",
            onclick: () => this.group([...this.marks], field.value) }, "Group")));
      }
      this.chips.replaceChildren(...parts);
    }

    // -- keys --------------------------------------------------------------------------------

    key(event, item) {
      if (event.ctrlKey || event.metaKey || event.altKey) return;
      const act = {
        ArrowLeft: () => this.walk(item, event.key),
        ArrowRight: () => this.walk(item, event.key),
        ArrowUp: () => this.walk(item, event.key),
        ArrowDown: () => this.walk(item, event.key),
        Home: () => this.walkTo(this.plot.shownItems()[0]),
        Enter: () => item && this.select(item.id),
        " ": () => item && (event.shiftKey ? this.markItem(item) : this.select(item.id)),
        p: () => item && item.node && this.pin(item.id),
        m: () => item && this.markItem(item),
        g: () => this.marks.size && this.group([...this.marks], ""),
        c: () => item && item.node && this.copy(item.id),
        i: () => item && this.walkEdge(item, this.model.ins, this.model.source),
        o: () => item && this.walkEdge(item, this.model.outs, this.model.target),
        d: () => this.side.focus(),
        "+": () => this.plot.zoom(1.35),
        "=": () => this.plot.zoom(1.35),
        "-": () => this.plot.zoom(1 / 1.35),
        0: () => this.plot.fit(),
        "/": () => this.searchInput.focus(),
        "?": () => this.help(),
        Escape: () => this.escape(),
      }[event.key];
      if (!act) return;
      event.preventDefault();
      act();
    }

    escape() {
      if (this.marks.size && this.selected === null) {
        this.marks.clear();
        this.mirror();
        this.showChips();
      } else this.select(null);
      this.plot.hover(null);
    }

    markItem(item) {
      if (item.node) this.mark(item.id);
    }

    walk(item, key) {
      this.walkTo(this.plot.neighbour(item, key));
    }

    walkTo(item) {
      if (!item) return;
      this.plot.reveal(item);
      this.plot.focus(item);
      this.plot.hover(item, true);
    }

    /** To the strongest input or output that is shown. */
    walkEdge(item, lists, ends) {
      const nodes = item.group ? item.group.nodes : [item.node];
      let best = null;
      for (const node of nodes)
        for (const e of lists[node.index]) {
          const other = this.plot.itemOf(this.model.nodes[ends[e]]);
          if (!other.shown || other === item) continue;
          if (best === null || this.model.share[e] > this.model.share[best.e]) best = { e, other };
        }
      if (best) this.walkTo(best.other);
    }

    // -- search ------------------------------------------------------------------------------

    search() {
      const found = this.model.search(this.searchInput.value);
      const ids = new Set(found.map((node) => node.id));
      const any = this.searchInput.value.trim() !== "";
      this.plot.svg.classList.toggle("is-searching", any);
      for (const item of this.plot.items) {
        const hit = item.group
          ? item.group.nodes.some((node) => ids.has(node.id))
          : ids.has(item.id);
        item.element.classList.toggle("is-found", any && hit);
      }
      this.found = found.slice(0, 30);
      this.at = -1;
      this.results.replaceChildren(...this.found.map((node, i) =>
        el("li", { role: "option", id: `${this.results.id}-${i}`, "aria-selected": "false",
          onpointerdown: (event) => {
            event.preventDefault();
            this.take(i);
          } },
          sag.glyph(node.kind, 5.5), el("span", {}, sag.bdi(this.model.name(node))),
          el("small", {}, sag.bdi(sag.word(this.model.token(node.position))), ` ${node.position}`))));
      if (any && !found.length) this.results.append(el("li", { class: "is-none" }, "No node found"));
      if (found.length > this.found.length) {
        this.results.append(el("li", { class: "is-none" },
          `and ${found.length - this.found.length} more, marked in the picture`));
      }
      this.results.hidden = !any;
      this.searchInput.setAttribute("aria-expanded", String(any));
      this.say(any ? sag.count(found.length, "node") + " found" : "");
    }

    searchKey(event) {
      if (event.key === "ArrowDown" || event.key === "ArrowUp") {
        event.preventDefault();
        if (!this.found || !this.found.length) return;
        const n = this.found.length;
        this.at = (this.at + (event.key === "ArrowDown" ? 1 : this.at < 0 ? 0 : -1) + n) % n;
        [...this.results.children].forEach((child, i) => {
          child.setAttribute("aria-selected", String(i === this.at));
          if (i === this.at) child.scrollIntoView({ block: "nearest" });
        });
        this.searchInput.setAttribute("aria-activedescendant", `${this.results.id}-${this.at}`);
      } else if (event.key === "Enter") {
        if (this.found && this.found.length) this.take(Math.max(this.at, 0));
      } else if (event.key === "Escape") {
        event.preventDefault();
        this.searchInput.value = "";
        this.search();
        this.plot.focus(this.plot.current || this.plot.shownItems()[0]);
      }
    }

    take(i) {
      const node = this.found[i];
      this.results.hidden = true;
      this.searchInput.setAttribute("aria-expanded", "false");
      this.select(node.id, true);
      this.plot.focus(this.itemOf(node.id));
    }

    // -- small things ------------------------------------------------------------------------

    async copy(text) {
      const done = await sag.copy(text, this.root);
      this.tell(done ? `Copied ${sag.shown(text)}` : "The browser does not allow copying here.");
    }

    tell(text) {
      this.toast.textContent = text;
      this.toast.hidden = false;
      clearTimeout(this.toastTimer);
      this.toastTimer = setTimeout(() => (this.toast.hidden = true), 2500);
    }

    say(text) {
      this.live.textContent = text;
    }

    nextTheme() {
      const next = THEMES[(THEMES.indexOf(this.theme) + 1) % THEMES.length];
      this.setTheme(next, true);
    }

    setTheme(theme, keep = true) {
      this.theme = THEMES.includes(theme) ? theme : "auto";
      this.root.dataset.theme = this.theme;
      const names = { auto: "Auto", light: "Light", dark: "Dark" };
      if (this.themeButton) {
        this.themeButton.textContent = names[this.theme];
        this.themeButton.setAttribute("aria-label", `Colours: ${names[this.theme]}; change`);
      }
      if (keep) remember("theme", this.theme);
      this.plot.readColours();
    }

    help() {
      const keys = [
        ["← → ↑ ↓", "walk to the next node"],
        ["i, o", "walk to the strongest input, output"],
        ["Enter", "select; again for its details"],
        ["d", "go to the details"],
        ["p", "pin: keep whatever the filters say"],
        ["m, Shift click", "mark; then g to group"],
        ["c", "copy the node id"],
        ["/", "search"],
        ["+ − 0", "zoom, fit"],
        ["Esc", "let go of the selection"],
      ];
      const dialog = el("dialog", { class: "sag-help", "aria-label": "Keys" },
        el("h2", {}, "Keys"),
        el("dl", {}, keys.map(([key, what]) => [el("dt", {}, el("kbd", {}, key)), el("dd", {}, what)])),
        el("p", {}, "Drag to move, wheel to zoom, Shift and wheel to go sideways. A node's area is " +
          "its influence on the targets; an edge is as strong as the influence it carries. Solid " +
          "blue adds, dashed orange takes away."),
        el("form", { method: "dialog" }, el("button", { class: "sag-button" }, "Close")));
      dialog.addEventListener("close", () => dialog.remove());
      this.root.append(dialog);
      dialog.showModal();
    }

    // -- state -------------------------------------------------------------------------------

    state() {
      return {
        selected: this.selected,
        pins: [...this.pins],
        groups: this.groups.map(({ name, nodes }) => ({ name, members: nodes.map((n) => n.id) })),
        hidden: [...this.hiddenKinds],
        nodes: this.nodeShare,
        edges: this.edgeShare,
        compact: this.compact,
      };
    }

    /** From a file or an address, so nothing about it is taken on trust. */
    restore(state) {
      const given = state || { groups: this.model.graph.supernodes };
      if (typeof given !== "object") return;
      const known = (ids) =>
        (Array.isArray(ids) ? ids : []).filter((id) => this.model.byId.has(id));
      const share = (value, otherwise) =>
        typeof value === "number" && value >= 0 && value <= 1 ? value : otherwise;
      this.pins = new Set(known(given.pins));
      const taken = new Set();
      for (const group of Array.isArray(given.groups) ? given.groups : []) {
        if (!group || typeof group !== "object") continue;
        const ids = known(group.members).filter((id) => !taken.has(id));
        if (ids.length < 2) continue;
        for (const id of ids) taken.add(id);
        const nodes = ids.map((id) => this.model.byId.get(id));
        nodes.sort((a, b) => b.influence - a.influence);
        const name = String(group.name || "Group").slice(0, 60);
        this.groups.push({ key: "group:" + nodes[0].id, name, nodes });
      }
      this.hiddenKinds = new Set(
        (Array.isArray(given.hidden) ? given.hidden : []).filter((k) => this.model.kinds.includes(k))
      );
      this.nodeShare = share(given.nodes, this.nodeShare);
      this.edgeShare = share(given.edges, this.edgeShare);
      this.compact = given.compact === true;
      const groupKeys = this.groups.map((group) => group.key);
      if (this.model.byId.has(given.selected) || groupKeys.includes(given.selected))
        this.selected = given.selected;
    }

    changed() {
      if (this.options.onState) this.options.onState(this.state());
      if (!this.options.persist) return;
      clearTimeout(this.saving);
      this.saving = setTimeout(() => {
        try {
          history.replaceState(null, "", "#" + encodeURIComponent(JSON.stringify(this.state())));
        } catch {
          /* some frames refuse */
        }
      }, 200);
    }

    handle() {
      const page = this;
      return {
        get model() {
          return page.model;
        },
        timing: this.timing,
        select: (id) => this.select(id, true),
        pin: (id) => this.pin(id),
        group: (ids, name) => this.group(ids, name),
        ungroup: (key) => this.ungroup(key),
        setFilters: ({ nodes, edges }) => {
          if (nodes !== undefined) this.nodeShare = nodes;
          if (edges !== undefined) this.edgeShare = edges;
          this.nodeSlider.input.value = 100 * this.nodeShare;
          this.edgeSlider.input.value = 100 * this.edgeShare;
          this.filter();
        },
        setData: (data, state) => {
          this.load(data, state || null);
          this.setTheme(this.theme, false);
        },
        setTheme: (theme) => this.setTheme(theme),
        state: () => this.state(),
        fit: () => this.plot.fit(),
        destroy: () => {
          this.media.removeEventListener("change", this.onMedia);
          clearTimeout(this.saving);
          clearTimeout(this.toastTimer);
          this.plot.destroy();
          this.root.remove();
        },
      };
    }
  }

  const icon = (label, text, act) =>
    el("button", { type: "button", class: "sag-button sag-icon", "aria-label": label, title: label,
      onclick: act }, text);

  /** After the next frame is on the screen. */
  function painted(then) {
    requestAnimationFrame(() => requestAnimationFrame(() => setTimeout(then)));
  }

  let counter = 0;
  const unique = (name) => `sag-${name}-${++counter}`;

  function readAddress() {
    try {
      return location.hash ? JSON.parse(decodeURIComponent(location.hash.slice(1))) : null;
    } catch {
      return null;
    }
  }
})((window.SaeAttnGraph = window.SaeAttnGraph || {}));
