/* The site's data: scripts that call `SaeAttnCards.take(name, data)`, loaded when they are needed.
   A page that is a plain file may load scripts, but not fetch. */
(function (sag) {
  "use strict";

  const KEPT = 8; // files of features held at once
  const files = new Map();
  const loading = new Map();
  const cards = (window.SaeAttnCards = { strings: new Map() });

  cards.take = function (name, data) {
    if (name === "site") cards.site = data;
    else if (name === "tokens") data.ids.forEach((id, i) => cards.strings.set(id, data.strings[i]));
    else files.set(name, data);
  };

  function load(name) {
    if (files.has(name)) return Promise.resolve(files.get(name));
    if (!loading.has(name)) {
      loading.set(name, new Promise((done, failed) => {
        const script = document.createElement("script");
        script.src = `data/${name}.js`;
        script.onload = () => (files.has(name) ? done(files.get(name)) : failed(missing(name)));
        script.onerror = () => failed(missing(name));
        document.head.append(script);
      }).finally(() => loading.delete(name)));
    }
    return loading.get(name);
  }
  const missing = (name) => new Error(`The file data/${name}.js of this site is missing or damaged.`);
  const two = (layer) => String(layer).padStart(2, "0");

  /** A token's text; `#id` where nobody said. */
  cards.token = function (id) {
    const text = cards.strings.get(id);
    return text === undefined || text === null ? "#" + id : text;
  };

  cards.layerFacts = (layer) => cards.site.layers.find((one) => one.layer === layer) || null;

  /** All features of a layer in short, column by column; `at` finds a feature's place. */
  cards.layer = async function (layer) {
    const data = await load(`layer-${two(layer)}`);
    if (!data.at) data.at = new Map(data.feature.map((feature, i) => [feature, i]));
    return data;
  };

  /** Everything about one feature, or `null`. */
  cards.feature = async function (layer, feature) {
    const facts = cards.layerFacts(layer);
    const number = facts
      ? facts.files.findIndex(([first, last]) => first <= feature && feature <= last)
      : -1;
    if (number < 0) return null;
    const name = `features/${two(layer)}-${String(number).padStart(4, "0")}`;
    const { features } = await load(name);
    const held = [...files.keys()].filter((key) => key.startsWith("features/") && key !== name);
    for (const old of held.slice(0, Math.max(0, held.length - KEPT + 1))) files.delete(old);
    return features.find((one) => one.feature === feature) || null;
  };

  /** `"5/7515"`, `"attn:5:7515@3"` or `"5.3"` as a feature or a head; else `null`. */
  cards.parse = function (text) {
    let match = /^\s*(?:attn:)?(\d{1,6})[/:](\d{1,9})(?:@\d+)?\s*$/.exec(text);
    if (match) return { layer: +match[1], feature: +match[2] };
    match = /^\s*(?:L|attn:)?(\d{1,6})(?:\.|H)(\d{1,6})\s*$/i.exec(text);
    return match ? { layer: +match[1], head: +match[2] } : null;
  };

  cards.featureLink = (layer, feature) => `#${layer}/${feature}`;
  cards.headLink = (layer, head) => `#${layer}.${head}`;
})(window.SaeAttnGraph);
