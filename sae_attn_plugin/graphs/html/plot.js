/* The picture: edges on canvas, nodes as SVG (so that they can be focused), labels above. */
(function (sag) {
  "use strict";

  const { el, svg } = sag;
  const MARGIN = { left: 58, right: 14, top: 24, bottom: 58 };
  const WAIT = 110; // ms a pointer rests on a node before its card shows
  const MOST_LIT = 300;

  const point = (angle, radius) => [radius * Math.sin(angle), -radius * Math.cos(angle)];
  const polygon = (n, turn = 0, radius = 1) =>
    Array.from({ length: n }, (_, i) => point(turn + (2 * Math.PI * i) / n, radius));
  const closed = (points) => "M" + points.map((p) => p.map((c) => c.toFixed(3)).join()).join("L") + "Z";
  const DISC = "M-1,0A1,1,0,1,1,1,0A1,1,0,1,1,-1,0Z";
  const ARM = 0.38;
  const GLYPHS = {
    triangle: closed(polygon(3, 0, 1.22)),
    circle: DISC,
    disc: DISC,
    hexagon: closed(polygon(6, Math.PI / 6, 1.12)),
    diamond: closed(polygon(4, 0, 1.1)),
    square: "M-.88,-.88H.88V.88H-.88Z",
    pentagon: closed(polygon(5, 0, 1.1)),
    cross: closed(
      [[-1, -1 + ARM], [-1 + ARM, -1], [0, -ARM], [1 - ARM, -1], [1, -1 + ARM], [ARM, 0],
       [1, 1 - ARM], [1 - ARM, 1], [0, ARM], [-1 + ARM, 1], [-1, 1 - ARM], [-ARM, 0]]
    ),
    star: closed(polygon(10).map((_, i) => point((Math.PI * i) / 5, i % 2 ? 0.55 : 1.35))),
    group: "M-1.5,-.6Q-1.5,-1,-1.1,-1H1.1Q1.5,-1,1.5,-.6V.6Q1.5,1,1.1,1H-1.1Q-1.5,1,-1.5,.6Z",
  };
  sag.glyph = function (kind, size = 7) {
    const [shape, colour] = kind === "group" ? ["group", "group"] : sag.kind(kind);
    return svg(
      "svg",
      { class: "sag-glyph", width: 2 * size + 4, height: 2 * size + 2, "aria-hidden": "true",
        viewBox: "-1.6 -1.4 3.2 2.8" },
      svg("path", { d: GLYPHS[shape], class: "sag-fill-" + colour })
    );
  };

  class Plot {
    /** `hooks`: `hover(item)`, `pick(item, event)`, `card(item)`, `key(event, item)`, `resized()`. */
    constructor(root, model, hooks) {
      this.model = model;
      this.hooks = hooks;
      this.root = root;
      this.items = model.nodes.map((node) => ({ node, id: node.id, index: node.index }));
      this.owner = this.items.map((item) => item);
      this.view = { k: 1, x: 0, y: 0 };
      this.lit = [];
      this.edges = [];
      this.state = { focus: null, selected: null };
      this.build();
      this.readColours();
      this.observer = new ResizeObserver(() => this.resize());
      this.observer.observe(this.box);
    }

    build() {
      this.back = el("canvas", { class: "sag-canvas", "aria-hidden": "true" });
      this.links = el("canvas", { class: "sag-canvas", "aria-hidden": "true" });
      this.front = el("canvas", { class: "sag-canvas sag-front", "aria-hidden": "true" });
      this.layer = svg("g", {});
      this.svg = svg("svg", { class: "sag-nodes", role: "group" }, this.layer);
      this.rowsBox = el("div", { class: "sag-rows", "aria-hidden": "true" });
      this.tokensBox = el("div", { class: "sag-tokens", role: "list", "aria-label": "Prompt tokens" });
      this.card = el("div", { class: "sag-card", role: "tooltip", hidden: true });
      this.box = el("div", { class: "sag-plot" }, this.back, this.links, this.svg, this.front,
        this.rowsBox, this.tokensBox, this.card);
      this.root.append(this.box);
      for (const item of this.items) this.layer.append(this.nodeElement(item));
      this.tokenElements = this.model.tokens.map((token, position) => {
        const word = el("bdi", {}, sag.short(sag.word(token), 14));
        const node = el("div", { class: "sag-token", role: "listitem",
          title: `position ${position}: ${sag.quoted(token)}` }, word, el("small", {}, position));
        this.tokensBox.append(node);
        return node;
      });
      this.listen();
    }

    nodeElement(item) {
      const [shape, colour] = item.group ? ["group", "group"] : sag.kind(item.node.kind);
      const asked = !item.group && this.model.isAsked(item.node);
      const size = item.group
        ? Math.max(...item.group.nodes.map((node) => node.influence)) / this.model.largest
        : item.node.influence / this.model.largest;
      item.radius = item.group ? 10 : asked ? 10.5 : 3.6 + 8.2 * Math.sqrt(Math.min(size, 1));
      item.path = svg("path", { d: GLYPHS[shape], class: "sag-fill-" + colour });
      item.element = svg("g",
        { class: "sag-node" + (asked ? " is-target" : ""), tabindex: "-1", role: "button",
          "data-id": item.id, "data-kind": item.group ? "group" : item.node.kind,
          "aria-label": this.describe(item) },
        item.path);
      item.element.sagItem = item;
      return item.element;
    }

    describe(item) {
      if (item.group) {
        return `Group ${sag.shown(item.group.name)}, ${sag.count(item.group.nodes.length, "node")}`;
      }
      const node = item.node;
      const parts = [this.model.name(node), this.model.place(node)];
      if (node.activation !== undefined && node.activation !== null)
        parts.push(`activation ${sag.number(node.activation)}`);
      if (sag.isTarget(node) && node.pre_activation !== undefined)
        parts.push(`value ${sag.number(node.pre_activation)}`);
      else parts.push(`influence ${sag.percent(node.influence)}`);
      return parts.join(", ");
    }

    // -- input -------------------------------------------------------------------------------

    listen() {
      const itemAt = (target) => {
        const node = target instanceof Element ? target.closest(".sag-node") : null;
        return node ? node.sagItem : null;
      };
      this.svg.addEventListener("pointerover", (event) => {
        const item = itemAt(event.target);
        if (item && !this.drag) this.hover(item);
      });
      this.svg.addEventListener("pointerout", (event) => {
        if (itemAt(event.target) && !itemAt(event.relatedTarget)) this.hover(null);
      });
      this.svg.addEventListener("pointerdown", (event) => {
        if (event.button !== 0) return;
        this.drag = { x: event.clientX, y: event.clientY, moved: false, item: itemAt(event.target) };
        try {
          this.svg.setPointerCapture(event.pointerId);
        } catch {
          /* a pointer that is gone already */
        }
      });
      this.svg.addEventListener("pointermove", (event) => {
        const drag = this.drag;
        if (!drag) return;
        const [dx, dy] = [event.clientX - drag.x, event.clientY - drag.y];
        if (!drag.moved && Math.hypot(dx, dy) < 4) return;
        drag.moved = true;
        drag.x = event.clientX;
        drag.y = event.clientY;
        this.hover(null);
        this.box.classList.add("is-panning");
        this.pan(dx, dy);
      });
      const end = (event) => {
        const drag = this.drag;
        this.drag = null;
        this.box.classList.remove("is-panning");
        if (drag && !drag.moved && event.type === "pointerup") {
          if (drag.item) this.focus(drag.item);
          this.hooks.pick(drag.item, event);
        }
      };
      this.svg.addEventListener("pointerup", end);
      this.svg.addEventListener("pointercancel", end);
      this.box.addEventListener("wheel", (event) => {
        event.preventDefault();
        const box = this.box.getBoundingClientRect();
        const step = event.deltaMode === 1 ? 18 * event.deltaY : event.deltaY;
        if (event.shiftKey || Math.abs(event.deltaX) > Math.abs(event.deltaY)) {
          this.pan(event.shiftKey ? -step : -event.deltaX, 0);
        } else {
          this.zoom(Math.exp(-step / 420), event.clientX - box.left, event.clientY - box.top);
        }
      }, { passive: false });
      this.svg.addEventListener("focusin", (event) => {
        const item = itemAt(event.target);
        if (!item) return;
        this.current = item;
        for (const other of this.layer.querySelectorAll('[tabindex="0"]'))
          other.setAttribute("tabindex", "-1");
        item.element.setAttribute("tabindex", "0");
        if (item.element.matches(":focus-visible")) this.hover(item, true);
      });
      this.svg.addEventListener("focusout", () => this.hover(null));
      this.svg.addEventListener("keydown", (event) => this.hooks.key(event, itemAt(event.target)));
    }

    hover(item, now = false) {
      if (this.hovered === item) return;
      this.hovered = item;
      clearTimeout(this.timer);
      this.card.hidden = true;
      if (item) this.timer = setTimeout(() => this.showCard(item), now ? 0 : WAIT);
      this.hooks.hover(item);
    }

    showCard(item) {
      this.card.replaceChildren(...this.hooks.card(item));
      this.card.hidden = false;
      const [x, y] = this.screen(item);
      const { offsetWidth: w, offsetHeight: h } = this.card;
      const gap = this.glyphSize(item) + 10;
      const left = x + gap + w < this.width ? x + gap : x - gap - w;
      this.card.style.left = Math.max(4, left) + "px";
      this.card.style.top = Math.max(4, Math.min(y - h / 2, this.height - h - 4)) + "px";
    }

    focus(item) {
      if (item && item.element.isConnected) item.element.focus({ preventScroll: true });
    }

    /** The nearest visible item in a direction: along the row, or in the next row. */
    neighbour(item, key) {
      const items = this.shownItems();
      if (!item) return items[0] || null;
      const sideways = key === "ArrowLeft" || key === "ArrowRight";
      const sign = key === "ArrowRight" || key === "ArrowDown" ? 1 : -1;
      let best = null;
      let cost = Infinity;
      for (const other of items) {
        if (other === item) continue;
        const [dx, dy] = [other.x - item.x, other.y - item.y];
        const [ahead, aside] = sideways ? [sign * dx, Math.abs(dy)] : [sign * dy, Math.abs(dx)];
        if (ahead <= 0.5) continue;
        if (sideways && aside > 14) continue; // stay in the line
        const price = sideways ? ahead : ahead * 3 + aside;
        if (price < cost) [best, cost] = [other, price];
      }
      if (best || !sideways) return best;
      for (const other of items) { // no more in this line: the nearest anywhere to that side
        const ahead = sign * (other.x - item.x);
        const price = ahead + 2 * Math.abs(other.y - item.y);
        if (ahead > 0.5 && price < cost) [best, cost] = [other, price];
      }
      return best;
    }

    // -- view --------------------------------------------------------------------------------

    resize() {
      const { clientWidth: w, clientHeight: h } = this.box;
      if (!w || !h || (w === this.width && h === this.height)) return;
      this.width = w;
      this.height = h;
      this.ratio = Math.min(window.devicePixelRatio || 1, 2);
      for (const canvas of [this.back, this.links, this.front]) {
        canvas.width = Math.round(w * this.ratio);
        canvas.height = Math.round(h * this.ratio);
      }
      this.hooks.resized();
    }

    arrange(mask) {
      const inner = [this.width - MARGIN.left - MARGIN.right, this.height - MARGIN.top - MARGIN.bottom];
      this.plan = sag.layout(this.model, mask, Math.max(inner[0], 80), Math.max(inner[1], 80));
      for (const item of this.items) {
        if (item.group) continue;
        item.x = this.plan.x[item.index];
        item.y = this.plan.y[item.index];
      }
      this.placeGroups();
      this.rowElements = this.plan.rows.map((row) => el("div", { class: "sag-row" }, row.name));
      this.rowsBox.replaceChildren(...this.rowElements);
      this.fit();
    }

    fit() {
      const w = this.width - MARGIN.left - MARGIN.right;
      const h = this.height - MARGIN.top - MARGIN.bottom;
      const k = Math.min(w / this.plan.width, h / this.plan.height, 1.25);
      this.least = Math.min(k, 1) * 0.7;
      this.view.k = k;
      this.view.x = MARGIN.left + (w - k * this.plan.width) / 2;
      this.view.y = MARGIN.top + (h - k * this.plan.height) / 2;
      this.redraw();
    }

    zoom(factor, x = this.width / 2, y = this.height / 2) {
      const k = Math.max(this.least, Math.min(6, this.view.k * factor));
      const by = k / this.view.k;
      this.view.x = x - (x - this.view.x) * by;
      this.view.y = y - (y - this.view.y) * by;
      this.view.k = k;
      this.clampView();
      this.redraw();
    }

    pan(dx, dy) {
      this.view.x += dx;
      this.view.y += dy;
      this.clampView();
      this.redraw();
    }

    clampView() {
      const [w, h] = [this.plan.width * this.view.k, this.plan.height * this.view.k];
      this.view.x = Math.max(80 - w, Math.min(this.width - 80, this.view.x));
      this.view.y = Math.max(60 - h, Math.min(this.height - 60, this.view.y));
    }

    /** Bring an item into view. */
    reveal(item) {
      const [x, y] = this.screen(item);
      const right = this.width - MARGIN.right;
      const bottom = this.height - MARGIN.bottom;
      if (x > MARGIN.left && x < right && y > MARGIN.top && y < bottom) return;
      this.view.x += this.width / 2 - x;
      this.view.y += this.height / 2 - y;
      this.clampView();
      this.redraw();
    }

    screen(item) {
      return [item.x * this.view.k + this.view.x, item.y * this.view.k + this.view.y];
    }

    glyphSize(item) {
      return item.radius * Math.max(0.6, Math.min(this.view.k, 1.7));
    }

    // -- groups ------------------------------------------------------------------------------

    setGroups(groups) {
      for (const item of this.items.slice(this.model.nodes.length)) item.element.remove();
      this.items.length = this.model.nodes.length;
      this.owner = this.items.slice();
      for (const group of groups) {
        const item = { group, id: group.key, index: this.items.length };
        for (const node of group.nodes) this.owner[node.index] = item;
        this.layer.append(this.nodeElement(item));
        this.items.push(item);
      }
      this.placeGroups();
    }

    placeGroups() {
      for (const item of this.items) {
        if (!item.group || !this.plan) continue;
        const nodes = [...item.group.nodes].sort((a, b) => b.influence - a.influence);
        const seat = nodes.find((node) => this.plan.x[node.index]) || nodes[0];
        item.x = this.plan.x[seat.index];
        item.y = this.plan.y[seat.index];
      }
    }

    /** What is drawn for a node: itself, or its group. */
    itemOf(node) {
      return this.owner[node.index];
    }

    shownItems() {
      return this.items.filter((item) => item.shown);
    }

    // -- drawing -----------------------------------------------------------------------------

    /** `visible` per node, `edges` strongest first; edges of a group are added up. */
    show(visible, edges) {
      for (const item of this.items) {
        item.shown = item.group
          ? item.group.nodes.some((node) => visible[node.index])
          : Boolean(visible[item.index]) && this.owner[item.index] === item;
      }
      for (const item of this.items) item.element.classList.toggle("is-out", !item.shown);
      this.edges = this.gather(edges);
      this.strongest = this.edges.reduce((most, edge) => Math.max(most, edge.flow), 0) || 1;
      this.redraw();
    }

    gather(edges) {
      const { source, target, flow, weight, share } = this.model;
      const single = this.items.length === this.model.nodes.length;
      if (single) {
        return Array.from(edges, (e) => ({
          a: this.items[source[e]], b: this.items[target[e]], flow: flow[e], share: share[e],
          sign: weight[e] < 0 ? -1 : 1, e,
        }));
      }
      const sums = new Map();
      for (const e of edges) {
        const [a, b] = [this.owner[source[e]], this.owner[target[e]]];
        if (a === b) continue;
        const key = a.index * this.items.length + b.index;
        const edge = sums.get(key) || { a, b, flow: 0, net: 0, share: 0, e, count: 0 };
        edge.flow += flow[e];
        edge.net += Math.sign(weight[e]) * flow[e];
        edge.share = Math.max(edge.share, share[e]);
        edge.count++;
        sums.set(key, edge);
      }
      return [...sums.values()].map((edge) => ({ ...edge, sign: edge.net < 0 ? -1 : 1 }));
    }

    /** Light the edges of one item, and dim the rest. */
    light(item, visible) {
      this.focusItem = item;
      this.lit = [];
      if (item) {
        const nodes = item.group ? item.group.nodes : [item.node];
        const mine = [];
        for (const node of nodes)
          for (const list of [this.model.ins, this.model.outs])
            for (const e of list[node.index])
              if (visible[this.model.source[e]] && visible[this.model.target[e]]) mine.push(e);
        mine.sort((a, b) => this.model.share[b] - this.model.share[a]);
        this.lit = this.gather(mine.slice(0, MOST_LIT));
      }
      const near = new Set(this.lit.flatMap((edge) => [edge.a, edge.b]));
      if (item) near.add(item);
      this.svg.classList.toggle("has-focus", Boolean(item));
      for (const other of this.items) other.element.classList.toggle("is-near", near.has(other));
      this.redraw();
    }

    redraw() {
      if (this.queued || !this.plan || !this.width) return;
      this.queued = true;
      requestAnimationFrame(() => {
        this.queued = false;
        this.draw();
      });
    }

    draw() {
      if (!this.plan || !this.width) return;
      const { k, x, y } = this.view;
      this.layer.setAttribute("transform", `translate(${x.toFixed(2)},${y.toFixed(2)}) scale(${k})`);
      for (const item of this.items) {
        if (!item.shown) continue;
        const size = this.glyphSize(item) / k;
        const place = `translate(${item.x.toFixed(1)},${item.y.toFixed(1)}) scale(${size.toFixed(3)})`;
        if (item.drawn !== place) item.element.setAttribute("transform", (item.drawn = place));
      }
      this.drawRows();
      this.drawTokens();
      this.drawEdges();
      this.drawLabels();
    }

    clear(canvas) {
      const context = canvas.getContext("2d");
      context.setTransform(this.ratio, 0, 0, this.ratio, 0, 0);
      context.clearRect(0, 0, this.width, this.height);
      return context;
    }

    drawRows() {
      const context = this.clear(this.back);
      const { k, x, y } = this.view;
      const left = Math.max(MARGIN.left - 4, 0);
      this.plan.rows.forEach((row, i) => {
        const top = row.y * k + y;
        context.fillStyle = this.colours.band;
        context.beginPath();
        context.roundRect(left, top + 3, this.width - left - 8, row.size * k - 6, 6);
        context.fill();
        const label = this.rowElements[i];
        label.style.transform = `translateY(${(row.middle * k + y).toFixed(1)}px) translateY(-50%)`;
        label.classList.toggle("is-out", row.size * k < 11);
      });
      context.strokeStyle = this.colours.guide;
      context.lineWidth = 1;
      context.beginPath();
      for (const column of this.plan.columns) {
        if (!column.filled) continue;
        const at = Math.round(column.middle * k + x) + 0.5;
        if (at < left) continue;
        context.moveTo(at, y);
        context.lineTo(at, this.height - MARGIN.bottom + 4);
      }
      context.stroke();
    }

    drawTokens() {
      const { k, x } = this.view;
      if (this.tokenWidths === undefined) {
        this.tokenWidths = this.tokenElements.map((node) => node.firstChild.offsetWidth);
      }
      const filled = this.plan.columns.filter((column) => column.filled);
      const tight = filled.some((column, i) => {
        const next = filled[i + 1];
        const both = next && (this.tokenWidths[column.position] + this.tokenWidths[next.position]) / 2;
        return next && both + 3 > (next.middle - column.middle) * k;
      });
      this.tokensBox.classList.toggle("is-steep", tight);
      let free = -Infinity;
      this.plan.columns.forEach((column, i) => {
        const node = this.tokenElements[i];
        if (!node) return;
        const at = column.middle * k + x;
        const wide = tight ? 11 : (this.tokenWidths[i] || 10) + 6;
        const room = at - wide / 2 > free || this.litPosition === i || (column.filled && !tight);
        const out = at < MARGIN.left - 6 || at > this.width - 4 || !room;
        if (!out) free = at + wide / 2;
        node.classList.toggle("is-out", out);
        node.classList.toggle("is-used", column.filled);
        node.classList.toggle("is-lit", this.litPosition === i);
        node.style.transform = `translateX(${at.toFixed(1)}px) translateX(-50%)`;
      });
    }

    curve(context, edge) {
      const { k, x, y } = this.view;
      const x0 = edge.a.x * k + x;
      const y0 = edge.a.y * k + y;
      const x1 = edge.b.x * k + x;
      const y1 = edge.b.y * k + y;
      const rise = 0.45 * (y1 - y0);
      // upright edges bow out, round what lies between
      const bow = Math.abs(x1 - x0) < 12 && Math.abs(y1 - y0) > 60 ? 0.1 * (y1 - y0) : 0;
      context.moveTo(x0, y0);
      context.bezierCurveTo(x0 + bow, y0 + rise, x1 + bow, y1 - rise, x1, y1);
      return [(x0 + x1) / 2 + 0.75 * bow, (y0 + y1) / 2];
    }

    /** Strokes of like look are one path: a few dozen strokes, however many edges. */
    stroke(context, edges, look) {
      const bins = new Map();
      for (const edge of edges) {
        const [width, alpha] = look(edge);
        const w = Math.max(1, Math.round(width * 2));
        const a = Math.max(1, Math.round(alpha * 10));
        const key = `${edge.sign},${w},${a}`;
        if (!bins.has(key)) bins.set(key, { sign: edge.sign, w: w / 2, a: a / 10, edges: [] });
        bins.get(key).edges.push(edge);
      }
      for (const bin of [...bins.values()].sort((p, q) => p.a - q.a)) {
        context.beginPath();
        for (const edge of bin.edges) this.curve(context, edge);
        context.strokeStyle = bin.sign < 0 ? this.colours.neg : this.colours.pos;
        context.globalAlpha = bin.a;
        context.lineWidth = bin.w;
        context.setLineDash(bin.sign < 0 ? [5 + bin.w, 3 + bin.w * 0.6] : []);
        context.stroke();
      }
      context.globalAlpha = 1;
      context.setLineDash([]);
    }

    drawEdges() {
      const context = this.clear(this.links);
      context.save();
      context.beginPath();
      context.rect(MARGIN.left - 4, 0, this.width, this.height - MARGIN.bottom + 6);
      context.clip();
      const dim = this.focusItem ? 0.28 : 1;
      this.stroke(context, this.edges, (edge) => {
        const part = Math.sqrt(edge.flow / this.strongest);
        return [0.5 + 3.6 * part, (0.1 + 0.75 * part) * dim];
      });
      if (this.focusItem) {
        const most = this.lit.reduce((top, edge) => Math.max(top, edge.share), 0) || 1;
        this.stroke(context, this.lit, (edge) => {
          const part = Math.sqrt(edge.share / most);
          return [0.8 + 4 * part, 0.25 + 0.75 * part];
        });
        this.drawHeads(context, most);
      }
      context.restore();
    }

    /** The head that carries most of a lit edge, on the edge. */
    drawHeads(context, most) {
      const named = this.lit
        .filter((edge) => edge.share > 0.12 * most && !edge.count && this.model.heads[edge.e])
        .sort((a, b) => b.share - a.share)
        .slice(0, 24);
      context.font = `600 10px ${this.font}`;
      context.textAlign = "center";
      context.textBaseline = "middle";
      const taken = [];
      for (const edge of named) {
        const head = this.model.topHead(edge.e);
        context.beginPath();
        let [x, y] = this.curve(context, edge);
        for (let i = 0; i < 4 && taken.some(([a, b]) => Math.hypot(a - x, b - y) < 21); i++) {
          y += 15;
        }
        if (taken.some(([a, b]) => Math.hypot(a - x, b - y) < 21)) continue;
        taken.push([x, y]);
        context.beginPath();
        polygon(6, Math.PI / 6, 12).forEach(([dx, dy], i) => {
          if (i) context.lineTo(x + dx * 1.1, y + dy * 0.85);
          else context.moveTo(x + dx * 1.1, y + dy * 0.85);
        });
        context.closePath();
        context.fillStyle = this.colours.paper;
        context.fill();
        context.lineWidth = 1.4;
        context.strokeStyle = edge.sign < 0 ? this.colours.neg : this.colours.pos;
        context.stroke();
        context.fillStyle = this.colours.ink;
        context.fillText(head, x, y + 0.5);
      }
    }

    drawLabels() {
      const context = this.clear(this.front);
      context.save();
      context.beginPath();
      context.rect(MARGIN.left - 4, 0, this.width, this.height - MARGIN.bottom + 6);
      context.clip();
      context.textAlign = "center";
      context.textBaseline = "top";
      context.direction = "ltr";
      context.lineJoin = "round";
      const boxes = [];
      const bodies = [];
      const shown = this.shownItems();
      for (const item of shown) {
        const [x, y] = this.screen(item);
        if (x < 0 || x > this.width || y < 0 || y > this.height) continue;
        bodies.push([x, y, this.glyphSize(item) + 1, item]);
      }
      const rank = (item) =>
        item.element.matches(".is-selected, .is-pinned, .is-target, .is-marked") || item.group
          ? 0
          : this.focusItem && item.element.matches(".is-near") ? 1 : 2;
      const order = bodies
        .map((body) => [rank(body[3]), body])
        .sort(([p, a], [q, b]) => p - q || influence(b[3]) - influence(a[3]));
      let drawn = 0;
      for (const [level, [x, y, r, item]] of order) {
        if (drawn > 140 || (this.focusItem && level > 1)) break;
        const text = item.group
          ? sag.short(sag.shown(item.group.name), 24)
          : this.model.mark(item.node);
        if (!text) continue;
        const big = item.group || (!item.group && sag.isTarget(item.node));
        context.font = `${big ? "600 12px" : "10px"} ${this.font}`;
        const half = context.measureText(text).width / 2 + 2;
        const above = big && !item.group;
        const top = above ? y - r - 17 : y + r + 1.5;
        const middle = Math.max(MARGIN.left + half, Math.min(this.width - half - 4, x));
        const box = [middle - half, top, middle + half, top + (big ? 14 : 11)];
        const hits =
          boxes.some((other) => overlap(box, other)) ||
          (level > 0 &&
            bodies.some(
              ([bx, by, br, other]) =>
                other !== item && overlap(box, [bx - br, by - br, bx + br, by + br])
            ));
        if (hits && level > 0) continue;
        boxes.push(box);
        drawn++;
        context.strokeStyle = this.colours.paper;
        context.globalAlpha = 0.85;
        context.lineWidth = 3;
        context.strokeText(text, middle, top);
        context.globalAlpha = 1;
        context.fillStyle = big ? this.colours.ink : this.colours.soft;
        context.fillText(text, middle, top);
      }
      context.restore();
    }

    readColours() {
      const style = getComputedStyle(this.box);
      const read = (name) => style.getPropertyValue("--sag-" + name).trim();
      this.colours = Object.fromEntries(
        ["paper", "ink", "soft", "band", "guide", "pos", "neg"].map((name) => [name, read(name)])
      );
      this.font = style.fontFamily;
      this.redraw();
    }

    destroy() {
      clearTimeout(this.timer);
      this.observer.disconnect();
      this.box.remove();
    }
  }

  const influence = (item) => (item.group ? item.group.nodes[0].influence : item.node.influence);
  const overlap = (a, b) => a[0] < b[2] && b[0] < a[2] && a[1] < b[3] && b[1] < a[3];

  sag.Plot = Plot;
})((window.SaeAttnGraph = window.SaeAttnGraph || {}));
