"""The IOI studies against single prompts, edited one by one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import sae_attn_plugin as sap
from sae_attn_plugin.backends.protocol import Site
from sae_attn_plugin.errors import FileError, InputError
from sae_attn_plugin.studies import (
    ioi_circuit,
    ioi_features,
    ioi_positions,
    qk_ioi,
    qk_variance,
)
from sae_attn_plugin.tasks import IOIDataset

N = 6


@pytest.fixture(scope="module")
def lens() -> sap.FeatureLens:
    return sap.demo.load("nnsight")


@pytest.fixture(scope="module")
def data(lens: sap.FeatureLens) -> IOIDataset:
    return IOIDataset(N, lens.tokenizer, 3, "mixed", prepend_bos=lens.prepend_bos)


def difference(logits: torch.Tensor, data: IOIDataset, i: int) -> float:
    end = logits[0, int(data.positions["END"][i])]
    return float(end[data.correct[i]] - end[data.wrong[i]])


def tokens_of(data: IOIDataset, i: int) -> torch.Tensor:
    return data.tokens[i : i + 1, : int(data.lengths[i])]


def test_swapped_exchanges_the_pair_and_nothing_else(data: IOIDataset) -> None:
    other = data.swapped()
    assert (other.correct == data.correct).all()
    assert (other.positions["S2"] == data.positions["S2"]).all()
    assert (other.positions["IO"] == data.positions["S1"]).all()
    for i in range(N):
        clean, swapped = tokens_of(data, i)[0].tolist(), tokens_of(other, i)[0].tolist()
        a, b = int(data.positions["IO"][i]), int(data.positions["S1"][i])
        clean[a], clean[b] = clean[b], clean[a]
        assert clean == swapped
    assert [s.order for s in other.swapped().samples] == [s.order for s in data.samples]


def test_features_against_single_prompts(lens: sap.FeatureLens, data: IOIDataset) -> None:
    table = ioi_features(lens, [1], n=N, seed=3, progress=False).table
    both = table[(table["order"] == "both") & (table["kind"] == "feature")]
    live: dict[int, list[int]] = {}
    for i in range(N):
        frame = lens.run(tokens_of(data, i)).features(1, int(data.positions["S2"][i]))
        for feature in frame["feature"].tolist():
            live.setdefault(feature, []).append(i)
    assert set(both["feature"]) == set(live)
    for feature in both["feature"].tolist()[:3]:
        effects = []
        for i in range(N):
            run = lens.run(tokens_of(data, i))
            edit = sap.AblateFeature(1, feature, int(data.positions["S2"][i]))
            edited = lens.intervene(run, [edit]).logits
            effects.append(difference(edited, data, i) - difference(run.logits, data, i))
        rows = table[table["feature"] == feature].set_index("order")
        assert rows.loc["both", "effect"] == pytest.approx(np.mean(effects), abs=2e-5)
        assert rows.loc["both", "active"] == pytest.approx(len(live[feature]) / N)
        orders = [s.order for s in data.samples]
        for order in ("ABBA", "BABA"):
            mine = [e for e, o in zip(effects, orders, strict=True) if o == order]
            assert rows.loc[order, "effect"] == pytest.approx(np.mean(mine), abs=2e-5)


def test_error_and_layer_rows(lens: sap.FeatureLens, data: IOIDataset) -> None:
    table = ioi_features(lens, [1], n=N, seed=3, progress=False).table
    table = table[table["order"] == "both"].set_index("kind")
    dictionary = lens.dictionaries[1]
    effects: dict[str, list[float]] = {"error": [], "layer": []}
    for i in range(N):
        tokens, at = tokens_of(data, i), int(data.positions["S2"][i])
        clean = difference(lens.run(tokens).logits, data, i)

        def spliced(z: torch.Tensor, at: int = at) -> torch.Tensor:
            z = z.clone()
            z[0, at] = dictionary.decode(dictionary.encode(z[0]))[at]
            return z

        def nothing(out: torch.Tensor, at: int = at) -> torch.Tensor:
            out = out.clone()
            out[0, at] = 0
            return out

        for kind, site, edit in (
            ("error", Site("z", 1), spliced),
            ("layer", Site("attn_out", 1), nothing),
        ):
            edited = lens.backend.forward(tokens, {site: edit})[Site("logits")]
            effects[kind].append(difference(edited, data, i) - clean)
    for kind, values in effects.items():
        assert table.loc[kind, "effect"] == pytest.approx(np.mean(values), abs=2e-5)


def test_positions_against_single_prompts(lens: sap.FeatureLens, data: IOIDataset) -> None:
    study = ioi_positions(lens, [1, 2], n=N, seed=3, conjunctions=[" with"], progress=False)
    table = study.table.set_index("condition")
    moved = data.new_names().with_sentence_in_front().with_inserted_clause()
    sources = {"all three": moved, "swapped pair": data.swapped(), "three names": data.abc()}
    sources["“and” → “with”"] = data.with_conjunction(" with")
    metric: dict[str, list[float]] = {}
    sites = [Site("attn_out", layer) for layer in (1, 2)]
    for i in range(N):
        tokens, at = tokens_of(data, i), int(data.positions["S2"][i])

        def record(name: str, edits: Any, tokens: Any = tokens, i: int = i) -> None:
            edited = lens.backend.forward(tokens, edits)[Site("logits")]
            metric.setdefault(name, []).append(difference(edited, data, i))

        def put(values: dict, at: int | slice = at) -> dict:
            def edit_of(site: Site) -> Any:
                def edit(out: torch.Tensor) -> torch.Tensor:
                    out = out.clone()
                    out[:, at] = values[site]
                    return out

                return edit

            return {site: edit_of(site) for site in sites}

        record("clean", {})
        zero = dict.fromkeys(sites, torch.zeros(()))
        record("zero at S2", put(zero))
        record("zero at all positions", put(zero, slice(None)))
        for name, source in sources.items():
            there = int(source.positions["S2"][i])
            found = lens.backend.forward(tokens_of(source, i), reads=sites)
            record(name, put({site: found[site][:, there] for site in sites}))
    for name, values in metric.items():
        assert table.loc[name, "logit_difference"] == pytest.approx(np.mean(values), abs=3e-5)
    clean, zero = np.mean(metric["clean"]), np.mean(metric["zero at S2"])
    for name in sources:
        mean = np.mean(metric[name])
        assert table.loc[name, "retained"] == pytest.approx(mean / clean, abs=1e-4)
        expected = (mean - zero) / (clean - zero)
        assert table.loc[name, "recovered"] == pytest.approx(expected, abs=1e-4)
    # The two zero ablations, which the paper's code mixes up, are far apart.
    assert abs(zero - np.mean(metric["zero at all positions"])) > 0.5


def test_circuit_against_single_prompts(lens: sap.FeatureLens, data: IOIDataset) -> None:
    study = ioi_circuit(
        lens, {"both": [0, 2]}, [(1, 504)], [(2, 0), (2, 2)], n=N, seed=3, progress=False
    )
    groups = study.table.set_index("group")
    paths = study.tables["paths"].set_index(["feature", "head"])
    spliced, cut = [], []

    def splice(layer: int) -> Any:
        dictionary = lens.dictionaries[layer]
        return lambda z: dictionary.decode(dictionary.encode(z[0]))[None]

    for i in range(N):
        tokens = tokens_of(data, i)
        edits = {Site("z", layer): splice(layer) for layer in (0, 2)}
        spliced.append(difference(lens.backend.forward(tokens, edits)[Site("logits")], data, i))
        run = lens.run(tokens)
        edge = sap.PatchEdge("attn:1:504", "value:2.0", int(data.positions["S2"][i]))
        edited = lens.intervene(run, [edge]).logits
        cut.append(difference(edited, data, i) - difference(run.logits, data, i))
    assert groups.loc["both", "logit_difference"] == pytest.approx(np.mean(spliced), abs=3e-5)
    assert paths.loc[("attn:1:504", "2.0"), "effect"] == pytest.approx(np.mean(cut), abs=3e-5)
    assert set(paths.index) == {
        (writer, head) for writer in ("attn:1:504", "all") for head in ("2.0", "2.2", "all")
    }
    assert groups.loc["all", "layers"] == "0, 1, 2, 3"


def test_pairs_are_those_of_each_head(lens: sap.FeatureLens, tmp_path: Path) -> None:
    study = qk_ioi(lens, [(2, 0), (2, 2)], n=N, seed=3, k=(1, 4), keys=["S2"], folder=tmp_path)
    data = IOIDataset(N, lens.tokenizer, 3, "mixed", prepend_bos=lens.prepend_bos)
    alone = qk_variance(lens, data, 2, 2, "END", "S2")
    rows = study.table[study.table["head"] == 2]
    assert rows["explained"].tolist() == alone.table((1, 4))["explained"].tolist()
    attention = [
        float(lens.run(tokens_of(data, i)).capture["pattern", 2][0, 2, -1, data.positions["S2"][i]])
        for i in range(N)
    ]
    assert rows["attention"].tolist()[0] == pytest.approx(np.mean(attention), rel=1e-5)
    kinds = study.tables["kinds"]
    for head in (0, 2):
        assert kinds.loc[kinds["head"] == head, "share"].sum() == pytest.approx(1.0, abs=1e-5)
    again = qk_ioi(lens, [(2, 0), (2, 2)], n=N, seed=3, k=(1, 4), keys=["S2"], folder=tmp_path)
    for name, table in study.tables.items():
        pd.testing.assert_frame_equal(again.tables[name], table, check_exact=True)
    assert len(study.plot().axes[0].get_lines()) == 4
    with pytest.raises(FileError, match="made with other settings"):
        qk_ioi(lens, [(2, 0)], n=N, seed=4, k=(1, 4), keys=["S2"], folder=tmp_path)


def test_hosts_agree(lens: sap.FeatureLens) -> None:
    other = sap.demo.load("transformer_lens")
    studies = [
        lambda x: ioi_features(x, [3], n=2, progress=False),
        lambda x: ioi_positions(x, [1], n=2, conjunctions=[], progress=False),
        lambda x: ioi_circuit(x, features=[(1, 504)], n=2, progress=False),
    ]
    for study in studies:
        ours, theirs = study(lens), study(other)
        key = ["kind", "layer", "feature", "order"]
        for name, table in ours.tables.items():
            pair = [table, theirs.tables[name]]
            if name == "features":  # equally small effects may change places
                pair = [x.sort_values(key).reset_index(drop=True) for x in pair]
            pd.testing.assert_frame_equal(pair[0], pair[1], rtol=1e-4, atol=2e-4)


def test_pictures_show_the_tables(lens: sap.FeatureLens) -> None:
    study = ioi_positions(lens, [1], n=2, conjunctions=[], progress=False)
    axes = study.plot().axes[0]
    labels = [text.get_text() for text in axes.get_yticklabels()]
    assert labels == list(study.table["condition"])
    study = ioi_features(lens, [1], n=2, progress=False)
    labels = [text.get_text() for text in study.plot().axes[0].get_yticklabels()]
    strongest = study.table[study.table["kind"] == "feature"].iloc[0]
    assert f"attn:{strongest['layer']}:{strongest['feature']}" in labels[:3]
    study = ioi_circuit(lens, features=[(1, 504)], heads=[(2, 0)], n=2, progress=False)
    assert [t.get_text() for t in study.plot().axes[1].get_yticklabels()] == ["attn:1:504", "all"]


@pytest.mark.parametrize(
    ("study", "options", "message"),
    [
        (ioi_features, {"role": "S3"}, "unknown role"),
        (ioi_features, {"layers": [7]}, "no SAE in layer 7"),
        (ioi_features, {"n": 0}, "at least 1"),
        (ioi_positions, {"role": "S3"}, "unknown role"),
        (ioi_positions, {"layers": [9], "n": 2}, "do not exist"),
        (ioi_positions, {"conjunctions": " or"}, "must be a list"),
        (ioi_positions, {"conjunctions": [" zzz"], "n": 2}, "knows none"),
        (ioi_positions, {"layers": [], "n": 2}, "do not exist"),
        (qk_ioi, {"query": "S3"}, "unknown role"),
        (qk_ioi, {"n": 3}, "at least 4"),
        (qk_ioi, {"n": 4, "min_attention": 1.1}, "no head attends"),
        (qk_ioi, {"heads": [(0, 99)]}, "head 0.99 does not exist"),
        (ioi_circuit, {"groups": {"x": [9]}}, "group 'x': no SAE in layer 9"),
        (ioi_circuit, {"groups": {"x": []}}, "group 'x': no layers given"),
        (ioi_circuit, {"heads": [(0, 99)]}, "head 0.99 does not exist"),
        (ioi_circuit, {"features": [(0, 9999)], "n": 2}, "attn:0:9999 does not exist"),
    ],
)
def test_bad_input(lens: sap.FeatureLens, study: Any, options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        study(lens, **options)
