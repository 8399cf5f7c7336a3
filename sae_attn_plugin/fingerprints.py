"""What tells a model or SAE from one of the same name with other weights, at next to no cost."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sae_attn_plugin.backends.protocol import Norm

if TYPE_CHECKING:
    from sae_attn_plugin.backends.protocol import Backend

__all__ = ["fingerprint", "model_fingerprint", "source_of"]

_SAMPLES = 4096  # of each tensor


def fingerprint(parts: Mapping[str, Any]) -> str:
    """16 hexadecimal digits of the names, shapes and evenly spaced entries of tensors.

    Entries are taken as float32, so that the same weights have one fingerprint in any container.
    A change of a few entries alone may go unseen; retraining, other weights or rounding does not.
    """
    digest = hashlib.sha256()
    for name in sorted(parts):
        value = parts[name]
        if isinstance(value, Norm):
            digest.update(f"{name}:{fingerprint(vars(value))};".encode())
        elif isinstance(value, Tensor):
            if value.ndim == 1 and not value.any():
                continue  # some hosts have biases of zero where others have none
            flat = value.detach()
            digest.update(f"{name}:{list(flat.shape)};".encode())
            flat = flat.reshape(-1) if flat.is_contiguous() else flat.contiguous().reshape(-1)
            step = max(1, flat.numel() // _SAMPLES)
            digest.update(flat[::step].to("cpu", torch.float32).numpy().tobytes())
    return digest.hexdigest()[:16]


def model_fingerprint(backend: Backend) -> str:
    """Of what attention reads and writes in every layer, and of the unembedding."""
    layers = [fingerprint(vars(backend.layer_weights(i))) for i in range(backend.geometry.n_layers)]
    W_U, b_U = backend.unembed()
    last = fingerprint({"W_U": W_U, "b_U": b_U})
    return hashlib.sha256("".join([*layers, last]).encode()).hexdigest()[:16]


def source_of(dictionaries: Iterable[Any]) -> str | None:
    """The release or folder that all were loaded from; None where they were given as objects."""
    sources = {getattr(getattr(d, "source", None), "sae_attn_source", None) for d in dictionaries}
    return sources.pop() if len(sources) == 1 else None
