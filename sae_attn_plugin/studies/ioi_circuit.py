"""Do the SAEs keep the IOI circuit, and by which heads do features at S2 act?

Two measurements of Kissane et al. 2024. *Groups*: the SAEs of some layers take the place of what
those layers compute, without error terms, at all positions; what is left of the logit difference?
*Paths*: what one head's value input sees of one feature at S2 is taken away (path patching), while
everything else sees the feature as it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from torch import Tensor

from sae_attn_plugin.dictionaries import chosen_layers
from sae_attn_plugin.errors import InputError
from sae_attn_plugin.interventions.datasets import DatasetResult
from sae_attn_plugin.interventions.edits import AblateError, Edit, PatchEdge
from sae_attn_plugin.statistics import bootstrap
from sae_attn_plugin.studies.attention import check_heads, mean_attention
from sae_attn_plugin.studies.ioi_features import ioi_features
from sae_attn_plugin.studies.parts import in_parts
from sae_attn_plugin.studies.result import Study
from sae_attn_plugin.tasks.ioi import ROLES, IOIDataset
from sae_attn_plugin.tasks.rows import check_count

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from sae_attn_plugin.lens import FeatureLens

__all__ = ["GPT2_SMALL", "ioi_circuit", "plot"]

GPT2_SMALL: Mapping[str, tuple[int, ...]] = {
    "duplicate token": (0, 3),
    "previous token": (2, 4),
    "induction": (5, 6),
    "S-inhibition": (7, 8),
    "name movers": (9, 10, 11),
}
"""The groups of layers that the paper's authors splice in GPT-2 small."""


def ioi_circuit(
    lens: FeatureLens,
    groups: Mapping[str, Sequence[int]] | None = None,
    features: Sequence[tuple[int, int]] | None = None,
    heads: Sequence[tuple[int, int]] | None = None,
    *,
    n: int = 100,
    role: str = "S2",
    min_attention: float = 0.3,
    seed: int = 0,
    folder: Path | None = None,
    progress: bool | None = None,
) -> Study:
    """Logit difference kept by the SAEs of groups of layers, and paths from features to heads.

    Args:
        lens: model and SAEs.
        groups: layers by name. None: :data:`GPT2_SMALL` for a model of its shape, else each layer
            with an SAE by itself; all of them together are added in either case.
        features: ``(layer, feature)`` writers. None: the three of :func:`ioi_features` whose
            ablation at ``role`` lowers the logit difference most.
        heads: ``(layer, head)`` readers. None: all in layers above the features that attend from
            END to ``role`` with ``min_attention`` or more on average.
        folder: keeps finished parts, so that an interrupted study goes on where it was.

    Returns:
        Table ``groups``: ``group``, ``layers``, the ``logit_difference`` and ``kept`` (spliced /
        clean, of means), with 95 % bootstrap intervals over prompts. Table ``paths``: ``feature``
        (``attn:L:F``, or "all"), ``head`` ("L.H", or "all"), and ``effect``, the mean change of the
        logit difference when the path is cut, with its interval.

    Raises:
        InputError: a layer without SAE, a head or feature that does not exist, an unknown role.
    """
    if role not in ROLES:
        raise InputError(f"unknown role {role!r}; known: {', '.join(ROLES)}")
    check_count(n, "n")
    named = _groups(lens, groups)
    asked = None if heads is None else check_heads(lens, heads)
    data = IOIDataset(n, lens.tokenizer, seed, "mixed", prepend_bos=lens.prepend_bos)
    if features is None:
        table = ioi_features(
            lens, n=n, role=role, seed=seed, folder=folder, progress=progress
        ).table
        ranked = table.query("kind == 'feature' and order == 'both'").sort_values("effect").head(3)
        features = list(zip(ranked["layer"], ranked["feature"], strict=True))
    chosen = [(int(layer), int(feature)) for layer, feature in features]
    for layer, feature in chosen:
        if layer not in lens.dictionaries or not 0 <= feature < lens.dictionaries[layer].d_sae:
            raise InputError(f"attn:{layer}:{feature} does not exist in these SAEs")
    attention = mean_attention(lens, data, "END", role)
    if asked is None:
        lowest = min((layer for layer, _ in chosen), default=0)
        places = (attention >= min_attention).nonzero().tolist()
        asked = [(layer, head) for layer, head in places if layer > lowest]
    readers = check_heads(lens, asked)

    sets: list[tuple[str, str, list[Edit]]] = [("clean", "", [])]
    for name, layers in named.items():
        sets.append(("group", name, [AblateError(layer) for layer in layers]))
    paths: list[tuple[str, str, list[Edit]]] = []
    for layer, feature in chosen:
        for reader in readers:
            if reader[0] > layer:
                edge = _edge((layer, feature), reader, role)
                paths.append((f"attn:{layer}:{feature}", f"{reader[0]}.{reader[1]}", [edge]))
    every = [edge for *_, edges in paths for edge in edges]
    for writer in dict.fromkeys(name for name, _, _ in paths):
        mine = [edge for name, _, edges in paths for edge in edges if name == writer]
        sets.append((writer, "all", mine))
    for reader in dict.fromkeys(name for _, name, _ in paths):
        mine = [edge for _, name, edges in paths for edge in edges if name == reader]
        sets.append(("all", reader, mine))
    sets += paths
    if every:
        sets.append(("all", "all", every))

    settings = {
        **lens.provenance,
        "groups": {name: list(layers) for name, layers in named.items()},
        "features": [list(x) for x in chosen],
        "heads": [list(x) for x in readers],
        "n": n,
        "role": role,
        "min_attention": min_attention,
        "seed": seed,
    }

    def compute(number: int) -> dict[str, Tensor]:
        found = lens.intervene_dataset(data, sets[number][2], progress=False)
        assert isinstance(found, DatasetResult)
        return {"metric": found.edited.double().cpu()[None]}

    found = in_parts(
        len(sets), compute, name="ioi-circuit", folder=folder, settings=settings, progress=progress
    )["metric"].numpy()
    clean = found[0]
    group_rows, path_rows = [], []
    for (kind, name, _), metric in zip(sets, found, strict=True):
        if kind == "clean" or kind == "group":
            kept = bootstrap(np.stack([metric, clean], 1), lambda m: m[..., 0] / m[..., 1])
            layers = ", ".join(map(str, named.get(name, ())))
            row = {"group": name or "clean", "layers": layers}
            difference = bootstrap(metric).columns("logit_difference")
            group_rows.append({**row, **difference, **kept.columns("kept")})
        else:
            row = {"feature": kind, "head": name}
            path_rows.append({**row, **bootstrap(metric - clean).columns("effect")})
    columns = ["feature", "head", "effect", "effect_low", "effect_high"]
    tables = {
        "groups": pd.DataFrame(group_rows),
        "paths": pd.DataFrame(path_rows, columns=columns),
        "attention": pd.DataFrame(
            [
                {"layer": layer, "head": head, "attention": float(attention[layer, head])}
                for layer, head in readers
            ],
            columns=["layer", "head", "attention"],
        ),
    }
    return Study("ioi_circuit", settings, tables)


def _edge(feature: tuple[int, int], head: tuple[int, int], role: str) -> PatchEdge:
    return PatchEdge(f"attn:{feature[0]}:{feature[1]}", f"value:{head[0]}.{head[1]}", role)


def _groups(
    lens: FeatureLens, groups: Mapping[str, Sequence[int]] | None
) -> dict[str, tuple[int, ...]]:
    known = chosen_layers(lens.dictionaries)
    g = lens.backend.geometry
    if groups is None:
        like_gpt2 = g.n_layers == 12 and g.n_heads == 12 and known == list(range(12))
        groups = GPT2_SMALL if like_gpt2 else {f"layer {layer}": (layer,) for layer in known}
    found = {str(name): tuple(int(x) for x in layers) for name, layers in groups.items()}
    for name, layers in found.items():
        try:
            chosen_layers(lens.dictionaries, layers)
        except InputError as error:
            raise InputError(f"group {name!r}: {error}") from None
    return {**found, "all": tuple(known)}


def plot(study: Study) -> Figure:
    """What the SAEs keep, and which heads the features act through."""
    from matplotlib.figure import Figure

    groups, paths = study.tables["groups"], study.tables["paths"]
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    value, low, high = (groups[f"logit_difference{end}"] for end in ("", "_low", "_high"))
    left.barh(range(len(groups)), value, xerr=[value - low, high - value], capsize=2)
    left.set_yticks(range(len(groups)), list(groups["group"]))
    left.invert_yaxis()
    left.set(xlabel="logit difference, SAEs spliced without error")
    if len(paths):
        grid = paths.pivot(index="feature", columns="head", values="effect")
        order = [*[x for x in grid.columns if x != "all"], "all"]
        rows = [*[x for x in grid.index if x != "all"], "all"]
        grid = grid.loc[rows, order]
        size = float(np.nanmax(np.abs(grid.to_numpy()))) or 1.0
        image = right.imshow(grid, cmap="RdBu_r", vmin=-size, vmax=size, aspect="auto")
        right.set_xticks(range(len(order)), order, rotation=90, fontsize=7)
        right.set_yticks(range(len(rows)), rows, fontsize=8)
        right.set(xlabel="value input of head", title="change when the path is cut")
        figure.colorbar(image, ax=right)
    return figure
