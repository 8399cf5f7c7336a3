"""Readers: the linear functionals of the residual stream that targets apply.

A feature reads the stream at every source position, through its heads:
``reader[h, p] = (pattern[h, q, p] / scale_p) * centre(gamma * (W_V^h w_h))``. A logit reads it at
its own position only. Centring is left to the writers (see ``writers``).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_attn_plugin.attribution.frozen import FrozenLayer, FrozenRun


@dataclass(frozen=True)
class FeatureReaders:
    """Readers of many features of one layer.

    Attributes:
        heads: ``[unique, head, d_model]``: ``gamma * (W_V^h w_h)``, one row per distinct feature.
        row: ``[target]`` into ``heads``.
        position: ``[target]`` query positions.
        weights: ``[target, head, source]``: pattern / norm scale (and / SAE input scale).
        constant: ``[target]``: encoder bias, ``-b_dec . w``, value bias, norm bias.
        value: ``[target]``: the pre-activations, from z itself.
    """

    heads: Float[Tensor, "unique head d_model"]
    row: Int[Tensor, " target"]
    position: Int[Tensor, " target"]
    weights: Float[Tensor, "target head source"]
    constant: Float[Tensor, " target"]
    value: Float[Tensor, " target"]


def feature_readers(
    layer: FrozenLayer, features: Int[Tensor, " target"], positions: Int[Tensor, " target"]
) -> FeatureReaders:
    """The readers of features of a layer's dictionary at query positions."""
    dictionary, encoded, weights = layer.dictionary, layer.encoded, layer.weights
    assert dictionary is not None
    assert encoded is not None
    dtype, n_heads = layer.z.dtype, layer.z.shape[1]
    unique, row = features.unique(return_inverse=True)
    encoder = dictionary.encoder(unique, dtype)
    groups = torch.arange(n_heads, device=layer.z.device) // (n_heads // weights.W_V.shape[0])
    heads = torch.empty(
        len(unique), n_heads, weights.W_V.shape[1], dtype=dtype, device=layer.z.device
    )
    for head, group in enumerate(groups.tolist()):
        torch.matmul(encoder[:, head], weights.W_V[group].T, out=heads[:, head])
    value_bias = torch.einsum("uhe,he->uh", encoder, weights.b_V[groups])
    norm = weights.norm
    if norm.bias is not None:
        value_bias = value_bias + heads @ norm.bias
    if norm.weight is not None:
        heads *= norm.weight
    input_scale = dictionary.input_scale(encoded.scale)[positions, 0]
    pattern = layer.pattern[:, positions].transpose(0, 1) / input_scale[:, None, None]
    c = dictionary.constants(unique, dtype)
    return FeatureReaders(
        heads=heads,
        row=row,
        position=positions,
        weights=pattern / layer.scale[:, 0],
        constant=c[row] + (pattern.sum(-1) * value_bias[row]).sum(-1),
        value=c[row] + (encoder[row] * layer.z[positions]).sum((-2, -1)) / input_scale,
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
