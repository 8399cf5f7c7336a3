"""Induction: a token was seen before, and what followed it then is expected again.

At the *destination* the tokens up to and including it (the *prefix*) repeat earlier ones; the
*source* is the token that followed the earlier copy. An induction head attends from the destination
to the source; a duplicate-token head attends one token before the source.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from sae_attn_plugin.errors import InputError
from sae_attn_plugin.tasks.rows import Rows, check_count, pad, padding_id
from sae_attn_plugin.tokens import encode_prompt, need_tokenizer, own_convention, token_string

__all__ = ["InductionDataset"]

# How far the end of the room for the first copy stays from the last place of the second one: with
# 128 tokens and prefixes up to 9 the first copy then starts at 1 to 98, as in arXiv:2406.17759.
_ROOM = 11


class InductionDataset:
    """Rows with repeats, and where each repeat is. Made by :meth:`random_repeats`,
    :meth:`prefix_sweep` and :meth:`from_text`.

    Attributes:
        tokens: ``[row, longest]``, padded on the right; ``mask`` is true where there is a token.
            ``groups()`` gives rectangles of equal length without padding.
        row, destination, source, prefix: ``[repeat]``: the row of each repeat, the two positions,
            and how many tokens repeat, the destination included.
        bos: the id at position 0, or None where rows start with ordinary tokens.
    """

    rows: Rows
    tokenizer: Any
    bos: int | None
    row: Int[Tensor, " repeat"]
    destination: Int[Tensor, " repeat"]
    source: Int[Tensor, " repeat"]
    prefix: Int[Tensor, " repeat"]

    def __init__(
        self, rows: Rows, repeats: Int[Tensor, "repeat 4"], tokenizer: Any, bos: int | None
    ) -> None:
        self.rows, self.tokenizer, self.bos = rows, tokenizer, bos
        self.row, self.destination, self.source, self.prefix = repeats.unbind(1)

    @classmethod
    def random_repeats(
        cls,
        n: int,
        vocabulary: Any,
        seed: int,
        *,
        segment: int = 24,
        lead: int = 0,
        gap: int = 0,
        prepend_bos: bool = True,
        bos: int | None = None,
    ) -> InductionDataset:
        """BOS, ``lead`` random tokens, a random segment, ``gap`` random tokens, the segment again.

        Tokens of a row are distinct but for the second copy. Every token of the second copy except
        its last is a destination; the prefix grows along it.

        Args:
            vocabulary: a tokenizer (all but its special tokens), the number of ids, or the ids.
            bos: default: the tokenizer's.

        Raises:
            InputError: fewer ids than a row needs, no BOS where one is asked for.
        """
        ids, start, tokenizer = _vocabulary(vocabulary, prepend_bos, bos)
        check_count(n)
        for name, value, least in (("segment", segment, 2), ("lead", lead, 0), ("gap", gap, 0)):
            check_count(value, name, least)
        rng = random.Random(f"repeats {seed}")
        rows, repeats = [], []
        first = len(start) + lead
        second = first + segment + gap
        for row in range(n):
            drawn = _distinct(rng, ids, lead + segment + gap)
            rows.append([*start, *drawn, *drawn[lead : lead + segment]])
            repeats += [(row, second + i, first + i + 1, i + 1) for i in range(segment - 1)]
        return cls._of(rows, repeats, tokenizer, start)

    @classmethod
    def prefix_sweep(
        cls,
        n: int,
        vocabulary: Any,
        seed: int,
        *,
        prefix_lengths: Sequence[int] = tuple(range(1, 10)),
        length: int = 128,
        prepend_bos: bool = True,
        bos: int | None = None,
    ) -> InductionDataset:
        """Rows in which exactly ``prefix`` tokens repeat once, ``n`` rows per prefix length.

        Distinct random tokens; those from ``a`` on are copied to ``b``. The destination is the last
        token copied, ``b + prefix - 1``; the source is ``a + prefix``, what followed the first
        copy. ``a`` is uniform over the same places for every prefix length, ``b`` uniform over all
        places after the source that leave a token after the second copy (arXiv:2406.17759).

        Args:
            vocabulary, bos: as in :meth:`random_repeats`. length: tokens per row, BOS included.

        Raises:
            InputError: rows too short for the longest prefix, fewer ids than a row needs.
        """
        ids, start, tokenizer = _vocabulary(vocabulary, prepend_bos, bos)
        check_count(n)
        check_count(length, "length")
        prefixes = [check_count(p, "prefix length") for p in prefix_lengths]
        if not prefixes:
            raise InputError("no prefix length given")
        lowest, highest = len(start), length - 2 * max(prefixes) - 1 - _ROOM
        if highest < lowest:
            raise InputError(
                f"length={length} is too short for a prefix of {max(prefixes)} tokens; at least "
                f"{lowest + 2 * max(prefixes) + 1 + _ROOM} are needed"
            )
        rng = random.Random(f"sweep {seed}")
        rows, repeats = [], []
        for prefix in prefixes:
            for _ in range(n):
                tokens = [*start, *_distinct(rng, ids, length - len(start))]
                a = rng.randint(lowest, highest)
                b = rng.randint(a + prefix + 1, length - prefix - 1)
                tokens[b : b + prefix] = tokens[a : a + prefix]
                repeats.append((len(rows), b + prefix - 1, a + prefix, prefix))
                rows.append(tokens)
        return cls._of(rows, repeats, tokenizer, start)

    @classmethod
    def from_text(
        cls,
        texts: Sequence[Any] | Tensor,
        tokenizer: Any = None,
        *,
        min_prefix: int = 1,
        length: int | None = None,
        prepend_bos: bool | None = None,
        bos: int | None = None,
    ) -> InductionDataset:
        """Repeats as they are in texts, one per destination: the longest, the latest of equals.

        A repeat is exact, does not overlap itself, and never reaches into a BOS at position 0.

        Args:
            texts: strings, or token ids: ``[row, position]``, or rows of unequal length.
            tokenizer: needed for strings.
            min_prefix: shortest repeat to keep.
            length: rows are cut after so many tokens, BOS included.
            prepend_bos: for strings; None: the tokenizer's own convention.
            bos: which id is BOS at position 0 of token rows; default: the tokenizer's.

        Raises:
            InputError: no text, ids that are not whole numbers, no repeat found.
        """
        check_count(min_prefix, "min_prefix")
        given: Any = texts
        if isinstance(given, str) or len(given) == 0:
            raise InputError(f"expected a list of texts or token rows, got {texts!r}")
        if length is not None:
            check_count(length, "length", 2)
        if all(isinstance(text, str) for text in given):
            tokenizer = need_tokenizer(tokenizer)
            with_bos = own_convention(tokenizer) if prepend_bos is None else prepend_bos
            rows = [encode_prompt(tokenizer, text, with_bos)[:length] for text in given]
        else:
            rows = [_whole(row)[:length] for row in given]
        if bos is None and tokenizer is not None:
            bos = tokenizer.bos_token_id
        repeats = []
        for i, row in enumerate(rows):
            body = int(row[0] == bos)
            repeats += [(i, d, s, p) for d, s, p in _repeats_in(row, body) if p >= min_prefix]
        if not repeats:
            raise InputError(f"no repeat of {min_prefix} or more tokens in {len(rows)} texts")
        starts = {row[0] for row in rows}
        return cls._of(
            rows, repeats, tokenizer, [bos] if bos is not None and {bos} == starts else []
        )

    @classmethod
    def _of(
        cls,
        rows: list[list[int]],
        repeats: list[tuple[int, int, int, int]],
        tokenizer: Any,
        start: list[int],
    ) -> InductionDataset:
        padding = 0 if tokenizer is None else padding_id(tokenizer)
        return cls(
            pad(rows, padding), torch.tensor(repeats), tokenizer, start[0] if start else None
        )

    def __len__(self) -> int:
        return len(self.tokens)

    def __repr__(self) -> str:
        return f"InductionDataset({len(self)} rows, {len(self.row)} repeats)"

    @property
    def tokens(self) -> Int[Tensor, "row position"]:
        return self.rows.tokens

    @property
    def mask(self) -> Bool[Tensor, "row position"]:
        return self.rows.mask

    @property
    def lengths(self) -> Int[Tensor, " row"]:
        return self.rows.lengths

    @property
    def correct(self) -> Int[Tensor, " repeat"]:
        """The token at each source, which induction predicts at the destination."""
        return self.tokens[self.row, self.source]

    def groups(self, at_once: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """``(row numbers, tokens [member, length])`` of rows of equal length, unpadded."""
        return self.rows.groups(at_once)

    def repeats(self) -> Int[Tensor, "repeat 3"]:
        """Columns row, destination, source."""
        return torch.stack((self.row, self.destination, self.source), 1)

    def prefix_positions(self, repeat: int) -> tuple[range, range]:
        """The positions of the earlier copy of a repeat's prefix, and of the later one."""
        d, s, p = (int(x[repeat]) for x in (self.destination, self.source, self.prefix))
        return range(s - p, s), range(d - p + 1, d + 1)

    def readable(self, repeat: int) -> str:
        """The row of a repeat, with ``[prefix]``, ``*source*`` and ``[prefix]`` marked."""
        row = int(self.row[repeat])
        earlier, later = self.prefix_positions(repeat)
        source, parts = int(self.source[repeat]), []
        for i, token in enumerate(self.tokens[row, : int(self.lengths[row])].tolist()):
            text = token_string(self.tokenizer, token)
            opens = "[" * ((i == earlier.start) + (i == later.start)) + "*" * (i == source)
            closes = "*" * (i == source) + "]" * ((i == earlier[-1]) + (i == later[-1]))
            parts.append(opens + text + closes)
        return ("" if self.tokenizer is not None else " ").join(parts)


def _vocabulary(given: Any, prepend_bos: bool, bos: int | None) -> tuple[list[int], list[int], Any]:
    """Ids to draw from, how rows start (BOS or nothing), and the tokenizer if that was given."""
    tokenizer = None
    if isinstance(given, int):
        ids = list(range(given))
    elif hasattr(given, "get_vocab"):
        tokenizer = given
        ids = sorted(set(given.get_vocab().values()) - set(given.all_special_ids))
        bos = given.bos_token_id if bos is None else bos
    elif isinstance(given, Sequence | Tensor | np.ndarray) and not isinstance(given, str):
        ids = list(dict.fromkeys(_whole(given)))
    else:
        raise InputError(f"expected a tokenizer, a number of ids or ids, got {given!r}")
    if prepend_bos and bos is None:
        raise InputError(
            "prepend_bos=True, but no BOS id is known; pass bos= (the id) or prepend_bos=False"
        )
    start = [bos] if prepend_bos and bos is not None else []
    return [i for i in ids if i != bos], start, tokenizer


def _distinct(rng: random.Random, ids: list[int], count: int) -> list[int]:
    if len(ids) < count:
        raise InputError(
            f"{count} distinct tokens are needed in a row, but only {len(ids)} ids are given; "
            "shorten the rows"
        )
    return rng.sample(ids, count)


def _whole(row: Any) -> list[int]:
    """A row of ids as a list of integers."""
    values = np.asarray(row.detach().cpu() if isinstance(row, Tensor) else row)
    if values.ndim != 1 or not values.size or values.dtype.kind not in "iu":
        raise InputError(f"expected rows of token ids, got {row!r}")
    return values.tolist()


def _repeats_in(row: Sequence[int], body: int) -> list[tuple[int, int, int]]:
    """``(destination, source, prefix)`` of every destination in a row that has one.

    Args:
        body: where ordinary tokens start.
    """
    tokens = np.asarray(row[body:])
    count = len(tokens)
    found = []
    # run[k]: how many tokens up to and including (destination, k) are equal
    run = np.zeros(count, dtype=int)
    for d in range(count):
        before = np.concatenate(([0], run[:-1]))
        run = np.where(tokens == tokens[d], before + 1, 0)
        # The earlier copy ends at k, the source is k + 1 < d, and the copies do not overlap.
        ends = np.arange(max(d - 1, 0))
        lengths = np.minimum(run[: len(ends)], d - ends)
        if len(ends) and lengths.max() > 0:
            k = int(np.flatnonzero(lengths == lengths.max())[-1])
            found.append((d + body, k + 1 + body, int(lengths[k])))
    return found


def fuzzy_classes(tokenizer: Any, d_vocab: int) -> Int[Tensor, " d_vocab"]:
    """``[d_vocab]``: the same number for tokens equal but for a leading space and letter case.

    Kissane et al. 2024 match induction prefixes in text this way (" cat", "cat", "Cat"). Special
    tokens, tokens of nothing but spaces, and ids without text are each their own class; without a
    tokenizer all are.
    """
    if tokenizer is None:
        return torch.arange(d_vocab)
    special = set(tokenizer.all_special_ids)
    numbers = [i for i in range(min(d_vocab, len(tokenizer))) if i not in special]
    return classes_of({i: token_string(tokenizer, i) for i in numbers}, d_vocab)


def classes_of(strings: Mapping[int, str], d_vocab: int) -> Int[Tensor, " d_vocab"]:
    """:func:`fuzzy_classes` from the strings of tokens; those not given are their own class."""
    classes = torch.arange(d_vocab)
    first: dict[str, int] = {}
    for number, string in strings.items():
        text = string.removeprefix(" ").lower()
        if text.strip():
            classes[number] = first.setdefault(text, number)
    return classes


def prefix_length(
    classes: Sequence[int] | Int[Tensor, " position"], destination: int, source: int, body: int = 0
) -> int:
    """How many tokens up to and including ``destination`` equal those that end before ``source``.

    The copies do not overlap and do not reach below ``body``, where ordinary tokens start.

    Args:
        classes: the row's tokens, or their :func:`fuzzy_classes`.
    """
    row = np.asarray(classes)
    most = max(0, min(source - body, destination - source + 1))
    earlier = row[source - most : source][::-1]
    later = row[destination - most + 1 : destination + 1][::-1]
    differ = np.flatnonzero(earlier != later)
    return int(differ[0]) if len(differ) else most
