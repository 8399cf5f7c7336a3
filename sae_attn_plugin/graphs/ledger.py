"""The ledger of a graph: what adds up, before and after a graph is cut, merged or averaged."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import pandas as pd

from sae_attn_plugin.errors import InputError

if TYPE_CHECKING:
    import networkx as nx

__all__ = ["graph_ledger"]

# What a node with a ledger holds beside its in-edges; ``internal`` only where nodes were merged.
TERMS = ("constant", "pruned_in", "internal")


def graph_ledger(graph: nx.DiGraph[Any]) -> pd.DataFrame:
    """What adds up at every target of a graph: one row per node that has a ledger.

    Args:
        graph: from :meth:`Attribution.to_networkx`, or from any function here that takes one.

    Returns:
        ``in_sum`` of the edges in the graph, ``constant``, ``pruned`` (edges left out),
        ``internal`` (edges between nodes that were merged), ``value``, ``residual`` (what the sum
        misses) and ``relative_residual`` (over the sum of |edges| and the sizes of the rest).
        In the units of the target.
    """
    rows = {}
    for node, attributes in graph.nodes(data=True):
        if "constant" not in attributes:
            continue
        weights = [weight for *_, weight in graph.in_edges(node, data="weight")]
        terms = [attributes.get(term, 0.0) for term in TERMS]
        if "pre_activation" not in attributes:
            raise InputError(f"the node {node!r} has a constant but no pre_activation to add up to")
        value = attributes["pre_activation"]
        residual = value - math.fsum([*weights, *terms])
        size = math.fsum(map(abs, [*weights, *terms]))
        rows[node] = (math.fsum(weights), *terms, value, residual,
                      abs(residual) / max(size, 1e-30))  # fmt: skip
    columns = ["in_sum", "constant", "pruned", "internal", "value", "residual", "relative_residual"]
    index = pd.Index(list(rows), name="target")
    return pd.DataFrame(list(rows.values()), columns=columns, index=index, dtype=float)


def restricted(graph: nx.DiGraph[Any], keep: Iterable[str]) -> Any:
    """The part of a graph on some of its nodes; edges cut off are summed in ``pruned_in``."""
    kept = set(keep)
    part: Any = graph.subgraph(kept).copy()
    for node in part:
        if "constant" not in part.nodes[node]:
            continue
        lost = [weight for source, _, weight in graph.in_edges(node, data="weight")
                if source not in kept]  # fmt: skip
        if lost:
            so_far = part.nodes[node].get("pruned_in", 0.0)
            part.nodes[node]["pruned_in"] = math.fsum([so_far, *lost])
    part.graph["targets"] = [t for t in graph.graph.get("targets", ()) if t in kept]
    return with_shares(part)


def with_shares(graph: Any) -> Any:
    """The graph with every edge's ``share`` set anew: |weight| over those into its target."""
    total: defaultdict[str, float] = defaultdict(float)
    for _, target, weight in graph.edges(data="weight"):
        total[target] += abs(weight)
    for _, target, attributes in graph.edges(data=True):
        attributes["share"] = abs(attributes["weight"]) / total[target] if total[target] else 0.0
    return graph


def check_nodes(graph: nx.DiGraph[Any], nodes: Iterable[Any], what: str) -> list[str]:
    """Ids of nodes, each of which the graph has."""
    names = [str(node) for node in nodes]
    for name in names:
        if name not in graph:
            raise InputError(f"{what}: the node {name!r} is not in the graph ({len(graph)} nodes)")
    return names
