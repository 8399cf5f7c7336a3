"""Other ways to the same numbers, as well as they can be done: what the engine is compared with."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from sae_attn_plugin.attribution.frozen import FrozenLayer, FrozenRun
from sae_attn_plugin.attribution.writers import WriterTable


def writers_by_position(table: WriterTable, layer: int) -> Tensor:
    """``[position, writer, d_model]`` of what feeds a layer; as many at each position."""
    n_positions = len(table.starts) - 1
    (per_position,) = {int(n) for n in table.starts[1:] - table.starts[:-1]}
    (upstream,) = {int(n) for n in table.prefix(layer)}
    every = table.vectors[: len(table)].view(n_positions, per_position, -1)
    return every[:, :upstream]


def _pre_activations(
    layer: FrozenLayer, stream: Tensor, queries: slice, encoder: Tensor, own: Tensor | None
) -> Tensor:
    """Pre-activations (without constants) from the residual stream, patterns and scales frozen.

    ``stream [source, d_model]``; ``encoder [target, head, d_head]``; ``own [target]`` is each
    target's query, counted in ``queries``; None: all are at the one query.
    """
    weights, n_sources = layer.weights, len(stream)
    x = weights.norm.linear(stream, layer.scale[:n_sources])
    v = torch.einsum("pd,hde->phe", x, weights.W_V)
    z = torch.einsum("hqp,phe->qhe", layer.pattern[:, queries, :n_sources], v)
    return (encoder * (z if own is None else z[own])).sum((-2, -1))


def _targets(layer: FrozenLayer) -> tuple[Tensor, Tensor, Tensor]:
    assert layer.encoded is not None
    assert layer.dictionary is not None
    rows = layer.dictionary.read(layer.encoded.feature, layer.z.dtype)[0]
    return layer.encoded.feature, layer.encoded.position, rows


def grouped_autograd(run: FrozenRun, table: WriterTable) -> Iterator[tuple[int, int, Tensor]]:
    """The best batched autograd: one vectorised backward pass per layer and query position, over
    the positions that the query sees. Yields ``(layer, query, [target, position, writer])``."""
    for number in range(len(run.layers) - 1, 0, -1):
        layer, y = run.layers[number], writers_by_position(table, number)
        _, position, encoder = _targets(layer)
        stream = run_stream(run, number)
        for query in range(run.n_positions):
            here = encoder[position == query]
            leaf = stream[: query + 1].clone().requires_grad_()
            with torch.enable_grad():
                out = _pre_activations(layer, leaf, slice(query, query + 1), here, None)
            one = torch.eye(len(here), dtype=out.dtype)
            (gradient,) = torch.autograd.grad(out, leaf, one, is_grads_batched=True)
            edges = torch.bmm(gradient.transpose(0, 1), y[: query + 1].transpose(1, 2))
            yield number, query, edges.transpose(0, 1)


def batched_autograd(run: FrozenRun, table: WriterTable) -> Iterator[tuple[int, int, Tensor]]:
    """``is_grads_batched`` over all targets of a layer at once, at every position."""
    for number in range(len(run.layers) - 1, 0, -1):
        layer, y = run.layers[number], writers_by_position(table, number)
        _, position, encoder = _targets(layer)
        leaf = run_stream(run, number).clone().requires_grad_()
        with torch.enable_grad():
            out = _pre_activations(layer, leaf, slice(None), encoder, position)
        one = torch.eye(len(encoder), dtype=out.dtype)
        (gradient,) = torch.autograd.grad(out, leaf, one, is_grads_batched=True)
        yield number, -1, torch.bmm(gradient.transpose(0, 1), y.transpose(1, 2)).transpose(0, 1)


def plain_autograd(run: FrozenRun, table: WriterTable) -> Iterator[tuple[int, int, Tensor]]:
    """One backward pass per target."""
    for number in range(len(run.layers) - 1, 0, -1):
        layer, y = run.layers[number], writers_by_position(table, number)
        _, position, encoder = _targets(layer)
        leaf = run_stream(run, number).clone().requires_grad_()
        with torch.enable_grad():
            out = _pre_activations(layer, leaf, slice(None), encoder, position).unbind()
        for target in out:
            (gradient,) = torch.autograd.grad(target, leaf, retain_graph=True)
            yield number, -1, torch.einsum("pd,pnd->pn", gradient, y)[None]


def run_stream(run: FrozenRun, layer: int) -> Tensor:
    """The residual stream before a layer (any point will do: the network is linear)."""
    stream = run.embed if run.pos_embed is None else run.embed + run.pos_embed
    for earlier in run.layers[:layer]:
        stream = stream + earlier.weights.attn_out(earlier.z)
        assert earlier.mlp is not None
        stream = stream + earlier.mlp.out
    return stream


def all_edges(
    way: Callable[[FrozenRun, WriterTable], Iterator[tuple[int, int, Tensor]]],
    run: FrozenRun,
    table: WriterTable,
) -> int:
    """Compute every edge and keep it, as one would; returns how many numbers that is."""
    return sum(edges.numel() for _, _, edges in [*way(run, table)])


def every_destination_dfa(layer: FrozenLayer, features: Tensor) -> Tensor:
    """DFA by source ``[feature, destination, source]`` the common way: every source's weighted
    value for every destination first, ``[destination, source, head * d_head]``, then encoders."""
    assert layer.dictionary is not None
    weighted = torch.einsum("hqp,phe->qphe", layer.pattern, layer.v).flatten(-2)
    encoder = layer.dictionary.W_enc[:, features]
    return (weighted @ encoder).permute(2, 0, 1)
