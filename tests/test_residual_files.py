"""Graphs with every kind of node in every format and picture."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import networkx as nx
import pytest
from helpers import random_sae, random_transcoder, sae_at, tiny_gpt2, word_tokenizer
from test_neuronpedia import check_valid

import sae_attn_plugin as sap
from sae_attn_plugin.graphs.neuronpedia import to_neuronpedia

TOKENS = [3, 57, 7, 19, 7, 13, 2]


@functools.cache
def run() -> Any:
    lens = sap.FeatureLens(
        tiny_gpt2(),
        [random_sae(0, 30), sae_at(2, "hook_attn_out", 30)],
        transcoders=[
            random_transcoder(0, 30, architecture="skip_transcoder"),
            sae_at(1, "hook_mlp_out", 30),
        ],
        residual_saes=[sae_at(2, "hook_resid_pre", 30), sae_at(2, "hook_resid_mid", 30)],
        tokenizer=word_tokenizer(),
    )
    return lens.run(TOKENS)


@functools.cache
def attribution() -> Any:
    found = run().attribute(
        [sap.LogitDiff(5, 6), sap.Feature(2, 3, 5)],
        mlp="linearise",
        heads="linearise",
        expand={"residual": [2, 5, 6]},
        residual="recurse",
        node_budget=None,
    )
    known = {
        f"{kind}{part}" for kind in ("tc", "mlp_sae", "resid") for part in ("", "_err", "_bias")
    }
    known |= {"resid_mid", "resid_mid_err", "resid_mid_bias", "tc_skip", "head", "mlp", "attn"}
    present = set(found.nodes["kind"])
    assert present >= known, known - present
    return found


@pytest.mark.parametrize("ending", ["json", "graphml", "gexf", "safetensors"])
def test_every_kind_survives(ending: str, tmp_path: Path) -> None:
    graph = attribution().to_networkx()
    path = tmp_path / f"graph.{ending}"
    sap.save(graph, path)
    again = sap.load(path)
    assert nx.utils.graphs_equal(graph, again)
    assert again.graph["expand"] == {"residual": [2, 5, 6]}


def test_the_attribution_survives(tmp_path: Path) -> None:
    path = tmp_path / "attribution.safetensors"
    sap.save(attribution(), path)
    again = sap.load(path)
    assert again.ledger.equals(attribution().ledger)
    assert again.edges.astype(str).equals(attribution().edges.astype(str))


def test_neuronpedia_fits_the_schema() -> None:
    check_valid(to_neuronpedia(attribution().prune(0.95, 0.98).to_networkx()))


def test_neuronpedia_html_and_picture(tmp_path: Path) -> None:
    graph = attribution().prune(0.95, 0.98).to_networkx()
    document = to_neuronpedia(graph)
    ids = [node["node_id"] for node in document["nodes"]]
    assert len(set(ids)) == len(graph)
    assert {node["sae_attn_kind"] for node in document["nodes"]} >= {"resid", "resid_mid", "tc"}
    page = tmp_path / "graph.html"
    sap.save(graph, page)
    text = page.read_text()
    for kind in ("resid", "resid_err", "resid_mid", "tc", "mlp_sae", "head"):
        assert f"{kind}: [" in text, kind  # has a glyph and a name
    assert json.dumps(next(name for name in graph if name.startswith("resid_mid:"))) in text
    figure = sap.draw(graph, tmp_path / "graph.png")
    assert (tmp_path / "graph.png").stat().st_size > 10_000
    shown = {text.get_text() for legend in figure.axes for text in legend.texts}
    rows = {text for text in shown if "stream" in text}
    assert {"2 · stream", "2 · stream at MLP"} <= rows


def test_circuits_of_heads_refuse_the_stream(tmp_path: Path) -> None:
    residual = [sae_at(2, "hook_resid_post", 30)]
    lens = sap.FeatureLens(tiny_gpt2(), [random_sae(0, 30)], residual_saes=residual)
    run = lens.run(TOKENS)
    graph = run.graph(sap.LogitDiff(5, 6), expand="residual", nodes=1, edges=1)
    with pytest.raises(sap.UnsupportedError, match="without expand='residual'"):
        sap.save(graph, tmp_path / "circuit.json", format="mib", run=run)
    assert not (tmp_path / "circuit.json").exists()
