"""The variance of a score over prompts, against plain arithmetic on single scores."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import sae_attn_plugin as sap
from sae_attn_plugin.tasks import IOIDataset

LAYER, HEAD = 2, 2


@functools.cache
def lens() -> sap.FeatureLens:
    return sap.demo.load()


@functools.cache
def dataset(n: int = 10) -> IOIDataset:
    return IOIDataset(n, lens().tokenizer, 3, prepend_bos=lens().prepend_bos)


@functools.cache
def found() -> sap.QKVariance:
    return sap.qk_variance(lens(), dataset(), LAYER, HEAD)


@functools.cache
def single() -> list[Any]:
    data, every = dataset(), []
    for i in range(len(data)):
        run = lens().run([data.tokens[i, : int(data.lengths[i])].tolist()])
        positions = data.positions
        every.append(run.qk(LAYER, HEAD, int(positions["END"][i]), int(positions["S2"][i])))
    return every


def test_shares_by_kind_are_an_exact_split_of_the_variance() -> None:
    v = found()
    assert v.by_kind.to_numpy().sum() == pytest.approx(1, abs=1e-5)
    scores = np.array([qk.score for qk in single()])
    np.testing.assert_allclose(v.scores, scores, rtol=1e-6)
    embed = np.array(
        [
            sum(
                qk.weights[i, j].item()
                for i, a in enumerate(qk.query_nodes)
                for j, b in enumerate(qk.key_nodes)
                if a.startswith("mlp:") and b.startswith("embed@")
            )
            for qk in single()
        ]
    )
    expected = np.cov(embed, scores, ddof=0)[0, 1] / scores.var()
    assert v.by_kind.loc["mlp", "embed"] == pytest.approx(expected, rel=1e-3, abs=1e-6)


def test_pairs_are_the_terms_of_single_scores() -> None:
    v = found()
    rows: list[dict[tuple[str, str], float]] = []
    for qk in single():
        terms = qk.terms
        features = terms[
            terms["query_node"].astype(str).str.startswith("attn:")
            & terms["key_node"].astype(str).str.startswith("attn:")
        ]
        row = {}
        for a, b, weight in features.itertuples(index=False):
            row[str(a).rsplit("@", 1)[0], str(b).rsplit("@", 1)[0]] = float(weight)
        rows.append(row)
    for j, pair in list(enumerate(v.names))[:: max(1, len(v.names) // 200)]:
        expected = [row.get(pair, 0.0) for row in rows]
        np.testing.assert_allclose(v.terms[:, j], expected, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(v.features, [sum(r.values()) for r in rows], rtol=1e-4, atol=1e-5)
    assert v.all_pairs == pytest.approx(1 - (v.scores - v.features).var() / v.scores.var())
    # The first pair chosen leaves least variance of all.
    left = [(v.scores - v.terms[:, j]).var() for j in range(len(v.names))]
    best: Any = v.pairs.iloc[0]
    assert (best["query_feature"], best["key_feature"]) == v.names[int(np.argmin(left))]
    assert best["explained"] == pytest.approx(1 - min(left) / v.scores.var())
    assert v.pairs["explained"].is_monotonic_increasing


def test_table() -> None:
    table = found().table()
    assert table["k"].tolist() == [1, 2, 4, 8, 16]
    assert table["explained"].is_monotonic_increasing
    assert (table["fitted"] >= table["explained"] - 1e-9).all()
    assert table["fitted"].max() <= 1 + 1e-9
    assert (table["held_out"] < table["explained"]).any()  # chosen on other prompts
    assert "explain" in repr(found())


def test_a_score_made_of_two_pairs_is_explained_by_two() -> None:
    rng = np.random.default_rng(0)
    terms = np.zeros((40, 6))
    terms[:, 1], terms[:, 4] = rng.normal(size=40), 0.5 * rng.normal(size=40)
    terms[:, 2] = 0.01 * rng.normal(size=40)
    plain = found()
    names = tuple((f"attn:0:{i}", f"attn:0:{i}") for i in range(6))
    made = replace(plain, scores=terms[:, 1] + terms[:, 4] + 3, terms=terms, names=names)
    assert made.pairs["query_feature"].tolist()[:2] == ["attn:0:1", "attn:0:4"]
    assert made.table((2,))["explained"].item() == pytest.approx(1)
    assert made.table((2,))["held_out"].item() == pytest.approx(1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"key": "S3"}, "unknown role 'S3'"),
        ({"query": "S1", "key": "END"}, "comes after query"),
        ({"pairs_per_prompt": 0}, "pairs_per_prompt=0"),
    ],
)
def test_what_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(sap.InputError, match=message):
        sap.qk_variance(lens(), dataset(), LAYER, HEAD, **options)


def test_too_few_prompts_and_scores_that_do_not_vary() -> None:
    with pytest.raises(sap.InputError, match="variance over 3 prompts"):
        sap.qk_variance(lens(), dataset(3), LAYER, HEAD)
    same = [sap.demo.ioi_prompt()] * 4
    align = {"END": [-1] * 4, "S2": [9] * 4}
    with pytest.raises(sap.InputError, match="does not vary"):
        sap.qk_variance(lens(), same, LAYER, HEAD, align=align)
    with pytest.raises(sap.InputError, match="unknown role 'S2'; these prompts have END"):
        sap.qk_variance(lens(), same, LAYER, HEAD, align={"END": [-1] * 4})
    with pytest.raises(sap.InputError, match="expected at least 1 pair"):
        found().table((0,))
