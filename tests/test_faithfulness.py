"""Keeping only a circuit, against hooks and sae_lens by hand."""

from __future__ import annotations

import json
from typing import Any

import networkx as nx
import numpy as np
import pytest
import torch
from helpers import random_transcoder, sae_at
from typer.testing import CliRunner

import sae_attn_plugin as sap
from sae_attn_plugin import cli


@pytest.fixture(scope="module")
def lens() -> sap.FeatureLens:
    return sap.demo.load()


@pytest.fixture(scope="module")
def ioi(lens: sap.FeatureLens) -> Any:
    return sap.tasks.IOIDataset(6, lens.tokenizer, 3, prepend_bos=lens.prepend_bos)


@pytest.fixture(scope="module")
def graph(lens: sap.FeatureLens) -> Any:
    return lens.run(sap.demo.ioi_prompt()).graph(sap.LogitDiff(" Mary", " John"), max_nodes=25)


def by_hand(lens: Any, text: str, keep: Any, new: Any, new_error: Any) -> torch.Tensor:
    """Logits at the end with the features ``keep[layer]`` live at all positions; by sae_lens."""
    saes = list(sap.demo.load_saes().values())
    model, hooks = lens.backend.model, []
    for layer, sae in enumerate(saes):

        def edit(z: torch.Tensor, hook: Any, sae: Any = sae, layer: int = layer) -> torch.Tensor:  # noqa: ARG001
            acts = sae.encode(z)
            error = z - sae.decode(acts)
            features, errors = keep[layer]
            other = new[layer].expand_as(acts).clone()
            other[..., features] = acts[..., features]
            return sae.decode(other) + (error if errors else new_error[layer])

        hooks.append((f"blocks.{layer}.attn.hook_z", edit))
    with torch.no_grad():
        return model.run_with_hooks(lens.to_tokens(text), fwd_hooks=hooks)[0, -1]


def kept(names: Any) -> dict[int, tuple[list[int], bool]]:
    found: dict[int, tuple[list[int], bool]] = {layer: ([], False) for layer in range(4)}
    for name in names:
        kind, layer, *feature = name.split(":")
        features, errors = found[int(layer)]
        if kind == "attn":
            features.append(int(feature[0]))
        else:
            errors = True
        found[int(layer)] = features, errors
    return found


@pytest.mark.parametrize("ablate", ["mean", "zero"])
def test_against_sae_lens(lens: Any, ioi: Any, graph: Any, ablate: Any) -> None:
    found = sap.faithfulness(graph, lens, ioi, ablate=ablate, minimality=2, shares=(0.2, 1))
    saes = list(sap.demo.load_saes().values())
    new, new_error = [], []
    for layer, sae in enumerate(saes):
        acts, errors = [], []
        for text in ioi.abc().texts:
            z = lens.run(text).capture["z", layer][0]
            with torch.no_grad():
                acts.append(sae.encode(z))
                errors.append(z - sae.decode(acts[-1]))
        zero = ablate == "zero"
        new.append(torch.cat(acts).mean(0) * (not zero))
        new_error.append(torch.cat(errors).mean(0) * (not zero))

    def metric(names: Any) -> float:
        values = []
        for i, text in enumerate(ioi.texts):
            logits = by_hand(lens, text, kept(names), new, new_error)
            values.append(float(logits[ioi.correct[i]] - logits[ioi.wrong[i]]))
        return float(np.mean(values))

    assert found.circuit == pytest.approx(metric(found.nodes), abs=1e-3)
    assert found.empty == pytest.approx(metric([]), abs=1e-3)
    assert found.model == pytest.approx(
        float(sap.tasks.ioi_scores(lens, ioi).logit_difference.mean()), abs=1e-3
    )
    count = int(found.curve["nodes"].iloc[0])
    assert found.curve["metric"].iloc[0] == pytest.approx(metric(found.nodes[:count]), abs=1e-3)
    name, without = found.minimality.loc[0, ["node", "metric"]]
    assert without == pytest.approx(metric([n for n in found.nodes if n != name]), abs=1e-3)
    span = found.model - found.empty
    assert found.faithful.value == pytest.approx((found.circuit - found.empty) / span)
    assert found.minimality.loc[0, "drop"] == pytest.approx((found.circuit - without) / span)


def test_everything_kept_is_the_model(lens: Any) -> None:
    """A circuit of every active feature and error, at its own position."""
    alone = sap.tasks.IOIDataset(1, lens.tokenizer, 3, prepend_bos=lens.prepend_bos)
    whole: Any = nx.DiGraph(model="demo")
    for node in lens.run(alone.texts[0]).writers.rows():
        if node.kind in ("attn", "attn_err"):
            whole.add_node(str(node), influence=1.0)
    found = sap.faithfulness(
        whole, lens, alone, ablate="zero", minimality=0, shares=(0, 1), positions="same"
    )
    assert found.circuit == pytest.approx(found.model, abs=1e-3)
    assert found.faithful.value == pytest.approx(1, abs=1e-3)
    assert found.cpr == pytest.approx(0.5, abs=1e-3)
    assert found.cmd == pytest.approx(0.5, abs=1e-3)


def test_roles_and_resampling(lens: Any, ioi: Any, graph: Any) -> None:
    roles = {2: "S1", 4: "IO", 10: "S2", 14: "END"}
    found = sap.faithfulness(
        graph,
        lens,
        ioi,
        ablate="resample",
        positions=roles,
        minimality=0,
        shares=(1,),
    )
    # the complement keeps all but the circuit: the same as patching the circuit from the others
    edits: list[sap.Edit] = []
    for name in found.nodes:
        body, role = name.split("@")
        kind, layer, *feature = body.split(":")
        other = sap.From("abc")
        edits.append(
            sap.AblateFeature(int(layer), int(feature[0]), role, to=other)
            if kind == "attn"
            else sap.AblateError(int(layer), role, to=other)
        )
    patched = lens.intervene_dataset(ioi, edits, sources={"abc": ioi.abc()}).edited
    assert found.complement == pytest.approx(float(patched.mean()), abs=1e-3)
    assert 0 < len(found.nodes) < 25


def test_a_circuit_of_many_prompts(lens: Any, ioi: Any) -> None:
    """Components of averaged attributions, the most influential first, everywhere or by role."""
    train = sap.tasks.IOIDataset(5, lens.tokenizer, 9, prepend_bos=lens.prepend_bos)
    many = lens.attribute_many(train, nodes=1, edges=1, progress=False)
    options: Any = {"ablate": "zero", "minimality": 0, "shares": (0, 0.5, 1)}
    found = sap.faithfulness(many, lens, ioi, max_nodes=40, **options)
    frame = many.nodes[many.nodes["kind"].isin(["attn", "attn_err"])]
    body = frame.index.str.partition("@").get_level_values(0)
    strongest = frame["influence"].groupby(body).sum().sort_values(ascending=False)
    assert list(found.nodes) == list(strongest.index[:40])
    by_hand: Any = nx.DiGraph()
    for name, influence in strongest.iloc[:40].items():
        by_hand.add_node(f"{name}@0", influence=influence)
    again = sap.faithfulness(by_hand, lens, ioi, **options)
    assert (again.nodes, again.circuit) == (found.nodes, found.circuit)

    whole = sap.faithfulness(many, lens, ioi, **options)
    assert len(whole.nodes) == len(strongest)
    assert whole.faithful.value > found.faithful.value  # most of the model's features

    at_roles = sap.faithfulness(many, lens, ioi, positions="same", max_nodes=40, **options)
    of_roles = frame[frame["role"] != "other"]["influence"].sort_values(ascending=False)
    expected = [name for name in of_roles.index[:40] if "=" not in name]
    assert [name for name in at_roles.nodes if name in set(of_roles.index)] == expected
    edits: list[sap.Edit] = []
    for name in at_roles.nodes:
        body, role = name.split("@")
        kind, layer, *feature = body.split(":")
        edits.append(
            sap.AblateFeature(int(layer), int(feature[0]), role)
            if kind == "attn"
            else sap.AblateError(int(layer), role)
        )
    ablated = lens.intervene_dataset(ioi, edits).edited
    assert at_roles.complement == pytest.approx(float(ablated.mean()), abs=1e-3)
    with pytest.raises(sap.InputError, match="have roles already"):
        sap.faithfulness(many, lens, ioi, positions={14: "END"})
    with pytest.raises(sap.InputError, match="max_nodes=0: expected at least 1"):
        sap.faithfulness(many, lens, ioi, max_nodes=0)
    with pytest.raises(sap.InputError, match="expected 'all', 'same', or roles"):
        sap.faithfulness(many, lens, ioi, positions="some")  # type: ignore[arg-type]


def test_a_report_is_written(lens: Any, ioi: Any, graph: Any, tmp_path: Any) -> None:
    found = sap.faithfulness(graph, lens, ioi, minimality=1, shares=(0, 0.5, 1))
    data = json.loads(found.save(tmp_path / "report.json").read_text())
    assert data["cpr"] == found.cpr
    assert len(data["curve"]) == 3
    assert found.save(tmp_path / "curve.PNG").read_bytes().startswith(b"\x89PNG")


def call(*arguments: object) -> Any:
    return CliRunner().invoke(cli.app, ["faithfulness", *map(str, arguments)])


def test_the_command_on_a_graph_file(lens: Any, graph: Any, tmp_path: Any) -> None:
    """The report of the call, on the model that the file names; the screen shows its numbers."""
    file, report, picture = (tmp_path / name for name in ("g.json", "r.json", "r.png"))
    sap.save(graph, file)
    options = ("--prompts", 4, "--seed", 3, "--max-nodes", 6, "--minimality", 2, "--no-errors")
    result = call(file, *options, "--ablate", "zero", "--out", report, "--out", picture)
    assert result.exit_code == 0, result.output
    ioi = sap.tasks.IOIDataset(4, lens.tokenizer, 3, prepend_bos=lens.prepend_bos)
    found = sap.faithfulness(
        graph, lens, ioi, ablate="zero", errors=False, max_nodes=6, minimality=2
    )
    assert json.loads(report.read_text()) == found.to_dict()
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert f"6 components on {len(ioi)} ioi prompts, the others at zero" in result.output
    for shown in (found.circuit, found.complement, found.model, found.empty):
        assert f"{shown:.4f}" in result.output
    assert f"CPR {found.cpr:.3f}, CMD {found.cmd:.3f}" in result.output

    result = call(file, "--task", "induction", "--prompts", 3, "--minimality", 0)
    assert result.exit_code == 0, result.output
    rows = sap.tasks.InductionDataset.random_repeats(
        3, lens.tokenizer, 0, prepend_bos=lens.prepend_bos
    )
    again = sap.faithfulness(graph, lens, rows, minimality=0)
    assert f"{again.circuit:.4f}" in result.output


@pytest.mark.parametrize("transcoders", [False, True])
def test_the_command_averages_prompts(tmp_path: Any, transcoders: bool) -> None:
    lens, report = sap.demo.load(transcoders=transcoders), tmp_path / "r.json"
    options = ("--average", 3, "--prompts", 4, "--seed", 1, "--max-nodes", 9, "--minimality", 1)
    kind = "tc" if transcoders else "attn"
    given = ("--transcoders", "demo", "--kinds", "tc") if transcoders else ()
    result = call("--model", "demo", *options, *given, "--positions", "same", "--out", report)
    assert result.exit_code == 0, result.output
    few, others = (
        sap.tasks.IOIDataset(n, lens.tokenizer, seed, prepend_bos=lens.prepend_bos)
        for n, seed in ((3, 2), (4, 1))
    )
    many = lens.attribute_many(few, nodes=1, edges=1)
    found = sap.faithfulness(
        many, lens, others, kinds=[kind], positions="same", max_nodes=9, minimality=1
    )
    assert json.loads(report.read_text()) == found.to_dict()
    assert {name.partition(":")[0].removesuffix("_err") for name in found.nodes} == {kind}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give a graph file, or --model"),
        (("--model", "demo", "--task", "induction"), "give a graph file"),
        (("--model", "demo", "--residual-saes", "x"), "--residual-saes go with a graph file"),
        (("--model", "demo", "--saes", "x"), "leave --saes out"),
        (("--model", "demo", "--device", "meta"), "runs on the cpu here; leave --device out"),
        (("--model", "demo", "--transcoders", "x"), "--transcoders demo"),
        (("--model", "demo", "--prompts", "0"), "--prompts 0: expected at least 1"),
        (("--model", "demo", "--minimality", "-1"), "--minimality -1: expected at least 0"),
        (("--model", "demo", "--out", "r.txt"), "expected a path that ends in .json"),
        (("--model", "demo", "--kinds", "tc", "--average", "1"), "expected some of attn"),
        (("nowhere.json",), "nowhere.json"),
        (("g.json", "--out", "g.json"), "is the graph itself"),
        (("g.json", "--positions", "same"), "give roles, or positions='all'"),
    ],
)
def test_the_command_refuses(
    graph: Any, tmp_path: Any, monkeypatch: Any, arguments: Any, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    sap.save(graph, "g.json")
    before = (tmp_path / "g.json").read_bytes()
    result = call(*arguments)
    assert result.exit_code == 2, result.output
    assert message in " ".join(result.output.split())
    assert [path.name for path in tmp_path.iterdir()] == ["g.json"]
    assert (tmp_path / "g.json").read_bytes() == before


def test_what_does_not_fit(lens: Any, ioi: Any, graph: Any) -> None:
    with pytest.raises(sap.InputError, match="ablate must be"):
        sap.faithfulness(graph, lens, ioi, ablate="noise")  # type: ignore[arg-type]
    with pytest.raises(sap.InputError, match="shares must lie"):
        sap.faithfulness(graph, lens, ioi, shares=(0, 2))
    with pytest.raises(sap.InputError, match="no features of attention SAEs"):
        sap.faithfulness(graph, lens, ioi, positions={0: "END"})
    moved = ioi.with_sentence_in_front("One day it was late.")
    with pytest.raises(sap.InputError, match="paired prompts need equal lengths"):
        sap.faithfulness(graph, lens, ioi, ablate="resample", reference=moved, minimality=0)


# -- dictionaries of other kinds -------------------------------------------------------------------


@pytest.fixture(scope="module")
def mixed(lens: Any) -> Any:
    """The demo model with SAEs on z and on what attention adds, transcoders with and without a skip
    connection, and an SAE on what an MLP adds: ``(lens, saes, mlps)``."""
    d_model = lens.backend.geometry.d_model
    saes: dict[int, Any] = {
        0: next(iter(sap.demo.load_saes().values())),
        1: sae_at(1, "hook_attn_out", d_model),
    }
    mlps: dict[int, Any] = {
        0: random_transcoder(0, d_model, hooks=("ln2.hook_normalized", "hook_mlp_out")),
        1: random_transcoder(
            1,
            d_model,
            architecture="skip_transcoder",
            hooks=("hook_resid_mid", "hook_mlp_out"),
        ),
        2: sae_at(2, "hook_mlp_out", d_model),
    }
    found = sap.FeatureLens(
        lens.backend.model, saes, transcoders=mlps, prepend_bos=lens.prepend_bos
    )
    return found, saes, mlps


def parts_of(sae: Any, read: torch.Tensor, value: torch.Tensor) -> tuple[Any, Any, Any]:
    """Activations, the skip connection's share, and the error; by sae_lens."""
    acts = sae.encode(read)
    skip = sae(read) - sae.decode(acts)
    return acts, skip, value - sae.decode(acts) - skip


def mixed_by_hand(mixed: Any, text: str, keep: Any, new: Any, errors: bool) -> torch.Tensor:
    """Logits at the end with the components ``keep`` live, by hooks and sae_lens."""
    lens, saes, mlps = mixed
    model, hooks, seen = lens.backend.model, [], {}

    def edit_of(place: Any, sae: Any) -> Any:
        def edit(value: torch.Tensor, hook: Any) -> torch.Tensor:  # noqa: ARG001
            acts, skip, error = parts_of(sae, read_at(place, value, seen, model), value)
            other, new_error = new[place]
            wanted = other.expand_as(acts).clone()
            features = [f for kind, layer, f in keep if (kind, layer) == place]
            wanted[..., features] = acts[..., features]
            whole = not errors or (f"{place[0]}_err", place[1], None) in keep
            return sae.decode(wanted) + skip + (error if whole else new_error)

        return edit

    for layer, sae in saes.items():
        site = "attn.hook_z" if layer == 0 else "hook_attn_out"
        hooks.append((f"blocks.{layer}.{site}", edit_of(("attn", layer), sae)))
    for layer, sae in mlps.items():
        kind = "mlp_sae" if layer == 2 else "tc"
        hooks.append(
            (f"blocks.{layer}.hook_resid_mid", lambda x, hook: seen.update({hook.layer(): x}))
        )
        hooks.append((f"blocks.{layer}.hook_mlp_out", edit_of((kind, layer), sae)))
    with torch.no_grad():
        return model.run_with_hooks(lens.to_tokens(text), fwd_hooks=hooks)[0, -1]


def read_at(place: Any, value: torch.Tensor, streams: Any, model: Any) -> torch.Tensor:
    kind, layer = place
    if kind != "tc":
        return value
    x = streams[layer]
    if layer == 1:
        return x
    x = x - x.mean(-1, keepdim=True)
    return x / (x.pow(2).mean(-1, keepdim=True) + model.cfg.eps).sqrt()


@pytest.mark.parametrize("errors", [True, False])
@pytest.mark.parametrize("ablate", ["mean", "zero"])
def test_transcoders_and_saes_everywhere(mixed: Any, ioi: Any, ablate: Any, errors: bool) -> None:
    lens, saes, mlps = mixed
    graph = lens.run(sap.demo.ioi_prompt()).graph(sap.LogitDiff(" Mary", " John"), max_nodes=60)
    places = {("attn", layer): sae for layer, sae in saes.items()}
    places |= {("mlp_sae" if layer == 2 else "tc", layer): sae for layer, sae in mlps.items()}
    found = sap.faithfulness(
        graph, lens, ioi, ablate=ablate, errors=errors, minimality=0, shares=(0, 1)
    )
    keep = set()
    for name in found.nodes:
        kind, layer, *feature = name.split(":")
        keep.add((kind, int(layer), int(feature[0]) if feature else None))
    assert {(kind.removesuffix("_err"), layer) for kind, layer, _ in keep} >= {
        *(("attn", 0), ("attn", 1), ("tc", 0)),
        *([("tc", 1), ("mlp_sae", 2)] if errors else []),
    }
    assert any(kind.endswith("_err") for kind, *_ in keep) == errors
    new: dict[Any, Any] = {}
    for (kind, layer), sae in places.items():
        of_place = []
        for text in ioi.abc().texts:
            capture = lens.run(text).capture
            site = {"attn": "z" if layer == 0 else "attn_out"}.get(kind, "mlp_out")
            value = capture[site, layer]
            streams = {layer: capture["resid_pre", layer] + capture["attn_out", layer]}
            with torch.no_grad():
                read = read_at((kind, layer), value, streams, lens.backend.model)
                acts, _, error = parts_of(sae, read, value)
            of_place.append((acts[0], error[0]))
        means = tuple(torch.cat(part).mean(0) for part in zip(*of_place, strict=True))
        new[kind, layer] = tuple(part * (ablate == "mean") for part in means)

    def metric(keep: Any) -> float:
        values = []
        for i, text in enumerate(ioi.texts):
            logits = mixed_by_hand(mixed, text, keep, new, errors)
            values.append(float(logits[ioi.correct[i]] - logits[ioi.wrong[i]]))
        return float(np.mean(values))

    assert found.empty == pytest.approx(metric(set()), rel=1e-4, abs=1e-3)
    assert found.circuit == pytest.approx(metric(keep), rel=1e-4, abs=1e-3)
    assert abs(found.circuit - found.empty) > 0.05
    assert found.about["kinds"] == ["attn", "tc", "mlp_sae"]


def test_some_kinds_alone(mixed: Any, lens: Any, ioi: Any) -> None:
    """Dictionaries of other kinds stay out of the way, as if the lens had none."""
    whole, saes, _ = mixed
    prompt, target = sap.demo.ioi_prompt(), sap.LogitDiff(" Mary", " John")
    graph = whole.run(prompt).graph(target, max_nodes=60)
    alone = sap.FeatureLens(lens.backend.model, saes, prepend_bos=lens.prepend_bos)
    options: Any = {"ablate": "zero", "minimality": 0, "shares": (1,)}
    found = sap.faithfulness(graph, whole, ioi, kinds="attn", **options)
    expected = sap.faithfulness(graph, alone, ioi, **options)
    assert found.nodes == expected.nodes
    assert (found.circuit, found.empty) == pytest.approx((expected.circuit, expected.empty))
    other = sap.faithfulness(graph, whole, ioi, kinds=["tc", "mlp_sae"], **options)
    assert {name.partition(":")[0].removesuffix("_err") for name in other.nodes} == {
        "tc",
        "mlp_sae",
    }
    for kinds in ("resid", ["attn", "head"], []):
        with pytest.raises(sap.InputError, match="expected some of attn, tc, mlp_sae"):
            sap.faithfulness(graph, whole, ioi, kinds=kinds)
