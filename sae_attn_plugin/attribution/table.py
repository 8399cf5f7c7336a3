"""Attribution: the node, edge and ledger tables of a sweep, and what pruning leaves of them."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd

from sae_attn_plugin.attribution.rdfa import Block, Flow, Loose, row_sums
from sae_attn_plugin.attribution.writers import KINDS, WriterTable
from sae_attn_plugin.errors import InputError
from sae_attn_plugin.nodes import FEATURE_KINDS, Node
from sae_attn_plugin.tokens import as_index

if TYPE_CHECKING:
    import networkx as nx
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from sae_attn_plugin.attribution.explain import EdgeExplanation
    from sae_attn_plugin.attribution.qk import QKAttribution

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
        qk: the run's scores, for :meth:`explain`; None for one that was read from a file.
    """

    flow: Flow
    writers: WriterTable
    roots: Mapping[int, Node]
    tokens: tuple[str, ...]
    provenance: Mapping[str, Any]
    head_split: HeadSplit
    neuronpedia: Mapping[tuple[str, int], str]
    probabilities: Mapping[int, float]
    qk: Callable[[int, int, int, int], QKAttribution] | None = None

    def __repr__(self) -> str:
        targets = ", ".join(map(str, self.roots.values()))
        return (
            f"Attribution of {targets}: {len(self._numbers)} nodes, {self.flow.n_edges} edges, "
            f"worst ledger residual {self.worst_residual:.1e}"
        )

    # -- tables ----------------------------------------------------------------------------------

    @cached_property
    def _numbers(self) -> np.ndarray:
        """Node numbers present, in the order of the table: targets first, then writers."""
        present = np.zeros(len(self.flow.influence), dtype=bool)
        present[self.flow.target] = True
        for piece in self.flow.pieces:
            present[piece.source] = True
        roots = np.sort(np.fromiter(self.roots, dtype=np.int64))
        present[roots] = False
        return np.concatenate([roots, np.flatnonzero(present)])

    @cached_property
    def _ids(self) -> pd.Index:
        """Ids of the nodes in ``_numbers``."""
        numbers = self._numbers.tolist()
        return pd.Index([str(self._node(number)) for number in numbers], name="node")

    @cached_property
    def _places(self) -> np.ndarray:
        """``[node]``: place of each node in ``_numbers``, -1 where it is not there."""
        places = np.full(len(self.flow.influence), -1, dtype=np.int32)
        places[self._numbers] = np.arange(len(self._numbers))
        return places

    @cached_property
    def _columns(self) -> dict[str, np.ndarray]:
        """What the writer table says of each node; the roots' own values in their places."""
        writers, numbers = self.writers, self._numbers
        is_writer = numbers < len(writers)
        row = np.where(is_writer, numbers, 0)
        kind = np.array(KINDS, dtype=object)[writers.kind[row]]
        index = writers.index[row].astype(np.int64)
        columns = {
            "kind": kind,
            "layer": writers.layer[row].astype(np.int64),
            "feature": np.where(np.isin(kind, FEATURE_KINDS), index, -1),
            "head": np.where(kind == "head", index, -1),
            "position": writers.position[row].astype(np.int64),
            "activation": np.where(is_writer, writers.activation[row], np.nan),
            "pre_activation": np.where(is_writer, writers.pre_activation[row], np.nan),
        }
        for place, number in enumerate(numbers[: len(self.roots)].tolist()):
            node = self.roots[number]
            columns["kind"][place], columns["position"][place] = node.kind, node.position
            for name in ("layer", "feature", "head"):
                value = getattr(node, name)
                columns[name][place] = -1 if value is None else value
        return columns

    def _node(self, number: int) -> Node:
        return self.roots[number] if number in self.roots else self.writers.node(number)

    @cached_property
    def nodes(self) -> pd.DataFrame:
        """One row per node, indexed by node id.

        ``constant``, ``pre_activation`` (value for logits) and ``pruned_in`` stand on targets;
        ``expanded`` tells whether a node has its own in-edges here.
        """
        flow, numbers, columns = self.flow, self._numbers, self._columns
        rows = self._places[flow.target]

        def on_targets(values: np.ndarray, others: float | np.ndarray = np.nan) -> np.ndarray:
            column = np.broadcast_to(np.asarray(others), len(numbers)).astype(values.dtype)
            column[rows] = values
            return column

        tokens = np.array(self.tokens, dtype=object)
        frame = pd.DataFrame(
            {
                "kind": columns["kind"],
                "layer": _optional(columns["layer"]),
                "position": columns["position"],
                "token": tokens[columns["position"]],
                "feature": _optional(columns["feature"]),
                "head": _optional(columns["head"]),
                "activation": columns["activation"],
                "pre_activation": on_targets(flow.value, columns["pre_activation"]),
                "constant": on_targets(flow.constant),
                "pruned_in": on_targets(flow.dropped),
                "influence": (flow.influence + flow.root_weight)[numbers],
                "expanded": on_targets(np.ones(len(rows), dtype=bool), False),
                "probability": pd.Series(self.probabilities, dtype=float)
                .reindex(numbers)
                .to_numpy(),
                "neuronpedia": None,
            },
            index=self._ids,
        )
        for (of, number), base in self.neuronpedia.items():
            at = (columns["kind"] == of) & (columns["layer"] == number)
            frame.loc[at, "neuronpedia"] = [f"{base}/{i}" for i in columns["feature"][at]]
        return frame

    @cached_property
    def edges(self) -> pd.DataFrame:
        """One row per edge: ``source``, ``target``, ``weight`` (signed contribution to the target's
        pre-activation or logit), ``share`` (|weight| over the target's in-edges, pruned ones left
        out)."""
        flow, scale = self.flow, _scale(self.flow)
        codes = self._places.astype(np.min_scalar_type(-len(self._numbers)))
        counts = [np.count_nonzero(piece.weight) for piece in flow.pieces]
        size, dtype = sum(counts), flow.pieces[0].weight.dtype
        ends = {name: np.empty(size, codes.dtype) for name in ("source", "target")}
        weight, share = np.empty(size, dtype), np.empty(size, dtype)
        done = 0
        for piece, count in zip(flow.pieces, counts, strict=True):
            part = slice(done, done + count)
            done = part.stop
            source, target = codes[piece.source], codes[flow.target[piece.rows]]
            factor, values = scale[piece.rows], piece.weight
            if isinstance(piece, Block):
                source = source[:, None]
            if count < values.size:
                live = values != 0
                source, target, factor = (
                    np.broadcast_to(one, values.shape)[live] for one in (source, target, factor)
                )
                values = values[live]
            # written in place: what is made besides costs as much again
            columns = (ends["source"], ends["target"], weight, share)
            to_source, to_target, to_weight, to_share = (
                column[part].reshape(values.shape) for column in columns
            )
            to_source[...], to_target[...], to_weight[...] = source, target, values
            np.multiply(np.abs(values, out=to_share), factor, out=to_share)
        ids = pd.CategoricalDtype(self._ids)
        frame: dict[str, Any] = {
            name: pd.Categorical.from_codes(values, dtype=ids, validate=False)
            for name, values in ends.items()
        }
        return pd.DataFrame({**frame, "weight": weight, "share": share}, copy=False)

    def edges_by_head(self) -> pd.DataFrame:
        """Edges into attention features with one row per head; they sum to the edge. ``head`` is
        missing on edges into logits, scores and MLPs, which pass through no head's values."""
        frame = self.edges
        live = self.flow.weight != 0
        target = self.flow.target[self.flow.row[live]]
        source = self.flow.source[live]
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

    def explain(
        self, edge: Any, *, heads: int = 3, n: int = 5, relative: bool = False
    ) -> EdgeExplanation:
        """Why an attention edge is there: its heads, and why each looks at the edge's source.

        Args:
            edge: ``(source, target)`` or ``(source, target, head)`` as node ids, or a row of
                :attr:`edges` or :meth:`edges_by_head`, or an edge of ``to_networkx(by="head")``.
            heads: how many of the strongest heads, where none is named.
            n: strongest terms of each head's score.
            relative: terms of the score relative to the other keys.

        Raises:
            InputError: no such edge, or one that passes through no head.
        """
        from sae_attn_plugin.attribution.explain import explain

        return explain(self, edge, heads=heads, n=n, relative=relative)

    @cached_property
    def ledger(self) -> pd.DataFrame:
        """Per target: ``in_sum`` of the edges here, ``constant``, ``pruned`` (edges left out),
        ``value`` as the model computes it, ``residual`` (what the sum misses) and
        ``relative_residual`` (over the sum of |edges| + |constant|)."""
        flow = self.flow
        residual = flow.value - flow.in_sum - flow.constant - flow.dropped
        size = flow.abs_sum + np.abs(flow.constant) + np.abs(flow.dropped)
        return pd.DataFrame(
            {
                "in_sum": flow.in_sum,
                "constant": flow.constant,
                "pruned": flow.dropped,
                "value": flow.value,
                "residual": residual,
                "relative_residual": np.abs(residual) / np.maximum(size, 1e-30),
            },
            index=self._ids[self._places[flow.target]].rename("target"),
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
            if not isinstance(value, numbers.Real) or not 0 < value <= 1:
                raise InputError(f"prune({name}={value!r}): expected a share in (0, 1]")
        if max_nodes is not None and as_index(max_nodes, "prune(max_nodes)") < 1:
            raise InputError(f"prune(max_nodes={max_nodes}): expected at least 1")
        flow = self.flow
        is_root = np.zeros(len(flow.influence), dtype=bool)
        is_root[list(self.roots)] = True
        keep_node = is_root | _top_share(np.where(is_root, 0, _influence(flow)), nodes, max_nodes)
        inner = _between(flow, keep_node)
        keep = _top_share(_edge_scores(inner), edges, None)
        row, source = inner.row[keep], inner.source[keep]
        target = flow.target[row]
        expanded = np.zeros(len(flow.influence), dtype=bool)
        expanded[flow.target] = True
        while True:
            has_in = np.zeros(len(flow.influence), dtype=bool)
            has_in[target] = True
            has_out = np.zeros(len(flow.influence), dtype=bool)
            has_out[source] = True
            alive = (has_out | is_root) & (has_in | ~expanded | is_root)
            still = alive[source] & alive[target]
            if still.all():
                break
            keep[np.flatnonzero(keep)[~still]] = False
            row, source, target = row[still], source[still], target[still]
        step = {"nodes": nodes, "edges": edges, "max_nodes": max_nodes}
        about = dict(self.provenance)
        if "pruning" in about:  # once more
            about["pruned_before"] = [*about.get("pruned_before", []), about["pruning"]]
        about["pruning"] = step
        return replace(self, flow=_subset(inner, keep, alive | is_root), provenance=about)

    # -- graphs ----------------------------------------------------------------------------------

    def to_networkx(self, by: Literal["head"] | None = None) -> nx.DiGraph[Any]:
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


def _optional(values: np.ndarray) -> pd.api.extensions.ExtensionArray:
    """Integers with ``<NA>`` where they are negative."""
    return pd.arrays.IntegerArray(values, values < 0)


# -- arithmetic on the edges of a flow -----------------------------------------------------------


def _scale(flow: Flow) -> np.ndarray:
    """``[row]``: what turns |weight| into a share of the row, in the dtype of the edges."""
    dtype = flow.pieces[0].weight.dtype
    scale = np.zeros(len(flow.target), dtype)
    np.divide(
        1, flow.abs_sum, out=scale, where=flow.abs_sum > np.finfo(dtype).tiny, casting="same_kind"
    )
    return scale


def _influence(flow: Flow) -> np.ndarray:
    """Influence of every node on the roots through the flow's edges."""
    influence = np.zeros(len(flow.influence))
    scale = 1 / np.maximum(flow.abs_sum, 1e-300)
    for piece in flow.pieces:  # deeper targets first, so their influence is complete
        if isinstance(piece, Block):
            node = flow.target[piece.rows]
            passed = (influence[node] + flow.root_weight[node]) * scale[piece.rows]
            influence[piece.source] += np.abs(piece.weight) @ passed.astype(piece.weight.dtype)
            continue
        for part in _by_depth(piece, flow.depth):
            node = flow.target[part.row]
            passed = (influence[node] + flow.root_weight[node]) * scale[part.row]
            influence += np.bincount(part.source, passed * np.abs(part.weight), len(influence))
    return influence


def _by_depth(piece: Loose, depth: np.ndarray) -> list[Loose]:
    """The edges of a piece, cut where the depth of their targets changes."""
    cuts = np.flatnonzero(np.diff(depth[piece.row])) + 1
    columns = (np.split(values, cuts) for values in (piece.row, piece.source, piece.weight))
    return [Loose(*part) for part in zip(*columns, strict=True)]


def _between(flow: Flow, keep_node: np.ndarray) -> Flow:
    """The edges among the kept nodes, sorted by row and source; the others are dropped."""
    found = []
    keep_row = keep_node[flow.target]
    for piece in flow.pieces:
        if isinstance(piece, Block):
            source = np.flatnonzero(keep_node[piece.source])
            target = np.flatnonzero(keep_row[piece.rows])
            weight = piece.weight[np.ix_(source, target)]
            row, node, weight = Block(0, piece.source[source], weight).coo()
            row = (piece.first + target).astype(np.int32)[row]
        else:
            kept = keep_row[piece.row] & keep_node[piece.source]
            row, node, weight = piece.row[kept], piece.source[kept], piece.weight[kept]
        live = weight != 0
        found.append((row[live], node[live], weight[live]))
    row, source, weight = (np.concatenate(column) for column in zip(*found, strict=True))
    order = np.lexsort((source, row))
    loose = Loose(row[order], source[order], weight[order])
    return _with_edges(flow, loose)


def _with_edges(flow: Flow, edges: Loose) -> Flow:
    """The flow with some of its edges; the rest goes to ``dropped``."""
    size = len(flow.target)
    abs_sum = np.bincount(edges.row, np.abs(edges.weight), size)
    in_sum = row_sums([edges], size)
    lost = flow.in_sum - in_sum
    lost[np.abs(lost) <= 1e-13 * flow.abs_sum] = 0  # the same edges, summed in another order
    dropped = flow.dropped + lost
    return replace(flow, pieces=(edges,), in_sum=in_sum, abs_sum=abs_sum, dropped=dropped)


def _edge_scores(flow: Flow) -> np.ndarray:
    """What each edge passes on, with shares over the flow's own in-edges, in float64."""
    influence = _influence(flow) + flow.root_weight
    factor = influence[flow.target] / np.maximum(flow.abs_sum, 1e-300)
    return factor[flow.row] * np.abs(flow.weight)


def _top_share(score: np.ndarray, share: float, limit: int | None) -> np.ndarray:
    """Mask of the smallest set whose scores reach ``share`` of the total; of equal scores, the
    first."""
    ordered = np.sort(score)[::-1]
    cumulative = np.cumsum(ordered)
    count = 0
    if len(cumulative) and cumulative[-1] > 0:
        count = int(np.searchsorted(cumulative, share * cumulative[-1] * (1 - 1e-12))) + 1
        if share == 1:
            count = int((score > 0).sum())
    count = min(count, len(score) if limit is None else limit)
    if count == 0:
        return np.zeros(len(score), dtype=bool)
    mask = score > ordered[count - 1]
    equal = np.flatnonzero(score == ordered[count - 1])
    mask[equal[: count - int(mask.sum())]] = True
    return mask


def _subset(flow: Flow, keep: np.ndarray, alive: np.ndarray) -> Flow:
    """The rows of live targets with their kept edges; the rest goes to ``dropped``."""
    flow = _with_edges(flow, Loose(flow.row[keep], flow.source[keep], flow.weight[keep]))
    row = alive[flow.target]
    (edges,) = flow.pieces
    place = (np.cumsum(row) - 1).astype(np.int32)
    return replace(
        flow,
        pieces=(Loose(place[edges.coo()[0]], edges.source, edges.weight),),
        **{
            name: getattr(flow, name)[row]
            for name in ("target", "depth", "in_sum", "abs_sum", "constant", "value", "dropped")
        },
    )
