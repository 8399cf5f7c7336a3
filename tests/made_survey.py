"""Surveys that nobody measured: random tables in the shape of a survey's, of any size.

For tests of what reads surveys: odd token texts, dead features, many features. Values are random
but agree with each other: shares sum to 1, ``dfa_abs`` to its parts, kept DFA plus the rest to the
DFA by head.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

ROLES = ("self", "previous", "first", "duplicate", "induction")


class Strings:
    """A tokenizer in so far as tokens have strings."""

    def __init__(self, strings: Sequence[str]) -> None:
        self.strings = list(strings)

    def convert_ids_to_tokens(self, token: int) -> str:
        return self.strings[token]

    def decode(self, tokens: Sequence[int]) -> str:
        return "".join(self.strings[token] for token in tokens)


def made_survey(
    folder: Path,
    *,
    layers: Sequence[int] = (0, 1),
    d_sae: int = 40,
    n_heads: int = 4,
    n_rows: int = 50,
    context: int = 32,
    vocabulary: Sequence[str] = tuple(f" t{i}" for i in range(100)),
    keep: int = 6,
    sample: int = 6,
    sources: int = 5,
    dead: float = 0.1,
    seed: int = 0,
) -> Path:
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    edges = [0, 1, 2]
    while edges[-1] < context - 1:
        edges.append(2 * (edges[-1] - 1) + 1)
    edges = [edge for edge in edges if edge < context]
    positions = list(range(min(16, context))) + [2**i for i in range(4, 12) if 2**i < context]
    tokens = rng.integers(0, len(vocabulary), (n_rows, context)).astype(np.int32)
    _write(
        folder / "rows.parquet",
        {
            "row": np.arange(n_rows),
            "tokens": _lists(tokens.ravel(), np.full(n_rows, context)),
        },
    )
    strings = [text.encode("utf-8", "replace").decode() for text in vocabulary]
    _write(folder / "tokens.parquet", {"token": np.arange(len(strings)), "string": strings})
    writers = {}
    for layer in layers:
        for name, columns in _layer(
            rng, layer, d_sae, n_heads, tokens, vocabulary, keep, sample, sources, dead, edges,
            positions,
        ).items():  # fmt: skip
            table = pa.table(columns)
            if name not in writers:
                writers[name] = pq.ParquetWriter(folder / f"{name}.parquet", table.schema)
            writers[name].write_table(table, row_group_size=1 << 14)
    for writer in writers.values():
        writer.close()
    facts: dict[str, Any] = {
        "format": "sae-attn-survey",
        "version": 1,
        "provenance": {"model": "made up", "backend": "none"},
        "layers": list(layers),
        "n_heads": n_heads,
        "d_sae": {str(layer): d_sae for layer in layers},
        "context": context,
        "distance_edges": edges,
        "position_edges": positions,
        "positions_by_bin": [
            n_rows * (stop - start)
            for start, stop in zip(positions, [*positions[1:], context], strict=True)
        ],
        "roles": list(ROLES),
        "rows": n_rows,
        "tokens": int(tokens.size),
    }
    (folder / "survey.json").write_text(json.dumps(facts))
    return folder


def _layer(
    rng: np.random.Generator, layer: int, d_sae: int, n_heads: int, tokens: np.ndarray,
    vocabulary: Sequence[str], keep: int, sample: int, sources: int, dead: float,
    edges: list[int], positions: list[int],
) -> dict[str, dict[str, Any]]:  # fmt: skip
    ids = np.arange(d_sae, dtype=np.int32)
    live = rng.random(d_sae) >= dead
    fires = np.where(live, 1 + np.floor(rng.lognormal(5, 2, d_sae)), 0).astype(np.int64)
    scale = rng.lognormal(0, 0.5, d_sae)
    quantiles = scale[:, None] * np.array([0.05, 0.15, 0.4, 0.9, 1.6, 3.0])
    features: dict[str, Any] = {
        "layer": np.full(d_sae, layer, np.int16),
        "feature": ids,
        "fires": fires,
        "density": fires / tokens.size,
        "mean": np.where(live, scale * 0.6, np.nan),
        "max": np.where(live, scale * 4, np.nan),
        **{
            f"q{q}": np.where(live, quantiles[:, i], np.nan)
            for i, q in enumerate((10, 25, 50, 75, 90, 99))
        },
        "dfa_abs": np.where(live, scale * 1.3, np.nan),
        "decoder_norm": rng.lognormal(0, 0.1, d_sae),
        "dead": ~live,
        "neuronpedia": [f"https://www.neuronpedia.org/made/{layer}-att/{i}" for i in ids],
    }
    share = rng.dirichlet(np.full(n_heads, 0.4), d_sae)
    noisy = share * rng.lognormal(0, 0.7, share.shape)
    measured = np.where(live[:, None], noisy / noisy.sum(1, keepdims=True), np.nan)
    absolute = measured * scale[:, None] * 1.3
    heads = {
        "layer": np.full(d_sae * n_heads, layer, np.int16),
        "feature": np.repeat(ids, n_heads),
        "head": np.tile(np.arange(n_heads, dtype=np.int16), d_sae),
        "decoder_share": share.ravel(),
        "dfa": (absolute * rng.uniform(-1, 1, absolute.shape)).ravel(),
        "dfa_abs": absolute.ravel(),
        "dfa_share": measured.ravel(),
        "weighted_share": measured.ravel(),
    }
    return {
        "features": features,
        "heads": heads,
        "examples": _examples(
            rng, layer, fires, scale, tokens, n_heads, keep, sample, sources, edges
        ),
        "cofiring": _cofiring(rng, layer, ids[live]),
        "logits": _logits(rng, layer, ids, vocabulary),
        "positions_profile": _positions(rng, layer, ids[live], fires[live], len(positions)),
    }


def _examples(
    rng: np.random.Generator, layer: int, fires: np.ndarray, scale: np.ndarray, tokens: np.ndarray,
    n_heads: int, keep: int, sample: int, sources: int, edges: list[int],
) -> dict[str, Any]:  # fmt: skip
    context = tokens.shape[1]
    counts = np.stack([np.minimum(fires, keep), np.minimum(fires, sample)], 1)  # [feature, kind]
    n = int(counts.sum())
    feature = np.repeat(np.arange(len(fires), dtype=np.int32), counts.sum(1))
    kind = np.repeat(np.tile(["top", "sample"], len(fires)), counts.ravel())
    rank = np.concatenate([np.arange(c) for c in counts.ravel()]).astype(np.int16)
    top = kind == "top"
    # distinct places, some in one row
    place = rng.integers(0, tokens.size, len(fires))[feature] + 7 * (rank + keep * ~top)
    row, position = np.divmod(place % tokens.size, context)
    position = position.astype(np.int32)
    activation = scale[feature] * np.where(
        top, 4 - 0.05 * rank, rng.lognormal(-1, 1, n).clip(max=3)
    )
    weights = np.exp(rng.normal(0, 2, (n, sources)))
    signs = rng.choice([-1, 1], (n, sources), p=[0.2, 0.8])
    length = np.minimum(position + 1, sources)
    inside = np.arange(sources) < length[:, None]
    distance = np.floor(rng.random((n, sources)) ** 3 * (position[:, None] + 1)).astype(np.int32)
    distance = np.where((position < sources)[:, None], np.arange(sources), distance)
    # distinct sources: distances in order, each at least one more than the last
    distance = np.sort(distance, 1)
    for i in range(1, sources):
        distance[:, i] = np.maximum(distance[:, i], distance[:, i - 1] + 1)
    inside &= distance <= position[:, None]
    length = inside.sum(1)
    dfa = np.where(inside, weights * signs, 0.0)
    dfa *= (activation / np.abs(dfa).sum(1))[:, None]
    rest = 0.02 * activation * rng.normal(size=n)
    by_head = rng.dirichlet(np.full(n_heads, 0.4), n) * (dfa.sum(1) + rest)[:, None]
    size = np.abs(dfa)
    bins = np.searchsorted(edges, np.minimum(distance, context - 1), side="right") - 1
    by_distance = np.zeros((n, len(edges)))
    np.add.at(by_distance, (np.arange(n)[:, None], bins), size)
    roles = np.zeros((n, len(ROLES)))
    roles[:, 0] = (size * (distance == 0)).sum(1)
    roles[:, 1] = (size * (distance == 1)).sum(1)
    roles[:, 2] = (size * (distance == position[:, None])).sum(1)
    # strongest first, as a survey keeps them
    order = np.argsort(-size, 1, kind="stable")
    source = np.take_along_axis(position[:, None] - distance, order, 1)
    ordered, kept = np.take_along_axis(dfa, order, 1), np.take_along_axis(inside, order, 1)
    return {
        "layer": np.full(n, layer, np.int16),
        "feature": feature,
        "kind": kind,
        "rank": rank,
        "row": row,
        "position": position,
        "activation": activation.astype(np.float32),
        "pre_activation": (activation + 0.1).astype(np.float32),
        "dfa_by_head": _lists(by_head.astype(np.float32).ravel(), np.full(n, n_heads)),
        "sources": _lists(source[kept].astype(np.int32), length),
        "dfa": _lists(ordered[kept].astype(np.float32), length),
        "dfa_rest": rest.astype(np.float32),
        "by_distance": _lists(by_distance.astype(np.float32).ravel(), np.full(n, len(edges))),
        "roles": _lists(roles.astype(np.float32).ravel(), np.full(n, len(ROLES))),
        "dfa_abs": (size.sum(1) + np.abs(rest)).astype(np.float32),
        "active": rng.integers(1, 60, n).astype(np.int32),
    }


def _cofiring(rng: np.random.Generator, layer: int, live: np.ndarray) -> dict[str, Any]:
    n = 10 * len(live)
    together = rng.integers(1, 50, n)
    return {
        "layer": np.full(n, layer, np.int16),
        "feature": np.repeat(live, 10),
        "other_layer": np.full(n, layer, np.int16),
        "other": rng.choice(live, n) if n else np.zeros(0, np.int32),
        "together": together,
        "fires_sample": together + rng.integers(0, 50, n),
        "jaccard": rng.random(n),
    }


def _logits(
    rng: np.random.Generator, layer: int, ids: np.ndarray, vocabulary: Sequence[str]
) -> dict[str, Any]:
    n = 20 * len(ids)
    token = rng.integers(0, len(vocabulary), n).astype(np.int32)
    sign = np.tile(np.repeat(np.array([1, -1], np.int8), 10), len(ids))
    size = np.sort(rng.random((2 * len(ids), 10)), 1)[:, ::-1].ravel()
    return {
        "layer": np.full(n, layer, np.int16),
        "feature": np.repeat(ids, 20),
        "rank": np.tile(np.arange(10, dtype=np.int16), 2 * len(ids)),
        "sign": sign,
        "token": token,
        "string": pa.nulls(n, pa.string()),
        "effect": (sign * size).astype(np.float32),
    }


def _positions(
    rng: np.random.Generator, layer: int, live: np.ndarray, fires: np.ndarray, n_bins: int
) -> dict[str, Any]:
    counts = rng.multinomial(fires, np.full(n_bins, 1 / n_bins))
    feature, position_bin = np.nonzero(counts)
    return {
        "layer": np.full(len(feature), layer, np.int16),
        "feature": live[feature],
        "position_bin": position_bin.astype(np.int16),
        "fires": counts[feature, position_bin],
    }


def _lists(values: np.ndarray, lengths: np.ndarray) -> pa.ListArray:
    ends = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(ends), pa.array(np.ascontiguousarray(values)))


def _write(path: Path, columns: dict[str, Any]) -> None:
    pq.write_table(pa.table(columns), path)
