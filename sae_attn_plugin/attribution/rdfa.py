"""Recursive DFA in closed form: one sweep from the top layer down, no autograd.

All targets of a layer are known once the layers above are done. Their readers are computed as one
batch, contracted with every active upstream writer as matrix products over the causal half, and
their influence is pushed to the sources; then the sweep goes one sublayer down: first the MLP of a
layer, then its attention.

A feature is a number, so its row explains its pre-activation. A node that passes on what it reads
(a head, a linearised MLP, a transcoder's skip connection) is a vector. Its row explains what it
gives to the roots: the vector times the gradient of the weighted roots at its place, through every
node that is expanded above it. That gradient is carried along in the sweep.

Where an SAE splits the residual stream itself, readers may take its terms in the writers' stead.
Then nothing of what they read reaches the writers, but through the SAE's own features where those
are expanded.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sae_attn_plugin.attribution.frozen import FrozenResidual, FrozenRun, LinearMlp
from sae_attn_plugin.attribution.qk import ScoreReader
from sae_attn_plugin.attribution.readers import (
    FeatureReaders,
    LocalReaders,
    ReaderSet,
    StreamReader,
    feature_readers,
    head_readers,
    mlp_feature_readers,
    mlp_readers,
    residual_readers,
    skip_readers,
)
from sae_attn_plugin.attribution.writers import LeanVectors, WriterTable
from sae_attn_plugin.errors import InputError
from sae_attn_plugin.nodes import PASSING_KINDS, RESIDUAL_KINDS, Feature

# Targets and source positions whose readers are formed together: enough for good matrix products,
# and no more, since larger blocks leave the cache (the best of those measured).
_TARGETS, _BLOCK = 320, 32
# Where writers have to be made first, more targets share them.
_TARGETS_LEAN = 2 * _TARGETS
# Targets whose own functionals are carried through the values together.
_READERS = 1024
# The part of a memory budget that work in flight may take, and what it can use at all.
_WORK_SHARE, _WORK_BYTES = 5, 256 * 2**20
# Numbers added up before the sum is continued in float64.
_FEW = 16
# What a target and a node cost on the host, whatever the edges; and what a single edge costs
# besides its weight: its row and its source.
_ROW_BYTES, _NODE_BYTES, _EDGE_BYTES = 96, 48, 8


@dataclass(frozen=True, eq=False)
class Block:
    """Edges from every source to every target of a block.

    Attributes:
        first: row of the block's first target in the :class:`Flow`; the others follow it.
        source: ``[source]`` nodes.
        weight: ``[source, target]``.
    """

    first: int
    source: np.ndarray
    weight: np.ndarray

    @property
    def rows(self) -> slice:
        return slice(self.first, self.first + self.weight.shape[1])

    def coo(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """``(row, source, weight)``, each ``[edge]``."""
        n_sources, n_targets = self.weight.shape
        rows = np.arange(self.first, self.first + n_targets, dtype=np.int32)
        return np.tile(rows, n_sources), np.repeat(self.source, n_targets), self.weight.ravel()


@dataclass(frozen=True, eq=False)
class Loose:
    """Single edges: ``row``, ``source`` and ``weight``, each ``[edge]``."""

    row: np.ndarray
    source: np.ndarray
    weight: np.ndarray

    @property
    def rows(self) -> np.ndarray:
        return self.row

    def coo(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return self.row, self.source, self.weight


@dataclass(frozen=True, eq=False)
class Flow:
    """Edges of a sweep, one row per target.

    Nodes ``0 .. len(writers) - 1`` are the writers' rows; roots that are no active writer follow.

    Attributes:
        roots: node of each root, in the order given.
        target: ``[row]`` node of each row; depth: ``[row]`` falls from row to row, and targets of
            one depth have no edges among them.
        pieces: the edges, those of deeper targets first.
        in_sum, abs_sum: ``[row]``, the sums of the row's edges and of their absolute values.
        constant, value, dropped: ``[row]``; ``dropped`` sums the edges left out of the row.
        root_weight: ``[node]``, the share of each root in the influence that starts the sweep.
        influence: ``[node]``.
        kept: how many of the strongest edges of each target are here at most; None: all.
        passing: expanded nodes that pass on what they read; directions: ``[passing, d_model]``, the
            gradient of the roots at each, which times the node's vector is the value of its row.
    """

    roots: tuple[int, ...]
    target: np.ndarray
    depth: np.ndarray
    pieces: tuple[Block | Loose, ...]
    in_sum: np.ndarray
    abs_sum: np.ndarray
    constant: np.ndarray
    value: np.ndarray
    dropped: np.ndarray
    root_weight: np.ndarray
    influence: np.ndarray
    passing: np.ndarray | None = None
    directions: np.ndarray | None = None
    kept: int | None = None

    @property
    def n_edges(self) -> int:
        return sum(piece.weight.size for piece in self.pieces)

    @cached_property
    def weight(self) -> np.ndarray:
        """``[edge]``; ``row`` and ``source`` are the edges' target rows and source nodes."""
        return _concatenate([piece.weight.ravel() for piece in self.pieces])

    @cached_property
    def row(self) -> np.ndarray:
        return _concatenate([piece.coo()[0] for piece in self.pieces])

    @cached_property
    def source(self) -> np.ndarray:
        return _concatenate([piece.coo()[1] for piece in self.pieces])


def row_sums(pieces: Iterable[Block | Loose], n_rows: int) -> np.ndarray:
    """``[row]``: the sum of each row's edges, in float64."""
    sums = np.zeros(n_rows)
    for piece in pieces:
        if isinstance(piece, Block):
            sums[piece.rows] += piece.weight.sum(0, dtype=np.float64)
        else:
            sums += np.bincount(piece.row, piece.weight, n_rows)
    return sums


def _concatenate(arrays: list[np.ndarray]) -> np.ndarray:
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


@dataclass
class _Batch:
    """The edges of some targets: dense blocks, or the strongest of each target.

    Attributes:
        first: row of the first target; own: ``[3, target]``: constant, value, and the sum of the
            edges that were left out; abs_sum: ``[target]`` of the edges here.
        source, weight: ``[target, edge]``, where only the strongest are kept; a target that has
            fewer is filled up with zeros.
    """

    first: int
    abs_sum: Tensor
    own: Tensor
    blocks: list[_Dense] | None
    source: Tensor | None = None
    weight: Tensor | None = None

    @property
    def n_targets(self) -> int:
        return len(self.abs_sum)

    @property
    def nbytes(self) -> int:
        """As they will be on the host: single edges carry their row and their source."""
        if self.blocks is not None:
            return sum(block.weight.nbytes for block in self.blocks)
        assert self.weight is not None
        return self.weight.numel() * (self.weight.element_size() + _EDGE_BYTES)

    def reduce(self, keep: int, work: int) -> None:
        """Keep the strongest edges of each target and sum the others.

        Args:
            keep: how many at most.
            work: bytes that may be used on the way.
        """
        if self.blocks is None:
            assert self.source is not None
            assert self.weight is not None
            if keep >= self.weight.shape[1]:
                return
            best = _strongest(self.weight, keep)
            self._replace(self.source.gather(1, best), self.weight.gather(1, best), self.weight)
            return
        size = sum(len(block.columns) for block in self.blocks)
        if keep >= size:
            return
        device = self.abs_sum.device
        columns = torch.from_numpy(np.concatenate([block.columns for block in self.blocks]))
        columns = columns.to(device)
        # the row, twice while its blocks are joined, and its absolute values; of the chosen ones,
        # values and places, sorted and not
        element = self.blocks[0].weight.element_size()
        at_once = max(1, work // (4 * element * size + (2 * element + 24) * keep))
        source = torch.empty(self.n_targets, keep, dtype=torch.int32, device=device)
        weight = torch.empty(self.n_targets, keep, dtype=self.blocks[0].weight.dtype, device=device)
        left = torch.empty(self.n_targets, dtype=torch.float64, device=device)
        for low in range(0, self.n_targets, at_once):
            some = slice(low, min(low + at_once, self.n_targets))
            dense = torch.cat([_widen(block, some) for block in self.blocks]).T
            best = _strongest(dense, keep)
            torch.gather(dense, 1, best, out=weight[some])
            source[some] = columns[best]
            left[some] = dense.sum(1, dtype=torch.float64)
        self.blocks = None
        self._replace(source, weight, left)

    def _replace(self, source: Tensor, weight: Tensor, before: Tensor) -> None:
        """``before``: the edges so far, or their sums."""
        before = before if before.ndim == 1 else before.sum(1, dtype=torch.float64)
        self.own[2] += before - weight.sum(1, dtype=torch.float64)
        self.abs_sum = weight.abs().sum(1, dtype=torch.float64)
        self.source, self.weight = source, weight

    def leave(self) -> tuple[list[Block | Loose], Tensor]:
        """The edges on the host, and their sum for each target."""
        sums = torch.zeros(self.n_targets, dtype=torch.float64)
        if self.blocks is not None:
            blocks: list[Block | Loose] = []
            for block in self.blocks:
                weight = block.weight.numpy(force=True)
                blocks.append(Block(self.first + block.begin, block.columns, weight))
                sums[block.begin :] += _column_sums(torch.from_numpy(weight))
            return blocks, sums
        assert self.source is not None
        assert self.weight is not None
        weight, source = self.weight.numpy(force=True), self.source.numpy(force=True)
        self.weight = self.source = None
        row = np.arange(self.first, self.first + len(weight), dtype=np.int32)
        live = weight != 0
        row = np.repeat(row, np.count_nonzero(live, axis=1))
        sums += torch.from_numpy(weight).sum(1, dtype=torch.float64)
        return [Loose(row, source[live], weight[live])], sums


def _column_sums(weight: Float[Tensor, "column target"]) -> Float[Tensor, " target"]:
    """In float64. Sums of a few are formed as they stand: converting every number costs more."""
    few = len(weight) // _FEW * _FEW
    sums = weight[:few].view(-1, _FEW, weight.shape[1]).sum(1).sum(0, dtype=torch.float64)
    return sums + weight[few:].sum(0, dtype=torch.float64)


def _strongest(weight: Tensor, keep: int) -> Tensor:
    """``[target, keep]``: places of the strongest edges, in their order."""
    return weight.abs().topk(keep, dim=1, sorted=False).indices.sort(dim=1).values


@dataclass
class _Rows:
    """Rows of the targets done so far, on the device; they leave it once, at the end.

    Attributes:
        keep: how many of the strongest edges of each target are kept; None: all. It falls when
            the edges would take more than ``limit`` bytes.
        most: how many rows there can be in the end.
        work: bytes that may be used besides; element_size: of a weight.
    """

    keep: int | None
    limit: int
    most: int
    work: int
    element_size: int
    target: list[np.ndarray] = field(default_factory=list)
    depth: list[np.ndarray] = field(default_factory=list)
    batches: list[_Batch] = field(default_factory=list)
    n_rows: int = 0
    nbytes: int = 0

    def add(
        self, target: np.ndarray, depth: int, blocks: list[_Dense], abs_sum: Tensor, own: Tensor
    ) -> None:
        """The rows of some targets.

        Args:
            blocks: their edges; abs_sum: ``[target]`` of these.
            own: ``[2, target]``: constant, value.
        """
        own = torch.cat([own.double(), torch.zeros_like(abs_sum)[None]])
        batch = _Batch(self.n_rows, abs_sum, own, blocks)
        if self.keep is not None:
            batch.reduce(self.keep, self.work)
            if batch.blocks is not None:  # what they are written in is used again
                batch.blocks = [b._replace(weight=b.weight.clone()) for b in blocks]
        self.batches.append(batch)
        self.target.append(target)
        self.depth.append(np.full(len(target), depth, dtype=np.int32))
        self.n_rows += len(target)
        self.nbytes += batch.nbytes
        if self.nbytes > self.limit:
            self._shrink()

    def _shrink(self) -> None:
        """Keep fewer edges of every target, so that half of the limit is free again, or that all
        that may come will fit."""
        per_edge = self.element_size + _EDGE_BYTES
        fair = self.limit // (per_edge * self.most)
        half = self.limit // (2 * per_edge * self.n_rows)
        self.keep = max(1, fair, half)
        for batch in self.batches:
            batch.reduce(self.keep, self.work)
        self.nbytes = sum(batch.nbytes for batch in self.batches)

    def finish(
        self,
        roots: Sequence[int],
        root_weight: np.ndarray,
        influence: Tensor,
        directions: Mapping[int, Tensor],
    ) -> Flow:
        """Everything to the host."""
        pieces: list[Block | Loose] = []
        in_sum: list[Tensor] = []
        abs_sum = torch.cat([batch.abs_sum for batch in self.batches]).numpy(force=True)
        own = torch.cat([batch.own for batch in self.batches], dim=1).numpy(force=True)
        for i in range(len(self.batches)):
            found, sums = self.batches[i].leave()
            pieces += found
            in_sum.append(sums)
        return Flow(
            roots=tuple(roots),
            target=np.concatenate(self.target),
            depth=np.concatenate(self.depth),
            pieces=tuple(pieces),
            in_sum=torch.cat(in_sum).numpy(),
            abs_sum=abs_sum,
            constant=own[0],
            value=own[1],
            dropped=own[2],
            root_weight=root_weight,
            influence=influence.numpy(force=True),
            passing=np.array(list(directions), dtype=np.int64) if directions else None,
            directions=torch.stack(list(directions.values())).numpy(force=True)
            if directions
            else None,
            kept=self.keep,
        )


class _Dense(NamedTuple):
    """Edges of a batch of targets from some writers, all of which the targets from ``begin`` on
    see. ``weight [column, target]``."""

    begin: int
    columns: np.ndarray
    weight: Tensor


def _widen(block: _Dense, some: slice) -> Tensor:
    """``[column, target]`` of some targets, with zeros for those that do not see the block."""
    unseen = max(0, min(block.begin, some.stop) - some.start)
    seen = block.weight[:, max(0, some.start - block.begin) : max(0, some.stop - block.begin)]
    return torch.nn.functional.pad(seen, (unseen, 0))


class _Scratch:
    """Tensors for what is used once and overwritten: fresh memory costs more than it is worth."""

    def __init__(self, like: Tensor) -> None:
        self._like, self._held = like, dict[str, Tensor]()

    def get(self, name: str, *shape: int) -> Tensor:
        """A tensor of this shape, with anything in it; the one before of this name is gone."""
        size = math.prod(shape)
        held = self._held.get(name)
        if held is None or len(held) < size:
            del held
            self._held.pop(name, None)  # before the next is there
            self._held[name] = held = self._like.new_empty(size)
        return held[:size].view(shape)


@dataclass
class _Sweep:
    """What the steps of one sweep share; ``influence`` and ``gradient`` grow on the way down.

    Attributes:
        start: ``[node]``, the roots' own influence.
        gradient: ``[position, d_model]`` of the weighted roots at the sublayer that the sweep has
            reached; None where nothing passes on what it reads, so that nothing asks for it.
        checkpoints: by depth of the readers, the positions ``[position]`` where they read terms of
            a residual SAE; at_checkpoint: the gradient that stays there.
        work: bytes for what is in flight.
    """

    run: FrozenRun
    writers: WriterTable
    rows: _Rows
    influence: Tensor
    start: Tensor
    gradient: Tensor | None
    work: int
    scratch: _Scratch
    checkpoints: Mapping[int, np.ndarray] = field(default_factory=dict)
    directions: dict[int, Tensor] = field(default_factory=dict)
    at_checkpoint: dict[int, Tensor] = field(default_factory=dict)

    def window(self, depth: int) -> tuple[np.ndarray, np.ndarray]:
        """``(first, count)``, each ``[position]``: rows of the terms of the stream that readers of
        this depth read."""
        first, count = self.writers.starts[:-1], self.writers.before(depth)
        if depth not in self.checkpoints:
            return first, count
        at, (first_apart, count_apart) = self.checkpoints[depth], self.writers.apart(depth)
        return np.where(at, first_apart, first), np.where(at, count_apart, count)

    def finish(self, nodes: np.ndarray, order: int, blocks: list[_Dense], own: Tensor) -> None:
        """Keep the rows of some targets, and hand their influence to their sources.

        Args:
            order: as of the writers; it falls from row to row.
            own: ``[2, target]``: constant and value.
        """
        strengths = self.absolute(blocks)
        total = torch.zeros(len(nodes), dtype=torch.float64, device=self.influence.device)
        for block, strength in zip(blocks, strengths, strict=True):
            total[block.begin :] += strength.sum(0)
        at = torch.from_numpy(nodes).to(self.influence.device)
        _push(self.influence, blocks, strengths, total, self.influence[at] + self.start[at])
        self.rows.add(nodes, order, blocks, total, own)

    def absolute(self, blocks: Sequence[_Dense]) -> list[Tensor]:
        """The absolute values of edges, ``[column, target]`` each; overwritten by the next ones."""
        sizes = [block.weight.numel() for block in blocks]
        parts = self.scratch.get("absolute", sum(sizes)).split(sizes)
        return [
            torch.abs(block.weight, out=part.view(block.weight.shape))
            for block, part in zip(blocks, parts, strict=True)
        ]

    def add(self, added: Tensor | None, depth: int) -> None:
        """Add to the gradient what readers of a depth read."""
        if self.gradient is None or added is None:
            return
        if depth in self.checkpoints:
            at = torch.from_numpy(self.checkpoints[depth]).to(added.device)[:, None]
            stays = torch.where(at, added, 0)
            before = self.at_checkpoint.get(depth)
            self.at_checkpoint[depth] = stays if before is None else before + stays
            added = torch.where(at, 0, added)
        self.gradient = self.gradient + added

    def add_score(self, root: ScoreReader, weight: float) -> None:
        """A score reads the stream before its own layer, so it joins the gradient there."""
        if self.gradient is None:
            return
        vectors = root.vectors.to(self.gradient)
        if self.writers.means is not None:
            vectors = vectors - vectors.mean(-1, keepdim=True)
        at = torch.tensor(root.positions, device=vectors.device)
        read = torch.zeros_like(self.gradient).index_add(0, at, weight * vectors)
        self.add(read, 2 * root.layer + 1)

    def slope(self, nodes: np.ndarray, checkpoint: int | None = None) -> Tensor | None:
        """``[target]``: the derivative of the weighted roots with respect to each row's value.

        Args:
            checkpoint: the depth where the targets split the stream, if they do.
        """
        if self.gradient is None:
            return None
        gradient = self.gradient
        if checkpoint is not None:
            gradient = self.at_checkpoint.get(checkpoint, torch.zeros_like(gradient))
        slope = self.start[torch.from_numpy(nodes).to(self.start.device)].to(self.gradient.dtype)
        inside = np.flatnonzero(nodes < len(self.writers))
        features = inside[~np.isnan(self.writers.activation[nodes[inside]])]
        rows = nodes[features]
        at = torch.from_numpy(self.writers.position[rows].astype(np.int64)).to(slope.device)
        written = _dot(self.writers, rows, gradient[at])
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
    residuals: Mapping[int, FrozenResidual] | None = None,
    checkpoints: Mapping[int, np.ndarray] | None = None,
    recurse: bool = False,
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
        memory_budget: bytes that may be held at once: the writers, the edges that are kept, and
            work in flight. Where all edges would take more, the strongest of each target are kept
            and the rest is summed in ``Flow.dropped``.
        progress: called with each layer when it is done.
        mlps: by layer, with activation ratios frozen: raw MLPs and SAEs on MLP outputs are then
            expanded through them. None: they are leaves.
        heads: heads of layers without an SAE are expanded through their patterns, else leaves.
        residuals: the stream split by residual SAEs, by depth of its readers; ``writers`` holds
            their terms.
        checkpoints: by depth, ``[position]``, where readers take those terms and not the writers.
        recurse: features of residual SAEs get in-edges from the writers, else they are leaves.

    Raises:
        InputError: a memory budget that even one edge for each target does not fit in.
    """
    n_layers, device = len(run.layers), run.embed.device
    numbers = _number_roots(writers, roots)
    n_nodes = max([len(writers), *(number + 1 for number in numbers)])
    root_weight = np.zeros(n_nodes)
    np.add.at(root_weight, numbers, np.asarray(root_weights, dtype=np.float64))
    kinds = ["attn", "tc", "tc_skip"] + ["mlp", "mlp_sae"] * (mlps is not None) + ["head"] * heads
    kinds += list(RESIDUAL_KINDS) * recurse
    expandable = writers.of_kinds(kinds)
    passing = writers.of_kinds([kind for kind in kinds if kind in PASSING_KINDS])
    most = int(expandable.sum())
    most = len(roots) + (most if node_budget is None else min(most, node_budget))
    work, limit = _divide(memory_budget, run, writers, n_nodes, most)
    state = _Sweep(
        run=run,
        writers=writers,
        rows=_Rows(edges_per_target, limit, most, work // 2, run.embed.element_size()),
        influence=torch.zeros(n_nodes, dtype=torch.float64, device=device),
        start=torch.from_numpy(root_weight).to(device),
        gradient=torch.zeros_like(run.embed) if passing.any() else None,
        work=work,
        scratch=_Scratch(run.embed),
        checkpoints=checkpoints or {},
    )
    last = 2 * n_layers + 1
    for number, root in zip(numbers, roots, strict=True):
        if isinstance(root, StreamReader):
            readers = LocalReaders(
                root.vector[None],
                torch.tensor([root.constant], dtype=torch.float64, device=device),
                torch.tensor([root.value], dtype=torch.float64, device=device),
                centred=True,
            )
            at, one = np.array([root.position]), np.array([number])
            window = state.window(last)
            found = _expand_local(state, 2 * last, one, at, lambda _, r=readers: r, window)
            state.add(found, last)
        elif isinstance(root, ScoreReader):
            columns, weights = root.edges(writers, *state.window(2 * root.layer + 1))
            own = torch.tensor([[root.constant], [root.value]], dtype=torch.float64, device=device)
            blocks = [_Dense(0, columns, weights[:, None])]
            # a root, which nothing reads
            state.finish(np.array([number]), 2 * last, blocks, own)

    remaining, waiting = node_budget, torch.zeros(())
    wanted_here = _roots_by_place(numbers, roots)

    def split_stream(depth: int) -> None:
        """Expand features of the residual SAE that readers of this depth may read."""
        nonlocal remaining
        if depth not in (residuals or {}):
            return
        assert residuals is not None
        chosen = _select(writers, state.influence, expandable, 2 * depth - 1, remaining, numbers)
        if remaining is not None:
            remaining -= len(chosen)
        dictionary = residuals[depth].dictionary
        wanted = wanted_here.get((dictionary.kind, dictionary.layer), {})
        _expand_residual(state, residuals[depth], *_sorted_targets(writers, chosen, wanted))

    split_stream(last)
    for depth in range(2 * n_layers, 0, -1):
        layer, of_mlp = (depth - 1) // 2, depth % 2 == 0
        before = state.gradient
        wanted: dict[int, Feature] = {}
        for kind in ("tc", "mlp_sae") if of_mlp else ("attn",):
            wanted |= wanted_here.get((kind, layer), {})
        chosen = _select(writers, state.influence, expandable, 2 * depth, remaining, numbers)
        if remaining is not None:
            remaining -= len(chosen)
        nodes, index, at = _sorted_targets(writers, chosen, wanted)
        if len(nodes):
            group = _expand_mlp if of_mlp else _expand_attention
            group(state, layer, nodes, index, at, mlps)
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
        split_stream(depth)
        if progress is not None and not of_mlp:
            progress(layer)
    return state.rows.finish(numbers, root_weight, state.influence, state.directions)


def _divide(
    memory_budget: int, run: FrozenRun, writers: WriterTable, n_nodes: int, n_rows: int
) -> tuple[int, int]:
    """``(work, limit)``: bytes for what is in flight and for the edges that are kept.

    Raises:
        InputError: if the budget leaves too little.
    """
    size = run.embed.element_size()
    n_heads = max([layer.z.shape[1] for layer in run.layers], default=1)
    held = writers.nbytes + n_nodes * _NODE_BYTES + n_rows * _ROW_BYTES
    free = memory_budget - held
    work = min(_WORK_BYTES, free // _WORK_SHARE)
    # One target: its row (and what the choice of its strongest edges takes), its readers.
    least = 2 * len(writers) * (4 * size + 8) + _reader_bytes(run, n_heads)
    # Beside the edges kept so far stand, for a moment, those that are kept from then on, half as
    # many, and the batch that made it necessary.
    limit, fewest = (free - 2 * work) * 2 // 3, n_rows * (size + _EDGE_BYTES)
    if work < least or limit < fewest:
        need = held + max(_WORK_SHARE * least, 2 * least + 3 * fewest)
        raise InputError(
            f"memory_budget={memory_budget}: attributing this prompt takes at least {need} bytes "
            f"({len(writers)} writers, up to {n_rows} targets); give more, or a smaller node_budget"
        )
    return work, limit


def _reader_bytes(run: FrozenRun, n_heads: int) -> int:
    """What the readers of one target take, at a block of source positions and at all."""
    d_model, positions = run.embed.shape[1], run.n_positions
    numbers = (2 * n_heads + _BLOCK + 2) * d_model + 4 * n_heads * positions
    return run.embed.element_size() * numbers


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


def _roots_by_place(
    numbers: Sequence[int], roots: Sequence[StreamReader | ScoreReader | Feature]
) -> dict[tuple[str, int], dict[int, Feature]]:
    """Features among the roots by kind and layer, each by its node number."""
    found: dict[tuple[str, int], dict[int, Feature]] = {}
    for number, root in zip(numbers, roots, strict=True):
        if isinstance(root, Feature):
            found.setdefault((root.kind, root.layer), {})[number] = root
    return found


def _sorted_targets(
    writers: WriterTable, chosen: np.ndarray, wanted: Mapping[int, Feature]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Nodes, features (or heads) and positions, sorted by position."""
    nodes = np.concatenate([chosen, list(wanted)]).astype(np.int64)
    index = np.concatenate([writers.index[chosen], [r.feature for r in wanted.values()]])
    at = np.concatenate([writers.position[chosen], [r.position for r in wanted.values()]])
    order = np.argsort(at, kind="stable")
    return nodes[order], index[order].astype(np.int64), at[order].astype(np.int64)


def _upstream(window: tuple[np.ndarray, np.ndarray], position: int) -> np.ndarray:
    first, count = (int(values[position]) for values in window)
    return np.arange(first, first + count, dtype=np.int32)


def _select(
    writers: WriterTable,
    influence: Tensor,
    expandable: np.ndarray,
    order: int,
    remaining: int | None,
    roots: Sequence[int],
) -> np.ndarray:
    """Nodes of one place in the writers' order that are expanded: those among the ``remaining``
    most influential of all pending ones, here and below. Roots are expanded anyway."""
    here = expandable & (writers.order == order)
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
    pending = np.concatenate([rows, np.flatnonzero(expandable & (writers.order < order))])
    if len(pending) <= remaining:
        return rows
    best = np.argsort(-strength[pending], kind="stable")[:remaining]
    return np.sort(pending[best[best < len(rows)]])


def _push(
    influence: Tensor,
    blocks: Sequence[_Dense],
    strengths: Sequence[Tensor],
    total: Tensor,
    target_influence: Tensor,
) -> None:
    """Hand each target's influence to its sources, in proportion to |edge|."""
    factor = torch.where(total > 0, target_influence / total, 0).to(blocks[0].weight.dtype)
    for block, strength in zip(blocks, strengths, strict=True):
        columns = torch.from_numpy(block.columns).to(influence.device)
        influence.index_add_(0, columns, (strength @ factor[block.begin :]).double())


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

    def readers(piece: slice) -> ReaderSet:
        which = torch.from_numpy(index[piece])
        at = torch.from_numpy(position[piece]).to(device)
        if frozen.dictionary is not None:
            return feature_readers(frozen, which, at)
        return head_readers(frozen, which.to(device), at, state.direction(nodes[piece]))

    state.add(_expand(state, layer, nodes, position, readers), 2 * layer + 1)


def _expand_residual(
    state: _Sweep,
    residual: FrozenResidual,
    nodes: np.ndarray,
    index: np.ndarray,
    position: np.ndarray,
) -> None:
    """In-edges of features of a residual SAE, from all that wrote the stream."""
    if not len(nodes):
        return
    depth, device = residual.depth, state.influence.device

    def readers(piece: slice) -> LocalReaders:
        features = torch.from_numpy(index[piece]).to(device)
        return residual_readers(residual, features, torch.from_numpy(position[piece]).to(device))

    window = state.writers.starts[:-1], state.writers.before(depth)
    added = _expand_local(state, 2 * depth - 1, nodes, position, readers, window, depth)
    if state.gradient is not None and added is not None:
        state.gradient = state.gradient + added


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
    reads = depth - 1 if state.run.parallel else depth
    window = state.window(reads)
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

        found.append(_expand_local(state, 2 * depth, of_group, at, readers, window))
    for added in found:  # not before all of this sublayer have asked for the gradient
        state.add(added, reads)


def _expand_local(
    state: _Sweep,
    order: int,
    nodes: np.ndarray,
    position: np.ndarray,
    make_readers: Callable[[slice], LocalReaders],
    window: tuple[np.ndarray, np.ndarray],
    checkpoint: int | None = None,
) -> Tensor | None:
    """In-edges of targets that read their own position only, sorted by position; returns what they
    add to the gradient.

    Args:
        window: the rows that make up the stream they read.
        checkpoint: the depth where the targets split the stream, if they do.
    """
    writers, device = state.writers, state.influence.device
    slope = state.slope(nodes, checkpoint)
    # the reader's way through an MLP, and its edges with their absolute values
    width = 4 * int(window[1].max()) + 16 * writers.vectors.shape[1]
    chunk = min(_READERS, max(1, state.work // (2 * state.run.embed.element_size() * width)))
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
        own = torch.stack([readers.constant, readers.value])
        for q in np.unique(at):
            a, b = np.searchsorted(at, [q, q + 1])
            columns = _upstream(window, int(q))
            if not len(columns):
                continue
            inside = slice(int(columns[0]), int(columns[-1]) + 1)
            weights = writers.vectors[inside] @ readers.vectors[a:b].T
            if not readers.centred and writers.means is not None:
                weights = weights + writers.means[inside, None] * readers.vectors[a:b].sum(-1)
            blocks = [_Dense(0, columns, weights)]
            state.finish(nodes[piece][a:b], order, blocks, own[:, a:b])
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
    make_readers: Callable[[slice], ReaderSet],
) -> Tensor | None:
    """In-edges of targets of attention of one layer, sorted by position; returns what they add to
    the gradient."""
    run, writers = state.run, state.writers
    window = state.window(2 * layer + 1)
    offsets = np.concatenate([[0], np.cumsum(window[1])])
    columns = np.concatenate([_upstream(window, p) for p in range(run.n_positions)])
    slope = state.slope(nodes)
    added = None if state.gradient is None else torch.zeros_like(state.gradient)
    n_heads, size = run.layers[layer].z.shape[1], run.embed.element_size()
    # Half of the work in flight is for the edges of these targets, with their absolute values or
    # the strongest of them, and for their readers at a block of positions; a quarter for what the
    # readers of more targets share.
    per_target = 2 * size * len(columns) + _reader_bytes(run, n_heads)
    most = _TARGETS_LEAN if isinstance(writers.vectors, LeanVectors) else _TARGETS
    chunk = min(most, max(1, state.work // (2 * per_target)))
    shared = state.work // (4 * size * (2 * n_heads + 4) * writers.vectors.shape[1])
    group = chunk * max(1, min(_READERS, shared) // chunk)
    for begin in range(0, len(nodes), group):
        end = min(begin + group, len(nodes))
        readers = make_readers(slice(begin, end))
        for first in range(begin, end, chunk):
            piece = slice(first, min(first + chunk, end))
            heads = state.scratch.get("heads", piece.stop - first, *readers.heads.shape[1:])
            n_sources = int(position[piece.stop - 1]) + 1
            part = readers.part(slice(first - begin, piece.stop - begin), n_sources, heads)
            sloped = None if slope is None else slope[piece]
            blocks = _contract(
                state, part, position[piece], window, offsets, columns, sloped, added
            )
            own = torch.stack([part.constant, part.value])
            state.finish(nodes[piece], 2 * (2 * layer + 1), blocks, own)
    if added is not None and writers.means is not None:  # attention reads the centred stream
        added -= added.mean(-1, keepdim=True)
    return added


def _contract(
    state: _Sweep,
    readers: FeatureReaders,
    at: np.ndarray,
    window: tuple[np.ndarray, np.ndarray],
    offsets: np.ndarray,
    columns: np.ndarray,
    slope: Tensor | None,
    added: Tensor | None,
) -> list[_Dense]:
    """Edges of a batch of targets at positions ``at`` (sorted), over the causal half only.

    ``added [position, d_model]`` is given the sum of the readers, times their ``slope [target]``.
    """
    heads, n_targets, (starts, counts) = readers.heads, len(at), window
    d_model = heads.shape[2]
    n_sources = int(at[-1]) + 1
    begins = np.searchsorted(at, np.arange(n_sources))  # earlier targets do not see the position
    ends = np.concatenate([[0], np.cumsum(counts[:n_sources] * (n_targets - begins))])
    size = int(ends[-1])
    # Rows of which only the strongest edges are kept leave nothing behind.
    flat = heads.new_empty(size) if state.rows.keep is None else state.scratch.get("flat", size)
    pieces = [
        flat[ends[p] : ends[p + 1]].view(int(counts[p]), n_targets - int(begins[p]))
        for p in range(n_sources)
    ]
    for low in range(0, n_sources, _BLOCK):
        high, begin = min(low + _BLOCK, n_sources), int(begins[low])
        # contiguous as the product writes it: torch splits any other batch into single products
        block = state.scratch.get("block", n_targets - begin, high - low, d_model)
        torch.bmm(readers.weights[begin:, :, low:high].transpose(1, 2), heads[begin:], out=block)
        if added is not None and slope is not None:
            added[low:high] += torch.einsum("t,tpd->pd", slope[begin:].to(block), block)
        for p, y in _writers_at(state, low, high, starts, counts, offsets, columns):
            torch.mm(y, block[int(begins[p]) - begin :, p - low].T, out=pieces[p])
    # neighbouring positions that the same targets see are one block
    bounds = [0, *(np.flatnonzero(np.diff(begins)) + 1).tolist(), n_sources]
    return [
        _Dense(
            int(begins[a]),
            columns[offsets[a] : offsets[b]],
            flat[ends[a] : ends[b]].view(-1, n_targets - int(begins[a])),
        )
        for a, b in itertools.pairwise(bounds)
    ]


def _writers_at(
    state: _Sweep,
    low: int,
    high: int,
    starts: np.ndarray,
    counts: np.ndarray,
    offsets: np.ndarray,
    columns: np.ndarray,
) -> Iterator[tuple[int, Float[Tensor, "writer d_model"]]]:
    """The writers at each position of a block; one that is made is overwritten by later ones."""
    vectors = state.writers.vectors
    if vectors.views:
        for p in range(low, high):
            yield p, vectors[int(starts[p]) : int(starts[p] + counts[p])]
        return
    # Several positions at once, which share products, as far as the work in flight allows.
    row_bytes = 4 * state.run.embed.element_size() * vectors.shape[1]
    most = max(1, state.work // (8 * row_bytes * max(1, int(counts[low:high].max()))))
    for a in range(low, high, most):
        b = min(a + most, high)
        key = torch.from_numpy(columns[offsets[a] : offsets[b]].astype(np.int64))
        out = state.scratch.get("writers", len(key), vectors.shape[1])
        y = vectors.gather(key.to(vectors.device), out)
        for p in range(a, b):
            yield p, y[offsets[p] - offsets[a] : offsets[p + 1] - offsets[a]]


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
            torch.from_numpy(feature[piece].astype(np.int64)),
            torch.from_numpy(position[piece].astype(np.int64)).to(device),
        ).part()
        rows = torch.from_numpy(source[piece].astype(np.int64)).to(device)
        at = torch.from_numpy(writers.position[source[piece]].astype(np.int64)).to(device)
        dots = torch.einsum("ed,ehd->eh", writers.vectors[rows], readers.heads)
        factor = readers.weights[torch.arange(len(rows), device=device), :, at]
        result.append((dots * factor).numpy(force=True))
    return np.concatenate(result) if result else np.zeros((0, n_heads))
