"""QK attribution: scores term by term, against the hosts' own scores and patterns."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from architecture_models import RECIPES
from helpers import HOSTS
from test_architectures import DTYPES, PAIRS, exact, run_of

from sae_attn_plugin.attribution.qk import QKAttribution

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
