"""What every head does, by its features: the paper's table of heads, with the checks it lacked.

*Top features.* A feature belongs to a head by the norm of its decoder row there (``decoder``: the
paper's h_ik, :func:`sae_attn_plugin.head_attribution`), by measured direct feature attribution
(``dfa``: the head's share of the sum of ``|DFA by head|`` over all firings in the corpus), or by
how much the head does for it in all (``total``: number of firings times mean ``|DFA|`` of the head,
which favours features that fire often). Features that fire fewer than ``min_fires`` times in the
corpus are left out: of a dead feature only the decoder is known, and it says nothing.

*Agreement* of decoder and DFA: Spearman's rank correlation over the layer's live features, and how
many of the ``top`` features are the same.

*Monosemanticity*: how alike a head's top features are, in up to four ways, each a mean over pairs:

- ``direction``: cosine of the head's slices of their decoder rows (needs ``lens=``);
- ``cofiring``: Jaccard index of the positions at which they fire, in the sample of positions;
- ``tokens``: cosine of the counts of destination tokens and of strongest source tokens in their
  strongest examples;
- ``families``: Jaccard index of the families they belong to (needs ``families=``).

Each is compared with sets of random features of the same layer that fire about as often: feature
by feature a random one among those closest in number of firings. A component's *excess* is
``(value - null mean) / (1 - null mean)``, 0 for a random set and 1 for identical features; the
score is the mean excess. A head is called monosemantic if its score reaches the threshold and at
most 5 % of the random sets score as high. The paper read ten features of each head by eye and found
14 of GPT-2 small's 144 heads plausibly monosemantic.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy import sparse
from scipy.stats import rankdata

from sae_attn_plugin.errors import InputError
from sae_attn_plugin.statistics import Interval
from sae_attn_plugin.studies.firings import Text, chosen_layers, firings, text
from sae_attn_plugin.studies.result import Study
from sae_attn_plugin.tasks.rows import check_count

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from sae_attn_plugin.corpus.survey import Survey
    from sae_attn_plugin.lens import FeatureLens

__all__ = ["heads", "plot"]

_BY = ("decoder", "dfa", "total")
_ALIKE = ("decoder", "dfa")  # rankings whose top features are compared with each other
_THRESHOLDS = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5)
_LEVEL = 0.05  # of random sets that may score as high
_NEIGHBOURS = 25  # features on either side, by firings, that a random one is drawn from
_MUCH = 0.2  # of a head's DFA, for a family to be named
_REDRAWN = 20  # times, until the features of a set differ
_DRAWN_AT_ONCE = 2**24


def heads(
    survey: Survey,
    *,
    lens: FeatureLens | None = None,
    families: Study | None = None,
    layers: Sequence[int] | None = None,
    top: int = 10,
    threshold: float = 0.2,
    tops: Sequence[int] = (3, 5, 10, 20),
    min_fires: int = 10,
    random_sets: int = 100,
    resamples: int = 1000,
    seed: int = 0,
) -> Study:
    """The table of heads of a corpus survey, with agreement and monosemanticity.

    Args:
        survey: a finished corpus survey.
        lens: with the SAEs of the survey, for their decoder directions.
        families: what :func:`sae_attn_plugin.studies.families` found in the same survey.
        layers: all of the survey by default.
        top: features of a head that are looked at.
        threshold: of the monosemanticity score.
        tops: numbers of top features, to see how much the result depends on ``top``.
        min_fires: features with fewer firings in the corpus are left out.
        random_sets: drawn for each head. resamples: of the bootstrap. seed: of both.

    Returns:
        Tables ``heads`` (one row per head: live features, its share of the layer's |DFA|,
        ``agreement`` with bootstrap interval over features, ``agreement_by_firings`` with features
        weighted by their firings, ``overlap`` of the top features and what chance gives, and for
        both rankings score, p and whether it is called monosemantic, the families that a fifth or
        more of its ``|DFA|`` goes into), ``features`` (the top features of each head by each
        ranking: share, firings, families, tokens promoted most), ``components`` (each component
        with its random sets' mean, 95 % quantile and excess), ``sensitivity`` (share of heads
        called monosemantic for numbers of top features and thresholds) and, with ``families=``,
        ``families`` (what part of each head's ``|DFA|`` goes into members of each family, and how
        many of them are among its top features by DFA).

    Raises:
        InputError: a layer not in the survey, SAEs other than the survey's, fewer live features
            than ``top`` in a layer, numbers out of range.
    """
    wanted = chosen_layers(survey, layers)
    for name, value in (("top", top), ("min_fires", min_fires), ("random_sets", random_sets)):
        check_count(value, name, 2 if name == "top" else 1)
    sizes = sorted({*map(int, tops), top})
    if sizes[0] < 2:
        raise InputError(f"tops={list(tops)}: a pair needs at least 2 features")
    if not 0 < threshold <= 1:
        raise InputError(f"threshold={threshold}: expected a number in (0, 1]")
    if lens is not None:
        _check_same(survey, lens, wanted)
    where = text(survey)
    rng = np.random.default_rng(seed)
    parts: dict[str, list[pd.DataFrame]] = {"heads": [], "features": [], "components": []}
    scores: list[pd.DataFrame] = []
    for layer in wanted:
        one = _Layer(survey, layer, where, lens, families, min_fires, top)
        table = one.agreement(resamples, rng)
        alike, components = one.monosemanticity(sizes, random_sets, rng)
        scores.append(alike)
        at_top: Any = alike[alike["top"] == top]
        for by in _ALIKE:
            mine = at_top[at_top["by"] == by].set_index("head")
            table[f"score_{by}"] = table["head"].map(mine["score"])
            table[f"p_{by}"] = table["head"].map(mine["p"])
            said = (mine["score"] >= threshold) & (mine["p"] <= _LEVEL)
            table[f"monosemantic_{by}"] = table["head"].map(said)
        features = one.table()
        if families is not None:
            shares = one.by_family(families)
            table["families"] = table["head"].map(_most(shares))
            parts.setdefault("families", []).append(shares)
        parts["heads"].append(table)
        parts["features"].append(features)
        parts["components"].append(components.query("top == @top"))
    tables = {name: pd.concat(some, ignore_index=True) for name, some in parts.items()}
    tables["sensitivity"] = _sensitivity(pd.concat(scores), threshold)
    settings = {
        **survey.facts["provenance"],
        "survey": {key: survey.facts[key] for key in ("rows", "tokens", "positions_counted")},
        "layers": wanted,
        "top": top,
        "threshold": threshold,
        "level": _LEVEL,
        "min_fires": min_fires,
        "random_sets": random_sets,
        "resamples": resamples,
        "seed": seed,
        "components": sorted(set(tables["components"]["component"])),
        "decoder_directions": lens is not None,
        "families": families is not None,
    }
    return Study("heads", settings, tables)


def _check_same(survey: Survey, lens: FeatureLens, layers: Sequence[int]) -> None:
    here = lens.provenance["fingerprints"]["saes"]
    there = survey.facts["provenance"]["fingerprints"]["saes"]
    for layer in map(str, layers):
        if here.get(layer) != there.get(layer):
            raise InputError(
                f"the lens has another SAE in layer {layer} than the survey was made with; load "
                f"{survey.facts['provenance'].get('saes', {}).get(layer, 'that one')!r}"
            )


class _Layer:
    """The live features of one layer, in order of their number.

    Attributes:
        features: ``[n]``, their numbers; fires: ``[n]``.
        decoder, dfa, total: ``[n, head]``.
    """

    def __init__(
        self,
        survey: Survey,
        layer: int,
        where: Text,
        lens: FeatureLens | None,
        families: Study | None,
        min_fires: int,
        top: int,
    ) -> None:
        self.survey, self.layer, self.top = survey, layer, top
        frame: Any = survey.features
        frame = frame[(frame["layer"] == layer) & (frame["fires"] >= min_fires)]
        frame = frame.sort_values("feature")
        self.features = frame["feature"].to_numpy(np.int64)
        if len(self.features) < max(top, 3):
            raise InputError(
                f"layer {layer} has {len(self.features)} features that fire {min_fires} times or "
                f"more; top={top} needs more: survey more text, or lower min_fires or top"
            )
        self.fires = frame["fires"].to_numpy(np.int64)
        self.density = frame["density"].to_numpy(float)
        by_head: Any = survey.heads
        by_head = by_head[by_head["layer"] == layer]
        self.n_heads = int(survey.facts["n_heads"])

        def grid(column: str) -> npt.NDArray[np.float64]:
            table = by_head.pivot(index="feature", columns="head", values=column)
            return table.loc[self.features].to_numpy(float)

        self.shares = {"decoder": grid("decoder_share"), "dfa": grid("dfa_share")}
        self.shares["total"] = grid("dfa_abs") * self.fires[:, None]
        self.place = pd.Series(np.arange(len(self.features)), index=self.features)
        self.families = self._families(families)
        self.similar = {
            "cofiring": _jaccard(self._active()),
            "tokens": _cosine(self._tokens(where)),
        }
        if families is not None:
            self.similar["families"] = _jaccard(self._memberships(families).T)
        self.slices = None
        if lens is not None:
            import torch

            rows = lens.dictionaries[layer].decoder(torch.tensor(self.features), torch.float64)
            self.slices = rows.detach().cpu().numpy()  # [n, head, d_head]

    # -- what features are like ------------------------------------------------------------------

    def _known(self, features: Any) -> tuple[Any, Any]:
        """Places of features among the live ones, and which have one."""
        place = self.place.reindex(np.asarray(features)).to_numpy(float)
        return np.nan_to_num(place).astype(np.int64), ~np.isnan(place)

    def _active(self) -> sparse.csc_matrix:
        """``[drawn position, feature]``."""
        sample: Any = self.survey.sample
        sample = sample[sample["layer"] == self.layer]
        place, known = self._known(sample["feature"])
        length = int(self.survey.facts["context"])
        at = sample["row"].to_numpy(np.int64) * length + sample["position"].to_numpy(np.int64)
        _, at = np.unique(at, return_inverse=True)
        shape = (int(at.max(initial=-1)) + 1, len(self.features))
        ones = np.ones(int(known.sum()))
        return sparse.csc_matrix((ones, (at[known], place[known])), shape=shape)

    def _tokens(self, where: Text) -> sparse.csr_matrix:
        """``[feature, 2 * class]``: tokens at destinations, then at strongest sources."""
        f = firings(self.survey, self.layer, "top", where)
        place, known = self._known(f.feature)
        d_vocab = len(where.of_token)
        own = where.classes[f.row, f.position]
        source = where.classes[f.row, np.maximum(f.source, 0)] + d_vocab
        with_source = known & (f.source >= 0)
        rows = np.concatenate([place[known], place[with_source]])
        columns = np.concatenate([own[known], source[with_source]])
        shape = (len(self.features), 2 * d_vocab)
        return sparse.csr_matrix((np.ones(len(rows)), (rows, columns)), shape=shape)

    def _families(self, families: Study | None) -> dict[int, list[str]]:
        found: dict[int, list[str]] = {}
        if families is not None:
            members: Any = families.tables["members"]
            members = members[members["layer"] == self.layer]
            for feature, family in zip(members["feature"], members["family"], strict=True):
                found.setdefault(int(feature), []).append(str(family))
        return found

    def _memberships(self, families: Study) -> npt.NDArray[np.bool_]:
        names = families.settings["families"]
        found = np.zeros((len(self.features), len(names)), bool)
        for feature, mine in self.families.items():
            if feature in self.place.index:
                found[self.place[feature], [names.index(name) for name in mine]] = True
        return found

    # -- rankings --------------------------------------------------------------------------------

    def order(self, by: str, head: int) -> npt.NDArray[np.int64]:
        """Places of features, the head's first at the front."""
        return np.argsort(-self.shares[by][:, head], kind="stable")

    def agreement(self, resamples: int, rng: np.random.Generator) -> pd.DataFrame:
        decoder = np.stack([rankdata(x) for x in self.shares["decoder"].T], 1)
        dfa = np.stack([rankdata(x) for x in self.shares["dfa"].T], 1)
        found = _correlations(decoder, dfa, resamples, rng)
        weights = self.fires / self.fires.sum()
        weighted = _pearson(*(weights @ x for x in _products(decoder, dfa)))
        total = self.shares["total"].sum(0)
        n = len(self.features)
        rows = []
        for head in range(self.n_heads):
            tops = [set(self.order(by, head)[: self.top].tolist()) for by in _ALIKE]
            rows.append(
                {
                    "layer": self.layer,
                    "head": head,
                    "features": n,
                    "dfa_share": float(total[head] / total.sum()),
                    **found[head].columns("agreement"),
                    "agreement_by_firings": float(weighted[head]),
                    "overlap": len(tops[0] & tops[1]) / self.top,
                    "overlap_by_chance": self.top / n,
                }
            )
        return pd.DataFrame(rows)

    def by_family(self, families: Study) -> pd.DataFrame:
        """What part of each head's ``|DFA|`` goes into members of each family."""
        members, total = self._memberships(families), self.shares["total"]
        shares = members.T @ total / np.maximum(total.sum(0), 1e-30)
        names = families.settings["families"]
        return pd.DataFrame(
            {
                "layer": self.layer,
                "head": np.tile(np.arange(self.n_heads), len(names)),
                "family": np.repeat(names, self.n_heads),
                "dfa_share": shares.ravel(),
                "top": self._in_top(members).ravel(),
            }
        )

    def _in_top(self, members: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
        """``[family, head]``: members among the top features by DFA."""
        tops = [self.order("dfa", head)[: self.top] for head in range(self.n_heads)]
        return np.stack([members[top].sum(0) for top in tops], 1)

    def table(self) -> pd.DataFrame:
        """The top features of each head, by each ranking."""
        promoted: Any = self.survey.logits
        promoted = promoted[(promoted["layer"] == self.layer) & (promoted["sign"] > 0)]
        promoted = promoted[promoted["rank"] < 3].sort_values(["feature", "rank"])
        words = promoted.groupby("feature")["string"].agg(lambda x: " ".join(map(repr, x)))
        rows = []
        for head in range(self.n_heads):
            for by in _BY:
                of_all = self.shares[by][:, head]
                scale = of_all.sum() if by == "total" else 1.0
                for rank, place in enumerate(self.order(by, head)[: self.top].tolist(), 1):
                    feature = int(self.features[place])
                    rows.append(
                        {
                            "layer": self.layer,
                            "head": head,
                            "by": by,
                            "rank": rank,
                            "feature": feature,
                            "share": float(of_all[place] / scale) if scale else math.nan,
                            "decoder_share": float(self.shares["decoder"][place, head]),
                            "dfa_share": float(self.shares["dfa"][place, head]),
                            "fires": int(self.fires[place]),
                            "density": float(self.density[place]),
                            "families": " ".join(self.families.get(feature, [])),
                            "promotes": words.get(feature, ""),
                        }
                    )
        return pd.DataFrame(rows)

    # -- monosemanticity -------------------------------------------------------------------------

    def _random_sets(
        self, chosen: npt.NDArray[np.int64], count: int, rng: np.random.Generator
    ) -> npt.NDArray[np.int64]:
        """``[set, member]``: for each feature one that fires about as often, in a set all different
        where the layer has enough features."""
        n = len(self.features)
        by_fires = np.argsort(self.fires, kind="stable")
        rank = np.empty(n, np.int64)
        rank[by_fires] = np.arange(n)
        width = min(n, 2 * _NEIGHBOURS + 1)
        low = np.broadcast_to(
            np.clip(rank[chosen] - width // 2, 0, n - width), (count, len(chosen))
        )
        drawn = low + rng.integers(0, width, low.shape)
        for _ in range(_REDRAWN):
            order = np.argsort(drawn, axis=1, kind="stable")
            ordered = np.take_along_axis(drawn, order, 1)
            again = np.zeros(drawn.shape, bool)
            np.put_along_axis(again, order[:, 1:], ordered[:, 1:] == ordered[:, :-1], 1)
            if not again.any():
                break
            drawn[again] = (low + rng.integers(0, width, low.shape))[again]
        return by_fires[drawn]

    def _alike(self, sets: npt.NDArray[np.int64], head: int) -> dict[str, npt.NDArray[np.float64]]:
        """By component ``[set, one, other]``, NaN for a feature and itself."""
        present, sets = np.unique(sets, return_inverse=True)
        one, other = sets[:, :, None], sets[:, None, :]
        same = one == other
        components = dict(self.similar)
        if self.slices is not None:
            components["direction"] = _cosine(self.slices[:, head])
        return {
            name: np.where(same, np.nan, likeness(present)[one, other])
            for name, likeness in components.items()
        }

    def monosemanticity(
        self, sizes: Sequence[int], random_sets: int, rng: np.random.Generator
    ) -> tuple[pd.DataFrame, pd.DataFrame]:
        """Scores by head, ranking and number of top features; and their components."""
        scores, components = [], []
        most = min(max(sizes), len(self.features))
        for head in range(self.n_heads):
            for by in _ALIKE:
                chosen = self.order(by, head)[:most]
                drawn = self._random_sets(chosen, random_sets, rng)
                alike = self._alike(np.concatenate([chosen[None], drawn]), head)
                for size in (s for s in sizes if s <= most):
                    about = {"layer": self.layer, "head": head, "by": by, "top": size}
                    excess = []
                    for name, matrix in alike.items():
                        part = matrix[:, :size, :size]
                        pairs = np.maximum((~np.isnan(part)).sum((1, 2)), 1)
                        values = np.nansum(part, axis=(1, 2)) / pairs
                        mean = float(values[1:].mean())
                        excess.append((values - mean) / max(1 - mean, 1e-9))
                        components.append(
                            {
                                **about,
                                "component": name,
                                "value": float(values[0]),
                                "null_mean": mean,
                                "null_95": float(np.quantile(values[1:], 0.95)),
                                "excess": float(excess[-1][0]),
                            }
                        )
                    score = np.mean(excess, 0)
                    as_high = int((score[1:] >= score[0]).sum())
                    p = (as_high + 1) / (random_sets + 1)
                    scores.append({**about, "score": float(score[0]), "p": p})
        return pd.DataFrame(scores), pd.DataFrame(components)


# -- likeness of some features with each other -----------------------------------------------------

_Likeness = Callable[[npt.NDArray[np.int64]], npt.NDArray[np.float64]]


def _jaccard(active: Any) -> _Likeness:
    """Of columns of zeros and ones."""
    active = sparse.csc_matrix(active, dtype=np.float64)
    size = np.asarray(active.sum(0))[0]

    def likeness(some: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        columns = active[:, some]
        both = (columns.T @ columns).toarray()
        return both / np.maximum(size[some][:, None] + size[some][None] - both, 1)

    return likeness


def _cosine(rows: Any) -> _Likeness:
    """Of rows."""
    rows = sparse.csr_matrix(rows, dtype=np.float64)
    norm = np.sqrt(np.asarray(rows.multiply(rows).sum(1)))[:, 0]
    rows = sparse.csr_matrix(sparse.diags(1 / np.maximum(norm, 1e-30)) @ rows)

    def likeness(some: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        return (rows[some] @ rows[some].T).toarray()

    return likeness


# -- correlations ----------------------------------------------------------------------------------


def _products(x: Any, y: Any) -> tuple[Any, ...]:
    x, y = x - x.mean(0), y - y.mean(0)  # for precision
    return x, y, x * x, y * y, x * y


def _pearson(x: Any, y: Any, xx: Any, yy: Any, xy: Any) -> npt.NDArray[np.float64]:
    """From means."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return (xy - x * y) / np.sqrt(np.maximum(xx - x * x, 0) * np.maximum(yy - y * y, 0))


def _correlations(x: Any, y: Any, resamples: int, rng: np.random.Generator) -> list[Interval]:
    """Of columns, with percentile bootstrap intervals over rows; draws are shared by columns.

    ``x`` and ``y`` are ranks: a resample keeps the ranks of the whole, as is usual.
    """
    n = len(x)
    columns = _products(x, y)
    value = _pearson(*(column.mean(0) for column in columns))
    drawn, step = [], max(1, _DRAWN_AT_ONCE // n)
    for start in range(0, resamples, step):
        count = min(step, resamples - start)
        weights = rng.multinomial(n, np.full(n, 1 / n), size=count) / n
        drawn.append(_pearson(*(weights @ column for column in columns)))
    low, high = np.nanquantile(np.concatenate(drawn), [0.025, 0.975], axis=0)
    return [
        Interval(float(v), float(a), float(b), n) for v, a, b in zip(value, low, high, strict=True)
    ]


def _most(shares: pd.DataFrame) -> Mapping[int, str]:
    """By head, the families that a good part of its DFA goes into."""
    large: Any = shares[shares["dfa_share"] >= _MUCH]
    large = large.sort_values("dfa_share", ascending=False)
    found = dict.fromkeys(shares["head"].tolist(), "")
    for head, group in large.groupby("head"):
        found[int(head)] = ", ".join(
            f"{name} {share:.0%}"
            for name, share in zip(group["family"], group["dfa_share"], strict=True)
        )
    return found


def _sensitivity(scores: pd.DataFrame, threshold: float) -> pd.DataFrame:
    rows = []
    groups: Any = scores.groupby(["by", "top"], sort=True)
    for (by, size), group in groups:
        for value in sorted({*_THRESHOLDS, threshold}):
            said = (group["score"] >= value) & (group["p"] <= _LEVEL)
            rows.append(
                {
                    "by": by,
                    "top": int(size),
                    "threshold": value,
                    "heads": len(group),
                    "monosemantic": int(said.sum()),
                    "share": float(said.mean()),
                }
            )
    return pd.DataFrame(rows)


def plot(study: Study) -> Figure:
    """Agreement and monosemanticity by head and layer, and what the threshold does."""
    from matplotlib.figure import Figure

    table, sensitivity = study.tables["heads"], study.tables["sensitivity"]
    layers, n_heads = sorted(table["layer"].unique()), int(table["head"].max()) + 1
    tall = 1.3 + 0.32 * len(layers)
    figure = Figure(figsize=(max(9.0, 3.0 + 0.75 * n_heads), 2 * tall + 3.2), layout="constrained")
    top, bottom = cast(Any, figure).subfigures(2, 1, height_ratios=[2 * tall, 3.0])
    panels = (
        ("agreement", "agreement of decoder and DFA (Spearman)", "RdBu", -1, 1),
        ("overlap", f"top {study.settings['top']} by decoder that are top by DFA", "viridis", 0, 1),
        ("score_decoder", "monosemanticity, top by decoder", "viridis", 0, 0.6),
        ("score_dfa", "monosemanticity, top by DFA", "viridis", 0, 0.6),
    )
    for ax, (column, title, colours, low, high) in zip(
        top.subplots(2, 2).flat, panels, strict=True
    ):
        grid = table.pivot(index="layer", columns="head", values=column).reindex(layers)
        values = grid.to_numpy(float)
        image = ax.imshow(values, cmap=colours, vmin=low, vmax=high, aspect="auto")
        said = None
        if column.startswith("score"):
            name = column.replace("score", "monosemantic")
            said = table.pivot(index="layer", columns="head", values=name).reindex(layers)
        for y in range(len(layers)):
            for x in range(n_heads):
                if n_heads > 16 or values[y, x] != values[y, x]:
                    continue
                middle = (values[y, x] - low) / (high - low)
                dark = abs(middle - 0.5) > 0.3 if colours == "RdBu" else middle < 0.6
                bold = said is not None and bool(said.to_numpy()[y, x])
                ax.text(
                    x,
                    y,
                    f"{values[y, x]:.2f}",
                    ha="center",
                    va="center",
                    size=7,
                    color="white" if dark else "black",
                    weight="bold" if bold else "normal",
                )
        ax.set_xticks(range(n_heads), range(n_heads))
        ax.set_yticks(range(len(layers)), layers)
        ax.set(xlabel="head", ylabel="layer")
        ax.set_title(title, size=9)
        figure.colorbar(image, ax=ax, shrink=0.85)
    for ax, by in zip(bottom.subplots(1, 2), _ALIKE, strict=True):
        for size, group in sensitivity[sensitivity["by"] == by].groupby("top"):
            ax.plot(group["threshold"], group["share"], marker="o", ms=3, label=f"top {size}")
        ax.axvline(study.settings["threshold"], color="grey", ls=":", lw=0.8)
        ax.set(xlabel="threshold", ylabel="share of heads", ylim=(-0.02, 1.02))
        ax.set_title(f"called monosemantic, features by {by}", size=9)
        ax.legend(fontsize=7)
    figure.suptitle(f"Heads by their features: {study.settings.get('model', '')}", size=11)
    return figure
