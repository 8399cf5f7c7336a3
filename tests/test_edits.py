"""Edits as data."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

import sae_attn_plugin as sap

EDITS = [
    sap.SetFeature(1, 3, None, 2.5),
    sap.AblateFeature(1, 3, "S2", to=sap.Mean("abc", "END")),
    sap.AblateFeature(1, 3, (4, -2)),
    sap.AblateFeature(1, 3, -1, to=sap.From("other", (1, 2))),
    sap.ScaleFeature(0, 5, 2, -1.0),
    sap.Steer(2, 7, None, 0.1),
    sap.AblateError(2, "END", to=sap.From("abc")),
    sap.AblateHead(1, 4, "S1+1", to=sap.Mean()),
    sap.PatchSite("attn_out", 2, "S2"),
    sap.PatchSite("embed", position=3, to=None),
    sap.PatchEdge("attn:0:7", "value:2.1", "S2", to=sap.From("abc")),
    sap.PatchEdge("attn_err:0", "attn:1:12", 2, reader_position=(5, 6)),
    sap.AddToStream(torch.tensor([0.1, -1 / 3, 1e-30]), 2, "mlp_out", 1),
    sap.AddToStream(torch.tensor([0.1, 1 / 3], dtype=torch.float64), (2, 3)),
]


@pytest.mark.parametrize("edit", EDITS, ids=lambda e: type(e).__name__)
def test_edits_go_through_json_and_back(edit: sap.Edit) -> None:
    back = sap.Edit.from_dict(json.loads(json.dumps(edit.to_dict())))
    assert back == edit
    assert hash(back) == hash(edit)
    assert type(back) is type(edit)
    assert back.to_dict() == edit.to_dict()


def test_edits_are_told_apart() -> None:
    assert len(set(EDITS)) == len(EDITS)
    vector = torch.tensor([0.1, -1 / 3, 1e-30])
    assert sap.AddToStream(vector, 2, "mlp_out", 1) in EDITS
    assert sap.AddToStream(vector.double(), 2, "mlp_out", 1) not in EDITS
    with pytest.raises(AttributeError):
        EDITS[0].value = 3.0  # type: ignore[attr-defined]


def test_positions_of_a_data_set_become_plain() -> None:
    edit = sap.AblateFeature(1, 3, torch.tensor([4, 2]))  # type: ignore[arg-type]
    assert edit.position == (4, 2)
    assert edit == sap.AblateFeature(1, 3, [4, 2])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: sap.AblateFeature(1, 3, 2.5), "position must be a number, a role"),  # type: ignore[arg-type]
        (lambda: sap.AblateFeature(1, 3, True), "position must be"),
        (lambda: sap.AblateFeature(1, 3, ()), "position must be"),
        (lambda: sap.AblateFeature("1", 3), "layer must be a whole number"),  # type: ignore[arg-type]
        (lambda: sap.SetFeature(1, 3, 0, float("nan")), "value must be a finite number"),
        (lambda: sap.AblateHead(1, 3, to=0.0), r"to must be None \(zero\), Mean"),  # type: ignore[arg-type]
        (lambda: sap.AblateFeature(1, 3, kind="mlp"), "kind must be one of attn, tc, mlp_sae"),  # type: ignore[arg-type]
        (lambda: sap.PatchSite("pattern", 1), "cannot patch 'pattern'; known: embed"),  # type: ignore[arg-type]
        (lambda: sap.PatchEdge("attn:0", "final"), "not a writer"),
        (lambda: sap.PatchEdge("attn:0:1", "pattern:1.2"), "not a reader"),
        (lambda: sap.PatchEdge("attn_bias:0", "final", to=sap.Mean()), "only be taken away"),
        (lambda: sap.PatchEdge("embed", "value:1", reader_position=2), "only a feature has"),
        (lambda: sap.PatchEdge.between("embed@1", "mlp:1@2"), "reads nothing"),
        (lambda: sap.Freeze("pattern"), "cannot freeze pattern"),  # type: ignore[arg-type]
        (lambda: sap.Edit.from_dict({"edit": "Cut"}), "not an edit"),
        (
            lambda: sap.Edit.from_dict({"edit": "AblateHead", "layer": 1, "head": 0, "at": 2}),
            "AblateHead has no at; it has head, layer, position, to",
        ),
        (lambda: sap.Edit.from_dict({"edit": "AblateHead", "layer": 1}), "not a AblateHead"),
    ],
)
def test_values_that_do_not_fit(make: Any, message: str) -> None:
    with pytest.raises(sap.InputError, match=message):
        make()


def test_an_edge_of_a_graph() -> None:
    assert sap.PatchEdge.between("attn:0:7@2", "attn:1:3@6") == sap.PatchEdge(
        "attn:0:7", "attn:1:3", 2, reader_position=6
    )
    assert sap.PatchEdge.between("embed@2", 'logit:"a"@6') == sap.PatchEdge("embed", "final", 2)
