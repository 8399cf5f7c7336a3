"""Whatever comes in, what comes out is right, or one error of this package on one line.

``SAE_ATTN_FUZZ=100 pytest tests/test_fuzz.py`` looks a hundred times longer, at random.
"""

from __future__ import annotations

import functools
import json
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import FUZZ, LensMaker
from helpers import random_sae, tiny_gpt2, tiny_llama, word_tokenizer
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save as save_tensors
from test_files import small_graph
from typer.testing import CliRunner

import sae_attn_plugin as sap
from sae_attn_plugin import cli
from sae_attn_plugin.checkpoints import load_state, save_state
from sae_attn_plugin.graphs import native
from sae_attn_plugin.studies.result import Study, load_study


def examples(n: int) -> Any:
    return settings(max_examples=n * max(FUZZ, 1))


def outcome(call: Callable[[], Any]) -> Any:
    """What a call gives; None where it is refused as this package refuses."""
    try:
        return call()
    except sap.SaeAttnError as error:
        refusal = error
    text = str(refusal)
    assert text
    assert "\n" not in text
    assert type(refusal) is not sap.SaeAttnError
    return None


# -- values ----------------------------------------------------------------------------------------

anything = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-50, 80),
    st.floats(),
    st.text(max_size=8),
    st.binary(max_size=4),
    st.lists(st.integers(-3, 70), max_size=4),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
    st.builds(np.int64, st.integers(-20, 70)),
    st.builds(torch.tensor, st.integers(-20, 70)),
)
small = st.integers(-8, 8)
index = st.one_of(small, small, anything)
word = st.integers(2, 60).map(lambda i: f"w{i}")
words = st.lists(word, min_size=1, max_size=8).map(" ".join)
token = st.one_of(word, st.integers(-2, 62), anything)
prompt = st.one_of(
    words,
    words,
    st.text(max_size=20),
    st.lists(st.one_of(words, st.text(max_size=5)), max_size=3),
    st.lists(st.integers(-1, 61), max_size=45),
    st.lists(st.lists(st.integers(0, 60), max_size=4), max_size=3),
    anything,
    st.builds(lambda ids, kind: torch.tensor(ids).to(kind),
              st.lists(st.integers(0, 60), max_size=5),
              st.sampled_from([torch.int32, torch.uint8, torch.int64, torch.float32, torch.bool])),
    st.builds(lambda ids: np.array(ids), st.lists(st.integers(0, 90), max_size=5)),
)  # fmt: skip
vector = st.one_of(
    anything,
    st.integers(0, 40).map(torch.ones),
    st.sampled_from([30, 30, 29]).flatmap(
        lambda n: st.lists(st.floats(width=32), min_size=n, max_size=n).map(torch.tensor)
    ),
)
target = st.one_of(
    st.builds(sap.Logit, token, index),
    st.builds(sap.LogitDiff, token, token, index),
    st.builds(sap.Feature, index, st.one_of(st.integers(0, 50), anything), index),
    st.builds(sap.HeadScore, index, index, index, index),
    st.builds(sap.Direction, vector, index),
)


# -- prompts and targets ---------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["hooked_transformer", "nnsight"])
def test_prompts(lens_of: LensMaker, host: str) -> None:
    lens = lens_of("gpt2", host)

    @examples(60)
    @given(prompt)
    def check(given_prompt: Any) -> None:
        run = outcome(lambda: lens.run(given_prompt))
        if run is not None:
            for one in (run[i] for i in range(len(run))):
                assert torch.isfinite(one.logits).all()
                assert len(one.token_strings) == one.tokens.shape[1]

    check()


def test_prompts_of_any_text_in_the_demo_model() -> None:
    lens = sap.demo.load()

    @examples(40)
    @given(st.one_of(st.text(), st.text(st.characters(codec=None, max_codepoint=0x2FF)),
                     st.lists(st.sampled_from([" John", "<|endoftext|>", ",", "\ud800", " to"]))
                     .map("".join)))  # fmt: skip
    def check(text: str) -> None:
        run = outcome(lambda: lens.run(text))
        if run is not None:
            outcome(lambda: run.attribute(node_budget=5).prune().to_networkx())

    check()


@pytest.mark.parametrize("host", ["hooked_transformer", "transformer_bridge", "nnsight"])
def test_targets(lens_of: LensMaker, host: str) -> None:
    lens = lens_of("gpt2", host, torch.float64)
    run = lens.run("w5 w9 w17 w5 w9")

    @examples(40)
    @given(st.one_of(target, st.lists(target, max_size=3), anything),
           st.sampled_from([0, 1, 3, 2000, None]), st.sampled_from([None, 1, 5]))  # fmt: skip
    @example(sap.Logit("w7"), 2000, None)
    def check(what: Any, budget: Any, kept: Any) -> None:
        att = outcome(lambda: run.attribute(what, node_budget=budget, edges_per_target=kept))
        if att is not None:
            assert att.worst_residual <= 1e-10
            assert np.isfinite(att.edges["weight"]).all()
            assert math.isclose(att.ledger["value"].iloc[0], att.ledger["value"].iloc[0])

    check()


@examples(120)
@given(st.data())
def test_questions(data: st.DataObject) -> None:
    run = _demo_run()
    name = data.draw(st.sampled_from(["dfa", "qk", "features", "attribute", "prune", "edit"]))
    if name == "dfa":
        a, b, c = (data.draw(index) for _ in range(3))
        found = outcome(lambda: run.dfa(a, b, c))
        if found is not None:
            total = float(found.by_head.sum()) + float(found.constant)
            assert abs(total - float(found.pre_activation)) <= 1e-4 * (1 + abs(total))
    elif name == "qk":
        a, b, c, d = (data.draw(index) for _ in range(4))
        outcome(lambda: run.qk(a, b, c, d))
    elif name == "features":
        a, b, c = (
            data.draw(index),
            data.draw(index),
            data.draw(st.sampled_from(["attn", "tc", "x"])),
        )
        outcome(lambda: run.features(a, b, c))
    elif name == "attribute":
        options = data.draw(
            st.dictionaries(
                st.sampled_from(["weights", "mlp", "heads", "node_budget", "edges_per_target",
                                 "memory_budget"]), anything, max_size=2)
        )  # fmt: skip
        outcome(lambda: run.attribute(sap.Logit(5), **options))
    elif name == "prune":
        options = data.draw(
            st.dictionaries(
                st.sampled_from(["nodes", "edges", "max_nodes"]),
                st.one_of(st.floats(-0.5, 1.5), anything),
            )
        )
        att = _demo_attribution()
        pruned = outcome(lambda: att.prune(**options))
        if pruned is not None:
            assert pruned.worst_residual <= 1e-5
    else:
        number = st.one_of(st.floats(), anything)
        kind, arguments = data.draw(
            st.one_of(
                st.tuples(st.just(sap.AblateFeature), st.tuples(index, index, index)),
                st.tuples(st.just(sap.SetFeature), st.tuples(index, index, index, number)),
                st.tuples(st.just(sap.ScaleFeature), st.tuples(index, index, index, number)),
                st.tuples(st.just(sap.AblateError), st.tuples(index, index)),
                st.tuples(st.just(sap.AblateHead), st.tuples(index, index, index)),
                st.tuples(st.just(lambda edit: edit), st.tuples(anything)),
            )
        )
        result = outcome(lambda: run.lens.intervene(run, [kind(*arguments)]))
        if result is not None:
            outcome(lambda: result.effect(sap.LogitDiff(5, 6)))


@functools.cache
def _demo_run() -> Any:
    return sap.demo.load().run("When John and Mary went to the store")


@functools.cache
def _demo_attribution() -> Any:
    return _demo_run().attribute(sap.Logit(5), node_budget=20)


# -- SAEs ------------------------------------------------------------------------------------------


@functools.cache
def _models() -> tuple[Any, ...]:
    return tiny_gpt2(n_layers=1), tiny_llama(n_layers=1)


@examples(40)
@given(st.data())
def test_saes_that_may_not_fit(data: st.DataObject) -> None:
    from helpers import on_host

    model = data.draw(st.sampled_from(_models()))
    architecture = data.draw(st.sampled_from(["standard", "jumprelu", "topk", "gated"]))
    hook = data.draw(
        st.sampled_from([f"blocks.{i}.{site}" for i in (0, 0, 1)
                         for site in ("attn.hook_z", "hook_attn_out", "hook_mlp_out")])
        | st.text(max_size=8) | st.none()
    )  # fmt: skip
    width = data.draw(st.sampled_from([30, 48, 36, 6, 1, 31]))
    sae = random_sae(0, width, 40, architecture)
    sae.cfg.metadata.hook_name = hook
    sae.cfg.metadata.hook_head_index = data.draw(st.sampled_from([None, None, None, 0, 4, 9, -1]))
    sae.to(data.draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16])))
    with torch.no_grad():
        parameter = data.draw(st.sampled_from(sorted(dict(sae.named_parameters()))))
        value = data.draw(st.sampled_from([None, None, math.nan, math.inf, 1e30]))
        if value is not None:
            dict(sae.named_parameters())[parameter].view(-1)[0] = value
    host = data.draw(st.sampled_from(["hooked_transformer", "nnsight"]))
    given_as = data.draw(
        st.sampled_from([lambda s: [s], lambda s: s, lambda s: {0: s}, lambda s: {1: s},
                         lambda s: [s, s], lambda s: {"x": s}])
    )  # fmt: skip
    lens = outcome(
        lambda: sap.FeatureLens(
            on_host(model, host), given_as(sae), tokenizer=word_tokenizer(), prepend_bos=False
        )
    )
    if lens is None:
        return
    assert value is None or math.isfinite(value)
    att = outcome(lambda: lens.run("w5 w9 w17").attribute(sap.Logit("w7")))
    assert att is None or att.worst_residual <= 1e-5


# -- files -----------------------------------------------------------------------------------------

damage = st.one_of(
    st.tuples(st.just("flip"), st.floats(0, 1, exclude_max=True), st.integers(0, 7)),
    st.tuples(st.just("cut"), st.floats(0, 1, exclude_max=True), st.just(0)),
    st.tuples(st.just("insert"), st.floats(0, 1, exclude_max=True), st.integers(0, 255)),
    st.tuples(st.just("zero"), st.floats(0, 1, exclude_max=True), st.integers(1, 64)),
)


def damaged(data: bytes, how: list[tuple[str, float, int]]) -> bytes:
    broken = bytearray(data)
    for kind, where, what in how:
        at = int(where * len(broken))
        if not broken:
            break
        if kind == "flip":
            broken[at] ^= 1 << what
        elif kind == "cut":
            del broken[at:]
        elif kind == "insert":
            broken.insert(at, what)
        else:
            broken[at : at + what] = bytes(min(what, len(broken) - at))
    return bytes(broken)


@functools.cache
def _folder() -> Path:
    folder = tempfile.TemporaryDirectory()
    _kept.append(folder)
    return Path(folder.name)


_kept: list[Any] = []


@functools.cache
def _written(ending: str) -> bytes:
    path = _folder() / f"good{ending}"
    if ending == ".att.safetensors":
        sap.save(_demo_attribution(), path)
    elif ending == ".study.json":
        table = pd.DataFrame({"a": [1, 2], "b": [0.1, math.nan], "c": ["x", "y"]})
        Study("quality", {"model": "m"}, {"main": table}).save(path)
    elif ending == ".state":
        save_state(path, {"x": torch.ones(3)}, {"settings": {"a": 1}, "step": 2})
    else:
        sap.save(_demo_attribution().prune(max_nodes=6).to_networkx(), path)
    return path.read_bytes()


def _read(ending: str, data: bytes) -> Any:
    path = _folder() / f"bad{ending}"
    path.write_bytes(data)
    if ending == ".study.json":
        study = load_study(path)
        study._repr_html_()
        return study
    if ending == ".state":
        return load_state(path, {"a": 1})
    return sap.load(path)


ENDINGS = (
    ".json",
    ".graphml",
    ".gexf",
    ".safetensors",
    ".att.safetensors",
    ".study.json",
    ".state",
)


@pytest.mark.parametrize("ending", ENDINGS)
def test_damaged_files(ending: str) -> None:
    good = _written(ending)

    @examples(60)
    @given(st.lists(damage, min_size=1, max_size=3))
    def check(how: Any) -> None:
        found = outcome(lambda: _read(ending, damaged(good, how)))
        if found is not None and ending not in (".study.json", ".state"):
            outcome(lambda: sap.save(found, _folder() / f"again{Path(ending).suffix}"))

    check()


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=4,
)


def _places(document: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Of every value in a document; of long lists, the first and the last."""
    if isinstance(document, dict):
        children = list(document.items())
    elif isinstance(document, list):
        children = list(enumerate(document))
        children = children if len(children) < 4 else [children[0], children[-1]]
    else:
        return [at]
    return [at, *(p for key, value in children for p in _places(value, (*at, key)))]


def _replaced(document: Any, at: tuple[Any, ...], value: Any, remove: bool) -> Any:
    if not at:
        return value
    document = json.loads(json.dumps(document))
    inner = document
    for key in at[:-1]:
        inner = inner[key]
    if remove:
        del inner[at[-1]]
    else:
        inner[at[-1]] = value
    return document


@pytest.mark.parametrize("ending", [".json", ".study.json"])
def test_every_field_of_json_files_with_something_else(ending: str) -> None:
    document = json.loads(_written(ending))
    places = _places(document)

    @examples(150)
    @given(st.sampled_from(places), json_values, st.booleans())
    def check(at: tuple[Any, ...], value: Any, remove: bool) -> None:
        broken = _replaced(document, at, value, remove)
        loaded = outcome(lambda: _read(ending, json.dumps(broken).encode()))
        if loaded is not None and ending == ".json":
            for use in USES:
                outcome(lambda use=use: use(loaded))

    check()


def test_numbers_beyond_what_tables_hold() -> None:
    document, at = json.loads(_written(".study.json")), ("tables", "main", "rows", 1, 0)
    for number in (2**63, -(2**63) - 1):
        data = json.dumps(_replaced(document, at, number, False)).encode()
        assert outcome(lambda data=data: _read(".study.json", data)) is None
    assert outcome(lambda: _demo_run().attribute(sap.Logit(5), weights=[10**400])) is None
    assert outcome(lambda: sap.ScaleFeature(0, 1, 2, 10**400)) is None


def _exported(name: str, **options: Any) -> Callable[[Any], Any]:
    ending = {"html": ".html", "graphml": ".graphml", "gexf": ".gexf",
              "native": ".safetensors"}.get(name, ".json")  # fmt: skip
    return lambda graph: sap.save(graph, _folder() / f"out{ending}", format=name, **options)


# What people do with a graph that they were given.
USES: list[Callable[[Any], Any]] = [
    sap.graph_ledger,
    lambda graph: sap.compare_graphs(graph, small_graph()),
    sap.strongest_paths,
    *(_exported(name) for name in ("json", "native", "graphml", "gexf", "html")),
    _exported("neuronpedia", slug="x", scan="gpt2-small", source_set="att-kk"),
    lambda graph: sap.graph_difference(graph, small_graph()),
    lambda graph: sap.aggregate_graphs([graph, small_graph()]),
]


@pytest.mark.parametrize("part", ["header", "native"])
def test_native_files_with_other_headers(part: str) -> None:
    """Safetensors that are sound, of which the JSON in the header is not."""
    from safetensors import safe_open

    path = _folder() / "good.safetensors"
    _written(".safetensors" if part == "header" else ".att.safetensors")
    path = path if part == "header" else _folder() / "good.att.safetensors"
    with safe_open(path, framework="pt") as file:
        metadata = dict(file.metadata())
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    fields = [(key, at) for key, text in metadata.items() for at in _json_places(text)]

    @examples(100)
    @given(st.sampled_from(fields), json_values, st.sampled_from([*tensors, None]), st.booleans())
    def check(field: Any, value: Any, lost: Any, remove: bool) -> None:
        key, at = field
        kept = {name: tensor for name, tensor in tensors.items() if lost is None or name != lost}
        changed = dict(metadata)
        if lost is None:
            try:
                document = json.loads(metadata[key])
            except json.JSONDecodeError:
                changed[key] = json.dumps(value)
            else:
                changed[key] = json.dumps(_replaced(document, at, value, remove))
        data = save_tensors(kept, metadata=changed)
        loaded = outcome(lambda: _read(".safetensors", data))
        if loaded is not None and hasattr(loaded, "nodes") and not hasattr(loaded, "ledger"):
            outcome(lambda: sap.graph_ledger(loaded))
        elif loaded is not None:
            outcome(lambda: loaded.prune().to_networkx())

    check()


def _json_places(text: str) -> list[tuple[Any, ...]]:
    try:
        return _places(json.loads(text))
    except json.JSONDecodeError:
        return [()]


# -- command lines ---------------------------------------------------------------------------------

TEXT = st.text(st.characters(exclude_characters="\0", codec="utf-8"), max_size=8)


def _options() -> dict[str, list[str]]:
    import typer

    command: Any = typer.main.get_command(cli.app)
    return {
        name: [o for p in one.params for o in (*p.opts, *p.secondary_opts) if o.startswith("--")]
        for name, one in command.commands.items()
        if name != "explore"  # serves until it is stopped
    }


@pytest.fixture(scope="module")
def offline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "graph.json").write_bytes(_written(".json"))
    (folder / "text.txt").write_text("John gave Mary a drink.\n" * 3)
    (folder / "half.json").write_bytes(_written(".json")[:200])
    (folder / "empty.txt").write_text("")
    return folder


def test_command_lines(offline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(offline)
    value = st.sampled_from(
        ["-1", "0", "1", "2", "0.5", "nan", "inf", "1e400", "", " ", "cpu", "cuda:99", "demo",
         "sae-attn-demo", "nowhere", "./nowhere", "graph.json", "half.json", "empty.txt",
         "text.txt", "out.json", "out.png", "x/out.html", "/", ".", "#5", "#999999999999999999999",
         "attn:0:1@0", "attn:99:1@0", "attn:0:1@-999", " Mary", "0-1", "5,5", "[1", "layers=[0]",
         "float16", "nnsight", "quality", "qk-ioi", "=", "x=1"]) | TEXT  # fmt: skip
    options = _options()

    @examples(60)
    @given(st.data())
    def check(data: st.DataObject) -> None:
        command = data.draw(st.sampled_from(sorted(options)))
        arguments = [command]
        if command in ("study", "export", "reproduce") and data.draw(st.integers(0, 9)):
            arguments += data.draw(st.lists(value, max_size=3))
        for name in data.draw(st.lists(st.sampled_from(options[command]), max_size=5, unique=True)):
            arguments += [name] if data.draw(st.integers(0, 9)) == 0 else [name, data.draw(value)]
        if command == "demo" and not any("--" in one for one in arguments):
            return  # the demo itself is tested elsewhere
        before = {path: path.read_bytes() for path in (offline / "text.txt", offline / "half.json")}
        result = CliRunner().invoke(cli.app, arguments)
        error = result.exception
        assert error is None or isinstance(error, SystemExit), (arguments, error)
        assert result.exit_code in (0, 1, 2), arguments
        assert "Traceback" not in result.output
        assert before == {path: path.read_bytes() for path in before}
        assert not list(offline.glob("**/.*.tmp"))

    check()


def test_the_native_reader_is_the_one_that_is_fuzzed() -> None:
    assert callable(native.read)
