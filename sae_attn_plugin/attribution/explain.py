"""Why an edge is there: by head, and why each head looks where it looks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from sae_attn_plugin.errors import InputError
from sae_attn_plugin.nodes import Node

if TYPE_CHECKING:
    from sae_attn_plugin.attribution.qk import QKAttribution
    from sae_attn_plugin.attribution.table import Attribution

__all__ = ["EdgeExplanation", "explain"]


@dataclass(frozen=True, eq=False)
class EdgeExplanation:
    """An attention edge, joined with the scores that make its heads look at its source.

    Attributes:
        source, target: node ids; weight: of the edge, all heads together.
        heads: one row per head, strongest first: ``weight`` (they sum to the edge), ``share`` (of
            the sum of absolute weights), ``pattern`` (attention weight from the target's position
            to the source's), ``score``, ``relative_score`` (NaN for heads that were not asked for).
        qk: by head, every term of its score.
        terms: the strongest terms: ``head, query_node, key_node, weight``.
        relative: whether the terms are those of the relative score.
    """

    source: str
    target: str
    weight: float
    heads: pd.DataFrame
    qk: Mapping[int, QKAttribution]
    terms: pd.DataFrame
    relative: bool

    def __repr__(self) -> str:
        lines = [f"{self.source} -> {self.target}: {self.weight:+.4f}"]
        of = "relative score" if self.relative else "score"
        for head, qk in self.qk.items():
            row: Any = self.heads.loc[head]
            value = qk.relative_score if self.relative else qk.score
            lines.append(
                f"  head {qk.layer}.{head}: {row['weight']:+.4f} ({row['share']:.0%}), looks with "
                f"weight {qk.pattern:.3f}, {of} {value:+.3f}, of which"
            )
            of_head: Any = self.terms[self.terms["head"] == head]
            for term in of_head.to_dict("records"):
                lines.append(
                    f"    {term['weight']:+.4f}  {term['query_node']} x {term['key_node']}"
                )
        left = len(self.heads) - len(self.qk)
        if left > 0:
            rest = float(self.heads["weight"].iloc[len(self.qk) :].sum())
            lines.append(f"  {left} other heads: {rest:+.4f}")
        return "\n".join(lines)


def explain(
    attribution: Attribution, edge: Any, *, heads: int = 3, n: int = 5, relative: bool = False
) -> EdgeExplanation:
    """See :meth:`Attribution.explain`."""
    for name, value in (("heads", heads), ("n", n)):
        if value < 1:
            raise InputError(f"explain({name}={value}): expected at least 1")
    if attribution.qk is None:
        raise InputError(
            "this attribution does not hold its run, so scores cannot be computed; attribute the "
            "prompt again"
        )
    source, target, only = _ends(edge)
    weight = _weight(attribution, source, target)
    of, to = Node.parse(source), Node.parse(target)
    split = _by_head(attribution, source, target, weight)
    if split is None or to.layer is None:
        raise InputError(
            f"{source} -> {target} passes through no head; only edges into attention features and "
            "heads have scores behind them"
        )
    if only is not None:
        if only not in split.index:
            raise InputError(
                f"head {only!r} carries nothing of {source} -> {target}; heads that do: "
                f"{', '.join(map(str, split.index))}"
            )
        chosen = [only]
        split = split.reindex([only, *(head for head in split.index if head != only)])
    else:
        chosen = [int(head) for head in split.index[:heads]]
    qk = {head: attribution.qk(to.layer, head, to.position, of.position) for head in chosen}
    frame = pd.DataFrame({"weight": split, "share": split.abs() / max(split.abs().sum(), 1e-300)})
    nan = float("nan")
    for column in ("pattern", "score", "relative_score"):
        frame[column] = [getattr(qk[head], column) if head in qk else nan for head in frame.index]
    terms: Any = [one.top(n, relative=relative).assign(head=head) for head, one in qk.items()]
    table: Any = pd.concat(terms, ignore_index=True)
    columns = ["head", "query_node", "key_node", "weight"]
    return EdgeExplanation(source, target, weight, frame, qk, table[columns], relative)


def _ends(edge: Any) -> tuple[str, str, int | None]:
    """Source, target and head of an edge in any of the forms that tables and graphs give."""
    head: Any = None
    if isinstance(edge, pd.Series | Mapping):
        source, target, head = edge["source"], edge["target"], edge.get("head")
    elif isinstance(edge, tuple | list) and len(edge) in (2, 3):
        source, target, *rest = edge
        head = rest[0] if rest else None
    else:
        raise InputError(
            f"expected an edge (source, target) or (source, target, head), or a row of a table of "
            f"edges, got {edge!r:.80}"
        )
    if isinstance(head, str):  # the key of a MultiDiGraph's edge, "5.1"
        head = head.rsplit(".", 1)[-1]
    try:
        number = None if head is None or head is pd.NA or head != head else int(head)
    except (TypeError, ValueError):
        raise InputError(
            f"{head!r} is no head; expected a number, or a key such as '5.1'"
        ) from None
    return str(source), str(target), number


def _weight(attribution: Attribution, source: str, target: str) -> float:
    edges = attribution.edges
    for name in (source, target):
        if name not in attribution.nodes.index:
            raise InputError(f"no node {name} in this attribution")
    found: Any = edges[(edges["source"] == source) & (edges["target"] == target)]
    if not len(found):
        raise InputError(f"no edge {source} -> {target} in this attribution; it may be pruned")
    return float(found["weight"].iloc[0])


def _by_head(attribution: Attribution, source: str, target: str, weight: float) -> pd.Series | None:
    """The edge's heads, strongest first, or None where it passes through none."""
    to = Node.parse(target)
    if to.kind == "head":
        return pd.Series([weight], index=[to.head], name="weight")
    if to.kind != "attn" or to.layer is None:
        return None
    row = attribution._numbers[attribution._ids.get_loc(source)]
    split = attribution.head_split(
        to.layer, np.array([to.feature]), np.array([to.position]), np.array([row])
    )[0]
    series: Any = pd.Series(split.astype(float), index=pd.RangeIndex(len(split)), name="weight")
    series = series[series != 0]
    return series.reindex(series.abs().sort_values(ascending=False, kind="stable").index)
