"""Models and SAEs whose weights are written down, not trained.

Coordinates of the stream, heads that match and move them, features that read and write what heads
hold; :mod:`sae_attn_plugin.demo.circuits` says how.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

EPSILON = 1e-5  # of every norm
SHARPNESS = 100.0
BOS = "<bos>"
N_CTX = 8
_ROPE_THETA = 1e30  # only the first pair of rotary dimensions turns

Coordinates = Mapping[str, float]


@dataclass(frozen=True)
class HeadSpec:
    """One head in terms of coordinates.

    Attributes:
        matches: the score is the sum over these of (query sum) * (key sum).
        moves: dimension i of z holds ``gain`` times the coordinate read, and writes the sum.
        lag: look this many positions back, by rotary positions, instead of matching.
        rests: look at BOS where nothing matches.
    """

    matches: Sequence[tuple[Coordinates, Coordinates]] = ()
    moves: Sequence[tuple[str, Coordinates]] = ()
    gain: float = 1.0
    lag: int | None = None
    rests: bool = True


@dataclass(frozen=True)
class FeatureSpec:
    """Encoder and decoder weights by ``(head, dimension of z)``."""

    reads: Mapping[tuple[int, int], float]
    writes: Mapping[tuple[int, int], float]
    bias: float = 0.0


def looks_back(
    moves: Sequence[tuple[str, Coordinates]], gain: float, n_ctx: int = N_CTX
) -> HeadSpec:
    """A head that looks at the position before, by learned positions; position 0 sees itself."""
    matches = [({f"@{p}": 1.0}, {f"@{p - 1}": 1.0}) for p in range(1, n_ctx)]
    return HeadSpec(matches, moves, gain, rests=False)


def norm_scale(n: int, *values: float) -> float:
    """The scale of a norm over n coordinates with these values and zeros."""
    return math.sqrt(sum(value**2 for value in values) / n + EPSILON)


class Stream:
    """Coordinates as pairs of dimensions; all tensors are float64.

    Writing c gives (+c, -c); reading takes half the difference.
    """

    def __init__(self, n: int, names: Sequence[str]) -> None:
        assert len(names) <= n, f"{len(names)} coordinates do not fit in {n}"
        self.d_model: int = 2 * n
        self.index: dict[str, int] = {name: i for i, name in enumerate(names)}

    def write(self, values: Coordinates) -> Tensor:
        """``[d_model]``"""
        vector = torch.zeros(self.d_model, dtype=torch.float64)
        for name, value in values.items():
            vector[2 * self.index[name]], vector[2 * self.index[name] + 1] = value, -value
        return vector

    def read(self, values: Coordinates) -> Tensor:
        """``[d_model]``, so that ``write(a) @ read(b)`` is the dot product of a and b."""
        return self.write(values) / 2


def _weights(
    stream: Stream, head: HeadSpec, vocabulary: Sequence[str], d_head: int, rotary: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Q, K, V ``[d_model, d_head]`` and O ``[d_head, d_model]`` of one head."""
    q, k, v, o = torch.zeros(4, stream.d_model, d_head, dtype=torch.float64)
    sharp = SHARPNESS * math.sqrt(d_head)  # attention divides by the root
    tokens: Coordinates = dict.fromkeys(vocabulary, 1.0)
    if head.lag is not None:
        # The first rotary pair turns by one radian per position: the score is cos(lag - distance).
        turned = sharp * torch.tensor([math.cos(head.lag), -math.sin(head.lag)])
        q[:, [0, d_head // 2]] = stream.read(tokens)[:, None] * turned.to(q)
        k[:, 0] = stream.read(tokens)
    else:
        rest = [(dict.fromkeys(vocabulary, 0.5), {BOS: 1.0})] if head.rests else []
        for i, (query, key) in enumerate([*head.matches, *rest], start=int(rotary)):
            assert i < (d_head // 2 if rotary else d_head), "too many matches for a head"
            q[:, i], k[:, i] = sharp * stream.read(query), stream.read(key)
    for i, (read, write) in enumerate(head.moves):
        v[:, i] = head.gain * stream.read({read: 1.0})
        o[:, i] = stream.write(write)
    return q, k, v, o.T


def gpt2_model(
    stream: Stream,
    vocabulary: Sequence[str],
    layers: Sequence[Sequence[HeadSpec]],
    unembed: Mapping[str, Coordinates],
    positions: bool,
    _n_kv_heads: int = 0,
    n_ctx: int = N_CTX,
) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    n_heads = len(layers[0])
    config: Any = GPT2Config(
        **_shared(vocabulary),
        n_positions=n_ctx,
        n_embd=stream.d_model,
        n_layer=len(layers),
        n_head=n_heads,
        n_inner=1,
        layer_norm_epsilon=EPSILON,
    )
    model: Any = GPT2LMHeadModel(config)
    _clear(model)
    with torch.no_grad():
        if positions:
            for p in range(n_ctx):
                model.transformer.wpe.weight[p] = stream.write({f"@{p}": 1})
        _tokens(stream, vocabulary, unembed, model.transformer.wte, model.lm_head)
        for block, heads in zip(model.transformer.h, layers, strict=True):
            parts = [
                _weights(stream, head, vocabulary, stream.d_model // n_heads, False)
                for head in heads
            ]
            q, k, v, o = zip(*parts, strict=True)
            block.attn.c_attn.weight.copy_(torch.cat([*q, *k, *v], dim=1))
            block.attn.c_proj.weight.copy_(torch.cat(o))
    return model


def llama_model(
    stream: Stream,
    vocabulary: Sequence[str],
    layers: Sequence[Sequence[HeadSpec]],
    unembed: Mapping[str, Coordinates],
    _positions: bool,
    n_kv_heads: int,
) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    n_heads, d_head = len(layers[0]), 12
    config: Any = LlamaConfig(
        **_shared(vocabulary),
        max_position_embeddings=N_CTX,
        hidden_size=stream.d_model,
        intermediate_size=1,
        num_hidden_layers=len(layers),
        num_attention_heads=n_heads,
        num_key_value_heads=n_kv_heads,
        head_dim=d_head,
        rms_norm_eps=EPSILON,
        rope_parameters={"rope_type": "default", "rope_theta": _ROPE_THETA},
    )
    model: Any = LlamaForCausalLM(config)
    _clear(model)
    with torch.no_grad():
        _tokens(stream, vocabulary, unembed, model.model.embed_tokens, model.lm_head)
        for block, heads in zip(model.model.layers, layers, strict=True):
            parts = [_weights(stream, head, vocabulary, d_head, True) for head in heads]
            q, k, v, o = zip(*parts, strict=True)
            first = slice(None, None, n_heads // n_kv_heads)  # a group shares keys and values
            attention = block.self_attn
            attention.q_proj.weight.copy_(torch.cat(q, dim=1).T)
            attention.k_proj.weight.copy_(torch.cat(k[first], dim=1).T)
            attention.v_proj.weight.copy_(torch.cat(v[first], dim=1).T)
            attention.o_proj.weight.copy_(torch.cat(o).T)
    return model


def _shared(vocabulary: Sequence[str]) -> dict[str, Any]:
    return {
        "vocab_size": len(vocabulary),
        "tie_word_embeddings": False,
        "attn_implementation": "eager",
        "bos_token_id": 0,
        "eos_token_id": 0,
    }


def _clear(model: Any) -> None:
    """Everything zero, norm gains one, in float64."""
    model.double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_gain = name.endswith(("ln_1.weight", "ln_2.weight", "ln_f.weight", "norm.weight"))
            parameter.fill_(float(is_gain))


def _tokens(
    stream: Stream,
    vocabulary: Sequence[str],
    unembed: Mapping[str, Coordinates],
    embedding: Any,
    lm_head: Any,
) -> None:
    for i, token in enumerate(vocabulary):
        embedding.weight[i] = stream.write({token: 1})
        lm_head.weight[i] = stream.read(unembed.get(token, {}))


def head_width(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def sae_of(
    layer: int,
    features: Sequence[FeatureSpec],
    n_heads: int,
    d_head: int,
    b_dec: float,
    name: str,
    dtype: torch.dtype,
) -> Any:
    """A plain sae_lens SAE; ``b_dec`` stands on every dimension that a feature writes."""
    from sae_lens.saes.sae import SAEMetadata
    from sae_lens.saes.standard_sae import StandardSAE, StandardSAEConfig

    hook_name = f"blocks.{layer}.attn.hook_z"
    sae = StandardSAE(
        StandardSAEConfig(
            d_in=n_heads * d_head,
            d_sae=len(features),
            dtype=str(dtype).removeprefix("torch."),
            device="cpu",
            apply_b_dec_to_input=True,
            normalize_activations="none",
            reshape_activations="hook_z",
            metadata=SAEMetadata(model_name=name, hook_name=hook_name, prepend_bos=False),
        )
    )
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.zero_()
        for i, feature in enumerate(features):
            sae.b_enc[i] = feature.bias
            for (head, dim), weight in feature.reads.items():
                sae.W_enc[head * d_head + dim, i] = weight
            for (head, dim), weight in feature.writes.items():
                sae.W_dec[i, head * d_head + dim] = weight
                sae.b_dec[head * d_head + dim] = b_dec
    return sae.eval()


def tokenizer_of(ids: dict[str, int]) -> Any:
    """Words split at spaces; BOS is written out in prompts."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words: Any = Tokenizer(models.WordLevel(ids, unk_token=BOS))  # pyright: ignore[reportCallIssue]
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token=BOS, eos_token=BOS, pad_token=BOS, unk_token=BOS
    )
