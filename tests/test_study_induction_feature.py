"""The induction-feature study against loops over every position."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import sae_attn_plugin as sap
from sae_attn_plugin.demo import language
from sae_attn_plugin.errors import InputError
from sae_attn_plugin.studies import induction_feature
from sae_attn_plugin.studies.activations import fired
from sae_attn_plugin.studies.induction_feature import proxies
from sae_attn_plugin.tasks.induction import fuzzy_classes


@pytest.fixture(scope="module")
def lens() -> sap.FeatureLens:
    return sap.demo.load("nnsight")


@pytest.fixture(scope="module")
def windows() -> torch.Tensor:
    return torch.tensor(language.token_rows(random.Random(7), 80, 128, ["repeats"]))


@given(st.lists(st.lists(st.integers(0, 3), min_size=6, max_size=6), min_size=1, max_size=4))
def test_proxies_by_brute_force(rows: list[list[int]]) -> None:
    found = proxies(torch.tensor(rows), torch.arange(4), bos=0).toarray()
    for row, line in enumerate(rows):
        body = int(line[0] == 0)
        for position in range(6):
            for token in range(4):
                earlier = range(body, position)
                expected = position >= body and any(
                    line[e] == line[position] and line[e + 1] == token for e in earlier
                )
                assert found[row * 6 + position, token] == expected


def test_firings_are_those_of_a_run(lens: sap.FeatureLens, windows: torch.Tensor) -> None:
    found = fired(lens, [1, 3], windows[:3])
    for layer in (1, 3):
        for row in range(3):
            frame = lens.run(windows[row]).features(layer)
            mine = found[layer]["row"] == row
            assert found[layer]["position"][mine].tolist() == frame["position"].tolist()
            assert found[layer]["feature"][mine].tolist() == frame["feature"].tolist()
            expected = pytest.approx(frame["activation"].tolist(), rel=1e-4)
            assert found[layer]["activation"][mine].tolist() == expected


def test_counts_by_a_loop(lens: sap.FeatureLens, windows: torch.Tensor) -> None:
    study = induction_feature(lens, windows, 1, min_fires=4, progress=False)
    one = study.table.iloc[0]
    classes = fuzzy_classes(lens.tokenizer, 490)
    token = classes[lens.tokenizer.convert_tokens_to_ids(one["token"])]
    table = {"both": 0, "fires": 0, "proxy": 0, "positions": 0}
    for row in windows[40:]:
        acts = fired(lens, [1], row[None])[1]
        firing = set(acts["position"][acts["feature"] == one["feature"]].tolist())
        line = classes[row].tolist()
        for position in range(1, 128):
            next_to = any(
                line[e] == line[position] and line[e + 1] == token for e in range(1, position)
            )
            table["both"] += position in firing and next_to
            table["fires"] += position in firing
            table["proxy"] += next_to
            table["positions"] += 1
    assert one[list(table)].to_dict() == table
    assert one["precision"] == pytest.approx(table["both"] / table["fires"])
    assert one["recall"] == pytest.approx(table["both"] / table["proxy"])
    negatives = table["positions"] - table["proxy"]
    assert one["specificity"] == pytest.approx(1 - (table["fires"] - table["both"]) / negatives)
    quantiles = study.tables["quantiles"]
    assert quantiles["fires"].sum() == table["fires"]
    assert quantiles["proxy"].sum() == table["both"]
    assert one["precision_low"] <= one["precision"] <= one["precision_high"]
    best = study.tables["features"].iloc[0]
    assert (best["feature"], best["token"]) == (one["feature"], one["token"])
    for name in ("precision", "recall", "specificity", "f1"):
        assert best[name] == pytest.approx(one[name])


def test_the_demo_model_has_induction_features(
    lens: sap.FeatureLens, windows: torch.Tensor
) -> None:
    """Above chance by far on windows that had no say in the choice of token."""
    best = induction_feature(lens, windows, 1, min_fires=4).tables["features"].head(10)
    assert (best["precision"] > 50 * best["base_rate"]).all()
    assert best["f1"].min() > 0.5


def test_examples_are_what_they_say(lens: sap.FeatureLens, windows: torch.Tensor) -> None:
    study = induction_feature(lens, windows, 1, feature=1010, token=" too")
    for row in study.tables["examples"].to_dict("records"):
        acts = fired(lens, [1], windows[[row["window"]]])[1]
        firing = set(acts["position"][acts["feature"] == 1010].tolist())
        assert (row["position"] in firing) == (row["kind"] == "false positive")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer": 9}, "no SAE in layer 9"),
        ({"layer": 1, "feature": 1024}, "does not exist"),
        ({"layer": 1, "token": " too"}, "pass feature="),
        ({"layer": 1, "feature": 3, "token": " two words"}, "token"),
        ({"layer": 1, "windows": torch.ones(3, 8, dtype=torch.long)}, "at least 4 windows"),
        ({"layer": 1, "windows": torch.ones(4, 8, dtype=torch.long)}, "more windows"),
        ({"layer": 1, "min_fires": 10**6}, "lower min_fires"),
        ({"layer": 1, "quantiles": 0}, "quantiles"),
    ],
)
def test_bad_input(
    lens: sap.FeatureLens, windows: torch.Tensor, options: dict, message: str
) -> None:
    options = {"windows": windows[:8], **options}
    with pytest.raises(InputError, match=message):
        induction_feature(lens, options.pop("windows"), **options)
