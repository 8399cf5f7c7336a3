"""Recursive DFA in closed form: one sweep from the top layer down, no autograd.

All targets of a layer are known once the layers above are done. Their readers are computed as one
batch, contracted with every active upstream writer as matrix products over the causal half, and
their influence is pushed to the sources; then the sweep goes one layer down.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from sae_attn_plugin.attribution.frozen import FrozenRun
from sae_attn_plugin.attribution.qk import ScoreReader
from sae_attn_plugin.attribution.readers import StreamReader, feature_readers
from sae_attn_plugin.attribution.writers import WriterTable
from sae_attn_plugin.nodes import Feature

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

    def finish(self, roots: Sequence[int], root_weight: np.ndarray, influence: np.ndarray) -> Flow:
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
        )


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
) -> Flow:
    """Attribute the roots recursively.

    Args:
        run: the frozen run.
        writers: its writers.
        roots: what to explain.
        root_weights: influence each root starts with, summing to 1.
        node_budget: how many features are expanded into their own in-edges, most influential
            first (influence is |edge| normalised over a target's in-edges, as in circuit-tracer);
            None: all with any influence. Roots are always expanded and do not count.
        edges_per_target: keep only this many strongest edges of each target; the rest is summed
            in ``Flow.dropped``. None: all.
        memory_budget: bytes for the dense rows of the targets in flight.
        progress: called with each layer when it is done.
    """
    n_layers, device = len(run.layers), run.embed.device
    rows = _Rows()
    numbers = _number_roots(writers, roots)
    n_nodes = max([len(writers), *(number + 1 for number in numbers)])
    influence = torch.zeros(n_nodes, dtype=torch.float64, device=device)
    root_weight = np.zeros(n_nodes)
    np.add.at(root_weight, numbers, np.asarray(root_weights, dtype=np.float64))
    start = torch.from_numpy(root_weight).to(device)

    for number, root in zip(numbers, roots, strict=True):
        if isinstance(root, StreamReader):
            columns = _upstream(writers, writers.prefix(n_layers), root.position)
            vectors = writers.vectors[columns[0] : columns[-1] + 1]
            weights = (vectors @ root.vector)[None]
            rows.add(
                np.array([number]),
                2 * n_layers + 1,
                columns,
                weights,
                torch.tensor([root.constant], dtype=torch.float64),
                torch.tensor([root.value], dtype=torch.float64),
                edges_per_target,
            )
            _push(
                influence, torch.from_numpy(columns).to(device), weights, start[number : number + 1]
            )
        elif isinstance(root, ScoreReader):
            columns, weights = root.edges(writers)
            rows.add(
                np.array([number]),
                2 * n_layers + 1,  # a root, which nothing reads
                columns,
                weights[None],
                torch.tensor([root.constant], dtype=torch.float64),
                torch.tensor([root.value], dtype=torch.float64),
                edges_per_target,
            )
            at = torch.from_numpy(columns).to(device)
            _push(influence, at, weights[None], start[number : number + 1])

    remaining = node_budget
    for layer in range(n_layers - 1, -1, -1):
        if run.layers[layer].dictionary is None:
            continue
        wanted = {
            number: root
            for number, root in zip(numbers, roots, strict=True)
            if isinstance(root, Feature) and root.layer == layer
        }
        chosen = _select(writers, influence, layer, remaining, numbers)
        if remaining is not None:
            remaining -= len(chosen)
        nodes = np.concatenate([chosen, list(wanted)]).astype(np.int64)
        if len(nodes) == 0:
            continue
        feature = np.concatenate([writers.index[chosen], [r.feature for r in wanted.values()]])
        position = np.concatenate([writers.position[chosen], [r.position for r in wanted.values()]])
        order = np.argsort(position, kind="stable")
        _expand(
            run,
            writers,
            layer,
            nodes[order],
            feature[order].astype(np.int64),
            position[order].astype(np.int64),
            influence,
            start,
            rows,
            edges_per_target,
            memory_budget,
        )
        if progress is not None:
            progress(layer)
    return rows.finish(numbers, root_weight, influence.numpy(force=True))


def _number_roots(
    writers: WriterTable, roots: Sequence[StreamReader | ScoreReader | Feature]
) -> list[int]:
    """Node numbers of the roots: their writer's row where they are active features."""
    numbers, extra = [], len(writers)
    for root in roots:
        row = np.array([], dtype=np.int64)
        if isinstance(root, Feature):
            of_layer = writers.features_of(root.layer)
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
    layer: int,
    remaining: int | None,
    roots: Sequence[int],
) -> np.ndarray:
    """Features of a layer that are expanded: those among the ``remaining`` most influential of all
    pending ones, in this layer and below. Roots are expanded anyway."""
    strength = influence.numpy(force=True).copy()
    strength[list(roots)] = 0
    rows = writers.features_of(layer)
    rows = rows[strength[rows] > 0]
    if remaining is None:
        return rows
    if remaining <= 0:
        return rows[:0]
    lower = np.concatenate([writers.features_of(below) for below in range(layer)] or [rows[:0]])
    pending = np.concatenate([rows, lower])
    if len(pending) <= remaining:
        return rows
    order = np.argsort(-strength[pending], kind="stable")[:remaining]
    return np.sort(pending[order[order < len(rows)]])


def _push(influence: Tensor, columns: Tensor, weights: Tensor, target_influence: Tensor) -> None:
    """Hand each target's influence to its sources, in proportion to |edge|."""
    total = weights.abs().sum(1)
    factor = torch.where(total > 0, target_influence.to(total.dtype) / total, 0)
    influence.index_add_(0, columns, (factor @ weights.abs()).double())


def _expand(
    run: FrozenRun,
    writers: WriterTable,
    layer: int,
    nodes: np.ndarray,
    feature: np.ndarray,
    position: np.ndarray,
    influence: Tensor,
    start: Tensor,
    rows: _Rows,
    keep: int | None,
    memory_budget: int,
) -> None:
    """In-edges of features of one layer, targets sorted by position."""
    device = influence.device
    prefix = writers.prefix(layer)
    offsets = np.concatenate([[0], np.cumsum(prefix)])
    columns = np.concatenate([_upstream(writers, prefix, p) for p in range(run.n_positions)])
    column_index = torch.from_numpy(columns).to(device)
    d_model, n_heads = writers.vectors.shape[1], run.layers[layer].z.shape[1]
    # per target: its edges and their absolute values, its readers, their block
    per_target = run.embed.element_size() * (2 * len(columns) + (n_heads + _BLOCK) * d_model)
    chunk = max(1, memory_budget // per_target)
    for first in range(0, len(nodes), chunk):
        piece = slice(first, first + chunk)
        at = position[piece]
        readers = feature_readers(
            run.layers[layer],
            torch.from_numpy(feature[piece]).to(device),
            torch.from_numpy(at).to(device),
        )
        heads = readers.heads[readers.row]
        last = int(offsets[at[-1] + 1])
        weights = torch.zeros(len(at), last, dtype=run.dtype, device=device)
        for low in range(0, int(at[-1]) + 1, _BLOCK):
            high = min(low + _BLOCK, int(at[-1]) + 1)
            begin = int(np.searchsorted(at, low))  # earlier targets cannot see this block
            block = torch.bmm(readers.weights[begin:, :, low:high].transpose(1, 2), heads[begin:])
            for p in range(low, high):
                y = writers.vectors[writers.starts[p] : writers.starts[p] + prefix[p]]
                out = weights[begin:, offsets[p] : offsets[p + 1]]
                torch.matmul(block[:, p - low], y.T, out=out)
        numbers = nodes[piece]
        at_nodes = torch.from_numpy(numbers).to(device)
        _push(influence, column_index[:last], weights, influence[at_nodes] + start[at_nodes])
        for q in np.unique(at):
            a, b = np.searchsorted(at, [q, q + 1])
            width = int(offsets[q + 1])
            rows.add(
                numbers[a:b],
                2 * layer + 1,
                columns[:width],
                weights[a:b, :width],
                readers.constant[a:b],
                readers.value[a:b],
                keep,
            )


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
