"""SAEs of single heads, and SAEs trained on z without value biases, in attribution."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers import SAE_ARCHITECTURES, random_sae, tiny_gpt2, tiny_llama
from torch import Tensor

import sae_attn_plugin as sap
from sae_attn_plugin.backends import as_backend
from sae_attn_plugin.backends.loading import to_hooked_transformer
from sae_attn_plugin.backends.protocol import Geometry, Site
from sae_attn_plugin.dictionaries import from_sae, place

HEADS, WIDTH = 5, 6
TOKENS = [3, 14, 15, 9, 26, 5, 3, 14]


def of_head(head: int, layer: int = 1, seed: int = 0, **config: Any) -> Any:
    """A random SAE on the z of one head, as plain sae_lens has it."""
    width = config.pop("d_in", WIDTH)
    sae = random_sae(layer, width, d_sae=20, seed=seed, reshape_activations="none", **config)
    sae.cfg.metadata.hook_head_index = head
    sae.cfg.metadata.sae_id = f"head {head}"
    return sae


def _on_attn_out(sae: Any) -> Any:
    sae.cfg.metadata.hook_name = "blocks.1.hook_attn_out"
    return sae


@pytest.fixture(scope="module")
def geometry() -> Geometry:
    return as_backend(tiny_gpt2()).geometry


def z_of(model: Any, layer: int) -> Tensor:
    site = Site("z", layer)
    return as_backend(model).forward(torch.tensor([TOKENS]), reads=[site])[site][0]


@pytest.mark.parametrize("architecture", SAE_ARCHITECTURES)
@pytest.mark.parametrize("subtract", [True, False])
def test_a_dictionary_of_one_head_is_its_sae_on_that_head(
    geometry: Geometry, architecture: str, subtract: bool
) -> None:
    sae = of_head(3, architecture=architecture, dtype="float64", apply_b_dec_to_input=subtract)
    dictionary = from_sae(sae, geometry)
    z = torch.randn(9, HEADS, WIDTH, dtype=torch.float64)
    encoded = dictionary.encode(z)
    with torch.no_grad():
        acts = sae.encode(z[:, 3])
        expected = torch.zeros_like(z)
        expected[:, 3] = sae.decode(acts)
    dense = torch.zeros_like(acts)
    dense[encoded.position, encoded.feature] = encoded.activation
    torch.testing.assert_close(dense, acts, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(dictionary.decode(encoded), expected, rtol=1e-10, atol=1e-12)
    rows = dictionary.encoder(torch.arange(20), torch.float64)
    others = [head for head in range(HEADS) if head != 3]
    assert not rows[:, others].any()
    assert rows[:, 3].any()


def test_heads_of_one_layer_stand_side_by_side(geometry: Geometry) -> None:
    kinds = {4: "gated", 0: "topk_rescaled", 2: "jumprelu"}
    saes = {
        head: of_head(
            head,
            architecture=kind,
            dtype="float64",
            seed=head,
            apply_b_dec_to_input=head != 2,
            normalize_activations="expected_average_only_in" if head == 0 else "none",
        )
        for head, kind in kinds.items()
    }
    for head, sae in saes.items():
        sae.sparsity = torch.full((20,), -1.0 - head)
    dictionary = place(list(saes.values()), geometry)[1]
    assert [part["head"] for part in dictionary.metadata["heads"]] == [0, 2, 4]
    assert [part["first_feature"] for part in dictionary.metadata["heads"]] == [0, 20, 40]
    assert dictionary.architecture == "topk+jumprelu+gated"
    assert dictionary.log_density is not None
    assert dictionary.log_density[[0, 20, 40]].tolist() == [-1, -3, -5]
    z = torch.randn(9, HEADS, WIDTH, dtype=torch.float64)
    encoded = dictionary.encode(z)
    dense = torch.zeros(9, 60, dtype=torch.float64)
    dense[encoded.position, encoded.feature] = encoded.activation
    expected, reconstruction = [], torch.zeros_like(z)
    for head in (0, 2, 4):
        with torch.no_grad():
            acts = saes[head].encode(z[:, head])
            reconstruction[:, head] = saes[head].decode(acts)
        expected.append(acts)
    torch.testing.assert_close(dense, torch.cat(expected, 1), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(dictionary.decode(encoded), reconstruction, rtol=1e-10, atol=1e-12)
    linear = (dictionary.encoder(encoded.feature, torch.float64) * z[encoded.position]).sum((1, 2))
    linear = linear + dictionary.constants(encoded.feature, torch.float64)
    torch.testing.assert_close(linear, encoded.pre_activation, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_graphs_with_single_heads_close_and_hold_on_the_model(kind: str) -> None:
    model = (tiny_gpt2 if kind == "gpt2" else tiny_llama)(torch.float64)
    heads, width = (5, 6) if kind == "gpt2" else (6, 8)
    saes = [
        random_sae(0, heads * width, dtype="float64"),
        *(of_head(h, dtype="float64", seed=h, d_in=width) for h in (0, 3)),
        of_head(2, layer=2, dtype="float64", architecture="gated", d_in=width),
    ]
    lens = sap.FeatureLens(model, saes)
    run = lens.run(TOKENS)
    features = run.features(layer=1)
    assert {feature // 20 for feature in features.feature} == {0, 1}
    z = z_of(model, 1)
    with torch.no_grad():
        acts = saes[2].encode(z[:, 3])
    for row in features[features.feature >= 20].itertuples():
        assert row.activation == pytest.approx(acts[row.position, row.feature - 20].item())
    row = features[features.feature >= 20].iloc[-1]
    by_head = run.dfa(1, int(row.feature), int(row.position)).by_head
    assert not by_head[[h for h in range(heads) if h != 3]].any()
    assert by_head[3] != 0
    attribution = run.attribute(sap.Logit(7))
    scale = attribution.ledger.in_sum.abs() + attribution.ledger.constant.abs() + 1
    assert (attribution.ledger.residual.abs() / scale).max() < (1e-10 if kind == "gpt2" else 1e-5)
    validation = sap.validate(attribution.to_networkx(), lens, max_sources=12)
    assert validation.frozen.r2 > 1 - 1e-8
    assert {"attn", "attn_err"} <= set(attribution.nodes.kind)


@pytest.mark.parametrize(
    ("saes", "error", "message"),
    [
        ([of_head(9)], sap.InputError, r"of head 9, but \S+ has heads 0\.\.4"),
        ([of_head(1), of_head(1, seed=1)], sap.InputError, "two SAEs for head 1 of layer 1"),
        (
            [of_head(1), random_sae(1, 30)],
            sap.InputError,
            "two SAEs for hook_z of layer 1: .* or one for each head",
        ),
        (
            [of_head(1, normalize_activations="layer_norm")],
            sap.UnsupportedError,
            "of head 1 normalises its input",
        ),
        ([of_head(1, d_in=30)], sap.InputError, r"head 1, has d_in 30, but .* 1 heads x 6 = 6"),
        ([_on_attn_out(of_head(1))], sap.InputError, "head 1, reads what all heads write"),
    ],
)
def test_what_does_not_fit(
    geometry: Geometry, saes: list[Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        place(saes, geometry)


# -- value biases ---------------------------------------------------------------------------------


def folded_z(model: Any, layer: int) -> Tensor:
    """z of TransformerLens' default processing, from TransformerLens itself (rounded there)."""
    processed = to_hooked_transformer(copy.deepcopy(model))
    processed.load_and_process_state_dict(
        processed.state_dict(),
        fold_ln=True,
        center_writing_weights=True,
        center_unembed=True,
        fold_value_biases=True,
    )
    _, cache = processed.run_with_cache(torch.tensor([TOKENS]))
    return cache[f"blocks.{layer}.attn.hook_z"][0]


@pytest.mark.parametrize("architecture", SAE_ARCHITECTURES)
@pytest.mark.parametrize("subtract", [True, False])
def test_saes_trained_on_folded_z_see_it(architecture: str, subtract: bool) -> None:
    model = tiny_gpt2(torch.float64)
    sae = random_sae(
        1, 30, dtype="float64", architecture=architecture, apply_b_dec_to_input=subtract
    )
    z = folded_z(model, 1)
    assert (z - z_of(model, 1)).abs().max() > 0.05
    with torch.no_grad():
        expected = sae.encode(z)
        reconstruction = sae.decode(expected)
    sae.cfg.metadata.value_biases = "folded"
    lens = sap.FeatureLens(model, sae)
    run = lens.run(TOKENS)
    dense = torch.zeros_like(expected)
    found = run.features(layer=1)
    dense[found.position, found.feature] = torch.tensor(found.activation)
    torch.testing.assert_close(dense, expected, rtol=1e-4, atol=5e-6)
    # what the SAE leaves over of z is the same on either side of the folding
    own = z_of(model, 1)
    dictionary = lens.dictionaries[1]
    left = own - dictionary.decode(dictionary.encode(own))
    torch.testing.assert_close(left, z - reconstruction, rtol=1e-4, atol=5e-6)
    ledger = run.attribute(sap.Logit(7)).ledger
    scale = ledger.in_sum.abs() + ledger.constant.abs() + 1
    assert (ledger.residual.abs() / scale).max() < 1e-10

    # and the SAE itself, moved for splicing
    from sae_attn_plugin.heads import value_bias_part

    moved = sap.AttentionSAE.of(sae, n_heads=HEADS).shifted(
        value_bias_part(as_backend(model).layer_weights(1))
    )
    with torch.no_grad():
        torch.testing.assert_close(moved.encode(own), expected, rtol=1e-4, atol=5e-6)
        torch.testing.assert_close(own - moved(own), left, rtol=1e-4, atol=5e-6)


def test_the_authors_saes_are_known_by_their_neuronpedia_id() -> None:
    model = tiny_gpt2(torch.float64)
    saes = [random_sae(1, 30, dtype="float64") for _ in range(3)]
    saes[0].cfg.metadata.neuronpedia_id = "gpt2-small/1-att-kk"
    saes[1].cfg.metadata.neuronpedia_id = "gpt2-small/1-att-kk"
    saes[1].cfg.metadata.value_biases = "kept"
    b_dec = [sap.FeatureLens(model, sae).dictionaries[1].b_dec for sae in saes]
    assert torch.equal(b_dec[1], b_dec[2])
    assert not torch.allclose(b_dec[0], b_dec[2])


def test_single_heads_on_folded_z() -> None:
    model = tiny_gpt2(torch.float64)
    saes = [of_head(h, dtype="float64", seed=h) for h in (0, 3)]
    z = folded_z(model, 1)
    with torch.no_grad():
        expected = torch.cat([saes[0].encode(z[:, 0]), saes[1].encode(z[:, 3])], 1)
    for sae in saes:
        sae.cfg.metadata.value_biases = "folded"
    dense = torch.zeros_like(expected)
    found = sap.FeatureLens(model, saes).run(TOKENS).features(layer=1)
    dense[found.position, found.feature] = torch.tensor(found.activation)
    torch.testing.assert_close(dense, expected, rtol=1e-4, atol=5e-6)
