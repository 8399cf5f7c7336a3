"""Sites of cards in a browser: opened as files, read by pointer, by finger and by keyboard."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.parquet as pq
import pytest
import torch
from browser import chromium
from made_survey import Strings, made_survey
from test_page import HOSTILE, written

import sae_attn_plugin as sap
from sae_attn_plugin.demo.language import held_out_rows

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Locator, Page

    Open = Callable[..., Page]

# As it stands in running text; only what is invisible or steers its surroundings is spelled out.
SHOWN = {
    "\u202eevil\u2066": "\\u{202E}evil\\u{2066}",
    "\u2028\u2029": "\\u{2028}\\u{2029}",
    "\ud83d": "\\u{D83D}",
    "\x00\x1b[31m": "\\u{0}\\u{1B}[31m",
    "\n": "↵",
    "\t": "⇥",
    "": "∅",
}
STRINGS = [*HOSTILE, "\t", "", "\ufffd", " שלום", "</SCRIPT >", "`${window.hacked=1}`", "\\", "'"]
COLOURED = "e => getComputedStyle(e).backgroundColor"
NONE = "rgba(0, 0, 0, 0)"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as started:
        yield started


@pytest.fixture(scope="module")
def survey(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_survey(tmp_path_factory.mktemp("surveys") / "made", d_sae=90)


@pytest.fixture(scope="module")
def site(survey: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sites") / "site"
    labels = {(1, 5): "names after a comma"}
    return sap.cards(survey, folder, labels=labels, per_file=16, progress=False)


@pytest.fixture
def show(browser: Browser, site: Path) -> Iterator[Open]:
    """Opens a page of a site; a complaint, or a request to a network, fails the test."""
    pages, complaints = [], []

    def opened(fragment: str = "", page_of: Path = site, **context: Any) -> Page:
        context = {"viewport": {"width": 1280, "height": 900}, **context}
        page = browser.new_context(**context).new_page()
        pages.append(page)
        page.on("console", lambda m: complaints.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on(
            "request", lambda r: None if r.url.startswith("file:") else complaints.append(r.url)
        )
        page.goto(f"{page_of.as_uri()}{fragment}")
        ready(page)
        return page

    opened.complaints = complaints  # type: ignore[attr-defined]
    yield opened
    for page in pages:
        page.context.close()
    assert not complaints


def wait(page: Page, condition: str) -> None:
    """Playwright's own way needs eval, which the pages forbid."""
    came = page.evaluate(
        """() => new Promise((done) => {
          const late = performance.now() + 30000;
          const look = () => (CONDITION) ? done(true)
            : performance.now() > late ? done(false) : setTimeout(look, 10);
          look();
        })""".replace("CONDITION", condition)
    )
    assert came, f"never came about: {condition}; {page.url}"


def ready(page: Page, fragment: str | None = None) -> None:
    wanted = "location.hash" if fragment is None else f"{fragment!r}"
    wait(page, f"SaeAttnCards.ready === {wanted} && location.hash === {wanted}")


def rows(page: Page) -> list[str]:
    return page.locator(".sac-list tbody tr").evaluate_all("e => e.map(r => r.dataset.feature)")


def table(survey: Path, name: str) -> Any:
    return pq.read_table(survey / f"{name}.parquet").to_pandas()


def top_of(survey: Path, layer: int, feature: int) -> Any:
    kept = table(survey, "examples")
    chosen = (kept["layer"] == layer) & (kept["feature"] == feature) & (kept["kind"] == "top")
    found: Any = kept[chosen]
    return found.sort_values("rank").reset_index(drop=True)


def share(text: str) -> float:
    return written(text.rstrip("%")) / 100


# -- the index -------------------------------------------------------------------------------------


def test_index(show: Open, survey: Path) -> None:
    page = show()
    features = table(survey, "features")
    live: Any = features[features["fires"] > 0]
    facts = page.locator(".sac-about").inner_text()
    assert f"{len(live):,}" in facts
    assert f"{live['fires'].sum():,}" in facts
    assert page.locator(".sac-grid td a").count() == 8
    assert f"1–50 of {len(live)} features" in page.locator(".sac-count").inner_text()
    names = [f"{layer}/{f}" for layer, f in zip(live["layer"], live["feature"], strict=True)]
    assert rows(page) == names[:50]
    page.get_by_label("Next page").click()
    wait(page, "document.querySelector('.sac-count').textContent.startsWith('51')")
    assert rows(page) == names[50:100]
    # sorted by density, the highest first, then the other way; the address says so
    order = live.sort_values(["density", "layer", "feature"], ascending=[False, True, True])
    page.locator("[data-sort=density]").click()
    wait(page, "location.hash === '#?sort=density&down=1'")
    ranked = [f"{layer}/{f}" for layer, f in zip(order["layer"], order["feature"], strict=True)]
    wait(page, f"document.querySelector('.sac-list tbody tr').dataset.feature === '{ranked[0]}'")
    assert rows(page) == ranked[:50]
    page.locator("[data-sort=density]").click()
    wait(page, f"document.querySelector('.sac-list tbody tr').dataset.feature !== '{ranked[0]}'")
    assert page.locator(".sac-list [aria-sort=ascending]").inner_text().startswith("Density")
    page.reload()
    ready(page)
    least = live["density"].min()
    assert share(page.locator(".sac-list tbody tr td:nth-child(3)").first.inner_text()) == (
        pytest.approx(least, rel=1e-2)
    )


def test_filters(show: Open, survey: Path) -> None:
    page = show()
    features = table(survey, "features")
    live = features[features["fires"] > 0].set_index(["layer", "feature"])
    page.locator("[data-filter=layer]").select_option("1")
    page.locator("[data-filter=density]").select_option("common")
    inside = live[(live["density"] >= 0.01) & (live["density"] < 0.1)].loc[1]
    wait(page, f"document.querySelector('.sac-count').textContent.includes('of {len(inside)} ')")
    assert rows(page) == [f"1/{f}" for f in inside.index]
    page.locator("[data-filter=density]").select_option("")
    page.locator("[data-filter=q]").fill("AFTER a comma")
    wait(page, "document.querySelectorAll('.sac-list tbody tr').length === 1")
    assert rows(page) == ["1/5"]
    assert "names after a comma" in page.locator(".sac-list tbody").inner_text()
    page.locator("[data-filter=q]").fill("")
    page.locator("[data-filter=head]").select_option("2")
    heads = table(survey, "heads").set_index(["layer", "feature", "head"])["dfa_share"]
    best = heads.unstack().loc[live.index].loc[1].idxmax(axis=1)
    expected = [f"1/{f}" for f in best.index[best == 2]]
    wait(page, f"document.querySelector('.sac-count').textContent.includes('of {len(expected)} ')")
    assert rows(page) == expected
    page.locator("[data-filter=q]").fill("nothing at all")
    page.get_by_text("No feature matches.").wait_for()


@pytest.mark.parametrize("wanted", ["#0/3", "#?layer=1&q=e"])
def test_a_filter_typed_last_holds_no_one_back(show: Open, wanted: str) -> None:
    page = show()
    page.evaluate(
        """(wanted) => {
          const { showFeature } = SaeAttnCards;
          SaeAttnCards.showFeature = async (...asked) => {  // a slow disk
            await new Promise((done) => setTimeout(done, 400));
            return showFeature(...asked);
          };
          const field = document.querySelector("[data-filter=q]");
          field.value = "the";
          field.dispatchEvent(new Event("input"));
          const soon = performance.now() + 200;
          setTimeout(() => {
            location.hash = wanted;
            while (performance.now() < soon);  // the filter's wait ends before the page turns
          }, 20);
        }""",
        wanted,
    )
    ready(page, wanted)
    if "/" in wanted:
        assert page.locator("h1").inner_text() == "Feature 0/3"
        page.keyboard.press("u")
        ready(page, "#?q=the")
        assert page.locator("[data-filter=q]").input_value() == "the"


def test_search_leads_to_features_heads_and_tokens(show: Open, survey: Path) -> None:
    page = show()
    box = page.locator("header input")
    for said, found in (("1/5", "#1/5"), ("attn:0:3@4", "#0/3"), ("0.3", "#0.3")):
        page.keyboard.press("/")
        box.fill(said)
        box.press("Enter")
        ready(page, found)
        page.locator("h1").click()
    row = top_of(survey, 0, 3).iloc[0]
    texts = table(survey, "rows").set_index("row")["tokens"]
    token = texts[row["row"]][row["position"]]
    box.fill(f" t{token}")
    box.press("Enter")
    wait(page, "document.querySelectorAll('.sac-list tbody tr').length > 0")
    shown = page.locator(".sac-list tbody tr").all_inner_texts()
    assert all(f"t{token}" in text for text in shown)
    assert page.locator(".sac-list [data-feature='0/3']").count() == 1


# -- a feature -------------------------------------------------------------------------------------


def test_a_card_says_what_the_tables_say(show: Open, survey: Path) -> None:
    page = show("#0/3")
    assert page.locator("h1").inner_text() == "Feature 0/3"
    row = table(survey, "features").iloc[3]
    facts = page.locator(".sag-facts").first.inner_text()
    assert f"{row['fires']:,} firings" in facts
    for name in ("max", "mean", "dfa_abs", "decoder_norm"):
        assert f"{row[name]:.3f}"[:5] in facts.replace("\n", " ")
    heads = table(survey, "heads")
    heads = heads[(heads["layer"] == 0) & (heads["feature"] == 3)]
    for (_, expected), line in zip(
        heads.iterrows(), page.locator(".sac-heads tbody tr").all(), strict=True
    ):
        cells = line.locator("td").all_inner_texts()
        assert share(cells[1]) == pytest.approx(expected["decoder_share"], rel=0.05, abs=0.006)
        assert share(cells[2]) == pytest.approx(expected["dfa_share"], rel=0.05, abs=0.006)
        assert written(cells[3]) == pytest.approx(expected["dfa"], rel=0.006)
    logits = table(survey, "logits")
    logits = logits[(logits["layer"] == 0) & (logits["feature"] == 3)]
    for name, sign in (("raises", 1), ("lowers", -1)):
        mine = logits[logits["sign"] == sign]
        shown = page.locator(f"[data-part={name}] tbody tr")
        assert shown.locator("th").all_inner_texts() == [f"␣t{t}" for t in mine["token"]]
        values = [written(text) for text in shown.locator("td:last-child").all_inner_texts()]
        assert values == pytest.approx(mine["effect"].tolist(), rel=0.006)
    link = page.get_by_role("link", name="Neuronpedia")
    assert link.get_attribute("href") == row["neuronpedia"]
    columns = page.locator("[aria-label^='|DFA| by distance'] [data-value]")
    total = sum(float(c.get_attribute("data-value") or "nan") for c in columns.all())
    assert total == pytest.approx(1, abs=1e-3)


def test_examples_are_lit_where_the_feature_fires(show: Open, survey: Path) -> None:
    page = show("#0/3")
    texts = table(survey, "rows").set_index("row")["tokens"]
    for kept, shown in zip(
        top_of(survey, 0, 3).to_dict("records"),
        page.locator("[data-part=top] .sac-example").all(),
        strict=True,
    ):
        assert written(shown.locator("b").first.inner_text()) == (
            pytest.approx(kept["activation"], rel=1e-3)
        )
        fires = shown.locator(".sac-firing")
        assert fires.text_content() == f" t{texts[kept['row']][kept['position']]}"
        assert fires.evaluate(COLOURED) != NONE
        start = max(kept["position"] - 24, 0)
        around = texts[kept["row"]][start : kept["position"] + 9]
        text = shown.locator(".sac-text").text_content() or ""
        assert "".join(f" t{token}" for token in around) in text


def sources(example: Locator) -> dict[int, float]:
    """What the numbers below an example say."""
    found = example.locator("[data-part=sources] [data-value]").evaluate_all(
        "e => e.map(x => [x.dataset.key, Number(x.dataset.value), x.textContent])"
    )
    for _, value, text in found:
        assert written(text) == pytest.approx(value, rel=1e-3)
    return {int(key): value for key, value, _ in found if key != "rest"}


def test_sources_under_the_cursor(show: Open, survey: Path) -> None:
    page = show("#0/3")
    kept = top_of(survey, 0, 3).iloc[1]
    example = page.locator("[data-part=top] .sac-example").nth(1)
    dfa = dict(zip(kept["sources"].tolist(), kept["dfa"].tolist(), strict=True))

    def coloured() -> dict[int, str]:
        found = example.locator("[data-position]").evaluate_all(
            f"e => e.map(x => [Number(x.dataset.position), ({COLOURED})(x)])"
        )
        return {position: colour for position, colour in found if colour != NONE}

    before = coloured()
    assert kept["position"] in before
    assert example.locator(".sac-readout").is_hidden()
    example.locator(".sac-firing").hover()
    assert sources(example) == pytest.approx(dfa, rel=1e-4)
    assert set(coloured()) <= set(dfa)
    strongest = max(dfa, key=lambda p: abs(dfa[p]))
    assert strongest in coloured()
    titles = {
        position: example.locator(f"[data-position='{position}']").get_attribute("title") or ""
        for position in dfa
    }
    for position, title in titles.items():
        assert written(title.split(": ")[1]) == pytest.approx(dfa[position], rel=1e-4)
    # the part that is not shown, and the constant, close the sum
    said = {
        key: float(example.locator(f"[data-key={key}]").get_attribute("data-value") or "nan")
        for key in ("rest", "sum", "constant")
    }
    assert said["rest"] == pytest.approx(kept["dfa_rest"], rel=1e-4)
    assert said["sum"] == pytest.approx(sum(dfa.values()) + kept["dfa_rest"], rel=1e-3)
    assert said["sum"] + said["constant"] == pytest.approx(kept["pre_activation"], rel=1e-5)
    page.mouse.move(5, 5)
    assert coloured() == before
    # keyboard: Tab reaches the firing token, Enter keeps its sources, Escape or leaving lets go
    example.locator(".sac-firing").focus()
    assert example.locator(".sac-readout").is_visible()
    page.keyboard.press("Tab")
    assert example.locator(".sac-readout").is_hidden()
    # a click keeps them while the pointer is elsewhere; a second one lets go
    example.locator(".sac-firing").click()
    page.mouse.move(5, 5)
    assert example.locator(".sac-readout").is_visible()
    example.locator(".sac-firing").click()
    page.mouse.move(5, 5)
    assert example.locator(".sac-readout").is_hidden()
    # all at once
    page.keyboard.press("d")
    assert page.locator(".is-dfa").count() == page.locator(".sac-example").count()
    page.keyboard.press("d")
    assert coloured() == before


def test_sources_under_the_cursor_are_the_run_s(show: Open, tmp_path: Path) -> None:
    lens = sap.demo.load("nnsight")
    rows = torch.tensor(held_out_rows(8, 40, seed=3))
    survey = sap.survey(lens, rows, tmp_path / "survey", layers=[1, 2], keep=4, progress=False)
    page = show(page_of=survey.cards(tmp_path / "site", progress=False))
    assert "sae-attn-demo" in page.locator(".sac-about").inner_text()
    often: Any = survey.features[survey.features["fires"] >= 20]
    live = often.sort_values("dfa_abs", ascending=False)
    for layer in (1, 2):
        feature = int(live[live["layer"] == layer]["feature"].iloc[0])
        page.evaluate(f"location.hash = '#{layer}/{feature}'")
        ready(page, f"#{layer}/{feature}")
        shown = page.locator("[data-part=top] .sac-example").all()
        assert len(shown) > 1
        for example in shown[:2]:
            row, at = (int(example.get_attribute(f"data-{k}") or "-1") for k in ("row", "at"))
            run = lens.run([rows[row].tolist()])
            dfa = run.dfa(layer, feature, at)
            largest = float(dfa.by_source.abs().max())
            example.locator(".sac-firing").hover()
            said = sources(example)
            assert said == pytest.approx(
                {p: float(dfa.by_source[p]) for p in said}, rel=1e-3, abs=1e-4 * largest
            )
            # those that are not named add up to the rest
            others = set(range(at + 1)) - set(said)
            rest = example.locator("[data-key=rest]").all()
            assert sum(float(dfa.by_source[p]) for p in others) == pytest.approx(
                sum(float(r.get_attribute("data-value") or "nan") for r in rest), abs=1e-4 * largest
            )
            texts = [run.token_strings[p] for p in range(max(at - 24, 0), at)]
            assert "".join(texts) in (example.locator(".sac-text").text_content() or "")
            page.mouse.move(5, 5)


def test_by_finger(show: Open) -> None:
    page = show("#0/3", viewport={"width": 390, "height": 800}, has_touch=True, is_mobile=True)
    example = page.locator("[data-part=top] .sac-example").first
    example.locator(".sac-firing").tap()
    assert example.locator(".sac-readout").is_visible()
    example.locator(".sac-firing").tap()
    assert example.locator(".sac-readout").is_hidden()


def test_keys_walk_through_features(show: Open, survey: Path) -> None:
    features = table(survey, "features")
    ids = features[(features["layer"] == 1) & (features["fires"] > 0)]["feature"].tolist()
    page = show(f"#1/{ids[0]}")
    for key, expected in (("j", 1), ("ArrowRight", 2), ("k", 1), ("ArrowLeft", 0), ("k", -1)):
        page.keyboard.press(key)
        ready(page, f"#1/{ids[expected]}")
    assert page.locator("h1").inner_text() == f"Feature 1/{ids[-1]}"
    assert page.title() == f"1/{ids[-1]} · made up"
    page.keyboard.press("h")
    wait(page, "/^#1\\.[0-3]$/.test(location.hash) && SaeAttnCards.ready === location.hash")
    head = page.evaluate("location.hash")
    page.keyboard.press("j")
    wait(page, f"location.hash !== '{head}' && SaeAttnCards.ready === location.hash")
    page.keyboard.press("u")
    ready(page, "")
    page.go_back()
    wait(page, "SaeAttnCards.ready === location.hash && location.hash.startsWith('#1.')")


def test_head(show: Open, survey: Path) -> None:
    page = show("#1.2")
    heads = table(survey, "heads")
    heads = heads[(heads["layer"] == 1) & (heads["head"] == 2)].set_index("feature")
    features = table(survey, "features")
    features = features[features["layer"] == 1].set_index("feature")
    often = features.index[features["fires"] >= 10]
    for column, name in ((1, "decoder_share"), (2, "dfa_share")):
        section = page.locator(".sac-two").first.locator("section").nth(column - 1)
        lines = section.locator("tbody tr").all()
        expected = heads.loc[often][name].sort_values(ascending=False, kind="stable").head(20)
        assert [int(line.get_attribute("data-feature") or "-1") for line in lines] == (
            expected.index.tolist()
        )
        for line, (feature, value) in zip(lines, expected.items(), strict=True):
            cells = line.locator("td").all_inner_texts()
            assert share(cells[column]) == pytest.approx(value, abs=0.006)
            assert cells[3] == f"{features['fires'][feature]:,}"
    page.locator(".sac-two tbody a").first.click()
    ready(page, f"#1/{page.evaluate('location.hash').split('/')[1]}")
    assert page.locator("h1").inner_text().startswith("Feature 1/")


# -- what could go wrong ---------------------------------------------------------------------------


def test_token_text_is_inert(show: Open, tmp_path: Path) -> None:
    survey = made_survey(tmp_path / "survey", vocabulary=["x"] * len(STRINGS), d_sae=8, dead=0)
    features = table(survey, "features")
    features["neuronpedia"] = "javascript:window.hacked=1"
    features.to_parquet(survey / "features.parquet")
    labels = {(layer, f): HOSTILE[8 * layer + f - layer] for layer in (0, 1) for f in range(8)}
    start = sap.cards(
        survey, tmp_path / "site", tokenizer=Strings(STRINGS), labels=labels,
        title="</title><script>window.hacked=1</script>\u202e", progress=False,
    )  # fmt: skip
    for path in start.parent.rglob("*.js"):
        if path.parent.name != "site":
            assert "hacked=1</" not in path.read_text()
    page = show(page_of=start)
    page.locator("[data-filter=q]").fill("<script>")
    page.locator("summary").click()
    texts = table(survey, "rows").set_index("row")["tokens"]
    seen = set()
    for layer in (0, 1):
        for feature in range(8):
            page.evaluate(f"location.hash = '#{layer}/{feature}'")
            ready(page, f"#{layer}/{feature}")
            assert page.get_by_role("link", name="Neuronpedia").count() == 0
            page.locator(".sac-firing").first.focus()
            found = page.locator(".sac-example").evaluate_all(
                """e => e.map(x => [x.dataset.row, [...x.querySelectorAll('[data-position]')]
                    .map(s => [s.dataset.position, s.textContent])])"""
            )
            for row, spans in found:
                for position, text in spans:
                    token = STRINGS[texts[int(row)][int(position)]]
                    assert text == SHOWN.get(token, token)
                    seen.add(token)
    assert seen == set(STRINGS)
    page.evaluate("location.hash = '#0.1'")
    ready(page, "#0.1")
    steering = page.evaluate(
        "/[\\u202a-\\u202e\\u2066-\\u2069\\u200e\\u200f\\u2028\\u2029\\u0000\\u001b]/"
        ".test(document.body.innerText + document.title)"
    )
    assert not steering
    assert page.evaluate("typeof window.hacked") == "undefined"
    assert page.locator("img, iframe, object, [onerror], [onload], bdi script").count() == 0


def test_the_policy_stops_scripts(show: Open) -> None:
    page = show()
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


@pytest.mark.parametrize("asked", ["#1/99999", "#9/1", "#0.7", "#nonsense", "#%E0%A4%A"])
def test_what_is_not_there_is_said(show: Open, asked: str) -> None:
    page = show(asked)
    assert page.locator("h1").inner_text() == "Nothing here"
    assert page.get_by_role("alert").inner_text()
    page.get_by_role("link", name="To all features").click()
    ready(page, "")
    assert len(rows(page)) == 50


def test_a_missing_file_is_named(show: Open, site: Path, tmp_path: Path) -> None:
    shutil.copytree(site.parent, tmp_path / "copy")
    (tmp_path / "copy" / "data" / "features" / "01-0001.js").unlink()
    page = show("#1/20", page_of=tmp_path / "copy" / "index.html")
    assert "data/features/01-0001.js" in page.get_by_role("alert").inner_text()
    complaints = show.complaints  # type: ignore[attr-defined]
    assert "ERR_FILE_NOT_FOUND" in complaints.pop()


@pytest.mark.parametrize("fragment", ["", "#0/3", "#1.2"])
def test_a_phone_scrolls_one_way(show: Open, fragment: str) -> None:
    page = show(fragment, viewport={"width": 360, "height": 740}, is_mobile=True, has_touch=True)
    if fragment == "#0/3":
        page.locator(".sac-firing").first.tap()
    assert page.evaluate("document.documentElement.scrollWidth") <= 360


def test_colours(show: Open) -> None:
    paper = "getComputedStyle(document.querySelector('.sag')).backgroundColor"
    dark = show("#0/3", color_scheme="dark")
    assert dark.evaluate(paper) == "rgb(17, 20, 27)"
    light = show("#0/3", color_scheme="light")
    assert light.evaluate(paper) == "rgb(255, 255, 255)"
    for _ in range(2):
        light.locator("[data-act=theme]").click()
    assert light.evaluate(paper) == "rgb(17, 20, 27)"
    light.reload()
    ready(light)
    assert light.evaluate(paper) == "rgb(17, 20, 27)"


def test_many_features(show: Open, site: Path, tmp_path: Path) -> None:
    """More than are listed at once: the first layer, then all when asked for."""
    shutil.copytree(site.parent, tmp_path / "site")
    data, most = tmp_path / "site" / "data", 0
    for layer in (0, 1):
        path = data / f"layer-{layer:02d}.js"
        call, text = path.read_text().removesuffix(");\n").split(",", 1)
        columns = json.loads(text)
        n, most = len(columns["feature"]), most + len(columns["feature"]) * 330
        for name in columns.keys() - {"feature", "heads"}:
            columns[name] = columns[name] * 330
        columns["feature"] = list(range(330 * n))
        path.write_text(f"{call},{json.dumps(columns)});")
    text = (data / "site.js").read_text()
    (data / "site.js").write_text(re.sub(r'"features":(\d+)', r'"features":\g<1>000', text))
    page = show(page_of=tmp_path / "site" / "index.html")
    page.locator("[data-filter=layer]").select_option("all")
    wait(page, f"document.querySelector('.sac-count').textContent.includes('of {most:,}')")
    took = page.evaluate(
        """() => new Promise((done) => {
          const started = performance.now();
          document.querySelector('.sac-list [data-sort=density]').click();
          const look = () => document.querySelector('.sac-list [aria-sort=descending]')
            ? done(performance.now() - started) : requestAnimationFrame(look);
          look();
        })"""
    )
    assert most > 50_000
    assert 0 < took < 5000
