"""Graphs as files: exact round trips, never pickle, written whole or not at all."""

from __future__ import annotations

import json
import math
import numbers
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from sae_attn_plugin.errors import FileError, InputError
from sae_attn_plugin.io import write_atomically
from sae_attn_plugin.nodes import Node

if TYPE_CHECKING:
    import networkx as nx

__all__ = ["load", "save"]

FORMAT = "sae-attn-graph"
VERSION = 1
_RESERVED = {"node": {"id"}, "edge": {"source", "target", "key"}}


def save(graph: nx.DiGraph, path: str | Path) -> None:
    """Write an attribution graph to a file; :func:`load` gives it back exactly.

    The ending of the path picks the format: ``.json`` is networkx' node-link JSON with a format
    marker, keys sorted and one node or edge a line. The same graph gives the same bytes.

    Args:
        graph: a ``DiGraph`` or ``MultiDiGraph`` whose nodes are node ids. Attributes may be
            strings, finite numbers, booleans, None, and lists and dicts of these.
        path: the file; an existing one is replaced only once the new one is complete.

    Raises:
        InputError: unknown ending, or something in the graph the format cannot hold, named.
        FileError: the file cannot be written.
    """
    data = _format_of(path).write(graph)
    write_atomically(path, lambda file: file.write(data))


def load(path: str | Path) -> nx.DiGraph:
    """Read a graph that :func:`save` wrote: a ``DiGraph`` or ``MultiDiGraph``.

    Raises:
        InputError: unknown ending.
        FileError: missing, foreign, damaged, or written by a newer version; says where and what.
    """
    file_format = _format_of(path)
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise FileError(f"cannot read {path}: {error.strerror or error}") from error
    try:
        return file_format.read(data)
    except _Damaged as error:
        raise FileError(f"cannot load {path}: {error}") from error.__cause__


class _Damaged(Exception):
    """What is wrong with a graph or a file; the caller knows which of the two it holds."""


# -- node-link JSON ------------------------------------------------------------------------------


def _write_json(graph: nx.DiGraph) -> bytes:
    import networkx as nx  # late: the package imports this file, and should cost little

    if not isinstance(graph, nx.DiGraph):  # MultiDiGraph is one
        raise InputError(f"expected a DiGraph or MultiDiGraph, got {type(graph).__name__}")
    try:
        _check_graph(graph)
        data = _plain(nx.node_link_data(graph, edges="edges"), "graph")
    except _Damaged as error:
        raise InputError(f"the graph cannot be saved as JSON: {error}") from None
    data |= {"format": FORMAT, "version": VERSION}
    fields = ",\n".join(f'"{key}": {_dump(data[key])}' for key in sorted(data))
    return f"{{\n{fields}\n}}\n".encode("ascii")


def _dump(value: Any) -> str:
    if isinstance(value, list):
        lines = ",\n".join(_dump_line(item) for item in value)
        return f"[\n{lines}\n]" if lines else "[]"
    return _dump_line(value)


def _dump_line(value: Any) -> str:
    # ASCII: tokens may hold halves of a character, which UTF-8 cannot encode.
    return json.dumps(value, sort_keys=True, allow_nan=False, ensure_ascii=True)


def _plain(value: Any, where: str) -> Any:
    """A copy that JSON gives back as it is."""
    if type(value).__module__ == "numpy" and hasattr(value, "item") and value.ndim == 0:
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        raise _Damaged(f"{where} is {value}; numbers must be finite")
    if value is None or isinstance(value, str | int | float):
        return value
    if type(value) is list:
        return [_plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise _Damaged(f"{where} has the key {key!r}; keys must be strings")
        return {key: _plain(item, f"{where}[{key!r}]") for key, item in value.items()}
    raise _Damaged(
        f"{where} is a {type(value).__name__}; expected a string, a number, a boolean, None, or a "
        "list or dict of these"
    )


def _read_json(data: bytes) -> nx.DiGraph:
    import networkx as nx

    try:
        document = json.loads(data.decode("utf-8"), parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise _Damaged(f"not a text file (byte {error.start})") from error
    except json.JSONDecodeError as error:
        raise _Damaged(
            f"not valid JSON, or cut short: line {error.lineno}, column {error.colno}: {error.msg}"
        ) from error
    except RecursionError:
        raise _Damaged("nested too deeply") from None
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise _Damaged(f'not a graph of this package: the marker "format": "{FORMAT}" is missing')
    version = document.get("version")
    if type(version) is not int or version < 1:
        raise _Damaged(f"its version is {version!r}; expected a number")
    if version > VERSION:
        raise _Damaged(
            f"it has format version {version}, and this release reads up to {VERSION}; upgrade "
            "sae-attn-plugin"
        )
    _check_document(document)
    _plain(document, "file")  # finite numbers: 1e999 is valid JSON
    graph = nx.node_link_graph(document, edges="edges")
    _check_graph(graph)
    return graph


def _refuse_constant(name: str) -> NoReturn:
    raise _Damaged(f"it holds {name}; numbers must be finite")


def _check_document(document: dict[str, Any]) -> None:
    """What networkx would take in silence: missing parts, repeated and unknown nodes."""
    expected = {"directed": bool, "multigraph": bool, "graph": dict, "nodes": list, "edges": list}
    for name, kind in expected.items():
        if type(document.get(name)) is not kind:
            raise _Damaged(f"{name!r} is missing or no {kind.__name__}")
    if not document["directed"]:
        raise _Damaged("the graph is not directed")
    known: set[str] = set()
    for i, node in enumerate(document["nodes"]):
        if not isinstance(node, dict) or not isinstance(node.get("id"), str):
            raise _Damaged(f"nodes[{i}] has no id")
        if node["id"] in known:
            raise _Damaged(f"nodes[{i}] repeats {node['id']!r}")
        known.add(node["id"])
    seen: set[tuple[Any, ...]] = set()
    names = ("source", "target", "key") if document["multigraph"] else ("source", "target")
    for i, edge in enumerate(document["edges"]):
        if not isinstance(edge, dict) or any(
            not isinstance(edge.get(name), str | int) for name in names
        ):
            raise _Damaged(f"edges[{i}] lacks one of {', '.join(names)}")
        for name in ("source", "target"):
            if edge[name] not in known:
                raise _Damaged(f"edges[{i}]: its {name} {edge[name]!r} is not among the nodes")
        place = tuple(edge[name] for name in names)
        if place in seen:
            raise _Damaged(f"edges[{i}] repeats {' -> '.join(map(str, place[:2]))}")
        seen.add(place)


def _check_graph(graph: nx.DiGraph) -> None:
    for name, attributes in graph.nodes(data=True):
        if not isinstance(name, str):
            raise _Damaged(f"the node {name!r} is no node id")
        _check_names("node", repr(name), attributes)
        try:
            node = Node.parse(name)
        except InputError as error:
            raise _Damaged(str(error)) from None
        for field in ("kind", "layer", "position", "feature", "head"):
            if field in attributes and attributes[field] != getattr(node, field):
                raise _Damaged(f"the node {name!r} has {field} {attributes[field]!r}")
    edges: Any = graph.edges  # called with keys only where the graph has them
    keys = {"keys": True} if graph.is_multigraph() else {}
    for source, target, *key, attributes in edges(data=True, **keys):
        where = f"the edge {source} -> {target}"
        if key and not isinstance(key[0], str | int):
            raise _Damaged(f"{where} has the key {key[0]!r}; expected a string or a number")
        _check_names("edge", where, attributes)
        if not isinstance(attributes.get("weight"), numbers.Real):
            raise _Damaged(f"{where} has no weight")


def _check_names(what: str, where: str, attributes: Mapping[Any, Any]) -> None:
    if taken := _RESERVED[what] & attributes.keys():
        raise _Damaged(f"{where} has an attribute named {taken.pop()!r}, which the format needs")


# -- formats -------------------------------------------------------------------------------------


class _Format(NamedTuple):
    write: Callable[[nx.DiGraph], bytes]
    read: Callable[[bytes], nx.DiGraph]


_FORMATS: dict[str, _Format] = {".json": _Format(_write_json, _read_json)}


def _format_of(path: str | Path) -> _Format:
    suffix = Path(path).suffix.lower()
    if suffix not in _FORMATS:
        raise InputError(
            f"the ending of {str(path)!r} names no known graph format; known: {', '.join(_FORMATS)}"
        )
    return _FORMATS[suffix]
