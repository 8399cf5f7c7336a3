"""``sae-attn evaluate``."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Annotated, Any

import typer

import sae_attn_plugin as sap
from sae_attn_plugin.cli.options import (
    Backend,
    DeviceOption,
    Dtype,
    DtypeOption,
    HostOption,
    check_counts,
    check_device,
    check_files,
    check_saes,
)
from sae_attn_plugin.cli.screen import session
from sae_attn_plugin.cli.text import (
    DATA_HELP,
    DEMO,
    SAMPLE_HELP,
    check_text,
    full_name,
    load,
    parse_layers,
    sampled,
)
from sae_attn_plugin.errors import InputError

_SHARES = ("fvu", "recovered_zero", "recovered_mean", "dead", "dense")


def evaluate(
    model: Annotated[
        str,
        typer.Option(
            help="A folder in Hugging Face format, a hub name, or demo.", callback=full_name
        ),
    ],
    saes: Annotated[
        str, typer.Option(help="A folder with attention-z SAEs, or a sae_lens release.")
    ],
    data: Annotated[
        str | None, typer.Option(help=f"{DATA_HELP} demo: the demo's own.", callback=full_name)
    ] = None,
    sample: Annotated[int | None, typer.Option(help=SAMPLE_HELP)] = None,
    rows: Annotated[int, typer.Option(help="Rows to read from --data.")] = 128,
    context: Annotated[int, typer.Option(help="Tokens in a row.")] = 128,
    layers: Annotated[str, typer.Option(help="all, or numbers such as 0,2-4.")] = "all",
    rows_at_once: Annotated[int, typer.Option(help="Rows in one forward pass.")] = 16,
    exclude_special_tokens: Annotated[
        bool | None,
        typer.Option(
            "--exclude-special-tokens/--all-tokens",
            help="Whether to leave out BOS and other special tokens. Default: as the SAEs say.",
        ),
    ] = None,
    sae_lens: Annotated[
        bool, typer.Option(help="Measure with sae_lens' own run_evals beside it.")
    ] = True,
    out: Annotated[Path, typer.Option(help="The measurement, .json.")] = Path("evaluation.json"),
    picture: Annotated[Path | None, typer.Option(help="A picture, .png.")] = None,
    seed: Annotated[int, typer.Option(help="Of the bootstrap and of --sample.")] = 0,
    backend: HostOption = Backend.transformer_lens,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = Dtype.float32,
) -> None:
    """How good SAEs are: sparsity, error, and the cross-entropy they keep, with intervals."""
    with session() as screen:
        check_text(data, sample)
        if data is None and sample is None:
            raise InputError("give --data or --sample, the text to measure on")
        check_counts(rows=rows, context=context, rows_at_once=rows_at_once)
        check_files((out, ".json"), (picture, ".png"))
        screen.hush()
        import torch

        from sae_attn_plugin.corpus.rows import read_rows

        check_device(device)
        check_saes(saes)
        with screen.busy(f"loading {model}"):
            host = load(model, backend.value, device, getattr(torch, dtype.value))
        with screen.busy(f"loading {saes}") if Path(saes).is_dir() else contextlib.nullcontext():
            dictionaries = sap.load_saes(saes, device=device)
        with screen.busy("checking the model"):
            lens = sap.FeatureLens(host, dictionaries)
        if sample is not None:
            text = sampled(host, model, sample, context, seed, device)
        elif data == DEMO:
            from sae_attn_plugin.demo.language import held_out_rows

            text = torch.tensor(held_out_rows(rows, context, seed))
        else:
            assert data is not None
            text = read_rows(
                data, lens.tokenizer, context, prepend_bos=lens.prepend_bos, limit=rows
            )
        known = list(lens.dictionaries)
        result = sap.evaluate(
            lens,
            text,
            layers=known if layers == "all" else parse_layers(layers, max(known) + 1),
            rows_at_once=rows_at_once,
            exclude_tokens=exclude_special_tokens,
            sae_lens=sae_lens,
            seed=seed,
        )
        result.save(out)
        if picture is not None:
            from sae_attn_plugin.graphs.picture import write_png

            write_png(result.draw(), picture)

        facts = result.facts
        screen.heading(f"{lens}")
        screen.lines(
            f"{facts['sequences']} sequences, {facts['tokens']} tokens; in brackets "
            f"{facts['level']:.0%} intervals over sequences"
        )
        table: Any = result.table
        for title, names in (
            ("Sparsity", ("l0", "l1", "dead", "dense")),
            ("Error of the reconstruction", ("mse", "fvu")),
            ("Cross-entropy, nats per token", ("ce_clean", "ce_spliced", "ce_zero", "ce_mean")),
            ("Cross-entropy recovered", ("recovered_zero", "recovered_mean")),
        ):
            screen.heading(title)
            screen.table(
                ("layer", *names),
                (
                    (layer, *(_interval(name, table.loc[(layer, name)]) for name in names))
                    for layer in result.layers
                ),
            )
        if sae_lens:
            screen.heading("Largest relative difference from sae_lens' run_evals")
            both = table.dropna(subset="sae_lens")
            error = ((both["value"] - both["sae_lens"]).abs() / both["sae_lens"].abs()).max()
            screen.lines(f"{error:.1e} over {len(both)} figures")
        screen.heading("Written")
        screen.lines(*(str(path) for path in (out, picture) if path is not None))


def _interval(name: str, row: Any) -> str:
    form = "{:.1%}" if name in _SHARES else "{:.3f}" if name.startswith("ce") else "{:.2f}"
    value, low, high = (form.format(row[key]) for key in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"
