"""Recursive DFA in closed form: one sweep from the top layer down, no autograd.

All targets of a layer are known once the layers above are done. Their readers are computed as one
batch, contracted with every active upstream writer as matrix products over the causal half, and
their influence is pushed to the sources; then the sweep goes one sublayer down: first the MLP of a
layer, then its attention.

A feature is a number, so its row explains its pre-activation. A node that passes on what it reads
(a head, a linearised MLP, a transcoder's skip connection) is a vector. Its row explains what it
gives to the roots: the vector times the gradient of the weighted roots at its place, through every
node that is expanded above it. That gradient is carried along in the sweep.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from sae_attn_plugin.attribution.frozen import FrozenRun, LinearMlp
from sae_attn_plugin.attribution.qk import ScoreReader
from sae_attn_plugin.attribution.readers import (
    FeatureReaders,
    LocalReaders,
    StreamReader,
    feature_readers,
    head_readers,
    mlp_feature_readers,
    mlp_readers,
    skip_readers,
)
from sae_attn_plugin.attribution.writers import WriterTable
from sae_attn_plugin.nodes import PASSING_KINDS, Feature

# Source positions whose readers are formed together: enough for a good matrix product, few enough
# that the block stays in cache.
_BLOCK = 8


@dataclass(frozen=True)
class Flow:
    """Edges of a sweep in compressed rows: one row per target.

    Nodes ``0 .. len(writers) - 1`` are the writers' rows; roots that are no active writer follow.

    Attributes:
        roots: node of each root, in the order given.
        target: ``[row]`` node of each row; depth: ``[row]`` of each target, for the order.
        start: ``[row + 1]``; source, weight: ``[edge]``.
        constant, value, dropped: ``[row]``; ``dropped`` sums the edges left out of the row.
        root_weight: ``[node]``, the share of each root in the influence that starts the sweep.
        influence: ``[node]``.
        passing: expanded nodes that pass on what they read; directions: ``[passing, d_model]``, the
            gradient of the roots at each, which times the node's vector is the value of its row.
    """

    roots: tuple[int, ...]
    target: np.ndarray
    depth: np.ndarray
    start: np.ndarray
    source: np.ndarray
    weight: np.ndarray
    constant: np.ndarray
    value: np.ndarray
    dropped: np.ndarray
    root_weight: np.ndarray
    influence: np.ndarray
    passing: np.ndarray | None = None
    directions: np.ndarray | None = None


@dataclass
class _Rows:
    """Edges of the targets done so far."""

    target: list[np.ndarray] = field(default_factory=list)
    depth: list[np.ndarray] = field(default_factory=list)
    count: list[np.ndarray] = field(default_factory=list)
    source: list[np.ndarray] = field(default_factory=list)
    weight: list[np.ndarray] = field(default_factory=list)
    constant: list[np.ndarray] = field(default_factory=list)
    value: list[np.ndarray] = field(default_factory=list)
    dropped: list[np.ndarray] = field(default_factory=list)

    def add(
        self,
        target: np.ndarray,
        depth: int,
        columns: np.ndarray,
        weights: Tensor,
        constant: Tensor,
        value: Tensor,
        keep: int | None,
    ) -> None:
        """``weights [target, column]``, every column a source of every one of these targets."""
        n_rows, n_columns = weights.shape
        dropped = np.zeros(n_rows)
        if keep is not None and keep < n_columns:
            best = weights.abs().topk(keep, dim=1).indices.sort(dim=1).values
            kept = weights.gather(1, best)
            dropped = (weights.double().sum(1) - kept.double().sum(1)).numpy(force=True)
            source, weights, n_columns = columns[best.numpy(force=True)].ravel(), kept, keep
        else:
            source = np.tile(columns, n_rows)
        self.target.append(target)
        self.depth.append(np.full(n_rows, depth, dtype=np.int32))
        self.count.append(np.full(n_rows, n_columns, dtype=np.int64))
        self.source.append(source)
        self.weight.append(weights.reshape(-1).numpy(force=True))
        self.constant.append(constant.double().numpy(force=True))
        self.value.append(value.double().numpy(force=True))
        self.dropped.append(dropped)

    def finish(
        self,
        roots: Sequence[int],
        root_weight: np.ndarray,
        influence: np.ndarray,
        directions: Mapping[int, Tensor],
    ) -> Flow:
        return Flow(
            roots=tuple(roots),
            target=np.concatenate(self.target),
            depth=np.concatenate(self.depth),
            start=np.concatenate([[0], np.cumsum(np.concatenate(self.count))]),
            source=np.concatenate(self.source),
            weight=np.concatenate(self.weight),
            constant=np.concatenate(self.constant),
            value=np.concatenate(self.value),
            dropped=np.concatenate(self.dropped),
            root_weight=root_weight,
            influence=influence,
            passing=np.array(list(directions), dtype=np.int64) if directions else None,
            directions=torch.stack(list(directions.values())).numpy(force=True)
            if directions
            else None,
        )


@dataclass
class _Sweep:
    """What the steps of one sweep share; ``influence`` and ``gradient`` grow on the way down.

    Attributes:
        start: ``[node]``, the roots' own influence.
        gradient: ``[position, d_model]`` of the weighted roots at the sublayer that the sweep has
            reached; None where nothing passes on what it reads, so that nothing asks for it.
    """

    run: FrozenRun
    writers: WriterTable
    rows: _Rows
    influence: Tensor
    start: Tensor
    gradient: Tensor | None
    keep: int | None
    memory_budget: int
    directions: dict[int, Tensor] = field(default_factory=dict)

    def add(self, added: Tensor | None) -> None:
        """Add to the gradient."""
        if self.gradient is not None and added is not None:
            self.gradient = self.gradient + added

    def add_score(self, root: ScoreReader, weight: float) -> None:
        """A score reads the stream before its own layer, so it joins the gradient there."""
        if self.gradient is None:
            return
        vectors = root.vectors.to(self.gradient)
        if self.writers.means is not None:
            vectors = vectors - vectors.mean(-1, keepdim=True)
        at = torch.tensor(root.positions, device=vectors.device)
        self.gradient = self.gradient.index_add(0, at, weight * vectors)

    def slope(self, nodes: np.ndarray) -> Tensor | None:
        """``[target]``: the derivative of the weighted roots with respect to each row's value."""
        if self.gradient is None:
            return None
        slope = self.start[torch.from_numpy(nodes).to(self.start.device)].to(self.gradient.dtype)
        inside = np.flatnonzero(nodes < len(self.writers))
        features = inside[~np.isnan(self.writers.activation[nodes[inside]])]
        rows = nodes[features]
        at = torch.from_numpy(self.writers.position[rows].astype(np.int64)).to(slope.device)
        written = _dot(self.writers, rows, self.gradient[at])
        pre = torch.from_numpy(self.writers.pre_activation[rows]).to(written)
        slope[torch.from_numpy(features).to(slope.device)] += written / pre
        # What passes on is measured in units of the roots already.
        slope[torch.from_numpy(np.setdiff1d(inside, features)).to(slope.device)] = 1
        return slope

    def direction(self, nodes: np.ndarray) -> Tensor:
        """``[target, d_model]``: the gradient of the weighted roots at each node."""
        assert self.gradient is not None
        at = self.writers.position[nodes].astype(np.int64)
        found = self.gradient[torch.from_numpy(at).to(self.gradient.device)]
        self.directions.update(zip(nodes.tolist(), found, strict=True))
        return found


def sweep(
    run: FrozenRun,
    writers: WriterTable,
    roots: Sequence[StreamReader | ScoreReader | Feature],
    root_weights: Sequence[float],
    *,
    node_budget: int | None = None,
    edges_per_target: int | None = None,
    memory_budget: int = 512 * 2**20,
    progress: Callable[[int], object] | None = None,
    mlps: Sequence[LinearMlp] | None = None,
    heads: bool = False,
) -> Flow:
    """Attribute the roots recursively.

    Args:
        run: the frozen run.
        writers: its writers.
        roots: what to explain.
        root_weights: influence each root starts with, summing to 1.
        node_budget: how many nodes are expanded into their own in-edges, most influential
            first (influence is |edge| normalised over a target's in-edges, as in circuit-tracer);
            None: all with any influence. Roots are always expanded and do not count.
        edges_per_target: keep only this many strongest edges of each target; the rest is summed
            in ``Flow.dropped``. None: all.
        memory_budget: bytes for the dense rows of the targets in flight.
        progress: called with each layer when it is done.
        mlps: by layer, with activation ratios frozen: raw MLPs and SAEs on MLP outputs are then
            expanded through them. None: they are leaves.
        heads: heads of layers without an SAE are expanded through their patterns, else leaves.
    """
    n_layers, device = len(run.layers), run.embed.device
    numbers = _number_roots(writers, roots)
    n_nodes = max([len(writers), *(number + 1 for number in numbers)])
    root_weight = np.zeros(n_nodes)
    np.add.at(root_weight, numbers, np.asarray(root_weights, dtype=np.float64))
    kinds = ["attn", "tc", "tc_skip"] + ["mlp", "mlp_sae"] * (mlps is not None) + ["head"] * heads
    expandable = writers.of_kinds(kinds)
    passing = writers.of_kinds([kind for kind in kinds if kind in PASSING_KINDS])
    state = _Sweep(
        run=run,
        writers=writers,
        rows=_Rows(),
        influence=torch.zeros(n_nodes, dtype=torch.float64, device=device),
        start=torch.from_numpy(root_weight).to(device),
        gradient=torch.zeros_like(run.embed) if passing.any() else None,
        keep=edges_per_target,
        memory_budget=memory_budget,
    )
    for number, root in zip(numbers, roots, strict=True):
        if isinstance(root, StreamReader):
            readers = LocalReaders(
                root.vector[None],
                torch.tensor([root.constant], dtype=torch.float64),
                torch.tensor([root.value], dtype=torch.float64),
                centred=True,
            )
            at = np.array([root.position])
            prefix = writers.prefix(n_layers)
            depth = 2 * n_layers + 1
            one = np.array([number])
            state.add(_expand_local(state, depth, one, at, lambda _, r=readers: r, prefix))
        elif isinstance(root, ScoreReader):
            columns, weights = root.edges(writers)
            state.rows.add(
                np.array([number]),
                2 * n_layers + 1,  # a root, which nothing reads
                columns,
                weights[None],
                torch.tensor([root.constant], dtype=torch.float64),
                torch.tensor([root.value], dtype=torch.float64),
                edges_per_target,
            )
            at = torch.from_numpy(columns).to(device)
            _push(state.influence, at, weights[None], state.start[number : number + 1])

    remaining, waiting = node_budget, torch.zeros(())
    for depth in range(2 * n_layers, 0, -1):
        layer, of_mlp = (depth - 1) // 2, depth % 2 == 0
        before = state.gradient
        wanted = {
            number: root
            for number, root in zip(numbers, roots, strict=True)
            if isinstance(root, Feature) and root.layer == layer and (root.kind != "attn") == of_mlp
        }
        chosen = _select(writers, state.influence, expandable, depth, remaining, numbers)
        if remaining is not None:
            remaining -= len(chosen)
        nodes = np.concatenate([chosen, list(wanted)]).astype(np.int64)
        if len(nodes):
            index = np.concatenate([writers.index[chosen], [r.feature for r in wanted.values()]])
            at = np.concatenate([writers.position[chosen], [r.position for r in wanted.values()]])
            order = np.argsort(at, kind="stable")
            nodes, index, at = nodes[order], index[order].astype(np.int64), at[order]
            group = _expand_mlp if of_mlp else _expand_attention
            group(state, layer, nodes, index, at.astype(np.int64), mlps)
        if not of_mlp:
            for number, root in zip(numbers, roots, strict=True):
                if isinstance(root, ScoreReader) and root.layer == layer:
                    state.add_score(root, float(root_weight[number]))
        if run.parallel and before is not None and state.gradient is not None:
            if of_mlp:
                # No attention feeds the MLP of its own layer, so what that added waits.
                waiting, state.gradient = state.gradient - before, before
            else:
                state.gradient = state.gradient + waiting
        if progress is not None and not of_mlp:
            progress(layer)
    return state.rows.finish(
        numbers, root_weight, state.influence.numpy(force=True), state.directions
    )


def _number_roots(
    writers: WriterTable, roots: Sequence[StreamReader | ScoreReader | Feature]
) -> list[int]:
    """Node numbers of the roots: their writer's row where they are active features."""
    numbers, extra = [], len(writers)
    for root in roots:
        row = np.array([], dtype=np.int64)
        if isinstance(root, Feature):
            of_layer = writers.features_of(root.layer, root.kind)
            same = (writers.index[of_layer] == root.feature) & (
                writers.position[of_layer] == root.position
            )
            row = of_layer[same]
        numbers.append(int(row[0]) if len(row) else extra)
        extra += not len(row)
    return numbers


def _upstream(writers: WriterTable, prefix: np.ndarray, position: int) -> np.ndarray:
    start = writers.starts[position]
    return np.arange(start, start + prefix[position], dtype=np.int32)


def _select(
    writers: WriterTable,
    influence: Tensor,
    expandable: np.ndarray,
    depth: int,
    remaining: int | None,
    roots: Sequence[int],
) -> np.ndarray:
    """Nodes of a sublayer that are expanded: those among the ``remaining`` most influential of all
    pending ones, here and below. Roots are expanded anyway."""
    here = expandable & (writers.depth == depth)
    if not here.any():
        return np.zeros(0, dtype=np.int64)
    strength = influence.numpy(force=True).copy()
    strength[list(roots)] = 0
    rows = np.flatnonzero(here)
    rows = rows[strength[rows] > 0]
    if remaining is None:
        return rows
    if remaining <= 0:
        return rows[:0]
    pending = np.concatenate([rows, np.flatnonzero(expandable & (writers.depth < depth))])
    if len(pending) <= remaining:
        return rows
    order = np.argsort(-strength[pending], kind="stable")[:remaining]
    return np.sort(pending[order[order < len(rows)]])


def _push(influence: Tensor, columns: Tensor, weights: Tensor, target_influence: Tensor) -> None:
    """Hand each target's influence to its sources, in proportion to |edge|."""
    total = weights.abs().sum(1)
    factor = torch.where(total > 0, target_influence.to(total.dtype) / total, 0)
    influence.index_add_(0, columns, (factor @ weights.abs()).double())


def _expand_attention(
    state: _Sweep,
    layer: int,
    nodes: np.ndarray,
    index: np.ndarray,
    position: np.ndarray,
    _mlps: Sequence[LinearMlp] | None,
) -> None:
    """In-edges of features or heads of one layer."""
    frozen, device = state.run.layers[layer], state.influence.device

    def readers(piece: slice) -> FeatureReaders:
        which = torch.from_numpy(index[piece]).to(device)
        at = torch.from_numpy(position[piece]).to(device)
        if frozen.dictionary is not None:
            return feature_readers(frozen, which, at)
        return head_readers(frozen, which, at, state.direction(nodes[piece]))

    state.add(_expand(state, layer, nodes, position, readers))


def _expand_mlp(
    state: _Sweep,
    layer: int,
    nodes: np.ndarray,
    index: np.ndarray,
    position: np.ndarray,
    mlps: Sequence[LinearMlp] | None,
) -> None:
    """In-edges of what belongs to the MLP of one layer."""
    mlp, device = state.run.layers[layer].mlp, state.influence.device
    assert mlp is not None
    linear = None if mlps is None else mlps[layer]
    depth = 2 * layer + 2
    prefix = state.writers.before(depth - 1 if state.run.parallel else depth)
    inactive = nodes >= len(state.writers)
    feature = inactive.copy()
    feature[~inactive] = ~np.isnan(state.writers.activation[nodes[~inactive]])
    found: list[Tensor | None] = []
    for group in (feature, ~feature):
        if not group.any():
            continue
        of_group, which, at = nodes[group], index[group], position[group]

        def readers(
            piece: slice,
            of_group: np.ndarray = of_group,
            which: np.ndarray = which,
            at: np.ndarray = at,
            passing: bool = not bool(feature[group][0]),
        ) -> LocalReaders:
            places = torch.from_numpy(at[piece]).to(device)
            if not passing:
                features = torch.from_numpy(which[piece]).to(device)
                return mlp_feature_readers(mlp, features, places, linear)
            directions = state.direction(of_group[piece])
            if mlp.dictionary is not None:
                return skip_readers(mlp, places, directions)
            assert linear is not None
            return mlp_readers(mlp, places, directions, linear)

        found.append(_expand_local(state, depth, of_group, at, readers, prefix))
    for added in found:  # not before all of this sublayer have asked for the gradient
        state.add(added)


def _expand_local(
    state: _Sweep,
    depth: int,
    nodes: np.ndarray,
    position: np.ndarray,
    make_readers: Callable[[slice], LocalReaders],
    prefix: np.ndarray,
) -> Tensor | None:
    """In-edges of targets that read their own position only, sorted by position; returns what they
    add to the gradient."""
    writers, device = state.writers, state.influence.device
    slope = state.slope(nodes)
    width = int(prefix.max()) + 3 * writers.vectors.shape[1]
    chunk = max(1, state.memory_budget // (2 * state.run.embed.element_size() * width))
    added = None if state.gradient is None else torch.zeros_like(state.gradient)
    for first in range(0, len(nodes), chunk):
        piece = slice(first, first + chunk)
        readers, at = make_readers(piece), position[piece]
        if added is not None and slope is not None:
            vectors = readers.vectors
            if readers.centred and writers.means is not None:
                vectors = vectors - vectors.mean(-1, keepdim=True)
            added.index_add_(
                0, torch.from_numpy(at).to(device), vectors * slope[piece, None].to(vectors)
            )
        for q in np.unique(at):
            a, b = np.searchsorted(at, [q, q + 1])
            columns = _upstream(writers, prefix, int(q))
            if not len(columns):
                continue
            inside = slice(int(columns[0]), int(columns[-1]) + 1)
            weights = readers.vectors[a:b] @ writers.vectors[inside].T
            if not readers.centred and writers.means is not None:
                weights = weights + readers.vectors[a:b].sum(-1)[:, None] * writers.means[inside]
            numbers = nodes[piece][a:b]
            at_nodes = torch.from_numpy(numbers).to(device)
            index = torch.from_numpy(columns).to(device)
            strength = state.influence[at_nodes] + state.start[at_nodes]
            _push(state.influence, index, weights, strength)
            constant, value = readers.constant[a:b], readers.value[a:b]
            state.rows.add(numbers, depth, columns, weights, constant, value, state.keep)
    return added


def _dot(writers: WriterTable, rows: np.ndarray, vectors: Tensor) -> Tensor:
    """``[row]``: each writer, as it stands in the stream, times its vector."""
    index = torch.from_numpy(rows.astype(np.int64)).to(vectors.device)
    dots = (writers.vectors[index] * vectors).sum(-1)
    return dots if writers.means is None else dots + writers.means[index] * vectors.sum(-1)


def _expand(
    state: _Sweep,
    layer: int,
    nodes: np.ndarray,
    position: np.ndarray,
    make_readers: Callable[[slice], FeatureReaders],
) -> Tensor | None:
    """In-edges of targets of attention of one layer, sorted by position; returns what they add to
    the gradient."""
    run, writers, device = state.run, state.writers, state.influence.device
    prefix = writers.prefix(layer)
    offsets = np.concatenate([[0], np.cumsum(prefix)])
    columns = np.concatenate([_upstream(writers, prefix, p) for p in range(run.n_positions)])
    column_index = torch.from_numpy(columns).to(device)
    slope = state.slope(nodes)
    added = None if state.gradient is None else torch.zeros_like(state.gradient)
    d_model, n_heads = writers.vectors.shape[1], run.layers[layer].z.shape[1]
    # per target: its edges and their absolute values, its readers, their block
    per_target = run.embed.element_size() * (2 * len(columns) + (n_heads + _BLOCK) * d_model)
    chunk = max(1, state.memory_budget // per_target)
    for first in range(0, len(nodes), chunk):
        piece = slice(first, first + chunk)
        at = position[piece]
        readers = make_readers(piece)
        heads = readers.heads[readers.row]
        last = int(offsets[at[-1] + 1])
        weights = torch.zeros(len(at), last, dtype=run.dtype, device=device)
        for low in range(0, int(at[-1]) + 1, _BLOCK):
            high = min(low + _BLOCK, int(at[-1]) + 1)
            begin = int(np.searchsorted(at, low))  # earlier targets cannot see this block
            block = torch.bmm(readers.weights[begin:, :, low:high].transpose(1, 2), heads[begin:])
            if added is not None and slope is not None:
                added[low:high] += torch.einsum("t,tpd->pd", slope[piece][begin:].to(block), block)
            for p in range(low, high):
                y = writers.vectors[writers.starts[p] : writers.starts[p] + prefix[p]]
                out = weights[begin:, offsets[p] : offsets[p + 1]]
                torch.matmul(block[:, p - low], y.T, out=out)
        numbers = nodes[piece]
        at_nodes = torch.from_numpy(numbers).to(device)
        strength = state.influence[at_nodes] + state.start[at_nodes]
        _push(state.influence, column_index[:last], weights, strength)
        for q in np.unique(at):
            a, b = np.searchsorted(at, [q, q + 1])
            width = int(offsets[q + 1])
            state.rows.add(
                numbers[a:b],
                2 * layer + 1,
                columns[:width],
                weights[a:b, :width],
                readers.constant[a:b],
                readers.value[a:b],
                state.keep,
            )
    if added is not None and writers.means is not None:  # attention reads the centred stream
        added -= added.mean(-1, keepdim=True)
    return added


def edges_by_head(
    run: FrozenRun,
    writers: WriterTable,
    layer: int,
    feature: np.ndarray,
    position: np.ndarray,
    source: np.ndarray,
    memory_budget: int = 256 * 2**20,
) -> np.ndarray:
    """Edges into features of one layer split by head, ``[edge, head]``.

    Args:
        feature, position: ``[edge]`` of the target; source: ``[edge]`` writer rows.
    """
    device = run.embed.device
    result = []
    n_heads, d_model = run.layers[layer].z.shape[1], writers.vectors.shape[1]
    chunk = max(1, memory_budget // (run.embed.element_size() * (n_heads + 1) * d_model))
    for first in range(0, len(source), chunk):
        piece = slice(first, first + chunk)
        readers = feature_readers(
            run.layers[layer],
            torch.from_numpy(feature[piece].astype(np.int64)).to(device),
            torch.from_numpy(position[piece].astype(np.int64)).to(device),
        )
        rows = torch.from_numpy(source[piece].astype(np.int64)).to(device)
        at = torch.from_numpy(writers.position[source[piece]].astype(np.int64)).to(device)
        dots = torch.einsum("ed,ehd->eh", writers.vectors[rows], readers.heads[readers.row])
        factor = readers.weights[torch.arange(len(rows), device=device), :, at]
        result.append((dots * factor).numpy(force=True))
    return np.concatenate(result) if result else np.zeros((0, n_heads))
