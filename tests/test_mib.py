"""Circuits of heads: scores against DFA, models seen without SAEs, and the format's own rules."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers import random_saes, tiny_gpt2, tiny_llama
from test_files import small_graph

import sae_attn_plugin as sap
from sae_attn_plugin.graphs.mib import to_mib

PROMPT = [3, 1, 4, 1, 5, 9]
TARGET = sap.LogitDiff(7, 2)


def scores(document: Any) -> dict[str, float]:
    return {name: edge["score"] for name, edge in document["edges"].items()}


@pytest.fixture(scope="module", params=[tiny_gpt2, tiny_llama], ids=["gpt2", "llama"])
def lenses(request: Any) -> Any:
    """The same model with an SAE in every layer, and with one in the last only."""
    import torch

    model = request.param(torch.float64)
    saes = random_saes(model)
    return [sap.FeatureLens(model, chosen).run([PROMPT]) for chosen in (saes, saes[-1:])]


def test_heads_of_features_are_the_heads_of_the_model(lenses: Any) -> None:
    """Summed over features, error and bias, a head writes what it writes without an SAE."""
    split, plain = (
        to_mib(run.attribute(TARGET, node_budget=0).to_networkx(), run) for run in lenses
    )
    direct = {name: s for name, s in scores(plain).items() if name.endswith("->logits")}
    last = {name for name in direct if name.startswith("a2.")}
    for name in direct.keys() - last:
        assert scores(split)[name] == pytest.approx(direct[name], abs=1e-6), name
    assert any(abs(direct[name]) > 1e-3 for name in direct if name.startswith("a"))

    split, plain = (to_mib(run.attribute(TARGET).to_networkx(), run) for run in lenses)
    into = [name for name in scores(plain) if "->a2." in name and name.startswith(("a", "m", "in"))]
    assert len(into) > 100
    for name in into:
        assert scores(split)[name] == pytest.approx(scores(plain)[name], abs=1e-6), name


def test_what_heads_read_is_their_dfa(lenses: Any) -> None:
    """Into the last layer: sum over features of DFA by head, less the value bias, times slope."""
    run = lenses[0]
    attribution = run.attribute(TARGET)
    graph = attribution.to_networkx()
    document = to_mib(graph, run)
    target = graph.graph["targets"][0]
    layer = run.frozen.layers[2]
    for head in range(run.lens.backend.geometry.n_heads):
        expected = 0.0
        for source, _, weight in graph.in_edges(target, data="weight"):
            node = sap.Node.parse(source)
            if node.kind != "attn" or node.layer != 2:
                continue
            assert node.feature is not None
            dfa = run.dfa(2, node.feature, node.position)
            encoder = layer.dictionary.encoder(_index(node.feature), layer.z.dtype)[0, head]
            group = head * layer.v.shape[1] // run.lens.backend.geometry.n_heads
            bias = layer.weights.b_V[group]
            norm = layer.weights.norm
            if norm.bias is not None:
                bias = bias + norm.bias @ layer.weights.W_V[group]
            carried = layer.pattern[head, node.position].sum() * (encoder @ bias)
            slope = weight / graph.nodes[source]["activation"]
            expected += float(dfa.by_head[head] - carried) * slope
        end = f"a2.h{head}<v>"
        found = sum(s for name, s in scores(document).items() if name.endswith(end))
        found += document["sae_attn"]["unassigned"].get(end, 0.0)
        assert found == pytest.approx(expected, abs=1e-6)


def _index(number: int) -> Any:
    import torch

    return torch.tensor([number])


@pytest.mark.parametrize("prune", [False, True])
def test_the_ledger_closes_over_heads(lenses: Any, prune: bool) -> None:
    for run in lenses:
        attribution = run.attribute(TARGET, node_budget=20)
        if prune:
            attribution = attribution.prune(0.7, 0.9)
        graph = attribution.to_networkx()
        document = to_mib(graph, run)
        extra = document["sae_attn"]
        direct = sum(s for name, s in scores(document).items() if name.endswith("->logits"))
        total = direct + extra["unassigned"].get("logits", 0.0) + extra["constant"]
        assert total + extra["pruned"] == pytest.approx(extra["value"], abs=1e-6)
        by_head = to_mib(attribution.to_networkx(by="head"), run)
        assert scores(by_head) == pytest.approx(scores(document), abs=1e-6)
        # What is in the circuit is what the graph has.
        assert not any(e["in_graph"] for n, e in document["edges"].items() if "<q>" in n)
        inside = {n for n, e in document["edges"].items() if e["in_graph"]}
        touched = {end for n in inside for end in n.split("<")[0].split("->")}
        assert {n for n, v in document["nodes"].items() if v["in_graph"]} == touched


def test_nodes_and_edges_are_those_of_the_format(lenses: Any) -> None:
    run = lenses[0]
    document = to_mib(run.attribute(TARGET).prune().to_networkx(), run)
    layers, heads = document["cfg"]["n_layers"], document["cfg"]["n_heads"]
    assert list(document["cfg"]) == ["n_layers", "n_heads", "parallel_attn_mlp", "d_model"]
    assert len(document["nodes"]) == 2 + layers * (heads + 1)
    # n_forward by n_backward positions, those that the order of execution allows
    count, before = 0, 1
    for _ in range(layers):
        count += 3 * heads * before + before + heads
        before += heads + 1
    assert len(document["edges"]) == count + before
    assert {"input->a0.h0<q>", "a0.h0->m0", "m0->a1.h2<v>", "m2->logits"} <= set(document["edges"])
    assert "a0.h0->a0.h1<v>" not in document["edges"]


def test_files_and_refusals(lenses: Any, tmp_path: Path) -> None:
    run = lenses[0]
    graph = run.attribute(TARGET).prune().to_networkx()
    sap.save(graph, tmp_path / "a.json", format="mib", run=run)
    assert json.loads((tmp_path / "a.json").read_text()) == to_mib(graph, run)
    with pytest.raises(sap.FileError, match="not a graph of this package"):
        sap.load(tmp_path / "a.json")
    (tmp_path / "a.json").unlink()
    with pytest.raises(sap.InputError, match="needs the run"):
        sap.save(graph, tmp_path / "a.json", format="mib")
    with pytest.raises(sap.InputError, match="expected the run that the graph was made from"):
        sap.save(graph, tmp_path / "a.json", format="mib", run=run.lens.run([[3, 1, 4]]))
    with pytest.raises(sap.InputError, match="expected the run that the graph was made from"):
        to_mib(small_graph(), run)
    source, target, _ = next(iter(graph.edges(data=True)))
    graph.edges[source, target]["weight"] *= 3
    with pytest.raises(sap.InputError, match=r"in the graph and .* in the run"):
        to_mib(graph, run)
    graph = run.attribute(sap.Direction(run.frozen.W_U[:, 3])).to_networkx()
    with pytest.raises(sap.UnsupportedError, match="cannot end a circuit of heads"):
        to_mib(graph, run)
    assert list(tmp_path.iterdir()) == []


def test_transcoder_features_are_their_mlp() -> None:
    """What they read sums to their pre-activations, what they write to the MLP's own output."""
    run = sap.demo.load(transcoders=True).run(sap.demo.ioi_prompt())
    target = sap.LogitDiff(" Mary", " John")
    attribution = run.attribute(target, node_budget=60)
    graph = attribution.to_networkx()
    document = to_mib(graph, run)
    extra, name = document["sae_attn"], graph.graph["targets"][0]
    into = sum(s for edge, s in scores(document).items() if edge.endswith("->m3"))
    expected = 0.0
    for source, _, weight in graph.in_edges(name, data="weight"):
        row = graph.nodes[source]
        if row["kind"] == "tc" and row["layer"] == 3 and "constant" in row:
            expected += weight / row["activation"] * (row["pre_activation"] - row["constant"])
    assert abs(expected) > 1e-3
    found = into + extra["unassigned"].get("m3", 0.0)
    assert found == pytest.approx(expected, rel=1e-3, abs=1e-4)
    plain = sap.demo.load().run(sap.demo.ioi_prompt())
    direct = to_mib(plain.attribute(target, node_budget=0).to_networkx(), plain)
    for layer in range(4):
        edge = f"m{layer}->logits"
        assert scores(document)[edge] == pytest.approx(scores(direct)[edge], abs=1e-4)
