"""``sae-attn reproduce``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

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
from sae_attn_plugin.cli.options import DeviceOption, check_device, check_files
from sae_attn_plugin.cli.screen import session
from sae_attn_plugin.errors import InputError

_SHOWN = 10


def reproduce(
    graph: GraphFile,
    model: Model = None,
    saes: Dictionaries = None,
    transcoders: Dictionaries = None,
    residual_saes: Dictionaries = None,
    backend: Host = None,
    device: DeviceOption = "cpu",
    tolerance: Annotated[
        float, typer.Option(help="Largest difference, as a share of each target's scale.")
    ] = 1e-5,
    out: Annotated[Path | None, typer.Option(help="Write the new graph here, .json.")] = None,
) -> None:
    """Make a graph again from what its file says; exit status 0: the same, 1: different."""
    with session() as screen:
        if not 0 <= tolerance < 1:
            raise InputError(f"--tolerance {tolerance}: expected a share in [0, 1)")
        check_files((out, ".json"))
        loaded = load_graph(graph)
        if out is not None and out.exists() and out.samefile(graph):
            raise InputError(f"{str(out)!r} is the graph itself; expected another file to write")
        screen.hush()
        check_device(device)
        given = {"saes": saes, "transcoders": transcoders, "residual_saes": residual_saes}
        lens = lens_of_graph(screen, loaded.graph, model, given, backend, device)
        with screen.busy("attributing"):
            found = sap.reproduce(loaded, lens, tolerance=tolerance)
        if out is not None:
            sap.save(found.graph, out)

        screen.heading(f"{lens}")
        screen.heading("Changed since the file was written" if found.changed else "Made as it was")
        screen.lines(*found.changed)
        c = found.comparison
        screen.heading("Same" if found.same else "Different")
        screen.lines(
            f"{len(found.graph)} nodes, {found.graph.number_of_edges()} edges",
            f"largest difference {c.error:.2e} of its target's scale"
            + ("" if c.where is None else f", at {_place(c.where)}")
            + f"; allowed {tolerance:g}",
        )
        for what, rows in (
            ("nodes only in the file", c.only_first),
            ("nodes only here", c.only_second),
            ("edges only in the file", c.edges_only_first),
            ("edges only here", c.edges_only_second),
        ):
            if rows:
                screen.heading(f"{len(rows)} {what}")
                screen.lines(*(_place(row) for row in rows[:_SHOWN]))
    if not found.same:
        raise typer.Exit(1)


def _place(where: Any) -> str:
    from sae_attn_plugin.cli.screen import plain

    return plain(where if isinstance(where, str) else " -> ".join(map(str, where[:2])))
