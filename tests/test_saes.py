"""SAEs that know their heads: each trap of sae_lens on attention z, and that it is not met here.

Every test shows the trap on plain sae_lens first, so that it fails when sae_lens mends it.
"""

from __future__ import annotations

import copy
import io
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import SAE_ARCHITECTURES, hooked_sae_transformer, random_sae, tiny_gpt2
from sae_lens import SAE, StandardTrainingSAEConfig
from sae_lens.loading.pretrained_sae_loaders import (
    get_gemma_2_config_from_hf,
    handle_config_defaulting,
)
from sae_lens.saes.sae import SAEMetadata, TrainingSAE
from torch import Tensor

import sae_attn_plugin as sap
from sae_attn_plugin import saes

HEADS, WIDTH = 5, 6
NORMALISATIONS = ("none", "layer_norm", "constant_norm_rescale")


def plain(architecture: str = "standard", layer: int = 1, **config: Any) -> Any:
    return random_sae(layer, HEADS * WIDTH, architecture=architecture, **config)


def attention(architecture: str = "standard", layer: int = 1, **config: Any) -> Any:
    return sap.AttentionSAE.of(plain(architecture, layer, **config), n_heads=HEADS)


def one_head(head: int = 3, layer: int = 1, **config: Any) -> Any:
    config = {"reshape_activations": "none", "d_sae": 20, **config}
    sae = random_sae(layer, WIDTH, **config)
    sae.cfg.metadata.hook_head_index = head
    return sae


def z(*shape: int) -> Tensor:
    return torch.randn(*(shape or (2, 7)), HEADS, WIDTH)


@pytest.fixture(scope="module")
def model() -> Any:
    return hooked_sae_transformer(tiny_gpt2())


TOKENS = torch.tensor([[3, 14, 15, 9, 26, 5]])


# -- the same SAE ---------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", SAE_ARCHITECTURES)
@pytest.mark.parametrize("normalisation", NORMALISATIONS)
@pytest.mark.parametrize("subtract", [True, False])
def test_it_computes_what_sae_lens_computes(
    architecture: str, normalisation: str, subtract: bool
) -> None:
    config: dict[str, Any] = dict(
        normalize_activations=normalisation, apply_b_dec_to_input=subtract
    )
    theirs, ours = plain(architecture, **config), attention(architecture, **config)
    assert isinstance(ours, SAE)
    x = z()
    with torch.no_grad():
        torch.testing.assert_close(ours.encode(x), theirs.encode(x))
        torch.testing.assert_close(ours(x), theirs(x))
        ours.turn_off_forward_pass_hook_z_reshaping()
        theirs.turn_off_forward_pass_hook_z_reshaping()
        torch.testing.assert_close(ours(x.flatten(-2)), theirs(x.flatten(-2)))


def test_weights_are_shared_and_the_original_is_left_alone() -> None:
    theirs = plain()
    before = theirs.cfg.to_dict()
    ours = sap.AttentionSAE.of(theirs, n_heads=HEADS)
    assert ours.W_enc is theirs.W_enc
    assert ours.cfg.metadata.n_heads == HEADS
    assert theirs.cfg.to_dict() == before
    assert theirs.cfg.metadata.n_heads is None
    assert sap.AttentionSAE.of(ours) is ours


def test_what_is_saved_is_plain_sae_lens(tmp_path: Path) -> None:
    ours = attention("topk_rescaled")
    ours.save_model(tmp_path)
    theirs = SAE.load_from_disk(tmp_path)
    assert type(theirs).__module__ == "sae_lens.saes.topk_sae"
    assert theirs.cfg.reshape_activations == "hook_z"
    again = sap.AttentionSAE.load_from_disk(tmp_path)
    assert (again.n_heads, again.d_head) == (HEADS, WIDTH)
    x = z()
    with torch.no_grad():
        torch.testing.assert_close(again(x), theirs(x), rtol=0, atol=1e-6)
        torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=1e-6)


# -- section 2b: hook_z ---------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", SAE_ARCHITECTURES)
def test_trap_2b_1_decode_before_encode(architecture: str) -> None:
    features = torch.rand(2, 7, 40)
    theirs = plain(architecture)
    with pytest.raises(AttributeError, match="d_head"):
        theirs.decode(features)
    ours = attention(architecture)
    with torch.no_grad():
        got = ours.decode(features)
        theirs.encode(z())
        assert got.shape == (2, 7, HEADS, WIDTH)
        torch.testing.assert_close(got, theirs.decode(features))


def test_trap_2b_1_where_decoding_needs_the_scale_it_says_so() -> None:
    ours = attention(normalize_activations="layer_norm")
    with pytest.raises(sap.InputError, match=r"normalises its input \(layer_norm\), so decode"):
        ours.decode(torch.rand(3, 40))


def test_trap_2b_2_flat_input() -> None:
    x = z()
    with pytest.raises(RuntimeError, match=r"\(210\) must match the size of tensor b \(30\)"):
        plain()(x.flatten(-2))
    ours = attention()
    with torch.no_grad():
        expected = ours(x)
        torch.testing.assert_close(ours(x.flatten(-2)), expected.flatten(-2))
        torch.testing.assert_close(ours(x.flatten(-2)[0]), expected.flatten(-2)[0])
        torch.testing.assert_close(ours.encode(x.flatten(-2)), ours.encode(x))
    for shape in ((2, 7, 31), (2, 7, WIDTH, HEADS), (2, 7, HEADS, WIDTH + 1)):
        with pytest.raises(sap.InputError, match=r"takes z as \[\.\.\., 5, 6\] .* or \[\.\.\., 30"):
            ours(torch.zeros(shape))
    ours.turn_off_forward_pass_hook_z_reshaping()
    with pytest.raises(sap.InputError, match=r"takes \[\.\.\., 30\] while its reshaping is off"):
        ours(x)


@pytest.mark.parametrize("normalisation", NORMALISATIONS)
def test_trap_2b_3_deepcopy_before_first_use(normalisation: str) -> None:
    theirs = plain()
    with pytest.raises(AttributeError, match="d_head"):
        copy.deepcopy(theirs)(z())
    ours = attention("gated", normalize_activations=normalisation)
    copied = copy.deepcopy(ours)
    x = z()
    with torch.no_grad():
        expected = ours(x)
        copied.W_dec.mul_(2)
        assert not torch.allclose(copied(x), expected)
        copied.W_dec.div_(2)
        torch.testing.assert_close(copied(x), expected)


@pytest.mark.parametrize("architecture", SAE_ARCHITECTURES)
def test_trap_2b_4_torch_save(architecture: str) -> None:
    with pytest.raises(AttributeError, match=r"[Cc]an't (get|pickle) local"):
        torch.save(plain(architecture), io.BytesIO())
    ours, file = attention(architecture, normalize_activations="layer_norm"), io.BytesIO()
    torch.save(ours, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    x = z()
    with torch.no_grad():
        torch.testing.assert_close(again(x), ours(x))


def test_trap_2b_5_a_later_input_of_another_split() -> None:
    x = z()
    theirs = plain()
    with torch.no_grad():
        theirs(x)
        other = theirs(x.reshape(2, 7, WIDTH, HEADS))
    assert other.shape == (2, 7, HEADS, WIDTH)  # not the shape it was given
    ours = attention()
    with torch.no_grad():
        ours(x)
        with pytest.raises(sap.InputError, match=r"takes z as \[\.\.\., 5, 6\]"):
            ours(x.reshape(2, 7, WIDTH, HEADS))
        for shape in ((3,), (1, 1), (4, 2, 9)):  # batch shapes may change
            assert ours(z(*shape)).shape == (*shape, HEADS, WIDTH)


def test_trap_reshape_none_is_the_default_of_training(model: Any, tmp_path: Path) -> None:
    metadata = SAEMetadata(model_name="tiny", hook_name="blocks.1.attn.hook_z")
    config = StandardTrainingSAEConfig(d_in=30, d_sae=40, metadata=metadata)
    TrainingSAE.from_dict(config.to_dict()).save_inference_model(tmp_path)
    with pytest.raises(RuntimeError, match="must match"):
        model.run_with_saes(TOKENS, saes=[SAE.load_from_disk(tmp_path)], use_error_term=True)
    model.reset_saes()
    with pytest.warns(UserWarning, match=r"saved with reshape_activations='none'.*read as"):
        ours = sap.AttentionSAE.load_from_disk(tmp_path, n_heads=HEADS)
    got = model.run_with_saes(TOKENS, saes=[ours], use_error_term=True)
    torch.testing.assert_close(got, model(TOKENS))
    with pytest.warns(UserWarning, match="read as 'hook_z'"):
        loaded = sap.load_saes(tmp_path)[tmp_path.name]
    assert loaded.cfg.reshape_activations == "hook_z"
    got = model.run_with_saes(TOKENS, saes=[loaded], use_error_term=True)
    torch.testing.assert_close(got, model(TOKENS))
    # and what is trained here is saved right
    ours = saes.training_config("standard", n_heads=HEADS, d_head=WIDTH, metadata=metadata)
    assert ours.reshape_activations == "hook_z"


@pytest.mark.parametrize("error_term", [True, False])
def test_trap_hook_head_index_is_ignored_when_spliced(model: Any, error_term: bool) -> None:
    sae = one_head(3)
    _, cache = model.run_with_cache_with_saes(TOKENS, saes=[sae], use_error_term=error_term)
    name = "blocks.1.attn.hook_z.hook_sae_acts_post"
    assert cache[name].shape == (1, 6, HEADS, 20)  # on all heads
    ours = sap.AttentionSAE.of(sae, n_heads=HEADS)
    logits, cache = model.run_with_cache_with_saes(TOKENS, saes=[ours], use_error_term=error_term)
    assert cache[name].shape == (1, 6, 20)
    _, clean = model.run_with_cache(TOKENS)
    own = clean["blocks.1.attn.hook_z"]
    with torch.no_grad():
        expected = own.clone()
        expected[:, :, 3] = own[:, :, 3] if error_term else sae(own[:, :, 3])

    def replaced(_: Tensor, hook: Any) -> Tensor:  # noqa: ARG001
        return expected

    by_hand = model.run_with_hooks(TOKENS, fwd_hooks=[("blocks.1.attn.hook_z", replaced)])
    torch.testing.assert_close(logits, by_hand)
    if error_term:

        def ablate(features: Tensor, hook: Any) -> Tensor:  # noqa: ARG001
            features[:] = 0
            return features

        ablated = model.run_with_hooks_with_saes(TOKENS, saes=[ours], fwd_hooks=[(name, ablate)])
        assert not torch.allclose(ablated, by_hand)


def test_one_head_alone_and_in_place() -> None:
    sae = one_head(3)
    ours = sap.AttentionSAE.of(sae, n_heads=HEADS)
    assert (ours.head, ours.n_heads, ours.d_head) == (3, HEADS, WIDTH)
    x = z().double()  # what passes by keeps its precision
    with torch.no_grad():
        out = ours(x)
        others = [0, 1, 2, 4]
        assert torch.equal(out[:, :, others], x[:, :, others])
        torch.testing.assert_close(out[:, :, 3].float(), sae(x[:, :, 3]))
        features = ours.encode(x)
        ours.decode(features)
        with pytest.raises(sap.InputError, match="leaves the other heads as they are, so decode"):
            ours.decode(features)
        ours.turn_off_forward_pass_hook_z_reshaping()
        torch.testing.assert_close(ours(x[:, :, 3]), sae(x[:, :, 3]))
        ours.turn_on_forward_pass_hook_z_reshaping()
        with pytest.raises(sap.InputError, match="for the head's z alone, call turn_off"):
            ours(x[:, :, 3])
    x = x.requires_grad_()
    ours(x).sum().backward()
    assert x.grad is not None
    assert (x.grad[:, :, others] == 1).all()


def test_what_one_head_saves_is_plain_sae_lens(tmp_path: Path) -> None:
    ours = sap.AttentionSAE.of(one_head(3), n_heads=HEADS)
    ours.save_model(tmp_path)
    theirs = SAE.load_from_disk(tmp_path)
    assert theirs.cfg.reshape_activations == "none"
    assert theirs.cfg.metadata.hook_head_index == 3
    again = sap.AttentionSAE.load_from_disk(tmp_path)
    assert (again.head, again.n_heads) == (3, HEADS)
    x = z()
    with torch.no_grad():
        torch.testing.assert_close(again(x)[:, :, 3], theirs(x[:, :, 3]))


def test_trap_evals_leave_reshaping_off_after_an_exception() -> None:
    ours = attention()
    x = z()
    with torch.no_grad():
        expected = ours(x)
        ours.turn_off_forward_pass_hook_z_reshaping()
        with pytest.raises(sap.InputError, match="turn_on_forward_pass_hook_z_reshaping"):
            ours(x)  # loud, not wrong
        ours.turn_on_forward_pass_hook_z_reshaping()
        torch.testing.assert_close(ours(x), expected)


def test_trap_width_table_of_gemma_scope_1() -> None:
    config = get_gemma_2_config_from_hf(
        "google/gemma-scope-27b-pt-att", "layer_10/width_131k/average_l0_50", "cpu"
    )
    assert config["d_in"] == 4608  # 32 heads x 128 is 4096
    sae = random_sae(10, 4608, d_sae=8)
    sae.cfg.metadata.model_name = config["model_name"]
    with pytest.raises(sap.InputError, match="d_in 4608, which is not that of 32 heads x 128"):
        sap.AttentionSAE.of(sae)


def test_trap_config_dicts_lose_what_sae_lens_does_not_know() -> None:
    old = {"architecture": "standard", "d_in": 30, "d_sae": 40, "hook_name": "x", "n_heads": 5}
    assert "n_heads" not in handle_config_defaulting(dict(old))["metadata"]
    ours = attention().cfg.to_dict()
    assert handle_config_defaulting(ours)["metadata"]["n_heads"] == HEADS


def test_trap_missing_metadata_is_none_and_no_error() -> None:
    sae = random_sae(1, 30)
    assert sae.cfg.metadata.n_haeds is None
    with pytest.raises(sap.InputError, match="does not say how many heads it spans; pass n_heads="):
        sap.AttentionSAE.of(sae)


def test_trap_hook_names_are_not_checked() -> None:
    """What sae_lens' runners write into the metadata when training starts is checked."""
    plain_config = StandardTrainingSAEConfig(d_in=30, d_sae=40)
    plain_config.metadata.hook_name = "blocks.1.attn.hook_zz"
    for head in (None, 2):
        config = saes.training_config("standard", n_heads=HEADS, d_head=WIDTH, head=head)
        metadata = TrainingSAE.from_dict(config.to_dict()).cfg.metadata
        for name in ("blocks.1.attn.hook_zz", "blocks.1.hook_resid_pre"):
            with pytest.raises(sap.InputError, match=r"expected 'blocks\.LAYER\.attn\.hook_z'"):
                metadata.hook_name = name
        metadata.hook_name = "blocks.1.attn.hook_z"
        with pytest.raises(sap.InputError, match=rf"hook_head_index is 3, but .* head={head}"):
            metadata.hook_head_index = 3
        metadata.hook_head_index = head


# -- what does not fit ----------------------------------------------------------------------------


def test_configurations_say_what_is_wrong() -> None:
    def made(architecture: str = "topk", **options: Any) -> Any:
        return saes.training_config(
            architecture, **{"n_heads": HEADS, "d_head": WIDTH, "d_sae": 40, **options}
        )

    assert made().d_in == 30
    assert made(head=1).d_in == WIDTH
    assert saes.training_config(n_heads=HEADS, d_head=WIDTH).d_sae == 240
    cases: tuple[tuple[dict[str, Any], str], ...] = (
        ({"architecture": "temporal"}, "no training architecture 'temporal' .* matryoshka"),
        ({"l1_coefficient": 3}, "topk has no option 'l1_coefficient'"),
        ({"d_in": 31}, "d_in 31 is not that of 5 heads x 6: 30; leave it out"),
        ({"head": 5}, r"no head 5; there are: 0\.\.4"),
        ({"n_heads": 0}, "needs n_heads, d_head and d_sae"),
    )
    for options, message in cases:
        with pytest.raises(sap.InputError, match=message):
            made(**options)


def test_what_cannot_be_given_heads() -> None:
    training = TrainingSAE.from_dict(
        saes.training_config("batchtopk", n_heads=HEADS, d_head=WIDTH).to_dict()
    )
    with pytest.raises(sap.UnsupportedError, match="a training SAE cannot be given heads"):
        sap.AttentionSAE.of(training)
    for options in ({"n_heads": 4}, {"n_heads": 5, "d_head": 7}, {"d_head": 4}):
        with pytest.raises(sap.InputError, match="d_in 30, which is not that of"):
            sap.AttentionSAE.of(plain(), **options)
    with pytest.raises(sap.InputError, match=r"head 7, cannot be: there are heads 0\.\.4"):
        sap.AttentionSAE.of(one_head(7), n_heads=HEADS)
    stream = random_sae(0, 30, reshape_activations="none")
    stream.cfg.metadata.hook_name = "blocks.0.hook_resid_pre"
    with pytest.raises(sap.InputError, match="no attention z"):
        sap.AttentionSAE.of(stream, n_heads=HEADS)


@pytest.mark.parametrize("architecture", sorted(saes.ARCHITECTURES))
def test_training_saes_can_be_copied_pickled_and_resumed(architecture: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {}
    if "matryoshka" in architecture:
        options["matryoshka_widths"] = [20, 40]
    if "topk" in architecture:
        options["k"] = 4
    sae = TrainingSAE.from_dict(
        saes.training_config(
            architecture, n_heads=HEADS, d_head=WIDTH, d_sae=40, **options
        ).to_dict()
    )
    assert isinstance(sae, saes.ARCHITECTURES[architecture][0])
    x, file = z().flatten(0, 1).flatten(-2), io.BytesIO()
    torch.save(sae, file)
    file.seek(0)
    with torch.no_grad(), warnings.catch_warnings():
        expected = sae(x)
        torch.testing.assert_close(copy.deepcopy(sae)(x), expected)
        torch.testing.assert_close(torch.load(file, weights_only=False)(x), expected)
        sae.save_model(tmp_path)  # what a checkpoint of sae_lens' runner holds
        torch.testing.assert_close(TrainingSAE.load_from_disk(tmp_path)(x), expected)
    assert expected.shape == x.shape
