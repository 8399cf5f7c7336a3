"""From sketches to tables, one layer at a time, as parquet files."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_attn_plugin.corpus.sketches import (
    LayerSketch,
    PositionSample,
    Reservoir,
    quantiles,
    row_and_position,
)
from sae_attn_plugin.dictionaries import Dictionary, head_attribution
from sae_attn_plugin.io import write_atomically
from sae_attn_plugin.tokens import token_string

if TYPE_CHECKING:
    import pyarrow as pa

    from sae_attn_plugin.backends.protocol import Backend

__all__ = ["QUANTILES", "TABLES", "logit_effects", "write_table"]

QUANTILES = {"q10": 0.1, "q25": 0.25, "q50": 0.5, "q75": 0.75, "q90": 0.9, "q99": 0.99}
TABLES = (
    "features", "heads", "examples", "cofiring", "logits", "sample", "positions",
    "positions_profile", "rows", "tokens",
)  # fmt: skip
_LOGITS_AT_ONCE = 2**26  # effects on tokens in flight
_PAIRS_AT_ONCE = 2**24  # of features that fire together, in flight
_ROWS_AT_ONCE = 2**16


def write_table(path: Path, parts: Iterable[pa.Table]) -> None:
    """Tables of one schema as one file, whole or not at all; a row group or more for each."""
    import pyarrow.parquet as pq

    def write(file: Any) -> None:
        writer = None
        try:
            for part in parts:
                writer = writer or pq.ParquetWriter(file, part.schema, compression="zstd")
                writer.write_table(part)
        finally:
            if writer is not None:
                writer.close()

    write_atomically(path, write)


def _table(columns: Mapping[str, Any]) -> pa.Table:
    import pyarrow as pa

    return pa.table(
        {name: c if isinstance(c, pa.Array) else pa.array(c) for name, c in columns.items()}
    )


def _lists(values: np.ndarray, kept: np.ndarray | None = None) -> pa.Array:
    """Rows of a matrix as lists; ``kept``: how many of each row."""
    import pyarrow as pa

    n, width = values.shape
    if kept is None:
        lengths, flat = np.full(n, width), values.reshape(-1)
    else:
        lengths, flat = kept, values[np.arange(width) < kept[:, None]]
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(flat))


def _numpy(x: Tensor) -> np.ndarray:
    return x.numpy(force=True)


def _layer_column(layer: int, n: int) -> np.ndarray:
    return np.full(n, layer, dtype=np.int16)


def _share(part: Float[np.ndarray, "n head"]) -> Float[np.ndarray, "n head"]:
    """Of each head; NaN where nothing is."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return part / part.sum(1, keepdims=True)


# -- features and heads ----------------------------------------------------------------------------


def features_table(
    layer: int, sketch: LayerSketch, dictionary: Dictionary, positions_counted: int
) -> pa.Table:
    fires = _numpy(sketch.fires)
    alive = fires > 0
    largest = np.full(len(fires), np.nan)
    slots = _numpy(sketch.top.filled)
    activation = _numpy(sketch.top.details["activation"])
    owner, first = np.unique(slots // sketch.top.k, return_index=True)
    largest[owner] = activation[slots[first]]
    found = quantiles(_numpy(sketch.histogram), list(QUANTILES.values()))
    found = np.minimum(found, largest[:, None])
    base = dictionary.metadata.get("neuronpedia_id")
    d = dictionary.d_sae
    every = torch.arange(d, device=dictionary.W_dec.device)
    norm = _numpy(dictionary.decoder(every, torch.float64).flatten(1).norm(dim=1))
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.where(alive, _numpy(sketch.total) / fires, np.nan)
        size = np.where(alive, _numpy(sketch.dfa_abs).sum(1) / fires, np.nan)
    import pyarrow as pa

    urls = [f"https://www.neuronpedia.org/{base}/{i}" if base else None for i in range(d)]
    return _table(
        {
            "layer": _layer_column(layer, d),
            "feature": np.arange(d, dtype=np.int32),
            "fires": fires,
            "density": fires / max(positions_counted, 1),
            "mean": mean,
            "max": largest,
            **{name: found[:, i] for i, name in enumerate(QUANTILES)},
            "dfa_abs": size,
            "decoder_norm": norm,
            "dead": ~alive,
            "neuronpedia": pa.array(urls, type=pa.string()),
        }
    )


def heads_table(layer: int, sketch: LayerSketch, dictionary: Dictionary) -> pa.Table:
    n_heads, d = dictionary.n_heads, dictionary.d_sae
    shares = head_attribution(dictionary)[[f"head_{h}" for h in range(n_heads)]].to_numpy()
    fires = _numpy(sketch.fires)[:, None]
    size = _numpy(sketch.dfa_abs)
    with np.errstate(invalid="ignore", divide="ignore"):
        columns = {
            "decoder_share": shares,
            "dfa": np.where(fires > 0, _numpy(sketch.dfa) / fires, np.nan),
            "dfa_abs": np.where(fires > 0, size / fires, np.nan),
        }
    columns |= {"dfa_share": _share(size), "weighted_share": _share(_numpy(sketch.dfa_weighted))}
    return _table(
        {
            "layer": _layer_column(layer, d * n_heads),
            "feature": np.repeat(np.arange(d, dtype=np.int32), n_heads),
            "head": np.tile(np.arange(n_heads, dtype=np.int16), d),
            **{name: column.astype(np.float64).reshape(-1) for name, column in columns.items()},
        }
    )


def positions_profile_table(layer: int, sketch: LayerSketch) -> pa.Table:
    """Bins in which a feature fires; others are left out."""
    fires = _numpy(sketch.by_position)
    feature, position_bin = fires.nonzero()
    return _table(
        {
            "layer": _layer_column(layer, len(feature)),
            "feature": feature.astype(np.int32),
            "position_bin": position_bin.astype(np.int16),
            "fires": fires[feature, position_bin],
        }
    )


# -- examples --------------------------------------------------------------------------------------


def examples_table(layer: int, sketch: LayerSketch) -> pa.Table:
    import pyarrow as pa

    return pa.concat_tables(
        _examples(layer, kind, reservoir)
        for kind, reservoir in (("top", sketch.top), ("sample", sketch.sample))
    )


def _examples(layer: int, kind: str, reservoir: Reservoir) -> pa.Table:
    import pyarrow as pa

    slots = reservoir.filled
    details = {name: _numpy(value[slots]) for name, value in reservoir.details.items()}
    feature = _numpy(slots // reservoir.k)
    row, position = row_and_position(_numpy(reservoir.place.view(-1)[slots]))
    _, start, count = np.unique(feature, return_index=True, return_counts=True)
    kept = (details["sources"] >= 0).sum(1)
    n = len(feature)
    return _table(
        {
            "layer": _layer_column(layer, n),
            "feature": feature.astype(np.int32),
            "kind": pa.array(np.full(n, kind, dtype=object), type=pa.string()),
            "rank": (np.arange(n) - np.repeat(start, count)).astype(np.int32),
            "row": row,
            "position": position.astype(np.int32),
            "activation": details["activation"],
            "pre_activation": details["pre_activation"],
            "dfa_by_head": _lists(details["dfa_by_head"]),
            "sources": _lists(details["sources"].astype(np.int32), kept),
            "dfa": _lists(details["dfa"], kept),
            "dfa_rest": details["dfa_rest"],
            "by_distance": _lists(details["by_distance"]),
            "roles": _lists(details["roles"]),
            "dfa_abs": details["dfa_abs"],
            "active": details["active"],
        }
    )


def rows_in(reservoirs: Iterable[Reservoir], drawn: PositionSample) -> Int[np.ndarray, " row"]:
    """The rows that examples and drawn positions refer to."""
    found = [row_and_position(_numpy(drawn.place))[0]]
    for reservoir in reservoirs:
        found.append(
            np.unique(row_and_position(_numpy(reservoir.place.view(-1)[reservoir.filled]))[0])
        )
    return np.unique(np.concatenate(found))


def rows_tables(
    rows: Int[np.ndarray, " row"], read: Callable[[np.ndarray], np.ndarray]
) -> Iterator[pa.Table]:
    """``read`` gives the tokens ``[row, position]`` of rows by their numbers."""
    for start in range(0, max(len(rows), 1), _ROWS_AT_ONCE):
        some = rows[start : start + _ROWS_AT_ONCE]
        yield _table({"row": some.astype(np.int64), "tokens": _lists(read(some).astype(np.int32))})


# -- positions -------------------------------------------------------------------------------------


def positions_table(drawn: PositionSample) -> pa.Table:
    row, position = row_and_position(_numpy(drawn.place))
    return _table({"row": row, "position": position.astype(np.int32)})


def sample_table(layer: int, drawn: PositionSample) -> pa.Table:
    place, feature, activation = _entries(drawn, layer)
    row, position = row_and_position(place)
    return _table(
        {
            "row": row,
            "position": position.astype(np.int32),
            "layer": _layer_column(layer, len(place)),
            "feature": feature,
            "activation": activation,
        }
    )


def _entries(drawn: PositionSample, layer: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    if layer not in drawn.entries:
        return np.zeros(0, np.int64), np.zeros(0, np.int32), np.zeros(0, np.float32)
    place, feature, activation = (_numpy(column) for column in drawn.entries[layer])
    return place, feature, activation


def cofiring_table(layer: int, drawn: PositionSample, d_sae: int, n: int) -> pa.Table:
    """The ``n`` features of the same layer that fire most with each, by Jaccard index."""
    from scipy.sparse import csr_array

    place, feature, _ = _entries(drawn, layer)
    column = np.searchsorted(_numpy(drawn.place), place)
    ones = np.ones(len(place), dtype=np.int32)
    active = csr_array((ones, (column, feature)), shape=(len(drawn.place), d_sae))
    by_feature = active.T.tocsr()
    fires = np.asarray(active.sum(0)).reshape(-1).astype(np.int64)
    per_place = np.diff(active.indptr).astype(np.int64)
    # An upper bound of the pairs of each feature, so that few enough are made at once.
    bound = np.cumsum(by_feature @ per_place) if len(place) else np.zeros(d_sae, np.int64)
    found: list[tuple[np.ndarray, ...]] = []
    start = 0
    while start < d_sae and len(place):
        before = bound[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(bound, before + _PAIRS_AT_ONCE)))
        pairs = (by_feature[start:stop] @ active).tocoo()
        one, other = pairs.coords[0] + start, pairs.coords[1]
        together = pairs.data.astype(np.int64)
        apart = one != other
        one, other, together = one[apart], other[apart], together[apart]
        jaccard = together / (fires[one] + fires[other] - together)
        order = np.lexsort((other, -together, -jaccard, one))
        one, other, together, jaccard = (x[order] for x in (one, other, together, jaccard))
        _, first, count = np.unique(one, return_index=True, return_counts=True)
        kept = np.arange(len(one)) - np.repeat(first, count) < n
        found.append(tuple(x[kept] for x in (one, other, together, jaccard)))
        start = stop
    empty = (np.zeros(0, np.int64),) * 3 + (np.zeros(0),)
    one, other, together, jaccard = (np.concatenate(c) for c in zip(empty, *found, strict=True))
    return _table(
        {
            "layer": _layer_column(layer, len(one)),
            "feature": one.astype(np.int32),
            "other_layer": _layer_column(layer, len(one)),
            "other": other.astype(np.int32),
            "together": together,
            "fires_sample": fires[one],
            "jaccard": jaccard,
        }
    )


# -- logits ----------------------------------------------------------------------------------------


def logit_effects(
    backend: Backend, dictionary: Dictionary, features: Int[Tensor, " n"]
) -> Iterator[Float[Tensor, "some d_vocab"]]:
    """What decoder rows add to the logits, some features at a time.

    The row goes through W_O (and a norm after attention), the final norm and W_U, norms without
    their scale and bias; the mean over the vocabulary is taken off.
    """
    from sae_attn_plugin.attribution.frozen import algebra_dtype

    g = backend.geometry
    dtype = algebra_dtype(g.dtype)
    weights = backend.layer_weights(dictionary.layer).to(dtype, g.device)
    final = backend.final_norm().to(dtype, g.device)
    W_U = backend.unembed()[0].to(g.device, dtype)
    W_U = W_U - W_U.mean(1, keepdim=True)
    for some in features.split(max(1, _LOGITS_AT_ONCE // W_U.shape[1])):
        rows = dictionary.decoder(some.to(dictionary.W_dec.device), dtype).to(g.device)
        stream = rows.flatten(1) @ weights.W_O.flatten(0, 1)
        one = stream.new_ones(1, 1)
        if weights.post_norm is not None:
            stream = weights.post_norm.linear(stream, one)
        yield final.linear(stream, one) @ W_U


def logits_table(
    layer: int,
    backend: Backend,
    dictionary: Dictionary,
    alive: Int[np.ndarray, " n"],
    n: int,
    strings: Callable[[np.ndarray], list[str]],
) -> Iterator[pa.Table]:
    """The ``n`` tokens that each living feature adds to most (sign 1), and least (sign -1)."""
    import pyarrow as pa

    start = 0
    for effects in logit_effects(backend, dictionary, torch.from_numpy(alive)):
        some = alive[start : start + len(effects)]
        start += len(effects)
        k = min(n, effects.shape[1])
        for sign in (1, -1):
            value, token = (sign * effects).topk(k, dim=1)
            tokens = _numpy(token).reshape(-1)
            yield _table(
                {
                    "layer": _layer_column(layer, len(tokens)),
                    "feature": np.repeat(some.astype(np.int32), k),
                    "rank": np.tile(np.arange(k, dtype=np.int32), len(some)),
                    "sign": np.full(len(tokens), sign, dtype=np.int8),
                    "token": tokens.astype(np.int32),
                    "string": pa.array(strings(tokens), type=pa.string()),
                    "effect": (sign * _numpy(value)).astype(np.float64).reshape(-1),
                }
            )


def empty_logits() -> pa.Table:
    import pyarrow as pa

    none = np.zeros(0)
    return _table(
        {
            "layer": none.astype(np.int16),
            "feature": none.astype(np.int32),
            "rank": none.astype(np.int32),
            "sign": none.astype(np.int8),
            "token": none.astype(np.int32),
            "string": pa.array([], type=pa.string()),
            "effect": none,
        }
    )


class Strings:
    """Tokens as text that a parquet file can hold, each looked up once."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.known: dict[int, str] = {}

    def __call__(self, tokens: np.ndarray) -> list[str]:
        for token in np.unique(tokens).tolist():
            if token not in self.known:
                text = token_string(self._tokenizer, token)
                self.known[token] = text.encode("utf-8", "replace").decode("utf-8")
        return [self.known[token] for token in tokens.tolist()]

    def table(self) -> pa.Table:
        """Every token that was looked up."""
        import pyarrow as pa

        tokens = sorted(self.known)
        texts = pa.array([self.known[token] for token in tokens], type=pa.string())
        return _table({"token": np.array(tokens, dtype=np.int32), "string": texts})
