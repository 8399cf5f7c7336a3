"""Several graphs at once: what differs, whether it is more than rounding, what they share."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import networkx as nx
import numpy as np

from sae_attn_plugin.errors import InputError
from sae_attn_plugin.graphs.ledger import TERMS, with_shares
from sae_attn_plugin.nodes import Node

__all__ = ["GraphComparison", "aggregate_graphs", "compare_graphs", "graph_difference",
           "graphs_equal"]  # fmt: skip

_SAME = ("kind", "layer", "position", "token", "feature", "head", "neuronpedia", "label")


@dataclass(frozen=True)
class GraphComparison:
    """How two graphs agree.

    Attributes:
        only_first, only_second: nodes of one graph.
        edges_only_first, edges_only_second: edges of one graph, among nodes of both.
        error: the largest difference of a weight or a ledger term, over its target's scale: the
            larger of the two graphs' sums of |in-edges| + |constant|. An edge that one graph lacks
            counts as 0 there.
        where: the edge or node with that error.
    """

    only_first: tuple[str, ...]
    only_second: tuple[str, ...]
    edges_only_first: tuple[tuple[Any, ...], ...]
    edges_only_second: tuple[tuple[Any, ...], ...]
    error: float
    where: tuple[Any, ...] | str | None

    def equal(self, tolerance: float = 1e-5) -> bool:
        """The same nodes, and no difference above the tolerance."""
        return not self.only_first and not self.only_second and self.error <= tolerance


def compare_graphs(first: nx.DiGraph[Any], second: nx.DiGraph[Any]) -> GraphComparison:
    """Compare nodes, edge weights and ledgers of two attribution graphs.

    Raises:
        InputError: a graph with heads as parallel edges beside one without.
    """
    _check_alike([first, second])
    both = set(first) & set(second)
    edges = [{at: w for at, w in _weights(g).items() if both.issuperset(at[:2])}
             for g in (first, second)]  # fmt: skip
    scale: defaultdict[str, float] = defaultdict(float)
    for graph in (first, second):
        size: defaultdict[str, float] = defaultdict(float)
        for _, target, weight in graph.edges(data="weight"):
            size[target] += abs(weight)
        for node in graph:
            here = size[node] + abs(graph.nodes[node].get("constant", 0.0))
            scale[node] = max(scale[node], here)
    error, where = 0.0, None
    for at in dict.fromkeys([*edges[0], *edges[1]]):
        difference = abs(edges[0].get(at, 0.0) - edges[1].get(at, 0.0))
        relative = difference / max(scale[at[1]], 1e-30)
        if relative > error:
            error, where = relative, at
    for node in first:
        if node not in second:
            continue
        for name in ("pre_activation", *TERMS):
            a, b = (graph.nodes[node].get(name, 0.0) for graph in (first, second))
            # Where nothing is summed, values are compared with themselves.
            relative = abs(a - b) / max(scale[node], abs(a), abs(b), 1e-30)
            if relative > error:
                error, where = relative, node
    return GraphComparison(
        only_first=tuple(node for node in first if node not in second),
        only_second=tuple(node for node in second if node not in first),
        edges_only_first=tuple(at for at in edges[0] if at not in edges[1]),
        edges_only_second=tuple(at for at in edges[1] if at not in edges[0]),
        error=error,
        where=where,
    )


def graphs_equal(first: nx.DiGraph[Any], second: nx.DiGraph[Any], tolerance: float = 1e-5) -> bool:
    """Whether two graphs have the same nodes and, within a tolerance, the same weights.

    The tolerance is relative to each target's scale, as in :class:`GraphComparison`.
    """
    return compare_graphs(first, second).equal(tolerance)


def graph_difference(first: nx.DiGraph[Any], second: nx.DiGraph[Any]) -> Any:
    """``first - second``: a graph of all nodes and edges of both.

    Edges carry the difference as ``weight``, and ``first`` and ``second``; what one graph lacks is
    0 there. Ledgers are subtracted term by term and close. Of a node that has in-edges in one graph
    only, the other's value stands under ``pruned_in``. Activation, influence and value of a node
    are differences too.
    """
    graph = _combine([first, second], [1.0, -1.0])
    for *_, attributes in graph.edges(data=True):
        attributes["first"], attributes["second"] = attributes.pop("weights")
    graph.graph["difference_of"] = [_about(first), _about(second)]
    return graph


def aggregate_graphs(
    graphs: Sequence[nx.DiGraph[Any]], positions: Sequence[Mapping[int, int]] | None = None
) -> Any:
    """The mean of several graphs.

    Edges carry the mean as ``weight``, its standard deviation over the graphs as ``std`` and the
    number of graphs that have it as ``count``; nodes carry ``count``. What a graph lacks counts as
    0, so ledgers are means too, and close. Of a node that has in-edges in some graphs only, the
    value in the others stands under ``pruned_in``.

    Args:
        graphs: at least one, all with heads as parallel edges or none.
        positions: for each graph, its positions -> common positions, to line up prompts of
            different length by their roles. Nodes at other positions are left out, and what they
            wrote is summed in ``pruned_in``. Nodes that come to the same id are added up. None: the
            positions as they are.

    Raises:
        InputError: no graph, or graphs and positions that do not fit.
    """
    if not graphs:
        raise InputError("aggregate_graphs needs at least one graph")
    if positions is not None:
        if len(positions) != len(graphs):
            raise InputError(f"{len(graphs)} graphs, but positions of {len(positions)}")
        graphs = [_moved(g, to) for g, to in zip(graphs, positions, strict=True)]
    n = len(graphs)
    result = _combine(graphs, [1 / n] * n)
    for *_, attributes in result.edges(data=True):
        weights = attributes.pop("weights")
        attributes["std"] = float(np.std(weights))
        attributes["count"] = sum(weight != 0 for weight in weights)
    for node in result:
        result.nodes[node]["count"] = sum(node in graph for graph in graphs)
    result.graph["aggregate_of"] = [_about(graph) for graph in graphs]
    return result


# -- combining -------------------------------------------------------------------------------------


def _combine(graphs: Sequence[nx.DiGraph[Any]], factors: Sequence[float]) -> Any:
    """A linear combination; edges keep each graph's weight in ``weights``."""
    _check_alike(graphs)
    result: Any = type(graphs[0])()
    for key, value in graphs[0].graph.items():
        if all(graph.graph.get(key) == value for graph in graphs):
            result.graph[key] = value
    result.graph["targets"] = list(
        dict.fromkeys(t for graph in graphs for t in graph.graph.get("targets", ()))
    )
    result.graph["tokens"] = _common_tokens(graphs)
    for node in dict.fromkeys(node for graph in graphs for node in graph):
        rows = [graph.nodes[node] if node in graph else None for graph in graphs]
        result.add_node(node, **_combined(rows, factors))
    tables = [_weights(graph) for graph in graphs]
    for at in dict.fromkeys(at for table in tables for at in table):
        weights = [table.get(at, 0.0) for table in tables]
        extra = {"head": head} if (head := _head(graphs, at)) is not None else {}
        total = math.fsum(f * w for f, w in zip(factors, weights, strict=True))
        result.add_edge(*at, weight=total, weights=weights, **extra)
    return with_shares(result)


def _combined(rows: Sequence[Any], factors: Sequence[float]) -> dict[str, Any]:
    present = [row for row in rows if row is not None]
    attributes = {
        name: present[0][name]
        for name in _SAME
        if name in present[0] and all(row.get(name) == present[0][name] for row in present)
    }
    has_ledger = any("constant" in row for row in present)

    def total(name: str) -> float:
        return math.fsum(
            f * row.get(name, 0.0) for f, row in zip(factors, rows, strict=True) if row is not None
        )

    for name in ("activation", "influence", "pre_activation"):
        if any(name in row for row in present):
            attributes[name] = total(name)
    attributes["expanded"] = has_ledger
    if has_ledger:
        for name in TERMS:
            if name != "internal" or any(name in row for row in present):
                attributes[name] = total(name)
        attributes["pruned_in"] += math.fsum(  # values whose in-edges are not in their graph
            f * row.get("pre_activation", 0.0)
            for f, row in zip(factors, rows, strict=True)
            if row is not None and "constant" not in row
        )
    return attributes


def _moved(graph: nx.DiGraph[Any], to: Mapping[int, int]) -> Any:
    """The graph with its positions renamed; nodes elsewhere are left out, their edges pruned."""
    names: dict[str, str | None] = {}
    for name in graph:
        node = Node.parse(name)
        at = to.get(node.position)
        names[name] = None if at is None else str(replace(node, position=at))
    result: Any = type(graph)()
    result.graph.update(graph.graph)
    result.graph["targets"] = [
        new for t in graph.graph.get("targets", ()) if (new := names.get(t)) is not None
    ]
    tokens = graph.graph.get("tokens") or []
    length = 1 + max(to.values(), default=-1)
    back = {new: old for old, new in to.items()}
    result.graph["tokens"] = [
        tokens[back[p]] if p in back and back[p] < len(tokens) else "*" for p in range(length)
    ]
    for old, new in names.items():
        if new is None:
            continue
        moved = {**graph.nodes[old], "position": Node.parse(new).position}
        if new in result:
            rows = [result.nodes[new], moved]
            result.nodes[new].update(_combined(rows, [1.0, 1.0]))
        else:
            result.add_node(new, **moved)
    lost: defaultdict[str, float] = defaultdict(float)
    keys: Any = {"keys": True} if graph.is_multigraph() else {}
    edges: Any = graph.edges
    for source, target, *key, attributes in edges(data=True, **keys):
        start, end = names[source], names[target]
        if end is None:
            continue
        if start is None:
            lost[end] += attributes["weight"]
        elif result.has_edge(start, end, *key):
            result.edges[(start, end, *key)]["weight"] += attributes["weight"]
        else:
            result.add_edge(start, end, *key, **attributes)
    for node, weight in lost.items():
        result.nodes[node]["pruned_in"] = result.nodes[node].get("pruned_in", 0.0) + weight
    return result


def _weights(graph: nx.DiGraph[Any]) -> dict[tuple[Any, ...], float]:
    keys: Any = {"keys": True} if graph.is_multigraph() else {}
    edges: Any = graph.edges
    return {tuple(at): weight for *at, weight in edges(data="weight", **keys)}


def _head(graphs: Sequence[nx.DiGraph[Any]], at: tuple[Any, ...]) -> Any:
    edges: Any = next(graph for graph in graphs if graph.has_edge(*at)).edges
    return edges[at].get("head")


def _common_tokens(graphs: Sequence[nx.DiGraph[Any]]) -> list[str]:
    lists = [graph.graph.get("tokens") or [] for graph in graphs]
    length = max(map(len, lists))
    columns = [{tokens[p] for tokens in lists if p < len(tokens)} for p in range(length)]
    return [column.pop() if len(column) == 1 else "*" for column in columns]


def _about(graph: nx.DiGraph[Any]) -> dict[str, Any]:
    return {key: graph.graph.get(key) for key in ("model", "prompt", "token_ids", "targets")}


def _check_alike(graphs: Sequence[nx.DiGraph[Any]]) -> None:
    if len({graph.is_multigraph() for graph in graphs}) > 1:
        raise InputError("some of the graphs have heads as parallel edges and some do not")
