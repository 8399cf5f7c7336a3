"""One batch of rows through the model and its SAEs, into the sketches.

Everything comes from one forward pass. DFA by head is computed of every firing, ``w_ih . z^h``; DFA
by source position only of firings that are kept, with values projected on encoder rows first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_attn_plugin.attribution.frozen import algebra_dtype
from sae_attn_plugin.backends.protocol import Backend, Site, read_sites, repeat_kv
from sae_attn_plugin.corpus.sketches import (
    ROLES,
    Sketch,
    bin_of,
    distance_edges,
    hash_of,
    place_of,
    position_edges,
)
from sae_attn_plugin.dictionaries import Dictionary
from sae_attn_plugin.errors import InputError

__all__ = ["Gatherer"]

_AT_ONCE = 2**18  # numbers of encoder rows in flight: they should stay in the processor's cache
_BY_SOURCE = 2**22  # numbers of DFA by head and source in flight


@dataclass(frozen=True)
class _Batch:
    """What all layers of a batch share; positions of its rows one after the other."""

    tokens: Int[Tensor, "row pos"]
    place: Int[Tensor, " position"]
    hash: Int[Tensor, " position"]
    bins: Int[Tensor, " position"]
    counted: Tensor | None
    chosen: Tensor


@dataclass(frozen=True)
class _Layer:
    dictionary: Dictionary
    encoder: Float[Tensor, "d_sae d_in"]
    hash: Int[Tensor, " d_sae"]


class Gatherer:
    """Runs the model and fills a sketch.

    Args:
        backend: the model.
        dictionaries: SAEs on z, by layer.
        context: tokens in a row; sources: source positions kept of a firing.
        seed: of what is drawn.
        excluded: positions with these tokens are not counted.
    """

    def __init__(
        self,
        backend: Backend,
        dictionaries: Mapping[int, Dictionary],
        context: int,
        sources: int,
        seed: int = 0,
        excluded: Sequence[int] = (),
    ) -> None:
        self.backend: Backend = backend
        self.context: int = context
        self.sources: int = sources
        self.seed: int = seed
        self.device: torch.device = backend.geometry.device
        self.dtype: torch.dtype = algebra_dtype(backend.geometry.dtype)
        self.excluded: Tensor = torch.tensor(list(excluded), dtype=torch.int64, device=self.device)
        self.layers: dict[int, _Layer] = {n: self._layer(n, d) for n, d in dictionaries.items()}
        self.reads: list[Site] = [
            Site(name, n) for n in dictionaries for name in ("z", "v", "pattern")
        ]
        at = np.arange(context)
        distance = (at[:, None] - at).clip(0)
        bins = bin_of(distance_edges(context), context)[distance]
        self.distance_bins: Tensor = torch.from_numpy(bins).to(self.device)
        self.n_distances: int = len(distance_edges(context))
        self.position_bins: Tensor = torch.from_numpy(bin_of(position_edges(context), context))
        self.n_position_bins: int = len(position_edges(context))

    def _layer(self, number: int, dictionary: Dictionary) -> _Layer:
        every = torch.arange(dictionary.d_sae, device=dictionary.W_enc.device)
        rows = dictionary.read(every, self.dtype)[0].flatten(1).contiguous()
        return _Layer(
            dictionary, rows.to(self.device), hash_of(self.seed, number, every.to(self.device))
        )

    def __call__(self, sketch: Sketch, tokens: Int[Tensor, "row pos"], first_row: int) -> None:
        """Add rows to a sketch.

        Args:
            tokens: on any device; first_row: the number of the first of them in the corpus.

        Raises:
            InputError: NaN or infinity in the model.
        """
        with torch.no_grad():
            self._add(sketch, tokens.to(self.device), first_row)

    def _add(self, sketch: Sketch, tokens: Int[Tensor, "row pos"], first_row: int) -> None:
        found = read_sites(self.backend, tokens, self.reads)
        batch = self._batch(sketch, tokens, first_row)
        for number, layer in self.layers.items():
            z, v, pattern = (
                found[Site(name, number)].to(self.device) for name in ("z", "v", "pattern")
            )
            for name, value in (("v", v), ("z", z)):
                if not bool(torch.isfinite(value).all()):
                    raise InputError(
                        f"{self.backend.geometry.model_name}: {name} of layer {number} holds NaN "
                        f"or infinity in rows {first_row}..{first_row + len(tokens) - 1}; load "
                        "sound weights, or the model in a wider dtype"
                    )
            self._add_layer(sketch, number, layer, batch, z.to(self.dtype), v, pattern)
        drawn = batch.place[batch.chosen]
        if len(drawn):
            sketch.drawn.draw(drawn)
        bins = batch.bins if batch.counted is None else batch.bins[batch.counted]
        counts = torch.bincount(bins, minlength=self.n_position_bins).cpu().numpy()
        sketch.saw(len(tokens), tokens.numel(), counts)

    def _batch(self, sketch: Sketch, tokens: Int[Tensor, "row pos"], first_row: int) -> _Batch:
        n_rows, length = tokens.shape
        position = torch.arange(length, device=self.device).repeat(n_rows)
        row = torch.arange(first_row, first_row + n_rows, device=self.device)
        row = row.repeat_interleave(length)
        place = place_of(row, position)
        counted = None
        if len(self.excluded):
            counted = ~torch.isin(tokens.flatten(), self.excluded)
        chosen = sketch.drawn.choose(place)
        return _Batch(
            tokens=tokens,
            place=place,
            hash=hash_of(self.seed, row, position),
            bins=self.position_bins.to(self.device).repeat(n_rows),
            counted=counted,
            chosen=chosen if counted is None else chosen & counted,
        )

    def _add_layer(
        self,
        sketch: Sketch,
        number: int,
        layer: _Layer,
        batch: _Batch,
        z: Float[Tensor, "row pos head d_head"],
        v: Float[Tensor, "row pos n_kv d_head"],
        pattern: Float[Tensor, "row head query key"],
    ) -> None:
        into = sketch.layers[number]
        z = z.flatten(0, 1)
        encoded = layer.dictionary.encode(z)
        z = z.flatten(1) / layer.dictionary.input_scale(encoded.scale)
        position, feature = encoded.position, encoded.feature
        activation, pre = encoded.activation, encoded.pre_activation
        active = torch.bincount(position, minlength=len(z))
        if batch.counted is not None:
            kept = batch.counted[position].nonzero()[:, 0]
            position, feature, activation, pre = (
                x[kept] for x in (position, feature, activation, pre)
            )
        if not len(feature):
            return
        into.count(feature, activation, batch.bins[position])
        by_head = _by_head(layer.encoder, z, feature, position, self.backend.geometry.n_heads)
        into.attribute(feature, activation, by_head)
        chosen = batch.chosen[position].nonzero()[:, 0]
        if len(chosen):
            sketch.drawn.note(
                number, batch.place[position[chosen]], feature[chosen], activation[chosen]
            )

        place = batch.place[position]
        # Positive floats sort as their bits do.
        strongest = -activation.double().contiguous().view(torch.int64)
        drawn = hash_of(layer.hash[feature], batch.hash[position])
        offers = [
            (into.top, *into.top.offer(feature, strongest, place)),
            (into.sample, *into.sample.offer(feature, drawn, place)),
        ]
        came = torch.unique(torch.cat([index for _, index, _ in offers]))
        if not len(came):
            return
        details = self._by_source(
            layer, batch, feature[came], position[came], encoded.scale, v, pattern
        )
        details |= {
            "activation": activation[came],
            "pre_activation": pre[came],
            "dfa_by_head": by_head[came],
            "active": active[position[came]],
        }
        for reservoir, index, slots in offers:
            at = torch.searchsorted(came, index)
            reservoir.write(slots, {name: value[at] for name, value in details.items()})

    def _by_source(
        self,
        layer: _Layer,
        batch: _Batch,
        feature: Int[Tensor, " n"],
        position: Int[Tensor, " n"],
        scale: Float[Tensor, "position 1"],
        v: Float[Tensor, "row pos n_kv d_head"],
        pattern: Float[Tensor, "row head query key"],
    ) -> dict[str, Tensor]:
        """DFA by source of firings sorted by position, summed over heads."""
        n_heads, length = pattern.shape[1], pattern.shape[-1]
        step = max(1, _BY_SOURCE // (n_heads * length))
        counts = torch.bincount(position // length, minlength=len(batch.tokens)).tolist()
        parts: list[dict[str, Tensor]] = []
        start = 0
        for row, count in enumerate(counts):
            if not count:
                continue
            values = repeat_kv(v[row], n_heads).to(self.dtype).permute(1, 2, 0)
            same = batch.tokens[row][:, None] == batch.tokens[row]
            earlier = same.tril(-1)
            after = torch.zeros_like(earlier)
            after[:, 1:] = earlier[:, :-1]
            for first in range(start, start + count, step):
                part = slice(first, min(first + step, start + count))
                query = position[part] - row * length
                encoder = layer.encoder.index_select(0, feature[part])
                encoder = encoder / layer.dictionary.input_scale(scale[position[part]])
                split = torch.bmm(encoder.unflatten(1, (n_heads, -1)).transpose(0, 1), values)
                split *= pattern[row].index_select(1, query)
                by_source = split.sum(0)
                parts.append(self._summaries(by_source, query, earlier, after))
            start += count
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _summaries(
        self,
        by_source: Float[Tensor, "n source"],
        query: Int[Tensor, " n"],
        earlier: Tensor,
        after: Tensor,
    ) -> dict[str, Tensor]:
        """What is kept of DFA by source, and how it lies by distance and role."""
        n, length = by_source.shape
        size = by_source.abs()
        visible = torch.arange(length, device=query.device) <= query[:, None]
        k = min(self.sources, length)
        kept = torch.where(visible, size, -1).topk(k, dim=1)
        seen = kept.values >= 0
        index = by_source.new_full((n, self.sources), -1, dtype=torch.int64)
        index[:, :k] = torch.where(seen, kept.indices, -1)
        dfa = by_source.new_zeros(n, self.sources)
        dfa[:, :k] = by_source.gather(1, kept.indices) * seen
        by_distance = by_source.new_zeros(n, self.n_distances)
        by_distance.scatter_add_(1, self.distance_bins[query], size)
        roles = {
            "self": size.gather(1, query[:, None])[:, 0],
            "previous": size.gather(1, (query - 1).clamp_min(0)[:, None])[:, 0] * (query > 0),
            "first": size[:, 0],
            "duplicate": (size * earlier[query]).sum(1),
            "induction": (size * after[query]).sum(1),
        }
        return {
            "sources": index,
            "dfa": dfa,
            "dfa_rest": by_source.scatter(1, kept.indices, 0).sum(1),
            "by_distance": by_distance,
            "roles": torch.stack([roles[name] for name in ROLES], dim=1),
            "dfa_abs": size.sum(1),
        }


def _by_head(
    encoder: Float[Tensor, "d_sae d_in"],
    z: Float[Tensor, "position d_in"],
    feature: Int[Tensor, " n"],
    position: Int[Tensor, " n"],
    n_heads: int,
) -> Float[Tensor, "n head"]:
    """``w_ih . z^h`` of every firing."""
    step = max(1, _AT_ONCE // z.shape[1])
    parts = []
    for features, positions in zip(feature.split(step), position.split(step), strict=True):
        products = encoder.index_select(0, features).mul_(z.index_select(0, positions))
        parts.append(products.unflatten(1, (n_heads, -1)).sum(2))
    return torch.cat(parts)
