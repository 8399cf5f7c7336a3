"""Long work in parts: shown as it goes, kept as it goes, taken up where it stopped."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from sae_attn_plugin.checkpoints import load_state, save_state
from sae_attn_plugin.errors import FileError

__all__ = ["fingerprint", "in_parts", "make_folder"]


def in_parts(
    count: int,
    compute: Callable[[int], Mapping[str, Tensor]],
    *,
    name: str,
    folder: Path | None = None,
    settings: Mapping[str, Any] | None = None,
    progress: bool | None = None,
) -> dict[str, Tensor]:
    """Compute ``count`` parts and join each of their tensors along the first dimension.

    Args:
        compute: part number to named tensors, the same names for every part.
        name: of the work; shown, and part of the files' names.
        folder: where finished parts are kept; given again with the same ``settings``, they are read
            instead of computed. None: kept in memory only.
        progress: show a bar; None: on a terminal.

    Raises:
        FileError: the folder holds parts of other settings, or cannot be written.
    """
    if folder is not None:
        make_folder(folder)
    found: list[Mapping[str, Tensor]] = []
    hidden = not (sys.stderr.isatty() if progress is None else progress)
    for number in tqdm(range(count), desc=name, disable=hidden, leave=False):
        path = None if folder is None else folder / f"{name}-{number:05d}.safetensors"
        if path is not None and path.is_file():
            part, _ = load_state(path, settings or {})
        else:
            part = compute(number)
            if path is not None:
                save_state(path, part, {"settings": settings or {}})
        found.append(part)
    return {key: torch.cat([part[key].cpu() for part in found]) for key in found[0]}


def make_folder(folder: Path) -> None:
    """Make a folder and those above it.

    Raises:
        FileError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileError(f"cannot make the folder {folder}: {error.strerror}") from error


def fingerprint(tokens: Tensor) -> dict[str, Any]:
    """Shape and hash of token ids, so that settings tell one data set from another."""
    ids = tokens.detach().cpu().long().contiguous()
    return {
        "shape": list(ids.shape),
        "sha256": hashlib.sha256(ids.numpy().tobytes()).hexdigest()[:16],
    }
