"""Every edge of a graph is exact with all else held: every model, both hosts, all sources."""

from __future__ import annotations

import pytest
from frozen_edges import HOSTS, MODELS, frozen
from helpers import STORIES

# TransformerLens 3 announces that version 4 will drop HookedTransformer.
pytestmark = pytest.mark.filterwarnings("ignore:HookedTransformer is deprecated")

# The others take long; that edges are causal is tested on every architecture elsewhere.
FEW = ("demo", "stories260K", "gpt2", "gemma2")


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize(
    "model", [pytest.param(m, marks=[pytest.mark.slow] * (m not in FEW)) for m in MODELS]
)
def test_predicted_is_measured(model: str, host: str) -> None:
    """To 1e-5 of the sum of |edges| into the target that the graph keeps."""
    if model == "stories260K" and not STORIES.is_dir():
        pytest.skip("stories260K is not at hand")
    graph, found = frozen(model, host)
    assert set(zip(found.table["source"], found.table["target"], strict=True)) == set(graph.edges)
    assert len(found.table) >= 100
    assert {"attn", "attn_err", "mlp", "embed"} <= set(found.table["kind"])
    assert found.max_error <= 1e-5
    assert found.table["measured"].abs().max() > 1e-2
