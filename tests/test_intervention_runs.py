"""Edits on the model, against hooks of TransformerLens and plain algebra."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import LensMaker
from helpers import HOSTS, TINY, on_host, random_saes, tiny_llama, word_tokenizer

import sae_attn_plugin as sap
from sae_attn_plugin.backends.protocol import Site

F32, F64 = torch.float32, torch.float64
TOKENS = [3, 57, 7, 19, 7, 13, 2]
OTHER = [5, 9, 7, 44, 31, 13, 8]
BATCH = [TOKENS, OTHER, [11, 12, 13, 14, 15, 16, 17]]
EVERYTHING = ("patterns", "norms", "mlp", "attention")


def hooked(model: Any, tokens: Any, hooks: dict[str, Any]) -> torch.Tensor:
    """Logits of a HookedTransformer with functions at its own hooks."""

    def wrap(function: Any) -> Any:
        return lambda value, hook: function(value.clone())  # noqa: ARG005

    model = getattr(getattr(model, "backend", model), "model", model)
    with torch.no_grad():
        return model.run_with_hooks(
            torch.tensor(tokens), fwd_hooks=[(name, wrap(f)) for name, f in hooks.items()]
        )


def assigned(where: Any, new: Any) -> Any:
    def edit(value: torch.Tensor) -> torch.Tensor:
        value[where] = new
        return value

    return edit


# -- heads, sites, features ------------------------------------------------------------------------


@pytest.mark.parametrize("model", TINY)
def test_heads_and_sites(lens_of: LensMaker, model: str) -> None:
    lens = lens_of(model, "hooked_transformer", F32)
    run, other = lens.run(BATCH), lens.run([OTHER, TOKENS, OTHER])
    places = ([0, 1, 2], [2, 6, 3])
    z = other.capture["z", 1]
    cases: list[tuple[sap.Edit, str, Any]] = [
        (
            sap.AblateHead(1, 2, (2, 6, 3)),
            "blocks.1.attn.hook_z",
            assigned((*places, 2), 0.0),
        ),
        (
            sap.AblateHead(1, 2, to=sap.Mean("other")),
            "blocks.1.attn.hook_z",
            assigned((slice(None), slice(None), 2), z[:, :, 2].mean((0, 1))),
        ),
        (
            sap.AblateHead(1, 2, (2, 6, 3), to=sap.From("other", (1, 5, 5))),
            "blocks.1.attn.hook_z",
            assigned((*places, 2), z[[0, 1, 2], [1, 5, 5], 2]),
        ),
        (
            sap.PatchSite("z", 1, -2, to=sap.From("other")),
            "blocks.1.attn.hook_z",
            assigned((slice(None), 5), z[:, 5]),
        ),
        (
            sap.PatchSite("attn_out", 0, (2, 6, 3), to=sap.From("other")),
            "blocks.0.hook_attn_out",
            assigned(places, other.capture["attn_out", 0][places]),
        ),
        (
            sap.PatchSite("mlp_out", 2, to=sap.From("other")),
            "blocks.2.hook_mlp_out",
            assigned(slice(None), other.capture["mlp_out", 2]),
        ),
        (
            sap.PatchSite("attn_out", 0, 3, to=sap.Mean("other", 4)),
            "blocks.0.hook_attn_out",
            assigned((slice(None), 3), other.capture["attn_out", 0][:, 4].mean(0)),
        ),
        (
            sap.PatchSite("v", 1, (2, 6, 3), to=None),
            "blocks.1.attn.hook_v",
            assigned(places, 0.0),
        ),
        (
            sap.PatchSite("resid_pre", 2, (2, 6, 3), to=sap.From("other")),
            "blocks.2.hook_resid_pre",
            assigned(places, other.capture["resid_pre", 2][places]),
        ),
        (
            sap.PatchSite("embed", position=1, to=sap.From("other")),
            "hook_embed",
            assigned((slice(None), 1), other.capture["embed", -1][:, 1]),
        ),
    ]
    for edit, name, function in cases:
        result = lens.intervene(run, [edit], sources={"other": other})
        expected = hooked(lens, BATCH, {name: function})
        torch.testing.assert_close(result.logits, expected, rtol=1e-5, atol=1e-5, msg=str(edit))
        assert not torch.allclose(expected, run.logits, atol=1e-3)


@pytest.mark.parametrize("architecture", ["jumprelu", "topk_rescaled"])
@pytest.mark.parametrize("normalisation", ["none", "layer_norm"])
def test_features_and_errors(architecture: str, normalisation: str) -> None:
    model = TINY["gpt2"](F64)
    saes = random_saes(model, architecture, normalize_activations=normalisation)
    lens = sap.FeatureLens(on_host(model, "hooked_transformer"), saes)
    run, other = lens.run(BATCH), lens.run([OTHER, TOKENS, OTHER])
    sae, at = saes[1], (2, 6, 3)
    rows = torch.arange(3)
    here = (rows, torch.tensor(at))
    with torch.no_grad():
        active = torch.stack(
            [sae.encode(z)[p] for z, p in zip(run.capture["z", 1], at, strict=True)]
        )
    number = int(active.sum(0).argmax())

    def parts(of: sap.Run) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Activations, error and what an activation of 1 adds, by sae_lens, prompt by prompt."""
        acts, errors, unit = [], [], []
        with torch.no_grad():
            for z in of.capture["z", 1]:
                f = sae.encode(z)
                out = sae.decode(f)
                one = f.clone()
                one[:, number] += 1
                acts.append(f)
                errors.append(z - out)
                sae.encode(z)  # with layer_norm, a decode uses up the statistics of its input
                unit.append(sae.decode(one) - out)
        return tuple(torch.stack(x) for x in (acts, errors, unit))  # type: ignore[return-value]

    acts, error, unit = parts(run)
    theirs, their_error, _ = parts(other)
    z = run.capture["z", 1]

    def moved(amount: torch.Tensor) -> torch.Tensor:
        return z + amount[..., None, None] * unit

    def only(where: Any, amount: Any) -> torch.Tensor:
        change = torch.zeros(acts.shape[:2], dtype=F64)
        change[where] = amount
        return change

    f = acts[..., number]
    cases = [
        (sap.ScaleFeature(1, number, at, 3.0), moved(only(here, 2 * f[here]))),
        (sap.Steer(1, number, None, 0.7), moved(only(slice(None), 0.7))),
        (sap.Steer(1, number, at, -0.7), moved(only(here, -0.7))),
        (
            sap.AblateFeature(1, number, at, to=sap.From("other")),
            moved(only(here, theirs[..., number][here] - f[here])),
        ),
        (
            sap.AblateFeature(1, number, to=sap.From("other")),
            moved(theirs[..., number] - f),
        ),
        (
            sap.AblateFeature(1, number, to=sap.Mean("other")),
            moved(theirs[..., number].mean() - f),
        ),
        (
            sap.AblateFeature(1, number, at, to=sap.Mean("other", 5)),
            moved(only(here, theirs[:, 5, number].mean() - f[here])),
        ),
        (sap.AblateError(1), z - error),
        (sap.AblateError(1, to=sap.From("other")), z - error + their_error),
    ]
    for edit, expected in cases:
        result = lens.intervene(run, [edit], sources={"other": other})
        torch.testing.assert_close(result.z[1], expected, rtol=1e-10, atol=1e-10, msg=str(edit))
        logits = hooked(lens, BATCH, {"blocks.1.attn.hook_z": lambda _, e=expected: e})
        torch.testing.assert_close(result.logits, logits, rtol=1e-10, atol=1e-10)
        assert not torch.allclose(expected, z, atol=1e-3), edit


def test_edits_of_one_site_are_taken_in_order(lens_of: LensMaker) -> None:
    lens = lens_of("gpt2", "nnsight", F64)
    run = lens.run(TOKENS)
    feature = int(run.features(layer=1, position=4)["feature"].iloc[0])
    head, scale = sap.AblateHead(1, 0), sap.ScaleFeature(1, feature, 4, 2.0)
    plain = lens.intervene(run, [head]).z[1]
    dictionary = lens.dictionaries[1]

    def act(z: torch.Tensor) -> float:
        found = dictionary.encode(z[0])
        hit = (found.feature == feature) & (found.position == 4)
        return float(found.activation[hit].sum())

    row = dictionary.decoder(torch.tensor([feature]), F64)[0]
    first = lens.intervene(run, [head, scale]).z[1]
    expected = plain.clone()
    expected[0, 4] += act(plain) * row
    torch.testing.assert_close(first, expected)
    second = lens.intervene(run, [scale, head]).z[1]
    expected = run.capture["z", 1].clone()
    expected[0, 4] += act(expected) * row
    expected[:, :, 0] = 0
    torch.testing.assert_close(second, expected)


def test_changed_features(lens_of: LensMaker) -> None:
    lens = lens_of("gpt2", "hooked_transformer", F64)
    run = lens.run(BATCH)
    feature = int(run[0].features(layer=1, position=4)["feature"].iloc[0])
    edits = [sap.AblateFeature(1, feature, 4), sap.SetFeature(2, 3, (5, 6, 6), 9.0)]
    result = lens.intervene(run, edits)
    frame = result.changed_features()
    assert list(frame["change"].abs()) == sorted(frame["change"].abs(), reverse=True)
    # the layer above the first edit answers, those below do not, and in the edited layer itself
    # nothing but what was asked for
    of_first = frame[frame["layer"] == 1]
    assert set(zip(of_first["position"], of_first["feature"], strict=True)) == {(4, feature)}
    assert set(of_first["edited"]) == {0.0}
    assert not (frame["layer"] == 0).any()
    set_ones = frame[(frame["layer"] == 2) & (frame["edited"] == 9.0)]
    assert dict(zip(set_ones["prompt"], set_ones["position"], strict=True)) == {0: 5, 1: 6, 2: 6}
    above = frame[(frame["layer"] == 2) & (frame["edited"] != 9.0)]
    assert len(above) > 5
    z = result.read["attn", 2]
    for prompt, position, number, edited in above.head(8)[
        ["prompt", "position", "feature", "edited"]
    ].itertuples(index=False):
        with torch.no_grad():
            expected = random_saes(TINY["gpt2"](F64))[2].encode(z[prompt])[position, number]
        assert edited == pytest.approx(float(expected), abs=1e-12)
    assert len(lens.intervene(run, []).changed_features()) == 0


# -- path patching ---------------------------------------------------------------------------------


def split_inputs(model: Any, host: str) -> Any:
    """A HookedTransformer whose heads have inputs of their own."""
    hosted = on_host(model, host)
    hosted.cfg.use_split_qkv_input = True
    hosted.cfg.use_hook_mlp_in = True
    hosted.cfg.ungroup_grouped_query_attention = True
    return hosted


def contribution(lens: sap.FeatureLens, saes: Any, run: sap.Run, writer: str) -> torch.Tensor:
    """``[batch, position, d_model]`` of a writer of layer 0, by sae_lens and plain products."""
    kind = writer.partition(":")[0]
    if kind == "embed":
        return run.capture["embed", -1]
    if kind == "mlp":
        return run.capture["mlp_out", 0]
    if kind == "attn_out":
        return run.capture["attn_out", 0]
    weights = lens.backend.layer_weights(0)
    z = run.capture["z", 0]
    if kind == "head":
        return z[:, :, 3] @ weights.W_O[3]
    with torch.no_grad():
        acts = torch.stack([saes[0].encode(row) for row in z])
        if kind == "attn":
            part = acts[..., 7, None] * saes[0].W_dec[7]
        elif kind == "attn_bias":
            part = saes[0].b_dec.expand(*acts.shape[:2], -1)
        else:
            part = z.flatten(-2) - (acts @ saes[0].W_dec + saes[0].b_dec)
    out = part @ weights.W_O.flatten(0, 1)
    return out + weights.b_O if kind == "attn_bias" else out


WRITERS = (*("attn:0:7", "attn_err:0", "attn_bias:0", "head:0.3", "attn_out:0", "mlp:0", "embed"),)


@pytest.mark.parametrize("model", TINY)
def test_path_patching_is_a_changed_input_of_one_reader(model: str) -> None:
    """Against TransformerLens' own separate inputs, with everything else live."""
    plain = TINY[model](F32)
    saes = random_saes(plain)
    lens = sap.FeatureLens(on_host(plain, "hooked_transformer"), saes)
    split = split_inputs(plain, "hooked_transformer")
    run, other = lens.run(BATCH), lens.run([OTHER, TOKENS, OTHER])
    where = ([0, 1, 2], [2, 4, 3])
    readers: list[tuple[str, str, Any]] = [
        ("value:2.1", "blocks.2.hook_v_input", (*where, 1)),
        ("value:2", "blocks.2.hook_v_input", (*where, slice(None))),
        ("query:2.4", "blocks.2.hook_q_input", (*where, 4)),
        ("query:1", "blocks.1.hook_q_input", (*where, slice(None))),
        ("key:2", "blocks.2.hook_k_input", (*where, slice(None))),
        ("key:2.3", "blocks.2.hook_k_input", (*where, 3)),
        ("mlp:1", "blocks.1.hook_mlp_in", where),
        ("final", "ln_final", where),
    ]
    moved = 0
    for writer in WRITERS:
        was, now = (contribution(lens, saes, r, writer)[where] for r in (run, other))
        for reader, name, at in readers:
            for to in (None, sap.From("other")):
                if to is not None and writer == "attn_bias:0":
                    continue
                change = (0 if to is None else now) - was
                if isinstance(at[-1], slice):
                    change = change[:, None]

                def edit(value: torch.Tensor, at: Any = at, change: Any = change) -> torch.Tensor:
                    value[at] += change
                    return value

                edge = sap.PatchEdge(writer, reader, (2, 4, 3), to=to)
                result = lens.intervene(run, [edge], sources={"other": other})
                if name == "ln_final":
                    final = edit(run.capture["resid_final", -1].clone())
                    W_U, b_U = lens.backend.unembed()
                    expected = lens.backend.final_norm().apply(final) @ W_U
                    expected = expected if b_U is None else expected + b_U
                else:
                    expected = hooked(split, BATCH, {name: edit})
                torch.testing.assert_close(
                    result.logits, expected, rtol=2e-5, atol=2e-5, msg=str(edge)
                )
                moved += not torch.allclose(expected, run.logits, atol=1e-4)
    assert moved > 40  # of 52; a feature may be silent here


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("model", TINY)
def test_a_patched_edge_is_the_edge_of_the_graph(lens_of: LensMaker, model: str, host: str) -> None:
    """With patterns and norms held, what a reader loses is the edge, for every kind of writer."""
    lens = lens_of(model, host)
    run = lens.run(TOKENS)
    targets: list[Any] = [sap.Feature(2, 5, 6), sap.Logit(9)]
    att = run.attribute(targets, node_budget=0)
    frame = att.edges.astype({"source": str, "target": str})
    size = frame["weight"].abs().groupby(frame["target"]).sum()
    kinds = set()
    for target, root, reader in zip(
        targets, map(str, att.roots.values()), ("value:2", "final"), strict=True
    ):
        into = frame[frame["target"] == root]
        kind = into["source"].str.extract("^([a-z_]+)")[0]
        into = pd.concat([part[:: len(part) // 4 + 1] for _, part in into.groupby(kind)])
        for source, weight in zip(into["source"], into["weight"], strict=True):
            writer, _, at = source.rpartition("@")
            edge = sap.PatchEdge(writer, reader, int(at))
            effect = lens.intervene(run, [edge], ["patterns", "norms"]).effect(target)
            assert float(effect) == pytest.approx(-weight, rel=0, abs=1e-5 * float(size[root]))
            kinds.add(writer.partition(":")[0])
    learned = {"pos"} if model == "gpt2" else set()
    assert kinds == {"embed", "attn", "attn_err", "attn_bias", "mlp", *learned}


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("freeze", [(), ("patterns", "norms")])
def test_a_feature_that_reads(lens_of: LensMaker, host: str, freeze: Any) -> None:
    """One feature sees one writer less: its activation moves, and nothing else of its layer."""
    lens = lens_of("llama", host)
    run = lens.run(TOKENS)
    feature = int(run.features(layer=1, position=6)["feature"].iloc[0])
    att = run.attribute(sap.Feature(1, feature, 6), node_budget=0)
    row = att.edges.assign(size=att.edges["weight"].abs()).sort_values("size").iloc[-1]
    edge = sap.PatchEdge.between(row["source"], row["target"])
    result = lens.intervene(run, [edge], freeze)
    dictionary = lens.dictionaries[1]
    change = result.z[1] - run.capture["z", 1]
    decoder = dictionary.decoder(torch.tensor([feature]), F32)[0]
    torch.testing.assert_close(change[:, :6], torch.zeros_like(change[:, :6]), rtol=0, atol=2e-6)
    moved = float((change[0, 6] * decoder).sum() / decoder.square().sum())
    torch.testing.assert_close(change[0, 6], moved * decoder, rtol=1e-4, atol=1e-5)
    before = run.features(layer=1, position=6).set_index("feature").loc[feature]
    if freeze:
        after = max(before["pre_activation"] - row["weight"], 0.0)
        assert moved == pytest.approx(after - before["activation"], rel=1e-4, abs=1e-5)
    else:
        # the same by hand: all heads of the layer without the writer, then that feature alone
        writer, _, at = str(row["source"]).rpartition("@")
        whole = lens.intervene(run, [sap.PatchEdge(writer, "value:1", int(at))]).z[1]
        now = dictionary.encode(whole[0])
        hit = (now.feature == feature) & (now.position == 6)
        assert moved == pytest.approx(
            float(now.activation[hit].sum()) - before["activation"], rel=1e-4, abs=1e-5
        )


def test_edges_that_cannot_be(lens_of: LensMaker) -> None:
    lens = lens_of("llama", "hooked_transformer")
    run = lens.run(TOKENS)
    for edge, message in (
        (sap.PatchEdge("attn:2:1", "value:2.0", 1), "comes before"),
        (sap.PatchEdge("mlp:1", "mlp:1", 1), "comes before"),
        (sap.PatchEdge("pos", "final", 1), "no learned positions"),
        (sap.PatchEdge("head:0.6", "final", 1), r"head 6 is out of range: 0\.\.5"),
        (sap.PatchEdge("attn:0:40", "final", 1), "feature 40 is out of range"),
        (sap.PatchEdge("mlp:3", "final", 1), r"layer 3 is out of range: 0\.\.2"),
    ):
        with pytest.raises(sap.InputError, match=message):
            lens.intervene(run, [edge])
    lens.intervene(run, [sap.PatchEdge("attn:1:1", "mlp:1", 1)])


# -- hosts -----------------------------------------------------------------------------------------


def every_edit() -> list[sap.Edit]:
    from_other, mean = sap.From("other"), sap.Mean("other")
    return [
        sap.SetFeature(0, 3, 2, 1.5),
        sap.ScaleFeature(1, 3, None, -2.0),
        sap.Steer(0, 4, (3, 4), 0.5),
        sap.AblateFeature(1, 5, to=mean),
        sap.AblateError(2, 3, to=from_other),
        sap.AblateHead(0, 1, to=mean),
        sap.PatchSite("mlp_out", 0, 4, to=from_other),
        sap.PatchSite("v", 2, 1, to=from_other),
        sap.PatchSite("resid_pre", 1, 2, to=from_other),
        sap.PatchEdge("attn:0:7", "value:2.1", 3),
        sap.PatchEdge("attn_out:0", "value:2", (4, 1), to=from_other),
        sap.PatchEdge("head:0.2", "attn:1:11", 2),
        sap.PatchEdge("attn_err:0", "mlp:1", 5),
        sap.PatchEdge("mlp:0", "final", 6, to=mean),
        sap.AddToStream(torch.linspace(-1, 1, 36), 2, "attn_out", 1),
    ]


@pytest.mark.parametrize("freeze", [(), ("patterns",), EVERYTHING], ids=len)
def test_hosts_agree_on_every_edit(lens_of: LensMaker, freeze: Any) -> None:
    found = []
    for host in HOSTS:
        lens = lens_of("llama", host)
        run, other = lens.run(BATCH[:2]), lens.run([BATCH[2], TOKENS])
        result = lens.intervene(run, every_edit(), freeze, sources={"other": other})
        assert not torch.allclose(result.logits, run.logits, atol=1e-2)
        found.append(result.logits)
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-4, atol=1e-4)


def test_every_edit_runs_remotely() -> None:
    from nnsight import TransformersModel

    model = tiny_llama()
    wrapped = TransformersModel(model, tokenizer=word_tokenizer())
    found = []
    for remote in (False, "local"):
        lens = sap.FeatureLens(wrapped, random_saes(model), remote=remote)
        run, other = lens.run(BATCH[:2]), lens.run([BATCH[2], TOKENS])
        sources = {"other": other}
        found.append(
            [
                lens.intervene(run, every_edit(), freeze, sources=sources).logits
                for freeze in ((), ("norms", "attention"))
            ]
        )
    for here, there in zip(*found, strict=True):
        torch.testing.assert_close(here, there, rtol=1e-5, atol=1e-5)


# -- freezing --------------------------------------------------------------------------------------


def test_all_layers_but_some(lens_of: LensMaker) -> None:
    lens = lens_of("gpt2", "hooked_transformer", F64)
    run = lens.run(TOKENS)
    edit = sap.AddToStream(torch.randn(30, dtype=F64) * 3, 1, "embed")
    reads = [Site("attn_out", layer) for layer in range(3)]
    seen: dict[Site, torch.Tensor] = {}
    forward = lens.backend.forward

    def spy(tokens: Any, edits: Any = None, also: Any = ()) -> Any:
        found = forward(tokens, edits, [*also, *reads])
        seen.update(found)
        return found

    for freeze, held in (
        (sap.Freeze("attention", but=(1,)), {0, 2}),
        (sap.Freeze("attention", layers=(1,)), {1}),
        ([sap.Freeze("attention", (0,)), sap.Freeze("attention", (2,))], {0, 2}),
    ):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(lens.backend, "forward", spy)
            lens.intervene(run, [edit], freeze)  # type: ignore[arg-type]
        for layer in range(3):
            same = torch.allclose(seen[Site("attn_out", layer)], run.capture["attn_out", layer])
            assert same is (layer in held)
    with pytest.raises(sap.InputError, match=r"layer 3 is out of range: 0\.\.2"):
        lens.intervene(run, [], sap.Freeze("mlp", but=(3,)))
    lens.intervene(run, [], sap.Freeze("norms", but=(3,)))


def test_held_attention_has_what_the_clean_feature_wrote(lens_of: LensMaker) -> None:
    """Two features of different layers, all held: effects are direct, so they add up."""
    lens = lens_of("gpt2", "hooked_transformer", F64)
    run = lens.run(TOKENS)
    pick = [run.features(layer=layer, position=6)["feature"].iloc[0] for layer in (0, 1)]
    edits = [sap.AblateFeature(layer, int(pick[layer]), 6) for layer in (0, 1)]
    target = sap.Logit(9)
    both = lens.intervene(run, edits, EVERYTHING).effect(target)
    alone = [lens.intervene(run, [edit], EVERYTHING).effect(target) for edit in edits]
    assert float(both) == pytest.approx(float(sum(alone)), abs=1e-10)
    assert float(both) != pytest.approx(float(alone[0]), abs=1e-3)


# -- prompts, roles, data sets ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def demo() -> sap.FeatureLens:
    return sap.demo.load()


@pytest.fixture(scope="module")
def ioi(demo: sap.FeatureLens) -> Any:
    return sap.tasks.IOIDataset(12, demo.tokenizer, 0, prepend_bos=demo.prepend_bos)


def test_each_prompt_is_edited_at_its_own_position(demo: sap.FeatureLens, ioi: Any) -> None:
    """The mistake of Kissane et al.'s released ``ablate_sae_feature``: indexing ``[:, positions]``
    ablates every prompt at the union of all prompts' positions."""
    run = demo.run(ioi)
    assert len(set(ioi.positions["S2"].tolist())) > 2  # or there would be no difference to see
    edit = sap.PatchSite("attn_out", 0, "S2", to=None)
    result = demo.intervene(run, [edit])
    for i, position in enumerate(ioi.positions["S2"].tolist()):
        alone = demo.run(ioi.texts[i])
        (name, clean) = ("blocks.0.hook_attn_out", alone.capture["attn_out", 0])
        expected = hooked(demo, alone.tokens.tolist(), {name: assigned((0, position), 0.0)})
        torch.testing.assert_close(result[i].logits, expected, rtol=1e-4, atol=1e-4)
        union = hooked(
            demo,
            alone.tokens.tolist(),
            {
                name: assigned(
                    (0, [p for p in set(ioi.positions["S2"].tolist()) if p < clean.shape[1]]), 0.0
                )
            },
        )
        assert not torch.allclose(expected, union, atol=1e-2)


def test_the_role_is_one_position_not_all(demo: sap.FeatureLens, ioi: Any) -> None:
    """The mistake of their ``zero_abl_attn_out``: asked for S2, it ablates all positions."""
    at_role = demo.intervene_dataset(ioi, [sap.PatchSite("attn_out", 0, "S2", to=None)])
    at_tuple = demo.intervene_dataset(
        ioi, [sap.PatchSite("attn_out", 0, tuple(ioi.positions["S2"].tolist()), to=None)]
    )
    everywhere = demo.intervene_dataset(ioi, [sap.PatchSite("attn_out", 0, to=None)])
    torch.testing.assert_close(at_role.edited, at_tuple.edited)
    assert not torch.allclose(at_role.edited, everywhere.edited, atol=0.1)


def test_positions_that_do_not_pair_are_refused(demo: sap.FeatureLens, ioi: Any) -> None:
    run = demo.run(ioi)
    for position in ((3, 4), tuple(range(13))):
        with pytest.raises(sap.InputError, match="positions for 12 prompts; a tuple holds one"):
            demo.intervene(run, [sap.AblateHead(0, 0, position)])
    with pytest.raises(sap.InputError, match="2 positions for 1 prompts"):
        demo.intervene(run[0], [sap.AblateHead(0, 0, (3, 4))])
    with pytest.raises(sap.InputError, match=r"no role 'S3' here; known: IO, S1"):
        demo.intervene(run, [sap.AblateHead(0, 0, "S3")])
    with pytest.raises(sap.InputError, match="not made from a data set"):
        demo.intervene(demo.run(ioi.texts[0]), [sap.AblateHead(0, 0, "S2")])
    with pytest.raises(sap.InputError, match="no source named 'abc': none is given"):
        demo.intervene(run, [sap.AblateHead(0, 0, "S2", to=sap.From("abc"))])
    with pytest.raises(sap.InputError, match="has 3 prompts and the run has 12"):
        demo.intervene(
            run,
            [sap.AblateHead(0, 0, "S2", to=sap.From("abc"))],
            sources={"abc": demo.run(ioi.texts[:3])},
        )
    with pytest.raises(sap.InputError, match="patching everywhere needs prompts of equal length"):
        demo.intervene(
            run[0],
            [sap.PatchSite("z", 0, to=sap.From("abc"))],
            sources={"abc": demo.run(f"{ioi.texts[0]} the")},
        )


def test_patching_by_role_across_lengths(demo: sap.FeatureLens, ioi: Any) -> None:
    """S2 is taken from S2 wherever it stands in the counterpart."""
    moved = ioi.with_sentence_in_front("One day it was late.")
    edits = [sap.PatchSite("attn_out", 1, "S2", to=sap.From("moved"))]
    result = demo.intervene_dataset(ioi, edits, sources={"moved": moved}, batch_size=2)
    for i in (0, 5, 11):
        one, other = demo.run(ioi.texts[i]), demo.run(moved.texts[i])
        at, there = int(ioi.positions["S2"][i]), int(moved.positions["S2"][i])
        assert at != there
        new = other.capture["attn_out", 1][0, there]
        logits = hooked(
            demo, one.tokens.tolist(), {"blocks.1.hook_attn_out": assigned((0, at), new)}
        )[0, -1]
        expected = float(logits[ioi.correct[i]] - logits[ioi.wrong[i]])
        assert float(result.edited[i]) == pytest.approx(expected, abs=1e-3)


def test_a_data_set_gives_what_its_run_gives(demo: sap.FeatureLens, ioi: Any) -> None:
    edits = {
        "feature": [sap.AblateFeature(1, 665, "END"), sap.ScaleFeature(2, 7, "S2", 2.0)],
        "mean": [sap.AblateHead(0, 1, "S2", to=sap.Mean("abc"))],
        "edge": [sap.PatchEdge("attn_out:0", "value:1", "S2", to=sap.From("abc"))],
    }
    sources = {"abc": ioi.abc()}
    by_name = demo.intervene_dataset(ioi, edits, sources=sources, batch_size=3)
    run, counterpart = demo.run(ioi), demo.run(ioi.abc())
    for name, of_name in edits.items():
        whole = demo.intervene(run, of_name, sources={"abc": counterpart})
        torch.testing.assert_close(by_name[name].edited, whole.metric, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(by_name[name].clean, whole.clean_metric, rtol=1e-4, atol=1e-4)
        assert by_name[name].mean_effect == pytest.approx(
            float((whole.metric - whole.clean_metric).mean()), abs=1e-4
        )
    scores = sap.tasks.ioi_scores(demo, ioi).logit_difference
    torch.testing.assert_close(by_name["mean"].clean, scores, rtol=1e-4, atol=1e-4)
    interval = by_name["mean"].interval()
    assert interval.low <= by_name["mean"].mean_effect <= interval.high
    assert list(by_name["mean"].table.columns) == ["clean", "edited", "effect"]


def test_induction_rows(demo: sap.FeatureLens) -> None:
    sweep = sap.tasks.InductionDataset.prefix_sweep(
        2, demo.tokenizer, 0, prefix_lengths=(1, 3), length=32
    )
    edits = [sap.PatchSite("attn_out", 1, "DESTINATION", to=None)]
    result = demo.intervene_dataset(sweep, edits)
    for row in range(4):
        tokens = sweep.tokens[row].tolist()
        at, correct = int(sweep.destination[row]), int(sweep.correct[row])
        logits = hooked(demo, [tokens], {"blocks.1.hook_attn_out": assigned((0, at), 0.0)})
        expected = float(logits[0, at].log_softmax(-1)[correct])
        assert float(result.edited[row]) == pytest.approx(expected, abs=1e-4)
    repeats = sap.tasks.InductionDataset.random_repeats(2, demo.tokenizer, 0, segment=8)
    clean = demo.intervene_dataset(repeats, []).clean
    for row in range(2):
        logits = demo.run(repeats.tokens[row][None]).logits[0].log_softmax(-1)
        here = repeats.row == row
        expected = logits[repeats.destination[here], repeats.correct[here]].mean()
        assert float(clean[row]) == pytest.approx(float(expected), abs=1e-4)
    with pytest.raises(sap.InputError, match="several repeats have no single destination"):
        demo.intervene_dataset(repeats, edits)


# -- generation ------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", HOSTS)
def test_generation(lens_of: LensMaker, host: str) -> None:
    lens = lens_of("gpt2", host)
    run = lens.run(BATCH)
    edits = [sap.AblateHead(1, 2), sap.SetFeature(2, 3, (5, 6, 2), 9.0)]
    result = lens.intervene(run, edits, max_new_tokens=4)
    model = TINY["gpt2"]()
    with torch.no_grad():
        theirs = model.generate(torch.tensor(BATCH), max_new_tokens=4, do_sample=False)[:, 7:]
    assert result.clean_generated is not None
    assert result.generated is not None
    assert torch.equal(result.clean_generated, theirs[:, : result.clean_generated.shape[1]])
    # by hand: the whole text again for each token, with the edits where they stand
    tokens = torch.tensor(BATCH)
    for _ in range(4):
        logits = lens.intervene(lens.run(tokens), edits).logits
        tokens = torch.cat([tokens, logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(result.generated, tokens[:, 7 : 7 + result.generated.shape[1]])
    assert not torch.equal(result.generated, result.clean_generated)
    assert len(result.continuations()) == 3


@pytest.mark.parametrize("model", TINY)
def test_generation_with_frozen_parts(lens_of: LensMaker, model: str) -> None:
    """Frozen parts are held over the prompt and live after it, so nothing changes without edits."""
    lens = lens_of(model, "nnsight")
    run = lens.run(BATCH)
    result = lens.intervene(run, [], EVERYTHING, max_new_tokens=5)
    assert result.generated is not None
    assert result.clean_generated is not None
    assert torch.equal(result.generated, result.clean_generated)
    edge = sap.PatchEdge("attn:0:7", "attn:1:11", 3)
    assert lens.intervene(run, [edge], EVERYTHING, max_new_tokens=2).generated is not None
    with pytest.raises(sap.InputError, match="more than the model's context of 40"):
        lens.intervene(run, [], max_new_tokens=40)


def test_unequal_results(lens_of: LensMaker) -> None:
    lens = lens_of("gpt2", "hooked_transformer")
    run = lens.run([TOKENS, TOKENS[:4], OTHER])
    result = lens.intervene(run, [sap.AblateHead(1, 2, -1)])
    target = sap.Logit(9)
    for i, tokens in enumerate([TOKENS, TOKENS[:4], OTHER]):
        alone = lens.intervene(lens.run(tokens), [sap.AblateHead(1, 2, len(tokens) - 1)])
        torch.testing.assert_close(result[i].logits, alone.logits)
        assert float(result.effect(target)[i]) == pytest.approx(
            float(alone.effect(target)), abs=1e-5
        )
    with pytest.raises(sap.InputError, match="differ in length"):
        result.logits  # noqa: B018
    frame = result.changed_features()
    assert set(frame["prompt"]) == {0, 1, 2}
    assert np.isfinite(frame["change"]).all()
