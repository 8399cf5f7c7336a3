"""What is measured on the tasks: answers at the end of a prompt, and where each head attends.

Functions of tensors come first; below them, functions that run a model on a dataset. A model is a
``FeatureLens``, a backend, or anything ``FeatureLens`` takes. Prompts of equal length share a
forward pass and nothing is padded, so each gets the numbers it gets alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_attn_plugin.backends import as_backend
from sae_attn_plugin.backends.protocol import Backend, Site
from sae_attn_plugin.errors import InputError
from sae_attn_plugin.tasks.induction import InductionDataset
from sae_attn_plugin.tasks.ioi import IOIDataset
from sae_attn_plugin.tasks.rows import check_count
from sae_attn_plugin.tokens import check_ids

__all__ = [
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

_MEMORY = 512 * 2**20  # bytes that come back from one forward pass, unless a row takes more


# Functions of tensors ------------------------------------------------------------------------


def logit_difference(
    logits: Float[Tensor, "n d_vocab"], correct: Int[Tensor, " n"], wrong: Int[Tensor, " n"]
) -> Float[Tensor, " n"]:
    """Logit of ``correct`` minus logit of ``wrong``, per prompt; ``logits`` at one position each.

    Raises:
        InputError: shapes that do not fit each other, ids outside the vocabulary.
    """
    return _pick(logits, correct) - _pick(logits, wrong)


def probability(
    logits: Float[Tensor, "n d_vocab"], token: Int[Tensor, " n"]
) -> Float[Tensor, " n"]:
    """Probability of one token per prompt."""
    return _pick(_log_softmax(logits), token).exp()


def kl_divergence(
    clean: Float[Tensor, "n d_vocab"], edited: Float[Tensor, "n d_vocab"]
) -> Float[Tensor, " n"]:
    """KL(clean || edited) in nats, per prompt, from the logits of both."""
    if clean.shape != edited.shape:
        raise InputError(
            f"logits of equal shape are needed, got {list(clean.shape)} and {list(edited.shape)}"
        )
    p, q = _log_softmax(clean), _log_softmax(edited)
    # A token that is impossible in the clean run (logit -inf) adds nothing.
    return torch.where(p == -torch.inf, 0.0, p.exp() * (p - q)).sum(-1)


def recovered_fraction(
    clean: Float[Tensor, " n"], corrupted: Float[Tensor, " n"], edited: Float[Tensor, " n"]
) -> float:
    """``(edited - corrupted) / (clean - corrupted)`` of the means over prompts: 1 at the clean
    run, 0 at the corrupted one; below 0 and above 1 where the edit goes beyond them.

    The means come first, since a prompt on which clean and corrupted agree has no fraction.

    Raises:
        InputError: nothing to average, or the two means are equal.
    """
    if 0 in (clean.numel(), corrupted.numel(), edited.numel()):
        raise InputError("recovered_fraction needs at least one value of each kind")
    top, bottom, middle = (float(x.double().mean()) for x in (clean, corrupted, edited))
    if top == bottom:
        raise InputError(
            f"clean and corrupted both average {top:g}, so no fraction of their difference exists"
        )
    return (middle - bottom) / (top - bottom)


def pair_attention(
    pattern: Float[Tensor, "batch head query key"],
    row: Int[Tensor, " pair"],
    query: Int[Tensor, " pair"],
    key: Int[Tensor, " pair"],
) -> Float[Tensor, "pair head"]:
    """Attention of every head at given places: ``pattern[row, :, query, key]``."""
    return pattern[row, :, query, key]


def _pick(values: Tensor, token: Tensor) -> Tensor:
    if values.ndim != 2 or token.shape != values.shape[:1]:
        raise InputError(
            f"expected values [n, d_vocab] and one token id for each of n prompts, got "
            f"{list(values.shape)} and {list(token.shape)}"
        )
    if token.numel() and not 0 <= int(token.min()) <= int(token.max()) < values.shape[1]:
        raise InputError(f"token ids must lie in 0..{values.shape[1] - 1}")
    dtype = torch.promote_types(values.dtype, torch.float32)
    return values.to(dtype).gather(1, token.to(values.device)[:, None])[:, 0]


def _log_softmax(logits: Tensor) -> Tensor:
    # Sums over a vocabulary lose digits in half precision.
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


# A model on a dataset ------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class TaskScores:
    """Answers of a model to IOI prompts.

    Attributes:
        logit_difference: ``[n]`` logit of IO minus logit of S.
        probability: ``[n]`` of IO among all tokens.
        first: ``[n]`` whether IO is the most likely of all tokens.
    """

    logit_difference: Float[Tensor, " n"]
    probability: Float[Tensor, " n"]
    first: Tensor

    @property
    def accuracy(self) -> float:
        """Share of prompts whose most likely next token is IO."""
        return float(self.first.double().mean())

    @property
    def preferred(self) -> float:
        """Share of prompts on which IO is more likely than S."""
        return float((self.logit_difference > 0).double().mean())

    def __repr__(self) -> str:
        return (
            f"TaskScores({len(self.first)} prompts: accuracy {self.accuracy:.3f}, IO over S "
            f"{self.preferred:.3f}, logit difference {float(self.logit_difference.mean()):.3f}, "
            f"probability {float(self.probability.mean()):.3f})"
        )


def end_logits(
    model: Any, dataset: IOIDataset, batch_size: int | None = None
) -> Float[Tensor, "n d_vocab"]:
    """Logits at the last token of every prompt, as the model returns them.

    Args:
        batch_size: prompts per forward pass at most; None: so many that the logits take about half
            a gigabyte.

    Raises:
        InputError: prompts longer than the model's context, ids it does not have.
    """
    backend = backend_of(model)
    found: list[Tensor | None] = [None] * len(dataset)
    for members, tokens in batches(backend, dataset, batch_size, patterns=False):
        last = backend.forward(tokens)[Site("logits")][:, -1]
        for i, row in zip(members.tolist(), last, strict=True):
            found[i] = row.clone()  # not the whole batch's logits with it
    return torch.stack([row for row in found if row is not None])


def ioi_scores(model: Any, dataset: IOIDataset, batch_size: int | None = None) -> TaskScores:
    """Logit difference, probability and accuracy on IOI prompts; see :func:`end_logits`."""
    logits = end_logits(model, dataset, batch_size)
    correct, wrong = dataset.correct.to(logits.device), dataset.wrong.to(logits.device)
    return TaskScores(
        logit_difference(logits, correct, wrong),
        probability(logits, correct),
        logits.argmax(-1) == correct,
    )


def head_scores(
    model: Any, dataset: InductionDataset | IOIDataset, batch_size: int | None = None
) -> pd.DataFrame:
    """Where every head attends, as mean attention weights: rows ``(layer, head)``, columns

    - ``induction``: from each destination to its source, the token after the earlier copy (on IOI
      prompts: from S2 to S1+1);
    - ``duplicate_token``: from each destination to the earlier copy itself (S2 to S1);
    - ``previous_token``: from each position to the one before it, where that is neither missing
      nor the first of the row, which heads attend to for want of anything better.

    Means are over all repeats of the dataset, and over all positions for ``previous_token``.

    Args:
        batch_size: rows per forward pass at most; None: so many that patterns and logits take about
            half a gigabyte.

    Raises:
        InputError: rows longer than the model's context, ids it does not have.
    """
    backend = backend_of(model)
    g = backend.geometry
    sites = [Site("pattern", layer) for layer in range(g.n_layers)]
    names = ("induction", "duplicate_token", "previous_token")
    sums = {name: torch.zeros(g.n_layers, g.n_heads, dtype=torch.float64) for name in names}
    counts: dict[str, int] = dict.fromkeys(names, 0)
    repeats = dataset.repeats()
    for members, tokens in batches(backend, dataset, batch_size, patterns=True):
        here = {int(row): i for i, row in enumerate(members)}
        mine = repeats[torch.isin(repeats[:, 0], members)]
        row = torch.tensor([here[int(r)] for r in mine[:, 0]], dtype=torch.long)
        later = torch.arange(2, tokens.shape[1])
        every = torch.arange(len(tokens)).repeat_interleave(len(later))
        later = later.repeat(len(tokens))
        places = {
            "induction": (row, mine[:, 1], mine[:, 2]),
            "duplicate_token": (row, mine[:, 1], mine[:, 2] - 1),
            "previous_token": (every, later, later - 1),
        }
        found = backend.forward(tokens, reads=sites)
        for name, (rows, query, key) in places.items():
            counts[name] += len(rows)
            for layer, site in enumerate(sites):
                pattern = found[site]
                at = (index.to(pattern.device) for index in (rows, query, key))
                sums[name][layer] += pair_attention(pattern, *at).double().sum(0).cpu()
    return pd.DataFrame(
        {name: (sums[name] / max(counts[name], 1)).flatten().numpy() for name in names},
        index=pd.MultiIndex.from_product(
            [range(g.n_layers), range(g.n_heads)], names=["layer", "head"]
        ),
    )


def backend_of(model: Any) -> Backend:
    """The backend of a ``FeatureLens``, or of any model."""
    from sae_attn_plugin.lens import FeatureLens  # the lens stands above the tasks

    return model.backend if isinstance(model, FeatureLens) else as_backend(model)


def batches(
    backend: Backend,
    dataset: InductionDataset | IOIDataset,
    batch_size: int | None,
    *,
    patterns: bool,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Groups of the dataset on the model's device, checked against the model.

    Args:
        patterns: whether the attention patterns of all layers are read, as well as the logits.
    """
    g = backend.geometry
    if batch_size is not None:
        check_count(batch_size, "batch_size")
    for members, tokens in dataset.groups():
        length = tokens.shape[1]
        numbers = length * (g.d_vocab + patterns * g.n_layers * g.n_heads * length)
        fitting = max(1, _MEMORY // (numbers * g.dtype.itemsize))
        for part in torch.arange(len(members)).split(min(fitting, batch_size or fitting)):
            yield members[part], check_ids(tokens[part], g.d_vocab, g.n_ctx, g.device)
