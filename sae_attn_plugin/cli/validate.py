"""``sae-attn validate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import sae_attn_plugin as sap
from sae_attn_plugin.cli.loading import (
    Dictionaries,
    GraphFile,
    Host,
    Model,
    lens_of_graph,
    load_graph,
)
from sae_attn_plugin.cli.options import DeviceOption, check_counts, check_device, check_reports
from sae_attn_plugin.cli.screen import plain, session

_CONDITIONS = {
    "frozen": "all else held: what edges claim",
    "free": "everything live",
    "random": "everything live, edges the graph does not have",
}


def validate(
    graph: GraphFile,
    model: Model = None,
    saes: Dictionaries = None,
    transcoders: Dictionaries = None,
    residual_saes: Dictionaries = None,
    backend: Host = None,
    device: DeviceOption = "cpu",
    max_sources: Annotated[
        int, typer.Option(help="Test the edges of so many sources, the most influential ones.")
    ] = 20,
    freeze: Annotated[
        list[str] | None,
        typer.Option(help="One more condition with this part held, such as patterns. Repeatable."),
    ] = None,
    baseline: Annotated[bool, typer.Option(help="Measure random edges too.")] = True,
    seed: Annotated[int, typer.Option(help="Of the random edges.")] = 0,
    out: Annotated[
        list[Path] | None,
        typer.Option(help="Write every edge, .json, or a picture, .png, .svg, .pdf. Repeatable."),
    ] = None,
) -> None:
    """Remove the sources of a graph's edges on the model, against what the edges predict."""
    with session() as screen:
        check_counts(max_sources=max_sources)
        files = out or []
        check_reports(files, graph)
        loaded = load_graph(graph)
        screen.hush()
        check_device(device)
        given = {"saes": saes, "transcoders": transcoders, "residual_saes": residual_saes}
        lens = lens_of_graph(screen, loaded.graph, model, given, backend, device)
        found = sap.validate(
            loaded,
            lens,
            max_sources=max_sources,
            baseline=baseline,
            freezes={part: part for part in freeze or ()},
            seed=seed,
            progress=screen.live,
        )
        for path in files:
            found.save(path)

        screen.heading(f"{lens}")
        screen.heading(
            f"Edges of the {found.about['sources']} most influential sources, removed one by one"
        )
        screen.table(
            ("", "", "edges", "max error", "R2", "rank correlation", "signs agree"),
            (
                (
                    name,
                    _CONDITIONS.get(name, "held"),
                    len(part.table),
                    f"{part.max_error:.1e}",
                    part.r2,
                    part.rank_correlation,
                    f"{part.sign_agreement:.1%}",
                )
                for name, part in found.parts().items()
            ),
        )
        screen.lines("errors are shares of the sum of |edges| into the target")
        if files:
            screen.heading("Written")
            screen.lines(*(plain(str(path)) for path in files))
