"""A survey in memory: tables written down, for tests of what reads them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from reference_survey import ROLES, bin_of, distance_edges, position_edges, role_masks


@dataclass
class Tables:
    """What the studies of surveys read, by the names of a ``Survey``."""

    facts: dict[str, Any]
    features: pd.DataFrame
    heads: pd.DataFrame
    examples: pd.DataFrame
    logits: pd.DataFrame
    sample: pd.DataFrame
    positions: pd.DataFrame
    positions_profile: pd.DataFrame
    rows: pd.DataFrame
    tokens: pd.DataFrame
    extra: dict[str, Any] = field(default_factory=dict)


LOGITS = ["layer", "feature", "rank", "sign", "token", "string", "effect"]


def from_firings(
    rows: Sequence[Sequence[int]],
    strings: Mapping[int, str],
    firings: Sequence[tuple[int, int, int, Mapping[int, float]]],
    logits: Sequence[tuple[Any, ...]] = (),
    heads: pd.DataFrame | None = None,
    n_heads: int = 2,
    bos: int = 0,
) -> Tables:
    """A survey of one layer from its firings ``(feature, row, position, {source: dfa})``.

    All firings are both the strongest and the sampled ones; all positions are drawn. The activation
    is the sum of DFA.
    """
    context = len(rows[0])
    edges, bins = distance_edges(context), position_edges(context)
    d_sae = max(feature for feature, *_ in firings) + 1
    examples, rank = [], dict.fromkeys(range(d_sae), 0)
    for feature, row, position, dfa in firings:
        by_source = np.zeros(position + 1)
        by_source[list(dfa)] = list(dfa.values())
        size = np.abs(by_source)
        at = bin_of(position - np.arange(position + 1), edges)
        examples.append(
            {
                "layer": 0,
                "feature": feature,
                "rank": rank[feature],
                "row": row,
                "position": position,
                "activation": by_source.sum(),
                "sources": np.array(list(dfa)),
                "dfa": np.array(list(dfa.values())),
                "by_distance": np.bincount(at, size, minlength=len(edges)),
                "roles": role_masks(list(rows[row]), position) @ size,
                "dfa_abs": size.sum(),
            }
        )
        rank[feature] += 1
    frame: Any = pd.DataFrame(examples)
    both = pd.concat([frame.assign(kind=kind) for kind in ("top", "sample")], ignore_index=True)
    counted = frame.assign(position_bin=bin_of(frame["position"], bins))
    profile: Any = counted.groupby(["layer", "feature", "position_bin"]).size()
    fires = np.bincount(frame["feature"], minlength=d_sae)
    places = [(row, p) for row in range(len(rows)) for p in range(context)]
    n = len(places)
    facts = {
        "provenance": {"model": "written", "fingerprints": {"saes": {"0": "x"}}},
        "rows": len(rows),
        "tokens": n,
        "positions_counted": n,
        "positions_by_bin": np.bincount(bin_of([p for _, p in places], bins)).tolist(),
        "layers": [0],
        "n_heads": n_heads,
        "d_sae": {"0": d_sae},
        "context": context,
        "bos": bos,
        "roles": list(ROLES),
        "distance_edges": edges,
        "position_edges": bins,
    }
    return Tables(
        facts=facts,
        features=pd.DataFrame(
            {"layer": 0, "feature": range(d_sae), "fires": fires, "density": fires / n}
        ),
        heads=pd.DataFrame() if heads is None else heads,
        examples=both,
        logits=pd.DataFrame(list(logits), columns=LOGITS),
        sample=frame[["row", "position", "layer", "feature", "activation"]],
        positions=pd.DataFrame(places, columns=["row", "position"]),
        positions_profile=profile.rename("fires").reset_index(),
        rows=pd.DataFrame({"row": range(len(rows)), "tokens": [np.array(r) for r in rows]}),
        tokens=pd.DataFrame({"token": list(strings), "string": list(strings.values())}),
    )
