/* A head's card: its features by the two shares, where it looks from, how well the shares agree. */
(function (sag, cards) {
  "use strict";

  const { el } = sag;

  cards.showHead = async function (main, layer, head) {
    const facts = cards.layerFacts(layer);
    if (!facts || head >= cards.site.n_heads)
      return cards.showProblem(main, `This site has no head ${layer}.${head}.`);
    const data = await cards.layer(layer);
    const card = data.heads[head];
    const enough = ` Of features with ${cards.site.min_fires} firings or more.`;
    const short = (x) => (x === null ? "–" : sag.number(x, 3));
    const shown = [
      ["agreement", card.low === undefined ? short(card.agreement)
        : `${short(card.agreement)} (${short(card.low)} to ${short(card.high)})`],
      ["features it carries most of", card.top.toLocaleString("en")],
      ["of the layer's |DFA|", cards.share(card.share)],
      ["in both lists", `${card.overlap} of ${card.by_dfa.length}`],
    ];
    if (card.score !== undefined)
      shown.push([card.monosemantic ? "score: monosemantic" : "score: not monosemantic", short(card.score)]);
    const all = cards.site.heads;
    const here = all.findIndex((one) => one.layer === layer && one.head === head);
    const step = (by) => {
      const to = all[(here + by + all.length) % all.length];
      return cards.headLink(to.layer, to.head);
    };
    main.replaceChildren(
      cards.top(`Head ${layer}.${head}`, [], [step(-1), "Previous head"], [step(1), "Next head"]),
      el("dl", { class: "sag-facts" }, shown.map(([name, value]) =>
        el("div", {}, el("dt", {}, name), el("dd", {}, value)))),
      el("div", { class: "sac-two" },
        ranking("Top features by decoder share", layer, data, card.by_decoder, 1,
          `The head's part of the L2 norms of the feature's decoder, by head.${enough}`),
        ranking("Top features by measured DFA share", layer, data, card.by_dfa, 2,
          `The head's part of |DFA| over all firings in the corpus.${enough}`)),
      el("div", { class: "sac-two" },
        card.distance.some((x) => x !== null)
          ? cards.section("How far back its features look",
            "|DFA| by distance from source to destination, over the sampled firings of the layer's " +
            "features, each firing weighted by this head's part of its |DFA|.",
            cards.columns(card.distance, cards.bins(cards.site.distances), cards.share, "|DFA| by distance"))
          : null,
        agreementGrid(card)));
    return step;
  };

  function ranking(title, layer, data, rows, sorted, note) {
    const columns = [
      { key: "feature", name: "Feature", wide: true, sorts: false },
      { key: "called", name: "Fires most strongly on", wide: true, sorts: false },
      { key: "decoder", name: "Decoder", sorts: false },
      { key: "dfa", name: "DFA", sorts: false },
      { key: "fires", name: "Firings", sorts: false },
    ];
    return cards.section(title, note, rows.length ? cards.table(columns, null, null, rows.map((row) => {
      const i = row[0];
      return el("tr", { "data-feature": data.feature[i] },
        el("th", { scope: "row" }, cards.featureTag(layer, data.feature[i])),
        el("td", { class: "is-text" }, cards.called(data.tokens[i], data.label[i])),
        [1, 2].map((at) => el("td", {}, el("span", { class: "sac-with-bar" },
          cards.bar(row[at], at === sorted ? "is-pos" : "is-plain"), cards.share(row[at])))),
        el("td", {}, data.fires[i].toLocaleString("en")));
    }), title) : el("p", { class: "sag-note" }, "No feature of this layer fired."));
  }

  /** Where features lie between the two shares. */
  function agreementGrid(card) {
    const side = Math.round(Math.sqrt(card.grid.length));
    const most = Math.max(...card.grid);
    if (!most) return null;
    const part = (i) => `${Math.round((100 * i) / side)}–${Math.round((100 * (i + 1)) / side)}%`;
    const cells = [];
    for (let row = side - 1; row >= 0; row--)
      for (let column = 0; column < side; column++) {
        const n = card.grid[row * side + column];
        const cell = el("i", { title: `decoder ${part(column)}, DFA ${part(row)}: ${sag.count(n, "feature")}` });
        if (n) cell.style.backgroundColor = sag.heat(Math.log1p(n) / Math.log1p(most));
        cells.push(cell);
      }
    const box = el("div", { class: "sac-cells", role: "img",
      "aria-label": `Features by decoder share and DFA share; rank correlation ${sag.number(card.agreement, 3)}` },
      cells);
    box.style.gridTemplateColumns = `repeat(${side}, 1fr)`;
    return cards.section("Do the two shares agree?",
      "Each cell counts features; on the diagonal both say the same. The colour is logarithmic. " +
      `Agreement is the rank correlation over the features with ${cards.site.min_fires} firings or more.`,
      el("div", { class: "sac-agree" }, el("span", { class: "sac-up" }, "DFA share →"), box,
        el("span", {}, "decoder share →")));
  }
})(window.SaeAttnGraph, window.SaeAttnCards);
