"""What a layer's attention scores are made of, as plain tensors, and where each host keeps it.

Rotary angles are never computed here: they are taken from the host's own rotary module, so that
every variant it has (scaled, YaRN, LongRoPE, dynamic NTK) gives the numbers it gives in the model.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from sae_attn_plugin.backends.architectures import (
    Architecture,
    WeightSource,
    read_matrix,
    read_norm,
)
from sae_attn_plugin.backends.protocol import Backend, Geometry, Norm
from sae_attn_plugin.backends.walk import submodule
from sae_attn_plugin.errors import BackendError, UnsupportedError


@dataclass(frozen=True)
class Rotary:
    """Rotary positions of one layer: ``rotate(x) = x * cos + J(x) * sin`` on the first dimensions.

    Attributes:
        cos, sin: ``[position, rotary_dim]``, as the host computes them for these positions.
        adjacent: ``J`` pairs dimensions ``(0, 1), (2, 3), ...`` (GPT-J) instead of the halves.
    """

    cos: Float[Tensor, "position rotary_dim"]
    sin: Float[Tensor, "position rotary_dim"]
    adjacent: bool = False

    def rotate(self, x: Float[Tensor, "... d_head"], position: Tensor | int) -> Tensor:
        """``x`` at ``position``, which broadcasts against all but the last axis of ``x``."""
        cos, sin = self.cos[position], self.sin[position]
        turned, passed = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
        return torch.cat([turned * cos + self._swap(turned) * sin, passed], dim=-1)

    def rotate_back(self, x: Float[Tensor, "... d_head"], position: Tensor | int) -> Tensor:
        """The transpose of :meth:`rotate` (its inverse too, where the angles are not scaled)."""
        cos, sin = self.cos[position], self.sin[position]
        turned, passed = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
        return torch.cat([turned * cos - self._swap(turned * sin), passed], dim=-1)

    def _swap(self, x: Tensor) -> Tensor:
        if self.adjacent:
            return torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2)
        first, second = x.chunk(2, dim=-1)
        return torch.cat([-second, first], dim=-1)


@dataclass(frozen=True)
class ScoreWeights:
    """One layer's queries, keys and what turns their product into a score.

    ``score[h, q, p] = scale * rotate(N_q(x_q W_Q + b_Q)) . rotate(N_k(x_p W_K + b_K))``, then
    ``soft_cap * tanh(score / soft_cap)`` where there is a cap, then ``+ slope[h] * (p - q)`` where
    there is ALiBi; x is the normalised residual stream.

    Attributes:
        W_Q: ``[n_heads, d_model, d_head]``; b_Q: ``[n_heads, d_head]``.
        W_K: ``[n_kv, d_model, d_head]``; b_K: ``[n_kv, d_head]``.
        scale: what multiplies the dot product.
        q_norm, k_norm: norms of queries and keys, or None. A weight of ``[d_head]`` acts on each
            head by itself (Qwen3, Gemma 3), a longer one on all heads together (OLMo-2).
        rotary: None where positions are learned or biased.
        soft_cap: ``c`` where the model uses ``c * tanh(score / c)``.
        alibi_slopes: ``[n_heads]`` or None.
        rope: what the host calls its rotary variant, for messages.
    """

    W_Q: Float[Tensor, "n_heads d_model d_head"]
    b_Q: Float[Tensor, "n_heads d_head"]
    W_K: Float[Tensor, "n_kv d_model d_head"]
    b_K: Float[Tensor, "n_kv d_head"]
    scale: float
    q_norm: Norm | None = None
    k_norm: Norm | None = None
    rotary: Rotary | None = None
    soft_cap: float | None = None
    alibi_slopes: Float[Tensor, " n_heads"] | None = None
    rope: str = "default"

    def to(self, dtype: torch.dtype, device: torch.device | None = None) -> ScoreWeights:
        changed: dict[str, Any] = {}
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                changed[name] = value.to(device, dtype)
            elif isinstance(value, Norm):
                changed[name] = value.to(dtype, device)
            elif isinstance(value, Rotary):
                cos, sin = value.cos.to(device, dtype), value.sin.to(device, dtype)
                changed[name] = Rotary(cos, sin, value.adjacent)
        return replace(self, **changed)

    def queries(
        self, x: Float[Tensor, "... position d_model"], scale: Tensor | None = None
    ) -> tuple[Float[Tensor, "... position head d_head"], Tensor | None]:
        """Queries, normalised and rotated, and the scale of their own norm, if they have one.

        Args:
            x: the normalised residual stream. scale: of that norm, where it is held.
        """
        return self._finish(x, self.W_Q, self.b_Q, self.q_norm, scale)

    def keys(
        self, x: Float[Tensor, "... position d_model"], scale: Tensor | None = None
    ) -> tuple[Float[Tensor, "... position n_kv d_head"], Tensor | None]:
        """The same of keys."""
        return self._finish(x, self.W_K, self.b_K, self.k_norm, scale)

    def _finish(
        self, x: Tensor, W: Tensor, b: Tensor, norm: Norm | None, scale: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        out = torch.einsum("...pd,hde->...phe", x, W) + b
        if norm is not None:
            # a weight for all heads is one of them together
            whole = norm.weight is not None and len(norm.weight) != out.shape[-1]
            flat = out.flatten(-2) if whole else out
            if scale is None:
                scale = norm.scale(flat).unsqueeze(-2) if whole else norm.scale(flat)
            flat = norm.apply(flat, scale.squeeze(-2) if whole else scale)
            out = flat.unflatten(-1, out.shape[-2:]) if whole else flat
        if self.rotary is not None:
            out = self.rotary.rotate(out, torch.arange(x.shape[-2], device=x.device)[:, None])
        return out, None if norm is None else scale

    def capped(self, score: Tensor) -> Tensor:
        """Scores as the soft-cap leaves them."""
        return score if self.soft_cap is None else self.soft_cap * (score / self.soft_cap).tanh()

    def scores(
        self,
        q: Float[Tensor, "... query head d_head"],
        k: Float[Tensor, "... key head d_head"],
    ) -> Float[Tensor, "... head query key"]:
        """Scores before any soft-cap, with ALiBi's bias where there is one, of masked keys too."""
        at = torch.arange(q.shape[-3], device=q.device)
        found = self.scale * torch.einsum("...qhe,...khe->...hqk", q, k)
        return found + self.alibi(at[:, None], at)

    def alibi(
        self, query: Tensor | int, key: Tensor | int, head: int | slice = slice(None)
    ) -> Float[Tensor, ...]:
        """ALiBi's bias, heads first; a zero where there is none."""
        if self.alibi_slopes is None:
            return self.W_Q.new_zeros(())
        slopes, distance = self.alibi_slopes[head], torch.as_tensor(key - query)
        return slopes.reshape(*slopes.shape, *[1] * distance.ndim) * distance.to(slopes.device)

    def pattern(
        self,
        q: Float[Tensor, "... query d_head"],
        k: Float[Tensor, "... key d_head"],
        head: int,
        visible: Bool[Tensor, "... query key"],
    ) -> Float[Tensor, "... query key"]:
        """Attention weights of one head from its queries and keys."""
        scores = self.capped(self.scale * (q @ k.transpose(-1, -2)))
        at = torch.arange(q.shape[-2], device=q.device)
        scores = scores + self.alibi(at[:, None], at, head)
        return scores.masked_fill(~visible, -torch.inf).softmax(-1)


def need_scores(backend: Backend, layer: int, n_positions: int) -> ScoreWeights:
    """The score weights of a layer from a host that has them.

    Raises:
        UnsupportedError: it has none.
    """
    if not hasattr(backend, "score_weights"):
        raise UnsupportedError(
            f"the backend {backend.host!r} gives no queries and keys: it has no "
            "score_weights(layer, n_positions)"
        )
    return backend.score_weights(layer, n_positions)


def check_weights(
    got: Tensor,
    pattern: Tensor,
    largest: float,
    weights: ScoreWeights,
    model_dtype: torch.dtype,
    who: str,
) -> None:
    """Check that scores give a model's attention pattern.

    Args:
        got: attention weights from the scores; pattern: the model's, over the same keys.
        largest: score. who: model, host, layer and position, for the message.

    Raises:
        BackendError: they do not: some part of this model's scores is not known here.
    """
    # Attention sinks leave rows that sum to less than 1; where they look is the same.
    expected = pattern / pattern.sum(-1, keepdim=True).clamp_min(1e-30)
    error = float((got - expected).abs().max())
    # What rounding a score costs: a difference in the score is at most that in the pattern.
    allowed = 1e-3 + 4 * torch.finfo(model_dtype).eps * largest
    if not error <= allowed:
        raise BackendError(
            f"{who}: the scores do not give the model's attention pattern (largest difference "
            f"{error:.3g}, allowed {allowed:.3g}), so they are not used. Read here: rotary "
            f"positions {'none' if weights.rotary is None else repr(weights.rope)}, "
            f"scale {weights.scale:.6g}, soft-cap {weights.soft_cap}, norms of queries and keys "
            f"{'yes' if weights.q_norm is not None else 'no'}. If the architecture does something "
            "else, describe it with sap.register_architecture(...)"
        )


def need_plain_norm(norm: Norm, who: str) -> Norm:
    """Refuse a norm of queries or keys that is no RMSNorm."""
    if norm.kind != "rms":
        raise UnsupportedError(
            f"{who}: queries and keys go through a {norm.kind!r} norm; known: rms"
        )
    return norm


# -- Hugging Face --------------------------------------------------------------------------------


def read_scores(
    model: nn.Module,
    architecture: Architecture,
    geometry: Geometry,
    layer: int,
    n_positions: int,
    source: WeightSource | None = None,
) -> ScoreWeights:
    """The score weights of one layer of a Hugging Face model, for a prompt of ``n_positions``."""
    W_Q, b_Q, W_K, b_K = _projections(model, architecture, geometry, layer, source)
    return ScoreWeights(
        W_Q=W_Q,
        b_Q=b_Q,
        W_K=W_K,
        b_K=b_K,
        **read_score_parts(model, architecture, geometry, layer, n_positions, source),
    )


def read_score_parts(
    model: nn.Module,
    architecture: Architecture,
    geometry: Geometry,
    layer: int,
    n_positions: int,
    source: WeightSource | None = None,
) -> dict[str, Any]:
    """Everything of :class:`ScoreWeights` but the projections."""
    row, config = architecture, getattr(model, "config", None)
    attention = _original(submodule(model, f"{row.blocks}.{layer}.{row.attention}"))
    norms = {}
    for name, path in (("q_norm", row.q_norm), ("k_norm", row.k_norm)):
        if path is not None:
            module = _original(_find(model, row, f"{row.blocks}.{layer}.{path}"))
            norms[name] = need_plain_norm(read_norm(module, row, source), row.model_type)
    return {
        "scale": _scale(attention, row),
        "soft_cap": (getattr(config, row.score_soft_cap, None) or None)
        if row.score_soft_cap is not None
        else None,
        "rotary": _rotary(model, row, geometry, layer, n_positions, source is not None),
        "rope": rope_type(config, layer),
        **norms,
    }


def score_modules(architecture: Architecture, layer: int) -> list[str]:
    """Paths of the modules whose weights :func:`read_scores` reads."""
    row = architecture
    inside = (*_projection_paths(row), row.q_norm, row.k_norm)
    return [f"{row.blocks}.{layer}.{path}" for path in dict.fromkeys(inside) if path is not None]


def rope_type(config: Any, layer: int) -> str:
    """What a configuration calls the rotary variant of a layer."""
    rope = getattr(config, "rope_parameters", None) or {}
    types = getattr(config, "layer_types", None)
    if types and isinstance(rope.get(types[layer]), dict):
        rope = rope[types[layer]]
    return str(rope.get("rope_type", "default"))


def _projection_paths(row: Architecture) -> tuple[str, str]:
    if row.layout != "separate":
        return row.values, row.values
    if row.queries is None or row.keys is None:
        raise UnsupportedError(
            f"the architecture {row.model_type!r}: its row does not say which modules give queries "
            "and keys; add Architecture(queries=..., keys=...) to read attention scores"
        )
    return row.queries, row.keys


def _projections(
    model: nn.Module,
    row: Architecture,
    g: Geometry,
    layer: int,
    source: WeightSource | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    found = []
    for which, path in enumerate(_projection_paths(row)):
        module = _find(model, row, f"{row.blocks}.{layer}.{path}")
        weight, bias = read_matrix(module, source)
        heads = g.n_kv_heads if which else g.n_heads
        if bias is None:
            bias = weight.new_zeros(weight.shape[1])
        for value in (weight, bias):
            found.append(_select(value, row, g, which, heads))
    W_Q, b_Q, W_K, b_K = found
    return W_Q.transpose(0, 1), b_Q, W_K.transpose(0, 1), b_K


def _select(out: Tensor, row: Architecture, g: Geometry, which: int, heads: int) -> Tensor:
    """Queries (0) or keys (1), ``[..., heads, d_head]``, from the output axis of their module."""
    if row.layout == "interleaved":
        split = out.unflatten(-1, (g.n_kv_heads, 3, g.d_head))
        return split[..., which, :]
    if row.layout == "stacked":
        start = which * g.n_heads * g.d_head
        out = out[..., start : start + heads * g.d_head]
    return out.unflatten(-1, (heads, g.d_head))


def _scale(attention: Any, row: Architecture) -> float:
    if isinstance(row.score_scale, float | int):
        return float(row.score_scale)
    name = row.score_scale.removeprefix("/")
    value = getattr(attention, name, None)
    if not isinstance(value, float | int):
        raise UnsupportedError(
            f"the architecture {row.model_type!r}: {type(attention).__name__} has no number "
            f"{name!r} that scales its scores; say Architecture(score_scale=...): the name of one, "
            "with '/' before it where it divides, or the factor itself"
        )
    return 1 / float(value) if row.score_scale.startswith("/") else float(value)


def _rotary(
    model: nn.Module, row: Architecture, g: Geometry, layer: int, n_positions: int, elsewhere: bool
) -> Rotary | None:
    """Cosines and sines from the host's rotary module (or GPT-J's table)."""
    if row.rotary is None:
        return None
    where: Any = _original(_find(model, row, row.rotary))
    config: Any = model.config
    if isinstance(where, Tensor):  # GPT-J: [position, sines then cosines], one per pair
        if elsewhere:
            from transformers.models.gptj.modeling_gptj import create_sinusoidal_positions

            where = create_sinusoidal_positions(*where.shape)
        sin, cos = (half.repeat_interleave(2, -1) for half in where[:n_positions].chunk(2, -1))
        return Rotary(cos.to(g.device, g.dtype), sin.to(g.device, g.dtype), adjacent=True)
    if elsewhere:  # the model here may hold no buffers either
        where = type(where)(config)
    positions = torch.arange(n_positions, device=g.device)[None]
    like = torch.empty(1, n_positions, 1, dtype=g.dtype, device=g.device)
    extra = {}
    if "layer_type" in inspect.signature(where.forward).parameters:
        extra["layer_type"] = config.layer_types[layer]
    try:
        with torch.no_grad():
            cos, sin = where(like, positions, **extra)
        if cos.shape != sin.shape or cos.shape[:-1] != (1, n_positions):
            raise ValueError(f"shapes {tuple(cos.shape)} and {tuple(sin.shape)}")
        if cos.shape[-1] > g.d_head:
            raise ValueError(f"{cos.shape[-1]} rotary dimensions, but heads have {g.d_head}")
    except (TypeError, ValueError, AttributeError, KeyError, RuntimeError) as error:
        raise UnsupportedError(
            f"the architecture {row.model_type!r}: rotary positions of type "
            f"{rope_type(config, layer)!r} are not known: {type(where).__name__} gave no cosines "
            f"and sines [1, {n_positions}, at most {g.d_head}] for a prompt ({error})"
        ) from error
    return Rotary(cos[0].to(g.device), sin[0].to(g.device), row.rotary_pairs == "adjacent")


def _find(model: nn.Module, row: Architecture, path: str) -> Any:
    try:
        return submodule(model, path)
    except (AttributeError, IndexError, KeyError, TypeError):
        raise UnsupportedError(
            f"the architecture {row.model_type!r}: {type(model).__name__} has no {path!r}, which "
            "its row names for attention scores"
        ) from None


def _original(module: Any) -> Any:
    """The host's own module, inside what a bridge puts around it."""
    inside = getattr(module, "original_component", None)
    return module if inside is None else inside
