/* The graph as arrays, what the filters leave of it, and groups of nodes. */
(function (sag) {
  "use strict";

  const TARGETS = new Set(["logit", "logit_diff", "direction", "score"]);

  /** kind -> [glyph, colour variable, name, name of many]; the order is that of the legend. */
  const KINDS = {
    attn: ["triangle", "attn", "attention feature", "attention features"],
    tc: ["circle", "tc", "transcoder feature", "transcoder features"],
    mlp_sae: ["circle", "tc", "MLP feature", "MLP features"],
    resid: ["hexagon", "resid", "residual feature", "residual features"],
    resid_mid: ["hexagon", "resid", "residual feature at an MLP", "residual features at MLPs"],
    head: ["hexagon", "head", "head without SAE", "heads without SAE"],
    attn_err: ["cross", "err", "attention error", "attention errors"],
    tc_err: ["cross", "mlp", "transcoder error", "transcoder errors"],
    attn_bias: ["diamond", "bias", "attention bias", "attention biases"],
    tc_bias: ["diamond", "bias", "transcoder bias", "transcoder biases"],
    mlp_sae_err: ["cross", "mlp", "MLP error", "MLP errors"],
    mlp_sae_bias: ["diamond", "bias", "MLP bias", "MLP biases"],
    resid_err: ["cross", "resid", "residual error", "residual errors"],
    resid_bias: ["diamond", "bias", "residual bias", "residual biases"],
    resid_mid_err: ["cross", "resid", "residual error at an MLP", "residual errors at MLPs"],
    resid_mid_bias: ["diamond", "bias", "residual bias at an MLP", "residual biases at MLPs"],
    tc_skip: ["square", "mlp", "transcoder skip", "transcoder skips"],
    mlp: ["square", "mlp", "MLP", "MLPs"],
    super: ["group", "group", "supernode", "supernodes"],
    embed: ["disc", "embed", "token embedding", "token embeddings"],
    pos: ["pentagon", "pos", "position embedding", "position embeddings"],
    logit: ["star", "target", "logit", "logits"],
    logit_diff: ["star", "target", "logit difference", "logit differences"],
    direction: ["star", "target", "direction", "directions"],
    score: ["star", "target", "attention score", "attention scores"],
  };
  sag.kind = (kind) => KINDS[kind] || ["square", "bias", kind, kind];
  sag.kindOrder = (kind) => {
    const at = Object.keys(KINDS).indexOf(kind);
    return at < 0 ? 99 : at;
  };
  sag.isTarget = (node) => TARGETS.has(node.kind);

  class Model {
    /** `data` as docs/page.md describes it. */
    constructor(data) {
      this.data = data;
      this.graph = data.graph || {};
      this.tokens = this.graph.tokens || [];
      this.asked = new Set(this.graph.targets || []);
      this.nodes = data.nodes.map((node, index) => ({ influence: 0, ...node, index }));
      this.byId = new Map(this.nodes.map((node) => [node.id, node]));
      const edges = data.edges;
      const n = edges.length;
      this.source = Int32Array.from(edges, (edge) => edge[0]);
      this.target = Int32Array.from(edges, (edge) => edge[1]);
      this.weight = Float64Array.from(edges, (edge) => edge[2]);
      this.share = Float64Array.from(edges, (edge) => edge[3]);
      this.heads = edges.map((edge) => edge[4] || null);
      this.flow = Float64Array.from(this.share, (share, e) => {
        return share * (this.nodes[this.target[e]].influence || 0);
      });
      // strongest first, so that a filter is a prefix
      this.edgeOrder = Uint32Array.from({ length: n }, (_, e) => e).sort(
        (a, b) => this.flow[b] - this.flow[a] || a - b
      );
      this.nodeOrder = this.nodes
        .map((node) => node.index)
        .sort((a, b) => this.nodes[b].influence - this.nodes[a].influence || a - b);
      this.ins = this.nodes.map(() => []);
      this.outs = this.nodes.map(() => []);
      for (let e = 0; e < n; e++) {
        this.ins[this.target[e]].push(e);
        this.outs[this.source[e]].push(e);
      }
      for (const edgesOf of [this.ins, this.outs])
        for (const list of edgesOf) list.sort((a, b) => this.size(b) - this.size(a) || a - b);
      this.kinds = [...new Set(this.nodes.map((node) => node.kind))].sort(
        (a, b) => sag.kindOrder(a) - sag.kindOrder(b)
      );
      this.rows = [...new Map(this.nodes.map((node) => [this.rowKey(node), this.row(node)]))]
        .map(([key, row]) => ({ key, ...row }))
        .sort((a, b) => a.order - b.order);
      const inner = this.nodes.filter((node) => !this.isAsked(node));
      this.largest = inner.reduce((most, node) => Math.max(most, node.influence), 0) || 1;
    }

    size(e) {
      return Math.abs(this.weight[e]);
    }

    isAsked(node) {
      return this.asked.has(node.id) || sag.isTarget(node);
    }

    rowKey(node) {
      return String(this.row(node).order);
    }

    /** Tokens below, layers upward, MLPs above their layer's attention, targets on top. */
    row(node) {
      if (sag.isTarget(node)) return { order: 1e6, name: "output" };
      if (node.layer === null || node.layer === undefined) return { order: -1, name: "tokens" };
      const rows = [" resid", " attn", " mid", " MLP"];
      let place = /^(mlp|tc)/.test(node.kind) ? 3 : 1;
      if (node.kind.startsWith("resid")) place = node.kind.startsWith("resid_mid") ? 2 : 0;
      return { order: 4 * node.layer + place, name: node.layer + rows[place] };
    }

    token(position) {
      return this.tokens[position] === undefined ? "" : this.tokens[position];
    }

    /** The head that carries most of an edge, and its part. */
    topHead(e) {
      const heads = this.heads[e];
      if (!heads) return null;
      let best = null;
      for (const key of Object.keys(heads))
        if (best === null || Math.abs(heads[key]) > Math.abs(heads[best])) best = key;
      return best;
    }

    // -- names -------------------------------------------------------------------------------

    name(node) {
      if (node.label && !sag.isTarget(node)) return sag.shown(node.label);
      return this.plainName(node);
    }

    plainName(node) {
      switch (node.kind) {
        case "attn":
          return `Feature ${node.layer} / ${node.feature}`;
        case "tc":
        case "mlp_sae":
          return `MLP feature ${node.layer} / ${node.feature}`;
        case "resid":
          return `Residual feature ${node.layer} / ${node.feature}`;
        case "resid_mid":
          return `Residual feature before MLP ${node.layer} / ${node.feature}`;
        case "head":
          return `Head ${node.layer}.${node.head}`;
        case "embed":
          return `Token ${sag.quoted(this.token(node.position))}`;
        case "pos":
          return `Position ${node.position}`;
        case "logit":
          return `Logit ${sag.shown(node.title || node.id)}`;
        case "logit_diff":
          return `Logit difference ${sag.shown(node.title || node.id)}`;
        case "score":
          return `Attention score, ${sag.shown(node.title || node.id)}`;
        case "direction":
          return `Direction ${sag.shown(node.title || node.id)}`;
        default: {
          const name = sag.kind(node.kind)[2];
          const layer = node.layer === null || node.layer === undefined ? "" : ` ${node.layer}`;
          return name[0].toUpperCase() + name.slice(1) + layer;
        }
      }
    }

    /** The short mark beside a glyph. */
    mark(node) {
      if (node.label && node.kind === "super") return sag.short(sag.shown(node.label), 18);
      if (node.feature !== undefined && node.feature !== null) {
        return node.label ? sag.short(sag.shown(node.label), 18) : String(node.feature);
      }
      if (node.kind === "head") return `${node.layer}.${node.head}`;
      if (sag.isTarget(node)) return sag.short(sag.shown(node.title || node.id), 40);
      return "";
    }

    /** Where a node stands, in words. */
    place(node) {
      return `at ${sag.quoted(this.token(node.position))}, position ${node.position}`;
    }

    // -- filters -----------------------------------------------------------------------------

    /** Nodes that hold `share` of the influence; targets, and those in `always`, stay. */
    visibleNodes(share, hiddenKinds, always) {
      const visible = new Uint8Array(this.nodes.length);
      const inner = this.nodeOrder.filter((i) => !this.isAsked(this.nodes[i]));
      let total = 0;
      for (const i of inner) total += this.nodes[i].influence;
      let sum = 0;
      for (const i of inner) {
        if (share < 1 && sum >= share * total - 1e-12 * total) break;
        sum += this.nodes[i].influence;
        if (!hiddenKinds.has(this.nodes[i].kind)) visible[i] = 1;
      }
      for (const node of this.nodes)
        if (this.isAsked(node) || always.has(node.id)) visible[node.index] = 1;
      return visible;
    }

    /** Edges among visible nodes that hold `share` of what such edges carry, strongest first. */
    visibleEdges(share, visible) {
      let total = 0;
      let among = 0;
      for (const e of this.edgeOrder)
        if (visible[this.source[e]] && visible[this.target[e]]) {
          total += this.flow[e];
          among++;
        }
      const kept = [];
      let sum = 0;
      for (const e of this.edgeOrder) {
        if (share < 1 && sum >= share * total - 1e-12 * total) break;
        if (!visible[this.source[e]] || !visible[this.target[e]]) continue;
        sum += this.flow[e];
        kept.push(e);
      }
      return { kept, among };
    }

    /** The share of edges that leaves about `limit` of them. */
    shareFor(limit) {
      if (this.edgeOrder.length <= limit) return 1;
      let total = 0;
      for (const flow of this.flow) total += flow;
      let sum = 0;
      for (let i = 0; i < limit; i++) sum += this.flow[this.edgeOrder[i]];
      return total ? Math.floor((200 * sum) / total) / 200 : 1;
    }

    // -- the ledger --------------------------------------------------------------------------

    /** What adds up to a node's value: `{rows: [{name, kind, value, count}], value, residual}`. */
    ledger(node, by) {
      if (!this.ins[node.index].length && node.constant === undefined) return null;
      const groups = new Map();
      for (const e of this.ins[node.index]) {
        const source = this.nodes[this.source[e]];
        const [key, name] = this.ledgerGroup(source, by);
        if (!groups.has(key)) groups.set(key, { name, key, kind: source.kind, value: 0, count: 0 });
        const group = groups.get(key);
        group.value += this.weight[e];
        group.count++;
      }
      let rows = [...groups.values()];
      if (by === "kind") rows.sort((a, b) => sag.kindOrder(a.kind) - sag.kindOrder(b.kind));
      else if (by === "layer") rows.sort((a, b) => a.key - b.key);
      else rows.sort((a, b) => Math.abs(b.value) - Math.abs(a.value));
      if (rows.length > 12) {
        const rest = rows.slice(11);
        rows = rows.slice(0, 11);
        rows.push({
          name: sag.count(rest.length, "other"),
          kind: null,
          value: rest.reduce((sum, row) => sum + row.value, 0),
          count: rest.reduce((sum, row) => sum + row.count, 0),
        });
      }
      const extra = [
        ["constant", node.constant],
        ["edges inside", node.internal],
        ["pruned edges", node.pruned_in],
      ];
      for (const [name, value] of extra)
        if (value !== null && value !== undefined)
          rows.push({ name, kind: name, value, count: null });
      const sum = rows.reduce((total, row) => total + row.value, 0);
      const value = node.pre_activation;
      const known = value !== null && value !== undefined;
      return { rows, sum, value: known ? value : null, residual: known ? value - sum : null };
    }

    ledgerGroup(source, by) {
      if (by === "token") {
        const token = this.token(source.position);
        return [source.position, `${sag.word(token)} · ${source.position}`];
      }
      if (by === "layer") {
        const row = this.row(source);
        return [row.order, row.order < 0 ? "tokens" : `layer ${row.name}`];
      }
      return [source.kind, sag.kind(source.kind)[3]];
    }

    // -- search ------------------------------------------------------------------------------

    search(query) {
      const words = query.toLowerCase().split(/\s+/).filter(Boolean);
      if (!words.length) return [];
      const found = [];
      for (const i of this.nodeOrder) {
        const node = this.nodes[i];
        if (!node.searchText) {
          node.searchText = [
            node.id, this.plainName(node), node.label || "", sag.kind(node.kind)[2],
            this.token(node.position), "layer " + node.layer,
          ].join("\n").toLowerCase();
        }
        if (words.every((word) => node.searchText.includes(word))) found.push(node);
      }
      return found;
    }
  }
  sag.Model = Model;
})((window.SaeAttnGraph = window.SaeAttnGraph || {}));
