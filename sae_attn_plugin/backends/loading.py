"""Load a model by name or folder for either host, ready for attribution."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Generator
from pathlib import Path
from typing import Any, Literal, cast

import torch

from sae_attn_plugin.backends.architectures import find_architecture, read_norm
from sae_attn_plugin.backends.walk import submodule
from sae_attn_plugin.errors import InputError, UnsupportedError

Host = Literal["transformer_lens", "transformer_bridge", "nnsight"]
HOSTS: tuple[Host, ...] = ("transformer_lens", "transformer_bridge", "nnsight")


def load_model(
    name: str | Path,
    backend: Host = "transformer_lens",
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    model_name: str | None = None,
) -> Any:
    """Load a model so that its z is what SAEs are trained on.

    Args:
        name: a folder in Hugging Face format, or a hub name.
        backend: ``"transformer_lens"``: ``HookedTransformer`` without weight processing (a folder
            whose architecture :func:`to_hooked_transformer` cannot convert becomes a
            ``TransformerBridge``); ``"transformer_bridge"``; ``"nnsight"``: the Hugging Face model
            with eager attention and its tokenizer, as nnsight's ``TransformersModel``.
        model_name: what graphs call a model from a folder; default: the folder as given.

    Raises:
        InputError: no such folder and no such model, or an unknown backend.
    """
    if backend not in HOSTS:
        raise InputError(f"unknown backend {backend!r}; known: {', '.join(HOSTS)}")
    name = str(name)
    is_folder = Path(name).is_dir()
    if is_folder and not (Path(name) / "config.json").is_file():
        raise InputError(f"the folder {name} holds no model: config.json is missing")
    if not is_folder and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise InputError(f"no such folder: {name}")
    if backend == "transformer_lens" and not is_folder:
        from transformer_lens import HookedTransformer

        with _explain(name):
            return HookedTransformer.from_pretrained_no_processing(name, device=device, dtype=dtype)
    if backend == "transformer_bridge" and not is_folder:
        return _bridge(name, device, dtype)

    model, tokenizer = load_huggingface(name, device, dtype)
    if model_name is not None:
        model.config._name_or_path = model_name
    if backend == "nnsight":
        from nnsight import TransformersModel

        return TransformersModel(model, tokenizer=tokenizer, task="text-generation")
    if backend == "transformer_lens":
        with contextlib.suppress(UnsupportedError):
            return to_hooked_transformer(model, tokenizer)
    bridge = _bridge(name, device, dtype)
    bridge.cfg.model_name = model_name or bridge.cfg.model_name
    return bridge


def load_huggingface(name: str, device: str, dtype: torch.dtype) -> tuple[Any, Any]:
    """The Hugging Face model, with eager attention, and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with _explain(name):
        model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="eager", dtype=dtype)
        tokenizer = AutoTokenizer.from_pretrained(name)
    return cast(Any, model).to(device).eval(), tokenizer


def _bridge(name: str, device: str, dtype: torch.dtype) -> Any:
    from transformer_lens.model_bridge import TransformerBridge

    with _explain(name):
        return TransformerBridge.boot_transformers(name, device=device, dtype=dtype).eval()


@contextlib.contextmanager
def _explain(name: str) -> Generator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            f"cannot load the model {name!r}: it is neither a folder in Hugging Face format nor a "
            f"model the hub or the local cache can give ({first})"
        ) from error


# model_type -> TransformerLens' module and function of weight conversion
_CONVERSIONS = {
    "gpt2": ("gpt2", "convert_gpt2_weights"),
    "gpt_neox": ("neox", "convert_neox_weights"),
    "gptj": ("gptj", "convert_gptj_weights"),
    "llama": ("llama", "convert_llama_weights"),
    "mistral": ("mistral", "convert_mistral_weights"),
    "qwen2": ("qwen2", "convert_qwen2_weights"),
    "qwen3": ("qwen3", "convert_qwen3_weights"),
    "gemma": ("gemma", "convert_gemma_weights"),
    "gemma2": ("gemma", "convert_gemma_weights"),
    "gemma3_text": ("gemma", "convert_gemma_weights"),
    "olmo2": ("olmo2", "convert_olmo2_weights"),
}


def to_hooked_transformer(model: Any, tokenizer: Any = None) -> Any:
    """A ``HookedTransformer`` with the weights of a Hugging Face model, unprocessed.

    TransformerLens itself only loads models it knows by name. This takes any GPT-2, GPT-NeoX,
    GPT-J, Llama, Mistral, Qwen2, Qwen3, Gemma, Gemma 2, Gemma 3 (text) or OLMo-2 with default
    rotary embeddings, through TransformerLens' own weight conversions. The result is run on a short
    input beside the original and must give the same logits.

    Raises:
        UnsupportedError: another architecture, an option that TransformerLens does not have, or a
            conversion that changes the logits; the message names it.
    """
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    kind = model.config.model_type
    who = f"cannot convert this {kind!r} model to a HookedTransformer"
    advice = "use TransformerBridge or nnsight"
    if kind not in _CONVERSIONS:
        raise UnsupportedError(
            f"{who}: known architectures are {', '.join(sorted(_CONVERSIONS))}; {advice}"
        )
    if refused := _not_in_transformer_lens(model.config):
        raise UnsupportedError(f"{who}: TransformerLens has no {refused}; {advice}")
    cfg = HookedTransformerConfig(
        model_name=getattr(model.config, "_name_or_path", "") or kind,
        original_architecture=type(model).__name__,
        device=str(model.device),
        dtype=model.dtype,
        **_hooked_settings(model.config),
    )
    module, function = _CONVERSIONS[kind]
    convert = getattr(
        importlib.import_module(f"transformer_lens.pretrained.weight_conversions.{module}"),
        function,
    )
    hooked = HookedTransformer(cfg)
    # load_and_process_state_dict() would round float64 weights to float32, even without processing.
    hooked.load_state_dict(
        hooked.fill_missing_keys({**convert(model, cfg), **_exact_weights(model)}), strict=False
    )
    hooked = hooked.eval()
    tokens = (torch.arange(1, 9, device=model.device) * 37 % cfg.d_vocab)[None, : cfg.n_ctx]
    with torch.no_grad():
        expected, got = model(tokens, use_cache=False).logits, hooked(tokens)
    error = float((got - expected).abs().max() / expected.abs().max())
    if not error <= (1e-3 if model.dtype.itemsize >= 4 else 0.1):
        raise UnsupportedError(f"{who}: the logits differ by {error:.2g} of the largest; {advice}")
    if tokenizer is not None:
        # set_tokenizer() would reload it from its folder with another BOS convention.
        hooked.tokenizer = tokenizer
    return hooked


def _exact_weights(model: Any) -> dict[str, torch.Tensor]:
    """Embeddings and norm gains that the conversions round to float32, as the model has them."""
    row = find_architecture(model.config.model_type)
    if not row.norm_offset:
        return {}
    blocks = submodule(model, row.blocks)
    paths = {"ln1.w": row.norm, "ln2.w": row.mlp_norm}
    paths |= {"ln1_post.w": row.post_norm, "ln2_post.w": row.mlp_post_norm}
    norms = {
        f"blocks.{layer}.{name}": submodule(block, path)
        for layer, block in enumerate(blocks)
        for name, path in paths.items()
        if path is not None
    }
    norms["ln_final.w"] = submodule(model, row.final_norm)
    weights = {name: read_norm(module, row).weight for name, module in norms.items()}
    with torch.no_grad():
        embedding = submodule(model, row.embed)
        everything = torch.arange(embedding.weight.shape[0], device=embedding.weight.device)
        embedded = embedding(everything)
    return {"embed.W_E": embedded, **{k: w for k, w in weights.items() if w is not None}}


def _rope(config: Any) -> dict[str, Any]:
    """Rotary settings of global attention; Gemma 3 keeps one set per kind of layer."""
    rope = getattr(config, "rope_parameters", None) or {}
    return rope.get("full_attention", rope)


def _not_in_transformer_lens(config: Any) -> str | None:
    """What this configuration asks for that a HookedTransformer cannot do."""

    def has(name: str, default: Any = False) -> Any:
        return getattr(config, name, default)

    kind = config.model_type
    if kind == "gpt2" and (has("scale_attn_by_inverse_layer_idx") or not config.scale_attn_weights):
        return "other scaling of attention scores"
    if _rope(config).get("rope_type", "default") != "default":
        return f"rotary embeddings of type {_rope(config)['rope_type']!r} here"
    if has("mlp_bias") or (has("attention_bias") and kind != "gpt_neox"):
        return f"biases in {kind}"
    if kind == "gpt_neox" and not config.attention_bias:
        return "GPT-NeoX without attention biases"
    if kind == "olmo2" and config.num_key_value_heads != config.num_attention_heads:
        return "grouped-query attention in OLMo-2"
    return None


def _hooked_settings(config: Any) -> dict[str, Any]:
    """A Hugging Face configuration in TransformerLens' terms."""

    def get(*names: str) -> Any:
        return next((v for n in names if (v := getattr(config, n, None)) is not None), None)

    kind, n_heads, rope = config.model_type, config.num_attention_heads, _rope(config)
    d_head = get("head_dim") or config.hidden_size // n_heads
    layer_norm = kind in ("gpt2", "gpt_neox", "gptj")
    settings: dict[str, Any] = {
        "n_layers": config.num_hidden_layers,
        "d_model": config.hidden_size,
        "n_ctx": config.max_position_embeddings,
        "n_heads": n_heads,
        "d_head": d_head,
        "d_vocab": config.vocab_size,
        "d_mlp": get("n_inner", "intermediate_size") or 4 * config.hidden_size,
        "act_fn": get("activation_function", "hidden_activation", "hidden_act"),
        "eps": get("layer_norm_epsilon", "layer_norm_eps", "rms_norm_eps"),
        "normalization_type": "LN" if layer_norm else "RMS",
        "final_rms": not layer_norm,
        "gated_mlp": not layer_norm,
    }
    if kind == "gptj" or (kind == "gpt_neox" and config.use_parallel_residual):
        settings["parallel_attn_mlp"] = True
    if kind not in ("gpt2", "olmo2") and (get("num_key_value_heads") or n_heads) != n_heads:
        settings["n_key_value_heads"] = config.num_key_value_heads
    elif not layer_norm and kind not in ("olmo2", "qwen3"):
        settings["n_key_value_heads"] = n_heads  # the conversions name their weights for it
    if kind != "gpt2":
        share = rope.get("partial_rotary_factor", 1.0)
        settings |= {
            "positional_embedding_type": "rotary",
            "rotary_dim": config.rotary_dim if kind == "gptj" else int(d_head * share),
            "rotary_base": rope.get("rope_theta", 10000),
            "rotary_adjacent_pairs": kind == "gptj",
        }
    if kind in ("qwen3", "gemma3_text"):  # OLMo-2 brings norms of its own
        settings["use_qk_norm"] = True
    if kind in ("gemma2", "gemma3_text"):
        settings |= {
            "attn_scale": config.query_pre_attn_scalar**0.5,
            "use_normalization_before_and_after": True,
        }
    if kind == "gemma3_text":
        local = config.rope_parameters.get("sliding_attention") or rope
        settings["rotary_base_local"] = local["rope_theta"]
    for cap, name in (
        ("attn_scores_soft_cap", "attn_logit_softcapping"),
        ("output_logits_soft_cap", "final_logit_softcapping"),
    ):
        # Gemma 3 ignores the cap on scores.
        if get(name) is not None and not (kind == "gemma3_text" and cap.startswith("attn")):
            settings[cap] = get(name)
    window = get("sliding_window")
    types = get("layer_types") or ["sliding_attention"] * config.num_hidden_layers
    if window is not None and "sliding_attention" in types:
        settings |= {
            "use_local_attn": True,
            "window_size": window,
            "attn_types": ["local" if t == "sliding_attention" else "global" for t in types],
        }
    return settings
