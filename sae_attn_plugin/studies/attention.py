"""Where heads look between roles of a data set."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from sae_attn_plugin.backends.protocol import Site
from sae_attn_plugin.errors import InputError
from sae_attn_plugin.interventions.datasets import batches

if TYPE_CHECKING:
    from sae_attn_plugin.lens import FeatureLens
    from sae_attn_plugin.tasks.ioi import IOIDataset

__all__ = ["check_heads", "mean_attention"]


def check_heads(lens: FeatureLens, heads: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """``(layer, head)`` pairs, each once and in order.

    Raises:
        InputError: one that does not exist.
    """
    g = lens.backend.geometry
    found = sorted({(int(layer), int(head)) for layer, head in heads})
    for layer, head in found:
        if not (0 <= layer < g.n_layers and 0 <= head < g.n_heads):
            raise InputError(
                f"head {layer}.{head} does not exist: {g.model_name} has layers 0..{g.n_layers - 1}"
                f" with heads 0..{g.n_heads - 1}"
            )
    return found


def mean_attention(
    lens: FeatureLens, data: IOIDataset, query: str, key: str
) -> Float[Tensor, "layer head"]:
    """Mean attention from one role to another over the prompts; 0 where the key comes later."""
    g = lens.backend.geometry
    total = torch.zeros(g.n_layers, g.n_heads, dtype=torch.float64)
    for members in batches(lens, data):
        length = int(data.lengths[members[0]])
        tokens = data.tokens[members, :length].to(g.device)
        at = [data.positions[name][members] for name in (query, key)]
        run = lens.backend.forward(tokens, reads=[Site("pattern", x) for x in range(g.n_layers)])
        for layer in range(g.n_layers):
            pattern = run[Site("pattern", layer)].cpu().double()
            total[layer] += pattern[torch.arange(len(members)), :, at[0], at[1]].sum(0)
    return total / len(data)
