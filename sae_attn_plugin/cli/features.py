"""``sae-attn features``."""

from __future__ import annotations

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
    check_folder,
    check_saes,
)
from sae_attn_plugin.cli.screen import plain, session
from sae_attn_plugin.cli.text import (
    DATA_HELP,
    DEMO,
    SAMPLE_HELP,
    check_text,
    full_name,
    parse_layers,
    sampled,
)
from sae_attn_plugin.errors import InputError


def features(
    model: Annotated[
        str,
        typer.Option(
            help="A folder in Hugging Face format, a hub name, or demo.", callback=full_name
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder for the survey; the same command goes on.")],
    saes: Annotated[
        str | None,
        typer.Option(
            help="A folder with attention-z SAEs, or a sae_lens release. Default: the demo's."
        ),
    ] = None,
    data: Annotated[
        str | None, typer.Option(help=f"{DATA_HELP} demo: the demo's own.", callback=full_name)
    ] = None,
    sample: Annotated[int | None, typer.Option(help=SAMPLE_HELP)] = None,
    rows: Annotated[
        int | None, typer.Option(help="Rows to read from --data at most. Default: all; demo: 512.")
    ] = None,
    context: Annotated[int, typer.Option(help="Tokens in a row.")] = 128,
    layers: Annotated[str, typer.Option(help="all, or numbers such as 0,2-4.")] = "all",
    rows_at_once: Annotated[int, typer.Option(help="Rows in one forward pass.")] = 16,
    keep: Annotated[int, typer.Option(help="Strongest firings kept of each feature.")] = 20,
    draw: Annotated[int, typer.Option(help="Firings drawn at random of each feature.")] = 20,
    sources: Annotated[int, typer.Option(help="Source positions kept of each firing.")] = 16,
    positions: Annotated[
        int, typer.Option(help="Positions drawn, with all features active there.")
    ] = 32768,
    exclude_special_tokens: Annotated[
        bool | None,
        typer.Option(
            "--exclude-special-tokens/--all-tokens",
            help="Whether to leave out BOS and other special tokens. Default: as the SAEs say.",
        ),
    ] = None,
    workers: Annotated[
        int, typer.Option(help="Processes that share the work, by Ray; 0: this one alone.")
    ] = 0,
    shards: Annotated[
        int | None, typer.Option(help="Parts of the work, with --workers. Default: 4 for each.")
    ] = None,
    address: Annotated[
        str | None, typer.Option(help="Of a Ray cluster, such as auto. Default: this machine.")
    ] = None,
    site: Annotated[
        Path | None, typer.Option(help="Folder for a static site of feature and head cards.")
    ] = None,
    checkpoint_every: Annotated[
        int, typer.Option(help="Forward passes between writes of the state.")
    ] = 100,
    fresh: Annotated[bool, typer.Option(help="Start anew instead of going on.")] = False,
    seed: Annotated[int, typer.Option(help="Of what is drawn, and of --sample.")] = 0,
    backend: HostOption = Backend.nnsight,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = Dtype.float32,
) -> None:
    """Survey every feature of every layer over a corpus, in one pass."""
    with session() as screen:
        check_text(data, sample)
        if data is None and sample is None:
            raise InputError("give --data or --sample, the text to survey")
        if saes is None and model != DEMO:
            raise InputError("give --saes, the SAEs to survey")
        check_counts(
            rows=rows,
            rows_at_once=rows_at_once,
            keep=keep,
            draw=draw,
            sources=sources,
            positions=positions,
            shards=shards,
            checkpoint_every=checkpoint_every,
        )
        for name, value, least in (("context", context, 2), ("workers", workers, 0)):
            if value < least:
                raise InputError(f"--{name} {value}: expected at least {least}")
        for name, value in (("shards", shards), ("address", address)):
            if value is not None and not workers:
                raise InputError(f"--{name} goes with --workers")
        check_folder(out, "--out")
        screen.hush()
        from sae_attn_plugin.corpus.shards import LensRecipe

        check_device(device)
        check_saes(saes)
        where = str(sap.demo.SAES_PATH) if saes is None else saes
        recipe = LensRecipe(model, where, backend.value, device, dtype.value)  # type: ignore[arg-type]
        with screen.busy(f"loading {model}"):
            lens = recipe()
        text: Any = data
        if sample is not None:
            host: Any = lens.backend.model  # pyright: ignore[reportAttributeAccessIssue]
            text = sampled(host, model, sample, context, seed, device)
        elif data == DEMO:
            import torch

            from sae_attn_plugin.demo.language import held_out_rows

            text, rows = torch.tensor(held_out_rows(rows or 512, context, seed)), None
        known = list(lens.dictionaries)
        sharing = {"workers": workers, "shards": shards, "address": address} if workers else {}
        survey = sap.survey(
            recipe if workers else lens,
            text,
            out,
            layers=known if layers == "all" else parse_layers(layers, max(known) + 1),
            rows_at_once=rows_at_once,
            keep=keep,
            sample=draw,
            sources=sources,
            positions=positions,
            seed=seed,
            context=None if sample is not None or data == DEMO else context,
            limit=rows,
            exclude_tokens=exclude_special_tokens,
            checkpoint_every=checkpoint_every,
            resume=not fresh,
            **sharing,
        )

        page = None if site is None else survey.cards(site, progress=screen.live)

        facts = survey.facts
        screen.heading(f"{lens}")
        screen.lines(
            f"{facts['rows']:,} rows of {facts['context']} tokens in {facts['forwards']:,} forward "
            f"passes, each token once"
        )
        screen.heading("Features")
        screen.table(
            ("layer", "features", "dead", "firings", "per position", "median density"),
            (_layer(survey, layer) for layer in survey.layers),
        )
        screen.heading("Heads that most features' DFA comes from")
        for layer in survey.layers:
            screen.lines(_heads(survey, layer))
        screen.heading("Written")
        screen.lines(plain(str(out)))
        if page is not None:
            screen.lines(plain(str(page)))
        screen.heading("Next")
        screen.lines(
            f"sae-attn heads {plain(str(out))}",
            f"sae-attn cards {plain(str(out))} --out SITE",
        )


def _layer(survey: sap.Survey, layer: int) -> tuple[Any, ...]:
    columns = ["fires", "density", "dead"]
    table = survey.table("features", layer=layer, columns=columns)
    alive: Any = table[~table["dead"]]
    fires = int(table["fires"].sum())
    return (
        layer,
        len(table),
        int(table["dead"].sum()),
        fires,
        fires / survey.facts["positions_counted"],
        f"{float(alive['density'].median()):.2%}" if len(alive) else None,
    )


def _heads(survey: sap.Survey, layer: int) -> str:
    """How many living features have each head as the largest part of their DFA."""
    heads = survey.table("heads", layer=layer, columns=["feature", "head", "dfa_share"])
    share: Any = heads.pivot(index="feature", columns="head", values="dfa_share").dropna()
    counts = share.idxmax(axis=1).value_counts().head(5)
    found = (f"{layer}.{head}: {count}" for head, count in counts.items())
    return f"layer {layer}   " + "   ".join(found)
