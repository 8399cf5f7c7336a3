"""Neuronpedia graph JSON: valid, free of collisions, and as the public pages read it."""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path
from typing import Any

import networkx as nx
import pytest
from helpers import random_saes, tiny_gpt2, word_tokenizer

import sae_attn_plugin as sap
from sae_attn_plugin.graphs.neuronpedia import cantor_pair, to_neuronpedia

SCHEMA = Path(__file__).parents[1].parent / "shared/data/neuronpedia/graph-schema.json"
PROMPT = "w3 w4 w5 w3 w4 w9"
# An error without number is told apart by its position, as the public pages do.
ERRORS = ("lorsa error", "mlp reconstruction error")


@functools.cache
def attribution() -> Any:
    model = tiny_gpt2()
    saes = random_saes(model)[:2]  # none in the last layer: it shows as heads
    lens = sap.FeatureLens(model, saes, tokenizer=word_tokenizer())
    targets = [sap.Logit("w7"), sap.Logit(5), sap.LogitDiff("w5", "w6"), sap.Feature(1, 3, -1)]
    return lens.run(PROMPT).attribute(targets)


def real_graph(by: Any = None) -> Any:
    return attribution().to_networkx(by=by)


def hostile_graph() -> Any:
    """One node of every kind, ids that run into one another where untyped, awkward tokens."""
    tokens = ["(p=0.5)", '"', "\ud83d", "<b>", "\u202e", "plain"]
    graph: Any = nx.DiGraph(
        tokens=tokens, token_ids=[0, 3, 5, 0, 3, 5], model="some/where/gpt2-small",
        targets=['logit:"(p=0.5)"@5'],
    )  # fmt: skip
    for name in (
        "attn:0:3@5", "attn_err:0@5", "attn_err:5@3", "attn:0:5@3", "attn_bias:0@5", "mlp:0@5",
        "head:0.3@5", "embed@5", "embed@3", "pos@5", "pos@3", 'logit:"(p=0.5)"@5', "logit:#3@5",
        'logit:"3"@5', 'logit_diff:"\\""-#4@5', 'direction:"a b"@5', "const:attn:0:3@5",
        "attn:3:0@5", 'const:logit:"3"@5',
    ):  # fmt: skip
        graph.add_node(name)
    graph.add_edge("attn:0:3@5", 'logit:"(p=0.5)"@5', weight=-0.5)
    return graph


def check_valid(document: Any) -> None:
    import jsonschema

    if not SCHEMA.exists():
        pytest.skip(f"the schema is not beside the checkout: {SCHEMA}")
    schema = json.loads(SCHEMA.read_text(encoding="utf-8"))
    jsonschema.Draft7Validator(schema).validate(json.loads(json.dumps(document)))


@pytest.mark.parametrize("by", [None, "head"])
@pytest.mark.parametrize("options", [{}, {"no_feature": -1, "create_time_ms": 1, "slug": "s"}])
def test_real_graphs_are_valid(by: Any, options: Any) -> None:
    check_valid(to_neuronpedia(real_graph(by), **options))


def test_the_schema_is_a_test() -> None:
    import jsonschema

    document = to_neuronpedia(hostile_graph())
    check_valid(document)
    del document["nodes"][0]["clerp"]
    with pytest.raises(jsonschema.ValidationError):
        check_valid(document)


@pytest.mark.parametrize("graph", [real_graph, hostile_graph])
def test_ids_do_not_collide_and_links_join_nodes(graph: Any) -> None:
    graph = graph()
    document = to_neuronpedia(graph)
    nodes = document["nodes"]
    for key in ("node_id", "jsNodeId", "sae_attn_id"):
        assert len({node[key] for node in nodes}) == len(graph)
    known = {node["node_id"]: node["sae_attn_id"] for node in nodes}
    links = {
        (known[link["source"]], known[link["target"]]): link["weight"] for link in document["links"]
    }
    assert links == {(source, target): w for source, target, w in graph.edges(data="weight")}


def test_nodes_say_what_they_are() -> None:
    graph = real_graph()
    rows = {node["sae_attn_id"]: node for node in to_neuronpedia(graph)["nodes"]}
    for name, row in rows.items():
        node = sap.Node.parse(name)
        assert row["sae_attn_kind"] == node.kind
        assert row["ctx_idx"] == node.position
        assert ("error" in row["feature_type"]) == (node.kind in ("attn_err", "mlp", "head"))
        assert isinstance(row["layer"], str)
        if node.layer is not None:
            assert row["layer"] == str(node.layer)
    assert {rows[name]["layer"] for name in graph if name.startswith("logit")} == {"3"}
    assert rows["embed@2"]["layer"] == "E"
    feature = rows["attn:1:3@5"]
    assert feature["feature_type"] == "lorsa"
    assert feature["feature"] == cantor_pair(1, 3) == 13
    assert feature["sae_attn_feature"] == 3
    assert feature["node_id"] == "1_lor_3_5"
    assert feature["activation"] == graph.nodes["attn:1:3@5"]["activation"]
    assert rows["attn_err:1@5"]["node_id"] == "1_error_attn_5"
    assert rows["attn_err:1@5"]["feature"] is None
    assert rows["embed@2"]["node_id"] == "E_5_2"
    assert rows['logit:"w5"@5']["is_target_logit"]


def test_cantor_pairs_are_unique() -> None:
    pairs = {cantor_pair(layer, feature) for layer in range(50) for feature in range(50)}
    assert len(pairs) == 2500
    assert cantor_pair(5, 7515) == 7520 * 7521 // 2 + 7515


def test_pages_that_drop_what_repeats_drop_no_bias_and_no_logit() -> None:
    """A public page drops a (layer, feature) that stands at over two thirds of the positions."""
    graph = real_graph()
    seen: dict[Any, int] = {}
    for node in to_neuronpedia(graph)["nodes"]:
        if "error" not in node["feature_type"] and node["sae_attn_kind"] != "attn":
            key = node["layer"], node["feature"]
            seen[key] = seen.get(key, 0) + 1
    assert set(seen.values()) == {1}


def test_no_feature() -> None:
    for node in to_neuronpedia(hostile_graph(), no_feature=-1)["nodes"]:
        assert isinstance(node["feature"], int)
        assert (node["feature"] == -1) == (node["feature_type"] in ERRORS)


def test_logits_carry_a_probability_or_say_that_there_is_none() -> None:
    graph = hostile_graph()
    graph.nodes['logit:"(p=0.5)"@5']["probability"] = 0.25
    rows = {node["sae_attn_id"]: node for node in to_neuronpedia(graph)["nodes"]}
    shown = {name: row["clerp"] for name, row in rows.items() if row["feature_type"] == "logit"}
    assert shown == {
        'logit:"(p=0.5)"@5': 'Output "(p =0.5)" (p=0.250)',
        "logit:#3@5": "Output #3 (p=n/a)",
        'logit:"3"@5': 'Output "3" (p=n/a)',
        'logit_diff:"\\""-#4@5': 'Output """ - #4 (p=n/a)',
        'direction:"a b"@5': 'Direction "a b" (p=n/a)',
    }
    parts = {name: text.split("(p=")[1].split(")")[0] for name, text in shown.items()}
    assert set(parts.values()) == {"0.250", "n/a"}
    assert rows['logit:"(p=0.5)"@5']["token_prob"] == 0.25
    assert "token_prob" not in rows["logit:#3@5"]
    assert rows["logit:#3@5"]["feature"] == 3


def test_influence_is_cumulative_and_small_means_important() -> None:
    graph = real_graph()
    targets = set(graph.graph["targets"])
    rows = {node["sae_attn_id"]: node for node in to_neuronpedia(graph)["nodes"]}
    assert all(rows[name]["influence"] is None for name in targets)
    order = sorted(set(graph) - targets, key=lambda name: rows[name]["influence"])
    raw = [graph.nodes[name]["influence"] for name in order]
    assert raw == sorted(raw, reverse=True)
    assert rows[order[0]]["influence"] == pytest.approx(raw[0] / sum(raw))
    assert rows[order[-1]]["influence"] == pytest.approx(1)
    assert all(rows[name]["sae_attn_influence"] == graph.nodes[name]["influence"] for name in order)


def test_heads_are_summed_and_kept() -> None:
    whole = to_neuronpedia(real_graph())
    by_head = to_neuronpedia(real_graph("head"))
    ends = [{(link["source"], link["target"]) for link in d["links"]} for d in (whole, by_head)]
    assert ends[0] == ends[1]
    assert len(by_head["links"]) == len(ends[1])
    expected = {(link["source"], link["target"]): link["weight"] for link in whole["links"]}
    split = 0
    for link in by_head["links"]:
        weight = expected[link["source"], link["target"]]
        assert link["weight"] == pytest.approx(weight, rel=1e-3, abs=1e-6)
        if "by_head" in link:
            split += 1
            assert math.fsum(link["by_head"].values()) == link["weight"]
            assert all(key.startswith("0.") or key.startswith("1.") for key in link["by_head"])
    assert split > 0
    assert not any("by_head" in link for link in whole["links"])


def with_addresses(*addresses: str) -> Any:
    graph = hostile_graph()
    names = [name for name in graph if name.startswith("attn:")]
    for name, address in zip(names, addresses, strict=False):
        graph.nodes[name]["neuronpedia"] = f"https://www.neuronpedia.org/{address}"
    return graph


def test_neuronpedia_names_come_from_the_features() -> None:
    metadata = to_neuronpedia(with_addresses("gpt2/0-att-kk/3", "gpt2/0-att-kk/5"))["metadata"]
    assert metadata["scan"] == "gpt2"
    assert metadata["feature_details"] == {"neuronpedia_lorsa_source_set": "att-kk"}
    assert metadata["info"]["source_urls"] == ["https://www.neuronpedia.org/gpt2/0-att-kk"]
    metadata = to_neuronpedia(hostile_graph())["metadata"]
    assert metadata["scan"] == "gpt2-small"
    assert "feature_details" not in metadata
    metadata = to_neuronpedia(hostile_graph(), scan="a", source_set="b", slug="c")["metadata"]
    assert (metadata["scan"], metadata["slug"]) == ("a", "c")
    assert metadata["feature_details"] == {"neuronpedia_lorsa_source_set": "b"}


def test_several_sources_have_to_be_settled() -> None:
    graph = with_addresses("gpt2/0-att-kk/3", "gpt2/0-att-jb/5")
    with pytest.raises(sap.InputError, match=r"\(att-jb, att-kk\).*pass source_set="):
        to_neuronpedia(graph)
    assert to_neuronpedia(graph, source_set="att-kk")["metadata"]["scan"] == "gpt2"


def test_metadata_tells_how_the_graph_was_made() -> None:
    graph = real_graph()
    graph.graph["pruning"] = {"nodes": 0.8, "edges": 0.98, "max_nodes": None}
    metadata = to_neuronpedia(graph)["metadata"]
    assert metadata["prompt"] == PROMPT
    assert metadata["prompt_tokens"] == graph.graph["tokens"]
    assert metadata["pruning_settings"] == {"node_threshold": 0.8, "edge_threshold": 0.98}
    assert metadata["generation_settings"]["max_feature_nodes"] == graph.graph["node_budget"]
    made = metadata["generation_settings"]["sae_attn"]
    for key in ("model", "backend", "dtype", "saes", "versions", "worst_ledger_residual"):
        assert made[key] == graph.graph[key]
    assert metadata["info"]["generator"]["version"] == sap.__version__
    assert "create_time_ms" not in metadata["info"]
    timed = to_neuronpedia(graph, create_time_ms=17)["metadata"]
    assert timed["info"]["create_time_ms"] == 17
    check_valid(to_neuronpedia(graph, create_time_ms=17))


def test_files_are_the_document_and_the_same_each_time(tmp_path: Path) -> None:
    for graph in (real_graph(), real_graph("head"), hostile_graph()):
        sap.save(graph, tmp_path / "a.json", format="neuronpedia", scan="x")
        sap.save(graph.copy(), tmp_path / "b.json", format="neuronpedia", scan="x")
        assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
        document = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))
        assert document == to_neuronpedia(graph, scan="x")
    with pytest.raises(sap.FileError, match=r"a\.json: it is a graph for Neuronpedia.*not read"):
        sap.load(tmp_path / "a.json")


def test_the_slug_tells_graphs_apart() -> None:
    slugs = set()
    for weight in (0.5, 0.25):
        graph = hostile_graph()
        graph.edges["attn:0:3@5", 'logit:"(p=0.5)"@5']["weight"] = weight
        slugs.add(to_neuronpedia(graph)["metadata"]["slug"])
    assert len(slugs) == 2
    assert all(slug.startswith("p-0-5-b-plain-") for slug in slugs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda g: g.graph.pop("tokens"), "the graph has no prompt"),
        (lambda g: g.graph.update(tokens=["a"]), "is outside the prompt of 1 tokens"),
        (lambda g: g.graph.pop("model"), "pass scan="),
        (lambda g: g.add_node("embed@1", x=float("nan")), "Neuronpedia JSON: .* is nan"),
        (lambda g: g.add_node("embed@1", activation="much"), "'embed@1' has activation 'much'"),
        (lambda g: g.add_node("nonsense"), "not a node id: 'nonsense'"),
    ],
)
def test_what_cannot_be_exported_is_refused_before_writing(
    tmp_path: Path, change: Any, message: str
) -> None:
    graph = hostile_graph()
    change(graph)
    with pytest.raises(sap.InputError, match=message):
        sap.save(graph, tmp_path / "a.json", format="neuronpedia")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("path", "options", "message"),
    [
        ("a.json", {"format": "pickle"}, r"unknown graph format 'pickle'; known: json, "),
        ("a.txt", {"format": "neuronpedia"}, r"ends in \.json, got '.*a\.txt'"),
        ("a.json", {"slug": "s"}, "'json' has no option 'slug'; its options: none"),
        ("a.json", {"format": "neuronpedia", "slugs": "s"}, "no option 'slugs'; its options: slug"),
    ],
)
def test_wrong_formats_and_options(tmp_path: Path, path: str, options: Any, message: str) -> None:
    with pytest.raises(sap.InputError, match=message):
        sap.save(hostile_graph(), tmp_path / path, **options)
    assert list(tmp_path.iterdir()) == []
