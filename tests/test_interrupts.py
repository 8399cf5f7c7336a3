"""Ctrl-C and errors in the middle of work: nothing stays behind, and the next call is right."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import HOSTS, on_host, random_saes, tiny_gpt2, word_tokenizer
from test_robust import hooks_on, lens_on
from test_training import tokens_of
from test_training import train as train_saes

import sae_attn_plugin as sap

PROMPT = "w5 w9 w17 w5 w9"
ROWS = torch.randint(2, 61, (4, 12), generator=torch.Generator().manual_seed(0))


def inner(model: Any) -> torch.nn.Module:
    """A module that every host runs in the middle of its forward pass: the MLP of layer 1."""
    ends = (".1.mlp", ".1._original_component.mlp")  # the latter on a bridge
    return next(module for name, module in model.named_modules() if name.endswith(ends))


@contextlib.contextmanager
def failing(model: Any, error: type[BaseException], after: int) -> Iterator[list[int]]:
    """The model raises in the middle of the pass that follows ``after`` others."""
    calls = [0]

    def stop(*_: Any) -> None:
        calls[0] += 1
        if calls[0] > after:
            raise error("stop")

    handle = inner(model).register_forward_hook(stop)
    try:
        yield calls
    finally:
        handle.remove()


def intervene(lens: sap.FeatureLens) -> Any:
    run = lens.run(PROMPT)
    feature = next(iter(run.features(layer=1)["feature"]))
    edits = [sap.AblateFeature(layer=1, feature=int(feature))]
    return lens.intervene(run, edits, freeze="patterns").logits


def validate(lens: sap.FeatureLens) -> Any:
    graph = lens.run(PROMPT).graph(sap.Logit("w7"), nodes=0.5, edges=0.9)
    found = sap.validate(graph, lens, max_sources=6, progress=False)
    return torch.tensor(found.free.table["measured"].to_numpy())


def attribute(lens: sap.FeatureLens) -> Any:
    edges = lens.run(PROMPT).attribute(sap.Logit("w7"), progress=False).edges
    return torch.tensor(edges["weight"].to_numpy())


def evaluate(lens: sap.FeatureLens) -> Any:
    settings: Any = {"rows_at_once": 2, "resamples": 10, "sae_lens": False, "progress": False}
    found = sap.evaluate(lens, ROWS, layers=[1], **settings)
    return torch.tensor(found.table["value"].to_numpy(dtype=float))


WORK: dict[str, Callable[[sap.FeatureLens], Any]] = {
    "intervene": intervene,
    "validate": validate,
    "attribute": attribute,
    "evaluate": evaluate,
}


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_work_on_a_lens(host: str, error: type[BaseException]) -> None:
    lens = lens_on(host)
    model: Any = lens.backend.model  # type: ignore[attr-defined]
    before = hooks_on(model)
    for name, work in WORK.items():
        with failing(model, error, 10**6) as calls:
            expected = work(lens)
        # The first pass, one in the middle, the last.
        ends = {0, calls[0] - 1} if error is KeyboardInterrupt else set()
        for after in sorted({calls[0] // 2} | ends):
            with failing(model, error, after), pytest.raises(error, match="stop"):
                work(lens)
            assert hooks_on(model) == before, name
        torch.testing.assert_close(work(lens), expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_sae_lens_own_measurement(error: type[BaseException]) -> None:
    """``sap.evaluate`` runs sae_lens' too, which hooks the model by itself."""
    lens = lens_on("hooked_transformer")
    model: Any = lens.backend.model  # type: ignore[attr-defined]
    before = hooks_on(model)

    def both() -> Any:
        found = sap.evaluate(lens, ROWS, layers=[1], resamples=10, sae_lens=True, progress=False)
        return found.table[["value", "sae_lens"]].to_numpy(dtype=float)

    with failing(model, error, 10**6) as calls:
        expected = both()
    assert np.isfinite(expected[:, 1]).any()
    for after in range(calls[0]):
        with failing(model, error, after), pytest.raises(error, match="stop"):
            both()
        assert hooks_on(model) == before
    np.testing.assert_array_equal(both(), expected)


@pytest.mark.parametrize("host", [*HOSTS, "bare", "hooked"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_splice(host: str, error: type[BaseException]) -> None:
    model = sap.hooked(tiny_gpt2()) if host == "hooked" else on_host(tiny_gpt2(), host)
    saes = random_saes(tiny_gpt2())
    module = getattr(model, "_module", model)

    def logits() -> torch.Tensor:
        with torch.no_grad():
            out = module(ROWS)
        return getattr(out, "logits", out)

    def spliced(edit: Any = None) -> torch.Tensor:
        with sap.splice(model, saes, edit=edit):
            return logits()

    def stop(*_: Any) -> None:
        raise error("stop")

    plain, expected = logits(), spliced()
    before = hooks_on(module)  # a bridge puts its own on itself in its first pass
    assert not torch.allclose(plain, expected, atol=1e-3)
    with pytest.raises(error, match="stop"):  # in an SAE
        spliced(stop)
    with failing(module, error, 0), pytest.raises(error, match="stop"):  # in the model
        spliced()
    with pytest.raises(error, match="stop"), sap.splice(model, saes):  # between passes
        stop()
    assert hooks_on(module) == before
    assert torch.equal(logits(), plain)
    assert torch.equal(spliced(), expected)


@pytest.mark.parametrize("host", HOSTS)
def test_splices_of_threads_take_turns(host: str) -> None:
    """One thread holds its splice open while another splices other SAEs, and runs a lens."""
    model = on_host(tiny_gpt2(), host)
    module = getattr(model, "_module", model)
    groups = [random_saes(tiny_gpt2(), seed=seed) for seed in range(2)]
    lens = sap.FeatureLens(model, groups[0], tokenizer=word_tokenizer(), prepend_bos=False)

    def logits(number: int) -> torch.Tensor:
        with torch.no_grad(), sap.splice(model, groups[number]):
            out = module(ROWS)
        return getattr(out, "logits", out)

    alone, plain = logits(1), lens.run(PROMPT).logits
    got: dict[str, torch.Tensor] = {}

    def splices() -> None:
        got["spliced"] = logits(1)

    def runs() -> None:
        got["run"] = lens.run(PROMPT).logits

    threads = [threading.Thread(target=target, daemon=True) for target in (splices, runs)]
    with sap.splice(model, groups[0]):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(0.3)
        assert not got  # they wait
        nested = lens.run(PROMPT).logits  # the thread itself does not
    for thread in threads:
        thread.join(60)
    assert torch.equal(got["spliced"], alone)
    assert torch.equal(got["run"], plain)
    assert not torch.allclose(nested, plain, atol=1e-3)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_training_goes_on_where_it_was(error: type[BaseException], tmp_path: Path) -> None:
    """Stopped in the middle of a pass, twice: only the checkpoint is there, and the SAEs that come
    out in the end are those of training in one go."""
    short: dict[str, Any] = {"n_tokens": 64 * 40, "layers": [1]}
    whole = train_saes(tmp_path / "whole", **short)[1]
    model = tiny_gpt2()
    source = sap.training.z_source(model)
    before = hooks_on(model)
    out, checkpoint = tmp_path / "out", tmp_path / "checkpoint.safetensors"
    again: dict[str, Any] = {
        **short,
        "source": source,
        "tokens": tokens_of,
        "checkpoint": checkpoint,
        "checkpoint_every": 1,
    }
    for after in (3, 2):
        with failing(model, error, after), pytest.raises(error, match="stop"):
            train_saes(out, **again)
        assert hooks_on(model) == before
        left = sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file())
        assert [p for p in left if not p.startswith("whole")] == ["checkpoint.safetensors"]
    resumed = train_saes(out, **again)[1]
    for file in whole.iterdir():
        assert (resumed / file.name).read_bytes() == file.read_bytes(), file.name
