"""Writers: the terms whose sum is the residual stream at a position."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_attn_plugin.attribution.frozen import (
    FrozenLayer,
    FrozenMlp,
    FrozenResidual,
    FrozenRun,
)
from sae_attn_plugin.backends.protocol import Norm
from sae_attn_plugin.dictionaries import Dictionary, Encoded
from sae_attn_plugin.nodes import FEATURE_KINDS, RESIDUAL_KINDS, Node

# Kinds by code, as stored in WriterTable.kind.
KINDS = (
    *("embed", "pos", "attn", "attn_bias", "attn_err", "head", "mlp"),
    *("tc", "tc_bias", "tc_err", "tc_skip", "mlp_sae", "mlp_sae_bias", "mlp_sae_err"),
    *(f"{kind}{part}" for kind in RESIDUAL_KINDS for part in ("", "_bias", "_err")),
)
_CODE = {kind: code for code, kind in enumerate(KINDS)}
_OF_ATTENTION = ("attn", "attn_bias", "attn_err", "head")
# What an SAE makes of the whole stream is no writer beside the others. It is kept behind them, out
# of reach of every prefix, for the readers that take it in their stead.
_APART = 2**20


# A table up to this size is written out; a larger one shares its rows.
_DENSE_BYTES = 256 * 2**20


@dataclass(frozen=True, eq=False)
class WriterVectors:
    """Vectors of all writers, ``[writer, d_model]``, centred where the model's norms centre.

    A feature writes the same direction wherever it is active, so in a long prompt its row is kept
    once: ``vectors[i] = strength[i] * rows[row[i]]``. Index it as a tensor's first dimension.

    Attributes:
        rows: ``[row, d_model]``.
        row, strength: ``[writer]``; None: every writer has its own row, as it is.
    """

    rows: Float[Tensor, "row d_model"]
    row: Int[Tensor, " writer"] | None = None
    strength: Float[Tensor, " writer"] | None = None

    def __len__(self) -> int:
        return len(self.rows if self.row is None else self.row)

    def __getitem__(self, key: int | slice | Tensor) -> Float[Tensor, "... d_model"]:
        if self.row is None or self.strength is None:
            return self.rows[key]
        # not in place: one row comes as a view
        return self.rows[self.row[key]] * self.strength[key][..., None]

    @property
    def shape(self) -> tuple[int, int]:
        return len(self), self.rows.shape[1]

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (self.rows, self.row, self.strength) if t is not None)

    @property
    def device(self) -> torch.device:
        return self.rows.device

    @property
    def views(self) -> bool:
        """Whether a slice of it is there already, and costs nothing."""
        return self.row is None

    def gather(
        self, key: Int[Tensor, " n"], out: Float[Tensor, "n d_model"]
    ) -> Float[Tensor, "n d_model"]:
        """``self[key]``, written to ``out``."""
        if self.row is None or self.strength is None:
            return torch.index_select(self.rows, 0, key, out=out)
        torch.index_select(self.rows, 0, self.row[key], out=out)
        return out.mul_(self.strength[key, None])

    def whole(self) -> WriterVectors:
        """With every row in memory."""
        return self


@dataclass(frozen=True, eq=False)
class LeanVectors:
    """As :class:`WriterVectors`, with the rows of features made from their dictionaries whenever
    they are asked for: for prompts and models whose rows would not fit in memory.

    Attributes:
        parts: by number; a tensor ``[row, d_model]``, or a function from features ``[n]`` to their
            rows ``[n, d_model]``. Neither is centred.
        part: ``[writer]``, the number of each writer's part; row: ``[writer]``, its row there, or
            its feature; strength: ``[writer]``.
        centred: rows are centred on their way out.
    """

    parts: tuple[Tensor | Callable[[Tensor], Tensor], ...]
    part: Int[Tensor, " writer"]
    row: Int[Tensor, " writer"]
    strength: Float[Tensor, " writer"]
    d_model: int
    centred: bool

    def __len__(self) -> int:
        return len(self.row)

    def __getitem__(self, key: int | slice | Tensor) -> Float[Tensor, "... d_model"]:
        if isinstance(key, slice):
            key = torch.arange(len(self), device=self.device)[key]
        if isinstance(key, int) or key.ndim == 0:
            return self[torch.as_tensor([int(key)], device=self.device)][0]
        return self.gather(key, self.strength.new_empty(len(key), self.d_model))

    @property
    def shape(self) -> tuple[int, int]:
        return len(self), self.d_model

    @property
    def nbytes(self) -> int:
        held = [part for part in self.parts if isinstance(part, Tensor)]
        return sum(t.nbytes for t in (*held, self.part, self.row, self.strength))

    @property
    def device(self) -> torch.device:
        return self.row.device

    @property
    def views(self) -> bool:
        return False

    def gather(
        self, key: Int[Tensor, " n"], out: Float[Tensor, "n d_model"]
    ) -> Float[Tensor, "n d_model"]:
        """``self[key]``, written to ``out``."""
        part, row = self.part[key], self.row[key]
        for number, rows in enumerate(self.parts):
            at = (part == number).nonzero()[:, 0]
            if not len(at):
                continue
            if isinstance(rows, Tensor):
                found = rows[row[at]]
            else:  # a feature that is active at several of these places is made once
                features, inverse = row[at].unique(return_inverse=True)
                found = rows(features)[inverse]
            out.index_copy_(0, at, found)
        if self.centred:
            out -= out.mean(-1, keepdim=True)
        return out.mul_(self.strength[key, None])

    def whole(self) -> WriterVectors:
        """With every row in memory."""
        return WriterVectors(self[:])


@dataclass(frozen=True)
class WriterTable:
    """Every writer of a frozen run, sorted by position, then by depth.

    Writers at position ``p`` are rows ``starts[p]:starts[p + 1]``; those a reader of layer ``l``
    sees are the first ``prefix(l)[p]`` of them. Where residual SAEs are given, the terms that those
    split the stream into stand behind them: :meth:`apart`.

    Attributes:
        vectors: ``[writer, d_model]``, centred where the model's norms centre what they read.
        kind: ``[writer]`` codes into :data:`KINDS`; layer: -1 for embeddings; index: feature or
            head, else -1; position; depth: 0 for embeddings, ``2l + 1`` attention of layer l,
            ``2l + 2`` its MLP; far above these for terms of residual SAEs.
        activation: feature activation, NaN for other kinds.
        starts: ``[positions + 1]``.
        means: ``[writer]``, what centring took from each coordinate; None where nothing is centred.
    """

    vectors: WriterVectors | LeanVectors
    kind: np.ndarray
    layer: np.ndarray
    index: np.ndarray
    position: np.ndarray
    depth: np.ndarray
    activation: np.ndarray
    pre_activation: np.ndarray
    starts: np.ndarray
    means: Float[Tensor, " writer"] | None = None

    def __len__(self) -> int:
        return len(self.kind)

    def prefix(self, layer: int) -> np.ndarray:
        """``[position]``: how many writers at each position feed attention of ``layer``.

        ``layer`` may be the number of layers: then all of them, what the final norm reads.
        """
        return self.before(2 * layer + 1)

    def before(self, depth: int) -> np.ndarray:
        """``[position]``: how many writers at each position come before ``depth``."""
        upstream = np.concatenate([[0], np.cumsum(self.depth < depth)])
        return upstream[self.starts[1:]] - upstream[self.starts[:-1]]

    def apart(self, depth: int) -> tuple[np.ndarray, np.ndarray]:
        """``(first, count)``, each ``[position]``: rows of the terms that a residual SAE splits the
        stream into where readers of this depth read it."""
        low, high = self.before(_APART + depth), self.before(_APART + depth + 1)
        return self.starts[:-1] + low, high - low

    @cached_property
    def order(self) -> np.ndarray:
        """``[writer]``: a sweep is through with larger ones first. A term of the stream comes
        between its readers and all that is written before."""
        apart = self.depth >= _APART
        return np.where(apart, 2 * (self.depth - _APART) - 1, 2 * self.depth)

    def node(self, row: int) -> Node:
        kind, layer = KINDS[self.kind[row]], int(self.layer[row])
        return Node(
            kind,
            int(self.position[row]),
            layer=layer if layer >= 0 else None,
            feature=int(self.index[row]) if kind in FEATURE_KINDS else None,
            head=int(self.index[row]) if kind == "head" else None,
        )

    def rows(self) -> dict[Node, int]:
        """The row of every writer, by node."""
        return {self.node(row): row for row in range(len(self))}

    def features_of(self, layer: int, kind: str = "attn") -> np.ndarray:
        """Rows of the features of a layer's attention (or MLP) dictionary."""
        return self._features.get((kind, layer), np.zeros(0, dtype=np.int64))

    @cached_property
    def _features(self) -> dict[tuple[str, int], np.ndarray]:
        found = {}
        for kind in FEATURE_KINDS:
            rows = np.flatnonzero(self.kind == _CODE[kind])
            layer = self.layer[rows]
            found |= {(kind, int(number)): rows[layer == number] for number in np.unique(layer)}
        return found

    def full(self, rows: np.ndarray) -> Float[Tensor, "row d_model"]:
        """Writers as they stand in the residual stream, before centring."""
        index = torch.from_numpy(rows.astype(np.int64)).to(self.vectors.device)
        vectors = self.vectors[index]
        return vectors if self.means is None else vectors + self.means[index][:, None]

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors and arrays."""
        arrays = (value for value in vars(self).values() if isinstance(value, np.ndarray | Tensor))
        return self.vectors.nbytes + sum(array.nbytes for array in arrays)

    def of_kinds(self, kinds: Iterable[str]) -> np.ndarray:
        """``[writer]``: whether each is of one of these kinds."""
        return np.isin(self.kind, [_CODE[kind] for kind in kinds])


@dataclass
class _Part:
    """Writers of one kind and layer.

    ``vectors`` are ``[row, d_model]``; where ``row`` and ``strength`` are given, writer ``i`` is
    ``strength[i] * vectors[row[i]]``. Of features it is a function from their numbers to their
    rows, called when those are placed, so that no two large parts exist at once; ``features`` are
    then those of the rows.
    """

    vectors: Tensor | Callable[[Tensor], Tensor]
    kind: str
    position: Tensor
    layer: int = -1
    index: Tensor | None = None
    activation: Tensor | None = None
    pre_activation: Tensor | None = None
    row: Tensor | None = None
    strength: Tensor | None = None
    features: Tensor | None = None

    @property
    def n_rows(self) -> int:
        given = self.vectors if isinstance(self.vectors, Tensor) else self.features
        assert given is not None
        return len(given)

    def make(self) -> Tensor:
        """``[row, d_model]``."""
        if isinstance(self.vectors, Tensor):
            return self.vectors
        assert self.features is not None
        return self.vectors(self.features)


def write_table(
    run: FrozenRun,
    dense_bytes: int = _DENSE_BYTES,
    residuals: Sequence[FrozenResidual] = (),
    at_most: int | None = None,
) -> WriterTable:
    """Collect every writer of a frozen run.

    Args:
        run: the frozen run.
        residuals: places where an SAE splits the stream itself.
        dense_bytes: above this size, writers with the same direction share a row.
        at_most: bytes for the vectors; where those would take more, rows of features are made
            whenever they are asked for. None: no limit.
    """
    everywhere = torch.arange(run.n_positions, device=run.embed.device)
    parts = [_Part(run.embed, "embed", everywhere)]
    if run.pos_embed is not None:
        parts.append(_Part(run.pos_embed, "pos", everywhere))
    for number, layer in enumerate(run.layers):
        parts += _attention_parts(number, layer, everywhere)
        if layer.mlp is not None:
            parts += _mlp_parts(number, layer.mlp, everywhere)
    for residual in residuals:
        parts += _residual_parts(residual, everywhere)
    return _assemble(parts, run, dense_bytes, at_most)


def _residual_parts(residual: FrozenResidual, everywhere: Tensor) -> list[_Part]:
    dictionary, encoded = residual.dictionary, residual.encoded
    kind, number = dictionary.kind, dictionary.layer
    bias = dictionary.bias(encoded.scale, encoded.mean)
    return [
        _feature_part(dictionary, encoded, number),
        _Part(bias, f"{kind}_bias", everywhere, number),
        _Part(residual.error, f"{kind}_err", everywhere, number),
    ]


def _attention_parts(number: int, layer: FrozenLayer, everywhere: Tensor) -> list[_Part]:
    weights = layer.weights
    bias = weights.b_O.expand(len(everywhere), -1)
    if layer.dictionary is not None and layer.dictionary.writes == "attn_out":
        return _attn_out_parts(number, layer, everywhere)
    if layer.dictionary is None or layer.encoded is None:
        n_heads = layer.z.shape[1]
        # One head at a time through its own slice of W_O.
        heads = torch.einsum("phe,hed->phd", layer.z, weights.W_O)
        position = everywhere.repeat_interleave(n_heads)
        vectors = layer.after(heads.flatten(0, 1), position)
        index = torch.arange(n_heads, device=everywhere.device).repeat(len(everywhere))
        parts = [_Part(vectors, "head", position, number, index)]
    else:
        dictionary, encoded = layer.dictionary, layer.encoded
        parts = [
            _feature_part(
                dictionary,
                encoded,
                number,
                weights.W_O.flatten(0, 1),
                weights.post_norm,
                layer.post_scale,
            ),
            _Part(layer.to_residual(layer.error, everywhere), "attn_err", everywhere, number),
        ]
        reconstruction_bias = dictionary.bias(encoded.scale, encoded.mean)
        bias = bias + reconstruction_bias.flatten(-2) @ weights.W_O.flatten(0, 1)
    bias = layer.after(bias, everywhere)
    if weights.post_norm is not None and weights.post_norm.bias is not None:
        bias = bias + weights.post_norm.bias
    return [*parts, _Part(bias, "attn_bias", everywhere, number)]


def _attn_out_parts(number: int, layer: FrozenLayer, everywhere: Tensor) -> list[_Part]:
    """What an SAE on attn_out splits is already in the residual stream, b_O with it."""
    dictionary, encoded = layer.dictionary, layer.encoded
    assert dictionary is not None
    assert encoded is not None
    return [
        _feature_part(dictionary, encoded, number),
        _Part(layer.error, "attn_err", everywhere, number),
        _Part(dictionary.bias(encoded.scale, encoded.mean), "attn_bias", everywhere, number),
    ]


def _feature_part(
    dictionary: Dictionary,
    encoded: Encoded,
    number: int,
    W_O: Float[Tensor, "d_in d_model"] | None = None,
    post_norm: Norm | None = None,
    post_scale: Float[Tensor, "position 1"] | None = None,
) -> _Part:
    """Features of a layer. ``W_O``, ``post_norm`` and its frozen scale are what their decoder rows
    go through on their way to the residual stream."""
    unique, inverse = encoded.feature.unique(return_inverse=True)
    strength = dictionary.strength(encoded)
    if post_norm is not None and post_scale is not None:
        strength = strength / post_scale[encoded.position, 0]
    dtype = encoded.activation.dtype

    def directions(features: Tensor) -> Tensor:
        rows = dictionary.decoder(features, dtype)
        if W_O is not None:
            rows = rows.flatten(-2) @ W_O
        return rows if post_norm is None else post_norm.linear(rows, rows.new_ones(()))

    return _Part(
        directions,
        dictionary.kind,
        encoded.position,
        number,
        encoded.feature,
        encoded.activation,
        encoded.pre_activation,
        row=inverse,
        strength=strength,
        features=unique,
    )


def _mlp_parts(number: int, mlp: FrozenMlp, everywhere: Tensor) -> list[_Part]:
    dictionary, encoded = mlp.dictionary, mlp.encoded
    if dictionary is None or encoded is None:
        return [_Part(mlp.out, "mlp", everywhere, number)]
    assert mlp.error is not None
    post = mlp.post_norm if dictionary.writes == "mlp_raw" else None
    features = _feature_part(dictionary, encoded, number, post_norm=post, post_scale=mlp.post_scale)
    bias = mlp.after(dictionary.bias(encoded.scale, encoded.mean), slice(None))
    if mlp.post_bias is not None:
        bias = bias + mlp.post_bias
    parts = [
        features,
        _Part(bias, f"{dictionary.kind}_bias", everywhere, number),
        _Part(mlp.error, f"{dictionary.kind}_err", everywhere, number),
    ]
    if mlp.skip is not None:
        parts.append(_Part(mlp.skip, "tc_skip", everywhere, number))
    return parts


def _assemble(
    parts: list[_Part], run: FrozenRun, dense_bytes: int, at_most: int | None
) -> WriterTable:
    def column(get: object, fill: float, dtype: type) -> np.ndarray:
        columns = []
        for part in parts:
            value = get(part)  # type: ignore[operator]
            size = len(part.position)
            columns.append(
                value.numpy(force=True)
                if isinstance(value, Tensor)
                else np.full(size, fill if value is None else value)
            )
        return np.concatenate(columns).astype(dtype)

    position = column(lambda part: part.position, -1, np.int32)
    depth = column(_depth, 0, np.int32)
    order = np.lexsort((depth, position))  # stable: features keep their order
    position = position[order]
    vectors, means = _vectors(parts, order, run, dense_bytes, at_most)
    return WriterTable(
        vectors=vectors,
        kind=column(lambda part: _CODE[part.kind], 0, np.int8)[order],
        layer=column(lambda part: part.layer, -1, np.int16)[order],
        index=column(lambda part: part.index, -1, np.int32)[order],
        position=position,
        depth=depth[order],
        activation=column(lambda part: part.activation, np.nan, np.float64)[order],
        pre_activation=column(lambda part: part.pre_activation, np.nan, np.float64)[order],
        starts=np.searchsorted(position, np.arange(run.n_positions + 1)),
        means=means,
    )


def _vectors(
    parts: list[_Part],
    order: np.ndarray,
    run: FrozenRun,
    dense_bytes: int,
    at_most: int | None,
) -> tuple[WriterVectors | LeanVectors, Float[Tensor, " writer"] | None]:
    """The vectors of all parts in the table's order, and what centring took from them."""
    device, d_model = run.embed.device, run.embed.shape[1]
    n_writers, size = len(order), run.embed.element_size()
    place = np.empty(n_writers, dtype=np.int64)
    place[order] = np.arange(n_writers)
    places = torch.from_numpy(place).to(device)
    limit = dense_bytes if at_most is None else min(dense_bytes, at_most)
    shared = n_writers * d_model * size > limit
    n_rows = sum(part.n_rows for part in parts) if shared else n_writers
    if shared and at_most is not None and n_rows * d_model * size + n_writers * 12 > at_most:
        return _lean_vectors(parts, places, run)
    rows = torch.empty(n_rows, d_model, dtype=run.dtype, device=device)
    row = torch.empty(n_writers if shared else 0, dtype=torch.int64, device=device)
    strength = torch.ones(len(row), dtype=run.dtype, device=device)
    means = torch.zeros(n_writers, dtype=run.dtype, device=device)
    writer = filled = 0
    for part in parts:
        at = places[writer : writer + len(part.position)]
        writer += len(at)
        vectors = part.make()
        # Centring is symmetric, so it moves from every reader to the writers, once.
        if run.normalization == "layer":
            mean = vectors.mean(-1)
            vectors = vectors - mean[:, None]
            means[at] = _of_writers(part, mean)
        if shared:
            rows[filled : filled + len(vectors)] = vectors
            own = torch.arange(len(vectors), device=device) if part.row is None else part.row
            row[at] = filled + own
            if part.strength is not None:
                strength[at] = part.strength
            filled += len(vectors)
        elif part.row is None or part.strength is None:
            rows[at] = vectors
        else:
            rows[at] = vectors[part.row].mul_(part.strength[:, None])
    found = WriterVectors(rows, row, strength) if shared else WriterVectors(rows)
    return found, means if run.normalization == "layer" else None


def _of_writers(part: _Part, values: Tensor) -> Tensor:
    """``[writer]`` from ``[row]``."""
    if part.row is None or part.strength is None:
        return values
    return values[part.row] * part.strength


def _lean_vectors(
    parts: list[_Part], places: Tensor, run: FrozenRun
) -> tuple[LeanVectors, Float[Tensor, " writer"] | None]:
    """:func:`_vectors` without rows of features."""
    n_writers, device, centred = len(places), run.embed.device, run.normalization == "layer"
    number = torch.empty(n_writers, dtype=torch.int16, device=device)
    row = torch.empty(n_writers, dtype=torch.int32, device=device)
    strength = torch.ones(n_writers, dtype=run.dtype, device=device)
    means = torch.zeros(n_writers if centred else 0, dtype=run.dtype, device=device)
    writer = 0
    for i, part in enumerate(parts):
        at = places[writer : writer + len(part.position)]
        writer += len(at)
        number[at] = i
        if isinstance(part.vectors, Tensor):
            own = torch.arange(part.n_rows, device=device)
            row[at] = (own if part.row is None else part.row).int()
        else:
            assert part.index is not None
            row[at] = part.index.int()
        if part.strength is not None:
            strength[at] = part.strength
        if centred:
            means[at] = _of_writers(part, _means(part))
    vectors = LeanVectors(
        tuple(part.vectors for part in parts), number, row, strength, run.embed.shape[1], centred
    )
    return vectors, means if centred else None


def _means(part: _Part, at_once: int = 1024) -> Tensor:
    """The mean coordinate of each row, ``[row]``, some rows at a time."""
    if isinstance(part.vectors, Tensor):
        return part.vectors.mean(-1)
    assert part.features is not None
    return torch.cat([part.vectors(some).mean(-1) for some in part.features.split(at_once)])


def _depth(part: _Part) -> int:
    if part.layer < 0:
        return 0
    if part.kind.startswith(RESIDUAL_KINDS):
        return _APART + 2 * part.layer + (2 if part.kind.startswith("resid_mid") else 1)
    return 2 * part.layer + (1 if part.kind in _OF_ATTENTION else 2)
