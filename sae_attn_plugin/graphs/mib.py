"""Attribution graphs as circuits of heads, in the JSON of MIB and EAP-IG.

Features are summed to heads: a feature's vector is split by the head whose slice of its decoder
wrote it, and what a feature reads by the head that reads it. So an edge between features becomes
edges from heads to the value inputs of heads (``a0.h1->a3.h4<v>``).

Only the path through values is ours. Query and key inputs, and the inputs of MLPs, are edges of the
format too; they stand in the file with score 0 and outside the circuit, which says nothing about
them. The features of an MLP's transcoder read its input (``a0.h1->m3``), where the graph has them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch

from sae_attn_plugin.attribution.readers import (
    StreamReader,
    feature_readers,
    mlp_feature_readers,
)
from sae_attn_plugin.errors import InputError, UnsupportedError
from sae_attn_plugin.nodes import RESIDUAL_KINDS, Logit, LogitDiff, Node, unquote

if TYPE_CHECKING:
    import networkx as nx
    from jaxtyping import Float
    from torch import Tensor

    from sae_attn_plugin.attribution.frozen import FrozenLayer
    from sae_attn_plugin.backends.protocol import Geometry
    from sae_attn_plugin.lens import Run

__all__ = ["to_mib"]

_MLP = ("mlp", "tc", "mlp_sae")  # and what is missing of them
_TOLERANCE = 1e-3  # of a target's edges; other runs, and other precisions, miss by far more
_NOTE = (
    "Scores of attribution through values only (<v>): query and key inputs, and inputs of MLPs "
    "without a transcoder, are not attributed, have score 0 and are outside the circuit."
)


def to_mib(graph: nx.DiGraph[Any], run: Run) -> dict[str, Any]:
    """A graph as a circuit document of MIB and EAP-IG: heads, MLPs, ``input`` and ``logits``.

    The score of an edge is activation times gradient along the paths of the graph, in units of the
    graph's target (the mean over targets, where there are several): the sum, over the edges between
    features that it stands for, of their weight times the derivative of the target with respect to
    the pre-activation they end in, with patterns and norm scales frozen. The scores of the edges
    into ``logits``, with ``unassigned["logits"]`` (output biases, which no head writes),
    ``constant`` and ``pruned`` of the extra key ``sae_attn``, sum to the target's value.

    An edge is in the circuit if it stands for at least one edge of the graph, a node if one of its
    edges is.

    Args:
        graph: from :meth:`Attribution.to_networkx`, pruned or not; parallel edges are summed.
        run: the run the graph is of, which splits features by head.

    Raises:
        InputError: a graph without targets, of another run, or with nodes that were merged.
        UnsupportedError: dictionaries or targets that have no split by head.
    """
    _check_run(graph, run)
    targets = _targets(graph)
    gradient = _gradients(graph, targets)
    geometry = run.lens.backend.geometry
    scores: defaultdict[tuple[str | None, str], float] = defaultdict(float)
    parts = _Parts(run)
    for target, slope in gradient.items():
        for (component, end), value in _split_edges(graph, run, parts, target).items():
            scores[component, end] += value * slope
    names = list(_edge_names(geometry))
    inside = {f"{component}->{end}" for component, end in scores if component is not None}
    used = {end for name in inside for end in name.split("<")[0].split("->")}
    scored = {f"{component}->{end}": value for (component, end), value in scores.items()}
    ledger = {
        key: sum(graph.nodes[t].get(key, 0.0) for t in targets) / len(targets)
        for key in ("pre_activation", "constant", "pruned_in")
    }
    return {
        "cfg": {
            "n_layers": geometry.n_layers,
            "n_heads": geometry.n_heads,
            "parallel_attn_mlp": geometry.parallel,
            "d_model": geometry.d_model,
        },
        "nodes": {
            name: {"in_graph": name in used or name == "logits"} for name in _node_names(geometry)
        },
        "edges": {
            name: {"score": scored.get(name, 0.0), "in_graph": name in inside} for name in names
        },
        "sae_attn": {
            "note": _NOTE,
            "paths": ["v"],
            "targets": targets,
            "value": ledger["pre_activation"],
            "constant": ledger["constant"],
            "pruned": ledger["pruned_in"],
            "unassigned": {end: scores[None, end] for none, end in scores if none is None},
            "model": graph.graph.get("model"),
            "prompt": graph.graph.get("prompt"),
            "token_ids": graph.graph.get("token_ids"),
        },
    }


# -- the graph -----------------------------------------------------------------------------------


def _check_run(graph: nx.DiGraph[Any], run: Run) -> None:
    tokens = graph.graph.get("token_ids")
    if tokens != run.tokens[0].tolist() or len(run) != 1:
        raise InputError(
            f"the graph is of the token ids {tokens}, the run of {run.tokens.tolist()}; expected "
            "the run that the graph was made from"
        )


def _targets(graph: nx.DiGraph[Any]) -> list[str]:
    targets = [t for t in graph.graph.get("targets", ()) if t in graph]
    if not targets:
        raise InputError("the graph names no target that it holds; expected 'targets'")
    return targets


def _in_weights(graph: nx.DiGraph[Any], target: str) -> dict[str, float]:
    weights: defaultdict[str, float] = defaultdict(float)
    for source, _, weight in graph.in_edges(target, data="weight"):
        weights[source] += weight
    return dict(weights)


def _gradients(graph: nx.DiGraph[Any], targets: Iterable[str]) -> dict[str, float]:
    """d target / d pre-activation along the graph, of every node with in-edges, from the top down.

    An active feature's activation moves with its pre-activation, one to one.
    """
    import networkx as nx

    targets = list(targets)
    gradient: defaultdict[str, float] = defaultdict(float)
    for target in targets:
        gradient[target] += 1 / len(targets)
    try:
        order = list(nx.topological_sort(graph))
    except nx.NetworkXUnfeasible:
        raise InputError("the graph has a cycle; expected an attribution graph") from None
    for name in reversed(order):
        activation = graph.nodes[name].get("activation")
        if activation and graph.in_degree(name):
            gradient[name] += sum(
                weight / activation * gradient[target]
                for _, target, weight in graph.out_edges(name, data="weight")
            )
    return {name: value for name, value in gradient.items() if graph.in_degree(name)}


# -- what writes and what reads, by head -----------------------------------------------------------


def _split_edges(
    graph: nx.DiGraph[Any], run: Run, parts: _Parts, target: str
) -> dict[tuple[str | None, str], float]:
    """The edges into a target, summed by the component that writes and the input that reads."""
    weights = _in_weights(graph, target)
    ends, readers = _readers(run, Node.parse(target))
    size = sum(map(abs, weights.values()))
    by_position: defaultdict[int, list[str]] = defaultdict(list)
    for source in weights:
        by_position[Node.parse(source).position].append(source)
    found: defaultdict[tuple[str | None, str], float] = defaultdict(float)
    for position, sources in by_position.items():
        of_sources = [parts.of(source) for source in sources]
        vectors = torch.cat([vectors for _, vectors in of_sources])
        values = (vectors @ readers(position).T).double()
        counts = [len(names) for names, _ in of_sources]
        for source, value in zip(sources, values.split(counts), strict=True):
            if abs(float(value.sum()) - weights[source]) > _TOLERANCE * size:
                raise InputError(
                    f"the edge {source} -> {target} is {weights[source]:.6g} in the graph and "
                    f"{float(value.sum()):.6g} in the run; expected the graph's own run"
                )
        names = [name for names, _ in of_sources for name in names]
        for name, row in zip(names, values.tolist(), strict=True):
            for end, value in zip(ends, row, strict=True):
                found[name, end] += value
    return found


class _Parts:
    """The vectors of the graph's sources, by the component that writes them, each once."""

    def __init__(self, run: Run) -> None:
        self.run, self.rows = run, run.writers.rows()
        self.known: dict[str, tuple[list[str | None], Float[Tensor, "part d_model"]]] = {}

    def of(self, name: str) -> tuple[list[str | None], Float[Tensor, "part d_model"]]:
        """Components and their vectors; None for what no head writes, as the output bias."""
        if name not in self.known:
            split = self._split(Node.parse(name))
            vectors = torch.stack([vector for _, vector in split])
            self.known[name] = [component for component, _ in split], vectors
        return self.known[name]

    def _split(self, node: Node) -> list[tuple[str | None, Float[Tensor, " d_model"]]]:
        if node.kind.startswith(RESIDUAL_KINDS):
            raise UnsupportedError(
                f"{node} is a part of the whole stream, which many components wrote; a circuit of "
                "heads needs a graph without expand='residual'"
            )
        if node not in self.rows:
            raise InputError(f"the node {node} is not in the run; expected a graph as attributed")
        whole = self.run.writers.vectors[self.rows[node]]
        if node.kind in ("embed", "pos"):
            return [("input", whole)]
        if node.kind.startswith(_MLP):
            return [(f"m{node.layer}", whole)]
        assert node.layer is not None
        if node.kind == "head":
            return [(f"a{node.layer}.h{node.head}", whole)]
        frozen = self.run.frozen.layers[node.layer]
        if frozen.dictionary is not None and frozen.dictionary.writes != "z":
            raise UnsupportedError(
                f"the SAE of layer {node.layer} writes to the residual stream, not to heads; a "
                "circuit of heads needs SAEs on hook_z"
            )
        heads = self._by_head(node, frozen)
        if self.run.frozen.normalization == "layer":
            heads = heads - heads.mean(-1, keepdim=True)  # as the writers are
        rest = whole - heads.sum(0)
        if node.kind != "attn_bias":  # of which the output bias is no head's
            if rest.abs().max() > _TOLERANCE * whole.abs().max().clamp_min(1e-30):
                raise UnsupportedError(
                    f"the SAE of layer {node.layer} writes to the residual stream, not to heads; "
                    "a circuit of heads needs SAEs on hook_z"
                )
            return [(f"a{node.layer}.h{h}", vector) for h, vector in enumerate(heads)]
        return [
            *((f"a{node.layer}.h{h}", vector) for h, vector in enumerate(heads)),
            (None, rest),
        ]

    def _by_head(self, node: Node, layer: FrozenLayer) -> Float[Tensor, "head d_model"]:
        dictionary, encoded, at = layer.dictionary, layer.encoded, node.position
        if dictionary is None or encoded is None:  # only b_O, which is no head's
            return layer.z.new_zeros(layer.z.shape[1], layer.weights.W_O.shape[-1])
        if node.kind == "attn":
            here = (encoded.feature == node.feature) & (encoded.position == at)
            index = torch.tensor([node.feature], device=layer.z.device)
            strength = encoded.activation[here] * encoded.scale[at, 0]
            z = dictionary.decoder(index, layer.z.dtype)[0] * strength
        elif node.kind == "attn_err":
            z = layer.error[at]
        else:
            z = dictionary.bias(encoded.scale, encoded.mean)[at]
        out = torch.einsum("he,hed->hd", z.to(layer.z.dtype), layer.weights.W_O)
        return layer.after(out, torch.full((len(out),), at, device=out.device))


def _readers(
    run: Run, node: Node
) -> tuple[list[str], Callable[[int], Float[Tensor, "end d_model"]]]:
    """The inputs through which a target reads, and their readers at a source position."""
    if node.kind == "attn":
        assert node.layer is not None
        device = run.frozen.embed.device
        one = feature_readers(
            run.frozen.layers[node.layer],
            torch.tensor([node.feature], device=device),
            torch.tensor([node.position], device=device),
        ).part()
        heads, weights = one.heads[0], one.weights[0]
        ends = [f"a{node.layer}.h{h}<v>" for h in range(len(heads))]
        return ends, lambda position: heads * weights[:, position, None]
    if node.kind == "tc":
        return [f"m{node.layer}"], _mlp_reader(run, node)
    if node.kind not in ("logit", "logit_diff"):
        raise UnsupportedError(
            f"the target {node} cannot end a circuit of heads; expected a logit, a logit "
            "difference, or features of attention or of transcoders"
        )
    tokens = unquote(node.label or "")
    target = (Logit if node.kind == "logit" else LogitDiff)(*tokens, position=node.position)
    reader = run._resolve(target)[1]
    assert isinstance(reader, StreamReader)
    return ["logits"], lambda _: reader.vector[None]


def _mlp_reader(run: Run, node: Node) -> Callable[[int], Float[Tensor, "end d_model"]]:
    """What a transcoder feature reads, at its own position."""
    assert node.layer is not None
    mlp, device = run.frozen.layers[node.layer].mlp, run.frozen.embed.device
    assert mlp is not None
    feature = torch.tensor([node.feature], device=device)
    found = mlp_feature_readers(mlp, feature, torch.tensor([node.position], device=device), None)
    if not found.centred and run.writers.means is not None:
        raise UnsupportedError(
            f"the transcoder of layer {node.layer} reads the residual stream without centring; a "
            "circuit of heads is not known for it"
        )
    return lambda _: found.vectors


# -- the names of the format -----------------------------------------------------------------------


def _node_names(g: Geometry) -> Iterator[str]:
    yield "input"
    for layer in range(g.n_layers):
        yield from (f"a{layer}.h{head}" for head in range(g.n_heads))
        yield f"m{layer}"
    yield "logits"


def _edge_names(g: Geometry) -> Iterator[str]:
    """Every edge of the format, in its order: who writes before whom."""
    before = ["input"]
    for layer in range(g.n_layers):
        heads = [f"a{layer}.h{head}" for head in range(g.n_heads)]
        for source in before:
            yield from (f"{source}->{head}<{way}>" for head in heads for way in "qkv")
        for source in before if g.parallel else [*before, *heads]:
            yield f"{source}->m{layer}"
        before += [*heads, f"m{layer}"]
    yield from (f"{source}->logits" for source in before)
