"""Sites of cards: what they hold is what the survey's tables hold."""

from __future__ import annotations

import itertools
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from made_survey import ROLES, Strings, made_survey
from scipy.stats import spearmanr
from typer.testing import CliRunner

import sae_attn_plugin as sap
from sae_attn_plugin import cli
from sae_attn_plugin.feature_cards.tables import rounded

Site = dict[str, Any]
Tables = dict[str, Any]  # data frames
_NUMBERS = ("fires", "density", "mean", "max", "q10", "q50", "q99", "dfa_abs", "decoder_norm")


def read(folder: Path) -> Site:
    """All data of a site by file, as its page reads them."""
    found = {}
    for path in sorted((folder / "data").rglob("*.js")):
        text = path.read_bytes().decode("ascii")
        match = re.fullmatch(r'SaeAttnCards\.take\("([^"]+)",(.*)\);\n', text)
        assert match is not None
        assert match[1] == str(path.relative_to(folder / "data").with_suffix(""))
        assert not set("<>&") & set(match[2])
        found[match[1]] = json.loads(match[2])
    return found


def features(site: Site) -> dict[tuple[int, int], dict[str, Any]]:
    found = {}
    for name, data in site.items():
        if name.startswith("features/"):
            layer = int(name.split("/")[1].split("-")[0])
            for one in map(dict, data["features"]):
                for kind in ("top", "sample"):
                    keys = site["site"]["example"]
                    one[kind] = [dict(zip(keys, row, strict=True)) for row in one[kind]]
                found[layer, one["feature"]] = one
    return found


@pytest.fixture(scope="module")
def survey(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_survey(tmp_path_factory.mktemp("surveys") / "made", layers=(0, 2), d_sae=30)


@pytest.fixture(scope="module")
def tables(survey: Path) -> Tables:
    return {path.stem: pq.read_table(path).to_pandas() for path in survey.glob("*.parquet")}


@pytest.fixture(scope="module")
def folder(survey: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sites") / "site"
    page = sap.cards(survey, folder, examples=4, context=(5, 2), per_file=7, progress=False)
    assert page == folder / "index.html"
    return folder


@pytest.fixture(scope="module")
def site(folder: Path) -> Site:
    return read(folder)


def close(one: Any, other: Any, digits: int = 6) -> bool:
    """Equal to so many digits; missing is NaN."""
    a = np.array([np.nan if x is None else x for x in np.atleast_1d(one)], dtype=float)
    b = np.asarray(np.atleast_1d(other), dtype=float)
    return a.shape == b.shape and np.allclose(
        a, b, rtol=0.5001 * 10 ** (1 - digits), equal_nan=True
    )


# -- what the cards say ----------------------------------------------------------------------------


def test_every_live_feature_has_a_card(site: Site, tables: Tables) -> None:
    table = tables["features"]
    live = table[table["fires"] > 0]
    assert 0 < len(live) < len(table)
    expected = list(zip(live["layer"], live["feature"], strict=True))
    assert sorted(features(site)) == expected
    for facts in site["site"]["layers"]:
        mine = live[live["layer"] == facts["layer"]]
        assert facts["features"] == facts["live"] == len(mine)
        # seven to a file, and the index says which
        files = [site[f"features/{facts['layer']:02d}-{i:04d}"] for i in range(len(facts["files"]))]
        found = [[one["feature"] for one in file["features"]] for file in files]
        assert list(itertools.chain(*found)) == mine["feature"].tolist()
        assert [[some[0], some[-1]] for some in found] == facts["files"]
        assert {len(some) for some in found[:-1]} == {7}
    assert site["site"]["fires"] == live["fires"].sum()


def test_numbers_are_the_tables(site: Site, tables: Tables) -> None:
    rows = tables["features"].set_index(["layer", "feature"])
    heads = tables["heads"].set_index(["layer", "feature", "head"]).sort_index()
    profile = tables["positions_profile"]
    for (layer, feature), one in features(site).items():
        row = rows.loc[(layer, feature)]
        for name in _NUMBERS:
            assert close(one[name], row[name])
        assert one["neuronpedia"] == row["neuronpedia"]
        mine = heads.loc[(layer, feature)]
        for name in ("decoder_share", "dfa", "dfa_abs", "dfa_share", "weighted_share"):
            assert close(one["heads"][name], mine[name], 5)
        counts = np.zeros(len(one["positions"]))
        of = profile[(profile["layer"] == layer) & (profile["feature"] == feature)]
        np.add.at(counts, of["position_bin"].to_numpy(), of["fires"].to_numpy())
        assert one["positions"] == counts.tolist()
        for name, sign in (("raised", 1), ("lowered", -1)):
            effects = _of(tables["logits"], layer, feature)
            effects = effects[effects["sign"] == sign].sort_values("rank")
            assert [token for token, _ in one[name]] == effects["token"].tolist()
            assert close([effect for _, effect in one[name]], effects["effect"])
        pairs = _of(tables["cofiring"], layer, feature)
        whole = ["other_layer", "other", "together", "fires_sample"]
        assert [row[:4] for row in one["cofiring"]] == pairs[whole].to_numpy().tolist()
        assert close([row[4] for row in one["cofiring"]], pairs["jaccard"])


def _of(table: Any, layer: int, feature: int) -> Any:
    return table[(table["layer"] == layer) & (table["feature"] == feature)]


def test_examples_are_the_tables(site: Site, tables: Tables) -> None:
    texts = tables["rows"].set_index("row")["tokens"]
    n = 0
    for (layer, feature), one in features(site).items():
        kept = _of(tables["examples"], layer, feature)
        places = {(e["kind"], e["row"], e["position"]): e for e in kept.to_dict("records")}
        top = kept[kept["kind"] == "top"].sort_values("rank")
        found = [(e["row"], e["position"]) for e in one["top"]]
        assert found == list(zip(top["row"], top["position"], strict=True))[:4]
        drawn = kept[kept["kind"] == "sample"].sort_values("activation", ascending=False)
        assert one["sampled"] == len(drawn)
        activations = [e["activation"] for e in one["sample"]]
        assert len(activations) == min(4, len(drawn))
        # evenly from the strongest to the weakest
        if len(drawn) == 6:
            assert close(activations, drawn["activation"].to_numpy()[[0, 2, 3, 5]])
        for kind in ("top", "sample"):
            for e in one[kind]:
                row = places[kind, e["row"], e["position"]]
                for name in ("activation", "pre_activation", "dfa_abs", "dfa_rest", "active"):
                    assert close(e[name], row[name])
                assert e["sources"] == row["sources"].tolist()
                assert close(e["dfa"], row["dfa"], 5)
                assert close(e["heads"], row["dfa_by_head"], 5)
                tokens = texts[e["row"]].tolist()
                shown = {start + i: t for start, ids in e["parts"] for i, t in enumerate(ids)}
                assert shown == {p: tokens[p] for p in shown}
                window = range(max(e["position"] - 5, 0), min(e["position"] + 3, 32))
                assert set(window) | set(e["sources"]) <= set(shown)
                # no more than that and a neighbour on each side of a source
                near = {s + d for s in e["sources"] for d in (-1, 0, 1)}
                assert set(shown) <= set(window) | near
                others = kept[(kept["row"] == e["row"]) & (kept["position"] != e["position"])]
                expected = {p for p in others["position"] if p in shown}
                assert {p for p, _ in e["others"]} == expected
                n += 1
    assert n > 250


def test_profiles_are_over_the_uniform_sample(site: Site, tables: Tables, survey: Path) -> None:
    edges = json.loads((survey / "survey.json").read_text())["distance_edges"]
    for (layer, feature), one in features(site).items():
        kept = _of(tables["examples"], layer, feature)
        drawn = kept[kept["kind"] == "sample"]
        bins, total = np.zeros(len(edges)), np.stack(drawn["by_distance"].tolist()).sum()
        for values in drawn["by_distance"]:
            bins += values
        assert close(one["distance"], bins / total, 4)
        roles = np.stack(drawn["roles"].tolist()).sum(0) / drawn["dfa_abs"].sum()
        assert len(one["roles"]) == len(ROLES)
        assert close(one["roles"], roles, 4)


def test_heads(site: Site, tables: Tables) -> None:
    every = tables["features"].set_index(["layer", "feature"])
    for layer in (0, 2):
        data = site[f"layer-{layer:02d}"]
        heads = tables["heads"][tables["heads"]["layer"] == layer]
        live = every.loc[layer]
        live = live[live["fires"] > 0]
        wide = {
            name: heads.pivot(index="feature", columns="head", values=name).loc[live.index]
            for name in ("decoder_share", "dfa_share", "dfa_abs")
        }
        assert data["feature"] == live.index.tolist()
        assert data["head"] == wide["dfa_share"].idxmax(axis=1).tolist()
        often = live.index[live["fires"] >= 10]
        size = wide["dfa_abs"].mul(live["fires"], axis=0)
        profile = _distances(tables["examples"], layer)
        for head, card in enumerate(data["heads"]):
            x, y = wide["decoder_share"][head], wide["dfa_share"][head]
            assert close(card["agreement"], spearmanr(x[often], y[often])[0], 4)
            for listed, values in ((card["by_decoder"], x), (card["by_dfa"], y)):
                expected = values[often].sort_values(ascending=False, kind="stable").head(20)
                assert [data["feature"][i] for i, *_ in listed] == expected.index.tolist()
                assert close([row[1] for row in listed], x[expected.index], 4)
                assert close([row[2] for row in listed], y[expected.index], 4)
            both = {i for i, *_ in card["by_decoder"]} & {i for i, *_ in card["by_dfa"]}
            assert card["overlap"] == len(both)
            assert card["top"] == data["head"].count(head)
            assert close(card["share"], size[head].sum() / size.to_numpy().sum(), 4)
            assert close(card["distance"], profile[head] / profile[head].sum(), 4)
            grid = np.array(card["grid"]).reshape(12, 12)
            assert grid.sum() == len(live)
            assert grid.sum(0).tolist() == np.histogram(x, 12, (0, 1))[0].tolist()
            assert grid.sum(1).tolist() == np.histogram(y, 12, (0, 1))[0].tolist()
            (short,) = [
                h for h in site["site"]["heads"] if (h["layer"], h["head"]) == (layer, head)
            ]
            assert short["agreement"] == card["agreement"]
            assert [f for f, *_ in short["few"]] == [
                data["feature"][i] for i, *_ in card["by_dfa"][:3]
            ]


def _distances(examples: Any, layer: int) -> np.ndarray:
    kept = examples[(examples["layer"] == layer) & (examples["kind"] == "sample")]
    size = np.abs(np.stack(kept["dfa_by_head"].tolist()))
    return (size / size.sum(1, keepdims=True)).T @ np.stack(kept["by_distance"].tolist())


def test_tokens_of_the_index(site: Site, tables: Tables) -> None:
    texts = tables["rows"].set_index("row")["tokens"]
    for layer in (0, 2):
        data = site[f"layer-{layer:02d}"]
        for feature, shown in zip(data["feature"], data["tokens"], strict=True):
            kept = _of(tables["examples"], layer, feature)
            kept = kept[kept["kind"] == "top"]
            fired = [texts[r][p] for r, p in zip(kept["row"], kept["position"], strict=True)]
            counts = pd.Series(fired).value_counts()
            assert [counts[t] for t in shown] == sorted(counts, reverse=True)[: len(shown)]
            assert len(shown) == min(3, len(counts))


def test_firings_with_the_same_text_are_shown_once(tmp_path: Path) -> None:
    survey = made_survey(tmp_path / "survey", layers=(0,), dead=0)
    path = survey / "examples.parquet"
    table = pq.read_table(path).to_pandas()
    top = table["kind"] == "top"
    table.loc[top & (table["rank"] < 3), ["row", "position", "activation"]] = [3, 7, 9.0]
    table.to_parquet(path)
    sap.cards(survey, tmp_path / "site", progress=False)
    for one in features(read(tmp_path / "site")).values():
        assert one["top"][0]["same"] == min(3, one["fires"])
        assert all(e["same"] == 1 for e in one["top"][1:])


# -- options ---------------------------------------------------------------------------------------


def test_bytes_are_the_same_again(survey: Path, folder: Path, tmp_path: Path, site: Site) -> None:
    sap.cards(survey, tmp_path / "again", examples=4, context=(5, 2), per_file=7, progress=False)
    files = sorted(p.relative_to(folder) for p in folder.rglob("*") if p.is_file())
    again = tmp_path / "again"
    assert files == sorted(p.relative_to(again) for p in again.rglob("*") if p.is_file())
    for file in files:
        assert (folder / file).read_bytes() == (again / file).read_bytes()
    # and files of another size hold the same cards
    sap.cards(survey, tmp_path / "large", examples=4, context=(5, 2), progress=False)
    assert features(read(tmp_path / "large")) == features(read(folder))
    assert read(tmp_path / "large")["layer-00"] == site["layer-00"]


def test_chosen_features(survey: Path, tmp_path: Path, tables: Tables) -> None:
    table = tables["features"]
    dead = table[(table["layer"] == 2) & (table["fires"] == 0)]["feature"].tolist()
    sap.cards(survey, tmp_path / "all", layers=[2], features="all", progress=False)
    site = read(tmp_path / "all")
    found = features(site)
    assert sorted(found) == [(2, feature) for feature in range(30)]
    assert [head["layer"] for head in site["site"]["heads"]] == [2] * 4
    for feature in dead:
        one = found[2, feature]
        assert (one["fires"], one["top"], one["sample"], one["max"]) == (0, [], [], None)
        assert site["layer-02"]["head"][feature] == -1
    sap.cards(survey, tmp_path / "some", features={0: [3, 1], 2: dead[:1]}, progress=False)
    expected = features(read(tmp_path / "all"))
    some = features(read(tmp_path / "some"))
    assert sorted(some) == [(0, 1), (0, 3), (2, dead[0])]
    assert some[2, dead[0]] == expected[2, dead[0]]


def test_names(survey: Path, tmp_path: Path) -> None:
    members: Any = pd.DataFrame(
        {
            "layer": [0, 0, 2],
            "feature": [1, 1, 3],
            "family": ["previous_token", "induction", "induction"],
            "score": [0.75, 0.5, 1.0],
            "score_low": [0.6, 0.4, 0.9],
            "score_high": [0.9, 0.7, 1.0],
            "baseline": [0.1, 0.2, 0.3],
        }
    )
    families = sap.studies.Study("families", {}, {"layers": members[:0], "members": members})
    sap.cards(
        survey, tmp_path / "site", families=families, labels={(2, 3): "<names>"}, title="A & <b>",
        features="all", progress=False, tokenizer=Strings([f"<{i}>" for i in range(100)]),
    )  # fmt: skip
    site = read(tmp_path / "site")
    found = features(site)
    assert site["site"]["families"] == ["induction", "previous_token"]
    assert found[0, 1]["families"] == [[1, 0.75, 0.6, 0.9, 0.1], [0, 0.5, 0.4, 0.7, 0.2]]
    assert found[2, 3]["label"] == "<names>"
    assert site["layer-02"]["label"][3] == "<names>"
    assert site["layer-02"]["families"][3] == [0]
    assert [layer["families"] for layer in site["site"]["layers"]] == [[1, 1], [1, 0]]
    assert "<title>A &amp; &lt;b&gt;</title>" in (tmp_path / "site" / "index.html").read_text()
    tokens = dict(zip(site["tokens"]["ids"], site["tokens"]["strings"], strict=True))
    assert tokens == {i: f"<{i}>" for i in tokens}
    other = sap.studies.Study("quality", {}, {"table": members})
    for name in ("families", "heads"):
        given: Any = {name: other}
        with pytest.raises(sap.InputError, match=rf"{name} must be .* study 'quality'"):
            sap.cards(survey, tmp_path / "other", **given, progress=False)


def test_heads_as_studied(survey: Path, tmp_path: Path, site: Site) -> None:
    heads = pd.DataFrame(
        {
            "layer": [0, 2],
            "head": [1, 3],
            "score_dfa": [0.25, np.nan],
            "monosemantic_dfa": [True, False],
            "agreement_low": [0.1, 0.2],
            "agreement_high": [0.3, 0.4],
        }
    )
    study = sap.studies.Study("heads", {"min_fires": 40}, {"heads": heads})
    sap.cards(survey, tmp_path / "site", heads=study, progress=False)
    found = read(tmp_path / "site")
    assert found["site"]["min_fires"] == 40
    scored = {
        (one["layer"], one["head"]): (one["score"], one["monosemantic"])
        for one in found["site"]["heads"]
        if "score" in one
    }
    assert scored == {(0, 1): (0.25, True), (2, 3): (None, False)}
    card = found["layer-00"]["heads"][1]
    assert (card["low"], card["high"]) == (0.1, 0.3)
    fires = found["layer-00"]["fires"]
    assert all(fires[i] >= 40 for i, *_ in card["by_dfa"])
    assert any(fires[i] < 40 for i, *_ in site["layer-00"]["heads"][1]["by_dfa"])
    with pytest.raises(sap.InputError, match="min_fires=40, got min_fires=10"):
        sap.cards(survey, tmp_path / "other", heads=study, min_fires=10, progress=False)


def test_command(survey: Path, tmp_path: Path, folder: Path) -> None:
    out = tmp_path / "site"
    given = ["cards", str(survey), "--out", str(out), "--examples", "4", "--context", "5", "2"]
    result = CliRunner().invoke(cli.app, given)
    assert result.exit_code == 0, result.output
    assert "index.html" in result.output
    assert features(read(out)) == features(read(folder))
    result = CliRunner().invoke(cli.app, [*given, "--layers", "1"])
    assert result.exit_code == 2
    assert "the survey has layers 0, 2; got 1" in result.output


# -- files -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": [1]}, "the survey has layers 0, 2; got 1"),
        ({"features": {0: [40]}}, "layer 0 of the survey has no feature 40"),
        ({"features": "some"}, "features must be 'live', 'all' or ids by layer, got 'some'"),
        ({"features": {0: []}}, "no feature is left"),
        ({"examples": 0}, "examples must be at least 1, got 0"),
        ({"context": (3, -1)}, "context must be"),
        ({"per_file": 0}, "per_file must be at least 1"),
        ({"min_fires": 0}, "min_fires must be at least 1"),
    ],
)
def test_wrong_options(survey: Path, tmp_path: Path, options: Any, message: str) -> None:
    with pytest.raises(sap.InputError, match=re.escape(message)):
        sap.cards(survey, tmp_path / "site", progress=False, **options)
    assert not list(tmp_path.iterdir())


def test_folders_of_others_are_left_alone(survey: Path, tmp_path: Path) -> None:
    target = tmp_path / "site"
    target.mkdir()
    (target / "thesis.tex").write_text("mine")
    with pytest.raises(sap.FileError, match=r"it holds thesis\.tex"):
        sap.cards(survey, target, progress=False)
    (target / "thesis.tex").rename(target / "index.html")
    with pytest.raises(sap.FileError, match="it holds no site of cards"):
        sap.cards(survey, target, progress=False)
    assert (target / "index.html").read_text() == "mine"
    (target / "index.html").unlink()
    sap.cards(survey, target, layers=[0], progress=False)  # empty
    assert set(p.name for p in tmp_path.iterdir()) == {"site"}
    sap.cards(survey, target, layers=[2], progress=False)  # a site
    assert {layer for layer, _ in features(read(target))} == {2}
    (target / "notes.txt").write_text("mine")
    with pytest.raises(sap.FileError, match=r"it holds notes\.txt"):
        sap.cards(survey, target, progress=False)
    with pytest.raises(sap.FileError, match="it is not a folder"):
        sap.cards(survey, target / "index.html", progress=False)
    with pytest.raises(sap.FileError, match="does not exist"):
        sap.cards(survey, tmp_path / "no" / "site", progress=False)
    assert {p.name for p in tmp_path.iterdir()} == {"site"}


def test_whole_or_not_at_all(survey: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "site"
    sap.cards(survey, target, layers=[0], progress=False)
    before = {p: p.read_bytes() for p in target.rglob("*") if p.is_file()}

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("sae_attn_plugin.feature_cards.build._Site.write_frame", interrupted)
        with pytest.raises(KeyboardInterrupt):
            sap.cards(survey, target, progress=False)
    assert {p: p.read_bytes() for p in target.rglob("*") if p.is_file()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["site"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "survey.json").unlink(), "holds no survey"),
        (lambda f: (f / "survey.json").write_text("{"), "is damaged"),
        (lambda f: (f / "survey.json").write_text("[]"), "is no survey's"),
        (lambda f: (f / "heads.parquet").unlink(), r"cannot read .*heads\.parquet"),
        (lambda f: (f / "examples.parquet").write_bytes(b"PAR1"), r"cannot read .*examples"),
        (lambda f: _change(f, "logits", lambda t: t.drop(columns="effect")), "no column effect"),
        (lambda f: _change(f, "rows", lambda t: t[t["row"] != 3]), "no row 3"),
        (lambda f: _change(f, "heads", lambda t: t[::-1]), "not in order"),
        (lambda f: _change(f, "examples", _shorter), "'by_distance' of its examples should"),
    ],
)  # fmt: skip
def test_damaged_surveys(survey: Path, tmp_path: Path, damage: Any, message: str) -> None:
    shutil.copytree(survey, tmp_path / "survey")
    damage(tmp_path / "survey")
    with pytest.raises(sap.FileError, match=message):
        sap.cards(tmp_path / "survey", tmp_path / "site", progress=False)
    assert [p.name for p in tmp_path.iterdir()] == ["survey"]


def _change(folder: Path, name: str, change: Any) -> None:
    path = folder / f"{name}.parquet"
    change(pq.read_table(path).to_pandas()).to_parquet(path, index=False)


def _shorter(table: pd.DataFrame) -> pd.DataFrame:
    return table.assign(by_distance=[values[:-1] for values in table["by_distance"]])


def test_rounding_keeps_digits() -> None:
    rng = np.random.default_rng(0)
    values = np.concatenate(
        [rng.normal(size=300) * 10.0 ** rng.integers(-30, 30, 300), [0, np.nan]]
    )
    short = rounded(values, 4)
    assert np.allclose(short, values, rtol=0.5001e-3, atol=0, equal_nan=True)
    assert all(
        len(repr(float(x)).replace("e-", "e").lstrip("-0.")) <= 9
        for x in short[:300]
        if 1e-4 < abs(x) < 1e4
    )
