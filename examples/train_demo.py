"""Make the demo model, its SAEs and the report, with one command:

    python examples/train_demo.py --out sae_attn_plugin/demo

Stages: ``model`` (the language model), ``saes`` (an attention-z SAE for every layer), ``evaluate``
(``report.json``). Each takes up where it was interrupted; ``--stage`` runs one alone.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import sae_lens
import torch
import transformers
from transformers import GPT2Config, GPT2LMHeadModel

import sae_attn_plugin as sap
from sae_attn_plugin.backends.loading import load_model
from sae_attn_plugin.demo import language
from sae_attn_plugin.demo.training import ModelRecipe, ioi_scores, repeat_scores, train_model
from sae_attn_plugin.registration import DEMO_MODEL_NAME
from sae_attn_plugin.training import recipe, train

LAYERS = range(4)
D_MODEL, D_MLP, N_HEADS, N_CTX = 128, 32, 8, 128
SAE_TOKENS = 4_000_000


def write_json(path: Path, value: Any) -> None:
    draft = path.with_name(f".{path.name}.draft")
    draft.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    os.replace(draft, path)


def replace_folder(draft: Path, target: Path) -> None:
    if target.exists():
        shutil.rmtree(target)
    draft.replace(target)


def new_model(seed: int) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    n_tokens = len(language.vocabulary())
    config = GPT2Config(
        vocab_size=n_tokens,
        n_layer=len(LAYERS),
        n_embd=D_MODEL,
        n_inner=D_MLP,
        n_head=N_HEADS,
        n_positions=N_CTX,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPT2LMHeadModel(config)


def make_model(out: Path, work: Path, steps: int, seed: int) -> None:
    model = new_model(seed)
    started = time.time()
    recipe = ModelRecipe(steps=steps)
    loss = train_model(
        model,
        lambda step: torch.tensor(language.training_batch(seed, step)),
        recipe,
        checkpoint=work / "model.safetensors",
    )
    draft = out / ".model.draft"  # beside its target, so that the rename is atomic
    model.save_pretrained(draft)
    language.build_tokenizer(N_CTX).save_pretrained(draft)
    replace_folder(draft, out / "model")
    facts = {
        "seed": seed,
        "recipe": asdict(recipe),
        "parameters": sum(p.numel() for p in model.parameters()),
        "vocabulary": len(language.vocabulary()),
        "tokens": steps * 4096,
        "mixture": language.MIXTURE,
        "final_loss": loss,
        "seconds_in_the_last_run": round(time.time() - started),
    }
    write_json(work / "model.json", facts)


def make_saes(out: Path, work: Path, n_tokens: int, seed: int) -> None:
    started = time.time()
    recipes = [
        recipe(DEMO_MODEL_NAME, layer, seed=seed, training_tokens=n_tokens) for layer in LAYERS
    ]
    train(
        recipes,
        load_model(out / "model", "nnsight"),
        out=out / "saes",
        checkpoint=work / "saes.safetensors",
    )
    cfg = recipes[0]
    facts = {
        "seed": seed,
        "architecture": "batchtopk, saved as jumprelu",
        "d_sae": cfg.sae.d_sae,
        "k": cfg.sae.k,
        "tokens": n_tokens,
        "batch_size": cfg.train_batch_size_tokens,
        "lr": cfg.lr,
        "dead_feature_window": cfg.dead_feature_window,
        "positions": "all, with BOS",
        "seconds_in_the_last_run": round(time.time() - started),
    }
    write_json(work / "saes.json", facts)


@torch.no_grad()
def evaluate(out: Path, work: Path, seed: int, n_rows: int = 2048) -> dict[str, Any]:
    model = sap.hooked(load_model(out / "model", "nnsight"))
    rng = random.Random(f"evaluate:{seed}")
    examples = [language.ioi_example(rng, held_out=True) for _ in range(4000)]
    repeats = [language.repeated_random_tokens(rng, segment=30) for _ in range(256)]
    rows = language.token_rows(rng, n_rows, 128, held_out=True)
    lens = sap.FeatureLens(model, out / "saes")
    table = sap.evaluate(lens, torch.tensor(rows), rows_at_once=64, sae_lens=False).wide()
    saes = {
        str(layer): {
            "tokens": n_rows * 128,
            "explained": 1 - row["fvu"],
            **{name: float(value) for name, value in row.items()},
        }
        for layer, row in table.iterrows()
    }
    report = {
        "model": {
            **read_facts(work / "model.json"),
            "ioi": asdict(ioi_scores(model, examples)),
            "repeats": asdict(repeat_scores(model, torch.tensor(repeats))),
        },
        "saes": {**read_facts(work / "saes.json"), "layers": saes},
        "evaluation": {
            "seed": seed,
            "ioi": "held-out combinations of template and names, all distractors",
            "saes": f"{n_rows} rows of 128 tokens of the training mixture, fresh seed, IOI "
            "sentences held out; the reconstruction replaces z at every position, BOS too",
        },
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "sae_lens": sae_lens.__version__,
        },
    }
    write_json(out / "report.json", report)
    return report


def read_facts(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def show(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    model = report["model"]
    console = Console()
    console.print(
        f"IOI accuracy {model['ioi']['accuracy']:.1%}, logit difference "
        f"{model['ioi']['logit_difference']:.2f}; repeated tokens {model['repeats']['first']:.2f} "
        f"-> {model['repeats']['second']:.2f} nats"
    )
    table = Table("layer", "L0", "dead", "explained", "recovered (zero)", "recovered (mean)")
    for layer, row in report["saes"]["layers"].items():
        shares = (row[k] for k in ("dead", "explained", "recovered_zero", "recovered_mean"))
        table.add_row(layer, f"{row['l0']:.1f}", *(f"{share:.1%}" for share in shares))
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True, help="folder for model/, saes/, report")
    parser.add_argument("--work", type=Path, help="folder for checkpoints (default: OUT/../.train)")
    parser.add_argument("--stage", choices=("model", "saes", "evaluate"), help="this stage only")
    parser.add_argument("--steps", type=int, default=4000, help="steps of the model")
    parser.add_argument("--sae-tokens", type=int, default=SAE_TOKENS)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    out: Path = args.out
    work: Path = args.work or out.resolve().parent / ".train"
    for folder in (out, work):
        folder.mkdir(parents=True, exist_ok=True)

    if args.stage == "model" or (args.stage is None and not (work / "model.json").exists()):
        make_model(out, work, args.steps, args.seed)
    if args.stage == "saes" or (args.stage is None and not (work / "saes.json").exists()):
        make_saes(out, work, args.sae_tokens, args.seed + 1)
    if args.stage in (None, "evaluate"):
        show(evaluate(out, work, args.seed + 2))


if __name__ == "__main__":
    main()
