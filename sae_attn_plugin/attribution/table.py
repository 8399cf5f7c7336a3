"""Attribution: the node, edge and ledger tables of a sweep, and what pruning leaves of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd

from sae_attn_plugin.attribution.rdfa import Flow
from sae_attn_plugin.attribution.writers import WriterTable
from sae_attn_plugin.errors import InputError
from sae_attn_plugin.nodes import FEATURE_KINDS, Node

if TYPE_CHECKING:
    import networkx as nx
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

HeadSplit = Callable[[int, np.ndarray, np.ndarray, np.ndarray], np.ndarray]


@dataclass(frozen=True, eq=False)
class Attribution:
    """Who writes what each target reads, down to the prompt's tokens.

    For every target the ledger closes: ``in_sum + pruned + constant == value``, up to rounding.

    Attributes:
        flow: the edges, one compressed row per target.
        writers: the table its node numbers point into.
        roots: nodes of the targets that were asked for, by node number.
        tokens: the prompt's tokens.
        provenance: everything needed to make this again.
        neuronpedia: address of the features of a kind and layer, where the SAE names one.
        probabilities: of the tokens of logit targets, by node number.
    """

    flow: Flow
    writers: WriterTable
    roots: Mapping[int, Node]
    tokens: tuple[str, ...]
    provenance: Mapping[str, Any]
    head_split: HeadSplit
    neuronpedia: Mapping[tuple[str, int], str]
    probabilities: Mapping[int, float]

    def __repr__(self) -> str:
        targets = ", ".join(map(str, self.roots.values()))
        return (
            f"Attribution of {targets}: {len(self._numbers)} nodes, {len(self.flow.weight)} edges, "
            f"worst ledger residual {self.worst_residual:.1e}"
        )

    # -- tables ----------------------------------------------------------------------------------

    @cached_property
    def _numbers(self) -> np.ndarray:
        """Node numbers present, in the order of the table: targets first, then writers."""
        present = np.unique(np.concatenate([self.flow.target, self.flow.source]))
        is_root = np.isin(present, list(self.roots))
        return np.concatenate([present[is_root], present[~is_root]])

    @cached_property
    def _ids(self) -> dict[int, str]:
        return {int(n): str(self._node(int(n))) for n in self._numbers}

    def _node(self, number: int) -> Node:
        return self.roots[number] if number in self.roots else self.writers.node(number)

    @cached_property
    def nodes(self) -> pd.DataFrame:
        """One row per node, indexed by node id.

        ``constant``, ``pre_activation`` (value for logits) and ``pruned_in`` stand on targets;
        ``expanded`` tells whether a node has its own in-edges here.
        """
        nodes = [self._node(int(number)) for number in self._numbers]
        inside = np.where(self._numbers < len(self.writers), self._numbers, 0)
        writer = self._numbers < len(self.writers)
        ledger = self._ledger_by_number
        numbers = [int(number) for number in self._numbers]
        nan = float("nan")
        row = {n: ledger.get(n, (nan, nan, nan, nan)) for n in numbers}
        pre = np.where(writer, self.writers.pre_activation[inside], nan)
        return pd.DataFrame(
            {
                "kind": [node.kind for node in nodes],
                "layer": pd.array([node.layer for node in nodes], dtype="Int64"),
                "position": [node.position for node in nodes],
                "token": [self.tokens[node.position] for node in nodes],
                "feature": pd.array([node.feature for node in nodes], dtype="Int64"),
                "head": pd.array([node.head for node in nodes], dtype="Int64"),
                "activation": np.where(writer, self.writers.activation[inside], nan),
                "pre_activation": [
                    row[n][3] if n in ledger else p for n, p in zip(numbers, pre, strict=True)
                ],
                "constant": [row[n][1] for n in numbers],
                "pruned_in": [row[n][2] for n in numbers],
                "influence": self.flow.influence[self._numbers]
                + self.flow.root_weight[self._numbers],
                "expanded": [n in ledger for n in numbers],
                "probability": [self.probabilities.get(n, nan) for n in numbers],
                "neuronpedia": [self._neuronpedia_url(node) for node in nodes],
            },
            index=pd.Index([self._ids[n] for n in numbers], name="node"),
        )

    def _neuronpedia_url(self, node: Node) -> str | None:
        base = None if node.layer is None else self.neuronpedia.get((node.kind, node.layer))
        return f"{base}/{node.feature}" if base and node.kind in FEATURE_KINDS else None

    @cached_property
    def edges(self) -> pd.DataFrame:
        """One row per edge: ``source``, ``target``, ``weight`` (signed contribution to the target's
        pre-activation or logit), ``share`` (|weight| over the target's in-edges, pruned ones left
        out)."""
        codes = np.full(len(self.flow.influence), -1, dtype=np.int64)
        codes[self._numbers] = np.arange(len(self._numbers))
        ids = pd.Index([self._ids[int(n)] for n in self._numbers])
        live = self.flow.weight != 0
        target = np.repeat(self.flow.target, np.diff(self.flow.start))
        return pd.DataFrame(
            {
                "source": pd.Categorical.from_codes(codes[self.flow.source[live]], categories=ids),
                "target": pd.Categorical.from_codes(codes[target[live]], categories=ids),
                "weight": self.flow.weight[live],
                "share": _shares(self.flow)[live],
            }
        )

    def edges_by_head(self) -> pd.DataFrame:
        """Edges into attention features with one row per head; they sum to the edge. ``head`` is
        missing on edges into logits, scores and MLPs, which pass through no head's values."""
        frame = self.edges
        target = np.repeat(self.flow.target, np.diff(self.flow.start))[self.flow.weight != 0]
        source = self.flow.source[self.flow.weight != 0]
        parsed = {int(n): self._node(int(n)) for n in self.flow.target}
        kinds = np.array([parsed[int(n)].kind for n in target], dtype=object)
        layer = np.array(
            [n.layer if (n := parsed[int(i)]).kind == "attn" else -1 for i in target], dtype=int
        )
        # A head's own edges pass through itself, those into an MLP or a logit through none.
        heads = [parsed[int(n)].head for n in target[kinds == "head"]]
        frames = [
            frame[(layer < 0) & (kinds != "head")].assign(head=pd.NA),
            frame[kinds == "head"].assign(head=heads),
        ]
        for number in np.unique(layer[layer >= 0]):
            at = np.flatnonzero(layer == number)
            feature = np.array([parsed[int(n)].feature for n in target[at]])
            position = np.array([parsed[int(n)].position for n in target[at]])
            split = self.head_split(int(number), feature, position, source[at])
            n_heads = split.shape[1]
            part = frame.iloc[np.repeat(at, n_heads)].assign(
                weight=split.ravel(), head=np.tile(np.arange(n_heads), len(at))
            )
            frames.append(part[part["weight"] != 0])
        result = pd.concat([f for f in frames if len(f)] or frames[:1], ignore_index=True)
        result["head"] = pd.array(result["head"], dtype="Int64")
        return result.reindex(columns=["source", "target", "head", "weight"])

    @cached_property
    def _ledger_by_number(self) -> dict[int, tuple[float, float, float, float]]:
        flow = self.flow
        return {
            int(number): (in_sum, constant, dropped, value)
            for number, in_sum, constant, dropped, value in zip(
                flow.target,
                _row_sums(flow, flow.weight),
                flow.constant,
                flow.dropped,
                flow.value,
                strict=True,
            )
        }

    @cached_property
    def ledger(self) -> pd.DataFrame:
        """Per target: ``in_sum`` of the edges here, ``constant``, ``pruned`` (edges left out),
        ``value`` as the model computes it, ``residual`` (what the sum misses) and
        ``relative_residual`` (over the sum of |edges| + |constant|)."""
        flow = self.flow
        in_sum = _row_sums(flow, flow.weight)
        residual = flow.value - in_sum - flow.constant - flow.dropped
        size = _row_sums(flow, np.abs(flow.weight)) + np.abs(flow.constant) + np.abs(flow.dropped)
        return pd.DataFrame(
            {
                "in_sum": in_sum,
                "constant": flow.constant,
                "pruned": flow.dropped,
                "value": flow.value,
                "residual": residual,
                "relative_residual": np.abs(residual) / np.maximum(size, 1e-30),
            },
            index=pd.Index([self._ids[int(n)] for n in flow.target], name="target"),
        )

    @property
    def worst_residual(self) -> float:
        """The largest relative ledger residual over all targets."""
        return float(self.ledger["relative_residual"].max())

    def check_closure(self, tolerance: float = 1e-5) -> None:
        """Raise if a ledger does not close.

        Raises:
            InputError: naming the worst target and by how much it misses.
        """
        worst = self.ledger["relative_residual"].idxmax()
        if not self.worst_residual <= tolerance:
            raise InputError(
                f"the ledger of {worst} does not close: relative residual "
                f"{self.worst_residual:.3g}, allowed {tolerance:g}"
            )

    # -- pruning ---------------------------------------------------------------------------------

    def prune(
        self, nodes: float = 0.8, edges: float = 0.98, max_nodes: int | None = None
    ) -> Attribution:
        """Keep what carries the influence; what is removed stays in the ledger as ``pruned``.

        As in circuit-tracer: the smallest set of nodes whose influence reaches the share ``nodes``,
        then the smallest set of edges among them that reaches the share ``edges``, then, until
        nothing changes, features without in-edges and nodes that lead nowhere are dropped.

        Args:
            nodes: share of node influence kept, in (0, 1].
            edges: share of edge influence kept, in (0, 1].
            max_nodes: at most this many nodes, targets not counted.
        """
        for name, value in (("nodes", nodes), ("edges", edges)):
            if not 0 < value <= 1:
                raise InputError(f"prune({name}={value}): expected a share in (0, 1]")
        if max_nodes is not None and max_nodes < 1:
            raise InputError(f"prune(max_nodes={max_nodes}): expected at least 1")
        flow = self.flow
        is_root = np.zeros(len(flow.influence), dtype=bool)
        is_root[list(self.roots)] = True
        influence = _influence(flow, np.ones(len(flow.weight), dtype=bool))
        keep_node = is_root | _top_share(np.where(is_root, 0, influence), nodes, max_nodes)
        target = np.repeat(flow.target, np.diff(flow.start))
        keep = keep_node[flow.source] & keep_node[target] & (flow.weight != 0)
        score = _edge_scores(flow, keep)
        keep &= _top_share(np.where(keep, score, 0), edges, None)
        expanded = np.zeros(len(flow.influence), dtype=bool)
        expanded[flow.target] = True
        while True:
            has_in = np.zeros(len(flow.influence), dtype=bool)
            has_in[target[keep]] = True
            has_out = np.zeros(len(flow.influence), dtype=bool)
            has_out[flow.source[keep]] = True
            alive = (has_out | is_root) & (has_in | ~expanded | is_root)
            still = keep & alive[flow.source] & alive[target]
            if still.sum() == keep.sum():
                break
            keep = still
        return replace(self, flow=_subset(flow, keep, alive | is_root))

    # -- graphs ----------------------------------------------------------------------------------

    def to_networkx(self, by: Literal["head"] | None = None) -> nx.DiGraph:
        """A ``networkx`` graph: node ids as nodes, the tables' columns as attributes.

        Args:
            by: ``"head"`` gives a ``MultiDiGraph`` whose parallel edges are heads (keys ``"5.1"``)
                and sum to the edge.
        """
        from sae_attn_plugin.graphs.build import to_networkx

        return to_networkx(self, by)

    # -- seeing it -------------------------------------------------------------------------------

    def plot(self, target: str | Node | None = None, n: int = 12, ax: Axes | None = None) -> Figure:
        """What adds up to a target: its strongest in-edges, the other edges, constant, pruned.

        Args:
            target: a node with in-edges here. None: the first of the targets asked for.
            n: how many edges have a bar of their own.
            ax: axes to draw into. None: a figure of its own, which notebooks show.

        Raises:
            InputError: a node without in-edges here, or ``n`` below 1.
        """
        from sae_attn_plugin.plots import bars

        name = str(next(iter(self.roots.values())) if target is None else target)
        if name not in self.ledger.index:
            raise InputError(f"plot({name!r}): the node has no ledger here; expected a target")
        if n < 1:
            raise InputError(f"plot(n={n}): expected at least 1")
        ledger = self.ledger.loc[name]
        edges = self.edges[self.edges["target"] == name]
        order = np.argsort(-np.abs(np.asarray(edges["weight"])), kind="stable")
        top = edges.iloc[order[:n]]
        tokens = [self.tokens[Node.parse(source).position] for source in top["source"]]
        names = [f"{one} {token!r}" for one, token in zip(top["source"], tokens, strict=True)]
        values = [float(weight) for weight in top["weight"]]
        if len(edges) > n:
            names.append(f"{len(edges) - n} other edges")
            values.append(float(ledger["in_sum"]) - sum(values))
        names += ["constant", "pruned edges", "= value"]
        values += [float(ledger[name]) for name in ("constant", "pruned", "value")]
        return bars(
            names, values, title=name, name="contribution", ax=ax, neutral=(len(names) - 1,)
        )

    def _repr_html_(self) -> str:
        from sae_attn_plugin import display

        nodes = self.nodes.reset_index()
        roots = {str(node) for node in self.roots.values()}
        ranks = np.argsort(-np.asarray(nodes["influence"]), kind="stable")
        top = nodes.iloc[[i for i in ranks if nodes["node"][i] not in roots]]
        ledger = self.ledger.loc[[str(node) for node in self.roots.values()]].reset_index()
        return display.card(
            "Attribution of " + ", ".join(map(str, self.roots.values())),
            [
                f"{len(nodes):,} nodes",
                f"{len(self.flow.weight):,} edges",
                f"worst ledger residual {self.worst_residual:.1e}",
            ],
            display.heading("Ledger"),
            display.table(ledger, ["target", "in_sum", "constant", "pruned", "value"], rows=5),
            display.heading("Most influential"),
            display.table(
                top, ["node", "token", "activation", "influence"], bars="influence", rows=8,
                neutral=True,
            ),
        )  # fmt: skip


# -- arithmetic on compressed rows ---------------------------------------------------------------


def _row_sums(flow: Flow, values: np.ndarray) -> np.ndarray:
    """Sum of each row's values, in float64."""
    filled = np.diff(flow.start) > 0  # reduceat gives a row without edges its neighbour's value
    sums = np.zeros(len(filled))
    if filled.any():
        sums[filled] = np.add.reduceat(values, flow.start[:-1][filled], dtype=np.float64)
    return sums


def _shares(flow: Flow) -> np.ndarray:
    total = _row_sums(flow, np.abs(flow.weight))
    return np.abs(flow.weight) / np.repeat(np.maximum(total, 1e-300), np.diff(flow.start))


def _influence(flow: Flow, keep: np.ndarray) -> np.ndarray:
    """Influence of every node on the roots, through the kept edges; shares over all in-edges."""
    share = np.where(keep, _shares(flow), 0)
    influence = np.zeros(len(flow.influence))
    for depth in np.unique(flow.depth)[::-1]:
        rows = np.flatnonzero(flow.depth == depth)
        first, last = rows[0], rows[-1] + 1  # rows of a depth are contiguous
        edges = slice(flow.start[first], flow.start[last])
        node = flow.target[first:last]
        counts = np.diff(flow.start[first : last + 1])
        passed = np.repeat(influence[node] + flow.root_weight[node], counts) * share[edges]
        influence += np.bincount(flow.source[edges], weights=passed, minlength=len(influence))
    return influence


def _edge_scores(flow: Flow, keep: np.ndarray) -> np.ndarray:
    """What each kept edge passes on, with shares over the kept in-edges."""
    inner = replace(flow, weight=np.where(keep, flow.weight, 0))
    influence = _influence(inner, keep) + flow.root_weight
    target = np.repeat(flow.target, np.diff(flow.start))
    return np.where(keep, _shares(inner) * influence[target], 0)


def _top_share(score: np.ndarray, share: float, limit: int | None) -> np.ndarray:
    """Mask of the smallest set whose scores reach ``share`` of the total."""
    order = np.argsort(-score, kind="stable")
    cumulative = np.cumsum(score[order])
    count = 0
    if len(cumulative) and cumulative[-1] > 0:
        count = int(np.searchsorted(cumulative, share * cumulative[-1] * (1 - 1e-12))) + 1
        if share == 1:
            count = int((score > 0).sum())
    mask = np.zeros(len(score), dtype=bool)
    mask[order[: count if limit is None else min(count, limit)]] = True
    return mask


def _subset(flow: Flow, keep: np.ndarray, alive: np.ndarray) -> Flow:
    """The rows of live targets with their kept edges; the rest goes to ``dropped``."""
    lost = _row_sums(flow, np.where(keep, 0, flow.weight))
    counts = _row_sums(flow, keep).astype(np.int64)
    row = alive[flow.target]
    return replace(
        flow,
        target=flow.target[row],
        depth=flow.depth[row],
        start=np.concatenate([[0], np.cumsum(counts[row])]),
        source=flow.source[keep],
        weight=flow.weight[keep],
        constant=flow.constant[row],
        value=flow.value[row],
        dropped=(flow.dropped + lost)[row],
    )
