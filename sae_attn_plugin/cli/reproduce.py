"""``sae-attn reproduce``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import sae_attn_plugin as sap
from sae_attn_plugin.cli.options import Backend, check_device
from sae_attn_plugin.cli.screen import Screen, session
from sae_attn_plugin.errors import InputError
from sae_attn_plugin.io import check_writable
from sae_attn_plugin.registration import DEMO_MODEL_NAME, DEMO_RELEASE

if TYPE_CHECKING:
    from sae_attn_plugin.lens import FeatureLens

_BACKENDS = {
    "hooked_transformer": "transformer_lens",
    "transformer_bridge": "transformer_bridge",
    "nnsight": "nnsight",
}
_DTYPES = ("float32", "float64", "bfloat16", "float16")
_SHOWN = 10


def reproduce(
    graph: Annotated[
        Path, typer.Argument(help="A graph file, .json, .safetensors, .graphml or .gexf.")
    ],
    model: Annotated[
        str | None, typer.Option(help="A folder or hub name. Default: as the file says.")
    ] = None,
    saes: Annotated[
        str | None, typer.Option(help="A folder or release. Default: as the file says.")
    ] = None,
    transcoders: Annotated[
        str | None, typer.Option(help="A folder or release. Default: as the file says.")
    ] = None,
    backend: Annotated[
        Backend | None, typer.Option(help="What runs the model. Default: as the file says.")
    ] = None,
    device: Annotated[str, typer.Option(help="Where to compute, such as cpu or cuda.")] = "cpu",
    tolerance: Annotated[
        float, typer.Option(help="Largest difference, as a share of each target's scale.")
    ] = 1e-5,
    out: Annotated[Path | None, typer.Option(help="Write the new graph here, .json.")] = None,
) -> None:
    """Make a graph again from what its file says; exit status 0: the same, 1: different."""
    with session() as screen:
        if not 0 <= tolerance < 1:
            raise InputError(f"--tolerance {tolerance}: expected a share in [0, 1)")
        if out is not None:
            if out.suffix.lower() != ".json":
                raise InputError(f"expected a path that ends in .json, got {str(out)!r}")
            check_writable(out)
        loaded = sap.load(graph)
        if isinstance(loaded, sap.Attribution):
            loaded = loaded.to_networkx()
        if out is not None and out.exists() and out.samefile(graph):
            raise InputError(f"{str(out)!r} is the graph itself; expected another file to write")
        screen.hush()
        check_device(device)
        lens = _lens(screen, loaded.graph, model, saes, transcoders, backend, device)
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


def _lens(
    screen: Screen,
    about: Mapping[str, Any],
    model: str | None,
    saes: str | None,
    transcoders: str | None,
    backend: Backend | None,
    device: str,
) -> FeatureLens:
    """Model and SAEs as a graph names them, unless told otherwise."""
    import torch

    from sae_attn_plugin.reproduction import needed

    host = _BACKENDS.get(str(about.get("backend"))) if backend is None else backend.value
    if host is None:
        raise InputError(
            f"the graph's backend is {about.get('backend')!r}, which is none of "
            f"{', '.join(_BACKENDS)}; pass --backend"
        )
    name = needed(about, "model", str) if model is None else model
    dtype = about.get("dtype", "float32")
    if dtype not in _DTYPES:
        raise InputError(f"the graph's dtype is {dtype!r}; known: {', '.join(_DTYPES)}")
    with screen.busy(f"loading {name}"):
        if name == DEMO_MODEL_NAME:
            if dtype != "float32":
                raise InputError(f"the graph is of the demo model in {dtype}; pass --model")
            loaded = sap.demo.load_model(host)  # pyright: ignore[reportArgumentType]
            # HookedTransformer does not move in silence.
            if device != "cpu":
                raise InputError("the demo model runs on the cpu here; leave --device out")
        else:
            try:
                kind: Any = host
                loaded = sap.load_model(name, kind, device, getattr(torch, dtype))
            except InputError as error:
                if model is not None:
                    raise
                raise InputError(
                    f"the graph's model is {name!r}, which cannot be loaded from here; pass "
                    f"--model, a folder or hub name ({error})"
                ) from error
    with screen.busy("loading SAEs"):
        of_attention = _dictionaries("saes", about, saes, device)
        of_mlps = _dictionaries("transcoders", about, transcoders, device) or None
    bos = about.get("prepend_bos")
    with screen.busy("checking the model"):
        return sap.FeatureLens(
            loaded,
            of_attention,
            transcoders=of_mlps,
            prepend_bos=bos if isinstance(bos, bool) else None,
        )


def _dictionaries(kind: str, about: Mapping[str, Any], given: str | None, device: str) -> Any:
    from sae_attn_plugin.reproduction import chosen

    said = about.get(kind)
    if given is None and not said:
        return {}
    sources = about.get("sources")
    source = sources.get(kind) if isinstance(sources, Mapping) else None
    name = given or source
    if not isinstance(name, str):
        raise InputError(
            f"the graph does not say where its {kind} are from (they were given as objects, or "
            f"from several places): pass --{kind}, a folder or a sae_lens release"
        )
    if name in (DEMO_RELEASE, f"{DEMO_RELEASE}/transcoders"):
        found = sap.demo.load_saes() if kind == "saes" else sap.demo.load_transcoders()
    else:
        try:
            found = sap.load_saes(name, device=device)
        except (InputError, sap.FileError) as error:
            if given is not None:
                raise
            raise InputError(
                f"the graph's {kind} are from {name!r}, which cannot be loaded from here; pass "
                f"--{kind}, a folder or a sae_lens release ({error})"
            ) from error
    return chosen(found, said)
