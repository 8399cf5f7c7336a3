"""Where heads look between roles of a data set."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from sae_attn_plugin.backends.protocol import Site
from sae_attn_plugin.interventions.datasets import batches

if TYPE_CHECKING:
    from sae_attn_plugin.lens import FeatureLens
    from sae_attn_plugin.tasks.ioi import IOIDataset

__all__ = ["mean_attention"]


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
