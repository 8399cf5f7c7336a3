"""Which features fire where in rows of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from jaxtyping import Int
from torch import Tensor

from sae_attn_plugin.attribution.frozen import algebra_dtype
from sae_attn_plugin.backends.protocol import Site

if TYPE_CHECKING:
    from sae_attn_plugin.lens import FeatureLens

__all__ = ["fired"]


def fired(
    lens: FeatureLens, layers: Sequence[int], tokens: Int[Tensor, "row position"]
) -> dict[int, dict[str, Tensor]]:
    """Every firing of the SAEs of ``layers``, from one forward pass.

    Returns:
        By layer: ``row``, ``position``, ``feature``, ``activation``, each ``[firing]``, sorted by
        row and position.
    """
    dtype = algebra_dtype(lens.backend.geometry.dtype)
    device = lens.backend.geometry.device
    sites = {layer: Site(lens.dictionaries[layer].reads, layer) for layer in layers}
    run = lens.backend.forward(tokens, reads=list(sites.values()))
    length = tokens.shape[1]
    found = {}
    for layer in layers:
        read = run[sites[layer]].to(device, dtype).flatten(0, 1)
        encoded = lens.dictionaries[layer].encode(read)
        found[layer] = {
            "row": encoded.position // length,
            "position": encoded.position % length,
            "feature": encoded.feature,
            "activation": encoded.activation,
        }
    return found
