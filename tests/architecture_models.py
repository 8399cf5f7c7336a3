"""One tiny random model per architecture, with odd sizes and nothing at a convenient zero."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from helpers import VOCABULARY, randomize
from torch import nn
from torch.overrides import TorchFunctionMode
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
_ALTERNATING = ["sliding_attention", "full_attention", "sliding_attention"]


@dataclass(frozen=True)
class Recipe:
    """How to build one architecture.

    Attributes:
        name: of the transformers classes, without ``Config`` or ``ForCausalLM``.
        settings: on top of the shared sizes; ``"unset"`` removes one.
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
    "olmo2_ungrouped": Recipe("Olmo2", {"head_dim": "unset", "num_key_value_heads": 6}),
    "phi3": Recipe("Phi3", {"head_dim": "unset", "sliding_window": WINDOW}),
}


# -- an independent reading ----------------------------------------------------------------------


class _Frozen(TorchFunctionMode):
    """Cuts the gradient through attention weights and norm scales, wherever they arise.

    Attributes:
        scores: by layer, ``[head, query, key]`` before any soft-cap and softmax.
    """

    def __init__(self, soft_cap: float | None = None) -> None:
        super().__init__()
        self.soft_cap = soft_cap
        self.scores: list[torch.Tensor] = []
        self._before_cap: torch.Tensor | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "tanh" and args[0].ndim == 4 and self.soft_cap is not None:
            self._before_cap = args[0] * self.soft_cap
        if name == "softmax" and args[0].ndim == 4:
            self.scores.append((args[0] if self._before_cap is None else self._before_cap)[0])
        if name == "layer_norm":
            x, weight, bias, eps = args[0], kwargs["weight"], kwargs["bias"], kwargs["eps"]
            centred = x - x.mean(-1, keepdim=True)
            scale = (centred.square().mean(-1, keepdim=True) + eps).sqrt().detach()
            return centred / scale * weight + bias
        out = func(*args, **kwargs)
        return out.detach() if name in ("softmax", "rsqrt") else out


class FrozenAutograd:
    """Direct edges of a Hugging Face model by autograd, without anything of the package.

    Every writer is multiplied by a leaf that stands at 1 and enters through the model's own output
    projections and post-norms; what blocks compute from the stream is cut off, so that a derivative
    with respect to a leaf is the direct edge of its writer.

    Args:
        model: in float64; saes: one sae_lens SAE for every layer; tokens: one prompt.
    """

    def __init__(self, model: Any, saes: list[Any], tokens: list[int]) -> None:
        self.saes, self.n = saes, len(tokens)
        self.n_heads = model.config.num_attention_heads
        self.leaves: dict[str, torch.Tensor] = {}  # name -> [position] or [position, feature]
        self.z: list[torch.Tensor] = []
        blocks: Any = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList))
        learned = [m for m in model.modules() if isinstance(m, torch.nn.Embedding)]
        handles = [
            module.register_forward_hook(self._scaled(name))
            for name, module in zip(("embed", "pos"), learned, strict=False)
        ]
        for layer, block in enumerate(blocks):
            attention = next(
                m for n, m in block.named_children() if "attn" in n or n == "attention"
            )
            names = ("c_proj", "dense", "out_proj", "o_proj")
            projection = next(m for n, m in attention.named_children() if n in names)
            handles += [
                projection.register_forward_pre_hook(self._rebuilt(layer)),
                projection.register_forward_hook(self._biased(layer)),
                block.mlp.register_forward_hook(self._scaled(f"mlp:{layer}")),
            ]
        handles.append(model.get_output_embeddings().register_forward_hook(self._keep_logits))
        try:
            cap = getattr(model.config, "attn_logit_softcapping", None)
            with _Frozen(cap) as frozen, torch.enable_grad():
                model(torch.tensor([tokens]), use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        self.scores = frozen.scores

    def _leaf(self, name: str, *shape: int) -> torch.Tensor:
        self.leaves[name] = torch.ones(self.n, *shape, dtype=torch.float64, requires_grad=True)
        return self.leaves[name]

    def _scaled(self, name: str) -> Any:
        return lambda _module, _args, out: out.detach() * self._leaf(name)[:, None]

    def _rebuilt(self, layer: int) -> Any:
        def hook(_module: Any, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            sae, z = self.saes[layer], args[0][0]
            self.z.append(z)
            fixed = z.detach()
            features = sae.encode(fixed.reshape(self.n, self.n_heads, -1)).detach()
            W_dec, b_dec = sae.W_dec.detach(), sae.b_dec.detach()
            error = fixed - features @ W_dec - b_dec
            features = features * self._leaf(f"attn:{layer}", features.shape[1])
            bias = self._leaf(f"attn_bias:{layer}")[:, None] * b_dec
            error = error * self._leaf(f"attn_err:{layer}")[:, None]
            return ((features @ W_dec + bias + error)[None], *args[1:])

        return hook

    def _biased(self, layer: int) -> Any:
        def hook(module: Any, _args: Any, out: torch.Tensor) -> torch.Tensor | None:
            if module.bias is None:
                return None
            factor = self.leaves[f"attn_bias:{layer}"][:, None]
            return out - module.bias.detach() + module.bias.detach() * factor

        return hook

    def _keep_logits(self, _module: Any, _args: Any, out: torch.Tensor) -> None:
        self.logits = out[0]

    def leaf(self, node: str) -> tuple[torch.Tensor, tuple[int, ...]]:
        """The leaf tensor of a node id, and where in it the node stands."""
        body, position = node.split("@")
        kind, *numbers = body.split(":")
        if kind == "attn":
            return self.leaves[f"attn:{numbers[0]}"], (int(position), int(numbers[1]))
        return self.leaves[body], (int(position),)

    def edges(self, node: Any, tokens: tuple[int, int]) -> tuple[dict[str, float], float]:
        """In-edges by node id, and the constant, of a feature or a difference of two logits."""
        if node.kind == "attn":
            sae = self.saes[node.layer]
            shifted = self.z[node.layer][node.position] - sae.b_dec
            value = shifted @ sae.W_enc[:, node.feature] + sae.b_enc[node.feature]
        else:
            value = self.logits[node.position, tokens[0]] - self.logits[node.position, tokens[1]]
        gradients = torch.autograd.grad(
            value, list(self.leaves.values()), retain_graph=True, allow_unused=True
        )
        edges = {}
        for name, gradient in zip(self.leaves, gradients, strict=True):
            if gradient is None:
                continue
            for index in gradient.nonzero().tolist():
                feature = "".join(f":{i}" for i in index[1:])
                edges[f"{name}{feature}@{index[0]}"] = float(gradient[tuple(index)])
        return edges, float(value.detach()) - sum(edges.values())


# -- an architecture that nobody knows -----------------------------------------------------------


def made_up_model(dtype: torch.dtype) -> PreTrainedModel:
    """Post-norm after attention only, no norm before it, values interleaved with queries and keys,
    gains that are added to one half, learned positions, biases everywhere."""
    from transformers.modeling_outputs import CausalLMOutput

    width, heads, d_head = 24, 4, 5

    class MadeUpConfig(PretrainedConfig):
        model_type = "made_up"

    class Norm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.eps = nn.Parameter(torch.zeros(width)), 1e-5

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            scale = (x.square().mean(-1, keepdim=True) + self.eps).rsqrt()
            return x * scale * (0.5 + self.weight)

    class Look(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(width, 3 * heads * d_head)
            self.out = nn.Linear(heads * d_head, width)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            split = self.qkv(x).unflatten(-1, (heads, 3, d_head)).transpose(1, 2)
            q, k, v = split.unbind(-2)
            causal = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
            scores = (q @ k.transpose(-1, -2)).masked_fill(~causal, -torch.inf)
            pattern = scores.softmax(-1)
            return self.out((pattern @ v).transpose(1, 2).flatten(-2)), pattern

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.look, self.think = Look(), nn.Sequential(nn.Linear(width, width), nn.Tanh())
            self.after_look, self.before_think = Norm(), Norm()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x + self.after_look(self.look(x)[0])
            return x + self.think(self.before_think(x))

    class MadeUpModel(PreTrainedModel):
        config_class = MadeUpConfig
        _supports_sdpa = True

        def __init__(self, config: MadeUpConfig) -> None:
            super().__init__(config)
            self.words = nn.Embedding(VOCABULARY, width)
            self.places = nn.Embedding(40, width)
            self.trunk = nn.ModuleList([Block(), Block()])
            self.last = Norm()
            self.speak = nn.Linear(width, VOCABULARY)
            self.post_init()

        def forward(self, input_ids: torch.Tensor, **_options: Any) -> CausalLMOutput:
            x = self.words(input_ids) + self.places(torch.arange(input_ids.shape[1])[None])
            for block in self.trunk:
                x = block(x)
            return CausalLMOutput(logits=self.speak(self.last(x)))  # type: ignore[arg-type]

    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "num_hidden_layers": 2,
        "hidden_size": width,
        "num_attention_heads": heads,
        "head_dim": d_head,
        "max_position_embeddings": 40,
        "attn_implementation": "eager",
    }
    model: Any = MadeUpModel(MadeUpConfig(**settings))
    randomize(model, size=0.3)
    return model.to(dtype).eval()
