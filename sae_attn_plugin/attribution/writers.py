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

    vectors: WriterVectors
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
        index = torch.from_numpy(rows.astype(np.int64)).to(self.vectors.rows.device)
        vectors = self.vectors[index]
        return vectors if self.means is None else vectors + self.means[index][:, None]

    def of_kinds(self, kinds: Iterable[str]) -> np.ndarray:
        """``[writer]``: whether each is of one of these kinds."""
        return np.isin(self.kind, [_CODE[kind] for kind in kinds])


@dataclass
class _Part:
    """Writers of one kind and layer.

    ``vectors`` are ``[row, d_model]``; where ``row`` and ``strength`` are given, writer ``i`` is
    ``strength[i] * vectors[row[i]]``. A function is called when its rows are placed, so that no
    two large parts exist at once; ``n_rows`` then says how many it gives.
    """

    vectors: Tensor | Callable[[], Tensor]
    kind: str
    position: Tensor
    layer: int = -1
    index: Tensor | None = None
    activation: Tensor | None = None
    pre_activation: Tensor | None = None
    row: Tensor | None = None
    strength: Tensor | None = None
    n_rows: int = -1

    def __post_init__(self) -> None:
        if isinstance(self.vectors, Tensor):
            self.n_rows = len(self.vectors)


def write_table(
    run: FrozenRun,
    dense_bytes: int = _DENSE_BYTES,
    residuals: Sequence[FrozenResidual] = (),
) -> WriterTable:
    """Collect every writer of a frozen run.

    Args:
        run: the frozen run.
        residuals: places where an SAE splits the stream itself.
        dense_bytes: above this size, writers with the same direction share a row.
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
    return _assemble(parts, run, dense_bytes)


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

    def directions() -> Tensor:
        rows = dictionary.decoder(unique, dtype)
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
        n_rows=len(unique),
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


def _assemble(parts: list[_Part], run: FrozenRun, dense_bytes: int) -> WriterTable:
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
    vectors, means = _vectors(parts, order, run, dense_bytes)
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
    parts: list[_Part], order: np.ndarray, run: FrozenRun, dense_bytes: int
) -> tuple[WriterVectors, Float[Tensor, " writer"] | None]:
    """The vectors of all parts in the table's order, and what centring took from them."""
    device, d_model = run.embed.device, run.embed.shape[1]
    n_writers = len(order)
    shared = n_writers * d_model * run.embed.element_size() > dense_bytes
    n_rows = sum(part.n_rows for part in parts) if shared else n_writers
    rows = torch.empty(n_rows, d_model, dtype=run.dtype, device=device)
    place = np.empty(n_writers, dtype=np.int64)
    place[order] = np.arange(n_writers)
    places = torch.from_numpy(place).to(device)
    row = torch.empty(n_writers if shared else 0, dtype=torch.int64, device=device)
    strength = torch.ones(len(row), dtype=run.dtype, device=device)
    means = torch.zeros(n_writers, dtype=run.dtype, device=device)
    writer = filled = 0
    for part in parts:
        at = places[writer : writer + len(part.position)]
        writer += len(at)
        vectors = part.vectors if isinstance(part.vectors, Tensor) else part.vectors()
        # Centring is symmetric, so it moves from every reader to the writers, once.
        if run.normalization == "layer":
            mean = vectors.mean(-1)
            vectors = vectors - mean[:, None]
            means[at] = (
                mean
                if part.row is None or part.strength is None
                else mean[part.row] * part.strength
            )
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


def _depth(part: _Part) -> int:
    if part.layer < 0:
        return 0
    if part.kind.startswith(RESIDUAL_KINDS):
        return _APART + 2 * part.layer + (2 if part.kind.startswith("resid_mid") else 1)
    return 2 * part.layer + (1 if part.kind in _OF_ATTENTION else 2)
