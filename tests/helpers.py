"""Builders of small models and dictionaries with nothing left at a convenient zero."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from sae_lens import SAE
from sae_lens.saes.gated_sae import GatedSAE, GatedSAEConfig
from sae_lens.saes.jumprelu_sae import JumpReLUSAE, JumpReLUSAEConfig
from sae_lens.saes.sae import SAEMetadata
from sae_lens.saes.standard_sae import StandardSAE, StandardSAEConfig
from sae_lens.saes.topk_sae import TopKSAE, TopKSAEConfig
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from sae_attn_plugin.backends.loading import to_hooked_transformer

STORIES = Path(__file__).parents[1].parent / "shared" / "data" / "stories260K"
SAE_ARCHITECTURES = ("standard", "jumprelu", "topk", "topk_rescaled", "gated")
_BUILDERS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "standard": (StandardSAE, StandardSAEConfig, {}),
    "jumprelu": (JumpReLUSAE, JumpReLUSAEConfig, {}),
    "topk": (TopKSAE, TopKSAEConfig, {"k": 5, "rescale_acts_by_decoder_norm": False}),
    "topk_rescaled": (TopKSAE, TopKSAEConfig, {"k": 5, "rescale_acts_by_decoder_norm": True}),
    "gated": (GatedSAE, GatedSAEConfig, {}),
}


def randomize(module: torch.nn.Module, seed: int = 0, size: float = 0.1) -> None:
    """Give every parameter, biases and norm gains too, a random part."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter += size * noise.to(parameter.dtype)


def tiny_gpt2(dtype: torch.dtype = torch.float32, n_layers: int = 3) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=61,
        n_positions=40,
        n_embd=30,
        n_layer=n_layers,
        n_head=5,
        initializer_range=0.2,
        attn_implementation="eager",
        bos_token_id=0,
        eos_token_id=0,
    )
    model = GPT2LMHeadModel(config).to(dtype).eval()
    randomize(model)
    return model


def tiny_llama(dtype: torch.dtype = torch.float32, n_layers: int = 3) -> LlamaForCausalLM:
    """6 heads over 2 key/value heads, and head_dim other than d_model / heads."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=36,
        intermediate_size=44,
        num_hidden_layers=n_layers,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=40,
        initializer_range=0.2,
        tie_word_embeddings=False,
        attn_implementation="eager",
        bos_token_id=0,
        eos_token_id=0,
    )
    model = LlamaForCausalLM(config).to(dtype).eval()
    randomize(model)
    return model


TINY = {"gpt2": tiny_gpt2, "llama": tiny_llama}


def bridge(model: Any) -> Any:
    """A TransformerBridge over a copy of a tiny model."""
    import copy
    import tempfile

    from transformer_lens.model_bridge import TransformerBridge

    model = copy.deepcopy(model)
    model.config.architectures = [type(model).__name__]
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return TransformerBridge.boot_transformers(
            folder, hf_model=model, dtype=model.dtype
        ).eval()


def on_host(model: Any, host: str) -> Any:
    """A Hugging Face model as each host wants it."""
    if host == "hooked_transformer":
        return to_hooked_transformer(model)
    return bridge(model) if host == "transformer_bridge" else model


HOSTS = ("hooked_transformer", "transformer_bridge", "nnsight")


def random_sae(
    layer: int,
    d_in: int,
    d_sae: int = 40,
    architecture: str = "standard",
    dtype: str = "float32",
    seed: int = 0,
    **config: Any,
) -> SAE[Any]:
    """A random attention-z SAE with about a third of its features active."""
    sae_class, config_class, extra = _BUILDERS[architecture]
    settings = {
        "d_in": d_in,
        "d_sae": d_sae,
        "dtype": dtype,
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "hook_z",
        "metadata": SAEMetadata(
            model_name="tiny", hook_name=f"blocks.{layer}.attn.hook_z", prepend_bos=False
        ),
    }
    sae = sae_class(config_class(**{**settings, **extra, **config}))
    generator = torch.Generator().manual_seed(seed + 100 * layer)
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.3
            parameter.copy_((noise.abs() if name == "threshold" else noise).to(parameter.dtype))
    return sae


def random_saes(model: Any, architecture: str = "standard", **config: Any) -> list[SAE[Any]]:
    """One random SAE for every layer of a tiny Hugging Face model."""
    c = model.config
    d_head = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    config.setdefault("dtype", str(model.dtype).removeprefix("torch."))
    return [
        random_sae(layer, c.num_attention_heads * d_head, architecture=architecture, **config)
        for layer in range(c.num_hidden_layers)
    ]
