"""Pictures of results. Each takes ``ax``, matplotlib axes to draw into, or makes a figure.

Blue is above zero and orange below, as everywhere in the package; bars below zero are hatched too.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure

__all__ = ["bars", "heat_map"]

_POSITIVE, _NEGATIVE, _NEUTRAL, _INK = "#0072B2", "#D55E00", "#8C8C96", "#222222"


def canvas(ax: Axes | None, width: float, height: float) -> tuple[Figure, Axes]:
    """The axes given, or those of a new figure that notebooks show and pyplot knows nothing of."""
    if ax is not None:
        figure = ax.get_figure(root=True)
        assert figure is not None
        return figure, ax
    figure = blank(width, height)
    return figure, figure.subplots()


def blank(width: float, height: float) -> Figure:
    """A figure of this many inches that notebooks show and pyplot knows nothing of."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    class Picture(Figure):
        """A figure that a notebook shows without pyplot."""

        def _repr_png_(self) -> bytes:
            file = io.BytesIO()
            self.savefig(file, format="png", dpi=110)
            return file.getvalue()

    figure = Picture(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def diverging() -> LinearSegmentedColormap:
    """Orange through white to blue."""
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("sae_attn", [_NEGATIVE, "#FFFFFF", _POSITIVE])


def words(names: Sequence[str], longest: int = 14) -> list[str]:
    """Tokens as labels: without a leading space, what the font lacks as a box."""
    from sae_attn_plugin.graphs.picture import Writing

    writing = Writing("DejaVu Sans")
    shown = []
    for name in names:
        bare = name[1:] if name.startswith(" ") and name.strip() else name
        shown.append(writing.clean(bare if bare.strip() else f'"{bare}"', longest))
    return shown


def label(setter: Any, *args: Any, **style: Any) -> None:
    """Set text that is no mathematics, whatever dollars it holds."""
    found = setter(*args, **style)
    for one in found if isinstance(found, list) else [found]:
        one.set_parse_math(False)


def heat_map(
    values: np.ndarray,
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    title: str,
    name: str,
    ax: Axes | None = None,
    signed: bool = True,
) -> Figure:
    """``values[row, column]`` as colours, zero white.

    Args:
        name: of the values, beside the colour bar.
    """
    n_rows, n_columns = values.shape
    figure, axes = canvas(ax, min(2.4 + 0.42 * n_columns, 24), min(1.9 + 0.26 * n_rows, 14))
    most = float(np.abs(values).max()) or 1.0
    image = axes.imshow(
        values,
        cmap=diverging() if signed else "Blues",
        aspect="auto",
        interpolation="none",
        vmin=-most if signed else 0,
        vmax=most,
    )
    axes.set_xticks(range(n_columns))
    label(axes.set_xticklabels, words(columns), rotation=60, ha="right", fontsize=8)
    axes.set_yticks(range(n_rows))
    label(axes.set_yticklabels, list(rows), fontsize=8)
    for side in axes.spines.values():
        side.set_visible(False)
    axes.tick_params(length=0)
    axes.set_xticks(np.arange(n_columns + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(n_rows + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="#E4E6EC", linewidth=0.6)
    axes.tick_params(which="minor", length=0)
    label(axes.set_title, words([title], 120)[0], fontsize=10, loc="left")
    figure.colorbar(image, ax=axes, label=name, fraction=0.04, pad=0.02)
    return figure


def bars(
    names: Sequence[str],
    values: Sequence[float],
    *,
    title: str,
    name: str,
    ax: Axes | None = None,
    neutral: Sequence[int] = (),
) -> Figure:
    """Bars from zero, the first on top; those at the places ``neutral`` are grey."""
    figure, axes = canvas(ax, 6.4, 1.1 + 0.27 * len(names))
    places = np.arange(len(names))[::-1]
    for place, value, i in zip(places, values, range(len(names)), strict=True):
        colour = _NEUTRAL if i in neutral else _NEGATIVE if value < 0 else _POSITIVE
        hatch = "////" if value < 0 and i not in neutral else None
        axes.barh(place, value, height=0.72, color=colour, hatch=hatch, edgecolor="white", lw=0.4)
        axes.annotate(
            f"{value:+.3g}".replace("-", "−"), (value, place), (4 if value >= 0 else -4, 0),
            textcoords="offset points", va="center", ha="left" if value >= 0 else "right",
            fontsize=7, color=_INK,
        )  # fmt: skip
    axes.axvline(0, color=_INK, linewidth=0.8)
    axes.set_yticks(places)
    label(axes.set_yticklabels, words(names, 44), fontsize=8)
    axes.margins(x=0.14, y=0.02)
    axes.set_xlabel(name, fontsize=9)
    axes.tick_params(axis="x", labelsize=8)
    axes.tick_params(axis="y", length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    label(axes.set_title, words([title], 120)[0], fontsize=10, loc="left")
    return figure
