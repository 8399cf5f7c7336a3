"""Edges, constants and ledgers against autograd through an independent frozen network."""

from __future__ import annotations

import contextlib
import functools
from collections import defaultdict
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import SAE_ARCHITECTURES, TINY, TrueFloat64, random_saes, tiny_gpt2, tiny_llama
from oracle import Oracle, Row

import sae_attn_plugin as sap
from sae_attn_plugin.attribution.table import Attribution

TOKENS = [3, 57, 7, 19, 7, 13, 2]
F64 = torch.float64


@functools.cache
def true_model(name: str) -> Any:
    return TINY[name](F64)


class Case:
    """A lens and an oracle over the same model, SAEs and prompt, both truly in float64."""

    def __init__(self, name: str, saes: list[Any], model: Any = None) -> None:
        self.model = true_model(name) if model is None else model
        # GPT-2 computes in float64 by itself; Llama needs its casts removed.
        with TrueFloat64() if name == "llama" else contextlib.nullcontext():
            self.lens = sap.FeatureLens(self.model, saes)
            self.run = self.lens.run(TOKENS)
        self.oracle = Oracle(
            self.model, {int(s.cfg.metadata.hook_name.split(".")[1]): s for s in saes}, TOKENS
        )


@functools.cache
def case(
    name: str, architecture: str = "standard", layers: tuple[int, ...] = (0, 1, 2), **config: Any
) -> Case:
    saes = random_saes(true_model(name), architecture, **config)
    return Case(name, [saes[layer] for layer in layers])


def as_oracle_target(node_id: str) -> tuple[Any, ...]:
    node = sap.Node.parse(node_id)
    if node.kind == "attn":
        return ("attn", node.layer, node.feature, node.position)
    numbers = [int(part.strip("#")) for part in str(node.label).split("-")]
    return (node.kind, *numbers, node.position)


def engine_rows(att: Attribution) -> dict[str, Row]:
    edges: dict[str, dict[str, float]] = defaultdict(dict)
    frame = att.edges
    for source, target, weight in zip(
        frame["source"], frame["target"], frame["weight"].tolist(), strict=True
    ):
        assert source not in edges[target], f"edge {source} -> {target} twice"
        edges[target][source] = weight
    return {
        str(name): Row(edges[str(name)], constant, value)
        for name, constant, value in att.ledger[["constant", "value"]].itertuples()
    }


def worst_difference(got: Row, expected: Row) -> float:
    """The largest difference over the row's sum of |edges|, missing edges included."""
    scale = sum(map(abs, expected.edges.values())) + abs(expected.constant)
    edges = max(
        (
            abs(got.edges.get(name, 0.0) - expected.edges.get(name, 0.0))
            for name in got.edges.keys() | expected.edges.keys()
        ),
        default=0.0,
    )
    return max(edges, abs(got.constant - expected.constant), abs(got.value - expected.value)) / max(
        scale, 1e-30
    )


def assert_matches_autograd(case: Case, att: Attribution, tolerance: float = 1e-10) -> None:
    rows = engine_rows(att)
    expected = case.oracle.attribute({name: as_oracle_target(name) for name in rows})
    for name, row in rows.items():
        assert worst_difference(row, expected[name]) < tolerance, name
        assert sum(expected[name].edges.values()) + expected[name].constant == pytest.approx(
            expected[name].value, rel=1e-9, abs=1e-12
        )


# -- the oracle itself -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", TINY)
def test_the_oracle_is_the_model(name: str) -> None:
    one = case(name)
    with torch.no_grad(), TrueFloat64() if name == "llama" else contextlib.nullcontext():
        logits = one.model(torch.tensor([TOKENS])).logits[0]
    torch.testing.assert_close(one.oracle.logits, logits, rtol=1e-10, atol=1e-10)
    leaves = one.oracle._leaves()
    for layer, stream in zip(one.oracle.layers, one.oracle._streams(leaves), strict=False):
        torch.testing.assert_close(stream, layer.resid_pre, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("architecture", SAE_ARCHITECTURES)
def test_the_oracle_encodes_as_sae_lens(architecture: str) -> None:
    oracle = case("gpt2", architecture).oracle
    for layer in oracle.saes:
        acts, pre = oracle.acts(layer), oracle.pre_activations(layer)
        assert (acts > 0).any()
        torch.testing.assert_close(acts[acts > 0], pre[acts > 0], rtol=1e-10, atol=1e-10)


# -- edges, constants and values -------------------------------------------------------------------


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("architecture", SAE_ARCHITECTURES)
def test_every_edge_equals_autograd(name: str, architecture: str) -> None:
    one = case(name, architecture)
    att = one.run.attribute([sap.LogitDiff(5, 6), sap.Logit(9, position=3)], node_budget=None)
    assert len(att.ledger) > 50
    assert att.worst_residual < 1e-10
    assert_matches_autograd(one, att)


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize(
    "config",
    [
        {"normalize_activations": "layer_norm"},
        {"normalize_activations": "constant_norm_rescale"},
        {"normalize_activations": "layer_norm", "apply_b_dec_to_input": False},
        {"normalize_activations": "constant_norm_rescale", "architecture": "topk_rescaled"},
        {"normalize_activations": "layer_norm", "architecture": "gated"},
        {"apply_b_dec_to_input": False},
        {"apply_b_dec_to_input": False, "architecture": "topk_rescaled"},
        {"apply_b_dec_to_input": False, "architecture": "gated"},
        {"reshape_activations": "none", "architecture": "jumprelu"},
    ],
    ids=lambda config: "-".join(map(str, config.values())),
)
def test_edges_equal_autograd_for_every_normalisation(name: str, config: dict[str, Any]) -> None:
    one = case(name, **config)
    att = one.run.attribute(sap.Logit(5), node_budget=None)
    assert att.worst_residual < 1e-10
    assert_matches_autograd(one, att)


def test_grouped_value_biases() -> None:
    """A Llama with biases on its projections: the heads of a group share one."""
    model = tiny_llama(F64, attention_bias=True)
    assert model.model.layers[1].self_attn.v_proj.bias.abs().min() > 0
    one = Case("llama", random_saes(model), model)
    att = one.run.attribute([sap.LogitDiff(5, 6), sap.Feature(2, 3, 6)], node_budget=60)
    assert_matches_autograd(one, att)


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_active_and_inactive_features_as_targets(name: str, layer: int) -> None:
    one = case(name, "topk")
    acts = one.oracle.acts(layer)
    position = 5
    active = int(acts[position].argmax())
    inactive = int((acts[position] == 0).nonzero()[3])
    att = one.run.attribute(
        [sap.Feature(layer, active, position), sap.Feature(layer, inactive, position - len(TOKENS))]
    )
    roots = {f"attn:{layer}:{feature}@{position}" for feature in (active, inactive)}
    assert roots == {str(node) for node in att.roots.values()}
    assert roots <= set(att.ledger.index)
    assert att.nodes.loc[f"attn:{layer}:{active}@{position}", "activation"] == pytest.approx(
        float(acts[position, active])
    )
    assert pd.isna(att.nodes.loc[f"attn:{layer}:{inactive}@{position}", "activation"])
    assert_matches_autograd(one, att)


@pytest.mark.parametrize("name", TINY)
def test_a_direction_is_read_after_the_final_norm(name: str) -> None:
    one = case(name)
    vector = torch.randn(one.model.config.hidden_size, dtype=F64)
    att = one.run.attribute(sap.Direction(vector, 4, name="mine"), node_budget=0)
    expected = one.oracle.attribute({"mine": ("direction", vector, 4)})["mine"]
    row = engine_rows(att)['direction:"mine"@4']
    assert worst_difference(row, expected) < 1e-10


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("layers", [(0,), (1,), (2,), (0, 2)], ids=str)
def test_layers_without_an_sae_are_split_by_head(name: str, layers: tuple[int, ...]) -> None:
    one = case(name, layers=layers)
    att = one.run.attribute(sap.LogitDiff(5, 6), node_budget=None)
    assert {*att.nodes["kind"]} >= {"head", "attn", "attn_bias", "embed", "mlp"}
    assert_matches_autograd(one, att)


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("architecture", ["standard", "gated"])
def test_each_head_carries_what_autograd_says(name: str, architecture: str) -> None:
    one = case(name, architecture, normalize_activations="layer_norm")
    feature = int(one.oracle.acts(2)[6].argmax())
    att = one.run.attribute(sap.Feature(2, feature, 6), node_budget=8)
    frame = att.edges_by_head()
    targets = frame["target"].astype(str).unique()
    assert len(targets) == 9
    for target in targets:
        expected = one.oracle.edges_by_head(as_oracle_target(target))
        scale = sum(map(abs, expected.values()))
        part = frame[frame["target"] == target]
        got = {
            (str(source), int(head)): weight
            for source, head, weight in zip(
                part["source"], part["head"], part["weight"].tolist(), strict=True
            )
        }
        assert len(got) == len(part)
        worst = max(abs(got.get(k, 0) - expected.get(k, 0)) for k in got.keys() | expected.keys())
        assert worst < 1e-10 * scale


@pytest.mark.parametrize("name", TINY)
def test_dfa_by_head_and_source(name: str) -> None:
    """Against the definition, with the oracle's own pattern and values."""
    one = case(name, "topk_rescaled", normalize_activations="constant_norm_rescale")
    oracle, sae, layer, position, feature = one.oracle, one.lens, 1, 5, 11
    dfa = one.run.dfa(layer, feature, position)
    weights = oracle.saes[layer].W_enc.detach()[:, feature]
    weights = weights * oracle.saes[layer].W_dec.detach()[feature].norm()
    seen = oracle.layers[layer]
    size = seen.z[position].norm() / seen.z.shape[1] ** 0.5
    normed = oracle._norm(seen.resid_pre, oracle._first_norm(layer), oracle._sigma(seen.resid_pre))
    values = oracle._values(layer, normed)
    by_head = weights.unflatten(-1, (oracle.n_heads, oracle.d_head)) / size
    expected = torch.einsum("hp,hpe,he->hp", seen.pattern[:, position], values, by_head)
    torch.testing.assert_close(dfa.by_head_and_source, expected, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(dfa.by_head, expected.sum(1), rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(dfa.by_source, expected.sum(0), rtol=1e-9, atol=1e-11)
    assert dfa.pre_activation == pytest.approx(
        float(oracle.pre_activations(layer)[5, 11]), rel=1e-9
    )
    assert abs(dfa.residual) < 1e-12
    assert float(dfa.by_source[position + 1 :].abs().max()) == 0
    assert sae.tokenizer is None
    assert dfa.tokens[0] == "#3"


# -- constants, one bias at a time -----------------------------------------------------------------


def _gpt2_with_flat_attention() -> Any:
    """The first layer's queries are constant and its keys zero: no bias below moves the pattern."""
    model = tiny_gpt2(F64)
    attention = model.transformer.h[0].attn.c_attn
    width = model.config.hidden_size
    with torch.no_grad():
        attention.weight[:, : 2 * width] = 0
        attention.bias[: 2 * width] = 0
    return model


def _rows(model: Any, saes: list[Any], target: Any) -> Row:
    run = sap.FeatureLens(model, saes).run(TOKENS)
    return next(iter(engine_rows(run.attribute(target, node_budget=0)).values()))


@pytest.mark.parametrize("bias", ["b_V", "norm", "b_enc", "b_dec", "final_norm"])
def test_a_bias_set_to_zero_leaves_the_constant(bias: str) -> None:
    model, width, position, feature = _gpt2_with_flat_attention(), 30, 6, 4
    saes = random_saes(model, "topk_rescaled")
    sae: Any = saes[0]
    block = model.transformer.h[0]
    target = sap.Logit(5) if bias == "final_norm" else sap.Feature(0, feature, position)
    before = _rows(model, saes, target)

    scale = sae.W_dec.detach()[feature].norm()
    encoder = sae.W_enc.detach()[:, feature] * scale
    W_V = block.attn.c_attn.weight.detach()[:, 2 * width :]
    with torch.no_grad():
        # Every head's attention sums to 1, so a bias passes with weight 1.
        match bias:
            case "b_V":
                change = -block.attn.c_attn.bias[2 * width :] @ encoder
                block.attn.c_attn.bias[2 * width :] = 0
            case "norm":
                change = -(block.ln_1.bias @ W_V) @ encoder
                block.ln_1.bias.zero_()
            case "b_enc":
                change = -sae.b_enc[feature] * scale
                sae.b_enc.zero_()
            case "b_dec":
                change = sae.b_dec @ encoder
                sae.b_dec.zero_()
            case _:
                change = -model.transformer.ln_f.bias @ model.lm_head.weight[5]
                model.transformer.ln_f.bias.zero_()
    after = _rows(model, saes, target)
    assert abs(float(change)) > 1e-3
    assert after.constant - before.constant == pytest.approx(float(change), rel=1e-9)
    assert after.value - before.value == pytest.approx(float(change), rel=1e-9)
    assert after.edges.keys() == before.edges.keys() or bias == "b_dec"
    upstream = [name for name in before.edges if not name.startswith(("attn:0", "attn_"))]
    assert upstream
    for name in upstream:
        assert after.edges[name] == pytest.approx(before.edges[name], rel=1e-9, abs=1e-12)


def test_the_output_bias_and_decoder_bias_are_one_writer() -> None:
    """``attn_bias`` of the last layer on a logit, with the final norm's scale from the model."""
    model = tiny_gpt2(F64)
    saes = random_saes(model)
    run = sap.FeatureLens(model, saes).run(TOKENS)
    row = next(iter(engine_rows(run.attribute(sap.Logit(5), node_budget=0)).values()))
    projection = model.transformer.h[2].attn.c_proj
    vector = saes[2].b_dec.detach() @ projection.weight.detach() + projection.bias.detach()
    final = Oracle(model, {}, TOKENS).resid_final[-1]
    reader = model.transformer.ln_f.weight.detach() * model.lm_head.weight.detach()[5]
    sigma = torch.sqrt(final.var(unbiased=False) + 1e-5)
    assert row.edges["attn_bias:2@6"] == pytest.approx(
        float((vector - vector.mean()) @ reader / sigma), rel=1e-10
    )


# -- budgets ---------------------------------------------------------------------------------------


def test_memory_budget_changes_nothing() -> None:
    run = case("llama").run
    wide = run.attribute(sap.LogitDiff(5, 6), node_budget=None)
    tight = run.attribute(sap.LogitDiff(5, 6), node_budget=None, memory_budget=2 * 2**20)
    a, b = engine_rows(wide), engine_rows(tight)
    assert a.keys() == b.keys()
    assert max(worst_difference(a[name], b[name]) for name in a) < 1e-13
    pd.testing.assert_series_equal(wide.nodes["influence"], tight.nodes["influence"], rtol=1e-12)


def dense_influence(att: Attribution) -> tuple[list[str], np.ndarray]:
    """Influence by the power series ``w (A + A^2 + ...) + w``, ``A`` the share matrix."""
    names = list(map(str, att.nodes.index))
    place = {name: i for i, name in enumerate(names)}
    A = np.zeros((len(names), len(names)))
    for name, row in engine_rows(att).items():
        total = sum(map(abs, row.edges.values()))
        for source, weight in row.edges.items():
            A[place[name], place[source]] = abs(weight) / total
    start = np.zeros(len(names))
    start[[place[str(root)] for root in att.roots.values()]] = 1 / len(att.roots)
    total, flow = start.copy(), start
    while flow.any():
        flow = flow @ A
        total += flow
    return names, total


@pytest.mark.parametrize("name", TINY)
def test_influence_is_the_power_series(name: str) -> None:
    run = case(name).run
    att = run.attribute([sap.LogitDiff(5, 6), sap.Feature(1, 4, 3)], node_budget=None)
    names, influence = dense_influence(att)
    np.testing.assert_allclose(att.nodes.loc[names, "influence"], influence, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("budget", [0, 1, 7, 40])
def test_node_budget(budget: int) -> None:
    run = case("gpt2").run
    targets = [sap.Logit(5), sap.Feature(1, 4, 3)]
    att = run.attribute(targets, node_budget=budget)
    full = run.attribute(targets, node_budget=None)
    roots = {str(node) for node in att.roots.values()}
    assert roots <= set(att.ledger.index)
    expanded = set(att.ledger.index) - roots
    assert len(expanded) == budget
    a, b = engine_rows(att), engine_rows(full)
    assert max(worst_difference(a[name], b[name]) for name in a) < 1e-13
    assert set(att.nodes.index[att.nodes["expanded"]]) == set(att.ledger.index)
    # In the top layer all influence is known: what is expanded there beats what is not.
    top = att.nodes[(att.nodes["kind"] == "attn") & (att.nodes["layer"] == 2)]
    inside = top.loc[top["expanded"], "influence"]
    outside = top.loc[~top["expanded"], "influence"]
    if len(inside):
        assert inside.min() >= outside.max()


def test_the_budget_goes_to_the_most_influential_of_one_layer() -> None:
    run = case("gpt2", layers=(1,)).run
    full = run.attribute(sap.Logit(5), node_budget=None).nodes
    att = run.attribute(sap.Logit(5), node_budget=5).nodes
    features = full.loc[full["kind"] == "attn", "influence"].sort_values(ascending=False)
    assert set(att.index[att["expanded"] & (att["kind"] == "attn")]) == set(features.index[:5])


def test_roots_do_not_use_the_budget() -> None:
    """A root that is itself the strongest pending feature leaves the budget to the others."""
    run = case("gpt2").run
    full = run.attribute(sap.Logit(5), node_budget=None).nodes
    features = full.loc[full["kind"] == "attn", "influence"].sort_values(ascending=False)
    strongest = sap.Node.parse(str(features.index[0]))
    assert strongest.layer is not None
    assert strongest.feature is not None
    root = sap.Feature(strongest.layer, strongest.feature, strongest.position)
    att = run.attribute([sap.Logit(5), root], node_budget=3)
    assert len(att.ledger) == 2 + 3


@pytest.mark.parametrize("keep", [1, 6])
def test_edges_per_target(keep: int) -> None:
    run = case("llama").run
    att = run.attribute(sap.LogitDiff(5, 6), edges_per_target=keep, node_budget=20)
    full = engine_rows(run.attribute(sap.LogitDiff(5, 6), node_budget=20))
    ledger = att.ledger
    assert att.worst_residual < 1e-10
    for name, row in engine_rows(att).items():
        strongest = sorted(full[name].edges.items(), key=lambda item: -abs(item[1]))[:keep]
        assert row.edges == pytest.approx(dict(strongest), rel=1e-9)
        rest = sum(full[name].edges.values()) - sum(row.edges.values())
        assert ledger.loc[name, "pruned"] == pytest.approx(rest, rel=1e-9, abs=1e-12)


def test_pruning_keeps_what_was_dropped_before() -> None:
    run = case("gpt2").run
    short = run.attribute(sap.LogitDiff(5, 6), edges_per_target=30)
    full = run.attribute(sap.LogitDiff(5, 6)).ledger
    pruned = short.prune(0.5, 0.8).prune(0.9, 0.9)
    assert pruned.worst_residual < 1e-10
    for target, in_sum, lost in pruned.ledger[["in_sum", "pruned"]].itertuples():
        assert in_sum + lost == pytest.approx(full.loc[target, "in_sum"], rel=1e-9, abs=1e-12)


# -- pruning ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize(
    ("nodes", "edges", "max_nodes"),
    [(0.8, 0.98, None), (0.4, 0.7, None), (1.0, 1.0, None), (0.95, 1.0, 25), (1.0, 0.5, None)],
)
def test_prune(name: str, nodes: float, edges: float, max_nodes: int | None) -> None:
    att = case(name).run.attribute([sap.LogitDiff(5, 6), sap.Logit(9, 3)], node_budget=None)
    pruned = att.prune(nodes, edges, max_nodes)
    before, after = engine_rows(att), engine_rows(pruned)
    roots = {str(node) for node in att.roots.values()}

    # what is kept is unchanged, what is lost stands in the ledger
    assert pruned.worst_residual < 1e-10
    for target, row in after.items():
        assert row.constant == before[target].constant
        assert row.value == before[target].value
        assert row.edges.items() <= before[target].edges.items()
        lost = sum(before[target].edges.values()) - sum(row.edges.values())
        assert pruned.ledger.loc[target, "pruned"] == pytest.approx(lost, rel=1e-9, abs=1e-12)
        assert pruned.nodes.loc[target, "pruned_in"] == pruned.ledger.loc[target, "pruned"]

    # nodes: the smallest set that reaches the share, by an independent computation
    names, influence = dense_influence(att)
    others = sorted(
        ((v, n) for n, v in zip(names, influence, strict=True) if n not in roots), reverse=True
    )
    total, running, chosen = sum(v for v, _ in others), 0.0, set()
    for value, node in others:
        if running >= nodes * total * (1 - 1e-12) or (max_nodes and len(chosen) >= max_nodes):
            break
        running += value
        chosen.add(node)
    kept = set(map(str, pruned.nodes.index))
    assert roots <= kept
    assert kept - roots <= chosen
    if max_nodes is not None:
        assert len(kept - roots) <= max_nodes
    if edges == 1 and nodes == 1 and max_nodes is None:
        assert {t: r.edges for t, r in after.items()} == {t: r.edges for t, r in before.items()}

    # fixpoint: every node leads to a root; features have in-edges of their own
    sources = {source for row in after.values() for source in row.edges}
    assert kept == roots | sources
    for node in kept - roots:
        if node in before:
            assert after[node].edges, f"{node} lost all its in-edges but stayed"

    # edges: the smallest set that reaches the share of what passes between the chosen nodes
    scores = edge_scores(att, chosen | roots)
    order = sorted(scores.values(), reverse=True)
    reach = np.cumsum(order)
    count = int(np.searchsorted(reach, edges * reach[-1] * (1 - 1e-12)))
    strong = {e for e, score in scores.items() if edges == 1 or score >= order[count]}
    while True:
        ends = {t for _, t in strong}
        dead = {s for s, _ in strong if s in before and s not in ends | roots}
        dead |= {t for t in ends if t not in roots and t not in {s for s, _ in strong}}
        if not dead:
            break
        strong = {(s, t) for s, t in strong if s not in dead and t not in dead}
    assert {(s, t) for t, row in after.items() for s in row.edges} == strong


def edge_scores(att: Attribution, chosen: set[str]) -> dict[tuple[str, str], float]:
    """Influence of each target times the share of the edge, within the chosen nodes."""
    rows = {
        target: {s: abs(w) for s, w in row.edges.items() if s in chosen}
        for target, row in engine_rows(att).items()
        if target in chosen
    }
    influence = {str(root): 1 / len(att.roots) for root in att.roots.values()}
    scores = {}
    # the engine lists targets from the top down
    order = sorted(rows, key=lambda t: -(sap.Node.parse(t).layer or 0) if t[:4] == "attn" else -99)
    for target in order:
        total = sum(rows[target].values())
        for source, size in rows[target].items():
            score = influence.get(target, 0) * size / total
            scores[source, target] = score
            influence[source] = influence.get(source, 0) + score
    return scores


# -- graphs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TINY)
def test_networkx(name: str) -> None:
    run = case(name, layers=(0, 2)).run
    att = run.attribute([sap.LogitDiff(5, 6), sap.Feature(2, 3, 4)]).prune()
    graph = att.to_networkx()
    rows = engine_rows(att)
    assert {(s, t): d["weight"] for s, t, d in graph.edges(data=True)} == {
        (s, t): w for t, row in rows.items() for s, w in row.edges.items()
    }
    assert set(graph.nodes) == set(att.nodes.index)
    for node, data in graph.nodes(data=True):
        parsed = sap.Node.parse(node)
        assert str(parsed) == node
        assert (data["kind"], data["position"]) == (parsed.kind, parsed.position)
        assert data.get("layer") == parsed.layer
        assert data.get("feature") == parsed.feature
        assert data.get("head") == parsed.head
    for target in rows:
        data = graph.nodes[target]
        total = sum(d["weight"] for _, _, d in graph.in_edges(target, data=True))
        assert total + data["constant"] + data["pruned_in"] == pytest.approx(data["pre_activation"])
    assert graph.graph["token_ids"] == TOKENS
    assert graph.graph["worst_ledger_residual"] < 1e-10
    assert graph.graph["targets"] == ["logit_diff:#5-#6@6", "attn:2:3@4"]


@pytest.mark.parametrize("name", TINY)
def test_heads_sum_to_the_edge(name: str) -> None:
    att = case(name).run.attribute([sap.LogitDiff(5, 6)], node_budget=30).prune()
    graph = att.to_networkx()
    multi: Any = att.to_networkx(by="head")
    assert multi.is_multigraph()
    sums: dict[tuple[str, str], float] = defaultdict(float)
    for source, target, key, data in multi.edges(keys=True, data=True):
        node = sap.Node.parse(target)
        if node.kind == "attn":
            assert key == f"{node.layer}.{data['head']}"
        else:
            assert "head" not in data
        sums[source, target] += data["weight"]
    weights = {(s, t): d["weight"] for s, t, d in graph.edges(data=True)}
    assert sums.keys() == weights.keys()
    for pair, weight in weights.items():
        assert sums[pair] == pytest.approx(weight, rel=1e-9, abs=1e-13)


@pytest.mark.parametrize(("sharpness", "expected"), [(1.0, 10), (8.0, None), (200.0, 1)])
def test_default_targets_are_the_top_logits(sharpness: float, expected: int | None) -> None:
    """Cumulative probability 0.95, ten at most, weighted by probability."""
    model = tiny_gpt2(F64)
    with torch.no_grad():
        model.transformer.ln_f.weight *= sharpness
        model.transformer.ln_f.bias *= sharpness
    run = sap.FeatureLens(model, random_saes(model)).run(TOKENS)
    att = run.attribute(node_budget=5)
    probabilities, tokens = run.logits[0, -1].softmax(-1).sort(descending=True)
    chosen: list[int] = []
    while len(chosen) < 10 and probabilities[: len(chosen)].sum() < 0.95:
        chosen.append(int(tokens[len(chosen)]))
    assert len(chosen) == expected if expected else 1 < len(chosen) < 10
    names = [str(node) for node in att.roots.values()]
    assert names == [f"logit:#{token}@6" for token in chosen]
    shares = (probabilities[: len(chosen)] / probabilities[: len(chosen)].sum()).numpy()
    np.testing.assert_allclose(att.nodes.loc[names, "influence"], shares, rtol=1e-6)


def test_features_are_those_of_sae_lens() -> None:
    one = case("llama", "jumprelu")
    for layer in range(3):
        frame = one.run.features(layer)
        acts, pre = one.oracle.acts(layer), one.oracle.pre_activations(layer)
        assert len(frame) == int((acts > 0).sum())
        at = frame["position"].to_numpy(), frame["feature"].to_numpy()
        np.testing.assert_allclose(frame["activation"], acts.numpy()[at], rtol=1e-9)
        np.testing.assert_allclose(frame["pre_activation"], pre.numpy()[at], rtol=1e-9)
    assert set(one.run.features(1, -1)["position"]) == {len(TOKENS) - 1}


def test_logit_targets_know_their_probability(lens_of: Any) -> None:
    run = lens_of("gpt2").run([TOKENS])
    graph = run.graph([sap.Logit(3), sap.Logit(7), sap.Feature(1, 5, 4)])
    expected = run.logits[0, -1].double().softmax(-1)
    found = {node: p for node, p in graph.nodes(data="probability") if p is not None}
    assert len(found) == 2
    assert sorted(found.values()) == pytest.approx(sorted(expected[[3, 7]].tolist()))
