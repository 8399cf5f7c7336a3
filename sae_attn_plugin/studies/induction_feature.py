"""Induction features: "X is next by induction", against what the text says (Kissane et al. 2024).

The *proxy* for a token X is true at a position if an earlier occurrence of the token there was
followed by X at once, both up to a leading space and letter case. A feature is measured as a
classifier of its proxy: precision (it fires, so the proxy holds), recall (the proxy holds, so it
fires), specificity, and precision by quantile of activation.

Which token X belongs to a feature is found on one half of the windows; everything reported is
measured on the other half. The paper looked at one feature of one model by hand, and its two
classes were drawn on different scales; here every feature is measured, in counts on one scale.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from jaxtyping import Int
from scipy import sparse
from torch import Tensor

from sae_attn_plugin.dictionaries import chosen_layers
from sae_attn_plugin.errors import InputError
from sae_attn_plugin.statistics import NOTHING, bootstrap
from sae_attn_plugin.studies.activations import fired
from sae_attn_plugin.studies.parts import fingerprint, in_parts
from sae_attn_plugin.studies.result import Study
from sae_attn_plugin.tasks.induction import fuzzy_classes
from sae_attn_plugin.tasks.rows import check_count
from sae_attn_plugin.tokens import check_ids, single_token, token_string

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from sae_attn_plugin.lens import FeatureLens

__all__ = ["induction_feature", "plot", "proxies"]


def induction_feature(
    lens: FeatureLens,
    windows: Int[Tensor, "window position"],
    layer: int,
    feature: int | None = None,
    token: str | int | None = None,
    *,
    quantiles: int = 10,
    min_fires: int = 20,
    examples: int = 5,
    batch_size: int = 16,
    folder: Path | None = None,
    progress: bool | None = None,
) -> Study:
    """How well features of a layer say "X is next by induction".

    Args:
        lens: model and SAEs.
        windows: token ids of text, the first position BOS or an ordinary token.
        layer: whose SAE to look at.
        feature: the one to look at closely. None: the one with the highest F1.
        token: X of that feature. None: the token whose proxy it fits best on the first half.
        quantiles: bins of activation, of equal numbers of firings.
        min_fires: features that fire on fewer positions of either half are left out of
            ``features``.
        examples: how many false positives and misses to show.
        folder: keeps finished parts, so that an interrupted study goes on where it was.

    Returns:
        Tables ``feature`` (the one looked at: counts, precision, recall, specificity and F1 with
        95 % bootstrap intervals over windows), ``quantiles`` (activation range, firings, how many
        have the proxy, precision with interval), ``examples`` (false positives and misses in
        context) and ``features`` (every feature of the layer with its best token).

    Raises:
        InputError: a layer without SAE, a feature or token that does not exist, fewer than four
            windows, a feature that never fires, no feature that fires often enough.
    """
    g = lens.backend.geometry
    chosen_layers(lens.dictionaries, [layer])
    d_sae = lens.dictionaries[layer].d_sae
    if feature is not None and not 0 <= feature < d_sae:
        raise InputError(f"feature {feature} does not exist: layer {layer} has 0..{d_sae - 1}")
    if token is not None and feature is None:
        raise InputError("token= belongs to one feature; pass feature= with it")
    for name, value in (("quantiles", quantiles), ("batch_size", batch_size)):
        check_count(value, name)
    rows = check_ids(windows, g.d_vocab, g.n_ctx, g.device)
    if len(rows) < 4:
        raise InputError(f"at least 4 windows are needed, for two halves; got {len(rows)}")
    classes = fuzzy_classes(lens.tokenizer, g.d_vocab)
    wanted = None if token is None else single_token(lens.tokenizer, token, g.d_vocab)
    settings = {
        **lens.provenance,
        "layer": layer,
        "feature": feature,
        "token": None if wanted is None else token_string(lens.tokenizer, wanted),
        "windows": fingerprint(rows),
        "quantiles": quantiles,
        "min_fires": min_fires,
    }
    chunks = rows.split(batch_size)

    def compute(number: int) -> dict[str, Tensor]:
        found = fired(lens, [layer], chunks[number])[layer]
        return {**found, "row": found["row"] + number * batch_size}

    about = {**lens.provenance, "layer": layer, "windows": settings["windows"]}
    found = in_parts(
        len(chunks),
        compute,
        name=f"fired-{layer}",
        folder=folder,
        settings=about,
        progress=progress,
    )
    bos = None if lens.tokenizer is None else lens.tokenizer.bos_token_id
    places = _Places(rows.cpu(), classes, bos, found, d_sae)
    table = _features(lens, layer, places, min_fires)
    if feature is None:
        if table.empty:
            raise InputError(
                f"no feature of layer {layer} fires on {min_fires} positions of each half of the "
                "windows; give more windows, or lower min_fires"
            )
        feature = int(table.iloc[0]["feature"])
    if wanted is None:
        wanted = places.best_token(feature)
    close = _one(lens, layer, places, feature, int(classes[wanted]), quantiles, examples)
    return Study("induction_feature", settings, {**close, "features": table})


def proxies(
    tokens: Int[Tensor, "window position"],
    classes: Int[Tensor, " d_vocab"],
    bos: int | None = None,
) -> sparse.csr_matrix:
    """Which tokens are next by induction: ``[window * position, class]``, true where an earlier
    occurrence of the class at a position was followed by the class of the column. A BOS at the
    start of a window is no occurrence."""
    n, length = tokens.shape
    ids = classes.cpu()[tokens.cpu()].numpy()
    starts = (tokens[:, 0].cpu() == (-1 if bos is None else bos)).long().tolist()
    place, column = [], []
    for row in range(n):
        followers: dict[int, set[int]] = {}
        line = ids[row].tolist()
        for position in range(starts[row], length):
            seen = followers.get(line[position], ())
            place += [row * length + position] * len(seen)
            column += seen
            if position + 1 < length:
                # what follows this occurrence is known to later ones
                followers.setdefault(line[position], set()).add(line[position + 1])
    return sparse.csr_matrix(
        (np.ones(len(place), bool), (place, column)), shape=(n * length, len(classes))
    )


class _Places:
    """Firings and proxies of all positions; the first half of the windows and the second."""

    def __init__(
        self, tokens: Tensor, classes: Tensor, bos: int | None, found: dict[str, Tensor], d_sae: int
    ) -> None:
        self.tokens = tokens
        n, self.length = tokens.shape
        self.split = n // 2 * self.length
        self.bos = bos
        place = (found["row"] * self.length + found["position"]).numpy()
        shape = (n * self.length, d_sae)
        values = (found["activation"].double().numpy(), (place, found["feature"].numpy()))
        self.activation = sparse.csr_matrix(values, shape=shape).tocsc()
        self.proxy = proxies(tokens, classes, bos)
        # Positions at which a proxy can be asked for: all but a BOS.
        self.ordinary = np.ones(n * self.length, bool)
        if bos is not None:
            self.ordinary[:: self.length] = tokens[:, 0].numpy() != bos

    def half(self, second: bool) -> slice:
        return slice(self.split, None) if second else slice(0, self.split)

    def together(self, second: bool) -> tuple[sparse.csr_matrix, np.ndarray, np.ndarray]:
        """``[feature, class]`` counts of firing with the proxy true, firings, and proxies."""
        rows = self.half(second)
        ordinary = self.ordinary[rows]
        fires = (self.activation.tocsr()[rows][ordinary] > 0).astype(np.int64)
        proxy = self.proxy[rows][ordinary].astype(np.int64)
        both = sparse.csr_matrix(fires.T @ proxy)
        return both, np.asarray(fires.sum(0))[0], np.asarray(proxy.sum(0))[0]

    def best_token(self, feature: int) -> int:
        """The class whose proxy the feature fits best on the first half, by F1."""
        both, fires, proxy = self.together(second=False)
        row = both[feature]
        if not row.nnz:
            raise InputError(
                f"feature {feature} never fires in the first half of the windows where a token "
                "could be next by induction; give more windows, or pass token="
            )
        f1 = 2 * row.data / (fires[feature] + proxy[row.indices])
        return int(row.indices[f1.argmax()])


def _features(lens: FeatureLens, layer: int, places: _Places, min_fires: int) -> pd.DataFrame:
    """Best token of every feature, found on the first half and measured on the second."""
    both, fires, proxy = places.together(second=False)
    again, fires2, proxy2 = places.together(second=True)
    n = int(places.ordinary[places.half(second=True)].sum())
    live = np.flatnonzero((fires >= min_fires) & (fires2 >= min_fires))
    rows = []
    for feature in live.tolist():
        mine = both[feature]
        if not mine.nnz:
            continue
        token = int(mine.indices[(2 * mine.data / (fires[feature] + proxy[mine.indices])).argmax()])
        true = int(again[feature, token])
        scores = _scores(true, int(fires2[feature]), int(proxy2[token]), n)
        text = token_string(lens.tokenizer, token)
        row = {"layer": layer, "feature": feature, "token": text, "fires": int(fires2[feature])}
        rows.append({**row, "proxy": int(proxy2[token]), **scores})
    columns = ["layer", "feature", "token", "fires", "proxy", *_SCORES]
    table = pd.DataFrame(rows, columns=columns)
    return table.sort_values("f1", ascending=False, kind="stable").reset_index(drop=True)


_SCORES = ("precision", "recall", "specificity", "f1", "base_rate")


def _scores(true: int, fires: int, proxy: int, n: int) -> dict[str, float]:
    """Of a classifier: ``base_rate`` is the precision of firing anywhere."""
    return {
        "precision": true / fires if fires else np.nan,
        "recall": true / proxy if proxy else np.nan,
        "specificity": 1 - (fires - true) / (n - proxy) if n > proxy else np.nan,
        "f1": 2 * true / (fires + proxy) if fires + proxy else np.nan,
        "base_rate": proxy / n,
    }


def _one(
    lens: FeatureLens,
    layer: int,
    places: _Places,
    feature: int,
    token: int,
    quantiles: int,
    examples: int,
) -> dict[str, pd.DataFrame]:
    """One feature closely, on the second half of the windows."""
    rows = places.half(second=True)
    activation = places.activation[:, [feature]].toarray()[rows, 0]
    proxy = places.proxy[:, [token]].toarray()[rows, 0]
    ordinary = places.ordinary[rows]
    fires = (activation > 0) & ordinary
    if not fires.any():
        raise InputError(
            f"feature {feature} never fires in the second half of the windows; give more windows"
        )
    window = np.arange(len(fires)) // places.length

    def per_window(mask: np.ndarray) -> np.ndarray:
        return np.bincount(window[mask], minlength=window[-1] + 1).astype(float)

    # Columns: both, fires, proxy, positions.
    counts = np.stack(
        [per_window(mask) for mask in (fires & proxy, fires, proxy & ordinary, ordinary)], 1
    )
    total = counts.sum(0).astype(int).tolist()
    text = token_string(lens.tokenizer, token)
    row: dict[str, Any] = {"layer": layer, "feature": feature, "token": text}
    row |= dict(zip(("both", "fires", "proxy", "positions"), total, strict=True))
    for name, statistic in {
        "precision": lambda m: m[..., 0] / m[..., 1],
        "recall": lambda m: m[..., 0] / m[..., 2],
        "specificity": lambda m: 1 - (m[..., 1] - m[..., 0]) / (m[..., 3] - m[..., 2]),
        "f1": lambda m: 2 * m[..., 0] / (m[..., 1] + m[..., 2]),
    }.items():
        possible = total[2] > 0 or name != "recall"
        row |= (bootstrap(counts, statistic) if possible else NOTHING).columns(name)
    return {
        "feature": pd.DataFrame([row]),
        "quantiles": _quantiles(activation[fires], proxy[fires], quantiles),
        "examples": _examples(lens, places, activation, fires, proxy & ordinary, examples),
    }


def _quantiles(activation: np.ndarray, proxy: np.ndarray, quantiles: int) -> pd.DataFrame:
    order = np.argsort(activation, kind="stable")
    rows = []
    for number, part in enumerate(np.array_split(order, min(quantiles, len(order)))):
        found = bootstrap(proxy[part].astype(float))
        rows.append(
            {
                "quantile": number + 1,
                "activation_from": float(activation[part].min()),
                "activation_to": float(activation[part].max()),
                "fires": len(part),
                "proxy": int(proxy[part].sum()),
                "activation_sum": float(activation[part].sum()),
                "activation_sum_proxy": float(activation[part][proxy[part]].sum()),
                **found.columns("precision"),
            }
        )
    return pd.DataFrame(rows)


def _examples(
    lens: FeatureLens,
    places: _Places,
    activation: np.ndarray,
    fires: np.ndarray,
    proxy: np.ndarray,
    count: int,
) -> pd.DataFrame:
    """The strongest false positives, and misses, with the tokens before and the next one."""
    wrong = np.flatnonzero(fires & ~proxy)
    wrong = wrong[np.argsort(-activation[wrong], kind="stable")][:count]
    missed = np.flatnonzero(~fires & proxy)
    missed = missed[:: max(1, len(missed) // max(count, 1))][:count]
    rows = []
    for kind, found in (("false positive", wrong), ("miss", missed)):
        for place in found.tolist():
            window, position = divmod(place + places.split, places.length)
            line = places.tokens[window].tolist()
            text = [token_string(lens.tokenizer, t) for t in line]
            rows.append(
                {
                    "kind": kind,
                    "window": window,
                    "position": position,
                    "activation": float(activation[place]),
                    "before": "".join(text[max(0, position - 12) : position + 1]),
                    "next": text[position + 1] if position + 1 < len(text) else "",
                }
            )
    columns = ["kind", "window", "position", "activation", "before", "next"]
    return pd.DataFrame(rows, columns=columns)


def plot(study: Study) -> Figure:
    """Firings by activation with and without the proxy, on one scale, and precision."""
    from matplotlib.figure import Figure

    one, table = study.tables["feature"].iloc[0], study.tables["quantiles"]
    figure = Figure(figsize=(9.5, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    places = table["quantile"]
    left.bar(places, table["activation_sum_proxy"], color="C0", label="proxy true")
    rest = table["activation_sum"] - table["activation_sum_proxy"]
    bottom = table["activation_sum_proxy"]
    left.bar(places, rest, bottom=bottom, color="C1", label="proxy false")
    left.set(xlabel="quantile of activation", ylabel="sum of activations")
    left.legend(fontsize=8)
    low, high = (table[f"precision_{end}"] for end in ("low", "high"))
    error = [(table["precision"] - low).fillna(0), (high - table["precision"]).fillna(0)]
    right.errorbar(places, table["precision"], yerr=error, marker="o", capsize=2)
    right.axhline(one["proxy"] / one["positions"], color="grey", ls=":", label="base rate")
    right.set(xlabel="quantile of activation", ylabel="precision", ylim=(-0.02, 1.02))
    right.legend(fontsize=8)
    figure.suptitle(
        f"attn:{one['layer']}:{one['feature']} as “{one['token']!r} is next by induction”: "
        f"precision {one['precision']:.2f}, recall {one['recall']:.2f}",
        fontsize=10,
    )
    return figure
