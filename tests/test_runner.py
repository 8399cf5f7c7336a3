"""sae_lens' own training runner on attention z, and what it saves, where this package is not."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from helpers import hooked_sae_transformer, tiny_gpt2, word_tokenizer
from sae_lens import SAE, LanguageModelSAERunnerConfig, LanguageModelSAETrainingRunner
from sae_lens.config import LoggingConfig
from sae_lens.evals import EvalConfig, run_evals
from sae_lens.training.activation_scaler import ActivationScaler
from sae_lens.training.activations_store import ActivationsStore
from safetensors.torch import load_file, save_file

import sae_attn_plugin as sap
from sae_attn_plugin import saes

# sae_lens' store copies tensors in a way that torch warns of
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:sae_lens")
HEADS, WIDTH, LAYER = 5, 6, 1
HOOK = f"blocks.{LAYER}.attn.hook_z"
OPTIONS: dict[str, dict[str, Any]] = {
    "standard": {"l1_coefficient": 0.05},
    "gated": {"l1_coefficient": 0.05},
    "topk": {"k": 6},
    "jumprelu": {"l0_coefficient": 0.01},
    "batchtopk": {
        "k": 6,
        "topk_threshold_lr": 0.2,
        "normalize_activations": "expected_average_only_in",
    },
    "matryoshka_batchtopk": {"k": 6, "topk_threshold_lr": 0.2, "matryoshka_widths": [16, 64]},
}
TOKENS = torch.arange(2, 50).reshape(4, 12)

# Runs where this package cannot be imported, not even by accident.
ELSEWHERE = """
import sys, json
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "sae_attn_plugin":
            raise ImportError("sae_attn_plugin is blocked here")
sys.meta_path.insert(0, Blocked())
import torch, warnings
warnings.simplefilter("ignore")
from safetensors.torch import load_file, save_file
from sae_lens import SAE, HookedSAETransformer
from transformer_lens import HookedTransformerConfig
folder = sys.argv[1]
cfg = json.load(open(folder + "/model.json"))
model = HookedSAETransformer(HookedTransformerConfig(**cfg))
model.load_state_dict(load_file(folder + "/model.safetensors"))
model.eval()
tokens = torch.tensor(json.load(open(folder + "/tokens.json")))
out = {}
with torch.no_grad():
    for name in json.load(open(folder + "/names.json")):
        sae = SAE.load_from_disk(folder + "/" + name)
        assert type(sae).__module__.startswith("sae_lens."), type(sae)
        logits, cache = model.run_with_cache_with_saes(tokens, saes=[sae])
        point = sae.cfg.metadata.hook_name
        out[name + ".logits"] = logits
        out[name + ".features"] = cache[point + ".hook_sae_acts_post"]
        out[name + ".z"] = cache[point + ".hook_sae_output"]
        exact = model.run_with_saes(tokens, saes=[sae], use_error_term=True)
        assert (exact - model(tokens)).abs().max() < 1e-5
assert "sae_attn_plugin" not in sys.modules
save_file({k: v.contiguous() for k, v in out.items()}, folder + "/out.safetensors")
"""


@pytest.fixture(scope="module")
def model() -> Any:
    return hooked_sae_transformer(tiny_gpt2(), word_tokenizer())


def rows() -> Dataset:
    tokens = torch.randint(2, 60, (3200, 16), generator=torch.Generator().manual_seed(0))
    return Dataset.from_dict({"input_ids": tokens.tolist()})


def train(model: Any, config: Any, out: Path, hook: str = HOOK, **options: Any) -> Path:
    settings: dict[str, Any] = dict(
        sae=config,
        model_name="tiny",
        hook_name=hook,
        dataset_path="tokens",
        is_dataset_tokenized=True,
        streaming=False,
        prepend_bos=True,
        context_size=16,
        training_tokens=3200,
        train_batch_size_tokens=64,
        n_batches_in_buffer=8,
        store_batch_size_prompts=4,
        n_batches_for_norm_estimate=5,
        lr=1e-2,
        device="cpu",
        n_checkpoints=0,
        checkpoint_path=None,
        output_path=str(out),
        logger=LoggingConfig(log_to_wandb=False),
        verbose=False,
    )
    LanguageModelSAETrainingRunner(
        LanguageModelSAERunnerConfig(**{**settings, **options}),
        override_dataset=rows(),
        override_model=model,
    ).run()
    return out


@pytest.fixture(scope="module")
def trained(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An SAE of every architecture from sae_lens' runner, and where they are."""
    folder = tmp_path_factory.mktemp("trained")
    for name, options in OPTIONS.items():
        torch.manual_seed(0)
        config = saes.training_config(name, n_heads=HEADS, d_head=WIDTH, d_sae=64, **options)
        train(model, config, folder / name)
    return folder


def test_every_training_architecture_is_here() -> None:
    assert set(OPTIONS) == set(saes.ARCHITECTURES)


@pytest.mark.parametrize("name", OPTIONS)
def test_what_the_runner_saves_says_all_there_is_to_know(trained: Path, name: str) -> None:
    config = json.loads((trained / name / "cfg.json").read_text())
    plain = {"batchtopk": "jumprelu", "matryoshka_batchtopk": "jumprelu"}.get(name, name)
    assert config["architecture"] == plain
    assert config["reshape_activations"] == "hook_z"
    assert config["d_in"] == HEADS * WIDTH
    assert "n_heads" not in config  # sae_lens has no such field
    metadata = config["metadata"]
    assert (metadata["n_heads"], metadata["d_head"]) == (HEADS, WIDTH)
    assert metadata["hook_name"] == HOOK
    assert metadata["training_architecture"] == name


@pytest.mark.parametrize("name", OPTIONS)
def test_training_fits(model: Any, trained: Path, name: str) -> None:
    sae = sap.AttentionSAE.load_from_disk(trained / name)
    assert (sae.n_heads, sae.d_head) == (HEADS, WIDTH)
    with torch.no_grad():
        z = model.run_with_cache(TOKENS)[1][HOOK][:, 1:]
        left = (sae(z) - z).square().sum()
        whole = (z - z.mean((0, 1))).square().sum()
    assert left < 0.8 * whole


def test_saved_saes_splice_the_same_where_this_package_is_not(
    model: Any, trained: Path, tmp_path: Path
) -> None:
    names = list(OPTIONS)
    config = model.cfg.to_dict()
    keep = {"n_layers", "d_model", "n_ctx", "d_head", "n_heads", "d_mlp", "d_vocab", "act_fn"}
    keep |= {"normalization_type", "eps", "positional_embedding_type", "attn_scale", "device"}
    keep |= {"use_attn_scale", "d_vocab_out", "original_architecture"}
    config = {key: value for key, value in config.items() if key in keep}
    (tmp_path / "model.json").write_text(json.dumps(config, default=str))
    save_file(
        {k: v.contiguous() for k, v in model.state_dict().items()}, tmp_path / "model.safetensors"
    )
    (tmp_path / "tokens.json").write_text(json.dumps(TOKENS.tolist()))
    (tmp_path / "names.json").write_text(json.dumps(names))
    for name in names:
        (tmp_path / name).symlink_to(trained / name)
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    elsewhere = load_file(tmp_path / "out.safetensors")
    with torch.no_grad():
        clean = model(TOKENS)
        z = model.run_with_cache(TOKENS)[1][HOOK]
        for name in names:
            sae = sap.AttentionSAE.load_from_disk(trained / name)
            with sap.splice(model, sae) as spliced:
                logits = model(TOKENS)
            assert (logits - elsewhere[f"{name}.logits"]).abs().max() < 1e-6
            assert (sae(z) - elsewhere[f"{name}.z"]).abs().max() < 1e-6
            features = spliced.features[LAYER]
            assert (features - elsewhere[f"{name}.features"]).abs().max() < 1e-6
            assert features.any()
            assert (logits - clean).abs().max() > 1e-3


def test_evaluation_of_sae_lens_takes_them(model: Any, trained: Path, tmp_path: Path) -> None:
    """``run_evals`` gives what it gives for the plain SAE, also for an SAE of one head."""
    config = saes.training_config("topk", n_heads=HEADS, d_head=WIDTH, d_sae=24, head=2, k=3)
    train(model, config, tmp_path, hook_head_index=2, training_tokens=640)
    for folder in (trained / "topk", tmp_path):
        found = []
        ours = sap.AttentionSAE.load_from_disk(folder)
        for sae in (SAE.load_from_disk(folder), ours):
            store = ActivationsStore(
                model=model,
                dataset=rows(),
                streaming=False,
                hook_name=HOOK,
                hook_head_index=sae.cfg.metadata.hook_head_index,
                context_size=16,
                d_in=sae.cfg.d_in,
                n_batches_in_buffer=4,
                total_training_tokens=640,
                store_batch_size_prompts=4,
                train_batch_size_tokens=64,
                prepend_bos=True,
                normalize_activations="none",
                device=torch.device("cpu"),
                dtype="float32",
            )
            settings = EvalConfig(
                batch_size_prompts=4,
                n_eval_reconstruction_batches=2,
                n_eval_sparsity_variance_batches=2,
                compute_kl=True,
                compute_ce_loss=True,
                compute_l2_norms=True,
                compute_sparsity_metrics=True,
                compute_variance_metrics=True,
            )
            scaler = ActivationScaler()
            found.append(run_evals(sae, store, model, scaler, settings)[0])
        for group, values in found[0].items():
            assert found[1][group] == pytest.approx(values, abs=1e-6, nan_ok=True), group
        assert ours.hook_z_reshaping_mode  # as it was


def test_trap_view_errors_fill_the_log(
    model: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def errors(host: Any) -> int:
        caplog.clear()
        config = saes.training_config("standard", n_heads=HEADS, d_head=WIDTH, d_sae=24)
        train(host, config, tmp_path / "out", training_tokens=320)
        return sum("view operation" in record.message for record in caplog.records)

    assert errors(model) > 5
    assert errors(sap.hooked(tiny_gpt2(), word_tokenizer())) == 0


def test_trap_one_head_trains_on_its_head(model: Any, tmp_path: Path) -> None:
    config = saes.training_config(
        "batchtopk", n_heads=HEADS, d_head=WIDTH, d_sae=24, head=2, k=3, topk_threshold_lr=0.2
    )
    train(model, config, tmp_path, hook_head_index=2)
    saved = json.loads((tmp_path / "cfg.json").read_text())
    assert (saved["d_in"], saved["reshape_activations"]) == (WIDTH, "none")
    assert saved["metadata"]["hook_head_index"] == 2
    sae = sap.load_saes(tmp_path)[tmp_path.name]
    assert isinstance(sae, sap.AttentionSAE)
    with torch.no_grad():
        z = model.run_with_cache(TOKENS)[1][HOOK][:, 1:]
        out = sae(z)
        assert torch.equal(out[:, :, [0, 1, 3, 4]], z[:, :, [0, 1, 3, 4]])
        left, own = (out - z).square().sum(), z[:, :, 2]
        assert 0 < left < 0.8 * (own - own.mean((0, 1))).square().sum()
        plain = SAE.load_from_disk(tmp_path)
        torch.testing.assert_close(plain(own), out[:, :, 2])
    run = sap.FeatureLens(tiny_gpt2(), sae).run([3, 4, 5, 6])
    assert len(run.features())


@pytest.mark.parametrize(
    ("hook", "head", "message"),
    [
        ("blocks.1.hook_resid_pre", None, "cannot train on the hook 'blocks.1.hook_resid_pre'"),
        (HOOK, 3, "hook_head_index is 3, but the SAE's configuration has head=None"),
    ],
)
def test_trap_a_runner_at_odds_with_its_sae(
    model: Any, tmp_path: Path, hook: str, head: int | None, message: str
) -> None:
    config = saes.training_config("standard", n_heads=HEADS, d_head=WIDTH, d_sae=24)
    with pytest.raises(sap.InputError, match=message):
        train(model, config, tmp_path / "out", hook, hook_head_index=head)
    assert not (tmp_path / "out").exists()
