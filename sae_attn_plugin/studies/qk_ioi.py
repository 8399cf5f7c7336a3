"""Which pairs of features make heads look at names in IOI prompts (Kissane et al. 2024, appendix).

For the heads that look from END at a name, the score is split into its terms, and a few pairs of
features are asked how much of its variance over prompts they explain. The paper reports 62 % for 8
pairs of one sub-circuit of GPT-2 small.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from tqdm.auto import tqdm

from sae_attn_plugin.errors import FileError, InputError
from sae_attn_plugin.studies.attention import check_heads, mean_attention
from sae_attn_plugin.studies.parts import make_folder
from sae_attn_plugin.studies.qk import QKVariance, qk_variance
from sae_attn_plugin.studies.result import Study, load_study
from sae_attn_plugin.tasks.ioi import ROLES, IOIDataset
from sae_attn_plugin.tasks.rows import check_count

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from sae_attn_plugin.lens import FeatureLens

__all__ = ["plot", "qk_ioi"]


def qk_ioi(
    lens: FeatureLens,
    heads: Sequence[tuple[int, int]] | None = None,
    *,
    n: int = 100,
    query: str = "END",
    keys: Sequence[str] = ("S2", "IO"),
    k: Sequence[int] = (1, 2, 4, 8, 16, 32),
    min_attention: float = 0.3,
    seed: int = 0,
    folder: Path | None = None,
    progress: bool | None = None,
) -> Study:
    """Feature pairs behind the scores of S-inhibition heads (END to S2) and name movers (to IO).

    Args:
        lens: model and SAEs.
        heads: ``(layer, head)``, looked at for every key. None: for each key, the heads that
            attend to it from ``query`` with ``min_attention`` or more on average.
        n: prompts. query, keys: roles. k: numbers of pairs.
        folder: keeps finished heads, so that an interrupted study goes on where it was.

    Returns:
        Table ``explained``: ``layer, head, key``, the mean ``attention``, ``k``, and the shares of
        variance ``explained``, ``fitted`` and ``held_out`` (see :class:`QKVariance`; pairs chosen
        on half of the prompts and judged on the other), and ``all_pairs``, what all pairs of
        features together explain. Table ``pairs``: the best ones in words of node ids. Table
        ``kinds``: the share of every kind of term; each score's shares sum to 1.

    Raises:
        InputError: an unknown role, a head that does not exist, no head that looks at a key.
    """
    for role in (query, *keys):
        if role not in ROLES:
            raise InputError(f"unknown role {role!r}; known: {', '.join(ROLES)}")
    check_count(n, "n", 4)
    asked = None if heads is None else check_heads(lens, heads)
    data = IOIDataset(n, lens.tokenizer, seed, "mixed", prepend_bos=lens.prepend_bos)
    attention = {key: mean_attention(lens, data, query, key) for key in keys}
    wanted: list[tuple[int, int, str]] = []
    for key in keys:
        places = (attention[key] >= min_attention).nonzero().tolist() if asked is None else asked
        wanted += [(int(layer), int(head), key) for layer, head in places]
    if not wanted:
        best = max(float(found.max()) for found in attention.values())
        raise InputError(
            f"no head attends from {query} to {', '.join(keys)} with {min_attention} or more on "
            f"average; the most is {best:.3f}. Lower min_attention, or pass heads="
        )
    settings = {
        **lens.provenance,
        "scores": [list(one) for one in wanted],
        "n": n,
        "query": query,
        "k": list(k),
        "seed": seed,
    }
    if folder is not None:
        make_folder(folder)
    hidden = None if progress is None else not progress
    tables: dict[str, list[pd.DataFrame]] = {}
    for layer, head, key in tqdm(wanted, desc="qk-ioi", unit="head", disable=hidden, leave=False):
        path = None if folder is None else folder / f"qk-ioi-{layer}-{head}-{query}-{key}.json"
        about = {**settings, "scores": [[layer, head, key]]}
        if path is not None and path.is_file():
            part = load_study(path)
            if part.settings != about:
                raise FileError(
                    f"{path} was made with other settings; give the same ones, or remove it to "
                    "start anew"
                )
        else:
            found = qk_variance(lens, data, layer, head, query, key, progress=False)
            mean = float(attention[key][layer, head])
            part = Study("qk_ioi", about, _tables(found, mean, k))
            if path is not None:
                part.save(path)
        for name, table in part.tables.items():
            tables.setdefault(name, []).append(table)
    whole = {name: pd.concat(parts, ignore_index=True) for name, parts in tables.items()}
    return Study("qk_ioi", settings, whole)


def _tables(found: QKVariance, attention: float, k: Sequence[int]) -> dict[str, pd.DataFrame]:
    about: dict[str, Any] = {"layer": found.layer, "head": found.head, "key": found.key}
    kinds = found.by_kind.stack().rename("share")
    kinds.index.names = ["query_kind", "key_kind"]
    frames = {
        "explained": found.table(k).assign(all_pairs=found.all_pairs),
        "pairs": found.pairs.head(max(k)),
        "kinds": kinds.reset_index(),
    }
    extra = {"explained": {"attention": attention}}
    return {
        name: pd.concat(
            [pd.DataFrame({**about, **extra.get(name, {})}, index=frame.index), frame], axis=1
        )
        for name, frame in frames.items()
    }


def plot(study: Study) -> Figure:
    """Share of the score's variance explained against the number of pairs, for every head."""
    from matplotlib.figure import Figure

    table = study.table
    keys = list(dict.fromkeys(table["key"]))
    figure = Figure(figsize=(5.2 * len(keys), 3.8), layout="constrained")
    panels = figure.subplots(1, len(keys), squeeze=False)[0]
    for axes, key in zip(panels, keys, strict=True):
        mine = table[table["key"] == key]
        for i, (head, rows) in enumerate(mine.groupby(["layer", "head"])):
            label = f"{head[0]}.{head[1]}"  # pyright: ignore[reportIndexIssue]
            axes.plot(rows["k"], rows["explained"], marker="o", ms=3, color=f"C{i % 10}")
            axes.plot(
                rows["k"], rows["held_out"], marker="o", ms=3, ls=":", color=f"C{i % 10}",
                label=label,
            )  # fmt: skip
        axes.set(
            xscale="log",
            xlabel="pairs of features",
            ylabel="share of variance explained",
            title=f"{study.settings['query']} → {key}",
            ylim=(-0.2, 1.05),
        )
        axes.legend(title="head; dotted: held out", fontsize=7, ncols=2)
    return figure
