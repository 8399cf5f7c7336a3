"""Features whose family is known by construction, among features of none.

A GPT-2 of two layers with four heads each, and an attention-z SAE for each layer, are written down
so that every feature reads what one head does (:mod:`sae_attn_plugin.demo.circuits` says how such
models are written):

| layer, head | looks at | z holds |
|---|---|---|
| 0.0 | the position before | the token there |
| 0.1 | earlier positions with the same token, else BOS | the token there |
| 0.2 | itself | the token and the position |
| 0.3 | BOS | that it is BOS |
| 1.0 | positions after earlier copies of the token (through 0.0), else BOS | the token there |
| 1.1 | the six positions before, alike | their tokens, averaged |
| 1.2 | all positions, alike | their tokens, averaged |
| 1.3 | the position before | the token there, if it counts (numbers, days) |

The families of its features follow: features of 0.0 are previous-token features, and so on. Those
of 1.2 read the topic of a row (a set of words; some rows are about one), those of 1.3 write the
successor of what they read. Decoys belong to fewer families than they seem to, or to none:

- "mixed" features fire for any of three unrelated reasons, each about a third of the time;
- a feature of the token ``title`` fires at few positions, since the token stands nowhere else;
- features of 1.3 that promote an unrelated word, or the number itself;
- features that never fire.

Noise is added to what features read and write: encoders, decoders, values and output projections
get independent Gaussian noise of ``noise`` times the root mean square of their entries. Queries and
keys are left alone, since a head that looks elsewhere makes features of another family.
"""

from __future__ import annotations

import itertools
import math
import random
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from jaxtyping import Int
from torch import Tensor
from tqdm.auto import tqdm

from sae_attn_plugin.demo.by_hand import (
    BOS,
    FeatureSpec,
    HeadSpec,
    Stream,
    gpt2_model,
    looks_back,
    norm_scale,
    sae_of,
    tokenizer_of,
)
from sae_attn_plugin.errors import InputError

if TYPE_CHECKING:
    from sae_attn_plugin.lens import FeatureLens
    from sae_attn_plugin.studies import Study

__all__ = ["PlantedFamilies", "compare", "plant", "pooled", "recovery"]

N_CTX = 96
_N_HEADS = 4
_N = 304  # coordinates, some of them unused


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


TOPICS = (
    _words("cat dog horse goat duck fox bear owl"),
    _words("bread soup rice milk honey corn jam tea"),
    _words("rain snow wind storm cloud frost hail fog"),
    _words("drum flute harp horn bell lute pipe viol"),
)
NUMBERS = _words("one two three four five six seven eight nine ten eleven twelve")
DAYS = _words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
TITLE = "title"
WORDS = tuple(word for topic in TOPICS for word in topic)
_COUNTED = NUMBERS + DAYS
_ORDINARY = (*WORDS, *_COUNTED, TITLE)
VOCABULARY = (BOS, *_ORDINARY)
_NEXT = {
    **dict(itertools.pairwise(NUMBERS)),
    **dict(zip(DAYS, (*DAYS[1:], DAYS[0]), strict=True)),
}
_WINDOWS = ((4, 8), (16, 20), (32, 36), (64, 72))  # positions, the last one out


@dataclass(frozen=True, eq=False)
class PlantedFamilies:
    """A model with features of known families.

    Attributes:
        model: a Hugging Face GPT-2; saes: one per layer, on ``hook_z``; tokenizer: of words.
        rows: ``[row, 96]``, text for a survey.
        truth: one row per feature: ``layer, feature, name, families`` (a tuple of names).
    """

    model: Any
    saes: tuple[Any, ...]
    tokenizer: Any
    rows: Int[Tensor, "row position"]
    truth: pd.DataFrame

    def lens(self) -> FeatureLens:
        """The model on a ``HookedTransformer``."""
        from sae_attn_plugin.backends.loading import to_hooked_transformer
        from sae_attn_plugin.lens import FeatureLens

        return FeatureLens(to_hooked_transformer(self.model, self.tokenizer), self.saes)


def plant(seed: int = 0, noise: float = 0.0, *, rows: int = 80, each: int = 8) -> PlantedFamilies:
    """A model with ``each`` features of every family, in random order, and about as many decoys.

    Args:
        seed: of text, of which tokens the features are for, and of noise.
        noise: relative to the root mean square of each weight matrix.
        rows: of text.

    Raises:
        InputError: no rows, noise below 0, more features than there are tokens for.
    """
    if rows < 1 or not 1 <= each <= 12 or not noise >= 0:
        raise InputError(
            f"rows={rows}, each={each}, noise={noise}: expected at least 1 row, 1 to 12 features "
            "of each family, noise of 0 or more"
        )
    rng = random.Random(f"families {seed}")
    stream = Stream(
        _N,
        [
            *VOCABULARY,
            *(f"@{p}" for p in range(N_CTX)),
            *(f"{kind} {t}" for kind in ("prev", "say") for t in _ORDINARY),
        ],
    )
    s0, s1 = norm_scale(_N, 1, 1), norm_scale(_N, 1, 1, 1)
    model = gpt2_model(
        stream,
        VOCABULARY,
        _heads(s0),
        {t: {f"say {t}": 2.0} for t in _ORDINARY},
        True,
        n_ctx=N_CTX,
    )
    model = model.float().eval()
    features = [_first(rng, each, 1 / s0), _second(rng, each, 1 / s1)]
    saes, truth = [], []
    for layer, planted in enumerate(features):
        rng.shuffle(planted)
        specs = [feature for _, _, feature in planted]
        d_head = 2 * _N // _N_HEADS
        sae = sae_of(layer, specs, _N_HEADS, d_head, 0.0, "planted-families", torch.float32)
        saes.append(sae)
        truth += [(layer, i, name, families) for i, (name, families, _) in enumerate(planted)]
    generator = torch.Generator().manual_seed(seed)
    _add_noise(model, saes, noise, generator)
    ids = {token: i for i, token in enumerate(VOCABULARY)}
    text = [[ids[token] for token in _row(rng)] for _ in range(rows)]
    return PlantedFamilies(
        model,
        tuple(saes),
        tokenizer_of(ids),
        torch.tensor(text),
        pd.DataFrame(truth, columns=["layer", "feature", "name", "families"]),
    )


def compare(planted: PlantedFamilies, study: Study) -> pd.DataFrame:
    """What ``sap.studies.families`` found beside what was planted.

    Returns:
        ``family, planted, found, right, precision, recall``, and a last row ``all`` of all of them
        together. Features with too few firings to be judged count as not found.
    """
    members = study.tables["members"]
    found = set(zip(members["layer"], members["feature"], members["family"], strict=True))
    truth = {
        (layer, feature, family)
        for layer, feature, families in zip(
            planted.truth["layer"],
            planted.truth["feature"],
            planted.truth["families"],
            strict=True,
        )
        for family in families
    }
    rows = []
    for name in [*study.settings["families"], "all"]:
        there = {x for x in truth if name in (x[2], "all")}
        claimed = {x for x in found if name in (x[2], "all")}
        right = len(there & claimed)
        rows.append(
            {
                "family": name,
                "planted": len(there),
                "found": len(claimed),
                "right": right,
                "precision": right / len(claimed) if claimed else math.nan,
                "recall": right / len(there) if there else math.nan,
            }
        )
    return pd.DataFrame(rows)


def recovery(
    noises: Sequence[float] = (0.0, 0.5, 1.0, 2.0),
    seeds: Sequence[int] = (0, 1, 2),
    *,
    rows: int = 160,
    sample: int = 40,
    progress: bool = True,
) -> pd.DataFrame:
    """Precision and recall of the family tests on planted features, by noise.

    Args:
        sample: firings of each feature that the survey draws for the tests.

    Returns:
        The columns of :func:`compare` with ``noise`` and ``seed``; ``pooled`` makes one table of
        the seeds.
    """
    from sae_attn_plugin.corpus.survey import survey
    from sae_attn_plugin.studies.families import families

    cases = [(noise, seed) for noise in noises for seed in seeds]
    parts = []
    for noise, seed in tqdm(cases, desc="planting families", disable=not progress):
        planted = plant(seed, noise, rows=rows)
        with tempfile.TemporaryDirectory() as folder:
            found = survey(planted.lens(), planted.rows, folder, sample=sample, progress=False)
            table = compare(planted, families(found))
        parts.append(table.assign(noise=noise, seed=seed))
    return pd.concat(parts, ignore_index=True)


def pooled(table: pd.DataFrame) -> pd.DataFrame:
    """:func:`recovery` with the counts of all seeds added up."""
    counts: Any = table.groupby(["noise", "family"], sort=False)[
        ["planted", "found", "right"]
    ].sum()
    counts["precision"] = counts["right"] / counts["found"]
    counts["recall"] = counts["right"] / counts["planted"]
    return counts.reset_index()


# -- the model -----------------------------------------------------------------------------------


def _heads(s0: float) -> list[list[HeadSpec]]:
    """Heads 0.0 and 1.0 write; the others only fill z."""
    own = [({f"@{p}": 1.0}, {f"@{p}": 1.0}) for p in range(N_CTX)]
    others = [({f"@{p}": -1.0}, {f"@{p}": 1.0}) for p in range(N_CTX)]
    window = [
        ({f"@{p}": 1.0}, {f"@{k}": 1.0 for k in range(max(0, p - 6), p)}) for p in range(1, N_CTX)
    ]
    quiet = [(t, {}) for t in _ORDINARY]
    places = [(f"@{p}", {}) for p in range(N_CTX)]
    return [
        [
            # a gain of s0 writes "prev t" with 1, as large as the token itself
            looks_back([(t, {f"prev {t}": s0}) for t in _ORDINARY], 1.0, N_CTX),
            HeadSpec([*(({t: 1.0}, {t: 1.0}) for t in _ORDINARY), *others], quiet),
            HeadSpec(own, [*quiet, *places], rests=False),
            HeadSpec(moves=[(BOS, {})]),
        ],
        [
            HeadSpec(
                [({t: 1.0}, {f"prev {t}": 1.0}) for t in _ORDINARY],
                [(t, {f"say {t}": 1.0}) for t in _ORDINARY],
            ),
            HeadSpec(window, quiet, rests=False),
            HeadSpec((), quiet, rests=False),
            looks_back([(t, {f"say {_NEXT.get(t, t)}": 1.0}) for t in _COUNTED], 1.0, N_CTX),
        ],
    ]


_Planted = tuple[str, tuple[str, ...], FeatureSpec]


def _reads(
    parts: Sequence[tuple[int, int, float]],
    threshold: float,
    unit: float,
    writes: dict[tuple[int, int], float] | None = None,
) -> FeatureSpec:
    """Reads amounts (head, dimension, weight) of z in ``unit``; fires above ``threshold``."""
    reads = {(head, dim): weight / unit for head, dim, weight in parts}
    return FeatureSpec(reads, writes or {(head, dim): 1.0 for head, dim, _ in parts}, -threshold)


def _dim(token: str) -> int:
    return _ORDINARY.index(token)


def _first(rng: random.Random, each: int, unit: float) -> list[_Planted]:
    """Layer 0. Of z, one dimension for each token; after them, in head 2, one per position."""
    found: list[_Planted] = []
    for head, family in enumerate(("previous_token", "duplicate_token", "current_token")):
        for t in rng.sample(WORDS, each):
            feature = _reads([(head, _dim(t), 1.0)], 0.5, unit)
            found.append((f"{family} {t}", (family,), feature))
    for t in rng.sample(WORDS, each):
        # BOS counts for more than the token, but alone does not do
        feature = _reads([(3, 0, 1.0), (2, _dim(t), 0.6)], 1.3, unit)
        found.append((f"attention_sink {t}", ("attention_sink",), feature))
    for low, high in _WINDOWS:
        parts = [(2, len(_ORDINARY) + p, 1.0) for p in range(low, high)]
        families = ("current_token", "positional")
        found.append((f"positional {low}-{high - 1}", families, _reads(parts, 0.5, unit)))
    title = _reads([(2, _dim(TITLE), 1.0)], 0.5, unit)
    found.append((f"current_token {TITLE}", ("current_token",), title))
    for _ in range(each):
        a, b, c = rng.sample(WORDS, 3)
        # a duplicate is about as frequent as a token
        parts = [(0, _dim(a), 1.0), (1, _dim(b), 1.0), (2, _dim(c), 1.0)]
        found.append((f"mixed {a} {b} {c}", (), _reads(parts, 0.5, unit)))
    found += [(f"dead {i}", (), _reads([(i, 0, 1.0)], 50.0, unit)) for i in range(3)]
    return found


def _second(rng: random.Random, each: int, unit: float) -> list[_Planted]:
    """Layer 1. Of z, one dimension for each token; in head 3, for each that counts."""
    found: list[_Planted] = []
    for t in rng.sample(WORDS, each):
        feature = _reads([(0, _dim(t), 1.0)], 0.3, unit)
        found.append((f"induction {t}", ("induction",), feature))
    for t in rng.sample(WORDS, each):
        feature = _reads([(1, _dim(t), 6.0)], 0.5, unit)
        found.append((f"local_context {t}", ("local_context",), feature))
    for number in range(each):
        # words of a topic are a sixth of all in other rows, more than half in its own
        topic = TOPICS[number % len(TOPICS)]
        words = topic if number < len(TOPICS) else rng.sample(topic, 6)
        parts = [(2, _dim(t), 1.0) for t in words]
        threshold = 0.3 * len(words) / len(topic)
        name = f"long_range {number % len(TOPICS)} {len(words)}"
        found.append((name, ("long_range",), _reads(parts, threshold, unit)))
    counted = rng.sample(sorted(_NEXT), each)
    for t in counted:
        feature = _reads([(3, _COUNTED.index(t), 1.0)], 0.5, unit)
        found.append((f"successor {t}", ("previous_token", "successor"), feature))
    for i, t in enumerate(rng.sample(sorted(_NEXT), each)):
        # promotes the number itself, or a word, by the dimensions that head 0 writes with
        said = t if i % 2 else rng.choice(WORDS)
        writes = {(0, _dim(said)): 1.0}
        feature = _reads([(3, _COUNTED.index(t), 1.0)], 0.5, unit, writes)
        found.append((f"previous {t}, says {said}", ("previous_token",), feature))
    for _ in range(each):
        a, b = rng.sample(WORDS, 2)
        t = rng.choice(_COUNTED)
        # of the words before, only two of a kind reach the threshold
        parts = [(0, _dim(a), 1.0), (1, _dim(b), 1.2), (3, _COUNTED.index(t), 1.0)]
        found.append((f"mixed {a} {b} {t}", (), _reads(parts, 0.3, unit)))
    found += [(f"dead {i}", (), _reads([(i, 0, 1.0)], 50.0, unit)) for i in range(3)]
    return found


def _add_noise(model: Any, saes: Sequence[Any], noise: float, generator: torch.Generator) -> None:
    if not noise:
        return
    width = model.config.n_embd
    weights = [w for sae in saes for w in (sae.W_enc.data, sae.W_dec.data)]
    for block in model.transformer.h:
        weights += [block.attn.c_attn.weight.data[:, 2 * width :], block.attn.c_proj.weight.data]
    for weight in weights:
        drawn = torch.randn(weight.shape, generator=generator)
        weight += noise * weight.pow(2).mean().sqrt() * drawn


def _row(rng: random.Random) -> list[str]:
    """BOS, sometimes a title, words (in half of the rows mostly of one topic), things that count,
    and a segment that comes twice."""
    topic = rng.choice(TOPICS) if rng.random() < 0.5 else None
    row = [BOS, TITLE] if rng.random() < 0.5 else [BOS]
    while len(row) < N_CTX:
        drawn = rng.random()
        if drawn < 0.3:
            row.append(rng.choice(_COUNTED))
        elif topic is not None and drawn < 0.75:
            row.append(rng.choice(topic))
        else:
            row.append(rng.choice(WORDS))
    length = rng.randint(6, 16)
    first = rng.randint(2, N_CTX - 2 * length)
    second = rng.randint(first + length, N_CTX - length)
    row[second : second + length] = row[first : first + length]
    return row
