"""``sae-attn export``."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import sae_attn_plugin as sap
from sae_attn_plugin.cli.options import Backend
from sae_attn_plugin.cli.screen import Screen, session
from sae_attn_plugin.errors import InputError
from sae_attn_plugin.io import check_writable
from sae_attn_plugin.registration import DEMO_MODEL_NAME

if TYPE_CHECKING:
    import networkx as nx

    from sae_attn_plugin.lens import Run


class Format(str, Enum):
    json = "json"
    native = "native"
    graphml = "graphml"
    gexf = "gexf"
    neuronpedia = "neuronpedia"
    mib = "mib"
    html = "html"


def export(
    graph: Annotated[
        Path, typer.Argument(help="A graph file, .json, .safetensors, .graphml or .gexf.")
    ],
    out: Annotated[Path, typer.Argument(help="The file to write.")],
    format: Annotated[
        Format | None,
        typer.Option(help="Default: by the ending of OUT, and json for .json."),
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
    cantor: Annotated[
        bool | None,
        typer.Option(
            "--cantor/--no-cantor",
            help="neuronpedia: features numbered by Cantor pairs (the default), or as they are.",
        ),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="mib: the graph's model, unless it is the demo model.")
    ] = None,
    saes: Annotated[str | None, typer.Option(help="mib: the graph's SAEs.")] = None,
    backend: Annotated[Backend, typer.Option(help="mib: what runs the model.")] = (
        Backend.transformer_lens
    ),
) -> None:
    """A graph file in another format, for other programs and pages."""
    with session() as screen:
        given = {"slug": slug, "scan": scan, "source_set": source_set, "no_feature": no_feature,
                 "cantor": cantor}  # fmt: skip
        options: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
        check_writable(out)
        for name, value in (("--model", model), ("--saes", saes)):
            if value is not None and format is not Format.mib:
                raise InputError(f"{name} goes with --format mib")
        loaded = sap.load(graph)
        if out.exists() and out.samefile(graph):
            raise InputError(f"{str(out)!r} is the graph itself; expected another file to write")
        if isinstance(loaded, sap.Attribution):
            loaded = loaded.to_networkx()
        if format is Format.mib:
            options["run"] = _run_of(loaded, model, saes, backend, screen)
        sap.save(loaded, out, format=None if format is None else format.value, **options)
        screen.written(loaded, out)


def _run_of(
    graph: nx.DiGraph[Any], model: str | None, saes: str | None, backend: Backend, screen: Screen
) -> Run:
    """The graph's prompt through its model again."""
    made_with, tokens = graph.graph.get("model"), graph.graph.get("token_ids")
    if not isinstance(tokens, list):
        raise InputError("the graph does not say its token ids, so its run cannot be made again")
    demo = made_with == DEMO_MODEL_NAME and model is None and saes is None
    if (model is None or saes is None) and not demo:
        raise InputError(
            f"--format mib runs the graph's prompt again: pass --model and --saes of {made_with}"
        )
    screen.hush()
    if model is None:
        with screen.busy("loading the demo model"):
            lens = sap.demo.load(backend=backend.value)
    else:
        with screen.busy(f"loading {model}"):
            lens = sap.FeatureLens(sap.load_model(model, backend.value), saes)
    with screen.busy("running the prompt"):
        return lens.run([tokens])
