"""The same graph on every host, closed ledgers, and refusal of what would be wrong."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from conftest import LensMaker
from helpers import (
    ALL_HOSTS,
    HOSTS,
    TINY,
    TrueFloat64,
    bridge,
    hooks_on,
    on_host,
    random_saes,
    tiny_gpt2,
    word_tokenizer,
)

import sae_attn_plugin as sap
from sae_attn_plugin.backends import as_backend
from sae_attn_plugin.backends.architectures import Architecture
from sae_attn_plugin.backends.huggingface import HuggingFaceBackend
from sae_attn_plugin.backends.loading import to_hooked_transformer
from sae_attn_plugin.backends.protocol import LayerWeights, Site
from sae_attn_plugin.backends.transformer_lens import TransformerLensBackend

F32, F64 = torch.float32, torch.float64
PROMPT = "w3 w57 w7 w19 w7 w13 w2"
TARGETS = [sap.LogitDiff("w5", "w6"), sap.Logit("w9", 3), sap.Feature(2, 7, 4)]


def same_graph(one: Any, other: Any, tolerance: float) -> None:
    """Same nodes and edges, every weight within ``tolerance`` of its target's sum of |edges|."""
    assert set(one.nodes.index) == set(other.nodes.index)
    assert set(one.ledger.index) == set(other.ledger.index)
    keys = ["source", "target"]
    frames = [att.edges.astype({"source": str, "target": str}) for att in (one, other)]
    both = frames[0].merge(frames[1], on=keys, how="outer", validate="one_to_one")
    assert not both[["weight_x", "weight_y"]].isna().any().any()
    scale = both["weight_x"].abs().groupby(both["target"]).transform("sum")
    assert ((both["weight_x"] - both["weight_y"]).abs() / scale).max() < tolerance
    ledgers = one.ledger.join(other.ledger.add_suffix("_other"))
    scale = frames[0]["weight"].abs().groupby(frames[0]["target"]).sum()
    scale = scale.reindex(ledgers.index).fillna(0) + ledgers["constant"].abs()
    for name in ("constant", "value", "in_sum"):
        assert ((ledgers[name] - ledgers[f"{name}_other"]).abs() / scale).max() < tolerance


@pytest.mark.parametrize(
    ("model", "dtype", "allowed"),
    # In float64 every host rounds Llama's rotary angles in its own way.
    [("gpt2", F32, 1e-5), ("llama", F32, 1e-5), ("gpt2", F64, 1e-10)],
    ids=["gpt2-float32", "llama-float32", "gpt2-float64"],
)
@pytest.mark.parametrize("host", [host for host in ALL_HOSTS if host != "hooked_transformer"])
def test_every_host_gives_the_same_graph(
    lens_of: LensMaker, model: str, dtype: torch.dtype, allowed: float, host: str
) -> None:
    reference = lens_of(model, dtype=dtype).run(PROMPT).attribute(TARGETS, node_budget=None)
    att = lens_of(model, host, dtype).run(PROMPT).attribute(TARGETS, node_budget=None)
    assert len(att.ledger) > 100
    same_graph(reference, att, allowed)
    assert att.worst_residual < allowed
    backend = {"transformer_bridge": "transformer_bridge"}.get(
        host, "hooked_transformer" if host.startswith("hooked") else "nnsight"
    )
    assert att.to_networkx().graph["backend"] == backend


@pytest.mark.parametrize("model", TINY)
def test_a_model_from_a_folder_on_every_host(tmp_path: Path, model: str) -> None:
    plain = TINY[model](n_layers=2)
    plain.save_pretrained(tmp_path)
    word_tokenizer().save_pretrained(tmp_path)
    saes = random_saes(plain)
    expected = sap.FeatureLens(plain, saes, tokenizer=word_tokenizer()).run(PROMPT)
    for backend in ("transformer_lens", "transformer_bridge", "nnsight"):
        hosted = sap.load_model(tmp_path, backend)
        run = sap.FeatureLens(hosted, saes).run(PROMPT)
        assert run.tokens.tolist() == expected.tokens.tolist()
        target = sap.LogitDiff("w5", "w6")
        same_graph(expected.attribute(target), run.attribute(target), 1e-5)


@pytest.mark.parametrize("model", TINY)
@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize(
    ("dtype", "allowed"), [(F32, 1e-5), (F64, 1e-10)], ids=["float32", "float64"]
)
@pytest.mark.parametrize("length", [1, 40])
def test_the_ledger_closes(
    lens_of: LensMaker, model: str, host: str, dtype: torch.dtype, allowed: float, length: int
) -> None:
    """Up to the context, where the host computes in the dtype of its weights (TrueFloat64)."""
    cast_free = model == "llama" and host != "hooked_transformer" and dtype == F64
    with TrueFloat64() if cast_free else contextlib.nullcontext():
        lens = lens_of(model, host, dtype, "jumprelu")
        run = lens.run([(7 * i + 3) % 61 for i in range(length)])
    att = run.attribute([sap.LogitDiff(5, 6), sap.Feature(0, 1, 0)], node_budget=300)
    assert len(att.ledger) >= 2
    assert att.worst_residual <= allowed
    att.check_closure(allowed)
    pruned = att.prune()
    assert pruned.worst_residual <= allowed
    with pytest.raises(sap.InputError, match="does not close"):
        dataclasses.replace(
            att, flow=dataclasses.replace(att.flow, constant=att.flow.constant + 1e-3)
        ).check_closure(allowed)


@pytest.mark.parametrize("host", HOSTS)
def test_batches_are_the_prompts_one_by_one(lens_of: LensMaker, host: str) -> None:
    lens = lens_of("llama", host)
    prompts = [PROMPT, "w9 w8 w7 w6 w5 w4 w3"]
    batch = lens.run(prompts)
    assert len(batch) == 2
    for index, prompt in enumerate(prompts):
        alone = lens.run(prompt)
        torch.testing.assert_close(batch.logits[index], alone.logits[0], rtol=1e-4, atol=1e-5)
        assert batch[index].prompts == (prompt,)
        same_graph(
            alone.attribute(sap.Logit(5), node_budget=20),
            batch[index].attribute(sap.Logit(5), node_budget=20),
            1e-5,
        )
        table: Any = batch.features(1)
        table = table[table["prompt"] == index].drop(columns="prompt")
        pd.testing.assert_frame_equal(table, alone.features(1), rtol=1e-3)
    with pytest.raises(sap.InputError, match=r"2 prompts; pick one: run\[i\]"):
        batch.attribute(sap.Logit(5))


# -- ids ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ALL_HOSTS)
@pytest.mark.parametrize("adds_bos", [True, False])
@pytest.mark.parametrize("said", [True, False, None])
def test_the_same_string_gives_the_same_ids(host: str, adds_bos: bool, said: bool | None) -> None:
    """``prepend_bos=None``: the SAEs' metadata where it says, else the tokenizer's convention."""
    model, tokenizer = tiny_gpt2(n_layers=1), word_tokenizer(adds_bos)
    saes = random_saes(model)
    for sae in saes:
        sae.cfg.metadata.prepend_bos = said
    lens = sap.FeatureLens(on_host(model, host, tokenizer), saes, tokenizer=tokenizer)
    bos = [0] if (adds_bos if said is None else said) else []
    assert lens.to_tokens("w4 w60").tolist() == [[*bos, 4, 60]]
    assert lens.to_tokens("<bos> w4").tolist() == [[0, 4]]
    assert lens.run("w4 w60").token_strings == (*["<bos>"] * len(bos), "w4", "w60")
    own = sap.FeatureLens(lens.backend, saes, prepend_bos=not bos)
    assert own.to_tokens("w4").tolist() == [[*([] if bos else [0]), 4]]


@pytest.mark.parametrize("adds_bos", [True, False])
def test_a_tokenizer_reloaded_by_transformer_lens(adds_bos: bool) -> None:
    """TransformerLens adds a BOS convention of its own, which must not decide."""
    model = tiny_gpt2(n_layers=1)
    saes = random_saes(model)
    saes[0].cfg.metadata.prepend_bos = None
    hosted = [bridge(model, word_tokenizer(adds_bos)), to_hooked_transformer(model)]
    hosted[1].set_tokenizer(word_tokenizer(adds_bos))
    for host in hosted:
        lens = sap.FeatureLens(host, saes)
        assert lens.prepend_bos is adds_bos
        assert lens.to_tokens("w4").tolist() == [[*[0] * adds_bos, 4]]


def test_saes_that_disagree_on_bos() -> None:
    model = tiny_gpt2(n_layers=2)
    saes = random_saes(model)
    saes[0].cfg.metadata.prepend_bos = True
    lens = sap.FeatureLens(model, saes, tokenizer=word_tokenizer())
    with pytest.raises(sap.InputError, match="disagree on prepend_bos; pass prepend_bos="):
        lens.run("w3 w4")
    assert len(lens.run([3, 4])) == 1


# -- processed weights -----------------------------------------------------------------------------

_PROCESSING = {
    "fold_ln": False,
    "center_writing_weights": False,
    "center_unembed": False,
    "fold_value_biases": False,
}


def processed(model: Any, **which: bool) -> Any:
    hooked = to_hooked_transformer(model)
    hooked.load_and_process_state_dict(hooked.state_dict(), **{**_PROCESSING, **which})
    return hooked


@pytest.mark.parametrize(
    "which",
    [
        {"fold_ln": True},
        {"center_writing_weights": True},
        {"fold_ln": True, "center_writing_weights": True, "center_unembed": True},
    ],
    ids=lambda which: "+".join(which),
)
def test_folded_norms_and_centred_weights_give_the_same_graph(
    which: dict[str, bool],
) -> None:
    model = tiny_gpt2(F64)
    saes = random_saes(model)
    plain = sap.FeatureLens(to_hooked_transformer(model), saes).run([3, 57, 7, 19, 7])
    hooked = processed(model, **which)
    if which.get("fold_ln"):
        assert hooked.cfg.normalization_type == "LNPre"
    run = sap.FeatureLens(hooked, saes).run([3, 57, 7, 19, 7])
    # Centring the unembedding shifts every logit alike; folding moves the final norm's bias.
    target = sap.LogitDiff(5, 6)
    same_graph(
        plain.attribute(target, node_budget=None), run.attribute(target, node_budget=None), 1e-6
    )


@pytest.mark.parametrize(
    "which",
    [
        {"fold_value_biases": True},
        {name: True for name in _PROCESSING},
    ],
    ids=["values", "default"],
)
def test_folded_value_biases_are_refused(which: dict[str, bool]) -> None:
    with pytest.raises(sap.BackendError, match=r"value biases are folded.*no_processing"):
        as_backend(processed(tiny_gpt2(), **which))


def test_a_bridge_in_compatibility_mode() -> None:
    model = tiny_gpt2()
    unprocessed = bridge(model)
    unprocessed.enable_compatibility_mode(disable_warnings=True, no_processing=True)
    run = sap.FeatureLens(unprocessed, random_saes(model)).run([3, 57, 7])
    plain = sap.FeatureLens(model, random_saes(model), tokenizer=word_tokenizer()).run([3, 57, 7])
    same_graph(plain.attribute(sap.Logit(5)), run.attribute(sap.Logit(5)), 1e-5)
    folded = bridge(model)
    folded.enable_compatibility_mode(disable_warnings=True)
    with pytest.raises(sap.BackendError, match="value biases are folded"):
        as_backend(folded)


# -- a model that is not what its weights say ------------------------------------------------------


Patch = pytest.MonkeyPatch


def _wrong_eps(model: Any, patch: Patch) -> None:
    norm = model.transformer.h[1].ln_1
    patch.setattr(
        norm,
        "forward",
        lambda x: torch.nn.functional.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, 0.05),
    )


def _interleaved(_model: Any, patch: Patch) -> None:
    """GPT-NeoX's layout, taken for GPT-2's: the widths fit."""

    def select(_self: Architecture, out: torch.Tensor, geometry: Any) -> torch.Tensor:
        return out.unflatten(-1, (geometry.n_heads, 3, geometry.d_head))[..., 2, :]

    patch.setattr(Architecture, "select_values", select)


def _swapped_heads(_model: Any, patch: Patch) -> None:
    read = HuggingFaceBackend.layer_weights

    def wrong(self: HuggingFaceBackend, layer: int) -> LayerWeights:
        weights = read(self, layer)
        return dataclasses.replace(weights, W_O=weights.W_O.flip(0) if layer == 2 else weights.W_O)

    patch.setattr(HuggingFaceBackend, "layer_weights", wrong)


def _transposed_values(_model: Any, patch: Patch) -> None:
    read = HuggingFaceBackend.layer_weights

    def wrong(self: HuggingFaceBackend, layer: int) -> LayerWeights:
        weights = read(self, layer)
        return dataclasses.replace(weights, W_V=weights.W_V.flip(-1))

    patch.setattr(HuggingFaceBackend, "layer_weights", wrong)


def _extra_writer(layer: int) -> Any:
    def change(model: Any, _patch: Patch) -> None:
        model.transformer.h[layer].register_forward_hook(lambda _m, _a, out: out + 0.3)

    return change


def _soft_cap(model: Any, _patch: Patch) -> None:
    model.lm_head.register_forward_hook(lambda _m, _a, out: torch.tanh(out / 3) * 3)


def _deaf(_model: Any, patch: Patch) -> None:
    run = HuggingFaceBackend.forward

    def deaf(self: HuggingFaceBackend, tokens: Any, edits: Any = (), reads: Any = ()) -> Any:
        return run(self, tokens, None, [*reads, *(edits or ())])

    patch.setattr(HuggingFaceBackend, "forward", deaf)


@pytest.mark.parametrize(
    ("change", "identity"),
    [
        (_wrong_eps, r"v = N\(resid_pre\) W_V \+ b_V in layer 1"),
        (_transposed_values, r"v = N\(resid_pre\) W_V \+ b_V in layer 0"),
        (_interleaved, r"v = N\(resid_pre\) W_V \+ b_V in layer 0"),
        (_swapped_heads, r"z W_O \+ b_O = what attention adds in layer 2"),
        (_extra_writer(0), "writers sum to resid_pre in layer 1"),
        (_extra_writer(2), "writers sum to the final residual"),
        (_soft_cap, r"logits = N\(resid_final\) W_U \+ b_U"),
        (_deaf, r"an edit at z\[2\] does not change the logits"),
    ],
)
def test_a_broken_identity_is_named(
    change: Any, identity: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_gpt2()
    as_backend(copy.deepcopy(model))
    change(model, monkeypatch)
    with pytest.raises(sap.BackendError, match=identity):
        as_backend(model)


def test_a_broken_identity_is_named_on_transformer_lens(monkeypatch: pytest.MonkeyPatch) -> None:
    read = TransformerLensBackend.layer_weights

    def wrong(self: TransformerLensBackend, layer: int) -> LayerWeights:
        weights = read(self, layer)
        return dataclasses.replace(weights, b_O=weights.b_O + 0.1)

    monkeypatch.setattr(TransformerLensBackend, "layer_weights", wrong)
    with pytest.raises(sap.BackendError, match=r"z W_O \+ b_O = what attention adds in layer 0"):
        as_backend(to_hooked_transformer(tiny_gpt2()))


def test_sdpa_is_switched_to_eager() -> None:
    eager = TINY["llama"]()
    model = copy.deepcopy(eager)
    model.set_attn_implementation("sdpa")
    with pytest.warns(UserWarning, match=r"'sdpa'.*switched to 'eager'"):
        lens = sap.FeatureLens(model, random_saes(model))
    assert model.config._attn_implementation == "eager"
    expected = sap.FeatureLens(eager, random_saes(eager)).run([3, 4, 5]).attribute(sap.Logit(5))
    same_graph(expected, lens.run([3, 4, 5]).attribute(sap.Logit(5)), 1e-6)


@pytest.mark.parametrize("host", ALL_HOSTS)
def test_training_mode_is_refused(host: str) -> None:
    hosted = on_host(tiny_gpt2(n_layers=1), host)
    getattr(hosted, "_module", hosted).train()
    with pytest.raises(sap.InputError, match=r"training mode.*call model\.eval\(\)"):
        as_backend(hosted)


def test_an_unknown_architecture_is_refused() -> None:
    from transformers import BloomConfig, BloomForCausalLM

    config = BloomConfig(vocab_size=61, hidden_size=32, n_layer=1, n_head=4)
    with pytest.raises(sap.UnsupportedError, match=r"'bloom' is not known; known: gemma, gemma2"):
        as_backend(BloomForCausalLM(config).eval())


def test_attached_saes_are_refused() -> None:
    model = tiny_gpt2(n_layers=2)
    hosted = on_host(model, "hooked_sae_transformer")
    hosted.add_sae(random_saes(model)[1])
    with pytest.raises(sap.InputError, match=r"blocks\.1\.attn\.hook_z; call model\.reset_saes"):
        as_backend(hosted)
    hosted.reset_saes()
    assert len(sap.FeatureLens(hosted, random_saes(model)).run([3, 4])) == 1


# -- the model is left as it was -------------------------------------------------------------------


def logits_of(hosted: Any, tokens: torch.Tensor) -> torch.Tensor:
    module = getattr(hosted, "_module", hosted)
    with torch.no_grad():
        out = module(tokens)
    return getattr(out, "logits", out)


@pytest.mark.parametrize("model", TINY)
@pytest.mark.parametrize("host", ALL_HOSTS)
def test_the_model_is_left_as_it_was(model: str, host: str) -> None:
    plain = TINY[model](n_layers=2)
    hosted = on_host(plain, host)
    module = getattr(hosted, "_module", hosted)
    tokens = torch.tensor([[3, 4, 5, 6]])
    before = logits_of(hosted, tokens)
    weights = {name: t.clone() for name, t in module.state_dict().items()}
    lens = sap.FeatureLens(hosted, random_saes(plain))
    hooks = hooks_on(hosted)

    run = lens.run(tokens)
    run.attribute(sap.Logit(5))
    edit = sap.AblateFeature(layer=0, feature=3)
    lens.intervene(run, [edit], freeze=["patterns", "norms", "mlp"])

    def fail(_value: torch.Tensor) -> torch.Tensor:
        raise ZeroDivisionError("inside an edit")

    for site in (Site("z", 1), Site("attn_in", 0), Site("mlp_in", 1), Site("unembed_in")):
        with pytest.raises(Exception, match="inside an edit"):
            lens.backend.forward(tokens, {site: fail, Site("embed"): lambda x: x + 1})
    assert hooks_on(hosted) == hooks
    assert torch.equal(logits_of(hosted, tokens), before)
    assert torch.equal(lens.run(tokens).logits, run.logits)
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, weights[name]), name


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("name", ["pattern", "logits", "resid_final"])
def test_read_only_sites(lens_of: LensMaker, host: str, name: str) -> None:
    site = Site(name, 0) if name == "pattern" else Site(name)
    with pytest.raises(sap.InputError, match=r"can be read but not edited"):
        lens_of("gpt2", host).backend.forward(torch.tensor([[3]]), {site: lambda x: x})
