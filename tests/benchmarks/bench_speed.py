"""``pytest tests/benchmarks/bench_speed.py``: the same calls under pytest-benchmark.

A plain ``pytest`` does not collect this file. ``python -m tests.benchmarks`` gives the ratios.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import sae_attn_plugin as sap
from sae_attn_plugin.attribution.dfa import attribution_by_source
from sae_attn_plugin.attribution.writers import write_table

from . import rivals, shape

_TARGET = sap.Logit(5)


@pytest.fixture(scope="module", params=[32, 64])
def run(request: Any) -> Any:
    torch.set_num_threads(2)
    found = shape.wide_lens().run(shape.tokens_of(request.param))
    found.writers  # noqa: B018 - made once, not in the measurement
    return found


def test_forward(benchmark: Any, run: Any) -> None:
    with torch.no_grad():
        benchmark(shape.gpt2_shape("sdpa"), run.tokens)


def test_capture(benchmark: Any, run: Any) -> None:
    benchmark(run.lens.run, run.tokens)


def test_encode(benchmark: Any, run: Any) -> None:
    layers = run.frozen.layers
    found = benchmark(lambda: [layer.dictionary.encode(layer.z) for layer in layers])
    assert all(len(e.feature) == shape.ACTIVE * run.tokens.shape[1] for e in found)


def test_writers(benchmark: Any, run: Any) -> None:
    benchmark(write_table, run.frozen)


def test_dfa(benchmark: Any, run: Any) -> None:
    benchmark(run.dfa, 11, 7, -1)


@pytest.mark.parametrize("way", [attribution_by_source, rivals.every_destination_dfa])
@pytest.mark.parametrize("n_features", [1, 20])
def test_dfa_everywhere(benchmark: Any, run: Any, way: Any, n_features: int) -> None:
    benchmark(way, run.frozen.layers[11], torch.arange(n_features))


@pytest.mark.parametrize("budget", [2000, None])
def test_attribute(benchmark: Any, run: Any, budget: int | None) -> None:
    att = benchmark(run.attribute, _TARGET, node_budget=budget)
    assert att.worst_residual < 1e-5


def test_graph(benchmark: Any, run: Any) -> None:
    benchmark(run.graph, _TARGET)


def test_best_autograd(benchmark: Any, run: Any) -> None:
    args = (rivals.grouped_autograd, run.frozen, run.writers)
    benchmark.pedantic(rivals.all_edges, args, rounds=3)
