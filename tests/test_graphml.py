"""GraphML: exact where GraphML itself is not, readable elsewhere, clear about damage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np
import pytest
from test_files import check_refused, content, small_graph

import sae_attn_plugin as sap

AWKWARD: list[Any] = [
    "", " ", "  x\n", "\t", "\r", "\r\n", "\x00", "\x85", "\u2028", "\ufffe", "\ud83d",
    "\U0001f600", "json:", "json:1", 'json:"x"', "JSON:1", "<&>\"'", "]]>", "&#13;", "true", "1",
    "nan", None, True, False, 0, -1, 2**63 - 1, -(2**63), 2**63, 10**30, 0.1, -0.0, 5e-324, 1e308,
    1.0, [], {}, [None, [True, {"a": 1.0, "\ud83d": []}]], {"json:": "json:"},
]  # fmt: skip
NAMES = (
    "id", "key", "json:", "json:x", "", " ", "a\tb", "\r", "\ud83d", "<", "node_default",
    "edge_default", "name", "d0", "weight", "node_for_adding", "u_for_edge",
)  # fmt: skip


@pytest.mark.parametrize("multi", [False, True])
def test_every_value_and_name_comes_back(tmp_path: Path, multi: bool) -> None:
    graph = small_graph(multi)
    for i, value in enumerate(AWKWARD):
        graph.graph[f"v{i}"] = value
        graph.nodes["embed@0"][f"v{i}"] = value
        graph.nodes["attn:5:17@1"]["the same name"] = value
        for *_, attributes in graph.edges(data=True):
            attributes[f"v{i}"] = value
        sap.save(graph, tmp_path / "a.graphml")
        assert content(sap.load(tmp_path / "a.graphml")) == content(graph)


@pytest.mark.parametrize("name", NAMES)
def test_every_name_comes_back(tmp_path: Path, name: str) -> None:
    graph = small_graph(multi=True)
    graph.graph[name] = 1
    sap.save(graph, tmp_path / "a.graphml")
    assert content(sap.load(tmp_path / "a.graphml")) == content(graph)
    if name not in ("weight", "key"):
        for *_, attributes in graph.edges(data=True):
            attributes[name] = "x"
        sap.save(graph, tmp_path / "a.graphml")
        assert content(sap.load(tmp_path / "a.graphml")) == content(graph)


def test_every_node_id_and_key_comes_back(tmp_path: Path) -> None:
    graph: Any = nx.MultiDiGraph()
    labels = ["\u202e", "\ud83d", "\\u0000", "\x7f", "<&>", "\\n\\t", '\\"']
    nodes = [f'logit:"{label}"@{i}' for i, label in enumerate(labels)]
    for node in nodes:
        for key in (0, 7, -1, 10**30, "0", "7", "5.1", "", " ", "json:0", "\r", "\ud83d"):
            graph.add_edge("embed@0", node, key=key, weight=1)
    sap.save(graph, tmp_path / "a.graphml")
    assert content(sap.load(tmp_path / "a.graphml")) == content(graph)


def test_many_random_graphs(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        multi = bool(rng.integers(2))
        graph: Any = nx.MultiDiGraph() if multi else nx.DiGraph()
        nodes = [f"attn:{i}:{int(rng.integers(9))}@{i}" for i in range(30)]
        for node in rng.permutation(nodes).tolist():
            graph.add_node(node, activation=float(rng.standard_normal()))
        for source, target in rng.choice(nodes, (80, 2)).tolist():
            graph.add_edge(source, target, weight=float(rng.standard_cauchy()))
        sap.save(graph, tmp_path / "a.graphml")
        assert content(sap.load(tmp_path / "a.graphml")) == content(graph)


@pytest.mark.parametrize("multi", [False, True])
def test_others_read_it(tmp_path: Path, multi: bool) -> None:
    graph = small_graph(multi)
    sap.save(graph, tmp_path / "a.graphml")
    read: Any = nx.read_graphml(tmp_path / "a.graphml", force_multigraph=multi)
    assert type(read) is type(graph)
    assert list(read) == list(graph)
    for name in ("kind", "position", "layer", "influence"):
        assert dict(read.nodes(data=name)) == dict(graph.nodes(data=name))
    assert list(read.edges(data="weight")) == list(graph.edges(data="weight"))
    if multi:
        keys = [key for *_, key in graph.edges(keys=True)]
        assert [attributes["key"] for *_, attributes in read.edges(data=True)] == keys
        assert len({key for *_, key in read.edges(keys=True)}) == len(keys)


def test_names_of_the_format_are_refused(tmp_path: Path) -> None:
    graph = small_graph()
    graph.graph["sae_attn_format"] = "mine"
    with pytest.raises(sap.InputError, match="'sae_attn_format', which GraphML files need"):
        sap.save(graph, tmp_path / "a.graphml")
    graph = small_graph()
    graph.nodes["embed@0"]["x"] = float("nan")
    with pytest.raises(sap.InputError, match=r"cannot be saved as GraphML: .*is nan"):
        sap.save(graph, tmp_path / "a.graphml")
    assert list(tmp_path.iterdir()) == []


def good(tmp_path: Path) -> str:
    sap.save(small_graph(multi=True), tmp_path / "good.graphml")
    return (tmp_path / "good.graphml").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("</graphml>", "", "not valid XML, or cut short: line"),
        ("<graphml ", "<!DOCTYPE a><graphml ", "document type declaration"),
        ("encoding='utf-8'", "encoding='ebcdic-9'", "not valid XML"),
        ("graphml.graphdrawing.org/xmlns\"", "example.org\"", "not GraphML"),
        ("sae-attn-graph", "other", "not a graph of this package: the marker"),
        (' attr.name="sae_attn_version"', ' attr.name="v"', "its version is None"),
        ('<data key="d5">1<', '<data key="d5">2<', "format version 2, and this release reads up"),
        (">True</data>\n  </graph>", ">Maybe</data>\n  </graph>", "is 'Maybe'; expected a boolean"),
        ('edgedefault="directed"', 'edgedefault="undirected"', "the graph is not directed"),
        ('<node id="embed@0">', '<node id="embed@-1">', "'embed@0' is not among the nodes"),
        ('<node id="embed@0">', '<node id="attn:5:17@1">', r"nodes\[2\] repeats 'attn:5:17@1'"),
        ('<node id="embed@0">', "<node>", r"nodes\[1\] has no id"),
        ('<node id="embed@0">', '<node id="json:3">', r"nodes\[1\] has no id"),
        ('<node id="embed@0">', '<node id="json:{">', r"nodes\[1\]\['id'\] is 'json:{', which is"),
        ('source="embed@0" ', "", r"edges\[0\] has no source"),
        (">5.1</data>", ">5.0</data>", r"edges\[1\] repeats embed@0"),
        (">0.30000000000000004<", ">much<", r"edges\[0\]\['weight'\] is 'much'; expected a double"),
        (">0.30000000000000004<", ">1e999<", r"\['weight'\] is inf"),
        (">0.3333333333333333<", ">nan<", r"\['influence'\] is nan"),
        ('json:[1, 2]', "json:[1, NaN]", "it holds NaN"),
        ('json:[1, 2]', "json:[1, 2", r"graph\['token_ids'\] is 'json:\[1, 2', which is not valid"),
        ('<data key="d8">embed', '<data key="d99">embed', r"nodes\[1\] has the attribute 'd99'"),
        ('<data key="d8">embed', '<data key="d8">pos', "'embed@0' has kind 'pos'"),
        ('attr.type="double"', 'attr.type="quad"', r"keys\[\d\] lacks an id, a name or a known"),
    ],
)  # fmt: skip
def test_damage_is_told_with_its_place(tmp_path: Path, old: str, new: str, message: str) -> None:
    check_refused(tmp_path / "a.graphml", good(tmp_path), old, new, message)


def test_every_cut_is_noticed(tmp_path: Path) -> None:
    data = good(tmp_path).rstrip().encode()
    path = tmp_path / "a.graphml"
    for length in range(0, len(data), 37):
        path.write_bytes(data[:length])
        with pytest.raises(sap.FileError):
            sap.load(path)


@pytest.mark.parametrize("data", [b"", b"\x89PNG\r\n\x1a\n", b"{}", b"<a/>", b"\xff\xfe<\x00"])
def test_foreign_files_are_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.graphml").write_bytes(data)
    with pytest.raises(sap.FileError, match=r"a\.graphml: not "):
        sap.load(tmp_path / "a.graphml")
