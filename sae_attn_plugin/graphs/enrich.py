"""What a run knows of a graph's nodes beyond the graph: DFA, edges by head, QK pairs, examples."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from sae_attn_plugin.errors import BackendError, InputError, UnsupportedError
from sae_attn_plugin.nodes import Node

if TYPE_CHECKING:
    import networkx as nx

    from sae_attn_plugin.lens import Run

__all__ = ["enrich"]

_DIGITS = 6
_QK_NODES, _QK_HEADS, _QK_PAIRS = 40, 2, 8  # QK tables are large and few are ever opened


def enrich(
    graph: nx.DiGraph[Any],
    run: Run,
    *,
    max_features: int | None = 300,
    heads: bool = True,
    qk: bool | None = None,
    examples: Mapping[tuple[int, int], Sequence[Mapping[str, Any]]] | None = None,
) -> nx.DiGraph[Any]:
    """A copy of a graph whose nodes and edges say more, as attributes that every file keeps.

    Args:
        graph: from :meth:`Run.graph` or :meth:`Attribution.to_networkx` on this run's prompt.
        run: the run of that prompt, with the same model and SAEs.
        max_features: so many attention features get DFA, the most influential first; None: all.
        heads: split edges into features by head.
        qk: add the strongest query-key pairs behind the attention that carries most of the most
            influential features. None: if this model's scores are known here.
        examples: by ``(layer, feature)``, texts on which the feature is active: dicts with
            ``"tokens"`` and ``"activations"``, lists of equal length.

    Returns:
        A new graph of the same type. Feature nodes have ``dfa``, a dict of
        ``by_head_and_source`` (``[n_heads][position + 1]``, in units of the pre-activation) and
        ``constant``; some ``qk``, a list of dicts of ``head``, ``query``, ``key``, ``pattern`` (the
        attention weight), ``score``, ``relative_score``, ``terms`` (``[query node, key node,
        weight]``) and ``rest``, what all other terms add. Edges into features have ``by_head``, a
        dict such as ``{"5.1": weight}``.

    Raises:
        InputError: a graph of another prompt or of other SAEs, or examples of another form.
        UnsupportedError, BackendError: ``qk=True`` on a model whose scores are not known here.
    """
    if graph.graph.get("token_ids") != run.tokens[0].tolist() or len(run) != 1:
        raise InputError("the graph is of another prompt than the run; expected its own")
    if max_features is not None and max_features < 0:
        raise InputError(f"enrich(max_features={max_features}): expected at least 0")
    result = graph.copy()
    nodes = {name: Node.parse(name) for name in result}
    features = sorted(
        (name for name, node in nodes.items() if node.kind == "attn"),
        key=lambda name: -float(result.nodes[name].get("influence", 0.0)),
    )
    for name in features[:max_features]:
        _add_dfa(result.nodes[name], nodes[name], run)
    if heads and not result.is_multigraph():
        _add_heads(result, nodes, run)
    if qk is not False:
        try:
            for name in features[:max_features][:_QK_NODES]:
                _add_qk(result.nodes[name], nodes[name], run)
        except (UnsupportedError, BackendError):  # of the model, so at the first node if at all
            if qk:
                raise
    for name in features if examples else ():
        node = nodes[name]
        found = (examples or {}).get((node.layer or 0, node.feature or 0))
        if found:
            result.nodes[name]["examples"] = [_example(one, name) for one in found]
    return result


def _add_dfa(attributes: dict[str, Any], node: Node, run: Run) -> None:
    assert node.layer is not None
    assert node.feature is not None
    dfa = run.dfa(node.layer, node.feature, node.position)
    split = dfa.by_head_and_source[:, : node.position + 1].double().numpy(force=True)
    attributes["dfa"] = {
        "by_head_and_source": [[_short(value) for value in row] for row in split.tolist()],
        "constant": _short(dfa.constant),
    }


def _add_heads(graph: nx.DiGraph[Any], nodes: Mapping[str, Node], run: Run) -> None:
    from sae_attn_plugin.attribution.rdfa import edges_by_head

    rows = run.writers.rows()
    by_layer: dict[int, list[tuple[str, str]]] = defaultdict(list)
    for source, target in graph.edges:
        node = nodes[target]
        if node.kind == "attn" and node.layer is not None:
            if nodes[source] not in rows:
                raise InputError(
                    f"{source} writes nothing in this run; the graph was made with another model "
                    "or other SAEs"
                )
            by_layer[node.layer].append((source, target))
    for layer, pairs in by_layer.items():
        split = edges_by_head(
            run.frozen,
            run.writers,
            layer,
            np.array([nodes[target].feature for _, target in pairs]),
            np.array([nodes[target].position for _, target in pairs]),
            np.array([rows[nodes[source]] for source, _ in pairs]),
        )
        for pair, weights in zip(pairs, split.tolist(), strict=True):
            graph.edges[pair]["by_head"] = {
                f"{layer}.{head}": _short(weight) for head, weight in enumerate(weights) if weight
            }


def _add_qk(attributes: dict[str, Any], node: Node, run: Run) -> None:
    """The strongest pairs behind the scores of the heads and sources that carry most of it."""
    split = attributes.get("dfa", {}).get("by_head_and_source")
    if not split:
        return
    assert node.layer is not None
    sizes = np.abs(np.array(split))
    strongest = np.argsort(-sizes, axis=None, kind="stable")[:_QK_HEADS]
    found = []
    for cell in strongest.tolist():
        head, key = divmod(cell, sizes.shape[1])
        qk = run.qk(layer=node.layer, head=head, query=node.position, key=key)
        top = qk.top(_QK_PAIRS)
        pairs = zip(top["query_node"], top["key_node"], top["weight"], strict=True)
        found.append(
            {
                "head": head,
                "query": node.position,
                "key": key,
                "pattern": _short(float(qk.pattern)),
                "score": _short(float(qk.score)),
                "relative_score": _short(float(qk.relative_score)),
                "terms": [[str(one), str(other), _short(float(w))] for one, other, w in pairs],
                "rest": _short(float(qk.score) - float(top["weight"].sum())),
            }
        )
    attributes["qk"] = found


def _example(one: Any, name: str) -> dict[str, Any]:
    tokens = one.get("tokens") if isinstance(one, Mapping) else None
    values = one.get("activations") if isinstance(one, Mapping) else None
    if tokens is None or values is None or len(tokens) != len(values):
        raise InputError(
            f"an example of {name} is {one!r}; expected a dict with 'tokens' and 'activations' of "
            "equal length"
        )
    return {
        "tokens": [str(token) for token in tokens],
        "activations": [_short(float(value)) for value in values],
    }


def _short(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")
