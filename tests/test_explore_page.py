"""The explorer's page in a browser: every interaction, hostile text, a server that goes away."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from browser import chromium
from explore_server import Server, demo_server

import sae_attn_plugin as sap

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

PROMPT = str(sap.demo.ioi_prompt())


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as started:
        yield started


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    started = demo_server(tmp_path_factory.mktemp("explorer") / "sessions")
    yield started
    started.stop()


@pytest.fixture
def page(browser: Browser, server: Server) -> Iterator[Page]:
    """The page, ready; what it complains about or asks of others fails the test."""
    context = browser.new_context(viewport={"width": 1300, "height": 1000})
    shown = context.new_page()
    complaints: list[str] = []
    shown.on("pageerror", lambda error: complaints.append(str(error)))
    shown.on("console", lambda m: complaints.append(m.text) if _counts(m) else None)
    own = (server.address, "data:", "blob:")
    shown.on("request", lambda r: None if r.url.startswith(own) else complaints.append(r.url))
    shown.goto(server.address)
    shown.locator("body[data-ready=yes]").wait_for()
    yield shown
    context.close()
    assert not complaints


def _counts(message: Any) -> bool:
    """Refused connections and refused requests are said so by the browser itself."""
    return message.type == "error" and "Failed to load resource" not in message.text


def run_prompt(page: Page, text: str = PROMPT) -> None:
    page.fill("#prompt", text)
    page.click("#ask button")
    page.locator("#grid [data-cell]").first.wait_for()


def pick(page: Page, cell: str = "1.14", number: int = 0) -> str:
    """The feature that was picked, as a node id."""
    page.locator(f'[data-cell="{cell}"]').click()
    chip = page.locator("#cell [data-feature]").nth(number)
    chip.click()
    page.locator("table.heat").wait_for()
    return chip.get_attribute("data-feature") or ""


def value(text: str) -> float:
    return float(text.replace("\u2212", "-"))


def test_features_of_a_prompt(page: Page, server: Server) -> None:
    run_prompt(page)
    frame = server.lens.run(PROMPT).features()
    counts = frame.groupby(["layer", "position"]).size()
    cells = page.locator("#grid [data-cell]")
    assert cells.count() == 4 * 15
    for (layer, position), count in counts.items():
        cell = page.locator(f'[data-cell="{layer}.{position}"]')
        assert cell.text_content() == str(count)
    assert "Mary" in (page.locator("#next").text_content() or "")
    name = pick(page)
    here = frame[(frame["layer"] == 1) & (frame["position"] == 14)]
    best = here.loc[here["activation"].idxmax()]
    assert name == f"attn:1:{best.feature}@14"
    assert page.locator("#cell [data-feature]").count() == len(here)


def test_through_dfa_to_the_source_and_on(page: Page, server: Server) -> None:
    run_prompt(page)
    node = sap.Node.parse(pick(page))
    run = server.lens.run(PROMPT)
    assert node.layer is not None
    assert node.feature is not None
    dfa = run.dfa(node.layer, node.feature, node.position)
    shown = [value(t) for t in page.locator("table.heat tbody [data-pair]").all_text_contents()]
    assert shown == pytest.approx(dfa.by_head_and_source.flatten().tolist(), abs=6e-5)
    page.locator('table.heat [data-source="9"]').click()
    page.locator("#sources tbody tr").first.wait_for()
    rows = page.locator("#sources tbody tr")
    edges = run.attribute(sap.Feature(node.layer, node.feature, 14), node_budget=0).edges
    weights = {str(s): w for s, w in zip(edges["source"], edges["weight"], strict=True)}
    for cells in [row.locator("td").all_text_contents() for row in rows.all()]:
        assert value(cells[1]) == pytest.approx(weights[cells[0]], abs=6e-5)
    upstream = page.locator("#sources [data-upstream]").first
    name = upstream.get_attribute("data-upstream")
    upstream.click()
    page.locator(f'#trail [data-trail="{name}"]').wait_for()
    assert page.locator("#trail [data-trail]").count() == 2
    page.locator("#trail [data-trail]").first.click()  # and back
    page.locator("table.heat").wait_for()
    assert page.locator("#trail [data-trail]").count() == 1


def test_why_a_head_looks_there(page: Page, server: Server) -> None:
    run_prompt(page)
    pick(page)
    page.locator('table.heat [data-pair="4.9"]').click()
    page.locator("#qk tbody tr").first.wait_for()
    qk = server.lens.run(PROMPT).qk(1, 4, 14, 9)
    text = page.locator("#qk .numbers").text_content() or ""
    assert f"{qk.pattern:.1%}".rstrip("%") in text
    top = qk.top(1).iloc[0]
    cells = page.locator("#qk tbody tr").first.locator("td").all_text_contents()
    assert cells[:2] == [top["query_node"], top["key_node"]]
    assert value(cells[2]) == pytest.approx(top["weight"], abs=6e-5)
    features = page.locator("#qk button")
    name = features.first.text_content() or ""
    features.first.click()
    page.locator(f'#trail [data-trail="{name}"]').wait_for()


def test_ablate_scale_and_set(page: Page, server: Server) -> None:
    run_prompt(page)
    node = sap.Node.parse(pick(page))
    assert node.layer is not None
    assert node.feature is not None
    run = server.lens.run(PROMPT)
    target = run.resolve_token(" Mary")[0]

    def shown_change() -> float:
        rows = page.locator("#logits tbody tr").all()
        row = next(row for row in rows if (row.text_content() or "").strip().startswith("Mary"))
        return value(row.locator("td").nth(3).text_content() or "")

    def applied() -> float:
        page.evaluate("document.getElementById('effect').replaceChildren()")
        page.locator("#apply button[type=submit]").click()
        page.locator("#logits").wait_for()
        return shown_change()

    def expected(edit: Any) -> float:
        result = server.lens.intervene(run, [edit])
        return float(result.logits[0, -1, target] - run.logits[0, -1, target])

    place = (node.layer, node.feature)
    page.click("#ablate")
    assert applied() == pytest.approx(expected(sap.AblateFeature(*place, 14)), abs=2e-4)
    assert page.locator("[data-text=before]").count() == 1
    page.click("#scale")
    assert page.locator("[data-edit]").count() == 1  # instead of the other
    page.fill("[data-edit] input[type=number]", "3")
    assert applied() == pytest.approx(expected(sap.ScaleFeature(*place, 14, 3.0)), abs=2e-4)
    page.locator("[data-edit] select").select_option("set")
    page.fill("[data-edit] input[type=number]", "40")
    page.check("[data-edit] input[type=checkbox]")
    edit = sap.SetFeature(*place, None, 40.0)
    assert applied() == pytest.approx(expected(edit), abs=2e-4)
    result = server.lens.intervene(run, [edit], max_new_tokens=12)
    clean, edited = result.continuations()[0]
    after = page.locator("[data-text=after]")
    assert clean != edited
    assert (after.text_content() or "").endswith(edited.replace("\n", "\u23ce"))
    assert after.locator("mark").count() == 1
    page.click("#clear-edits")
    assert page.locator("[data-edit]").count() == 0
    page.locator("#apply button[type=submit]").click()
    page.get_by_text("expected 1 to 64 edits").wait_for()


def test_build_a_graph_select_in_it_and_download(
    page: Page, server: Server, tmp_path: Path
) -> None:
    run_prompt(page)
    page.select_option("#target-kind", "difference")
    page.fill("#target-token", " Mary")
    page.click("#build button[type=submit]")
    page.get_by_text("Which token should be subtracted?").wait_for()
    page.fill("#target-wrong", " John")
    page.fill("#max-nodes", "40")
    page.click("#build button[type=submit]")
    page.locator(".sag-node").first.wait_for()
    attribution = server.lens.run(PROMPT).attribute(sap.LogitDiff(" Mary", " John"))
    expected = attribution.prune(0.8, 0.98, 40).to_networkx()
    nodes = page.locator(".sag-node")
    assert {node.get_attribute("data-id") for node in nodes.all()} == set(expected)
    name = next(name for name in expected if name.startswith("attn:1"))
    page.locator(f".sag-node[data-id={json.dumps(name)}]").click()
    page.locator(f'#trail [data-trail="{name}"]').wait_for()
    for format in ("json", "native", "gexf"):
        page.select_option("#format", format)
        with page.expect_download() as download:
            page.click("#export")
        path = tmp_path / download.value.suggested_filename
        download.value.save_as(path)
        assert sap.graphs_equal(sap.load(path), expected)
    page.select_option("#target-kind", "feature")
    page.click("#build button[type=submit]")
    page.locator(f".sag-node[data-id={json.dumps(name)}]").wait_for()


def test_sessions_are_saved_loaded_and_deleted(page: Page, server: Server) -> None:
    run_prompt(page)
    name = pick(page)
    page.click("#ablate")
    page.fill("#session-name", "mine 1")
    page.click("#save button[type=submit]")
    page.locator("#sessions option", has_text="mine 1").wait_for(state="attached")
    stored = json.loads((server.sessions / "mine 1.json").read_text())
    assert stored["state"]["prompt"] == PROMPT
    run_prompt(page, "When Tom and Anna went to the park")
    page.locator("#trail [data-trail]").first.wait_for(state="detached")
    assert page.locator("[data-edit]").count() == 0  # positions of another prompt
    page.click("#load")
    page.locator(f'#trail [data-trail="{name}"]').wait_for()
    assert page.input_value("#prompt") == PROMPT
    assert page.locator("[data-edit]").count() == 1
    page.fill("#session-name", "a.json")
    page.click("#save button[type=submit]")
    page.get_by_text("a session's name has").wait_for()
    page.fill("#session-name", "../x")
    page.click("#save button[type=submit]")
    page.get_by_text("Give the session a name of letters").wait_for()
    page.click("#delete")
    page.locator("#sessions option").wait_for(state="detached")
    assert not (server.sessions / "mine 1.json").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "the prompt is empty"), (" the" * 300, "128")],
)
def test_wrong_prompts_are_told(page: Page, text: str, message: str) -> None:
    page.fill("#prompt", text)
    page.click("#ask button")
    page.get_by_text(message).wait_for()
    page.fill("#prompt", PROMPT)
    page.keyboard.press("Enter")
    page.locator("#grid [data-cell]").first.wait_for()
    assert page.locator("#message").is_hidden()
    page.select_option("#target-kind", "token")
    page.fill("#target-token", "no such token")
    page.click("#build button[type=submit]")
    page.locator("#message", has_text="no such token").wait_for()
    assert "Traceback" not in (page.locator("#message").text_content() or "")


HOSTILE = (
    "</b><img src=x onerror=window.hacked=1>",
    "\u202ex\u200b\x00",
    "\u00a0",
    "<script>window.hacked=1</script>",
    "\"'><svg onload=window.hacked=1>",
)


def test_hostile_text_is_only_text(page: Page, server: Server) -> None:
    page.fill("#prompt", "".join(HOSTILE))
    page.click("#ask button")  # which the demo's tokenizer does not know, and says so
    page.locator("#message", has_text="<script>window.hacked=1</script>").wait_for()
    # whatever the model's tokens are: none draws anything, none turns the line around
    kinds = server.app.state.questions.kinds
    real = dict(kinds)

    def spoiled(kind: str) -> Any:
        def answer(asked: Any, progress: Any) -> Any:
            found = real[kind](asked, progress)
            if kind == "open":
                found["tokens"] = [HOSTILE[i % 5] for i, _ in enumerate(found["tokens"])]
            for i, row in enumerate(found["next"] if kind == "open" else found["tokens"]):
                row["token"]["text"] = HOSTILE[i % 5]
            if kind == "intervene":
                found["edited_text"] = "".join(HOSTILE)
            return found

        return answer

    kinds |= {kind: spoiled(kind) for kind in ("open", "intervene")}
    try:
        run_prompt(page)
        pick(page)
        page.click("#ablate")
        page.locator("#apply button[type=submit]").click()
        page.locator("#logits").wait_for()
        page.locator('table.heat [data-pair="4.9"]').click()
        page.locator("#qk tbody tr").first.wait_for()
    finally:
        kinds |= real
    text = page.locator("main").text_content() or ""
    assert "</b><img src=x onerror=window.hacked=1>" in text
    assert "\\u202ex\\u200b\\u0000" in text
    assert "\u202e" not in text
    assert page.evaluate("window.hacked") is None
    assert page.locator("main img, main svg, main script").count() == 0


def test_progress_and_cancel(page: Page, server: Server) -> None:
    run_prompt(page)
    kinds, go, seen = server.app.state.questions.kinds, threading.Event(), threading.Event()
    real = kinds["graph"]

    def slow(asked: Any, progress: Any) -> Any:
        while not go.is_set():
            progress(0.4, "thinking about it")
            seen.set()
            time.sleep(0.01)
        return real(asked, progress)

    kinds["graph"] = slow
    try:
        page.click("#build button[type=submit]")
        job = page.locator('.job[data-kind="graph"]')
        job.get_by_text("thinking about it").wait_for()
        assert float(job.locator("progress").get_attribute("value") or 0) == pytest.approx(0.4)
        page.locator("#apply button[type=submit]").click()
        page.get_by_text("waiting, 1 before it").wait_for()
        job.locator("button").click()
        job.wait_for(state="detached")
        page.get_by_text("expected 1 to 64 edits").wait_for()  # the queue goes on
        assert page.locator(".sag-node").count() == 0
        page.click("#build button[type=submit]")
        job.wait_for()
        go.set()
        page.locator(".sag-node").first.wait_for()
    finally:
        kinds["graph"] = real


def test_an_open_page_survives_a_restart(page: Page, server: Server) -> None:
    run_prompt(page)
    name = pick(page)
    page.select_option("#target-kind", "difference")
    page.fill("#target-token", " Mary")
    page.fill("#target-wrong", " John")
    server.stop()
    page.click("#build button[type=submit]")  # asked while it is away
    page.get_by_text("the server is away; waiting for it").wait_for()
    server.start()
    page.locator(".sag-node").first.wait_for()
    assert page.locator("#status").text_content() == ""
    assert page.locator(f'#trail [data-trail="{name}"]').count() == 1
    # in the middle of work: the answer never comes, so the page asks the next server
    kinds, seen = server.app.state.questions.kinds, threading.Event()

    def stuck(_: Any, progress: Any) -> None:
        while True:
            progress(0.1, "stuck")
            seen.set()
            time.sleep(0.05)

    kinds["intervene"] = stuck
    page.click("#ablate")
    page.locator("#apply button[type=submit]").click()
    assert seen.wait(10)
    server.stop()
    server.start()
    page.locator("#logits").wait_for()
    # and what was there is there after the page itself is loaded again
    page.reload()
    page.locator(f'#trail [data-trail="{name}"]').wait_for()
    page.locator(".sag-node").first.wait_for()
    assert page.locator("[data-edit]").count() == 1


def test_pages_of_other_sites_get_nothing(browser: Browser, server: Server) -> None:
    """A page of another origin can neither read from the explorer nor write to it."""
    context = browser.new_context()
    other = context.new_page()
    other.route("http://other.example/", lambda route: route.fulfill(
        status=200, content_type="text/html", body="<title>other</title>"))  # fmt: skip
    other.goto("http://other.example/")
    tried = """async ([address, type]) => {
      try {
        const answer = await fetch(address + "api/sessions/theirs", {
          method: "PUT", headers: {"Content-Type": type}, body: '{"state": {}}'});
        return answer.status;
      } catch (error) { return String(error); }
    }"""
    for kind in ("application/json", "text/plain"):
        assert "TypeError" in str(other.evaluate(tried, [server.address, kind]))
    sent = """(address) => { const f = document.createElement("form"); f.method = "POST";
      f.enctype = "text/plain"; f.action = address + "api/jobs"; document.body.append(f);
      f.submit(); }"""
    other.evaluate(sent, server.address)
    other.get_by_text(re.compile("other sites are refused")).wait_for()
    assert "theirs" not in server.send("GET", "/api/sessions")[1]["names"]
    context.close()
