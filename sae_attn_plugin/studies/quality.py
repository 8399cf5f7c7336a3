"""How good SAEs are, layer by layer: Table 1 of Kissane et al. 2024 for any model and SAEs.

The figures are those of :func:`sae_attn_plugin.evaluate`; the paper's are ``l0`` and
``recovered_zero``. Zero ablation of one attention layer often costs little, which makes
``recovered_zero`` easy to please; ``recovered_mean`` and ``fvu`` stand beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
import torch
from jaxtyping import Int
from torch import Tensor

from sae_attn_plugin.dictionaries import chosen_layers
from sae_attn_plugin.evaluation import METRICS, evaluate
from sae_attn_plugin.studies.parts import fingerprint, in_parts
from sae_attn_plugin.studies.result import Study
from sae_attn_plugin.tokens import check_ids

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from sae_attn_plugin.lens import FeatureLens

__all__ = ["plot", "quality"]


def quality(
    lens: FeatureLens,
    windows: Int[Tensor, "window position"],
    layers: Sequence[int] | None = None,
    *,
    batch_size: int = 16,
    seed: int = 0,
    folder: Path | None = None,
    progress: bool | None = None,
) -> Study:
    """Sparsity, error and cross-entropy kept by the SAEs of a lens, with 95 % intervals.

    Args:
        lens: model and SAEs.
        windows: token ids of text. layers: default: all with an SAE.
        folder: keeps finished layers, so that an interrupted study goes on where it was.

    Returns:
        Table ``quality``: one row per layer with ``d_sae`` and each of
        :data:`~sae_attn_plugin.evaluation.METRICS`, with ``_low`` and ``_high`` ends of its
        bootstrap interval over windows.

    Raises:
        InputError: a layer without an SAE, rows longer than the context.
    """
    g = lens.backend.geometry
    rows = check_ids(windows, g.d_vocab, g.n_ctx, g.device)
    chosen = chosen_layers(lens.dictionaries, layers)
    settings = {
        **lens.provenance,
        "layers": chosen,
        "windows": fingerprint(rows),
        "seed": seed,
    }
    # Layers share the clean forward passes, unless they are to be kept one by one.
    parts = [chosen] if folder is None else [[layer] for layer in chosen]

    def compute(number: int) -> dict[str, Tensor]:
        found = evaluate(
            lens,
            rows,
            layers=parts[number],
            rows_at_once=batch_size,
            seed=seed,
            sae_lens=False,
            progress=bool(progress) and folder is None,
        )
        values = [
            [found.table.loc[(layer, name), ["value", "low", "high"]].tolist() for name in METRICS]
            for layer in parts[number]
        ]
        return {"values": torch.tensor(values, dtype=torch.float64)}

    values = in_parts(
        len(parts), compute, name="quality", folder=folder, settings=settings, progress=progress
    )["values"]
    table = []
    for layer, found in zip(chosen, values.tolist(), strict=True):
        row: dict[str, float] = {"layer": layer, "d_sae": lens.dictionaries[layer].d_sae}
        for name, (value, low, high) in zip(METRICS, found, strict=True):
            row |= {name: value, f"{name}_low": low, f"{name}_high": high}
        table.append(row)
    return Study("quality", settings, {"quality": pd.DataFrame(table)})


def plot(study: Study) -> Figure:
    """Sparsity, cross-entropy recovered and variance explained, by layer."""
    from matplotlib.figure import Figure

    table = study.table
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    panels: list[tuple[str, dict[str, str]]] = [
        ("active features (L0)", {"l0": "L0"}),
        (
            "share of cross-entropy recovered",
            {"recovered_zero": "against zero", "recovered_mean": "against the mean"},
        ),
        ("share of variance unexplained", {"fvu": "unexplained"}),
    ]
    for axes, (label, names) in zip(figure.subplots(1, 3), panels, strict=True):
        for name, text in names.items():
            value, low, high = (table[f"{name}{end}"] for end in ("", "_low", "_high"))
            error = [(value - low).clip(lower=0), (high - value).clip(lower=0)]
            axes.errorbar(table["layer"], value, yerr=error, marker="o", capsize=2, label=text)
        axes.set(xlabel="layer", ylabel=label)
        axes.set_xticks(table["layer"])
        if len(names) > 1:
            axes.legend(fontsize=8)
    return figure
