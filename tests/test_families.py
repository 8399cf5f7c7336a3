"""Families of features: criteria on firings written down, scores against brute force, and recovery
of features whose family is known by construction."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from reference_survey import ReferenceSurvey
from scipy.stats import binomtest
from survey_tables import from_firings

import sae_attn_plugin as sap
from sae_attn_plugin.demo.families import PlantedFamilies, compare, plant, pooled, recovery
from sae_attn_plugin.errors import InputError
from sae_attn_plugin.statistics import wilson
from sae_attn_plugin.studies import families, family_scores, load_study
from sae_attn_plugin.studies.families import FAMILIES

# -- criteria, firing by firing ------------------------------------------------------------------

STRINGS = {0: "<bos>", 1: " Cat", 2: "cat", 3: " dog", 4: " Monday", 5: " tuesday", 6: " owl"}
BASE = [0, 1, 3, 2, 6, 4, 3, 6, 6, 3, 6, 6, 3, 6, 6, 3, 6, 6, 3, 6]
LINE = BASE + [6] * 20 + [3]


def met(position: int, dfa: dict[int, float], name: str, logits: Any = ()) -> float:
    """The score of a feature all of whose firings are this one; NaN where it is not asked."""
    survey = from_firings([LINE], STRINGS, [(0, 0, position, dfa)] * 3, logits)
    table = family_scores(survey, [name], min_firings=1)  # pyright: ignore[reportArgumentType]
    return float(table["score"].iloc[0]) if len(table) else math.nan


@pytest.mark.parametrize(
    ("name", "position", "dfa", "expected"),
    [
        # " Cat" dog cat: the dog followed an earlier cat, whatever its case
        ("induction", 3, {2: 1.0}, 1),
        ("induction", 3, {1: 1.0}, 0),
        ("induction", 3, {2: 1.0, 1: 2.0}, 0),  # not the strongest
        ("induction", 3, {2: 1.0, 1: -2.0}, 1),  # but the strongest of those that help
        ("induction", 3, {2: -1.0}, 0),
        ("induction", 8, {8: 1.0}, 0),  # "owl owl": the destination is no source of its own
        ("previous_token", 3, {2: 1.0}, 1),
        ("previous_token", 3, {1: 1.0}, 0),
        ("previous_token", 1, {0: 1.0}, 0),  # BOS
        ("previous_token", 0, {0: 1.0}, math.nan),
        ("duplicate_token", 3, {1: 1.0}, 1),
        ("duplicate_token", 3, {3: 1.0}, 0),
        ("duplicate_token", 3, {2: 1.0}, 0),
        ("current_token", 3, {3: 1.0, 1: 0.9}, 1),
        ("current_token", 0, {0: 1.0}, 0),
        ("attention_sink", 3, {0: 1.0}, 1),
        ("attention_sink", 3, {1: 1.0, 0: 0.5}, 0),
        ("local_context", 12, {8: 1.0, 5: 1.0, 12: 1.5}, 1),
        ("local_context", 12, {8: 1.0, 12: 1.5}, 0),
        ("local_context", 12, {11: 2.0, 8: 1.0}, 0),  # the token before is not context
        ("local_context", 12, {3: 2.0, 8: 1.0}, 0),  # 9 back
        ("local_context", 12, {9: 2.0, 8: 1.0}, 0),  # a copy of the destination's token
        ("local_context", 7, {4: 1.0}, math.nan),
        ("local_context", 12, {10: 2.0, 8: 1.0}, 0),  # what followed one
        ("long_range", 40, {5: 1.0, 1: 1.0, 40: 1.5}, 1),
        ("long_range", 40, {0: 2.0, 1: 1.0}, 0),  # position 0
        ("long_range", 40, {6: 2.0, 1: 1.0}, 0),  # a copy
        ("long_range", 40, {7: 2.0, 1: 1.0}, 0),  # what followed one
        ("long_range", 40, {24: 2.0, 1: 1.0}, 0),  # 16 back
        ("long_range", 32, {1: 1.0}, math.nan),
    ],
)
def test_criteria(name: str, position: int, dfa: dict[int, float], expected: float) -> None:
    assert met(position, dfa, name) == pytest.approx(expected, nan_ok=True)


def promotes(*tokens: tuple[int, float]) -> list[tuple[Any, ...]]:
    return [(0, 0, rank, 1, t, STRINGS[t], effect) for rank, (t, effect) in enumerate(tokens)]


@pytest.mark.parametrize(
    ("source", "logits", "expected"),
    [
        (5, promotes((5, 2.0), (4, 1.5)), 1),  # Monday, and Tuesday above Monday
        (5, promotes((4, 2.0), (5, 1.5)), 0),
        (5, promotes((3, 2.0), (5, 1.5)), 1),
        (5, promotes((3, 4.0), (5, 1.5)), 0),  # hardly promoted beside another
        (5, promotes((3, -1.0), (5, -1.0)), 0),
        (2, promotes((5, 2.0)), 0),  # the dog has no successor
    ],
)
def test_successor(source: int, logits: Any, expected: float) -> None:
    assert met(7, {source: 1.0}, "successor", logits) == expected


def test_users_sequences_replace_the_known_ones() -> None:
    firings = [(0, 0, 7, {2: 1.0})] * 10
    survey: Any = from_firings([LINE], STRINGS, firings, promotes((6, 1.0)))
    own = family_scores(survey, ["successor"], sequences={"animals": ["dog", "OWL"]})
    assert own["score"].iloc[0] == 1
    assert family_scores(survey, ["successor"])["score"].iloc[0] == 0
    with pytest.raises(InputError, match="at least two"):
        family_scores(survey, ["successor"], sequences={"animals": "dog"})


def test_chance_is_what_a_uniform_source_would_score() -> None:
    survey: Any = from_firings([LINE], STRINGS, [(0, 0, 3, {2: 1.0}), (0, 0, 12, {11: 1.0})] * 5)
    table = family_scores(survey).set_index("family")
    # at 3, "cat": one copy, one token after it; at 12, "dog": three copies, each before an owl
    assert table.loc["duplicate_token", "chance"] == pytest.approx((1 / 4 + 3 / 13) / 2)
    assert table.loc["induction", "chance"] == pytest.approx((1 / 4 + 3 / 13) / 2)
    assert table.loc["previous_token", "chance"] == pytest.approx((1 / 4 + 1 / 13) / 2)
    assert table.loc["attention_sink", "chance"] == pytest.approx((1 / 4 + 1 / 13) / 2)


def test_a_score_at_the_base_rate_makes_no_member() -> None:
    # at position 1 half of the sources are position 0
    survey: Any = from_firings([LINE], STRINGS, [(0, 0, 1, {0: 1.0}), (0, 0, 1, {1: 1.0})] * 10)
    row = family_scores(survey, ["attention_sink"]).iloc[0]
    assert (row["score"], row["chance"], row["member"]) == (0.5, 0.5, False)


def test_positional_counts_firings_out_of_place_and_knows_tokens_with_places() -> None:
    rng = np.random.default_rng(0)
    rows = [[0, 4, *rng.integers(1, 4, 38).tolist()] for _ in range(40)]
    firings: list[Any] = [(0, row, 1, {1: 1.0}) for row in range(40)]  # Monday stands there only
    firings += [(1, row, 5, {5: 1.0}) for row in range(40)]  # whatever stands at 5
    firings += [(2, row, int(p), {p: 1.0}) for row in range(40) for p in rng.integers(0, 40, 4)]
    table = family_scores(from_firings(rows, STRINGS, firings), ["positional"])  # pyright: ignore[reportArgumentType]
    assert table["score"].tolist()[:2] == pytest.approx([39 / 40, 39 / 40])
    assert table["baseline"].tolist()[:2] == pytest.approx([39 / 40, 0], abs=0.25)
    assert table["member"].tolist() == [False, True, False]
    assert table["score"].iloc[2] < 0.3


def test_induction_tells_prefix_and_what_came_next() -> None:
    row = [0, 1, 3, 6, 4, 2, 3, 6, 4, 3, 3, 3, 3]  # cat dog owl Monday, cat dog owl Monday
    survey: Any = from_firings([row], STRINGS, [(0, 0, 7, {4: 1.0})] * 12)
    found = families(survey, ["induction"]).tables["members"].iloc[0]
    assert found["token"] == " Monday"
    assert (found["prefix"], found["next"], found["token_share"]) == (3, 1, 1)


def test_wilson_intervals_are_scipys() -> None:
    for hits, n in ((0, 5), (3, 7), (20, 20), (1, 1000)):
        share, low, high = wilson(hits, n)
        true = binomtest(hits, n).proportion_ci(method="wilson")
        assert (share, low, high) == pytest.approx((hits / n, true.low, true.high), abs=1e-12)
    assert np.isnan(wilson(0, 0)).all()


# -- planted features ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[PlantedFamilies, Any]:
    """Few rows, with every firing in the sample."""
    planted = plant(3, 0.5, rows=6, each=3)
    folder = tmp_path_factory.mktemp("small")
    found = sap.survey(
        planted.lens(), planted.rows, folder, sample=600, keep=4, sources=96, progress=False
    )
    assert found.features["fires"].max() <= 600
    return planted, found


def by_hand(name: str, tokens: list[int], q: int, dfa: np.ndarray) -> bool | None:
    """The criterion of one firing, from its full DFA; None: not asked. BOS is token 0."""
    s = int(dfa.argmax())
    if name == "attention_sink":
        return None if q == 0 else bool(dfa[s] > 0 and s == 0)
    copies = [k for k in range(q) if tokens[k] == tokens[q] and tokens[q] != 0]
    if name in ("local_context", "long_range"):
        near = name == "local_context"
        if q <= (8 if near else 32):
            return None
        size = np.abs(dfa)
        inside = range(q - 8, q - 1) if near else range(q - 16)
        mass = sum(size[k] for k in inside) - sum(size[k] + size[k + 1] for k in copies)
        if not near:
            mass -= size[0]
        return bool(mass >= 0.5 * size.sum())
    if name == "previous_token" and q == 0:
        return None
    places = {
        "induction": [k + 1 for k in copies if k + 1 < q],
        "previous_token": [q - 1] if q > 1 else [],
        "duplicate_token": copies,
        "current_token": [q] if q > 0 else [],
    }[name]
    return bool(dfa[s] > 0 and s in places)


def test_scores_are_those_of_brute_force_over_all_firings(
    small: tuple[PlantedFamilies, Any],
) -> None:
    planted, found = small
    reference = ReferenceSurvey(planted.model, dict(enumerate(planted.saes)), planted.rows)
    pd.testing.assert_series_equal(
        reference.features["fires"], found.features["fires"], check_dtype=False
    )
    names = [name for name in FAMILIES if name not in ("positional", "successor")]
    table = family_scores(found, names, min_firings=1)
    table = table.set_index(["layer", "feature", "family"])
    checked = 0
    for (layer, feature), group in reference.firings.groupby(["layer", "feature"]):  # pyright: ignore[reportGeneralTypeIssues]
        for name in names:
            said = [
                by_hand(name, reference.token_rows[row], position, dfa)
                for row, position, dfa in zip(
                    group["row"], group["position"], group["dfa"], strict=True
                )
            ]
            asked = [one for one in said if one is not None]
            if asked:
                row = table.loc[(layer, feature, name)]
                assert row["n"] == len(asked)
                # rounding may turn the strongest of two equal sources
                assert row["score"] == pytest.approx(np.mean(asked), abs=0.02)
                checked += 1
    assert checked > 200


@pytest.mark.parametrize(("noise", "precision", "recall"), [(0.0, 0.9, 0.95), (0.5, 0.9, 0.8)])
def test_planted_families_are_found(
    noise: float, precision: float, recall: float, tmp_path: Path
) -> None:
    planted = plant(1, noise, rows=64)
    found = sap.survey(planted.lens(), planted.rows, tmp_path, sample=60, progress=False)
    study = families(found)
    table = compare(planted, study).set_index("family")
    assert table.loc["all", "precision"] >= precision
    assert table.loc["all", "recall"] >= recall
    if not noise:
        assert table["recall"].min() >= 0.75
        assert table["precision"].min() >= 0.75
    members: Any = study.tables["members"]
    names: Any = planted.truth.set_index(["layer", "feature"])["name"]
    for layer, feature, family, token in members[
        ["layer", "feature", "family", "token"]
    ].itertuples(index=False):
        if family in ("induction", "previous_token") and names[layer, feature].startswith(family):
            assert names[layer, feature].endswith(token)  # which token it is about


def test_the_counts_of_several_seeds_are_pooled() -> None:
    table = recovery(noises=(0.0,), seeds=(1, 2), rows=12, sample=12, progress=False)
    assert set(table["seed"]) == {1, 2}
    together = pooled(table).set_index("family")
    assert together.loc["all", "planted"] == table.loc[table["family"] == "all", "planted"].sum()
    right, found = together.loc["all", ["right", "found"]]
    assert together.loc["all", "precision"] == right / found > 0.7


def test_dead_and_rare_features_are_left_out(small: tuple[PlantedFamilies, Any]) -> None:
    _, found = small
    table = family_scores(found, min_firings=30)
    fires = found.features.set_index(["layer", "feature"])["fires"]
    seen = set(zip(table["layer"], table["feature"], strict=True))
    assert seen <= {index for index, n in fires.items() if n >= 30}
    assert (table["n"] >= 30).all()


def test_the_study_reads_back_and_draws(small: tuple[PlantedFamilies, Any], tmp_path: Path) -> None:
    _, found = small
    study = families(found, examples=2)
    study.save(tmp_path / "families.json")
    again = load_study(tmp_path / "families.json")
    for name, table in study.tables.items():
        pd.testing.assert_frame_equal(table, again.tables[name], check_dtype=False)
    assert len(again.plot().axes) == 3
    shares = study.table
    assert set(shares["family"]) == {*FAMILIES, "none"}
    inside = shares[shares["family"] != "none"]
    assert (inside["met_low"] <= inside["met"] + 1e-12).all()
    assert (shares["share_low"] <= shares["share"]).all()
    wrong = study.tables["false_positives"]
    assert (wrong.groupby(["layer", "family"]).size() <= 2).all()


def test_layers_can_be_chosen(small: tuple[PlantedFamilies, Any]) -> None:
    _, found = small
    one = families(found, ["induction", "long_range"], layers=[1])
    assert set(one.table["layer"]) == {1}
    both: Any = family_scores(found)
    part: Any = family_scores(found, layers=[1])
    # baselines come from all layers
    pd.testing.assert_frame_equal(both[both["layer"] == 1].reset_index(drop=True), part)


def test_what_cannot_be_asked_is_said(small: tuple[PlantedFamilies, Any]) -> None:
    _, found = small
    with pytest.raises(InputError, match=r"unknown family 'inductoin'; known: induction"):
        families(found, ["inductoin"])
    with pytest.raises(InputError, match=r"layer 7 is not in the survey; layers in it: 0, 1"):
        families(found, layers=[7])
    with pytest.raises(InputError, match="one twice"):
        families(found, ["induction", "induction"])
    with pytest.raises(InputError, match="10000 sampled firings"):
        families(found, min_firings=10_000)
    with pytest.raises(InputError, match="expected a share"):
        families(found, threshold=1.5)
    survey: Any = from_firings([LINE], STRINGS, [(0, 0, 3, {2: 1.0})])
    only_top = dataclasses.replace(survey, examples=survey.examples.query("kind == 'top'"))
    with pytest.raises(InputError, match="no uniform sample"):
        families(only_top)
    with pytest.raises(InputError, match="1 to 12 features"):
        plant(0, each=99)
