/* Text that is safe to show, numbers, and elements. Text only ever becomes a text node. */
(function (sag) {
  "use strict";

  const SVG = "http://www.w3.org/2000/svg";

  /** An element; `null` attributes and children are left out, `on...` functions listen. */
  function create(namespace, name, attributes, children) {
    const node = namespace
      ? document.createElementNS(namespace, name)
      : document.createElement(name);
    for (const [key, value] of Object.entries(attributes || {})) {
      if (value === null || value === undefined || value === false) continue;
      if (typeof value === "function") node.addEventListener(key.slice(2), value);
      else node.setAttribute(key, value === true ? "" : String(value));
    }
    for (const child of children.flat(2)) {
      if (child === null || child === undefined) continue;
      node.append(child instanceof Node ? child : document.createTextNode(String(child)));
    }
    return node;
  }
  sag.el = (name, attributes, ...children) => create(null, name, attributes, children);
  sag.svg = (name, attributes, ...children) => create(SVG, name, attributes, children);

  const VISIBLE = { "\n": "↵", "\r": "␍", "\t": "⇥" };
  const HIDDEN = /[\p{Cc}\p{Cf}\p{Cs}\u2028\u2029]/gu;
  const PICTOGRAM_BEFORE = /\p{Extended_Pictographic}[\uFE0F\u{1F3FB}-\u{1F3FF}]?$/u;
  const PICTOGRAM_AFTER = /^\p{Extended_Pictographic}/u;

  /** Text with everything invisible spelled out: controls, direction marks, half characters. */
  sag.shown = function (text) {
    return String(text).replace(HIDDEN, (c, at, whole) => {
      if (VISIBLE[c]) return VISIBLE[c];
      const joins =
        c === "\u200D" &&
        PICTOGRAM_BEFORE.test(whole.slice(0, at)) &&
        PICTOGRAM_AFTER.test(whole.slice(at + 1));
      if (joins) return c; // one emoji made of several
      return "\\u{" + c.codePointAt(0).toString(16).toUpperCase() + "}";
    });
  };

  /** A token as a word: without its leading space; blanks in quotes. */
  sag.word = function (token) {
    const bare = token.startsWith(" ") && token.trim() ? token.slice(1) : token;
    return sag.shown(bare.trim() || /[\n\r\t]/.test(bare) ? bare : '"' + bare + '"');
  };

  /** A token in quotes, its spaces as they are. */
  sag.quoted = (token) => "“" + sag.shown(token) + "”";

  /** A token isolated from the direction of the text around it. */
  sag.bdi = (text, attributes) => sag.el("bdi", attributes, text);

  sag.short = (text, longest) =>
    [...text].length > longest ? [...text].slice(0, longest - 1).join("") + "…" : text;

  /** Four digits, a real minus sign. */
  sag.number = function (value, digits = 4) {
    if (value === null || value === undefined || !Number.isFinite(value)) return "–";
    const size = Math.abs(value);
    let text;
    if (size === 0) text = "0";
    else if (size >= 1e6 || size < 1e-4) text = size.toExponential(digits - 2);
    else text = size.toFixed(Math.max(0, digits - 1 - Math.floor(Math.log10(size))));
    return (value < 0 ? "−" : "") + text;
  };
  sag.signed = (value, digits) => (value > 0 ? "+" : "") + sag.number(value, digits);
  sag.percent = (share) =>
    share >= 0.0995 ? (100 * share).toFixed(0) + "%" : (100 * share).toPrecision(2) + "%";
  sag.count = (n, one, many) => n.toLocaleString("en") + " " + (n === 1 ? one : many || one + "s");

  /** `{layer, head}` as the field writes it: "5.1". */
  sag.compareHeads = (a, b) => {
    const [x, y] = [a, b].map((key) => String(key).split(".").map(Number));
    return x[0] - y[0] || x[1] - y[1];
  };

  /** Put text on the clipboard; also where the page is a plain file. */
  sag.copy = async function (text, near) {
    try {
      await navigator.clipboard.writeText(text);
      return true;
    } catch {
      const area = sag.el("textarea", { class: "sag-hidden", "aria-hidden": "true" });
      const focused = document.activeElement;
      area.value = text;
      near.append(area);
      area.select();
      let done = false;
      try {
        done = document.execCommand("copy");
      } catch {
        done = false;
      }
      area.remove();
      if (focused && focused.focus) focused.focus({ preventScroll: true });
      return done;
    }
  };

  /** The colour of a share of the largest value: blue above zero, orange below. */
  sag.heat = function (share) {
    const alpha = Math.round(78 * Math.min(1, Math.abs(share)));
    return `color-mix(in srgb, var(--sag-${share < 0 ? "neg" : "pos"}) ${alpha}%, transparent)`;
  };

  /** Addresses from the data are followed only where they are plain web addresses. */
  sag.safeLink = function (address) {
    if (typeof address !== "string") return null;
    try {
      const url = new URL(address);
      return url.protocol === "https:" ? url.href : null;
    } catch {
      return null;
    }
  };

  /** What a reader chose, such as the colours; `null` where the browser keeps nothing. */
  sag.recall = function (name) {
    try {
      return localStorage.getItem("sae-attn-graph:" + name);
    } catch {
      return null;
    }
  };
  sag.remember = function (name, value) {
    try {
      localStorage.setItem("sae-attn-graph:" + name, value);
    } catch {
      /* a page without storage */
    }
  };
})((window.SaeAttnGraph = window.SaeAttnGraph || {}));
