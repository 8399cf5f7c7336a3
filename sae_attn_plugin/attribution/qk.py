"""Why a head looks where it looks: a pre-softmax score, term by term.

With the norm scales frozen, the query at ``q`` and the key at ``p`` are sums over the writers there
and a few constants, so their product is a sum over pairs: the score is bilinear, and its terms add
up to it exactly.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sae_attn_plugin.attribution.frozen import FrozenLayer
from sae_attn_plugin.attribution.writers import WriterTable
from sae_attn_plugin.backends.scores import ScoreWeights, check_weights
from sae_attn_plugin.errors import InputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Side = Literal["query", "key", "both"]
SIDES: tuple[Side, ...] = ("query", "key", "both")
# Terms of a query or key that no writer carries.
CONSTANTS = ("norm_bias", "b_Q", "b_K", "q_norm_bias", "k_norm_bias", "alibi")
_CHUNK = 2**22  # products formed at once when the largest of many are searched


@dataclass(frozen=True)
class FrozenScores:
    """Queries and keys of one layer, with every norm scale held.

    Attributes:
        layer: number of the layer; frozen: the layer itself; weights: in the algebra's dtype.
        q: ``[position, head, d_head]``, k: ``[position, n_kv, d_head]``: normalised and rotated.
        q_scale, k_scale: ``[position, head or 1, 1]`` of the norms of queries and keys, or None.
    """

    layer: int
    frozen: FrozenLayer
    weights: ScoreWeights
    q: Float[Tensor, "position head d_head"]
    k: Float[Tensor, "position n_kv d_head"]
    q_scale: Tensor | None
    k_scale: Tensor | None

    def group(self, head: int) -> int:
        """The key/value head that a head reads."""
        return head // (self.q.shape[1] // self.k.shape[1])

    def rows(self, query: int) -> Float[Tensor, "head key"]:
        """Scores of every head from ``query`` to each key up to it, before any soft-cap, with
        ALiBi's bias where there is one."""
        q, k = self.q[query], self.k[: query + 1]
        q = q.unflatten(0, (k.shape[1], -1))
        scores = self.weights.scale * torch.einsum("gre,pge->grp", q, k).flatten(0, 1)
        return scores + self.weights.alibi(query, torch.arange(query + 1, device=q.device))

    def capped(self, score: Tensor) -> Tensor:
        """What the softmax gets."""
        return self.weights.capped(score)

    def visible(self, query: int) -> Tensor:
        """``[key]``: keys up to ``query`` that any head of the layer gives any weight."""
        return (self.frozen.pattern[:, query, : query + 1] > 0).any(0)

    # -- sides -----------------------------------------------------------------------------------

    def side(
        self,
        side: Literal["query", "key"],
        vectors: Float[Tensor, "n d_model"],
        position: int,
        head: int,
    ) -> Float[Tensor, "n d_head"]:
        """What residual vectors at a position add to the query (times the scale) or the key."""
        is_query, w = side == "query", self.weights
        W = w.W_Q[head] if is_query else w.W_K[self.group(head)]
        return self._finish(
            side,
            self.frozen.weights.norm.linear(vectors, self.frozen.scale[position]) @ W,
            position,
            head,
        )

    def constants(
        self, side: Literal["query", "key"], position: int, head: int
    ) -> dict[str, Float[Tensor, " d_head"]]:
        """The parts of a query (times the scale) or key that no writer carries, by name."""
        w, norm, is_query = self.weights, self.frozen.weights.norm, side == "query"
        at = head if is_query else self.group(head)
        W, b = (w.W_Q[at], w.b_Q[at]) if is_query else (w.W_K[at], w.b_K[at])
        found = {}
        if norm.bias is not None:
            found["norm_bias"] = self._finish(side, norm.bias @ W, position, head)
        if b.any():
            found["b_Q" if is_query else "b_K"] = self._finish(side, b, position, head)
        own = w.q_norm if is_query else w.k_norm
        if own is not None and own.bias is not None:
            name = "q_norm_bias" if is_query else "k_norm_bias"
            found[name] = self._turn(side, _of_head(own.bias, at, self.q.shape[-1]), position)
        return found

    def reader(self, side: Literal["query", "key"], query: int, key: int, head: int) -> Tensor:
        """The functional ``[d_model]`` of the stream at the query (or key) that gives the score
        with the other side held: ``side(...) . other`` without centring, which writers bring."""
        w, is_query = self.weights, side == "query"
        at = head if is_query else self.group(head)
        other = self.k[key, self.group(head)] if is_query else self.q[query, head]
        position = query if is_query else key
        if w.rotary is not None:
            other = w.rotary.rotate_back(other, position)
        own, scale = (w.q_norm, self.q_scale) if is_query else (w.k_norm, self.k_scale)
        if own is not None and scale is not None:
            other = other / _at(scale, position, at)
            if own.weight is not None:
                other = other * _of_head(own.weight, at, len(other))
        vector = (w.W_Q if is_query else w.W_K)[at] @ other * w.scale
        norm = self.frozen.weights.norm
        if norm.weight is not None:
            vector = vector * norm.weight
        return vector / self.frozen.scale[position, 0]

    def _finish(self, side: Literal["query", "key"], x: Tensor, position: int, head: int) -> Tensor:
        """The norm of queries or keys with its scale held, then the rotation and the scale."""
        w, is_query = self.weights, side == "query"
        own, scale = (w.q_norm, self.q_scale) if is_query else (w.k_norm, self.k_scale)
        if own is not None and scale is not None:
            at = head if is_query else self.group(head)
            x = x / _at(scale, position, at)
            if own.weight is not None:
                x = x * _of_head(own.weight, at, x.shape[-1])
        return self._turn(side, x, position)

    def _turn(self, side: str, x: Tensor, position: int) -> Tensor:
        w = self.weights
        if w.rotary is not None:
            x = w.rotary.rotate(x, position)
        return x * w.scale if side == "query" else x


def freeze_scores(
    number: int,
    layer: FrozenLayer,
    weights: ScoreWeights,
    resid_pre: Float[Tensor, "position d_model"],
) -> FrozenScores:
    """Queries and keys of a layer of a frozen run.

    Args:
        number: of the layer. weights: any dtype. resid_pre: as the host computed it.
    """
    dtype, device = layer.z.dtype, layer.z.device
    w = weights.to(dtype, device)
    x = layer.weights.norm.apply(resid_pre.to(device, dtype), layer.scale)
    (q, q_scale), (k, k_scale) = w.queries(x), w.keys(x)
    return FrozenScores(number, layer, w, q, k, q_scale, k_scale)


def check_pattern(scores: FrozenScores, query: int, model_dtype: torch.dtype, who: str) -> None:
    """Check that the scores of a query give the model's own attention pattern.

    Raises:
        BackendError: they do not: some part of this model's scores is not known here.
    """
    visible = scores.visible(query)
    pattern = scores.frozen.pattern[:, query, : query + 1][:, visible]
    row = scores.rows(query)[:, visible]
    got = scores.capped(row).softmax(-1)
    where = f"{who}, layer {scores.layer}, position {query}"
    check_weights(got, pattern, float(row.abs().max()), scores.weights, model_dtype, where)


def check_score(scores: FrozenScores, head: int, query: int, key: int) -> None:
    """Refuse what does not exist: a head, a key after its query, a masked key."""
    check_pair(scores.layer, scores.q.shape[1], scores.visible(query), head, query, key)


def check_pair(
    layer: int, n_heads: int, visible: Bool[Tensor, " key"], head: int, query: int, key: int
) -> None:
    """The same of a layer's heads, and of the keys that the query sees."""
    if not 0 <= head < n_heads:
        raise InputError(
            f"head {head} is out of range: layer {layer} has {n_heads} heads (0..{n_heads - 1})"
        )
    if key > query:
        raise InputError(
            f"key {key} comes after query {query}: a head looks at its own position and earlier "
            "ones; give key <= query"
        )
    if not visible[key]:
        first = int(visible.nonzero()[0, 0])
        raise InputError(
            f"key {key} is masked for query {query} in layer {layer}: no head gives it any "
            f"weight (sliding-window attention sees keys {first} to {query} here)"
        )


def check_side(side: Side) -> None:
    if side not in SIDES:
        raise InputError(f"HeadScore(side={side!r}): expected one of {', '.join(SIDES)}")


@dataclass(frozen=True, eq=False)
class QKAttribution:
    """One pre-softmax score as a sum over pairs: query-side term times key-side term.

    ``terms["weight"].sum() == score``, up to rounding. Terms are the active features, their errors
    and biases, embeddings, positions, MLPs (node ids), and what no writer carries: ``norm_bias``,
    ``b_Q``, ``b_K``, the biases of norms of queries and keys, ``alibi``.

    Attributes:
        layer, head, query, key: which score.
        score: scaled by the model's attention scale, before any soft-cap.
        capped_score: what the softmax gets: ``soft_cap * tanh(score / soft_cap)``, or the score.
        soft_cap: None where there is none.
        pattern: the attention weight that the model gave this key.
        query_parts: ``[query term, d]``; key_parts: ``[key term, d]``; terms are their products.
        query_nodes, key_nodes: names of the terms.
        row: ``[key]`` scores of this query to every visible key, before any soft-cap; row_pattern:
            their attention weights; row_keys: their positions.
        tokens: of the prompt.
    """

    layer: int
    head: int
    query: int
    key: int
    score: float
    capped_score: float
    soft_cap: float | None
    pattern: float
    query_parts: Float[Tensor, "query_term d"]
    key_parts: Float[Tensor, "key_term d"]
    query_nodes: tuple[str, ...]
    key_nodes: tuple[str, ...]
    row: Float[Tensor, " key"]
    row_pattern: Float[Tensor, " key"]
    row_keys: tuple[int, ...]
    tokens: tuple[str, ...]
    rivals_of: Callable[[], tuple[Tensor, tuple[str, ...]]]

    def __repr__(self) -> str:
        capped = "" if self.soft_cap is None else f" ({self.capped_score:+.4f} after the soft-cap)"
        return (
            f"QKAttribution of head {self.layer}.{self.head}, {self._at(self.query)} looks at "
            f"{self._at(self.key)}: score {self.score:+.4f}{capped}, weight {self.pattern:.3f}, "
            f"{len(self.query_nodes)} x {len(self.key_nodes)} terms"
        )

    def _at(self, position: int) -> str:
        return f"{self.tokens[position]!r}@{position}"

    def plot(self, n: int = 15, ax: Axes | None = None) -> Figure:
        """The ``n`` strongest pairs of terms, and what all others add.

        Args:
            ax: axes to draw into. None: a figure of its own, which notebooks show.
        """
        from sae_attn_plugin.plots import bars

        top = self.top(n)
        names = [f"{q} × {k}" for q, k in zip(top["query_node"], top["key_node"], strict=True)]
        values = [float(weight) for weight in top["weight"]]
        names += ["all other pairs", "= score"]
        values += [self.score - sum(values), self.score]
        title = f"Head {self.layer}.{self.head}, {self._at(self.query)} to {self._at(self.key)}"
        return bars(names, values, title=title, name="score", ax=ax, neutral=(len(names) - 1,))

    def _repr_html_(self) -> str:
        from sae_attn_plugin import display

        row = dict(zip(self.row_keys, self.row_pattern.double().tolist(), strict=True))
        return display.card(
            f"Head {self.layer}.{self.head}, {self._at(self.query)} to {self._at(self.key)}",
            [
                f"score {display.number(self.score, True)}",
                f"attention {self.pattern:.1%}",
                f"{len(self.query_nodes)} x {len(self.key_nodes)} terms",
            ],
            display.coloured(self.tokens, [row.get(p, 0.0) for p in range(self.query + 1)]),
            display.heading("Strongest terms"),
            display.table(self.top(8), ["query_node", "key_node", "weight"], bars="weight", rows=8),
        )

    # -- terms -----------------------------------------------------------------------------------

    @cached_property
    def weights(self) -> Float[Tensor, "query_term key_term"]:
        """Every term as a matrix, in the order of ``query_nodes`` and ``key_nodes``."""
        return self.query_parts @ self.key_parts.T

    @cached_property
    def terms(self) -> pd.DataFrame:
        """One row per pair: ``query_node``, ``key_node``, ``weight``."""
        n, m = len(self.query_nodes), len(self.key_nodes)
        return pd.DataFrame(
            {
                "query_node": pd.Categorical.from_codes(
                    np.repeat(np.arange(n), m), categories=pd.Index(self.query_nodes)
                ),
                "key_node": pd.Categorical.from_codes(
                    np.tile(np.arange(m), n), categories=pd.Index(self.key_nodes)
                ),
                "weight": self.weights.flatten().numpy(force=True),
            }
        )

    def top(self, n: int = 10, *, relative: bool = False) -> pd.DataFrame:
        """The ``n`` strongest terms by absolute value, signed: ``query_node, key_node, weight``.

        Args:
            relative: of the softmax-relative score instead: terms at this key, times
                ``1 - pattern``, and terms at every other visible key, times minus its pattern.
        """
        if n < 1:
            raise InputError(f"top({n}): expected at least 1")
        keys, names = self._relative_keys if relative else (self.key_parts, self.key_nodes)
        chunk = max(1, _CHUNK // max(len(self.query_parts), 1))
        best: list[tuple[float, int, int]] = []
        for first in range(0, len(keys), chunk):
            block = self.query_parts @ keys[first : first + chunk].T
            found = block.abs().flatten().topk(min(n, block.numel())).indices.tolist()
            width = block.shape[1]
            best += [
                (float(block[i // width, i % width]), i // width, first + i % width) for i in found
            ]
            best = sorted(best, key=lambda one: -abs(one[0]))[:n]
        return pd.DataFrame(
            {
                "query_node": [self.query_nodes[i] for _, i, _ in best],
                "key_node": [names[j] for _, _, j in best],
                "weight": [weight for weight, _, _ in best],
            }
        )

    # -- marginals -------------------------------------------------------------------------------

    @cached_property
    def by_query(self) -> pd.Series:
        """Signed sum of each query-side term over all keys' terms; they sum to the score."""
        return _series(self.query_parts @ self.key_parts.sum(0), self.query_nodes, "query_node")

    @cached_property
    def by_key(self) -> pd.Series:
        """Signed sum of each key-side term over all queries' terms; they sum to the score."""
        return _series(self.key_parts @ self.query_parts.sum(0), self.key_nodes, "key_node")

    @cached_property
    def by_kind(self) -> pd.DataFrame:
        """Terms summed by kind: query kinds as rows, key kinds as columns (``attn``: features)."""
        rows, row = np.unique([_kind(name) for name in self.query_nodes], return_inverse=True)
        columns, column = np.unique([_kind(name) for name in self.key_nodes], return_inverse=True)
        sums = np.zeros((len(rows), len(columns)))
        np.add.at(sums, (row[:, None], column), self.weights.double().numpy(force=True))
        return pd.DataFrame(
            sums, index=pd.Index(rows, name="query"), columns=pd.Index(columns, name="key")
        )

    @property
    def residual(self) -> float:
        """What the terms miss of the score; rounding only."""
        return self.score - float(self.weights.double().sum())

    @property
    def relative_residual(self) -> float:
        """The residual over the sum of absolute terms."""
        return abs(self.residual) / max(float(self.weights.double().abs().sum()), 1e-30)

    # -- against the other keys ------------------------------------------------------------------

    @property
    def relative_score(self) -> float:
        """The score minus the pattern-weighted mean over the visible keys: what the softmax feels.

        Adding to this score alone changes the key's weight by ``pattern * (1 - pattern)`` per unit
        at first order; adding to all of them changes nothing.
        """
        weights = self.row_pattern.double() / self.row_pattern.double().sum()
        return self.score - float((weights * self.row.double()).sum())

    @cached_property
    def relative_by_query(self) -> pd.Series:
        """Each query-side term's part in the relative score; they sum to it."""
        keys, _ = self._relative_keys
        return _series(self.query_parts @ keys.sum(0), self.query_nodes, "query_node")

    @cached_property
    def relative_by_key(self) -> pd.Series:
        """Each key-side term's part in the relative score, at this key and at its rivals; constants
        that every key has cancel up to their rotation and norm scales. They sum to it."""
        keys, names = self._relative_keys
        return _series(keys @ self.query_parts.sum(0), names, "key_node")

    @cached_property
    def _relative_keys(self) -> tuple[Tensor, tuple[str, ...]]:
        """Key-side terms at every visible key, weighted for the relative score."""
        return self.rivals_of()


def qk_attribution(
    scores: FrozenScores,
    writers: WriterTable,
    head: int,
    query: int,
    key: int,
    tokens: tuple[str, ...],
) -> QKAttribution:
    """All terms of one score. Only this pair's terms are formed."""
    check_score(scores, head, query, key)
    visible = scores.visible(query).nonzero()[:, 0]
    row = scores.rows(query)[head, visible]
    pattern = scores.frozen.pattern[head, query, visible]
    at = int((visible == key).nonzero()[0, 0])
    query_parts, query_nodes = _parts(scores, writers, "query", query, query, head)

    def rivals() -> tuple[Tensor, tuple[str, ...]]:
        weights = pattern / pattern.sum()
        found, names = [], []
        for index, position in enumerate(visible.tolist()):
            parts, nodes = _parts(scores, writers, "key", position, query, head)
            factor = float(position == key) - weights[index]
            found.append(parts * factor)
            names += [f"{name}@{position}" if name in CONSTANTS else name for name in nodes]
        return torch.cat(found), tuple(names)

    key_parts, key_nodes = _parts(scores, writers, "key", key, query, head)
    return QKAttribution(
        layer=scores.layer,
        head=head,
        query=query,
        key=key,
        score=float(row[at]),
        capped_score=float(scores.capped(row[at])),
        soft_cap=scores.weights.soft_cap,
        pattern=float(pattern[at]),
        query_parts=query_parts,
        key_parts=key_parts,
        query_nodes=query_nodes,
        key_nodes=key_nodes,
        row=row,
        row_pattern=pattern,
        row_keys=tuple(visible.tolist()),
        tokens=tokens,
        rivals_of=rivals,
    )


def _parts(
    scores: FrozenScores,
    writers: WriterTable,
    side: Literal["query", "key"],
    position: int,
    query: int,
    head: int,
) -> tuple[Tensor, tuple[str, ...]]:
    """Terms of one side, writers first, with their names."""
    start, count = int(writers.starts[position]), int(writers.prefix(scores.layer)[position])
    names = [str(writers.node(row)) for row in range(start, start + count)]
    parts = [scores.side(side, writers.vectors[start : start + count], position, head)]
    for name, vector in scores.constants(side, position, head).items():
        names.append(name)
        parts.append(vector[None])
    found = torch.cat(parts)
    slopes = scores.weights.alibi_slopes
    if slopes is not None:
        # One more dimension, where only ALiBi's own two terms meet.
        bias = 1.0 if side == "query" else float(slopes[head]) * (position - query)
        found = torch.nn.functional.pad(found, (0, 1, 0, 1))
        found[-1, -1] = bias
        names.append("alibi")
    return found, tuple(names)


# -- a score as a target of the graph ------------------------------------------------------------


@dataclass(frozen=True)
class ScoreReader:
    """A score as linear functionals of the residual stream: ``sum of vector . x + constant``.

    Attributes:
        layer: whose score; only writers below it are read.
        vectors: ``[part, d_model]``; positions: ``[part]``; one part for each side followed.
    """

    layer: int
    vectors: Float[Tensor, "part d_model"]
    positions: tuple[int, ...]
    constant: float
    value: float

    def edges(
        self, writers: WriterTable, first: np.ndarray, count: np.ndarray
    ) -> tuple[np.ndarray, Tensor]:
        """``(writer rows, weights)``; a writer that is read on both sides has one edge.

        Args:
            first, count: ``[position]``, the rows that make up the stream.
        """
        found: dict[int, tuple[np.ndarray, Tensor]] = {}
        for vector, position in zip(self.vectors, self.positions, strict=True):
            start, stop = int(first[position]), int(first[position] + count[position])
            columns = np.arange(start, stop, dtype=np.int32)
            weights = writers.vectors[start:stop] @ vector
            if position in found:
                weights = weights + found[position][1]
            found[position] = (columns, weights)
        order = sorted(found)
        return (
            np.concatenate([found[position][0] for position in order]),
            torch.cat([found[position][1] for position in order]),
        )


def score_reader(scores: FrozenScores, head: int, query: int, key: int, side: Side) -> ScoreReader:
    """The reader of one score, with the product of the two sides split between them.

    ``side="query"`` holds the key and gives the whole score to what writes the query, ``"key"`` the
    reverse, ``"both"`` half of each; every one closes to the score.
    """
    check_score(scores, head, query, key)
    check_side(side)
    bias = float(scores.weights.alibi(query, key, head))
    value = float(scores.rows(query)[head, key])
    q = scores.q[query, head] * scores.weights.scale
    k = scores.k[key, scores.group(head)]
    share = 0.5 if side == "both" else 1.0
    vectors, positions, constant = [], [], bias
    for one, position, other in (("query", query, k), ("key", key, q)):
        if side in (one, "both"):
            vectors.append(share * scores.reader(one, query, key, head))  # type: ignore[arg-type]
            positions.append(position)
            parts = scores.constants(one, position, head)  # type: ignore[arg-type]
            constant += share * sum(float(vector @ other) for vector in parts.values())
    return ScoreReader(scores.layer, torch.stack(vectors), tuple(positions), constant, value)


# -- arithmetic ----------------------------------------------------------------------------------


def _at(scale: Float[Tensor, "position head 1"], position: int, head: int) -> Tensor:
    return scale[position, head if scale.shape[1] > 1 else 0, 0]


def _of_head(weight: Float[Tensor, " d"], head: int, d_head: int) -> Tensor:
    """The slice of a norm's weight or bias that acts on a head."""
    return weight if len(weight) == d_head else weight[head * d_head : (head + 1) * d_head]


def _series(values: Tensor, names: tuple[str, ...], index: str) -> pd.Series:
    return pd.Series(values.numpy(force=True), index=pd.Index(names, name=index), name="weight")


def _kind(name: str) -> str:
    return name.split(":")[0].split("@")[0]
