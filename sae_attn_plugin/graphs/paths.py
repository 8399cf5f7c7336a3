"""The strongest paths through an attribution graph."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import networkx as nx

from sae_attn_plugin.errors import InputError
from sae_attn_plugin.nodes import KINDS, Node, quote

__all__ = ["Path", "strongest_paths"]

# Where the token at the position says what the node is.
_SHOW_TOKEN = (
    *("embed", "pos", "mlp:", "attn_err", "attn_bias", "head"),
    *("tc_err", "tc_bias", "tc_skip", "mlp_sae_err", "mlp_sae_bias"),
    *("resid_err", "resid_bias", "resid_mid_err", "resid_mid_bias"),
)


@dataclass(frozen=True)
class Path:
    """A path through a graph, from its source to its target.

    Attributes:
        nodes: node ids, source first.
        weights: of its edges, in units of each edge's target (pre-activation or logit).
        share: product of the edges' shares, in (0, 1].
        tokens: the prompt's token at each node, None where the graph does not say.
        keys: of its edges in a ``MultiDiGraph`` (heads, such as ``"5.1"``), else empty.
    """

    nodes: tuple[str, ...]
    weights: tuple[float, ...]
    share: float
    tokens: tuple[str | None, ...] = ()
    keys: tuple[str | int, ...] = ()

    @property
    def sign(self) -> int:
        """+1 or -1: the product of the signs of the weights."""
        return -1 if sum(weight < 0 for weight in self.weights) % 2 else 1

    def __len__(self) -> int:
        """How many edges."""
        return len(self.weights)

    def __str__(self) -> str:
        first, *rest = (
            f"{node} {quote(token)}"
            if token is not None and (i == 0 or node.startswith(_SHOW_TOKEN))
            else node
            for i, (node, token) in enumerate(zip(self.nodes, self._tokens, strict=True))
        )
        arrows = [f" -[{key}]-> " if isinstance(key, str) else " -> " for key in self.keys]
        arrows = arrows or [" -> "] * len(self)
        return first + "".join(arrow + node for arrow, node in zip(arrows, rest, strict=True))

    @property
    def _tokens(self) -> tuple[str | None, ...]:
        return self.tokens or (None,) * len(self.nodes)


def strongest_paths(
    graph: nx.DiGraph[Any],
    target: str | Node | None = None,
    n: int = 5,
    source: str | int | Node | None = None,
) -> list[Path]:
    """The paths to a target with the largest product of edge shares.

    An edge's share is its |weight| over the sum of |weight| of the target's in-edges, so the shares
    of all paths from the leaves to a target sum to 1. The search is exact: dynamic programming over
    the graph's topological order, the ``n`` best partial paths kept at every node.

    Args:
        graph: from :meth:`Attribution.to_networkx`. In a ``MultiDiGraph`` each head is an edge of
            its own.
        target: a node id; None: any of the graph's targets.
        n: how many; fewer where the graph has fewer.
        source: where paths start. None: leaves (nodes without in-edges: embeddings, MLPs, biases,
            errors, heads, features that were not expanded). A position (negative from the end):
            leaves there. A node id: that node. A kind, such as ``"embed"`` or ``"attn"``: any node
            of that kind.

    Returns:
        At most ``n`` paths, largest share first; equal shares in the graph's order.

    Raises:
        InputError: a target or source that is not in the graph, no path between them, or a graph
            with a cycle.
    """
    if n < 1:
        raise InputError(f"strongest_paths(n={n}): expected at least 1")
    targets = find_targets(graph, target)
    starts = set(find_starts(graph, source))
    inside = set(targets).union(*(nx.ancestors(graph, node) for node in targets))
    try:
        order = list(nx.topological_sort(graph.subgraph(inside)))
    except nx.NetworkXUnfeasible:
        raise InputError("the graph has a cycle; expected an attribution graph") from None
    best: dict[str, list[_Partial]] = {}
    for node in order:
        found: list[_Partial] = [_Partial(1.0, node)] if node in starts else []
        for before, edge_share, weight, key in _in_edges(graph, node):
            found += (
                _Partial(partial.share * edge_share, node, partial, weight, key)
                for partial in best.get(before, ())
            )
        # one more, since a target that is a start holds an empty path, which is no answer
        best[node] = heapq.nsmallest(n + 1, found, key=_rank)
    arrived = (p for node in order if node in targets for p in best[node] if p.before is not None)
    ends = heapq.nsmallest(n, arrived, key=_rank)
    if not ends:
        raise InputError(
            f"no path leads from {_describe(source)} to {' or '.join(sorted(targets))}"
        )
    return [_path(graph, end) for end in ends]


class _Partial(NamedTuple):
    share: float
    node: str
    before: _Partial | None = None
    weight: float = math.nan
    key: str | int | None = None

    def chain(self) -> Iterator[_Partial]:
        step: _Partial | None = self
        while step is not None:
            yield step
            step = step.before


def _rank(partial: _Partial) -> float:
    return -partial.share


def _path(graph: nx.DiGraph[Any], end: _Partial) -> Path:
    steps = list(end.chain())[::-1]
    return Path(
        nodes=tuple(step.node for step in steps),
        weights=tuple(step.weight for step in steps[1:]),
        share=end.share,
        tokens=tuple(graph.nodes[step.node].get("token") for step in steps),
        keys=tuple(step.key for step in steps[1:] if step.key is not None),
    )


def _in_edges(
    graph: nx.DiGraph[Any], node: str
) -> Iterator[tuple[str, float, float, str | int | None]]:
    """``(source, share, weight, key)`` of the edges into a node that carry anything."""
    edges: Any
    if isinstance(graph, nx.MultiDiGraph):
        edges = graph.in_edges(node, keys=True, data=True)
    else:
        edges = graph.in_edges(node, data=True)
    total = sum(abs(edge[-1]["weight"]) for edge in edges)
    for before, _, *key, attributes in edges:
        weight = attributes["weight"]
        share = attributes.get("share")
        if share is None:
            share = abs(weight) / total if total else 0.0
        if share > 0:
            yield before, share, weight, key[0] if key else None


def find_targets(graph: nx.DiGraph[Any], target: str | Node | None) -> set[str]:
    if target is None:
        targets: set[str] = set(graph.graph.get("targets", []))
        if not targets:
            raise InputError("the graph does not name its targets; pass target=, a node id")
    else:
        targets = {str(target)}
    for node in sorted(targets - set(graph)):
        Node.parse(node)
        raise InputError(f"the target {node} is not in the graph{_hint(graph)}")
    return targets


def find_starts(graph: nx.DiGraph[Any], source: str | int | Node | None) -> Iterable[str]:
    def leaves(keep: Callable[[Node], bool]) -> list[str]:
        return [v for v, degree in graph.in_degree if degree == 0 and keep(Node.parse(v))]

    if source is None:
        return leaves(lambda _: True)
    if isinstance(source, int):
        length = len(graph.graph.get("tokens") or ())
        if not -length <= source < (length or math.inf):
            raise InputError(f"position {source} is out of range: the prompt has {length} tokens")
        position = source % length if length else source
        return leaves(lambda node: node.position == position)
    source = str(source)
    if source in KINDS:
        return [node for node in graph if Node.parse(node).kind == source]
    if source not in graph:
        Node.parse(source)  # an unknown form is told as such
        raise InputError(f"the source {source} is not in the graph{_hint(graph)}")
    return [source]


def _hint(graph: nx.DiGraph[Any]) -> str:
    return f" ({len(graph)} nodes; pruning may have removed it)"


def _describe(source: str | int | Node | None) -> str:
    if source is None:
        return "a leaf"
    if isinstance(source, int):
        return f"a leaf at position {source}"
    return f"a node of kind {source!r}" if source in KINDS else str(source)
