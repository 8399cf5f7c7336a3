"""Interventions over a data set, a batch at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from sae_attn_plugin.errors import InputError
from sae_attn_plugin.interventions.edits import Edit
from sae_attn_plugin.statistics import Interval, bootstrap
from sae_attn_plugin.tasks.rows import check_count

if TYPE_CHECKING:
    from sae_attn_plugin.interventions.apply import Frozen
    from sae_attn_plugin.lens import Dataset, FeatureLens

_MEMORY = 512 * 2**20  # bytes of one batch's clean run, unless a prompt takes more


@dataclass(frozen=True, eq=False)
class DatasetResult:
    """What edits do to the metric of a data set, prompt by prompt.

    Attributes:
        clean, edited: ``[n]``: the logit difference of an IOI prompt; the mean log-probability, in
            nats, of the repeated tokens of a row of repeats. NaN for a row without any.
        edits: what was changed.
    """

    clean: Float[Tensor, " n"]
    edited: Float[Tensor, " n"]
    edits: tuple[Edit, ...] = ()

    @property
    def effect(self) -> Float[Tensor, " n"]:
        """Edited minus clean, per prompt."""
        return self.edited - self.clean

    @property
    def mean_effect(self) -> float:
        """Mean of ``effect``."""
        return float(self.effect.nanmean())

    def interval(self, level: float = 0.95) -> Interval:
        """The mean effect with its bootstrap interval over prompts (rows without an answer left
        out)."""
        effect = self.effect.numpy(force=True)
        return bootstrap(effect[~np.isnan(effect)], level=level)

    @property
    def table(self) -> pd.DataFrame:
        """One row per prompt: ``clean, edited, effect``."""
        columns = {"clean": self.clean, "edited": self.edited, "effect": self.effect}
        frame = pd.DataFrame({name: x.numpy(force=True) for name, x in columns.items()})
        return frame.rename_axis("prompt")

    def __repr__(self) -> str:
        return (
            f"DatasetResult({len(self.clean)} prompts: {float(self.clean.nanmean()):.4f} clean, "
            f"{float(self.edited.nanmean()):.4f} edited, effect {self.interval()})"
        )


def intervene_dataset(
    lens: FeatureLens,
    dataset: Dataset,
    edits: Sequence[Edit] | Mapping[str, Sequence[Edit]],
    freeze: Frozen = (),
    *,
    sources: Mapping[str, Any] | None = None,
    batch_size: int | None = None,
    progress: bool | None = None,
) -> DatasetResult | dict[str, DatasetResult]:
    """Edit every prompt of a data set and measure its metric with and without.

    Prompts of equal length share forward passes; nothing is padded. A role in an edit stands where
    it stands in each prompt.

    Args:
        dataset: ``IOIDataset`` or ``InductionDataset``.
        edits: one list of edits, or several by name, which share the clean runs.
        freeze: as in ``lens.intervene``.
        sources: by name, runs or data sets with as many prompts (or one), such as
            ``dataset.abc()``; a :class:`Mean` is taken over the whole source.
        batch_size: prompts per forward pass at most; None: so many that a batch's clean run takes
            about half a gigabyte.
        progress: show a bar; None: on a terminal.

    Returns:
        A :class:`DatasetResult`, or one for each name.

    Raises:
        InputError: what does not fit, before anything is run for long.
    """
    from sae_attn_plugin.interventions.apply import resolve_freeze
    from sae_attn_plugin.interventions.plan import Plan
    from sae_attn_plugin.interventions.sources import Sources

    if batch_size is not None:
        check_count(batch_size, "batch_size")
    named = {"": edits} if not isinstance(edits, Mapping) else edits
    sets = {
        name: [given] if isinstance(given, Edit) else list(given) for name, given in named.items()
    }
    if not sets:
        raise InputError("no edits given; expected a list, or lists by name")
    for edit in (edit for given in sets.values() for edit in given):
        if not isinstance(edit, Edit):
            raise InputError(f"expected an edit such as AblateFeature(...), got {edit!r}")
    held = resolve_freeze(freeze, lens.backend.geometry.n_layers)
    given = Sources(lens, sources or {})
    n = len(dataset)
    dtype = torch.promote_types(lens.backend.geometry.dtype, torch.float32)
    clean = torch.full((n,), torch.nan, dtype=dtype)
    edited = {name: clean.clone() for name in sets}
    disable = None if progress is None else not progress
    with tqdm(total=n * len(sets), desc="intervening", disable=disable, leave=False) as bar:
        for members in batches(lens, dataset, batch_size=batch_size):
            run = lens.run_rows(dataset, members)
            clean[members] = run.roles.score(run.logits).to(clean)
            for name, of_set in sets.items():
                plan = Plan(lens, run, held, of_set, given, members, n)
                edited[name][members] = plan.run_once().metric.to(clean)
                bar.update(len(members))
    results = {
        name: DatasetResult(clean, edited[name], tuple(of_set)) for name, of_set in sets.items()
    }
    return results if isinstance(edits, Mapping) else results[""]


def batches(
    lens: FeatureLens,
    dataset: Dataset,
    members: Sequence[int] | None = None,
    batch_size: int | None = None,
) -> Iterator[list[int]]:
    """Prompt numbers of a data set in groups of equal length, shortest first, of a size whose clean
    run fits in memory."""
    g = lens.backend.geometry
    lengths = dataset.lengths.tolist()
    chosen = range(len(dataset)) if members is None else members
    for length in sorted({lengths[i] for i in chosen}):
        group = [i for i in chosen if lengths[i] == length]
        per_layer = 3 * g.d_model + 2 * g.n_heads * g.d_head + g.n_heads * length
        numbers = length * (g.n_layers * per_layer + g.d_vocab)
        size = max(1, _MEMORY // (numbers * g.dtype.itemsize))
        size = min(size, batch_size or size)
        for first in range(0, len(group), size):
            yield group[first : first + size]
