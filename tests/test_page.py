"""The HTML page of a graph, as a reader uses it: in a browser, by pointer and by keyboard."""

from __future__ import annotations

import itertools
import json
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import networkx as nx
import numpy as np
import pytest
from browser import chromium

import sae_attn_plugin as sap
from sae_attn_plugin.graphs.html import page_data, page_html, script, style

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Locator, Page

    from sae_attn_plugin.lens import Run

    Open = Callable[..., Page]

HOSTILE = (
    "<script>window.hacked=1</script>",
    "</script><img src=x onerror=window.hacked=1>",
    "<!--",
    "\"'><svg onload=window.hacked=1>",
    "\u202eevil\u2066",
    "\u2028\u2029",
    "\ud83d",
    "{{constructor}}",
    " \U0001f468\u200d\U0001f469\u200d\U0001f467",
    "مرحبا",
    "javascript:alert(1)",
    "&lt;b&gt;",
    "\x00\x1b[31m",
    "\n",
    "   ",
)


@pytest.fixture(scope="module")
def run() -> Run:
    return sap.demo.load().run(sap.demo.ioi_prompt())


@pytest.fixture(scope="module")
def graph(run: Run) -> nx.DiGraph:
    return run.graph(sap.LogitDiff(" Mary", " John"), max_nodes=60)


@pytest.fixture(scope="module")
def rich(run: Run, graph: nx.DiGraph) -> nx.DiGraph:
    examples = {
        (node.layer, node.feature): [{"tokens": ["<b>", " here"], "activations": [0.0, 2.0]}]
        for node in map(sap.Node.parse, graph)
        if node.layer is not None and node.feature is not None
    }
    return sap.enrich(graph, run, examples=examples)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as started:
        yield started


@pytest.fixture
def show(browser: Browser, tmp_path: Path) -> Iterator[Open]:
    """Opens a graph's page, offline; anything the page complains about fails the test."""
    pages, complaints = [], []

    def opened(graph: nx.DiGraph, fragment: str = "", **context: Any) -> Page:
        path = tmp_path / f"{len(pages)}.html"
        sap.graph_to_html(graph, path)
        page = browser.new_context(viewport={"width": 1300, "height": 850}, **context).new_page()
        pages.append(page)
        page.on("console", lambda m: complaints.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on(
            "request",
            lambda r: None if r.url.startswith("file:") else complaints.append(r.url),
        )
        page.goto(f"{path.as_uri()}{fragment}")
        wait(page, "saeAttnPage.timing.first > 0")
        return page

    opened.complaints = complaints  # type: ignore[attr-defined]
    yield opened
    for page in pages:
        page.context.close()
    assert not complaints


def wait(page: Page, condition: str) -> None:
    """Playwright's own way needs eval, which the pages forbid."""
    came = page.evaluate(
        "() => new Promise((done) => { const until = Date.now() + 60000; const look = () => "
        f"{{ if ({condition}) done(true); else if (Date.now() > until) done(false); "
        "else setTimeout(look, 10); }; look(); })"
    )
    assert came, f"{condition} did not come true in a minute"


def node_at(page: Page, name: str) -> Locator:
    return page.locator(f".sag-node[data-id={json.dumps(name)}]")


def shown_nodes(page: Page) -> int:
    return page.locator(".sag-node:not(.is-out)").count()


def state(page: Page) -> dict[str, Any]:
    return page.evaluate("saeAttnPage.state()")


def top_feature(graph: nx.DiGraph) -> str:
    features = [name for name in graph if name.startswith("attn:")]
    return max(features, key=lambda name: graph.nodes[name]["influence"])


def written(text: str) -> float:
    """A number as the page writes it."""
    return float(text.replace("−", "-").replace(",", ""))


# -- the file ------------------------------------------------------------------------------------


def test_one_file_that_loads_nothing(rich: nx.DiGraph, tmp_path: Path) -> None:
    sap.save(rich, tmp_path / "a.html")
    sap.save(rich, tmp_path / "rich.json")
    sap.save(sap.load(tmp_path / "rich.json"), tmp_path / "b.html")
    text = (tmp_path / "a.html").read_text(encoding="utf-8")
    assert text == (tmp_path / "b.html").read_text(encoding="utf-8")
    policy = re.search(r'Security-Policy" content="([^"]+)"', text)
    assert policy is not None
    assert policy[1].startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy[1]
    assert not re.findall(r"<(?:link|iframe|img|script src)", text)
    # apart from the one namespace of SVG, the assets name no address
    assert set(re.findall(r"https?://[^\"'`\s]+", script() + style())) == {
        "http://www.w3.org/2000/svg"
    }
    assert "innerHTML" not in script()


def test_data_holds_the_graph(run: Run, graph: nx.DiGraph, rich: nx.DiGraph) -> None:
    data = json.loads(json.dumps(page_data(rich)))
    names = [node["id"] for node in data["nodes"]]
    assert names == list(graph)
    for source, target, weight, share, *_ in data["edges"]:
        edge = graph.edges[names[source], names[target]]
        assert weight == pytest.approx(edge["weight"], rel=1e-6)
        into = sum(abs(w) for *_, w in graph.in_edges(names[target], data="weight"))
        assert share == pytest.approx(abs(edge["weight"]) / into, rel=1e-5)
    # each head's part adds up to the edge, and each DFA to the pre-activation
    split = [row for row in data["edges"] if len(row) > 4]
    assert len(split) > 100
    for _, _, weight, _, heads in split:
        size = sum(map(abs, heads.values()))
        assert sum(heads.values()) == pytest.approx(weight, abs=1e-5 * size)
    with_dfa = [node for node in data["nodes"] if "dfa" in node]
    assert len(with_dfa) == sum(name.startswith("attn:") for name in graph)
    for node in with_dfa:
        matrix = np.array(node["dfa"]["by_head_and_source"])
        assert matrix.shape == (8, node["position"] + 1)
        total = matrix.sum() + node["dfa"]["constant"]
        assert total == pytest.approx(node["pre_activation"], abs=1e-4)
    with_qk = [node for node in data["nodes"] if "qk" in node]
    assert with_qk
    for node in with_qk:
        for one in node["qk"]:
            pattern = run.capture["pattern", node["layer"]][0, one["head"], one["query"]]
            assert one["pattern"] == pytest.approx(float(pattern[one["key"]]), abs=1e-5)
            total = sum(weight for *_, weight in one["terms"]) + one["rest"]
            assert total == pytest.approx(one["score"], abs=1e-4)


def test_parallel_edges_of_heads_are_added_up(run: Run) -> None:
    attribution = run.attribute(sap.LogitDiff(" Mary", " John")).prune(0.5, 0.5)
    plain = page_data(attribution.to_networkx())
    by_head = page_data(attribution.to_networkx(by="head"))

    def edges(data: dict[str, Any]) -> dict[tuple[str, str], float]:
        ids = [node["id"] for node in data["nodes"]]
        return {(ids[a], ids[b]): weight for a, b, weight, *_ in data["edges"]}

    assert edges(by_head) == pytest.approx(edges(plain), rel=1e-3, abs=1e-4)
    assert any(len(row) > 4 for row in by_head["edges"])


@pytest.mark.parametrize("make", [sap.show, page_data, page_html])
def test_an_empty_graph_is_refused(make: Callable[[nx.DiGraph], Any]) -> None:
    with pytest.raises(sap.InputError, match="no nodes"):
        make(nx.DiGraph())


def test_refusals(run: Run, graph: nx.DiGraph, tmp_path: Path) -> None:
    with pytest.raises(sap.InputError, match=r"ends in \.html"):
        sap.graph_to_html(graph, tmp_path / "graph.txt")
    with pytest.raises(sap.FileError, match="does not exist"):
        sap.graph_to_html(graph, tmp_path / "none" / "graph.html")
    other = run.lens.run([[0, 486, 72]])
    with pytest.raises(sap.InputError, match="another prompt"):
        sap.enrich(graph, other)
    node = sap.Node.parse(top_feature(graph))
    examples: Any = {(node.layer, node.feature): [{}]}
    with pytest.raises(sap.InputError, match="'tokens' and 'activations'"):
        sap.enrich(graph, run, qk=False, examples=examples)
    with pytest.raises(sap.InputError, match="expected at least 0"):
        sap.enrich(graph, run, max_features=-1)
    stranger = graph.copy()
    silent = next(i for i in range(99) if i not in run.features(0, 3)["feature"].tolist())
    stranger.add_edge(f"attn:0:{silent}@3", next(n for n in graph if n.startswith("attn:1")))
    with pytest.raises(sap.InputError, match=f"attn:0:{silent}@3 writes nothing in this run"):
        sap.enrich(stranger, run)
    with pytest.raises(sap.InputError, match="written for others"):
        sap.load(tmp_path / "graph.html")
    assert not list(tmp_path.iterdir())


# -- reading -------------------------------------------------------------------------------------


def test_first_look(show: Open, graph: nx.DiGraph) -> None:
    page = show(graph)
    assert shown_nodes(page) == len(graph)
    assert "= 8.496" in page.locator("h1").inner_text()
    tokens = page.locator(".sag-token bdi").all_inner_texts()
    assert tokens[:4] == ["<|endoftext|>", "When", "John", "and"]
    # layers upward, positions rightward
    place = {
        name: node_at(page, name).bounding_box()
        for name in graph
        if name.startswith(("embed", "attn:", "logit"))
    }
    for name, box in place.items():
        for other, under in place.items():
            here, there = sap.Node.parse(name), sap.Node.parse(other)
            assert box is not None
            assert under is not None
            if here.layer is not None and there.layer is not None and here.layer > there.layer:
                assert box["y"] < under["y"]
            if here.position > there.position and here.kind == there.kind == "embed":
                assert box["x"] > under["x"]
    # size by influence
    features = sorted(
        (name for name in graph if name.startswith("attn:")),
        key=lambda name: graph.nodes[name]["influence"],
    )
    widths = [(place[name] or {})["width"] for name in features]
    assert widths == sorted(widths)
    assert widths[-1] > 1.5 * widths[0]
    # edges are on the canvas in the two colours
    inked = page.evaluate(
        """() => {
          const canvas = document.querySelectorAll('canvas')[1];
          const {data} = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height);
          let blue = 0, orange = 0;
          for (let i = 0; i < data.length; i += 4) {
            if (data[i + 3] < 60) continue;
            if (data[i + 2] > data[i] + 60) blue++; else if (data[i] > data[i + 2] + 60) orange++;
          }
          return [blue, orange];
        }"""
    )
    assert min(inked) > 300


def test_hover_shows_a_card(show: Open, rich: nx.DiGraph) -> None:
    page, name = show(rich), top_feature(rich)
    card = page.locator(".sag-card")
    assert card.is_hidden()
    node_at(page, name).hover()
    card.wait_for(state="visible")
    text = card.inner_text()
    node = sap.Node.parse(name)
    assert f"Feature {node.layer} / {node.feature}" in text
    for word in ("activation", "influence", "attention features", "most from"):
        assert word in text
    assert "has-focus" in (page.locator(".sag-nodes").get_attribute("class") or "")
    page.mouse.move(5, 5)
    card.wait_for(state="hidden")


def test_click_shows_the_ledger(show: Open, rich: nx.DiGraph) -> None:
    page, name = show(rich), top_feature(rich)
    node_at(page, name).click()
    side, attributes = page.locator(".sag-side"), rich.nodes[name]
    assert side.locator(".sag-id code").inner_text() == name
    for by in ("kind", "layer", "token"):
        side.locator(".sag-choice button", has_text=by).click()
        rows = side.locator("[data-part=ledger] tr")
        numbers = [written(t) for t in rows.locator(".sag-num").all_inner_texts()]
        assert numbers[-1] == pytest.approx(attributes["pre_activation"], abs=1e-3)
        assert sum(numbers[:-1]) == pytest.approx(numbers[-1], abs=5e-3)
        names = rows.locator("th").all_inner_texts()
        assert names[-3:] == ["constant", "pruned edges", "= pre-activation"]
        assert numbers[-3] == pytest.approx(attributes["constant"], abs=1e-3)
        assert numbers[-2] == pytest.approx(attributes["pruned_in"], abs=1e-3)
    assert "within" in side.locator("[data-part=ledger] .sag-note").inner_text()
    into = rich.in_degree(name)
    assert f"{into} edges" in side.locator("[data-part=inputs] h3").inner_text()
    side.locator("[data-part=inputs] .sag-more").click()
    assert side.locator("[data-part=inputs] li").count() == into
    # a click on an input leads there
    first = side.locator("[data-part=inputs] li button").first
    source = first.get_attribute("data-to")
    strongest = max(rich.in_edges(name, data="weight"), key=lambda edge: abs(edge[2]))
    assert source == strongest[0]
    first.click()
    assert state(page)["selected"] == source


def test_dfa_as_a_heat_map(show: Open, run: Run, rich: nx.DiGraph) -> None:
    page, name = show(rich), top_feature(rich)
    node_at(page, name).click()
    node, section = sap.Node.parse(name), page.locator("[data-part=dfa]")
    assert node.layer is not None
    assert node.feature is not None
    dfa = run.dfa(node.layer, node.feature, node.position)
    heads = [written(t) for t in section.locator(".sag-head .sag-num").all_inner_texts()]
    assert heads == pytest.approx(dfa.by_head.tolist(), abs=2e-3)
    words = section.locator(".sag-prompt span")
    best = int(dfa.by_source.abs().argmax())
    alpha = "el => Number(getComputedStyle(el).backgroundColor.match(/[0-9.]+(?=\\)$)/)[0])"
    strengths = [words.nth(p).evaluate(alpha) for p in range(node.position + 1)]
    assert int(np.argmax(strengths)) == best
    head = int(dfa.by_head_and_source[:, best].abs().argmax())
    cell = section.locator(f".sag-cells i[data-head='{head}'][data-position='{best}']")
    cell.hover()
    said = section.locator("output").inner_text()
    assert written(said.split()[0]) == pytest.approx(
        float(dfa.by_head_and_source[head, best]), abs=2e-3
    )
    assert f"head {node.layer}.{head}" in said
    other = int((dfa.by_head_and_source.abs().argmax(1) != best).int().argmax())
    section.locator(f".sag-head[data-head='{other}']").click()
    strengths = [words.nth(p).evaluate(alpha) for p in range(node.position + 1)]
    assert int(np.argmax(strengths)) == int(dfa.by_head_and_source[other].abs().argmax())


def test_qk_pairs_and_examples(show: Open, rich: nx.DiGraph) -> None:
    page, name = show(rich), top_feature(rich)
    node_at(page, name).click()
    qk = rich.nodes[name]["qk"][0]
    section = page.locator("[data-part=qk] details").first
    assert f"Head {sap.Node.parse(name).layer}.{qk['head']}" in section.inner_text()
    pairs = section.locator(".sag-pairs li")
    assert pairs.count() == len(qk["terms"])
    assert qk["terms"][0][0] in pairs.first.inner_text()
    number = written(pairs.first.locator(".sag-num").inner_text())
    assert number == pytest.approx(qk["terms"][0][2], abs=1e-2)
    example = page.locator("[data-part=examples] .sag-example").first
    assert example.inner_text().startswith("<b> here")


def test_neuronpedia_link_only_to_the_web(show: Open, graph: nx.DiGraph) -> None:
    first, second = [name for name in graph if name.startswith("attn:")][:2]
    changed = graph.copy()
    changed.nodes[first]["neuronpedia"] = "https://www.neuronpedia.org/gpt2-small/5-att-kk/3"
    changed.nodes[second]["neuronpedia"] = "javascript:window.hacked=1"
    page = show(changed)
    page.evaluate("id => saeAttnPage.select(id)", first)
    link = page.locator(".sag-actions a")
    assert link.get_attribute("href") == changed.nodes[first]["neuronpedia"]
    assert link.get_attribute("rel") == "noopener noreferrer"
    page.evaluate("id => saeAttnPage.select(id)", second)
    assert page.locator(".sag-actions a").count() == 0


# -- filters, pins, groups, search ---------------------------------------------------------------


def slide(page: Page, name: str, value: float) -> None:
    page.locator(f"input[data-filter={name}]").evaluate(
        "(el, value) => { el.value = value; el.dispatchEvent(new Event('input')); }", value
    )


def test_sliders_act_at_once(show: Open, graph: nx.DiGraph) -> None:
    page = show(graph)
    slide(page, "nodes", 50)
    inner = sorted(
        (graph.nodes[n]["influence"] for n in graph if not n.startswith("logit")), reverse=True
    )
    expected = int(np.searchsorted(np.cumsum(inner), 0.5 * sum(inner))) + 1
    assert shown_nodes(page) == expected + 1  # the target stays
    output = page.locator(".sag-slider output").first.inner_text()
    assert output == f"50% · {expected + 1} of {len(graph)}"
    before = page.locator(".sag-slider output").nth(1).inner_text()
    slide(page, "edges", 40)
    after = page.locator(".sag-slider output").nth(1).inner_text()
    kept = [int(re.sub(r"\D", "", text.split("·")[1].split("of")[0])) for text in (before, after)]
    assert 0 < kept[1] < kept[0] / 2
    # by keyboard too
    page.locator("input[data-filter=nodes]").focus()
    page.keyboard.press("Home")
    assert shown_nodes(page) == 1
    page.keyboard.press("End")
    assert shown_nodes(page) == len(graph)


def test_kinds_hide(show: Open, graph: nx.DiGraph) -> None:
    page = show(graph)
    button = page.locator(".sag-kind[data-kind=mlp]")
    button.click()
    assert button.get_attribute("aria-pressed") == "false"
    n_mlp = sum(name.startswith("mlp:") for name in graph)
    assert n_mlp
    assert shown_nodes(page) == len(graph) - n_mlp
    button.click()
    assert shown_nodes(page) == len(graph)


def test_pins_outlive_filters(show: Open, graph: nx.DiGraph) -> None:
    page = show(graph)
    weakest = min(
        (n for n in graph if n.startswith("attn:")), key=lambda n: graph.nodes[n]["influence"]
    )
    node_at(page, weakest).click()
    page.locator("[data-act=pin]").click()
    slide(page, "nodes", 0)
    assert shown_nodes(page) == 2
    assert node_at(page, weakest).is_visible()
    chip = page.locator("[data-part=pins] .sag-chip")
    assert chip.count() == 1
    chip.locator(".sag-chip-x").click()
    assert shown_nodes(page) == 1


def test_groups(show: Open, graph: nx.DiGraph) -> None:
    page = show(graph)
    members = [name for name in graph if name.startswith("attn:1:")][:3]
    for name in members:
        node_at(page, name).click(modifiers=["Shift"])
    page.locator("[data-act=group-name]").fill("S <b>inhibition</b>")
    page.locator("[data-act=group]").click()
    assert state(page)["groups"] == [
        {
            "name": "S <b>inhibition</b>",
            "members": sorted(members, key=lambda n: -graph.nodes[n]["influence"]),
        }
    ]
    assert shown_nodes(page) == len(graph) - 3 + 1
    assert page.locator(".sag-node[data-kind=group]").count() == 1
    side = page.locator(".sag-side")
    assert "3 nodes" in side.inner_text()
    # the weights it writes to a node outside are the sum of its members' edges
    target = 'logit_diff:" Mary"-" John"@14'
    total = sum(graph.edges[n, target]["weight"] for n in members if graph.has_edge(n, target))
    row = side.locator(f"[data-to={json.dumps(target)}]")
    if total:
        assert written(row.locator(".sag-num").inner_text()) == pytest.approx(total, abs=2e-3)
    side.locator("[data-act=rename]").fill("renamed")
    side.locator("[data-act=rename]").press("Enter")
    assert state(page)["groups"][0]["name"] == "renamed"
    # the state is in the address, and a page opened with it looks the same
    wait(page, "location.hash.includes('renamed')")
    again = show(graph, fragment=page.evaluate("location.hash"))
    assert state(again) == state(page)
    assert again.locator(".sag-node[data-kind=group]").count() == 1
    side.locator("[data-act=ungroup]").click()
    assert shown_nodes(page) == len(graph)
    assert state(page)["groups"] == []


def test_supernodes_of_the_graph(show: Open, graph: nx.DiGraph) -> None:
    """Groups that the graph names stand as groups; nodes merged in it are nodes of their own."""
    members = [name for name in graph if name.startswith("attn:2:")][:3]
    named = graph.copy()
    named.graph["supernodes"] = {"movers": members}
    page = show(named)
    assert [group["name"] for group in state(page)["groups"]] == ["movers"]
    assert set(state(page)["groups"][0]["members"]) == set(members)
    merged = sap.contract(graph, {"movers": members})
    page = show(merged)
    (made,) = [name for name in merged if name.startswith("super:")]
    node_at(page, made).click()
    side = page.locator(".sag-side")
    assert side.locator("h2").inner_text() == "movers"
    assert side.locator("[data-part=members] li").all_inner_texts() == merged.nodes[made]["members"]
    numbers = side.locator("[data-part=ledger] .sag-num").all_inner_texts()
    values = [written(text) for text in numbers]
    assert sum(values[:-1]) == pytest.approx(values[-1], abs=5e-3)


def test_search(show: Open, graph: nx.DiGraph) -> None:
    page = show(graph)
    page.keyboard.press("Tab")
    box = page.get_by_role("combobox", name="Search nodes")
    box.fill("mary")
    hits = [n for n in graph if graph.nodes[n]["token"] == " Mary" or "Mary" in n]
    assert page.locator(".sag-node.is-found").count() == len(hits)
    assert page.locator(".sag-results [role=option]").count() == len(hits)
    box.press("ArrowDown")
    box.press("Enter")
    assert state(page)["selected"] in hits
    box.fill("no such thing")
    assert "No node found" in page.locator(".sag-results").inner_text()
    box.press("Escape")
    assert page.locator(".sag-node.is-found").count() == 0
    assert page.locator(".sag-results").is_hidden()
    box.fill(top_feature(graph))
    box.press("Enter")
    assert state(page)["selected"] == top_feature(graph)


def test_copy_a_node_id(show: Open, graph: nx.DiGraph) -> None:
    page, name = show(graph, permissions=["clipboard-read", "clipboard-write"]), top_feature(graph)
    node_at(page, name).click()
    page.locator("[data-act=copy]").click()
    page.locator(".sag-toast", has_text=name).wait_for()
    page.locator(".sag-search input").focus()
    page.keyboard.press("Control+V")
    assert page.locator(".sag-search input").input_value() == name


def test_keyboard(show: Open, graph: nx.DiGraph) -> None:
    page, name = show(graph), top_feature(graph)
    page.evaluate("id => saeAttnPage.select(id)", name)
    node_at(page, name).focus()
    focused = "document.activeElement.getAttribute('data-id')"
    page.keyboard.press("ArrowRight")
    right = page.evaluate(focused)
    assert right != name
    page.keyboard.press("ArrowLeft")
    assert page.evaluate(focused) == name
    for key, higher in (("ArrowUp", True), ("ArrowDown", False)):
        box = node_at(page, page.evaluate(focused)).bounding_box()
        page.keyboard.press(key)
        moved = node_at(page, page.evaluate(focused)).bounding_box()
        assert box is not None
        assert moved is not None
        assert (moved["y"] < box["y"]) == higher
        assert moved["y"] != box["y"]
    node_at(page, name).focus()
    page.keyboard.press("i")
    source = page.evaluate(focused)
    strongest = max(graph.in_edges(name, data="weight"), key=lambda edge: abs(edge[2]))
    assert source == strongest[0]
    page.keyboard.press("Enter")
    assert state(page)["selected"] == source
    page.keyboard.press("p")
    assert state(page)["pins"] == [source]
    page.keyboard.press("m")
    page.keyboard.press("o")
    page.keyboard.press("m")
    page.keyboard.press("g")
    assert len(state(page)["groups"]) == 1
    page.keyboard.press("Escape")
    assert state(page)["selected"] is None
    page.keyboard.press("/")
    assert page.evaluate("document.activeElement.type") == "search"
    page.keyboard.press("Escape")
    page.keyboard.press("?")
    page.locator("dialog[open]").wait_for()
    page.keyboard.press("Escape")
    assert page.locator("dialog").count() == 0


def test_assistive_names(show: Open, graph: nx.DiGraph) -> None:
    page, name = show(graph), top_feature(graph)
    node = sap.Node.parse(name)
    label = node_at(page, name).get_attribute("aria-label") or ""
    assert label.startswith(f"Feature {node.layer} / {node.feature}, at “")
    assert "influence" in label
    assert page.locator(".sag-node[tabindex='0']").count() == 1
    nameless = page.evaluate(
        """() => [...document.querySelectorAll('button, input, [role=button], [role=listbox]')]
          .filter((el) => !(el.getAttribute('aria-label') || el.textContent.trim() || el.title))
          .map((el) => el.outerHTML.slice(0, 80))"""
    )
    assert nameless == []
    node_at(page, name).click()
    assert f"Feature {node.layer} / {node.feature}" in page.locator("[aria-live]").inner_text()


def test_light_and_dark(show: Open, graph: nx.DiGraph) -> None:
    paper = "getComputedStyle(document.querySelector('.sag')).backgroundColor"
    assert show(graph).evaluate(paper) == "rgb(255, 255, 255)"
    page = show(graph, color_scheme="dark")
    dark = page.evaluate(paper)
    assert max(map(int, re.findall(r"\d+", dark))) < 40
    button = page.locator("[data-act=theme]")
    button.click()
    assert button.inner_text() == "Light"
    assert page.evaluate(paper) == "rgb(255, 255, 255)"
    button.click()
    assert page.evaluate(paper) == dark
    page.reload()
    assert page.locator("[data-act=theme]").inner_text() == "Dark"


def test_zoom_and_pan(show: Open, graph: nx.DiGraph) -> None:
    page, name = show(graph), top_feature(graph)
    settled = "new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))"

    def place() -> tuple[float, float]:
        page.evaluate(settled)
        box = node_at(page, name).bounding_box()
        assert box is not None
        return box["x"] + box["width"] / 2, box["y"] + box["height"] / 2

    x, y = place()
    page.mouse.move(x, y)
    page.mouse.wheel(0, -300)
    assert place() == pytest.approx((x, y), abs=3)  # zooms about the pointer
    start = page.locator(".sag-plot").bounding_box()
    assert start is not None
    page.mouse.move(start["x"] + 100, start["y"] + 20)
    page.mouse.down()
    page.mouse.move(start["x"] + 60, start["y"] + 50, steps=4)
    page.mouse.up()
    assert place() == pytest.approx((x - 40, y + 30), abs=3)
    page.get_by_role("button", name="Fit the whole graph").click()
    assert place() == pytest.approx((x, y), abs=1)


# -- what tokens may hold ------------------------------------------------------------------------


def hostile_graph() -> nx.DiGraph:
    graph = nx.DiGraph()
    last = len(HOSTILE) - 1
    target = str(sap.Node("direction", last, label=json.dumps("</script><b>", ensure_ascii=False)))
    graph.graph.update(tokens=list(HOSTILE), targets=[target], model="<img src=x onerror=hacked>")
    graph.add_node(target, influence=1.0, pre_activation=1.0, constant=0.0, pruned_in=0.0)
    for position, token in enumerate(HOSTILE):
        name = f"attn:0:{position}@{position}"
        graph.add_node(
            name, influence=0.5, activation=1.0, pre_activation=1.0, constant=0.1, pruned_in=0.1,
            label=token, dfa={"by_head_and_source": [[0.5] * (position + 1)], "constant": 0.1},
            examples=[{"tokens": [token], "activations": [1.0]}],
        )  # fmt: skip
        graph.add_node(f"embed@{position}", influence=0.2)
        graph.add_edge(f"embed@{position}", name, weight=0.8)
        graph.add_edge(name, target, weight=-0.1)
    return graph


def test_token_text_is_inert(show: Open, tmp_path: Path) -> None:
    graph = hostile_graph()
    page = show(graph)
    assert page.title() == "“</script><b>”"
    for name in graph:
        page.evaluate("id => saeAttnPage.select(id)", name)
        if name.startswith("attn"):
            node_at(page, name).hover()
            page.locator(".sag-card").wait_for(state="visible")
    page.locator(".sag-search input").fill("script")
    page.evaluate(
        "names => saeAttnPage.group(names, '</script><img src=x onerror=hacked=1>')",
        [name for name in graph if name.startswith("attn")][:3],
    )
    assert page.evaluate("typeof window.hacked") == "undefined"
    found = page.evaluate(
        "[...document.querySelectorAll('img, iframe, object, b b, [onerror], [onload]')].length"
    )
    assert found == 0
    assert page.locator("script").count() == 2
    # nothing that steers the text around it is left in what is shown
    steering = page.evaluate(
        "/[\\u202a-\\u202e\\u2066-\\u2069\\u200e\\u200f\\u2028\\u2029\\u0000\\u001b]/"
        ".test(document.body.innerText)"
    )
    assert not steering
    shown = page.locator(".sag-token bdi").all_inner_texts()
    assert shown[0] == "<script>windo…"
    assert shown[4] == "\\u{202E}evil\\…"
    assert "\U0001f468\u200d\U0001f469\u200d\U0001f467" in shown[8]
    assert shown[13] == "↵"
    # and the file itself holds none of it raw
    sap.graph_to_html(graph, tmp_path / "raw.html")
    raw = (tmp_path / "raw.html").read_bytes().decode("utf-8")
    assert "onerror" not in re.sub(r'(?s)<script type="application/json".*?</script>', "", raw)
    body = raw.split('id="sae-attn-data">')[1].split("</script>")[0]
    assert not set("<>&") & set(body)
    assert body.isascii()
    assert json.loads(body)["graph"]["tokens"] == list(HOSTILE)


def test_the_policy_stops_scripts(show: Open, graph: nx.DiGraph) -> None:
    page = show(graph)
    ran = page.evaluate(
        """() => new Promise((done) => {
          const script = document.createElement('script');
          script.textContent = 'window.hacked = 1';
          document.addEventListener('securitypolicyviolation', (e) => done(e.violatedDirective));
          document.body.append(script);
          setTimeout(() => done('ran'), 2000);
        })"""
    )
    assert ran.startswith("script-src")
    assert page.evaluate("typeof window.hacked") == "undefined"
    complaints = show.complaints  # type: ignore[attr-defined]
    assert len(complaints) == 1
    assert "Content Security Policy" in complaints.pop()


# -- large graphs --------------------------------------------------------------------------------


def large_graph(n_nodes: int = 2000, n_edges: int = 20_000) -> nx.DiGraph:
    rng = random.Random(0)
    positions, layers = 60, 12
    graph = nx.DiGraph()
    target = f'logit:" x"@{positions - 1}'
    graph.graph.update(
        tokens=[f" w{p}" for p in range(positions)], targets=[target], model="synthetic"
    )
    by_layer: list[list[tuple[str, int]]] = [[(f"embed@{p}", p) for p in range(positions)]]
    each = -(-(n_nodes - positions - 1) // layers)
    for layer in range(layers):
        count = min(each, n_nodes - 1 - sum(map(len, by_layer)))
        places = [int(positions * rng.random() ** 0.6) for _ in range(count)]
        by_layer.append([(f"attn:{layer}:{k}@{p}", p) for k, p in enumerate(places)])
    for name, _ in [*itertools.chain(*by_layer), (target, 0)]:
        graph.add_node(
            name, influence=0.1 * rng.random() ** 6, activation=1.0, pre_activation=1.0,
            constant=0.1, pruned_in=0.0,
        )  # fmt: skip
    for _ in range(2 * n_edges):  # half of them point backwards
        low, high = sorted(rng.sample(range(layers + 1), 2))
        (a, p), (b, q) = rng.choice(by_layer[low]), rng.choice(by_layer[high])
        if p <= q:
            graph.add_edge(a, b, weight=rng.gauss(0, 1))
    for name, _ in by_layer[-1]:
        graph.add_edge(name, target, weight=rng.gauss(0, 1))
    return graph


def test_two_thousand_nodes(show: Open, record_property: Callable[[str, object], None]) -> None:
    graph = large_graph()
    assert len(graph) == 2000
    page = show(graph)
    assert shown_nodes(page) == 2000
    first = page.evaluate("saeAttnPage.timing.first")
    times = []
    for value in (80, 50, 90, 100):
        page.evaluate("saeAttnPage.timing.filter = 0")
        slide(page, "nodes", value)
        wait(page, "saeAttnPage.timing.filter > 0")
        times.append(page.evaluate("saeAttnPage.timing.filter"))
    record_property("first_draw_ms", first)
    record_property("filter_ms", times)
    print(f"2,000 nodes, {graph.number_of_edges()} edges: first draw {first:.0f} ms, filter", times)  # noqa: T201
    # far above what was measured: a slow machine should pass, a quadratic page should not
    assert first < 8000
    assert max(times) < 4000


# -- in another page, and in notebooks -----------------------------------------------------------


def test_mount_in_a_page_of_ones_own(browser: Browser, graph: nx.DiGraph) -> None:
    page = browser.new_page(viewport={"width": 1200, "height": 800})
    page.set_content(
        f"<style>{style()}</style><div id=a style='height:700px'></div><script>{script()}</script>"
    )
    name = top_feature(graph)
    page.evaluate(
        """([data, id]) => {
          window.log = [];
          window.page = SaeAttnGraph.mount(document.getElementById('a'), data, {
            header: false,
            onSelect: (id) => log.push(['select', id]),
            onPin: (ids) => log.push(['pin', ids]),
            onGroup: (groups) => log.push(['group', groups.length]),
          });
        }""",
        [page_data(graph), name],
    )
    wait(page, "page.timing.first > 0")
    node_at(page, name).click()
    page.evaluate("id => page.pin(id)", name)
    others = [n for n in graph if n.startswith("attn:2:")][:2]
    page.evaluate("ids => page.group(ids, 'two')", others)
    log = page.evaluate("log")
    assert ["select", name] in log
    assert ["pin", [name]] in log
    assert ["group", 1] in log
    assert page.locator("h1").count() == 0
    page.evaluate("data => page.setData(data)", page_data(graph.subgraph(list(graph)[:20])))
    wait(page, "document.querySelectorAll('.sag-node').length === 20")
    page.evaluate("page.destroy()")
    assert page.locator(".sag").count() == 0
    page.close()


def test_in_a_notebook(browser: Browser, run: Run) -> None:
    shown = run.page(sap.LogitDiff(" Mary", " John"), max_nodes=20, max_features=3)
    page = browser.new_page()
    page.set_content(f"<!doctype html><body>{shown._repr_html_()}")
    frame = page.frame_locator("iframe")
    frame.locator(".sag-node").first.wait_for()
    assert frame.locator(".sag-node").count() == 21
    page.close()
