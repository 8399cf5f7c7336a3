"""Which attention features carry the logit difference of IOI prompts (Kissane et al. 2024).

Every feature that is active at a role is set to zero there, one at a time, with the error term of
its SAE kept; the effect on logit(IO) - logit(S) is measured on every prompt on which it is active
and is exactly zero on the others. The error term is ablated as a row of its own, and so is the
whole layer at that role. (Figure 16a of the paper.)

Each prompt is edited at its own position of the role. (The paper's code edits every prompt at the
union of all prompts' positions.)
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pandas as pd
import torch
from torch import Tensor

from sae_attn_plugin.dictionaries import chosen_layers
from sae_attn_plugin.errors import InputError
from sae_attn_plugin.interventions.datasets import batches
from sae_attn_plugin.interventions.edits import AblateError, AblateFeature, Edit, PatchSite
from sae_attn_plugin.statistics import bootstrap
from sae_attn_plugin.studies.activations import fired
from sae_attn_plugin.studies.parts import in_parts
from sae_attn_plugin.studies.result import Study
from sae_attn_plugin.tasks.ioi import ROLES, IOIDataset
from sae_attn_plugin.tasks.rows import check_count

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from sae_attn_plugin.lens import FeatureLens

__all__ = ["ioi_features", "plot"]

Order = Literal["ABBA", "BABA", "mixed"]


def ioi_features(
    lens: FeatureLens,
    layers: Sequence[int] | None = None,
    *,
    n: int = 100,
    role: str = "S2",
    order: Order = "mixed",
    seed: int = 0,
    folder: Path | None = None,
    progress: bool | None = None,
) -> Study:
    """The effect of every feature at a role on the logit difference.

    Args:
        lens: model and SAEs.
        layers: whose features to look at. None: all layers with an SAE.
        n: prompts. role: one of IO, S1, S1+1, S2, END, AND.
        folder: keeps finished parts, so that an interrupted study goes on where it was.

    Returns:
        Table ``features``: one row per feature, error term or layer, and order of the names:
        ``kind`` ("feature", "error" or "layer"), ``layer``, ``feature``, ``order`` ("both", "ABBA",
        "BABA"), ``active`` (share of prompts), and ``effect``, the mean change of the logit
        difference when it is set to zero, with its 95 % bootstrap interval over prompts; the
        largest first. Table ``clean``: the logit difference as it is.

    Raises:
        InputError: an unknown role, a layer without SAE, no feature active.
    """
    if role not in ROLES:
        raise InputError(f"unknown role {role!r}; known: {', '.join(ROLES)}")
    chosen = chosen_layers(lens.dictionaries, layers)
    check_count(n, "n")
    data = IOIDataset(n, lens.tokenizer, seed, order, prepend_bos=lens.prepend_bos)
    settings = {
        **lens.provenance,
        "layers": chosen,
        "n": n,
        "role": role,
        "order": order,
        "seed": seed,
    }
    active = _active(lens, data, role, chosen)
    if not active:
        raise InputError(f"no feature of layers {chosen} is active at {role} on these prompts")
    everyone = list(range(n))
    rows: list[tuple[str, int, int, list[int], Edit]] = []
    for layer in chosen:
        nothing = PatchSite("attn_out", layer, role, to=None)
        rows.append(("layer", layer, -1, everyone, nothing))
        rows.append(("error", layer, -1, everyone, AblateError(layer, role)))
    for (layer, feature), prompts in active.items():
        edit = AblateFeature(layer, feature, role)
        rows.append(("feature", layer, feature, prompts, edit))

    def compute(number: int) -> dict[str, Tensor]:
        _, _, _, prompts, edit = rows[number]
        effect = torch.zeros(1, n, dtype=torch.float64)
        for members in batches(lens, data, prompts):
            result = lens.intervene(lens.run_rows(data, members), [edit])
            effect[0, members] = (result.metric - result.clean_metric).double().cpu()
        return {"effect": effect}

    common: dict[str, Any] = {"folder": folder, "settings": settings, "progress": progress}
    effects = in_parts(len(rows), compute, name="ioi-features", **common)["effect"]
    orders = [sample.order for sample in data.samples]
    table = []
    for (kind, layer, feature, prompts, _), effect in zip(rows, effects, strict=True):
        for which in ("both", *sorted(set(orders))):
            mine = [i for i in range(n) if which in ("both", orders[i])]
            row = {"kind": kind, "layer": layer, "feature": feature, "order": which}
            row["active"] = len(set(prompts) & set(mine)) / len(mine)
            table.append({**row, **bootstrap(effect[mine].numpy()).columns("effect")})
    frame = pd.DataFrame(table)
    size = frame["effect"].abs().where(frame["order"] == "both")
    rank = size.groupby([frame["kind"], frame["layer"], frame["feature"]]).transform("max")
    frame = frame.assign(rank=rank).sort_values("rank", ascending=False, kind="stable")
    tables = {
        "features": frame.drop(columns="rank").reset_index(drop=True),
        "clean": _clean(lens, data, orders),
    }
    return Study("ioi_features", settings, tables)


def _active(
    lens: FeatureLens, data: IOIDataset, role: str, layers: list[int]
) -> dict[tuple[int, int], list[int]]:
    """On which prompts each feature is active at the role."""
    found: dict[tuple[int, int], list[int]] = {}
    device = lens.backend.geometry.device
    for members in batches(lens, data):
        length = int(data.lengths[members[0]])
        tokens = data.tokens[members, :length].to(device)
        at = data.positions[role][members].to(device)
        for layer, hits in fired(lens, layers, tokens).items():
            here = hits["position"] == at[hits["row"]]
            columns = (hits["row"][here].tolist(), hits["feature"][here].tolist())
            for row, feature in zip(*columns, strict=True):
                found.setdefault((layer, feature), []).append(members[row])
    return {key: sorted(found[key]) for key in sorted(found)}


def _clean(lens: FeatureLens, data: IOIDataset, orders: list[str]) -> pd.DataFrame:
    clean = torch.zeros(len(data), dtype=torch.float64)
    for members in batches(lens, data):
        run = lens.run_rows(data, members)
        clean[members] = run.roles.score(run.logits).double().cpu()
    rows = []
    for which in ("both", *sorted(set(orders))):
        mine = [i for i, order in enumerate(orders) if which in ("both", order)]
        found = bootstrap(clean[mine].numpy())
        rows.append({"order": which, "n": len(mine), **found.columns("logit_difference")})
    return pd.DataFrame(rows)


def plot(study: Study, count: int = 20) -> Figure:
    """The strongest features, with the error terms, by order of the names."""
    from matplotlib.figure import Figure

    table = study.table
    names = [
        f"{kind} {layer}" if kind != "feature" else f"attn:{layer}:{feature}"
        for kind, layer, feature in zip(
            table["kind"], table["layer"], table["feature"], strict=True
        )
    ]
    table = table.assign(name=names)
    shown = [n for n in dict.fromkeys(names) if not n.startswith("layer")][:count]
    figure = Figure(figsize=(9, 0.26 * len(shown) + 1.4), layout="constrained")
    axes = figure.subplots()
    orders = [o for o in ("ABBA", "BABA") if o in set(table["order"])] or ["both"]
    for i, order in enumerate(orders):
        rows = table[table["order"] == order].set_index("name").loc[shown]
        places = [k + 0.38 * (i - (len(orders) - 1) / 2) for k in range(len(shown))]
        error = [rows["effect"] - rows["effect_low"], rows["effect_high"] - rows["effect"]]
        axes.barh(places, rows["effect"], 0.36, xerr=error, label=order, capsize=2)
    axes.set_yticks(range(len(shown)), shown)
    axes.invert_yaxis()
    axes.axvline(0, color="black", lw=0.8)
    axes.set(xlabel=f"change of the logit difference when ablated at {study.settings['role']}")
    axes.legend(title="order", fontsize=8)
    return figure
