"""Where a graph is thin: cuts, dominators, neighbourhoods. On networkx, of attribution graphs."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import networkx as nx

from sae_attn_plugin.errors import InputError
from sae_attn_plugin.graphs.ledger import check_nodes, restricted
from sae_attn_plugin.graphs.paths import find_starts, find_targets
from sae_attn_plugin.nodes import Node

__all__ = ["Cut", "dominators", "min_cut", "subgraph_around"]

_SOURCE, _SINK = "source", "sink"  # no node ids


@dataclass(frozen=True)
class Cut:
    """What separates a source from a target at least cost.

    Attributes:
        value: sum of the capacities that are cut.
        edges: cut edges ``(source, target)``, where edges were cut.
        nodes: cut nodes, where nodes were cut.
        source_side: nodes on the side of the source; cut nodes are on neither side.
    """

    value: float
    edges: tuple[tuple[str, str], ...] = ()
    nodes: tuple[str, ...] = ()
    source_side: frozenset[str] = frozenset()


def min_cut(
    graph: nx.DiGraph[Any],
    source: str | int | Node | None = None,
    target: str | Node | None = None,
    *,
    of: Literal["edges", "nodes"] = "edges",
    capacity: Literal["weight", "influence", "count"] | None = None,
) -> Cut:
    """The cheapest set of edges, or of nodes, without which nothing leads from source to target.

    It is a minimum cut in the sense of max-flow min-cut (networkx'
    :func:`~networkx.algorithms.flow.minimum_cut`), and says where a circuit is thin. It is no
    intervention: signs do not enter, and weights into different targets are in different units.

    Args:
        graph: from :meth:`Attribution.to_networkx`; parallel edges are summed. Prune first: in an
            unpruned graph nearly every token has an edge of its own into the target.
        source: as in :func:`strongest_paths`: None for all leaves, a position for the leaves there,
            a node id, or a kind.
        target: a node id. None: the graph's targets, as one.
        of: cut ``"edges"``, or ``"nodes"`` (sources and targets apart).
        capacity: what a cut costs. Of an edge: ``"weight"`` (the default), its |weight|;
            ``"influence"``, what it passes on, its share of the influence of its target (a source's
            own out-edges are always such a cut, so ask for nodes); ``"count"``, 1. Of a node:
            ``"influence"`` (the default), its influence on the target along the graph; ``"count"``,
            1, which gives the fewest nodes.

    Raises:
        InputError: a node that is not in the graph, a source among the targets, a node capacity
            that is none, or, for nodes, a source with an edge into the target itself.
    """
    capacity = capacity or ("weight" if of == "edges" else "influence")
    allowed = {"edges": ("weight", "influence", "count"), "nodes": ("influence", "count")}
    if of not in allowed or capacity not in allowed[of]:
        raise InputError(
            f"min_cut(of={of!r}, capacity={capacity!r}): expected of='edges' with 'weight', "
            "'influence' or 'count', or of='nodes' with 'influence' or 'count'"
        )
    targets, starts = find_targets(graph, target), set(find_starts(graph, source))
    if both := sorted(targets & starts):
        raise InputError(f"{both[0]} is both source and target; nothing separates it from itself")
    weights, passed, influence = _flow_of_influence(graph, targets)
    inside = _between(graph, starts, targets)
    if not inside & targets:
        return Cut(0.0, source_side=frozenset(starts))
    edges = {pair: w for pair, w in weights.items() if inside.issuperset(pair)}
    by_node = of == "nodes"

    def enter(node: str) -> Any:
        return (node, "in") if by_node else node

    def leave(node: str) -> Any:
        return (node, "out") if by_node else node

    network = nx.DiGraph()
    if by_node:
        direct = sorted(pair for pair in edges if pair[0] in starts and pair[1] in targets)
        if direct:
            raise InputError(
                f"{direct[0][0]} has an edge into {direct[0][1]} itself, so no nodes separate "
                "them; prune the graph, or cut edges"
            )
        for node in inside - starts - targets:
            price = 1.0 if capacity == "count" else influence[node]
            network.add_edge(enter(node), leave(node), capacity=price)
        for one, other in edges:
            network.add_edge(leave(one), enter(other))  # without a capacity: endless
    else:
        cost = {"weight": weights, "influence": passed}.get(capacity, dict.fromkeys(weights, 1.0))
        for one, other in edges:
            network.add_edge(one, other, capacity=abs(cost[one, other]))
    for node in starts & inside:
        network.add_edge(_SOURCE, leave(node))
    for node in targets & inside:
        network.add_edge(enter(node), _SINK)
    value, (side, _) = nx.minimum_cut(network, _SOURCE, _SINK)
    if of == "edges":
        cut = sorted(pair for pair in edges if pair[0] in side and pair[1] not in side)
        return Cut(float(value), edges=tuple(cut), source_side=frozenset(side - {_SOURCE}))
    cut_nodes = sorted(
        n for n in inside - starts - targets if enter(n) in side and leave(n) not in side
    )
    near = {n for n in inside if leave(n) in side}
    return Cut(float(value), nodes=tuple(cut_nodes), source_side=frozenset(near))


def dominators(
    graph: nx.DiGraph[Any],
    source: str | int | Node | None = None,
    target: str | Node | None = None,
) -> list[str]:
    """The nodes that every path from source to target goes through, nearest the source first.

    Args:
        graph, source, target: as for :func:`min_cut`. Several sources or targets count as one.

    Returns:
        Node ids, sources and targets apart; empty where paths share no node.

    Raises:
        InputError: a node that is not in the graph, or no path.
    """
    targets, starts = find_targets(graph, target), set(find_starts(graph, source))
    inside = _between(graph, starts, targets)
    if not inside & targets or not inside & starts:
        raise InputError(f"no path leads from {source} to {' or '.join(sorted(targets))}")
    network = nx.DiGraph(graph.subgraph(inside).edges())
    network.add_edges_from((_SOURCE, node) for node in starts & inside)
    network.add_edges_from((node, _SINK) for node in targets & inside)
    parent = nx.immediate_dominators(network, _SOURCE)
    chain, node = [], parent[_SINK]
    while node != _SOURCE:
        chain.append(node)
        node = parent[node]
    return [node for node in reversed(chain) if node not in starts and node not in targets]


def subgraph_around(
    graph: nx.DiGraph[Any],
    nodes: str | Node | Iterable[str | Node],
    up: int | None = None,
    down: int | None = None,
) -> Any:
    """The graph around one node or several: what writes to them, and what they write to.

    Args:
        graph: from :meth:`Attribution.to_networkx`.
        nodes: a node id, or several.
        up: how many edges towards the tokens. None: all the way.
        down: how many edges towards the targets. None: all the way.

    Returns:
        A graph of the same kind. Its ledgers close: edges cut off are summed in ``pruned_in``.

    Raises:
        InputError: a node that is not in the graph, or a negative number of edges.
    """
    for name, hops in (("up", up), ("down", down)):
        if hops is not None and hops < 0:
            raise InputError(f"subgraph_around({name}={hops}): expected at least 0, or None")
    one = isinstance(nodes, str | Node)
    names = check_nodes(graph, [nodes] if one else nodes, "subgraph_around")
    backward = graph.reverse(copy=False)
    keep = set(names)
    for name in names:
        for way, hops in ((backward, up), (graph, down)):
            keep |= set(nx.single_source_shortest_path_length(way, name, cutoff=hops))
    return restricted(graph, keep)


def _between(graph: nx.DiGraph[Any], starts: Iterable[str], targets: Iterable[str]) -> set[str]:
    """Nodes on some path from a start to a target."""
    starts, targets = set(starts), set(targets)
    after = starts.union(*(nx.descendants(graph, node) for node in starts))
    before = targets.union(*(nx.ancestors(graph, node) for node in targets))
    return after & before


def _flow_of_influence(
    graph: nx.DiGraph[Any], targets: set[str]
) -> tuple[dict[tuple[str, str], float], dict[tuple[str, str], float], dict[str, float]]:
    """``(weight, influence passed on)`` by pair, and influence by node, along the graph."""
    weights: dict[tuple[str, str], float] = {}
    size: dict[tuple[str, str], float] = {}
    for source, target, weight in graph.edges(data="weight"):
        pair = source, target
        weights[pair] = weights.get(pair, 0.0) + weight
        size[pair] = size.get(pair, 0.0) + abs(weight)
    try:
        order = list(nx.topological_sort(graph))
    except nx.NetworkXUnfeasible:
        raise InputError("the graph has a cycle; expected an attribution graph") from None
    influence = {node: 1 / len(targets) if node in targets else 0.0 for node in order}
    passed = dict.fromkeys(weights, 0.0)
    for node in reversed(order):
        sources = list(graph.predecessors(node))
        total = math.fsum(size[source, node] for source in sources)
        for source in sources if total else ():
            passed[source, node] = influence[node] * size[source, node] / total
            influence[source] += passed[source, node]
    return weights, passed, influence
