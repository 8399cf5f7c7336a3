"""An attribution as a networkx graph."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import networkx as nx
import pandas as pd

from sae_attn_plugin.errors import InputError

if TYPE_CHECKING:
    from sae_attn_plugin.attribution.table import Attribution


def to_networkx(attribution: Attribution, by: Literal["head"] | None = None) -> nx.DiGraph[Any]:
    """See :meth:`Attribution.to_networkx`. Attributes that do not apply to a node are left out."""
    if by not in (None, "head"):
        raise InputError(f"to_networkx(by={by!r}): expected None or 'head'")
    graph: Any = nx.MultiDiGraph() if by == "head" else nx.DiGraph()
    graph.graph.update(attribution.provenance)
    graph.graph["tokens"] = list(attribution.tokens)
    graph.graph["targets"] = [str(node) for node in attribution.roots.values()]
    graph.graph["worst_ledger_residual"] = attribution.worst_residual
    for node, attributes in zip(
        attribution.nodes.index, attribution.nodes.to_dict("records"), strict=True
    ):
        known = {str(k): _plain(v) for k, v in attributes.items() if not _missing(v)}
        graph.add_node(node, **known)
    if by == "head":
        frame = attribution.edges_by_head()
        for source, target, head, weight in frame.itertuples(index=False):
            layer = graph.nodes[target].get("layer")
            key = None if _missing(head) else f"{layer}.{head}"
            attributes = {} if key is None else {"head": int(head)}
            graph.add_edge(source, target, key=key, weight=float(weight), **attributes)
    else:
        frame = attribution.edges
        columns = (frame[name].tolist() for name in ("source", "target", "weight", "share"))
        for source, target, weight, share in zip(*columns, strict=True):
            graph.add_edge(source, target, weight=weight, share=share)
    return graph


def _missing(value: Any) -> bool:
    return value is None or value is pd.NA or value != value


def _plain(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else value
