"""One tiny random model per architecture, with odd sizes and nothing at a convenient zero."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from helpers import VOCABULARY, randomize
from transformers import PretrainedConfig, PreTrainedModel

WINDOW = 4  # shorter than every prompt of the tests
_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 36,
    "intermediate_size": 44,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 40,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
    "pad_token_id": None,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
_NO_HEAD_DIM = {"head_dim": None}
_ALTERNATING = ["sliding_attention", "full_attention", "sliding_attention"]


@dataclass(frozen=True)
class Recipe:
    """How to build one architecture.

    Attributes:
        name: of the transformers classes, without ``Config`` or ``ForCausalLM``.
        settings: on top of the shared sizes; None removes one.
        seed: of the weights.
    """

    name: str
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def config(self) -> PretrainedConfig:
        name = "Gemma3Text" if self.name == "Gemma3" else self.name
        config_class: Callable[..., PretrainedConfig] = getattr(transformers, f"{name}Config")
        settings = {**_SIZES, **self.settings}
        return config_class(
            **{key: value for key, value in settings.items() if value != "unset"},
            attn_implementation="eager",
        )

    def build(self, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
        torch.manual_seed(0)
        for suffix in ("ForCausalLM", "LMHeadModel"):
            if model_class := getattr(transformers, self.name + suffix, None):
                # Drawn in float32, so that every dtype has the same weights.
                model = model_class(self.config)
                randomize(model)
                return model.to(dtype).eval()
        raise LookupError(self.name)


_GPT = {
    "n_embd": 30,
    "n_head": 5,
    "n_layer": 3,
    "n_positions": 40,
    "n_inner": 44,
    **dict.fromkeys(
        (
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "max_position_embeddings",
        ),
        "unset",
    ),
}
_GEMMA = {"hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 11}
_NEOX = {"head_dim": "unset", "num_key_value_heads": "unset", "hidden_size": 48}

RECIPES = {
    "gpt2": Recipe("GPT2", _GPT),
    "gpt_neox": Recipe("GPTNeoX", {**_NEOX, "rotary_pct": 0.5}),
    "gpt_neox_sequential": Recipe(
        "GPTNeoX", {**_NEOX, "rotary_pct": 0.5, "use_parallel_residual": False}
    ),
    "gptj": Recipe("GPTJ", {**_GPT, "n_embd": 40, "rotary_dim": 4}),
    "llama": Recipe("Llama"),
    "mistral": Recipe("Mistral", {"sliding_window": WINDOW}),
    "qwen2": Recipe("Qwen2", {"head_dim": "unset"}),
    "qwen3": Recipe("Qwen3"),
    "gemma": Recipe("Gemma", {"hidden_act": "gelu_pytorch_tanh"}),
    "gemma2": Recipe(
        "Gemma2",
        {
            **_GEMMA,
            "sliding_window": WINDOW,
            "layer_types": _ALTERNATING,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 6.0,
        },
    ),
    "gemma3_text": Recipe(
        "Gemma3", {**_GEMMA, "sliding_window": WINDOW, "layer_types": _ALTERNATING}
    ),
    "olmo2": Recipe("Olmo2", {"head_dim": "unset"}),
    "phi3": Recipe("Phi3", {"head_dim": "unset", "sliding_window": WINDOW}),
}
