"""Token rows of unequal length: padded to be looked at, in groups of equal length to be run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from sae_attn_plugin.errors import InputError
from sae_attn_plugin.tokens import as_index


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows of token ids, padded on the right.

    Attributes:
        tokens: ``[row, longest]`` ids; padding stands after the last token only, where a causal
            model cannot see it from any earlier position.
        mask: ``[row, longest]``, true where there is a token.
    """

    tokens: Int[Tensor, "row position"]
    mask: Bool[Tensor, "row position"]

    @property
    def lengths(self) -> Int[Tensor, " row"]:
        return self.mask.sum(1)

    def groups(
        self, at_once: int | None = None
    ) -> Iterator[tuple[Int[Tensor, " member"], Int[Tensor, "member position"]]]:
        """Row numbers and unpadded tokens of rows of equal length, shortest first.

        Args:
            at_once: at most so many rows in one group.
        """
        lengths = self.lengths
        for length in lengths.unique().tolist():
            members = (lengths == length).nonzero()[:, 0]
            for part in members.split(at_once or len(members)):
                yield part, self.tokens[part, :length]


def pad(rows: Sequence[Sequence[int]], padding: int) -> Rows:
    """Rows as one rectangle, padded on the right."""
    width = max(map(len, rows))
    tokens = torch.full((len(rows), width), padding)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = True
    return Rows(tokens, mask)


def padding_id(tokenizer: Any) -> int:
    """What stands where there is no token."""
    names = ("pad_token_id", "eos_token_id", "bos_token_id")
    return next((i for name in names if (i := getattr(tokenizer, name)) is not None), 0)


def check_count(n: Any, name: str = "n", least: int = 1) -> int:
    """A whole number of at least ``least``.

    Raises:
        InputError: for anything else.
    """
    count = as_index(n, name)
    if isinstance(n, bool) or count < least:
        raise InputError(f"{name} must be a whole number of at least {least}, got {n!r}")
    return count
