"""What dictionaries read in a run whose sites were read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from sae_attn_plugin.backends.protocol import (
    Geometry,
    LayerWeights,
    Norm,
    Site,
)
from sae_attn_plugin.backends.scores import ScoreWeights, check_weights, need_scores
from sae_attn_plugin.interventions import steps

if TYPE_CHECKING:
    from sae_attn_plugin.dictionaries import Dictionary
    from sae_attn_plugin.lens import FeatureLens, Run


def what_it_reads(
    lens: FeatureLens,
    dictionary: Dictionary,
    values: Mapping[Site, Tensor],
    scale: Tensor | None = None,
) -> Tensor:
    """What a dictionary reads on a run, ``[batch, position, ...]``: z as it stands, what attention
    makes of it, or what stands in front of the MLP.

    Args:
        scale: of the norm on the way, where it is held.
    """
    layer = dictionary.layer
    if dictionary.reads in ("resid_pre", "resid_mid"):
        sites = sites_of_stream(dictionary, lens.backend.geometry)
        return torch.stack([values[site] for site in sites]).sum(0)
    if dictionary.reads == "z":
        return values[Site("z", layer)]
    if dictionary.reads == "mlp_out":
        return values[Site("mlp_out", layer)]
    weights = lens.backend.layer_weights(layer)
    if dictionary.reads == "attn_out":
        raw = weights.attn_out(values[Site("z", layer)].to(weights.W_O))
        return raw if weights.post_norm is None else weights.post_norm.as_host(raw, scale)
    x = values[Site("resid_pre", layer)]
    if not lens.backend.geometry.parallel:
        x = x + values[Site("attn_out", layer)].to(x)
    dtype = torch.promote_types(x.dtype, torch.float32)
    norm = weights.mlp_norm or Norm("none")
    return steps.mlp_reader(lambda: x, dictionary.reads, norm, scale, dtype)()


def read_by(
    run: Run,
    dictionary: Dictionary,
    values: Mapping[Site, Tensor],
    held: Mapping[str, frozenset[int]],
) -> Float[Tensor, "batch position ..."]:
    """What a dictionary reads in a run whose sites were read, in float32 or float64.

    Args:
        held: by part, where it was held. Held attention is live in z still, and held norms keep
            their scale.
    """
    scale = None
    behind_norm = dictionary.reads not in ("resid_pre", "resid_mid")
    if behind_norm and dictionary.layer in held.get("norms", ()):
        weights = run.lens.backend.layer_weights(dictionary.layer)
        scale = _scale_before(run, dictionary, weights)
    read = what_it_reads(run.lens, dictionary, values, scale)
    return read.to(torch.promote_types(read.dtype, torch.float32))


@dataclass(frozen=True)
class CleanScores:
    """Queries and keys of a layer of the clean run, known to give the model's patterns.

    Attributes:
        weights: in float32 or float64.
        q, k: ``[batch, position, head, d_head]``, each head's own, normalised and rotated.
        scale: of the norm in front of attention; q_scale, k_scale: of the norms of queries and of
            keys, if the model has them.
    """

    weights: ScoreWeights
    q: Float[Tensor, "batch position head d_head"]
    k: Float[Tensor, "batch position head d_head"]
    scale: Tensor
    q_scale: Tensor | None
    k_scale: Tensor | None


def clean_scores(run: Run, layer: int) -> CleanScores:
    """Those of a layer, computed and checked once for a run.

    Raises:
        UnsupportedError, BackendError: scores of this model that are not known here.
    """
    if layer not in run._clean_scores:
        g = run.lens.backend.geometry
        dtype = torch.promote_types(g.dtype, torch.float32)
        weights = score_weights(run.lens, layer, run.tokens.shape[1])
        norm, x = run.lens.backend.layer_weights(layer).norm, run.capture["resid_pre", layer]
        normed = steps.norm_of(x.to(weights.W_Q), norm, None)
        (q, q_scale), (k, k_scale) = weights.queries(normed), weights.keys(normed)
        k = k.repeat_interleave(q.shape[2] // k.shape[2], 2)
        pattern = run.capture["pattern", layer].to(g.device, dtype)
        visible = steps.visible(pattern)
        for head in range(q.shape[2]):
            one, other = q[:, :, head], k[:, :, head]
            got = weights.pattern(one, other, head, visible)
            largest = weights.scale * float((one @ other.transpose(-1, -2)).abs().max())
            who = f"{g.model_name} on {run.lens.backend.host}, layer {layer}"
            check_weights(got, pattern[:, head], largest, weights, g.dtype, who)
        scale = scale_of(norm, x)
        run._clean_scores[layer] = CleanScores(weights, q, k, scale, q_scale, k_scale)
    return run._clean_scores[layer]


def queries_and_keys(
    run: Run, layer: int, resid_pre: Float[Tensor, "batch position d_model"], hold_norms: bool
) -> tuple[Tensor, Tensor]:
    """Each head's queries and keys ``[batch, position, head, d_head]`` of another stream.

    Args:
        hold_norms: whether the norm in front of attention, and those of queries and keys, have the
            scales of the clean run.
    """
    clean, norm = clean_scores(run, layer), run.lens.backend.layer_weights(layer).norm
    scale, of_q, of_k = (
        (clean.scale, clean.q_scale, clean.k_scale) if hold_norms else (None, None, None)
    )
    x = steps.norm_of(resid_pre.to(clean.q), norm, scale)
    q, k = clean.weights.queries(x, of_q)[0], clean.weights.keys(x, of_k)[0]
    return q, k.repeat_interleave(q.shape[2] // k.shape[2], 2)


def score_weights(lens: FeatureLens, layer: int, n_positions: int) -> ScoreWeights:
    """Those of a layer in float32 or float64."""
    g = lens.backend.geometry
    found = need_scores(lens.backend, layer, n_positions)
    return found.to(torch.promote_types(g.dtype, torch.float32), g.device)


def sites_of_stream(dictionary: Dictionary, geometry: Geometry) -> list[Site]:
    """Sites whose sum a residual SAE reads."""
    layer, last = dictionary.layer, geometry.n_layers - 1
    if dictionary.reads == "resid_mid":
        return [Site("resid_pre", layer), Site("attn_out", layer)]
    if layer <= last:
        return [Site("resid_pre", layer)]
    names = ["resid_pre", "attn_out", *["mlp_out"] * geometry.has_mlp]
    return [Site(name, last) for name in names]


def _scale_before(run: Run, dictionary: Dictionary, weights: LayerWeights) -> Tensor | None:
    """The clean scale of the norm on the way to what a dictionary reads."""
    layer, clean = dictionary.layer, run.capture
    if dictionary.reads == "attn_out" and weights.post_norm is not None:
        return scale_of(weights.post_norm, weights.attn_out(clean["z", layer].to(weights.W_O)))
    if dictionary.reads in ("mlp_in", "mlp_normalised") and weights.mlp_norm is not None:
        middle = clean["resid_pre", layer]
        if not run.lens.backend.geometry.parallel:
            middle = middle + clean["attn_out", layer]
        return scale_of(weights.mlp_norm, middle)
    return None


def scale_of(norm: Norm, clean: Tensor) -> Tensor:
    return norm.scale(clean.to(torch.promote_types(clean.dtype, torch.float32)))
