"""SAEs on the residual stream: edges against autograd, removals on the model, what is refused."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from architecture_models import RECIPES
from full_oracle import FullOracle
from helpers import HOSTS, on_host, random_sae, random_transcoder, sae_at, tiny_gpt2
from test_full_attribution import MODELS, PAIR, TOKENS, Case, assert_autograd, model_of, rows_of

import sae_attn_plugin as sap


def residual_saes(name: str, d_model: int, dtype: str = "float64") -> dict[tuple[str, int], Any]:
    """One of every place: before the layers, before an MLP, and after the last layer."""
    sae = functools.partial(sae_at, d_in=d_model, dtype=dtype)
    found = {
        ("resid", 0): sae(0, "hook_resid_pre"),
        ("resid", 1): sae(0, "hook_resid_post", normalize_activations="layer_norm"),
        ("resid", 2): sae(2, "hook_resid_pre", architecture="topk_rescaled"),
        ("resid", 3): sae(2, "hook_resid_post", architecture="gated"),
    }
    if name != "gpt_neox":
        found["resid_mid", 1] = sae(1, "hook_resid_mid", architecture="jumprelu")
    return found


class ResidualCase(Case):
    """A case with residual SAEs, split at some positions."""

    def __init__(self, name: str, at: tuple[int, ...], recurse: bool) -> None:
        super().__init__(name, "mixed", "mixed")
        self.residual = residual_saes(name, self.model.config.hidden_size)
        with self.exact():
            self.lens = sap.FeatureLens(
                self.model,
                self.saes,
                transcoders=self.transcoders,
                residual_saes=list(self.residual.values()),
            )
            self.run = self.lens.run(TOKENS)
            self.oracle = FullOracle(
                self.model, self.saes, self.transcoders, TOKENS, self.residual, at, recurse
            )


EVERYWHERE = tuple(range(len(TOKENS)))
THROUGH: Any = {"mlp": "linearise", "heads": "linearise"}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    ("at", "recurse"), [(EVERYWHERE, True), ((0, 3, 6), True), ((2, 4), False)]
)
def test_edges_equal_autograd(name: str, at: tuple[int, ...], recurse: bool) -> None:
    one = ResidualCase(name, at, recurse)
    torch.testing.assert_close(
        one.oracle.direct["logits"].detach(), one.oracle.plain, rtol=1e-9, atol=1e-9
    )
    whole = at == EVERYWHERE
    att = one.run.attribute(
        sap.LogitDiff(*PAIR),
        node_budget=None,
        expand="residual" if whole else {"residual": at, "writers": [1]},
        residual="recurse" if recurse else "terminal",
        **THROUGH,
    )
    assert att.worst_residual < 1e-10
    kinds = assert_autograd(one, att, per_kind=4)
    streams = {"resid", "resid_mid"} if name != "gpt_neox" else {"resid"}
    assert kinds >= {"logit_diff", "attn"}
    assert (streams & kinds) == (streams if recurse else set())
    # One position's part of a sum is either the SAE's terms or the writers', never both.
    residual = ("resid",)
    for target, row in rows_of(att).items():
        if sap.Node.parse(target).kind.startswith(residual):
            assert not any(source.startswith(residual) for source in row)
            continue
        for position in range(len(TOKENS)):
            here = {s.startswith(residual) for s in row if s.endswith(f"@{position}")}
            assert len(here) <= 1, (target, position)


def test_a_residual_feature_is_a_target() -> None:
    one = ResidualCase("llama", (), False)
    target = sap.Feature(1, 3, 4, "resid")
    att = one.run.attribute(target, node_budget=None)
    assert_autograd(one, att)
    assert str(next(iter(att.roots.values()))) == "resid:1:3@4"
    stream = one.oracle.live["resid", 1][4:5].detach()
    expected = one.oracle.pre(one.residual["resid", 1], stream)[0, 3]
    assert att.ledger["value"].iloc[0] == pytest.approx(float(expected), rel=1e-9)
    features = one.run.features(1, 4, kind="resid")
    acts = one.residual["resid", 1].encode(stream)[0]
    assert features["feature"].tolist() == acts.nonzero()[:, 0].tolist()


def test_a_score_is_split_too() -> None:
    one = ResidualCase("gpt2", (), False)
    target = sap.HeadScore(1, 0, 5, 2)
    plain = one.run.attribute(target, node_budget=0)
    att = one.run.attribute(target, expand="residual", node_budget=0)
    assert att.worst_residual < 1e-10
    assert att.ledger["value"].iloc[0] == pytest.approx(plain.ledger["value"].iloc[0])
    kinds = set(att.nodes["kind"])
    assert kinds == {"score", "resid", "resid_err", "resid_bias"}


@pytest.mark.parametrize(("name", "host"), [("gpt2", HOSTS[0]), ("gemma2", HOSTS[2])])
def test_frozen_effects_are_the_edges(name: str, host: str) -> None:
    model: Any = RECIPES[name].build(torch.float32)
    d_model = model.config.hidden_size
    c = model.config
    d_head = getattr(c, "head_dim", None) or d_model // c.num_attention_heads
    saes = [random_sae(layer, c.num_attention_heads * d_head, d_sae=24) for layer in range(3)]
    residual = residual_saes(name, d_model, "float32")
    lens = sap.FeatureLens(
        on_host(model, host),
        saes,
        transcoders=[random_transcoder(1, d_model)],
        residual_saes=list(residual.values()),
    )
    att = lens.run(TOKENS).attribute(
        sap.LogitDiff(*PAIR), expand="residual", residual="recurse", node_budget=60, **THROUGH
    )
    assert att.worst_residual < 1e-5
    graph = att.prune(0.7, 0.9).to_networkx()
    report = sap.validate(graph, lens, max_sources=12)
    assert report.frozen.max_error <= 2e-5
    assert report.frozen.table["kind"].str.startswith("resid").any()
    assert report.free.max_error > 1e-3


@functools.cache
def model() -> Any:
    return tiny_gpt2()


@pytest.mark.parametrize(
    ("saes", "message"),
    [
        (
            [sae_at(1, "hook_resid_pre", 30), sae_at(0, "hook_resid_post", 30)],
            "two SAEs for",
        ),
        ([sae_at(1, "hook_resid_mid", 30)] * 2, "before the MLP of layer 1"),
        ([sae_at(0, "hook_resid_pre", 28)], "30 wide"),
        ([sae_at(3, "hook_resid_pre", 30)], "only 3 layers"),
        ([random_sae(0, 30)], "is of attention"),
        ([sae_at(0, "hook_mlp_out", 30)], "transcoders="),
        ([random_transcoder(0, 30)], "transcoders="),
        ([sae_at(0, "hook_embed", 30)], "unknown hook name"),
    ],
)
def test_saes_that_do_not_fit(saes: Any, message: str) -> None:
    with pytest.raises(sap.InputError, match=message):
        sap.FeatureLens(model(), {}, residual_saes=saes)


def test_a_parallel_block_has_no_middle() -> None:
    neox = model_of("gpt_neox")
    with pytest.raises(sap.InputError, match="has no such place"):
        sap.FeatureLens(
            neox, {}, residual_saes=[sae_at(0, "hook_resid_mid", neox.config.hidden_size)]
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"expand": {"residual": [2], "writers": [0, 2]}}, "position 2 is to be split both"),
        ({"expand": {"residual": [-1], "writers": [2]}}, "position 2 is to be split both"),
        ({"expand": ("residual", "writers")}, "a position has one"),
        ({"expand": "features"}, "known: 'writers', 'residual'"),
        ({"expand": {"residual": [9]}}, "position 9 is out of range"),
        ({"residual": "linearise"}, "known: 'terminal', 'recurse'"),
    ],
)
def test_options_that_do_not_fit(options: Any, message: str) -> None:
    lens = sap.FeatureLens(model(), {}, residual_saes=[sae_at(0, "hook_resid_pre", 30)])
    with pytest.raises(sap.InputError, match=message):
        lens.run([1, 2, 3]).attribute(sap.Logit(3), **options)


def test_without_residual_saes() -> None:
    run = sap.FeatureLens(model(), {}).run([1, 2, 3])
    with pytest.raises(sap.InputError, match="without residual SAEs"):
        run.graph(sap.Logit(3), expand="residual")
    with pytest.raises(sap.InputError, match="residual_saes="):
        sap.FeatureLens(model(), [sae_at(0, "hook_resid_pre", 30)])
    with pytest.raises(sap.InputError, match="no SAE on hook_resid_pre in layer 0"):
        run.attribute(sap.Feature(0, 1, 2, "resid"))
