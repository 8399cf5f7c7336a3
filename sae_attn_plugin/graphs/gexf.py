"""GEXF 1.2, written and read here, exactly.

networkx' writer drops the attributes of the graph and stamps the day's date, so the same graph
would give other bytes tomorrow. Here the attributes stand in the description, which GEXF gives
every file, and no date is written. Values that GEXF cannot hold stand as ``json:`` and their JSON,
as in GraphML.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree
from xml.etree.ElementTree import Element, SubElement

from sae_attn_plugin.errors import InputError
from sae_attn_plugin.graphs.files import (
    FORMAT,
    VERSION,
    Damaged,
    check_version,
    graph_of,
    node_link,
)
from sae_attn_plugin.graphs.graphml import (
    TYPES,
    decoded,
    is_safe,
    marked,
    named,
    parse_xml,
    values,
    with_names,
    word,
    xml_value,
)

if TYPE_CHECKING:
    import networkx as nx

_XMLNS = "http://www.gexf.net/1.2draft"
_NS = f"{{{_XMLNS}}}"
_KEY = "sae_attn_key"  # networkx' reader trips over an attribute named "key"
_GEXF_TYPES = {bool: "boolean", int: "long", float: "double", str: "string"}


def write(graph: nx.DiGraph[Any]) -> bytes:
    """The same graph gives the same bytes."""
    document = node_link(graph, "GEXF")
    root = Element("gexf", {"xmlns": _XMLNS, "version": "1.2"})
    meta = SubElement(root, "meta")
    SubElement(meta, "creator").text = "sae-attn-plugin"
    marks = {"format": FORMAT, "version": VERSION, "multigraph": document["multigraph"]}
    SubElement(meta, "description").text = marked({**marks, "graph": document["graph"]})
    body = SubElement(root, "graph", {"defaultedgetype": "directed", "mode": "static"})
    columns = {what: _Columns(what, body) for what in ("node", "edge")}
    nodes, edges = SubElement(body, "nodes"), SubElement(body, "edges")
    for row in document["nodes"]:
        name, label = row.pop("id"), row.get("label")
        shown = label if isinstance(label, str) and label and is_safe(label) else name
        element = SubElement(nodes, "node", {"id": word(name), "label": word(shown)})
        columns["node"].write(element, row)
    for i, row in enumerate(document["edges"]):
        ends = {end: word(row.pop(end)) for end in ("source", "target")}
        element = SubElement(edges, "edge", {"id": str(i), **ends})
        if document["multigraph"]:
            if _KEY in row:
                raise InputError(f"an edge has an attribute named {_KEY!r}, which GEXF files need")
            row[_KEY] = row.pop("key")
        if type(row["weight"]) is float:
            element.set("weight", repr(row.pop("weight")))
        columns["edge"].write(element, row)
    ElementTree.indent(root)
    text: str = ElementTree.tostring(root, encoding="unicode")
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{text}\n'.encode()


class _Columns:
    """The attributes that a kind of row has, declared as they come."""

    def __init__(self, what: str, body: Element) -> None:
        self.declared = SubElement(body, "attributes", {"class": what, "mode": "static"})
        self.what = what
        self.ids: dict[tuple[str, str], str] = {}

    def write(self, element: Element, row: dict[str, Any]) -> None:
        if not row:
            return
        filled = SubElement(element, "attvalues")
        for name in sorted(row):
            raw = row[name]
            value = xml_value(raw)
            kind = _GEXF_TYPES[type(value)]
            # Strings are quoted as XML attributes need; what stands as JSON is quoted already.
            text = word(raw) if isinstance(raw, str) else _text(value)
            SubElement(filled, "attvalue", {"for": self.id(name, kind), "value": text})

    def id(self, name: str, kind: str) -> str:
        if (name, kind) not in self.ids:
            identifier = self.ids[name, kind] = f"{self.what}{len(self.ids)}"
            attributes = {"id": identifier, "title": word(name), "type": kind}
            SubElement(self.declared, "attribute", attributes)
        return self.ids[name, kind]


def _text(value: str | bool | float) -> str:
    if isinstance(value, str):
        return value
    return str(value).lower() if isinstance(value, bool) else repr(value)


def read(data: bytes) -> nx.DiGraph[Any]:
    """The graph that :func:`write` wrote."""
    root = parse_xml(data)
    body = root.find(f"{_NS}graph")
    if root.tag != f"{_NS}gexf" or body is None:
        raise Damaged("not GEXF 1.2: it has no graph")
    text = root.findtext(f"{_NS}meta/{_NS}description") or ""
    marks = decoded(text, "the description") if text.startswith("json:") else None
    if not isinstance(marks, dict) or marks.get("format") != FORMAT:
        raise Damaged(f'not a graph of this package: its description lacks "format": "{FORMAT}"')
    check_version(marks.get("version"))
    document: dict[str, Any] = {
        "directed": body.get("defaultedgetype") == "directed",
        "multigraph": marks.get("multigraph"),
        "graph": marks.get("graph"),
        "nodes": [],
        "edges": [],
    }
    keys = {what: _keys(body, what) for what in ("node", "edge")}
    for i, element in enumerate(body.findall(f"{_NS}nodes/{_NS}node")):
        where = f"nodes[{i}]"
        row = _attributes(element, keys["node"], where)
        document["nodes"].append(with_names(row, where, id=named(element, "id", where)))
    for i, element in enumerate(body.findall(f"{_NS}edges/{_NS}edge")):
        where = f"edges[{i}]"
        row = _attributes(element, keys["edge"], where)
        if (weight := element.get("weight")) is not None:
            row = with_names(row, where, weight=_number(weight, f"{where}['weight']"))
        if marks.get("multigraph") is True and _KEY in row:
            row = with_names(row, where, key=row.pop(_KEY))
        ends = {end: named(element, end, where) for end in ("source", "target")}
        document["edges"].append(with_names(row, where, **ends))
    return graph_of(document)


def _keys(body: Element, what: str) -> dict[str, tuple[str, str]]:
    keys = {}
    for declared in body.findall(f"{_NS}attributes"):
        if declared.get("class") != what:
            continue
        for i, element in enumerate(declared.findall(f"{_NS}attribute")):
            identifier, title, kind = (element.get(name) for name in ("id", "title", "type"))
            if identifier is None or title is None or kind not in TYPES:
                raise Damaged(f"the {what} attribute {i} lacks an id, a title or a known type")
            keys[identifier] = (decoded(title, f"the {what} attribute {i}"), kind)
    return keys


def _attributes(element: Element, keys: dict[str, tuple[str, str]], where: str) -> dict[str, Any]:
    found = element.findall(f"{_NS}attvalues/{_NS}attvalue")
    pairs = [(value.get("for"), value.get("value", "")) for value in found]
    return values(pairs, keys, where)


def _number(text: str, where: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise Damaged(f"{where} is {text[:40]!r}; expected a number") from None
