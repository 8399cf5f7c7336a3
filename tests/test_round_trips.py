"""Every format that loads gives back any graph exactly; an attribution comes back whole."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import FUZZ
from helpers import random_saes, tiny_gpt2, tiny_llama
from hypothesis import given, settings
from hypothesis import strategies as st
from test_files import check_refused, check_round_trip, content, small_graph

import sae_attn_plugin as sap
from sae_attn_plugin.graphs import files
from sae_attn_plugin.nodes import quote

ENDINGS = ("json", "safetensors", "graphml", "gexf")

# Any text, halves of a character and control characters too.
TEXT = st.text(st.characters(exclude_categories=()), max_size=6)
NUMBERS = st.floats(allow_nan=False, allow_infinity=False) | st.integers() | st.booleans()
SCALARS = st.none() | NUMBERS | TEXT
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
WEIGHTS = st.floats(allow_nan=False, allow_infinity=False)
# Names that mean something to a format, and so cannot hold just anything.
_OWN = {"id", "key", "source", "target", "weight", "sae_attn_key", "share", "tokens", "targets",
        "kind", "layer", "position", "feature", "head", *files._NUMBERS, *files._TEXTS}  # fmt: skip
ATTRIBUTES = st.dictionaries(TEXT.filter(lambda name: name not in _OWN), VALUES, max_size=4)


@st.composite
def graphs(draw: Any) -> Any:
    graph: Any = draw(st.sampled_from([nx.DiGraph, nx.MultiDiGraph]))()
    graph.graph.update(draw(ATTRIBUTES))
    position = st.integers(0, 5)
    nodes = draw(
        st.lists(
            st.builds("embed@{}".format, position)
            | st.builds("attn:{}:{}@{}".format, position, st.integers(0, 10**17), position)
            | st.builds(lambda t, p: f"logit:{quote(t)}@{p}", TEXT, position),
            unique=True,
            max_size=6,
        )
    )
    for node in nodes:
        graph.add_node(node)
        graph.nodes[node].update(draw(ATTRIBUTES))
    if nodes:
        ends = st.tuples(st.sampled_from(nodes), st.sampled_from(nodes))
        for source, target in draw(st.lists(ends, max_size=8)):
            place = (source, target)
            if graph.is_multigraph():
                place = (*place, draw(TEXT | st.integers()))
            graph.add_edge(*place)
            graph.edges[place].update({**draw(ATTRIBUTES), "weight": draw(WEIGHTS)})
    return graph


@pytest.mark.parametrize("ending", ENDINGS)
@settings(max_examples=30 * max(FUZZ, 1))
@given(graph=graphs())
def test_any_graph_comes_back(tmp_path: Path, ending: str, graph: Any) -> None:
    check_round_trip(graph, tmp_path, ending)


# -- attributions ----------------------------------------------------------------------------------


def small_attribution(dtype: torch.dtype = torch.float32, make: Any = tiny_gpt2) -> Any:
    model = make(dtype)
    run = sap.FeatureLens(model, random_saes(model)).run([[3, 1, 4, 1, 5, 9]])
    return run.attribute([sap.Logit(7), sap.Feature(2, 3, -1), sap.LogitDiff(1, 2)])


def check_same(first: Any, second: Any) -> None:
    for name in ("nodes", "edges", "ledger"):
        pd.testing.assert_frame_equal(getattr(first, name), getattr(second, name), check_exact=True)
    for name in ("roots", "tokens", "provenance", "neuronpedia", "probabilities"):
        assert getattr(first, name) == getattr(second, name), name
    for name in ("row", "source", "weight"):  # however the edges are held
        np.testing.assert_array_equal(getattr(first.flow, name), getattr(second.flow, name))
    for one, other in (
        (first.flow, second.flow),
        (first.writers, second.writers),
        (first.writers.vectors, second.writers.vectors),
    ):
        for field in dataclasses.fields(one):
            if field.name in ("pieces", "vectors"):
                continue
            a, b = getattr(one, field.name), getattr(other, field.name)
            assert type(a) is type(b), field.name
            if isinstance(a, np.ndarray):
                assert a.dtype == b.dtype
                np.testing.assert_array_equal(a, b)
            elif isinstance(a, torch.Tensor):
                assert a.dtype == b.dtype
                assert torch.equal(a, b)
            else:
                assert a == b


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("make", [tiny_gpt2, tiny_llama])
def test_an_attribution_comes_back_whole(tmp_path: Path, dtype: torch.dtype, make: Any) -> None:
    attribution = small_attribution(dtype, make)
    sap.save(attribution, tmp_path / "a.safetensors")
    loaded = sap.load(tmp_path / "a.safetensors")
    assert isinstance(loaded, sap.Attribution)
    check_same(loaded, attribution)
    pd.testing.assert_frame_equal(
        loaded.edges_by_head(), attribution.edges_by_head(), check_exact=True
    )
    sap.save(loaded, tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    # and works on: pruned, then by head, then as a graph
    check_same(loaded.prune(0.6, 0.9), attribution.prune(0.6, 0.9))
    by_head = loaded.prune(0.6, 0.9).edges_by_head()
    expected = attribution.prune(0.6, 0.9).edges_by_head()
    pd.testing.assert_frame_equal(by_head, expected, rtol=1e-5, atol=1e-7)
    assert content(loaded.to_networkx()) == content(attribution.to_networkx())
    assert loaded.worst_residual == attribution.worst_residual <= 1e-5


def test_a_pruned_attribution_and_one_without_heads(tmp_path: Path) -> None:
    pruned = small_attribution().prune(0.5, 0.8, 12)
    sap.save(pruned, tmp_path / "a.safetensors")
    sap.save(pruned, tmp_path / "b.safetensors", heads=False)
    check_same(sap.load(tmp_path / "a.safetensors"), pruned)
    bare = sap.load(tmp_path / "b.safetensors")
    check_same(bare, pruned)
    with pytest.raises(sap.InputError, match="saved without its edges by head"):
        bare.edges_by_head()


def test_attributions_go_to_safetensors_only(tmp_path: Path) -> None:
    with pytest.raises(sap.InputError, match=r"got an Attribution; pass its to_networkx\(\)"):
        sap.save(small_attribution(), tmp_path / "a.json")
    assert list(tmp_path.iterdir()) == []


# -- damage to native files ------------------------------------------------------------------------


def parts(data: bytes) -> tuple[dict[str, Any], bytes]:
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def joined(header: Any, body: bytes) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


def changed(data: bytes, change: Any) -> bytes:
    """With what ``change`` does to the JSON in the metadata."""
    header, body = parts(data)
    inner = json.loads(header["__metadata__"]["sae_attn"])
    change(inner)
    header["__metadata__"]["sae_attn"] = json.dumps(inner)
    return joined(header, body)


def test_every_changed_byte_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    sap.save(small_graph(multi=True), path)
    data, rng = path.read_bytes(), np.random.default_rng(0)
    for at in rng.integers(len(data), size=300).tolist():
        flipped = bytearray(data)
        flipped[at] ^= 1 << int(rng.integers(8))
        path.write_bytes(flipped)
        with contextlib.suppress(sap.FileError):  # else a bit that says nothing, as of padding
            assert content(sap.load(path)) == content(small_graph(multi=True))


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.7, 0.999])
def test_a_file_cut_short(tmp_path: Path, share: float) -> None:
    path = tmp_path / "a.safetensors"
    sap.save(small_attribution(), path)
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(sap.FileError, match=r"cut short|not a safetensors file"):
        sap.load(path)


def test_damage_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    sap.save(small_attribution(), path)
    data = path.read_bytes()
    header, body = parts(data)
    start, end = header["flow.weight"]["data_offsets"]
    body = bytearray(body)
    body[(start + end) // 2] ^= 1
    cases = [
        (joined(header, bytes(body)), r"the tensor flow\.weight is damaged"),
        (changed(data, lambda h: h["document"]["tokens"].append("x")), "the document is damaged"),
        (changed(data, lambda h: h.update(version=2)), "format version 2, and this release reads"),
        (changed(data, lambda h: h.update(format="x")), 'the marker "format": "sae-attn"'),
        (changed(data, lambda h: h.update(kind="run")), "it holds a 'run'"),
        (changed(data, lambda h: h.pop("sha256")), "lack the document or its digests"),
        (joined({"__metadata__": {}}, b""), "not a file of this package"),
        (b"\x89PNG\r\n\x1a\n" * 9, "not a safetensors file"),
        ((2).to_bytes(8, "little") + b"[]", "not a file of this package"),
    ]
    for damaged, message in cases:
        path.write_bytes(damaged)
        with pytest.raises(sap.FileError, match=message) as caught:
            sap.load(path)
        assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("field", "change", "message"),
    [
        ("influence", lambda a: a[:-1], "flow.root_weight has the wrong length"),
        ("in_sum", lambda a: a[:-1], "flow.in_sum has the wrong length"),
        ("depth", lambda a: a[::-1].copy(), "not in the order of their targets' depth"),
        ("target", lambda a: a + 10**6, "flow.target points outside the nodes"),
    ],
)
def test_a_flow_that_cannot_be_is_refused(
    tmp_path: Path, field: str, change: Any, message: str
) -> None:
    """As another program might write it, with the right digests."""
    attribution = small_attribution()
    flow = dataclasses.replace(
        attribution.flow, **{field: change(getattr(attribution.flow, field))}
    )
    path = tmp_path / "a.safetensors"
    sap.save(dataclasses.replace(attribution, flow=flow), path, heads=False)
    with pytest.raises(sap.FileError, match=message):
        sap.load(path)


def test_plain_safetensors_of_others(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"weight": torch.ones(3)}, tmp_path / "a.safetensors")
    with pytest.raises(sap.FileError, match="not a file of this package"):
        sap.load(tmp_path / "a.safetensors")


# -- GEXF ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("multi", [False, True])
def test_networkx_reads_gexf(tmp_path: Path, multi: bool) -> None:
    graph = small_graph(multi)
    sap.save(graph, tmp_path / "a.gexf")
    read: Any = nx.read_gexf(tmp_path / "a.gexf")
    assert type(read) is type(graph)
    assert list(read) == list(graph)
    for name in ("kind", "position", "layer", "influence"):
        assert dict(read.nodes(data=name)) == dict(graph.nodes(data=name))
    assert list(read.edges(data="weight")) == list(graph.edges(data="weight"))
    if multi:
        keys = [attributes["sae_attn_key"] for *_, attributes in read.edges(data=True)]
        assert keys == [key for *_, key in graph.edges(keys=True)]


def good_gexf(tmp_path: Path) -> str:
    sap.save(small_graph(multi=True), tmp_path / "good.gexf")
    return (tmp_path / "good.gexf").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("</gexf>", "", "not valid XML, or cut short: line"),
        ("<gexf ", "<!DOCTYPE a><gexf ", "document type declaration"),
        ("gexf.net/1.2draft", "example.org", "not GEXF 1.2: it has no graph"),
        ("sae-attn-graph", "other", "not a graph of this package: its description lacks"),
        ("json:{", "json:", "the description is .* not valid JSON"),
        ('defaultedgetype="directed"', 'defaultedgetype="undirected"', "the graph is not directed"),
        ('for="node0"', 'for="node9"', r"nodes\[0\] has the attribute 'node9', .* not declared"),
        ('weight="0.30000000000000004"', 'weight="much"', r"edges\[0\]\['weight'\] is 'much'"),
        ('weight="0.30000000000000004"', 'weight="1e999"', "is inf; numbers must be finite"),
        ('source="embed@0"', 'source="embed@9"', "'embed@9' is not among the nodes"),
        ('<node id="embed@0"', "<node ", r"nodes\[1\] has no id"),
        ('type="long"', 'type="date"', "lacks an id, a title or a known type"),
    ],
)
def test_damaged_gexf_is_refused(tmp_path: Path, old: str, new: str, message: str) -> None:
    check_refused(tmp_path / "a.gexf", good_gexf(tmp_path), old, new, message)


def test_gexf_of_others(tmp_path: Path) -> None:
    nx.write_gexf(nx.DiGraph([("a", "b")]), tmp_path / "a.gexf")
    with pytest.raises(sap.FileError, match="not a graph of this package"):
        sap.load(tmp_path / "a.gexf")
