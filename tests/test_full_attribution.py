"""Every combination of dictionaries against autograd: transcoders, MLP-out and attn_out SAEs,
linearised MLPs and heads, on four shapes of models."""

from __future__ import annotations

import contextlib
import functools
import random
from collections import defaultdict
from typing import Any

import numpy as np
import pytest
import torch
from architecture_models import RECIPES
from full_oracle import FullOracle
from helpers import TrueFloat64, random_sae, random_transcoder, sae_at

import sae_attn_plugin as sap

TOKENS = [3, 57, 7, 19, 7, 13, 2]
F64 = torch.float64
MODELS = ("gpt2", "gpt_neox", "llama", "gemma2")
PAIR = (5, 6)


@functools.cache
def model_of(name: str) -> Any:
    return RECIPES[name].build(F64)


def _sizes(model: Any) -> tuple[int, int]:
    c = model.config
    d_head = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    return c.hidden_size, c.num_attention_heads * d_head


def attention(what: str, model: Any, dtype: str = "float64") -> dict[int, Any]:
    """SAEs by layer. ``mixed``: one of each kind, and one layer without."""
    d_model, width = _sizes(model)
    z = functools.partial(random_sae, d_in=width, d_sae=24, dtype=dtype)
    out = functools.partial(sae_at, hook="hook_attn_out", d_in=d_model, dtype=dtype)
    match what:
        case "none":
            return {}
        case "z":
            return {layer: z(layer) for layer in range(3)}
        case "attn_out":
            architectures = ("standard", "topk_rescaled", "jumprelu")
            return {layer: out(layer, architecture=a) for layer, a in enumerate(architectures)}
        case "attn_out_layer_norm":  # gpt2-small-attn-out-v5 is such
            return {n: out(n, normalize_activations="layer_norm") for n in range(3)}
        case "mixed":
            return {0: z(0), 1: out(1, architecture="gated")}
    raise ValueError(what)


def mlps(name: str, what: str, model: Any, dtype: str = "float64") -> dict[int, Any]:
    d_model, _ = _sizes(model)
    tc = functools.partial(random_transcoder, d_model=d_model, dtype=dtype)
    sae = functools.partial(sae_at, hook="hook_mlp_out", d_in=d_model, dtype=dtype)
    stream = "hook_resid_pre" if name == "gpt_neox" else "hook_resid_mid"
    match what:
        case "none":
            return {}
        case "tc":
            return {
                0: tc(0, architecture="transcoder"),
                1: tc(1, architecture="jumprelu_transcoder", hooks=(stream, "hook_mlp_out")),
                2: tc(2, architecture="skip_transcoder"),
            }
        case "skip":
            hooks = ("ln2.hook_normalized", "mlp.hook_out")
            return {
                0: tc(0, architecture="jumprelu_skip_transcoder", hooks=hooks),
                1: tc(1, architecture="skip_transcoder", hooks=(stream, "hook_mlp_out")),
                2: tc(2, hooks=hooks, normalize_activations="layer_norm"),
            }
        case "sae":
            return {
                0: sae(0, architecture="standard", normalize_activations="layer_norm"),
                1: sae(1, architecture="topk"),
                2: sae(2, architecture="gated"),
            }
        case "mixed":
            return {1: sae(1), 2: tc(2, architecture="jumprelu_skip_transcoder")}
    raise ValueError(what)


class Case:
    def __init__(self, name: str, attn: str, mlp: str) -> None:
        self.model = model_of(name)
        self.saes = attention(attn, self.model)
        self.transcoders = mlps(name, mlp, self.model)
        self.exact = contextlib.nullcontext if name in ("gpt2", "gpt_neox") else TrueFloat64
        with self.exact():
            self.lens = sap.FeatureLens(self.model, self.saes, transcoders=self.transcoders)
            self.run = self.lens.run(TOKENS)
            self.oracle = FullOracle(self.model, self.saes, self.transcoders, TOKENS)


@functools.cache
def case(name: str, attn: str, mlp: str) -> Case:
    return Case(name, attn, mlp)


@pytest.mark.parametrize("attn", ["z", "attn_out"])
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_dfa_is_what_the_edges_add_up_to(name: str, attn: str) -> None:
    """By head and source, in models without biases, where writers alone make up the values."""
    here = case(name, attn, "none")
    with here.exact():
        active = here.run.features(2)
        for feature, position in active[["feature", "position"]].to_numpy()[::9].tolist():
            dfa = here.run.dfa(2, feature, position)
            att = here.run.attribute(sap.Feature(2, feature, position), node_budget=0)
            split = np.zeros(dfa.by_head_and_source.shape)
            frame = att.edges_by_head()
            at: Any = [sap.Node.parse(source).position for source in frame["source"]]
            np.add.at(split, (frame["head"].to_numpy(int), at), frame["weight"].to_numpy())
            np.testing.assert_allclose(split, dfa.by_head_and_source, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("attn", ["z", "attn_out", "attn_out_layer_norm"])
@pytest.mark.parametrize("name", ["gpt2", "gemma2"])
def test_dfa_closes_at_every_destination(name: str, attn: str) -> None:
    here = case(name, attn, "none")
    with here.exact():
        for layer in range(3):
            encoded = here.run.features(layer)
            features = list(range(10))  # enough for one product of all
            split = here.run.dfa_by_source(layer, features)
            few = here.run.dfa_by_source(layer, torch.tensor(features[:2]))
            torch.testing.assert_close(few, split[:2], rtol=1e-10, atol=1e-12)
            for row, feature in enumerate(features):
                for position in range(split.shape[1]):
                    dfa = here.run.dfa(layer, feature, position)
                    assert abs(dfa.residual) < 1e-10
                    found = split[row, position]
                    torch.testing.assert_close(found, dfa.by_source, rtol=1e-9, atol=1e-11)
            for _, at, _, feature, _, pre in encoded.itertuples(index=False):
                if feature in features:
                    total = here.run.dfa(layer, feature, at)
                    assert float(total.by_source.sum()) + total.constant == pytest.approx(pre)


def rows_of(att: Any) -> dict[str, dict[str, float]]:
    rows: dict[str, dict[str, float]] = defaultdict(dict)
    frame = att.edges
    for source, target, weight in zip(
        frame["source"], frame["target"], frame["weight"].tolist(), strict=True
    ):
        assert source not in rows[target], f"edge {source} -> {target} twice"
        rows[target][source] = weight
    return rows


def assert_autograd(one: Case, att: Any, per_kind: int = 6, tolerance: float = 1e-10) -> set[str]:
    """Edges and values of some rows of every kind; the kinds that were compared."""
    rows, ledger = rows_of(att), att.ledger
    root = next(iter(att.roots.values()))
    places = one.oracle.gradients(root, PAIR)
    count: dict[str, int] = defaultdict(int)
    nodes = [sap.Node.parse(str(target)) for target in ledger.index]
    random.Random(0).shuffle(nodes)
    for node in nodes:
        count[node.kind] += 1
        if count[node.kind] > per_kind:
            continue
        target = str(node)
        expected, value = one.oracle.row(node, PAIR, places)
        got = rows[target]
        scale = sum(map(abs, expected.values())) + abs(value)
        worst = max(abs(got.get(k, 0) - expected.get(k, 0)) for k in got.keys() | expected.keys())
        assert worst <= tolerance * scale, f"{target}: {worst / scale:.1e}"
        assert abs(ledger.loc[target, "value"] - value) <= tolerance * scale, target
    return set(count)


@pytest.mark.parametrize("name", MODELS)
def test_the_oracle_is_the_model(name: str) -> None:
    one = case(name, "mixed", "mixed")
    for run in (one.oracle.direct, one.oracle.live):
        torch.testing.assert_close(run["logits"].detach(), one.oracle.plain, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    ("attn", "mlp", "options"),
    [
        ("attn_out", "none", {}),
        ("attn_out_layer_norm", "none", {"mlp": "linearise"}),
        ("z", "tc", {}),
        ("z", "skip", {}),
        ("attn_out", "skip", {"mlp": "linearise"}),
        ("z", "sae", {"mlp": "linearise"}),
        ("z", "sae", {}),
        ("mixed", "mixed", {"mlp": "linearise", "heads": "linearise"}),
        ("mixed", "mixed", {}),
        ("none", "none", {"mlp": "linearise", "heads": "linearise"}),
        ("none", "tc", {"heads": "linearise"}),
        ("z", "none", {"mlp": "linearise"}),
        ("none", "none", {}),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else value,
)
def test_edges_equal_autograd(name: str, attn: str, mlp: str, options: dict[str, str]) -> None:
    one = case(name, attn, mlp)
    att = one.run.attribute(sap.LogitDiff(*PAIR), node_budget=None, **options)  # type: ignore[arg-type]
    assert att.worst_residual < 1e-10
    kinds = assert_autograd(one, att)
    expected = {"logit_diff"} | ({"attn"} if attn != "none" else set())
    expected |= {"tc"} if mlp in ("tc", "skip", "mixed") else set()
    expected |= {"tc_skip"} if mlp in ("tc", "skip", "mixed") else set()
    if "mlp" in options:
        expected |= {"mlp_sae"} if mlp in ("sae", "mixed") else set()
        expected |= {"mlp"} if mlp in ("none", "mixed") else set()
    expected |= {"head"} if "heads" in options else set()
    assert kinds == expected
