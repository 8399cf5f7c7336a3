"""A real language model with grouped-query attention: SAEs trained on it, graphs on every host."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import STORIES

import sae_attn_plugin as sap
from sae_attn_plugin.backends.loading import HOSTS
from sae_attn_plugin.training import FlatZ, attention_z_config, train_saes

pytestmark = pytest.mark.skipif(not STORIES.is_dir(), reason="stories260K is not at hand")

TEXT = (
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. "
    "One day, she saw a big, red ball. Lily wanted to play with the ball, but it was too high. "
)


@pytest.fixture(scope="module")
def saes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short training: enough features for graphs, not for a study."""
    model = FlatZ(sap.load_model(STORIES, "nnsight"))
    torch.manual_seed(0)
    start = torch.ones(64, 1, dtype=torch.long)
    text = model.backend.model.generate(  # type: ignore[attr-defined]
        start,
        attention_mask=torch.ones_like(start),
        do_sample=True,
        min_new_tokens=63,
        max_new_tokens=63,
        pad_token_id=2,
    )
    out = tmp_path_factory.mktemp("stories")
    train_saes(
        model.z,
        lambda _round: text,
        attention_z_config(64, 256, 12),
        layers=range(5),
        out=out,
        model_name="stories260K",
        context_size=64,
        n_tokens=60_000,
        batch_size=1024,
        progress=False,
    )
    return out


@pytest.mark.parametrize("length", [10, 40, 100])
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
