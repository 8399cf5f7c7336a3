"""Does attention tell the second subject where the first one stood relative to " and"?

The test of Kissane et al. 2024 (Fig. 5): in the clean run, what some attention layers write at S2
is replaced by what they write there on a counterpart of the prompt. If a counterpart that keeps a
relation keeps the logit difference, and one that breaks it does not, those layers carry that
relation.

Two flaws of the paper's code are not repeated: the zero ablation it draws as baseline was at all
positions and not at S2 (both are given here, by name), and each prompt is patched at its own S2.
Added: the swapped pair, which turns the relation round and leaves all else; several conjunctions;
intervals over prompts, paired.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from torch import Tensor

from sae_attn_plugin.errors import InputError
from sae_attn_plugin.interventions.datasets import DatasetResult
from sae_attn_plugin.interventions.edits import Edit, From, Mean, PatchSite
from sae_attn_plugin.statistics import NOTHING, bootstrap
from sae_attn_plugin.studies.parts import in_parts
from sae_attn_plugin.studies.result import Study
from sae_attn_plugin.tasks.ioi import ROLES, IOIDataset, knows
from sae_attn_plugin.tasks.rows import check_count

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from sae_attn_plugin.lens import FeatureLens

__all__ = ["CONJUNCTIONS", "ioi_positions", "plot"]

CONJUNCTIONS = (" alongside", " or", " with", " but", " near", " beside")


def ioi_positions(
    lens: FeatureLens,
    layers: Sequence[int] | None = None,
    *,
    n: int = 100,
    role: str = "S2",
    conjunctions: Sequence[str] = CONJUNCTIONS,
    seed: int = 0,
    folder: Path | None = None,
    progress: bool | None = None,
) -> Study:
    """Replace what attention layers write at S2 by what they write on counterparts of the prompt.

    Args:
        lens: the model; its SAEs are not used.
        layers: patched together. The paper's are 5 and 6 of GPT-2 small. None: the layer whose
            output at ``role``, put to its mean over the prompts, lowers the logit difference most,
            and the one after it.
        conjunctions: words that take the place of " and" between the pair; those with words that
            the tokenizer does not know are left out and told in the settings.
        folder: keeps finished parts, so that an interrupted study goes on where it was.

    Returns:
        Table ``conditions``: ``condition``, ``relation`` ("kept", "turned", "removed", "ablated"),
        the ``logit_difference``, ``retained`` (edited / clean, of means) and ``recovered``
        ((edited - zero at S2) / (clean - zero at S2)), each with a 95 % bootstrap interval over
        prompts, all columns of a prompt resampled together. Table ``layers``: what the choice of
        layers was made from.

    Raises:
        InputError: a layer or role that does not exist, no conjunction left.
    """
    g = lens.backend.geometry
    if role not in ROLES:
        raise InputError(f"unknown role {role!r}; known: {', '.join(ROLES)}")
    check_count(n, "n")
    if isinstance(conjunctions, str):
        raise InputError(f"conjunctions must be a list, got one string {conjunctions!r}")
    data = IOIDataset(n, lens.tokenizer, seed, "mixed", prepend_bos=lens.prepend_bos)
    by_layer = _by_layer(lens, data, role, progress)
    if layers is None:
        first = int(by_layer["effect"].to_numpy().argmin())
        layers = [first, *([first + 1] if first + 1 < g.n_layers else [])]
    chosen = sorted({int(layer) for layer in layers})
    if not chosen or not 0 <= chosen[0] <= chosen[-1] < g.n_layers:
        raise InputError(f"layers {chosen} do not exist: {g.model_name} has 0..{g.n_layers - 1}")
    known = [word for word in conjunctions if knows(lens.tokenizer, f" {word.strip()}")]
    if conjunctions and not known:
        raise InputError(
            f"the tokenizer knows none of the conjunctions {list(conjunctions)}; pass others"
        )
    names = data.new_names()
    counterparts: dict[str, tuple[str, IOIDataset]] = {
        "new names": ("kept", names),
        "sentence in front": ("kept", data.with_sentence_in_front()),
        "inserted clause": ("kept", data.with_inserted_clause()),
        "all three": ("kept", names.with_sentence_in_front().with_inserted_clause()),
        "swapped pair": ("turned", data.swapped()),
        "new names, swapped": ("turned", names.swapped()),
        "three names": ("removed", data.abc()),
    }
    for word in known:
        counterparts[f"“and” → “{word.strip()}”"] = ("removed", data.with_conjunction(word))

    def patch(position: str | None, to: From | Mean | None) -> list[Edit]:
        return [PatchSite("attn_out", layer, position, to) for layer in chosen]

    runs: list[tuple[str, str, list[Edit], IOIDataset | None]] = [
        ("clean", "kept", [], None),
        *((c, relation, patch(role, From()), d) for c, (relation, d) in counterparts.items()),
        (f"mean at {role}", "ablated", patch(role, Mean()), data),
        (f"zero at {role}", "ablated", patch(role, None), None),
        ("zero at all positions", "ablated", patch(None, None), None),
    ]
    settings = {
        **lens.provenance,
        "layers": chosen,
        "n": n,
        "role": role,
        "conjunctions": known,
        "unknown_conjunctions": [word for word in conjunctions if word not in known],
        "seed": seed,
    }

    def compute(number: int) -> dict[str, Tensor]:
        _, _, edits, source = runs[number]
        sources = {} if source is None else {"source": source}
        found = lens.intervene_dataset(data, edits, sources=sources, progress=False)
        assert isinstance(found, DatasetResult)
        return {"metric": found.edited.double().cpu()[None]}

    found = in_parts(
        len(runs),
        compute,
        name="ioi-positions",
        folder=folder,
        settings=settings,
        progress=progress,
    )["metric"]
    metric = dict(zip((name for name, *_ in runs), found.numpy(), strict=True))
    rows = []
    for name, relation, _, _ in runs:
        columns = np.stack([metric[name], metric["clean"], metric[f"zero at {role}"]], 1)
        kept = bootstrap(columns, lambda m: m[..., 0] / m[..., 1])
        zero = bootstrap(columns, lambda m: (m[..., 0] - m[..., 2]) / (m[..., 1] - m[..., 2]))
        rows.append(
            {
                "condition": name,
                "relation": relation,
                **bootstrap(metric[name]).columns("logit_difference"),
                **kept.columns("retained"),
                **(zero if name != f"zero at {role}" else NOTHING).columns("recovered"),
            }
        )
    tables = {"conditions": pd.DataFrame(rows), "layers": by_layer.reset_index()}
    return Study("ioi_positions", settings, tables)


def _by_layer(
    lens: FeatureLens, data: IOIDataset, role: str, progress: bool | None
) -> pd.DataFrame:
    """The effect of each layer's output at the role, put to its mean over the prompts."""
    sets = {
        str(layer): [PatchSite("attn_out", layer, role, Mean())]
        for layer in range(lens.backend.geometry.n_layers)
    }
    found = lens.intervene_dataset(data, sets, sources={"source": data}, progress=progress)
    assert isinstance(found, dict)
    rows = [{"layer": int(k), **r.interval().columns("effect")} for k, r in found.items()]
    return pd.DataFrame(rows).set_index("layer")


def plot(study: Study) -> Figure:
    """The logit difference under every counterpart, coloured by what becomes of the relation."""
    from matplotlib.figure import Figure

    table = study.table
    colours = {"kept": "C0", "turned": "C3", "removed": "C1", "ablated": "0.6"}
    figure = Figure(figsize=(8.5, 0.3 * len(table) + 1.2), layout="constrained")
    axes = figure.subplots()
    value, low, high = (table[f"logit_difference{end}"] for end in ("", "_low", "_high"))
    places = range(len(table))
    axes.barh(
        places,
        value,
        xerr=[value - low, high - value],
        color=[colours[r] for r in table["relation"]],
        capsize=2,
    )
    axes.set_yticks(places, list(table["condition"]))
    axes.invert_yaxis()
    axes.axvline(float(value.iloc[0]), color="C0", ls=":", lw=1)
    layers = ", ".join(map(str, study.settings["layers"]))
    axes.set(
        xlabel=f"logit difference, attention of layers {layers} patched at {study.settings['role']}"
    )
    handles = [axes.bar(0, 0, color=c) for c in colours.values()]
    axes.legend(handles, list(colours), title="relation to “and”", fontsize=8)
    return figure
