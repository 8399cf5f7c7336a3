"""The command line: what it writes, and one clear message for everything it refuses."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers import random_saes, random_transcoder, tiny_gpt2, word_tokenizer
from test_files import small_graph
from typer.testing import CliRunner

import sae_attn_plugin as sap
from sae_attn_plugin import cli

PROMPT = "w3 w4 w5 w3 w4 w9"
BACKENDS = ("transformer_lens", "transformer_bridge", "nnsight")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and a folder of SAEs."""
    folder = tmp_path_factory.mktemp("cli")
    model = tiny_gpt2()
    model.save_pretrained(folder / "model")
    word_tokenizer().save_pretrained(folder / "model")
    for layer, sae in enumerate(random_saes(model)):
        sae.save_model(folder / "saes" / f"blocks.{layer}.attn.hook_z")
    return folder


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def call(*arguments: object) -> Any:
    result = CliRunner().invoke(cli.app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def call_graph(files: Path, *arguments: object, **changes: str | None) -> Any:
    options: dict[str, str | None] = {
        "model": str(files / "model"),
        "saes": str(files / "saes"),
        "prompt": PROMPT,
        **changes,
    }
    given = [item for name, value in options.items() if value for item in (f"--{name}", value)]
    if options["prompt"] == "":
        given += ["--prompt", ""]
    return call("graph", *given, *arguments)


def numbers_apart(first: Any, second: Any) -> float:
    """The largest difference of two graphs of the same nodes and edges, relative to their sizes."""
    assert set(first) == set(second)
    assert set(first.edges) == set(second.edges)
    scale = max(abs(weight) for *_, weight in first.edges(data="weight"))
    return max(
        abs(weight - second.edges[source, target]["weight"]) / scale
        for source, target, weight in first.edges(data="weight")
    )


def test_every_backend_writes_the_same_graph(files: Path, here: Path) -> None:
    graphs = {}
    for backend in BACKENDS:
        out, picture = here / f"{backend}.json", here / f"{backend}.png"
        result = call_graph(
            files, "--wrong", "w7", "--out", out, "--picture", picture, "--max-nodes", 30,
            target="w5", backend=backend,
        )  # fmt: skip
        assert result.exit_code == 0, result.stderr
        assert "Worst ledger residual" in result.stdout
        assert 'logit_diff:"w5"-"w7"@5' in result.stdout
        assert str(out) in result.stdout
        assert result.stderr == ""
        assert picture.read_bytes().startswith(b"\x89PNG")
        graphs[backend] = sap.load(out)
    reference = graphs["transformer_lens"]
    assert reference.graph["pruning"] == {"nodes": 0.8, "edges": 0.98, "max_nodes": 30}
    assert reference.graph["prompt"] == PROMPT
    assert len(reference) <= 31
    for backend in BACKENDS[1:]:
        assert numbers_apart(reference, graphs[backend]) < 1e-5


@pytest.mark.parametrize(
    ("arguments", "target"),
    [
        ([], None),
        (["--target", "w5"], 'logit:"w5"@5'),
        (["--target", "#5", "--position", "-2"], 'logit:"w5"@4'),
        (["--target", "#5", "--wrong", "w6", "--position", "2"], 'logit_diff:"w5"-"w6"@2'),
        (["--target", "attn:2:7@-1"], "attn:2:7@5"),
        (["--target", "attn:1:0@3", "--prepend-bos"], "attn:1:0@3"),
        (["--target", "w5", "--prepend-bos", "--dtype", "float64"], 'logit:"w5"@6'),
        (["--target", "w5", "--node-budget", "0", "--nodes", "1", "--edges", "1"], 'logit:"w5"@5'),
    ],
)
def test_targets(files: Path, here: Path, arguments: list[str], target: str | None) -> None:
    result = call_graph(files, *arguments)
    assert result.exit_code == 0, result.stderr
    graph = sap.load(here / "graph.json")
    if target is None:
        assert 1 <= len(graph.graph["targets"]) <= 10
    else:
        assert graph.graph["targets"] == [target]
    assert sorted(path.name for path in here.iterdir()) == ["graph.json"]


REFUSED: dict[str, tuple[dict[str, str | None], list[str], str]] = {
    "no such model": ({"model": "./nowhere"}, [], "no such folder: ./nowhere"),
    "no such hub model": ({"model": "nobody/nothing"}, [], "cannot load the model"),
    "a folder without a model": ({"model": "."}, [], "config.json is missing"),
    "no such SAEs": ({"saes": "nowhere"}, [], "neither a folder nor a sae_lens release"),
    "a misspelled release": ({"saes": "gpt2-small-hook-z-k"}, [], "gpt2-small-hook-z-kk"),
    "a folder without SAEs": ({"saes": "."}, [], "no SAE in the folder"),
    "an empty prompt": ({"prompt": ""}, [], "the prompt is empty"),
    "unknown words": ({"prompt": "w3 zebra"}, [], "'zebra'"),
    "a long prompt": ({"prompt": "w3 " * 41}, [], "41 tokens, but the model's context is 40"),
    "several tokens": ({"target": "w3 w4"}, [], "is 2 tokens"),
    "an unknown token": ({"target": "zebra"}, [], "does not know 'zebra'"),
    "a token id": ({"target": "#61"}, [], "outside the vocabulary, 0..60"),
    "an empty target": ({"target": None}, ["--target", ""], "the target is empty"),
    "the same token": ({"target": "w3"}, ["--wrong", "w3"], "with itself is always 0"),
    "wrong alone": ({}, ["--wrong", "w3"], "--wrong needs --target"),
    "position alone": ({}, ["--position", "3"], "--position needs --target"),
    "a position": ({"target": "w3"}, ["--position", "6"], "position 6 is out of range"),
    "a bad feature": ({"target": "attn:5"}, [], "not a feature: 'attn:5'"),
    "a layer": ({"target": "attn:3:1@0"}, [], "no SAE in layer 3; layers with one: 0, 1, 2"),
    "a feature": ({"target": "attn:1:40@0"}, [], "feature 40 is out of range"),
    "a feature's position": ({"target": "attn:1:1@-7"}, [], "position -7 is out of range"),
    "a feature and wrong": ({"target": "attn:1:1@0"}, ["--wrong", "w3"], "go with a token"),
    "a share": ({}, ["--nodes", "1.5"], "--nodes 1.5: expected a share in (0, 1]"),
    "a NaN share": ({}, ["--edges", "nan"], "--edges nan: expected a share in (0, 1]"),
    "max nodes": ({}, ["--max-nodes", "0"], "--max-nodes 0: expected at least 1"),
    "node budget": ({}, ["--node-budget", "-1"], "--node-budget -1: expected at least 0"),
    "an ending": ({}, ["--out", "graph.txt"], "ends in .json, got 'graph.txt'"),
    "a picture's ending": ({}, ["--picture", "graph.svg"], "ends in .png, got 'graph.svg'"),
    "a folder": ({}, ["--out", "none/graph.json"], "does not exist"),
    "a page's ending": ({}, ["--page", "graph.htm"], "ends in .html, got 'graph.htm'"),
    "a picture's folder": ({}, ["--picture", "none/graph.png"], "does not exist"),
    "a device": ({}, ["--device", "abacus"], "the device 'abacus' cannot be used"),
    "an unknown backend": ({"backend": "jax"}, [], "'jax' is not one of"),
    "an unknown option": ({}, ["--colour", "red"], "No such option"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_one_message_and_no_file(files: Path, here: Path, case: str) -> None:
    changes, arguments, message = REFUSED[case]
    result = call_graph(files, *arguments, **changes)
    check_refused(result, here, message)


def check_refused(result: Any, here: Path, message: str) -> None:
    assert result.exit_code == 2
    said = " ".join(result.stderr.replace("│", " ").split())
    assert message in said
    assert "Traceback" not in said
    assert said.startswith("error: ") == ("Usage" not in said)
    assert result.stdout == ""
    assert list(here.iterdir()) == []


def edit_sae(files: Path, folder: Path, **changes: Any) -> Path:
    """A copy of the first SAE with another configuration."""
    shutil.copytree(files / "saes" / "blocks.0.attn.hook_z", folder)
    config = json.loads((folder / "cfg.json").read_text())
    metadata = changes.pop("metadata", {})
    config.update(changes)
    config["metadata"].update(metadata)
    (folder / "cfg.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("hook_name", "message"),
    [
        ("blocks.0.attention.hook_z", "unknown hook name 'blocks.0.attention.hook_z'"),
        ("blocks.9.attn.hook_z", "has only 3 layers"),
    ],
)
def test_saes_on_hooks_that_do_not_exist(
    files: Path, here: Path, tmp_path_factory: Any, hook_name: str, message: str
) -> None:
    folder = tmp_path_factory.mktemp("saes") / "sae"
    sae = edit_sae(files, folder, metadata={"hook_name": hook_name})
    check_refused(call_graph(files, saes=str(sae)), here, message)


def test_an_sae_of_another_width(files: Path, here: Path, tmp_path_factory: Any) -> None:
    from helpers import random_sae

    folder = tmp_path_factory.mktemp("saes")
    random_sae(0, d_in=32).save_model(folder)
    message = "has d_in 32, but hook_z of"
    check_refused(call_graph(files, saes=str(folder)), here, message)


@pytest.mark.parametrize("architecture", ["temporal", "matching_pursuit"])
def test_saes_without_a_linear_pre_activation(
    files: Path, here: Path, tmp_path_factory: Any, architecture: str
) -> None:
    from sae_lens.registry import get_sae_class

    sae_class, config_class = get_sae_class(architecture)
    sae = sae_class(config_class(d_in=30, d_sae=512))
    sae.cfg.metadata.hook_name = "blocks.0.attn.hook_z"
    folder = tmp_path_factory.mktemp("saes")
    sae.save_model(folder)
    message = f"the {architecture} SAE on 'blocks.0.attn.hook_z' cannot be attributed"
    check_refused(call_graph(files, saes=str(folder)), here, message)


def test_a_failure_while_drawing_writes_nothing(
    files: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_arguments: Any) -> None:
        raise sap.InputError("no paint")

    monkeypatch.setattr(sap, "draw", fail)
    result = call_graph(files, "--picture", "graph.png", "--page", "graph.html")
    assert result.exit_code == 2
    assert "error: no paint" in result.stderr
    assert list(here.iterdir()) == []


def test_graph_writes_a_page(files: Path, here: Path) -> None:
    result = call_graph(files, "--page", "graph.html")
    assert result.exit_code == 0, result.stderr
    assert "graph.html" in result.stdout
    page = (here / "graph.html").read_text(encoding="utf-8")
    assert '"by_head_and_source"' in page
    assert '"qk"' in page


def test_an_interrupt_is_exit_130_and_writes_nothing(
    files: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_arguments: Any, **_options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sap.FeatureLens, "run", interrupt)
    result = call_graph(files)
    assert result.exit_code == 130
    assert "interrupted" in result.stderr
    assert list(here.iterdir()) == []


def test_a_defect_keeps_its_traceback(
    files: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sap.FeatureLens, "run", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        call_graph(files)
    assert list(here.iterdir()) == []


# -- the demo, on a random model -----------------------------------------------------------------


@pytest.fixture
def demo(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo command over the tiny model."""

    def load(backend: str) -> sap.FeatureLens:
        model = sap.load_model(files / "model", backend)  # type: ignore[arg-type]
        return sap.FeatureLens(model, sap.load_saes(files / "saes"))

    prompt = sap.demo.IOIPrompt(PROMPT)
    prompt.correct, prompt.wrong = "w4", "w3"
    prompt.positions = {"S1": 0, "IO": 1, "S2": 3, "END": 5}
    monkeypatch.setattr(sap.demo, "load", load)
    monkeypatch.setattr(sap.demo, "ioi_prompt", lambda: prompt)


@pytest.mark.usefixtures("demo")
@pytest.mark.parametrize("backend", BACKENDS)
def test_demo(here: Path, backend: str) -> None:
    (here / "out").mkdir()
    result = call("demo", "--backend", backend, "--out", "out")
    assert result.exit_code == 0, result.stderr
    assert result.stderr == ""
    said = ["Prompt", "Logit difference", "active features", "share of decoder norm", "Next"]
    said += ['from IO, "w4"@1', 'from S2, "w3"@3', "Worst ledger residual"]
    for part in said:
        assert part in result.stdout
    lines = result.stdout.splitlines()
    values = {
        label: float(next(line for line in lines if label in line).split()[-1])
        for label in ("predicted, direct", "measured, all else frozen", "everything free")
    }
    assert values["measured, all else frozen"] == pytest.approx(
        values["predicted, direct"], abs=1e-5
    )
    assert values["everything free"] != pytest.approx(values["predicted, direct"], abs=1e-3)
    written = sorted(path.name for path in (here / "out").iterdir())
    assert written == ["graph.html", "graph.json", "graph.png"]
    assert sap.load(here / "out" / "graph.json").graph["targets"] == ['logit_diff:"w4"-"w3"@5']


@pytest.mark.usefixtures("demo")
def test_demo_with_a_sentence_of_ones_own(here: Path) -> None:
    result = call("demo", "--prompt", "w8 w9 w8 w2", "--correct", "w9", "--wrong", "w8")
    assert result.exit_code == 0, result.stderr
    assert 'from IO, "w9"@1' in result.stdout
    assert 'from S2, "w8"@2' in result.stdout
    assert (here / "graph.png").is_file()


@pytest.mark.usefixtures("demo")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", "w3 w4"], "--prompt needs --correct and --wrong"),
        (["--out", "/dev/null/none"], "/dev/null is no folder"),
        (["--correct", "w3 w4"], "is 2 tokens"),
        (["--correct", ""], "is 0 tokens"),
    ],
)
def test_demo_refuses(here: Path, arguments: list[str], message: str) -> None:
    check_refused(call("demo", *arguments), here, message)


# -- start-up ------------------------------------------------------------------------------------


# -- export --------------------------------------------------------------------------------------


@pytest.fixture
def graph_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("graphs") / "graph.json"
    graph = small_graph()
    graph.graph["tokens"] = ["a", " b"]
    sap.save(graph, path)
    return path


def test_export_there_and_back(graph_file: Path, here: Path) -> None:
    result = call("export", graph_file, "a.graphml")
    assert result.exit_code == 0, result.stderr
    assert "a.graphml" in result.stdout
    assert call("export", "a.graphml", "b.json", "--format", "json").exit_code == 0
    assert (here / "b.json").read_bytes() == graph_file.read_bytes()


def test_export_to_gexf_safetensors_and_heads(here: Path) -> None:
    run = sap.demo.load().run(sap.demo.ioi_prompt())
    attribution = run.attribute(sap.LogitDiff(" Mary", " John")).prune(0.5)
    sap.save(attribution, "a.safetensors")
    for command in (["a.safetensors", "a.gexf"], ["a.gexf", "a.json"],
                    ["a.json", "heads.json", "--format", "mib"],
                    ["a.json", "np.json", "--format", "neuronpedia", "--no-cantor"]):  # fmt: skip
        result = call("export", *command)
        assert result.exit_code == 0, result.stderr
    assert dict(sap.load("a.json").nodes) == dict(attribution.to_networkx().nodes)
    edges = json.loads((here / "heads.json").read_text(encoding="utf-8"))["edges"]
    assert sum(edge["in_graph"] for edge in edges.values()) > 10
    document = json.loads((here / "np.json").read_text(encoding="utf-8"))
    assert "schema_version" not in document["metadata"]
    for node in document["nodes"]:
        if node["sae_attn_kind"] == "attn":
            assert node["feature"] == node["sae_attn_feature"]


def test_export_for_neuronpedia(graph_file: Path, here: Path) -> None:
    names = {"slug": "mine", "scan": "gpt2-small", "source-set": "att-kk", "no-feature": "-1"}
    options = [item for name, value in names.items() for item in (f"--{name}", value)]
    result = call("export", graph_file, "np.json", "--format", "neuronpedia", *options)
    assert result.exit_code == 0, result.stderr
    metadata = json.loads((here / "np.json").read_text(encoding="utf-8"))["metadata"]
    assert (metadata["slug"], metadata["scan"]) == ("mine", "gpt2-small")
    assert metadata["feature_details"] == {"neuronpedia_lorsa_source_set": "att-kk"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["GRAPH", "a.txt"], "names no known graph format; known: .json, .safetensors"),
        (["GRAPH", "a.graphml", "--format", "neuronpedia"], "ends in .json, got 'a.graphml'"),
        (["GRAPH", "a.json", "--format", "pickle"], "'pickle' is not one of"),
        (["GRAPH", "a.json", "--slug", "s"], "the format 'json' has no option 'slug'"),
        (["GRAPH", "a.json", "--format", "neuronpedia"], "pass scan="),
        (["GRAPH", "none/a.graphml"], "does not exist"),
        (["GRAPH", "GRAPH", "--format", "neuronpedia"], "is the graph itself"),
        (["none.json", "a.graphml"], "cannot read none.json: No such file"),
        (["GRAPH", "a.json", "--format", "mib"], "pass --model and --saes"),
        (["GRAPH", "a.json", "--model", "gpt2"], "--model goes with --format mib"),
        (["GRAPH.gz", "a.graphml"], "names no known graph format"),
        (["GRAPH"], "Missing argument"),
    ],
)
def test_export_refuses(graph_file: Path, here: Path, arguments: list[str], message: str) -> None:
    before = graph_file.read_bytes()
    given = [argument.replace("GRAPH", str(graph_file)) for argument in arguments]
    check_refused(call("export", *given), here, message)
    assert graph_file.read_bytes() == before


@pytest.mark.parametrize("data", [b"", b"{}", b'{"metadata": {}, "qParams": {}, "links": []}'])
def test_export_of_a_foreign_file(graph_file: Path, here: Path, data: bytes) -> None:
    graph_file.write_bytes(data)
    check_refused(call("export", graph_file, "a.graphml"), here, "cannot load")


def test_transcoders_and_what_passes_on(files: Path, here: Path) -> None:
    folder = here / "transcoders"
    random_transcoder(1, 30).save_model(folder / "blocks.1")
    out = here / "graph.json"
    through = ("--mlp", "linearise", "--heads", "linearise", "--nodes", 1, "--edges", 1)
    result = call_graph(
        files, "--out", out, "--node-budget", 400, *through,
        target="w5", transcoders=str(folder), saes=str(files / "saes" / "blocks.0.attn.hook_z"),
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    graph = sap.load(out)
    expanded = {sap.Node.parse(n).kind for n, yes in graph.nodes(data="expanded") if yes}
    assert expanded == {"logit", "attn", "tc", "mlp", "head"}
    assert (graph.graph["mlp"], graph.graph["heads"]) == ("linearise", "linearise")
    refused = call_graph(files, "--out", out, target="w5", transcoders=str(here / "none"))
    assert refused.exit_code == 2
    assert "neither a folder nor a sae_lens release" in refused.stderr
    refused = call_graph(files, "--out", out, target="w5", transcoders=str(files / "saes"))
    assert refused.exit_code == 2
    assert "is of attention" in " ".join(refused.stderr.split())


LATE = {
    "graph": ("--saes ./nowhere --prompt w3", "'./nowhere' is neither a folder nor"),
    "graph, transcoders": ("--saes SAES --transcoders ./no --prompt w3", "'./no' is neither"),
    "graph, a release": ("--saes nowhere --prompt w3", "'nowhere' is neither a folder nor"),
    "evaluate": ("--saes ./nowhere --data TEXT", "'./nowhere' is neither a folder nor"),
    "evaluate, text": ("--saes SAES --data ./nowhere", "no such file: ./nowhere"),
    "evaluate, a folder": ("--saes SAES --data SAES", "but none saved by datasets"),
    "evaluate, an ending": ("--saes SAES --data setup.cfg", "cannot read setup.cfg: expected"),
    "features": ("--saes ./nowhere --data TEXT --out new", "'./nowhere' is neither a folder nor"),
    "features, text": ("--saes SAES --data ./nowhere --out new", "no such file: ./nowhere"),
    "explore": ("--saes ./nowhere", "'./nowhere' is neither a folder nor"),
    "explore, sessions": ("--saes SAES --sessions setup.cfg/in", "setup.cfg is no folder"),
    "study quality": ("--saes ./nowhere --data TEXT", "'./nowhere' is neither a folder nor"),
    "study prefix": ("--saes ./nowhere", "'./nowhere' is neither a folder nor"),
    "study quality, text": ("--saes SAES --data ./nowhere", "no such file: ./nowhere"),
    "study quality, out": ("--saes SAES --data TEXT --out setup.cfg/in", "setup.cfg is no folder"),
    "study quality, work": ("--saes SAES --data TEXT --work setup.cfg", "setup.cfg is no folder"),
    "train, out": ("--out setup.cfg/in --data TEXT", "setup.cfg is no folder"),
    "train, text": ("--out new --data ./nowhere", "no such file: ./nowhere"),
}


@pytest.mark.parametrize("case", LATE)
def test_wrong_sources_are_told_before_the_model_loads(
    files: Path, here: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    options, message = LATE[case]
    monkeypatch.setattr(sap, "load_model", lambda *_, **__: pytest.fail("loads the model"))
    text, other = here / "text.txt", here / "setup.cfg"
    text.write_text("w3 w4\n")
    other.write_text("\n")
    given = options.replace("SAES", str(files / "saes")).replace("TEXT", str(text)).split()
    result = call(*case.partition(",")[0].split(), "--model", files / "model", *given)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())
    assert sorted(here.iterdir()) == [other, text]


def test_version_and_help() -> None:
    assert call("--version").stdout == f"sae-attn {sap.__version__}\n"
    for command in ([], ["demo"], ["graph"], ["export"]):
        assert call(*command, "--help").exit_code == 0


def test_the_command_line_loads_nothing_heavy() -> None:
    heavy = ("torch", "transformers", "sae_lens", "matplotlib", "networkx", "numpy", "pandas")
    code = f"import sys, sae_attn_plugin.cli; print([m for m in {heavy} if m in sys.modules])"
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True,
        cwd=Path(cli.__file__).parents[2],
    )  # fmt: skip
    assert found.stdout.strip() == "[]"


def test_help_in_a_process_of_its_own() -> None:
    found = subprocess.run(
        [sys.executable, "-m", "sae_attn_plugin.cli", "--help"], capture_output=True, text=True,
        check=True, cwd=Path(cli.__file__).parents[2],
    )  # fmt: skip
    assert "demo" in found.stdout
    assert "graph" in found.stdout
