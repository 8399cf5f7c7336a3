"""Supernodes: nodes that do one thing, merged into one, with the ledger still closed."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import networkx as nx
import numpy as np

from sae_attn_plugin.errors import InputError
from sae_attn_plugin.graphs.ledger import check_nodes, with_shares
from sae_attn_plugin.nodes import Node, quote

if TYPE_CHECKING:
    from sae_attn_plugin.lens import FeatureLens

__all__ = ["contract", "suggest_supernodes"]


def contract(graph: nx.DiGraph[Any], groups: Mapping[str, Iterable[str | Node]]) -> Any:
    """Merge groups of nodes into supernodes.

    Edges between two (super)nodes are summed with their signs, parallel ones by key. A supernode's
    ``pre_activation``, ``constant`` and ``pruned_in`` are sums over its members; edges between
    members are summed in its attribute ``internal``. So its ledger closes: in-edges + constant +
    pruned + internal = value. ``members`` lists who was merged, ``influence`` is the sum of theirs.

    Args:
        graph: from :meth:`Attribution.to_networkx`.
        groups: label -> node ids. A supernode's id is ``super:LAYER:"label"@POSITION``, with the
            deepest layer and the last position among its members.

    Returns:
        A graph of the same kind, with ``graph["merged"]``: label -> members.

    Raises:
        InputError: an empty group, a node that is not in the graph or in two groups, or a group
            around a node outside it, which would make a cycle.
    """
    place: dict[str, str] = {}
    members: dict[str, list[str]] = {}
    for label, group in groups.items():
        if not isinstance(label, str) or isinstance(group, str):
            raise InputError(f"expected {{label: [node ids]}}, got {label!r}: {group!r}")
        names = check_nodes(graph, group, f"the group {label!r}")
        if not names:
            raise InputError(f"the group {label!r} is empty")
        parsed = [Node.parse(name) for name in names]
        layers = [node.layer for node in parsed if node.layer is not None]
        position = max(node.position for node in parsed)
        made = Node("super", position, layer=max(layers, default=None), label=quote(label))
        members[str(made)] = names
        for name in names:
            if name in place:
                raise InputError(f"the node {name} is twice in the groups")
            place[name] = str(made)
    if taken := sorted(set(members) & (set(graph) - place.keys())):
        raise InputError(f"the graph already has a node {taken[0]}; pick another label")
    for name in graph:
        place.setdefault(name, name)
    _check_cycles(graph, place)

    result: Any = type(graph)()
    result.graph.update(graph.graph)
    result.graph["targets"] = list(dict.fromkeys(place[t] for t in graph.graph.get("targets", ())))
    merged = dict(graph.graph.get("merged", {}))
    merged |= {label: members[made] for label, made in zip(groups, members, strict=True)}
    result.graph["merged"] = merged
    for name in graph:
        if place[name] not in result:
            group = members.get(place[name])
            attributes = graph.nodes[name] if group is None else _merged(graph, place[name], group)
            result.add_node(place[name], **attributes)
    sums: defaultdict[tuple[Any, ...], list[float]] = defaultdict(list)
    rest: dict[tuple[Any, ...], dict[str, Any]] = {}
    keys: Any = {"keys": True} if graph.is_multigraph() else {}
    edges: Any = graph.edges
    for source, target, *key, attributes in edges(data=True, **keys):
        if place[source] == place[target]:
            continue
        at = (place[source], place[target], *key)
        sums[at].append(attributes["weight"])
        rest.setdefault(at, attributes)
    for at, weights in sums.items():
        result.add_edge(*at, **{**rest[at], "weight": math.fsum(weights)})
    return with_shares(result)


def _merged(graph: nx.DiGraph[Any], made: str, group: list[str]) -> dict[str, Any]:
    node, inside = Node.parse(made), set(group)
    rows = [graph.nodes[name] for name in group]
    attributes: dict[str, Any] = {"kind": "super", "position": node.position, "members": group}
    if node.layer is not None:
        attributes["layer"] = node.layer
    tokens = {row.get("token") for row in rows}
    if len(tokens) == 1 and None not in tokens:
        attributes["token"] = tokens.pop()
    attributes["influence"] = math.fsum(row.get("influence", 0.0) for row in rows)
    ledgers = [row for row in rows if "constant" in row]
    if ledgers:
        for name in ("pre_activation", "constant", "pruned_in"):
            attributes[name] = math.fsum(row.get(name, 0.0) for row in ledgers)
        edges = graph.in_edges(group, data="weight")
        within = [weight for source, _, weight in edges if source in inside]
        within += [row.get("internal", 0.0) for row in ledgers]
        attributes["internal"] = math.fsum(within)
    attributes["expanded"] = bool(ledgers)
    return attributes


def _check_cycles(graph: nx.DiGraph[Any], place: Mapping[str, str]) -> None:
    quotient = nx.DiGraph()
    for source, target in graph.edges():
        if place[source] != place[target]:
            quotient.add_edge(place[source], place[target])
    try:
        cycle = nx.find_cycle(quotient)
    except nx.NetworkXNoCycle:
        return
    around = " -> ".join([cycle[0][0], *(target for _, target in cycle)])
    raise InputError(
        f"these groups make a cycle: {around}; split the group, or take what is between into it"
    )


def suggest_supernodes(
    graph: nx.DiGraph[Any],
    lens: FeatureLens | None = None,
    *,
    threshold: float = 0.6,
    across_positions: bool = True,
) -> dict[str, list[str]]:
    """Groups of attention features of a layer that look alike, for :func:`contract`.

    Two features are as alike as the mean of: the cosine of their decoders, the cosine of their
    encoders (both need ``lens``), and the cosine of their edges, in and out, as shares with their
    signs. Groups come from average linkage (:func:`scipy.cluster.hierarchy.linkage`) and stay
    within a layer, so merging them makes no cycle.

    Args:
        graph: from :meth:`Attribution.to_networkx`.
        lens: whose SAEs the features are of. None: by shared neighbours alone.
        threshold: mean likeness within a group, in (0, 1].
        across_positions: whether a group may hold features at several positions.

    Returns:
        label -> node ids, for groups of two and more; the most influential group first.

    Raises:
        InputError: a threshold outside (0, 1].
    """
    if not 0 < threshold <= 1:
        raise InputError(f"suggest_supernodes(threshold={threshold}): expected it in (0, 1]")
    rooms: defaultdict[Any, list[str]] = defaultdict(list)
    targets = set(graph.graph.get("targets", ()))
    for name in graph:
        node = Node.parse(name)
        if node.kind == "attn" and name not in targets:
            rooms[node.layer, None if across_positions else node.position].append(name)
    found = []
    for (layer, _), names in rooms.items():
        likeness = _likeness(graph, names, None if lens is None else lens.dictionaries.get(layer))
        found += [[names[i] for i in group] for group in _linked(likeness, threshold)]
    influence = dict(graph.nodes(data="influence", default=0.0))
    found.sort(key=lambda group: -math.fsum(influence[name] for name in group))
    groups: dict[str, list[str]] = {}
    for group in found:
        best = Node.parse(max(group, key=lambda name: influence[name]))
        label = f"{best.layer}:{best.feature} and {len(group) - 1} alike"
        groups[label if label not in groups else f"{label} @{best.position}"] = group
    return groups


def _likeness(graph: nx.DiGraph[Any], names: list[str], dictionary: Any) -> np.ndarray:
    parts = [_cosines(_neighbours(graph, names))]
    if dictionary is not None:
        import torch

        index = torch.tensor([Node.parse(name).feature for name in names])
        index = index.to(dictionary.W_dec.device)
        for rows in (dictionary.decoder, dictionary.encoder):
            parts.append(_cosines(rows(index, torch.float64).flatten(1).numpy(force=True)))
    return np.mean(parts, axis=0)


def _neighbours(graph: nx.DiGraph[Any], names: list[str]) -> np.ndarray:
    """Signed shares of the edges in and out, one row per node."""
    columns: dict[tuple[str, str], int] = {}
    entries = []
    for row, name in enumerate(names):
        ends = [("in", edge[0], edge[2]) for edge in graph.in_edges(name, data=True)]
        ends += [("out", edge[1], edge[2]) for edge in graph.out_edges(name, data=True)]
        for way, other, attributes in ends:
            column = columns.setdefault((way, other), len(columns))
            value = math.copysign(attributes.get("share", 0.0), attributes["weight"])
            entries.append((row, column, value))
    table = np.zeros((len(names), max(len(columns), 1)))
    for row, column, value in entries:
        table[row, column] += value
    return table


def _cosines(rows: np.ndarray) -> np.ndarray:
    size = np.linalg.norm(rows, axis=1, keepdims=True)
    unit = rows / np.maximum(size, 1e-300)
    return unit @ unit.T


def _linked(likeness: np.ndarray, threshold: float) -> list[list[int]]:
    from scipy.cluster.hierarchy import fcluster, linkage
    from scipy.spatial.distance import squareform

    if len(likeness) < 2:
        return []
    distance = np.clip(1 - likeness, 0, None)
    np.fill_diagonal(distance, 0)
    tree = linkage(squareform(distance, checks=False), method="average")
    groups: defaultdict[int, list[int]] = defaultdict(list)
    for i, label in enumerate(fcluster(tree, 1 - threshold + 1e-12, criterion="distance")):
        groups[int(label)].append(i)
    return [group for group in groups.values() if len(group) > 1]
