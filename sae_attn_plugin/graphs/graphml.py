"""GraphML, written through networkx and read back exactly.

Numbers, booleans and strings are GraphML's own, so other programs use them as they are. What
GraphML cannot hold (None, lists, dicts, integers over 64 bits, strings with characters that XML
forbids or changes) stands as the string ``json:`` and its JSON. A string that itself begins with
``json:`` is written that way too, so reading is never in doubt. The same goes for node ids and
names of attributes. The key of a parallel edge is its attribute ``key``; its XML id is a number.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from sae_attn_plugin.errors import InputError
from sae_attn_plugin.graphs.files import (
    FORMAT,
    VERSION,
    Damaged,
    check_version,
    graph_of,
    node_link,
    refuse_constant,
)

if TYPE_CHECKING:
    import networkx as nx

_NS = "{http://graphml.graphdrawing.org/xmlns}"
_MARK = "json:"
_UNSAFE = re.compile("[^\t\n\x20-\x7e\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_TAKEN = ("id", "node_default", "edge_default")  # networkx gives these a meaning of its own
_FORMAT, _VERSION, _MULTI = "sae_attn_format", "sae_attn_version", "sae_attn_multigraph"


def write(graph: nx.DiGraph[Any]) -> bytes:
    """The same graph gives the same bytes."""
    import networkx as nx
    from networkx.readwrite.graphml import GraphMLWriter

    document = node_link(graph, "GraphML")
    multi = document["multigraph"]
    marks = {_FORMAT: FORMAT, _VERSION: VERSION, _MULTI: multi}
    if taken := sorted(marks.keys() & document["graph"].keys()):
        raise InputError(f"the graph has an attribute named {taken[0]!r}, which GraphML files need")
    out: Any = nx.MultiDiGraph() if multi else nx.DiGraph()
    out.graph.update(_encode(document["graph"]) | marks)
    for node in document["nodes"]:
        name = word(node.pop("id"))
        out.add_node(name)
        out.nodes[name].update(_encode(node))
    for edge in document["edges"]:
        source, target = word(edge.pop("source")), word(edge.pop("target"))
        number = out.add_edge(source, target)
        place = (source, target, number) if multi else (source, target)
        out.edges[place].update(_encode(edge))
    # Python's own XML: lxml, where installed, would give other bytes.
    writer: Any = GraphMLWriter(out, prettyprint=True)
    if multi:
        for i, element in enumerate(writer.xml.iter("edge")):
            element.set("id", f"e{i}")  # unique, as GraphML asks; networkx repeats the key
    file = io.BytesIO()
    writer.dump(file)
    return file.getvalue()


def _encode(attributes: dict[str, Any]) -> dict[str, Any]:
    return {
        marked(name) if name in _TAKEN else word(name): xml_value(attributes[name])
        for name in sorted(attributes)
    }


def xml_value(value: Any) -> Any:
    if isinstance(value, str):
        return value if is_safe(value) else marked(value)
    if isinstance(value, bool | float) or (isinstance(value, int) and -(2**63) <= value < 2**63):
        return value
    return marked(value)


def word(text: str) -> str:
    """A string that stands in an XML attribute, where tabs and line ends are fragile."""
    return text if is_safe(text) and not re.search(r"[\t\n]", text) else marked(text)


def is_safe(text: str) -> bool:
    return not text.startswith(_MARK) and _UNSAFE.search(text) is None


def marked(value: Any) -> str:
    return _MARK + json.dumps(value, sort_keys=True, allow_nan=False, ensure_ascii=True)


# -- reading -------------------------------------------------------------------------------------


def read(data: bytes) -> nx.DiGraph[Any]:
    """The graph that :func:`write` wrote.

    Read here and not by networkx, which takes repeated nodes and unknown ends in silence.
    """
    root = parse_xml(data)
    body = root.find(f"{_NS}graph")
    if root.tag != f"{_NS}graphml" or body is None:
        raise Damaged("not GraphML: it has no graph")
    keys = _keys(root)
    attributes = _attributes(body, keys, "graph")
    if attributes.pop(_FORMAT, None) != FORMAT:
        raise Damaged(f"not a graph of this package: the marker {_FORMAT!r} is missing")
    check_version(attributes.pop(_VERSION, None))
    multi = attributes.pop(_MULTI, None)
    if type(multi) is not bool:
        raise Damaged(f"{_MULTI!r} is missing or no boolean")
    document: dict[str, Any] = {
        "directed": body.get("edgedefault") == "directed",
        "multigraph": multi,
        "graph": attributes,
        "nodes": [],
        "edges": [],
    }
    for i, element in enumerate(body.findall(f"{_NS}node")):
        where = f"nodes[{i}]"
        row = _attributes(element, keys, where)
        document["nodes"].append(with_names(row, where, id=named(element, "id", where)))
    for i, element in enumerate(body.findall(f"{_NS}edge")):
        where = f"edges[{i}]"
        row = _attributes(element, keys, where)
        ends = {end: named(element, end, where) for end in ("source", "target")}
        document["edges"].append(with_names(row, where, **ends))
    return graph_of(document)


def parse_xml(data: bytes) -> ElementTree.Element:
    """The root of an XML file of which nothing is known yet."""
    if b"<!DOCTYPE" in data:  # entities could grow without bound
        raise Damaged("it has a document type declaration, which no file of this package has")
    try:
        return ElementTree.fromstring(data)
    except ElementTree.ParseError as error:
        line, column = error.position
        raise Damaged(
            f"not valid XML, or cut short: line {line}, column {column + 1}: {error}"
        ) from error
    except (ValueError, LookupError) as error:  # an encoding that Python does not know
        raise Damaged(f"not valid XML: {error}") from error


def with_names(row: dict[str, Any], where: str, **names: Any) -> dict[str, Any]:
    if taken := sorted(row.keys() & names.keys()):
        raise Damaged(f"{where} has an attribute named {taken[0]!r}, which the format needs")
    return row | names


def _keys(root: ElementTree.Element) -> dict[str, tuple[str, str]]:
    """Of each declared attribute: its name and its type."""
    keys = {}
    for i, element in enumerate(root.findall(f"{_NS}key")):
        name, kind = element.get("attr.name"), element.get("attr.type")
        identifier = element.get("id")
        if identifier is None or name is None or kind not in TYPES:
            raise Damaged(f"keys[{i}] lacks an id, a name or a known type")
        if element.find(f"{_NS}default") is not None:
            raise Damaged(f"keys[{i}] has a default, which no file of this package has")
        keys[identifier] = (decoded(name, f"keys[{i}]"), kind)
    return keys


def _attributes(
    element: ElementTree.Element, keys: dict[str, tuple[str, str]], where: str
) -> dict[str, Any]:
    pairs = [(data.get("key"), data.text or "") for data in element.findall(f"{_NS}data")]
    return values(pairs, keys, where)


def values(
    pairs: Sequence[tuple[str | None, str]], keys: Mapping[str, tuple[str, str]], where: str
) -> dict[str, Any]:
    """Attributes from the key and the text of each, with the names and types declared."""
    found: dict[str, Any] = {}
    for key, text in pairs:
        if key is None or key not in keys:
            raise Damaged(f"{where} has the attribute {key!r}, which is not declared")
        name, kind = keys[key]
        if name in found:
            raise Damaged(f"{where} repeats {name!r}")
        try:
            found[name] = TYPES[kind](text)
        except ValueError:
            raise Damaged(f"{where}[{name!r}] is {text[:40]!r}; expected a {kind}") from None
        if kind == "string":
            found[name] = decoded(text, f"{where}[{name!r}]")
    return found


def named(element: ElementTree.Element, name: str, where: str) -> Any:
    text = element.get(name)
    if text is None:
        raise Damaged(f"{where} has no {name}")
    return decoded(text, f"{where}[{name!r}]")


def decoded(text: str, where: str) -> Any:
    if not text.startswith(_MARK):
        return text
    try:
        return json.loads(text.removeprefix(_MARK), parse_constant=refuse_constant)
    except (ValueError, RecursionError):
        raise Damaged(f"{where} is {text[:40]!r}, which is not valid JSON") from None


def _boolean(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise ValueError
    return text.lower() == "true"


TYPES: dict[str, Any] = {
    "boolean": _boolean,
    "int": int,
    "long": int,
    "float": float,
    "double": float,
    "string": str,
}
