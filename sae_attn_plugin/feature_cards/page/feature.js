/* A feature's card: where it fires, from where, through which heads, with what, to what effect. */
(function (sag, cards) {
  "use strict";

  const { el } = sag;
  const HEADS_AT_FIRST = 16;
  const BANDS = [
    ["q99", "Highest 1%"], ["q90", "90–99%"], ["q75", "75–90%"], ["q50", "50–75%"],
    ["q25", "25–50%"], ["q10", "10–25%"], [null, "Lowest 10%"],
  ];

  cards.showFeature = async function (main, layer, number) {
    const facts = cards.layerFacts(layer);
    const [feature, data] = facts
      ? await Promise.all([cards.feature(layer, number), cards.layer(layer)])
      : [null, null];
    if (!feature) return cards.showProblem(main, `This site has no feature ${layer}/${number}.`);
    const at = data.at.get(number);
    const step = (by) => {
      const n = data.feature.length;
      return cards.featureLink(layer, data.feature[(at + by + n) % n]);
    };
    const examples = [];
    const context = { feature, layer, examples, most: feature.max || 1 };
    const link = sag.safeLink(feature.neuronpedia);
    const best = data.head[at];
    const tags = feature.families.map(([family, score, low, high, baseline]) =>
      el("span", { class: "sac-family", title: `score ${sag.number(score, 3)} (${sag.number(low, 3)} to ${
        sag.number(high, 3)}), baseline ${sag.number(baseline, 3)}` },
        sag.shown(cards.site.families[family].replace(/_/g, " ")), " ", cards.share(score)));
    if (feature.label) tags.unshift(el("bdi", { class: "sac-label" }, sag.shown(feature.label)));
    const density = feature.fires
      ? `${cards.density(feature.density)} (${sag.count(feature.fires, "firing")})` : "never fired";
    const numbers = [["density", density]];
    if (feature.fires) {
      numbers.push(["highest", sag.number(feature.max)], ["mean", sag.number(feature.mean)],
        ["|DFA|", sag.number(feature.dfa_abs)]);
      if (best >= 0) numbers.push(["most through head",
        [cards.headTag(layer, best), ` ${cards.share(data.share[at])}`]]);
    }
    numbers.push(["decoder norm", sag.number(feature.decoder_norm)]);
    const paint = feature.top.length || feature.sample.length
      ? el("button", { type: "button", class: "sag-button", "data-act": "paint", "aria-pressed": "false",
        title: "Colour every example by where its firing comes from (d)",
        onclick: () => toggle(context, paint) }, "Show sources")
      : null;
    context.paint = paint;
    main.replaceChildren(
      cards.top(`Feature ${layer}/${number}`, tags, [step(-1), "Previous feature"],
        [step(1), "Next feature"],
        link && el("a", { class: "sag-button", href: link, target: "_blank",
          rel: "noopener noreferrer" }, "Neuronpedia ↗")),
      el("dl", { class: "sag-facts" }, numbers.map(([name, value]) =>
        el("div", {}, el("dt", {}, name), el("dd", {}, value)))),
      el("div", { class: "sac-card" },
        el("div", { class: "sac-main" },
          feature.top.length ? el("section", { "data-part": "top" },
            el("h2", {}, "Strongest firings", paint),
            el("p", { class: "sag-note" }, "Green is activation. Point at a framed token, or tap it or " +
              "move to it with Tab: the text is coloured by how much of the firing came from each " +
              "token, blue for it and orange against it."),
            feature.top.map((values) => example(context, values))) : null,
          feature.sample.length ? el("section", { "data-part": "sample" },
            el("h2", {}, "Drawn from all its firings"),
            el("p", { class: "sag-note" }, `Of ${sag.count(feature.sampled, "firing")} drawn uniformly, ` +
              "by their place among the feature's activations."),
            sampled(context)) : null,
          feature.fires ? null : el("p", {}, "It did not fire anywhere in the corpus.")),
        el("div", { class: "sac-side" }, heads(context, data), distances(feature), roles(feature),
          spread(feature), logits(feature), positions(feature), cofiring(layer, feature, data))));
    return Object.assign(step, { paint: paint ? () => toggle(context, paint) : null,
      up: best >= 0 ? cards.headLink(layer, best) : null });
  };

  // -- examples ----------------------------------------------------------------------------------

  function toggle(context, button) {
    context.all = !context.all;
    button.setAttribute("aria-pressed", String(context.all));
    for (const one of context.examples) one.rest();
  }

  function sampled(context) {
    const { feature } = context;
    const parts = [];
    let last = null;
    for (const values of feature.sample) {
      const activation = values[2];
      const band = BANDS.find(([key]) => key === null || activation >= feature[key]);
      if (band !== last) parts.push(el("h3", {}, band[1]));
      last = band;
      parts.push(example(context, values));
    }
    return parts;
  }

  function example(context, values) {
    const one = Object.fromEntries(cards.site.example.map((name, i) => [name, values[i]]));
    const { layer, most } = context;
    const dfa = new Map(one.sources.map((source, i) => [source, one.dfa[i]]));
    const largest = Math.max(...one.dfa.map(Math.abs), 1e-12);
    const others = new Map(one.others);
    const spans = new Map();
    const readout = el("div", { class: "sac-readout", hidden: true });
    let pinned = false;
    let before = 0;
    const text = el("p", { class: "sac-text" });
    const fire = el("button", { type: "button", class: "sac-firing", "aria-expanded": "false",
      "aria-label": `Fires ${sag.number(one.activation)} on ${cards.running(tokenAt(one, one.position))}, ` +
        `position ${one.position}; show where it comes from`,
      onpointerenter: (event) => event.pointerType !== "touch" && show(true),
      onpointerleave: (event) => event.pointerType !== "touch" && rest(),
      onfocus: () => show(true),
      onblur: () => {
        pinned = false;
        rest();
      },
      onpointerdown: () => (before = Number(pinned)),
      onclick: () => {
        pinned = !before;
        before = Number(pinned);
        if (pinned) show(true);
        else hide();
      } });
    for (const [start, tokens] of one.parts) {
      if (start > 0) text.append(el("span", { class: "sac-gap", "aria-hidden": "true" }, "… "));
      tokens.forEach((id, i) => {
        const position = start + i;
        const words = sag.bdi(cards.running(id));
        let span;
        if (position === one.position) {
          fire.append(words);
          span = fire;
        } else span = el("span", {}, words);
        span.dataset.position = position;
        spans.set(position, span);
        text.append(span);
      });
    }

    /** By activation. */
    function rest() {
      if (pinned) return;
      if (context.all) return show(false);
      hide();
    }
    function hide() {
      readout.hidden = true;
      box.classList.remove("is-dfa");
      fire.setAttribute("aria-expanded", "false");
      for (const [position, span] of spans) {
        const value = position === one.position ? one.activation : others.get(position);
        span.style.backgroundColor = value === undefined ? "" : green(value / most);
        span.title = value === undefined ? `position ${position}`
          : `position ${position}: activation ${sag.number(value)}`;
      }
    }
    /** By source; `told` with the numbers below. */
    function show(told) {
      box.classList.add("is-dfa");
      for (const [position, span] of spans) {
        const value = dfa.get(position);
        span.style.backgroundColor = value === undefined ? "" : sag.heat(value / largest);
        span.title = value === undefined ? `position ${position}` : `position ${position}: ${sag.signed(value, 5)}`;
      }
      if (told && !readout.firstChild) readout.append(...numbers(layer, one));
      readout.hidden = !told;
      fire.setAttribute("aria-expanded", String(told));
    }

    const box = el("article", { class: "sac-example", "data-row": one.row, "data-at": one.position },
      el("div", { class: "sac-strength", title: `activation, row ${one.row} of the corpus, position ${one.position}` },
        el("b", { class: "sag-num" }, sag.number(one.activation)),
        el("small", {}, `${one.row}:${one.position}`),
        one.same > 1 ? el("small", { title: "kept firings with the same text up to here" },
          `${one.same} alike`) : null),
      el("div", { class: "sac-body" }, text, readout));
    context.examples.push({ rest });
    hide();
    return box;
  }

  const tokenAt = (one, position) => {
    for (const [start, tokens] of one.parts)
      if (start <= position && position < start + tokens.length) return tokens[position - start];
    return null;
  };

  function green(share) {
    const alpha = Math.round(12 + 60 * Math.min(1, share));
    return `color-mix(in srgb, var(--sag-attn) ${alpha}%, transparent)`;
  }

  /** From which tokens, through which heads, and how that makes the pre-activation. */
  function numbers(layer, one) {
    const value = (number, key) => el("b", { class: `sag-num ${number < 0 ? "sac-neg" : "sac-pos"}`,
      "data-value": number, "data-key": key }, sag.signed(number));
    const sum = one.heads.reduce((a, b) => a + b, 0);
    const sources = one.sources.map((source, i) => el("li", {},
      cards.chip(tokenAt(one, source)), el("small", {}, source), value(one.dfa[i], source)));
    if (one.dfa_rest) sources.push(el("li", {}, "all others ", value(one.dfa_rest, "rest")));
    const heads = one.heads.map((number, h) => [number, h]).sort((a, b) => Math.abs(b[0]) - Math.abs(a[0]));
    const few = heads.slice(0, 6);
    const others = heads.slice(6).reduce((total, [number]) => total + number, 0);
    return [
      el("div", {}, el("span", { class: "sac-what" }, "from"), el("ul", { "data-part": "sources" }, sources)),
      el("div", {}, el("span", { class: "sac-what" }, "through"), el("ul", { "data-part": "heads" },
        few.map(([number, h]) => el("li", {}, `${layer}.${h}`, value(number, h))),
        heads.length > 6 ? el("li", {}, "others ", value(others, "others")) : null)),
      el("div", {}, el("span", { class: "sac-what" }, "sum"),
        el("ul", {}, el("li", { class: "is-text" }, value(sum, "sum"), " and the constant ", value(one.pre_activation - sum, "constant"),
          " make the pre-activation ", el("b", { class: "sag-num" }, sag.number(one.pre_activation))),
        el("li", {}, sag.count(one.active, "feature"), " of the layer active here"))),
    ];
  }

  // -- beside ------------------------------------------------------------------------------------

  function heads({ layer, feature }) {
    const { decoder_share: decoder, dfa_share: dfa, dfa: mean } = feature.heads;
    const size = (h) => Math.max(decoder[h] || 0, dfa[h] || 0);
    const every = decoder.map((_, h) => h);
    const most = Math.max(...every.map(size), 1e-12);
    const strongest = new Set([...every].sort((a, b) => size(b) - size(a)).slice(0, HEADS_AT_FIRST));
    const few = every.filter((h) => strongest.has(h));
    const row = (h) => el("tr", { "data-head": h },
      el("th", { scope: "row" }, cards.headTag(layer, h)),
      el("td", { class: "sac-pair" }, cards.bar((decoder[h] || 0) / most, "is-plain"),
        cards.bar((dfa[h] || 0) / most, "is-pos")),
      el("td", {}, cards.share(decoder[h])), el("td", {}, cards.share(dfa[h])),
      el("td", {}, mean[h] === null ? "–" : sag.signed(mean[h], 3)));
    const body = el("tbody", {}, few.map(row));
    const more = every.length > few.length
      ? el("button", { type: "button", class: "sag-more", onclick: () => {
        body.replaceChildren(...every.map(row));
        more.remove();
      } }, `All ${every.length} heads`) : null;
    return cards.section("Heads", null, el("table", { class: "sac-table sac-heads" },
      el("caption", { class: "sag-hidden" }, "Shares of the feature by head"),
      el("thead", {}, el("tr", {}, el("th", { scope: "col" }, "Head"), el("td", {}),
        el("th", { scope: "col" }, el("span", { class: "sac-key is-plain" }), "Decoder"),
        el("th", { scope: "col" }, el("span", { class: "sac-key is-pos" }), "DFA"),
        el("th", { scope: "col", title: "Mean over all firings, with its sign" }, "Mean"))),
      body), more,
    el("p", { class: "sag-note" }, "Share of the decoder's norm against the share of |DFA| measured " +
      "over all firings; mean DFA in units of the pre-activation."));
  }

  const over = (feature) => `Over ${sag.count(feature.sampled, "firing")} drawn uniformly.`;

  function distances(feature) {
    if (!feature.distance || feature.distance[0] === null) return null;
    return cards.section("How far back", over(feature), cards.columns(feature.distance,
      cards.bins(cards.site.distances), cards.share, "|DFA| by distance from source to destination"));
  }

  const ROLES = {
    self: "the token itself", previous: "the token before", first: "position 0",
    duplicate: "the same token, earlier", induction: "after the same token, earlier",
  };

  function roles(feature) {
    if (!feature.roles) return null;
    return cards.section("From which tokens", over(feature) + " A source can have several roles.",
      el("table", { class: "sac-table" }, el("caption", { class: "sag-hidden" }, "|DFA| by role of the source"),
        el("tbody", {}, cards.site.roles.map((role, i) => el("tr", { "data-role": role },
          el("th", { scope: "row" }, ROLES[role] || role),
          el("td", { class: "sac-wide" }, cards.bar(feature.roles[i], "is-pos")),
          el("td", {}, cards.share(feature.roles[i])))))));
  }

  function spread(feature) {
    const picture = feature.fires ? cards.quantiles(feature) : null;
    return picture && cards.section("Activations", null, picture);
  }

  function logits(feature) {
    if (!feature.raised.length && !feature.lowered.length) return null;
    const all = [...feature.raised, ...feature.lowered].map(([, effect]) => Math.abs(effect));
    const most = Math.max(...all, 1e-12);
    const side = (name, rows, look) => el("table", { class: "sac-table", "data-part": name },
      el("caption", {}, name), el("tbody", {}, rows.map(([token, effect]) => el("tr", {},
        el("th", { scope: "row" }, cards.chip(token)),
        el("td", { class: "sac-wide" }, cards.bar(Math.abs(effect) / most, look)),
        el("td", {}, sag.signed(effect, 3))))));
    return cards.section("Effect on the next token",
      "Logits per unit of activation straight through the decoder, W_O and the unembedding, less " +
      "their mean and without the final norm's scale.",
      el("div", { class: "sac-logits" }, side("raises", feature.raised, "is-pos"),
        side("lowers", feature.lowered, "is-neg")));
  }

  function positions(feature) {
    const among = cards.site.positions_by_bin;
    if (!among || !feature.positions.some(Boolean)) return null;
    const each = feature.positions.map((fires, i) => (among[i] ? fires / among[i] : 0));
    return cards.section("Where in the row", "Part of the positions there at which it fires.",
      cards.columns(each, cards.bins(cards.site.positions), cards.density, "Density by position", 5));
  }

  function cofiring(layer, feature, data) {
    if (!feature.cofiring.length) return null;
    return cards.section("Fires together with",
      "In a sample of positions; the share is of the positions where either fires.",
      el("table", { class: "sac-table", "data-part": "cofiring" },
        el("caption", { class: "sag-hidden" }, "Features that fire at the same positions"),
        el("tbody", {}, feature.cofiring.map(([otherLayer, other, together, , jaccard]) => {
          const i = otherLayer === layer ? data.at.get(other) : undefined;
          const known = i !== undefined;
          return el("tr", { title: sag.count(together, "position") },
            el("th", { scope: "row" }, known || otherLayer !== layer
              ? cards.featureTag(otherLayer, other) : `${otherLayer}/${other}`),
            el("td", { class: "is-text" }, known ? cards.called(data.tokens[i].slice(0, 2), data.label[i]) : null),
            el("td", {}, el("span", { class: "sac-with-bar" }, cards.bar(jaccard), cards.share(jaccard))));
        }))));
  }
})(window.SaeAttnGraph, window.SaeAttnCards);
