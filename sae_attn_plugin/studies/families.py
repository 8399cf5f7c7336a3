"""Families of attention features, found by tests on a corpus survey instead of by eye.

Every test is a criterion that a single firing meets or not. A feature's *score* for a family is the
share of its firings that meet the criterion, estimated from the survey's uniform sample of its
firings, with a 95 % Wilson interval (which, unlike a bootstrap, is honest when all of a few firings
agree). A feature is a *member* when the score reaches the threshold and the lower end of the
interval lies above the *baseline*. It may belong to several families or to none.

Of a firing at destination q the survey knows the DFA of its strongest sources (summed over heads),
and how much ``|DFA|`` lies at each distance and role. s is the source with the largest positive
DFA, c(x) the token at x up to a leading space and letter case. A firing meets

- ``induction``: s < q, and c(s - 1) = c(q): s is what followed an earlier copy of q's token;
- ``previous_token``: s = q - 1. Not asked at q = 0;
- ``duplicate_token``: s < q, and c(s) = c(q);
- ``current_token``: s = q;
- ``attention_sink``: s is position 0 or holds BOS. Not asked at q = 0. In the four above, a BOS at
  s, or at q where copies of its token are looked for, never counts;
- ``local_context``: ``|DFA|`` at distances q - source of 2 to 8, less that at copies of q's token
  and at what followed them, is at least half of all. Not asked where q <= 8;
- ``long_range``: ``|DFA|`` at distances of 17 and more, less that at position 0, at copies of q's
  token and at what followed them, is at least half of all. Not asked where q <= 32;
- ``successor``: c(s) stands in a sequence (numbers, days, months, letters, ordinals, the user's),
  and its successor is among the ten tokens that the feature's decoder promotes most, with at least
  half the effect of the first and above c(s) itself. In a small vocabulary many features promote
  some successor by chance; the table ``shifted`` tells how many.

``positional`` is a criterion on the feature: the score is the sum over bins b of max(0, p_b - u_b),
where p_b is the share of its firings (all of them, counted) in position bin b and u_b that of all
positions: the share of firings that would have to move for it to fire alike at all positions.

Baselines. For the first five and ``successor``: ``chance``, the score if s were drawn uniformly
from the sources that the same firings can see. For ``local_context`` and ``long_range``, where a
uniform draw is itself a hypothesis about the feature: ``typical``, how often firings at the same
positions (by bin) meet the criterion, averaged over all features of the survey with equal weight.
For ``positional``: the score of a feature that fires by its token alone, with the tokens of its own
firings and the positions that these tokens have in the survey's sample of positions, or the score
that so many firings reach by chance, whichever is larger.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy import sparse

from sae_attn_plugin.errors import InputError
from sae_attn_plugin.statistics import bootstrap, wilson
from sae_attn_plugin.studies.firings import (
    ROLES,
    Firings,
    Text,
    chosen_layers,
    firings,
    text,
)
from sae_attn_plugin.studies.result import Study
from sae_attn_plugin.tasks.rows import check_count

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from sae_attn_plugin.corpus.survey import Survey

__all__ = ["FAMILIES", "SEQUENCES", "families", "family_scores", "plot"]

FAMILIES = (
    "induction",
    "previous_token",
    "duplicate_token",
    "current_token",
    "attention_sink",
    "local_context",
    "long_range",
    "positional",
    "successor",
)
_TYPICAL = ("local_context", "long_range")  # whose baseline is what other features do there
_ROLE = {
    "induction": "induction",
    "previous_token": "previous",
    "duplicate_token": "duplicate",
    "current_token": "self",
    "attention_sink": "first",
}
_NEAR, _FAR = 9, 17  # first distance that is not near, first that is far: edges of bins
_LONGEST_PREFIX = 16  # tokens looked back
_SHIFTS = (1, 2, 3, 4)
_LEAST_EFFECT = 0.5  # of a successor, beside the token promoted most


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


SEQUENCES: Mapping[str, tuple[str, ...]] = {
    "number": tuple(map(str, range(101))),
    "year": tuple(map(str, range(1900, 2031))),
    "number word": _words(
        "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
        "fifteen sixteen seventeen eighteen nineteen twenty"
    ),
    "tens": _words("ten twenty thirty forty fifty sixty seventy eighty ninety hundred"),
    "ordinal": _words("first second third fourth fifth sixth seventh eighth ninth tenth"),
    "ordinal number": ("1st", "2nd", "3rd", *(f"{n}th" for n in range(4, 21))),
    "weekday": _words("monday tuesday wednesday thursday friday saturday sunday monday"),
    "short weekday": _words("mon tue wed thu fri sat sun mon"),
    "month": _words(
        "january february march april may june july august september october november december "
        "january"
    ),
    "short month": _words("jan feb mar apr may jun jul aug sep oct nov dec jan"),
    "letter": tuple("abcdefghijklmnopqrstuvwxyz"),
}
"""Sequences in which a token has a successor, compared without leading space and letter case."""


def families(
    survey: Survey,
    names: Sequence[str] | None = None,
    *,
    layers: Sequence[int] | None = None,
    threshold: float = 0.5,
    min_firings: int = 10,
    sequences: Mapping[str, Sequence[str]] | None = None,
    examples: int = 3,
) -> Study:
    """Which features belong to which families, by the criteria above.

    Args:
        survey: a finished corpus survey.
        names: of families to test; all by default.
        layers: to report; all by default. Baselines come from all layers of the survey.
        threshold: that a score must reach.
        min_firings: features with fewer sampled firings that the criterion can be asked of are left
            out (for all families, or for one).
        sequences: by name, instead of :data:`SEQUENCES`.
        examples: false positives to show for each family and layer.

    Returns:
        Tables ``layers`` (by layer and family: features asked, members, ``share`` of features with
        Wilson interval, ``firings_share``: members' share of all firings, ``met``: the share of all
        firings that meet the criterion whatever feature they are of, both with bootstrap intervals
        over features, and ``met_baseline``), ``members`` (one row per feature and family it belongs
        to: score with interval, baseline, ``chance``, ``typical``, ``score_top``: the score of its
        strongest firings, ``dfa_share``: mean share of |DFA| at the family's role, the commonest
        token at s, and for induction the mean number of repeated tokens and how often the token at
        s did come next), ``overlap`` (members of both of two families), ``strongest``
        (of features with at least twice as many firings as are kept of the strongest: those whose
        strongest firings alone reach the threshold, those of them that are members, and members
        among the others), ``false_positives`` (sampled firings of members that do not meet the
        criterion, in context) and ``shifted`` (members of ``successor``, and how many there would
        be with what comes two, three or four places on in the successor's stead: what chance gives
        with this vocabulary). :func:`family_scores` has all scores.

    Raises:
        InputError: an unknown family, a layer not in the survey, a survey without sampled firings,
            no feature with enough of them.
    """
    given = sequences or SEQUENCES
    judge, found, table = _tested(survey, names, layers, threshold, min_firings, given)
    check_count(examples, "examples", 0)
    members: Any = table[table["member"]].reset_index(drop=True)
    by_layer = {layer.layer: layer for layer in found}
    members = judge.described(members, by_layer)
    settings = {
        **survey.facts["provenance"],
        "survey": {key: survey.facts[key] for key in ("rows", "tokens", "positions_counted")},
        "families": judge.names,
        "layers": [layer.layer for layer in found],
        "threshold": threshold,
        "min_firings": min_firings,
        "near": [2, _NEAR - 1],
        "far": _FAR,
        "sequences": {name: list(values) for name, values in given.items()},
    }
    tables = {
        "layers": _by_layer(table, judge.names),
        "members": members,
        "overlap": _overlap(members, judge.names),
        "strongest": _strongest(table, judge.names, threshold, found),
        "false_positives": judge.false_positives(members, by_layer, examples),
    }
    if "successor" in judge.names:
        tables["shifted"] = _shifted(judge, found, table, threshold, min_firings, given)
    return Study("families", settings, tables)


def family_scores(
    survey: Survey,
    names: Sequence[str] | None = None,
    *,
    layers: Sequence[int] | None = None,
    threshold: float = 0.5,
    min_firings: int = 10,
    sequences: Mapping[str, Sequence[str]] | None = None,
) -> pd.DataFrame:
    """Scores of every feature for every family, of members and others alike.

    Args and errors are those of :func:`families`.

    Returns:
        ``layer, feature, family, fires, n`` (firings asked), ``score`` with ``score_low`` and
        ``score_high``, ``baseline, chance, typical, score_top, dfa_share, member``.
    """
    return _tested(survey, names, layers, threshold, min_firings, sequences or SEQUENCES)[2]


def _tested(
    survey: Survey,
    names: Sequence[str] | None,
    layers: Sequence[int] | None,
    threshold: float,
    min_firings: int,
    sequences: Mapping[str, Sequence[str]],
) -> tuple[_Judge, list[_Layer], pd.DataFrame]:
    chosen = _names(names)
    wanted = chosen_layers(survey, layers)
    check_count(min_firings, "min_firings")
    if not 0 < threshold <= 1:
        raise InputError(f"threshold={threshold}: expected a share in (0, 1]")
    if not (survey.examples["kind"] == "sample").any():
        raise InputError(
            "the survey kept no uniform sample of firings, which scores are estimated from; make "
            "it with sample=20 or more"
        )
    where = text(survey)
    judge = _Judge(survey, where, chosen, _successors(where, sequences))
    everything = [judge.layer(layer) for layer in chosen_layers(survey, None)]
    typical = _typical([f for f in everything if len(f.firings)], chosen, judge.edges)
    found = [f for f in everything if f.layer in wanted]
    parts = [judge.scores(layer, typical, min_firings) for layer in found]
    table = pd.concat(parts, ignore_index=True)
    if table.empty:
        raise InputError(
            f"no feature has {min_firings} sampled firings; survey more text, or with a larger "
            "sample=, or lower min_firings"
        )
    above = table["score_low"] > table["baseline"]
    table["member"] = (table["score"] >= threshold) & above & (table["n"] >= min_firings)
    # A criterion that can be asked of too few firings says nothing of the feature.
    enough: Any = table[table["n"] >= min_firings]
    return judge, found, enough.reset_index(drop=True)


def _names(names: Sequence[str] | None) -> list[str]:
    if names is None:
        return list(FAMILIES)
    chosen = [names] if isinstance(names, str) else list(names)
    for name in chosen:
        if name not in FAMILIES:
            raise InputError(f"unknown family {name!r}; known: {', '.join(FAMILIES)}")
    if not chosen or len(set(chosen)) < len(chosen):
        raise InputError(f"names={chosen!r} names no family, or one twice")
    return chosen


def _successors(
    where: Text, sequences: Mapping[str, Sequence[str]], shift: int = 1
) -> dict[int, set[int]]:
    """Class to the classes that may follow it, ``shift`` places on."""
    found: dict[int, set[int]] = {}
    classes = {
        string.removeprefix(" ").lower(): int(where.of_token[token])
        for token, string in where.strings.items()
    }
    for name, sequence in sequences.items():
        if isinstance(sequence, str) or len(sequence) < 2:
            raise InputError(f"sequence {name!r}: expected at least two strings, got {sequence!r}")
        known = [classes.get(str(item).removeprefix(" ").lower()) for item in sequence]
        for one, other in zip(known, known[shift:], strict=False):
            if one is not None and other is not None and one != other:
                found.setdefault(one, set()).add(other)
    return found


@dataclass(frozen=True, eq=False)
class _Layer:
    """Sampled firings of a layer, and which criteria they meet.

    ``met``, ``asked``, ``chance``: by family, ``[n]``; ``top`` and ``met_top``: strongest firings.
    """

    layer: int
    firings: Firings
    met: Mapping[str, npt.NDArray[np.bool_]]
    asked: Mapping[str, npt.NDArray[np.bool_]]
    chance: Mapping[str, npt.NDArray[np.float64]]
    top: Firings
    met_top: Mapping[str, npt.NDArray[np.bool_]]
    asked_top: Mapping[str, npt.NDArray[np.bool_]]


class _Judge:
    """The criteria, on one survey."""

    def __init__(
        self, survey: Survey, where: Text, names: Sequence[str], successors: dict[int, set[int]]
    ) -> None:
        self.survey, self.where, self.names, self.successors = survey, where, names, successors
        self.edges = np.asarray(survey.facts["position_edges"])
        self.distances = np.asarray(survey.facts["distance_edges"])
        self.by_firing = [name for name in names if name != "positional"]

    # -- single firings --------------------------------------------------------------------------

    def layer(self, layer: int) -> _Layer:
        found = firings(self.survey, layer, "sample", self.where)
        top = firings(self.survey, layer, "top", self.where)
        promotes = self._promotes(layer)
        met, asked, chance = self._judge(found, promotes)
        met_top, asked_top, _ = self._judge(top, promotes)
        return _Layer(layer, found, met, asked, chance, top, met_top, asked_top)

    def _judge(self, f: Firings, promotes: sparse.csr_matrix | None) -> tuple[Any, Any, Any]:
        everyone = np.ones(len(f), bool)
        met, asked, chance = {}, {}, {}
        for name in self.by_firing:
            asked[name] = everyone
            if name in ("previous_token", "attention_sink"):
                asked[name] = f.position > 0
            if name in _TYPICAL:
                met[name], asked[name] = self._mass(name, f)
                chance[name] = np.full(len(f), np.nan)
        for name in (n for n in self.by_firing if n not in _TYPICAL):
            met[name] = np.zeros(len(f), bool)
            chance[name] = np.zeros(len(f))
        length = self.where.tokens.shape[1]
        positions = np.arange(length)
        for part in f.parts(length):
            p = f.pick(part)
            n = np.arange(len(p))
            tokens, classes = self.where.tokens[p.row], self.where.classes[p.row]
            visible = positions[None] <= p.position[:, None]
            earlier = positions[None] < p.position[:, None]
            own = classes[n, p.position][:, None]
            bos = tokens == self.where.bos
            own_bos = bos[n, p.position][:, None]
            same = (classes == own) & ~own_bos
            hits = {
                "previous_token": (positions[None] == p.position[:, None] - 1) & ~bos,
                "duplicate_token": same & earlier,
                "current_token": (positions[None] == p.position[:, None]) & ~bos,
                "attention_sink": (bos | (positions[None] == 0)) & visible,
            }
            if "induction" in self.by_firing:
                after = np.zeros_like(same)
                after[:, 1:] = same[:, :-1]
                hits["induction"] = after & earlier
            if "successor" in self.by_firing and promotes is not None:
                hits["successor"] = self._succeeds(p, classes, promotes) & visible
            for name, hit in hits.items():
                if name in met:
                    met[name][part] = (p.source >= 0) & hit[n, p.source]
                    chance[name][part] = hit.sum(1) / (p.position + 1)
        return {k: v & asked[k] for k, v in met.items()}, asked, chance

    def _mass(self, name: str, f: Firings) -> tuple[Any, Any]:
        """At least half of |DFA| at distances near or far, where there is room for both. What
        copies of the destination's token and what followed them hold is taken off, wherever it
        is, and from far sources what position 0 holds."""
        near = name == "local_context"
        inside = (
            (self.distances >= 2) & (self.distances < _NEAR) if near else self.distances >= _FAR
        )
        room = f.position >= _NEAR if near else f.position > 2 * (_FAR - 1)
        less = ["duplicate", "induction", *([] if near else ["first"])]
        taken = f.roles[:, [ROLES.index(role) for role in less]].sum(1)
        mass = f.by_distance[:, inside].sum(1) - taken
        return room & (mass >= 0.5 * f.dfa_abs) & (f.dfa_abs > 0), room

    def _promotes(self, layer: int) -> sparse.csr_matrix | None:
        """``[feature, class]``: whether a feature promotes the successor of the class above the
        class itself, among its most promoted tokens."""
        if "successor" not in self.names:
            return None
        best: Any = self.survey.logits
        best = best[(best["layer"] == layer) & (best["sign"] > 0)].sort_values("rank")
        # tokens that a feature does not touch come next in line where it promotes few
        first = best.groupby("feature")["effect"].transform("first")
        best = best[(best["effect"] > 0) & (best["effect"] >= _LEAST_EFFECT * first)]
        rank: dict[tuple[int, int], int] = {}
        classes = self.where.of_token[best["token"].to_numpy(np.int64)]
        for feature, one, place in zip(best["feature"], classes, best["rank"], strict=True):
            rank.setdefault((int(feature), int(one)), int(place))
        features = sorted({feature for feature, _ in rank})
        rows, columns = [], []
        never = int(best["rank"].max()) + 1 if len(best) else 1
        for feature in features:
            for one, others in self.successors.items():
                ahead = min((rank.get((feature, other), never) for other in others), default=never)
                if ahead < rank.get((feature, one), never):
                    rows.append(feature)
                    columns.append(one)
        shape = (max(features, default=0) + 1, len(self.where.of_token))
        return sparse.csr_matrix((np.ones(len(rows), bool), (rows, columns)), shape=shape)

    def _succeeds(self, p: Firings, classes: Any, promotes: Any) -> Any:
        """``[firing, position]``: the feature promotes the successor of the token there."""
        known = sorted(self.successors)
        column = np.full(promotes.shape[1] + 1, -1)  # the last one: after the end of a row
        column[known] = np.arange(len(known))
        dense = promotes[:, known].toarray()
        hit = np.zeros(classes.shape, bool)
        inside = (column[classes] >= 0) & (p.feature[:, None] < len(dense))
        place, position = np.nonzero(inside)
        hit[place, position] = dense[p.feature[place], column[classes[place, position]]]
        return hit

    # -- features --------------------------------------------------------------------------------

    def scores(
        self, layer: _Layer, typical: Mapping[str, npt.NDArray[np.float64]], min_firings: int
    ) -> pd.DataFrame:
        """One row per feature with enough sampled firings and family."""
        f = layer.firings
        d_sae = int(f.feature.max()) + 1 if len(f) else 0
        total = np.bincount(f.feature, minlength=d_sae)
        alive = np.flatnonzero(total >= min_firings)
        frame: Any = self.survey.features
        frame = frame[frame["layer"] == layer.layer].set_index("feature")
        fires = frame["fires"].reindex(alive).to_numpy(np.int64)
        bins = np.searchsorted(self.edges, f.position, side="right") - 1

        def mean(values: Any, which: Any, features: Any = f.feature) -> Any:
            count = np.bincount(features[which], minlength=d_sae)
            summed = np.bincount(features[which], weights=values[which], minlength=d_sae)
            with np.errstate(invalid="ignore"):
                return (summed / count)[:d_sae][alive]

        parts = []
        for name in self.by_firing:
            asked, met = layer.asked[name], layer.met[name]
            n = np.bincount(f.feature[asked], minlength=d_sae)[alive]
            hits = np.bincount(f.feature[met], minlength=d_sae)[alive]
            score, low, high = wilson(hits, n)
            chance = mean(layer.chance[name], asked)
            usual = mean(typical[name][bins], asked)
            share = np.full(len(alive), np.nan)
            if name in _ROLE:
                role = f.roles[:, ROLES.index(_ROLE[name])]
                share = mean(role / np.maximum(f.dfa_abs, 1e-30), asked)
            columns = {
                "layer": layer.layer,
                "feature": alive,
                "family": name,
                "fires": fires,
                "n": n,
                "score": score,
                "score_low": low,
                "score_high": high,
                "baseline": usual if name in _TYPICAL else chance,
                "chance": chance,
                "typical": usual,
                "score_top": mean(
                    layer.met_top[name].astype(float), layer.asked_top[name], layer.top.feature
                ),
                "dfa_share": share,
            }
            parts.append(pd.DataFrame(columns))
        if "positional" in self.names:
            parts.append(self._positional(layer, alive, fires))
        return pd.concat(parts, ignore_index=True)

    def _positional(self, layer: _Layer, alive: Any, fires: Any) -> pd.DataFrame:
        n_bins = len(self.edges)
        everywhere, by_class = self._positions
        counts = self._profile(layer.layer)
        d_sae = len(counts)
        counts = counts[alive]
        total = counts.sum(1)
        with np.errstate(invalid="ignore", divide="ignore"):
            p = counts / total[:, None]
        score = np.maximum(p - everywhere, 0).sum(1)
        # The interval of the share in the bins that hold too many, less what all positions have.
        more = p > everywhere
        _, low, high = wilson((counts * more).sum(1), total)
        usual = (more * everywhere).sum(1)
        f = layer.firings
        classes = self.where.classes[f.row, f.position]
        own = by_class[classes]
        sums = sparse.csr_matrix(
            (np.ones(len(f)), (f.feature, np.arange(len(f)))), shape=(d_sae, len(f))
        )[alive]
        by_token = np.asarray((sums @ own) / sums.sum(1))
        token = np.maximum(by_token - everywhere, 0).sum(1)
        # |p - u| of n draws is about normal, with mean sqrt(2 u (1 - u) / (pi n)).
        noise = np.sqrt(2 * everywhere * (1 - everywhere) / math.pi).sum() / 2
        with np.errstate(invalid="ignore", divide="ignore"):
            noise = noise / np.sqrt(total)
        top = layer.top
        bins = np.searchsorted(self.edges, top.position, side="right") - 1
        best = np.zeros((d_sae, n_bins))
        np.add.at(best, (top.feature[top.feature < d_sae], bins[top.feature < d_sae]), 1)
        best = best[alive]
        with np.errstate(invalid="ignore", divide="ignore"):
            strongest = np.maximum(best / best.sum(1, keepdims=True) - everywhere, 0).sum(1)
        return pd.DataFrame(
            {
                "layer": layer.layer,
                "feature": alive,
                "family": "positional",
                "fires": fires,
                "n": total.astype(np.int64),
                "score": score,
                "score_low": np.maximum(low - usual, 0),
                "score_high": np.maximum(high - usual, 0),
                "baseline": np.maximum(token, noise),
                "chance": noise,
                "typical": token,
                "score_top": strongest,
                "dfa_share": np.nan,
            }
        )

    @functools.cache  # noqa: B019 - lives as long as one study
    def _profile(self, layer: int) -> npt.NDArray[np.float64]:
        """``[feature, bin]``: firings."""
        profile: Any = self.survey.positions_profile
        profile = profile[profile["layer"] == layer]
        counts = np.zeros((int(self.survey.facts["d_sae"][str(layer)]), len(self.edges)))
        where = profile["feature"].to_numpy(np.int64), profile["position_bin"].to_numpy(np.int64)
        np.add.at(counts, where, profile["fires"].to_numpy(float))
        return counts

    @functools.cached_property
    def _positions(self) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """Shares of bins: ``[bin]`` among all positions, counted, and ``[class, bin]`` among those
        that hold a token, from the sample of positions; a token that was not drawn has the
        positions of all."""
        drawn: Any = self.survey.positions
        if drawn.empty:
            raise InputError("the survey drew no positions; make it with positions= above 0")
        position = drawn["position"].to_numpy(np.int64)
        classes = self.where.classes[self.where.index(drawn["row"].to_numpy()), position]
        bins = np.searchsorted(self.edges, position, side="right") - 1
        n_bins = len(self.edges)
        everywhere = np.asarray(self.survey.facts["positions_by_bin"], dtype=float)
        everywhere = everywhere / everywhere.sum()
        counts = np.zeros((len(self.where.of_token), n_bins))
        np.add.at(counts, (classes, bins), 1)
        total = counts.sum(1, keepdims=True)
        return everywhere, np.where(total > 0, counts / np.maximum(total, 1), everywhere)

    # -- members ---------------------------------------------------------------------------------

    def described(self, members: pd.DataFrame, layers: Mapping[int, _Layer]) -> pd.DataFrame:
        """Members with the commonest token at s among firings that meet the criterion."""
        more = []
        for layer_number, feature, family in zip(
            members["layer"], members["feature"], members["family"], strict=True
        ):
            layer = layers[int(layer_number)]
            if family == "positional":
                more.append(self._where_it_fires(layer, int(feature)))
                continue
            f = layer.firings
            start, stop = np.searchsorted(f.feature, [feature, feature + 1])
            which = np.arange(start, stop)[layer.met[family][start:stop]]
            more.append(self._description(f.pick(which), family))
        columns = ["token", "token_share", "prefix", "next"]
        table = pd.DataFrame(more, columns=columns, index=members.index)
        described = pd.concat([members, table], axis=1)
        order = described.assign(order=described["family"].map(self.names.index))
        order = order.sort_values(["layer", "order", "score", "fires"], ascending=[1, 1, 0, 0])
        return order.drop(columns=["order", "member"]).reset_index(drop=True)

    def _where_it_fires(self, layer: _Layer, feature: int) -> tuple[str, float, float, float]:
        """The position bin with most firings above its share."""
        everywhere, _ = self._positions
        counts = self._profile(layer.layer)[feature]
        p = counts / counts.sum()
        best = int(np.argmax(p - everywhere))
        low = int(self.edges[best])
        high = int(self.edges[best + 1]) - 1 if best + 1 < len(self.edges) else None
        name = f"@{low}" if high == low else f"@{low}-{'' if high is None else high}"
        return name, float(p[best]), math.nan, math.nan

    def _description(self, f: Firings, family: str) -> tuple[str, float, float, float]:
        where = self.where
        known = f.source >= 0
        f = f.pick(known)
        if not len(f):
            return "", math.nan, math.nan, math.nan
        classes = where.classes[f.row, f.source]
        values, counts = np.unique(classes, return_counts=True)
        best = int(values[counts.argmax()])
        prefix = after = math.nan
        if family == "induction":
            prefix = float(self._prefix(f).mean())
            following = np.minimum(f.position + 1, where.tokens.shape[1] - 1)
            there = (f.position + 1 < where.tokens.shape[1]) & (where.tokens[f.row, following] >= 0)
            if there.any():
                after = float((where.classes[f.row, following] == classes)[there].mean())
        return where.string(best), float(counts.max() / len(f)), prefix, after

    def _prefix(self, f: Firings) -> npt.NDArray[np.int64]:
        """Tokens that repeat, the destination's among them, at most ``_LONGEST_PREFIX``; the two
        copies do not overlap."""
        where = self.where
        length = np.zeros(len(f), np.int64)
        going = np.ones(len(f), bool)
        for back in range(_LONGEST_PREFIX):
            early, late = f.source - 1 - back, f.position - back
            going &= (early >= 0) & (late >= f.source)
            safe = np.maximum(early, 0)
            going &= where.classes[f.row, safe] == where.classes[f.row, np.maximum(late, 0)]
            going &= where.tokens[f.row, safe] != where.bos
            length += going
        return length

    def false_positives(
        self, members: pd.DataFrame, layers: Mapping[int, _Layer], count: int
    ) -> pd.DataFrame:
        """For each layer and family the strongest sampled firings of members that do not meet the
        criterion, one for each feature at first."""
        rows = []
        groups: Any = members.groupby(["layer", "family"], sort=False)
        for (number, family), group in groups:
            if family == "positional":
                continue
            layer = layers[int(number)]
            f = layer.firings
            wrong = layer.asked[family] & ~layer.met[family]
            wrong &= np.isin(f.feature, group["feature"])
            found = np.flatnonzero(wrong)
            found = found[np.argsort(-f.activation[found], kind="stable")]
            _, first = np.unique(f.feature[found], return_index=True)
            later = np.setdiff1d(np.arange(len(found)), first)
            found = found[np.concatenate([np.sort(first), later])[:count]]
            for place in found.tolist():
                before, after = self.where.around(int(f.row[place]), int(f.position[place]))
                source = int(f.source[place])
                token = int(self.where.tokens[f.row[place], source]) if source >= 0 else -1
                rows.append(
                    {
                        "layer": int(number),
                        "family": family,
                        "feature": int(f.feature[place]),
                        "row": int(self.where.rows[f.row[place]]),
                        "position": int(f.position[place]),
                        "activation": float(f.activation[place]),
                        "source": source,
                        "source_token": self.where.string(token) if token >= 0 else "",
                        "before": before,
                        "next": after,
                    }
                )
        columns = ["layer", "family", "feature", "row", "position", "activation", "source"]
        return pd.DataFrame(rows, columns=[*columns, "source_token", "before", "next"])


def _typical(
    layers: Iterable[_Layer], names: Sequence[str], edges: npt.NDArray[np.int64]
) -> dict[str, npt.NDArray[np.float64]]:
    """By family ``[bin]``: how often firings at these positions meet its criterion, every feature
    with the same weight."""
    n_bins = len(edges)
    found = {}
    layers = list(layers)
    for name in (name for name in names if name != "positional"):
        hits, total = np.zeros(n_bins), np.zeros(n_bins)
        for layer in layers:
            f, asked, met = layer.firings, layer.asked[name], layer.met[name]
            bins = np.searchsorted(edges, f.position, side="right") - 1
            weight = 1 / np.bincount(f.feature)[f.feature]
            hits += np.bincount(bins[met], weights=weight[met], minlength=n_bins)
            total += np.bincount(bins[asked], weights=weight[asked], minlength=n_bins)
        found[name] = hits / np.maximum(total, 1e-30)
    return found


def _shifted(
    judge: _Judge,
    layers: Sequence[_Layer],
    table: pd.DataFrame,
    threshold: float,
    min_firings: int,
    sequences: Mapping[str, Sequence[str]],
) -> pd.DataFrame:
    """Members of the successor family, and how many there would be if what comes two, three or four
    places on were called the successor: about as many as chance gives with this vocabulary."""
    rows = []
    for shift in _SHIFTS:
        others = _Judge(
            judge.survey, judge.where, ["successor"], _successors(judge.where, sequences, shift)
        )
        for layer in layers:
            if shift == 1:
                mine: Any = table[(table["layer"] == layer.layer) & table["member"]]
                count = int((mine["family"] == "successor").sum())
            else:
                met, _, chance = others._judge(layer.firings, others._promotes(layer.layer))
                feature = layer.firings.feature
                n = np.bincount(feature)
                share, low, _ = wilson(np.bincount(feature, met["successor"]), n)
                usual = np.bincount(feature, chance["successor"]) / np.maximum(n, 1)
                said = (share >= threshold) & (low > usual) & (n >= min_firings)
                count = int(said.sum())
            rows.append({"layer": layer.layer, "shift": shift, "members": count})
    return pd.DataFrame(rows)


def _by_layer(table: pd.DataFrame, names: Sequence[str]) -> pd.DataFrame:
    """Shares of families, and of features in none."""
    rows = []
    groups: Any = table.groupby("layer")
    for layer, mine in groups:
        features = mine.groupby("feature").agg(fires=("fires", "first"), any=("member", "any"))
        for name in [*names, "none"]:
            if name == "none":
                group = features.assign(member=~features["any"])
            else:
                group = mine[mine["family"] == name]
            if not len(group):
                continue
            member, fires = group["member"].to_numpy(float), group["fires"].to_numpy(float)
            share, low, high = (float(x) for x in wilson(member.sum(), len(member)))
            row: dict[str, Any] = {"layer": int(layer), "family": name, "features": len(group)}
            row |= {"members": int(member.sum()), "share": share}
            row |= {"share_low": low, "share_high": high}
            row |= _weighted(member, fires).columns("firings_share")
            met, usual = math.nan, math.nan
            row |= {"met": met, "met_low": met, "met_high": met, "met_baseline": usual}
            if name != "none":
                row |= _weighted(group["score"].to_numpy(float), fires).columns("met")
                baseline = group["baseline"].to_numpy(float)
                row["met_baseline"] = float((baseline * fires).sum() / fires.sum())
            rows.append(row)
    return pd.DataFrame(rows)


def _weighted(values: npt.NDArray[np.float64], weights: npt.NDArray[np.float64]) -> Any:
    """The weighted mean, with a bootstrap interval over features."""
    return bootstrap(
        np.stack([values * weights, weights], 1), lambda m: m[..., 0] / m[..., 1], resamples=500
    )


def _overlap(members: pd.DataFrame, names: Sequence[str]) -> pd.DataFrame:
    """Members of both of two families, in all layers; the diagonal holds all members."""
    of = {
        name: set(zip(group["layer"], group["feature"], strict=True))
        for name, group in members.groupby("family")
    }
    rows = [
        {
            "family": one,
            **{other: len(of.get(one, set()) & of.get(other, set())) for other in names},
        }
        for one in names
    ]
    return pd.DataFrame(rows)


def _strongest(
    table: pd.DataFrame, names: Sequence[str], threshold: float, layers: Sequence[_Layer]
) -> pd.DataFrame:
    """What reading the strongest firings alone would have found, of features with at least twice as
    many firings as are kept of the strongest."""
    kept = max(int(np.bincount(layer.top.feature).max()) for layer in layers if len(layer.top))
    rows = []
    for name in (name for name in names if name != "positional"):
        group = table[(table["family"] == name) & (table["fires"] >= 2 * kept)]
        by_top = group["score_top"] >= threshold
        rows.append(
            {
                "family": name,
                "features": len(group),
                "by_strongest": int(by_top.sum()),
                "confirmed": int((by_top & group["member"]).sum()),
                "missed": int((~by_top & group["member"]).sum()),
            }
        )
    return pd.DataFrame(rows)


def plot(study: Study) -> Figure:
    """Shares of families by layer, of features and of firings, and what the strongest firings alone
    would have said."""
    from matplotlib.figure import Figure

    table, strongest = study.tables["layers"], study.tables["strongest"]
    names = [name for name in [*study.settings["families"], "none"] if name in set(table["family"])]
    layers = sorted(table["layer"].unique())
    height = max(3.6, 0.36 * len(names) + 1.4)
    figure = Figure(figsize=(6.4 + 1.1 * len(layers), height), layout="constrained")
    ratios = [max(2.0, 0.6 * len(layers))] * 2 + [2.6]
    *maps, right = figure.subplots(1, 3, width_ratios=ratios)
    for ax, column, title in zip(
        maps, ("share", "firings_share"), ("share of features", "share of firings"), strict=True
    ):
        grid = table.pivot(index="family", columns="layer", values=column)
        values = grid.reindex(index=names, columns=layers).to_numpy(float)
        ax.imshow(values, cmap="viridis", vmin=0, vmax=1, aspect="auto")
        for (y, x), value in np.ndenumerate(values):
            if value == value:
                colour = "black" if value > 0.6 else "white"
                ax.text(x, y, f"{value:.2f}", ha="center", va="center", color=colour, size=7)
        ax.set_xticks(range(len(layers)), layers)
        ax.set_yticks(range(len(names)), [n.replace("_", " ") for n in names])
        ax.set_xlabel("layer")
        ax.set_title(title, size=10)
    maps[1].set_yticklabels([])
    places = strongest["family"].map(names.index)
    right.barh(places, strongest["by_strongest"], color="C1", label="by strongest firings")
    right.barh(places, strongest["confirmed"], color="C0", label="and by all")
    right.barh(places, -strongest["missed"], color="C2", label="by all only")
    right.set_ylim(len(names) - 0.5, -0.5)
    right.set_yticks(range(len(names)), [""] * len(names))
    right.xaxis.set_major_formatter(lambda value, _: f"{abs(value):.0f}")
    right.axvline(0, color="black", lw=0.6)
    right.set_xlabel("features")
    right.set_title("found by strongest firings", size=10)
    right.legend(fontsize=7, loc="lower right")
    figure.suptitle(f"Families of attention features: {study.settings.get('model', '')}", size=11)
    return figure
