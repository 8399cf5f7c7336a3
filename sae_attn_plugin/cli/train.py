"""``sae-attn train``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

import sae_attn_plugin as sap
from sae_attn_plugin.cli.options import (
    Backend,
    DeviceOption,
    HostOption,
    check_device,
    check_folder,
)
from sae_attn_plugin.cli.screen import session
from sae_attn_plugin.cli.text import DATA_HELP, SAMPLE_HELP, check_text, load, parse_layers, sampled
from sae_attn_plugin.errors import FileError, InputError

_CHECKPOINT = "checkpoint.safetensors"


def train(
    out: Annotated[Path, typer.Option(help="Folder for the SAEs, one folder per layer.")],
    model: Annotated[
        str | None,
        typer.Option(help="A folder in Hugging Face format, or a hub name. Default: the recipe's."),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            help="gpt2-small, gelu-2l, gemma-2b, sae-attn-demo or generic. Default: by the model's "
            "name, else generic."
        ),
    ] = None,
    layers: Annotated[str, typer.Option(help="all, or numbers such as 0,2-4.")] = "all",
    data: Annotated[str | None, typer.Option(help=f"{DATA_HELP} Default: the recipe's.")] = None,
    sample: Annotated[int | None, typer.Option(help=SAMPLE_HELP)] = None,
    tokens: Annotated[int | None, typer.Option(help="Activations to train on.")] = None,
    context: Annotated[int | None, typer.Option(help="Tokens in a row.")] = None,
    batch: Annotated[int | None, typer.Option(help="Activations in a step.")] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate.")] = None,
    d_sae: Annotated[int | None, typer.Option(help="Number of features.")] = None,
    k: Annotated[float, typer.Option(help="Mean number of active features (generic recipe).")] = 16,
    rows_in_buffer: Annotated[
        int | None, typer.Option(help="Rows whose activations are held and shuffled at once.")
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(help="Of all that is drawn. Default: the recipe's; of --sample: 0."),
    ] = None,
    checkpoint_every: Annotated[
        int, typer.Option(help="Buffers between checkpoints; the same command goes on from one.")
    ] = 20,
    overwrite: Annotated[bool, typer.Option(help="Replace SAEs that are there already.")] = False,
    backend: HostOption = Backend.nnsight,
    device: DeviceOption = "cpu",
) -> None:
    """Train attention-z SAEs of some layers from one pass over the model."""
    with session() as screen:
        check_text(data, sample)
        changes: dict[str, Any] = {
            "training_tokens": tokens,
            "context_size": context,
            "train_batch_size_tokens": batch,
            "lr": lr,
            "seed": seed,
            "n_batches_in_buffer": rows_in_buffer,
        }
        changes = {name: value for name, value in changes.items() if value is not None}
        for name, value in (*changes.items(), ("k", k), ("checkpoint_every", checkpoint_every)):
            if value <= 0 and name != "seed":
                raise InputError(f"--{name.replace('_', '-')} {value}: expected more than 0")
        check_folder(out, "--out")
        screen.hush()
        import torch

        from sae_attn_plugin.recipes import RECIPES
        from sae_attn_plugin.training import recipe as make
        from sae_attn_plugin.training import train as run

        if recipe is None:
            recipe = model if model in RECIPES else "generic"
        if recipe not in (*RECIPES, "generic"):
            raise InputError(f"--recipe {recipe!r}: expected generic or {', '.join(RECIPES)}")
        if model is None and recipe == "generic":
            raise InputError("give --model, or a --recipe that names one")
        check_device(device)
        name = recipe if model is None else model
        with screen.busy(f"loading {name}"):
            host = load(name, backend.value, device, torch.float32)
            hooked: Any = sap.hooked(host)
        wanted = parse_layers(layers, hooked.cfg.n_layers)
        kind = hooked if recipe == "generic" else recipe
        recipes = [make(kind, n, d_sae=d_sae, k=k, device=device, **changes) for n in wanted]
        for cfg in recipes:
            if (out / cfg.hook_name).exists() and not overwrite:
                raise FileError(
                    f"{out / cfg.hook_name} is there already; give another --out, or --overwrite"
                )
        cfg = recipes[0]
        if data is None and sample is None and not cfg.dataset_path:
            raise InputError("give --data or --sample: the generic recipe names no text")
        source: Any = data
        if sample is not None:
            source = sampled(host, name, sample, cfg.context_size, seed or 0, device)
        checkpoint = out / _CHECKPOINT
        if checkpoint.exists():
            screen.error.print(f"going on from {checkpoint}")
        folders = run(
            recipes,
            hooked,
            source,
            out=out,
            checkpoint=checkpoint,
            checkpoint_every=checkpoint_every,
        )
        screen.heading(
            f"Trained: {len(folders)} SAEs of {cfg.sae.d_sae} features ({cfg.sae.architecture()}) "
            f"on {cfg.training_tokens:,} activations of {cfg.model_name}"
        )
        screen.lines(*(str(folder) for folder in folders.values()))
        screen.heading("Next")
        screen.lines(
            f"sae-attn evaluate --model {name} --saes {out} --data TEXT",
            f'sae-attn graph --model {name} --saes {out} --prompt "..."',
        )
