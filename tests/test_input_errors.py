"""Every bad input gives one clear error of this package: what was given, what to do."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import LensMaker
from helpers import random_sae, random_saes, tiny_gpt2, tiny_llama, word_tokenizer

import sae_attn_plugin as sap
from sae_attn_plugin import errors

OWN = (sap.InputError, sap.UnsupportedError, sap.BackendError, sap.FileError)


@contextmanager
def refused(error: type[errors.SaeAttnError], message: str) -> Iterator[None]:
    """Exactly this type of the package, with a message of one line."""
    with pytest.raises(errors.SaeAttnError) as caught:
        yield
    assert type(caught.value) is error
    text = str(caught.value)
    assert re.search(message, text), text
    assert "\n" not in text


def test_the_types_are_also_what_callers_expect() -> None:
    assert issubclass(sap.InputError, ValueError)
    assert issubclass(sap.UnsupportedError, NotImplementedError)
    assert issubclass(sap.BackendError, RuntimeError)
    assert issubclass(sap.FileError, OSError)
    assert all(issubclass(error, sap.SaeAttnError) for error in OWN)


def test_tests_have_no_network() -> None:
    import socket

    with socket.socket() as one, pytest.raises(RuntimeError, match="a test tried to connect"):
        one.connect(("192.0.2.1", 443))


# -- prompts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "the prompt is empty"),
        (" \n ", "no tokens"),
        (["w3", ""], "the prompt is empty"),
        ([], "no prompt given; expected a string"),
        ((), "no prompt given"),
        ([[]], r"got shape \(1, 0\)"),
        (torch.empty(0, dtype=torch.long), "no prompt given"),
        (torch.tensor(5), r"expected integer token ids.*got shape \(\)"),
        (5, "expected a string, a list of strings or token ids, got 5"),
        (None, "got None"),
        (3.5, "got 3.5"),
        (b"w3", "got b'w3'"),
        ({"prompt": "w3"}, "got {'prompt': 'w3'}"),
        ([1.0, 2.0], r"expected integer token ids.*got shape \(1, 2\) of torch\.float32"),
        (torch.tensor([[1.5]]), r"of torch\.float32"),
        ([True, False], r"of torch\.bool"),
        ([[1, 2], 3], r"must form a rectangle \[batch, position\]"),
        ([[1, 2], []], r"got shape \(1, 0\)"),
        ([[1, 2], [61]], r"must lie in 0\.\.60, got 61\.\.61"),
        (["w3", 4], "must form a rectangle"),
        (torch.zeros(1, 1, 1, dtype=torch.long), r"got shape \(1, 1, 1\)"),
        ([3, -1], r"must lie in 0\.\.60, got -1\.\.3"),
        ([3, 61], r"must lie in 0\.\.60, got 3\.\.61"),
        ([3] * 41, "has 41 tokens, but the model's context is 40; shorten"),
        (" ".join(["w3"] * 41), "has 41 tokens, but the model's context is 40"),
        ("w3 zebra w4", "the tokenizer does not know: 'zebra'; use words of its vocabulary"),
        (["w3", "quagga"], "does not know: 'quagga'"),
    ],
    ids=ascii,
)
def test_prompts(lens_of: LensMaker, prompt: Any, message: str) -> None:
    for host in ("hooked_transformer", "nnsight"):
        with refused(sap.InputError, message):
            lens_of("gpt2", host).run(prompt)


def test_prompts_that_are_fine(lens_of: LensMaker) -> None:
    lens = lens_of("gpt2")
    expected = [[3, 4]]
    prompts: tuple[Any, ...] = (
        "w3 w4",
        ["w3 w4"],
        [3, 4],
        [[3, 4]],
        np.array([3, 4]),
        torch.tensor([3, 4]),
    )
    for prompt in prompts:
        assert lens.run(prompt).tokens.tolist() == expected
    assert lens.run([3] * 40).tokens.shape == (1, 40)


def test_strings_need_a_tokenizer() -> None:
    model = tiny_gpt2(n_layers=1)
    lens = sap.FeatureLens(model, random_saes(model))
    with refused(sap.InputError, "no tokenizer; pass tokenizer= to FeatureLens, or give token ids"):
        lens.run("w3")
    with refused(sap.InputError, "no tokenizer; pass tokenizer="):
        lens.run([3]).attribute(sap.Logit("w3"))


def test_bos_needs_a_bos_token() -> None:
    model, tokenizer = tiny_gpt2(n_layers=1), word_tokenizer(False)
    import copy

    without = copy.deepcopy(tokenizer)
    without.bos_token = None
    lens = sap.FeatureLens(model, random_saes(model), tokenizer=without, prepend_bos=True)
    with refused(sap.InputError, "prepend_bos=True, but the tokenizer has no BOS token"):
        lens.run("w3")


# -- targets and questions -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (sap.Logit("w5 w6"), r"'w5 w6' is 2 tokens \['w5', 'w6'\]; expected exactly one"),
        (sap.Logit(""), r"'' is 0 tokens \[\]; expected exactly one"),
        (sap.Logit("zebra"), "the tokenizer does not know 'zebra'"),
        (sap.Logit(61), r"token id 61 is outside the vocabulary, 0\.\.60"),
        (sap.Logit(-1), "token id -1 is outside the vocabulary"),
        (sap.Logit(5.0), r"expected a token string or id, got 5\.0"),  # type: ignore[arg-type]
        (sap.Logit(None), "expected a token string or id, got None"),  # type: ignore[arg-type]
        (sap.Logit(5, position=7), r"position 7 is out of range: the prompt has 7 tokens \(0\.\.6"),
        (sap.Logit(5, position=-8), "position -8 is out of range"),
        (sap.Logit(5, position=1.5), r"position must be an integer, got 1\.5"),  # type: ignore[arg-type]
        (sap.Logit(5, position="3"), "position must be an integer, got '3'"),  # type: ignore[arg-type]
        (sap.LogitDiff("w5", "w6 w7"), "'w6 w7' is 2 tokens"),
        (sap.LogitDiff("w5", 5), 'LogitDiff of the token "w5" with itself is always 0'),
        (sap.Feature(3, 0, 0), "no SAE in layer 3; layers with one: 0, 1, 2"),
        (sap.Feature(-1, 0, 0), "no SAE in layer -1"),
        (sap.Feature(0, 40, 0), r"feature 40 is out of range: the SAE of layer 0 has 40 features"),
        (sap.Feature(0, -1, 0), "feature -1 is out of range"),
        (sap.Feature(0, 2.5, 0), r"feature must be an integer, got 2\.5"),  # type: ignore[arg-type]
        (sap.Feature(0, 0, 7), "position 7 is out of range"),
        (sap.Direction(torch.ones(29)), r"Direction: expected a vector \[30\], got \[29\]"),
        (sap.Direction(torch.ones(1, 30)), r"expected a vector \[30\], got \[1, 30\]"),
        (sap.Direction(torch.full((30,), math.nan)), "the vector holds NaN"),
        (sap.Direction([1.0] * 30), r"Direction: expected a vector \[30\], got a list"),  # type: ignore[arg-type]
        (sap.Direction(torch.ones(30), 9), "position 9 is out of range"),
        (
            "logit",
            "expected a Feature, Logit, LogitDiff, Direction or HeadScore as target, got 'logit'",
        ),
        (5, "as target, got 5"),
        ([], "no target given"),
        ([sap.Logit(5), sap.Logit("w5")], 'the same target twice: logit:"w5"@6'),
        ([sap.Feature(0, 1, 6), sap.Feature(0, 1, -1)], "the same target twice: attn:0:1@6"),
    ],
    ids=lambda value: ascii(value)[:50] if not isinstance(value, sap.Direction) else "direction",
)
def test_targets(lens_of: LensMaker, target: Any, message: str) -> None:
    run = lens_of("gpt2").run([3, 57, 7, 19, 7, 13, 2])
    with refused(sap.InputError, message):
        run.attribute(target)


def test_integers_of_other_libraries_are_integers(lens_of: LensMaker) -> None:
    """What a DataFrame or a tensor gives back can be asked about."""
    run = lens_of("gpt2").run([3, 57, 7])
    row = run.features(1).iloc[0]
    layer, feature, position = (row[name] for name in ("layer", "feature", "position"))
    att = run.attribute(sap.Feature(layer, feature, position))
    (root,) = att.roots.values()
    assert sap.Node.parse(str(root)) == root
    by_tensor = run.attribute(sap.Logit(run.logits[0, -1].argmax()))  # type: ignore[arg-type]
    (root,) = by_tensor.roots.values()
    assert sap.Node.parse(str(root)) == root
    for token in (np.int64(5), torch.tensor(5)):
        (node,) = run.attribute(sap.Logit(token)).roots.values()  # type: ignore[arg-type]
        assert str(node) == 'logit:"w5"@2'
    assert run.dfa(np.int64(1), np.int64(3), np.int64(-1)).position == 2  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda run: run.attribute(sap.Logit(5), node_budget=-1), "node_budget=-1 is out of range"),
        (lambda run: run.attribute(sap.Logit(5), edges_per_target=0), "edges_per_target=0 is out"),
        (lambda run: run.dfa(3, 0), "no SAE in layer 3"),
        (lambda run: run.dfa(0, 40), "feature 40 is out of range"),
        (lambda run: run.dfa(0, 0, 7), "position 7 is out of range"),
        (lambda run: run.dfa_by_source(3, [0]), "no SAE in layer 3"),
        (lambda run: run.dfa_by_source(0, [0, 40]), "feature 40 is out of range"),
        (lambda run: run.dfa_by_source(0, torch.zeros(2, 2)), "feature must be an integer"),
        (lambda run: run.features(5), "no SAE in layer 5"),
        (lambda run: run.features(0, -8), "position -8 is out of range"),
        (lambda run: run.attribute(sap.Logit(5)).prune(nodes=0), r"prune\(nodes=0\)"),
        (lambda run: run.attribute(sap.Logit(5)).prune(edges=1.1), r"prune\(edges=1\.1\)"),
        (lambda run: run.attribute(sap.Logit(5)).prune(nodes=math.nan), r"prune\(nodes=nan\)"),
        (lambda run: run.attribute(sap.Logit(5)).prune(max_nodes=0), r"prune\(max_nodes=0\)"),
        (lambda run: run.attribute(sap.Logit(5)).to_networkx(by="layer"), "by='layer'"),
    ],
)
def test_questions(lens_of: LensMaker, ask: Callable[[Any], Any], message: str) -> None:
    run = lens_of("gpt2").run([3, 57, 7, 19, 7, 13, 2])
    with refused(sap.InputError, message):
        ask(run)


# -- models and SAEs -------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["gpt2", 3, None, torch.nn.Linear(2, 2)])
def test_things_that_are_no_model(model: Any) -> None:
    with refused(sap.InputError, "not a model this package can host; expected a HookedTransformer"):
        sap.FeatureLens(model, [random_sae(0, 30)])


def test_a_model_with_nan_weights() -> None:
    model: Any = tiny_llama(n_layers=2)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = math.nan
    with refused(sap.BackendError, "NaN|largest difference nan"):
        sap.FeatureLens(model, random_saes(model))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "gpt2-small-hook-z-k",
            "neither a folder nor a sae_lens release; did you mean gpt2-small-hook-z-kk",
        ),
        ("no-such-thing-at-all", "neither a folder nor a sae_lens release"),
        ("/no/such/folder", "'/no/such/folder' is neither a folder nor a sae_lens release"),
        (Path("no") / "such", "is neither a folder nor a sae_lens release"),
    ],
)
def test_releases_and_paths_that_do_not_exist(source: str | Path, message: str) -> None:
    with refused(sap.InputError, message):
        sap.load_saes(source)
    with refused(sap.InputError, message):
        sap.FeatureLens(tiny_gpt2(n_layers=1), source)


def test_a_release_without_a_network() -> None:
    with refused(sap.FileError, "cannot load .* of the release 'gpt2-small-hook-z-kk'"):
        sap.load_saes("gpt2-small-hook-z-kk")


def _no_weights(folder: Path) -> None:
    (folder / "sae_weights.safetensors").unlink()


def _cut_weights(folder: Path) -> None:
    path = folder / "sae_weights.safetensors"
    path.write_bytes(path.read_bytes()[:-40])


def _no_json(folder: Path) -> None:
    (folder / "cfg.json").write_text("{not json")


def _other_json(folder: Path) -> None:
    (folder / "cfg.json").write_text(json.dumps({"model_type": "gpt2"}))


def _other_shape(folder: Path) -> None:
    path = folder / "cfg.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "d_sae": 41}))


def _other_architecture(folder: Path) -> None:
    path = folder / "cfg.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "architecture": "hypersae"}))


@pytest.mark.parametrize(
    "damage",
    [_no_weights, _cut_weights, _no_json, _other_json, _other_shape, _other_architecture],
)
def test_damaged_saes(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    random_sae(0, 30).save_model(tmp_path / "sae")
    damage(tmp_path / "sae")
    with refused(sap.FileError, rf"cannot load the SAE in {re.escape(str(tmp_path / 'sae'))}"):
        sap.load_saes(tmp_path)


def test_a_folder_without_saes(tmp_path: Path) -> None:
    (tmp_path / "something").mkdir()
    with refused(sap.InputError, r"no SAE in the folder .*; expected cfg\.json"):
        sap.load_saes(tmp_path)


@pytest.mark.parametrize("backend", ["transformer_lens", "transformer_bridge", "nnsight"])
def test_models_that_do_not_exist(tmp_path: Path, backend: Any) -> None:
    with refused(sap.InputError, r"holds no model: config\.json is missing"):
        sap.load_model(tmp_path, backend)
    with refused(sap.InputError, "no such folder: /no/such/model"):
        sap.load_model("/no/such/model", backend)
    with refused(sap.InputError, "cannot load the model 'no-such-model-at-all'"):
        sap.load_model("no-such-model-at-all", backend)


def test_an_unknown_backend(tmp_path: Path) -> None:
    with refused(sap.InputError, "unknown backend 'jax'; known: transformer_lens"):
        sap.load_model(tmp_path, "jax")  # type: ignore[arg-type]
