"""Circuits known on paper: models and SAEs whose weights are written down, not trained.

Each function builds a small Hugging Face model, an attention-z SAE for each of its layers, and the
attribution graph that they must have, computed from the written-down constants alone. They test
this package, and any other that claims to find such graphs.

How they are written:

*Stream.* The residual stream is a set of named coordinates: ``"A"`` (the token here is A), ``"@3"``
(the position is 3), ``"prev A"`` (the token before is A), ``"say A"``. A coordinate of value c is
the pair of dimensions (+c, -c), so the mean over dimensions is zero wherever the stream is made of
coordinates, and LayerNorm and RMSNorm both divide by ``scale = sqrt(sum of c^2 / n + EPSILON)``
with n coordinates, used or not. Embeddings set their coordinate to 1.

*Heads.* The score of a head is ``SHARPNESS / (scale_q scale_k)`` times a sum of products of
coordinates at query and key; heads that match by content look at BOS where nothing matches. The
best score is ahead by more than 100, so patterns are 0 or 1 to less than 1e-43. A head moves
coordinates: ``z = gain * c / scale_k``. Nothing moves BOS, so a head that looks there writes
nothing. MLPs are zero.

*Edges.* With patterns of 0 and 1, a writer of amount c of a coordinate has the edge
``w * gain * c / scale`` into a feature that reads this coordinate's z with encoder weight w, and
``u * c / scale`` into a logit that reads it with weight u.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch

from sae_attn_plugin.demo.by_hand import (
    BOS,
    N_CTX,
    Coordinates,
    FeatureSpec,
    HeadSpec,
    Stream,
    gpt2_model,
    head_width,
    llama_model,
    looks_back,
    norm_scale,
    sae_of,
    tokenizer_of,
)
from sae_attn_plugin.nodes import Logit, LogitDiff, Node

if TYPE_CHECKING:
    from sae_attn_plugin.attribution.table import Attribution
    from sae_attn_plugin.lens import FeatureLens

__all__ = [
    "CIRCUITS",
    "Circuit",
    "Comparison",
    "all",
    "grouped_query_induction",
    "induction",
    "negation",
    "s_inhibition",
    "two_hop_copy",
    "two_roles",
]

THRESHOLD = 1e-5  # edges below are rounding; the smallest true one is above 0.1

_Edges = Mapping[tuple[str, str], float]


@dataclass(frozen=True)
class Comparison:
    """A measured graph beside the true one.

    Attributes:
        precision, recall: of edges, as ``(source, target)``.
        worst: largest relative error of a weight, over the edges in both.
    """

    precision: float
    recall: float
    worst: float

    @classmethod
    def of(cls, found: _Edges, true: _Edges) -> Comparison:
        """Weights found beside the true ones, by ``(source, target)``."""
        both = found.keys() & true.keys()
        errors = [abs(found[edge] / true[edge] - 1) for edge in both]
        return cls(
            precision=len(both) / max(len(found), 1),
            recall=len(both) / len(true),
            worst=max(errors, default=math.inf),
        )


@dataclass(frozen=True, eq=False)
class Circuit:
    """A model, its SAEs, a prompt, and the attribution graph on paper.

    Attributes:
        name: of the function that builds it.
        model: a Hugging Face GPT-2 or Llama; saes: one per layer, on ``hook_z``.
        tokenizer: one word per token; the vocabulary is ``token_names``.
        prompt: token ids; answers: the most likely next token, by position.
        targets: what the graph explains.
        edges: weight by ``(source, target)`` node ids; constants: by target.
        edges_by_head: weight by ``(source, target, head)``, for targets that are features.
        patterns: by ``(layer, head)``, the key that each query position looks at.
        effects: by ``(feature, target)``, the change of the target when the feature is set to zero
            and everything else responds.
        feature_names: what each feature of a layer means.
    """

    name: str
    model: Any
    saes: tuple[Any, ...]
    tokenizer: Any
    token_names: tuple[str, ...]
    prompt: tuple[int, ...]
    answers: Mapping[int, str]
    targets: tuple[Logit | LogitDiff, ...]
    edges: _Edges
    edges_by_head: Mapping[tuple[str, str, int], float]
    constants: Mapping[str, float]
    patterns: Mapping[tuple[int, int], tuple[int, ...]]
    effects: _Edges
    feature_names: tuple[tuple[str, ...], ...]

    @property
    def nodes(self) -> tuple[str, ...]:
        """Ids of all nodes of the graph."""
        return tuple(dict.fromkeys(name for edge in self.edges for name in edge))

    def lens(self) -> FeatureLens:
        """The circuit on a ``HookedTransformer``."""
        from sae_attn_plugin.backends.loading import to_hooked_transformer
        from sae_attn_plugin.lens import FeatureLens

        return FeatureLens(to_hooked_transformer(self.model, self.tokenizer), self.saes)

    def meaning(self, node: str) -> str:
        """A node id in words."""
        parsed = Node.parse(node)
        token = self.token_names[self.prompt[parsed.position]]
        if parsed.kind == "attn" and parsed.layer is not None and parsed.feature is not None:
            return f"{self.feature_names[parsed.layer][parsed.feature]}, at {token}"
        return {
            "embed": f"the token {token}",
            "attn_err": f"error of layer {parsed.layer}, at {token}",
            "attn_bias": f"bias of layer {parsed.layer}, at {token}",
        }.get(parsed.kind, node)

    def table(self) -> pd.DataFrame:
        """One row per true edge: ``source, target, weight``, and both ends in words."""
        return pd.DataFrame(
            {
                "source": source,
                "target": target,
                "weight": weight,
                "from": self.meaning(source),
                "to": self.meaning(target),
            }
            for (source, target), weight in self.edges.items()
        )

    def found(self, attribution: Attribution) -> dict[tuple[str, str], float]:
        """Edges of an attribution above ``THRESHOLD`` that lead to a target through such edges."""
        chosen = attribution.edges["weight"].abs() > THRESHOLD
        return reached(attribution, chosen)

    def compare(self, attribution: Attribution) -> Comparison:
        """The edges of an attribution beside the true ones."""
        return Comparison.of(self.found(attribution), self.edges)


def reached(attribution: Attribution, chosen: pd.Series) -> dict[tuple[str, str], float]:
    """Of the chosen edges, those that lead to a target through chosen edges."""
    frame = attribution.edges[chosen]
    into: dict[str, dict[str, float]] = {}
    columns = (frame["source"], frame["target"], frame["weight"].tolist())
    for source, target, weight in zip(*columns, strict=True):
        into.setdefault(str(target), {})[str(source)] = weight
    pending, edges = [str(node) for node in attribution.roots.values()], {}
    while pending:
        target = pending.pop()
        for source, weight in into.pop(target, {}).items():
            edges[source, target] = weight
            pending.append(source)
    return edges


# -- the circuits --------------------------------------------------------------------------------


def induction(
    *,
    copy: float = 1.0,
    say: float = 1.5,
    unembed: float = 2.0,
    dtype: torch.dtype = torch.float32,
) -> Circuit:
    """Induction: ``<bos> A B C A`` is followed by B.

    Layer 0, head 1 looks one back and moves ``t`` to ``prev t`` (gain ``copy``); layer 1, head 0
    matches ``t`` at the query with ``prev t`` at the key (K-composition) and moves the key's token
    to ``say`` (gain ``say``); the logit reads ``say`` with weight ``unembed``.

    n = 18 coordinates. Layer 0 sees a token and a position everywhere: ``s0^2 = 2/n + EPSILON``,
    and writes ``c = copy / s0``. B has ``prev A`` when layer 1 reads it:
    ``s1^2 = (2 + c^2)/n + EPSILON``, and ``a = say / s1`` is written at the end, which has
    ``prev C``: ``sf^2 = (2 + c^2 + a^2)/n + EPSILON``. So

        token B -> say B: say / s1        say B -> logit B: unembed * a / sf

    The previous-token feature makes the pattern and so has no edge. Without it, head 0 looks at
    BOS, and the logit is 0.
    """
    n, names = 18, ("A", "B", "C")
    s0 = norm_scale(n, 1, 1)
    c = copy / s0
    a = say / norm_scale(n, 1, 1, c)
    logit = unembed * a / norm_scale(n, 1, 1, c, a)
    layers = [
        [HeadSpec(), looks_back([(t, {f"prev {t}": 1}) for t in names], copy)],
        [
            HeadSpec([({t: 1}, {f"prev {t}": 1}) for t in names], _says(names), say),
            HeadSpec(),
        ],
    ]
    edges = {
        ("embed@2", "attn:1:1@4"): say / norm_scale(n, 1, 1, c),
        ("attn:1:1@4", 'logit:"B"@4'): logit,
    }
    return _build(
        "induction",
        n=n,
        vocabulary=(BOS, *names),
        others=[f"{kind} {t}" for kind in ("prev", "say") for t in names],
        layers=layers,
        features=[_copies(1, 3), _copies(0, 3)],
        feature_names=[[f"{kind} {t}" for t in names] for kind in ("prev", "say")],
        unembed={t: {f"say {t}": unembed} for t in names},
        prompt="<bos> A B C A",
        answers={4: "B"},
        targets=[Logit("B", 4)],
        edges=edges,
        constants={"attn:1:1@4": 0.0, 'logit:"B"@4': 0.0},
        heads={1: 0},
        patterns={
            (0, 0): (0, 0, 0, 0, 0),
            (0, 1): (0, 0, 1, 2, 3),
            (1, 0): (0, 0, 0, 0, 2),
            (1, 1): (0, 0, 0, 0, 0),
        },
        effects={
            ("attn:0:0@2", 'logit:"B"@4'): -logit,
            ("attn:1:1@4", 'logit:"B"@4'): -logit,
        },
        dtype=dtype,
    )


def s_inhibition(
    *,
    duplicate: float = 1.0,
    inhibit: float = 1.0,
    move: float = 2.0,
    unembed: float = 2.0,
    suppress: float = 0.5,
    dtype: torch.dtype = torch.float32,
) -> Circuit:
    """Duplicate token, S-inhibition, name mover: ``<bos> A B A to`` is followed by B.

    Layer 0 looks at the same token earlier and moves ``t`` to ``dup t`` (gain ``duplicate``);
    layer 1 looks from ``to`` at a duplicate and moves ``dup t`` to ``not t`` (``inhibit``); layer 2
    looks from ``to`` at the first name whose ``not t`` is unset and moves it to ``say t``
    (``move``). A logit reads ``unembed * say t - suppress * not t``.

    n = 22 coordinates; ``s0^2 = 2/n + EPSILON``. At the second A, ``d = duplicate / s0`` is
    written, ``s1^2 = (2 + d^2)/n + EPSILON``; at ``to``, ``i = inhibit * d / s1``, then
    ``m = move / s0`` from the untouched B, ``sf^2 = (2 + i^2 + m^2)/n + EPSILON``. So

        token A (first) -> dup A: duplicate / s0       dup A -> not A: inhibit * d / s1
        token B -> say B: move / s0
        not A -> B - A: suppress * i / sf              say B -> B - A: unembed * m / sf

    Without ``not A``, layer 2 looks at A instead: the difference is ``-unembed * m / t`` with
    ``t^2 = (2 + m^2)/n + EPSILON``. Without ``dup A``, layer 1 looks at BOS: the same.
    """
    n, names = 22, ("A", "B", "C")
    s0 = norm_scale(n, 1, 1)
    d = duplicate / s0
    s1 = norm_scale(n, 1, 1, d)
    i, m = inhibit * d / s1, move / s0
    sf = norm_scale(n, 1, 1, i, m)
    by_not, by_say = suppress * i / sf, unembed * m / sf
    misled = -unembed * m / norm_scale(n, 1, 1, m) - (by_not + by_say)
    itself = [({f"@{p}": -1.0}, {f"@{p}": 1.0}) for p in range(N_CTX)]
    layers = [
        [
            HeadSpec(
                [*(({t: 1}, {t: 1}) for t in names), *itself],
                [(t, {f"dup {t}": 1}) for t in names],
                duplicate,
            )
        ],
        [
            HeadSpec(
                [({"to": 1}, {f"dup {t}": 1 for t in names})],
                [(f"dup {t}", {f"not {t}": 1}) for t in names],
                inhibit,
            )
        ],
        [
            HeadSpec(
                [
                    ({"to": 1}, {t: 1 for t in names}),
                    ({"to": 0.5}, {"@1": 1}),  # of several names, the first
                    *(({f"not {t}": -1}, {t: 1}) for t in names),
                ],
                _says(names),
                move,
            )
        ],
    ]
    target = 'logit_diff:"B"-"A"@4'
    edges = {
        ("embed@1", "attn:0:0@3"): duplicate / s0,
        ("attn:0:0@3", "attn:1:0@4"): inhibit * d / s1,
        ("embed@2", "attn:2:1@4"): move / s0,
        ("attn:1:0@4", target): by_not,
        ("attn:2:1@4", target): by_say,
    }
    return _build(
        "s_inhibition",
        n=n,
        vocabulary=(BOS, *names, "to"),
        others=[f"{kind} {t}" for kind in ("dup", "not", "say") for t in names],
        layers=layers,
        features=[_copies(0, 3)] * 3,
        feature_names=[[f"{kind} {t}" for t in names] for kind in ("dup", "not", "say")],
        unembed={t: {f"say {t}": unembed, f"not {t}": -suppress} for t in names},
        prompt="<bos> A B A to",
        answers={4: "B"},
        targets=[LogitDiff("B", "A", 4)],
        edges=edges,
        constants=dict.fromkeys(["attn:0:0@3", "attn:1:0@4", "attn:2:1@4", target], 0.0),
        heads={0: 0, 1: 0, 2: 0},
        patterns={(0, 0): (0, 0, 0, 1, 0), (1, 0): (0, 0, 0, 0, 3), (2, 0): (0, 0, 0, 0, 2)},
        effects={
            ("attn:0:0@3", target): misled,
            ("attn:1:0@4", target): misled,
            ("attn:2:1@4", target): suppress * i / norm_scale(n, 1, 1, i) - (by_not + by_say),
        },
        dtype=dtype,
    )


def two_hop_copy(
    *,
    copy: float = 1.0,
    threshold: float = 0.5,
    say: float = 1.5,
    unembed: float = 2.0,
    dtype: torch.dtype = torch.float32,
) -> Circuit:
    """Two hops (V-composition): the token two back is said; ``<bos> A B C`` is followed by A.

    Both layers look one back. Layer 0 moves ``t`` to ``mid t`` (gain ``copy``), layer 1 moves
    ``mid t`` to ``say t`` (gain ``say``). The encoder bias of layer 0 is ``-threshold``, which its
    decoder does not make up for: the error node carries ``threshold`` of ``mid``.

    n = 18 coordinates; ``s0^2 = 2/n + EPSILON``, ``c = copy / s0``; B has ``mid A``, C has
    ``mid B``: ``s1^2 = (2 + c^2)/n + EPSILON``, ``a = say * c / s1``,
    ``sf^2 = (2 + c^2 + a^2)/n + EPSILON``. So

        token A -> mid A: copy / s0, constant -threshold
        mid A -> say A: say * (c - threshold) / s1       error -> say A: say * threshold / s1
        say A -> logit A: unembed * a / sf

    Without ``mid A`` the error stays, and the logit is the same with ``threshold`` of ``mid A``.
    """
    n, names = 18, ("A", "B", "C")
    s0 = norm_scale(n, 1, 1)
    c = copy / s0
    s1 = norm_scale(n, 1, 1, c)
    a = say * c / s1
    logit = unembed * a / norm_scale(n, 1, 1, c, a)
    left = say * threshold / norm_scale(n, 1, 1, threshold)
    target = 'logit:"A"@3'
    edges = {
        ("embed@1", "attn:0:0@2"): copy / s0,
        ("attn:0:0@2", "attn:1:0@3"): say * (c - threshold) / s1,
        ("attn_err:0@2", "attn:1:0@3"): say * threshold / s1,
        ("attn:1:0@3", target): logit,
    }
    return _build(
        "two_hop_copy",
        n=n,
        vocabulary=(BOS, *names),
        others=[f"{kind} {t}" for kind in ("mid", "say") for t in names],
        layers=[
            [looks_back([(t, {f"mid {t}": 1}) for t in names], copy)],
            [looks_back([(f"mid {t}", {f"say {t}": 1}) for t in names], say)],
        ],
        features=[_copies(0, 3, bias=-threshold), _copies(0, 3)],
        feature_names=[[f"{kind} {t}" for t in names] for kind in ("mid", "say")],
        unembed={t: {f"say {t}": unembed} for t in names},
        prompt="<bos> A B C",
        answers={3: "A"},
        targets=[Logit("A", 3)],
        edges=edges,
        constants={"attn:0:0@2": -threshold, "attn:1:0@3": 0.0, target: 0.0},
        heads={0: 0, 1: 0},
        patterns={(0, 0): (0, 0, 1, 2), (1, 0): (0, 0, 1, 2)},
        effects={
            ("attn:0:0@2", target): unembed * left / norm_scale(n, 1, 1, c, left) - logit,
            ("attn:1:0@3", target): -logit,
        },
        dtype=dtype,
    )


def two_roles(
    *,
    say: float = 1.5,
    offset: float = 0.5,
    unembed: float = 2.0,
    dtype: torch.dtype = torch.float32,
) -> Circuit:
    """One head, two unrelated roles: it answers ``hue`` with a colour, ``count`` with a number.

    In ``<bos> red two hue count`` the features "say red" (at ``hue``) and "say two" (at ``count``)
    belong to the same head and differ in the source they read. Every decoder bias is ``offset``,
    which the SAE also takes from its input.

    n = 11 coordinates, no positions: ``s0^2 = 1/n + EPSILON``, ``z = say / s0``,
    ``sf^2 = (1 + z^2)/n + EPSILON``. So, for each of the two,

        token -> feature: say / s0, constant -offset
        feature -> logit: unembed * (z - offset) / sf    bias -> logit: unembed * offset / sf

    Where a feature is off, the error takes the bias back.
    """
    n, words = 11, ("red", "blue", "two", "six")
    s0 = norm_scale(n, 1)
    z = say / s0
    sf = norm_scale(n, 1, z)
    pairs = (
        ("embed@1", "attn:0:0@3", "attn_bias:0@3", 'logit:"red"@3'),
        ("embed@2", "attn:0:2@4", "attn_bias:0@4", 'logit:"two"@4'),
    )
    edges, constants, effects = {}, {}, {}
    for (token, feature, bias, logit), (*_, other_logit) in zip(pairs, pairs[::-1], strict=True):
        edges[token, feature] = say / s0
        edges[feature, logit] = unembed * (z - offset) / sf
        edges[bias, logit] = unembed * offset / sf
        constants |= {feature: -offset, logit: 0.0}
        # The bias is left of the answer; the other answer stays.
        effects[feature, logit] = unembed * (offset / norm_scale(n, 1, offset) - z / sf)
        effects[feature, other_logit] = 0.0
    return _build(
        "two_roles",
        n=n,
        vocabulary=(BOS, *words, "hue", "count"),
        others=[f"say {t}" for t in words],
        layers=[
            [
                HeadSpec(
                    [({"hue": 1}, {"red": 1, "blue": 1}), ({"count": 1}, {"two": 1, "six": 1})],
                    _says(words),
                    say,
                )
            ]
        ],
        features=[_copies(0, 4)],
        b_dec=offset,
        feature_names=[[f"say {t}" for t in words]],
        unembed={t: {f"say {t}": unembed} for t in words},
        prompt="<bos> red two hue count",
        answers={3: "red", 4: "two"},
        targets=[Logit("red", 3), Logit("two", 4)],
        edges=edges,
        constants=constants,
        heads={0: 0},
        patterns={(0, 0): (0, 0, 0, 1, 2)},
        effects=effects,
        positions=False,
        dtype=dtype,
    )


def negation(
    *,
    flag: float = 1.0,
    say: float = 1.5,
    inhibit: float = 0.125,
    unembed: float = 2.0,
    suppress: float = 0.5,
    dtype: torch.dtype = torch.float32,
) -> Circuit:
    """Exact negative edges: a word is repeated, unless ``not`` stands before it.

    Both layers look one back. Layer 0 moves ``not`` to ``negated`` (gain ``flag``); layer 1 moves
    ``t`` to ``say t`` and ``negated`` to ``say no`` (gain ``say``). The feature "say t" reads
    ``t - inhibit * negated`` and decodes to ``say t``, so the error node carries what it leaves.
    The logit of a word reads ``unembed * say t - suppress * say no``. After
    ``<bos> not A B`` the answer is ``no``, and the graph explains the logit of A.

    n = 17 coordinates; ``s0^2 = 2/n + EPSILON``, ``c = flag / s0`` at A,
    ``s1^2 = (2 + c^2)/n + EPSILON``; ``z = say / s1`` of A and ``y = say * c / s1`` of no are
    written at the end, ``sf^2 = (2 + z^2 + y^2)/n + EPSILON``. So

        token not -> negated: flag / s0
        token A -> say A: say / s1             negated -> say A: -inhibit * y
        negated -> say no: y
        say A -> logit A: unembed * (z - inhibit * y) / sf
        error -> logit A: unembed * inhibit * y / sf     say no -> logit A: -suppress * y / sf
    """
    n, names = 17, ("A", "B")
    s0 = norm_scale(n, 1, 1)
    c = flag / s0
    s1 = norm_scale(n, 1, 1, c)
    z, y = say / s1, say * c / s1
    sf = norm_scale(n, 1, 1, z, y)
    target = 'logit:"A"@3'
    edges = {
        ("embed@1", "attn:0:0@2"): flag / s0,
        ("embed@2", "attn:1:0@3"): say / s1,
        ("attn:0:0@2", "attn:1:0@3"): -inhibit * y,
        ("attn:0:0@2", "attn:1:2@3"): y,
        ("attn:1:0@3", target): unembed * (z - inhibit * y) / sf,
        ("attn_err:1@3", target): unembed * inhibit * y / sf,
        ("attn:1:2@3", target): -suppress * y / sf,
    }
    logit = (unembed * z - suppress * y) / sf
    free = say / s0  # "say A" without the flag
    rest = inhibit * y  # of "say A" without its feature
    layers = [
        [looks_back([("not", {"negated": 1})], flag)],
        [looks_back([*_says(names), ("negated", {"say no": 1})], say)],
    ]
    says = [
        *(FeatureSpec({(0, i): 1, (0, 2): -inhibit}, {(0, i): 1}) for i in range(2)),
        FeatureSpec({(0, 2): 1}, {(0, 2): 1}),
    ]
    return _build(
        "negation",
        n=n,
        vocabulary=(BOS, "not", *names, "no"),
        others=["negated", "say A", "say B", "say no"],
        layers=layers,
        features=[_copies(0, 1), says],
        feature_names=[["negated"], ["say A", "say B", "say no"]],
        unembed={
            **{t: {f"say {t}": unembed, "say no": -suppress} for t in names},
            "no": {"say no": unembed},
        },
        prompt="<bos> not A B",
        answers={3: "no"},
        targets=[Logit("A", 3)],
        edges=edges,
        constants=dict.fromkeys(["attn:0:0@2", "attn:1:0@3", "attn:1:2@3", target], 0.0),
        heads={0: 0, 1: 0},
        patterns={(0, 0): (0, 0, 1, 2), (1, 0): (0, 0, 1, 2)},
        effects={
            ("attn:0:0@2", target): unembed * free / norm_scale(n, 1, 1, free) - logit,
            ("attn:1:2@3", target): unembed * z / norm_scale(n, 1, 1, z) - logit,
            ("attn:1:0@3", target): (unembed * rest - suppress * y) / norm_scale(n, 1, 1, rest, y)
            - logit,
        },
        dtype=dtype,
    )


def grouped_query_induction(
    *,
    copy: float = 1.0,
    say: float = 1.5,
    second: float = 0.5,
    unembed: float = 2.0,
    dtype: torch.dtype = torch.float32,
) -> Circuit:
    """Induction as a Llama: RMSNorm, rotary positions, 4 query heads over 2 key/value heads.

    Layer 0: heads 2 and 3 share keys and values; by their queries head 3 looks one back and moves
    ``t`` to ``prev t``, head 2 looks two back and moves it to ``prev2 t`` (both gain ``copy``).
    Layer 1: heads 0 and 1 share keys and values and both match ``t`` with ``prev t``; head 0
    writes ``say t`` in full and head 1 ``second`` of it. The feature "say t" reads 3/4 of head 0
    and 1/4 of head 1. The other heads look at BOS.

    n = 14 coordinates, no position coordinates: ``s0^2 = 1/n + EPSILON``, ``c = copy / s0``; B has
    ``prev A``: ``s1^2 = (1 + c^2)/n + EPSILON``, and ``z = say / s1``; the end has ``prev C`` and
    ``prev2 B``: ``sf^2 = (1 + 2 c^2 + (1 + second)^2 z^2)/n + EPSILON``. So

        token B -> say B: say / s1, by head 3/4 and 1/4 of it
        say B -> logit B: unembed * (1 + second) * z / sf

    Without ``prev A``, or without ``say B``, the logit is 0. ``prev2`` does nothing but widen sf.
    """
    n, names = 14, ("A", "B", "C")
    s0 = norm_scale(n, 1)
    c = copy / s0
    s1 = norm_scale(n, 1, c)
    said = (1 + second) * say / s1
    sf = norm_scale(n, 1, c, c, said)
    logit = unembed * said / sf
    target = 'logit:"B"@4'
    matches = [({t: 1.0}, {f"prev {t}": 1.0}) for t in names]
    layers = [
        [
            HeadSpec(),
            HeadSpec(),
            HeadSpec(moves=[(t, {f"prev2 {t}": 1}) for t in names], gain=copy, lag=2),
            HeadSpec(moves=[(t, {f"prev {t}": 1}) for t in names], gain=copy, lag=1),
        ],
        [
            HeadSpec(matches, _says(names), say),
            HeadSpec(matches, [(t, {f"say {t}": second}) for t in names], say),
            HeadSpec(moves=_says(names), gain=-say),
            HeadSpec(moves=_says(names), gain=-say),
        ],
    ]
    both = [
        FeatureSpec({(0, i): 0.75, (1, i): 0.25}, {(0, i): 1, (1, i): 1}) for i in range(len(names))
    ]
    return _build(
        "grouped_query_induction",
        n=n,
        vocabulary=(BOS, *names),
        others=[f"{kind} {t}" for kind in ("prev", "prev2", "say") for t in names],
        layers=layers,
        features=[[*_copies(3, 3), *_copies(2, 3)], both],
        feature_names=[
            [f"{kind} {t}" for kind in ("prev", "prev2") for t in names],
            [f"say {t}" for t in names],
        ],
        unembed={t: {f"say {t}": unembed} for t in names},
        prompt="<bos> A B C A",
        answers={4: "B"},
        targets=[Logit("B", 4)],
        edges={("embed@2", "attn:1:1@4"): say / s1, ("attn:1:1@4", target): logit},
        constants={"attn:1:1@4": 0.0, target: 0.0},
        edges_by_head={
            ("embed@2", "attn:1:1@4", 0): 0.75 * say / s1,
            ("embed@2", "attn:1:1@4", 1): 0.25 * say / s1,
        },
        patterns={
            (0, 0): (0, 0, 0, 0, 0),
            (0, 1): (0, 0, 0, 0, 0),
            (0, 2): (0, 0, 0, 1, 2),
            (0, 3): (0, 0, 1, 2, 3),
            (1, 0): (0, 0, 0, 0, 2),
            (1, 1): (0, 0, 0, 0, 2),
            (1, 2): (0, 0, 0, 0, 0),
            (1, 3): (0, 0, 0, 0, 0),
        },
        effects={
            ("attn:0:0@2", target): -logit,
            ("attn:1:1@4", target): -logit,
            # "prev2 B" at the end: the final norm alone.
            ("attn:0:4@4", target): unembed * said / norm_scale(n, 1, c, said) - logit,
        },
        positions=False,
        n_kv_heads=2,
        dtype=dtype,
    )


CIRCUITS: tuple[Callable[..., Circuit], ...] = (
    induction,
    s_inhibition,
    two_hop_copy,
    two_roles,
    negation,
    grouped_query_induction,
)


def all(dtype: torch.dtype = torch.float32) -> tuple[Circuit, ...]:
    """Every circuit, with models and SAEs in ``dtype``."""
    return tuple(make(dtype=dtype) for make in CIRCUITS)


# -- how they are built --------------------------------------------------------------------------


def _says(names: Sequence[str]) -> list[tuple[str, Coordinates]]:
    return [(t, {f"say {t}": 1.0}) for t in names]


def _copies(head: int, count: int, bias: float = 0.0) -> list[FeatureSpec]:
    """One feature for each dimension of a head's z."""
    return [FeatureSpec({(head, i): 1.0}, {(head, i): 1.0}, bias) for i in range(count)]


def _build(
    name: str,
    *,
    n: int,
    vocabulary: Sequence[str],
    others: Sequence[str],
    layers: Sequence[Sequence[HeadSpec]],
    features: Sequence[Sequence[FeatureSpec]],
    feature_names: Sequence[Sequence[str]],
    unembed: Mapping[str, Coordinates],
    prompt: str,
    edges: _Edges,
    answers: Mapping[int, str],
    targets: Sequence[Logit | LogitDiff],
    constants: Mapping[str, float],
    patterns: Mapping[tuple[int, int], tuple[int, ...]],
    effects: _Edges,
    dtype: torch.dtype,
    heads: Mapping[int, int] | None = None,
    edges_by_head: Mapping[tuple[str, str, int], float] | None = None,
    b_dec: float = 0.0,
    positions: bool = True,
    n_kv_heads: int | None = None,
) -> Circuit:
    """Weights from the description; the true graph is passed through as it was computed.

    Args:
        others: coordinates beside tokens and positions. heads: the head of all edges into features
            of a layer, where ``edges_by_head`` is not given. n_kv_heads: makes it a Llama.
    """
    names = [*vocabulary, *(f"@{p}" for p in range(N_CTX) if positions), *others]
    stream = Stream(n, names)
    make = gpt2_model if n_kv_heads is None else llama_model
    model = make(stream, vocabulary, layers, unembed, positions, n_kv_heads or 0)
    if edges_by_head is None:
        layer_of = {target: Node.parse(target).layer for _, target in edges}
        edges_by_head = {
            (source, target, (heads or {})[layer]): weight
            for (source, target), weight in edges.items()
            if (layer := layer_of[target]) is not None
        }
    model = model.to(dtype).eval()
    d_head = head_width(model.config)
    saes = tuple(
        sae_of(layer, specs, len(layers[layer]), d_head, b_dec, name, dtype)
        for layer, specs in enumerate(features)
    )
    ids = {token: i for i, token in enumerate(vocabulary)}
    return Circuit(
        name=name,
        model=model,
        saes=saes,
        tokenizer=tokenizer_of(ids),
        token_names=tuple(vocabulary),
        prompt=tuple(ids[token] for token in prompt.split()),
        answers=answers,
        targets=tuple(targets),
        edges=edges,
        edges_by_head=edges_by_head,
        constants=constants,
        patterns=patterns,
        effects=effects,
        feature_names=tuple(tuple(names) for names in feature_names),
    )
