"""Releases: the list, the loaders on files of the authors' format, and SAEs on disk by name."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pandas as pd
import pytest
import torch
from helpers import hooked_sae_transformer, random_sae, tiny_gpt2
from sae_lens import SAE
from sae_lens.loading import pretrained_sae_loaders as loaders
from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory
from safetensors.torch import save_file
from typer.testing import CliRunner

import sae_attn_plugin as sap
from sae_attn_plugin import pretrained, registration
from sae_attn_plugin.cli import app

GELU, GEMMA = "gelu-2l-hook-z-kk", "gemma-2b-hook-z-kk"


@pytest.fixture(autouse=True)
def _as_it_was() -> Any:
    """Nothing a test adds stays in sae_lens' directory."""
    directory, local = dict(get_pretrained_saes_directory()), dict(pretrained._LOCAL)
    yield
    for table, before in ((get_pretrained_saes_directory(), directory), (pretrained._LOCAL, local)):
        table.clear()
        table.update(before)


def write_paper_sae(
    folder: Path, name: str, model: str, layer: int, d_in: int, d_sae: int = 24, **changes: Any
) -> dict[str, torch.Tensor]:
    """Files as ``AutoEncoder.save`` of Kissane et al. writes them: a state dict and its cfg."""
    generator = torch.Generator().manual_seed(layer)
    weights = {
        name: torch.randn(shape, generator=generator)
        for name, shape in (
            ("W_enc", (d_in, d_sae)),
            ("W_dec", (d_sae, d_in)),
            ("b_enc", (d_sae,)),
            ("b_dec", (d_in,)),
        )
    }
    path = folder / f"{name}.pt"
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({key: torch.nn.Parameter(t) for key, t in weights.items()}, path)
    config = {
        "seed": 49,
        "model_name": model,
        "layer": layer,
        "site": "z",
        "head": "cat",
        "concat_heads": True,
        "act_name": f"blocks.{layer}.attn.hook_z",
        "act_size": d_in,
        "dict_size": d_sae,
        "seq_len": 128,
        "enc_dtype": "fp32",
        "device": "cuda",
        **changes,
    }
    (folder / f"{name}_cfg.json").write_text(json.dumps(config))
    return weights


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder per repository in place of the hub; ``asked`` holds what was asked for."""

    def download(repo_id: str, filename: str, subfolder: str | None = None, **_: Any) -> str:
        path = tmp_path / repo_id / (subfolder or "") / filename
        if not path.is_file():
            raise huggingface_hub.errors.EntryNotFoundError(f"no {filename} in {repo_id}")
        return str(path)

    def snapshot(repo_id: str, allow_patterns: list[str], **_: Any) -> str:
        assert allow_patterns == ["*_cfg.json"]  # not all weights
        return str(tmp_path / repo_id)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    monkeypatch.setattr(loaders, "hf_hub_download", download)
    return tmp_path


def gelu(hub: Path, **changes: Any) -> dict[str, torch.Tensor]:
    lookup = get_pretrained_saes_directory()[GELU]
    name = lookup.saes_map["blocks.1.hook_z"].removesuffix(".pt")
    return write_paper_sae(hub / lookup.repo_id, name, "gelu-2l", 1, 512, **changes)


# -- the authors' SAEs ----------------------------------------------------------------------------


def test_the_authors_format_loads_by_release(hub: Path) -> None:
    weights = gelu(hub)
    sae: Any = SAE.from_pretrained(GELU, "blocks.1.hook_z")
    x = torch.randn(3, 8, 64)
    with torch.no_grad():
        acts = ((x.flatten(-2) - weights["b_dec"]) @ weights["W_enc"] + weights["b_enc"]).relu()
        out = (acts @ weights["W_dec"] + weights["b_dec"]).unflatten(-1, (8, 64))
        torch.testing.assert_close(sae.encode(x), acts)
        torch.testing.assert_close(sae(x), out)
    metadata = sae.cfg.metadata
    assert metadata.hook_name == "blocks.1.attn.hook_z"
    assert (metadata.model_name, metadata.context_size) == ("gelu-2l", 128)
    assert (metadata.n_heads, metadata.d_head, metadata.value_biases) == (8, 64, "folded")
    assert sae.cfg.device == "cpu"  # the file says cuda
    config = loaders.load_sae_config_from_huggingface(GELU, "blocks.1.hook_z")
    assert config["d_sae"] == 24
    half = SAE.from_pretrained(GELU, "blocks.1.hook_z", dtype="bfloat16")
    assert half.W_enc.dtype == torch.bfloat16
    ours = sap.AttentionSAE.from_pretrained(GELU, "blocks.1.hook_z")
    assert (ours.n_heads, ours.d_head) == (8, 64)
    assert isinstance(sap.load_saes(GELU)["blocks.1.hook_z"], sap.AttentionSAE)


def test_a_file_whose_name_is_not_known_is_found_by_what_its_config_says(hub: Path) -> None:
    repo = hub / get_pretrained_saes_directory()[GEMMA].repo_id
    write_paper_sae(repo, "gpt2-small_L6_Hcat_z_v9", "gpt2-small", 6, 768)
    weights = write_paper_sae(repo, "gemma/gemma-2b_L6_Hcat_z_v1", "gemma-2b", 6, 2048)
    sae: Any = SAE.from_pretrained(GEMMA, "blocks.6.hook_z")
    assert torch.equal(sae.W_enc, weights["W_enc"])
    assert sae.cfg.metadata.n_heads == 8
    write_paper_sae(repo, "another", "gemma-2b", 6, 2048)
    with pytest.raises(sap.FileError, match=r"has 2 SAEs of gemma-2b, layer 6, .*another_cfg.json"):
        SAE.from_pretrained(GEMMA, "blocks.6.hook_z")
    shutil.rmtree(repo)
    write_paper_sae(repo, "gpt2-small_L6_Hcat_z_v9", "gpt2-small", 6, 768)
    with pytest.raises(sap.FileError, match=r"has 0 SAEs of gemma-2b, .*gpt2-small_L6"):
        SAE.from_pretrained(GEMMA, "blocks.6.hook_z")


def test_trap_pt_files_are_read_without_unpickling(hub: Path) -> None:
    gelu(hub)
    lookup = get_pretrained_saes_directory()[GELU]
    path = hub / lookup.repo_id / lookup.saes_map["blocks.1.hook_z"]
    torch.save({"W_enc": Path("/")}, path)
    with pytest.raises(sap.FileError, match=r"cannot read .*UnpicklingError: Weights only"):
        SAE.from_pretrained(GELU, "blocks.1.hook_z")
    path.write_bytes(b"nothing")
    with pytest.raises(sap.FileError, match="cannot read"):
        SAE.from_pretrained(GELU, "blocks.1.hook_z")
    torch.save({"W_enc": torch.zeros(512, 23)}, path)
    with pytest.raises(sap.FileError, match=r"W_enc should be \(512, 24\), is \(512, 23\)"):
        SAE.from_pretrained(GELU, "blocks.1.hook_z")
    torch.save({"W_enc": torch.zeros(512, 24)}, path)
    with pytest.raises(sap.FileError, match=r"W_dec should be \(24, 512\), is nothing"):
        SAE.from_pretrained(GELU, "blocks.1.hook_z")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"act_name": "blocks.1.hook_resid_post"}, "expected an SAE on all heads"),
        ({"concat_heads": False}, "heads not concatenated; expected"),
    ],
)
def test_configs_of_other_sites(hub: Path, changes: dict[str, Any], message: str) -> None:
    gelu(hub, **changes)
    with pytest.raises(sap.FileError, match=message):
        SAE.from_pretrained(GELU, "blocks.1.hook_z")


def test_a_config_that_is_none(hub: Path) -> None:
    gelu(hub)
    lookup = get_pretrained_saes_directory()[GELU]
    name = lookup.saes_map["blocks.1.hook_z"].removesuffix(".pt")
    config = hub / lookup.repo_id / f"{name}_cfg.json"
    config.write_text('{"act_size": 3}')
    with pytest.raises(sap.FileError, match="is no SAE configuration: it has no 'act_name'"):
        SAE.from_pretrained(GELU, "blocks.1.hook_z")
    config.write_text("{")
    with pytest.raises(sap.FileError, match="is damaged or holds no SAE configuration"):
        SAE.from_pretrained(GELU, "blocks.1.hook_z")


def test_releases_of_the_authors_are_marked_as_folded(hub: Path) -> None:
    release, sae_id = "gpt2-small-hook-z-kk", "blocks.5.hook_z"
    lookup = get_pretrained_saes_directory()[release]
    name = lookup.saes_map[sae_id].removesuffix(".pt")
    write_paper_sae(hub / lookup.repo_id, name, "gpt2-small", 5, 768)
    plain = SAE.from_pretrained(release, sae_id)
    assert plain.cfg.metadata.value_biases is None  # sae_lens' own, left alone
    ours = sap.AttentionSAE.from_pretrained(release, sae_id)
    assert ours.cfg.metadata.value_biases == "folded"
    assert (ours.n_heads, ours.d_head) == (12, 64)


# -- Gemma Scope 2 --------------------------------------------------------------------------------


def test_trap_gemma_scope_2_takes_flat_z(hub: Path) -> None:
    release = "gemma-scope-2-270m-pt-att"
    lookup = get_pretrained_saes_directory()[release]
    sae_id, path = next(iter(lookup.saes_map.items()))
    folder = hub / lookup.repo_id / path
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    weights = {
        "w_enc": torch.randn(1024, 16),
        "w_dec": torch.randn(16, 1024),
        "b_enc": torch.randn(16),
        "b_dec": torch.randn(1024),
        "threshold": torch.rand(16),
    }
    save_file(weights, folder / "params.safetensors")
    (folder / "config.json").write_text(
        json.dumps(
            {
                "architecture": "jump_relu",
                "model_name": "google/gemma-3-270m",
                "hf_hook_point_in": "model.layers.12.self_attn.o_proj.input",
            }
        )
    )
    with pytest.MonkeyPatch.context() as patch:
        shapes = {name: list(t.shape) for name, t in weights.items()}
        patch.setattr(loaders, "get_safetensors_tensor_shapes", lambda *_: shapes)
        flat: Any = SAE.from_pretrained(release, sae_id)
        again: Any = SAE.from_pretrained(f"{release}-hook-z", sae_id)
        ours = sap.AttentionSAE.from_pretrained(release, sae_id)
    z = torch.randn(2, 3, 4, 256)
    assert flat.cfg.reshape_activations == "none"
    with pytest.raises(RuntimeError, match=r"must match the size"):
        flat(z)
    with torch.no_grad():
        expected = flat(z.flatten(-2)).unflatten(-1, (4, 256))
        torch.testing.assert_close(again(z), expected)
        torch.testing.assert_close(ours(z), expected)
    assert again.cfg.metadata.hf_hook_name == "model.layers.12.self_attn.o_proj.input"


# -- SAEs on disk ---------------------------------------------------------------------------------


def test_saes_on_disk_get_a_release_name(tmp_path: Path) -> None:
    saes = {"l0": random_sae(0, 30), "l2": random_sae(2, 30, architecture="jumprelu")}
    for name, sae in saes.items():
        sae.save_model(tmp_path / name)
    save_file({"sparsity": torch.zeros(40)}, tmp_path / "l2" / "sparsity.safetensors")
    weights = write_paper_sae(tmp_path, "paper", "tiny", 1, 30)
    paths = {"l0": tmp_path / "l0", "l2": str(tmp_path / "l2"), "l1": tmp_path / "paper.pt"}
    sap.register_release("mine", "tiny", paths)
    sap.register_release("mine", "tiny", paths)  # again is fine
    for name, sae in saes.items():
        loaded = SAE.from_pretrained("mine", name)
        assert torch.equal(loaded.W_enc, sae.W_enc)
    assert torch.equal(SAE.from_pretrained("mine", "l1").W_enc, weights["W_enc"])
    density = SAE.from_pretrained_with_cfg_and_sparsity("mine", "l2")[2]
    assert density is not None
    assert loaders.load_sae_config_from_huggingface("mine", "l2")["architecture"] == "jumprelu"
    lens = sap.FeatureLens(tiny_gpt2(), "mine")
    assert list(lens.dictionaries) == [0, 1, 2]
    row = sap.releases().set_index("release").loc["mine"]
    assert (row.model, row.hook, row.saes) == ("tiny", "z", 3)

    get_pretrained_saes_directory.cache_clear()  # survives
    assert torch.equal(SAE.from_pretrained("mine", "l0").W_enc, saes["l0"].W_enc)
    assert registration.DEMO_RELEASE in get_pretrained_saes_directory()

    shutil.rmtree(tmp_path / "l0")
    with pytest.raises(sap.FileError, match="the release 'mine' is not where it was"):
        SAE.from_pretrained("mine", "l0")


def test_what_cannot_be_a_release(tmp_path: Path) -> None:
    random_sae(0, 30).save_model(tmp_path / "sae")
    with pytest.raises(sap.InputError, match="has no SAEs"):
        sap.register_release("empty", "tiny", {})
    with pytest.raises(sap.FileError, match=r"no SAE at .*cfg\.json is not there"):
        sap.register_release("none", "tiny", {"a": tmp_path})
    (tmp_path / "x.pt").touch()
    with pytest.raises(sap.FileError, match=r"no SAE at .*x_cfg\.json"):
        sap.register_release("none", "tiny", {"a": tmp_path / "x.pt"})
    with pytest.raises(sap.InputError, match="release 'gpt2-small-res-jb' already, of 13 SAEs"):
        sap.register_release("gpt2-small-res-jb", "tiny", {"a": tmp_path / "sae"})
    for name in ("none", "empty"):
        assert name not in get_pretrained_saes_directory()


def test_names_that_others_took_first_are_left_to_them() -> None:
    directory = get_pretrained_saes_directory()
    other = copy.copy(directory["gpt2-small-res-jb"])
    directory[GELU] = other
    registration.register()
    assert directory[GELU] is other
    get_pretrained_saes_directory.cache_clear()
    assert get_pretrained_saes_directory()[GELU].model == "gelu-2l"


# -- the list -------------------------------------------------------------------------------------


def test_the_list_of_releases() -> None:
    table = sap.releases().set_index("release")
    assert isinstance(table, pd.DataFrame)
    kk = table.loc["gpt2-small-hook-z-kk"]
    assert (kk.model, kk.hook, kk.saes, kk.d_in) == ("gpt2-small", "z", 12, 768)
    assert kk.layers == tuple(range(12))
    assert kk.d_sae == (24576, 49152)
    assert kk.l0 == (3.0, 23.0)
    assert kk.variance_explained == (-7.55, 0.43)
    assert kk.value_biases == "folded"
    scope = table.loc["gemma-scope-2b-pt-att"]
    assert (scope.saes, scope.d_in, scope.d_sae) == (260, 2048, (16384, 65536))
    assert set(scope.transcoders) == {
        "gemma-scope-2b-pt-transcoders",
        "mntss-gemma-2-2b-2.5m-clt-as-per-layer",
    }
    assert table.loc["gemma-scope-2-27b-it-att"].d_sae == (16384, 65536, 262144)
    out = table[table.hook == "attn_out"]
    assert set(out.index) == {
        "gpt2-small-attn-out-v5-32k",
        "gpt2-small-attn-out-v5-128k",
        "pythia-70m-deduped-att-sm",
        "llama_scope_lxa_8x",
        "llama_scope_lxa_32x",
    }
    assert out.d_in.to_dict() == {
        "gpt2-small-attn-out-v5-32k": 768,
        "gpt2-small-attn-out-v5-128k": 768,
        "pythia-70m-deduped-att-sm": 512,
        "llama_scope_lxa_8x": 4096,
        "llama_scope_lxa_32x": 4096,
    }
    assert out.d_sae["llama_scope_lxa_8x"] == (32768,)
    assert {GELU, GEMMA, registration.DEMO_RELEASE} <= set(table.index)
    # every release of sae_lens whose name says attention is here, and no other
    directory = get_pretrained_saes_directory()
    named = {
        name for name in directory if any(s in name for s in ("-att", "hook-z", "attn-out", "lxa"))
    }
    assert set(table.index) == named


def test_the_list_of_saes() -> None:
    rows = sap.releases(by_sae=True).set_index(["release", "sae_id"])
    kk = rows.loc[("gpt2-small-hook-z-kk", "blocks.5.hook_z")]
    assert (kk.layer, kk.d_in, kk.d_sae, kk.l0, kk.variance_explained) == (5, 768, 49152, 17, 0.13)
    canonical = rows.loc[("gemma-scope-2b-pt-att-canonical", "layer_3/width_65k/canonical")]
    assert (canonical.layer, canonical.d_sae) == (3, 65536)
    assert pd.isna(canonical.l0)
    lxa = rows.loc[("llama_scope_lxa_8x", "l31a_8x")]
    assert (lxa.layer, lxa.d_in, lxa.hook) == (31, 4096, "attn_out")
    demo = rows.loc[(registration.DEMO_RELEASE, "blocks.2.attn.hook_z")]
    assert (demo.layer, demo.d_in, demo.d_sae) == (2, 128, 1024)
    assert not rows.layer.isna().any()


def test_a_demo_sae_splices() -> None:
    """The shipped SAEs, loaded by sae_lens alone, in sae_lens' model."""
    plain = sap.demo.load_model("nnsight")
    model = hooked_sae_transformer(plain._module)
    tokens = torch.tensor([[1, 5, 9, 12]])
    sae = SAE.from_pretrained(registration.DEMO_RELEASE, "blocks.1.attn.hook_z")
    with torch.no_grad():
        theirs = model.run_with_saes(tokens, saes=[sae])
        with sap.splice(model, sae):
            ours = model(tokens)
    torch.testing.assert_close(ours, theirs)


def test_the_list_on_the_command_line(tmp_path: Path) -> None:
    def call(*arguments: object) -> Any:
        return CliRunner().invoke(app, ["releases", *map(str, arguments)])

    path = tmp_path / "list.csv"
    result = call("--model", "GPT2", "--hook", "z", "--out", path)
    assert result.exit_code == 0, result.output
    assert "gpt2-small-hook-z-kk" in result.stdout
    assert "attn-out" not in result.stdout
    assert "0-11" in result.stdout
    assert pd.read_csv(path).release.tolist() == ["gpt2-small-hook-z-kk"]
    result = call("--saes", "gpt2-small-hook-z-kk")
    assert "blocks.11.hook_z" in result.stdout
    for arguments, message in (
        (("--saes", "gpt2-small-res-jb"), "no release 'gpt2-small-res-jb' of attention-output"),
        (("--out", tmp_path / "list.txt"), "expected a path that ends in .csv"),
    ):
        result = call(*arguments)
        assert result.exit_code == 2
        assert message in " ".join(result.stderr.split())
