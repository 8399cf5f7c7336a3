"""Attention's hook points on Hugging Face models and bridges, and sae_lens' tools on them."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from architecture_models import RECIPES
from datasets import Dataset
from helpers import bridge, hooks_on, random_sae, tiny_gpt2, word_tokenizer
from nnsight import NNsight
from sae_lens import SAE, LanguageModelSAETrainingRunner, StandardTrainingSAEConfig
from sae_lens.config import CacheActivationsRunnerConfig
from sae_lens.evals import EvalConfig, run_evals
from sae_lens.training.activation_scaler import ActivationScaler
from sae_lens.training.activations_store import ActivationsStore

import sae_attn_plugin as sap
from sae_attn_plugin.backends import as_backend
from sae_attn_plugin.backends.architectures import ARCHITECTURES
from sae_attn_plugin.backends.hooked import HOOKS, HookedModel, hooked
from sae_attn_plugin.backends.loading import to_hooked_transformer
from sae_attn_plugin.backends.protocol import Site
from sae_attn_plugin.errors import BackendError, InputError, UnsupportedError
from sae_attn_plugin.training import cache_activations, recipe

FAMILIES = ("gpt2", "llama", "gemma2")
TOKENS = torch.randint(2, 61, (2, 9), generator=torch.Generator().manual_seed(0))
Z = "blocks.1.attn.hook_z"
SITES = {
    "hook_resid_pre": "resid_pre",
    "attn.hook_v": "v",
    "attn.hook_z": "z",
    "attn.hook_pattern": "pattern",
    "hook_attn_out": "attn_out",
    "hook_mlp_out": "mlp_out",
}


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="To copy construct|The training dataset")
        yield


@pytest.mark.parametrize("other", ["hook points", "lens"])
def test_threads_on_one_model_take_turns(other: str) -> None:
    """While one is within a hook, the other waits: neither sees the other's pass."""
    model, tokens = tiny_gpt2(), TOKENS.flip(0) % 40 + 2
    first, lens = HookedModel(model), sap.FeatureLens(model, {})

    def z(tokens: torch.Tensor) -> torch.Tensor:
        if other == "lens":
            return lens.run(tokens).capture["z", 1]
        with torch.no_grad():
            return first.run_with_cache(tokens, names_filter=Z)[1][Z]

    alone, inside, done, seen = z(tokens), threading.Event(), threading.Event(), []

    def hook(z: torch.Tensor, hook: Any) -> torch.Tensor:  # noqa: ARG001
        seen.append(z.clone())
        inside.set()
        assert not done.wait(0.5)
        return torch.zeros_like(z)

    def second() -> torch.Tensor:
        assert inside.wait(30)
        found = z(tokens)
        done.set()
        return found

    with ThreadPoolExecutor(1) as pool, torch.no_grad():
        expected = first.run_with_hooks(TOKENS, fwd_hooks=[(Z, lambda z, hook: 0 * z)])  # noqa: ARG005
        waiting = pool.submit(second)
        edited = first.run_with_hooks(TOKENS, fwd_hooks=[(Z, hook)])
        torch.testing.assert_close(waiting.result(60), alone, rtol=0, atol=0)
    torch.testing.assert_close(edited, expected, rtol=0, atol=0)
    assert len(seen) == 1
    torch.testing.assert_close(seen[0], z(TOKENS), rtol=0, atol=0)


@pytest.mark.parametrize("name", RECIPES)
def test_hook_points_are_what_transformer_lens_has(name: str) -> None:
    """Against HookedTransformer where it can hold the model, else against nnsight."""
    model = RECIPES[name].build()
    with torch.no_grad():
        logits, found = HookedModel(model).run_with_cache(TOKENS)
        assert torch.equal(logits, model(TOKENS, use_cache=False).logits)
    assert hooks_on(model) == 0
    try:
        reference: Any = to_hooked_transformer(model)
    except UnsupportedError:
        read = [Site(site, layer) for layer in range(3) for site in SITES.values()]
        values = as_backend(NNsight(model)).forward(TOKENS, reads=read)
        expected = {
            f"blocks.{layer}.{hook}": values[Site(site, layer)]
            for layer in range(3)
            for hook, site in SITES.items()
        }
    else:
        with torch.no_grad():
            expected = reference.run_with_cache(TOKENS)[1]
    assert len(found) == 3 * len(HOOKS)
    for layer in range(3):
        for hook in HOOKS:
            key = f"blocks.{layer}.{hook}"
            if key not in expected:
                assert hook == "hook_resid_post"  # no site of the engine
                continue
            assert found[key].shape == expected[key].shape
            torch.testing.assert_close(found[key], expected[key], atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_bridge_has_the_names_of_hooked_transformer(name: str) -> None:
    model = RECIPES[name].build()
    ours = HookedModel(bridge(model))
    with torch.no_grad():
        logits, found = ours.run_with_cache(TOKENS)
        expected, cache = HookedModel(model).run_with_cache(TOKENS)
        torch.testing.assert_close(logits, expected, atol=2e-5, rtol=1e-5)
        for key, value in cache.items():
            torch.testing.assert_close(found[key], value, atol=2e-5, rtol=1e-5)
        for edit in ("attn.hook_z", "attn.hook_v", "attn.hook_pattern"):
            hook = (f"blocks.1.{edit}", _halve)
            edited = ours.run_with_hooks(TOKENS, fwd_hooks=[hook])
            assert not torch.allclose(edited, logits)
            if edit != "attn.hook_pattern":
                other = HookedModel(model).run_with_hooks(TOKENS, fwd_hooks=[hook])
                torch.testing.assert_close(edited, other, atol=2e-5, rtol=1e-5)
        assert torch.equal(ours(TOKENS), logits)


def _halve(value: torch.Tensor, hook: Any) -> torch.Tensor:  # noqa: ARG001
    return value / 2


def _halve_in_place(value: torch.Tensor, hook: Any) -> None:  # noqa: ARG001
    value[..., 1] /= 2


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("hook", [h for h in HOOKS if h != "attn.hook_pattern"])
@pytest.mark.parametrize("edit", [_halve, _halve_in_place])
def test_edits_do_what_they_do_on_hooked_transformer(name: str, hook: str, edit: Any) -> None:
    model = RECIPES[name].build()
    hooks: Any = [(f"blocks.1.{hook}", edit)]
    with torch.no_grad():
        got = hooked(model).run_with_hooks(TOKENS, fwd_hooks=hooks)
        expected = to_hooked_transformer(model).run_with_hooks(TOKENS, fwd_hooks=hooks)
        assert not torch.allclose(expected, model(TOKENS).logits)
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-5)
    assert hooks_on(model) == 0


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_reach_hook_z(name: str) -> None:
    model = RECIPES[name].build()
    grads: list[torch.Tensor] = []

    def keep(grad: torch.Tensor, hook: Any) -> None:  # noqa: ARG001
        grads.append(grad.detach().clone())

    for host in (hooked(model), to_hooked_transformer(model)):
        with host.hooks(bwd_hooks=[("blocks.1.attn.hook_z", keep)]):
            logits: Any = host(TOKENS)
            (logits[:, -1, 7] - logits[:, -1, 9]).sum().backward()
    assert grads[0].shape == grads[1].shape
    torch.testing.assert_close(grads[0], grads[1], atol=2e-5, rtol=1e-4)


def test_stopping_early_gives_the_residual_stream() -> None:
    model = tiny_gpt2()
    ours, theirs = hooked(model), to_hooked_transformer(model)
    calls = []
    model.transformer.h[2].register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        for stop in (0, 1, 2, -1, 3):
            expected = theirs(TOKENS, stop_at_layer=stop)
            torch.testing.assert_close(ours(TOKENS, stop_at_layer=stop), expected)
    assert len(calls) == 1  # for 3 only
    with pytest.raises(InputError, match="3 layers"):
        ours(TOKENS, stop_at_layer=4)


def test_loss_and_text() -> None:
    model = tiny_gpt2()
    ours = HookedModel(model, word_tokenizer())
    theirs = to_hooked_transformer(model, word_tokenizer())
    with torch.no_grad():
        for kind in ("loss", "both"):
            got, expected = ours(TOKENS, return_type=kind), theirs(TOKENS, return_type=kind)
            torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
        per_token = ours(TOKENS, return_type="loss", loss_per_token=True)
        assert per_token.shape == (2, 8)
        ids = ours.to_tokens("w3 w4 w5")
        assert ids.tolist() == [[0, 3, 4, 5]]
        assert ours.to_tokens("w3 w4", prepend_bos=False).tolist() == [[3, 4]]
        assert torch.equal(ours("w3 w4 w5"), ours(ids))
    with pytest.raises(InputError, match="unequal"):
        ours.to_tokens(["w3", "w3 w4"])
    with pytest.raises(InputError, match="no tokenizer"):
        HookedModel(model)("w3")


# -- refusals --------------------------------------------------------------------------------------


def test_a_hook_that_does_not_exist_raises_everywhere(tmp_path: Path) -> None:
    model = HookedModel(tiny_gpt2(), word_tokenizer())
    for wrong in ("blocks.1.attn.hook_q", "blocks.9.attn.hook_z", "transformer.h.0.attn"):
        with pytest.raises(InputError, match="no hook point"):
            model.run_with_hooks(TOKENS, fwd_hooks=[(wrong, _halve)])
        with pytest.raises(InputError, match="no hook point"):
            model.run_with_cache(TOKENS, names_filter=[wrong])
        with pytest.raises(InputError, match="no hook point"):
            model.add_hook(wrong, _halve)
        with pytest.raises(InputError, match="no hook point"):
            _store(model, hook_name=wrong).get_activations(TOKENS)
        cfg = CacheActivationsRunnerConfig(**_caching(tmp_path), hook_name=wrong, d_in=30)
        with pytest.raises(InputError, match="no hook point"):
            cache_activations(cfg, model, _dataset())
    # sae_lens' caching runner knows no single heads.
    cfg = CacheActivationsRunnerConfig(**_caching(tmp_path), hook_name=Z, d_in=6)
    with pytest.raises(InputError, match="never one"):
        cache_activations(cfg, model, _dataset())
    with pytest.raises(InputError, match=r"did you mean blocks.1.attn.hook_z"):
        model.run_with_cache(TOKENS, names_filter="blocks.1.hook_z")
    with pytest.raises(InputError, match="filter finds no"):
        model.run_with_hooks(TOKENS, fwd_hooks=[(lambda name: "mlp_in" in name, _halve)])
    with pytest.raises(InputError, match="finds no hook point"):
        model.run_with_cache(TOKENS, names_filter=lambda name: "mlp_in" in name)
    cfg = recipe(model, 1, context_size=16, hook_name="blocks.7.attn.hook_z")
    with pytest.raises(InputError, match="no hook point"):
        LanguageModelSAETrainingRunner(cfg, _dataset(), model).run()


def test_patterns_are_read_only_and_need_eager_attention() -> None:
    model = tiny_gpt2()
    ours = HookedModel(model)
    with pytest.raises(UnsupportedError, match="can only be read"):
        ours.run_with_hooks(TOKENS, fwd_hooks=[("blocks.1.attn.hook_pattern", _halve)])
    model.set_attn_implementation("sdpa")
    ours = HookedModel(model)
    z = ours.run_with_cache(TOKENS, names_filter="blocks.1.attn.hook_z")[1]
    assert len(z) == 1
    with pytest.raises(BackendError, match="eager"):
        ours.run_with_cache(TOKENS, names_filter="blocks.1.attn.hook_pattern")


def test_models_that_are_refused() -> None:
    model = tiny_gpt2()
    with pytest.raises(InputError, match="training mode"):
        HookedModel(model.train())
    model.eval()
    with pytest.raises(InputError, match="expected a Hugging Face model"):
        hooked(torch.nn.Linear(2, 2))
    with pytest.raises(InputError, match="context is 40"):
        hooked(model)(torch.zeros(1, 41, dtype=torch.long))
    with pytest.raises(InputError, match="return_type"):
        hooked(model)(TOKENS, return_type="logit")
    # A wrong row of the table: another module's input is not z.
    known = ARCHITECTURES["gpt2"]
    sap.register_architecture(replace(known, post_norm="ln_2"))
    try:
        with pytest.raises(BackendError, match="what attention adds"):
            HookedModel(model)
    finally:
        sap.register_architecture(known)


def test_hosts_come_back_as_they_should() -> None:
    model = tiny_gpt2()
    plain = to_hooked_transformer(model)
    assert hooked(plain) is plain
    ours = hooked(NNsight(model))
    assert ours is hooked(ours)
    lens = sap.FeatureLens(ours, [random_sae(1, 30)])
    assert lens.backend.host == "nnsight"


def test_a_bridge_that_had_saes_attached_keeps_its_hook_points() -> None:
    """sae_lens' SAETransformerBridge: its own alias hooks never fire, and attaching breaks more."""
    from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge

    model = tiny_gpt2()
    theirs = bridge(model)
    theirs.__class__ = SAETransformerBridge
    theirs._acts_to_saes, theirs._transcoder_output_hooks = {}, {}
    ours = HookedModel(theirs)
    name = "blocks.1.attn.hook_z"
    with torch.no_grad():
        before = ours.run_with_cache(TOKENS, names_filter=name)[1][name]
        expected = HookedModel(model).run_with_cache(TOKENS, names_filter=name)[1][name]
        torch.testing.assert_close(before, expected, atol=1e-5, rtol=1e-5)
        sae = random_sae(1, 30)
        sae.cfg.metadata.hook_name = "blocks.1.attn.o.hook_in"
        sae.turn_off_forward_pass_hook_z_reshaping()
        theirs.add_sae(sae)
        theirs.reset_saes()
        after = ours.run_with_cache(TOKENS, names_filter=name)[1][name]
        assert after.shape == (2, 9, 5, 6)
        assert torch.equal(before, after)
        edited = ours.run_with_hooks(TOKENS, fwd_hooks=[(name, _halve)])
        assert not torch.allclose(edited, ours(TOKENS))


def test_a_hook_point_that_is_not_reached_raises() -> None:
    model = tiny_gpt2()
    ours = HookedModel(model)
    # a block that calls none of its modules
    model.transformer.h[1].forward = lambda x, *_, **__: x
    with pytest.raises(BackendError, match=r"never reached.*blocks.1.attn.hook_z"):
        ours.run_with_cache(TOKENS, names_filter="blocks.1.attn.hook_z")


# -- sae_lens' tools -------------------------------------------------------------------------------


def _dataset(n: int = 64) -> Dataset:
    rows = torch.randint(1, 61, (n, 16), generator=torch.Generator().manual_seed(3))
    return Dataset.from_dict({"input_ids": rows.tolist()})


def _store(model: Any, **changes: Any) -> ActivationsStore:
    options: dict[str, Any] = {
        "hook_name": "blocks.1.attn.hook_z",
        "hook_head_index": None,
        "d_in": model.cfg.n_heads * model.cfg.d_head,
        "context_size": 16,
        "streaming": False,
        "n_batches_in_buffer": 4,
        "total_training_tokens": 64,
        "store_batch_size_prompts": 4,
        "train_batch_size_tokens": 16,
        "prepend_bos": False,
        "normalize_activations": "none",
        "device": torch.device("cpu"),
        "dtype": "float32",
    }
    return ActivationsStore(model=model, dataset=_dataset(), **{**options, **changes})


def _caching(folder: Path) -> dict[str, Any]:
    return {
        "dataset_path": "",
        "model_name": "tiny",
        "model_batch_size": 4,
        "training_tokens": 16 * 16,
        "context_size": 16,
        "buffer_size_gb": 3e-5,
        "new_cached_activations_path": str(folder / "cache"),
        "streaming": False,
        "prepend_bos": False,
        "shuffle": False,
    }


@pytest.mark.parametrize("name", FAMILIES)
def test_sae_lens_tools_see_the_same_z_on_every_host(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Store, training runner, run_evals and caching runner, on Hugging Face and on TL."""
    model = RECIPES[name].build()
    hosts = {
        "huggingface": HookedModel(model, word_tokenizer()),
        "bridge": HookedModel(bridge(model), word_tokenizer()),
        "hooked_transformer": to_hooked_transformer(model, word_tokenizer()),
    }
    d_in = hosts["huggingface"].cfg.n_heads * hosts["huggingface"].cfg.d_head
    seen: dict[str, list[torch.Tensor]] = {}
    for host, hosted in hosts.items():
        store = _store(hosted)
        caplog.clear()
        z = store.get_activations(TOKENS)
        if host != "hooked_transformer":  # where sae_lens logs an error for every batch
            assert not caplog.records
        torch.manual_seed(0)  # of the mixing buffer and the SAE
        sae_config = StandardTrainingSAEConfig(
            d_in=d_in, d_sae=24, l1_coefficient=0.1, reshape_activations="hook_z"
        )
        cfg = recipe(
            hosted,
            1,
            sae=sae_config,
            context_size=16,
            training_tokens=16 * 40,
            train_batch_size_tokens=16,
            n_batches_in_buffer=8,
            store_batch_size_prompts=4,
            is_dataset_tokenized=True,
            streaming=False,
            output_path=str(tmp_path / host),
            checkpoint_path=None,
        )
        LanguageModelSAETrainingRunner(cfg, _dataset(), hosted).run()
        sae = SAE.load_from_disk(tmp_path / host)
        assert sae.cfg.metadata.hook_name == "blocks.1.attn.hook_z"
        with torch.no_grad():
            features = sae.encode(z.unflatten(-1, (hosted.cfg.n_heads, hosted.cfg.d_head)))
        metrics, _ = run_evals(
            sae,
            _store(hosted),
            hosted,
            ActivationScaler(),
            EvalConfig(2, 4, compute_ce_loss=True, compute_sparsity_metrics=True),
            exclude_special_tokens=False,
        )
        kept = metrics["model_performance_preservation"]
        seen[host] = [z, features, torch.tensor([*kept.values(), metrics["sparsity"]["l0"]])]
        if host == "hooked_transformer":
            continue
        cached = cache_activations(
            CacheActivationsRunnerConfig(
                **_caching(tmp_path / host), hook_name=cfg.hook_name, d_in=d_in
            ),
            hosted,
            _dataset(),
        )
        rows = torch.tensor(cached[:4][cfg.hook_name])
        ids = torch.tensor(_dataset()[:4]["input_ids"])
        torch.testing.assert_close(rows, store.get_activations(ids), atol=1e-5, rtol=1e-4)
    for host in ("huggingface", "bridge"):
        for got, expected in zip(seen[host], seen["hooked_transformer"], strict=True):
            torch.testing.assert_close(got, expected, atol=2e-3, rtol=2e-3)
        torch.testing.assert_close(seen[host][0], seen["hooked_transformer"][0])
    assert (seen["huggingface"][1] != 0).any()
