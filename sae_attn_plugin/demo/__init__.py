"""The demo model: a small GPT-2 trained on IOI sentences, repeated tokens and simple prose.

The model and an attention-z SAE for each of its layers ship with the package, so everything can be
tried offline. ``docs/demo-model.md`` tells how they were made and what they reach.

``demo.circuits`` holds models whose weights are written down, with the graphs they must have;
``demo.planted`` hides random ones in random transformers; ``demo.families`` holds features whose
family is known.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sae_attn_plugin.registration import DEMO_MODEL_NAME

if TYPE_CHECKING:
    from sae_attn_plugin.backends.loading import Host
    from sae_attn_plugin.demo import circuits, families, planted
    from sae_attn_plugin.lens import FeatureLens

__all__ = [
    "MODEL_PATH",
    "SAES_PATH",
    "TRANSCODERS_PATH",
    "IOIPrompt",
    "circuits",
    "families",
    "ioi_prompt",
    "load",
    "load_model",
    "load_saes",
    "load_transcoders",
    "planted",
]

MODEL_PATH = Path(__file__).parent / "model"
SAES_PATH = Path(__file__).parent / "saes"
TRANSCODERS_PATH = Path(__file__).parent / "transcoders"


class IOIPrompt(str):
    """A prompt of the indirect object identification task; a string that knows its answer.

    Attributes:
        correct, wrong: the indirect object and the subject, as tokens.
        positions: token positions, BOS counted, of IO, S1, S2 and END.
    """

    correct: str
    wrong: str
    positions: dict[str, int]


def ioi_prompt() -> IOIPrompt:
    """The prompt of ``sae-attn demo``."""
    prompt = IOIPrompt("When John and Mary went to the store, John gave a drink to")
    prompt.correct, prompt.wrong = " Mary", " John"
    prompt.positions = {"S1": 2, "IO": 4, "S2": 10, "END": 14}
    return prompt


def load(backend: Host = "transformer_lens", *, transcoders: bool = False) -> FeatureLens:
    """The demo model with its SAEs, ready for prompts.

    Args:
        backend: ``"transformer_lens"`` (``HookedTransformer``), ``"transformer_bridge"`` or
            ``"nnsight"``.
        transcoders: with a transcoder for every MLP, too.
    """
    from sae_attn_plugin.lens import FeatureLens

    of_mlps = load_transcoders() if transcoders else None
    return FeatureLens(load_model(backend), load_saes(), transcoders=of_mlps)


def load_model(backend: Host = "transformer_lens") -> Any:
    """The demo model alone."""
    from sae_attn_plugin.backends.loading import load_model as load_any

    return load_any(MODEL_PATH, backend, model_name=DEMO_MODEL_NAME)


def load_saes() -> dict[str, Any]:
    """The demo SAEs by hook name: sae_lens SAEs that know their heads."""
    from sae_attn_plugin.dictionaries import load_saes as load_any

    return load_any(SAES_PATH)


def load_transcoders() -> dict[str, Any]:
    """The demo transcoders by hook name, as plain sae_lens transcoders."""
    from sae_attn_plugin.dictionaries import load_saes as load_any

    return load_any(TRANSCODERS_PATH)


def __getattr__(name: str) -> Any:
    if name in ("circuits", "families", "planted"):  # on first use, since it needs torch and pandas
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
