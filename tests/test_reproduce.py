"""The same again: files byte for byte, and graphs from what their files say."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers import random_saes, sae_at, tiny_gpt2, word_tokenizer
from typer.testing import CliRunner

import sae_attn_plugin as sap
from sae_attn_plugin import cli

PROMPT = "w3 w4 w5 w3 w4 w9"
_SCRIPT = """
import torch
torch.set_num_threads(1)
import sae_attn_plugin as sap
from sae_attn_plugin.studies.result import Study
lens = sap.demo.load()
run = lens.run(sap.demo.ioi_prompt())
att = run.attribute(sap.LogitDiff(" Mary", " John"), node_budget=40)
graph = att.prune(max_nodes=20).to_networkx()
for ending in ("json", "graphml", "gexf", "safetensors"):
    sap.save(graph, f"g.{ending}")
sap.save(att, "att.safetensors")
sap.draw(graph, "g.png")
sap.page(run, graph).save("g.html")
Study("quality", dict(lens.provenance), {"main": run.features()}).save("study.json")
"""


@pytest.mark.slow
def test_the_same_files_byte_for_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here, where other tests have run, and in a new process with other hashes."""
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    monkeypatch.chdir(here)
    exec(_SCRIPT, {})
    seed = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"
    environment = {**os.environ, "PYTHONHASHSEED": seed}
    command = [sys.executable, "-c", _SCRIPT]
    subprocess.run(command, cwd=there, env=environment, check=True, timeout=300)
    files = [
        {path.name: path.read_bytes() for path in folder.iterdir()} for folder in (here, there)
    ]
    assert len(files[0]) == 8
    assert files[0].keys() == files[1].keys()
    assert [name for name in files[0] if files[0][name] != files[1][name]] == []


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, its SAEs and a graph made with them."""
    folder = tmp_path_factory.mktemp("reproduce")
    model = tiny_gpt2()
    model.save_pretrained(folder / "model")
    word_tokenizer().save_pretrained(folder / "model")
    for layer, sae in enumerate(random_saes(model)):
        sae.save_model(folder / "saes" / f"blocks.{layer}.attn.hook_z")
    lens = sap.FeatureLens(sap.load_model(folder / "model"), str(folder / "saes"))
    run = lens.run(PROMPT)
    sap.save(run.graph([sap.Logit("w7"), sap.Feature(2, 3, -1)]), folder / "graph.json")
    direction = sap.Direction(lens.backend.unembed()[0][:, 5] + 0.1, name="a way")
    att = run.attribute([direction, sap.LogitDiff("w7", "w9")], weights=[1, 3])
    sap.save(att.prune(0.9).prune(0.8, max_nodes=9), folder / "other.safetensors")
    sap.save(att.prune(0.5).to_networkx(by="head"), folder / "heads.json")
    sap.save(run.graph(sap.HeadScore(2, 1, -1, 0, "query")), folder / "score.json")
    for layer, hook in ((1, "hook_resid_post"), (2, "hook_resid_mid")):
        sae_at(layer, hook, 30).save_model(folder / "residual" / f"{layer}.{hook}")
    stream = str(folder / "residual")
    model = sap.load_model(folder / "model")
    lens = sap.FeatureLens(model, str(folder / "saes"), residual_saes=stream)
    options: dict[str, Any] = {"expand": {"residual": [2, 5]}, "residual": "recurse"}
    sap.save(lens.run(PROMPT).graph(sap.Logit("w7"), **options), folder / "residual.json")
    return folder


def call(*arguments: object) -> Any:
    result = CliRunner().invoke(cli.app, ["reproduce", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


FILES = ("graph.json", "other.safetensors", "heads.json", "score.json", "residual.json")


@pytest.mark.parametrize("name", FILES)
def test_a_file_tells_all_that_is_needed(folder: Path, name: str, tmp_path: Path) -> None:
    result = call(folder / name, "--out", tmp_path / "again.json")
    assert result.exit_code == 0, result.output
    assert "Same" in result.output
    assert "Made as it was" in result.output
    again, given = sap.load(tmp_path / "again.json"), sap.load(folder / name)
    given = given if hasattr(given, "graph") else given.to_networkx()
    assert sap.graphs_equal(again, given, 1e-6)
    assert again.number_of_edges() == given.number_of_edges()


def test_another_host_gives_the_same_and_says_so(folder: Path) -> None:
    result = call(folder / "graph.json", "--backend", "nnsight")
    assert result.exit_code == 0, result.output
    assert "backend: hooked_transformer in the file, nnsight here" in result.output
    assert "fingerprints" not in result.output


def test_other_weights_give_another_graph(folder: Path, tmp_path: Path) -> None:
    for layer, sae in enumerate(random_saes(tiny_gpt2(), seed=5)):
        sae.save_model(tmp_path / "saes" / f"blocks.{layer}.attn.hook_z")
    result = call(folder / "graph.json", "--saes", tmp_path / "saes")
    assert result.exit_code == 1, result.output
    assert "Different" in result.output
    assert "fingerprints of saes 0" in result.output


def test_residual_saes_are_needed_again(folder: Path, tmp_path: Path) -> None:
    graph = sap.load(folder / "residual.json")
    assert any(data["kind"].startswith("resid") for _, data in graph.nodes(data=True))
    model, saes = sap.load_model(folder / "model"), str(folder / "saes")
    with pytest.raises(sap.InputError, match=r"residual_saes of layer resid:2: .* here is none"):
        sap.reproduce(graph, sap.FeatureLens(model, saes))
    other = [sae_at(1, "hook_resid_post", 30, seed=5), sae_at(2, "hook_resid_mid", 30)]
    found = sap.reproduce(graph, sap.FeatureLens(model, saes, residual_saes=other))
    assert not found
    assert [line for line in found.changed if line.startswith("fingerprints of residual_saes")]
    for sae in other:
        sae.save_model(tmp_path / "other" / sae.cfg.metadata.hook_name)
    result = call(folder / "residual.json", "--residual-saes", tmp_path / "other")
    assert result.exit_code == 1, result.output
    assert "fingerprints of residual_saes resid:2" in result.output


def _changed(folder: Path, path: Path, **changes: Any) -> Path:
    document = json.loads((folder / "graph.json").read_text())
    for name, value in changes.items():
        document["graph"].pop(name, None)
        if value is not None:
            document["graph"][name] = value
    path.write_text(json.dumps(document))
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"token_ids": None}, "does not say its token_ids"),
        ({"model": None}, "does not say its model"),
        ({"model": "./nowhere"}, "cannot be loaded from here; pass --model"),
        ({"sources": None}, "pass --saes, a folder or a sae_lens release"),
        ({"sources": {"saes": "./nowhere"}}, "cannot be loaded from here; pass --saes"),
        ({"residual_saes": {"resid:2": "x"}}, "pass --residual-saes, a folder or a sae_lens"),
        ({"backend": "abacus"}, "none of hooked_transformer"),
        ({"dtype": "int3"}, "dtype is 'int3'"),
        ({"saes": {"0": "other"}}, "saes of layer 0"),
        ({"pruning": [1]}, "pruning is"),
        ({"aggregate_of": []}, "not in one run"),
    ],
)
def test_what_a_file_lacks_is_said(
    folder: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    result = call(_changed(folder, tmp_path / "g.json", **changes))
    assert result.exit_code == 2, result.output
    assert message in result.output


def test_other_versions_are_named(folder: Path, tmp_path: Path) -> None:
    path = _changed(folder, tmp_path / "g.json", versions={"torch": "1.0"}, prompt="w3 w4")
    result = call(path)
    assert result.exit_code == 0, result.output
    assert "versions of torch: 1.0 in the file" in result.output
    assert "prompt: [" in result.output


def _validate(*arguments: object) -> Any:
    return CliRunner().invoke(cli.app, ["validate", *map(str, arguments)])


def test_a_file_is_validated_on_the_model_that_it_names(folder: Path, tmp_path: Path) -> None:
    report, picture = tmp_path / "report.json", tmp_path / "report.png"
    options = ("--max-sources", 6, "--freeze", "norms", "--out", report, "--out", picture)
    result = _validate(folder / "graph.json", *options)
    assert result.exit_code == 0, result.output
    lens = sap.FeatureLens(sap.load_model(folder / "model"), str(folder / "saes"))
    again = sap.validate(
        sap.load(folder / "graph.json"), lens, max_sources=6, freezes={"norms": "norms"}
    )
    assert json.loads(report.read_text())["summary"] == again.to_dict()["summary"]
    assert again.frozen.max_error < 1e-5
    assert picture.read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--freeze", "patern"), "cannot freeze patern"),
        (("--max-sources", "0"), "expected at least 1"),
        (("--out", "report.txt"), "expected a path that ends in .json"),
        (("--model", "./nowhere"), "nowhere"),
    ],
)
def test_a_validation_that_cannot_be_made_is_refused(
    folder: Path, arguments: tuple[str, str], message: str
) -> None:
    result = _validate(folder / "graph.json", *arguments)
    assert result.exit_code == 2, result.output
    assert message in result.output
