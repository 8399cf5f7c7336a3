"""Attributions over a data set, against an explicit loop over the prompts."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import sae_attn_plugin as sap
from sae_attn_plugin.tasks import IOIDataset
from sae_attn_plugin.tasks.aligned import with_roles

ROLES = ("IO", "S1", "S2", "END", "AND")


@functools.cache
def lens() -> sap.FeatureLens:
    return sap.demo.load()


@functools.cache
def dataset(n: int = 6) -> IOIDataset:
    return IOIDataset(n, lens().tokenizer, 3, prepend_bos=lens().prepend_bos)


@functools.cache
def aligned() -> sap.AlignedAttribution:
    return lens().attribute_many(dataset())


def explicit(data: IOIDataset, drop: bool = False) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Edge weights ``[prompt, (source, target)]`` and ledgers, by plain loops over plain tables."""
    rows, ledgers = [], []
    for i in range(len(data)):
        run = lens().run([data.tokens[i, : int(data.lengths[i])].tolist()])
        target = sap.LogitDiff(int(data.correct[i]), int(data.wrong[i]))
        pruned = run.attribute(target).prune(0.8, 0.98)
        roles = {int(data.positions[role][i]): role for role in ROLES}

        def name(node_id: str, roles: dict[int, str] = roles) -> str | None:
            node = sap.Node.parse(node_id)
            if drop and node.position not in roles:
                return None
            place = roles.get(node.position, "other")
            body = "logit_diff" if node.kind == "logit_diff" else node_id.rsplit("@", 1)[0]
            return f"{body}@{place}"

        sums: dict[tuple[str, str], float] = {}
        for source, end, weight, _ in pruned.edges.itertuples(index=False):
            pair = name(source), name(end)
            if None not in pair:
                sums[pair] = sums.get(pair, 0.0) + float(weight)  # type: ignore[index]
        rows.append(sums)
        ledger: Any = pruned.ledger
        ledgers.append(ledger.groupby([name(one) for one in ledger.index]).sum())
    return pd.DataFrame(rows).fillna(0.0), pd.concat(ledgers)


def test_means_errors_and_presence_are_those_of_a_loop() -> None:
    expected, _ = explicit(dataset())
    edges = aligned().edges.set_index(["source", "target"])
    assert set(edges.index) == set(expected.columns)
    for pair in expected.columns:
        column, row = expected[pair], edges.loc[pair]
        assert row["mean"] == pytest.approx(column.mean(), rel=1e-6, abs=1e-9)
        assert row["se"] == pytest.approx(column.sem(), rel=1e-5, abs=1e-8)
        assert row["present"] == pytest.approx((column != 0).mean())
        assert row["low"] <= row["mean"] + 1e-9
        assert row["mean"] <= row["high"] + 1e-9
    assert edges["mean"].abs().is_monotonic_decreasing


def test_intervals_are_those_of_the_shared_bootstrap() -> None:
    from sae_attn_plugin.statistics import bootstrap

    expected, _ = explicit(dataset())
    table = aligned().table(level=0.9, resamples=4000, seed=7)
    some = table[table["present"] > 0.6].head(5)
    assert len(some) == 5
    for row in some.to_dict("records"):
        values = expected[row["source"], row["target"]].to_numpy()
        interval = bootstrap(values, level=0.9, resamples=4000, seed=11)
        width = max(interval.high - interval.low, 1e-9)
        assert abs(row["low"] - interval.low) <= 0.1 * width  # other draws of the same thing
        assert abs(row["high"] - interval.high) <= 0.1 * width


def test_the_ledger_closes_over_prompts() -> None:
    for drop in (False, True):
        found = lens().attribute_many(dataset(), other="drop" if drop else "bucket")
        _, ledgers = explicit(dataset(), drop)
        ledger = found.ledger
        assert found.targets == ("logit_diff@END",)
        for column in ("constant", "pruned", "value"):
            sums: Any = ledgers.groupby(level=0)[column].sum()
            expected = sums / len(dataset())
            np.testing.assert_allclose(
                ledger[column].sort_index(), expected.sort_index(), rtol=1e-6, atol=1e-8
            )
        assert ledger["residual"].abs().max() < 1e-5
        assert (ledger["dropped"].abs().max() > 0) == drop


def test_positions_without_a_role_can_be_left_out_and_are_counted() -> None:
    expected, _ = explicit(dataset(), drop=True)
    found = lens().attribute_many(dataset(), other="drop")
    assert set(map(tuple, found.edges[["source", "target"]].astype(str).to_numpy())) == set(
        expected.columns
    )
    assert not any(name.endswith("@other") for name in found.node_ids)
    kept = found.weights()["weight"].abs().sum()
    assert 0.05 < found.dropped < 0.95
    assert "left out" in repr(found)
    assert kept > 0


def test_contrast_of_pairs() -> None:
    corrupted = dataset().abc()
    second = lens().attribute_many(corrupted)
    contrast = aligned().contrast(second)
    assert contrast.paired
    a, b = explicit(dataset())[0], explicit(corrupted)[0]
    edges = contrast.edges.set_index(["source", "target"])
    union = a.columns.union(b.columns)
    assert set(edges.index) == set(union)
    a, b = a.reindex(columns=union, fill_value=0.0), b.reindex(columns=union, fill_value=0.0)
    for pair in union[::25]:
        row, difference = edges.loc[pair], a[pair] - b[pair]
        assert row["difference"] == pytest.approx(difference.mean(), rel=1e-5, abs=1e-8)
        assert row["se"] == pytest.approx(difference.sem(), rel=1e-5, abs=1e-8)
        assert row["present_second"] == pytest.approx((b[pair] != 0).mean())
    unpaired = aligned().contrast(second, paired=False)
    pair = union[0]
    row = unpaired.edges.set_index(["source", "target"]).loc[pair]
    assert row["se"] == pytest.approx(np.hypot(a[pair].sem(), b[pair].sem()), rel=1e-5, abs=1e-8)
    few = lens().attribute_many(dataset(4))
    assert not aligned().contrast(few).paired
    with pytest.raises(sap.InputError, match="cannot pair 6 prompts with 4"):
        aligned().contrast(few, paired=True)


def test_roles_of_ones_own_and_targets_by_prompt() -> None:
    prompts = [sap.demo.ioi_prompt(), "After Mary and John left the store, John gave a drink to"]
    places = [{"FIRST": 2, "LAST": -1}, {"FIRST": 2, "LAST": -1}]
    answers = [(" Mary", " John"), (" Mary", " John")]
    found = lens().attribute_many(
        prompts,
        lambda i: [sap.LogitDiff(*answers[i]), sap.Logit(answers[i][0])],
        align=places,
    )
    assert set(found.targets) == {"logit_diff:0@LAST", "logit:1@LAST"}
    assert {name.rsplit("@", 1)[1] for name in found.node_ids} == {"FIRST", "LAST", "other"}
    score = lens().attribute_many(
        prompts, sap.HeadScore(2, 1, -1, 2, "key"), align={"FIRST": [2, 2], "LAST": [-1, -1]}
    )
    assert score.targets == ("score:2.1:FIRST:key@LAST",)
    feature = lens().attribute_many(prompts, sap.Feature(2, 7, -1), align=places)
    assert feature.targets == ("attn:2:7@LAST",)
    assert feature.nodes.loc["attn:2:7@LAST", "feature"] == 7


def test_two_roles_at_one_position_are_a_place_of_their_own() -> None:
    data = dataset()
    found = lens().attribute_many(data, align=("S1+1", "AND", "END"), nodes=1, edges=1)
    places = {name.rsplit("@", 1)[1] for name in found.node_ids}
    assert places == {"S1+1", "AND", "S1+1=AND", "END", "other"}


def test_files_and_graphs(tmp_path: Path) -> None:
    path = tmp_path / "many.json"
    aligned().save(path)
    again = sap.AlignedAttribution.load(path)
    pd.testing.assert_frame_equal(again.edges, aligned().edges)
    pd.testing.assert_frame_equal(again.nodes, aligned().nodes)
    pd.testing.assert_frame_equal(again.ledger, aligned().ledger)
    assert aligned().contrast(again).paired
    graph = aligned().to_networkx(min_present=0.5, certain=True)
    assert graph.number_of_edges() > 3
    for _, _, row in graph.edges(data=True):
        assert row["present"] >= 0.5
        assert row["low"] > 0 or row["high"] < 0
    assert graph.graph["n_prompts"] == 6
    assert "logit_diff@END" in graph
    json.dumps(dict(graph.nodes(data=True)))
    document = json.loads(path.read_text())
    document["entries"]["edge"][0] = 10**6
    path.write_text(json.dumps(document))
    with pytest.raises(sap.FileError, match="points outside the file"):
        sap.AlignedAttribution.load(path)
    path.write_text("{}")
    with pytest.raises(sap.FileError, match="holds no aligned attribution"):
        sap.AlignedAttribution.load(path)
    with pytest.raises(sap.FileError, match="cannot read"):
        sap.AlignedAttribution.load(tmp_path / "missing.json")


def test_one_prompt_has_no_spread() -> None:
    edges = lens().attribute_many(dataset(1)).edges
    assert edges[["se", "low", "high"]].isna().to_numpy().all()
    assert (edges["present"] == 1).all()


@pytest.mark.parametrize(
    ("align", "message"),
    [
        ([{"A": 1}, {"B": 1}], "prompt 1 has no position for the role 'A'"),
        ([{"A": 1}], "align has 1 dicts of positions for 2 prompts"),
        ({"A": [1]}, r"align\['A'\] has 1 positions for 2 prompts"),
        ({"A": 1}, r"align\['A'\] is 1; expected one position for each"),
        ({}, "align names no role"),
        ({"A": [1, 99]}, r"prompt 1: A is at position 99, but the prompt has \d+ tokens"),
        ({"A": [1, 1.5]}, "the position of A in prompt 1 must be an integer"),
        ({"a@b": [1, 2]}, "a role cannot be called 'a@b'"),
        ({"other": [1, 2]}, "a role cannot be called 'other'"),
        (None, "these prompts have no roles of their own; pass align="),
        (("IO",), "these prompts have no roles|align must be"),
    ],
)
def test_roles_that_cannot_be(align: Any, message: str) -> None:
    prompts = [sap.demo.ioi_prompt()] * 2
    with pytest.raises(sap.InputError, match=message):
        lens().attribute_many(prompts, sap.Logit(" Mary"), align=align)


def test_what_else_is_refused() -> None:
    with pytest.raises(sap.InputError, match="unknown role 'S3'; this data set has IO, S1"):
        with_roles(dataset(), ("S3",))
    with pytest.raises(sap.InputError, match="no prompts given"):
        with_roles([], {"A": []})
    with pytest.raises(sap.InputError, match="list of prompts, got str"):
        with_roles("one prompt", {"A": [1]})
    with pytest.raises(sap.InputError, match="name no answers; pass target="):
        lens().attribute_many([sap.demo.ioi_prompt()], align={"A": [1]})
    with pytest.raises(sap.InputError, match="expected 'bucket' or 'drop'"):
        lens().attribute_many(dataset(1), other="keep")  # type: ignore[arg-type]
    with pytest.raises(sap.InputError, match="level=2"):
        aligned().table(level=2)
    with pytest.raises(sap.InputError, match="min_present=2"):
        aligned().to_networkx(min_present=2)
