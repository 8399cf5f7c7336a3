"""Where each Hugging Face architecture keeps its modules: one row per ``model_type``.

What differs between architectures is data in a row; the engine has no branches for them. A row is
checked against the model itself before the model is accepted, so a wrong one is refused.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sae_attn_plugin.backends.protocol import Geometry, LayerWeights, MlpWeights, Norm
from sae_attn_plugin.backends.walk import select_values, submodule
from sae_attn_plugin.errors import InputError, UnsupportedError

# Weight and bias of a module, wherever they lie.
WeightSource = Callable[[nn.Module], "tuple[Tensor | None, Tensor | None]"]
QKVLayout = Literal["separate", "stacked", "interleaved"]


@dataclass(frozen=True)
class Architecture:
    """Module names and layouts of one family, relative to the model or to a block.

    Attributes:
        model_type: ``config.model_type`` of the family.
        blocks: the list of blocks, from the model.
        embed, pos_embed, final_norm, unembed: from the model; ``pos_embed`` where positions are
            learned and added to the token embedding.
        attention, mlp: from a block; attention returns ``(output, weights)``.
        out_projection: from a block; its input is z, heads side by side.
        values: from a block; the module whose output holds the values.
        layout: ``"separate"``: the output is the values; ``"stacked"``: all queries, all keys, all
            values; ``"interleaved"``: query, key and value of the first head, then of the next.
        norm, mlp_norm: from a block; what feeds attention and the MLP (the same module where they
            share one), None where they read the residual stream itself.
        post_norm, mlp_post_norm: from a block; what attention's and the MLP's outputs go through
            before they are added, or None.
        norm_kind: ``"layer"`` or ``"rms"``.
        norm_offset: what is added to a norm's weight before it multiplies (Gemma: 1).
        parallel: whether attention and MLP read the same residual stream, or the name of the
            configuration's field that says so.
        logit_soft_cap: name of the configuration's field with the final soft-cap, if any.
        queries, keys: from a block, for the layout ``"separate"``; the modules whose outputs they
            are. These and what follows are needed for attention scores only.
        q_norm, k_norm: from a block; norms of queries and keys, or None.
        rotary: from the model; the module that gives cosines and sines, or None.
        rotary_pairs: which dimensions turn together: ``"halves"`` or ``"adjacent"``.
        score_scale: attribute of the attention module that multiplies scores (with ``/`` before it:
            that divides them), or the factor itself.
        score_soft_cap: name of the configuration's field with the soft-cap of scores, if any.
        mlp_in, mlp_gate, mlp_out, mlp_activation: from the MLP; what ``mlp="linearise"`` needs.
            ``mlp_gate`` is None where there is no gate, and equal to ``mlp_in`` where one matrix
            holds the gate and then the rest. None: unknown.
    """

    model_type: str
    blocks: str
    embed: str
    final_norm: str
    attention: str
    out_projection: str
    values: str
    mlp: str
    norm: str | None
    mlp_norm: str | None
    layout: QKVLayout
    norm_kind: Literal["layer", "rms"]
    norm_offset: float = 0.0
    post_norm: str | None = None
    mlp_post_norm: str | None = None
    pos_embed: str | None = None
    unembed: str = "lm_head"
    parallel: bool | str = False
    logit_soft_cap: str | None = None
    queries: str | None = None
    keys: str | None = None
    q_norm: str | None = None
    k_norm: str | None = None
    rotary: str | None = None
    rotary_pairs: Literal["halves", "adjacent"] = "halves"
    score_scale: str | float = "scaling"
    score_soft_cap: str | None = None
    mlp_in: str | None = None
    mlp_gate: str | None = None
    mlp_out: str | None = None
    mlp_activation: str | None = None

    def __post_init__(self) -> None:
        for name, value, known in (
            ("layout", self.layout, ("separate", "stacked", "interleaved")),
            ("norm_kind", self.norm_kind, ("layer", "rms")),
            ("rotary_pairs", self.rotary_pairs, ("halves", "adjacent")),
        ):
            if value not in known:
                raise InputError(
                    f"architecture {self.model_type!r}: {name}={value!r}; known: {', '.join(known)}"
                )
        if self.norm is None and self.norm_kind == "layer":
            raise UnsupportedError(
                f"architecture {self.model_type!r}: LayerNorm before the unembedding but none "
                "before attention is not supported"
            )

    # -- layouts ---------------------------------------------------------------------------------

    def select_values(self, out: Tensor, geometry: Geometry) -> Tensor:
        """``[..., n_kv, d_head]`` from the output of the ``values`` module."""
        return select_values(out, self.layout, geometry.n_kv_heads, geometry.d_head)


_GPT2 = Architecture(
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
    mlp_in="c_fc",
    mlp_out="c_proj",
    mlp_activation="act",
)
_LLAMA = Architecture(
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
    queries="self_attn.q_proj",
    keys="self_attn.k_proj",
    rotary="model.rotary_emb",
    mlp_in="up_proj",
    mlp_gate="gate_proj",
    mlp_out="down_proj",
    mlp_activation="act_fn",
)
_QK_NORM: dict[str, Any] = {"q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm"}
_GEMMA = replace(_LLAMA, model_type="gemma", norm_offset=1.0)
_GEMMA2 = replace(
    _GEMMA,
    model_type="gemma2",
    mlp_norm="pre_feedforward_layernorm",
    post_norm="post_attention_layernorm",
    mlp_post_norm="post_feedforward_layernorm",
    logit_soft_cap="final_logit_softcapping",
    score_soft_cap="attn_logit_softcapping",
)

ARCHITECTURES: dict[str, Architecture] = {
    row.model_type: row
    for row in (
        _GPT2,
        replace(
            _GPT2,
            model_type="gpt_neox",
            blocks="gpt_neox.layers",
            embed="gpt_neox.embed_in",
            pos_embed=None,
            final_norm="gpt_neox.final_layer_norm",
            attention="attention",
            out_projection="attention.dense",
            values="attention.query_key_value",
            norm="input_layernorm",
            mlp_norm="post_attention_layernorm",
            layout="interleaved",
            parallel="use_parallel_residual",
            rotary="gpt_neox.rotary_emb",
            mlp_in="dense_h_to_4h",
            mlp_out="dense_4h_to_h",
        ),
        replace(
            _GPT2,
            model_type="gptj",
            pos_embed=None,
            out_projection="attn.out_proj",
            values="attn.v_proj",
            mlp_norm="ln_1",
            layout="separate",
            parallel=True,
            queries="attn.q_proj",
            keys="attn.k_proj",
            rotary="transformer.h.0.attn.embed_positions",
            rotary_pairs="adjacent",
            score_scale="/scale_attn",
            mlp_in="fc_in",
            mlp_out="fc_out",
        ),
        _LLAMA,
        replace(_LLAMA, model_type="mistral"),
        replace(_LLAMA, model_type="qwen2"),
        replace(_LLAMA, model_type="qwen3", **_QK_NORM),
        _GEMMA,
        _GEMMA2,
        # Gemma 3 has the field of the scores' soft-cap, and ignores it.
        replace(_GEMMA2, model_type="gemma3_text", score_soft_cap=None, **_QK_NORM),
        replace(
            _LLAMA,
            model_type="olmo2",
            norm=None,
            mlp_norm=None,
            post_norm="post_attention_layernorm",
            mlp_post_norm="post_feedforward_layernorm",
            **_QK_NORM,
        ),
        replace(
            _LLAMA,
            model_type="phi3",
            values="self_attn.qkv_proj",
            layout="stacked",
            mlp_in="gate_up_proj",
            mlp_gate="gate_up_proj",
            mlp_activation="activation_fn",
        ),
    )
}


def register_architecture(row: Architecture) -> None:
    """Teach the package an architecture, for this process; a known one is replaced.

    Models of that ``model_type`` are then accepted if they behave as the row says: every model is
    checked on a short input.

    Raises:
        InputError: ``row`` is no :class:`Architecture`.
    """
    if not isinstance(row, Architecture):
        raise InputError(f"expected an Architecture, got {type(row).__name__}")
    ARCHITECTURES[row.model_type] = row


def find_architecture(model_type: str) -> Architecture:
    """The row of a ``config.model_type``.

    Raises:
        UnsupportedError: naming the type, the ones that are known and what to add.
    """
    try:
        return ARCHITECTURES[model_type]
    except KeyError:
        raise UnsupportedError(
            f"the architecture {model_type!r} is not known; known: "
            f"{', '.join(sorted(ARCHITECTURES))}. Describe it with sap.register_architecture("
            f"sap.Architecture(model_type={model_type!r}, ...)): the names of its modules and how "
            "its values are laid out"
        ) from None


def check_modules(model: nn.Module, architecture: Architecture) -> None:
    """Check that the modules a row names are there.

    Raises:
        UnsupportedError: naming the first that is not.
    """
    row, where = architecture, f"the architecture {architecture.model_type!r}"
    of_model = (row.blocks, row.embed, row.pos_embed, row.final_norm, row.unembed)
    of_block = (row.attention, row.out_projection, row.values, row.mlp, row.norm, row.mlp_norm)
    for paths, prefix in (
        (of_model, ""),
        ((*of_block, row.post_norm, row.mlp_post_norm), f"{row.blocks}.0."),
    ):
        for path in paths:
            if path is None:
                continue
            try:
                submodule(model, prefix + path)
            except (AttributeError, IndexError, KeyError, TypeError):
                raise UnsupportedError(
                    f"{where}: {type(model).__name__} has no module {prefix + path!r}, which its "
                    "row names"
                ) from None


def read_geometry(model: nn.Module, architecture: Architecture) -> Geometry:
    """The shape of a Hugging Face model, from its configuration and its weights."""
    config: Any = model.config
    parallel, cap = architecture.parallel, architecture.logit_soft_cap
    needed = ["num_hidden_layers", "hidden_size", "num_attention_heads", "max_position_embeddings"]
    for name in [*needed, *([parallel] if isinstance(parallel, str) else [])]:
        if not hasattr(config, name):
            raise UnsupportedError(
                f"the architecture {architecture.model_type!r}: the configuration of "
                f"{type(model).__name__} has no field {name!r}, which is needed to read its shape"
            )
    n_heads = config.num_attention_heads
    embedding = submodule(model, architecture.embed)
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
        parallel=bool(getattr(config, parallel)) if isinstance(parallel, str) else parallel,
        has_mlp=True,
        dtype=embedding.weight.dtype,
        device=execution_device(embedding),
        mlp_post_norm=architecture.mlp_post_norm is not None,
        logit_soft_cap=None if cap is None else getattr(config, cap, None),
    )


def read_layer(
    model: nn.Module,
    architecture: Architecture,
    geometry: Geometry,
    layer: int,
    source: WeightSource | None = None,
) -> LayerWeights:
    """The attention weights of one layer of a Hugging Face model."""
    g, row = geometry, architecture
    block = submodule(model, row.blocks)[layer]

    def norm(path: str | None) -> Norm | None:
        return None if path is None else read_norm(submodule(block, path), row, source)

    W_out, b_out = read_matrix(submodule(block, row.out_projection), source)
    W_values, b_values = read_matrix(submodule(block, row.values), source)
    W_V = row.select_values(W_values, g)
    zeros = torch.zeros(g.n_kv_heads, g.d_head, dtype=W_V.dtype, device=W_V.device)
    return LayerWeights(
        W_V=W_V.transpose(0, 1),
        b_V=zeros if b_values is None else row.select_values(b_values, g),
        W_O=W_out.unflatten(0, (g.n_heads, g.d_head)),
        b_O=W_out.new_zeros(g.d_model) if b_out is None else b_out,
        norm=norm(row.norm) or Norm("none"),
        mlp_norm=norm(row.mlp_norm),
        post_norm=norm(row.post_norm),
        mlp_post_norm=norm(row.mlp_post_norm),
    )


def read_mlp(
    model: nn.Module,
    architecture: Architecture,
    layer: int,
    source: WeightSource | None = None,
) -> MlpWeights:
    """The weights of one layer's MLP of a Hugging Face model.

    Raises:
        UnsupportedError: a row that does not say how the MLP is made, or says so wrongly.
    """
    row = architecture
    if row.mlp_in is None or row.mlp_out is None or row.mlp_activation is None:
        raise UnsupportedError(
            f"the architecture {row.model_type!r} does not say how its MLP is made, which "
            "mlp='linearise' needs: give mlp_in, mlp_out, mlp_activation (and mlp_gate) in "
            "sap.Architecture"
        )
    path = f"{row.blocks}.{layer}.{row.mlp}"
    try:
        mlp = submodule(model, path)
        W_in, b_in = read_matrix(submodule(mlp, row.mlp_in), source)
        W_out, b_out = read_matrix(submodule(mlp, row.mlp_out), source)
        activation = submodule(mlp, row.mlp_activation)
        W_gate, b_gate = None, None
        if row.mlp_gate == row.mlp_in:
            W_gate, W_in = W_in.chunk(2, dim=-1)
            b_gate, b_in = (None, None) if b_in is None else b_in.chunk(2)
        elif row.mlp_gate is not None:
            W_gate, b_gate = read_matrix(submodule(mlp, row.mlp_gate), source)
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise UnsupportedError(
            f"the architecture {row.model_type!r}: {type(model).__name__} has no MLP at {path!r} "
            f"with {row.mlp_in}, {row.mlp_out} and {row.mlp_activation} ({error})"
        ) from None
    return MlpWeights(W_in, W_out, activation, b_in, b_out, W_gate, b_gate)


def mlp_matrices(architecture: Architecture, layer: int) -> list[str]:
    """Paths of a layer's MLP matrices, from the model; none where the row does not say."""
    row = architecture
    names = (row.mlp_in, row.mlp_gate, row.mlp_out)
    path = f"{row.blocks}.{layer}.{row.mlp}"
    return [f"{path}.{name}" for name in dict.fromkeys(names) if name is not None]


def read_norm(
    module: nn.Module, architecture: Architecture, source: WeightSource | None = None
) -> Norm:
    """Weight (offset added), bias and epsilon of a norm module."""
    # Each family names it its own way.
    found = [getattr(module, name) for name in ("eps", "variance_epsilon") if hasattr(module, name)]
    if not found:
        raise UnsupportedError(
            f"the architecture {architecture.model_type!r}: {type(module).__name__} is no norm "
            "with an epsilon (eps or variance_epsilon)"
        )
    weight, bias = (source or own_weights)(module)
    if weight is not None and architecture.norm_offset:
        # Added in float32, as the hosts do.
        weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
        weight = weight + architecture.norm_offset
    return Norm(architecture.norm_kind, float(found[0]), weight, bias)


def read_matrix(
    module: nn.Module, source: WeightSource | None = None
) -> tuple[Tensor, Tensor | None]:
    """Weight as ``[in, out]`` and bias of a Linear or of GPT-2's Conv1D."""
    module = getattr(module, "original_component", module)  # TransformerBridge wraps some
    weight, bias = (source or own_weights)(module)
    assert weight is not None
    # Conv1D already stores [in, out].
    return (weight if type(module).__name__ == "Conv1D" else weight.T), bias


def own_weights(module: nn.Module) -> tuple[Tensor | None, Tensor | None]:
    """Weight and bias of a module, brought from where accelerate keeps them if it does."""
    if hasattr(module, "_hf_hook"):
        from accelerate.utils import align_module_device

        context: Any = align_module_device(module)
    else:
        context = contextlib.nullcontext()
    with context:
        found = (getattr(module, "weight", None), getattr(module, "bias", None))
        weight, bias = (t.detach() if isinstance(t, Tensor) else None for t in found)
    return weight, bias


def execution_device(module: nn.Module) -> torch.device:
    """Where a module computes, which under accelerate need not be where its weights lie."""
    device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
    weight: Any = module.weight
    return weight.device if device is None else torch.empty(0, device=device).device
