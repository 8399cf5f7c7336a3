"""What a data set knows about its prompts: where the roles stand, and what should follow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sae_attn_plugin.errors import InputError
from sae_attn_plugin.tasks.induction import InductionDataset
from sae_attn_plugin.tasks.ioi import IOIDataset

__all__ = ["Answer", "Roles", "roles_of"]


@dataclass(frozen=True)
class Answer:
    """What should follow a position: ``correct``, rather than ``wrong`` where there is one."""

    position: int
    correct: int
    wrong: int | None = None


@dataclass(frozen=True)
class Roles:
    """Roles and answers of some prompts.

    Attributes:
        positions: role to its position in each prompt.
        answers: for each prompt.
        why: why there are no roles, for the error.
    """

    positions: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    answers: tuple[tuple[Answer, ...], ...] = ()
    why: str = "the run was not made from a data set: lens.run(dataset) knows roles"

    def pick(self, members: Sequence[int]) -> Roles:
        """Those of some prompts."""
        return Roles(
            {role: tuple(at[i] for i in members) for role, at in self.positions.items()},
            tuple(self.answers[i] for i in members) if self.answers else (),
            self.why,
        )

    def find(self, role: str) -> tuple[int, ...]:
        """The position of a role in each prompt.

        Raises:
            InputError: no such role.
        """
        if role not in self.positions:
            known = f"known: {', '.join(self.positions)}" if self.positions else self.why
            raise InputError(f"no role {role!r} here; {known}")
        return self.positions[role]

    def score(self, logits: Float[Tensor, "prompt position d_vocab"]) -> Float[Tensor, " prompt"]:
        """Of each prompt, the mean over its answers: the logit of the correct token minus that of
        the wrong one, or where there is none the log-probability of the correct token, in nats.

        Raises:
            InputError: the prompts have no answers.
        """
        if not self.answers:
            raise InputError(f"these prompts have no answers; {self.why}")
        dtype = torch.promote_types(logits.dtype, torch.float32)
        scores = []
        for row, answers in zip(logits, self.answers, strict=True):
            at = row[[a.position for a in answers]].to(dtype)
            every = torch.arange(len(answers))
            correct = at[every, [a.correct for a in answers]]
            wrong = [a.wrong for a in answers]
            other = (
                at.logsumexp(-1)
                if None in wrong
                else at[every, [w for w in wrong if w is not None]]
            )
            scores.append((correct - other).mean())
        return torch.stack(scores)


def roles_of(dataset: Any) -> Roles:
    """Roles and answers of a data set.

    IOI prompts have the roles of ``tasks.ioi.ROLES`` and the answer IO rather than S after END.
    Rows of an ``InductionDataset`` have the answers of their repeats; where each row has exactly
    one repeat, the roles ``DESTINATION`` and ``SOURCE`` as well.

    Raises:
        InputError: not a data set of this package.
    """
    if isinstance(dataset, IOIDataset):
        positions = {role: tuple(at.tolist()) for role, at in dataset.positions.items()}
        columns = (positions["END"], dataset.correct.tolist(), dataset.wrong.tolist())
        return Roles(positions, tuple((Answer(*row),) for row in zip(*columns, strict=True)))
    if isinstance(dataset, InductionDataset):
        answers: list[list[Answer]] = [[] for _ in range(len(dataset))]
        columns = (dataset.row, dataset.destination, dataset.correct)
        for row, position, token in zip(*(c.tolist() for c in columns), strict=True):
            answers[row].append(Answer(position, token))
        found = tuple(map(tuple, answers))
        if all(len(row) == 1 for row in found):
            order = dataset.row.argsort()
            names = (("DESTINATION", dataset.destination), ("SOURCE", dataset.source))
            return Roles({name: tuple(at[order].tolist()) for name, at in names}, found)
        why = (
            "rows with several repeats have no single destination; give positions, or use "
            "InductionDataset.prefix_sweep"
        )
        return Roles({}, found, why)
    raise InputError(
        f"expected an IOIDataset or an InductionDataset, got a {type(dataset).__name__}"
    )
