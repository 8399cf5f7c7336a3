"""Prompts whose positions have names: the same role stands at another place in each."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sae_attn_plugin.errors import InputError
from sae_attn_plugin.tokens import as_index

__all__ = ["DEFAULT_ROLES", "RolePrompts", "with_roles"]

DEFAULT_ROLES = ("IO", "S1", "S2", "END", "AND")
"""Roles of IOI that never share a position (S1+1 and AND do, where the subject comes first)."""
_OTHER = "other"


@dataclass(frozen=True, eq=False)
class RolePrompts:
    """Prompts and the positions of their roles.

    Attributes:
        prompts: strings, or lists of token ids.
        roles: names, in order; positions: one dict per prompt, role to position (negative from the
            end as given).
        correct, wrong: token ids per prompt, where the data set has answers.
        pairs: the same for sets whose prompts correspond one to one, else None.
    """

    prompts: tuple[Any, ...]
    roles: tuple[str, ...]
    positions: tuple[Mapping[str, int], ...]
    correct: tuple[int, ...] | None = None
    wrong: tuple[int, ...] | None = None
    pairs: str | None = None

    def __len__(self) -> int:
        return len(self.prompts)

    def at(self, prompt: int, length: int) -> dict[str, int]:
        """Role to position in one prompt, counted from its beginning.

        Raises:
            InputError: a position that the prompt does not have, naming both.
        """
        found = {}
        for role in self.roles:
            position = self.positions[prompt][role]
            if not -length <= position < length:
                raise InputError(
                    f"prompt {prompt}: {role} is at position {position}, but the prompt has "
                    f"{length} tokens (0..{length - 1}, or -{length}..-1 from the end)"
                )
            found[role] = position % length
        return found


def with_roles(prompts: Any, align: Any = None) -> RolePrompts:
    """Prompts with their roles.

    Args:
        prompts: a data set with ``tokens``, ``lengths`` and ``positions`` (such as ``IOIDataset``),
            or a list of strings or of rows of token ids.
        align: roles of a data set by name (default :data:`DEFAULT_ROLES`, those it has); or a dict
            of role to one position per prompt; or one dict of role to position per prompt.

    Raises:
        InputError: no prompts, a role that is unknown or that a prompt lacks, names that cannot be.
    """
    known: Any = getattr(prompts, "positions", None)
    is_dataset = isinstance(known, Mapping) and hasattr(prompts, "lengths")
    if is_dataset:
        rows = [
            prompts.tokens[i, : int(length)].tolist()
            for i, length in enumerate(prompts.lengths.tolist())
        ]
    elif isinstance(prompts, Sequence) and not isinstance(prompts, str | bytes):
        rows = [row.tolist() if isinstance(row, Tensor) else row for row in prompts]
    else:
        raise InputError(
            "expected a data set such as IOIDataset, or a list of prompts, got "
            f"{type(prompts).__name__}"
        )
    if not rows:
        raise InputError("no prompts given")
    by_name = isinstance(align, Sequence) and all(isinstance(one, str) for one in align)
    if isinstance(align, str):
        align, by_name = (align,), True
    if align is None or (by_name and is_dataset):
        if not is_dataset:
            raise InputError(
                "these prompts have no roles of their own; pass align=: a dict of role to one "
                "position per prompt, or one dict of role to position per prompt"
            )
        names = [r for r in DEFAULT_ROLES if r in known] or list(known) if align is None else align
        if unknown := [role for role in names if role not in known]:
            raise InputError(f"unknown role {unknown[0]!r}; this data set has {', '.join(known)}")
        align = {role: known[role] for role in names}
    roles, positions = _positions(align, len(rows))
    answers = [getattr(prompts, name, None) for name in ("correct", "wrong")]
    correct, wrong = (
        tuple(int(token) for token in answer) if is_dataset and answer is not None else None
        for answer in answers
    )
    pairs = None
    if is_dataset:
        clean: Any = getattr(prompts, "clean", None) or prompts
        text = json.dumps([clean.tokens.tolist(), clean.lengths.tolist()])
        pairs = hashlib.sha256(text.encode("ascii")).hexdigest()[:16]
    return RolePrompts(tuple(rows), roles, positions, correct, wrong, pairs)


def _positions(align: Any, n: int) -> tuple[tuple[str, ...], tuple[dict[str, int], ...]]:
    if isinstance(align, Mapping):
        for role, places in align.items():
            if isinstance(places, int) or not hasattr(places, "__len__"):
                raise InputError(
                    f"align[{role!r}] is {places!r}; expected one position for each of the {n} "
                    "prompts"
                )
            if len(places) != n:
                raise InputError(f"align[{role!r}] has {len(places)} positions for {n} prompts")
        roles = tuple(align)
        given = [{role: align[role][i] for role in roles} for i in range(n)]
    elif isinstance(align, Sequence) and all(isinstance(one, Mapping) for one in align):
        if len(align) != n:
            raise InputError(f"align has {len(align)} dicts of positions for {n} prompts")
        given = list(align)
        roles = tuple(dict.fromkeys(role for one in given for role in one))
    else:
        raise InputError(
            "align must be names of roles of a data set, a dict of role to one position per "
            f"prompt, or one dict of role to position per prompt; got {str(align)[:80]}"
        )
    if not roles:
        raise InputError("align names no role")
    for role in roles:
        if not isinstance(role, str) or not role or "@" in role or ":" in role or role == _OTHER:
            raise InputError(
                f"a role cannot be called {role!r}: expected a name without '@' and ':', other "
                f"than {_OTHER!r}"
            )
        for i, one in enumerate(given):
            if role not in one:
                raise InputError(
                    f"prompt {i} has no position for the role {role!r}; give every prompt one, or "
                    "leave the role out"
                )
    return roles, tuple(
        {role: as_index(one[role], f"the position of {role} in prompt {i}") for role in roles}
        for i, one in enumerate(given)
    )
