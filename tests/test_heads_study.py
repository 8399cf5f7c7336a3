"""The study of heads: agreement and likeness against plain loops; heads known by construction."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import spearmanr
from survey_tables import from_firings
from typer.testing import CliRunner

import sae_attn_plugin as sap
from sae_attn_plugin.cli import app
from sae_attn_plugin.demo.families import PlantedFamilies, plant
from sae_attn_plugin.errors import InputError
from sae_attn_plugin.studies import families, heads, load_study


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> tuple[PlantedFamilies, Any, Any]:
    """A planted model, its lens, and a survey."""
    made = plant(5, 0.5, rows=24, each=6)
    lens = made.lens()
    folder = tmp_path_factory.mktemp("heads") / "survey"
    return made, lens, sap.survey(lens, made.rows, folder, positions=1500, progress=False)


def live(found: Any, layer: int, least: int = 10) -> list[int]:
    table = found.features
    return table[(table["layer"] == layer) & (table["fires"] >= least)]["feature"].tolist()


def test_agreement_is_spearmans_over_live_features(planted: Any) -> None:
    _, _, found = planted
    table: Any = heads(found).table
    assert table["agreement"].between(table["agreement_low"], table["agreement_high"]).all()
    for layer, head in itertools.product((0, 1), range(4)):
        rows = found.heads[(found.heads["layer"] == layer) & (found.heads["head"] == head)]
        rows = rows.set_index("feature").loc[live(found, layer)]
        row = table[(table["layer"] == layer) & (table["head"] == head)].iloc[0]
        true: Any = spearmanr(rows["decoder_share"], rows["dfa_share"])
        assert row["agreement"] == pytest.approx(true.statistic)
        assert row["features"] == len(rows)
        tops = [
            set(rows.sort_values(by, ascending=False, kind="stable").index[:10])
            for by in ("decoder_share", "dfa_share")
        ]
        assert row["overlap"] == pytest.approx(len(tops[0] & tops[1]) / 10)
    assert table.groupby("layer")["dfa_share"].sum().to_numpy() == pytest.approx([1, 1])


def test_top_features_are_alive_and_in_order(planted: Any) -> None:
    made, _, found = planted
    table: Any = heads(found, families=families(found), top=5).tables["features"]
    for (layer, _, by), group in table.groupby(["layer", "head", "by"]):  # pyright: ignore[reportGeneralTypeIssues]
        assert group["rank"].tolist() == [1, 2, 3, 4, 5]
        assert (group["share"].diff().dropna() <= 0).all()
        assert set(group["feature"]) <= set(live(found, layer))
        if by != "total":
            assert group["share"].tolist() == group[f"{by}_share"].tolist()
    # head 0.1 is the duplicate-token head, 1.0 the induction head
    names: Any = made.truth.set_index(["layer", "feature"])["name"]
    for layer, head, family in ((0, 1, "duplicate_token"), (1, 0, "induction")):
        mine = table[(table["layer"] == layer) & (table["head"] == head) & (table["by"] == "dfa")]
        assert all(names[layer, f].startswith(family) for f in mine["feature"])
        assert (mine["families"].str.contains(family)).all()


def test_family_shares_are_of_the_heads_whole_attribution(planted: Any) -> None:
    _, _, found = planted
    kinds = families(found)
    table: Any = heads(found, families=kinds, random_sets=5).tables["families"]
    members = kinds.tables["members"].query("layer == 1 and family == 'induction'")["feature"]
    rows = found.heads.query("layer == 1 and head == 0").merge(found.features, on="feature")
    rows = rows[(rows["layer_y"] == 1) & rows["feature"].isin(live(found, 1))]
    size = rows["dfa_abs_x"] * rows["fires"]
    expected = size[rows["feature"].isin(members)].sum() / size.sum()
    row = table.query("layer == 1 and head == 0 and family == 'induction'").iloc[0]
    assert row["dfa_share"] == pytest.approx(expected)
    others = table.query("layer == 1 and head != 0 and family == 'induction'")["dfa_share"]
    assert row["dfa_share"] > 3 * others.max()  # the induction head


def test_components_are_plain_means_over_pairs(planted: Any) -> None:
    made, lens, found = planted
    kinds = families(found)
    study = heads(found, lens=lens, families=kinds, top=6, tops=[6], random_sets=20)
    features, components = study.tables["features"], study.tables["components"]
    assert set(components["component"]) == {"direction", "cofiring", "tokens", "families"}
    layer, head = 1, 1
    chosen = features.query("layer == @layer and head == @head and by == 'dfa'")["feature"].tolist()
    got = components.query("layer == @layer and head == @head and by == 'dfa'")
    got = got.set_index("component")["value"]
    pairs = list(itertools.combinations(chosen, 2))

    rows = made.saes[layer].W_dec.detach().double().unflatten(1, (4, -1))[:, head]
    cosine = torch.nn.functional.cosine_similarity
    expected = np.mean([float(cosine(rows[a], rows[b], dim=0)) for a, b in pairs])
    assert got["direction"] == pytest.approx(expected)

    sample = found.sample[found.sample["layer"] == layer]
    at = {f: set(zip(g["row"], g["position"], strict=True)) for f, g in sample.groupby("feature")}
    jaccard = [
        len(at.get(a, set()) & at.get(b, set())) / max(len(at.get(a, set()) | at.get(b, set())), 1)
        for a, b in pairs
    ]
    assert got["cofiring"] == pytest.approx(np.mean(jaccard))

    tokens = dict(zip(found.rows["row"], found.rows["tokens"], strict=True))
    counts = {f: np.zeros(2 * 60) for f in chosen}
    top = found.examples[(found.examples["layer"] == layer) & (found.examples["kind"] == "top")]
    for one in top[top["feature"].isin(chosen)].to_dict("records"):
        counts[one["feature"]][tokens[one["row"]][one["position"]]] += 1
        best = int(np.argmax(one["dfa"]))
        if one["dfa"][best] > 0:
            counts[one["feature"]][60 + tokens[one["row"]][one["sources"][best]]] += 1
    unit = {f: c / np.linalg.norm(c) for f, c in counts.items()}
    assert got["tokens"] == pytest.approx(np.mean([unit[a] @ unit[b] for a, b in pairs]))

    members = kinds.tables["members"].query("layer == @layer")
    of = {f: set(g["family"]) for f, g in members.groupby("feature")}
    alike = [
        len(of.get(a, set()) & of.get(b, set())) / max(len(of.get(a, set()) | of.get(b, set())), 1)
        for a, b in pairs
    ]
    assert got["families"] == pytest.approx(np.mean(alike))


# -- heads known by construction -------------------------------------------------------------------


def invented(seed: int, alike: bool, n: int = 120) -> tuple[Any, Any]:
    """A survey and a lens of one layer with two heads. Each head has 20 features of its own; with
    ``alike``, those of head 0 have nearly one decoder direction and fire at the same places."""
    rng = np.random.default_rng(seed)
    rows = rng.integers(1, 50, (30, 20)).tolist()
    strings = {i: f" t{i}" for i in range(50)}
    shared = [(int(rng.integers(30)), int(rng.integers(20))) for _ in range(25)]
    firings = []
    for feature in range(n):
        places = {(int(rng.integers(30)), int(rng.integers(20))) for _ in range(25)}
        if alike and feature < 20:
            places = set(shared)
        firings += [(feature, row, p, {int(rng.integers(p + 1)): 1.0}) for row, p in sorted(places)]
    share = rng.uniform(0.3, 0.7, n)
    share[:20], share[20:40] = rng.uniform(0.9, 1, 20), rng.uniform(0, 0.1, 20)
    both = np.stack([share, 1 - share], 1)
    by_head = pd.DataFrame(
        {
            "layer": 0,
            "feature": np.repeat(np.arange(n), 2),
            "head": np.tile([0, 1], n),
            "decoder_share": both.ravel(),
            "dfa": both.ravel(),
            "dfa_abs": both.ravel(),
            "dfa_share": both.ravel(),
        }
    )
    decoder = rng.normal(size=(n, 2, 16))
    if alike:
        decoder[:20, 0] = decoder[0, 0] + 0.3 * rng.normal(size=(20, 16))
    dictionary = SimpleNamespace(
        decoder=lambda some, dtype: torch.from_numpy(decoder).to(dtype)[some]
    )
    provenance = {"fingerprints": {"saes": {"0": "x"}}}
    lens = SimpleNamespace(dictionaries={0: dictionary}, provenance=provenance)
    return from_firings(rows, strings, firings, heads=by_head), lens


def test_a_head_of_one_thing_is_told_from_a_head_of_many() -> None:
    survey, lens = invented(0, alike=True)
    table = heads(survey, lens=lens, resamples=100).table.set_index("head")
    assert table.loc[0, "score_decoder"] > 0.5
    assert table["monosemantic_decoder"].tolist() == [True, False]
    assert table["monosemantic_dfa"].tolist() == [True, False]
    assert abs(table.loc[1, "score_decoder"]) < 0.1


def test_heads_of_random_features_are_called_by_chance_only() -> None:
    p = []
    for seed in range(8):
        survey, lens = invented(seed, alike=False)
        study = heads(survey, lens=lens, resamples=10, threshold=1e-6, tops=[10], random_sets=40)
        p += study.table["p_decoder"].tolist()
    assert 0.3 < np.mean(p) < 0.7
    assert np.mean(np.array(p) <= 0.05) <= 0.2


def test_sensitivity_falls_with_the_threshold(planted: Any) -> None:
    _, lens, found = planted
    table = heads(found, lens=lens, tops=[3, 8], random_sets=30).tables["sensitivity"]
    assert set(table["top"]) == {3, 8, 10}
    for _, group in table.groupby(["by", "top"]):
        assert (group.sort_values("threshold")["share"].diff().dropna() <= 0).all()
    assert (table["heads"] == 8).all()


def test_the_study_reads_back_and_draws(planted: Any, tmp_path: Path) -> None:
    _, _, found = planted
    study = heads(found, families=families(found), random_sets=10, resamples=50)
    study.save(tmp_path / "heads.json")
    again = load_study(tmp_path / "heads.json")
    for name, table in study.tables.items():
        pd.testing.assert_frame_equal(table, again.tables[name], check_dtype=False)
    assert len(again.plot().axes) == 4 + 4 + 2  # maps, their scales, thresholds
    same = heads(found, families=families(found), random_sets=10, resamples=50)
    pd.testing.assert_frame_equal(study.table, same.table)


def test_what_cannot_be_asked_is_said(planted: Any) -> None:
    _, _, found = planted
    with pytest.raises(InputError, match=r"layer 2 is not in the survey; layers in it: 0, 1"):
        heads(found, layers=[2])
    with pytest.raises(InputError, match="top=500 needs more"):
        heads(found, top=500)
    with pytest.raises(InputError, match="at least 2 features"):
        heads(found, tops=[1])
    other = plant(6, 0.0, rows=1, each=6)
    with pytest.raises(InputError, match="another SAE in layer 0"):
        heads(found, lens=other.lens())


# -- command line ----------------------------------------------------------------------------------


def test_command_line(planted: Any, tmp_path: Path) -> None:
    (_, _, found), out = planted, tmp_path / "a" / "new"
    run = CliRunner().invoke(
        app, ["heads", str(found.folder), "--out", str(out), "--layers", "1", "--top", "5"]
    )
    assert run.exit_code == 0, run.output
    for text in ("induction", "local context", "Share of heads called monosemantic", "1.0"):
        assert text in run.output
    assert "decoder directions are left out" in run.output
    names = ("heads.json", "heads.png", "families.json", "families.png")
    assert all((out / name).is_file() for name in names)
    assert set(load_study(out / "heads.json").table["layer"]) == {1}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "no survey in nowhere"),
        (["nowhere", "--saes", "x"], "need --model"),
        (["nowhere", "--sample", "0"], "--sample 0"),
    ],
)
def test_command_line_errors(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = CliRunner().invoke(app, ["heads", *arguments])
    assert run.exit_code == 2
    assert message in run.output
    assert not list(tmp_path.iterdir())
