"""How the demo model is made, and what it can do.

:func:`train_model` is a plain language-model loop, resumable to the bit: what a step sees depends
on the seed and the step alone.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor, nn
from tqdm.auto import tqdm

from sae_attn_plugin.checkpoints import (
    load_state,
    optimizer_state,
    restore_optimizer,
    save_state,
    under,
)
from sae_attn_plugin.demo.language import IOIExample, encode
from sae_attn_plugin.training import TokenSource

__all__ = [
    "IOIScores",
    "ModelRecipe",
    "RepeatScores",
    "ioi_scores",
    "repeat_scores",
    "train_model",
]


@dataclass(frozen=True)
class ModelRecipe:
    """How the demo model is trained: AdamW, linear warm-up, cosine decay to 2 %."""

    steps: int
    lr: float = 2e-3
    warm_up: int = 200
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.98)
    clip: float = 1.0


def train_model(
    model: nn.Module,
    tokens: TokenSource,
    recipe: ModelRecipe,
    *,
    checkpoint: Path | str | None = None,
    checkpoint_every: int = 500,
    progress: bool = True,
) -> float:
    """Train a language model in place on next-token prediction.

    Args:
        model: called with token ids ``[batch, position]``; returns an object with ``logits``.
            With dropout, a resumed run differs from an uninterrupted one.
        tokens: step number to its tokens; a pure function of the number.
        recipe: optimiser and schedule.
        checkpoint: file to resume from where it exists, and to write every ``checkpoint_every``
            steps.
        progress: show a progress bar.

    Returns:
        Mean loss in nats over the last 100 steps (or those of this call, where fewer).

    Raises:
        FileError: the checkpoint was made with another recipe or model.
    """
    checkpoint = None if checkpoint is None else Path(checkpoint)
    named = dict(model.named_parameters())  # tied weights appear once
    decayed = [p for p in named.values() if p.ndim >= 2]
    plain = [p for p in named.values() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": plain}],
        lr=recipe.lr,
        betas=recipe.betas,
        weight_decay=0.0,
    )
    settings = {"recipe": json.loads(json.dumps(asdict(recipe)))}
    start = 0
    if checkpoint is not None and checkpoint.exists():
        saved, facts = load_state(checkpoint, settings)
        start = facts["done"]
        with torch.no_grad():
            for name, parameter in named.items():
                parameter.copy_(saved[f"model.{name}"])
        restore_optimizer(optimizer, under(saved, "optimizer."), facts["optimizer"])
    losses: list[float] = []
    model.train()
    with tqdm(
        total=recipe.steps, initial=start, desc="Model", unit="step", disable=not progress
    ) as bar:
        for step in range(start, recipe.steps):
            for group in optimizer.param_groups:
                group["lr"] = _learning_rate(recipe, step)
            batch = tokens(step)
            logits = model(batch).logits
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(named.values(), recipe.clip)
            optimizer.step()
            losses = [*losses[-99:], loss.item()]
            bar.update()
            if step % 20 == 0:
                bar.set_postfix(loss=f"{sum(losses) / len(losses):.3f}")
            done = step + 1
            if checkpoint is not None and (done % checkpoint_every == 0 or done == recipe.steps):
                tensors, facts = optimizer_state(optimizer)
                save_state(
                    checkpoint,
                    {
                        **{f"model.{n}": p.detach() for n, p in named.items()},
                        **{f"optimizer.{n}": t for n, t in tensors.items()},
                    },
                    {"settings": settings, "done": done, "optimizer": facts},
                )
    model.eval()
    return sum(losses) / len(losses) if losses else math.nan


def _learning_rate(recipe: ModelRecipe, step: int) -> float:
    rise = min(1.0, (step + 1) / recipe.warm_up)
    return recipe.lr * rise * (0.02 + 0.49 * (1 + math.cos(math.pi * step / recipe.steps)))


# What the demo model can do ------------------------------------------------------------------


@dataclass(frozen=True)
class IOIScores:
    """Indirect object identification over ``n`` prompts.

    ``accuracy``: share of prompts whose most likely next token is the indirect object.
    ``logit_difference``: mean of logit(IO) - logit(S). ``worst_distractor``: the lowest accuracy
    among the kinds of distractor.
    """

    n: int
    accuracy: float
    logit_difference: float
    worst_distractor: float


def ioi_scores(
    logits: Callable[[Tensor], Tensor], examples: Sequence[IOIExample], at_once: int = 256
) -> IOIScores:
    """Measure IOI on sentences of the demo language; ``logits`` maps tokens to logits."""
    right: dict[str, list[bool]] = {}
    difference = 0.0
    for start in range(0, len(examples), at_once):
        part = examples[start : start + at_once]
        prompts = [[0, *encode(example.prompt)] for example in part]
        width = max(map(len, prompts))
        # Padding on the right is never seen by what is before it.
        padded = torch.tensor([prompt + [0] * (width - len(prompt)) for prompt in prompts])
        ends = torch.tensor([len(prompt) - 1 for prompt in prompts])
        last = logits(padded)[torch.arange(len(part)), ends]
        for example, row in zip(part, last, strict=True):
            io, subject = encode(f" {example.io} {example.subject}")
            difference += (row[io] - row[subject]).item()
            right.setdefault(example.distractor, []).append(row.argmax().item() == io)
    flat = [hit for hits in right.values() for hit in hits]
    return IOIScores(
        n=len(flat),
        accuracy=sum(flat) / len(flat),
        logit_difference=difference / len(flat),
        worst_distractor=min(sum(hits) / len(hits) for hits in right.values()),
    )


@dataclass(frozen=True)
class RepeatScores:
    """Mean loss in nats per token on the two copies of a random segment."""

    n: int
    first: float
    second: float


def repeat_scores(
    logits: Callable[[Tensor], Tensor], tokens: Int[Tensor, "batch pos"]
) -> RepeatScores:
    """Measure copying. ``tokens``: BOS, a random segment, and the same segment again.

    The first token of the second copy is left out: nothing announces it.
    """
    segment = (tokens.shape[1] - 1) // 2
    loss = F.cross_entropy(logits(tokens)[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none")
    first, second = loss[:, :segment], loss[:, segment + 1 :]
    return RepeatScores(len(tokens), first.mean().item(), second.mean().item())
