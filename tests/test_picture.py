"""Pictures: what is drawn, where, and that no token can break one."""

from __future__ import annotations

import itertools
import random
import sys
import warnings
from pathlib import Path
from typing import Any

import matplotlib
import networkx as nx
import numpy as np
import pytest
from helpers import random_saes, tiny_gpt2
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

import sae_attn_plugin as sap

TOKENS = ["<bos>", "When", " John", " and", " Mary", " went", " to", " the", " store", " to"]
KINDS = ("embed@{p}", "pos@{p}", "attn:{m}:{f}@{p}", "attn_err:{m}@{p}", "attn_bias:{m}@{p}",
         "mlp:{m}@{p}", "head:{m}.{h}@{p}")  # fmt: skip


def some_graph(n: int, tokens: list[str] = TOKENS, seed: int = 0, layers: int = 4) -> Any:
    rng = random.Random(seed)
    target = f'logit_diff:" Mary"-" John"@{len(tokens) - 1}'
    graph: Any = nx.DiGraph()
    graph.graph.update(tokens=tokens, targets=[target], worst_ledger_residual=3.2e-7)
    graph.add_node(target, kind="logit_diff", influence=1.0, pre_activation=3.25)
    while len(graph) < n:
        at = rng.choice([*range(len(tokens)), *[len(tokens) - 1] * 5])
        name = rng.choice(KINDS).format(
            p=at, m=rng.randrange(layers), f=rng.randrange(32768), h=rng.randrange(8)
        )
        graph.add_node(name, influence=rng.random() ** 4, token=tokens[at])
    names = [name for name in graph if name != target]
    for source in names:
        graph.add_edge(source, target, weight=rng.gauss(0, 1))
        if sap.Node.parse(source).kind in ("embed", "pos"):
            for feature in rng.sample(names, min(4, len(names))):
                if feature.startswith("attn:"):
                    graph.add_edge(source, feature, weight=rng.gauss(0, 1))
    return graph


def centres(figure: Figure) -> list[tuple[float, float]]:
    """Of every node, in inches."""
    collections = [c for c in figure.axes[0].collections if str(c.get_gid()).startswith("nodes:")]
    return [tuple(xy) for c in collections for xy in np.asarray(c.get_offsets())]


def edge_collection(figure: Figure) -> Any:
    return next(c for c in figure.axes[0].collections if c.get_gid() == "edges")


@pytest.mark.parametrize("n", [1, 10, 40, 60])
def test_no_two_nodes_and_no_two_texts_overlap(n: int) -> None:
    figure = sap.draw(some_graph(n))
    points = centres(figure)
    assert len(points) == n
    for (x0, y0), (x1, y1) in itertools.combinations(points, 2):
        assert abs(x0 - x1) > 0.3 or abs(y0 - y1) > 0.3
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    texts = [t for t in figure.axes[0].texts if t.get_text().strip()]
    boxes = [t.get_window_extent(canvas.get_renderer()) for t in texts]
    page = figure.bbox
    for (first, a), (second, b) in itertools.combinations(zip(texts, boxes, strict=True), 2):
        apart = a.x1 <= b.x0 or b.x1 <= a.x0 or a.y1 <= b.y0 or b.y1 <= a.y0
        assert apart, (first.get_text(), second.get_text())
    for text, box in zip(texts, boxes, strict=True):
        inside = min(box.x0, box.y0) >= 0 and box.x1 <= page.x1 and box.y1 <= page.y1
        assert inside, text.get_text()


def test_positions_go_right_and_layers_go_up() -> None:
    figure = sap.draw(some_graph(60))
    axes = figure.axes[0]
    numbers = [t for t in axes.texts if t.get_text().isdigit() and t.get_fontsize() == 6]
    assert [t.get_text() for t in numbers] == [str(p) for p in range(len(TOKENS))]
    x = [t.get_position()[0] for t in numbers]
    assert x == sorted(x)
    rows = [t for t in axes.texts if t.get_fontsize() == 8]
    names = [t.get_text() for t in sorted(rows, key=lambda t: t.get_position()[1])]
    per_layer = [f"{m} · {kind}" for m in range(4) for kind in ("attention", "MLP")]
    assert names == ["embeddings", *per_layer, "output"]


def test_edges_show_sign_and_share() -> None:
    graph: Any = nx.DiGraph()
    graph.graph.update(targets=['logit:" b"@1'], tokens=[" a", " b"])
    graph.add_edge("embed@1", 'logit:" b"@1', weight=3.0)
    graph.add_edge("mlp:0@1", 'logit:" b"@1', weight=-1.0)
    edges = edge_collection(sap.draw(graph))
    (thin, thick), (negative, positive) = sorted(edges.get_linewidths()), edges.get_linestyles()
    assert thick - 0.5 == pytest.approx(3 * (thin - 0.5))
    assert positive[1] is None  # solid; the stronger edge is painted last
    assert negative[1] is not None
    assert not np.allclose(*edges.get_edgecolors()[:, :3])


def test_heads_in_parallel_are_one_edge() -> None:
    graph: Any = nx.MultiDiGraph()
    graph.graph.update(targets=["attn:1:2@1"], tokens=[" a", " b"])
    graph.add_edge("embed@0", "attn:1:2@1", key="1.0", weight=3.0)
    graph.add_edge("embed@0", "attn:1:2@1", key="1.1", weight=-4.0)
    edges = edge_collection(sap.draw(graph))
    assert len(edges.get_paths()) == 1
    assert edges.get_linestyles()[0][1] is not None  # -1 in sum


def test_what_is_left_out_is_said() -> None:
    graph = some_graph(60)
    texts = [t.get_text() for t in sap.draw(graph, max_nodes=20, max_edges=5).axes[0].texts]
    said = next(t for t in texts if "not drawn" in t)
    assert "20 nodes  ·  5 edges" in said
    assert f"40 nodes and {graph.number_of_edges() - 5} edges" in said
    assert "worst ledger residual 3.2e-07" in said
    assert any(t == 'logit_diff:" Mary"-" John"@9 = 3.25' for t in texts)


HOSTILE = ["$x^2$", "\\frac{1}{", "$", "\\", "\u4e2d\u6587", "\ud83d", "\n", "", "   ", "\x00"]
HOSTILE += ["%", "a" * 500, "\U0001f986", "e\u0301", "\u202eabc", "_^{", "\ufffd", "\u2581x", "\t$"]


def test_any_token_can_be_drawn(tmp_path: Path) -> None:
    graph = some_graph(40, [*HOSTILE, " end"])
    graph.add_node('logit:"$\\\\alpha_\u4e2d \\n"@3', influence=0.5)
    graph.graph["targets"].append('logit:"$\\\\alpha_\u4e2d \\n"@3')
    graph.graph["model"] = "$\\bad_{"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = sap.draw(graph, tmp_path / "a.png")
    texts = [t.get_text() for t in figure.axes[0].texts]
    for shown in ("$x^2$", "\\frac{1}{", "□□", "\\ud83d", '"\\n"', "\\x00", "a" * 15 + "…"):
        assert shown in texts


def test_user_settings_do_not_matter(tmp_path: Path) -> None:
    sap.draw(some_graph(20), tmp_path / "a.png")
    settings: Any = {"text.usetex": True, "savefig.bbox": "tight", "font.size": 30,
                "figure.constrained_layout.use": True, "axes.facecolor": "red"}  # fmt: skip
    with matplotlib.rc_context(settings):
        sap.draw(some_graph(20), tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_same_bytes_twice_and_pyplot_stays_out(tmp_path: Path) -> None:
    before = "matplotlib.pyplot" in sys.modules
    for name in ("a.png", "b.png"):
        sap.draw(some_graph(200), tmp_path / name)
    data = (tmp_path / "a.png").read_bytes()
    assert data == (tmp_path / "b.png").read_bytes()
    assert data.startswith(b"\x89PNG")
    assert matplotlib.__version__.encode() not in data
    assert ("matplotlib.pyplot" in sys.modules) == before


@pytest.mark.slow
def test_long_prompts_and_deep_models(tmp_path: Path) -> None:
    figure = sap.draw(some_graph(200, TOKENS * 10, layers=26), tmp_path / "a.png")
    assert len(centres(figure)) == 200


@pytest.mark.parametrize("by", [None, "head"])
def test_a_real_graph(by: Any, tmp_path: Path) -> None:
    model = tiny_gpt2()
    run = sap.FeatureLens(model, random_saes(model)[:2]).run([[3, 1, 4, 1, 5]])
    targets = [sap.Logit(7), sap.Feature(1, 3, 2), sap.LogitDiff(5, 6)]
    graph = run.attribute(targets).prune(0.5).to_networkx(by=by)
    sap.draw(graph, tmp_path / "a.png")
    loaded = sap.draw(graph)
    assert len(centres(loaded)) == len(graph)


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(sap.InputError, match="no nodes"):
        sap.draw(nx.DiGraph())
    with pytest.raises(sap.InputError, match=r"ends in \.png"):
        sap.draw(some_graph(3), tmp_path / "a.svg")
    with pytest.raises(sap.InputError, match="max_edges=0"):
        sap.draw(some_graph(3), max_edges=0)
    with pytest.raises(sap.InputError, match="no font 'Nowhere Sans'"):
        sap.draw(some_graph(3), font="Nowhere Sans")
    with pytest.raises(sap.FileError, match="does not exist"):
        sap.draw(some_graph(3), tmp_path / "none" / "a.png")
    assert list(tmp_path.iterdir()) == []
