"""A real language model with grouped-query attention: SAEs trained on it, graphs on every host."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers import STORIES

import sae_attn_plugin as sap
from sae_attn_plugin.backends.loading import HOSTS
from sae_attn_plugin.corpus.rows import sample_rows
from sae_attn_plugin.training import attention_z_config, recipe, train

pytestmark = pytest.mark.skipif(not STORIES.is_dir(), reason="stories260K is not at hand")

TEXT = (
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. "
    "One day, she saw a big, red ball. Lily wanted to play with the ball, but it was too high. "
)


@pytest.fixture(scope="module")
def saes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short training: enough features for graphs, not for a study."""
    model = sap.hooked(sap.load_model(STORIES, "nnsight"))
    text = sample_rows(model.model, 64, 64, progress=False)  # pyright: ignore[reportArgumentType]
    options: Any = {
        "sae": attention_z_config(64, 256, 12),
        "context_size": 64,
        "training_tokens": 60_000,
        "train_batch_size_tokens": 1024,
        "n_batches_in_buffer": 64,
    }
    out = tmp_path_factory.mktemp("stories")
    train(
        [recipe(model, layer, **options) for layer in range(5)],
        model,
        text,
        out=out,
        progress=False,
    )
    return out


@pytest.mark.parametrize("length", [10, 40, pytest.param(100, marks=pytest.mark.slow)])
def test_the_same_closed_graph_on_every_host(saes: Path, length: int) -> None:
    edges = {}
    for host in HOSTS:
        lens = sap.FeatureLens(sap.load_model(STORIES, host), saes)
        tokens = lens.to_tokens(TEXT * 2)[:, :length]
        att = lens.run(tokens).attribute(node_budget=100)
        assert len(att.ledger) == 100 + len(att.roots)
        assert att.worst_residual <= 1e-5
        edges[host] = att.edges
    first = edges["transformer_lens"]
    size = first["weight"].abs().groupby(first["target"].astype(str)).sum()
    for host in HOSTS[1:]:
        both = first.astype({"source": str, "target": str}).merge(
            edges[host].astype({"source": str, "target": str}),
            on=["source", "target"],
            how="outer",
        )
        assert not both.isna().any(axis=None)
        difference = (both["weight_x"] - both["weight_y"]).abs()
        assert (difference / both["target"].map(size)).max() <= 1e-5


def test_features_fire_and_the_frozen_graph_is_true(saes: Path) -> None:
    lens = sap.FeatureLens(sap.load_model(STORIES, "nnsight"), saes)
    run = lens.run(TEXT)
    assert set(run.features()["layer"]) == set(range(5))
    report = sap.validate(run.graph(nodes=0.5, max_nodes=40), lens, progress=False)
    assert report.frozen.max_error <= 1e-5
