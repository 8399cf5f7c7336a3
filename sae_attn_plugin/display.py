"""How results look in notebooks: compact HTML, everything escaped, readable in light and dark.

Styles are inline and colours half transparent, so that nothing leaks into the notebook and the
same markup suits any theme.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from typing import Any

import pandas as pd

__all__ = ["card", "coloured", "number", "table", "text"]

_POSITIVE, _NEGATIVE, _NEUTRAL = "0,114,178", "213,94,0", "128,128,140"
_CARD = (
    "display:inline-block;max-width:100%;padding:10px 14px;border:1px solid rgba(128,128,140,.35);"
    "border-radius:10px;font:13px/1.5 system-ui,sans-serif;overflow-x:auto"
)
_SOFT = "opacity:.7;font-size:12px"
_CELL = "padding:1px 10px 1px 0;border:0;background:none"
_LONGEST = 60


def text(value: object, longest: int = _LONGEST) -> str:
    """Escaped text, with what is invisible or steers its surroundings spelled out."""
    shown = "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in str(value)
    )
    return html.escape(shown if len(shown) <= longest else shown[: longest - 1] + "…")


def number(value: float | None, signed: bool = False) -> str:
    """Four digits."""
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:{'+' if signed else ''}.4g}".replace("-", "−")


def card(title: str, facts: Iterable[str], *parts: str) -> str:
    """A framed result. ``title`` and ``facts`` are plain text; ``parts`` are HTML."""
    line = " · ".join(text(fact, 200) for fact in facts if fact)
    return (
        f'<div style="{_CARD}"><div style="font-weight:600">{text(title, 200)}</div>'
        f'<div style="{_SOFT}">{line}</div>{"".join(parts)}</div>'
    )


def heading(words: str) -> str:
    return f'<div style="font-weight:600;font-size:12px;margin-top:8px">{text(words)}</div>'


def note(words: str) -> str:
    return f'<div style="{_SOFT}">{text(words, 300)}</div>'


def coloured(tokens: Sequence[str], values: Sequence[float]) -> str:
    """Tokens in a row, each behind a colour as strong as its value: blue above zero, orange below.

    Tokens past the last value are faint.
    """
    most = max((abs(value) for value in values), default=0.0) or 1.0
    parts = []
    for i, token in enumerate(tokens):
        shown = text(token)
        if i >= len(values):
            parts.append(f'<bdi style="opacity:.45">{shown}</bdi>')
            continue
        colour = _NEGATIVE if values[i] < 0 else _POSITIVE
        alpha = round(0.75 * abs(values[i]) / most, 3)
        parts.append(
            f'<bdi title="{i}: {number(values[i], True)}" style="background:rgba({colour},{alpha});'
            f'border-radius:3px;padding:1px 0">{shown}</bdi>'
        )
    inside = "".join(parts)
    return f'<div style="white-space:pre-wrap;line-height:1.8;margin-top:4px">{inside}</div>'


def bar(value: float, most: float, neutral: bool = False) -> str:
    colour = _NEUTRAL if neutral else _NEGATIVE if value < 0 else _POSITIVE
    width = round(70 * min(abs(value) / (most or 1.0), 1.0), 1)
    return (
        f'<div style="width:{max(width, 1)}px;height:9px;border-radius:2px;'
        f'background:rgba({colour},.75)"></div>'
    )


def table(
    frame: pd.DataFrame,
    columns: Sequence[str],
    bars: str | None = None,
    rows: int = 10,
    neutral: bool = False,
) -> str:
    """The first rows of a frame; ``bars`` names a column that also gets a bar."""
    shown = frame.head(rows)
    most = float(shown[bars].abs().max()) if bars and len(shown) else 1.0
    head = "".join(f'<th style="{_CELL};text-align:left;{_SOFT}">{text(c)}</th>' for c in columns)
    body = []
    for record in shown.to_dict("records"):
        cells = "".join(
            f'<td style="{_CELL};{_align(record[c])}">{_cell(record[c])}</td>' for c in columns
        )
        if bars:
            cells += f'<td style="{_CELL}">{bar(float(record[bars]), most, neutral)}</td>'
        body.append(f'<tr style="background:none">{cells}</tr>')
    rest = len(frame) - len(shown)
    more = note(f"and {rest:,} more") if rest > 0 else ""
    return (
        f'<table style="border-collapse:collapse;margin:4px 0 0;font-size:12px"><thead><tr '
        f'style="background:none">{head}</tr></thead><tbody>{"".join(body)}</tbody></table>{more}'
    )


def _align(value: Any) -> str:
    plain = isinstance(value, str) or value is None
    return "text-align:left" if plain else "text-align:right;font-variant-numeric:tabular-nums"


def _cell(value: Any) -> str:
    if isinstance(value, str):
        return f"<bdi>{text(value)}</bdi>"
    if value is None or value is pd.NA:
        return "–"
    if isinstance(value, bool) or not hasattr(value, "__float__"):
        return text(value)
    return (
        str(int(value))
        if float(value).is_integer() and not isinstance(value, float)
        else number(float(value))
    )
