"""QK attribution: scores term by term, against the hosts' own scores and patterns."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from architecture_models import RECIPES, FrozenAutograd
from helpers import HOSTS, TrueFloat64, on_host, random_sae, random_saes, randomize, word_tokenizer
from test_architectures import DTYPES, PAIRS, TOKENS, exact, run_of

import sae_attn_plugin as sap
from sae_attn_plugin.attribution.qk import QKAttribution
from sae_attn_plugin.backends.architectures import ARCHITECTURES

pytestmark = pytest.mark.filterwarnings("ignore:HookedTransformer is deprecated")

TOLERANCE = {"float32": 1e-5, "float64": 1e-10}
WINDOWED = ("mistral", "gemma2", "gemma3_text", "phi3")


def qk_of(name: str, host: str, dtype: str, *where: int) -> QKAttribution:
    run = run_of(name, host, dtype)
    with exact(dtype):
        return run.qk(*where)


def pairs(name: str) -> list[tuple[int, int, int, int]]:
    """Layer, head, query, key: some that every layer sees, its own position too."""
    return [(0, 0, 5, 4), (1, 3, 8, 6), (2, 4, 7, 7), (2, 1, 3, 0 if name not in WINDOWED else 1)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "host"), PAIRS)
def test_terms_sum_to_the_score(name: str, host: str, dtype: str) -> None:
    for where in pairs(name):
        qk = qk_of(name, host, dtype, *where)
        assert qk.relative_residual <= TOLERANCE[dtype]
        total = float(qk.terms["weight"].sum())
        size = float(qk.terms["weight"].abs().sum())
        assert abs(total - qk.score) <= TOLERANCE[dtype] * size
        for marginal in (qk.by_query, qk.by_key, qk.by_kind):
            assert abs(float(marginal.to_numpy().sum()) - qk.score) <= TOLERANCE[dtype] * size


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "host"), [p for p in PAIRS if p[1] != "nnsight"])
def test_scores_are_the_hosts_own(name: str, host: str, dtype: str) -> None:
    """TransformerLens keeps its scores at hook_attn_scores, after any soft-cap."""
    run = run_of(name, host, dtype)
    seen = dict[int, torch.Tensor]()
    if host == "transformer_bridge" and name == "gptj":
        pytest.skip("the bridge gives no scores before the softmax here")

    def keep(value: torch.Tensor, hook: Any) -> None:
        seen[int(hook.name.split(".")[1])] = value

    hooks = [(f"blocks.{layer}.attn.hook_attn_scores", keep) for layer in range(3)]
    model: Any = run.lens.backend.model  # type: ignore[attr-defined]
    with exact(dtype), torch.no_grad():
        model.run_with_hooks(run.tokens, fwd_hooks=hooks)
    for layer, head, query, key in pairs(name):
        qk = qk_of(name, host, dtype, layer, head, query, key)
        expected = float(seen[layer][0, head, query, key])
        size = float(qk.weights.abs().sum())
        assert abs(qk.capped_score - expected) <= TOLERANCE[dtype] * max(size, 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", RECIPES)
def test_score_differences_are_log_pattern_differences(name: str, dtype: str) -> None:
    run = run_of(name, "nnsight", dtype)
    for layer, head, query, key in pairs(name):
        qk = qk_of(name, "nnsight", dtype, layer, head, query, key)
        pattern = run.capture["pattern", layer][0, head, query].double()
        for other in qk.row_keys:
            rival = qk_of(name, "nnsight", dtype, layer, head, query, other)
            expected = float(pattern[key].log() - pattern[other].log())
            size = float(qk.weights.abs().sum() + rival.weights.abs().sum())
            got = qk.capped_score - rival.capped_score
            assert abs(got - expected) <= TOLERANCE[dtype] * max(size, 1)


@pytest.mark.parametrize("name", RECIPES)
def test_hosts_have_the_same_terms(name: str) -> None:
    reference = qk_of(name, "nnsight", "float32", 2, 4, 7, 5)
    for host in HOSTS[:2]:
        if (name, host) in PAIRS:
            other = qk_of(name, host, "float32", 2, 4, 7, 5)
            assert other.query_nodes == reference.query_nodes
            difference = (other.weights - reference.weights).abs().max()
            assert float(difference) <= 1e-5 * float(reference.weights.abs().sum())


# -- every term by itself ------------------------------------------------------------------------


@pytest.mark.parametrize("name", RECIPES)
def test_terms_match_autograd(name: str) -> None:
    """Each marginal is a first derivative of the model's own score, each term a mixed second."""
    model = RECIPES[name].build(torch.float64)
    with TrueFloat64():
        oracle = FrozenAutograd(model, random_saes(model), TOKENS)
    for query, key in ((7, 5), (6, 6)):
        qk = qk_of(name, "nnsight", "float64", 2, 4, query, key)
        score = oracle.scores[2][4, query, key]
        size = float(qk.weights.abs().sum())
        assert abs(float(score.detach()) - qk.score) <= 1e-10 * size
        leaves = list(oracle.leaves.values())
        first = torch.autograd.grad(score, leaves, create_graph=True, allow_unused=True)
        slope: Any = {id(leaf): gradient for leaf, gradient in zip(leaves, first, strict=True)}

        def derivative(node: str, of: Any = slope) -> torch.Tensor:
            leaf, at = oracle.leaf(node)
            gradient = of[id(leaf)]
            return torch.zeros(()) if gradient is None else gradient[at]

        expected = dict(qk.by_query) if query != key else dict(qk.by_query.add(qk.by_key))
        for node in (n for n in qk.query_nodes if "@" in n):
            assert abs(float(derivative(node).detach()) - expected[node]) <= 1e-10 * size, node
        if query == key:
            continue
        for node in (n for n in qk.key_nodes if "@" in n):
            assert abs(float(derivative(node).detach()) - qk.by_key[node]) <= 1e-10 * size, node
        strongest = qk.by_query.abs().sort_values(ascending=False).index
        for node in [n for n in strongest if "@" in n][:4]:
            second = torch.autograd.grad(
                derivative(node), leaves, retain_graph=True, allow_unused=True
            )
            mixed = {id(leaf): gradient for leaf, gradient in zip(leaves, second, strict=True)}
            row = qk.weights[qk.query_nodes.index(node)]
            for other, weight in zip(qk.key_nodes, row.tolist(), strict=True):
                if "@" in other:
                    assert abs(float(derivative(other, mixed)) - weight) <= 1e-10 * size


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "qwen2"])
def test_constants_are_the_models_biases(name: str) -> None:
    """Without a bias in the model, its rows are gone and the score moves by what they held."""
    qk = qk_of(name, "nnsight", "float64", 0, 2, 6, 3)
    rows = {node: i for i, node in enumerate(qk.query_nodes)}
    assert "b_Q" in rows
    model: Any = RECIPES[name].build(torch.float64)
    with torch.no_grad():
        if name == "gpt2":
            model.transformer.h[0].attn.c_attn.bias[:30] = 0
        elif name == "gpt_neox":
            attention = model.gpt_neox.layers[0].attention.query_key_value
            attention.bias.view(6, 3, 8)[:, 0] = 0
        else:
            model.model.layers[0].self_attn.q_proj.bias[:] = 0
    with TrueFloat64():
        lens = sap.FeatureLens(model, random_saes(model), tokenizer=word_tokenizer())
        without = lens.run([TOKENS]).qk(0, 2, 6, 3)
    assert "b_Q" not in without.query_nodes
    size = float(qk.weights.abs().sum())
    held = qk.by_query.to_dict()["b_Q"]
    assert abs(held) > 1e-3
    assert abs(qk.score - without.score - held) <= 1e-10 * size


# -- positions -----------------------------------------------------------------------------------

ROPES: dict[str, dict[str, Any]] = {
    "linear": {"factor": 3.0},
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 8},
    "longrope": {
        "short_factor": [1.0, 1.1, 1.3, 1.7],
        "long_factor": [1.5, 2.0, 3.0, 4.0],
        "original_max_position_embeddings": 8,
    },
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
}


def llama_with(rope: str) -> Any:
    recipe = RECIPES["llama"]
    parameters = {"rope_type": rope, "rope_theta": 10000.0, **ROPES[rope]}
    settings = {**recipe.settings, "rope_parameters": parameters, "max_position_embeddings": 20}
    return replace(recipe, settings=settings).build(torch.float64)


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("host", ["nnsight", "transformer_bridge"])
def test_rotary_variants_are_the_hosts_own(rope: str, host: str) -> None:
    model = llama_with(rope)
    tokens = [*TOKENS, *TOKENS][:17]
    with TrueFloat64():
        lens = sap.FeatureLens(on_host(model, host), random_saes(model), tokenizer=word_tokenizer())
        run = lens.run([tokens])
        qk, rival = run.qk(1, 3, 15, 2), run.qk(1, 3, 15, 14)
    assert qk.relative_residual <= 1e-10
    pattern = run.capture["pattern", 1][0, 3, 15].log()
    size = float(qk.weights.abs().sum())
    assert abs(qk.score - rival.score - float(pattern[2] - pattern[14])) <= 1e-10 * size


def test_unknown_rotary_positions_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = RECIPES["llama"].build()
    saes = random_saes(model)

    def run_with(**changes: Any) -> sap.Run:
        monkeypatch.setitem(ARCHITECTURES, "llama", replace(ARCHITECTURES["llama"], **changes))
        return sap.FeatureLens(model, saes, tokenizer=word_tokenizer()).run([TOKENS])

    for changes in ({"rotary": None}, {"rotary_pairs": "adjacent"}, {"score_scale": 1.0}):
        with pytest.raises(
            sap.BackendError, match=r"layer 1, .* do not give the model's attention"
        ):
            run_with(**changes).qk(1, 0, 5, 3)
        monkeypatch.undo()
    for changes, message in (
        ({"rotary": "model.norm"}, r"rotary positions of type 'default' are not known"),
        ({"rotary": "model.rotor"}, r"no 'model.rotor'"),
        ({"queries": None}, r"which modules give queries"),
        ({"score_scale": "/nothing"}, r"has no number 'nothing'"),
    ):
        with pytest.raises(sap.UnsupportedError, match=message):
            run_with(**changes).qk(1, 0, 5, 3)
        monkeypatch.undo()


def test_alibi_is_a_term_of_its_own() -> None:
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    torch.manual_seed(0)
    cfg = HookedTransformerConfig(
        n_layers=2,
        d_model=20,
        n_ctx=20,
        d_head=5,
        n_heads=4,
        d_mlp=12,
        d_vocab=61,
        act_fn="relu",
        normalization_type="LN",
        positional_embedding_type="alibi",
        dtype=torch.float64,
        device="cpu",
    )
    model = HookedTransformer(cfg).eval()
    randomize(model, size=0.3)
    lens = sap.FeatureLens(model, [random_sae(0, 20, dtype="float64")])
    run = lens.run([TOKENS])
    qk = run.qk(1, 2, 7, 3)
    seen: list[torch.Tensor] = []
    with torch.no_grad():
        model.run_with_hooks(
            run.tokens,
            fwd_hooks=[("blocks.1.attn.hook_attn_scores", lambda value, hook: seen.append(value))],  # noqa: ARG005
        )
    assert qk.score == pytest.approx(float(seen[0][0, 2, 7, 3]), abs=1e-12)
    assert qk.relative_residual <= 1e-10
    alibi = qk.terms[(qk.terms["query_node"] == "alibi") & (qk.terms["weight"] != 0)]
    assert alibi["key_node"].tolist() == ["alibi"]
    assert alibi["weight"].tolist() == pytest.approx([-4 * 2.0**-6])
    assert float(qk.relative_by_key.sum()) == pytest.approx(qk.relative_score, rel=1e-9)

    # an edge into the query, against TransformerLens' own separate inputs
    edge = sap.PatchEdge("attn_out:0", "query:1.2")
    result = lens.intervene(run, [edge], patterns=[1])
    model.set_use_split_qkv_input(True)
    kept: list[torch.Tensor] = []

    def without(value: torch.Tensor, hook: Any) -> torch.Tensor:  # noqa: ARG001
        value[:, :, 2] -= run.capture["attn_out", 0]
        return value

    with torch.no_grad():
        logits = model.run_with_hooks(
            run.tokens,
            fwd_hooks=[
                ("blocks.1.hook_q_input", without),
                ("blocks.1.attn.hook_pattern", lambda value, hook: kept.append(value)),  # noqa: ARG005
            ],
        )
    torch.testing.assert_close(result.logits, logits, rtol=0, atol=1e-10)
    torch.testing.assert_close(result.patterns[1], kept[0], rtol=0, atol=1e-10)
    assert (kept[0] - run.capture["pattern", 1]).abs().max() > 1e-3


def test_remote_models_bring_queries_and_keys() -> None:
    for name in ("llama", "gptj", "gpt_neox", "qwen3"):
        model = RECIPES[name].build()
        saes, reference = random_saes(model), qk_of(name, "nnsight", "float32", 2, 1, 6, 4)
        host = on_host(model, "transformers_model")
        lens = sap.FeatureLens(host, saes, tokenizer=word_tokenizer(), remote="local")
        qk = lens.run([TOKENS]).qk(2, 1, 6, 4)
        torch.testing.assert_close(qk.weights, reference.weights, atol=1e-6, rtol=1e-5)


# -- against the other keys ----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "mistral", "gemma2", "gptj"])
def test_relative_score(name: str) -> None:
    """Score minus the pattern-weighted mean, again as a sum; and the derivative of the pattern."""
    qk = qk_of(name, "nnsight", "float64", 1, 3, 8, 6)
    run = run_of(name, "nnsight")
    with TrueFloat64():
        rivals = {key: run.qk(1, 3, 8, key) for key in qk.row_keys}
    assert len(rivals) == (4 if name in WINDOWED and name != "gemma2" else 9)
    mean = sum(rival.pattern * rival.score for rival in rivals.values())
    assert qk.relative_score == pytest.approx(qk.score - mean, rel=1e-9, abs=1e-12)
    size = sum(float(rival.weights.abs().sum()) for rival in rivals.values())
    for marginal in (qk.relative_by_query, qk.relative_by_key):
        assert abs(float(marginal.sum()) - qk.relative_score) <= 1e-10 * size
    top = qk.top(10**6, relative=True)
    assert abs(top["weight"].sum() - qk.relative_score) <= 1e-10 * size
    assert top["weight"].abs().is_monotonic_decreasing
    node = qk.query_nodes[0]
    expected = rivals[6].by_query[node] - sum(r.pattern * r.by_query[node] for r in rivals.values())
    assert qk.relative_by_query[node] == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_top_is_the_strongest_terms_and_keeps_their_sign() -> None:
    qk = qk_of("gpt2", "nnsight", "float32", 2, 4, 7, 5)
    terms = qk.terms
    strongest = terms.reindex(terms["weight"].abs().sort_values(ascending=False).index)[:12]
    top = qk.top(12)
    np.testing.assert_allclose(top["weight"], strongest["weight"])
    assert top["query_node"].astype(str).tolist() == strongest["query_node"].astype(str).tolist()
    assert (top["weight"] < 0).any()
    assert "head 2.4" in repr(qk)


# -- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ((3, 0, 5, 3), "layer 3 is out of range"),
        ((-1, 0, 5, 3), "layer -1 is out of range"),
        ((1, 6, 5, 3), "head 6 is out of range: layer 1 has 6 heads"),
        ((1, -1, 5, 3), "head -1 is out of range"),
        ((1, 0, 9, 3), "position 9 is out of range"),
        ((1, 0, 5, 6), "key 6 comes after query 5"),
        ((1, 0, 8, 4), r"key 4 is masked for query 8 in layer 1.*sees keys 5 to 8"),
        ((1, 1.5, 8, 4), "head must be an integer"),
    ],
)
def test_scores_that_do_not_exist(where: tuple[Any, ...], message: str) -> None:
    with pytest.raises(sap.InputError, match=message):
        run_of("mistral", "nnsight").qk(*where)


def test_backend_without_scores_is_refused() -> None:
    run = run_of("gpt2", "nnsight", "float32")

    class Old:
        host, geometry = "old", run.lens.backend.geometry
        tokenizer = revision = None
        layer_weights, final_norm = run.lens.backend.layer_weights, run.lens.backend.final_norm
        unembed, forward = run.lens.backend.unembed, run.lens.backend.forward

    model = RECIPES["gpt2"].build()
    lens = sap.FeatureLens(Old(), random_saes(model), tokenizer=word_tokenizer())
    with pytest.raises(sap.UnsupportedError, match="gives no queries and keys"):
        lens.run([TOKENS]).qk(0, 0, 3, 2)


# -- circuits written on paper -------------------------------------------------------------------


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("copy", [1.0, 0.7])
def test_induction_head_looks_for_the_reason_on_paper(copy: float, host: str) -> None:
    """One term: the token A at the query, times what the previous-token feature wrote."""
    circuit = sap.demo.circuits.induction(copy=copy, dtype=torch.float64)
    model = on_host(circuit.model, host, circuit.tokenizer)
    lens = sap.FeatureLens(model, circuit.saes, tokenizer=circuit.tokenizer)
    run = lens.run([list(circuit.prompt)])

    def scale(*values: float) -> float:
        return math.sqrt(sum(v * v for v in values) / 18 + 1e-5)

    c = copy / scale(1, 1)
    s1 = scale(1, 1, c)
    qk = run.qk(1, 0, 4, 2)
    assert qk.score == pytest.approx(100 * c / s1**2, rel=1e-10)
    top = qk.top(2)
    assert top.loc[0, ["query_node", "key_node"]].tolist() == ["embed@4", "attn:0:0@2"]
    assert top.loc[0, "weight"] == pytest.approx(100 * c / s1**2, rel=1e-10)
    assert abs(float(top["weight"].iloc[1])) < 1e-9
    rest = run.qk(1, 0, 4, 0)  # where nothing matches it rests at BOS, half as sharp
    assert rest.top(1)["weight"].iloc[0] == pytest.approx(50 / (s1 * scale(1, 1)), rel=1e-10)
    assert qk.pattern == pytest.approx(1)
    edge = run.attribute(sap.HeadScore(1, 0, 4, 2, "key")).edges
    strongest: Any = edge.loc[edge["weight"].abs().idxmax()]
    assert strongest["source"] == "attn:0:0@2"
    assert strongest["weight"] == pytest.approx(100 * c / s1**2, rel=1e-10)


def test_rotary_head_on_paper() -> None:
    """A head that looks one back by its rotary angle: sharpness * cos(1 - distance) / scales."""
    circuit = sap.demo.circuits.grouped_query_induction(dtype=torch.float64)
    with TrueFloat64():
        lens = sap.FeatureLens(circuit.model, circuit.saes, tokenizer=circuit.tokenizer)
        run = lens.run([list(circuit.prompt)])
        n = len(circuit.prompt)
        back = tuple(max(p - 1, 0) for p in range(n))
        head = next(h for (layer, h), at in circuit.patterns.items() if layer == 0 and at == back)
        n_coordinates = circuit.model.config.hidden_size // 2
        scale = math.sqrt(1 / n_coordinates + 1e-5)
        for query, key in ((n - 1, n - 2), (n - 1, n - 1), (3, 1)):
            qk = run.qk(0, head, query, key)
            expected = 100 * math.cos(1 - (query - key)) / scale**2
            assert qk.score == pytest.approx(expected, rel=1e-6)
            assert qk.top(1)["weight"].iloc[0] == pytest.approx(expected, rel=1e-6)
