"""A graph's edges against removals on the model."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from helpers import HOSTS, TINY
from scipy.stats import spearmanr

import sae_attn_plugin as sap
from sae_attn_plugin.interventions.validate import Agreement

TOKENS = torch.tensor([[1, 5, 9, 5, 33, 60, 2, 5]])


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("model", TINY)
def test_frozen_effects_are_the_edges(lens_of, model: str, host: str) -> None:
    lens = lens_of(model, host)
    graph = lens.run(TOKENS).graph(sap.LogitDiff(3, 7), nodes=0.5, edges=0.9)
    report = sap.validate(graph, lens, max_sources=12, baseline=False)
    assert report.frozen.max_error <= 1e-5
    assert report.frozen.sign_agreement == 1
    assert report.frozen.r2 == pytest.approx(1, abs=1e-6)
    # nothing held: norms, patterns and indirect paths answer too
    assert report.free.max_error > 1e-3
    assert set(report.free.by_kind().index) == set(report.free.table["kind"])


def test_a_wrong_edge_is_found(lens_of) -> None:
    lens = lens_of("gpt2", "nnsight", torch.float64)
    graph = lens.run(TOKENS).graph(sap.Feature(2, 7, 5), nodes=0.4, edges=0.8)
    source, target, data = max(graph.edges(data=True), key=lambda edge: abs(edge[2]["weight"]))
    assert sap.validate(graph, lens, baseline=False).frozen.max_error <= 1e-10
    data["weight"] *= -1
    table = sap.validate(graph, lens, baseline=False).frozen.table
    wrong = table[table["error"] > 1e-8]
    assert list(zip(wrong["source"], wrong["target"], strict=True)) == [(source, target)]


def test_heads_are_summed(lens_of) -> None:
    lens = lens_of("llama", "hooked_transformer")
    att = lens.run(TOKENS).attribute(sap.Logit(3)).prune(0.4, 0.8)
    whole, split = (
        sap.validate(att.to_networkx(by), lens).frozen.table.sort_values(["source", "target"])  # type: ignore[arg-type]
        for by in (None, "head")
    )
    assert list(whole["source"]) == list(split["source"])
    assert np.allclose(whole["predicted"], split["predicted"], rtol=1e-5, atol=1e-6)


def test_the_figures(lens_of) -> None:
    lens = lens_of("gpt2", "hooked_transformer")
    graph = lens.run(TOKENS).graph(sap.LogitDiff(3, 7), nodes=0.5, edges=0.9)
    free = sap.validate(graph, lens, max_sources=12).free
    predicted, measured = free.table["predicted"], free.table["measured"]
    assert free.rank_correlation == pytest.approx(spearmanr(predicted, measured)[0])
    assert free.r2 == pytest.approx(
        1 - np.sum((measured - predicted) ** 2) / (np.var(measured) * len(measured))
    )
    assert np.isnan(Agreement(free.table.assign(measured=0.0)).r2)


def test_random_edges_and_parts(lens_of) -> None:
    lens = lens_of("gpt2", "hooked_transformer", torch.float64)
    run = lens.run(TOKENS)
    graph = run.graph(sap.LogitDiff(3, 7), nodes=0.4, edges=0.9)
    parts = {"patterns": "patterns", "one": sap.Freeze("norms", but=(0,))}
    report = sap.validate(graph, lens, max_sources=15, freezes=parts)
    assert report.random is not None
    assert list(report.parts()) == ["frozen", "free", "patterns", "one", "random"]
    known = {source for source, _ in graph.edges}
    table = report.random.table
    assert not set(table["source"]) & known
    assert not table.duplicated(["source", "target"]).any()
    # their edges are those of the full attribution, and removing them with all held shows it
    for source, target, predicted in table[["source", "target", "predicted"]].head(6).values:
        writer, reader = sap.Node.parse(source), sap.Node.parse(target)
        vector = run.writers.vectors[run.writers.rows()[writer]]
        site = "mlp_out" if writer.kind == "mlp" else "attn_out"
        site = "embed" if writer.layer is None else site
        edit = sap.AddToStream(-vector, writer.position, site, writer.layer or 0)  # type: ignore[arg-type]
        aim = (
            sap.LogitDiff(3, 7)
            if reader.layer is None
            else sap.Feature(reader.layer, reader.feature, reader.position)  # type: ignore[arg-type]
        )
        effect = lens.intervene(run, [edit], ("patterns", "norms", "mlp", "attention")).effect(aim)
        assert float(effect) == pytest.approx(predicted, abs=1e-10)
    again = sap.validate(graph, lens, max_sources=15, freezes=parts)
    assert again.random is not None
    assert again.random.table.equals(table)
    gap = report.gap()
    assert gap.loc["free", "closed"] == 0
    assert gap.loc["frozen", "closed"] == pytest.approx(1)
    assert gap.loc["patterns", "distance"] > 0.01
    summary = report.summary()
    assert summary.loc["random", "mean_effect"] == pytest.approx(table["measured"].abs().mean())


def test_a_report_is_written(lens_of, tmp_path) -> None:
    lens = lens_of("gpt2", "hooked_transformer")
    graph = lens.run(TOKENS).graph(sap.LogitDiff(3, 7), nodes=0.4, edges=0.9)
    report = sap.validate(graph, lens, max_sources=5)
    found = json.loads(report.save(tmp_path / "report.json").read_text())
    assert len(found["edges"]["frozen"]) == len(report.frozen.table)
    assert found["summary"][0]["condition"] == "frozen"
    assert found["about"]["sources"] == 5
    assert report.save(tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(sap.InputError, match=r"ends in \.json, \.png"):
        report.save(tmp_path / "report.txt")
    assert not (tmp_path / "report.txt").exists()


def test_graphs_that_do_not_fit(lens_of) -> None:
    lens = lens_of("gpt2", "hooked_transformer")
    graph = lens.run(TOKENS).graph(sap.Logit(3), nodes=0.5)
    with pytest.raises(sap.InputError, match="at least 1"):
        sap.validate(graph, lens, max_sources=0)
    other = graph.copy()
    del other.graph["token_ids"]
    with pytest.raises(sap.InputError, match="which prompt"):
        sap.validate(other, lens)
    other = graph.copy()
    other.graph["token_ids"] = [1, 2, 3]
    with pytest.raises(sap.InputError, match=r"writes nothing|out of range"):
        sap.validate(other, lens)
    other = graph.copy()
    other.remove_edges_from(list(graph.edges))
    with pytest.raises(sap.InputError, match="no edges"):
        sap.validate(other, lens)
    direction = lens.run(TOKENS).graph(sap.Direction(torch.ones(30)), nodes=0.3)
    with pytest.raises(sap.InputError, match="vector"):
        sap.validate(direction, lens)
