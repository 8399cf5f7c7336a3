"""Dictionaries of single heads, and of z without value biases, brought to the common form."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from sae_attn_plugin.backends.protocol import Backend, Geometry, LayerWeights
from sae_attn_plugin.errors import InputError, UnsupportedError

if TYPE_CHECKING:
    from sae_attn_plugin.dictionaries import Dictionary

__all__ = ["fit", "is_folded", "join", "only_head", "value_bias_part"]


def only_head(dictionary: Dictionary, head: int, geometry: Geometry) -> Dictionary:
    """A dictionary of one head's z as one of all heads: its rows are zero outside the head.

    Args:
        dictionary: with ``n_heads`` 1.
        head: which head it is of.
        geometry: of the model.

    Raises:
        InputError: no such head.
        UnsupportedError: a normalisation, which would have to be of that head alone.
    """
    g, d = geometry, dictionary
    if not 0 <= head < g.n_heads:
        raise InputError(
            f"the SAE {d.sae_id!r} is of head {head}, but {g.model_name} has heads "
            f"0..{g.n_heads - 1}"
        )
    if d.normalisation in ("layer_norm", "constant_norm_rescale"):
        raise UnsupportedError(
            f"the SAE {d.sae_id!r} of head {head} normalises its input ({d.normalisation}); SAEs "
            "of one head are supported without"
        )
    own = slice(head * g.d_head, (head + 1) * g.d_head)

    def widened(narrow: Tensor, dim: int) -> Tensor:
        shape = list(narrow.shape)
        shape[dim] = g.n_heads * g.d_head
        wide = narrow.new_zeros(shape)
        wide.narrow(dim, own.start, g.d_head).copy_(narrow)
        return wide

    return replace(
        d,
        n_heads=g.n_heads,
        W_enc=widened(d.W_enc, 0),
        W_dec=widened(d.W_dec, 1),
        b_dec=widened(d.b_dec, 0),
        b_in=None if d.b_in is None else widened(d.b_in, 0),
        activation=lambda pre, x: d.activation(pre, x[..., own]),
    )


def join(dictionaries: Sequence[Dictionary]) -> Dictionary:
    """Dictionaries of several heads of one layer as one: features one after the other, by head.

    ``metadata["heads"]`` says which features are whose: head, first feature, number of features
    and SAE id of each.

    Raises:
        InputError: two SAEs for the same head, or an SAE of all heads among them.
    """
    if len(dictionaries) == 1:
        return dictionaries[0]
    for one, other in itertools.pairwise(dictionaries):
        if None in (_head(one), _head(other)):
            raise InputError(
                f"two SAEs for hook_z of layer {one.layer}: {one.sae_id!r} and {other.sae_id!r}; "
                "give one, or one for each head"
            )
    parts = sorted(dictionaries, key=lambda d: _head(d) or 0)
    for one, other in itertools.pairwise(parts):
        if _head(one) == _head(other):
            raise InputError(
                f"two SAEs for head {_head(one)} of layer {one.layer}: {one.sae_id!r} and "
                f"{other.sae_id!r}; give one"
            )
    sizes, first = [d.d_sae for d in parts], parts[0]

    def scales(name: str) -> Tensor | None:
        found = [getattr(d, name) for d in parts]
        if all(scale is None for scale in found):
            return None
        filled = [
            d.b_dec.new_ones(d.d_sae) if scale is None else scale
            for d, scale in zip(parts, found, strict=True)
        ]
        return torch.cat(filled)

    def activation(pre: Tensor, x: Tensor) -> Tensor:
        pieces = zip(parts, pre.split(sizes, dim=-1), strict=True)
        return torch.cat([d.activation(piece, x) for d, piece in pieces], dim=-1)

    subtracted = [d.b_in for d in parts if d.b_in is not None]
    densities = [d.log_density for d in parts if d.log_density is not None]
    common = {
        key: value
        for key, value in first.metadata.items()
        if all(key in d.metadata and d.metadata[key] == value for d in parts)
    }
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return replace(
        first,
        architecture="+".join(dict.fromkeys(d.architecture for d in parts)),
        W_enc=torch.cat([d.W_enc for d in parts], dim=1),
        b_enc=torch.cat([d.b_enc for d in parts]),
        W_dec=torch.cat([d.W_dec for d in parts]),
        b_dec=sum((d.b_dec for d in parts[1:]), first.b_dec),
        b_in=sum(subtracted[1:], subtracted[0]) if subtracted else None,
        activation=activation,
        active=None,
        encoder_scale=scales("encoder_scale"),
        decoder_scale=scales("decoder_scale"),
        normalisation="none",  # what single heads may have changes nothing
        log_density=torch.cat(densities) if len(densities) == len(parts) else None,
        sae_id="+".join(d.sae_id for d in parts),
        metadata={
            **common,
            "heads": [
                {"head": _head(d), "first_feature": start, "d_sae": d.d_sae, "sae_id": d.sae_id}
                for d, start in zip(parts, starts, strict=True)
            ],
        },
    )


def _head(dictionary: Dictionary) -> int | None:
    return dictionary.metadata.get("hook_head_index")


# -- z without value biases -----------------------------------------------------------------------


def is_folded(metadata: Mapping[str, Any] | Any) -> bool:
    """Whether an SAE was trained on z from which value biases had been folded away.

    Known of the SAEs of Kissane et al., also where they were loaded by sae_lens alone. Set
    ``sae.cfg.metadata.value_biases`` to ``"folded"`` or ``"kept"`` to say so yourself.
    """
    said = metadata.get("value_biases")
    if said is not None:
        return said == "folded"
    return str(metadata.get("neuronpedia_id") or "").endswith("-att-kk")


def value_bias_part(weights: LayerWeights) -> Float[Tensor, "n_heads d_head"]:
    """What value biases and the norm's bias add to z: ``b_V + beta W_V``, by query head.

    A constant, since attention patterns sum to 1.
    """
    bias = weights.b_V
    if weights.norm.bias is not None:
        bias = bias + torch.einsum("d,kde->ke", weights.norm.bias.to(bias), weights.W_V)
    return bias.repeat_interleave(weights.W_O.shape[0] // len(bias), dim=0)


def fit(dictionaries: Mapping[int, Dictionary], backend: Backend) -> dict[int, Dictionary]:
    """Dictionaries as they read the z of this model, value biases in it.

    One that was trained on z without them keeps its features: the part is taken off what it reads
    and added to what it writes.
    """
    return {
        layer: _shifted(d, value_bias_part(backend.layer_weights(layer)))
        if is_folded(d.metadata) and getattr(d, "reads", "z") == "z"
        else d
        for layer, d in dictionaries.items()
    }


def _shifted(d: Dictionary, offset: Float[Tensor, "n_heads d_head"]) -> Dictionary:
    if d.normalisation in ("layer_norm", "constant_norm_rescale"):
        raise UnsupportedError(
            f"the SAE {d.sae_id!r} was trained on z without value biases and normalises its input "
            f"({d.normalisation}): it cannot be moved to z with them"
        )
    flat = offset.flatten().to(d.b_dec)
    if (head := _head(d)) is not None:
        own = torch.zeros_like(offset)
        own[head] = offset[head]
        flat = own.flatten().to(d.b_dec)
    elif "heads" in d.metadata:
        own = torch.zeros_like(offset)
        which = [part["head"] for part in d.metadata["heads"]]
        own[which] = offset[which]
        flat = own.flatten().to(d.b_dec)
    return replace(d, b_dec=d.b_dec + flat, b_in=flat if d.b_in is None else d.b_in + flat)
