"""The steps an intervention takes inside the forward pass: plain functions over plain tensors.

Each maker returns a function of the value at its site. A remote run ships these by their source, so
they hold tensors, numbers and the dict ``seen`` of live values, and no model. Sites are plain
``(name, layer)`` tuples, and nothing inside a maker is annotated.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def see(seen: dict[Any, Tensor], site: tuple[str, int]) -> Any:
    """Keep the live value for later steps."""

    def step(value):
        seen[site] = value
        return value

    return step


def constant(held: Tensor) -> Any:
    """Another value instead."""

    def step(value):
        return held.to(value)

    return step


def add(vector: Tensor, position: int) -> Any:
    """Add a vector at one position."""

    def step(value):
        value = value.clone()
        value[:, position] += vector.to(value)
        return value

    return step


def mix(seen: dict[Any, Tensor], v: tuple[str, int], pattern: Tensor) -> Any:
    """z from a held pattern and the live values."""

    def step(z):
        values = seen[v].to(z)
        values = values.repeat_interleave(pattern.shape[1] // values.shape[-2], dim=-2)
        return torch.einsum("bhqk,bkhe->bqhe", pattern.to(z), values)

    return step


def stream(seen: dict[Any, Tensor], sites: list[tuple[str, int]]) -> Any:
    """The live sum of what stands at some sites."""

    def live():
        total = seen[sites[0]]
        for site in sites[1:]:
            total = total + seen[site].to(total)
        return total

    return live


def projected(seen: dict[Any, Tensor], z: tuple[str, int], W_O: Tensor, b_O: Tensor) -> Any:
    """The live z through the output projection: what a post-norm reads."""

    def live():
        flat = seen[z].to(W_O).flatten(-2)
        return flat @ W_O.flatten(0, 1) + b_O

    return live


def normalised(
    live: Any, centred: bool, weight: Tensor | None, bias: Tensor | None, scale: Tensor
) -> Any:
    """A norm of ``live()`` with a held scale, computed in the dtype of the scale."""

    def step(value):
        x = live().to(value.device, scale.dtype)
        if centred:
            x = x - x.mean(-1, keepdim=True)
        x = x / scale.to(x)
        if weight is not None:
            x = x * weight.to(x)
        if bias is not None:
            x = x + bias.to(x)
        return x.to(value)

    return step


def held_attention(
    clean: Tensor,
    changed: dict[int, Tensor],
    layer: int,
    W_O: Tensor,
    centred: bool,
    weight: Tensor | None,
    scale: Tensor | None,
) -> Any:
    """What attention added in the clean run, and what this layer's edits of z change in it.

    ``scale`` is that of the clean run's post-norm, None where there is none.
    """

    def step(value):
        held = clean.to(value)
        if layer not in changed:
            return held
        change = changed[layer].flatten(-2).to(W_O) @ W_O.flatten(0, 1)
        if scale is not None:
            if centred:
                change = change - change.mean(-1, keepdim=True)
            change = change / scale.to(change)
            if weight is not None:
                change = change * weight.to(change)
        return held + change.to(value)

    return step


def set_features(
    dictionary: Any,
    edits: list[tuple[int, int | None, float]],
    dtype: torch.dtype,
    changed: dict[int, Tensor],
) -> Any:
    """z with features set, its error term kept; a later edit of the same feature wins.

    Args:
        dictionary: of the layer; edits: ``(feature, position or None for everywhere, value)``;
            changed: by layer, is given what the edits add to z.
    """

    def step(z):
        work = z.to(dtype, copy=True)
        for prompt in work:
            encoded = dictionary.encode(prompt)
            live, wanted = {}, {}
            for feature, position, value in edits:
                if feature not in live:
                    hit = encoded.feature == feature
                    at = torch.zeros(len(prompt), dtype=dtype, device=z.device)
                    at[encoded.position[hit]] = encoded.activation[hit]
                    live[feature], wanted[feature] = at, at.clone()
                where = slice(None) if position is None else position
                wanted[feature][where] = value
            for feature, at in live.items():
                row = dictionary.decoder(torch.tensor([feature], device=z.device), dtype)[0]
                delta = (wanted[feature] - at) * encoded.scale[:, 0]
                prompt += delta[:, None, None] * row
        changed[dictionary.layer] = work - z
        return work.to(z.dtype)

    return step


def chain(steps: list[Any]) -> Any:
    """One step after the other."""

    def run(value):
        for step in steps:
            value = step(value)
        return value

    return run
