"""The doubling curves as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any


def draw(rows: Sequence[Any], path: Path) -> None:
    """One panel per curve of ``rows``, seconds and forward passes on doubling axes."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullFormatter

    parts = [p for p in dict.fromkeys(row.part for row in rows) if p.startswith("curve: ")]
    if not parts:
        raise SystemExit("no curves measured; add the part 'curves'")
    figure = Figure(figsize=(11, 7.5), layout="constrained")
    for axes, part in zip(figure.subplots(2, 2).flat, parts, strict=False):
        own = [row for row in rows if row.part == part]
        sizes = [int(row.what.replace(",", "")) for row in own]
        axes.plot(sizes, [row.forwards for row in own], "o-", label="plain forward passes")
        axes.plot(sizes, [row.seconds for row in own], "s--", label="seconds")
        axes.plot(sizes, [row.peak_mib / 1024 for row in own], "^:", label="peak memory, GiB")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.set_xlabel(part.removeprefix("curve: "))
        axes.grid(alpha=0.3)
    figure.axes[0].legend()
    figure.suptitle("What run.attribute costs, by the size of the problem")
    figure.savefig(path, dpi=110)
