"""Cuts, dominators, supernodes, differences and means: against brute force and closed ledgers."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np
import pytest
from helpers import random_saes, tiny_gpt2

import sae_attn_plugin as sap

TARGET = 'logit:" b"@2'


def random_graph(seed: int, multi: bool = False, density: float = 0.5) -> Any:
    """A layered graph of 2 + 3 + 2 + 1 nodes whose ledgers close."""
    rng = np.random.default_rng(seed)
    layers = [["embed@0", "embed@1"], [f"attn:0:{i}@{i}" for i in range(3)],
              ["attn:1:0@2", "attn:1:5@1"], [TARGET]]  # fmt: skip
    graph: Any = nx.MultiDiGraph() if multi else nx.DiGraph()
    graph.graph.update(targets=[TARGET], tokens=["a", " b", "c"], prompt="a bc")
    for node in itertools.chain(*layers):
        parsed = sap.Node.parse(node)
        graph.add_node(node, kind=parsed.kind, position=parsed.position,
                       influence=float(rng.random()))  # fmt: skip
    for low, high in itertools.combinations(range(4), 2):
        for source, target in itertools.product(layers[low], layers[high]):
            if (low, high) == (0, 3) or rng.random() > density:
                continue
            if not multi:
                graph.add_edge(source, target, weight=float(rng.standard_normal()))
                continue
            for head in range(2):
                weight = float(rng.standard_normal())
                graph.add_edge(source, target, key=f"{high}.{head}", weight=weight, head=head)
    for node in graph:
        if graph.in_degree(node):
            terms = {"constant": float(rng.standard_normal()), "pruned_in": float(rng.random())}
            weights = [w for *_, w in graph.in_edges(node, data="weight")]
            value = math.fsum([*weights, *terms.values()])
            graph.nodes[node].update(terms, pre_activation=value, activation=abs(value))
    return graph


def real_graph(prompt: Any = (3, 1, 4, 1, 5, 9), by: Any = None, prune: bool = True) -> Any:
    model = tiny_gpt2()
    run = sap.FeatureLens(model, random_saes(model)).run([list(prompt)])
    attribution = run.attribute(sap.LogitDiff(7, 2))
    return (attribution.prune(0.8, 0.9) if prune else attribution).to_networkx(by=by)


def check_ledger(graph: Any, tolerance: float = 1e-12) -> None:
    ledger = sap.graph_ledger(graph)
    assert len(ledger) > 0
    assert ledger["relative_residual"].max() <= tolerance


def summed(graph: Any) -> dict[tuple[str, str], float]:
    weights: dict[tuple[str, str], float] = {}
    for source, target, weight in graph.edges(data="weight"):
        weights[source, target] = weights.get((source, target), 0.0) + weight
    return weights


def test_the_ledger_of_a_graph_is_that_of_its_attribution() -> None:
    model = tiny_gpt2()
    run = sap.FeatureLens(model, random_saes(model)).run([[3, 1, 4, 1, 5, 9]])
    attribution = run.attribute(sap.LogitDiff(7, 2)).prune(0.8, 0.9)
    for by in (None, "head"):
        ledger = sap.graph_ledger(attribution.to_networkx(by=by))  # type: ignore[arg-type]
        for name in ("in_sum", "constant", "pruned", "value"):
            expected = attribution.ledger[name].loc[ledger.index]
            np.testing.assert_allclose(ledger[name], expected, rtol=1e-5, atol=1e-6)
        assert set(ledger.index) == set(attribution.ledger.index)
        assert ledger["relative_residual"].max() < 1e-5


# -- cuts and dominators ---------------------------------------------------------------------------


def influences(graph: Any) -> tuple[dict[tuple[str, str], float], dict[str, float]]:
    """By counting paths: what each edge passes on, and each node's influence."""
    weights = summed(graph)
    shares = {}
    for (source, target), _ in weights.items():
        size = sum(abs(w) for *_, w in graph.in_edges(target, data="weight"))
        here = sum(abs(d["weight"]) for s, _, d in graph.in_edges(target, data=True) if s == source)
        shares[source, target] = here / size
    node = dict.fromkeys(graph, 0.0)
    node[TARGET] = 1.0
    edge = dict.fromkeys(weights, 0.0)
    plain = nx.DiGraph(graph)
    for start in graph:
        if start == TARGET:
            continue
        for path in nx.all_simple_paths(plain, start, TARGET):
            product = math.prod(shares[pair] for pair in itertools.pairwise(path))
            node[start] += product
            edge[path[0], path[1]] += product
    return edge, node


@pytest.mark.parametrize("multi", [False, True])
@pytest.mark.parametrize("capacity", ["weight", "influence", "count"])
def test_min_cut_of_edges_is_the_cheapest_of_all(capacity: Any, multi: bool) -> None:
    done = 0
    for seed in range(12):
        graph = random_graph(seed, multi)
        plain = nx.DiGraph(graph)
        if not nx.has_path(plain, "embed@0", TARGET):
            continue
        done += 1
        cost: Any = {"weight": {p: abs(w) for p, w in summed(graph).items()},
                     "influence": influences(graph)[0],
                     "count": dict.fromkeys(summed(graph), 1.0)}[capacity]  # fmt: skip
        # every cut is a set of nodes that holds the source and not the target
        others = [node for node in graph if node not in ("embed@0", TARGET)]
        best = math.inf
        for chosen in itertools.product([False, True], repeat=len(others)):
            side = {"embed@0", *itertools.compress(others, chosen)}
            best = min(best, sum(c for (a, b), c in cost.items() if a in side and b not in side))
        cut = sap.min_cut(graph, "embed@0", TARGET, capacity=capacity)
        assert cut.value == pytest.approx(best)
        assert sum(cost[pair] for pair in cut.edges) == pytest.approx(best)
        plain.remove_edges_from(cut.edges)
        assert not nx.has_path(plain, "embed@0", TARGET)
        assert cut.source_side >= {"embed@0"}
    assert done > 5


@pytest.mark.parametrize("capacity", ["influence", "count"])
def test_min_cut_of_nodes_is_the_cheapest_of_all(capacity: Any) -> None:
    done = 0
    for seed in range(20):
        graph = random_graph(seed)
        starts = {"embed@0", "embed@1"}
        if not any(nx.has_path(graph, start, TARGET) for start in starts):
            continue
        done += 1
        node = influences(graph)[1]
        others = [n for n in graph if n not in starts | {TARGET}]
        best = math.inf
        for size in range(len(others) + 1):
            for gone in itertools.combinations(others, size):
                rest = graph.subgraph(set(graph) - set(gone))
                if not any(nx.has_path(rest, start, TARGET) for start in starts):
                    price = len(gone) if capacity == "count" else sum(node[n] for n in gone)
                    best = min(best, price)
        cut = sap.min_cut(graph, "embed", TARGET, of="nodes", capacity=capacity)
        assert cut.value == pytest.approx(best)
        rest = graph.subgraph(set(graph) - set(cut.nodes))
        assert not any(nx.has_path(rest, start, TARGET) for start in starts)
    assert done > 10


def test_dominators_are_the_nodes_of_every_path() -> None:
    found = 0
    for seed in range(60):
        graph = random_graph(seed, multi=seed % 2 == 0, density=0.3)
        paths = list(nx.all_simple_paths(nx.DiGraph(graph), "embed@0", TARGET))
        if not paths:
            with pytest.raises(sap.InputError, match="no path leads from embed@0"):
                sap.dominators(graph, "embed@0", TARGET)
            continue
        everywhere = set.intersection(*map(set, paths)) - {"embed@0", TARGET}
        expected = [node for node in paths[0] if node in everywhere]
        assert sap.dominators(graph, "embed@0") == expected
        found += len(expected)
    assert found > 10


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda g: sap.min_cut(g, "embed@7"), "embed@7 is not in the graph"),
        (lambda g: sap.min_cut(g, TARGET, TARGET), "is both source and target"),
        (lambda g: sap.min_cut(g, of="nodes", capacity="weight"), "or of='nodes' with 'influence'"),
        (lambda g: sap.min_cut(g, "attn", of="nodes"), "has an edge into .* prune the graph"),
        (lambda g: sap.dominators(g, "embed@0", "attn:9:9@9"), "attn:9:9@9 is not in the graph"),
        (lambda g: sap.subgraph_around(g, "embed@0", up=-1), r"up=-1.*at least 0"),
        (lambda g: sap.contract(g, {"x": []}), "the group 'x' is empty"),
        (lambda g: sap.contract(g, {"x": "embed@0"}), "expected {label"),
        (lambda g: sap.contract(g, {"x": ["embed@9"]}), "'embed@9' is not in the graph"),
        (lambda g: sap.contract(g, {"x": ["embed@0"], "y": ["embed@0"]}), "embed@0 is twice"),
        (lambda g: sap.suggest_supernodes(g, threshold=0), "threshold=0"),
        (lambda _: sap.aggregate_graphs([]), "at least one graph"),
        (lambda g: sap.aggregate_graphs([g], []), "1 graphs, but positions of 0"),
        (lambda g: sap.graph_difference(g, random_graph(0, True)), "some do not"),
    ],
)
def test_wrong_input_is_told(call: Any, message: str) -> None:
    with pytest.raises(sap.InputError, match=message):
        call(random_graph(3, density=1.0))


# -- parts and groups ------------------------------------------------------------------------------


@pytest.mark.parametrize("by", [None, "head"])
def test_the_graph_around_a_node(by: Any) -> None:
    graph = real_graph(by=by)
    plain = nx.DiGraph(graph)
    middle = max((n for n in graph if n.startswith("attn:1:")), key=lambda n: graph.degree(n))
    for up, down in ((1, 1), (0, None), (None, 0), (2, 0)):
        part = sap.subgraph_around(graph, middle, up, down)
        expected = {
            n for n in graph if _hops(plain, n, middle, up) or _hops(plain, middle, n, down)
        }
        assert set(part) == expected
        check_ledger(part, 1e-5)
        for at in part.edges:
            assert part.edges[at]["weight"] == graph.edges[at]["weight"]
    assert sap.subgraph_around(graph, [middle, TARGET_OF(graph)], 0, 0).graph["targets"]


def _hops(graph: Any, source: str, target: str, limit: int | None) -> bool:
    if not nx.has_path(graph, source, target):
        return False
    return limit is None or nx.shortest_path_length(graph, source, target) <= limit


def TARGET_OF(graph: Any) -> str:
    return graph.graph["targets"][0]


@pytest.mark.parametrize("multi", [False, True])
def test_contraction_sums_edges_and_keeps_the_ledger(tmp_path: Path, multi: bool) -> None:
    for seed in range(8):
        graph = random_graph(seed, multi, density=0.8)
        groups = {"low": ["attn:0:0@0", "attn:0:2@2"], "in": ["embed@0", "embed@1"]}
        merged = sap.contract(graph, groups)
        low, words = 'super:0:"low"@2', 'super:"in"@1'
        place = {n: n for n in graph} | dict.fromkeys(groups["low"], low)
        place |= dict.fromkeys(groups["in"], words)
        expected: dict[tuple[str, str], float] = {}
        for (source, target), weight in summed(graph).items():
            pair = place[source], place[target]
            expected[pair] = expected.get(pair, 0.0) + weight
        assert summed(merged) == pytest.approx(expected)
        check_ledger(merged)
        assert merged.nodes[low]["members"] == groups["low"]
        sap.save(merged, tmp_path / "a.json")
        assert sap.graphs_equal(sap.load(tmp_path / "a.json"), merged, 0)
        # again, over a supernode
        twice = sap.contract(merged, {"more": [low, "attn:0:1@1"]})
        check_ledger(twice)
        assert set(twice.graph["merged"]) == {"low", "in", "more"}


def test_edges_inside_a_group_are_in_its_ledger() -> None:
    graph = random_graph(1, density=1.0)
    group = ["attn:0:0@0", "attn:0:1@1", "attn:0:2@2", "attn:1:0@2", "attn:1:5@1"]
    merged = sap.contract(graph, {"all": group})
    check_ledger(merged)
    (made,) = (node for node in merged if node.startswith("super"))
    inside = sum(w for (a, b), w in summed(graph).items() if a in group and b in group)
    assert merged.nodes[made]["internal"] == pytest.approx(inside)
    with pytest.raises(sap.InputError, match=r'make a cycle: .*super:1:"x"@2'):
        sap.contract(graph, {"x": ["embed@0", "attn:1:0@2"]})


def test_a_real_graph_contracted_and_saved_everywhere(tmp_path: Path) -> None:
    graph = real_graph()
    lens = sap.FeatureLens(tiny_gpt2(), random_saes(tiny_gpt2()))
    groups = sap.suggest_supernodes(graph, lens, threshold=0.3)
    assert groups
    for names in groups.values():
        assert len(names) > 1
        assert len({sap.Node.parse(name).layer for name in names}) == 1
    merged = sap.contract(graph, groups)
    assert len(merged) == len(graph) - sum(len(names) - 1 for names in groups.values())
    check_ledger(merged, 1e-5)
    for ending in ("json", "safetensors", "graphml", "gexf"):
        sap.save(merged, tmp_path / f"a.{ending}")
        assert dict(sap.load(tmp_path / f"a.{ending}").nodes) == dict(merged.nodes)
    sap.save(merged, tmp_path / "np.json", format="neuronpedia", scan="x")
    sap.draw(merged)


def test_suggested_groups_are_alike() -> None:
    """The same feature at several positions is one group; a threshold of 1 takes nothing else."""
    graph = random_graph(0, density=1.0)
    graph.add_node("attn:0:0@2")
    for _, target, attributes in list(graph.out_edges("attn:0:0@0", data=True)):
        graph.add_edge("attn:0:0@2", target, **attributes)
    for source, _, attributes in list(graph.in_edges("attn:0:0@0", data=True)):
        graph.add_edge(source, "attn:0:0@2", **attributes)
    for *_, attributes in graph.edges(data=True):
        attributes["share"] = abs(attributes["weight"])
    groups = sap.suggest_supernodes(graph, threshold=1)
    assert list(groups.values()) == [["attn:0:0@0", "attn:0:0@2"]]
    assert sap.suggest_supernodes(graph, threshold=1, across_positions=False) == {}


def test_supernodes_go_to_neuronpedia() -> None:
    from test_neuronpedia import check_valid

    from sae_attn_plugin.graphs.neuronpedia import to_neuronpedia

    graph = real_graph()
    names = [n for n in graph if n.startswith("attn:1")][:3]
    graph.graph["supernodes"] = [{"name": "three", "members": names}]
    document = to_neuronpedia(graph, scan="x")
    ids = {node["sae_attn_id"]: node["node_id"] for node in document["nodes"]}
    assert document["qParams"]["supernodes"] == [["three", *(ids[name] for name in names)]]
    check_valid(document)
    merged = to_neuronpedia(sap.contract(graph, {"three": names}), scan="x")
    assert merged["qParams"]["supernodes"] == []
    check_valid(merged)


# -- several graphs --------------------------------------------------------------------------------


@pytest.mark.parametrize("multi", [False, True])
def test_the_difference_adds_up(multi: bool) -> None:
    first, second = random_graph(1, multi, 0.7), random_graph(2, multi, 0.7)
    difference = sap.graph_difference(first, second)
    expected = summed(first)
    for pair, weight in summed(second).items():
        expected[pair] = expected.get(pair, 0.0) - weight
    assert summed(difference) == pytest.approx(expected)
    check_ledger(difference)
    for *_, attributes in difference.edges(data=True):
        assert attributes["first"] - attributes["second"] == pytest.approx(attributes["weight"])
    nothing = sap.graph_difference(first, first)
    assert all(weight == 0 for *_, weight in nothing.edges(data="weight"))


def test_the_difference_of_prompts_on_a_real_model(tmp_path: Path) -> None:
    first, second = real_graph(), real_graph((3, 1, 4, 1, 8, 9))
    difference = sap.graph_difference(first, second)
    assert set(difference) == set(first) | set(second)
    check_ledger(difference, 1e-5)
    assert difference.graph["tokens"][4] == "*"
    sap.save(difference, tmp_path / "a.json")
    mean = sap.aggregate_graphs([first, second])
    check_ledger(mean, 1e-5)
    sap.save(mean, tmp_path / "b.json")


def test_equality_up_to_tolerance() -> None:
    graph = random_graph(1, density=1.0)
    assert sap.graphs_equal(graph, graph.copy(), 0)
    other = graph.copy()
    at = ("embed@0", "attn:0:0@0")
    scale = sum(abs(w) for *_, w in graph.in_edges(at[1], data="weight"))
    scale += abs(graph.nodes[at[1]]["constant"])
    other.edges[at]["weight"] += 1e-3 * scale
    found = sap.compare_graphs(graph, other)
    assert found.where == at
    assert found.error == pytest.approx(1e-3, rel=1e-2)
    assert found.equal(1.1e-3)
    assert not found.equal(0.9e-3)
    other = graph.copy()
    lost = other.edges[at]["weight"]
    other.remove_edge(*at)
    found = sap.compare_graphs(graph, other)
    assert found.edges_only_first == (at,)
    assert found.error == pytest.approx(abs(lost) / scale)
    other.remove_node("attn:1:0@2")
    assert sap.compare_graphs(graph, other).only_first == ("attn:1:0@2",)
    assert not sap.graphs_equal(graph, other, 10)
    changed = graph.copy()
    changed.nodes[TARGET]["constant"] += 5
    assert not sap.graphs_equal(graph, changed)


@pytest.mark.parametrize("multi", [False, True])
def test_the_mean_of_many(multi: bool) -> None:
    many = [random_graph(seed, multi, 0.6) for seed in range(5)]
    mean = sap.aggregate_graphs(many)
    check_ledger(mean)
    for at in mean.edges:
        weights = [g.edges[at]["weight"] if g.has_edge(*at) else 0.0 for g in many]
        attributes = mean.edges[at]
        assert attributes["weight"] == pytest.approx(np.mean(weights))
        assert attributes["std"] == pytest.approx(np.std(weights))
        assert attributes["count"] == sum(g.has_edge(*at) for g in many)
    assert all(mean.nodes[node]["count"] == 5 for node in mean)


def test_prompts_of_different_length_line_up_by_position() -> None:
    """The same graph, three tokens later, is the same graph once positions are mapped."""
    graph = random_graph(4, density=0.9)
    later = nx.relabel_nodes(graph, {n: _later(n) for n in graph})
    for node in later:
        later.nodes[node]["position"] += 3
    later.graph.update(targets=[_later(TARGET)], tokens=["x", "y", "z", *graph.graph["tokens"]])
    here, there = {p: p for p in range(3)}, {p + 3: p for p in range(3)}
    mean = sap.aggregate_graphs([graph, later], [here, there])
    assert sap.graphs_equal(mean, graph, 1e-12)
    assert mean.graph["tokens"] == graph.graph["tokens"]
    check_ledger(mean)
    # a position left out: what it wrote is pruned, and two positions at one are added up
    fewer = sap.aggregate_graphs([graph], [{1: 1, 2: 2}])
    assert not any(sap.Node.parse(node).position == 0 for node in fewer)
    check_ledger(fewer)
    folded = sap.aggregate_graphs([graph], [{0: 1, 1: 1, 2: 2}])
    check_ledger(folded)
    assert "embed@1" in folded
    assert "embed@0" not in folded


def _later(name: str) -> str:
    head, position = name.rsplit("@", 1)
    return f"{head}@{int(position) + 3}"
