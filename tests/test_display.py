"""What notebooks show of results, and their plots."""

from __future__ import annotations

import re
from collections.abc import Callable
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pandas as pd
import pytest

import sae_attn_plugin as sap
from sae_attn_plugin import display

HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x>',
    "\u202eevil",
    "$x_1$ & $",
    "\x00",
    "\ud83d",
)


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    lens = sap.demo.load()
    run = lens.run(sap.demo.ioi_prompt())
    attribution = run.attribute(sap.LogitDiff(" Mary", " John"))
    graph = attribution.prune(max_nodes=6).to_networkx()
    return {
        "run": run,
        "runs": lens.run([str(sap.demo.ioi_prompt()), str(sap.demo.ioi_prompt()) + " Mary"]),
        "dfa": run.dfa(1, 665, 14),
        "qk": run.qk(1, 5, 14, 9),
        "attribution": attribution,
        "result": lens.intervene(run, [sap.AblateFeature(1, 665, 14)]),
        "validation": sap.validate(graph, lens, max_sources=3, progress=False),
    }


class Balanced(HTMLParser):
    """Fails on tags that are not closed; collects the text."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.words: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:  # noqa: ARG002
        assert tag in {"div", "table", "thead", "tbody", "tr", "th", "td", "bdi"}
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def shown(markup: str) -> str:
    parser = Balanced()
    parser.feed(markup)
    parser.close()
    assert not parser.open
    return "\n".join(parser.words)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("run", ["Run of 15 tokens", "sae-attn-demo", " Mary", "0.99"]),
        ("runs", ["Run of 2 prompts", "run[1]", "16"]),
        ("dfa", ["Feature 1/665", "pre-activation 2.106", "1.2"]),
        ("qk", ["Head 1.5", "Strongest terms", "mlp:0@14"]),
        ("attribution", ["Attribution of logit_diff", "8.496", "attn:1:105@14"]),
        ("result", ["Intervention", " Mary"]),
        ("validation", ["Validation", "all else held", "everything live"]),
    ],
)
def test_notebooks_show(results: dict[str, Any], name: str, expected: list[str]) -> None:
    markup = results[name]._repr_html_()
    text = shown(markup)
    for words in expected:
        assert words in text
    assert len(markup) < 30_000
    assert not re.search(r"color:(?!rgba)", markup.replace("background-color", ""))  # any theme


def test_numbers_shown_are_the_results(results: dict[str, Any]) -> None:
    result = results["result"]
    from sae_attn_plugin.interventions.show import next_tokens

    frame = next_tokens(result).set_index("token")
    mary = results["run"].resolve_token(" Mary")[0]
    edited = result.logits[0, -1].softmax(-1)[mary]
    assert frame.loc[" Mary", "edited"] == pytest.approx(float(edited), rel=1e-5)
    counts = results["run"]._active_counts()
    features = results["run"].features()
    assert counts.to_numpy().sum() == len(features)
    assert counts.loc[2, 14] == len(results["run"].features(layer=2, position=14))


@pytest.mark.parametrize("name", ["run", "dfa", "qk", "attribution", "result", "validation"])
def test_plots(results: dict[str, Any], name: str) -> None:
    figure = results[name].plot()
    image = figure._repr_png_()
    assert image.startswith(b"\x89PNG")
    figure.canvas.draw()
    pixels = np.asarray(figure.canvas.buffer_rgba())  # as one number each
    assert len(np.unique(np.ascontiguousarray(pixels).view(np.uint32))) > 50
    assert len(image) > 5000


def test_plots_hold_the_numbers(results: dict[str, Any]) -> None:
    dfa = results["dfa"]
    image = dfa.plot().axes[0].images[0]
    assert np.allclose(image.get_array(), dfa.by_head_and_source[:, :15].numpy(), atol=1e-6)
    low, high = image.get_clim()
    assert low == -high  # zero is white
    attribution = results["attribution"]
    axes = attribution.plot(n=5).axes[0]
    widths = [patch.get_width() for patch in axes.patches]
    assert len(widths) == 5 + 1 + 3
    assert sum(widths[:-1]) == pytest.approx(widths[-1], abs=1e-4)
    assert widths[-1] == pytest.approx(float(attribution.ledger["value"].iloc[0]))
    panels = results["validation"].plot().axes
    assert [axes.get_title() for axes in panels] == ["frozen", "free", "random"]
    points = np.concatenate([c.get_offsets() for c in panels[0].collections])
    assert len(points) == len(results["validation"].frozen.table)
    assert np.allclose(points[:, 0], points[:, 1], atol=1e-4)


@pytest.mark.parametrize("name", ["run", "dfa", "qk", "attribution", "result"])
def test_plots_draw_into_axes(results: dict[str, Any], name: str) -> None:
    from matplotlib.figure import Figure

    figure = Figure()
    axes = figure.subplots()
    assert results[name].plot(ax=axes) is figure
    assert axes.has_data()


def test_refusals(results: dict[str, Any]) -> None:
    with pytest.raises(sap.InputError, match="no ledger here"):
        results["attribution"].plot("embed@0")
    with pytest.raises(sap.InputError, match="at least 1"):
        results["attribution"].plot(n=0)
    with pytest.raises(sap.InputError, match="prompt 3 is out of range"):
        results["result"].plot(prompt=3)
    with pytest.raises(sap.InputError, match="pick one"):
        results["runs"].plot()


@pytest.mark.parametrize("token", HOSTILE)
def test_text_is_inert(token: str) -> None:
    words = pd.Series([token, "b"], dtype=object)  # pandas' own strings hold no half characters
    frame = pd.DataFrame({"token": words, "n": [1.0, float("nan")]})
    markup = display.card(
        token, [token], display.coloured([token, "a"], [1.0]), display.heading(token),
        display.table(frame, ["token", "n"]), display.note(token),
    )  # fmt: skip
    shown(markup)  # knows no tag but its own
    assert not any(c in markup for c in "\u202e\x00\ud83d")
    from sae_attn_plugin import plots

    with np.errstate(all="raise"):
        figure = plots.bars([token, "b"], [1.0, -1.0], title=token, name="x")
        plots.heat_map(np.eye(2), [token, "b"], [token, "b"], title="t", name="x")
    figure.canvas.draw()  # no mathematics, no missing glyph, which would warn


def test_a_graph_is_shown(results: dict[str, Any]) -> None:
    graph = results["attribution"].prune(max_nodes=5).to_networkx()
    make: Callable[..., Any] = sap.show
    frame = make(graph, height=500)._repr_html_()
    assert frame.startswith('<iframe sandbox="allow-scripts allow-popups"')
    assert "height:500px" in frame
    assert frame.count("<") == 2  # the page within is escaped whole
