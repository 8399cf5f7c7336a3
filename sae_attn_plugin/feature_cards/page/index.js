/* The first page: what was surveyed, the heads, the features. */
(function (sag, cards) {
  "use strict";

  const { el } = sag;
  const PAGE = 50;
  const AT_ONCE = 40000; // features listed over all layers without being asked for
  const MEASURES = [
    ["top", "features it carries most of", (head) => head.top, (n) => n.toLocaleString("en")],
    ["agreement", "agreement of the two shares", (head) => head.agreement, (x) => sag.number(x, 2)],
    ["share", "share of the layer's |DFA|", (head) => head.share, (x) => cards.share(x)],
    ["score", "monosemanticity", (head) => head.score, (x) => sag.number(x, 2)],
  ];
  const named = (i) => sag.shown(cards.site.families[i].replace(/_/g, " "));
  const DENSITIES = [
    ["", "any density", 0, Infinity],
    ["high", "above 10%", 0.1, Infinity],
    ["common", "1% to 10%", 0.01, 0.1],
    ["rare", "0.1% to 1%", 0.001, 0.01],
    ["sparse", "below 0.1%", 0, 0.001],
  ];
  const COLUMNS = [
    { key: "feature", name: "Feature", wide: true },
    { key: "called", name: "Fires most strongly on", wide: true, sorts: false },
    { key: "families", name: "Families", wide: true, sorts: false },
    { key: "density", name: "Density", title: "Part of the positions where it fires" },
    { key: "fires", name: "Firings" },
    { key: "max", name: "Highest" },
    { key: "head", name: "Head", wide: true, title: "The head that carries most of its |DFA|" },
    { key: "share", name: "Its share", title: "The head's share of the feature's |DFA|" },
  ];
  const DOWN = new Set(["density", "fires", "max", "share", "top", "agreement", "overlap", "score"]);

  /** The reader's choices, from what follows `#?`. */
  function choices(query) {
    const given = new URLSearchParams(query);
    const layers = cards.site.layers;
    const total = layers.reduce((sum, one) => sum + one.features, 0);
    const first = total <= AT_ONCE ? "all" : String(layers[0].layer);
    return {
      layer: given.get("layer") || first,
      first,
      q: given.get("q") || "",
      density: given.get("density") || "",
      family: given.get("family") || "",
      head: given.get("head") || "",
      sort: given.get("sort") || "feature",
      down: given.get("down") === "1",
      page: Math.max(0, (parseInt(given.get("page"), 10) || 1) - 1),
      measure: given.get("measure") || "top",
      heads: given.get("heads") || "layer",
      headsDown: given.get("headsdown") === "1",
    };
  }

  function address(now) {
    const said = new URLSearchParams();
    if (now.layer !== now.first) said.set("layer", now.layer);
    for (const key of ["q", "density", "family", "head"]) if (now[key]) said.set(key, now[key]);
    if (now.sort !== "feature") said.set("sort", now.sort);
    if (now.down) said.set("down", "1");
    if (now.page) said.set("page", now.page + 1);
    if (now.measure !== "top") said.set("measure", now.measure);
    if (now.heads !== "layer") said.set("heads", now.heads);
    if (now.headsDown) said.set("headsdown", "1");
    const text = said.toString();
    return text ? "#?" + text : "#";
  }

  cards.showIndex = async function (main, query) {
    const now = choices(query);
    let kept = location.hash;
    const left = () => !list.isConnected || location.hash !== kept; // the reader has gone on
    const keep = () => {
      cards.lastIndex = address(now);
      if (location.hash !== kept) return; // the next page may still be on its way
      history.replaceState(null, "", address(now));
      kept = location.hash;
    };
    const heads = el("div", {});
    const list = el("div", { class: "sac-list" });
    const controls = filters(now, () => refresh());
    const families = cards.site.families.length ? familyGrid((layer, family) => {
      for (const [name, value] of [["layer", layer], ["family", family]]) {
        now[name] = String(value);
        controls.querySelector(`[data-filter=${name}]`).value = now[name];
      }
      refresh();
      controls.scrollIntoView({ block: "center" });
    }) : null;
    main.replaceChildren(...[about(), cards.section("Heads", null, heads),
      families && cards.section("Families", "Share of the layer's features on this site that belong to each; " +
        "a feature may belong to several or to none.", families),
      cards.section("Features", null, controls, list)].filter(Boolean));
    keep();
    const showHeads = () => heads.replaceChildren(headGrid(now, (measure) => {
      now.measure = measure;
      keep();
      showHeads();
    }), headTable(now, () => {
      keep();
      showHeads();
    }, heads.querySelector("details")));
    showHeads();
    let turn = 0;
    async function refresh(page = 0) {
      if (!list.isConnected) return;
      now.page = page;
      keep();
      if (left()) return;
      const mine = ++turn;
      const wanted = cards.site.layers.map((one) => one.layer)
        .filter((layer) => now.layer === "all" || String(layer) === now.layer);
      const found = [];
      for (const [i, layer] of wanted.entries()) {
        if (!list.firstChild || wanted.length > 4)
          list.replaceChildren(el("p", { class: "sag-note", role: "status" },
            `Reading layer ${i + 1} of ${wanted.length} …`));
        const data = await cards.layer(layer);
        if (mine !== turn || left()) return;
        for (const one of matches(layer, data, now)) found.push(one);
      }
      sorted(found, now);
      showList(list, found, now, refresh);
    }
    await refresh(now.page);
  };

  function about() {
    const { site } = cards;
    const features = site.layers.reduce((sum, one) => sum + one.features, 0);
    const live = site.layers.reduce((sum, one) => sum + one.live, 0);
    const counts = [
      ["layers", site.layers.length.toLocaleString("en")],
      ["heads", (site.layers.length * site.n_heads).toLocaleString("en")],
      [features === live ? "features, all of which fire" : `features, ${live.toLocaleString("en")} of which fire`,
        features.toLocaleString("en")],
      ["firings", site.fires.toLocaleString("en")],
    ];
    return el("section", { class: "sac-about" },
      el("h1", { tabindex: "-1" }, sag.bdi(sag.shown(site.title))),
      el("dl", { class: "sag-facts" }, counts.map(([name, value]) =>
        el("div", {}, el("dt", {}, name), el("dd", {}, value)))),
      el("dl", { class: "sac-facts" }, site.facts.map(([name, value]) =>
        [el("dt", {}, sag.shown(name)), el("dd", {}, sag.bdi(sag.shown(value)))])));
  }

  // -- heads -------------------------------------------------------------------------------------

  function headGrid(now, choose) {
    const { site } = cards;
    const measures = MEASURES.filter(([, , value]) => site.heads.some((head) => value(head) !== undefined));
    const [key, , value, text] = measures.find(([name]) => name === now.measure) || measures[0];
    const most = Math.max(...site.heads.map((head) => Math.abs(value(head) || 0))) || 1;
    const of = new Map(site.heads.map((head) => [`${head.layer}.${head.head}`, head]));
    const every = [...Array(site.n_heads).keys()];
    return el("div", {},
      el("div", { class: "sac-filters" }, el("label", {}, "Show ",
        el("select", { "data-act": "measure", onchange: (event) => choose(event.target.value) },
          measures.map(([name, words]) => el("option", { value: name, selected: name === key }, words))))),
      el("div", { class: "sac-scroll" }, el("table", { class: "sac-grid" },
        el("caption", { class: "sag-hidden" }, "Heads by layer; a cell leads to the head's card"),
        el("thead", {}, el("tr", {}, el("th", {}, el("span", { class: "sag-hidden" }, "layer")),
          every.map((h) => el("th", { scope: "col" }, h)))),
        el("tbody", {}, site.layers.map(({ layer }) => el("tr", {},
          el("th", { scope: "row" }, `layer ${layer}`),
          every.map((h) => {
            const head = of.get(`${layer}.${h}`);
            const shown = value(head);
            const cell = el("a", { href: cards.headLink(layer, h), title: `head ${layer}.${h}: ${
              head.top.toLocaleString("en")} features, agreement ${sag.number(head.agreement, 3)}, ${
              cards.share(head.share)} of the layer's |DFA|` },
              blank(shown) ? "–" : text(shown));
            if (!blank(shown)) cell.style.backgroundColor = sag.heat((0.75 * shown) / most);
            return el("td", {}, cell);
          })))))));
  }

  function familyGrid(choose) {
    const { site } = cards;
    const most = Math.max(...site.layers.flatMap((one) => one.families.map((n) => n / one.features))) || 1;
    return el("div", { class: "sac-scroll" }, el("table", { class: "sac-grid" },
      el("caption", { class: "sag-hidden" }, "Families by layer; a cell lists its features below"),
      el("thead", {}, el("tr", {}, el("th", {}, el("span", { class: "sag-hidden" }, "layer")),
        site.families.map((_, i) => el("th", { scope: "col" }, named(i))))),
      el("tbody", {}, site.layers.map((one) => el("tr", {},
        el("th", { scope: "row" }, `layer ${one.layer}`),
        one.families.map((n, i) => {
          const cell = el("button", { type: "button", title: `${sag.count(n, "feature")}; list them`,
            onclick: () => choose(one.layer, i) }, cards.share(n / one.features));
          cell.style.backgroundColor = sag.heat((0.75 * n) / one.features / most);
          return el("td", {}, cell);
        }))))));
  }

  function headTable(now, changed, before) {
    const columns = [
      { key: "layer", name: "Head", wide: true },
      { key: "top", name: "Features", title: "Features of whose |DFA| this head carries most" },
      { key: "agreement", name: "Agreement",
        title: "Rank correlation, over features, of decoder share and measured DFA share" },
      { key: "overlap", name: "Both lists", title: "Features in the first 20 by either share" },
      { key: "share", name: "Layer's |DFA|" },
      { key: "few", name: "First by DFA share", wide: true, sorts: false },
    ];
    const scored = cards.site.heads.some((head) => head.score !== undefined);
    if (scored) columns.splice(5, 0, { key: "score", name: "Monosemanticity",
      title: "How alike the head's top features are, above random ones; ✓ where it passes the test" });
    const heads = [...cards.site.heads];
    const down = now.headsDown ? -1 : 1;
    heads.sort((a, b) => {
      const order = now.heads === "layer" ? 0 : order2(a[now.heads], b[now.heads], down);
      return order || (a.layer - b.layer || a.head - b.head) * (now.heads === "layer" ? down : 1);
    });
    const details = el("details", { class: "sac-more", open: before ? before.open : false },
      el("summary", {}, "As a table"),
      cards.table(columns, { key: now.heads, down: now.headsDown }, (key) => {
        now.headsDown = now.heads === key ? !now.headsDown : DOWN.has(key);
        now.heads = key;
        changed();
      }, heads.map((head) => el("tr", { "data-head": `${head.layer}.${head.head}` },
        el("th", { scope: "row" }, cards.headTag(head.layer, head.head)),
        el("td", {}, head.top.toLocaleString("en")), el("td", {}, sag.number(head.agreement, 3)),
        el("td", {}, head.overlap), el("td", {}, cards.share(head.share)),
        scored ? el("td", {}, head.monosemantic ? "✓ " : "", sag.number(head.score, 2)) : null,
        el("td", { class: "is-text" }, head.few.map(([feature, tokens, label]) =>
          el("span", { class: "sac-few" }, cards.featureTag(head.layer, feature), " ",
            cards.called(tokens.slice(0, 1), label)))))), "Heads"));
    return details;
  }

  const blank = (x) => x === null || x === undefined || Number.isNaN(x);

  /** Missing values last, whatever the direction. */
  function order2(a, b, down) {
    if (blank(a) || blank(b)) return blank(a) - blank(b);
    return a === b ? 0 : a < b ? -down : down;
  }

  // -- features ----------------------------------------------------------------------------------

  function filters(now, changed) {
    const { site } = cards;
    const choose = (key, name, options) =>
      el("select", { "aria-label": name, "data-filter": key, onchange: (event) => {
        now[key] = event.target.value;
        changed();
      } }, options.map(([value, text]) => el("option", { value, selected: now[key] === value }, text)));
    let timer = null;
    return el("div", { class: "sac-filters" },
      choose("layer", "Layer", [["all", "all layers"],
        ...site.layers.map(({ layer }) => [String(layer), `layer ${layer}`])]),
      choose("head", "Head", [["", "any head"],
        ...[...Array(site.n_heads).keys()].map((h) => [String(h), `head ${h}`])]),
      choose("density", "Density", DENSITIES.map(([value, text]) => [value, text])),
      site.families.length
        ? choose("family", "Family", [["", "any family"],
          ...site.families.map((_, i) => [String(i), named(i)])])
        : null,
      el("input", { type: "search", value: now.q, placeholder: "Id, token or label", "data-filter": "q",
        "aria-label": "Filter by id, token or label", spellcheck: "false", autocomplete: "off",
        oninput: (event) => {
          clearTimeout(timer);
          now.q = event.target.value;
          timer = setTimeout(changed, 120);
        } }));
  }

  function matches(layer, data, now) {
    const [, , least, most] = DENSITIES.find(([key]) => key === now.density) || DENSITIES[0];
    const said = now.q.trim();
    const exact = cards.parse(said);
    const number = /^\d+$/.test(said) ? Number(said) : null;
    const wanted = now.q.toLowerCase();
    const tokens = new Set();
    if (said && !(exact && exact.feature !== undefined)) {
      // a token as it stands, spaces and all, or as readers type it
      for (const [id, text] of cards.strings) {
        if (text !== null && text.toLowerCase().includes(wanted.trim() ? wanted : " ")) tokens.add(id);
      }
    }
    const found = [];
    for (let i = 0; i < data.feature.length; i++) {
      const density = data.density[i] || 0;
      if (density < least || density >= most) continue;
      if (now.head !== "" && data.head[i] !== Number(now.head)) continue;
      if (now.family !== "" && !data.families[i].includes(Number(now.family))) continue;
      if (said) {
        const label = data.label[i];
        const hit = exact
          ? layer === exact.layer &&
            (exact.feature === undefined ? data.head[i] === exact.head : data.feature[i] === exact.feature)
          : (number !== null && data.feature[i] === number) ||
            data.tokens[i].some((id) => tokens.has(id)) ||
            (label !== null && label.toLowerCase().includes(wanted.trim()));
        if (!hit) continue;
      }
      found.push({ layer, i, data });
    }
    return found;
  }

  function sorted(found, now) {
    const down = now.down ? -1 : 1;
    const key = COLUMNS.some((column) => column.key === now.sort) ? now.sort : "feature";
    found.sort((a, b) => {
      const byPlace = a.layer - b.layer || a.data.feature[a.i] - b.data.feature[b.i];
      if (key === "feature") return byPlace * down;
      if (key === "head")
        return (a.layer - b.layer || a.data.head[a.i] - b.data.head[b.i]) * down || byPlace;
      return order2(a.data[key][a.i], b.data[key][b.i], down) || byPlace;
    });
  }

  function showList(list, found, now, refresh) {
    const pages = Math.max(1, Math.ceil(found.length / PAGE));
    const page = Math.min(now.page, pages - 1);
    const some = found.slice(page * PAGE, (page + 1) * PAGE);
    const { families } = cards.site;
    const columns = families.length ? COLUMNS : COLUMNS.filter((one) => one.key !== "families");
    const rows = some.map(({ layer, i, data }) => el("tr", { "data-feature": `${layer}/${data.feature[i]}` },
      el("th", { scope: "row" }, cards.featureTag(layer, data.feature[i])),
      el("td", { class: "is-text" }, cards.called(data.tokens[i], data.label[i])),
      families.length ? el("td", { class: "is-text" }, data.families[i].map((f) =>
        el("span", { class: "sac-family" }, named(f)))) : null,
      el("td", {}, cards.density(data.density[i])),
      el("td", {}, data.fires[i].toLocaleString("en")),
      el("td", {}, sag.number(data.max[i])),
      el("td", { class: "is-text" }, data.head[i] < 0 ? "–" : cards.headTag(layer, data.head[i])),
      el("td", {}, el("span", { class: "sac-with-bar" }, cards.bar(data.share[i]), cards.share(data.share[i])))));
    const turn = (to, text, label) => el("button", { type: "button", class: "sag-button",
      disabled: to < 0 || to >= pages, "aria-label": label, onclick: () => refresh(to) }, text);
    const first = page * PAGE + 1;
    list.replaceChildren(
      el("div", { class: "sac-pages" },
        el("span", { role: "status", class: "sac-count" }, found.length
          ? `${first.toLocaleString("en")}–${(first + some.length - 1).toLocaleString("en")} of ${
            sag.count(found.length, "feature")}`
          : "No feature matches."),
        turn(page - 1, "‹", "Previous page"), turn(page + 1, "›", "Next page")),
      found.length ? cards.table(columns, { key: now.sort, down: now.down }, (key) => {
        now.down = now.sort === key ? !now.down : DOWN.has(key);
        now.sort = key;
        refresh();
      }, rows, "Features") : el("span", {}));
  }
})(window.SaeAttnGraph, window.SaeAttnCards);
