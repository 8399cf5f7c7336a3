"""Training on tiny random models: what is saved loads in plain sae_lens, and resuming is exact."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import SAE, StandardTrainingSAEConfig, TopKTrainingSAEConfig
from safetensors.torch import load_file
from torch import Tensor
from transformers import GPT2LMHeadModel

from sae_attn_plugin import training
from sae_attn_plugin.demo import training as demo_training
from sae_attn_plugin.errors import FileError, InputError
from tests.helpers import tiny_gpt2, tiny_llama

D_IN = {"gpt2": 30, "llama": 48}
LAYERS = (0, 2)


def z_of(kind: str) -> training.ZSource:
    return training.z_source(tiny_gpt2() if kind == "gpt2" else tiny_llama())


def tokens_of(round_: int) -> Tensor:
    return torch.randint(1, 61, (16, 16), generator=torch.Generator().manual_seed(round_))


def train(out: Path, kind: str = "gpt2", tokens: Any = tokens_of, **options: Any):
    settings: dict[str, Any] = dict(
        layers=LAYERS,
        out=out,
        model_name="tiny",
        context_size=16,
        n_tokens=64 * 300,
        batch_size=64,
        lr=3e-3,
        dead_feature_window=50,
        progress=False,
    )
    config = options.pop("config", training.attention_z_config(D_IN[kind], d_sae=64, k=6))
    source = options.pop("source", z_of(kind))
    return training.train_saes(source, tokens, config, **{**settings, **options})


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def trained(request, tmp_path_factory: pytest.TempPathFactory):
    return request.param, train(tmp_path_factory.mktemp(request.param), request.param)


def test_saved_sae_is_plain_sae_lens(trained) -> None:
    _, folders = trained
    assert sorted(folders) == sorted(LAYERS)
    for layer, folder in folders.items():
        assert folder.name == f"blocks.{layer}.attn.hook_z"
        files = {"cfg.json", "sae_weights.safetensors", "sparsity.safetensors"}
        assert {path.name for path in folder.iterdir()} == files
        config = json.loads((folder / "cfg.json").read_text())
        assert config["architecture"] == "jumprelu"
        assert config["reshape_activations"] == "hook_z"
        assert config["normalize_activations"] == "none"
        metadata = config["metadata"]
        assert metadata["hook_name"] == folder.name
        assert metadata["model_name"] == "tiny"
        assert metadata["hook_head_index"] is None
        assert metadata["context_size"] == 16
        assert metadata["prepend_bos"] is True
        sparsity = load_file(folder / "sparsity.safetensors")["sparsity"]
        assert sparsity.shape == (64,)
        assert (sparsity <= 0).all()


def test_saved_sae_reconstructs(trained) -> None:
    """Plain sae_lens on ``hook_z`` gives what the file's own numbers give, and is a good fit."""
    kind, folders = trained
    z = z_of(kind)(tokens_of(10_000))
    heads = 5 if kind == "gpt2" else 6
    for layer, folder in folders.items():
        sae = SAE.load_from_disk(folder)
        with torch.no_grad():
            got = sae(z[layer].unflatten(-1, (heads, -1))).flatten(-2)
        weights = load_file(folder / "sae_weights.safetensors")
        pre = (z[layer] - weights["b_dec"]) @ weights["W_enc"] + weights["b_enc"]
        features = torch.where(pre > weights["threshold"], pre.relu(), 0)
        expected = features @ weights["W_dec"] + weights["b_dec"]
        assert (got - expected).abs().max() < 1e-6
        flat = z[layer].flatten(0, 1)
        left = (expected.flatten(0, 1) - flat).square().sum()
        assert left < 0.5 * (flat - flat.mean(0)).square().sum()
        assert 3 < (features != 0).sum(-1).float().mean() < 9


@pytest.mark.parametrize("kind", ["topk", "standard"])
def test_other_architectures(kind: str, tmp_path: Path) -> None:
    config = {
        "topk": TopKTrainingSAEConfig(d_in=30, d_sae=64, k=6),
        "standard": StandardTrainingSAEConfig(d_in=30, d_sae=64, l1_coefficient=0.1),
    }[kind]
    folder = train(tmp_path, config=config, layers=[1], n_tokens=64 * 20)[1]
    sae = SAE.load_from_disk(folder)
    assert sae.cfg.architecture() == kind
    assert sae.cfg.reshape_activations == "hook_z"
    assert config.reshape_activations == "none"  # the caller's config is left alone


def test_training_resumes_exactly(tmp_path: Path) -> None:
    checkpoint = tmp_path / "state.safetensors"
    run: dict[str, Any] = dict(n_tokens=64 * 50, checkpoint=checkpoint, checkpoint_every=3)
    whole = train(tmp_path / "whole", n_tokens=64 * 50)

    def interrupted(round_: int) -> Tensor:
        if round_ == 8:
            raise KeyboardInterrupt
        return tokens_of(round_)

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "resumed", tokens=interrupted, **run)
    assert checkpoint.exists()
    assert not (tmp_path / "resumed").exists()
    with pytest.raises(FileError, match="other settings"):
        train(tmp_path / "resumed", lr=1e-4, **run)
    seen: list[int] = []

    def counted(round_: int) -> Tensor:
        seen.append(round_)
        return tokens_of(round_)

    resumed = train(tmp_path / "resumed", tokens=counted, **run)
    assert seen[0] == 6
    assert not checkpoint.exists()
    for layer in LAYERS:
        for name in ("sae_weights.safetensors", "sparsity.safetensors"):
            left, right = load_file(whole[layer] / name), load_file(resumed[layer] / name)
            assert all(torch.equal(left[key], right[key]) for key in left)


def test_bad_input_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no z for layers"):
        train(tmp_path, layers=[0, 7])
    with pytest.raises(InputError, match="expected"):
        train(tmp_path, config=training.attention_z_config(31, d_sae=64))
    with pytest.raises(InputError, match="fewer than one batch"):
        train(tmp_path, batch_size=1024)
    with pytest.raises(InputError, match=r"no z for layers \[9\]"):
        training.z_source(tiny_gpt2(), [1, 9])
    assert not list(tmp_path.iterdir())


def test_model_learns_and_resumes_exactly(tmp_path: Path) -> None:
    recipe = demo_training.ModelRecipe(steps=12, lr=3e-3, warm_up=3)
    rows = torch.arange(1, 17).repeat(8, 1)

    def tokens(step: int) -> Tensor:
        return (rows * (step % 3 + 1)) % 61

    def fresh() -> GPT2LMHeadModel:
        model = tiny_gpt2()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        return model

    first = demo_training.train_model(fresh(), tokens, replace(recipe, steps=1), progress=False)
    whole = fresh()
    loss = demo_training.train_model(whole, tokens, recipe, progress=False)
    assert loss < first
    assert not whole.training

    def interrupted(step: int) -> Tensor:
        if step == 8:
            raise KeyboardInterrupt
        return tokens(step)

    options: dict[str, Any] = dict(
        checkpoint=tmp_path / "model.safetensors", checkpoint_every=5, progress=False
    )
    with pytest.raises(KeyboardInterrupt):
        demo_training.train_model(fresh(), interrupted, recipe, **options)
    resumed = fresh()
    demo_training.train_model(resumed, tokens, recipe, **options)
    for left, right in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(left, right)
    with pytest.raises(FileError, match="other settings"):
        demo_training.train_model(resumed, tokens, replace(recipe, lr=1.0), **options)
