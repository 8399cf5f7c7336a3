"""Edges joined with the scores behind them."""

from __future__ import annotations

from typing import Any

import pytest
from helpers import TrueFloat64
from test_architectures import run_of

import sae_attn_plugin as sap

pytestmark = pytest.mark.filterwarnings("ignore:HookedTransformer is deprecated")


def attribution(name: str = "llama") -> sap.Attribution:
    run = run_of(name, "nnsight")
    with TrueFloat64():  # not to be nested with that of run_of
        return run.attribute(sap.LogitDiff(7, 9), node_budget=60)


def strong_edge(att: sap.Attribution) -> tuple[str, str]:
    edges = att.edges
    inside: Any = edges[edges["target"].astype(str).str.startswith("attn:2:")]
    row: Any = inside.loc[inside["weight"].abs().idxmax()]
    return str(row["source"]), str(row["target"])


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "gemma3_text"])
def test_heads_sum_to_the_edge_and_terms_to_their_scores(name: str) -> None:
    att = attribution(name)
    source, target = strong_edge(att)
    with TrueFloat64():
        found = att.explain((source, target), heads=99, n=10**6)
        relative = att.explain((source, target), heads=2, n=10**6, relative=True)
    edges = att.edges
    weight = edges[(edges["source"] == source) & (edges["target"] == target)]["weight"].item()
    assert found.weight == weight
    assert found.heads["weight"].sum() == pytest.approx(weight, rel=1e-9)
    assert found.heads["weight"].abs().is_monotonic_decreasing
    run, at, to = run_of(name, "nnsight"), sap.Node.parse(source), sap.Node.parse(target)
    pattern = run.capture["pattern", 2][0, :, to.position, at.position]
    for head, row in found.heads.to_dict("index").items():
        terms: Any = found.terms[found.terms["head"] == head]["weight"]
        assert terms.sum() == pytest.approx(row["score"], abs=1e-9 * terms.abs().sum())
        assert row["pattern"] == pytest.approx(float(pattern[int(str(head))]), rel=1e-12)
    assert len(relative.qk) == 2
    for head, qk in relative.qk.items():
        terms: Any = relative.terms[relative.terms["head"] == head]["weight"]
        assert terms.sum() == pytest.approx(qk.relative_score, abs=1e-9 * terms.abs().sum())
    assert "other heads" in repr(relative)
    assert f"head 2.{found.heads.index[0]}: " in repr(found)


def test_every_form_of_an_edge() -> None:
    att = attribution()
    source, target = strong_edge(att)
    by_head = att.edges_by_head()
    rows = by_head[(by_head["source"] == source) & (by_head["target"] == target)]
    row: Any = rows.iloc[0]
    graph: Any = att.to_networkx(by="head")
    keys = [key for key in graph[source][target]]
    head = int(row["head"])
    whole = att.edges[(att.edges["source"] == source) & (att.edges["target"] == target)].iloc[0]
    with TrueFloat64():
        assert len(att.explain(whole, n=2).qk) == 3
        for edge in (row, (source, target, head), (source, target, keys[0])):
            found = att.explain(edge, n=2)
            assert list(found.qk) == [head]
            assert found.heads["weight"].iloc[0] == pytest.approx(row["weight"], rel=1e-9)
            assert len(found.terms) == 2


def test_edges_by_head_say_where_to_look() -> None:
    """Everything that a join needs stands on a graph's edges: head, and positions in the ids."""
    att = attribution()
    graph: Any = att.prune().to_networkx(by="head")
    plain = att.prune().to_networkx()
    for a, b in list(plain.edges)[:200]:
        parallel = graph[a][b]
        total = sum(data["weight"] for data in parallel.values())
        assert total == pytest.approx(plain[a][b]["weight"], rel=1e-6, abs=1e-9)
        if b.startswith("attn:"):
            assert {f"{graph.nodes[b]['layer']}.{d['head']}" for d in parallel.values()} == set(
                parallel
            )


@pytest.mark.parametrize(
    ("edge", "message"),
    [
        (("embed@0", "attn:9:9@9"), "no node attn:9:9@9"),
        (("attn:2:1", "b", "c", "d"), "expected an edge"),
        ("embed@0", "expected an edge"),
    ],
)
def test_edges_that_do_not_exist(edge: Any, message: str) -> None:
    with pytest.raises(sap.InputError, match=message):
        attribution().explain(edge)


def test_what_has_no_score_behind_it() -> None:
    att = attribution()
    source, target = strong_edge(att)
    root = str(att.ledger.index[0])
    edges: Any = att.edges
    direct = edges[edges["target"] == root]["source"].iloc[0]
    with pytest.raises(sap.InputError, match="passes through no head"):
        att.explain((direct, root))
    with pytest.raises(sap.InputError, match="head 77 carries nothing"):
        att.explain((source, target, 77))
    with pytest.raises(sap.InputError, match="'x' is no head"):
        att.explain((source, target, "x"))
    with pytest.raises(sap.InputError, match=r"explain\(n=0\)"):
        att.explain((source, target), n=0)
    with pytest.raises(sap.InputError, match="no edge"):
        att.explain((target, source))


def test_an_attribution_from_a_file_has_no_scores(tmp_path: Any) -> None:
    att = attribution()
    sap.save(att, tmp_path / "att.safetensors")
    again: Any = sap.load(tmp_path / "att.safetensors")
    with pytest.raises(sap.InputError, match="does not hold its run"):
        again.explain(strong_edge(att))
