"""A graph's edges against removals on the model."""

from __future__ import annotations

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
    report = sap.validate(graph, lens, max_sources=12)
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
    assert sap.validate(graph, lens).frozen.max_error <= 1e-10
    data["weight"] *= -1
    table = sap.validate(graph, lens).frozen.table
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
