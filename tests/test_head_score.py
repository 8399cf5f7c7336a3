"""A head's score as a target of the graph, against autograd."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from architecture_models import RECIPES, FrozenAutograd
from conftest import LensMaker
from helpers import TINY, TrueFloat64, random_saes
from oracle import Oracle
from test_architectures import PAIRS, TOKENS, exact, run_of

import sae_attn_plugin as sap

pytestmark = pytest.mark.filterwarnings("ignore:HookedTransformer is deprecated")

SIDES = ("query", "key", "both")


def edges_of(attribution: sap.Attribution, target: str) -> dict[str, float]:
    edges = attribution.edges
    of_target = edges[edges["target"] == target]
    return dict(zip(of_target["source"].astype(str), of_target["weight"], strict=True))


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("model", TINY)
@pytest.mark.parametrize(("query", "key"), [(7, 4), (5, 5)])
def test_edges_match_the_oracle(
    lens_of: LensMaker, model: str, side: Any, query: int, key: int
) -> None:
    """Every in-edge, the constant and the value, by autograd through a plain reading in float64."""
    lens = lens_of(model, "nnsight", torch.float64)
    plain = TINY[model](torch.float64)
    oracle = Oracle(plain, dict(enumerate(random_saes(plain))), TOKENS)
    with TrueFloat64():
        run = lens.run([TOKENS])
        attribution = run.attribute(sap.HeadScore(2, 3, query, key, side), node_budget=20)
    target = attribution.ledger.index[0]
    expected = oracle.attribute({"score": ("score", 2, 3, query, key, side)})["score"]
    found = edges_of(attribution, target)
    size = sum(map(abs, expected.edges.values())) + abs(expected.constant)
    assert set(found) == {name for name, weight in expected.edges.items() if weight != 0}
    for source, weight in expected.edges.items():
        assert abs(found[source] - weight) <= 1e-10 * size, source
    row = attribution.ledger.loc[target]
    assert abs(row["constant"] - expected.constant) <= 1e-10 * size
    assert abs(row["value"] - expected.value) <= 1e-10 * size
    attribution.check_closure(1e-10)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float64", 1e-10)])
@pytest.mark.parametrize(("name", "host"), PAIRS)
def test_ledger_closes_to_the_score(name: str, host: str, dtype: str, tolerance: float) -> None:
    run = run_of(name, host, dtype)
    with exact(dtype):
        targets = [sap.HeadScore(2, 4, 7, 5, side) for side in SIDES]
        attribution = run.attribute(targets, node_budget=30)
        score = run.qk(2, 4, 7, 5).score
    attribution.check_closure(tolerance)
    assert attribution.ledger["value"].iloc[:3].tolist() == pytest.approx([score] * 3, rel=1e-6)
    assert len(attribution.ledger) > 20  # recursed below the score


@pytest.mark.parametrize("name", RECIPES)
def test_edges_match_autograd_through_the_model(name: str) -> None:
    model = RECIPES[name].build(torch.float64)
    run = run_of(name, "nnsight")
    with TrueFloat64():
        oracle = FrozenAutograd(model, random_saes(model), TOKENS)
        attribution = run.attribute(sap.HeadScore(2, 4, 6, 6), node_budget=0)
        split = run.attribute([sap.HeadScore(2, 4, 7, 5, side) for side in ("query", "key")])
    leaves = list(oracle.leaves.values())

    def gradients(query: int, key: int) -> dict[int, Any]:
        score = oracle.scores[2][4, query, key]
        found = torch.autograd.grad(score, leaves, retain_graph=True, allow_unused=True)
        return {id(leaf): g for leaf, g in zip(leaves, found, strict=True)}

    half = edges_of(attribution, "score:2.4:6@6")
    both_sides = {
        **edges_of(split, "score:2.4:5:query@7"),
        **edges_of(split, "score:2.4:5:key@7"),
    }
    for edges, slope, share in (
        (half, gradients(6, 6), 0.5),  # half of what moves the query and the key at once
        (both_sides, gradients(7, 5), 1.0),
    ):
        size = sum(map(abs, edges.values()))
        assert len(edges) > 10
        for node, weight in edges.items():
            leaf, at = oracle.leaf(node)
            assert abs(weight - share * float(slope[id(leaf)][at])) <= 1e-10 * size, node


def test_both_sides_are_half_of_each() -> None:
    run = run_of("gpt2", "nnsight")
    att = run.attribute([sap.HeadScore(1, 0, 6, 3, side) for side in SIDES], node_budget=0)
    query, key, both = (edges_of(att, str(target)) for target in att.ledger.index[:3])
    assert set(query).isdisjoint(key)
    assert both.keys() == query.keys() | key.keys()
    for node, weight in {**query, **key}.items():
        assert both[node] == pytest.approx(weight / 2, rel=1e-12)
    qk = run.qk(1, 0, 6, 3)
    for node, weight in query.items():
        assert weight == pytest.approx(qk.by_query[node], rel=1e-9)


def test_graph_of_a_score(tmp_path: Any) -> None:
    run = run_of("llama", "nnsight", "float32")
    graph = run.graph(sap.HeadScore(2, 1, -1, 6), nodes=0.6)
    assert graph.graph["targets"] == ["score:2.1:6@8"]
    for name in ("graph.json", "graph.graphml"):
        sap.save(graph, tmp_path / name)
        assert set(sap.load(tmp_path / name).nodes) == set(graph.nodes)
    sap.draw(graph, tmp_path / "graph.png")
    by_head = run.attribute(sap.HeadScore(2, 1, -1, 6)).to_networkx(by="head")
    assert not any("head" in data for *_, data in by_head.in_edges("score:2.1:6@8", data=True))
    assert sap.validate(graph, run.lens, max_sources=3).frozen.max_error < 1e-5


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (sap.HeadScore(2, 6, 5, 3), "head 6 is out of range"),
        (sap.HeadScore(3, 0, 5, 3), "layer 3 is out of range"),
        (sap.HeadScore(2, 0, 3, 5), "key 5 comes after query 3"),
        (sap.HeadScore(2, 0, 8, 1), "masked for query 8"),
        (sap.HeadScore(2, 0, 20, 1), "position 20 is out of range"),
        (sap.HeadScore(2, 0, 5, 3, "values"), "expected one of query, key, both"),  # type: ignore[arg-type]
    ],
)
def test_scores_that_do_not_exist(target: sap.HeadScore, message: str) -> None:
    with pytest.raises(sap.InputError, match=message):
        run_of("mistral", "nnsight").attribute(target)
