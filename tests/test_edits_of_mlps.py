"""Edits of transcoders, of SAEs on what blocks write, and edges of every kind."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from architecture_models import RECIPES
from helpers import on_host
from test_full_attribution import attention, mlps

import sae_attn_plugin as sap
from sae_attn_plugin.backends.protocol import Site

TOKENS = [3, 57, 7, 19, 7, 13, 2]
OTHER = [5, 9, 7, 44, 31, 13, 8]
F64 = torch.float64


@functools.cache
def lens_with(name: str, what: str, of_mlps: str, host: str, dtype: torch.dtype) -> sap.FeatureLens:
    model = RECIPES[name].build(dtype)
    kind = str(dtype).removeprefix("torch.")
    return sap.FeatureLens(
        on_host(model, host),
        attention(what, model, kind),
        transcoders=mlps(name, of_mlps, model, kind),
    )


CASES = [
    ("gpt2", "attn_out", "tc", "hooked_transformer"),
    ("gpt2", "attn_out_layer_norm", "skip", "nnsight"),
    ("gpt_neox", "mixed", "tc", "nnsight"),
    ("gemma2", "attn_out", "skip", "nnsight"),
    ("gemma2", "z", "tc", "transformer_bridge"),
    ("llama", "mixed", "sae", "hooked_transformer"),
]


@pytest.mark.parametrize(("name", "what", "of_mlps", "host"), CASES)
def test_every_edge_is_exact(name: str, what: str, of_mlps: str, host: str) -> None:
    lens = lens_with(name, what, of_mlps, host, torch.float32)
    run = lens.run(TOKENS)
    graph = run.graph([sap.LogitDiff(5, 6), sap.Logit(9)], nodes=0.6, edges=0.9)
    report = sap.validate(graph, lens, max_sources=40, baseline=False)
    assert report.frozen.max_error <= 1e-5
    kinds = {sap.Node.parse(target).kind for target in report.frozen.table["target"]}
    assert {"attn", "logit_diff"} <= kinds
    assert ("tc" in kinds) is (of_mlps in ("tc", "skip"))


@pytest.mark.parametrize(("name", "what", "of_mlps", "host"), CASES)
def test_paths_are_edges_for_every_kind_of_writer(
    name: str, what: str, of_mlps: str, host: str
) -> None:
    lens = lens_with(name, what, of_mlps, host, torch.float32)
    run = lens.run(TOKENS)
    targets: dict[str, Any] = {"final": sap.Logit(9)}
    if 2 in lens.dictionaries:
        targets["value:2"] = sap.Feature(2, 5, 6)
    seen = set()
    for reader, target in targets.items():
        att = run.attribute(target, node_budget=0)
        frame = att.edges.astype({"source": str, "target": str})
        size = float(frame["weight"].abs().sum())
        kind = frame["source"].str.extract("^([a-z_]+)")[0]
        for of_kind, part in frame.groupby(kind):
            seen.add(of_kind)
            for source, weight in zip(part["source"][:3], part["weight"][:3], strict=True):
                writer, _, at = source.rpartition("@")
                edge = sap.PatchEdge(writer, reader, int(at))
                effect = lens.intervene(run, [edge], ["patterns", "norms"]).effect(target)
                assert float(effect) == pytest.approx(-float(weight), rel=0, abs=1e-5 * size), edge
    wanted = {"tc": {"tc", "tc_err", "tc_bias"}, "skip": {"tc", "tc_err", "tc_bias", "tc_skip"}}
    assert wanted.get(of_mlps, {"mlp_sae", "mlp_sae_err", "mlp_sae_bias"}) <= seen


def everything_read(lens: Any, run: Any, edge: Any, reads: list[Site]) -> dict[Site, torch.Tensor]:
    """Sites of an edited pass that a result does not keep."""
    forward, seen = lens.backend.forward, dict[Site, torch.Tensor]()

    def spy(tokens: Any, edits: Any = None, also: Any = ()) -> Any:
        found = forward(tokens, edits, [*also, *reads])
        seen.update(found)
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lens.backend, "forward", spy)
        lens.intervene(run, [edge], ["patterns", "norms"])
    return seen


@pytest.mark.parametrize(("name", "what", "of_mlps", "host"), CASES)
def test_a_feature_that_reads_an_edge(name: str, what: str, of_mlps: str, host: str) -> None:
    """A feature loses what its strongest source writes to it; what it writes moves by that much."""
    lens = lens_with(name, what, of_mlps, host, torch.float32)
    run = lens.run(TOKENS)
    for layer, dictionary in lens.all_dictionaries():
        kind = dictionary.kind
        if kind == "mlp_sae" or layer == 0:
            continue
        active = run.features(layer=layer, position=6, kind=kind)
        feature, before = int(active.iloc[0]["feature"]), active.iloc[0]
        att = run.attribute(sap.Feature(layer, feature, 6, kind), node_budget=0)
        row = att.edges.assign(size=att.edges["weight"].abs()).sort_values("size").iloc[-1]
        edge = sap.PatchEdge.between(str(row["source"]), str(row["target"]))
        reads = [Site(dictionary.writes, layer)]
        seen = everything_read(lens, run, edge, reads)
        forward = lens.backend.forward
        clean = forward(run.tokens, {}, reads)
        change = (seen[reads[0]] - clean[reads[0]])[0, 6].flatten()
        decoder = dictionary.decoder(torch.tensor([feature]), torch.float32)[0].flatten()
        moved = float((change @ decoder) / decoder.square().sum())
        assert torch.allclose(change, moved * decoder, rtol=1e-3, atol=2e-4)
        if dictionary.architecture == "topk" or dictionary.normalisation == "layer_norm":
            continue  # its activation depends on the others, or on a scale that moves with them
        if dictionary.architecture == "gated":
            continue  # whether it is on depends on more than its pre-activation
        pre = torch.full((1, dictionary.d_sae), float(before["pre_activation"] - row["weight"]))
        after = float(dictionary.activation(pre, pre)[0, feature])
        assert moved == pytest.approx(after - float(before["activation"]), rel=1e-3, abs=2e-4)


@pytest.mark.parametrize(("name", "what", "of_mlps", "host"), CASES)
def test_feature_edits_by_hand(name: str, what: str, of_mlps: str, host: str) -> None:
    """What a dictionary writes moves by the change of its feature, its error kept; with all held,
    the logit moves by that share of the edge."""
    lens = lens_with(name, what, of_mlps, host, torch.float32)
    run, other = lens.run([TOKENS, OTHER]), lens.run([OTHER, TOKENS])
    assert torch.allclose(
        lens.intervene(run, [], ["patterns", "norms", "mlp", "attention"]).logits,
        run.logits,
        atol=2e-4,
    )
    for layer, dictionary in lens.all_dictionaries():
        kind = dictionary.kind
        frame = run[0].features(layer=layer, position=5, kind=kind)
        feature, active = int(frame.iloc[0]["feature"]), float(frame.iloc[0]["activation"])
        edge = run[0].attribute(sap.Logit(9, 5), node_budget=0).edges
        row: Any = edge[edge["source"] == f"{kind}:{layer}:{feature}@5"]
        size = float(edge["weight"].abs().sum())
        weight = float(row["weight"].iloc[0])
        everything = ["patterns", "norms", "mlp", "attention"]
        which: Any = kind
        for edit, share in (
            (sap.AblateFeature(layer, feature, 5, kind=which), -1.0),
            (sap.ScaleFeature(layer, feature, 5, 3.0, kind=which), 2.0),
            (sap.Steer(layer, feature, 5, 0.5 * active, kind=which), 0.5),
        ):
            effect = lens.intervene(run[0], [edit], everything).effect(sap.Logit(9, 5))
            assert float(effect) == pytest.approx(share * weight, rel=0, abs=2e-5 * size), edit
            changed = lens.intervene(run[0], [edit]).changed_features()
            first: Any = changed[(changed["layer"] == layer) & (changed["feature"] == feature)]
            first = first[first["kind"] == kind] if "kind" in changed else first
            at = first[first["position"] == 5].iloc[0]
            assert at["edited"] == pytest.approx((1 + share) * active, rel=1e-4, abs=1e-5)
        patched = lens.intervene(
            run,
            [sap.AblateError(layer, 4, kind=which, to=sap.From("other"))],
            sources={"other": other},
        )
        assert not torch.allclose(patched.logits, run.logits, atol=1e-5)


def test_hosts_agree_on_edits_of_mlps() -> None:
    found = []
    for host in ("hooked_transformer", "nnsight"):
        lens = lens_with("gpt2", "attn_out", "tc", host, torch.float32)
        run, other = lens.run([TOKENS, OTHER]), lens.run([OTHER, TOKENS])
        edits = [
            sap.AblateFeature(0, 3, to=sap.Mean("other"), kind="tc"),
            sap.SetFeature(1, 4, (3, 5), 1.5, kind="tc"),
            sap.AblateError(2, 6, kind="tc"),
            sap.AblateFeature(1, 5, 4),
            sap.PatchEdge("tc:0:7", "attn:1:11", 3),
            sap.PatchEdge("tc_err:0", "tc:1:2", 5, to=sap.From("other")),
            sap.PatchEdge("tc_skip:2", "final", 6),
            sap.PatchEdge("attn:0:2", "tc:1:4", 6),
        ]
        found.append(lens.intervene(run, edits, sources={"other": other}).logits)
        with pytest.raises(sap.InputError, match="no SAE on hook_mlp_out in layer 0"):
            lens.intervene(run, [sap.AblateFeature(0, 3, kind="mlp_sae")])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)
