"""Every architecture on every host: ledger, edges against autograd, interventions, wrong rows."""

from __future__ import annotations

import contextlib
import copy
import functools
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from architecture_models import RECIPES, FrozenAutograd
from helpers import ALL_HOSTS, HOSTS, TrueFloat64, on_host, random_sae, random_saes, word_tokenizer
from nnsight import TransformersModel
from torch import Tensor

import sae_attn_plugin as sap
from sae_attn_plugin.backends import architectures
from sae_attn_plugin.backends.architectures import ARCHITECTURES, Architecture
from sae_attn_plugin.interventions.edits import FREEZABLE

# TransformerLens 3 announces that version 4 will drop HookedTransformer.
pytestmark = pytest.mark.filterwarnings("ignore:HookedTransformer is deprecated")

TOKENS = [5, 9, 3, 17, 40, 22, 8, 31, 2]
TARGET = sap.LogitDiff(7, 9)
DTYPES = {"float32": torch.float32, "float64": torch.float64}
ON_HOOKED = [name for name in RECIPES if name not in ("olmo2", "phi3")]
PAIRS = [
    (name, host)
    for name in RECIPES
    for host in HOSTS
    if host != "hooked_transformer" or name in ON_HOOKED
]


@contextlib.contextmanager
def exact(dtype: str) -> Iterator[None]:
    """float64 without the hosts' casts to float32; not to be nested."""
    with TrueFloat64() if dtype == "float64" else contextlib.nullcontext():
        yield


@functools.cache
def _run(name: str, host: str, dtype: str) -> sap.Run:
    model = RECIPES[name].build(DTYPES[dtype])
    with exact(dtype):
        lens = sap.FeatureLens(on_host(model, host), random_saes(model), tokenizer=word_tokenizer())
        return lens.run([TOKENS])


def run_of(name: str, host: str, dtype: str = "float64") -> sap.Run:
    return _run(name, host, dtype)


def attribution_of(name: str, host: str, dtype: str = "float64") -> sap.Attribution:
    return _attribution(name, host, dtype)


@functools.cache
def _attribution(name: str, host: str, dtype: str) -> sap.Attribution:
    run = run_of(name, host, dtype)
    with exact(dtype):
        return run.attribute(TARGET, node_budget=None)


def weights_of(attribution: sap.Attribution) -> Any:
    """Edge weights by (source, target)."""
    return attribution.edges.set_index(["source", "target"])["weight"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "host"), PAIRS)
def test_ledger_closes(name: str, host: str, dtype: str) -> None:
    attribution = attribution_of(name, host, dtype)
    assert len(attribution.ledger) > 100
    attribution.check_closure({"float32": 1e-5, "float64": 1e-10}[dtype])


@pytest.mark.parametrize("name", RECIPES)
def test_edges_match_autograd(name: str) -> None:
    """Every in-edge and the constant of some targets, against autograd through the model itself."""
    attribution = attribution_of(name, "nnsight")
    model = RECIPES[name].build(torch.float64)
    with TrueFloat64():
        oracle = FrozenAutograd(model, random_saes(model), TOKENS)
    ledger, edges = attribution.ledger, attribution.edges
    features = [t for t in ledger.index if str(t).startswith(("attn:1:", "attn:2:"))]
    targets = [ledger.index[0], *features[:3], *features[-3:]]
    for target in targets:
        node = sap.Node.parse(str(target))
        expected, constant = oracle.edges(node, (7, 9))
        of_target = edges[edges["target"] == target]
        found = dict(zip(of_target["source"], of_target["weight"], strict=True))
        size = sum(map(abs, expected.values()))
        assert set(found) <= set(expected)
        for source, weight in expected.items():
            assert abs(found.get(source, 0.0) - weight) <= 1e-10 * size, (target, source)
        assert abs(ledger.loc[target, "constant"] - constant) <= 1e-10 * (size + abs(constant))


@pytest.mark.parametrize(("name", "host"), [pair for pair in PAIRS if pair[1] != "nnsight"])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float64", 1e-6)])
def test_hosts_agree(name: str, host: str, dtype: str, tolerance: float) -> None:
    """In float64 too only to 1e-6: each host has float32 rotary angles of its own."""
    reference, other = (attribution_of(name, h, dtype) for h in ("nnsight", host))
    a, b = (weights_of(one).sort_index() for one in (reference, other))
    assert list(a.index) == list(b.index)
    size = a.abs().groupby(level="target", observed=True).transform("sum")
    relative = (a - b).abs() / size
    assert relative.max() <= tolerance


@pytest.mark.parametrize("name", RECIPES)
def test_heads_sum_to_edges(name: str) -> None:
    attribution = attribution_of(name, "nnsight")
    split = attribution.edges_by_head()
    total: Any = split.groupby(["source", "target"], observed=True)["weight"].sum()
    whole = weights_of(attribution)
    np.testing.assert_allclose(total.reindex(whole.index), whole, atol=1e-12, rtol=1e-9)
    assert split["head"].nunique() == run_of(name, "nnsight").lens.backend.geometry.n_heads


@pytest.mark.parametrize(("name", "host"), PAIRS)
def test_frozen_parts_change_nothing_by_themselves(name: str, host: str) -> None:
    run = run_of(name, host)
    with TrueFloat64():
        for part in (*((p,) for p in FREEZABLE), FREEZABLE):
            logits = run.lens.intervene(run, [], freeze=part).logits
            torch.testing.assert_close(logits, run.logits, atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize(("name", "host"), PAIRS)
def test_frozen_intervention_is_the_edge(name: str, host: str) -> None:
    """Taking a writer away changes targets by its edge, with everything between held."""
    run, attribution = run_of(name, host), attribution_of(name, host)
    edges = weights_of(attribution)
    root = str(attribution.ledger.index[0])
    features = [str(t) for t in attribution.ledger.index if str(t).startswith("attn:2:")]
    rows = {str(run.writers.node(i)): i for i in range(len(run.writers))}
    positions = {0: "embed", 1: "attn_out", 2: "mlp_out"}
    with TrueFloat64():
        for source in ("embed@3", "mlp:1@3", "attn_bias:0@3", "attn_err:1@3"):
            node = sap.Node.parse(source)
            site = {"embed": 0, "mlp": 2}.get(node.kind, 1)
            edit = sap.AddToStream(
                -run.writers.vectors[rows[source]],
                node.position,
                positions[site],  # type: ignore[arg-type]
                -1 if node.layer is None else node.layer,
            )
            result = run.lens.intervene(run, [edit], freeze=FREEZABLE)
            for target in features[:2] + features[-2:]:
                of = sap.Node.parse(target)
                effect = float(result.effect(sap.Feature(2, of.feature or 0, of.position)))
                assert abs(effect + edges.get((source, target), 0.0)) < 1e-10
        # Through the host's own output projection and, where there is one, its post-norm.
        last = [s for s, t in edges.index if t == root and str(s).startswith("attn:2:")]
        for source in last[:2]:
            node = sap.Node.parse(str(source))
            edit = sap.AblateFeature(2, node.feature or 0, node.position)
            for freeze in (("patterns", "norms", "mlp"), FREEZABLE):
                result = run.lens.intervene(run, [edit], freeze=freeze)
                assert abs(float(result.effect(TARGET)) + edges[source, root]) < 1e-10
        # From layer 0, everything between held but what the edit itself writes.
        below = [
            (s, t) for s, t in edges.index if str(s)[:7] == "attn:0:" and str(t)[:7] == "attn:2:"
        ]
        for source, target in below[:: max(1, len(below) // 3)]:
            node, of = sap.Node.parse(source), sap.Node.parse(target)
            edit = sap.AblateFeature(0, node.feature or 0, node.position)
            result = run.lens.intervene(run, [edit], freeze=FREEZABLE)
            effect = float(result.effect(sap.Feature(2, of.feature or 0, of.position)))
            assert abs(effect + edges[source, target]) < 1e-10


def test_free_run_feels_the_norms_that_freezing_holds() -> None:
    run = run_of("gemma2", "nnsight")
    edges = attribution_of("gemma2", "nnsight").edges
    source = next(s for s in edges["source"] if str(s).startswith("attn:2:") and "@8" in str(s))
    node = sap.Node.parse(str(source))
    edit = sap.AblateFeature(2, node.feature or 0, node.position)
    with TrueFloat64():
        frozen, free = (
            float(run.lens.intervene(run, [edit], freeze=freeze).effect(TARGET))
            for freeze in (("patterns", "norms", "mlp"), ("patterns", "mlp"))
        )
    assert abs(frozen - free) > 1e-4


# -- soft-caps -----------------------------------------------------------------------------------


@pytest.mark.parametrize("host", HOSTS)
def test_logit_targets_are_read_before_the_soft_cap(host: str) -> None:
    run = run_of("gemma2", host)
    with TrueFloat64():
        value = run.attribute(sap.Logit(7), node_budget=0).ledger["value"].iloc[0]
        result = run.lens.intervene(run, [])
    assert float(run.logits[0, -1, 7]) == pytest.approx(6 * np.tanh(value / 6), rel=1e-12)
    assert abs(value - float(run.logits[0, -1, 7])) > 1e-4
    assert float(result.value(sap.Logit(7))) == pytest.approx(value, rel=1e-12)


def test_table_in_the_docs_is_current() -> None:
    """``python tests/architecture_table.py`` writes it anew."""
    from architecture_table import HOSTS_PAGE, with_table

    text = HOSTS_PAGE.read_text(encoding="utf-8")
    assert with_table(text) == text


# -- what is refused -----------------------------------------------------------------------------


def test_unknown_architecture_is_refused_by_name() -> None:
    from transformers import BloomConfig, BloomForCausalLM

    model = BloomForCausalLM(BloomConfig(vocab_size=61, hidden_size=16, n_layer=1, n_head=2)).eval()
    with pytest.raises(sap.UnsupportedError, match=r"'bloom' is not known.*register_architecture"):
        sap.FeatureLens(model, random_sae(0, 16))
    with pytest.raises(sap.UnsupportedError, match="'bloom'"):
        sap.FeatureLens(on_host(model, "transformer_bridge"), random_sae(0, 16))


@pytest.mark.parametrize(
    ("name", "reason"), [("olmo2", "grouped-query attention in OLMo-2"), ("phi3", "'phi3' model")]
)
def test_hooked_transformer_refuses_what_it_cannot_hold(name: str, reason: str) -> None:
    with pytest.raises(sap.UnsupportedError, match=f"(?s){reason}.*TransformerBridge"):
        on_host(RECIPES[name].build(), "hooked_transformer")


class _Shuffled(Architecture):
    """Values read with the dimension of a head before the head."""

    def select_values(self, out: Tensor, geometry: Any) -> Tensor:
        right = super().select_values(out, geometry)
        return right.transpose(-1, -2).reshape(right.shape)


def _shuffled(row: Architecture) -> Architecture:
    return _Shuffled(**vars(row))


WRONG_ROWS = {
    "interleaved read as stacked": ("gpt_neox", {"layout": "stacked"}, "pattern @ v"),
    "stacked read as interleaved": ("gpt2", {"layout": "interleaved"}, "pattern @ v"),
    "no 1 + in norms": ("gemma", {"norm_offset": 0.0}, "W_V"),
    "1 + where there is none": ("llama", {"norm_offset": 1.0}, "W_V"),
    "post-norm of attention forgotten": ("gemma2", {"post_norm": None}, "input of the MLP"),
    "post-norm of the MLP forgotten": ("gemma2", {"mlp_post_norm": None}, "writers sum"),
    "only post-norms, read as pre-norms": (
        "olmo2",
        {"norm": "post_attention_layernorm", "post_norm": None},
        "W_V",
    ),
    "soft-cap forgotten": ("gemma2", {"logit_soft_cap": None}, "logits"),
    "other kind of norm": ("gpt2", {"norm_kind": "rms"}, "W_V"),
    "positions forgotten": ("gpt2", {"pos_embed": None}, "writers sum"),
}


@pytest.mark.parametrize("case", WRONG_ROWS)
def test_wrong_rows_are_refused(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, changes, identity = WRONG_ROWS[case]
    wrong = replace(ARCHITECTURES[name], **changes)
    monkeypatch.setitem(ARCHITECTURES, name, wrong)
    model = RECIPES[name].build()
    with pytest.raises(sap.BackendError, match=identity):
        sap.FeatureLens(model, random_saes(model))


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "llama"])
def test_values_with_dimensions_before_heads_are_refused(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ARCHITECTURES, name, _shuffled(ARCHITECTURES[name]))
    model = RECIPES[name].build()
    with pytest.raises(sap.BackendError, match="W_V"):
        sap.FeatureLens(model, random_saes(model))


def test_forgotten_parallel_blocks_change_the_frozen_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Frozen MLP norms would read attention's output, which the parallel MLP does not."""
    monkeypatch.setitem(
        ARCHITECTURES, "gpt_neox", replace(ARCHITECTURES["gpt_neox"], parallel=False)
    )
    model = RECIPES["gpt_neox"].build()
    with pytest.raises(sap.BackendError, match="input of the MLP"):
        sap.FeatureLens(model, random_saes(model))


@pytest.mark.parametrize("name", ["mistral", "gemma2", "gemma3_text", "phi3"])
@pytest.mark.parametrize("host", ["transformer_bridge", "nnsight"])
def test_patterns_keep_to_the_window(name: str, host: str) -> None:
    """A pattern without its window would not be the model's: no edge reaches beyond it."""
    run, edges = run_of(name, host), attribution_of(name, host).edges
    pattern = run.frozen.layers[0].pattern
    assert not pattern[:, 8, :5].any()
    assert pattern[:, 8, 5:].all()
    sources = {
        sap.Node.parse(str(source)).position
        for source, target in zip(edges["source"], edges["target"], strict=True)
        if re.fullmatch(r"attn:[02]:\d+@8", str(target))
    }
    assert sources == {5, 6, 7, 8}


def test_a_forgotten_window_breaks_the_hosts_agreement() -> None:
    """The same weights without a window are another model: the comparison of hosts sees it."""
    plain = replace(RECIPES["mistral"], settings={"sliding_window": None}).build(torch.float64)
    with TrueFloat64():
        hooked = on_host(plain, "hooked_transformer")
        lens = sap.FeatureLens(hooked, random_saes(plain), tokenizer=word_tokenizer())
        wider = lens.run([TOKENS]).attribute(TARGET, node_budget=None)
    reference = attribution_of("mistral", "nnsight")
    assert weights_of(wider).sub(weights_of(reference), fill_value=0).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layout": "mixed"}, "layout='mixed'"),
        ({"norm_kind": "batch"}, "norm_kind='batch'"),
        ({"norm": None, "norm_kind": "layer"}, "none before attention"),
    ],
)
def test_rows_that_make_no_sense(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(sap.SaeAttnError, match=message):
        replace(ARCHITECTURES["llama"], **changes)


def test_a_row_names_modules_that_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = replace(ARCHITECTURES["llama"], values="self_attn.w_v")
    monkeypatch.setitem(ARCHITECTURES, "llama", wrong)
    model = RECIPES["llama"].build()
    with pytest.raises(sap.UnsupportedError, match=r"'model.layers.0.self_attn.w_v'"):
        sap.FeatureLens(model, random_saes(model))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parallel": "is_parallel"}, "has no field 'is_parallel'"),
        ({"norm": "mlp"}, "LlamaMLP is no norm with an epsilon"),
        ({"blocks": "model.blocks"}, "no module 'model.blocks'"),
    ],
)
def test_rows_that_do_not_fit_the_model(
    changes: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ARCHITECTURES, "llama", replace(ARCHITECTURES["llama"], **changes))
    model = RECIPES["llama"].build()
    with pytest.raises(sap.UnsupportedError, match=message):
        sap.FeatureLens(model, random_saes(model))


def test_attention_that_returns_no_weights_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = RECIPES["llama"].build()
    attention = type(model.model.layers[0].self_attn)
    forward = attention.forward
    monkeypatch.setattr(attention, "forward", lambda *a, **k: (forward(*a, **k)[0], None))
    with pytest.raises(sap.BackendError, match=r"'self_attn' returned no attention weights"):
        sap.FeatureLens(model, random_saes(model))


# -- what users add ------------------------------------------------------------------------------


def test_made_up_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    from architecture_models import made_up_model

    monkeypatch.setattr(architectures, "ARCHITECTURES", dict(ARCHITECTURES))
    model = made_up_model(torch.float64)
    saes = [random_sae(layer, 20, dtype="float64") for layer in range(2)]
    with pytest.raises(sap.UnsupportedError, match="'made_up' is not known"):
        sap.FeatureLens(model, saes)
    sap.register_architecture(
        sap.Architecture(
            model_type="made_up",
            blocks="trunk",
            embed="words",
            pos_embed="places",
            final_norm="last",
            unembed="speak",
            attention="look",
            out_projection="look.out",
            values="look.qkv",
            mlp="think",
            norm=None,
            mlp_norm="before_think",
            post_norm="after_look",
            layout="interleaved",
            norm_kind="rms",
            norm_offset=0.5,
        )
    )
    lens = sap.FeatureLens(model, saes)
    run = lens.run([TOKENS])
    attribution = run.attribute(TARGET, node_budget=None)
    attribution.check_closure(1e-10)
    logits = lens.intervene(run, [], freeze=FREEZABLE).logits
    torch.testing.assert_close(logits, run.logits, atol=1e-11, rtol=1e-11)


def test_registering_something_else() -> None:
    with pytest.raises(sap.InputError, match="expected an Architecture, got dict"):
        sap.register_architecture({"model_type": "x"})  # type: ignore[arg-type]


# -- TransformerLens' own small models -----------------------------------------------------------


def toy(**settings: Any) -> Any:
    from helpers import randomize
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    torch.manual_seed(0)
    cfg = HookedTransformerConfig(
        **{
            "n_layers": 3,
            "d_model": 20,
            "n_ctx": 40,
            "d_head": 6,
            "n_heads": 5,
            "d_vocab": 61,
            "d_mlp": 24,
            "act_fn": "gelu",
            "normalization_type": "LN",
            "device": "cpu",
            "dtype": torch.float64,
            **settings,
        }
    )
    model = HookedTransformer(cfg).eval()
    randomize(model, size=0.2)
    return model


@pytest.mark.parametrize("normalization", [None, "LN", "LNPre", "RMS", "RMSPre"])
@pytest.mark.parametrize("attn_only", [False, True])
@pytest.mark.parametrize("positions", ["standard", "rotary", "alibi"])
def test_toy_models(normalization: str | None, attn_only: bool, positions: str) -> None:
    model = toy(
        normalization_type=normalization,
        attn_only=attn_only,
        positional_embedding_type=positions,
        **({"rotary_dim": 6} if positions == "rotary" else {}),
    )
    lens = sap.FeatureLens(model, [random_sae(i, 30, dtype="float64") for i in range(3)])
    run = lens.run([TOKENS])
    attribution = run.attribute(TARGET, node_budget=None)
    attribution.check_closure(1e-10)
    kinds = {str(n).split(":")[0].split("@")[0] for n in attribution.edges["source"]}
    assert ("mlp" in kinds) is not attn_only
    assert ("pos" in kinds) is (positions == "standard")
    logits = lens.intervene(run, [], freeze=FREEZABLE).logits
    torch.testing.assert_close(logits, run.logits, atol=1e-11, rtol=1e-11)


def test_shortformer_positions_are_refused() -> None:
    with pytest.raises(sap.UnsupportedError, match="'shortformer' is not supported"):
        sap.FeatureLens(toy(positional_embedding_type="shortformer"), random_sae(0, 30))


# -- prompts of unequal length -------------------------------------------------------------------

UNEQUAL = [[5, 9, 3, 17], [5, 9, 3, 17, 40, 22, 8], [2, 31, 7, 4], [11]]


@pytest.mark.parametrize(
    ("name", "host"), [pair for pair in PAIRS if pair[0] in ("gpt2", "gemma2")]
)
def test_prompts_of_unequal_length_are_as_alone(name: str, host: str) -> None:
    lens = run_of(name, host).lens
    with TrueFloat64():
        together = lens.run(UNEQUAL)
        alone = [lens.run([tokens]) for tokens in UNEQUAL]
        assert len(together) == len(UNEQUAL)
        for one, other in zip((together[i] for i in range(4)), alone, strict=True):
            assert one.tokens.tolist() == other.tokens.tolist()
            torch.testing.assert_close(one.logits, other.logits, atol=1e-12, rtol=1e-12)
            a, b = (run.attribute(TARGET, node_budget=None) for run in (one, other))
            np.testing.assert_allclose(weights_of(a), weights_of(b), atol=1e-11)
    features = together.features()
    assert features["prompt"].unique().tolist() == [0, 1, 2, 3]


def test_strings_of_unequal_length() -> None:
    lens = run_of("llama", "nnsight").lens
    run = lens.run(["w5 w9", "w5 w9 w3 w17"])
    assert [run[i].token_strings[-1] for i in range(2)] == ["w9", "w17"]
    assert run[-1].prompts == ("w5 w9 w3 w17",)
    assert repr(run) == "Run of 2 prompts, 2, 4 tokens"
    for refused in (lambda: run.tokens, lambda: run.logits):
        with pytest.raises(sap.InputError, match=r"2 to 4 tokens.*run\[i\]"):
            refused()
    with pytest.raises(sap.InputError, match="pick one"):
        run.attribute(TARGET)
    with pytest.raises(sap.InputError, match="make no rectangle"):
        lens.to_tokens(["w5", "w5 w9"])
    with pytest.raises(IndexError):
        run[2]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("host", ALL_HOSTS)
def test_a_pad_token_in_a_prompt_is_a_token(host: str, side: str) -> None:
    """No host takes it for padding: nothing is masked and positions count from 0."""
    model = RECIPES["gpt2"].build()
    tokens = torch.tensor([[0, 0, 5, 9, 0]])  # 0 is the tokenizer's padding token
    tokenizer = copy.deepcopy(word_tokenizer())
    hosted = on_host(model, host, tokenizer)
    for one in (tokenizer, getattr(hosted, "tokenizer", None)):
        if one is not None:
            one.padding_side = side  # nnsight turns it to the left in a tokenizer it is given
    lens = sap.FeatureLens(hosted, random_saes(model), tokenizer=tokenizer)
    with torch.no_grad():
        expected = model(tokens, attention_mask=torch.ones_like(tokens)).logits
    torch.testing.assert_close(lens.run(tokens).logits, expected, atol=1e-4, rtol=1e-4)


# -- half precision and offloaded weights --------------------------------------------------------


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 5e-2), (torch.float16, 5e-3)])
@pytest.mark.parametrize(
    ("name", "host"), [pair for pair in PAIRS if pair[0] in ("gpt2", "gptj", "gemma2", "olmo2")]
)
def test_half_precision(name: str, host: str, dtype: torch.dtype, bound: float) -> None:
    model = RECIPES[name].build(dtype)
    saes = random_saes(model, dtype="float32")
    lens = sap.FeatureLens(on_host(model, host), saes, tokenizer=word_tokenizer())
    run = lens.run([TOKENS])
    assert run.logits.dtype == run.capture["z", 0].dtype == dtype
    attribution = run.attribute(TARGET, node_budget=None)
    assert attribution.flow.weight.dtype == np.float32
    assert 1e-5 < attribution.worst_residual < bound  # reported, since the host rounds
    again = lens.intervene(run, [], freeze=FREEZABLE)
    assert again.logits.dtype == dtype
    assert abs(float(again.effect(TARGET))) < 0.05


@pytest.mark.parametrize("how", ["cpu", "disk", "dispatch"])
@pytest.mark.parametrize("name", ["gpt2", "gemma2"])
def test_weights_that_accelerate_keeps_elsewhere(name: str, how: str, tmp_path: Any) -> None:
    import accelerate

    model: Any = RECIPES[name].build()
    saes, device = random_saes(model), torch.device("cpu")
    match how:
        case "cpu":
            accelerate.cpu_offload(model, execution_device=device)
        case "disk":
            accelerate.disk_offload(model, tmp_path, execution_device=device)
        case "dispatch":
            accelerate.dispatch_model(model, device_map={"": "cpu"}, force_hooks=True)
    weights = {parameter.device.type for parameter in model.parameters()}
    lens = sap.FeatureLens(model, saes, tokenizer=word_tokenizer())
    run = lens.run([TOKENS])
    found = weights_of(run.attribute(TARGET, node_budget=None))
    pd.testing.assert_series_equal(found, weights_of(attribution_of(name, "nnsight", "float32")))
    assert lens.backend.geometry.device == device
    assert {parameter.device.type for parameter in model.parameters()} == weights
    logits = lens.intervene(run, [], freeze=FREEZABLE).logits
    torch.testing.assert_close(logits, run.logits, atol=1e-4, rtol=1e-4)


# -- remote --------------------------------------------------------------------------------------


def remote_pair(name: str) -> tuple[sap.FeatureLens, sap.FeatureLens]:
    """The same model here and through nnsight's simulation of a remote run."""
    model = RECIPES[name].build()
    wrapped, saes = TransformersModel(model, tokenizer=word_tokenizer()), random_saes(model)
    return sap.FeatureLens(wrapped, saes), sap.FeatureLens(wrapped, saes, remote="local")


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "gpt_neox"])
def test_remote_gives_the_same_graph_and_interventions(name: str) -> None:
    here, there = (lens.run([TOKENS]) for lens in remote_pair(name))
    a, b = (run.attribute(TARGET, node_budget=None) for run in (here, there))
    pd.testing.assert_frame_equal(a.edges, b.edges)
    pd.testing.assert_frame_equal(a.ledger, b.ledger)
    assert set(here.graph(TARGET).edges) == set(there.graph(TARGET).edges)
    vector = torch.linspace(-1, 1, here.frozen.embed.shape[1])
    for edits, freeze in (
        ([], FREEZABLE),
        ([sap.AblateFeature(1, 3), sap.SetFeature(2, 5, -1, 2.0)], ()),
        ([sap.AblateFeature(0, 3)], ("patterns", "norms")),
        ([sap.PatchEdge("attn_out:0", "query:2.1"), sap.PatchEdge("mlp:0", "key:2")], ("norms",)),
        ([sap.AddToStream(vector, 2), sap.AddToStream(vector, 3, "attn_out", 1)], ("norms", "mlp")),
    ):
        one, other = (run.lens.intervene(run, edits, freeze) for run in (here, there))
        torch.testing.assert_close(one.logits, other.logits, atol=0, rtol=0)
        torch.testing.assert_close(one.effect(TARGET), other.effect(TARGET), atol=0, rtol=0)
    edits = [sap.PatchEdge("attn_out:0", "query:2.1"), sap.Steer(2, 3, 4, 1.0)]
    one, other = (run.lens.intervene(run, edits, patterns=[2]) for run in (here, there))
    torch.testing.assert_close(one.patterns[2], other.patterns[2], atol=0, rtol=0)
    torch.testing.assert_close(one.read["attn", 2], other.read["attn", 2], atol=0, rtol=0)


@pytest.mark.parametrize("architecture", ["jumprelu", "topk_rescaled", "gated"])
def test_every_kind_of_sae_can_be_edited_remotely(architecture: str) -> None:
    model = RECIPES["gpt2"].build()
    wrapped = TransformersModel(model, tokenizer=word_tokenizer())
    saes = random_saes(model, architecture)
    effects = []
    for remote in (False, "local"):
        lens = sap.FeatureLens(wrapped, saes, remote=remote)
        run = lens.run([TOKENS])
        feature = int(run.features(layer=1)["feature"].iloc[0])
        effects.append(float(lens.intervene(run, [sap.AblateFeature(1, feature)]).effect(TARGET)))
    assert effects[0] == effects[1] != 0


def test_remote_needs_no_weights_here(tmp_path: Any) -> None:
    """A model on the meta device, whose other side uses attention that returns no weights."""
    model = RECIPES["llama"].build()
    model.save_pretrained(tmp_path)
    wrapped = TransformersModel(str(tmp_path), tokenizer=word_tokenizer(), task="text-generation")
    assert all(parameter.is_meta for parameter in wrapped._module.parameters())
    before = wrapped._module.config._attn_implementation
    assert before != "eager"
    run = sap.FeatureLens(wrapped, random_saes(model), remote="local").run("w5 w9 w3")
    assert wrapped._module.config._attn_implementation == before
    assert torch.is_grad_enabled()
    assert not any(value.requires_grad for value in run.capture.values.values())
    found = run.attribute(TARGET, node_budget=None)
    local = sap.FeatureLens(model, random_saes(model), tokenizer=word_tokenizer()).run("w5 w9 w3")
    expected = local.attribute(TARGET, node_budget=None)
    pd.testing.assert_series_equal(weights_of(found), weights_of(expected))


def test_what_crosses_the_wire(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sizes that docs/hosts.md gives."""
    from nnsight.schema.request import RequestModel

    sent: list[int] = []
    serialize = RequestModel.serialize

    def counted(*args: Any, **kwargs: Any) -> bytes:
        sent.append(len(blob := serialize(*args, **kwargs)))
        return blob

    monkeypatch.setattr(RequestModel, "serialize", staticmethod(counted))
    lens = remote_pair("llama")[1]
    run = lens.run([TOKENS])
    g, n = lens.backend.geometry, len(TOKENS)
    per_layer = n * (3 * g.d_model + (g.n_heads + g.n_kv_heads) * g.d_head) + g.n_heads * n**2
    numbers = g.n_layers * per_layer + n * (2 * g.d_model + g.d_vocab)
    assert sum(value.numel() for value in run.capture.values.values()) == numbers
    assert max(sent) < 32_000  # code, paths and token ids


def test_remote_is_refused_where_it_means_nothing() -> None:
    model = RECIPES["gpt2"].build()
    for wrong in (model, on_host(model, "nnsight")):
        with pytest.raises(sap.InputError, match=r"load it as nnsight\.TransformersModel"):
            sap.FeatureLens(wrong, random_saes(model), remote="local")
    with pytest.raises(sap.InputError, match="needs an nnsight model, not HookedTransformer"):
        sap.FeatureLens(on_host(model, "hooked_transformer"), random_saes(model), remote=True)


def test_a_remote_model_in_training_mode_is_refused() -> None:
    model = RECIPES["gpt2"].build().train()
    wrapped = TransformersModel(model, tokenizer=word_tokenizer())
    with pytest.raises(sap.InputError, match="training mode"):
        sap.FeatureLens(wrapped, random_saes(model), remote="local")
