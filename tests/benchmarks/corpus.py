"""What a survey of a corpus costs beside the plain forward pass over the same rows, and holds."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from typing import Any

import psutil
import torch
from tqdm.auto import tqdm

from sae_attn_plugin.backends.protocol import read_sites
from sae_attn_plugin.corpus import survey

from . import shape
from .measure import LARGE_PRODUCT_FLOP, interleaved, large_product

_ROWS, _CONTEXT = 16, 128
TOKENS = _ROWS * _CONTEXT


def _plan(**options: Any) -> survey.Plan:
    given: dict[str, Any] = {
        "layers": None,
        "rows_at_once": _ROWS,
        "keep": 20,
        "sample": 20,
        "sources": 16,
        "positions": 32768,
        "seed": 0,
        "exclude_tokens": None,
        "cofiring": 10,
        "logits": 10,
    }
    lens = shape.wide_lens()
    return survey.make_plan(lens, **given | options).of(_CONTEXT)


def _batch(number: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(number)
    return torch.randint(0, 50_257, (_ROWS, _CONTEXT), generator=generator)


def time_of_batches(
    rounds: int, clock: Callable[[], float]
) -> tuple[dict[str, float], dict[str, str]]:
    """Median seconds of a batch of 2,048 tokens: forward pass, and survey, early and late.

    Early, every firing enters the samples of its feature, and its DFA by source is computed. Late
    in a corpus hardly any does: reservoirs are full of stronger firings and smaller hashes.
    """
    plan = _plan()
    gather = plan.gatherer()
    early, late = plan.sketch(), plan.sketch()
    model = shape.gpt2_shape("sdpa")
    for layer in late.layers.values():  # as full as after very many rows
        for reservoir in (layer.top, layer.sample):
            lowest = torch.iinfo(torch.int64).min
            reservoir.priority.fill_(lowest)
            reservoir._worst.fill_(lowest)
            reservoir.place.zero_()
    late.drawn.limit = -1
    number = itertools.count()
    calls: dict[str, Callable[[], Any]] = {
        "forward": lambda: model(_batch(next(number))),
        "own forward, to the last z": lambda: read_sites(
            plan.lens.backend, _batch(next(number)), gather.reads
        ),
        "large matrix product": large_product(),
        "survey, first batches": lambda: gather(early, _batch(n := next(number)), n * _ROWS),
        "survey, full reservoirs": lambda: gather(late, _batch(n := next(number)), n * _ROWS),
    }
    seconds = interleaved(calls, rounds, at_most=600, clock=clock)
    encode = 12 * 2 * TOKENS * shape.D_IN * shape.D_SAE / LARGE_PRODUCT_FLOP
    encode *= seconds["large matrix product"]
    notes = dict.fromkeys(seconds, "") | {
        "survey, first batches": "every firing is kept, with its DFA by source",
        "survey, full reservoirs": (
            f"the encoders alone at the speed of a large product: {encode:.1f} s, "
            f"{encode / seconds['forward']:.2f} forwards"
        ),
    }
    return seconds, notes


def peak_of_lengths(lengths: tuple[int, ...] = (8, 16)) -> dict[int, tuple[float, float]]:
    """Seconds of a survey of so many batches of 2,048 tokens, and MiB the process held at most.

    With reservoirs small enough to be full after the shorter corpus.
    """
    found = {}
    for n in lengths:
        plan = _plan(keep=1, sample=1, positions=2048)
        gather, sketch = plan.gatherer(), plan.sketch()
        peak, process, start = 0, psutil.Process(), time.perf_counter()
        for number in tqdm(range(n), desc=f"memory of {n} batches", leave=False):
            gather(sketch, _batch(number), number * _ROWS)
            peak = max(peak, process.memory_info().rss)
        found[n * TOKENS] = (time.perf_counter() - start, peak / 2**20)
        del gather, sketch
    return found
