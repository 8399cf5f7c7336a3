"""Draw the pictures of docs/concepts: writer, reader, ledger, frozen run, from the demo model.

python examples/draw_concepts.py docs/images
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import sae_attn_plugin as sap
from sae_attn_plugin.graphs.picture import write_png

BLUE, ORANGE, GREY = "#2b6cb0", "#c05621", "#718096"
TARGET = "attn:1:665@14"  # read at the last token, from what layer 0 wrote at the comma


def bars(ax: Axes, names: list[str], values: np.ndarray, title: str) -> None:
    """Signed bars, first on top."""
    colors = [BLUE if v >= 0 else ORANGE for v in values]
    ax.barh(range(len(values)), values, color=colors)
    ax.set_yticks(range(len(values)), names)
    ax.invert_yaxis()
    ax.axvline(0, color="black", linewidth=0.8)
    ax.set_title(title, loc="left")
    ax.spines[["top", "right"]].set_visible(False)


def token(run: sap.Run, position: int) -> str:
    return f"{run.token_strings[position].strip() or '(space)'}@{position}"


def writer(run: sap.Run, att: sap.Attribution) -> Figure:
    """Which writers the stream at one position consists of, as shares of one reading."""
    found = edges_into(att, TARGET)
    here: Any = found[found.position == 9]
    here = here.sort_values("weight", key=abs, ascending=False)
    top, rest = here.head(8), here.iloc[8:]
    names = [*top.source, f"{len(rest)} others"]
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    values = np.array([*top.weight, rest.weight.sum()])
    title = f"Writers at {token(run, 9)}, as {TARGET} reads them"
    bars(figure.subplots(), names, values, title)
    return figure


def reader(run: sap.Run) -> Figure:
    """Where one feature reads: by head and source position."""
    node = sap.Node.parse(TARGET)
    assert node.layer is not None
    assert node.feature is not None
    dfa = run.dfa(node.layer, node.feature, node.position)
    values = dfa.by_head_and_source.numpy()
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    ax = figure.subplots()
    limit = abs(values).max()
    image = ax.imshow(values, cmap="RdBu", vmin=-limit, vmax=limit, aspect="auto")
    ax.set_xticks(range(len(run.token_strings)), run.token_strings, rotation=45, ha="right")
    ax.set_ylabel("head of layer 1")
    ax.set_title(f"What {TARGET} reads, by head and source position", loc="left")
    figure.colorbar(image, ax=ax, label="contribution")
    return figure


def ledger(att: sap.Attribution) -> Figure:
    """Edges and constant add up to the value."""
    found = edges_into(att, TARGET).sort_values("weight", key=abs, ascending=False)
    row = att.ledger.loc[TARGET]
    names = [*found.source.head(8), f"{len(found) - 8} other edges", "constant"]
    parts = [*found.weight.head(8), found.weight.iloc[8:].sum(), row.constant]
    ends = np.cumsum(parts)
    figure = Figure(figsize=(8, 4), layout="constrained")
    ax = figure.subplots()
    for i, (part, end) in enumerate(zip(parts, ends, strict=True)):
        ax.barh(i, part, left=end - part, color=BLUE if part >= 0 else ORANGE)
    ax.barh(len(parts), row.value, color=GREY)
    ax.set_yticks(range(len(parts) + 1), [*names, "value (from the model)"])
    ax.invert_yaxis()
    ax.margins(x=0.04)
    ax.axvline(row.value, color=GREY, linestyle=":")
    ax.set_title(f"The ledger of {TARGET}: it misses by {abs(row.residual):.1e}", loc="left")
    ax.spines[["top", "right"]].set_visible(False)
    return figure


def frozen(run: sap.Run, graph: nx.DiGraph) -> Figure:
    """Edges against removals, with everything held and with everything live."""
    found = sap.validate(graph, run.lens, max_sources=25)
    figure = Figure(figsize=(8, 4), layout="constrained")
    for ax, agreement, title in zip(
        figure.subplots(1, 2),
        (found.frozen, found.free),
        ("patterns, norms, MLPs held", "everything live"),
        strict=True,
    ):
        ax.plot(agreement.table.predicted, agreement.table.measured, ".", color=BLUE)
        low, high = ax.get_xlim()
        ax.plot([low, high], [low, high], color=GREY, linewidth=0.8, zorder=0)
        ax.set_xlabel("predicted: minus the edge")
        ax.set_ylabel("measured on the model")
        ax.set_title(f"{title}: R2 {agreement.r2:.3f}", loc="left", fontsize=11)
        ax.spines[["top", "right"]].set_visible(False)
    return figure


def edges_into(att: sap.Attribution, target: str) -> pd.DataFrame:
    found = att.edges[att.edges.target == target]
    return found.assign(position=[sap.Node.parse(s).position for s in found.source])


def main(folder: Path) -> None:
    lens = sap.demo.load()
    run = lens.run(sap.demo.ioi_prompt())
    att = run.attribute(sap.LogitDiff(" Mary", " John"))
    graph = att.prune(nodes=0.8, edges=0.98).to_networkx()
    write_png(writer(run, att), folder / "concept-writer.png")
    write_png(reader(run), folder / "concept-reader.png")
    write_png(ledger(att), folder / "concept-ledger.png")
    write_png(frozen(run, graph), folder / "concept-frozen-run.png")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "docs/images"))
