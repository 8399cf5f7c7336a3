"""Circuits hidden in random transformers."""

from __future__ import annotations

import pytest
import torch
from helpers import on_host

import sae_attn_plugin as sap
from sae_attn_plugin.demo.planted import plant, recovery

SIZES = [
    {},
    {"depth": 1, "width": 1, "parents": 1},
    {"depth": 4, "width": 5, "parents": 3, "length": 6},
]


@pytest.mark.parametrize("host", ["hooked_transformer", "nnsight"])
@pytest.mark.parametrize("sizes", SIZES, ids=len)
def test_without_noise_the_graph_is_the_drawn_one(host: str, sizes: dict[str, int]) -> None:
    for seed in range(2):
        planted = plant(seed, **sizes)  # type: ignore[arg-type]
        lens = sap.FeatureLens(on_host(planted.model, host), planted.saes)
        run = lens.run([list(planted.tokens)])
        att = run.attribute(planted.target, node_budget=None)
        found = planted.compare(att)
        assert (found.precision, found.recall) == (1, 1)
        assert found.worst <= 1e-5
        assert att.worst_residual <= 1e-5


def test_in_float64() -> None:
    planted = plant(3, dtype=torch.float64)
    run = planted.lens().run([list(planted.tokens)])
    assert planted.compare(run.attribute(planted.target)).worst <= 1e-9


def test_drawn_edges_are_causal() -> None:
    """Every drawn edge, against its removal on the model, with all else held."""
    planted = plant(1)
    lens = planted.lens()
    graph = lens.run([list(planted.tokens)]).graph(planted.target, nodes=1, edges=1)
    table = sap.validate(graph, lens, baseline=False).frozen.table
    columns = (table["source"], table["target"], table["measured"])
    measured = {(s, t): m for s, t, m in zip(*columns, strict=True)}
    for edge, weight in planted.edges.items():
        assert measured[edge] == pytest.approx(-weight, rel=1e-4)


def test_the_same_circuit_at_every_noise() -> None:
    clean, noisy = plant(5), plant(5, noise=0.1)
    assert clean.edges == noisy.edges
    assert clean.tokens == noisy.tokens
    assert plant(6).edges != clean.edges
    again = plant(5, noise=0.1)
    for one, other in zip(noisy.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_recovery_breaks_where_noise_is_strong() -> None:
    table = recovery([0.1, 1.0], range(4), progress=False)
    for column in ("precision", "recall"):
        assert table[table["noise"] == 0.1][column].mean() >= 0.95
        assert table[table["noise"] == 1.0][column].mean() < 0.6


def test_sizes_that_make_no_circuit() -> None:
    with pytest.raises(sap.InputError, match="at least 1"):
        plant(0, depth=0)
    with pytest.raises(sap.InputError, match="parents of at most width"):
        plant(0, width=2, parents=3)
    with pytest.raises(sap.InputError, match="noise"):
        plant(0, noise=-1)
