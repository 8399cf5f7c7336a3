"""Graph files: exact round trips, clear refusals, nothing half-written."""

from __future__ import annotations

import json
import os
from enum import Enum
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np
import pytest
from helpers import random_saes, tiny_gpt2

import sae_attn_plugin as sap
from sae_attn_plugin.io import write_atomically


def small_graph(multi: bool = False) -> Any:
    graph: Any = nx.MultiDiGraph() if multi else nx.DiGraph()
    graph.graph.update(
        prompt='a "quoted" \\ \u2603 \ud83d $x$\n',
        token_ids=[1, 2],
        nested={"none": None, "yes": True, "list": [1, 2.5, "x", []], "empty": {}},
        targets=['logit:" b"@1'],
    )
    graph.add_node('logit:" b"@1', kind="logit", position=1, constant=-0.0)
    graph.add_node("embed@0", kind="embed", position=0, token="\u2581\udce9", influence=1 / 3)
    graph.add_node("attn:5:17@1", kind="attn", layer=5, feature=17, position=1, expanded=False)
    weights = [0.1 + 0.2, -5e-324, 1.7976931348623157e308]
    key = [{"key": "5.0"}, {"key": 0}, {"key": "5.1"}] if multi else [{}, {}, {}]
    graph.add_edge("embed@0", "attn:5:17@1", weight=weights[0], share=1.0, **key[0])
    graph.add_edge("embed@0", 'logit:" b"@1', weight=weights[1], **key[1])
    if multi:
        graph.add_edge("embed@0", "attn:5:17@1", weight=weights[2], head=1, **key[2])
    return graph


def content(graph: Any) -> Any:
    """Everything a graph holds, with types and the orders of nodes and edges."""
    edges = graph.edges(data=True, **({"keys": True} if graph.is_multigraph() else {}))
    return type(graph), spell([graph.graph, list(graph.nodes(data=True)), list(edges)])


def spell(value: Any) -> str:
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key!r}: {spell(value[key])}' for key in sorted(value))}}}"
    if isinstance(value, list | tuple):
        return f"{type(value).__name__}({', '.join(map(spell, value))})"
    return repr(value)


def check_round_trip(graph: Any, folder: Path, ending: str) -> None:
    """What is loaded is what was saved, and saved again it gives the same bytes."""
    first, second = folder / f"a.{ending}", folder / f"b.{ending}"
    sap.save(graph, first)
    loaded = sap.load(first)
    assert content(loaded) == content(graph)
    sap.save(loaded, second)
    assert first.read_bytes() == second.read_bytes()


def check_refused(path: Path, text: str, old: str, new: str, message: str) -> None:
    """A good file with its first ``old`` exchanged is refused by name."""
    assert old in text
    path.write_text(text.replace(old, new, 1), encoding="utf-8")
    with pytest.raises(sap.FileError, match=message) as caught:
        sap.load(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("ending", ["json", "safetensors", "graphml", "gexf"])
@pytest.mark.parametrize("multi", [False, True])
def test_round_trip_is_exact(tmp_path: Path, multi: bool, ending: str) -> None:
    check_round_trip(small_graph(multi), tmp_path, ending)


def test_the_name_survives_nnsight() -> None:
    import nnsight  # noqa: F401 - puts a method `save` on every object

    assert sap.save.__module__ == "sae_attn_plugin.graphs.files"


def test_the_file_is_plain_node_link_json(tmp_path: Path) -> None:
    graph = small_graph()
    sap.save(graph, tmp_path / "a.json")
    document = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))
    assert document["format"] == "sae-attn-graph"
    assert document["version"] == 1
    assert content(nx.node_link_graph(document, edges="edges")) == content(graph)


@pytest.fixture(scope="module")
def attribution() -> sap.Attribution:
    model = tiny_gpt2()
    run = sap.FeatureLens(model, random_saes(model, d_sae=12)).run([[3, 1, 4, 1, 5, 9]])
    features = run.features(layer=2)
    last: Any = features[features["position"] == 5]["feature"]
    whole = run.attribute([sap.Logit(7), sap.Feature(2, int(last.iloc[0]), -1)])
    return whole.prune(max_nodes=40)


@pytest.mark.parametrize("ending", ["json", "safetensors", "graphml", "gexf"])
@pytest.mark.parametrize("by", [None, "head"])
def test_round_trip_of_a_real_graph(
    tmp_path: Path, attribution: sap.Attribution, by: Any, ending: str
) -> None:
    graph = attribution.to_networkx(by=by)
    assert graph.number_of_edges() > 100
    sap.save(graph, tmp_path / f"a.{ending}")
    assert content(sap.load(tmp_path / f"a.{ending}")) == content(graph)


def test_numpy_numbers_are_stored_as_numbers(tmp_path: Path) -> None:
    graph = small_graph()
    graph.nodes["embed@0"].update(a=np.int64(3), b=np.float32(0.1), c=np.bool_(True))
    sap.save(graph, tmp_path / "a.json")
    loaded = sap.load(tmp_path / "a.json").nodes["embed@0"]
    assert (loaded["a"], loaded["b"], loaded["c"]) == (3, float(np.float32(0.1)), True)
    assert loaded["c"] is True


class Word(str):
    """A string that knows more, as the demo's prompts do."""


class Level(float, Enum):
    low = 0.5


@pytest.mark.parametrize("ending", ["json", "safetensors", "graphml", "gexf"])
def test_of_what_is_more_than_a_string_or_number_that_is_stored(
    tmp_path: Path, ending: str
) -> None:
    graph = small_graph()
    graph.graph.update(prompt=Word("a"), level=Level.low, both=[Word("b")])
    sap.save(graph, tmp_path / f"a.{ending}")
    loaded = sap.load(tmp_path / f"a.{ending}").graph
    assert (loaded["prompt"], loaded["level"], loaded["both"]) == ("a", 0.5, ["b"])


def break_node(graph: Any, **attributes: Any) -> None:
    graph.nodes["embed@0"].update(attributes)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda g: break_node(g, x=float("nan")), r"'x'\] is nan; numbers must be finite"),
        (lambda g: break_node(g, x=[1, {"y": float("-inf")}]), r"\[1\]\['y'\] is -inf"),
        (lambda g: break_node(g, x=(1, 2)), "is a tuple; expected"),
        (lambda g: break_node(g, x={1: 2}), "has the key 1; keys must be strings"),
        (lambda g: break_node(g, x=object()), "is a object; expected"),
        (lambda g: break_node(g, id="mine"), "named 'id', which the format needs"),
        (lambda g: break_node(g, position=7), "'embed@0' has position 7"),
        (lambda g: g.add_node("feature 5"), "not a node id: 'feature 5'"),
        (lambda g: g.add_node(5), "the node 5 is no node id"),
        (lambda g: g.add_edge("embed@0", "embed@1"), "embed@0 -> embed@1 has no weight"),
        (lambda g: g.graph.update(x={3}), "is a set; expected"),
    ],
)
def test_what_cannot_be_saved_is_refused_before_writing(
    tmp_path: Path, damage: Any, message: str
) -> None:
    graph = small_graph()
    damage(graph)
    with pytest.raises(sap.InputError, match=message):
        sap.save(graph, tmp_path / "a.json")
    assert list(tmp_path.iterdir()) == []


def test_undirected_graphs_and_unknown_endings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(sap.InputError, match="expected a DiGraph or MultiDiGraph, got Graph"):
        sap.save(nx.Graph(), tmp_path / "a.json")  # type: ignore[arg-type]
    for path in ("a", "a.pickle", "a.json.gz"):
        with pytest.raises(sap.InputError, match=r"no known graph format; known: \.json"):
            sap.save(small_graph(), tmp_path / path)
        with pytest.raises(sap.InputError, match=r"no known graph format; known: \.json"):
            sap.load(tmp_path / path)
    assert list(tmp_path.iterdir()) == []


def edited(**changes: Any) -> bytes:
    document: dict[str, Any] = {
        "format": "sae-attn-graph",
        "version": 1,
        "directed": True,
        "multigraph": False,
        "graph": {},
        "nodes": [{"id": "embed@0"}, {"id": 'logit:" b"@1'}],
        "edges": [{"source": "embed@0", "target": 'logit:" b"@1', "weight": 1.0}],
    }
    document.update(changes)
    return json.dumps(document).encode()


EDGE = {"source": "embed@0", "target": 'logit:" b"@1', "weight": 1.0}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not valid JSON, or cut short: line 1"),
        (edited()[:-20], "not valid JSON, or cut short: line 1, column"),
        (b"\x89PNG\r\n\x1a\n", "not a text file"),
        (b"[1, 2]", "not a graph of this package"),
        (b"[" * 100_000, "nested too deeply|cut short"),
        (b'{"directed": true, "nodes": [], "links": []}', "not a graph of this package"),
        (edited(format="other"), "not a graph of this package"),
        (edited(version=2), "format version 2, and this release reads up to 1; upgrade"),
        (edited(version="1"), "its version is '1'; expected a number"),
        (edited(version=True), "its version is True; expected a number"),
        (edited(nodes={}), "'nodes' is missing or no list"),
        (edited(directed=False), "the graph is not directed"),
        (edited(nodes=[{"id": 3}]), r"nodes\[0\] has no id"),
        (edited(nodes=[{"id": "embed@0"}] * 2), r"nodes\[1\] repeats 'embed@0'"),
        (edited(nodes=[{"id": "embed@0"}, {"id": "embed@-1"}], edges=[]), "'embed@-1'"),
        (edited(nodes=[{"id": "embed@0", "kind": "pos"}], edges=[]), "has kind 'pos'"),
        (edited(edges=[{"source": "embed@0"}]), r"edges\[0\] lacks one of source, target"),
        (edited(edges=[{**EDGE, "source": "embed@9"}]), r"'embed@9' is not among the nodes"),
        (edited(edges=[EDGE, EDGE]), r"edges\[1\] repeats embed@0 -> logit"),
        (edited(edges=[{**EDGE, "weight": "1"}]), "has no weight"),
        (edited(multigraph=True), r"edges\[0\] lacks one of source, target, key"),
        (edited(edges=[{**EDGE, "weight": float("nan")}]), "it holds NaN"),
        (edited().replace(b"1.0}", b"1e999}"), r"\['weight'\] is inf"),
    ],
)
def test_foreign_and_damaged_files_are_refused(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(data)
    with pytest.raises(sap.FileError, match=message) as caught:
        sap.load(path)
    assert str(path) in str(caught.value)


def test_a_sound_hand_made_file_loads(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(edited())
    assert list(sap.load(path).edges(data="weight")) == [("embed@0", 'logit:" b"@1', 1.0)]


def test_missing_file_and_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(sap.FileError, match=r"cannot read .*a\.json: No such file"):
        sap.load(tmp_path / "a.json")
    with pytest.raises(sap.FileError, match=r"the folder .*none does not exist"):
        sap.save(small_graph(), tmp_path / "none" / "a.json")
    (tmp_path / "b.json").mkdir()
    with pytest.raises(sap.FileError, match="it is a folder"):
        sap.save(small_graph(), tmp_path / "b.json")


@pytest.mark.parametrize("error", [RuntimeError("boom"), KeyboardInterrupt(), OSError(28, "full")])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, error: BaseException
) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")

    def write(file: Any) -> None:
        file.write(b"half")
        raise error

    kind = sap.FileError if isinstance(error, OSError) else type(error)
    with pytest.raises(kind):
        write_atomically(path, write)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_devices_are_not_replaced() -> None:
    with pytest.raises(sap.FileError, match="not a regular file"):
        write_atomically(os.devnull, lambda file: file.write(b"x"))


def test_links_are_written_through(tmp_path: Path) -> None:
    (tmp_path / "real.json").write_bytes(b"old")
    (tmp_path / "link.json").symlink_to(tmp_path / "real.json")
    sap.save(small_graph(), tmp_path / "link.json")
    assert (tmp_path / "link.json").is_symlink()
    assert content(sap.load(tmp_path / "real.json")) == content(small_graph())
