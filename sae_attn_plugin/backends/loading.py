"""Load a model by name or folder for either host, ready for attribution."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, cast

import torch

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
def _explain(name: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            f"cannot load the model {name!r}: it is neither a folder in Hugging Face format nor a "
            f"model the hub or the local cache can give ({first})"
        ) from error


def to_hooked_transformer(model: Any, tokenizer: Any = None) -> Any:
    """A ``HookedTransformer`` with the weights of a Hugging Face model, unprocessed.

    TransformerLens itself only loads models it knows by name. Known here: GPT-2 and Llama (the
    latter with default rotary embeddings).

    Raises:
        UnsupportedError: any other architecture.
    """
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformer_lens.pretrained.weight_conversions.gpt2 import convert_gpt2_weights
    from transformer_lens.pretrained.weight_conversions.llama import convert_llama_weights

    config = model.config
    common = {
        "n_layers": config.num_hidden_layers,
        "d_model": config.hidden_size,
        "n_ctx": config.max_position_embeddings,
        "n_heads": config.num_attention_heads,
        "d_vocab": config.vocab_size,
        "model_name": getattr(config, "_name_or_path", "") or config.model_type,
        "device": str(model.device),
        "dtype": model.dtype,
    }
    if config.model_type == "gpt2":
        special = config.scale_attn_by_inverse_layer_idx or not config.scale_attn_weights
        cfg = HookedTransformerConfig(
            **common,
            d_head=config.hidden_size // config.num_attention_heads,
            d_mlp=config.n_inner or 4 * config.hidden_size,
            act_fn=config.activation_function,
            eps=config.layer_norm_epsilon,
            normalization_type="LN",
            original_architecture="GPT2LMHeadModel",
        )
        convert = convert_gpt2_weights
    elif config.model_type == "llama":
        special = (
            config.rope_parameters.get("rope_type", "default") != "default"
            or config.attention_bias
            or config.mlp_bias
        )
        d_head = getattr(config, "head_dim", None) or config.hidden_size // common["n_heads"]
        cfg = HookedTransformerConfig(
            **common,
            d_head=d_head,
            d_mlp=config.intermediate_size,
            act_fn=config.hidden_act,
            eps=config.rms_norm_eps,
            normalization_type="RMS",
            positional_embedding_type="rotary",
            rotary_dim=d_head,
            rotary_base=config.rope_parameters["rope_theta"],
            rotary_adjacent_pairs=False,
            gated_mlp=True,
            final_rms=True,
            n_key_value_heads=config.num_key_value_heads,
            original_architecture="LlamaForCausalLM",
        )
        convert = convert_llama_weights
    else:
        special, cfg, convert = True, None, None
    if special or cfg is None or convert is None:
        raise UnsupportedError(
            f"cannot convert this {config.model_type!r} model to a HookedTransformer; use "
            "TransformerBridge or nnsight"
        )
    hooked = HookedTransformer(cfg)
    # load_and_process_state_dict() would round float64 weights to float32, even without processing.
    hooked.load_state_dict(hooked.fill_missing_keys(convert(model, cfg)), strict=False)
    if tokenizer is not None:
        # set_tokenizer() would reload it from its folder with another BOS convention.
        hooked.tokenizer = tokenizer
    return hooked.eval()
