"""Where ``train`` and ``evaluate`` get their text from."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from sae_attn_plugin.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

_SAVED = ("state.json", "dataset_dict.json")
DATA_HELP = (
    "Text: a .txt, .jsonl or .parquet file, a folder saved by datasets, or a data set on the hub."
)
DEMO = "sae-attn-demo"
SAMPLE_HELP = "Instead of --data: so many rows that the model writes itself."


@overload
def full_name(name: str) -> str: ...
@overload
def full_name(name: None) -> None: ...
def full_name(name: str | None) -> str | None:
    """``demo`` is short for the demo model, and for its text."""
    return DEMO if name == "demo" else name


def check_text(data: str | None, sample: int | None) -> None:
    if data is not None and sample is not None:
        raise InputError("--data and --sample are two sources of text; give one")
    if sample is not None and sample < 1:
        raise InputError(f"--sample {sample}: expected at least 1")
    if data is None:
        return
    # What the reader would say too, but only when a model is loaded.
    endings, path = (".txt", ".jsonl", ".json", ".parquet"), Path(data)
    known = path.suffix.lower() in endings
    if path.is_file() and not known:
        raise InputError(f"cannot read {data}: expected a file that ends in {', '.join(endings)}")
    if not path.exists() and (known or data.startswith((".", "/", "~"))):
        raise InputError(f"no such file: {data}")
    if path.is_dir() and not any((path / f).is_file() for f in _SAVED):
        raise InputError(f"cannot read {data}: it is a folder, but none saved by datasets")


def load(name: str, backend: str, device: str, dtype: Any) -> Any:
    """A model by folder or name, called by the folder's name; ``sae-attn-demo``: the demo model."""
    import sae_attn_plugin as sap

    if name == DEMO:
        return sap.demo.load_model(backend)  # type: ignore[arg-type]
    known_as = Path(name).name if Path(name).is_dir() else None
    return sap.load_model(name, backend, device, dtype, model_name=known_as)  # type: ignore[arg-type]


def sampled(model: Any, name: str, n: int, context: int, seed: int, device: str) -> Tensor:
    """Rows the model writes itself; ``model`` as a host has it, ``name`` as it was loaded."""
    from transformers import PreTrainedModel

    from sae_attn_plugin.backends.loading import load_huggingface
    from sae_attn_plugin.corpus.rows import sample_rows

    bare = getattr(model, "_module", model)
    if not isinstance(bare, PreTrainedModel):
        import torch

        bare, _ = load_huggingface(name, device, torch.float32)
    return sample_rows(bare, n, context, seed=seed)


def parse_layers(text: str, n_layers: int) -> list[int]:
    """``all``, or numbers and ranges such as ``0,2-4``."""
    if text == "all":
        return list(range(n_layers))
    layers: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        if match is None:
            raise InputError(f"--layers {text!r}: expected all, or numbers such as 0,2-4")
        first, last = int(match[1]), int(match[2] or match[1])
        layers += range(first, last + 1)
    if wrong := [layer for layer in layers if layer >= n_layers]:
        raise InputError(f"--layers {text!r}: no layer {wrong[0]}; there are 0..{n_layers - 1}")
    if not layers or len(set(layers)) < len(layers):
        raise InputError(f"--layers {text!r} names no layer, or one twice")
    return layers
