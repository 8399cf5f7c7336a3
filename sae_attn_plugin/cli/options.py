"""What commands share: enums, parsing and early checks of options."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import sae_attn_plugin as sap
from sae_attn_plugin.errors import FileError, InputError
from sae_attn_plugin.io import check_writable

if TYPE_CHECKING:
    import networkx as nx

    from sae_attn_plugin.nodes import Target

_REPORTS = (".json", ".png", ".svg", ".pdf")
_FEATURE = re.compile(r"attn:(\d{1,18}):(\d{1,18})@(-?\d{1,18})")


class Backend(str, Enum):
    transformer_lens = "transformer_lens"
    transformer_bridge = "transformer_bridge"
    nnsight = "nnsight"


class Dtype(str, Enum):
    float32 = "float32"
    float64 = "float64"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Through(str, Enum):
    terminal = "terminal"
    linearise = "linearise"


HostOption = Annotated[Backend, typer.Option(help="What runs the model.")]
DeviceOption = Annotated[str, typer.Option(help="Where to compute, such as cpu or cuda.")]
DtypeOption = Annotated[Dtype, typer.Option(help="Of the model's weights.")]


def parse_token(text: str) -> str | int:
    """``#5335`` is a token id, anything else the token itself."""
    return int(text[1:]) if re.fullmatch(r"#\d{1,18}", text) else text


def parse_target(target: str | None, wrong: str | None, position: int | None) -> Target | None:
    if target is None:
        for name, value in (("--wrong", wrong), ("--position", position)):
            if value is not None:
                raise InputError(f"{name} needs --target, the token it goes with")
        return None
    if not target or wrong == "":
        raise InputError("the target is empty; expected a token or attn:LAYER:FEATURE@POSITION")
    if target.startswith("attn:"):
        match = _FEATURE.fullmatch(target)
        if match is None:
            raise InputError(
                f"not a feature: {target!r}; expected attn:LAYER:FEATURE@POSITION, such as "
                "attn:5:7515@10 or attn:5:7515@-1"
            )
        if wrong is not None or position is not None:
            raise InputError(f"--wrong and --position go with a token, not with {target!r}")
        layer, feature, at = (int(number) for number in match.groups())
        return sap.Feature(layer, feature, at)
    at = -1 if position is None else position
    if wrong is not None:
        return sap.LogitDiff(parse_token(target), parse_token(wrong), at)
    return sap.Logit(parse_token(target), at)


def writable_files(
    graph: Path, picture: Path | None, page: Path | None
) -> tuple[Path, Path | None, Path | None]:
    """The paths, known to be writable."""
    check_files((graph, ".json"), (picture, ".png"), (page, ".html"))
    return graph, picture, page


def check_files(*files: tuple[Path | None, str]) -> None:
    """That each path which is given has its ending and can be written."""
    for path, ending in files:
        if path is None:
            continue
        if path.suffix.lower() != ending:
            raise InputError(f"expected a path that ends in {ending}, got {str(path)!r}")
        check_writable(path)


def check_reports(files: Sequence[Path], graph: Path | None) -> None:
    """That reports and pictures can be written, and none over the graph itself."""
    for path in files:
        if path.suffix.lower() not in _REPORTS:
            endings = ", ".join(_REPORTS)
            raise InputError(f"expected a path that ends in {endings}, got {str(path)!r}")
        if graph is not None and path.exists() and graph.exists() and path.samefile(graph):
            raise InputError(f"{str(path)!r} is the graph itself; expected another file")
        check_writable(path)


def check_folder(path: Path, option: str) -> None:
    """That a folder to write into is one, or can be made."""
    there = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    if not there.is_dir():
        raise FileError(f"cannot write to {option} {path}: {there} is no folder")
    if not os.access(there, os.W_OK):
        raise FileError(f"cannot write to {option} {path}: the folder {there} is read-only")


def check_results(out: Path, files: Sequence[Path]) -> None:
    """That files can be written to ``--out``, a folder that is made if need be."""
    check_folder(out, "--out")
    for path in files if out.exists() else ():
        check_writable(path)


def check_saes(*sources: str | None) -> None:
    """That each folder or release which is given is one, before a model is loaded."""
    from sae_attn_plugin.dictionaries import sae_folders

    for source in sources:
        if source is not None:
            sae_folders(source)


def check_counts(**options: int | None) -> None:
    """That each number which is given is at least 1; ``rows_at_once`` is ``--rows-at-once``."""
    for name, value in options.items():
        if value is not None and value < 1:
            raise InputError(f"--{name.replace('_', '-')} {value}: expected at least 1")


def check_limits(nodes: float, edges: float, max_nodes: int | None, node_budget: int) -> None:
    for name, share in (("--nodes", nodes), ("--edges", edges)):
        if not 0 < share <= 1:
            raise InputError(f"{name} {share}: expected a share in (0, 1]")
    check_counts(max_nodes=max_nodes)
    if node_budget < 0:
        raise InputError(f"--node-budget {node_budget}: expected at least 0")


def check_device(device: str) -> None:
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch asserts that CUDA is compiled in
        first = str(error).splitlines()[0]
        raise InputError(f"the device {device!r} cannot be used: {first}") from None


def with_pruning(
    graph: nx.DiGraph[Any], nodes: float, edges: float, limit: int | None
) -> nx.DiGraph[Any]:
    graph.graph["pruning"] = {"nodes": nodes, "edges": edges, "max_nodes": limit}
    return graph
