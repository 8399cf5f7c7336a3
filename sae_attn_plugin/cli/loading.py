"""The model and SAEs a command runs on: as its options name them, or as a graph file says."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import sae_attn_plugin as sap
from sae_attn_plugin.cli.options import Backend, Dtype, check_saes
from sae_attn_plugin.cli.text import DEMO, full_name
from sae_attn_plugin.errors import InputError
from sae_attn_plugin.registration import DEMO_MODEL_NAME, DEMO_RELEASE

if TYPE_CHECKING:
    import networkx as nx

    from sae_attn_plugin.cli.screen import Screen
    from sae_attn_plugin.lens import FeatureLens

GraphFile = Annotated[
    Path, typer.Argument(help="A graph file, .json, .safetensors, .graphml or .gexf.")
]
Model = Annotated[str | None, typer.Option(help="A folder or hub name. Default: as the file says.")]
Dictionaries = Annotated[
    str | None, typer.Option(help="A folder or release. Default: as the file says.")
]
Host = Annotated[
    Backend | None, typer.Option(help="What runs the model. Default: as the file says.")
]

_BACKENDS = {
    "hooked_transformer": "transformer_lens",
    "transformer_bridge": "transformer_bridge",
    "nnsight": "nnsight",
}
_OF_DEMO = (DEMO_RELEASE, f"{DEMO_RELEASE}/transcoders")
_DTYPES = ("float32", "float64", "bfloat16", "float16")


def load_lens(
    screen: Screen,
    model: str,
    saes: str | None,
    backend: str,
    device: str,
    dtype: Dtype,
    transcoders: str | None = None,
) -> FeatureLens:
    """Model and SAEs as options name them; GPT-2 small has SAEs by default, the demo its own."""
    if full_name(model) == DEMO:
        check_demo_device(device)
        if saes is not None:
            raise InputError("--model demo has its own SAEs; leave --saes out")
        if transcoders not in (None, "demo"):
            raise InputError("--model demo has transcoders of its own: --transcoders demo")
        with screen.busy("loading the demo model"):
            return sap.demo.load(backend, transcoders=transcoders is not None)  # pyright: ignore[reportArgumentType]
    if saes is None:
        if model != "gpt2":
            raise InputError("give --saes, a folder with attention SAEs or a sae_lens release")
        saes = "gpt2-small-hook-z-kk"
    return load_named(screen, model, saes, backend, device, dtype, transcoders)


def load_named(
    screen: Screen,
    model: str,
    saes: str,
    backend: str,
    device: str,
    dtype: Dtype,
    transcoders: str | None = None,
    prepend_bos: bool | None = None,
) -> FeatureLens:
    """Model and SAEs by folder, hub name or release."""
    import torch

    check_saes(saes, transcoders)
    with screen.busy(f"loading {model}"):
        host = sap.load_model(model, backend, device, getattr(torch, dtype.value))  # pyright: ignore[reportArgumentType]
    found = [
        None if source is None else _read(screen, source, device) for source in (saes, transcoders)
    ]
    with screen.busy("checking the model"):
        return sap.FeatureLens(host, found[0], transcoders=found[1], prepend_bos=prepend_bos)


def check_demo_device(device: str) -> None:
    # HookedTransformer does not move in silence.
    if device != "cpu":
        raise InputError("the demo model runs on the cpu here; leave --device out")


def _read(screen: Screen, source: str, device: str) -> dict[str, Any]:
    # A release shows bars of its own while it downloads.
    with screen.busy(f"loading {source}") if Path(source).is_dir() else contextlib.nullcontext():
        return sap.load_saes(source, device=device)


def load_graph(path: Path) -> nx.DiGraph[Any]:
    """A graph from any of its files."""
    loaded = sap.load(path)
    return loaded.to_networkx() if isinstance(loaded, sap.Attribution) else loaded


def lens_of_graph(
    screen: Screen,
    about: Mapping[str, Any],
    model: str | None,
    given: Mapping[str, str | None],
    backend: Backend | None,
    device: str,
) -> FeatureLens:
    """Model and SAEs as a graph names them, unless told otherwise: ``given`` has the folder or
    release for ``saes``, ``transcoders`` and ``residual_saes``."""
    import torch

    from sae_attn_plugin.reproduction import needed

    host = _BACKENDS.get(str(about.get("backend"))) if backend is None else backend.value
    if host is None:
        raise InputError(
            f"the graph's backend is {about.get('backend')!r}, which is none of "
            f"{', '.join(_BACKENDS)}; pass --backend"
        )
    name = needed(about, "model", str) if model is None else full_name(model)
    dtype = about.get("dtype", "float32")
    if dtype not in _DTYPES:
        raise InputError(f"the graph's dtype is {dtype!r}; known: {', '.join(_DTYPES)}")
    named = {kind: _name(kind, about, source) for kind, source in given.items()}
    with screen.busy(f"loading {name}"):
        if name == DEMO_MODEL_NAME:
            if dtype != "float32":
                raise InputError(f"the graph is of the demo model in {dtype}; pass --model")
            check_demo_device(device)
            loaded = sap.demo.load_model(host)  # pyright: ignore[reportArgumentType]
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
        found = {
            kind: {} if source is None else _dictionaries(kind, about, source, device, given[kind])
            for kind, source in named.items()
        }
    bos = about.get("prepend_bos")
    with screen.busy("checking the model"):
        return sap.FeatureLens(
            loaded,
            found["saes"],
            transcoders=found["transcoders"] or None,
            residual_saes=found["residual_saes"] or None,
            prepend_bos=bos if isinstance(bos, bool) else None,
        )


def _name(kind: str, about: Mapping[str, Any], given: str | None) -> str | None:
    """Where dictionaries of a kind are from; None where the graph has none."""
    if given is None and not about.get(kind):
        return None
    sources = about.get("sources")
    source = sources.get(kind) if isinstance(sources, Mapping) else None
    name, option = given or source, f"--{kind.replace('_', '-')}"
    if not isinstance(name, str):
        raise InputError(
            f"the graph does not say where its {kind} are from (they were given as objects, or "
            f"from several places): pass {option}, a folder or a sae_lens release"
        )
    if name not in _OF_DEMO:
        with _told(kind, name, given):
            check_saes(name)
    return name


def _dictionaries(
    kind: str, about: Mapping[str, Any], name: str, device: str, given: str | None
) -> Any:
    from sae_attn_plugin.reproduction import chosen

    if name in _OF_DEMO:
        found = sap.demo.load_saes() if kind == "saes" else sap.demo.load_transcoders()
    else:
        with _told(kind, name, given):
            found = sap.load_saes(name, device=device)
    return chosen(found, about.get(kind))


@contextlib.contextmanager
def _told(kind: str, name: str, given: str | None) -> Generator[None]:
    """Errors of a source that only the graph names, with what to do."""
    try:
        yield
    except (InputError, sap.FileError) as error:
        if given is not None:
            raise
        raise InputError(
            f"the graph's {kind} are from {name!r}, which cannot be loaded from here; pass "
            f"--{kind.replace('_', '-')}, a folder or a sae_lens release ({error})"
        ) from error
