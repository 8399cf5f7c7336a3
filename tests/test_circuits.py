"""Circuits known on paper, found by the engine on every host."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from circuit_tables import PAGE, with_tables
from helpers import HOSTS, on_host

import sae_attn_plugin as sap
from sae_attn_plugin.demo import circuits

F32, F64 = torch.float32, torch.float64
NAMES = [make.__name__ for make in circuits.CIRCUITS]
EVERYTHING = ("patterns", "norms", "mlp", "attention")


@functools.cache
def circuit_of(name: str, dtype: torch.dtype = F32) -> circuits.Circuit:
    return getattr(circuits, name)(dtype=dtype)


@functools.cache
def lens_of(name: str, host: str = "hooked_transformer", dtype: torch.dtype = F32) -> Any:
    circuit = circuit_of(name, dtype)
    model = on_host(circuit.model, host, circuit.tokenizer)
    return sap.FeatureLens(model, circuit.saes, tokenizer=circuit.tokenizer)


@functools.cache
def found_in(name: str, host: str = "hooked_transformer", dtype: torch.dtype = F32) -> Any:
    """The run of a circuit's prompt and its whole attribution."""
    circuit = circuit_of(name, dtype)
    run = lens_of(name, host, dtype).run([list(circuit.prompt)])
    return run, run.attribute(list(circuit.targets), node_budget=None)


def allowed(name: str, host: str, dtype: torch.dtype) -> float:
    if dtype == F32:
        return 1e-5
    # Hugging Face computes RMSNorm in float32, whatever the model is in.
    rounds = name == "grouped_query_induction" and host != "hooked_transformer"
    return 1e-6 if rounds else 1e-10


on_every_host = [
    pytest.mark.parametrize("host", HOSTS),
    pytest.mark.parametrize("dtype", [F32, F64], ids=["float32", "float64"]),
    pytest.mark.parametrize("name", NAMES),
]


def everywhere(test: Callable[..., None]) -> Callable[..., None]:
    for mark in on_every_host:
        test = mark(test)
    return test


@everywhere
def test_the_model_does_what_it_was_written_for(name: str, host: str, dtype: torch.dtype) -> None:
    circuit, (run, _) = circuit_of(name, dtype), found_in(name, host, dtype)
    for position, answer in circuit.answers.items():
        assert circuit.token_names[int(run.logits[0, position].argmax())] == answer
    for (layer, head), keys in circuit.patterns.items():
        pattern = run.capture["pattern", layer][0, head]
        assert len(keys) == len(circuit.prompt)
        expected = torch.nn.functional.one_hot(torch.tensor(keys), len(keys))
        torch.testing.assert_close(pattern, expected.to(pattern), rtol=0, atol=1e-43)


def test_patterns_of_every_head_are_stated() -> None:
    for circuit in circuits.all():
        config = circuit.model.config
        heads = {
            (layer, head)
            for layer in range(config.num_hidden_layers)
            for head in range(config.num_attention_heads)
        }
        assert set(circuit.patterns) == heads


@everywhere
def test_the_graph_is_found(name: str, host: str, dtype: torch.dtype) -> None:
    circuit, (_, att) = circuit_of(name, dtype), found_in(name, host, dtype)
    agreement = circuit.compare(att)
    assert agreement.precision == agreement.recall == 1
    assert agreement.worst <= allowed(name, host, dtype)
    att.check_closure(1e-5 if allowed(name, host, dtype) > 1e-10 else 1e-10)


@everywhere
def test_constants_and_values(name: str, host: str, dtype: torch.dtype) -> None:
    circuit, (_, att) = circuit_of(name, dtype), found_in(name, host, dtype)
    assert set(circuit.constants) == {target for _, target in circuit.edges}
    for target, constant in circuit.constants.items():
        row = att.ledger.loc[target]
        into = [weight for (_, end), weight in circuit.edges.items() if end == target]
        size = sum(map(abs, into)) * allowed(name, host, dtype)
        assert row["constant"] == pytest.approx(constant, rel=0, abs=size)
        assert row["value"] == pytest.approx(sum(into) + constant, rel=0, abs=size)


@everywhere
def test_edges_by_head(name: str, host: str, dtype: torch.dtype) -> None:
    circuit, (_, att) = circuit_of(name, dtype), found_in(name, host, dtype)
    frame = att.edges_by_head().dropna(subset="head")
    found = {
        (str(source), str(target), int(head)): weight
        for source, target, head, weight in frame.itertuples(index=False)
        if abs(weight) > circuits.THRESHOLD and (str(source), str(target)) in circuit.edges
    }
    assert found == pytest.approx(
        dict(circuit.edges_by_head), rel=allowed(name, host, dtype), abs=0
    )
    for source, target in {(source, target) for source, target, _ in found}:
        split = [w for (*edge, _), w in circuit.edges_by_head.items() if edge == [source, target]]
        assert sum(split) == pytest.approx(circuit.edges[source, target], rel=1e-12)


@everywhere
def test_ablations(name: str, host: str, dtype: torch.dtype) -> None:
    """Free: as stated. With everything else held: minus the edge, if there is one."""
    circuit, (run, att) = circuit_of(name, dtype), found_in(name, host, dtype)
    lens, tolerance = lens_of(name, host, dtype), allowed(name, host, dtype)
    targets = dict(zip(map(str, att.roots.values()), circuit.targets, strict=True))
    for (feature, target), effect in circuit.effects.items():
        node = sap.Node.parse(feature)
        edits = [sap.AblateFeature(node.layer, node.feature, node.position)]  # type: ignore[arg-type]
        value = circuit.constants[target] + sum(
            abs(weight) for (_, end), weight in circuit.edges.items() if end == target
        )
        free = float(lens.intervene(run, edits).effect(targets[target]))
        assert free == pytest.approx(effect, rel=0, abs=2 * tolerance * value)
        held = float(lens.intervene(run, edits, EVERYTHING).effect(targets[target]))
        edge = circuit.edges.get((feature, target), 0.0)
        assert held == pytest.approx(-edge, rel=0, abs=2 * tolerance * value)


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("name", NAMES)
def test_ablating_an_absent_feature_changes_nothing(name: str, host: str) -> None:
    lens, (run, _) = lens_of(name, host), found_in(name, host)
    active = run.features()
    for layer, dictionary in lens.dictionaries.items():
        of_layer = active[active["layer"] == layer]
        present = set(zip(of_layer["feature"], of_layer["position"], strict=True))
        absent = [
            sap.AblateFeature(layer, feature, position)
            for feature in range(dictionary.d_sae)
            for position in range(run.tokens.shape[1])
            if (feature, position) not in present
        ]
        assert absent
        assert torch.equal(lens.intervene(run, absent).logits, run.logits)


@pytest.mark.parametrize("name", NAMES)
def test_validation_agrees(name: str) -> None:
    _, att = found_in(name, dtype=F64)
    result = sap.validate(att.to_networkx(), lens_of(name, dtype=F64), progress=False)
    assert result.frozen.max_error < 1e-10


SAY_B, LOGIT_B = ("embed@2", "attn:1:1@4"), ("attn:1:1@4", 'logit:"B"@4')
DIFFERENCE, LOGIT_A = 'logit_diff:"B"-"A"@4', 'logit:"A"@3'
FROM_MID = {("attn:0:0@2", "attn:1:0@3"), ("attn_err:0@2", "attn:1:0@3")}
MUTATIONS = [
    ("induction", {"unembed": 3.0}, {LOGIT_B}),
    ("induction", {"say": 2.0}, {SAY_B, LOGIT_B}),
    ("induction", {"copy": 0.5}, {SAY_B, LOGIT_B}),
    ("s_inhibition", {"suppress": 0.7}, {("attn:1:0@4", DIFFERENCE)}),
    ("s_inhibition", {"unembed": 1.0}, {("attn:2:1@4", DIFFERENCE)}),
    (
        "s_inhibition",
        {"move": 1.0},
        {("embed@2", "attn:2:1@4"), ("attn:1:0@4", DIFFERENCE), ("attn:2:1@4", DIFFERENCE)},
    ),
    ("two_hop_copy", {"threshold": 0.25}, FROM_MID),
    ("two_hop_copy", {"say": 1.0}, FROM_MID | {("attn:1:0@3", LOGIT_A)}),
    (
        "two_roles",
        {"offset": 0.25},
        {
            (f"{source}@{position}", logit)
            for position, feature, logit in ((3, 0, 'logit:"red"@3'), (4, 2, 'logit:"two"@4'))
            for source in (f"attn:0:{feature}", "attn_bias:0")
        },
    ),
    (
        "negation",
        {"inhibit": 0.0625},
        {
            ("attn:0:0@2", "attn:1:0@3"),
            ("attn:1:0@3", LOGIT_A),
            ("attn_err:1@3", LOGIT_A),
        },
    ),
    ("negation", {"suppress": 0.25}, {("attn:1:2@3", LOGIT_A)}),
    ("grouped_query_induction", {"second": 0.25}, {LOGIT_B}),
    ("grouped_query_induction", {"say": 1.0}, {SAY_B, LOGIT_B}),
]


@pytest.mark.parametrize(("name", "constants", "changed"), MUTATIONS)
def test_another_constant_changes_exactly_its_edges(
    name: str, constants: dict[str, float], changed: set[tuple[str, str]]
) -> None:
    original, other = circuit_of(name), getattr(circuits, name)(**constants)
    run = other.lens().run([list(other.prompt)])
    att = run.attribute(list(other.targets), node_budget=None)
    found = other.found(att)
    assert found.keys() == original.edges.keys()
    differs = {edge for edge, w in original.edges.items() if abs(found[edge] / w - 1) > 1e-3}
    assert differs == changed
    agreement = other.compare(att)
    assert agreement.precision == agreement.recall == 1
    assert agreement.worst < 1e-5


def test_a_missing_and_a_wrong_edge_are_counted() -> None:
    circuit = circuits.two_hop_copy()
    _, att = found_in("two_hop_copy")
    (first, weight), *rest = circuit.edges.items()
    one_less = dataclasses.replace(circuit, edges=dict(rest))
    agreement = one_less.compare(att)
    assert (agreement.precision, agreement.recall) == (3 / 4, 1)
    one_more = dataclasses.replace(circuit, edges={**circuit.edges, ("pos@1", "attn:0:0@2"): 1.0})
    agreement = one_more.compare(att)
    assert (agreement.precision, agreement.recall) == (1, 4 / 5)
    heavier = dataclasses.replace(circuit, edges={**circuit.edges, first: 2 * weight})
    assert heavier.compare(att).worst == pytest.approx(0.5, rel=1e-5)


def test_without_the_previous_token_head_nothing_is_found() -> None:
    circuit = circuits.induction()
    with torch.no_grad():
        circuit.model.transformer.h[0].attn.c_proj.weight.zero_()
    run = circuit.lens().run([list(circuit.prompt)])
    agreement = circuit.compare(run.attribute(list(circuit.targets), node_budget=None))
    assert agreement.recall == 0


def test_one_head_two_roles() -> None:
    """Heads do not tell the features apart; sources do."""
    circuit, (run, _) = circuit_of("two_roles"), found_in("two_roles")
    for feature, position, source in ((0, 3, 1), (2, 4, 2)):
        dfa = run.dfa(layer=0, feature=feature, position=position)
        assert len(dfa.by_head) == 1
        assert int(dfa.by_source.abs().argmax()) == source
        assert float(dfa.by_source[source]) == pytest.approx(
            circuit.edges[f"embed@{source}", f"attn:0:{feature}@{position}"], rel=1e-5
        )


def test_statements() -> None:
    assert [circuit.name for circuit in circuits.all()] == NAMES
    assert {c.model.dtype for c in circuits.all(F64)} == {F64}
    for circuit in circuits.all():
        assert min(map(abs, circuit.edges.values())) > 0.1 > circuits.THRESHOLD
        assert all(str(sap.Node.parse(node)) == node for node in circuit.nodes)
        assert len(circuit.table()) == len(circuit.edges)
        for sae, names in zip(circuit.saes, circuit.feature_names, strict=True):
            assert sae.cfg.d_sae == len(names)
    negative = [w for w in circuit_of("negation").edges.values() if w < 0]
    assert len(negative) == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        circuit_of("induction").name = "other"  # type: ignore[misc]


def test_prompts_can_be_text() -> None:
    run = circuits.s_inhibition().lens().run("<bos> A B A to")
    assert tuple(run.tokens[0].tolist()) == circuit_of("s_inhibition").prompt
    assert run.token_strings == ("<bos>", "A", "B", "A", "to")


def test_the_page_is_current() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert with_tables(text) == text, "run: python tests/circuit_tables.py"
    for name in NAMES:
        assert f"<!-- {name}: begin -->" in text
