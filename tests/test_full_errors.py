"""Dictionaries of MLPs and attn_out that do not fit, and what the messages say."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import random_sae, random_transcoder, sae_at, tiny_gpt2

import sae_attn_plugin as sap


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_gpt2()


@pytest.mark.parametrize(
    ("saes", "transcoders", "message"),
    [
        ([random_sae(0, 30), sae_at(0, "hook_attn_out", 30)], None, "two dictionaries for att"),
        ({}, [random_transcoder(1, 30), sae_at(1, "hook_mlp_out", 30)], "two dictionaries for the"),
        ({}, [random_transcoder(1, 30), random_transcoder(1, 30, seed=2)], "two dictionaries"),
        ({}, [random_transcoder(0, 30, hooks=("hook_resid_post", "hook_mlp_out"))], "its input is"),
        ({}, [random_transcoder(0, 30, hooks=("hook_resid_pre", "hook_mlp_out"))], "its input is"),
        ({}, [random_transcoder(0, 30, hooks=("mlp.hook_in", "hook_resid_post"))], "its output is"),
        ({}, [random_transcoder(7, 30)], "only 3 layers"),
        ({}, {2: random_transcoder(1, 30)}, "given for layer 2"),
        ({}, [random_transcoder(0, 24)], "30 wide"),
        ({}, [random_sae(0, 30)], "is of attention"),
        ([random_transcoder(0, 30)], None, "transcoders="),
        ([sae_at(0, "hook_mlp_out", 30)], None, "transcoders="),
        ([sae_at(0, "hook_attn_out", 28)], None, "30 wide"),
        ([sae_at(0, "hook_resid_pre", 30)], None, "unknown hook name"),
    ],
)
def test_dictionaries_that_do_not_fit(
    model: Any, saes: Any, transcoders: Any, message: str
) -> None:
    with pytest.raises(sap.InputError, match=message):
        sap.FeatureLens(model, saes, transcoders=transcoders)


def test_layers_of_a_transcoder_must_agree(model: Any) -> None:
    sae = random_transcoder(0, 30)
    sae.cfg.metadata.hook_name_out = "blocks.1.hook_mlp_out"
    with pytest.raises(sap.InputError, match="reads layer 0 and writes layer 1"):
        sap.FeatureLens(model, {}, transcoders=[sae])


def test_targets_and_options(model: Any) -> None:
    sae = sae_at(1, "hook_mlp_out", 30)
    run = sap.FeatureLens(model, {}, transcoders=[sae]).run([1, 2, 3])
    with pytest.raises(sap.InputError, match="only with mlp='linearise'"):
        run.attribute(sap.Feature(1, 3, 2, "mlp_sae"))
    with pytest.raises(sap.InputError, match="no transcoder in layer 1"):
        run.attribute(sap.Feature(1, 3, 2, "tc"))
    with pytest.raises(sap.InputError, match="known: 'terminal', 'linearise'"):
        run.attribute(sap.Logit(3), mlp="through")  # type: ignore[arg-type]
    with pytest.raises(sap.InputError, match="expected 1 numbers"):
        run.attribute(sap.Logit(3), weights=[1.0, 2.0])
    att = run.attribute(sap.Feature(1, 3, 2, "mlp_sae"), mlp="linearise", heads="linearise")
    assert att.worst_residual < 1e-5


def test_head_attribution_of_attn_out(model: Any) -> None:
    sae = sae_at(1, "hook_attn_out", 30)
    with pytest.raises(sap.InputError, match="no slices by head"):
        sap.head_attribution(sae)
    table = sap.FeatureLens(model, [sae]).head_attribution(1)
    W_O = model.transformer.h[1].attn.c_proj.weight.detach().unflatten(0, (5, 6))
    norms = torch.stack([(W @ sae.W_enc.detach()).norm(dim=0) for W in W_O])
    expected = (norms / norms.sum(0)).T
    found = torch.tensor(table[[f"head_{h}" for h in range(5)]].to_numpy())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_an_activation_of_zero_has_no_ratio(model: Any) -> None:
    """Hidden units whose pre-activation is exactly 0 leave the ledger exact."""
    with torch.no_grad():
        for block in model.transformer.h:
            block.mlp.c_fc.weight[:, :7] = 0
            block.mlp.c_fc.bias[:7] = 0
    att = sap.FeatureLens(model, {}).run([1, 2, 3]).attribute(sap.Logit(3), mlp="linearise")
    assert att.worst_residual < 1e-5


def test_the_demo_transcoders() -> None:
    prompt = sap.demo.ioi_prompt()
    lens = sap.demo.load(transcoders=True)
    att = lens.run(prompt).attribute(sap.LogitDiff(prompt.correct, prompt.wrong))
    assert att.worst_residual < 1e-5
    assert {"tc", "tc_err", "tc_bias"} <= set(att.nodes["kind"])
    assert "mlp" not in set(att.nodes["kind"])
