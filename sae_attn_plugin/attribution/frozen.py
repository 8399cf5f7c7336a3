"""The frozen run: one prompt, with attention patterns and norm scales held constant.

Everything downstream of it is linear. Only plain tensors live here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from sae_attn_plugin.backends.protocol import Backend, Capture, LayerWeights, Norm
from sae_attn_plugin.dictionaries import Dictionary, Encoded
from sae_attn_plugin.errors import InputError


@dataclass(frozen=True)
class FrozenLayer:
    """One layer of a frozen run.

    Attributes:
        weights: in the algebra's dtype.
        pattern: ``[head, query, key]``.
        v: ``[position, n_kv, d_head]``; z: ``[position, head, d_head]``.
        scale: ``[position, 1]``, the frozen scale of the norm before attention.
        post_scale: ``[position, 1]`` of the norm after attention, where there is one.
        mlp_out: ``[position, d_model]`` or None.
        dictionary, encoded: the layer's SAE and its features, or None.
        error: ``[position, head, d_head]``, z minus its reconstruction (all of z without an SAE).
    """

    weights: LayerWeights
    pattern: Float[Tensor, "head query key"]
    v: Float[Tensor, "position n_kv d_head"]
    z: Float[Tensor, "position head d_head"]
    scale: Float[Tensor, "position 1"]
    post_scale: Float[Tensor, "position 1"] | None
    mlp_out: Float[Tensor, "position d_model"] | None
    dictionary: Dictionary | None
    encoded: Encoded | None
    error: Float[Tensor, "position head d_head"]

    def to_residual(
        self, z: Float[Tensor, "n head d_head"], position: Tensor | slice
    ) -> Float[Tensor, "n d_model"]:
        """What ``z`` adds to the residual stream at ``position``, without b_O."""
        return self.after(z.flatten(-2) @ self.weights.W_O.flatten(0, 1), position)

    def after(
        self, out: Float[Tensor, "n d_model"], position: Tensor | slice
    ) -> Float[Tensor, "n d_model"]:
        """``out`` through the frozen post-norm, where the architecture has one."""
        if self.weights.post_norm is None or self.post_scale is None:
            return out
        return self.weights.post_norm.linear(out, self.post_scale[position])


@dataclass(frozen=True)
class FrozenRun:
    """A whole frozen run of one prompt.

    Attributes:
        embed, pos_embed: ``[position, d_model]``; the latter where positions are learned.
        final_norm, final_scale: the norm before the unembedding, and its scale ``[position, 1]``.
        W_U: ``[d_model, d_vocab]``; b_U: ``[d_vocab]`` or None.
        resid_final: ``[position, d_model]``.
    """

    layers: tuple[FrozenLayer, ...]
    embed: Float[Tensor, "position d_model"]
    pos_embed: Float[Tensor, "position d_model"] | None
    resid_final: Float[Tensor, "position d_model"]
    final_norm: Norm
    final_scale: Float[Tensor, "position 1"]
    W_U: Float[Tensor, "d_model d_vocab"]
    b_U: Float[Tensor, " d_vocab"] | None
    normalization: str

    @property
    def n_positions(self) -> int:
        return self.embed.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        return self.embed.dtype


def algebra_dtype(model_dtype: torch.dtype) -> torch.dtype:
    """float64 models are attributed in float64, everything else in float32."""
    return torch.float64 if model_dtype == torch.float64 else torch.float32


def freeze(
    backend: Backend, capture: Capture, dictionaries: Mapping[int, Dictionary], prompt: int = 0
) -> FrozenRun:
    """Freeze one prompt of a capture.

    Raises:
        InputError: if an activation is NaN or infinite, naming where it arose first.
    """
    g = backend.geometry
    dtype = algebra_dtype(g.dtype)

    def get(name: str, layer: int = -1) -> Tensor:
        value = capture[name, layer][prompt].to(g.device, dtype)
        if not torch.isfinite(value).all():
            where = name if layer < 0 else f"{name} of layer {layer}"
            raise InputError(f"{g.model_name}: {where} holds NaN or infinity on this prompt")
        return value

    layers = []
    for index in range(g.n_layers):
        weights = backend.layer_weights(index).to(dtype, g.device)
        resid_pre, z = get("resid_pre", index), get("z", index)
        dictionary = dictionaries.get(index)
        encoded = None if dictionary is None else dictionary.encode(z)
        post = weights.post_norm
        layers.append(
            FrozenLayer(
                weights=weights,
                pattern=get("pattern", index),
                v=get("v", index),
                z=z,
                scale=weights.norm.scale(resid_pre),
                post_scale=None if post is None else post.scale(weights.attn_out(z)),
                mlp_out=get("mlp_out", index) if g.has_mlp else None,
                dictionary=dictionary,
                encoded=encoded,
                error=z
                if dictionary is None or encoded is None
                else z - dictionary.decode(encoded),
            )
        )
    final_norm = backend.final_norm().to(dtype, g.device)
    resid_final = get("resid_final")
    W_U, b_U = backend.unembed()
    return FrozenRun(
        layers=tuple(layers),
        embed=get("embed"),
        pos_embed=get("pos_embed") if g.learned_positions else None,
        resid_final=resid_final,
        final_norm=final_norm,
        final_scale=final_norm.scale(resid_final),
        W_U=W_U.to(g.device),
        b_U=None if b_U is None else b_U.to(g.device),
        normalization=g.normalization,
    )
