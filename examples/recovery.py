"""How much noise until planted circuits are not found? Table and picture:

python examples/recovery.py --out docs/images/planted.png
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from sae_attn_plugin.demo.planted import recovery

NOISES = (0.0, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 0.7, 1.0)
SIZES = ({"depth": 2, "width": 4}, {"depth": 3, "width": 4}, {"depth": 3, "width": 8})


def main() -> None:
    parser = argparse.ArgumentParser(description="Recovery of planted circuits against noise")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--out", type=Path, default=Path("planted.png"))
    args = parser.parse_args()
    figure = Figure(figsize=(3.4 * len(SIZES), 3.2), layout="constrained")
    axes = figure.subplots(1, len(SIZES), sharey=True)
    for ax, sizes in zip(axes, SIZES, strict=True):
        table = recovery(NOISES, range(args.seeds), parents=2, **sizes)  # pyright: ignore[reportArgumentType]
        by_noise = table.groupby("noise")
        mean: Any = by_noise[["precision", "recall"]].mean()
        name = ", ".join(f"{key} {value}" for key, value in sizes.items())
        print(f"\n{name}: {table['edges'].mean():.0f} edges on average")
        print(mean.round(3).to_string())
        for column, colour in (("precision", "#1f77b4"), ("recall", "#d62728")):
            low, high = by_noise[column].min(), by_noise[column].max()
            ax.fill_between(mean.index, low, high, color=colour, alpha=0.15, lw=0)
            ax.plot(mean.index, mean[column], color=colour, marker="o", ms=3, label=column)
        ax.axhline(0.95, color="black", lw=0.7, ls=":")
        ax.set_xlabel("noise, relative to the weights")
        ax.set_title(name, fontsize=9)
    axes[0].set_ylabel("edges, mean and range over seeds")
    axes[0].legend(fontsize=8)
    figure.savefig(args.out, dpi=150)


if __name__ == "__main__":
    main()
