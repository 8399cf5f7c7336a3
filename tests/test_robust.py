"""NaN, interrupted writes, hooks, threads: what goes wrong is told, and nothing is left behind."""

from __future__ import annotations

import errno
import math
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from subprocess import PIPE
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import on_host, random_sae, random_saes, sae_at, tiny_gpt2, word_tokenizer
from test_files import small_graph

import sae_attn_plugin as sap
from sae_attn_plugin.backends.protocol import Site
from sae_attn_plugin.checkpoints import save_state
from sae_attn_plugin.graphs.picture import write_png
from sae_attn_plugin.io import write_atomically
from sae_attn_plugin.studies.result import Study
from sae_attn_plugin.training import _replace_folder

HOSTS = ("hooked_transformer", "transformer_bridge", "nnsight")


def lens_on(host: str, model: Any = None) -> sap.FeatureLens:
    model = tiny_gpt2() if model is None else model
    saes = random_saes(tiny_gpt2())
    return sap.FeatureLens(
        on_host(model, host), saes, tokenizer=word_tokenizer(), prepend_bos=False
    )


# -- NaN and infinity ------------------------------------------------------------------------------


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_bad_weights_of_a_model_are_named(host: str, value: float) -> None:
    lens = lens_on(host)
    model = lens.backend.model  # type: ignore[attr-defined]
    name = next(n for n, _ in model.named_parameters() if ".1." in n and "mlp" in n)
    with torch.no_grad():
        dict(model.named_parameters())[name].view(-1)[0] = value
    with pytest.raises(sap.BackendError, match=r"mlp_\w+ of layer 1 holds NaN or inf.*") as caught:
        lens.run("w5 w9 w17")
    assert name in str(caught.value)
    with pytest.raises(sap.BackendError, match=r"holds NaN or infinity"):
        sap.FeatureLens(model, random_saes(tiny_gpt2()), tokenizer=word_tokenizer())


def test_saes_whose_numbers_overflow_are_named() -> None:
    """Every parameter is finite, and what comes of it is not."""
    model = tiny_gpt2()
    gated: Any = random_sae(0, 30, architecture="gated")
    plain, late = random_sae(1, 30), sae_at(2, "hook_attn_out", 30)
    with torch.no_grad():
        gated.r_mag[0] = 1e30
        plain.W_enc[:, 3], plain.W_dec[3] = 1e25, 1e25
        late.b_enc[3], late.W_dec[3] = 1e25, 1e25
    with pytest.raises(sap.InputError, match=r"exp\(r_mag\)"):
        sap.FeatureLens(model, [gated])
    for sae, layer in ((plain, 1), (late, 2)):
        with pytest.raises(
            sap.InputError, match=f"layer {layer}, .*reconstruction holds NaN or inf"
        ):
            sap.FeatureLens(model, [sae]).run([[3, 1, 4, 1, 5]]).attribute(sap.Logit(5))


def test_values_that_overflow_are_told_from_bad_weights() -> None:
    lens = lens_on("hooked_transformer")
    with torch.no_grad():
        lens.backend.model.blocks[1].mlp.W_out.fill_(3e38)  # type: ignore[attr-defined]
    with pytest.raises(sap.BackendError, match=r"parameters are finite, so the values overflow"):
        lens.run("w5 w9 w17")


# -- files -----------------------------------------------------------------------------------------


def _study(path: Path) -> None:
    Study("quality", {"model": "m"}, {"main": pd.DataFrame({"a": [1.5, 2.5]})}).save(path)


def _png(path: Path) -> None:
    write_png(sap.draw(small_graph()), path)


WRITERS: dict[str, Any] = {
    "g.json": lambda path: sap.save(small_graph(), path),
    "g.graphml": lambda path: sap.save(small_graph(), path),
    "g.gexf": lambda path: sap.save(small_graph(), path),
    "g.safetensors": lambda path: sap.save(small_graph(), path),
    "g.html": lambda path: sap.save(small_graph(), path),
    "g.png": _png,
    "study.json": _study,
    "state.safetensors": lambda path: save_state(path, {"x": torch.ones(3)}, {"settings": 1}),
}


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("failure", ["full", "read_only", "interrupt", "rename"])
def test_a_write_that_fails_leaves_the_old_file(
    name: str, failure: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / name
    path.write_bytes(b"old")
    expected: Any = sap.FileError

    def no_space(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    if failure == "full":
        monkeypatch.setattr(os, "fsync", no_space)
    elif failure == "rename":
        monkeypatch.setattr(os, "replace", no_space)
    elif failure == "interrupt":
        monkeypatch.setattr(os, "fsync", stop)
        expected = KeyboardInterrupt
    else:
        real = os.access
        monkeypatch.setattr(os, "access", lambda at, mode: mode != os.W_OK and real(at, mode))
    with pytest.raises(expected):
        WRITERS[name](path)
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_a_disk_that_fills_up_half_way(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    import signal

    path = tmp_path / "big"
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.getsignal(signal.SIGXFSZ)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        with pytest.raises(sap.FileError, match="cannot write"):
            write_atomically(path, lambda file: [file.write(b"x" * 4_000) for _ in range(10)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert not list(tmp_path.iterdir())


def test_writers_at_once_leave_one_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "g.json"
    graphs = [small_graph(), small_graph(multi=True)]
    wholes = []
    for graph in graphs:
        sap.save(graph, path)
        wholes.append(path.read_bytes())
    with ThreadPoolExecutor(4) as pool:  # each writes through a temporary file of its own
        list(pool.map(lambda i: sap.save(graphs[i % 2], path), range(40)))
    assert path.read_bytes() in wholes
    assert [p.name for p in tmp_path.iterdir()] == ["g.json"]


_WRITER = """
import sys, pathlib
import sae_attn_plugin as sap
source, path = map(pathlib.Path, sys.argv[1:])
graph = sap.load(source)
print("ready", flush=True)
sys.stdin.readline()
for _ in range(60):
    sap.save(graph, path)
"""


def test_processes_at_once_leave_one_whole_file(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    path = folder / "g.json"
    wholes, writers = [], []
    for i in range(2):
        source = tmp_path / f"{i}.json"
        sap.save(small_graph(multi=bool(i)), source)
        wholes.append(source.read_bytes())
        command = [sys.executable, "-c", _WRITER, str(source), str(path)]
        writers.append(subprocess.Popen(command, stdin=PIPE, stdout=PIPE, stderr=PIPE, text=True))
    for writer in writers:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "ready\n"
    for writer in writers:
        assert writer.stdin is not None
        writer.stdin.write("go\n")
        writer.stdin.flush()
    seen = set()
    while any(writer.poll() is None for writer in writers):  # a reader meets whole files only
        if path.exists():
            seen.add(path.read_bytes())
    for writer in writers:
        _, said = writer.communicate(timeout=60)
        assert writer.returncode == 0, said
    assert path.read_bytes() in wholes
    assert seen <= set(wholes)
    assert [p.name for p in folder.iterdir()] == ["g.json"]


def test_a_trained_sae_is_replaced_or_kept(tmp_path: Path) -> None:
    target, draft = tmp_path / "sae", tmp_path / ".draft"
    for folder, text in ((target, "old"), (draft, "new")):
        folder.mkdir()
        (folder / "cfg.json").write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        real = Path.replace

        def fails(self: Path, to: Any) -> Path:
            if self == draft:
                raise KeyboardInterrupt
            return real(self, to)

        patch.setattr(Path, "replace", fails)
        with pytest.raises(KeyboardInterrupt):
            _replace_folder(draft, target)
    assert (target / "cfg.json").read_text() == "old"
    _replace_folder(draft, target)
    assert (target / "cfg.json").read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["sae"]


# -- hooks -----------------------------------------------------------------------------------------


def hooks_on(model: torch.nn.Module) -> int:
    return sum(
        len(getattr(module, name))
        for module in model.modules()
        for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    )


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_pass_leaves_no_hooks(host: str, error: type[BaseException]) -> None:
    lens = lens_on(host)
    model: Any = lens.backend.model  # type: ignore[attr-defined]
    run = lens.run("w5 w9 w17")
    before, logits = hooks_on(model), run.logits.clone()

    def stop(_value: torch.Tensor) -> torch.Tensor:
        raise error("stop")

    # A trace may wrap what is raised in it.
    with pytest.raises(BaseException, match="stop"):
        lens.backend.forward(run.tokens, {Site("z", 1): stop}, [Site("pattern", 0)])
    with pytest.raises(error):
        run.attribute(sap.Logit("w7"), progress=lambda *_: stop(logits))
    assert hooks_on(model) == before
    assert torch.equal(lens.run("w5 w9 w17").logits, logits)


# -- threads ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", HOSTS)
def test_threads_on_one_model_get_the_numbers_they_get_alone(host: str) -> None:
    model = on_host(tiny_gpt2(), host)
    saes, words = random_saes(tiny_gpt2()), word_tokenizer()
    lenses = [sap.FeatureLens(model, saes, tokenizer=words, prepend_bos=False) for _ in range(2)]
    prompts = [f"w{i} w9 w{i + 7} w{i}" for i in range(4, 12)]

    def weights(number: int) -> Any:
        run = lenses[number % 2].run(prompts[number])
        return run.attribute(sap.Logit("w7")).edges["weight"].to_numpy()

    alone = [weights(i) for i in range(len(prompts))]
    start = threading.Barrier(4)

    def together(number: int) -> Any:
        if number < 4:
            start.wait(30)
        return weights(number)

    with ThreadPoolExecutor(4) as pool:
        for expected, got in zip(alone, pool.map(together, range(len(prompts))), strict=True):
            np.testing.assert_array_equal(expected, got)
