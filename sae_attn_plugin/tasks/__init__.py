"""Tasks with known roles, and what is measured on them.

``IOIDataset``: indirect object identification, with corrupted counterparts. ``InductionDataset``:
repeated tokens. ``metrics``: logit difference and its kin, and attention scores of every head.
"""

from __future__ import annotations

from sae_attn_plugin.tasks.induction import InductionDataset
from sae_attn_plugin.tasks.ioi import Dropped, IOIDataset, IOISample
from sae_attn_plugin.tasks.metrics import (
    TaskScores,
    end_logits,
    head_scores,
    ioi_scores,
    kl_divergence,
    logit_difference,
    pair_attention,
    probability,
    recovered_fraction,
)

__all__ = [
    "Dropped",
    "IOIDataset",
    "IOISample",
    "InductionDataset",
    "TaskScores",
    "end_logits",
    "head_scores",
    "ioi_scores",
    "kl_divergence",
    "logit_difference",
    "pair_attention",
    "probability",
    "recovered_fraction",
]
