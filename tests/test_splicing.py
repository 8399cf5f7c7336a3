"""Splicing on every host, and the traps of attaching SAEs with sae_lens that it does not have."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from helpers import (
    bridge,
    hooked_sae_transformer,
    random_sae,
    random_saes,
    tiny_gpt2,
    tiny_llama,
)
from nnsight import NNsight
from torch import Tensor

import sae_attn_plugin as sap
from sae_attn_plugin.backends.loading import to_hooked_transformer

TOKENS = torch.tensor([[3, 14, 15, 9, 26, 5], [7, 7, 8, 9, 3, 2]])
Z = "blocks.1.attn.hook_z"
RAW = "blocks.1.attn.o.hook_in"  # its name on a bridge


def sae_bridge(model: Any) -> Any:
    """sae_lens' bridge, made from TransformerLens' as ``boot_transformers`` makes it."""
    from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge

    made = bridge(model)
    made.__class__ = SAETransformerBridge
    made._acts_to_saes, made._transcoder_output_hooks = {}, {}
    return made


def saes_of(kind: str) -> list[Any]:
    heads, width = (5, 6) if kind == "gpt2" else (6, 8)
    sae = random_sae(0, width, d_sae=20, reshape_activations="none")
    sae.cfg.metadata.hook_head_index = 2
    return [sae, random_sae(1, heads * width), random_sae(2, heads * width, architecture="gated")]


def logits_of(model: Any) -> Tensor:
    out = model(TOKENS)
    return getattr(out, "logits", out)


def enter(model: Any, saes: Any) -> None:
    with sap.splice(model, saes):
        pass


def on(host: str, model: Any) -> Any:
    match host:
        case "hooked_transformer":
            return to_hooked_transformer(model)
        case "hooked_sae_transformer":
            return hooked_sae_transformer(model)
        case "bridge":
            return bridge(model)
        case "sae_bridge":
            return sae_bridge(model)
        case "hooked":
            return sap.hooked(model)
        case _:
            return model


@pytest.mark.parametrize(
    ("kind", "host"),
    [
        *(
            ("gpt2", host)
            for host in ("hooked_sae_transformer", "bridge", "sae_bridge", "hf", "hooked")
        ),
        *(("llama", host) for host in ("hooked_transformer", "bridge", "hf")),
    ],
)
def test_every_host_gives_the_same(kind: str, host: str) -> None:
    plain = (tiny_gpt2 if kind == "gpt2" else tiny_llama)()
    reference = to_hooked_transformer(copy.deepcopy(plain))
    saes = saes_of(kind)
    width = 5 if kind == "gpt2" else 6

    def by_hand(z: Tensor, hook: Any) -> Tensor:
        sae = saes[hook.layer()]
        if hook.layer() == 0:
            z = z.clone()
            z[:, :, 2] = sae(z[:, :, 2])
            return z
        return sae(z)

    hooks = [(f"blocks.{layer}.attn.hook_z", by_hand) for layer in range(3)]
    with torch.no_grad():
        expected = reference.run_with_hooks(TOKENS, fwd_hooks=hooks)
        model = on(host, copy.deepcopy(plain))
        before = logits_of(model)
        assert (before - expected).abs().max() > 1e-2
        with sap.splice(model, saes) as spliced:
            centred = logits_of(model)
            assert spliced.features[(0, 2)].shape == (2, 6, 20)
            assert spliced.features[1].shape == (2, 6, 40)
        with sap.splice(model, saes, error_term=True):
            exact = logits_of(model)

        def first_only(features: Tensor, sae: Any) -> Tensor | None:
            return torch.zeros_like(features) if sae.head is None else None

        with sap.splice(model, saes, edit=first_only):
            edited = logits_of(model)
        after = logits_of(model)
    assert width == spliced.saes[1].n_heads
    torch.testing.assert_close(centred, expected, rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(exact, before, rtol=1e-4, atol=2e-5)
    assert not torch.allclose(edited, centred, atol=1e-3)
    assert torch.equal(after, before)


def test_through_nnsight() -> None:
    model, saes = tiny_gpt2(), saes_of("gpt2")
    wrapped, out = NNsight(model), torch.zeros(0)
    with torch.no_grad():
        with sap.splice(model, saes):
            expected = logits_of(model)
        with sap.splice(wrapped, saes), wrapped.trace(TOKENS):
            out = wrapped.output.logits.save()  # type: ignore[attr-defined]
    torch.testing.assert_close(out, expected)


def test_effects_of_features_are_those_of_the_lens() -> None:
    """Ablating a feature with the error term, everything live, is the lens' intervention."""
    model, sae = tiny_gpt2(), random_sae(1, 30)
    lens = sap.FeatureLens(model, sae)
    run = lens.run(TOKENS[:1])
    row = run.features(layer=1).iloc[-1]
    edit = sap.AblateFeature(1, int(row.feature), int(row.position))
    theirs = lens.intervene(run, [edit], freeze=()).logits

    def ablate(features: Tensor, _: Any) -> Tensor:
        changed = features.clone()
        changed[:, int(row.position), int(row.feature)] = 0
        return changed

    with torch.no_grad(), sap.splice(model, sae, error_term=True, edit=ablate):
        ours = model(TOKENS[:1]).logits
    torch.testing.assert_close(ours, theirs.reshape(ours.shape), rtol=1e-4, atol=1e-5)


def test_gradients_flow_through_the_reconstruction_alone() -> None:
    model, sae = hooked_sae_transformer(tiny_gpt2()), random_sae(1, 30)
    name = f"{Z}.hook_sae_acts_post"
    grads: dict[str, Tensor] = {}

    def keep(grad: Tensor, hook: Any) -> None:  # noqa: ARG001
        grads["theirs"] = grad.clone()

    with model.saes(saes=[sae], use_error_term=True), model.hooks(bwd_hooks=[(name, keep)]):
        model(TOKENS)[:, -1, 5].sum().backward()

    def watch(features: Tensor, _: Any) -> Tensor:
        features.register_hook(lambda grad: grads.update(ours=grad.clone()))
        return features

    with sap.splice(model, sae, error_term=True, edit=watch):
        model(TOKENS)[:, -1, 5].sum().backward()
    torch.testing.assert_close(grads["ours"], grads["theirs"])


# -- section 2c -----------------------------------------------------------------------------------


def test_trap_2c_permanent_hooks_are_lost_after_detaching() -> None:
    model, sae = hooked_sae_transformer(tiny_gpt2()), random_sae(1, 30)
    calls: list[int] = []

    def count(z: Tensor, hook: Any) -> None:  # noqa: ARG001
        calls.append(1)

    model.hook_dict[Z].add_perma_hook(count)
    with sap.splice(model, sae):
        model(TOKENS)
    model(TOKENS)
    assert len(calls) == 2  # kept here, during and after
    model.run_with_saes(TOKENS, saes=[sae])
    model(TOKENS)
    assert len(calls) == 2  # lost by sae_lens


def test_trap_2c_a_hook_that_does_not_exist_is_skipped(caplog: pytest.LogCaptureFixture) -> None:
    model = hooked_sae_transformer(tiny_gpt2())
    sae = random_sae(9, 30)
    with caplog.at_level(logging.WARNING):
        got = model.run_with_saes(TOKENS, saes=[sae])
    assert torch.equal(got, model(TOKENS))  # without the SAE
    assert "Skipping" in caplog.text
    for host in (model, tiny_gpt2()):
        with pytest.raises(sap.InputError, match=r"blocks\.9\.attn\.hook_z.*only 3 layers"):
            enter(host, sae)


def test_trap_2c_B1_hooks_by_their_usual_name_never_fire() -> None:
    model, sae = sae_bridge(tiny_gpt2()), random_sae(1, 30)
    calls: list[int] = []

    def count(z: Tensor, hook: Any) -> None:  # noqa: ARG001
        calls.append(1)

    model.run_with_hooks(TOKENS, fwd_hooks=[(Z, count)])
    assert not calls  # and no error
    with sap.splice(model, sae) as spliced:
        model(TOKENS)
        assert spliced.features[1].any()
        model.run_with_hooks(TOKENS, fwd_hooks=[(RAW, count)])
    assert calls
    assert len(sap.FeatureLens(model, sae).run(TOKENS[:1]).features(layer=1))


def test_trap_2c_B2_the_hook_point_stays_broken_after_a_reset() -> None:
    plain, sae = tiny_gpt2(), random_sae(1, 30)
    shape = (2, 6, 5, 6)

    def cached(model: Any) -> Tensor:
        return model.run_with_cache(TOKENS, names_filter=lambda name: name == RAW)[1][RAW]

    model = sae_bridge(plain)
    point = model.blocks[1].attn.o.hook_in
    assert cached(model).shape == shape
    with sap.splice(model, sae):
        model(TOKENS)
    assert model.blocks[1].attn.o.hook_in is point
    assert cached(model).shape == shape
    with model.saes(saes=[sae]):
        model(TOKENS)
    assert model.blocks[1].attn.o.hook_in is not point
    assert tuple(cached(model).shape) == (2, 6, 30)  # heads are gone
    # what sae_lens left there still takes a splice
    with torch.no_grad(), sap.splice(model, sae):
        got = model(TOKENS)
        with sap.splice(plain, sae):
            expected = plain(TOKENS).logits
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("error_term", [True, False])
def test_trap_2c_sae_lens_bridges_and_single_heads(error_term: bool) -> None:
    """sae_lens' own way of attaching, on a bridge that gives all heads flat."""
    plain = tiny_gpt2()
    model = sae_bridge(plain)
    sae = sap.AttentionSAE.of(saes_of("gpt2")[0], n_heads=5)
    whole = sap.AttentionSAE.of(random_sae(1, 30), n_heads=5)
    with torch.no_grad():
        with sap.splice(plain, [sae, whole], error_term=error_term):
            expected = logits_of(plain)
        got = model.run_with_saes(TOKENS, saes=[sae, whole], use_error_term=error_term)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=2e-5)


def test_what_does_not_fit() -> None:
    model, sae = hooked_sae_transformer(tiny_gpt2()), random_sae(1, 30)
    for saes, message in (
        ([sae, random_sae(1, 30, seed=1)], "two SAEs for hook_z of layer 1; give one"),
        ([], "no SAEs given"),
        ([3], "expected sae_lens SAEs, got int"),
        ([random_sae(1, 36)], "d_in 36, which is not that of 5 heads x 6"),
        (sap.AttentionSAE.of(random_sae(1, 30), n_heads=6), "is of 6 heads x 5, the model has 5 x"),
    ):
        with pytest.raises(sap.InputError, match=message):
            enter(model, saes)
    with pytest.raises(sap.InputError, match=r"torch\.nn\S+Linear is not a model SAEs can be"):
        enter(torch.nn.Linear(3, 3), sae)
    model.add_sae(sae)
    with pytest.raises(sap.InputError, match=r"attached at hook_z of layer 1; call .*reset_saes"):
        enter(model, sae)


def test_nothing_stays_behind_when_the_model_fails() -> None:
    model, sae = tiny_gpt2(), random_sae(1, 30)
    with pytest.raises(IndexError), sap.splice(model, sae):
        model(torch.tensor([[999]]))
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("host", ["hooked_transformer", "bridge", "hf", "hooked", "folded"])
def test_saes_trained_on_folded_z(host: str) -> None:
    plain = tiny_gpt2()
    folded = to_hooked_transformer(copy.deepcopy(plain))
    folded.load_and_process_state_dict(
        folded.state_dict(), fold_ln=True, center_unembed=False, fold_value_biases=True
    )
    saes = random_saes(plain)

    def by_hand(z: Tensor, hook: Any) -> Tensor:
        return saes[hook.layer()](z)

    hooks = [(f"blocks.{layer}.attn.hook_z", by_hand) for layer in range(3)]
    with torch.no_grad():
        expected = folded.run_with_hooks(TOKENS, fwd_hooks=hooks).log_softmax(-1)
    for sae in saes:
        sae.cfg.metadata.value_biases = "folded"
    model = folded if host == "folded" else on(host, plain)
    with torch.no_grad(), sap.splice(model, saes):
        got = logits_of(model).log_softmax(-1)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
