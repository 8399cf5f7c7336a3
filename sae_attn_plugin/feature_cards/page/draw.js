/* Pieces of cards: tokens, links, bars, small charts. */
(function (sag, cards) {
  "use strict";

  const { el, svg } = sag;

  /** A token on its own, spaces visible. */
  cards.chip = (id, attributes) =>
    el("bdi", { class: "sac-chip", title: `token ${id}`, ...attributes },
      sag.short(shownToken(cards.token(id)), 24));

  function shownToken(text) {
    if (text === "") return "∅";
    return sag.shown(text).replace(/ /g, "␣");
  }
  cards.shownToken = shownToken;

  /** A token in running text. */
  cards.running = (id) => sag.shown(cards.token(id)) || "∅";

  cards.featureTag = (layer, feature, attributes) =>
    el("a", { href: cards.featureLink(layer, feature), class: "sac-id", ...attributes },
      `${layer}/${feature}`);
  cards.headTag = (layer, head, attributes) =>
    el("a", { href: cards.headLink(layer, head), class: "sac-id", ...attributes }, `${layer}.${head}`);

  /** What a feature is called where there is little room: its label, else its tokens. */
  cards.called = (tokens, label) =>
    label
      ? el("bdi", { class: "sac-label" }, sag.shown(label))
      : el("span", { class: "sac-chips" }, tokens.map((id) => cards.chip(id)));

  /** A bar from 0 to 1. */
  cards.bar = function (share, look = "is-plain") {
    const inner = el("i", { class: look });
    inner.style.width = 100 * Math.min(1, Math.max(0, share || 0)) + "%";
    return el("span", { class: "sac-bar", "aria-hidden": "true" }, inner);
  };

  cards.share = (value) =>
    value === null || value === undefined ? "–" : value === 0 ? "0%" : sag.percent(value);

  cards.density = function (value) {
    if (value === null || value === undefined) return "–";
    if (value === 0) return "0";
    return 100 * value >= 0.001 ? Number((100 * value).toPrecision(3)) + "%" : sag.number(100 * value, 3) + "%";
  };

  cards.section = (title, note, ...parts) =>
    el("section", {}, el("h2", {}, title), ...parts,
      note ? el("p", { class: "sag-note" }, note) : null);

  /** Columns with a label below each, or below each `every`-th; `text` says a value. */
  cards.columns = function (values, labels, text, what, every = 1) {
    const most = Math.max(...values, 1e-12);
    const spoken = labels.map((label, i) => `${label}: ${text(values[i])}`);
    return el("div", { class: "sac-columns", role: "img", "aria-label": `${what}. ${spoken.join(", ")}` },
      values.map((value, i) => {
        const inner = el("i", {});
        inner.style.height = (100 * value) / most + "%";
        return el("div", { title: spoken[i], "data-value": value },
          el("span", { class: "sac-column" }, inner),
          el("small", {}, i % every && !/\D/.test(labels[i]) ? "" : labels[i]));
      }));
  };

  /** Bins `[edge, next)` as texts; the last one is open. */
  cards.bins = (edges) =>
    edges.map((edge, i) => {
      const next = edges[i + 1];
      if (next === undefined) return i && edge - edges[i - 1] > 1 ? `${edge}+` : String(edge);
      return next === edge + 1 ? String(edge) : `${edge}–${next - 1}`;
    });

  /** How activations spread: blocks between quantiles, each block's area its part of the firings. */
  cards.quantiles = function (feature) {
    const marks = [["q10", 10], ["q25", 25], ["q50", 50], ["q75", 75], ["q90", 90], ["q99", 99]];
    const at = [0, ...marks.map(([key]) => feature[key]), feature.max];
    if (at.some((value) => value === null)) return null;
    const mass = [0.1, 0.15, 0.25, 0.25, 0.15, 0.09, 0.01];
    const most = feature.max || 1;
    const least = most / 200;
    const blocks = mass.map((part, i) => ({
      from: at[i], to: at[i + 1], part, height: part / Math.max(at[i + 1] - at[i], least) }));
    const top = Math.max(...blocks.map((block) => block.height));
    const names = ["lowest 10%", "10–25%", "25–50%", "50–75%", "75–90%", "90–99%", "highest 1%"];
    const picture = svg("svg", { viewBox: "0 0 200 60", preserveAspectRatio: "none", class: "sac-spread",
      role: "img", "aria-label": "Activations: " + marks.map(([key, q]) =>
        `${q}% below ${sag.number(feature[key])}`).join(", ") + `, highest ${sag.number(feature.max)}` },
      blocks.map((block, i) => svg("rect", {
        x: (200 * block.from) / most, width: Math.max((200 * (block.to - block.from)) / most, 0.7),
        y: 60 - Math.max((58 * block.height) / top, 0.8), height: Math.max((58 * block.height) / top, 0.8),
        class: i % 2 ? "is-odd" : null },
        svg("title", {}, `${names[i]} of firings: ${sag.number(block.from)} to ${sag.number(block.to)}`))));
    return el("div", {}, picture,
      el("div", { class: "sac-axis" }, el("span", {}, "0"),
        el("span", {}, `median ${sag.number(feature.q50, 3)}`), el("span", {}, sag.number(feature.max, 3))));
  };

  /** A table whose columns sort: `columns` are `{key, name, text, value, cell, wide}`. */
  cards.table = function (columns, sort, onSort, rows, caption) {
    return el("div", { class: "sac-scroll" },
      el("table", { class: "sac-table" },
        el("caption", { class: "sag-hidden" }, caption),
        el("thead", {}, el("tr", {}, columns.map((column) => {
          const here = sort && sort.key === column.key;
          return el("th", { scope: "col", class: column.wide ? "is-text" : null, title: column.title,
            "aria-sort": here ? (sort.down ? "descending" : "ascending") : null },
            column.sorts === false ? column.name
              : el("button", { type: "button", "data-sort": column.key, onclick: () => onSort(column.key) },
                column.name, el("span", { "aria-hidden": "true" }, here ? (sort.down ? " ↓" : " ↑") : "")));
        }))),
        el("tbody", {}, rows)));
  };
})(window.SaeAttnGraph, window.SaeAttnCards);
