"""``sae-attn cards``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import sae_attn_plugin as sap
from sae_attn_plugin.cli.screen import plain, session
from sae_attn_plugin.cli.text import parse_layers


def cards(
    survey: Annotated[Path, typer.Argument(help="The folder of a survey.")],
    out: Annotated[
        Path, typer.Option(help="Folder for the site: new, empty, or with an earlier site.")
    ],
    layers: Annotated[str, typer.Option(help="all, or numbers such as 0,2-4.")] = "all",
    dead: Annotated[
        bool, typer.Option("--dead", help="Cards for features that never fired, too.")
    ] = False,
    examples: Annotated[
        int, typer.Option(help="Of each kind (strongest, drawn uniformly) per feature.")
    ] = 10,
    context: Annotated[
        tuple[int, int], typer.Option(help="Tokens shown before and after a firing.")
    ] = (24, 8),
    families: Annotated[
        Path | None, typer.Option(help="A study of families, as JSON, to show and filter by.")
    ] = None,
    heads: Annotated[
        Path | None, typer.Option(help="A study of heads, as JSON, for how monosemantic they are.")
    ] = None,
    min_fires: Annotated[
        int | None,
        typer.Option(
            help="Firings that a feature needs for heads' lists and agreement.",
            show_default="as the study of heads, or 10",
        ),
    ] = None,
    title: Annotated[
        str | None, typer.Option(help="Of the site.", show_default="the model's name")
    ] = None,
) -> None:
    """A survey as a static site: a card for each feature and head, to open without a server."""
    with session() as screen:
        page = sap.cards(
            survey,
            out,
            layers=None if layers == "all" else parse_layers(layers, 1 << 15),
            features="all" if dead else "live",
            examples=examples,
            context=context,
            families=None if families is None else sap.studies.load_study(families),
            heads=None if heads is None else sap.studies.load_study(heads),
            min_fires=min_fires,
            title=title,
            progress=screen.live,
        )
        files = [path for path in page.parent.rglob("*") if path.is_file()]
        size = sum(path.stat().st_size for path in files)
        screen.heading(f"Written: {len(files)} files, {size / 2**20:.1f} MiB")
        screen.lines(plain(str(page)))
