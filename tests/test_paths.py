"""The strongest paths, against the enumeration of every path."""

from __future__ import annotations

import itertools
import math
import random
from typing import Any

import networkx as nx
import pytest
from helpers import random_saes, tiny_gpt2

import sae_attn_plugin as sap

LOGIT = 'logit:" b"@3'
TOKENS = ["a", ' "q"', " $", " b"]


def random_graph(seed: int, multi: bool = False) -> Any:
    """Embeddings, three layers of features and a logit, with edges left out at random."""
    rng = random.Random(seed)
    graph: Any = nx.MultiDiGraph() if multi else nx.DiGraph()
    layers = [[f"embed@{p}" for p in range(4)]]
    layers += [[f"attn:{m}:{rng.randrange(90)}@{p}" for p in range(4)] for m in range(3)]
    layers += [[LOGIT]]
    for depth, layer in enumerate(layers):
        for node in layer:
            parsed = sap.Node.parse(node)
            graph.add_node(node, kind=parsed.kind, token=TOKENS[parsed.position])
            for before in itertools.chain(*layers[:depth]):
                for head in range(2 if multi else 1):
                    if rng.random() < 0.6:
                        key = {"key": f"{parsed.layer}.{head}"} if multi else {}
                        graph.add_edge(before, node, weight=rng.gauss(0, 1), **key)
    if not multi:
        for node in graph:
            edges = graph.in_edges(node, data=True)
            total = sum(abs(data["weight"]) for _, _, data in edges)
            for _, _, data in edges:
                data["share"] = abs(data["weight"]) / total
    graph.graph.update(targets=[LOGIT], tokens=TOKENS)
    return graph


def every_path(graph: Any, starts: list[str], target: str) -> list[tuple[float, tuple[str, ...]]]:
    """Shares and nodes of all paths, by plain enumeration."""
    found = []
    for start in starts:
        if start == target:
            continue
        for edges in nx.all_simple_edge_paths(graph, start, target):
            share = 1.0
            for before, after, *key in edges:
                total = sum(abs(d["weight"]) for _, _, d in graph.in_edges(after, data=True))
                data = graph[before][after][key[0]] if key else graph[before][after]
                share *= abs(data["weight"]) / total
            found.append((share, (start, *(edge[1] for edge in edges))))
    return sorted(found, reverse=True)


def leaves(graph: Any) -> list[str]:
    return [node for node in graph if graph.in_degree(node) == 0]


@pytest.mark.parametrize("multi", [False, True])
@pytest.mark.parametrize("seed", range(8))
def test_against_every_path(seed: int, multi: bool) -> None:
    graph = random_graph(seed, multi)
    expected = every_path(graph, leaves(graph), LOGIT)
    assert sum(share for share, _ in expected) == pytest.approx(1)  # shares split the target
    for n in (1, 7, len(expected) + 5):
        found = sap.strongest_paths(graph, n=n)
        assert len(found) == min(n, len(expected))
        for path, (share, nodes) in zip(found, expected, strict=False):
            assert path.share == pytest.approx(share, rel=1e-12)
            assert path.nodes == nodes or multi  # parallel heads share their nodes


@pytest.mark.parametrize("multi", [False, True])
def test_each_path_is_what_it_says(multi: bool) -> None:
    graph = random_graph(3, multi)
    for path in sap.strongest_paths(graph, n=50):
        keys = path.keys if multi else (None,) * len(path)
        assert len(keys) == len(path) == len(path.nodes) - 1
        sign = 1.0
        for before, after, key, weight in zip(
            path.nodes, path.nodes[1:], keys, path.weights, strict=False
        ):
            data = graph[before][after][key] if multi else graph[before][after]
            assert data["weight"] == weight
            sign *= math.copysign(1, weight)
        assert path.sign == sign
        assert path.tokens == tuple(graph.nodes[node]["token"] for node in path.nodes)


@pytest.mark.parametrize("seed", range(4))
def test_sources_and_targets(seed: int) -> None:
    graph = random_graph(seed)
    features = [node for node in graph if node.startswith("attn")]
    target = features[-1]
    cases: list[tuple[Any, list[str]]] = [
        (2, [v for v in leaves(graph) if v.endswith("@2")]),
        (-1, [v for v in leaves(graph) if v.endswith("@3")]),
        ("embed@1", ["embed@1"]),
        (sap.Node.parse("embed@1"), ["embed@1"]),
        (features[0], [features[0]]),
        ("attn", features),
        ("embed", [f"embed@{p}" for p in range(4)]),
    ]
    for source, starts in cases:
        for end in (LOGIT, target):
            expected = every_path(graph, starts, end)
            if not expected:
                with pytest.raises(sap.InputError, match="no path leads from"):
                    sap.strongest_paths(graph, end, source=source)
                continue
            found = sap.strongest_paths(graph, end, n=4, source=source)
            assert [path.share for path in found] == pytest.approx([s for s, _ in expected[:4]])
            assert {path.nodes[-1] for path in found} == {end}


def test_several_targets_and_a_target_that_is_a_source() -> None:
    graph = random_graph(1)
    inner = next(node for node in graph if node.startswith("attn:0"))
    graph.graph["targets"] = [LOGIT, inner]
    both = every_path(graph, leaves(graph), LOGIT) + every_path(graph, leaves(graph), inner)
    found = sap.strongest_paths(graph, n=5)
    assert [p.share for p in found] == pytest.approx([s for s, _ in sorted(both)[::-1][:5]])
    assert {path.nodes[0] for path in sap.strongest_paths(graph, source=inner)} == {inner}


def test_a_path_reads_well() -> None:
    graph = random_graph(0)
    path = sap.strongest_paths(graph, n=1, source="embed@1")[0]
    assert str(path).startswith('embed@1 " \\"q\\"" -> ')
    assert str(path).endswith(f" -> {LOGIT}")
    by_head = sap.strongest_paths(random_graph(0, multi=True), n=1)[0]
    assert f" -[{by_head.keys[0]}]-> " in str(by_head)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target": "attn:0:99@0"}, "target attn:0:99@0 is not in the graph"),
        ({"target": "nonsense"}, "not a node id: 'nonsense'"),
        ({"source": "embed@7"}, "source embed@7 is not in the graph"),
        ({"source": "nonsense"}, "not a node id: 'nonsense'"),
        ({"source": 4}, "position 4 is out of range: the prompt has 4 tokens"),
        ({"source": -5}, "position -5 is out of range"),
        ({"source": LOGIT}, "no path leads from"),
        ({"source": "mlp"}, "no path leads from a node of kind 'mlp'"),
        ({"n": 0}, "expected at least 1"),
    ],
)
def test_refusals(arguments: Any, message: str) -> None:
    with pytest.raises(sap.InputError, match=message):
        sap.strongest_paths(random_graph(0), **arguments)


def test_cycles_and_graphs_without_targets_are_refused() -> None:
    graph = random_graph(0)
    del graph.graph["targets"]
    with pytest.raises(sap.InputError, match="pass target="):
        sap.strongest_paths(graph)
    cycle: Any = nx.DiGraph()
    cycle.add_edge("attn:0:1@0", "attn:1:1@0", weight=1.0)
    cycle.add_edge("attn:1:1@0", "attn:0:1@0", weight=1.0)
    with pytest.raises(sap.InputError, match="cycle"):
        sap.strongest_paths(cycle, "attn:1:1@0")


def test_a_real_graph_by_edge_and_by_head() -> None:
    model = tiny_gpt2()
    run = sap.FeatureLens(model, random_saes(model)).run([[3, 1, 4, 1]])
    attribution = run.attribute(sap.Logit(7)).prune(0.5, 0.5, max_nodes=12)
    for by in (None, "head"):
        graph = attribution.to_networkx(by=by)
        expected = every_path(graph, leaves(graph), graph.graph["targets"][0])
        found = sap.strongest_paths(graph, n=10)
        assert [p.share for p in found] == pytest.approx([s for s, _ in expected[:10]], rel=1e-5)
