"""Edges against interventions on the model, and edits against sae_lens' own splice."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import LensMaker
from helpers import HOSTS, SAE_ARCHITECTURES, TINY, on_host, random_saes, tiny_gpt2
from oracle import Oracle

import sae_attn_plugin as sap

F32, F64 = torch.float32, torch.float64
TOKENS = [3, 57, 7, 19, 7, 13, 2]
EVERYTHING = ("patterns", "norms", "mlp", "attention")


def writer_vector(oracle: Oracle, node: sap.Node) -> tuple[torch.Tensor, str]:
    """What a writer adds to the stream and where, from the model's and the SAE's own weights."""
    layer, p = node.layer, node.position
    match node.kind:
        case "embed":
            return oracle.embed[p], "embed"
        case "pos":
            assert oracle.pos is not None
            return oracle.pos[p], "embed"
    assert layer is not None
    seen = oracle.layers[layer]
    if node.kind == "mlp":
        return seen.mlp_out[p], "mlp_out"
    if node.kind == "head":
        assert node.head is not None
        z = torch.zeros_like(seen.z[p])
        at = slice(node.head * oracle.d_head, (node.head + 1) * oracle.d_head)
        z[at] = seen.z[p, at]
        return oracle._out(layer, z), "attn_out"
    if layer not in oracle.saes:
        return oracle._out_bias(layer), "attn_out"
    sae = oracle.saes[layer]
    acts = oracle.acts(layer)[p]
    if node.kind == "attn":
        return oracle._out(layer, acts[node.feature] * sae.W_dec.detach()[node.feature].double()), (
            "attn_out"
        )
    with torch.no_grad():
        z_hat = acts @ sae.W_dec.double() + sae.b_dec.double()
        if node.kind == "attn_err":
            return oracle._out(layer, seen.z[p] - z_hat), "attn_out"
        return oracle._out(layer, sae.b_dec.double()) + oracle._out_bias(layer), "attn_out"


def as_target(node: sap.Node) -> Any:
    if node.kind == "attn":
        assert node.layer is not None
        assert node.feature is not None
        return sap.Feature(node.layer, node.feature, node.position)
    return sap.Logit(9, 6)


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize(
    ("model", "dtype", "allowed"),
    [("gpt2", F32, 1e-5), ("llama", F32, 1e-5), ("gpt2", F64, 1e-10)],
    ids=["gpt2-float32", "llama-float32", "gpt2-float64"],
)
def test_adding_a_writer_moves_every_target_by_its_edge(
    host: str, model: str, dtype: torch.dtype, allowed: float
) -> None:
    plain = TINY[model](dtype)
    saes = random_saes(plain, "jumprelu")[1:]
    lens = sap.FeatureLens(on_host(plain, host), saes)
    run = lens.run(TOKENS)
    oracle = Oracle(plain, {1: saes[0], 2: saes[1]}, TOKENS)
    targets = [
        *(sap.Feature(1, f, p) for f, p in ((3, 6), (11, 4))),
        *(sap.Feature(2, f, p) for f, p in ((5, 6), (17, 3))),
        sap.Logit(9, 6),
    ]
    att = run.attribute(targets, node_budget=0)
    edges = {
        (str(s), str(t)): w
        for s, t, w in zip(
            att.edges["source"], att.edges["target"], att.edges["weight"].tolist(), strict=True
        )
    }
    scale = att.edges["weight"].abs().groupby(att.edges["target"].astype(str)).sum().astype(float)
    roots = [str(node) for node in att.roots.values()]
    by_kind: dict[str, list[str]] = {}
    for name in dict.fromkeys(s for s, _ in edges):
        by_kind.setdefault(sap.Node.parse(name).kind, []).append(name)
    learned = {"pos"} if model == "gpt2" else set()
    assert set(by_kind) == {
        *("embed", "attn", "attn_err", "attn_bias", "mlp", "head"),
        *learned,
    }
    moved = 0
    for names in by_kind.values():
        for name in names[:: max(1, len(names) // 5)]:
            node = sap.Node.parse(name)
            vector, site = writer_vector(oracle, node)
            add = sap.AddToStream(vector.to(dtype), node.position, site, node.layer or 0)  # type: ignore[arg-type]
            result = lens.intervene(run, [add], freeze=EVERYTHING)
            for target, root in zip(targets, roots, strict=True):
                edge = edges.get((name, root), 0.0)
                assert float(result.effect(target)) == pytest.approx(
                    edge, rel=0, abs=allowed * scale[root]
                )
                moved += abs(edge) > 1e-3 * scale[root]
    assert moved > 40


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize(("model", "dtype"), [("gpt2", F64), ("llama", F32)])
def test_scaling_a_feature_moves_the_next_layer_by_its_edge(
    lens_of: LensMaker, host: str, model: str, dtype: torch.dtype
) -> None:
    allowed = 1e-10 if dtype == F64 else 1e-5
    lens = lens_of(model, host, dtype, "gated", normalize_activations="layer_norm")
    run = lens.run(TOKENS)
    att = run.attribute(sap.Feature(1, 7, -1), node_budget=0)
    scale = float(att.edges["weight"].abs().sum())
    frame = att.edges[att.edges["source"].astype(str).str.startswith("attn:0:")]
    assert len(frame) > 20
    freeze = ("patterns", "norms", "mlp")
    for source, weight in zip(frame["source"][::9], frame["weight"][::9].tolist(), strict=True):
        node = sap.Node.parse(source)
        activation = att.nodes.loc[source, "activation"]
        for factor in (0.0, 2.5):
            edit = sap.SetFeature(0, node.feature, node.position, factor * activation)  # type: ignore[arg-type]
            result = lens.intervene(run, [edit], freeze)
            # The statistics of the target's own input normalisation stay live in the model, so
            # read its linear form with the frozen ones.
            dictionary = lens.dictionaries[1]
            encoded = run.frozen.layers[1].encoded
            assert encoded is not None
            rows = dictionary.encoder(torch.tensor([7]), dtype)[0]
            change = (result.z[1][0, -1] - run.capture["z", 1][0, -1]) * rows
            moved = float(change.sum() / dictionary.input_scale(encoded.scale)[-1])
            assert moved == pytest.approx((factor - 1) * weight, rel=0, abs=allowed * scale)


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize(("model", "dtype"), [("gpt2", F64), ("llama", F32)])
def test_scaling_a_feature_moves_every_target_by_its_edge(
    lens_of: LensMaker, host: str, model: str, dtype: torch.dtype
) -> None:
    """With everything frozen only the direct path is left, whatever lies between."""
    allowed = 1e-10 if dtype == F64 else 1e-5
    lens = lens_of(model, host, dtype, "topk_rescaled", normalize_activations="none")
    run = lens.run(TOKENS)
    targets = [sap.Feature(1, 7, -1), sap.Feature(2, 9, 5), sap.Logit(9)]
    att = run.attribute(targets, node_budget=0)
    names: list[str] = list(att.nodes.index)
    for source in [name for name in names if name.startswith("attn:0:")][::7]:
        node = sap.Node.parse(source)
        assert node.feature is not None
        value = 2.5 * att.nodes.loc[source, "activation"]
        edit = sap.SetFeature(0, node.feature, node.position, value)
        result = lens.intervene(run, [edit], EVERYTHING)
        for target, root in zip(targets, map(str, att.roots.values()), strict=True):
            into = att.edges["target"] == root
            weight = float(att.edges.loc[into & (att.edges["source"] == source), "weight"].sum())
            scale = float(att.edges.loc[into, "weight"].abs().sum())
            assert float(result.effect(target)) == pytest.approx(
                1.5 * weight, rel=0, abs=allowed * scale
            )


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("model", TINY)
def test_without_edits_nothing_changes(lens_of: LensMaker, host: str, model: str) -> None:
    lens = lens_of(model, host)
    run = lens.run(TOKENS)
    assert torch.equal(lens.intervene(run, []).logits, run.logits)
    frozen = lens.intervene(run, [], freeze=EVERYTHING)
    torch.testing.assert_close(frozen.logits, run.logits, rtol=1e-5, atol=1e-5)
    assert float(frozen.effect(sap.Logit(5))) == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("part", EVERYTHING)
def test_freezing_holds_what_it_says(lens_of: LensMaker, host: str, part: str) -> None:
    """An edit early in the prompt, with one part frozen, against the same algebra by hand."""
    from sae_attn_plugin.backends.protocol import Site

    lens = lens_of("gpt2", host, F64)
    run = lens.run(TOKENS)
    # A strong edit, so that what is not frozen does move.
    edit = sap.AddToStream(torch.randn(30, dtype=F64) * 3, 1, "embed")
    seen: dict[Site, torch.Tensor] = {}
    forward = lens.backend.forward
    names = ("resid_pre", "attn_in", "v", "z", "attn_out", "mlp_in", "mlp_out")
    reads = [Site(name, layer) for layer in range(3) for name in names]
    reads += [Site("resid_final"), Site("unembed_in")]

    def spy(tokens: Any, edits: Any = None, also: Any = ()) -> Any:
        found = forward(tokens, edits, [*also, *reads])
        seen.update(found)
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lens.backend, "forward", spy)
        lens.intervene(run, [edit], freeze=[part])
    clean = forward(run.tokens, {}, reads)

    def held(name: str, layer: int) -> bool:
        return torch.allclose(seen[Site(name, layer)], clean[Site(name, layer)], atol=1e-9)

    for layer in range(3):
        assert not held("resid_pre", layer)
        assert held("mlp_out", layer) is (part == "mlp")
        assert held("attn_out", layer) is (part == "attention")
        pattern = run.capture["pattern", layer]
        mixed = torch.einsum("bhqk,bkhe->bqhe", pattern, seen[Site("v", layer)])
        assert torch.allclose(seen[Site("z", layer)], mixed, atol=1e-9) is (part == "patterns")
        mid = seen[Site("resid_pre", layer)] + seen[Site("attn_out", layer)]
        clean_mid = clean[Site("resid_pre", layer)] + clean[Site("attn_out", layer)]
        weights = lens.backend.layer_weights(layer)
        assert weights.mlp_norm is not None
        for name, norm, live, was in (
            (
                "attn_in",
                weights.norm,
                seen[Site("resid_pre", layer)],
                clean[Site("resid_pre", layer)],
            ),
            ("mlp_in", weights.mlp_norm, mid, clean_mid),
        ):
            frozen = norm.apply(live, norm.scale(was))
            at = seen[Site(name, layer)]
            assert torch.allclose(at, frozen, atol=1e-9) is (part == "norms")
            assert torch.allclose(at, norm.apply(live), atol=1e-9) is (part != "norms")
    norm = lens.backend.final_norm()
    final = norm.apply(seen[Site("resid_final")], norm.scale(clean[Site("resid_final")]))
    assert torch.allclose(seen[Site("unembed_in")], final, atol=1e-9) is (part == "norms")


# -- features against sae_lens ---------------------------------------------------------------------


def sae_lens_ablation(
    hosted: Any, sae: Any, feature: int, positions: list[int], value: float
) -> torch.Tensor:
    """Logits with one feature set, spliced by sae_lens with its error term."""

    def edit(acts: torch.Tensor, hook: Any) -> torch.Tensor:  # noqa: ARG001
        acts = acts.clone()
        acts[:, positions, feature] = value
        return acts

    name = f"{sae.cfg.metadata.hook_name}.hook_sae_acts_post"
    with torch.no_grad(), hosted.saes(saes=[sae], use_error_term=True):
        return hosted.run_with_hooks(torch.tensor([TOKENS]), fwd_hooks=[(name, edit)])


@pytest.mark.parametrize("architecture", SAE_ARCHITECTURES)
@pytest.mark.parametrize("normalisation", ["none", "layer_norm", "constant_norm_rescale"])
@pytest.mark.parametrize("position", [None, 4, -2])
def test_editing_a_feature_is_sae_lens_own_splice(
    architecture: str, normalisation: str, position: int | None
) -> None:
    model = tiny_gpt2(F64)
    saes = random_saes(model, architecture, normalize_activations=normalisation)
    theirs = on_host(model, "hooked_sae_transformer")
    acts = Oracle(model, dict(enumerate(saes)), TOKENS).acts(1)
    feature = int(acts[4:6].min(0).values.argmax())
    assert acts[4, feature] > 0
    assert acts[5, feature] > 0
    where = list(range(7)) if position is None else [position]
    expected = {
        value: sae_lens_ablation(theirs, saes[1], feature, where, value) for value in (0.0, 1.7)
    }
    for host in ("hooked_transformer", "nnsight"):
        lens = sap.FeatureLens(on_host(model, host), saes)
        run = lens.run(TOKENS)
        for value, edit in (
            (0.0, sap.AblateFeature(1, feature, position)),
            (1.7, sap.SetFeature(1, feature, position, 1.7)),
        ):
            result = lens.intervene(run, [edit])
            assert not torch.allclose(result.logits, run.logits, atol=1e-4)
            torch.testing.assert_close(result.logits, expected[value], rtol=1e-8, atol=1e-9)
            assert float(result.value(sap.Logit(5))) == pytest.approx(
                float(expected[value][0, -1, 5])
            )
            assert float(result.effect(sap.LogitDiff(5, 6))) == pytest.approx(
                float((expected[value] - run.logits)[0, -1, [5, 6]].diff().neg())
            )


def test_a_bridge_edits_as_the_other_hosts(lens_of: LensMaker) -> None:
    edits = [sap.AblateFeature(0, 3), sap.SetFeature(2, 8, -1, 4.0)]
    results = []
    for host in HOSTS:
        lens = lens_of("llama", host)
        results.append(lens.intervene(lens.run(TOKENS), edits).logits)
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(results[2], results[0], rtol=1e-4, atol=1e-5)


def test_several_edits(lens_of: LensMaker) -> None:
    lens = lens_of("gpt2", "hooked_transformer", F64)
    run = lens.run(TOKENS)
    active = run.features(0)
    feature = int(active.loc[active["position"] == 2, "feature"].iloc[0])
    everywhere = lens.intervene(run, [sap.AblateFeature(0, feature)]).logits
    one_by_one = [sap.AblateFeature(0, feature, p) for p in range(len(TOKENS))]
    torch.testing.assert_close(lens.intervene(run, one_by_one).logits, everywhere)
    # a later edit of the same feature wins
    both = [sap.AblateFeature(0, feature), sap.SetFeature(0, feature, 2, 5.0)]
    rest = [edit for edit in one_by_one if edit.position != 2]
    apart = [*rest, sap.SetFeature(0, feature, 2, 5.0)]
    torch.testing.assert_close(lens.intervene(run, both).logits, lens.intervene(run, apart).logits)
    last = lens.intervene(run, [*both, sap.AblateFeature(0, feature)]).logits
    torch.testing.assert_close(last, everywhere)
    # two additions at one place add up
    vector = torch.randn(30, dtype=F64)
    add = sap.AddToStream(vector, -3, "mlp_out", 1)
    twice = lens.intervene(run, [add, add]).logits
    once = lens.intervene(run, [sap.AddToStream(2 * vector, 4, "mlp_out", 1)]).logits
    torch.testing.assert_close(twice, once)


def test_interventions_on_a_batch(lens_of: LensMaker) -> None:
    lens = lens_of("gpt2", "nnsight", F64)
    prompts = torch.tensor([TOKENS, TOKENS[::-1]])
    edits = [sap.AblateFeature(1, 4), sap.AddToStream(torch.ones(30, dtype=F64), 2, "embed")]
    batch = lens.run(prompts)
    result = lens.intervene(batch, edits, freeze=["patterns", "norms"])
    for index in range(2):
        alone = lens.intervene(lens.run(prompts[index]), edits, freeze=["patterns", "norms"])
        torch.testing.assert_close(result.logits[index], alone.logits[0])
        for target in (sap.Feature(2, 3, -1), sap.LogitDiff(5, 6)):
            assert float(result.value(target)[index]) == pytest.approx(float(alone.value(target)))
            assert float(result.effect(target)[index]) == pytest.approx(
                float(alone.effect(target)), abs=1e-12
            )


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (sap.AblateFeature(7, 0), "no SAE in layer 7; layers with one: 0, 1, 2"),
        (sap.AblateFeature(0, 40), r"feature 40 is out of range.*0\.\.39"),
        (sap.SetFeature(0, -1, None, 1.0), "feature -1 is out of range"),
        (sap.AblateFeature(0, 0, 7), "position 7 is out of range: the prompt has 7 tokens"),
        (sap.AblateFeature(0, 0, -8), "position -8 is out of range"),
        (sap.AddToStream(torch.ones(29), 0), r"expected a vector \[30\], got \[29\]"),
        (sap.AddToStream(torch.ones(30), 7), "position 7 is out of range"),
        (sap.AddToStream(torch.ones(30), 0, "mlp_out", 3), r"layer 3 is out of range: 0\.\.2"),
        (sap.AddToStream(torch.ones(30), 0, "attn_out"), "layer -1 is out of range"),
        (sap.AddToStream(torch.ones(30), 0, "z", 1), "cannot add at 'z'; known: embed"),  # type: ignore[arg-type]
        ("attn:0:3@2", "expected an edit such as AblateFeature"),
    ],
)
def test_edits_that_do_not_fit(lens_of: LensMaker, edit: Any, message: str) -> None:
    lens = lens_of("gpt2")
    run = lens.run(TOKENS)
    with pytest.raises(sap.InputError, match=message):
        lens.intervene(run, [edit])


def test_unknown_parts_to_freeze(lens_of: LensMaker) -> None:
    lens = lens_of("gpt2")
    run = lens.run(TOKENS)
    with pytest.raises(
        sap.InputError, match="cannot freeze pattern; known: patterns, norms, mlp, attention"
    ):
        lens.intervene(run, [], freeze=["pattern", "norms"])
    with pytest.raises(sap.InputError, match="cannot freeze pattern; known"):
        lens.intervene(run, [], freeze="pattern")
    torch.testing.assert_close(lens.intervene(run, [], freeze="patterns").logits, run.logits)
