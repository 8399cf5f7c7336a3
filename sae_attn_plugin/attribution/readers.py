"""Readers: the linear functionals of the residual stream that targets apply.

A feature reads the stream at every source position, through its heads:
``reader[h, p] = (pattern[h, q, p] / scale_p) * centre(gamma * (W_V^h w_h))``. A logit reads it at
its own position only, and so does what belongs to an MLP. Centring is left to the writers (see
``writers``).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_attn_plugin.attribution.frozen import (
    FrozenLayer,
    FrozenMlp,
    FrozenResidual,
    FrozenRun,
    LinearMlp,
)


@dataclass(frozen=True)
class FeatureReaders:
    """Readers of many features (or heads) of one layer.

    Attributes:
        heads: ``[target, head, d_model]``: ``gamma * (W_V^h w_h)``.
        position: ``[target]`` query positions.
        weights: ``[target, head, source]``: pattern / norm scale (and / SAE input scale).
        constant: ``[target]``: encoder bias, ``-b_dec . w``, value bias, norm bias.
        value: ``[target]``: the pre-activations, from z itself.
    """

    heads: Float[Tensor, "target head d_model"]
    position: Int[Tensor, " target"]
    weights: Float[Tensor, "target head source"]
    constant: Float[Tensor, " target"]
    value: Float[Tensor, " target"]


@dataclass(frozen=True)
class ReaderSet:
    """What the readers of many targets of one layer share; :meth:`part` gives those of some.

    Attributes:
        heads: ``[unique, head, d_model]``: ``gamma * (W_V^h w_h)``; of several targets with the
            same functional there is one.
        row: ``[target]`` into these; None: target ``i`` has row ``i``.
        position: ``[target]`` query positions.
        which: ``[target]``, the one head that each reads through; None: all heads.
        input_scale: ``[target]`` of the SAE, or None.
        constant, value: ``[target]``; without what value and norm biases add to the constant, which
            is ``value_bias [unique, head]`` times the pattern.
    """

    layer: FrozenLayer
    heads: Float[Tensor, "unique head d_model"]
    row: Int[Tensor, " target"] | None
    position: Int[Tensor, " target"]
    which: Int[Tensor, " target"] | None
    input_scale: Float[Tensor, " target"] | None
    constant: Float[Tensor, " target"]
    value_bias: Float[Tensor, "unique head"]
    value: Float[Tensor, " target"]

    def part(
        self,
        piece: slice = slice(None),
        n_sources: int | None = None,
        out: Float[Tensor, "target head d_model"] | None = None,
    ) -> FeatureReaders:
        """The readers of some targets.

        Args:
            n_sources: how many source positions the targets see; None: all.
            out: where ``heads`` may be written.
        """
        layer, at = self.layer, self.position[piece]
        if self.which is None:
            pattern = layer.pattern[:, :, :n_sources].index_select(1, at).transpose(0, 1)
        else:
            pattern = layer.pattern[self.which[piece], at, :n_sources][:, None]
        if self.input_scale is not None:
            pattern = pattern / self.input_scale[piece, None, None]
        row = piece if self.row is None else self.row[piece]
        if self.row is None:
            heads = self.heads[piece]
        else:
            out = None if out is None else out[: len(at)]
            heads = torch.index_select(self.heads, 0, self.row[piece], out=out)
        # What adds to it is the whole row of the pattern: sources not seen have none of it.
        bias = (pattern.sum(-1) * self.value_bias[row]).sum(-1)
        return FeatureReaders(
            heads=heads,
            position=at,
            weights=pattern / layer.scale[:n_sources, 0],
            constant=self.constant[piece] + bias,
            value=self.value[piece],
        )


@dataclass(frozen=True)
class ZReaders:
    """Readers of features of a layer as functionals of z, whatever their dictionary reads.

    ``value == constant + (encoder[row] * z[position]).sum() / scale``, up to rounding.

    Attributes:
        encoder: ``[unique, head, d_head]``.
        scale: ``[target]``: what the frozen normalisations divide by; None: nothing.
        constant, value: ``[target]``: what no head carries, and the pre-activation.
    """

    encoder: Float[Tensor, "unique head d_head"]
    scale: Float[Tensor, " target"] | None
    constant: Float[Tensor, " target"]
    value: Float[Tensor, " target"]


def z_readers(
    layer: FrozenLayer,
    unique: Int[Tensor, " unique"],
    row: Int[Tensor, " target"],
    positions: Int[Tensor, " target"],
) -> ZReaders:
    """The readers of features ``unique[row]`` at query positions."""
    dictionary, encoded = layer.dictionary, layer.encoded
    assert dictionary is not None
    assert encoded is not None
    encoder, c = dictionary.read(unique, layer.z.dtype)
    c, scale = c[row], z_scale(layer)[positions, 0]
    if dictionary.reads == "z":
        value = c + _dot(encoder.flatten(1), row, layer.z.flatten(1), positions) / scale
    else:
        assert layer.attn_out is not None
        input_scale = dictionary.input_scale(encoded.scale)[positions, 0]
        value = c + _dot(encoder, row, layer.attn_out, positions) / input_scale
        if layer.post_bias is not None:
            c = c + (encoder @ layer.post_bias)[row] / input_scale
        c = c + (layer.before(encoder) @ layer.weights.b_O)[row] / scale
        encoder = through_output(layer, encoder)
    scaled = dictionary.normalisation != "none" or layer.post_scale is not None
    return ZReaders(encoder, scale if scaled else None, c, value)


def _dot(
    left: Float[Tensor, "a d"],
    i: Int[Tensor, " target"],
    right: Float[Tensor, "b d"],
    j: Int[Tensor, " target"],
) -> Float[Tensor, " target"]:
    """``(left[i] * right[j]).sum(-1)``; indexing with a tensor takes five times as long."""
    return left.index_select(0, i).mul_(right.index_select(0, j)).sum(-1)


def through_output(
    layer: FrozenLayer, encoder: Float[Tensor, "n d_model"]
) -> Float[Tensor, "n head d_head"]:
    """Functionals of what attention adds to the stream as functionals of z, before the scale of a
    norm between the two."""
    return torch.einsum("nd,hed->nhe", layer.before(encoder), layer.weights.W_O)


def z_scale(layer: FrozenLayer) -> Float[Tensor, "position 1"]:
    """What readers of z of a layer's dictionary are divided by."""
    dictionary, encoded = layer.dictionary, layer.encoded
    assert dictionary is not None
    assert encoded is not None
    scale = dictionary.input_scale(encoded.scale)
    if dictionary.reads == "z" or layer.post_scale is None:
        return scale
    return scale * layer.post_scale


def feature_readers(
    layer: FrozenLayer, features: Int[Tensor, " target"], positions: Int[Tensor, " target"]
) -> ReaderSet:
    """The readers of features of a layer's dictionary at query positions.

    ``features`` may stay on the host: which of them are equal is then found without asking the
    device, which would have to finish first.
    """
    unique, row = (t.to(layer.z.device) for t in features.unique(return_inverse=True))
    of_z = z_readers(layer, unique, row, positions)
    heads, value_bias = _through_values(layer, of_z.encoder)
    return ReaderSet(
        layer=layer,
        heads=heads,
        row=row,
        position=positions,
        which=None,
        input_scale=of_z.scale,
        constant=of_z.constant,
        value_bias=value_bias,
        value=of_z.value,
    )


def _through_values(
    layer: FrozenLayer, encoder: Float[Tensor, "unique head d_head"]
) -> tuple[Float[Tensor, "unique head d_model"], Float[Tensor, "unique head"]]:
    """Functionals of z as functionals of the residual stream, and what the biases give them."""
    weights, n_heads = layer.weights, encoder.shape[1]
    groups, per_group = _groups(layer), n_heads // weights.W_V.shape[0]
    norm, bias, W_V = weights.norm, weights.b_V, weights.W_V
    if norm.bias is not None:
        bias = bias + norm.bias @ W_V
    if norm.weight is not None:
        W_V = W_V * norm.weight[:, None]
    heads = torch.empty(
        len(encoder), n_heads, W_V.shape[1], dtype=encoder.dtype, device=encoder.device
    )
    for head in range(n_heads):
        torch.matmul(encoder[:, head], W_V[head // per_group].T, out=heads[:, head])
    return heads, (encoder * bias[groups]).sum(-1)


def _groups(layer: FrozenLayer) -> Int[Tensor, " head"]:
    """The key/value group of each head."""
    n_heads, n_kv = layer.z.shape[1], layer.weights.W_V.shape[0]
    return torch.arange(n_heads, device=layer.z.device) // (n_heads // n_kv)


def head_readers(
    layer: FrozenLayer,
    heads: Int[Tensor, " target"],
    positions: Int[Tensor, " target"],
    directions: Float[Tensor, "target d_model"],
) -> ReaderSet:
    """The readers of ``direction . (what a head adds to the residual stream)``: one head each."""
    weights, group = layer.weights, _groups(layer)[heads]
    encoder = torch.einsum("td,ted->te", layer.before(directions), weights.W_O[heads])
    if layer.post_scale is not None:
        encoder = encoder / layer.post_scale[positions]
    vector = torch.einsum("te,tde->td", encoder, weights.W_V[group])
    bias = (encoder * weights.b_V[group]).sum(-1)
    if weights.norm.bias is not None:
        bias = bias + vector @ weights.norm.bias
    if weights.norm.weight is not None:
        vector = vector * weights.norm.weight
    return ReaderSet(
        layer=layer,
        heads=vector[:, None],
        row=None,
        position=positions,
        which=heads,
        input_scale=None,
        constant=torch.zeros_like(bias),
        value_bias=bias[:, None],
        value=(encoder * layer.z[positions, heads]).sum(-1),
    )


@dataclass(frozen=True)
class LocalReaders:
    """Functionals of the residual stream at the targets' own positions.

    Attributes:
        vectors: ``[target, d_model]``; constant, value: ``[target]``.
        centred: the stream is centred before it is read.
    """

    vectors: Float[Tensor, "target d_model"]
    constant: Float[Tensor, " target"]
    value: Float[Tensor, " target"]
    centred: bool


def mlp_feature_readers(
    mlp: FrozenMlp,
    features: Int[Tensor, " target"],
    positions: Int[Tensor, " target"],
    linear: LinearMlp | None,
) -> LocalReaders:
    """The readers of features of an MLP's dictionary; ``linear`` is needed for SAEs only."""
    dictionary, encoded = mlp.dictionary, mlp.encoded
    assert dictionary is not None
    assert encoded is not None
    dtype = mlp.out.dtype
    rows, c = dictionary.read(features, dtype)
    rows = rows / dictionary.input_scale(encoded.scale)[positions]
    value = c + (rows * mlp.read(dictionary)[positions]).sum(-1)
    if dictionary.kind == "tc":
        return _through_input(mlp, dictionary.reads, rows, positions, c, value)
    assert linear is not None
    readers = mlp_readers(mlp, positions, rows, linear)
    return replace(readers, constant=c + readers.constant, value=value)


def residual_readers(
    residual: FrozenResidual, features: Int[Tensor, " target"], positions: Int[Tensor, " target"]
) -> LocalReaders:
    """The readers of features of an SAE on the residual stream, which no norm stands before."""
    dictionary = residual.dictionary
    rows, constant = dictionary.read(features, residual.stream.dtype)
    rows = rows / dictionary.input_scale(residual.encoded.scale)[positions]
    value = constant + (rows * residual.stream[positions]).sum(-1)
    return LocalReaders(rows, constant, value, centred=False)


def mlp_readers(
    mlp: FrozenMlp,
    positions: Int[Tensor, " target"],
    directions: Float[Tensor, "target d_model"],
    linear: LinearMlp,
) -> LocalReaders:
    """The readers of ``direction . (what the MLP adds)``, activation ratios frozen."""
    value = (directions * mlp.out[positions]).sum(-1)
    constant, into = torch.zeros_like(value), directions
    if mlp.post_norm is not None and mlp.post_scale is not None:
        if mlp.post_norm.bias is not None:
            constant = directions @ mlp.post_norm.bias
        into = mlp.post_norm.before(directions) / mlp.post_scale[positions]
    constant = constant + (into * linear.constant[positions]).sum(-1)
    rows = ((into @ linear.W_out.T) * linear.ratio[positions]) @ linear.W_in.T
    return _through_input(mlp, "mlp_in", rows, positions, constant, value)


def skip_readers(
    mlp: FrozenMlp,
    positions: Int[Tensor, " target"],
    directions: Float[Tensor, "target d_model"],
) -> LocalReaders:
    """The readers of ``direction . (what a transcoder's skip connection adds)``."""
    dictionary = mlp.dictionary
    assert dictionary is not None
    assert dictionary.W_skip is not None
    assert mlp.skip is not None
    into = directions
    if dictionary.writes == "mlp_raw":
        assert mlp.post_norm is not None
        assert mlp.post_scale is not None
        into = mlp.post_norm.before(directions) / mlp.post_scale[positions]
    rows = into @ dictionary.W_skip.to(into.dtype).T
    value = (directions * mlp.skip[positions]).sum(-1)
    return _through_input(mlp, dictionary.reads, rows, positions, torch.zeros_like(value), value)


def _through_input(
    mlp: FrozenMlp,
    reads: str,
    rows: Float[Tensor, "target d_model"],
    positions: Int[Tensor, " target"],
    constant: Float[Tensor, " target"],
    value: Float[Tensor, " target"],
) -> LocalReaders:
    """Functionals of an MLP's input as functionals of the residual stream."""
    if reads == "mlp_stream":
        return LocalReaders(rows, constant, value, centred=False)
    if reads == "mlp_in":
        if mlp.norm.bias is not None:
            constant = constant + rows @ mlp.norm.bias
        if mlp.norm.weight is not None:
            rows = rows * mlp.norm.weight
    return LocalReaders(
        rows / mlp.scale[positions], constant, value, centred=mlp.norm.kind == "layer"
    )


@dataclass(frozen=True)
class StreamReader:
    """A functional of the final residual stream at one position: ``vector . x + constant``."""

    vector: Float[Tensor, " d_model"]
    position: int
    constant: float
    value: float


def logit_reader(
    run: FrozenRun, direction: Float[Tensor, " d_model"], position: int, bias: float = 0.0
) -> StreamReader:
    """``direction . final_norm(x) + bias``, with the norm's scale frozen.

    Args:
        direction: ``[d_model]``, in the space of the final norm's output: a column of W_U, or a
            difference of two.
    """
    norm, scale = run.final_norm, run.final_scale[position, 0]
    direction = direction.to(run.dtype)
    constant = bias + (float(direction @ norm.bias) if norm.bias is not None else 0.0)
    value = bias + float(direction @ norm.apply(run.resid_final[position], scale))
    vector = direction if norm.weight is None else direction * norm.weight
    return StreamReader(vector / scale, position, constant, value)
