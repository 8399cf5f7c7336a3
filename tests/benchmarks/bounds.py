"""How much of the work upper bounds could save, measured: ``python -m tests.benchmarks bounds``.

The edges of a target from one source position are at most ``|reader| * sum of |writer|``, which
needs no product with the writers. Positions whose bounds together stay below a share of the
target's edges could be left out, were the ledger's and the influence's sums not wanted exactly.
"""

from __future__ import annotations

from typing import Any

import torch

from sae_attn_plugin.attribution.readers import feature_readers


def skippable(run: Any, share: float, per_layer: int = 40, seed: int = 0) -> tuple[float, float]:
    """The part of all edges in positions that can be left out so that at most ``share`` of the sum
    of a target's absolute edges is lost: by the bound, and by the edges themselves.

    Args:
        per_layer: targets drawn from each layer.
    """
    frozen, table = run.frozen, run.writers
    generator = torch.Generator().manual_seed(seed)
    edges = by_bound = by_truth = 0.0
    for number, layer in enumerate(frozen.layers):
        if layer.encoded is None or number == 0:
            continue
        some = torch.randperm(len(layer.encoded.feature), generator=generator)[:per_layer]
        part = feature_readers(
            layer, layer.encoded.feature[some], layer.encoded.position[some]
        ).part()
        reader = torch.einsum("thp,thd->tpd", part.weights, part.heads)
        upstream = table.prefix(number)
        bound, truth = (torch.zeros(reader.shape[:2], dtype=torch.float64) for _ in range(2))
        for p in range(frozen.n_positions):
            first = int(table.starts[p])
            y = table.vectors[first : first + int(upstream[p])]
            bound[:, p] = reader[:, p].norm(dim=-1) * y.norm(dim=-1).sum()
            truth[:, p] = (reader[:, p] @ y.T).abs().sum(-1)
        sizes = torch.from_numpy(upstream).double().expand_as(bound)
        seen = torch.arange(frozen.n_positions) <= part.position[:, None]
        allowed = share * truth.sum(1, keepdim=True)
        edges += float((sizes * seen).sum())
        by_bound += _left_out(bound, sizes, seen, allowed)
        by_truth += _left_out(truth, sizes, seen, allowed)
    return by_bound / edges, by_truth / edges


def _left_out(
    most: torch.Tensor, sizes: torch.Tensor, seen: torch.Tensor, allowed: torch.Tensor
) -> float:
    """Edges in the weakest positions of each target whose sum is allowed to go."""
    order = torch.where(seen, most, torch.inf).sort(dim=1)
    out = order.values.cumsum(1) <= allowed
    return float((sizes.gather(1, order.indices) * out).sum())
