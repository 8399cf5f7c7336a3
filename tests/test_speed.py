"""What keeps the engine fast and small, by counting instead of timing; and that it stays exact."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from helpers import random_saes, tiny_gpt2, tiny_llama
from torch.utils._python_dispatch import TorchDispatchMode

import sae_attn_plugin as sap
from sae_attn_plugin.attribution.dfa import attribution_by_source
from sae_attn_plugin.attribution.rdfa import sweep
from sae_attn_plugin.attribution.writers import LeanVectors, write_table

F64 = torch.float64
TOKENS = [3, 57, 7, 19, 7, 13, 2]


def run_of(make: Any = tiny_gpt2, dtype: torch.dtype = F64, tokens: Any = TOKENS) -> Any:
    model = make(dtype)
    return sap.FeatureLens(model, random_saes(model)).run([tokens])


@pytest.mark.parametrize("make", [tiny_gpt2, tiny_llama])
def test_shared_rows_are_the_same_writers(make: Any) -> None:
    run = run_of(make, tokens=[3, 5] * 8)
    dense, shared = write_table(run.frozen), write_table(run.frozen, dense_bytes=0)
    assert dense.vectors.row is None
    assert not isinstance(shared.vectors, LeanVectors)
    assert len(shared.vectors.rows) < len(dense)
    assert shared.vectors.shape == dense.vectors.shape
    every = slice(0, len(dense))
    torch.testing.assert_close(shared.vectors[every], dense.vectors[every], rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(shared.vectors[3], dense.vectors[3], rtol=1e-12, atol=1e-14)
    if dense.means is not None:
        torch.testing.assert_close(shared.means, dense.means, rtol=1e-12, atol=1e-14)
    reader = run._resolve(sap.Logit(5))[1]
    flows = [sweep(run.frozen, table, [reader], [1.0]) for table in (dense, shared)]
    assert flows[0].n_edges == flows[1].n_edges > 1000
    np.testing.assert_array_equal(flows[0].source, flows[1].source)
    np.testing.assert_allclose(flows[0].weight, flows[1].weight, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("group", [1, 15, 512])
def test_prompts_share_encoder_products(monkeypatch: Any, group: int) -> None:
    """As many products as groups, and every prompt has the features it has alone."""
    from sae_attn_plugin import dictionaries
    from sae_attn_plugin.attribution import frozen

    monkeypatch.setattr(frozen, "_ENCODE_POSITIONS", group)
    model = tiny_gpt2(F64)
    lens = sap.FeatureLens(model, random_saes(model, "topk"))
    prompts = torch.randint(0, 61, (5, 7), generator=torch.Generator().manual_seed(0))
    alone = [lens.run(row[None]) for row in prompts]
    expected = [one.features() for one in alone]
    calls = []
    encode = dictionaries.Dictionary._encode
    monkeypatch.setattr(
        dictionaries.Dictionary, "_encode", lambda self, x: calls.append(len(x)) or encode(self, x)
    )
    together = lens.run(prompts)
    for i, table in enumerate(expected):
        found = together[i].features()
        assert found[["layer", "position", "feature"]].equals(
            table[["layer", "position", "feature"]]
        )
        np.testing.assert_allclose(found["activation"], table["activation"], rtol=1e-12)
    per_group = max(1, group // 7)
    assert len(calls) == 3 * -(-5 // per_group)  # three layers, prompts rounded up to groups
    att = together[3].attribute(sap.Logit(5))
    np.testing.assert_allclose(
        att.flow.weight, alone[3].attribute(sap.Logit(5)).flow.weight, rtol=1e-9, atol=1e-13
    )


def test_long_prompts_are_encoded_in_pieces(monkeypatch: Any) -> None:
    from sae_attn_plugin import dictionaries

    run = run_of()
    layer = run.frozen.layers[1]
    whole = layer.dictionary.encode(layer.z)
    monkeypatch.setattr(dictionaries, "_ENCODE_BYTES", 2 * layer.dictionary.d_sae * 8)
    pieces = layer.dictionary.encode(layer.z)
    for name, value in vars(whole).items():
        torch.testing.assert_close(getattr(pieces, name), value, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("make", [tiny_gpt2, tiny_llama])
def test_dfa_at_every_destination(make: Any) -> None:
    run = run_of(make)
    split = attribution_by_source(run.frozen.layers[2], torch.tensor([4, 11]))
    for row, feature in enumerate((4, 11)):
        for position in range(len(TOKENS)):
            one = run.dfa(2, feature, position).by_source
            torch.testing.assert_close(split[row, position], one, rtol=1e-10, atol=1e-13)


class _Sizes(TorchDispatchMode):
    """The largest tensor that any operation makes, in numbers."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.largest = max(self.largest, out.untyped_storage().nbytes() // out.element_size())
        return out


def test_nothing_of_features_by_features_is_made() -> None:
    """With few edges kept per target, the largest tensor does not grow with all pairs."""
    run = run_of(tokens=TOKENS * 3)
    writers = run.writers
    with _Sizes() as sizes:
        run.attribute(sap.Logit(5), node_budget=None, edges_per_target=3, memory_budget=2**21)
    active = int((writers.activation > 0).sum())
    assert active > 500
    assert sizes.largest < active**2 / 20


class _Syncs:
    """Counts what would make the host wait for the device."""

    NAMES = ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "nonzero")

    def __init__(self, patch: Any) -> None:
        self.count = 0
        for name in self.NAMES:
            original = getattr(torch.Tensor, name)
            patch.setattr(torch.Tensor, name, self._counted(original))

    def _counted(self, original: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.count += 1
            return original(*args, **kwargs)

        return call


def _syncs(run: Any, budget: int | None, monkeypatch: Any) -> tuple[int, Any]:
    reader, frozen, writers = run._resolve(sap.Logit(5))[1], run.frozen, run.writers
    with monkeypatch.context() as patch:
        seen = _Syncs(patch)
        flow = sweep(frozen, writers, [reader], [1.0], node_budget=budget, memory_budget=2**21)
    return seen.count, flow


@pytest.mark.parametrize("budget", [None, 40])
def test_the_host_waits_once_per_layer(monkeypatch: Any, budget: int | None) -> None:
    """The choice of nodes brings the influences to the host; inside a layer nothing comes back,
    however many targets there are, and the edges come at the end."""
    counts = {}
    for length in (4, 12):
        tokens = [int(t) for t in np.arange(length) * 7 % 61]
        count, flow = _syncs(run_of(tokens=tokens), budget, monkeypatch)
        counts[length] = count - len(flow.pieces)  # which leave the device one by one, at the end
    assert counts[4] == counts[12] <= 2 * 3 + 4


def test_the_count_would_notice(monkeypatch: Any) -> None:
    with monkeypatch.context() as patch:
        seen = _Syncs(patch)
        torch.ones(2).sum().item()
        bool(torch.ones(()))
    assert seen.count == 2


def test_import_is_light() -> None:
    """Nothing of the hosts is imported before it is needed."""
    code = (
        "import sys, sae_attn_plugin; heavy = {'transformer_lens', 'nnsight', 'matplotlib', "
        "'transformers'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
