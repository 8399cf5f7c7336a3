"""Builders of small models and dictionaries with nothing left at a convenient zero."""

from __future__ import annotations

import atexit
import copy
import functools
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from nnsight import NNsight, TransformersModel
from sae_lens import SAE
from sae_lens.saes.gated_sae import GatedSAE, GatedSAEConfig
from sae_lens.saes.jumprelu_sae import JumpReLUSAE, JumpReLUSAEConfig
from sae_lens.saes.sae import SAEMetadata
from sae_lens.saes.standard_sae import StandardSAE, StandardSAEConfig
from sae_lens.saes.topk_sae import TopKSAE, TopKSAEConfig
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.overrides import TorchFunctionMode
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from sae_attn_plugin.backends.loading import to_hooked_transformer

STORIES = Path(__file__).parents[1].parent / "shared" / "data" / "stories260K"
VOCABULARY = 61
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


def tiny_gpt2(dtype: torch.dtype = torch.float32, n_layers: int = 3) -> Any:
    torch.manual_seed(0)
    config: Any = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=40,
        n_embd=30,
        n_layer=n_layers,
        n_head=5,
        initializer_range=0.2,
        attn_implementation="eager",  # pyright: ignore[reportCallIssue]
        bos_token_id=0,
        eos_token_id=0,
    )
    model: Any = GPT2LMHeadModel(config)
    model = model.to(dtype).eval()
    randomize(model)
    return model


def tiny_llama(
    dtype: torch.dtype = torch.float32, n_layers: int = 3, attention_bias: bool = False
) -> Any:
    """6 heads over 2 key/value heads, and head_dim other than d_model / heads."""
    torch.manual_seed(0)
    config: Any = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=36,
        intermediate_size=44,
        num_hidden_layers=n_layers,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=40,
        initializer_range=0.2,
        tie_word_embeddings=False,
        attention_bias=attention_bias,
        attn_implementation="eager",  # pyright: ignore[reportCallIssue]
        bos_token_id=0,
        eos_token_id=0,
    )
    model: Any = LlamaForCausalLM(config)
    model = model.to(dtype).eval()
    randomize(model)
    return model


TINY = {"gpt2": tiny_gpt2, "llama": tiny_llama}


@functools.cache
def _scratch() -> Path:
    """A folder that lives as long as the process."""
    folder = tempfile.mkdtemp(prefix="sae-attn-tests-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


@functools.cache
def word_tokenizer(adds_bos: bool = True) -> PreTrainedTokenizerFast:
    """Words ``w2 ... w60`` with ``<bos>`` 0 and ``<unk>`` 1, saved to and loaded from a folder.

    Args:
        adds_bos: whether the tokenizer prepends BOS by its own convention.
    """
    vocabulary = {"<bos>": 0, "<unk>": 1, **{f"w{i}": i for i in range(2, VOCABULARY)}}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))  # pyright: ignore[reportCallIssue]
    words.pre_tokenizer = pre_tokenizers.Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    if adds_bos:
        words.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
            single="<bos> $A", special_tokens=[("<bos>", 0)]
        )
    folder = _scratch() / f"tokenizer-{adds_bos}"
    PreTrainedTokenizerFast(
        tokenizer_object=words,
        bos_token="<bos>",
        eos_token="<bos>",
        pad_token="<bos>",
        unk_token="<unk>",
    ).save_pretrained(folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)


def bridge(model: Any, tokenizer: PreTrainedTokenizerFast | None = None) -> Any:
    """A TransformerBridge over a copy of a tiny model, which loads its tokenizer from a folder."""
    from transformer_lens.model_bridge import TransformerBridge

    model = copy.deepcopy(model)
    model.config.architectures = [type(model).__name__]
    folder = Path(tempfile.mkdtemp(dir=_scratch()))
    model.config.save_pretrained(folder)
    (tokenizer or word_tokenizer()).save_pretrained(folder)
    return TransformerBridge.boot_transformers(
        str(folder), hf_model=model, dtype=model.dtype
    ).eval()


def hooked_sae_transformer(model: Any, tokenizer: PreTrainedTokenizerFast | None = None) -> Any:
    """sae_lens' subclass of HookedTransformer with the weights of a tiny model."""
    from sae_lens import HookedSAETransformer

    plain = to_hooked_transformer(model, tokenizer)
    hooked = HookedSAETransformer(plain.cfg)
    hooked.load_state_dict(plain.state_dict())
    hooked.tokenizer = tokenizer
    return hooked.eval()


def on_host(model: Any, host: str, tokenizer: PreTrainedTokenizerFast | None = None) -> Any:
    """A Hugging Face model as each host wants it."""
    match host:
        case "hooked_transformer":
            return to_hooked_transformer(model, tokenizer)
        case "hooked_sae_transformer":
            return hooked_sae_transformer(model, tokenizer)
        case "transformer_bridge":
            return bridge(model, tokenizer)
        case "nnsight":
            return NNsight(model)
        case "transformers_model":
            return TransformersModel(model, tokenizer=tokenizer or word_tokenizer())
        case "bare":
            return model
    raise ValueError(host)


HOSTS = ("hooked_transformer", "transformer_bridge", "nnsight")
ALL_HOSTS = (*HOSTS, "hooked_sae_transformer", "transformers_model", "bare")


class TrueFloat64(TorchFunctionMode):
    """Leaves float64 tensors alone where Hugging Face casts them to float32."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if args and isinstance(args[0], torch.Tensor) and args[0].dtype == torch.float64:
            name = getattr(func, "__name__", "")
            if name == "float" or (name == "to" and torch.float32 in args[1:]):
                return args[0]
            if name in ("to", "softmax", "log_softmax") and kwargs.get("dtype") == torch.float32:
                kwargs["dtype"] = torch.float64
        return func(*args, **kwargs)


def hooks_on(model: Any) -> int:
    """How many forward hooks are registered anywhere in a model."""
    module = model if isinstance(model, torch.nn.Module) else model._module
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules())


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


TRANSCODERS = ("transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder")


def random_transcoder(
    layer: int,
    d_model: int,
    d_sae: int = 24,
    architecture: str = "transcoder",
    hooks: tuple[str, str] = ("mlp.hook_in", "hook_mlp_out"),
    dtype: str = "float32",
    seed: int = 0,
    **config: Any,
) -> SAE[Any]:
    """A random sae_lens transcoder of one layer, from and to hooks of its block."""
    from sae_lens.registry import get_sae_class

    sae_class, config_class = get_sae_class(architecture)
    settings = {
        "d_in": d_model,
        "d_out": d_model,
        "d_sae": d_sae,
        "dtype": dtype,
        "device": "cpu",
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
        "metadata": SAEMetadata(
            model_name="tiny",
            hook_name=f"blocks.{layer}.{hooks[0]}",
            hook_name_out=f"blocks.{layer}.{hooks[1]}",
            prepend_bos=False,
        ),
    }
    sae: Any = sae_class(config_class(**{**settings, **config}))
    generator = torch.Generator().manual_seed(seed + 100 * layer + 7)
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.3
            parameter.copy_((noise.abs() if name == "threshold" else noise).to(parameter.dtype))
    return sae


def sae_at(layer: int, hook: str, d_in: int, architecture: str = "standard", **config: Any) -> Any:
    """A random SAE on a hook of the residual stream's width, such as ``hook_attn_out``."""
    metadata = SAEMetadata(model_name="tiny", hook_name=f"blocks.{layer}.{hook}", prepend_bos=False)
    config = {"reshape_activations": "none", "metadata": metadata, "d_sae": 24, **config}
    return random_sae(layer, d_in, architecture=architecture, **config)
