"""Kept firings of a corpus survey as arrays, with the text around them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from sae_attn_plugin.errors import InputError
from sae_attn_plugin.tasks.induction import classes_of
from sae_attn_plugin.tokens import as_index

if TYPE_CHECKING:
    from sae_attn_plugin.corpus.survey import Survey

__all__ = ["Firings", "Text", "chosen_layers", "firings", "known_layers", "text"]

ROLES = ("self", "previous", "first", "duplicate", "induction")
_AT_ONCE = 2**25  # tokens looked at together


@dataclass(frozen=True, eq=False)
class Text:
    """The rows that a survey kept.

    Attributes:
        rows: their numbers in the corpus, ascending.
        tokens: ``[row, longest]``, -1 after the end of a row; classes: the same with tokens equal
            but for a leading space and letter case made one (:func:`fuzzy_classes`).
        of_token: ``[d_vocab]``, the class of each token.
        bos: id of BOS, or -1. strings: by token.
    """

    rows: npt.NDArray[np.int64]
    tokens: npt.NDArray[np.int64]
    classes: npt.NDArray[np.int64]
    of_token: npt.NDArray[np.int64]
    bos: int
    strings: Mapping[int, str]

    def index(self, rows: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """Where rows, by their numbers, lie in ``tokens``."""
        wanted = np.asarray(rows)
        found = np.searchsorted(self.rows, wanted)
        found = np.minimum(found, len(self.rows) - 1)
        if (self.rows[found] != wanted).any():
            missing = int(wanted[self.rows[found] != wanted][0])
            raise InputError(f"the survey kept no tokens of row {missing}; make it again")
        return found

    def string(self, token: int) -> str:
        return self.strings.get(token, f"#{token}")

    def around(self, row: int, position: int, before: int = 12) -> tuple[str, str]:
        """Text up to and including a position of a row (by place), and the token after it."""
        line = [t for t in self.tokens[row].tolist() if t >= 0]
        # words of tokenizers that split at spaces, and ids, carry no space of their own
        spaced = any(string.startswith(" ") for string in self.strings.values())
        text = ("" if spaced else " ").join(
            map(self.string, line[max(0, position - before) : position + 1])
        )
        return text, self.string(line[position + 1]) if position + 1 < len(line) else ""


@dataclass(frozen=True, eq=False)
class Firings:
    """Firings of one layer, ``[n]`` each, in order of feature.

    Attributes:
        row: place in :attr:`Text.tokens`. position: the destination.
        source: the source position with the largest positive DFA, -1 without one.
        source_dfa: its DFA.
        by_distance: ``[n, bin]`` and roles: ``[n, 5]``: |DFA| by distance and by role.
        dfa_abs: |DFA| over all sources.
    """

    feature: npt.NDArray[np.int64]
    row: npt.NDArray[np.int64]
    position: npt.NDArray[np.int64]
    activation: npt.NDArray[np.float64]
    source: npt.NDArray[np.int64]
    source_dfa: npt.NDArray[np.float64]
    by_distance: npt.NDArray[np.float64]
    roles: npt.NDArray[np.float64]
    dfa_abs: npt.NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.feature)

    def pick(self, which: Any) -> Firings:
        return Firings(**{name: value[which] for name, value in vars(self).items()})

    def parts(self, width: int) -> Iterator[slice]:
        """Slices so small that ``width`` numbers for each firing fit in memory."""
        step = max(1, _AT_ONCE // max(width, 1))
        for start in range(0, len(self), step):
            yield slice(start, start + step)


def text(survey: Survey) -> Text:
    """The rows of a survey, with the strings and classes of their tokens.

    Raises:
        InputError: a survey without rows.
    """
    frame = survey.rows.sort_values("row")
    if frame.empty:
        raise InputError("the survey kept no rows of text; make it with keep= and sample= above 0")
    lines = [np.asarray(tokens, dtype=np.int64) for tokens in frame["tokens"]]
    tokens = np.full((len(lines), max(map(len, lines))), -1, dtype=np.int64)
    for place, line in enumerate(lines):
        tokens[place, : len(line)] = line
    known = survey.tokens
    strings = dict(zip(known["token"].tolist(), known["string"].tolist(), strict=True))
    of_token = classes_of(strings, max(int(tokens.max()), max(strings, default=0)) + 1).numpy()
    bos = survey.facts.get("bos")
    return Text(
        rows=frame["row"].to_numpy(np.int64),
        tokens=tokens,
        classes=np.where(tokens >= 0, of_token[tokens], -1),
        of_token=of_token,
        bos=-1 if bos is None else int(bos),
        strings=strings,
    )


def firings(survey: Survey, layer: int, kind: str, where: Text) -> Firings:
    """Kept firings of one layer: ``kind`` is ``"sample"`` (uniform) or ``"top"``."""
    frame: Any = survey.examples
    frame = frame[(frame["layer"] == layer) & (frame["kind"] == kind)]
    frame = frame.sort_values(["feature", "rank"], kind="stable")
    source, size = _strongest(frame)
    n_bins = len(survey.facts["distance_edges"])
    return Firings(
        frame["feature"].to_numpy(np.int64),
        where.index(frame["row"].to_numpy()),
        frame["position"].to_numpy(np.int64),
        frame["activation"].to_numpy(np.float64),
        source,
        size,
        _stack(frame["by_distance"], n_bins),
        _stack(frame["roles"], len(ROLES)),
        frame["dfa_abs"].to_numpy(np.float64),
    )


def _stack(column: pd.Series, width: int) -> npt.NDArray[np.float64]:
    if column.empty:
        return np.zeros((0, width))
    return np.stack([np.asarray(cell, dtype=np.float64) for cell in column])


def _strongest(frame: pd.DataFrame) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    source = np.full(len(frame), -1, dtype=np.int64)
    size = np.zeros(len(frame))
    for place, (sources, dfa) in enumerate(zip(frame["sources"], frame["dfa"], strict=True)):
        if len(dfa):
            best = int(np.argmax(dfa))
            if dfa[best] > 0:
                source[place], size[place] = sources[best], dfa[best]
    return source, size


def chosen_layers(survey: Survey, layers: Sequence[int] | None) -> list[int]:
    """The layers asked for, all of them by default.

    Raises:
        InputError: a layer that was not surveyed, none or one twice.
    """
    known = known_layers(survey)
    if layers is None:
        return known
    wanted = [as_index(layer, "layer") for layer in layers]
    for layer in wanted:
        if layer not in known:
            there = ", ".join(map(str, known))
            raise InputError(f"layer {layer} is not in the survey; layers in it: {there}")
    if not wanted or len(set(wanted)) < len(wanted):
        raise InputError(f"layers={layers!r} names no layer, or one twice")
    return wanted


def known_layers(survey: Survey) -> list[int]:
    return sorted(int(layer) for layer in survey.facts["layers"])
