/* The explorer's page. Texts of prompts and models are only ever text nodes. All that counts is in
   `state`, which is kept in this tab and in saved sessions; each question carries its prompt, so
   nothing here depends on a server having been the same one before. */
(function () {
  "use strict";

  const KEY = "sae-attn-explore";
  const $ = (id) => document.getElementById(id);
  const blank = () => ({
    prompt: "", ran: "", cell: null, trail: [], source: null, pair: null, edits: [], newTokens: 12,
    target: { kind: "top", token: "", wrong: "", position: -1, nodes: 0.8, max: 60 }, built: false,
  });
  let state = blank();
  let info = null;
  let opened = null; // the answer about the prompt that ran
  let component = null; // the graph
  let generation = 0; // answers to questions of an earlier prompt are dropped

  // -- small tools -------------------------------------------------------------------------------

  function el(name, attributes, ...children) {
    const made = document.createElement(name);
    for (const [key, value] of Object.entries(attributes || {})) {
      if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
      else if (value === true) made.setAttribute(key, "");
      else if (value !== false && value != null) made.setAttribute(key, value);
    }
    made.append(...children.filter((child) => child != null));
    return made;
  }

  function fill(id, ...children) {
    const node = typeof id === "string" ? $(id) : id;
    node.replaceChildren(...children.filter((child) => child != null));
  }

  // What is invisible, or turns the line around, is spelled out.
  const hidden = /[\u0000-\u001f\u007f-\u00a0\u00ad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff\ufff9-\uffff]/gu;
  const shown = (text) =>
    String(text).replace(hidden, (c) =>
      c === "\n" ? "\u23ce" : c === "\t" ? "\u21e5" : "\\u" + c.codePointAt(0).toString(16).padStart(4, "0")
    );
  const token = (text) => el("span", { class: "token", dir: "auto" }, shown(text) || "\u2205");
  const sign = (value) => (value < 0 ? "\u2212" : "+") + Math.abs(value).toFixed(4);
  const number = (value) => (value == null ? "?" : value < 0 ? "\u2212" + Math.abs(value).toFixed(4) : value.toFixed(4));
  const percent = (value) => (100 * value).toFixed(value < 0.001 ? 3 : 1) + " %";

  function tint(node, value, most) {
    const strength = most > 0 ? Math.min(Math.abs(value) / most, 1) : 0;
    const colour = value < 0 ? "--minus" : "--plus";
    node.style.backgroundColor = `rgba(var(${colour}), ${(0.75 * strength).toFixed(3)})`;
  }

  function parse(id) {
    let match = /^attn:(\d+):(\d+)@(\d+)$/.exec(id);
    if (match) return { layer: +match[1], feature: +match[2], position: +match[3] };
    match = /@(\d+)$/.exec(id);
    return match ? { position: +match[1] } : {};
  }
  const id = (f) => `attn:${f.layer}:${f.feature}@${f.position}`;
  const same = (a, b) => a && b && id(a) === id(b);

  function tell(text) {
    $("message").hidden = !text;
    $("message").textContent = text || "";
  }

  function remember() {
    state.prompt = $("prompt").value;
    try { sessionStorage.setItem(KEY, JSON.stringify(state)); } catch { /* full, or forbidden */ }
  }

  // -- the server --------------------------------------------------------------------------------

  const pause = (ms) => new Promise((done) => setTimeout(done, ms));
  class Away extends Error {}

  function isAway(away) {
    $("status").textContent = away ? "the server is away; waiting for it" : "";
    $("status").classList.toggle("away", away);
  }

  async function call(method, path, body) {
    let response;
    try {
      response = await fetch(path, {
        method,
        headers: body === undefined ? {} : { "Content-Type": "application/json" },
        body: body === undefined ? undefined : JSON.stringify(body),
        cache: "no-store",
      });
    } catch {
      throw new Away("the server is away");
    }
    let answer = {};
    try { answer = await response.json(); } catch { throw new Away("the answer broke off"); }
    if (!response.ok) {
      const error = new Error(answer.error || `the server answered ${response.status}`);
      error.status = response.status;
      error.gone = Boolean(answer.gone);
      throw error;
    }
    isAway(false);
    return answer;
  }

  /** Like `call`, but waits for a server that is away or full. */
  async function patient(method, path, body, stopped) {
    for (let wait = 300; ; wait = Math.min(wait * 1.5, 3000)) {
      try {
        return await call(method, path, body);
      } catch (error) {
        if (error instanceof Away) isAway(true);
        else if (error.status !== 503) throw error;
        if (stopped && stopped()) throw error;
        await pause(wait);
      }
    }
  }

  const LABELS = {
    open: "Running the prompt", dfa: "Attributing to sources", sources: "Reading a source",
    qk: "Reading a score", graph: "Building the graph", export: "Writing the file",
    intervene: "Running with the edits",
  };

  /** Asks, shows progress with a button to cancel, and gives the answer; null if cancelled. */
  async function ask(kind, question) {
    let stop = false;
    const bar = el("progress", { max: 1 });
    const what = el("span", { class: "what" });
    const row = el("div", { class: "job", "data-kind": kind }, el("b", {}, LABELS[kind]), bar, what,
      el("button", { type: "button", onclick: () => { stop = true; } }, "Cancel"));
    const appear = setTimeout(() => $("jobs").append(row), 150); // quick ones need none
    try {
      let job = null;
      for (let wait = 40; ; wait = Math.min(wait * 1.3, 500)) {
        if (job === null) {
          job = await patient("POST", "/api/jobs", { ...question, kind }, () => stop);
        } else {
          try {
            job = await patient("GET", `/api/jobs/${job.id}`, undefined, () => stop);
          } catch (error) {
            if (!error.gone) throw error;
            job = null; // another server since: ask again
            continue;
          }
        }
        if (stop) {
          await call("DELETE", `/api/jobs/${job.id}`).catch(() => {});
          return null;
        }
        if (job.state === "done" || job.state === "failed") {
          call("DELETE", `/api/jobs/${job.id}`).catch(() => {});
          if (job.state === "failed") throw new Error(job.error);
          return job.result;
        }
        if (job.state === "cancelled") return null;
        if (job.state === "running") bar.value = job.share;
        what.textContent = job.state === "queued" ? `waiting, ${job.ahead} before it` : job.what;
        await pause(wait);
      }
    } catch (error) {
      if (stop) return null;
      throw error;
    } finally {
      clearTimeout(appear);
      row.remove();
    }
  }

  /** An answer about the prompt that ran, or null if cancelled, failed or out of date. */
  async function about(kind, question) {
    const asked = generation;
    tell("");
    try {
      const answer = await ask(kind, { prompt: state.ran, ...question });
      return asked === generation ? answer : null;
    } catch (error) {
      if (asked === generation) tell(error.message);
      return null;
    }
  }

  // -- prompt and features -----------------------------------------------------------------------

  async function open(keep) {
    generation += 1;
    const text = $("prompt").value;
    const before = state.ran;
    state.ran = text;
    const answer = await about("open", {});
    if (answer === null) { state.ran = before; return false; }
    opened = answer;
    if (!keep) {
      Object.assign(state, { cell: null, trail: [], source: null, pair: null, built: false });
      state.edits = state.edits.filter((edit) => edit.position === null);
      closeGraph();
      fill("effect");
    }
    for (const part of ["s-features", "s-edits", "s-graph"]) $(part).hidden = false;
    drawNext();
    drawGrid();
    drawCell();
    drawEdits();
    await drawTrail();
    remember();
    return true;
  }

  function drawNext() {
    const rows = opened.next.slice(0, 6).map((row) =>
      el("span", {}, token(row.token.text), ` ${percent(row.probability)}  `));
    fill("next", el("p", {}, "Most likely next: ", ...rows));
  }

  function byCell() {
    const cells = new Map();
    for (const [layer, position, feature, activation, pre] of opened.features) {
      const key = `${layer}.${position}`;
      if (!cells.has(key)) cells.set(key, []);
      cells.get(key).push({ layer, position, feature, activation, pre });
    }
    return cells;
  }

  function drawGrid() {
    const cells = byCell();
    const most = Math.max(1, ...[...cells.values()].map((cell) => cell.length));
    const rows = [...opened.layers].reverse().map((layer) =>
      el("tr", {}, el("th", { scope: "row" }, `layer ${layer}`),
        ...opened.tokens.map((_, position) => {
          const cell = cells.get(`${layer}.${position}`) || [];
          const button = el("button", {
            type: "button", "data-cell": `${layer}.${position}`,
            "aria-label": `${cell.length} features of layer ${layer} at position ${position}`,
            onclick: () => { state.cell = { layer, position }; drawGrid(); drawCell(); remember(); },
          }, String(cell.length));
          tint(button, cell.length, most);
          const on = state.cell && state.cell.layer === layer && state.cell.position === position;
          button.classList.toggle("on", Boolean(on));
          return el("td", {}, button);
        })));
    const foot = el("tr", {}, el("th"), ...opened.tokens.map((text, position) =>
      el("th", { scope: "col", class: "column" }, el("small", {}, String(position)), el("br"), token(text))));
    fill("grid", el("tbody", {}, ...rows), el("tfoot", {}, foot));
  }

  function drawCell() {
    if (!state.cell) return fill("cell");
    const { layer, position } = state.cell;
    const found = (byCell().get(`${layer}.${position}`) || []).sort((a, b) => b.activation - a.activation);
    const chips = found.map((f) => {
      const chip = el("button", { type: "button", "data-feature": id(f), onclick: () => follow(f, true) },
        String(f.feature), el("small", {}, f.activation.toFixed(2)));
      chip.classList.toggle("on", same(state.trail.at(-1), f));
      return chip;
    });
    return fill("cell", el("h3", {}, `Layer ${layer} at ${position} `, token(opened.tokens[position] ?? "")),
      el("div", { class: "chips" }, ...chips),
      found.length ? null : el("p", { class: "hint" }, "No feature is active here."));
  }

  // -- the trail: DFA, sources, recursion --------------------------------------------------------

  function follow(feature, anew) {
    const { layer, position } = feature;
    const at = state.trail.findIndex((one) => same(one, feature));
    state.trail = anew ? [feature] : at >= 0 ? state.trail.slice(0, at + 1) : [...state.trail, feature];
    state.trail = state.trail.map((f) => ({ layer: f.layer, feature: f.feature, position: f.position }));
    state.cell = { layer, position };
    state.source = state.pair = null;
    drawGrid();
    drawCell();
    return drawTrail();
  }

  async function drawTrail() {
    const current = state.trail.at(-1);
    $("s-trail").hidden = !current;
    fill("sources");
    fill("qk");
    if (!current) { fill("trail"); fill("feature"); return; }
    fill("trail", ...state.trail.flatMap((f, i) => [
      i ? el("span", {}, "\u2190") : null,
      el("button", { type: "button", "data-trail": id(f), onclick: () => follow(f, false) },
        `${f.layer}:${f.feature} at ${f.position} `, token(opened.tokens[f.position] ?? "")),
    ]));
    remember();
    const answer = await about("dfa", current);
    if (!answer || !same(state.trail.at(-1), current)) return;
    drawFeature(answer);
    if (state.source !== null) await drawSources();
    if (state.pair) await drawPair();
  }

  function drawFeature(dfa) {
    const url = opened.neuronpedia[dfa.layer];
    const most = Math.max(...dfa.by_head_and_source.flat().map(Math.abs));
    const heads = dfa.by_head_and_source.map((row, head) => {
      const total = row.reduce((a, b) => a + b, 0);
      return el("tr", {}, el("th", { scope: "row" }, `${dfa.layer}.${head}`),
        ...row.map((value, source) => {
          const cell = el("td", {}, el("button", {
            type: "button", "data-pair": `${head}.${source}`, title: `why head ${dfa.layer}.${head} looks at ${source}`,
            onclick: () => { state.source = source; state.pair = { head, key: source }; remember(); drawSources(); drawPair(); },
          }, sign(value)));
          tint(cell, value, most);
          return cell;
        }), el("td", {}, sign(total)));
    });
    const sums = opened.tokens.slice(0, dfa.position + 1).map((_, p) =>
      dfa.by_head_and_source.reduce((sum, row) => sum + row[p], 0));
    const head = el("thead", {}, el("tr", {}, el("th", {}, "head"), ...sums.map((value, p) => {
      const column = el("th", { scope: "col" }, el("button", {
        type: "button", "data-source": p, title: `what writes at position ${p}`,
        onclick: () => { state.source = p; state.pair = null; fill("qk"); remember(); drawSources(); },
      }, el("small", {}, String(p)), el("br"), token(opened.tokens[p])));
      return column;
    }), el("th", {}, "sum")));
    const foot = el("tfoot", {}, el("tr", {}, el("th", {}, "sum"), ...sums.map((value) => {
      const cell = el("td", {}, sign(value));
      tint(cell, value, Math.max(...sums.map(Math.abs)));
      return cell;
    }), el("td", {}, sign(sums.reduce((a, b) => a + b, 0)))));
    const edit = (how, amount) => addEdit({ ...feature(dfa), how, amount });
    fill("feature",
      el("div", { class: "numbers" },
        el("span", {}, "activation ", el("b", {}, number(dfa.activation))),
        el("span", {}, "pre-activation ", el("b", {}, number(dfa.pre_activation)), " = heads ",
          el("b", {}, sign(sums.reduce((a, b) => a + b, 0))), ", constant ", el("b", {}, sign(dfa.constant))),
        url ? el("a", { href: `${url}/${dfa.feature}`, target: "_blank", rel: "noopener noreferrer" }, "Neuronpedia") : null),
      el("div", { class: "chips" },
        el("button", { type: "button", id: "ablate", onclick: () => edit("ablate", 0) }, "Ablate it"),
        el("button", { type: "button", id: "scale", onclick: () => edit("scale", 2) }, "Scale it"),
        el("button", { type: "button", id: "explain", onclick: () => { state.target.kind = "feature"; drawTarget(); $("build").requestSubmit(); } }, "Build its graph")),
      el("p", { class: "hint" }, "By head and source position. Click a token to see who writes there, a number to see why the head looks there."),
      el("div", { class: "scroll" }, el("table", { class: "heat" }, head, el("tbody", {}, ...heads), foot)));
  }
  const feature = ({ layer, feature, position }) => ({ layer, feature, position });

  async function drawSources() {
    const current = state.trail.at(-1);
    const source = state.source;
    const answer = await about("sources", { ...current, source });
    if (!answer || !same(state.trail.at(-1), current) || state.source !== source) return;
    const most = Math.max(...answer.rows.map((row) => Math.abs(row.weight)), 0);
    const rows = answer.rows.map((row) => {
      const place = parse(row.id);
      const cell = el("td", {}, sign(row.weight));
      tint(cell, row.weight, most);
      const name = place.feature === undefined ? row.id
        : el("button", { type: "button", "data-upstream": row.id, onclick: () => follow(place, false) }, row.id);
      return el("tr", {}, el("td", { class: "text" }, name), cell,
        el("td", {}, row.activation === undefined ? "" : row.activation.toFixed(3)));
    });
    fill("sources", el("h3", {}, `Who writes at ${source} `, token(opened.tokens[source])),
      el("p", { class: "hint" }, `Edges from here sum to ${sign(answer.here)}; the table above adds the value bias. Click a feature to go on from it.`),
      el("div", { class: "scroll" }, el("table", {}, el("thead", {}, el("tr", {},
        el("th", { class: "text" }, "writer"), el("th", {}, "edge"), el("th", {}, "activation"))), el("tbody", {}, ...rows))),
      answer.left_out ? el("p", { class: "hint" }, `${answer.left_out} weaker ones are not shown.`) : null);
  }

  async function drawPair() {
    const current = state.trail.at(-1);
    const pair = state.pair;
    const answer = await about("qk", { layer: current.layer, head: pair.head, query: current.position, key: pair.key });
    if (!answer || !same(state.trail.at(-1), current) || state.pair !== pair) return;
    const most = Math.max(...answer.terms.map((term) => Math.abs(term[2])), 0);
    const name = (text) => {
      const place = parse(text);
      return place.feature === undefined ? el("span", {}, text)
        : el("button", { type: "button", onclick: () => follow(place, false) }, text);
    };
    fill("qk",
      el("h3", {}, `Head ${answer.layer}.${answer.head}: `, token(opened.tokens[answer.query]), " looks at ", token(opened.tokens[answer.key])),
      el("div", { class: "numbers" },
        el("span", {}, "attention ", el("b", {}, percent(answer.pattern))),
        el("span", {}, "score ", el("b", {}, number(answer.score))),
        el("span", {}, "against its rivals ", el("b", {}, sign(answer.relative_score)))),
      el("p", { class: "hint" }, `The strongest of ${answer.n_terms} terms; all of them sum to the score.`),
      el("div", { class: "scroll" }, el("table", {}, el("thead", {}, el("tr", {},
        el("th", { class: "text" }, "query side"), el("th", { class: "text" }, "key side"), el("th", {}, "term"))),
        el("tbody", {}, ...answer.terms.map(([query, key, weight]) => {
          const cell = el("td", {}, sign(weight));
          tint(cell, weight, most);
          return el("tr", {}, el("td", { class: "text" }, name(query)), el("td", { class: "text" }, name(key)), cell);
        })))));
  }

  // -- interventions -----------------------------------------------------------------------------

  function addEdit(edit) {
    state.edits = state.edits.filter((one) => !(one.layer === edit.layer && one.feature === edit.feature && one.position === edit.position));
    state.edits.push(edit);
    drawEdits();
    remember();
  }

  function drawEdits() {
    const rows = state.edits.map((edit, i) => {
      const amount = el("input", {
        type: "number", step: "any", value: edit.amount, "aria-label": "amount",
        oninput: (event) => { edit.amount = event.target.valueAsNumber; remember(); },
      });
      amount.hidden = edit.how === "ablate";
      const how = el("select", { "aria-label": "how", onchange: (event) => { edit.how = event.target.value; drawEdits(); remember(); } },
        ...[["ablate", "ablate"], ["scale", "multiply by"], ["set", "set to"]].map(([value, text]) =>
          el("option", { value, selected: edit.how === value }, text)));
      const everywhere = el("input", {
        type: "checkbox", checked: edit.position === null, "aria-label": "everywhere",
        onchange: (event) => { edit.position = event.target.checked ? null : edit.was ?? 0; drawEdits(); remember(); },
      });
      if (edit.position !== null) edit.was = edit.position;
      return el("div", { class: "edit", "data-edit": i }, how,
        el("span", {}, `feature ${edit.layer}:${edit.feature}` + (edit.position === null ? "" : ` at ${edit.position}`)),
        amount, el("label", {}, everywhere, " everywhere"),
        el("button", { type: "button", "aria-label": "remove", onclick: () => { state.edits.splice(i, 1); drawEdits(); remember(); } }, "\u00d7"));
    });
    fill("edits", ...rows, rows.length ? null : el("p", { class: "hint" }, "Pick a feature and ablate or scale it; the next token and the text are shown before and after."));
  }

  async function apply() {
    const edits = state.edits.map(({ layer, feature, position, how, amount }) => ({ layer, feature, position, how, amount }));
    const answer = await about("intervene", { edits, new_tokens: state.newTokens });
    if (!answer) return;
    const rows = answer.tokens.map((row) => {
      const change = row.edited - row.clean;
      return el("tr", {}, el("td", { class: "text" }, token(row.token.text)),
        el("td", {}, number(row.clean)), el("td", {}, number(row.edited)),
        el("td", { class: change < 0 ? "down" : "up" }, sign(change)),
        el("td", {}, percent(row.clean_probability)), el("td", {}, percent(row.edited_probability)));
    });
    const text = (label, said, mark) => said === undefined ? null
      : el("div", { "data-text": label }, el("b", {}, label + ": "), shown(opened.tokens.join("")), mark ? el("mark", {}, shown(said)) : shown(said));
    fill("effect",
      el("p", {}, "KL divergence of the next token, clean from edited: ", el("b", { id: "kl" }, answer.kl.toExponential(3)), " nats"),
      el("div", { class: "scroll" }, el("table", { id: "logits" }, el("thead", {}, el("tr", {},
        ...["next token", "logit", "edited", "change", "probability", "edited"].map((name, i) => el("th", { class: i ? "" : "text" }, name)))),
        el("tbody", {}, ...rows))),
      el("div", { class: "texts" }, text("before", answer.clean_text, false), text("after", answer.edited_text, answer.edited_text !== answer.clean_text)));
  }

  // -- graph -------------------------------------------------------------------------------------

  function drawTarget() {
    const t = state.target;
    $("target-kind").value = t.kind;
    $("target-token").value = t.token;
    $("target-wrong").value = t.wrong;
    $("target-position").value = t.position;
    $("keep-nodes").value = t.nodes;
    $("max-nodes").value = t.max;
    $("l-token").hidden = $("l-position").hidden = !["token", "difference"].includes(t.kind);
    $("l-wrong").hidden = t.kind !== "difference";
  }

  function readTarget() {
    state.target = {
      kind: $("target-kind").value, token: $("target-token").value, wrong: $("target-wrong").value,
      position: $("target-position").valueAsNumber, nodes: $("keep-nodes").valueAsNumber, max: $("max-nodes").valueAsNumber,
    };
    remember();
  }

  function graphQuestion() {
    const t = state.target;
    const question = { nodes: t.nodes, max_nodes: t.max };
    if (t.kind === "token") question.target = { token: t.token, position: t.position };
    if (t.kind === "difference") {
      if (!t.wrong) { tell("Which token should be subtracted?"); return null; }
      question.target = { token: t.token, wrong: t.wrong, position: t.position };
    }
    if (t.kind === "feature") {
      const current = state.trail.at(-1);
      if (!current) { tell("Pick a feature first: click a cell, then a feature."); return null; }
      question.target = { node: id(current) };
    }
    return question;
  }

  function closeGraph() {
    if (component) component.destroy();
    component = null;
    $("graph").classList.remove("has");
    fill("graph");
  }

  async function build() {
    const question = graphQuestion();
    const answer = question && (await about("graph", question));
    if (!answer) return;
    closeGraph();
    $("graph").classList.add("has");
    component = window.SaeAttnGraph.mount($("graph"), answer.data, { onSelect: selected });
    state.built = true;
    remember();
  }

  function selected(name) {
    const place = name && parse(name);
    if (place && place.feature !== undefined && opened && opened.layers.includes(place.layer)) follow(place, true);
  }

  async function download() {
    const question = graphQuestion();
    const answer = question && (await about("export", { ...question, format: $("format").value }));
    if (!answer) return;
    const bytes = Uint8Array.from(atob(answer.base64), (c) => c.charCodeAt(0));
    const url = URL.createObjectURL(new Blob([bytes]));
    const link = el("a", { href: url, download: answer.name });
    document.body.append(link);
    link.click();
    link.remove();
    setTimeout(() => URL.revokeObjectURL(url), 10000);
  }

  // -- sessions ----------------------------------------------------------------------------------

  function drawSessions(names) {
    const before = $("sessions").value;
    fill("sessions", ...names.map((name) => el("option", { value: name }, name)));
    if (names.includes(before)) $("sessions").value = before;
  }

  async function stored(method, name, body) {
    tell("");
    try {
      return await patient(method, `/api/sessions/${encodeURIComponent(name)}`, body);
    } catch (error) {
      tell(error.message);
      return null;
    }
  }

  async function restore(saved) {
    const whole = blank();
    for (const key of Object.keys(whole)) if (saved && key in saved) whole[key] = saved[key];
    whole.target = { ...blank().target, ...whole.target };
    for (const key of ["trail", "edits"]) if (!Array.isArray(whole[key])) whole[key] = [];
    state = whole;
    $("prompt").value = String(state.ran || state.prompt || "");
    $("new-tokens").value = state.newTokens;
    drawTarget();
    closeGraph();
    fill("effect");
    if (!state.ran) return;
    const wasBuilt = state.built;
    if ((await open(true)) && wasBuilt) await build();
  }

  // -- start -------------------------------------------------------------------------------------

  const on = (name, event, act) => $(name).addEventListener(event, (e) => { e.preventDefault(); act(e); });
  on("ask", "submit", () => open(false));
  $("prompt").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey) { event.preventDefault(); open(false); }
  });
  $("prompt").addEventListener("input", remember);
  on("apply", "submit", () => { state.newTokens = $("new-tokens").valueAsNumber; remember(); apply(); });
  on("clear-edits", "click", () => { state.edits = []; drawEdits(); fill("effect"); remember(); });
  on("build", "submit", () => { readTarget(); build(); });
  $("build").addEventListener("change", () => { readTarget(); drawTarget(); });
  on("export", "click", () => { readTarget(); download(); });
  on("save", "submit", async () => {
    remember();
    const name = $("session-name").value.trim();
    // A slash would make another address of it; everything else is the server's to judge.
    if (!name || /[/\\]/.test(name)) return tell("Give the session a name of letters, digits, spaces, '-' or '_'.");
    const answer = await stored("PUT", name, { state });
    if (answer) { drawSessions(answer.names); $("sessions").value = name; }
  });
  on("load", "click", async () => {
    const name = $("sessions").value;
    const answer = name && (await stored("GET", name));
    if (answer) { $("session-name").value = name; await restore(answer.state); }
  });
  on("delete", "click", async () => {
    const name = $("sessions").value;
    const answer = name && (await stored("DELETE", name));
    if (answer) drawSessions(answer.names);
  });

  async function watch() {
    for (;;) {
      await pause(4000);
      if (document.hidden) continue;
      try {
        const now = await call("GET", "/api/info");
        if (info && now.instance !== info.instance) { info = now; drawModel(); }
      } catch (error) {
        if (error instanceof Away) isAway(true);
      }
    }
  }

  function drawModel() {
    $("model").textContent = `${shown(info.model)} on ${info.host}: ${info.n_layers} layers, ${info.n_heads} heads; SAEs in layers ${Object.keys(info.saes).join(", ")}`;
    fill("format", ...info.formats.map((name) => el("option", { value: name }, name)));
  }

  async function start() {
    info = await patient("GET", "/api/info");
    drawModel();
    drawTarget();
    drawSessions((await patient("GET", "/api/sessions")).names);
    let kept = null;
    try { kept = JSON.parse(sessionStorage.getItem(KEY)); } catch { /* none */ }
    if (kept) await restore(kept);
    document.body.dataset.ready = "yes";
    watch();
  }
  start().catch((error) => tell(error.message));
})();
