/* The frame around the cards: what the address asks for, keys, search, colours. */
(function (sag, cards) {
  "use strict";

  const { el } = sag;
  const THEMES = ["auto", "light", "dark"];
  const NAMES = { auto: "Auto", light: "Light", dark: "Dark" };
  let theme = "auto";
  let step = null;
  let turn = 0;
  let root, main, search, themeButton, help;

  document.addEventListener("DOMContentLoaded", () => {
    const box = document.getElementById("cards");
    if (!cards.site) {
      box.append(el("p", {}, "The file data/site.js is missing or damaged: copy the whole folder."));
      return;
    }
    build(box);
    setTheme(sag.recall("theme") || "auto", false);
    window.addEventListener("hashchange", go);
    document.addEventListener("keydown", key);
    go();
  });

  function build(box) {
    search = el("input", { type: "search", placeholder: "5/7515, 5.3, a token", spellcheck: "false",
      "aria-label": "Find a feature, a head or a token", autocomplete: "off",
      onkeydown: (event) => {
        if (event.key === "Enter") find(search.value);
        else if (event.key === "Escape") search.blur();
      } });
    themeButton = el("button", { type: "button", class: "sag-button", "data-act": "theme",
      onclick: () => setTheme(THEMES[(THEMES.indexOf(theme) + 1) % THEMES.length], true) });
    const { title } = cards.site;
    main = el("main", { class: "sac-page" });
    root = el("div", { class: "sag sac", "data-theme": "auto" },
      el("header", { class: "sac-bar-top" },
        el("a", { class: "sac-home", href: "#", onclick: (event) => {
          event.preventDefault();
          location.hash = cards.lastIndex && address() !== "" ? cards.lastIndex : "#";
        } }, "Cards ", el("span", {}, sag.bdi(sag.shown(title)))),
        el("div", { class: "sag-search" }, search),
        el("div", { class: "sag-tools" }, themeButton,
          el("button", { type: "button", class: "sag-button", "data-act": "help",
            onclick: () => help.showModal() }, "Keys"))),
      main, (help = helpBox()));
    box.replaceChildren(root);
  }

  function helpBox() {
    const keys = [
      ["← →, k j", "the feature or head before, after"],
      ["d", "where all examples come from, and back"],
      ["h", "the feature's strongest head"],
      ["u", "up to the list"],
      ["Tab, Enter", "the next firing; keep its sources shown"],
      ["/", "search"],
    ];
    const box = el("dialog", { class: "sag-help", "aria-label": "Keys" }, el("h2", {}, "Keys"),
      el("dl", {}, keys.map(([name, what]) => [el("dt", {}, el("kbd", {}, name)), el("dd", {}, what)])),
      el("p", {}, "Every card has an address of its own, after the # in the page's address."),
      el("button", { type: "button", class: "sag-button", onclick: () => box.close() }, "Close"));
    return box;
  }

  function setTheme(wanted, keep) {
    theme = THEMES.includes(wanted) ? wanted : "auto";
    root.dataset.theme = theme;
    document.documentElement.dataset.theme = theme;
    themeButton.textContent = NAMES[theme];
    themeButton.setAttribute("aria-label", `Colours: ${NAMES[theme]}; change`);
    if (keep) sag.remember("theme", theme);
  }

  const address = () => {
    try {
      return decodeURIComponent(location.hash.slice(1));
    } catch {
      return location.hash.slice(1);
    }
  };

  async function go() {
    const mine = ++turn;
    const asked = address();
    step = null;
    const wanted = asked === "" || asked.startsWith("?") ? null : cards.parse(asked);
    document.title = (wanted ? asked + " · " : "") + sag.shown(cards.site.title);
    const fresh = el("main", { class: "sac-page" });
    try {
      let made = null;
      if (asked === "" || asked.startsWith("?")) {
        main.replaceWith(fresh);
        main = fresh;
        await cards.showIndex(main, location.hash.slice(2));
      } else if (!wanted) cards.showProblem(fresh, `Nothing is known by the name “${asked}”.`);
      else if (wanted.head !== undefined) made = await cards.showHead(fresh, wanted.layer, wanted.head);
      else made = await cards.showFeature(fresh, wanted.layer, wanted.feature);
      if (mine !== turn) return;
      step = made || null;
    } catch (error) {
      if (mine !== turn) return;
      cards.showProblem(fresh, error.message);
    }
    if (main !== fresh) {
      main.replaceWith(fresh);
      main = fresh;
    }
    window.scrollTo(0, 0);
    const title = main.querySelector("h1");
    if (title) title.focus({ preventScroll: true });
    cards.ready = location.hash;
  }

  /** A card's first lines: its name, and the way to its neighbours. */
  cards.top = (name, tags, [before, beforeName], [after, afterName], ...more) =>
    el("div", { class: "sac-top" },
      el("h1", { tabindex: "-1" }, name),
      el("div", { class: "sac-tags" }, tags),
      el("nav", { class: "sag-tools", "aria-label": "Neighbours" }, more,
        el("a", { class: "sag-button", href: before, "aria-label": beforeName, title: beforeName + " (k)" }, "‹"),
        el("a", { class: "sag-button", href: after, "aria-label": afterName, title: afterName + " (j)" }, "›")));

  cards.showProblem = function (box, text) {
    box.replaceChildren(el("h1", { tabindex: "-1" }, "Nothing here"), el("p", { role: "alert" }, sag.shown(text)),
      el("p", {}, el("a", { href: "#" }, "To all features")));
    return null;
  };

  function find(text) {
    const wanted = cards.parse(text);
    if (wanted) {
      location.hash = wanted.head === undefined ? cards.featureLink(wanted.layer, wanted.feature)
        : cards.headLink(wanted.layer, wanted.head);
    } else {
      const said = new URLSearchParams();
      if (text.trim()) {
        said.set("q", text);
        said.set("layer", "all");
      }
      location.hash = "#?" + said.toString();
    }
  }

  function key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey || help.open) return;
    if (/^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName)) return;
    const act = {
      ArrowRight: () => step && (location.hash = step(1)),
      ArrowLeft: () => step && (location.hash = step(-1)),
      j: () => step && (location.hash = step(1)),
      k: () => step && (location.hash = step(-1)),
      d: () => step && step.paint && step.paint(),
      h: () => step && step.up && (location.hash = step.up),
      u: () => (location.hash = cards.lastIndex || "#"),
      "/": () => search.focus(),
      "?": () => help.showModal(),
    }[event.key];
    if (!act) return;
    event.preventDefault();
    act();
  }
})(window.SaeAttnGraph, window.SaeAttnCards);
