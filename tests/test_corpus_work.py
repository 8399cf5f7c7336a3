"""A survey that is stopped, shared among workers, given something wrong, or long."""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import HOSTS, hooks_on, on_host, random_saes, sae_at, tiny_gpt2, word_tokenizer
from test_corpus import CONTEXT, ROWS, corpus, lens_of, same_tables, small

import sae_attn_plugin as sap
from sae_attn_plugin.backends import as_backend
from sae_attn_plugin.backends.protocol import Site, read_sites
from sae_attn_plugin.corpus.shards import LensRecipe

pytestmark = pytest.mark.filterwarnings("ignore:.*'eager'.*")


class Stop(Exception):
    pass


def stopping(batches: int) -> Any:
    """Data that break off after some batches of 4 rows."""
    left = [batches]

    def stream() -> Any:
        for some in corpus().split(4):
            left[0] -= 1
            if left[0] < 0:
                raise Stop
            yield some

    return stream


@pytest.mark.parametrize("batches", [1, 2, 3])
def test_a_stopped_survey_goes_on(tmp_path: Path, batches: int, monkeypatch: Any) -> None:
    lens = lens_of("gpt2")
    whole = small(lens, corpus(), tmp_path / "whole")
    with pytest.raises(Stop):  # the first row is looked at once before
        small(lens, stopping(batches + 1), tmp_path / "s", checkpoint_every=2)
    assert not (tmp_path / "s" / "survey.json").exists()
    with pytest.raises(sap.FileError, match="not finished"):
        sap.load_survey(tmp_path / "s")
    passed = []
    backend: Any = lens.backend
    forward = backend.read
    monkeypatch.setattr(
        lens.backend,
        "read",
        lambda tokens, *a, **k: passed.append(len(tokens)) or forward(tokens, *a, **k),
    )
    again = small(lens, corpus(), tmp_path / "s", checkpoint_every=2)
    assert sum(passed) == ROWS - 8 * (batches >= 2)  # what was checkpointed is not run again
    same_tables(whole, again, rtol=0)
    assert again.facts["forwards"] == whole.facts["forwards"]
    assert sorted(p.name for p in (tmp_path / "s").iterdir()) == sorted(
        p.name for p in (tmp_path / "whole").iterdir()
    )


@pytest.mark.slow
def test_a_killed_process_loses_only_what_came_after_its_last_checkpoint(tmp_path: Path) -> None:
    script = f"""
import os, signal, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_corpus import corpus, lens_of, small
lens = lens_of("gpt2")
forward, calls = lens.backend.read, []
def dying(tokens, *args, **options):
    calls.append(1)
    if len(calls) == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return forward(tokens, *args, **options)
lens.backend.read = dying
small(lens, corpus(), {str(tmp_path / "s")!r}, checkpoint_every=1)
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    found = small(lens_of("gpt2"), corpus(), tmp_path / "s")
    same_tables(small(lens_of("gpt2"), corpus(), tmp_path / "whole"), found, rtol=0)


def test_a_finished_survey_is_not_made_again(tmp_path: Path, monkeypatch: Any) -> None:
    lens = lens_of("gpt2")
    one = small(lens, corpus(), tmp_path / "s")
    monkeypatch.setattr(lens.backend, "read", None)
    again = small(lens, corpus(), tmp_path / "s")
    same_tables(one, again, rtol=0)
    assert sap.load_survey(tmp_path / "s").facts == one.facts
    for other in (corpus()[:-1], corpus().flip(0), torch.cat([corpus(), corpus()])):
        with pytest.raises(sap.FileError, match="a survey of other data"):
            small(lens, other, tmp_path / "s")
    monkeypatch.undo()
    shorter = small(lens, corpus()[:4], tmp_path / "s", resume=False)
    assert shorter.facts["rows"] == 4


# -- workers ---------------------------------------------------------------------------------------


def make_lens() -> sap.FeatureLens:
    return lens_of("gpt2")


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed")
@pytest.mark.filterwarnings("ignore")
def test_two_workers_of_which_one_is_killed_give_the_same_tables(
    tmp_path: Path, monkeypatch: Any
) -> None:
    died = tmp_path / "died"

    def dying() -> sap.FeatureLens:
        lens = lens_of("gpt2")
        backend: Any = lens.backend
        forward, calls = backend.read, []

        def wrapped(tokens: Any, *args: Any, **options: Any) -> Any:
            calls.append(1)
            if len(calls) == 2 and not died.exists() and os.getpid() != driver:
                died.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return forward(tokens, *args, **options)

        if os.getpid() != driver:
            backend.read = wrapped
        return lens

    driver = os.getpid()
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), *sys.path]))
    one = small(lens_of("gpt2"), corpus(), tmp_path / "one", rows_at_once=2)
    two = small(dying, corpus(), tmp_path / "two", rows_at_once=2, workers=2, shards=3)
    assert died.exists()
    same_tables(one, two, rtol=1e-6)
    for name in ("rows", "tokens", "forwards", "positions_counted", "positions_by_bin", "data"):
        assert one.facts[name] == two.facts[name]
    assert not (tmp_path / "two" / "unfinished").exists()


def test_finished_shards_are_not_run_again(tmp_path: Path, monkeypatch: Any) -> None:
    """Without Ray: tasks that run where they are submitted."""
    from sae_attn_plugin.corpus import shards

    ran: list[int] = []

    class Here(shards._Tasks):
        def submit(self, shard: Any, tokens: Any) -> None:
            if len(ran) == 2:
                raise Stop
            plan = self._plan
            sketch, gather = plan.sketch(), plan.gatherer()
            for i in range(0, len(tokens), plan.rows_at_once):
                gather(sketch, tokens[i : i + plan.rows_at_once].long(), shard.first_row + i)
            ran.append(shard.first_row)
            shard.write({"parts": dict(sketch.parts()), "facts": sketch.facts()}, tokens)

    monkeypatch.setattr(shards, "_Tasks", Here)
    options: dict[str, Any] = {"workers": 2, "shards": 4, "rows_at_once": 2}
    with pytest.raises(Stop):
        small(make_lens, corpus(), tmp_path / "s", **options)
    with pytest.raises(sap.FileError, match="begun with workers"):
        small(make_lens, corpus(), tmp_path / "s", rows_at_once=2)
    with pytest.raises(sap.FileError, match=re.escape("rows 4..7 are not those given now")):
        small(make_lens, torch.cat([corpus()[:4], corpus()[:10]]), tmp_path / "s", **options)
    ran.clear()
    ran.append(-1)  # one more may run before the next stop
    with pytest.raises(Stop):
        small(make_lens, corpus(), tmp_path / "s", **options | {"shards": 7})
    assert ran == [-1, 8]
    ran.clear()
    found = small(make_lens, corpus(), tmp_path / "s", **options)
    assert ran == [12]
    same_tables(small(lens_of("gpt2"), corpus(), tmp_path / "w", rows_at_once=2), found)


def test_a_recipe_makes_the_demo_lens() -> None:
    lens = LensRecipe("sae-attn-demo", str(sap.demo.SAES_PATH))()
    assert lens.provenance["fingerprints"] == sap.demo.load("nnsight").provenance["fingerprints"]


# -- what is refused -------------------------------------------------------------------------------


@functools.cache
def attn_out_lens() -> sap.FeatureLens:
    model = on_host(tiny_gpt2(), "transformers_model", word_tokenizer())
    return sap.FeatureLens(model, [sae_at(1, "hook_attn_out", 30)])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": 0}, "keep=0: expected an integer of at least 1"),
        ({"sample": 0}, "sample=0"),
        ({"sources": 0}, "sources=0"),
        ({"positions": -1}, "positions=-1"),
        ({"rows_at_once": 0}, "rows_at_once=0"),
        ({"checkpoint_every": 0}, "checkpoint_every=0"),
        ({"limit": 0}, "limit=0"),
        ({"context": 5}, "context=5, but the rows have 12 tokens"),
        ({"context": 999}, "expected 2..40"),
        ({"layers": [7]}, "no SAE in layer 7"),
        ({"layers": []}, "no layers given"),
        ({"data": []}, "the data is empty"),
        ({"data": lambda: []}, "the data is empty"),
        ({"data": iter([corpus()])}, "read only once"),
        ({"data": [[1, 2, 3], [1, 2]]}, "rows of one length"),
        ({"data": lambda: [corpus(), corpus()[:, :5]]}, "row 14 has 5 tokens"),
        ({"data": torch.full((2, 5), 99)}, "token ids must lie in 0..60"),
        ({"data": torch.zeros(3, 1, dtype=torch.long)}, "at least two"),
        ({"data": "missing.txt"}, "no such file"),
        ({"exclude_tokens": [*range(61)]}, "leaves no position"),
        ({"workers": 2}, "give a function that makes the lens"),
        ({"shards": 2}, "go with workers="),
        ({"seed": 2**70}, "64 bits"),
    ],
)  # fmt: skip
def test_wrong_input_is_one_clear_error(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    options = dict(options)
    data = options.pop("data", corpus())
    with pytest.raises(sap.InputError, match=re.escape(message)):
        small(lens_of("gpt2"), data, tmp_path / "s", **options)
    assert not (tmp_path / "s" / "survey.json").exists()


def test_the_command_surveys_and_goes_on(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from sae_attn_plugin.cli import app

    out = tmp_path / "s"
    command = ["features", "--model", "demo", "--data", "demo", "--rows", "6"]
    command += ["--context", "16", "--layers", "1", "--keep", "2", "--out", str(out)]
    first = CliRunner().invoke(app, [*command, "--site", str(tmp_path / "site")])
    assert first.exit_code == 0, first.output
    survey = sap.load_survey(out)
    assert survey.layers == [1]
    assert f"{int(survey.features['fires'].sum())}" in first.output
    assert (tmp_path / "site" / "index.html").is_file()
    again = CliRunner().invoke(app, command)
    assert again.exit_code == 0, again.output
    other = CliRunner().invoke(app, [*command, "--draw", "7"])
    assert other.exit_code == 2
    assert "sample is 20 there and 7 here" in other.output
    wrong = CliRunner().invoke(app, [*command, "--shards", "7"])
    assert "--shards goes with --workers" in wrong.output


def test_saes_that_do_not_read_z_are_refused(tmp_path: Path) -> None:
    with pytest.raises(sap.UnsupportedError, match="on hook_attn_out"):
        small(attn_out_lens(), corpus(), tmp_path / "s")


def test_other_settings_and_foreign_folders_are_refused(tmp_path: Path) -> None:
    lens = lens_of("gpt2")
    small(lens, corpus()[:4], tmp_path / "s")
    with pytest.raises(sap.FileError, match="keep is 4 there and 9 here"):
        small(lens, corpus()[:4], tmp_path / "s", keep=9)
    with pytest.raises(Stop):
        small(lens, stopping(3), tmp_path / "t", checkpoint_every=1)
    with pytest.raises(sap.FileError, match="unfinished survey of other settings: seed"):
        small(lens, corpus(), tmp_path / "t", seed=1)
    with pytest.raises(sap.FileError, match="begun on other data"):
        small(lens, corpus().flip(0), tmp_path / "t")
    with pytest.raises(sap.FileError, match="begun on other data"):
        small(lens, corpus()[:3], tmp_path / "t")
    with pytest.raises(sap.FileError, match="begun without workers"):
        small(make_lens, corpus(), tmp_path / "t", workers=2)
    (damaged,) = (tmp_path / "t" / "unfinished").glob("layer-1.*")
    damaged.write_bytes(damaged.read_bytes()[:100])
    with pytest.raises(sap.FileError, match="damaged"):
        small(lens, corpus(), tmp_path / "t")
    same_tables(
        small(lens, corpus(), tmp_path / "t", resume=False), small(lens, corpus(), tmp_path / "u")
    )
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    for resume in (True, False):
        with pytest.raises(sap.FileError, match="holds no survey"):
            small(lens, corpus(), tmp_path / "mine", resume=resume)
    assert (tmp_path / "mine" / "notes.txt").read_text() == "mine"
    with pytest.raises(sap.FileError, match="not a folder"):
        small(lens, corpus(), tmp_path / "mine" / "notes.txt")
    with pytest.raises(sap.FileError, match="no survey in"):
        sap.load_survey(tmp_path / "mine")
    found = sap.load_survey(tmp_path / "s")
    with pytest.raises(sap.InputError, match="no table 'feature'"):
        found.table("feature")
    with pytest.raises(sap.InputError, match="layer 9 was not surveyed"):
        found.table("features", layer=9)
    assert list(found.table("features", layer=1, columns=["fires"])) == ["fires"]


def test_nan_in_the_model_is_named(tmp_path: Path) -> None:
    model = tiny_gpt2()
    hosted = on_host(model, "transformers_model", word_tokenizer())
    lens = sap.FeatureLens(hosted, random_saes(model))
    with torch.no_grad():
        model.transformer.h[1].ln_1.weight[0] = float("nan")
    with pytest.raises(sap.InputError, match=r"of layer 1 holds NaN or infinity in rows 0\.\.3"):
        small(lens, corpus(), tmp_path / "s")


def test_excluded_tokens_are_not_counted(tmp_path: Path) -> None:
    lens = lens_of("gpt2")
    survey = small(lens, corpus(), tmp_path / "s", exclude_tokens=[0, 5])
    kept = ~np.isin(corpus().numpy(), [0, 5])
    assert survey.facts["positions_counted"] == kept.sum()
    for name in ("examples", "sample", "positions"):
        table = survey.table(name)
        assert kept[table["row"].to_numpy(), table["position"].to_numpy()].all()
    full = small(lens, corpus(), tmp_path / "full", keep=10**3)
    top = full.examples[full.examples["kind"] == "top"]
    top = top[kept[top["row"].to_numpy(), top["position"].to_numpy()]]
    counts = top.groupby(["layer", "feature"]).size()
    fires = survey.features.set_index(["layer", "feature"])["fires"]
    assert fires[fires > 0].equals(counts.astype("int64").rename("fires"))


@pytest.mark.parametrize("host", HOSTS)
def test_reading_sites_ends_the_pass_at_the_last_of_them(host: str) -> None:
    model = tiny_gpt2()
    hosted = on_host(model, host, word_tokenizer())
    backend = as_backend(hosted, word_tokenizer())
    own: Any = backend.model  # pyright: ignore[reportAttributeAccessIssue]
    reached: list[str] = []
    unembed = own.lm_head if host == "nnsight" else own.unembed
    handle = unembed.register_forward_hook(lambda *_: reached.append("unembed"))
    sites = [Site(name, layer) for layer in range(3) for name in ("z", "v", "pattern")]
    before = hooks_on(own)
    found = read_sites(backend, corpus(), sites)
    assert not reached
    assert hooks_on(own) == before
    whole = backend.forward(corpus(), reads=sites)
    assert len(reached) == 1
    for site in sites:
        assert torch.equal(found[site], whole[site])
    assert set(found) == set(sites)
    some = read_sites(backend, corpus(), [Site("z", 0), Site("logits")])
    assert torch.equal(some[Site("logits")], whole[Site("logits")])
    handle.remove()


def test_memory_does_not_grow_with_the_corpus() -> None:
    """What the sketches hold, over a corpus ten times as long, once reservoirs are full."""
    from test_corpus import sketch_of

    tokens = corpus(160, CONTEXT)

    def held(n: int) -> int:
        sketch = sketch_of(tokens[:n], 0, positions=40, keep=1, sample=1)
        return sum(a.nbytes for _, part in sketch.parts() for a in part.values())

    assert held(160) < 1.25 * held(16)
