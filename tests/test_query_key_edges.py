"""Edges into queries and keys: path patching of where heads look, against hooks on the model."""

from __future__ import annotations

import functools
from typing import Any

import pandas as pd
import pytest
import torch
from architecture_models import RECIPES
from conftest import LensMaker
from helpers import HOSTS, TINY, on_host, random_saes, word_tokenizer

import sae_attn_plugin as sap
from sae_attn_plugin.backends.protocol import Site
from sae_attn_plugin.interventions.plan import Plan

F32 = torch.float32
TOKENS = [3, 57, 7, 19, 7, 13, 2, 41, 23]
OTHER = [5, 9, 7, 44, 31, 13, 8, 2, 3]
LAYER, HEAD = 2, 4
SEPARATE = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "olmo2")
SHARED = ("gpt2", "gpt_neox", "gpt_neox_sequential", "gptj", "phi3")


@functools.cache
def recipe_lens(name: str, host: str = "nnsight") -> tuple[Any, sap.FeatureLens]:
    model: Any = RECIPES[name].build(F32)
    return model, sap.FeatureLens(
        on_host(model, host), random_saes(model), tokenizer=word_tokenizer()
    )


def by_hooks(model: Any, layer: int, side: str, change: torch.Tensor, head: int | None) -> Any:
    """Logits and pattern of a plain Hugging Face model whose projection of queries or keys reads
    another stream, at one head's output or at all."""
    block = model.model.layers[layer]
    projection = getattr(block.self_attn, {"query": "q_proj", "key": "k_proj"}[side])
    norm = getattr(block, "input_layernorm", torch.nn.Identity())  # OLMo-2 has none
    d_head = block.self_attn.head_dim
    live = {}

    def keep(_module: Any, args: Any, kwargs: Any) -> None:
        live["x"] = args[0] if args else kwargs["hidden_states"]

    def project(module: Any, _args: Any, out: torch.Tensor) -> torch.Tensor:
        x = norm(live["x"] + change)
        moved = torch.nn.functional.linear(x, module.weight, module.bias)
        if head is None:
            return moved
        out = out.clone()
        out[..., head * d_head : (head + 1) * d_head] = moved[
            ..., head * d_head : (head + 1) * d_head
        ]
        return out

    handles = [
        block.register_forward_pre_hook(keep, with_kwargs=True),
        projection.register_forward_hook(project),
    ]
    try:
        with torch.no_grad():
            out = model(torch.tensor([TOKENS]), output_attentions=True)
    finally:
        for handle in handles:
            handle.remove()
    return out.logits, out.attentions[layer]


@pytest.mark.parametrize("side", ["query", "key"])
@pytest.mark.parametrize("name", SEPARATE)
def test_another_stream_in_front_of_a_projection(name: str, side: str) -> None:
    """On every architecture with separate projections: rotary positions, sliding windows, soft-caps
    and norms of queries and keys included."""
    model, lens = recipe_lens(name)
    run = lens.run([TOKENS])
    change = -run.capture["attn_out", 0]
    result = lens.intervene(run, [sap.PatchEdge("attn_out:0", f"{side}:{LAYER}")], patterns=[LAYER])
    logits, pattern = by_hooks(model, LAYER, side, change, None)
    torch.testing.assert_close(result.logits, logits, rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(result.patterns[LAYER], pattern, rtol=1e-5, atol=1e-6)
    assert (pattern - run.capture["pattern", LAYER]).abs().max() > 1e-3

    at, one = 5, torch.zeros_like(change)
    one[:, at] = lens.run([OTHER]).capture["attn_out", 0][:, at] + change[:, at]
    edge = sap.PatchEdge("attn_out:0", f"{side}:{LAYER}", at, to=sap.From("other"))
    got = lens.intervene(run, [edge], sources={"other": lens.run([OTHER])}).logits
    expected, _ = by_hooks(model, LAYER, side, one, None)
    torch.testing.assert_close(got, expected, rtol=2e-5, atol=2e-5)
    if side == "query" and name != "olmo2":  # whose query norm is one of all heads
        got = lens.intervene(run, [sap.PatchEdge("attn_out:0", f"query:{LAYER}.{HEAD}")]).logits
        expected, _ = by_hooks(model, LAYER, side, change, HEAD)
        torch.testing.assert_close(got, expected, rtol=2e-5, atol=2e-5)
        assert (expected - logits).abs().max() > 1e-4


@pytest.mark.parametrize("name", [*SHARED, "gemma2", "qwen3", "olmo2", "mistral"])
def test_with_norms_held_scores_change_by_the_edge(name: str) -> None:
    """The new pattern is the softmax of the clean scores less the edges into them, on both sides:
    no hook is involved, so architectures with one projection for all three are here too."""
    _, lens = recipe_lens(name)
    run = lens.run([TOKENS])
    query, cap = 7, run.qk(LAYER, HEAD, 7, 7).soft_cap
    keys = run.qk(LAYER, HEAD, query, query).row_keys
    before = torch.tensor([run.qk(LAYER, HEAD, query, key).score for key in keys])
    for side in ("query", "key"):
        targets = [sap.HeadScore(LAYER, HEAD, query, key, side) for key in keys]
        edges = run.attribute(targets, node_budget=0).edges
        edges = edges.astype({"source": str, "target": str}).set_index(["target", "source"])
        scores, writer = before.clone(), "attn_bias:0"
        patched = []
        for i, key in enumerate(keys):
            at = query if side == "query" else key
            name_of = f"score:{LAYER}.{HEAD}:{key}:{side}@{query}"
            scores[i] -= float(edges.loc[(name_of, f"{writer}@{at}"), "weight"])
            patched.append(sap.PatchEdge(writer, f"{side}:{LAYER}.{HEAD}", at))
        result = lens.intervene(run, list(dict.fromkeys(patched)), ["norms"], patterns=[LAYER])
        capped = scores if cap is None else cap * (scores / cap).tanh()
        got = result.patterns[LAYER][0, HEAD, query, list(keys)]
        torch.testing.assert_close(got, capped.softmax(0), rtol=1e-4, atol=1e-5)
        assert (got - run.capture["pattern", LAYER][0, HEAD, query, list(keys)]).abs().max() > 1e-4


@pytest.mark.parametrize("model", TINY)
def test_hosts_agree(lens_of: LensMaker, model: str) -> None:
    edges = [
        sap.PatchEdge("attn:0:7", f"query:{LAYER}.1", to=sap.From("other")),
        sap.PatchEdge("mlp:0", f"key:{LAYER}", 4),
        sap.PatchEdge("attn_err:1", f"key:{LAYER}.3"),
        sap.PatchEdge("head:0.2", f"value:{LAYER}.3"),
    ]
    found = []
    for host in HOSTS:
        lens = lens_of(model, host, F32)
        run = lens.run([TOKENS, OTHER])
        result = lens.intervene(run, edges, sources={"other": lens.run([OTHER, TOKENS])})
        assert not torch.allclose(result.logits, run.logits, atol=1e-4)
        torch.testing.assert_close(result[1].logits, result.logits[1:])
        found.append(result.logits)
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("model", TINY)
def test_scores_after_an_edit_are_the_model_s(lens_of: LensMaker, model: str) -> None:
    """Against TransformerLens' own scores, with a head of layer 0 taken out by hooks."""
    lens = lens_of(model, "hooked_transformer", F32)
    run = lens.run([TOKENS, OTHER])
    result = lens.intervene(run, [sap.AblateHead(0, 1)], scores=[1, LAYER])
    host: Any = lens.backend.model  # type: ignore[attr-defined]
    seen = {}

    def ablate(z: torch.Tensor, hook: Any) -> torch.Tensor:  # noqa: ARG001
        z = z.clone()
        z[:, :, 1] = 0
        return z

    def keep(value: torch.Tensor, hook: Any) -> None:
        seen[hook.layer()] = value

    hooks = [(f"blocks.{layer}.attn.hook_attn_scores", keep) for layer in (1, LAYER)]
    with torch.no_grad():
        host.run_with_hooks(run.tokens, fwd_hooks=hooks)
        clean = dict(seen)
        host.run_with_hooks(run.tokens, fwd_hooks=[("blocks.0.attn.hook_z", ablate), *hooks])
    below = torch.ones(len(TOKENS), len(TOKENS)).tril().bool()
    for layer in (1, LAYER):
        got = result.scores(layer)
        torch.testing.assert_close(got[..., below], seen[layer][..., below], rtol=1e-5, atol=1e-5)
        target = sap.HeadScore(layer, HEAD, -2, 4)
        changed = (seen[layer] - clean[layer])[:, HEAD, -2, 4]
        torch.testing.assert_close(result.effect(target), changed, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(result[1].effect(target), changed[1:], rtol=1e-4, atol=1e-5)
        assert changed.abs().min() > 1e-3
    uneven = lens.run([TOKENS, OTHER[:6]])
    found = lens.intervene(uneven, [sap.AblateHead(0, 1)], scores=[LAYER])
    target = sap.HeadScore(LAYER, HEAD, 5, 4)
    torch.testing.assert_close(found.effect(target), result.effect(target), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [*SEPARATE, *SHARED])
def test_scores_give_the_patterns_of_the_edited_model(name: str) -> None:
    """Those of the host where an edit comes before, those mixed anew where an edge reads."""
    _, lens = recipe_lens(name)
    run = lens.run([TOKENS])
    vector = torch.linspace(-1, 1, lens.backend.geometry.d_model)
    edits: list[sap.Edit] = [sap.AblateHead(0, 1), sap.AddToStream(vector, 2)]
    edge = sap.PatchEdge("attn_out:1", f"query:{LAYER}.{HEAD}")
    cap = run.qk(LAYER, HEAD, 7, 7).soft_cap
    seen = run.capture["pattern", LAYER] > 0
    for given in (edits, [*edits, edge]):
        result = lens.intervene(run, given, patterns=[LAYER], scores=[LAYER])
        scores = result.scores(LAYER)
        capped = scores if cap is None else cap * (scores / cap).tanh()
        got = capped.masked_fill(~seen, -torch.inf).softmax(-1)
        torch.testing.assert_close(got, result.patterns[LAYER], rtol=1e-4, atol=1e-5)
        assert (got - run.capture["pattern", LAYER]).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "qwen3", "olmo2"])
def test_a_score_moves_by_its_edge(name: str) -> None:
    """With everything held, a feature that is taken out takes its edge along, on either side; both
    sides together add their product."""
    _, lens = recipe_lens(name)
    run = lens.run([TOKENS])
    query, key = 7, 5
    both, *sides = (sap.HeadScore(LAYER, HEAD, query, key, s) for s in ("both", "query", "key"))
    edges = run.attribute(sides, node_budget=0).edges.astype({"source": str, "target": str})
    scale = float(edges["weight"].abs().sum())
    frame = edges[edges["source"].str.startswith("attn:")].groupby("source")["weight"].sum()
    everything = ("patterns", "norms", "mlp", "attention")
    for name_of, weight in frame.iloc[:: len(frame) // 5].items():
        node = sap.Node.parse(str(name_of))
        assert node.layer is not None
        assert node.feature is not None
        edit = sap.AblateFeature(node.layer, node.feature, node.position)
        result = lens.intervene(run, [edit], everything, scores=[LAYER])
        effects = [float(result.effect(side)) for side in sides]
        assert sum(effects) == pytest.approx(-weight, abs=1e-5 * scale)
        assert effects[node.position == query] == pytest.approx(0, abs=1e-6 * scale)
        # one position writes only one side, so nothing is in both
        assert float(result.effect(both)) == pytest.approx(sum(effects), abs=1e-5 * scale)
    moved = lens.intervene(run, [sap.AblateHead(0, 1)], ["norms"], scores=[LAYER])
    alone = [float(moved.effect(side)) for side in sides]
    assert abs(float(moved.effect(both)) - sum(alone)) > 1e-5
    assert float(moved.clean_value(both)) == pytest.approx(
        run.qk(LAYER, HEAD, query, key).score, rel=1e-4, abs=1e-5
    )


@pytest.mark.parametrize("model", TINY)
def test_query_key_and_value_of_one_head(lens_of: LensMaker, model: str) -> None:
    """All three inputs of a head at once: its z is that of a run where all heads are changed."""
    lens = lens_of(model, "hooked_transformer", F32)
    run = lens.run([TOKENS])
    sides = ("query", "key", "value")

    def z(readers: list[str]) -> torch.Tensor:
        edges = [sap.PatchEdge("attn_out:0", reader) for reader in readers]
        return lens.intervene(run, edges).z[LAYER]

    whole = z([f"{side}:{LAYER}" for side in sides])
    alone = z([f"{side}:{LAYER}.{HEAD}" for side in sides])
    torch.testing.assert_close(alone[:, :, HEAD], whole[:, :, HEAD], rtol=1e-5, atol=1e-6)
    rest = [head for head in range(whole.shape[2]) if head != HEAD]
    torch.testing.assert_close(alone[:, :, rest], run.capture["z", LAYER][:, :, rest])
    # an edge into one head beside those into all: the other heads see the latter alone
    both = z([*(f"{side}:{LAYER}" for side in sides), f"query:{LAYER}.{HEAD}"])
    torch.testing.assert_close(both[:, :, rest], whole[:, :, rest], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("host", HOSTS)
def test_features_read_what_the_head_gives_now(lens_of: LensMaker, host: str) -> None:
    """A feature edited in the layer is read after the new pattern, held attention or not."""
    lens = lens_of("llama", host, F32)
    run = lens.run([TOKENS])
    edge = sap.PatchEdge("attn_out:0", f"query:{LAYER}")
    edit = sap.Steer(LAYER, 5, 6, 2.0)
    dictionary = lens.dictionaries[LAYER]
    decoder = dictionary.decoder(torch.tensor([5]), F32)[0]
    for freeze in ((), ("attention",)):
        edge_alone = lens.intervene(run, [edge], freeze)
        both = lens.intervene(run, [edge, edit], freeze)
        torch.testing.assert_close(both.read["attn", LAYER], edge_alone.z[LAYER])
        torch.testing.assert_close(both.z[LAYER][0, 6], edge_alone.z[LAYER][0, 6] + 2 * decoder)
        steered = lens.intervene(run, [edit], freeze)
        moved = (both.logits - steered.logits).abs().max()
        assert moved > 1e-4


def test_new_tokens_are_looked_at_with_the_change(lens_of: LensMaker) -> None:
    lens = lens_of("llama", "hooked_transformer", F32)
    run = lens.run([TOKENS[:5]])
    edges = [
        sap.PatchEdge("attn_out:0", f"query:{LAYER}"),
        sap.PatchEdge("attn_out:1", f"key:{LAYER}.3"),
    ]
    result = lens.intervene(run, edges, max_new_tokens=3)
    tokens = run.tokens
    assert result.generated is not None
    for expected in result.generated[0].tolist():
        logits = lens.intervene(lens.run(tokens), edges).logits
        assert int(logits[0, -1].argmax()) == expected
        tokens = torch.cat([tokens, torch.tensor([[expected]])], 1)


def test_an_edge_of_a_graph_of_a_score() -> None:
    _, lens = recipe_lens("llama")
    run = lens.run([TOKENS])
    target = sap.HeadScore(LAYER, HEAD, 7, 3, "key")
    edges = run.attribute(target, node_budget=0).edges.astype({"source": str, "target": str})
    row = edges.loc[edges["weight"].abs().idxmax()]
    edge = sap.PatchEdge.between(row["source"], row["target"])
    assert (edge.reader, edge.position) == (f"key:{LAYER}.{HEAD}", 3)
    pattern = lens.intervene(run, [edge], ["norms"], patterns=[LAYER]).patterns[LAYER][0, HEAD, 7]
    clean = run.capture["pattern", LAYER][0, HEAD, 7]
    # the other keys keep their scores, so the log-odds of this one change by the edge
    odds = (pattern[3] / pattern[4]).log() - (clean[3] / clean[4]).log()
    assert float(odds) == pytest.approx(-row["weight"], rel=1e-3)
    with pytest.raises(sap.InputError, match="two edges"):
        sap.PatchEdge.between("embed@3", f"score:{LAYER}.{HEAD}:3@7")
    with pytest.raises(sap.InputError, match="does not read position 5"):
        sap.PatchEdge.between("embed@5", f"score:{LAYER}.{HEAD}:3:key@7")


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "gemma2", "qwen3", "olmo2"])
@pytest.mark.parametrize("side", ["query", "key", "both"])
def test_graphs_of_scores_are_validated(name: str, side: Any) -> None:
    _, lens = recipe_lens(name)
    graph = lens.run(TOKENS).graph(sap.HeadScore(LAYER, 1, 7, 5, side), max_nodes=12)
    report = sap.validate(graph, lens, max_sources=12)
    into = report.frozen.table["target"].str.startswith("score")
    assert into.sum() > 3
    assert report.frozen.max_error <= 2e-5
    assert report.free.max_error > 1e-3
    assert report.random is not None
    assert isinstance(report.random.table, pd.DataFrame)


def test_what_cannot_be(lens_of: LensMaker) -> None:
    lens = lens_of("llama", "hooked_transformer", F32)
    run = lens.run([TOKENS])
    edge = sap.PatchEdge("attn_out:0", "query:1.2")
    with pytest.raises(sap.InputError, match=r"patterns of layer 1 are held.*but=\(1,\)"):
        lens.intervene(run, [edge], ["patterns"])
    lens.intervene(run, [edge], [sap.Freeze("patterns", but=(1,))])
    with pytest.raises(sap.InputError, match=r"head 6 is out of range"):
        lens.intervene(run, [sap.PatchEdge("attn_out:0", "key:1.6")])
    with pytest.raises(sap.InputError, match="comes before"):
        lens.intervene(run, [sap.PatchEdge("attn_out:1", "key:1")])
    with pytest.raises(sap.InputError, match="layer"):
        lens.intervene(run, [edge], patterns=[3])
    result = lens.intervene(run, [sap.AblateHead(0, 1)], scores=[1])
    for target, message in (
        (sap.HeadScore(2, 0, 5, 3), r"layer 2 were not kept; pass scores=\[2\]"),
        (sap.HeadScore(1, 6, 5, 3), "head 6 is out of range"),
        (sap.HeadScore(1, 0, 3, 5), "key 5 comes after query 3"),
        (sap.HeadScore(1, 0, 30, 5), "position 30 is out of range"),
        (sap.HeadScore(1, 0, 5, 3, "keys"), "expected one of query, key, both"),  # type: ignore[arg-type]
    ):
        for ask in (result.value, result.clean_value, result.effect):
            with pytest.raises(sap.InputError, match=message):
                ask(target)
    with pytest.raises(sap.InputError, match="layer 3 is out of range"):
        lens.intervene(run, [edge], scores=[3])
    window = recipe_lens("mistral")[1]
    found = window.intervene(window.run([TOKENS]), [], scores=[1])
    with pytest.raises(sap.InputError, match="is masked for query 8"):
        found.value(sap.HeadScore(1, 0, 8, 0))
    with pytest.raises(sap.InputError, match="only a feature has"):
        sap.PatchEdge("embed", "query:1", reader_position=2)


def test_patterns_that_the_scores_do_not_explain(monkeypatch: pytest.MonkeyPatch) -> None:
    _, lens = recipe_lens("gpt2")
    run, edge = lens.run([TOKENS]), sap.PatchEdge("attn_out:0", "query:1.2")
    pattern = run.capture["pattern", 1].clone()
    site = Site("pattern", 1)
    monkeypatch.setitem(run.capture.values, site, pattern * 0.8)  # type: ignore[arg-type]
    with pytest.raises(sap.UnsupportedError, match="attention sinks"):
        lens.intervene(run, [edge])
    monkeypatch.setitem(run.capture.values, site, pattern.flip(1))  # type: ignore[arg-type]
    with pytest.raises(sap.BackendError, match="do not give the model's attention pattern"):
        lens.intervene(run, [edge])


def test_what_does_not_come_back_is_missed(
    monkeypatch: pytest.MonkeyPatch, lens_of: LensMaker
) -> None:
    """From a model that sends its sites back and nothing else."""
    lens = lens_of("llama", "hooked_transformer", F32)
    run, edge = lens.run([TOKENS]), sap.PatchEdge("attn_out:0", "query:2.1")
    forward = Plan.forward

    def alone(plan: Any, *args: Any) -> Any:
        found = forward(plan, *args)
        plan.seen.clear()
        return found

    monkeypatch.setattr(Plan, "forward", alone)
    with pytest.raises(sap.UnsupportedError, match=r"pattern of head 2\.1.* remote model"):
        lens.intervene(run, [edge], patterns=[2])
    with pytest.raises(sap.UnsupportedError, match=r"layer 2: edits of features"):
        lens.intervene(run, [edge, sap.Steer(2, 3, 4, 1.0)])
    with pytest.raises(sap.UnsupportedError, match=r"scores of head 2\.1.* remote model"):
        lens.intervene(run, [edge], scores=[2])
    scores = lens.intervene(run, [edge], scores=[1]).scores(1)
    assert float(scores[0, 2, 7, 3]) == pytest.approx(run.qk(1, 2, 7, 3).score, rel=1e-4)
    clean = lens.intervene(run, [edge], patterns=[1]).patterns[1]
    torch.testing.assert_close(clean, run.capture["pattern", 1])
