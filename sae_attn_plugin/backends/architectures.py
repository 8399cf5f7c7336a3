"""Where each Hugging Face architecture keeps its modules: one row per ``model_type``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sae_attn_plugin.backends.protocol import Geometry, LayerWeights, Norm
from sae_attn_plugin.errors import UnsupportedError

QKVLayout = Literal["separate", "stacked"]


@dataclass(frozen=True)
class Architecture:
    """Module names and layouts of one family, relative to the model or to a block.

    Attributes:
        blocks: the list of blocks, from the model.
        embed, pos_embed, final_norm, unembed: from the model.
        attention, mlp, norm, mlp_norm: from a block.
        out_projection: from a block; its input is z, heads side by side.
        values: from a block; the module whose output holds the values.
        layout: ``"separate"``: the output is the values; ``"stacked"``: all queries, all keys,
            all values.
        norm_kind: ``"layer"`` or ``"rms"``.
    """

    model_type: str
    blocks: str
    embed: str
    final_norm: str
    attention: str
    out_projection: str
    values: str
    mlp: str
    norm: str
    mlp_norm: str
    layout: QKVLayout
    norm_kind: str
    pos_embed: str | None = None
    unembed: str = "lm_head"
    parallel: bool = False

    # -- layouts ---------------------------------------------------------------------------------

    def select_values(self, out: Tensor, geometry: Geometry) -> Tensor:
        """``[..., n_kv, d_head]`` from the output of the ``values`` module."""
        width = geometry.n_kv_heads * geometry.d_head
        return out[..., -width:].unflatten(-1, (geometry.n_kv_heads, geometry.d_head))

    def replace_values(self, out: Tensor, values: Tensor) -> Tensor:
        """The output of the ``values`` module with other values in it."""
        flat = values.flatten(-2)
        return torch.cat([out[..., : out.shape[-1] - flat.shape[-1]], flat], dim=-1)


ARCHITECTURES: dict[str, Architecture] = {
    row.model_type: row
    for row in (
        Architecture(
            model_type="gpt2",
            blocks="transformer.h",
            embed="transformer.wte",
            pos_embed="transformer.wpe",
            final_norm="transformer.ln_f",
            attention="attn",
            out_projection="attn.c_proj",
            values="attn.c_attn",
            mlp="mlp",
            norm="ln_1",
            mlp_norm="ln_2",
            layout="stacked",
            norm_kind="layer",
        ),
        Architecture(
            model_type="llama",
            blocks="model.layers",
            embed="model.embed_tokens",
            final_norm="model.norm",
            attention="self_attn",
            out_projection="self_attn.o_proj",
            values="self_attn.v_proj",
            mlp="mlp",
            norm="input_layernorm",
            mlp_norm="post_attention_layernorm",
            layout="separate",
            norm_kind="rms",
        ),
    )
}


def find_architecture(model_type: str) -> Architecture:
    """The row of a ``config.model_type``.

    Raises:
        UnsupportedError: naming the type and the ones that are known.
    """
    try:
        return ARCHITECTURES[model_type]
    except KeyError:
        raise UnsupportedError(
            f"the architecture {model_type!r} is not known; known: "
            f"{', '.join(sorted(ARCHITECTURES))}. Add a row to "
            "sae_attn_plugin.backends.architectures.ARCHITECTURES"
        ) from None


def submodule(root: Any, path: str) -> Any:
    """The module or envoy at a dotted path."""
    for name in path.split("."):
        root = root[int(name)] if name.isdigit() else getattr(root, name)
    return root


def read_geometry(model: nn.Module, architecture: Architecture) -> Geometry:
    """The shape of a Hugging Face model, from its configuration and its weights."""
    config: Any = model.config
    n_heads = config.num_attention_heads
    embedding = submodule(model, architecture.embed).weight
    return Geometry(
        model_name=getattr(config, "_name_or_path", "") or architecture.model_type,
        architecture=architecture.model_type,
        n_layers=config.num_hidden_layers,
        d_model=config.hidden_size,
        n_heads=n_heads,
        n_kv_heads=getattr(config, "num_key_value_heads", None) or n_heads,
        d_head=getattr(config, "head_dim", None) or config.hidden_size // n_heads,
        d_vocab=submodule(model, architecture.unembed).weight.shape[0],
        n_ctx=config.max_position_embeddings,
        learned_positions=architecture.pos_embed is not None,
        normalization=architecture.norm_kind,
        parallel=architecture.parallel,
        has_mlp=True,
        dtype=embedding.dtype,
        device=embedding.device,
    )


def read_layer(
    model: nn.Module, architecture: Architecture, geometry: Geometry, layer: int
) -> LayerWeights:
    """The attention weights of one layer of a Hugging Face model."""
    g = geometry
    block = submodule(model, architecture.blocks)[layer]
    W_out, b_out = _matrix(submodule(block, architecture.out_projection))
    W_values, b_values = _matrix(submodule(block, architecture.values))
    W_V = architecture.select_values(W_values, g)
    zeros = torch.zeros(g.n_kv_heads, g.d_head, dtype=W_V.dtype, device=W_V.device)
    return LayerWeights(
        W_V=W_V.transpose(0, 1),
        b_V=zeros if b_values is None else architecture.select_values(b_values, g),
        W_O=W_out.unflatten(0, (g.n_heads, g.d_head)),
        b_O=W_out.new_zeros(g.d_model) if b_out is None else b_out,
        norm=read_norm(submodule(block, architecture.norm), architecture),
        mlp_norm=read_norm(submodule(block, architecture.mlp_norm), architecture),
    )


def read_norm(module: nn.Module, architecture: Architecture) -> Norm:
    """Weight, bias and epsilon of a norm module."""
    eps = next(
        float(getattr(module, name))  # each family names it its own way
        for name in ("eps", "variance_epsilon")
        if hasattr(module, name)
    )
    weight = module.weight.detach() if isinstance(module.weight, Tensor) else None
    bias = getattr(module, "bias", None)
    return Norm(
        architecture.norm_kind, eps, weight, bias.detach() if isinstance(bias, Tensor) else None
    )


def _matrix(module: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Weight as ``[in, out]`` and bias of a Linear or of GPT-2's Conv1D."""
    weight: Any = module.weight
    bias: Any = module.bias
    # Conv1D already stores [in, out].
    matrix = weight if type(module).__name__ == "Conv1D" else weight.T
    return matrix.detach(), None if bias is None else bias.detach()
