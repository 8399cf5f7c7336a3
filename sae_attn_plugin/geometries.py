"""Heads of the models that public attention SAEs belong to, by name.

Numbers are those of the models' own configurations.
"""

from __future__ import annotations

import re

# model -> (query heads, d_head)
_HEADS = {
    "gpt2-small": (12, 64),
    "gelu-2l": (8, 64),
    "pythia-70m": (8, 64),
    "gemma-2b": (8, 256),
    "gemma-2-2b": (8, 256),
    "gemma-2-9b": (16, 256),
    "gemma-2-27b": (32, 128),
    "gemma-3-270m": (4, 256),
    "gemma-3-1b": (4, 256),
    "gemma-3-4b": (8, 256),
    "gemma-3-12b": (16, 256),
    "gemma-3-27b": (32, 128),
    "llama-3.1-8b": (32, 128),
    "sae-attn-demo": (8, 16),
}
_SAME = {"gpt2": "gpt2-small"}


def plain_name(model_name: str) -> str:
    """A model's name without owner and without what does not change its shape."""
    name = model_name.rsplit("/", 1)[-1].lower()
    name = re.sub(r"-(pt|it|deduped|instruct)$", "", name)
    return _SAME.get(name, name)


def known_heads(model_name: str | None) -> tuple[int, int] | None:
    """``(n_heads, d_head)`` of a model known by name, else None."""
    return _HEADS.get(plain_name(model_name)) if model_name else None
