"""The memory budget of an attribution is kept, counted in bytes of tensors and arrays."""

from __future__ import annotations

import time
import tracemalloc
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import random_saes, tiny_gpt2, tiny_llama
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

import sae_attn_plugin as sap
from sae_attn_plugin.attribution.rdfa import sweep
from sae_attn_plugin.attribution.writers import LeanVectors, WriterVectors, write_table

F64 = torch.float64


class _HostMemory(TorchDispatchMode):
    """Python's and numpy's peak between one tensor operation and the next."""

    def __init__(self) -> None:
        super().__init__()
        self.peaks = np.zeros((100_000, 2), dtype=np.int64)  # before any counting
        self.n = 0

    def note(self) -> None:
        self.peaks[self.n] = time.time_ns(), tracemalloc.get_traced_memory()[1]
        self.n += 1
        tracemalloc.reset_peak()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.note()
        return func(*args, **(kwargs or {}))


def peak_bytes(call: Callable[[], Any]) -> int:
    """The most that a call holds at once, beyond what was there before: tensors as PyTorch's
    allocator reports them, arrays and objects as ``tracemalloc`` does."""
    host = _HostMemory()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        tracemalloc.start()
        with host:
            kept = call()
            host.note()
        tracemalloc.stop()
    assert kept is not None
    results: Any = profiled.profiler.kineto_results  # pyright: ignore[reportOptionalMemberAccess]
    events = [e for e in results.events() if e.name() == "[memory]"]
    assert len(events) > 100
    events.sort(key=lambda event: event.start_ns())
    most = held = highest = done = 0
    for end, in_arrays in host.peaks[: host.n].tolist():
        highest = held
        while done < len(events) and events[done].start_ns() <= end:
            held += events[done].nbytes()
            highest = max(highest, held)
            done += 1
        most = max(most, highest + in_arrays)
    return most


def run_of(make: Any = tiny_llama, dtype: torch.dtype = torch.float32, length: int = 40) -> Any:
    model = make(dtype)
    tokens = torch.randint(0, 61, (1, length), generator=torch.Generator().manual_seed(0))
    run = sap.FeatureLens(model, random_saes(model)).run(tokens)
    assert run.frozen is not None  # made once, not by what is measured
    return run


def test_the_count_counts() -> None:
    def call() -> Any:
        for _ in range(200):
            torch.zeros(10).add_(1)
        tensor = torch.zeros(1000, 1000)
        array = np.zeros(500_000)
        tensor.sum()
        return tensor, array

    assert 8.0e6 < peak_bytes(call) < 8.3e6


@pytest.mark.parametrize(("mebibytes", "complete"), [(16, True), (6, True), (3, False)])
def test_the_budget_is_kept(mebibytes: int, complete: bool) -> None:
    """Whatever the budget, it is not exceeded, every ledger closes, and influences are the same;
    what is kept are the strongest edges of each target."""
    run, budget = run_of(), mebibytes * 2**20
    whole = run.attribute(sap.Logit(5), node_budget=None)
    assert whole.flow.kept is None
    run.__dict__.pop("writers")  # so that the table is counted too
    found = []

    def call() -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore" if not complete else "error")
            found.append(run.attribute(sap.Logit(5), node_budget=None, memory_budget=budget))
        return found

    peak = peak_bytes(call)
    assert peak <= budget
    if not complete:
        assert 8 * whole.flow.n_edges > budget / 2  # so there was reason to leave edges out
    (att,) = found
    att.check_closure(1e-5)
    np.testing.assert_array_equal(np.sort(att.flow.target), np.sort(whole.flow.target))
    a, b = (x.nodes["influence"] for x in (att, whole))
    np.testing.assert_allclose(a, b[a.index], rtol=1e-3, atol=1e-7)
    if complete:
        assert att.flow.kept is None
        assert att.flow.n_edges == whole.flow.n_edges
        return
    keep = att.flow.kept
    assert att.provenance["edges_per_target"] == keep
    assert 1 <= keep < 200
    named = run.attribute(sap.Logit(5), node_budget=None, edges_per_target=keep)
    left, right = (x.edges.set_index(["source", "target"])["weight"] for x in (att, named))
    assert left.groupby("target", observed=True).size().max() == keep
    assert len(left.index.symmetric_difference(right.index)) <= 1e-3 * len(right)  # near ties


def test_edges_left_out_are_said() -> None:
    run = run_of()
    with pytest.warns(UserWarning, match="strongest of each target are kept"):
        run.attribute(sap.Logit(5), node_budget=None, memory_budget=3 * 2**20)
    with pytest.raises(sap.InputError, match=r"takes at least \d+ bytes.*node_budget"):
        run.attribute(sap.Logit(5), node_budget=None, memory_budget=1000)


@pytest.mark.parametrize("make", [tiny_gpt2, tiny_llama])
def test_lean_vectors_are_the_same_writers(make: Any) -> None:
    run = run_of(make, F64, 20)
    dense, lean = write_table(run.frozen), write_table(run.frozen, at_most=0)
    assert isinstance(dense.vectors, WriterVectors)
    assert isinstance(lean.vectors, LeanVectors)
    assert lean.vectors.shape == dense.vectors.shape
    assert len(lean.vectors) == len(dense)
    some = torch.tensor([7, 3, 3, 150])
    for key in (slice(0, len(dense)), slice(5, 9), 3, torch.tensor(4), some, some[:0]):
        torch.testing.assert_close(lean.vectors[key], dense.vectors[key], rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(lean.vectors.whole()[:], dense.vectors[:], rtol=1e-12, atol=1e-14)
    rows = np.array([2, 40, 41])
    torch.testing.assert_close(lean.full(rows), dense.full(rows), rtol=1e-12, atol=1e-14)
    reader = run._resolve(sap.Logit(5))[1]
    flows = [sweep(run.frozen, table, [reader], [1.0]) for table in (dense, lean)]
    assert flows[0].n_edges == flows[1].n_edges > 1000
    orders = [np.lexsort((flow.source, flow.target[flow.row])) for flow in flows]  # other batches
    for values in ("source", "weight"):
        a, b = (getattr(flow, values)[order] for flow, order in zip(flows, orders, strict=True))
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-13)


def test_lean_attributions_are_saved_whole(tmp_path: Any) -> None:
    run = run_of(tiny_gpt2, F64, 20)
    run._lean["writers"] = write_table(run.frozen, at_most=0)
    att = run.attribute(sap.Logit(5), edges_per_target=5)
    assert isinstance(att.writers.vectors, LeanVectors)
    sap.save(att, tmp_path / "att.safetensors")
    again = sap.load(tmp_path / "att.safetensors")
    assert isinstance(again, sap.Attribution)
    torch.testing.assert_close(again.writers.vectors[:], run.writers.vectors[:], rtol=1e-12, atol=0)
    np.testing.assert_array_equal(again.flow.weight, att.flow.weight)


def _mapped_from(tensor: torch.Tensor) -> str:
    """The file whose mapping a tensor lies in, or nothing (Linux)."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        addresses, *_, name = line.split(maxsplit=5)
        low, high = (int(part, 16) for part in addresses.split("-"))
        if low <= tensor.data_ptr() < high:
            return name if name.startswith("/") else ""
    return ""


def test_dictionaries_stay_in_their_files(tmp_path: Path) -> None:
    """SAEs of a folder are memory-mapped: only what is used is read, and a copy is made only where
    the data type differs."""
    model = tiny_gpt2()
    for layer, sae in enumerate(random_saes(model)):
        sae.save_model(tmp_path / f"layer_{layer}")
    lens = sap.FeatureLens(model, tmp_path)
    assert len(lens.run([[3, 5, 7]]).features())
    for layer, dictionary in lens.dictionaries.items():
        for tensor in (dictionary.W_enc, dictionary.W_dec):
            assert _mapped_from(tensor) == str(tmp_path / f"layer_{layer}/sae_weights.safetensors")
    assert _mapped_from(lens.dictionaries[0].W_dec.double()) == ""
