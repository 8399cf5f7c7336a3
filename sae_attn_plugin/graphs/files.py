"""Graphs as files: exact round trips, never pickle, written whole or not at all."""

from __future__ import annotations

import json
import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from sae_attn_plugin.errors import FileError, InputError
from sae_attn_plugin.io import write_atomically
from sae_attn_plugin.nodes import Node

if TYPE_CHECKING:
    import networkx as nx

    from sae_attn_plugin.attribution.table import Attribution

__all__ = ["load", "save"]

FORMAT = "sae-attn-graph"
VERSION = 1
_RESERVED = {"node": {"id"}, "edge": {"source", "target", "key"}}
# What this package computes with, where it is there.
_NUMBERS = (
    "activation", "pre_activation", "constant", "pruned_in", "internal", "influence",
    "probability",
)  # fmt: skip
_TEXTS = ("token", "label", "neuronpedia")


def save(
    graph: nx.DiGraph[Any] | Attribution,
    path: str | Path,
    *,
    format: str | None = None,
    **options: Any,
) -> None:
    """Write an attribution graph, or a whole attribution, to a file; the same gives the same bytes.

    =================  ================  ============================================  ============
    ``format``         ending            what it is                                    :func:`load`
    =================  ================  ============================================  ============
    ``"native"``       ``.safetensors``  numbers as tensors: graphs and attributions   exact
    ``"json"``         ``.json``         networkx' node-link JSON with a marker        exact
    ``"graphml"``      ``.graphml``      GraphML, for yEd, Gephi, Cytoscape, igraph    exact
    ``"gexf"``         ``.gexf``         GEXF 1.2, for Gephi                           exact
    ``"neuronpedia"``  ``.json``         graph JSON of Neuronpedia, circuit-tracer     no
    ``"mib"``          ``.json``         circuit JSON of MIB and EAP-IG, by head       no
    ``"html"``         ``.html``         a page that shows it, offline                 no
    =================  ================  ============================================  ============

    Args:
        graph: a ``DiGraph`` or ``MultiDiGraph`` whose nodes are node ids. Attributes may be
            strings, finite numbers, booleans, None, and lists and dicts of these. Or an
            :class:`Attribution`, which the format ``"native"`` holds.
        path: the file; an existing one is replaced only once the new one is complete.
        format: a name from the table. None: by the ending of the path, and ``"json"`` for
            ``.json``.
        options: of ``"native"``: ``heads`` (:func:`~sae_attn_plugin.graphs.native.write`); of
            ``"neuronpedia"``: ``slug``, ``scan``, ``source_set``, ``no_feature``, ``cantor``,
            ``create_time_ms`` (:func:`~sae_attn_plugin.graphs.neuronpedia.to_neuronpedia`); of
            ``"mib"``: ``run``, which it needs (:func:`~sae_attn_plugin.graphs.mib.to_mib`); of
            ``"html"``: ``title``.

    Raises:
        InputError: unknown format, ending or option, or something in the graph that the format
            cannot hold, named.
        FileError: the file cannot be written.
    """
    chosen = _format_of(path, format, options)
    if hasattr(graph, "to_networkx") and not chosen.attributions:
        raise InputError(
            f"expected a graph for {str(path)!r}, got an {type(graph).__name__}; pass its "
            "to_networkx(), or a path that ends in .safetensors"
        )
    data = chosen.write(graph, **options)
    write_atomically(path, lambda file: file.write(data))


def load(path: str | Path) -> Any:
    """Read what :func:`save` wrote: a ``DiGraph``, a ``MultiDiGraph`` or an :class:`Attribution`.

    The ending of the path picks the format. Formats of others are written only.

    Raises:
        InputError: unknown ending.
        FileError: missing, foreign, damaged, or written by a newer version; says where and what.
    """
    read = _format_of(path).read
    if read is None:
        raise InputError(
            f"{str(path)!r} is written for others to read; load the graph's own file, such as its "
            ".json"
        )
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise FileError(f"cannot read {path}: {error.strerror or error}") from error
    try:
        return read(data)
    except Damaged as error:
        raise FileError(f"cannot load {path}: {error}") from error.__cause__


class Damaged(Exception):
    """What is wrong with a graph or a file; the caller knows which of the two it holds."""


# -- node-link JSON, and what every format shares ------------------------------------------------


def checked(graph: nx.DiGraph[Any], what: str) -> nx.DiGraph[Any]:
    """A copy of a sound graph whose attributes are plain Python; ``what`` it is to be saved as.

    Raises:
        InputError: no attribution graph, or an attribute that no file could give back.
    """
    return _build(node_link(graph, what))


def node_link(graph: nx.DiGraph[Any], what: str) -> dict[str, Any]:
    """Node-link data of a sound graph, all of it new; raises as :func:`checked` does."""
    import networkx as nx  # late: the package imports this file, and should cost little

    if not isinstance(graph, nx.DiGraph):  # MultiDiGraph is one
        raise InputError(f"expected a DiGraph or MultiDiGraph, got {type(graph).__name__}")
    try:
        _check_graph(graph)
        return plain(nx.node_link_data(graph, edges="edges"), "graph")
    except Damaged as error:
        raise InputError(f"the graph cannot be saved as {what}: {error}") from None


def _write_json(graph: nx.DiGraph[Any]) -> bytes:
    return _dump_document(node_link(graph, "JSON") | {"format": FORMAT, "version": VERSION})


def _write_neuronpedia(graph: nx.DiGraph[Any], **options: Any) -> bytes:
    from sae_attn_plugin.graphs.neuronpedia import to_neuronpedia

    return _dump_document(to_neuronpedia(graph, **options))


def _write_mib(graph: nx.DiGraph[Any], **options: Any) -> bytes:
    from sae_attn_plugin.graphs.mib import to_mib

    if "run" not in options:
        raise InputError(
            "the format 'mib' needs the run that the graph is of, since it splits features by "
            "head: save(..., format='mib', run=run)"
        )
    return _dump_document(to_mib(graph, **options))


def _write_html(graph: nx.DiGraph[Any], **options: Any) -> bytes:
    from sae_attn_plugin.graphs.html import page_html

    return page_html(graph, **options).encode("utf-8")


def _room(name: str) -> tuple[Callable[..., bytes], Callable[[bytes], Any]]:
    """The writer and the reader of a format with a module of its own, imported when called."""

    def write(content: Any, **options: Any) -> bytes:
        return import_module(f"sae_attn_plugin.graphs.{name}").write(content, **options)

    def read(data: bytes) -> Any:
        return import_module(f"sae_attn_plugin.graphs.{name}").read(data)

    return write, read


def _dump_document(data: dict[str, Any]) -> bytes:
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


def plain(value: Any, where: str) -> Any:
    """A copy that JSON gives back as it is."""
    if type(value).__module__ == "numpy" and hasattr(value, "item") and value.ndim == 0:
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        raise Damaged(f"{where} is {value}; numbers must be finite")
    if value is None or isinstance(value, bool):
        return value
    # Of what is more than a string or a number, such as a prompt that knows its answer, just that.
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return int.__int__(value)
    if isinstance(value, float):
        return float.__float__(value)
    if type(value) is list:
        return [plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise Damaged(f"{where} has the key {key!r}; keys must be strings")
        return {key: plain(item, f"{where}[{key!r}]") for key, item in value.items()}
    raise Damaged(
        f"{where} is a {type(value).__name__}; expected a string, a number, a boolean, None, or a "
        "list or dict of these"
    )


def _read_json(data: bytes) -> nx.DiGraph[Any]:
    try:
        document = json.loads(data.decode("utf-8"), parse_constant=refuse_constant)
    except UnicodeDecodeError as error:
        raise Damaged(f"not a text file (byte {error.start})") from error
    except json.JSONDecodeError as error:
        raise Damaged(
            f"not valid JSON, or cut short: line {error.lineno}, column {error.colno}: {error.msg}"
        ) from error
    except ValueError as error:  # an integer of thousands of digits
        raise Damaged(f"not a number that can be read: {error}") from error
    except RecursionError:
        raise Damaged("nested too deeply") from None
    if isinstance(document, dict) and document.keys() >= {"metadata", "qParams", "links"}:
        raise Damaged("it is a graph for Neuronpedia; that format is written, not read")
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise Damaged(f'not a graph of this package: the marker "format": "{FORMAT}" is missing')
    check_version(document.get("version"))
    return graph_of(document)


def check_version(version: Any, newest: int = VERSION) -> None:
    """Whether this release reads that version of its own files."""
    if type(version) is not int or version < 1:
        raise Damaged(f"its version is {version!r}; expected a number")
    if version > newest:
        raise Damaged(
            f"it has format version {version}, and this release reads up to {newest}; upgrade "
            "sae-attn-plugin"
        )


def graph_of(document: dict[str, Any]) -> nx.DiGraph[Any]:
    """The graph of node-link data from a file, of which nothing is known yet."""
    _check_document(document)
    plain(document, "file")  # finite numbers: 1e999 is valid JSON
    graph = _build(document)
    _check_graph(graph)
    return graph


def _build(document: dict[str, Any]) -> nx.DiGraph[Any]:
    """As networkx' node_link_graph, which trips over attributes named as its parameters are."""
    import networkx as nx

    graph: Any = nx.MultiDiGraph() if document["multigraph"] else nx.DiGraph()
    graph.graph.update(document["graph"])
    for node in document["nodes"]:
        graph.add_node(node["id"])
        graph.nodes[node["id"]].update(_without(node, "id"))
    names = ("source", "target", "key") if document["multigraph"] else ("source", "target")
    for edge in document["edges"]:
        place = tuple(edge[name] for name in names)
        graph.add_edge(*place)
        graph.edges[place].update(_without(edge, *names))
    return graph


def _without(row: dict[str, Any], *names: str) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key not in names}


def refuse_constant(name: str) -> NoReturn:
    raise Damaged(f"it holds {name}; numbers must be finite")


def _check_document(document: dict[str, Any]) -> None:
    """What networkx would take in silence: missing parts, repeated and unknown nodes."""
    expected = {"directed": bool, "multigraph": bool, "graph": dict, "nodes": list, "edges": list}
    for name, kind in expected.items():
        if type(document.get(name)) is not kind:
            raise Damaged(f"{name!r} is missing or no {kind.__name__}")
    if not document["directed"]:
        raise Damaged("the graph is not directed")
    known: set[str] = set()
    for i, node in enumerate(document["nodes"]):
        if not isinstance(node, dict) or not isinstance(node.get("id"), str):
            raise Damaged(f"nodes[{i}] has no id")
        if node["id"] in known:
            raise Damaged(f"nodes[{i}] repeats {node['id']!r}")
        known.add(node["id"])
    seen: set[tuple[Any, ...]] = set()
    names = ("source", "target", "key") if document["multigraph"] else ("source", "target")
    for i, edge in enumerate(document["edges"]):
        if not isinstance(edge, dict) or any(
            not isinstance(edge.get(name), str | int) for name in names
        ):
            raise Damaged(f"edges[{i}] lacks one of {', '.join(names)}")
        for name in ("source", "target"):
            if edge[name] not in known:
                raise Damaged(f"edges[{i}]: its {name} {edge[name]!r} is not among the nodes")
        place = tuple(edge[name] for name in names)
        if place in seen:
            raise Damaged(f"edges[{i}] repeats {' -> '.join(map(str, place[:2]))}")
        seen.add(place)


def _check_graph(graph: nx.DiGraph[Any]) -> None:
    for name, attributes in graph.nodes(data=True):
        if not isinstance(name, str):
            raise Damaged(f"the node {name!r} is no node id")
        _check_names("node", repr(name), attributes)
        try:
            node = Node.parse(name)
        except InputError as error:
            raise Damaged(str(error)) from None
        for field in ("kind", "layer", "position", "feature", "head"):
            if field in attributes and not _same(attributes[field], getattr(node, field)):
                raise Damaged(f"the node {name!r} has {field} {attributes[field]!r}")
        _check_values(f"the node {name!r}", attributes, _NUMBERS, _TEXTS)
    edges: Any = graph.edges  # called with keys only where the graph has them
    keys = {"keys": True} if graph.is_multigraph() else {}
    for source, target, *key, attributes in edges(data=True, **keys):
        where = f"the edge {source} -> {target}"
        if key and not isinstance(key[0], str | int):
            raise Damaged(f"{where} has the key {key[0]!r}; expected a string or a number")
        _check_names("edge", where, attributes)
        if not _is_number(attributes.get("weight")):
            raise Damaged(f"{where} has no weight")
        _check_values(where, attributes, ("share",), ())
    for field in ("tokens", "targets"):
        found = graph.graph.get(field, [])
        if not isinstance(found, list) or not all(isinstance(one, str) for one in found):
            raise Damaged(f"its {field} are no list of strings")


def _same(found: Any, expected: Any) -> bool:
    return found == expected and isinstance(found, str | bool) == isinstance(expected, str | bool)


def _is_number(value: Any) -> bool:
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        return False
    try:
        float(value)
    except OverflowError:  # an integer of hundreds of digits
        return False
    return True


def _check_values(
    where: str, attributes: Mapping[str, Any], numeric: Sequence[str], texts: Sequence[str]
) -> None:
    for field in numeric:
        if field in attributes and not _is_number(attributes[field]):
            raise Damaged(f"{where} has {field} {attributes[field]!r}; expected a number")
    for field in texts:
        if field in attributes and not isinstance(attributes[field], str):
            raise Damaged(f"{where} has {field} {attributes[field]!r}; expected a string")


def _check_names(what: str, where: str, attributes: Mapping[Any, Any]) -> None:
    if taken := _RESERVED[what] & attributes.keys():
        raise Damaged(f"{where} has an attribute named {taken.pop()!r}, which the format needs")


# -- formats -------------------------------------------------------------------------------------


class _Format(NamedTuple):
    ending: str
    write: Callable[..., bytes]
    read: Callable[[bytes], Any] | None = None
    options: tuple[str, ...] = ()
    attributions: bool = False


_FORMATS: dict[str, _Format] = {  # of those with the same ending, the first is its own
    "json": _Format(".json", _write_json, _read_json),
    "native": _Format(".safetensors", *_room("native"), options=("heads",), attributions=True),
    "graphml": _Format(".graphml", *_room("graphml")),
    "gexf": _Format(".gexf", *_room("gexf")),
    "neuronpedia": _Format(
        ".json",
        _write_neuronpedia,
        options=("slug", "scan", "source_set", "no_feature", "cantor", "create_time_ms"),
    ),
    "mib": _Format(".json", _write_mib, options=("run",)),
    "html": _Format(".html", _write_html, options=("title",)),
}
FORMATS = tuple(_FORMATS)
ENDINGS = tuple(dict.fromkeys(known.ending for known in _FORMATS.values()))


def _format_of(
    path: str | Path, name: str | None = None, options: Mapping[str, Any] | None = None
) -> _Format:
    suffix = Path(path).suffix.lower()
    if name is None:
        name = next((key for key, known in _FORMATS.items() if known.ending == suffix), None)
        if name is None:
            raise InputError(
                f"the ending of {str(path)!r} names no known graph format; known: "
                f"{', '.join(ENDINGS)}"
            )
    if name not in _FORMATS:
        raise InputError(f"unknown graph format {name!r}; known: {', '.join(_FORMATS)}")
    chosen = _FORMATS[name]
    if suffix != chosen.ending:
        raise InputError(
            f"a graph of the format {name!r} goes to a path that ends in {chosen.ending}, got "
            f"{str(path)!r}"
        )
    if unknown := sorted(set(options or ()) - set(chosen.options)):
        known = ", ".join(chosen.options) or "none"
        raise InputError(f"the format {name!r} has no option {unknown[0]!r}; its options: {known}")
    return chosen
