"""What is measured: a random model of GPT-2-small shape with twelve wide attention-z SAEs."""

from __future__ import annotations

import functools
from typing import Any

import torch
from sae_lens.saes.sae import SAEMetadata
from sae_lens.saes.topk_sae import TopKSAE, TopKSAEConfig
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

import sae_attn_plugin as sap

N_LAYERS, D_IN, D_SAE, ACTIVE = 12, 768, 24_576, 20


@functools.cache
def gpt2_shape(attention: str, n_layers: int = N_LAYERS) -> Any:
    """GPT-2 small with random weights; ``attention``: ``"eager"`` or ``"sdpa"``, same weights."""
    torch.manual_seed(0)
    config: Any = GPT2Config(n_layer=n_layers, attn_implementation=attention)  # pyright: ignore[reportCallIssue]
    if attention != "eager":
        model: Any = GPT2LMHeadModel(config)
        model.load_state_dict(gpt2_shape("eager", n_layers).state_dict(), assign=True)
        return model.eval()
    model = GPT2LMHeadModel(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "ln_" in name or name.endswith("bias"):
                parameter += 0.1 * torch.randn_like(parameter)
    return model.eval()


@functools.cache
def wide_saes(active: int = ACTIVE, n_layers: int = N_LAYERS) -> dict[int, TopKSAE]:
    """One TopK SAE per layer, so exactly ``active`` features fire at each position."""
    return {layer: _wide_sae(layer, active) for layer in range(n_layers)}


@functools.cache
def _weights(layer: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(layer)
    W_dec = torch.randn(D_SAE, D_IN, generator=generator)
    W_dec /= W_dec.norm(dim=1, keepdim=True)
    return W_dec.T.contiguous(), W_dec


def _wide_sae(layer: int, active: int) -> TopKSAE:
    metadata = SAEMetadata(
        model_name="gpt2-shape", hook_name=f"blocks.{layer}.attn.hook_z", prepend_bos=False
    )
    with torch.device("meta"):
        sae = TopKSAE(
            TopKSAEConfig(
                d_in=D_IN,
                d_sae=D_SAE,
                k=active,
                rescale_acts_by_decoder_norm=False,
                apply_b_dec_to_input=True,
                device="meta",
                metadata=metadata,
            )
        )
    W_enc, W_dec = _weights(layer)
    generator = torch.Generator().manual_seed(1000 + layer)
    values = {"W_enc": W_enc, "W_dec": W_dec}
    for name, parameter in sae.named_parameters():
        small = values.get(name)
        if small is None:
            small = 0.01 * torch.randn(parameter.shape, generator=generator)
        setattr(sae, name, torch.nn.Parameter(small, requires_grad=False))
    sae.cfg.device = "cpu"
    return sae


@functools.cache
def wide_lens(active: int = ACTIVE, n_layers: int = N_LAYERS) -> sap.FeatureLens:
    return sap.FeatureLens(gpt2_shape("eager", n_layers), wide_saes(active, n_layers))


def tokens_of(length: int, batch: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(length)
    return torch.randint(0, 50_257, (batch, length), generator=generator)
