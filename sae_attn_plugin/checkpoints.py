"""Checkpoints of a training run: one safetensors file, with JSON in its header; never pickle."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from sae_attn_plugin.errors import FileError
from sae_attn_plugin.io import write_atomically


def save_state(path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Tensors and JSON in one safetensors file, written whole or not at all."""
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    data = save(contiguous, metadata={"state": json.dumps(facts)})
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda file: file.write(data))


def load_state(path: Path, settings: Mapping[str, Any]) -> tuple[dict[str, Tensor], Any]:
    """The tensors and facts that :func:`save_state` wrote.

    Raises:
        FileError: damaged, or its facts hold other ``settings``.
    """
    try:
        with safe_open(path, framework="pt") as file:
            facts = json.loads((file.metadata() or {}).get("state", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, json.JSONDecodeError) as error:
        raise FileError(f"{path} is damaged ({error}); remove it to start anew") from error
    if facts.get("settings") != json.loads(json.dumps(settings)):
        raise FileError(
            f"{path} was made with other settings; give the same ones, or remove it to start anew"
        )
    return tensors, facts


def under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names start with ``prefix``, without it."""
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def optimizer_state(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], Any]:
    """An optimiser's state as named tensors, and its parameter groups."""
    state = optimizer.state_dict()
    tensors = {f"{i}.{n}": t for i, values in state["state"].items() for n, t in values.items()}
    return tensors, state["param_groups"]


def restore_optimizer(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], groups: Any
) -> None:
    """Undo :func:`optimizer_state`."""
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        index, _, key = name.partition(".")
        state.setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": groups})
