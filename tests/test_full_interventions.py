"""Edges of every kind against removals on the model, and edits of every kind of feature."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from architecture_models import RECIPES
from helpers import HOSTS, on_host, word_tokenizer
from test_full_attribution import MODELS, PAIR, TOKENS, attention, mlps

import sae_attn_plugin as sap

EVERYTHING = ("patterns", "norms", "mlp", "attention")


@functools.cache
def lens_of(name: str, host: str, attn: str, mlp: str) -> sap.FeatureLens:
    model: Any = RECIPES[name].build(torch.float32)
    saes = attention(attn, model, "float32")
    transcoders = mlps(name, mlp, model, "float32")
    return sap.FeatureLens(
        on_host(model, host), saes, transcoders=transcoders, tokenizer=word_tokenizer()
    )


@pytest.mark.parametrize(
    ("name", "host"),
    [
        *(("gpt2", HOSTS[0]), ("gpt2", HOSTS[2]), ("gpt_neox", HOSTS[2]), ("llama", HOSTS[0])),
        *(("llama", HOSTS[1]), ("gemma2", HOSTS[0]), ("gemma2", HOSTS[2])),
    ],
)
def test_frozen_effects_are_the_edges(name: str, host: str) -> None:
    """On every host the same graph, and removals that do what its edges say."""
    lens = lens_of(name, host, "mixed", "mixed")
    att = lens.run(TOKENS).attribute(
        sap.LogitDiff(*PAIR), node_budget=60, mlp="linearise", heads="linearise"
    )
    assert att.worst_residual < 1e-5
    graph = att.prune(0.6, 0.9).to_networkx()
    targets = {sap.Node.parse(target).kind for _, target in graph.edges}
    assert targets >= {"attn", "mlp"} or len(graph) < 10
    report = sap.validate(graph, lens, max_sources=10)
    assert report.frozen.max_error <= 2e-5
    assert report.frozen.r2 == pytest.approx(1, abs=1e-6)
    assert report.free.max_error > 1e-3


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("attn", "mlp"), [("attn_out", "skip"), ("z", "tc"), ("none", "sae")])
def test_hosts_agree(name: str, attn: str, mlp: str) -> None:
    rows = []
    for host in HOSTS:
        att = (
            lens_of(name, host, attn, mlp)
            .run(TOKENS)
            .attribute(sap.LogitDiff(*PAIR), node_budget=20, mlp="linearise", heads="linearise")
        )
        assert att.worst_residual < 1e-5
        frame = att.edges.astype({"source": str, "target": str})
        rows.append(frame.set_index(["target", "source"])["weight"].sort_index())
    first = rows[0]
    size = first.abs().groupby("target").transform("sum")
    for other in rows[1:]:
        assert set(other.index) == set(first.index)
        assert ((other.reindex(first.index) - first).abs() / size).max() < 1e-5


@pytest.mark.parametrize(
    ("name", "host"),
    [("gpt2", HOSTS[0]), ("gpt_neox", HOSTS[2]), ("llama", HOSTS[1]), ("gemma2", HOSTS[0])],
)
@pytest.mark.parametrize(
    ("attn", "mlp", "kind"),
    [
        ("attn_out", "none", "attn"),
        ("attn_out_layer_norm", "none", "attn"),
        ("z", "tc", "tc"),
        ("z", "skip", "tc"),
        ("none", "sae", "mlp_sae"),
    ],
)
def test_setting_a_feature_is_adding_its_decoder(
    name: str, host: str, attn: str, mlp: str, kind: Any
) -> None:
    lens = lens_of(name, host, attn, mlp)
    run = lens.run(TOKENS)
    assert torch.equal(lens.intervene(run, []).logits, run.logits)
    for layer in (0, 1, 2):
        feature = run.features(layer, 4, kind=kind).nlargest(1, "activation").iloc[0]
        edit = sap.AblateFeature(layer, int(feature["feature"]), 4, kind=kind)
        node = sap.Node(kind, 4, layer=layer, feature=int(feature["feature"]))
        vector = run.writers.full(torch.tensor([run.writers.rows()[node]]).numpy())[0]
        site: Any = "attn_out" if kind == "attn" else "mlp_out"
        for freeze in (EVERYTHING, ("norms",), ("patterns", "norms")):
            got = lens.intervene(run, [edit], freeze).logits
            wanted = lens.intervene(run, [sap.AddToStream(-vector, 4, site, layer)], freeze).logits
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=2e-4)
            assert (got - run.logits).abs().max() > 1e-4
        target = sap.Feature(layer, int(feature["feature"]), 4, kind)
        result = lens.intervene(run, [])
        assert float(result.value(target)) == pytest.approx(
            float(feature["pre_activation"]), rel=1e-3, abs=1e-4
        )


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "llama", "gemma2"])
@pytest.mark.parametrize(("attn", "mlp"), [("mixed", "skip"), ("attn_out", "tc"), ("z", "sae")])
def test_a_complement_is_the_circuit_ablated(name: str, attn: str, mlp: str) -> None:
    """Keeping all but a circuit, of every kind of dictionary, against edits of its nodes."""
    lens = lens_of(name, HOSTS[2], attn, mlp)
    data = sap.tasks.InductionDataset.random_repeats(
        3, list(range(5, 50)), 0, segment=4, prepend_bos=False
    )
    tokens = data.tokens[0].tolist()
    graph = lens.run([tokens]).graph(sap.Logit(tokens[-1], -2), max_nodes=40)
    for errors in (True, False):
        found = sap.faithfulness(
            graph, lens, data, ablate="zero", errors=errors, minimality=0, shares=(1,)
        )
        edits: list[sap.Edit] = []
        for node in found.nodes:
            kind, layer, *feature = node.split(":")
            what: Any = kind.removesuffix("_err")
            if feature:
                edits.append(sap.AblateFeature(int(layer), int(feature[0]), kind=what))
            else:
                edits.append(sap.AblateError(int(layer), kind=what))
        edited = lens.intervene_dataset(data, edits).edited
        assert found.complement == pytest.approx(float(edited.mean()), abs=1e-4)
        assert abs(found.complement - found.model) > 1e-3
        assert {"tc", "mlp_sae"} & {node.partition(":")[0] for node in found.nodes}
