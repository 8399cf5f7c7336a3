"""``sae-attn export``."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

import sae_attn_plugin as sap
from sae_attn_plugin.cli.screen import session
from sae_attn_plugin.errors import InputError
from sae_attn_plugin.io import check_writable


class Format(str, Enum):
    json = "json"
    graphml = "graphml"
    neuronpedia = "neuronpedia"


def export(
    graph: Annotated[Path, typer.Argument(help="A graph file, .json or .graphml.")],
    out: Annotated[Path, typer.Argument(help="The file to write.")],
    format: Annotated[
        Format | None,
        typer.Option(help="neuronpedia, json or graphml. Default: by the ending of OUT."),
    ] = None,
    slug: Annotated[str | None, typer.Option(help="neuronpedia: the graph's short name.")] = None,
    scan: Annotated[
        str | None, typer.Option(help="neuronpedia: the model's name on Neuronpedia.")
    ] = None,
    source_set: Annotated[
        str | None,
        typer.Option(help="neuronpedia: the features' source set there, such as att-kk."),
    ] = None,
    no_feature: Annotated[
        int | None,
        typer.Option(help="neuronpedia: number of error nodes, -1 for circuit-tracer's reader."),
    ] = None,
) -> None:
    """A graph file in another format, for other programs and pages."""
    with session() as screen:
        given = {"slug": slug, "scan": scan, "source_set": source_set, "no_feature": no_feature}
        options: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
        check_writable(out)
        loaded = sap.load(graph)
        if out.exists() and out.samefile(graph):
            raise InputError(f"{str(out)!r} is the graph itself; expected another file to write")
        sap.save(loaded, out, format=None if format is None else format.value, **options)
        screen.written(loaded, out)
