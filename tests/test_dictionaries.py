"""Dictionaries against sae_lens' own encode and decode, and what does not fit."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import SAE_ARCHITECTURES, random_sae, random_saes, tiny_gpt2
from sae_lens.saes.matching_pursuit_sae import MatchingPursuitSAE, MatchingPursuitSAEConfig
from sae_lens.saes.sae import SAEMetadata
from sae_lens.saes.temporal_sae import TemporalSAE, TemporalSAEConfig

import sae_attn_plugin as sap
from sae_attn_plugin.backends import as_backend
from sae_attn_plugin.backends.protocol import Geometry
from sae_attn_plugin.dictionaries import from_sae, place

HEADS, WIDTH = 5, 6
NORMALISATIONS = ("none", "expected_average_only_in", "layer_norm", "constant_norm_rescale")


@pytest.fixture(scope="module")
def geometry() -> Geometry:
    return as_backend(tiny_gpt2()).geometry


def metadata(**fields: Any) -> SAEMetadata:
    return SAEMetadata(**{"model_name": "tiny", "hook_name": "blocks.0.attn.hook_z", **fields})


@pytest.mark.parametrize("architecture", SAE_ARCHITECTURES)
@pytest.mark.parametrize("normalisation", NORMALISATIONS)
@pytest.mark.parametrize("reshape", ["hook_z", "none"])
@pytest.mark.parametrize("subtract", [True, False])
def test_encode_and_decode_are_those_of_sae_lens(
    geometry: Geometry, architecture: str, normalisation: str, reshape: str, subtract: bool
) -> None:
    sae = random_sae(
        0,
        HEADS * WIDTH,
        architecture=architecture,
        dtype="float64",
        normalize_activations=normalisation,
        reshape_activations=reshape,
        apply_b_dec_to_input=subtract,
    )
    dictionary = from_sae(sae, geometry)
    z = torch.randn(9, HEADS, WIDTH, dtype=torch.float64) * 2 + 0.3
    encoded = dictionary.encode(z)
    decoded = dictionary.decode(encoded)
    with torch.no_grad():
        acts = sae.encode(z if reshape == "hook_z" else z.flatten(-2))
        expected = sae.decode(acts).reshape(z.shape)
    dense = torch.zeros(9, dictionary.d_sae, dtype=torch.float64)
    dense[encoded.position, encoded.feature] = encoded.activation
    torch.testing.assert_close(dense, acts.detach(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(decoded, expected, rtol=1e-10, atol=1e-12)
    assert 0 < len(encoded.feature) < dense.numel()
    assert (encoded.position.diff() >= 0).all()

    # the linear form that attribution uses gives back the pre-activation of every feature
    rows = dictionary.encoder(encoded.feature, torch.float64)
    scale = dictionary.input_scale(encoded.scale)[encoded.position, 0]
    linear = (rows * z[encoded.position]).sum((-2, -1)) / scale
    constants = dictionary.constants(encoded.feature, torch.float64)
    torch.testing.assert_close(linear + constants, encoded.pre_activation, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(encoded.activation, encoded.pre_activation, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("architecture", SAE_ARCHITECTURES)
def test_float32_saes_of_a_float64_model(geometry: Geometry, architecture: str) -> None:
    """The algebra's dtype is the model's; the SAE keeps its own weights."""
    sae = random_sae(0, HEADS * WIDTH, architecture=architecture)
    encoded = from_sae(sae, geometry).encode(torch.randn(4, HEADS, WIDTH, dtype=torch.float64))
    assert encoded.activation.dtype == torch.float64
    assert sae.W_enc.dtype == torch.float32


@pytest.mark.parametrize("architecture", SAE_ARCHITECTURES)
def test_the_sae_is_left_as_it_was(architecture: str) -> None:
    model = tiny_gpt2()
    saes = random_saes(model, architecture)
    before = [{k: v.clone() for k, v in sae.state_dict().items()} for sae in saes]
    configs = [sae.cfg.to_dict() for sae in saes]
    state = [set(sae.__dict__) for sae in saes]
    run = sap.FeatureLens(model, saes).run([3, 4, 5])
    run.attribute(sap.Logit(5))
    run.lens.intervene(run, [sap.SetFeature(1, 3, None, 2.0)])
    for sae, weights, config, names in zip(saes, before, configs, state, strict=True):
        assert sae.cfg.to_dict() == config
        assert set(sae.__dict__) == names
        assert not sae.use_error_term
        assert all(not m._forward_hooks for m in sae.modules())
        for key, value in sae.state_dict().items():
            assert torch.equal(value, weights[key]), key
        assert all(p.requires_grad and p.grad is None for p in sae.parameters())


@pytest.mark.parametrize(
    ("sae_class", "config_class", "name"),
    [
        (TemporalSAE, TemporalSAEConfig, "temporal"),
        (MatchingPursuitSAE, MatchingPursuitSAEConfig, "matching_pursuit"),
    ],
)
def test_architectures_without_a_linear_pre_activation(
    geometry: Geometry, sae_class: Any, config_class: Any, name: str
) -> None:
    extra = {"n_heads": 2, "bottleneck_factor": 1, "kval_topk": 4} if name == "temporal" else {}
    config = config_class(d_in=30, d_sae=16, dtype="float32", metadata=metadata(), **extra)
    sae = sae_class(config)
    with pytest.raises(sap.UnsupportedError, match=f"the {name} SAE.*not linear.*supported: stand"):
        from_sae(sae, geometry)


def _nan(sae: Any) -> None:
    with torch.no_grad():
        sae.W_dec[3, 4] = math.nan


@pytest.mark.parametrize(
    ("fields", "change", "error", "message"),
    [
        (
            {"metadata": metadata(hook_name="blocks.0.attn.hook_y_z")},
            None,
            sap.InputError,
            r"hook name 'blocks\.0\.attn\.hook_y_z'; expected 'blocks\.LAYER\.attn\.hook_z'",
        ),
        (
            {
                "metadata": metadata(hook_name="blocks.0.hook_resid_pre"),
                "reshape_activations": "none",
            },
            None,
            sap.InputError,
            r"unknown hook name 'blocks\.0\.hook_resid_pre'",
        ),
        ({"metadata": SAEMetadata()}, None, sap.InputError, "unknown hook name None"),
        (
            {"d_in": 36},
            None,
            sap.InputError,
            r"d_in 36, but hook_z of \S+ is 5 heads x 6 = 30 wide",
        ),
        (
            {"metadata": metadata(hook_name="blocks.3.attn.hook_z")},
            None,
            sap.InputError,
            r"blocks\.3\.attn\.hook_z.* has only 3 layers",
        ),
        (
            {"metadata": metadata(hook_head_index=5), "d_in": 6, "reshape_activations": "none"},
            None,
            sap.InputError,
            r"of head 5, but \S+ has heads 0\.\.4",
        ),
        ({}, _nan, sap.InputError, "W_dec holds NaN"),
    ],
)
def test_what_does_not_fit(
    geometry: Geometry, fields: dict[str, Any], change: Any, error: type[Exception], message: str
) -> None:
    sae = random_sae(0, fields.pop("d_in", 30), **fields)
    if change is not None:
        change(sae)
    with pytest.raises(error, match=message):
        from_sae(sae, geometry)


def test_an_unsupported_normalisation(geometry: Geometry) -> None:
    sae = random_sae(0, 30)
    sae.cfg.normalize_activations = "covariance_whitening"  # type: ignore[assignment]
    with pytest.raises(sap.UnsupportedError, match="'covariance_whitening' is not supported"):
        from_sae(sae, geometry)


def test_placing(geometry: Geometry) -> None:
    first, second = random_sae(0, 30), random_sae(2, 30)
    for given in (
        [second, first],
        {"anything": second, 0: first},
        (sae for sae in (first, second)),
        {"blocks.2.attn.hook_z": second, "blocks.0.attn.hook_z": first},
    ):
        assert list(place(given, geometry)) == [0, 2]
    assert list(place(second, geometry)) == [2]
    with pytest.raises(sap.InputError, match="two SAEs for hook_z of layer 0"):
        place([first, random_sae(0, 30, seed=1)], geometry)
    with pytest.raises(sap.InputError, match="given for layer 1, but its hook is in layer 0"):
        place({1: first}, geometry)
    with pytest.raises(sap.InputError, match="no SAEs given"):
        place([], geometry)
    assert place({}, geometry) == {}  # none, and said so
    for foreign in ([torch.nn.Linear(3, 3)], [3], {0: "x"}):
        with pytest.raises(sap.InputError, match="expected sae_lens SAEs, a release name"):
            place(foreign, geometry)


def test_saes_from_a_folder(tmp_path: Path, geometry: Geometry) -> None:
    saes = [random_sae(layer, 30, architecture="jumprelu") for layer in (0, 2)]
    for number, sae in enumerate(saes):
        sae.save_model(tmp_path / "many" / f"sae_{number}")
    loaded = sap.load_saes(tmp_path / "many")
    assert list(loaded) == ["sae_0", "sae_1"]
    assert torch.equal(loaded["sae_1"].W_enc, saes[1].W_enc)
    assert list(place(tmp_path / "many", geometry)) == [0, 2]
    assert list(place(str(tmp_path / "many" / "sae_1"), geometry)) == [2]


@pytest.mark.parametrize("architecture", ["standard", "topk_rescaled"])
def test_head_attribution(geometry: Geometry, architecture: str) -> None:
    sae: Any = random_sae(1, HEADS * WIDTH, architecture=architecture)
    table = sap.head_attribution(sae, n_heads=HEADS)
    heads = [f"head_{h}" for h in range(HEADS)]
    assert list(table.columns) == [*heads, "top_head", "dead"]
    assert len(table) == 40
    rows = sae.W_dec.detach().double().numpy()
    for feature in (0, 7, 39):
        norms = [np.linalg.norm(rows[feature, WIDTH * h : WIDTH * (h + 1)]) for h in range(HEADS)]
        expected = np.array(norms) / sum(norms)
        np.testing.assert_allclose(table.loc[feature, heads].astype(float), expected, rtol=1e-5)
        assert table.loc[feature, "top_head"] == expected.argmax()
    np.testing.assert_allclose(table[heads].sum(axis=1), 1, rtol=1e-5)
    assert table["dead"].isna().all()

    density = torch.full((40,), -2.0)
    density[4], density[5], density[6] = -10.0, -math.inf, -5.9
    sae.sparsity = density
    dead = sap.head_attribution(sae, n_heads=HEADS)["dead"]
    assert np.flatnonzero(dead).tolist() == [4, 5]
    dictionary = from_sae(sae, geometry)
    assert sap.head_attribution(dictionary)["dead"].tolist() == dead.tolist()
    wide = sap.head_attribution(dictionary, dead_below=1e-5)["dead"]
    assert np.flatnonzero(wide).tolist() == [4, 5, 6]


def test_head_attribution_needs_the_number_of_heads() -> None:
    sae = random_sae(1, HEADS * WIDTH)
    with pytest.raises(sap.InputError, match="pass n_heads="):
        sap.head_attribution(sae)
    with pytest.raises(sap.InputError, match="30 does not divide into 4 heads"):
        sap.head_attribution(sae, n_heads=4)


def test_head_attribution_of_a_feature_that_writes_nothing() -> None:
    sae: Any = random_sae(1, HEADS * WIDTH)
    with torch.no_grad():
        sae.W_dec[3] = 0
    table = sap.head_attribution(sae, n_heads=HEADS)
    shares = table.loc[3, [f"head_{h}" for h in range(HEADS)]]
    assert (shares == 0).all()


def test_the_strongest_of_wide_rows_are_those_of_topk() -> None:
    from sae_attn_plugin.dictionaries import top_of_rows

    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(64, 8192, generator=generator)
    rows[8:16] = rows[8:16].round(decimals=1)  # ties everywhere
    rows[16:24] = -rows[16:24].abs()
    rows[24:32, 3000:3100] = 7.0
    rows[32:40] = rows[32:40].sort(dim=1).values  # all in a few groups
    for k in (1, 20, 100):
        values, indices = top_of_rows(rows, k)
        expected = rows.topk(k, dim=1)
        assert torch.equal(values, expected.values)
        assert torch.equal(indices.sort(1).values, expected.indices.sort(1).values)


def test_wide_topk_saes_fire_as_in_sae_lens() -> None:
    model = tiny_gpt2()
    (sae, *_) = random_saes(model, "topk", d_sae=8192, k=20)
    dictionary = from_sae(sae, as_backend(model).geometry)
    z = torch.randn(700, 5, 6, generator=torch.Generator().manual_seed(0))
    encoded = dictionary.encode(z)
    dense = torch.zeros(700, 8192)
    dense[encoded.position, encoded.feature] = encoded.activation
    with torch.no_grad():
        theirs = sae.encode(z)
    assert torch.equal(dense > 0, theirs > 0)
    torch.testing.assert_close(dense, theirs)
    place = encoded.position * 8192 + encoded.feature
    assert bool((place.diff() > 0).all())
