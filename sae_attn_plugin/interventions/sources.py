"""Where edits stand, and what they take from other runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sae_attn_plugin.errors import InputError
from sae_attn_plugin.interventions import steps
from sae_attn_plugin.interventions.edits import From, Mean, Position

if TYPE_CHECKING:
    from sae_attn_plugin.lens import FeatureLens, Run


@dataclass(frozen=True)
class Quantity:
    """What an edit replaces: ``"feature"``, ``"error"``, ``"head"`` (its z) or the name of a
    site. ``of``: the kind of the dictionary."""

    kind: str
    layer: int = -1
    index: int = 0
    of: Any = "attn"


def positions_of(
    run: Run, position: Position, name: str, members: Sequence[int], total: int
) -> list[int] | None:
    """One position for each prompt of a run of equal length; None: everywhere.

    Args:
        members: the numbers of its prompts in the whole run, of ``total`` prompts.

    Raises:
        InputError: a number out of range, not one position per prompt, an unknown role.
    """
    if position is None:
        return None
    if isinstance(position, str):
        return list(run.roles.find(position))
    if isinstance(position, int):
        return [run.resolve_position(position)] * len(run)
    if len(position) != total:
        raise InputError(
            f"{name}: {len(position)} positions for {total} prompts; a tuple holds one position "
            "per prompt. Several positions of a prompt are several edits"
        )
    return [run.resolve_position(position[i]) for i in members]


def gather(run: Run, quantity: Quantity, where: Sequence[int] | None) -> Tensor:
    """A quantity in a run of equal length: ``[prompt, ...]``, or ``[prompt, position, ...]``
    everywhere."""
    if quantity.kind in ("feature", "error"):
        from sae_attn_plugin.interventions.reading import what_it_reads

        dictionary, values = run.dictionary(quantity.layer, quantity.of), run.capture.values
        x = what_it_reads(run.lens, dictionary, values).to(run.lens.backend.geometry.device)
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        what = ("set" if quantity.kind == "feature" else "error", quantity.index, None, 0.0)
        written = None
        if dictionary.kind == "tc":
            written = run.capture[dictionary.writes, quantity.layer].to(x)
        live, _, error = steps.read_features(dictionary, x, [what], written)
        value = error if quantity.kind == "error" else live[quantity.index]
    elif quantity.kind == "head":
        value = run.capture["z", quantity.layer][:, :, quantity.index]
    else:
        value = run.capture[quantity.kind, quantity.layer]
    return value if where is None else value[torch.arange(len(value)), list(where)]


class Sources:
    """The runs and data sets that edits take values from, by name."""

    def __init__(self, lens: FeatureLens, given: Mapping[str, Any]) -> None:
        self.lens: FeatureLens = lens
        self.given: dict[str, Any] = dict(given)
        self._means: dict[tuple[Quantity, Mean, Position], Tensor] = {}

    def values(
        self,
        to: From | Mean,
        position: Position,
        quantity: Quantity,
        members: Sequence[int],
        total: int,
    ) -> Tensor:
        """What stands in the source for some prompts: ``[prompt, ...]`` at positions,
        ``[prompt, position, ...]`` everywhere; a mean is one for all.

        Args:
            position: of the edit, used where the source has no other.
            members: their numbers in the whole run, of ``total`` prompts.
        """
        if to.source not in self.given:
            known = f"given: {', '.join(self.given)}" if self.given else "none is given"
            raise InputError(
                f"no source named {to.source!r}: {known}. Pass sources={{{to.source!r}: run}}"
            )
        source = self.given[to.source]
        at = position if to.position is None else to.position
        if isinstance(to, Mean):
            key = (quantity, to, at)
            if key not in self._means:
                self._means[key] = self._mean(source, at, quantity)
            return self._means[key]
        count = len(source)
        if count not in (1, total):
            raise InputError(
                f"the source {to.source!r} has {count} prompts and the run has {total}; give one "
                "source prompt for each, or one for all"
            )
        chosen = [0] * len(members) if count == 1 else list(members)
        found: dict[int, Tensor] = {}
        for part, run in _parts(self.lens, source, sorted(set(chosen))):
            where = positions_of(run, at, "From", part, count)
            values = gather(run, quantity, where)
            found |= dict(zip(part, values, strict=True))
        shapes = {tuple(value.shape) for value in found.values()}
        if len(shapes) > 1:
            raise InputError(
                f"the prompts of the source {to.source!r} differ in length, so they cannot be "
                "patched everywhere at once; give positions or a role"
            )
        return torch.stack([found[i] for i in chosen])

    def _mean(self, source: Any, at: Position, quantity: Quantity) -> Tensor:
        total, count = None, 0
        for part, run in _parts(self.lens, source, range(len(source))):
            values = gather(run, quantity, positions_of(run, at, "Mean", part, len(source)))
            values = values.flatten(0, 1) if at is None else values
            one = values.double().sum(0)
            total = one if total is None else total + one
            count += len(values)
        assert total is not None
        # A mean of features is a number for all prompts; that of a vector, a vector for all.
        return total / count


def _parts(
    lens: FeatureLens, source: Any, members: Sequence[int]
) -> Iterator[tuple[list[int], Run]]:
    """Some prompts of a run or a data set, as runs of equal length."""
    from sae_attn_plugin.interventions.apply import equal_parts
    from sae_attn_plugin.interventions.datasets import batches
    from sae_attn_plugin.lens import Run

    members = list(members)
    if isinstance(source, Run):
        if source.lens is not lens and source.lens.backend is not lens.backend:
            raise InputError("a source is a run of another model; expected one of this lens")
        for part, run in equal_parts(source.pick(members)):
            yield [members[i] for i in part], run
        return
    for part in batches(lens, source, members):
        yield part, lens.run_rows(source, part)
