"""Pictures of validations, faithfulness and recovery."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from sae_attn_plugin.errors import InputError
from sae_attn_plugin.io import check_writable, write_atomically, write_json

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from sae_attn_plugin.interventions.faithfulness import Faithfulness
    from sae_attn_plugin.interventions.validate import Agreement, Validation

_LEAST = 1e-12


class Report(Protocol):
    """A result that is JSON and a picture."""

    def to_dict(self) -> dict[str, Any]: ...
    def plot(self) -> Figure: ...


def save(report: Report, path: str | Path) -> Path:
    """Write a report: ``.json``, or its picture as ``.png``, ``.svg`` or ``.pdf``; whole or not.

    Raises:
        InputError: another ending. FileError: a place that cannot be written.
    """
    path = check_writable(path)
    kind = path.suffix.removeprefix(".").lower()
    if kind == "json":
        write_json(path, report.to_dict())
    elif kind in ("png", "svg", "pdf"):
        made = report.plot()
        write_atomically(path, lambda file: made.savefig(file, format=kind, dpi=150))
    else:
        raise InputError(f"{path.name}: expected a file that ends in .json, .png, .svg or .pdf")
    return path


def figure(panels: int, width: float = 4.2, height: float = 4.2) -> tuple[Any, list[Any]]:
    """A figure that needs no display, and its axes: side by side, in two rows from four on."""
    from sae_attn_plugin.plots import blank

    rows = 1 if panels < 4 else 2
    columns = -(-panels // rows)
    made = blank(width * columns, height * rows)
    axes = list(made.subplots(rows, columns, squeeze=False).flat)
    for empty in axes[panels:]:
        empty.set_axis_off()
    return made, axes[:panels]


def scatter(validation: Validation) -> Figure:
    """Measured against predicted effects of every edge, one panel per condition."""
    parts = validation.parts()
    made, axes = figure(len(parts))
    for ax, (name, part) in zip(axes, parts.items(), strict=True):
        _panel(ax, name, part)
    handles, labels = [], []
    for ax in axes:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            if label not in labels:
                handles.append(handle)
                labels.append(label)
    # beside the panels, where it covers no point
    made.legend(
        handles, labels, fontsize=8, loc="outside right upper", title="source", markerscale=2
    )
    return made


def _panel(ax: Any, name: str, part: Agreement) -> None:
    from sae_attn_plugin.graphs.picture import STYLES

    table = part.table
    for kind, rows in table.groupby("kind"):
        marker, fill, shown = STYLES.get(str(kind), ("o", "#8C8C96", str(kind)))
        ax.scatter(
            rows["predicted"], rows["measured"], s=18, marker=marker, color=fill,
            edgecolors="#222222", linewidths=0.4, alpha=0.8, label=shown,
        )  # fmt: skip
    largest = max(float(table[["predicted", "measured"]].abs().max().max()), _LEAST) * 1.08
    ax.plot([-largest, largest], [-largest, largest], color="black", lw=0.7, zorder=0)
    small = float(table[["predicted", "measured"]].abs().stack().median())
    for scale in (ax.set_xscale, ax.set_yscale):
        scale("symlog", linthresh=max(small, _LEAST))
    ax.set_xlim(-largest, largest)
    ax.set_ylim(-largest, largest)
    ax.set_aspect("equal")
    _few_ticks(ax, largest / 1.08, small)
    ax.set_title(name, fontsize=10)
    ax.text(
        *(0.03, 0.97, f"R2 {part.r2:.3f}, signs {part.sign_agreement:.0%}\n{len(table)} edges"),
        **{"transform": ax.transAxes, "va": "top", "fontsize": 8},
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "pad": 1},
    )
    ax.set_xlabel("predicted: minus the edge", fontsize=9)
    ax.set_ylabel("measured on the model", fontsize=9)
    ax.tick_params(labelsize=8)


def _few_ticks(ax: Any, largest: float, small: float) -> None:
    """Zero and one or two powers of ten on each side, so that labels have room."""
    from matplotlib.ticker import FixedLocator, NullLocator

    top = math.floor(math.log10(largest))
    # below the linear part's end a power of ten stands next to zero
    powers = [10.0**power for power in (top - 1, top) if power == top or 10.0**power > small]
    ticks = [0.0, *powers, *(-power for power in powers)]
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(FixedLocator(ticks))
        axis.set_minor_locator(NullLocator())


def curve(faithfulness: Faithfulness) -> Figure:
    """Faithfulness of ever larger parts of a circuit, with its interval."""
    made, axes = figure(1, 5.2, 3.8)
    ax, table = axes[0], faithfulness.curve
    ax.fill_between(table["share"], table["low"], table["high"], alpha=0.2, color="#1f77b4", lw=0)
    ax.plot(table["share"], table["faithfulness"], marker="o", ms=3, color="#1f77b4")
    for level, style in ((0.0, ":"), (1.0, "--")):
        ax.axhline(level, color="black", lw=0.7, ls=style)
    ax.set_xlabel("share of the circuit kept")
    ax.set_ylabel("faithfulness")
    ax.set_title(f"CPR {faithfulness.cpr:.3f}, CMD {faithfulness.cmd:.3f}", fontsize=9)
    return made
