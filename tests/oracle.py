"""An independent reading of a Hugging Face model and its SAEs: plain torch, autograd.

Nothing of the package is used here. The network is run plainly first (which must give the model's
own logits), then again as a sum of writers, each multiplied with a leaf variable that stands at 1,
with attention patterns and norm scales held constant. The derivative of a target with respect to
a writer's leaf is the edge; the target with all leaves at 0 is the constant.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class _Layer:
    """What the plain run saw in one layer."""

    resid_pre: Tensor
    pattern: Tensor  # [head, query, key]
    z: Tensor  # [position, head * d_head]
    attn_out: Tensor
    mlp_out: Tensor


@dataclass
class Oracle:
    """A Hugging Face GPT-2 or Llama on one prompt.

    Args:
        model: the model, in any dtype; the oracle computes in float64.
        saes: sae_lens SAEs by layer.
        tokens: ids of one prompt.
    """

    model: Any
    saes: Mapping[int, Any]
    tokens: list[int]
    layers: list[_Layer] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        c = self.model.config
        self.w = {name: t.detach().double() for name, t in self.model.state_dict().items()}
        self.gpt2 = c.model_type == "gpt2"
        self.n_layers, self.n_heads = c.num_hidden_layers, c.num_attention_heads
        self.d_head = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
        self.n_kv = getattr(c, "num_key_value_heads", None) or c.num_attention_heads
        self.eps = c.layer_norm_epsilon if self.gpt2 else c.rms_norm_eps
        self.n = len(self.tokens)
        with torch.no_grad():
            self._run()

    # -- weights, read anew ----------------------------------------------------------------------

    def _name(self, layer: int, name: str) -> str:
        prefix = "transformer.h" if self.gpt2 else "model.layers"
        return f"{prefix}.{layer}.{name}"

    def _linear(self, x: Tensor, name: str) -> Tensor:
        """GPT-2's Conv1D keeps ``[in, out]``, a Linear ``[out, in]``."""
        weight = self.w[f"{name}.weight"]
        y = x @ (weight if self.gpt2 else weight.T)
        return y + self.w[f"{name}.bias"] if f"{name}.bias" in self.w else y

    def _sigma(self, x: Tensor) -> Tensor:
        if self.gpt2:
            return torch.sqrt(x.var(-1, unbiased=False, keepdim=True) + self.eps)
        return torch.sqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)

    def _norm(self, x: Tensor, name: str, sigma: Tensor) -> Tensor:
        if self.gpt2:
            x = x - x.mean(-1, keepdim=True)
            return x / sigma * self.w[f"{name}.weight"] + self.w[f"{name}.bias"]
        return x / sigma * self.w[f"{name}.weight"]

    def _first_norm(self, layer: int) -> str:
        return self._name(layer, "ln_1" if self.gpt2 else "input_layernorm")

    @property
    def _last_norm(self) -> str:
        return "transformer.ln_f" if self.gpt2 else "model.norm"

    def _values(self, layer: int, x: Tensor) -> Tensor:
        """``[head, position, d_head]``."""
        if self.gpt2:
            width = self.n_heads * self.d_head
            v = self._linear(x, self._name(layer, "attn.c_attn"))[:, 2 * width :]
        else:
            v = self._linear(x, self._name(layer, "self_attn.v_proj"))
        return self._heads(v)

    def _heads(self, flat: Tensor) -> Tensor:
        """``[head, position, d_head]`` with each group's heads side by side."""
        split = torch.stack(torch.split(flat, self.d_head, dim=-1))
        copies = self.n_heads // len(split)
        return torch.stack([split[head // copies] for head in range(self.n_heads)])

    def _pattern(self, layer: int, x: Tensor) -> Tensor:
        q, k = self._queries_and_keys(layer, x)
        scores = q @ k.transpose(-1, -2) / self.d_head**0.5
        mask = torch.ones(self.n, self.n, dtype=torch.bool).tril()
        return scores.masked_fill(~mask, -torch.inf).softmax(-1)

    def _queries_and_keys(self, layer: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """``[head, position, d_head]`` each, rotated."""
        if self.gpt2:
            q, k, _ = self._linear(x, self._name(layer, "attn.c_attn")).chunk(3, dim=-1)
        else:
            q = self._linear(x, self._name(layer, "self_attn.q_proj"))
            k = self._linear(x, self._name(layer, "self_attn.k_proj"))
        q, k = self._heads(q), self._heads(k)
        if not self.gpt2:
            q, k = self._rotate(q), self._rotate(k)
        return q, k

    def _rotate(self, x: Tensor) -> Tensor:
        theta = self.model.config.rope_parameters["rope_theta"]
        # The frequencies are float32 in every Llama.
        power = torch.arange(0, self.d_head, 2, dtype=torch.float32) / self.d_head
        angle = torch.outer(torch.arange(self.n).double(), (1.0 / theta**power).double())
        cos, sin = angle.cos(), angle.sin()
        a, b = x.chunk(2, dim=-1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)

    def _mlp(self, layer: int, x: Tensor) -> Tensor:
        if self.gpt2:
            hidden = self._linear(x, self._name(layer, "mlp.c_fc"))
            hidden = torch.nn.functional.gelu(hidden, approximate="tanh")
            return self._linear(hidden, self._name(layer, "mlp.c_proj"))
        gate = self._linear(x, self._name(layer, "mlp.gate_proj"))
        up = self._linear(x, self._name(layer, "mlp.up_proj"))
        return self._linear(gate * torch.sigmoid(gate) * up, self._name(layer, "mlp.down_proj"))

    @property
    def _projection(self) -> str:
        return "attn.c_proj" if self.gpt2 else "self_attn.o_proj"

    def _out(self, layer: int, z: Tensor) -> Tensor:
        """``z`` through the output projection, without its bias."""
        weight = self.w[self._name(layer, self._projection) + ".weight"]
        return z @ (weight if self.gpt2 else weight.T)

    def _out_bias(self, layer: int) -> Tensor:
        name = self._name(layer, self._projection) + ".bias"
        return self.w[name] if name in self.w else torch.zeros(self.embed.shape[1]).double()

    # -- the plain run ---------------------------------------------------------------------------

    def _run(self) -> None:
        ids = torch.tensor(self.tokens)
        self.embed = self.w["transformer.wte.weight" if self.gpt2 else "model.embed_tokens.weight"][
            ids
        ]
        self.pos = self.w["transformer.wpe.weight"][: self.n] if self.gpt2 else None
        x = self.embed if self.pos is None else self.embed + self.pos
        for layer in range(self.n_layers):
            name = self._first_norm(layer)
            normed = self._norm(x, name, self._sigma(x))
            pattern, values = self._pattern(layer, normed), self._values(layer, normed)
            z = torch.cat(list(pattern @ values), dim=-1)
            attn = self._out(layer, z) + self._out_bias(layer)
            mid = x + attn
            name = self._name(layer, "ln_2" if self.gpt2 else "post_attention_layernorm")
            mlp = self._mlp(layer, self._norm(mid, name, self._sigma(mid)))
            self.layers.append(_Layer(x, pattern, z, attn, mlp))
            x = mid + mlp
        self.resid_final = x
        final = self._norm(x, self._last_norm, self._sigma(x))
        self.logits = final @ self.w["lm_head.weight"].T

    # -- SAEs ------------------------------------------------------------------------------------

    def acts(self, layer: int) -> Tensor:
        """``[position, d_sae]``, by sae_lens' own encode."""
        sae, z = self.saes[layer], self.layers[layer].z
        with torch.no_grad():
            shaped = z.unflatten(-1, (self.n_heads, self.d_head)).to(sae.dtype)
            return sae.encode(shaped if self._reshapes(sae) else shaped.flatten(-2)).double()

    def _reshapes(self, sae: Any) -> bool:
        return sae.cfg.reshape_activations == "hook_z"

    def _frozen_statistics(self, sae: Any, z: Tensor) -> tuple[Tensor, Tensor]:
        """What the SAE's normalisation divides by, and what it multiplies its output with."""
        match sae.cfg.normalize_activations:
            case "layer_norm":
                std = z.std(-1, keepdim=True)
                return std + 1e-5, std
            case "constant_norm_rescale":
                size = z.pow(2).sum(-1, keepdim=True).sqrt() / z.shape[-1] ** 0.5
                return size, size
        return torch.ones_like(z[:, :1]), torch.ones_like(z[:, :1])

    def _pre_activations(self, layer: int, z: Tensor) -> Tensor:
        """``[position, d_sae]`` from a live ``z``, with the statistics of the plain run."""
        sae = self.saes[layer]
        p = {name: t.detach().double() for name, t in sae.state_dict().items()}
        divide, _ = self._frozen_statistics(sae, self.layers[layer].z)
        x = z - z.mean(-1, keepdim=True) if sae.cfg.normalize_activations == "layer_norm" else z
        x = x / divide
        if sae.cfg.apply_b_dec_to_input:
            x = x - p["b_dec"]
        if sae.cfg.architecture() == "gated":
            return x @ (p["W_enc"] * p["r_mag"].exp()) + p["b_mag"]
        pre = x @ p["W_enc"] + p["b_enc"]
        if getattr(sae.cfg, "rescale_acts_by_decoder_norm", False):
            pre = pre * p["W_dec"].norm(dim=-1)
        return pre

    def pre_activations(self, layer: int) -> Tensor:
        """Of the plain run."""
        return self._pre_activations(layer, self.layers[layer].z)

    # -- the frozen network ----------------------------------------------------------------------

    def _leaves(self) -> dict[tuple[str, int], Tensor]:
        """One leaf per writer: ``(kind, layer) -> [position, ...]``, all ones."""
        ones = lambda *shape: torch.ones(*shape, dtype=torch.float64, requires_grad=True)  # noqa: E731
        leaves = {("embed", -1): ones(self.n)}
        if self.pos is not None:
            leaves["pos", -1] = ones(self.n)
        for layer in range(self.n_layers):
            if layer in self.saes:
                leaves["attn", layer] = ones(self.n, self.saes[layer].cfg.d_sae)
                leaves["attn_err", layer] = ones(self.n)
            else:
                leaves["head", layer] = ones(self.n, self.n_heads)
            leaves["attn_bias", layer] = ones(self.n)
            leaves["mlp", layer] = ones(self.n)
        return leaves

    def _attention_writers(self, layer: int, s: Mapping[tuple[str, int], Tensor]) -> Tensor:
        z = self.layers[layer].z
        bias = self._out_bias(layer).expand(self.n, -1)
        if layer not in self.saes:
            split = z.unflatten(-1, (self.n_heads, self.d_head))
            live = (split * s["head", layer][..., None]).flatten(-2)
            return self._out(layer, live) + s["attn_bias", layer][:, None] * bias
        sae, acts = self.saes[layer], self.acts(layer)
        with torch.no_grad():
            shaped = acts.to(sae.dtype)
            error = z - sae.decode(shaped).double().reshape(self.n, -1)
        W_dec, b_dec = sae.W_dec.detach().double(), sae.b_dec.detach().double()
        if getattr(sae.cfg, "rescale_acts_by_decoder_norm", False):
            acts = acts / W_dec.norm(dim=-1)
        _, multiply = self._frozen_statistics(sae, z)
        features = (s["attn", layer] * acts) @ W_dec * multiply
        constant = b_dec * multiply
        if sae.cfg.normalize_activations == "layer_norm":
            constant = constant + z.mean(-1, keepdim=True)
        return (
            self._out(layer, features)
            + s["attn_err", layer][:, None] * self._out(layer, error)
            + s["attn_bias", layer][:, None] * (self._out(layer, constant) + bias)
        )

    def _streams(self, s: Mapping[tuple[str, int], Tensor]) -> list[Tensor]:
        """The residual stream before each layer and at the end, as a sum of scaled writers."""
        x = s["embed", -1][:, None] * self.embed
        if self.pos is not None:
            x = x + s["pos", -1][:, None] * self.pos
        streams = [x]
        for layer, seen in enumerate(self.layers):
            x = x + self._attention_writers(layer, s) + s["mlp", layer][:, None] * seen.mlp_out
            streams.append(x)
        return streams

    def _frozen_pre(self, layer: int, stream: Tensor, heads: Tensor | None = None) -> Tensor:
        """Pre-activations of a layer from a live stream; ``heads [head]`` scales each head."""
        seen = self.layers[layer]
        normed = self._norm(stream, self._first_norm(layer), self._sigma(seen.resid_pre))
        z = seen.pattern @ self._values(layer, normed)
        if heads is not None:
            z = z * heads[:, None, None]
        return self._pre_activations(layer, torch.cat(list(z), dim=-1))

    def _target(self, target: Any, streams: list[Tensor], heads: Tensor | None = None) -> Tensor:
        match target:
            case ("attn", layer, feature, position):
                return self._frozen_pre(layer, streams[layer], heads)[position, feature]
            case ("direction", vector, position):
                final = self._norm(streams[-1], self._last_norm, self._sigma(self.resid_final))
                return final[position] @ vector.double()
            case ("score", layer, head, query, key, side):
                return self._score(layer, head, query, key, side, streams[layer])
            case ("logit", token, position):
                vector = self.w["lm_head.weight"][token]
            case ("logit_diff", correct, wrong, position):
                vector = self.w["lm_head.weight"][correct] - self.w["lm_head.weight"][wrong]
            case _:
                raise ValueError(target)
        return self._target(("direction", vector, position), streams)

    def _score(
        self, layer: int, head: int, query: int, key: int, side: str, stream: Tensor
    ) -> Tensor:
        """A score with one side live and the other as in the plain run; for both, half of each."""
        plain = self.layers[layer].resid_pre
        name, sigma = self._first_norm(layer), self._sigma(plain)
        held_q, held_k = self._queries_and_keys(layer, self._norm(plain, name, sigma))
        q, k = self._queries_and_keys(layer, self._norm(stream, name, sigma))
        by_query = q[head, query] @ held_k[head, key] / self.d_head**0.5
        by_key = held_q[head, query] @ k[head, key] / self.d_head**0.5
        return {"query": by_query, "key": by_key, "both": (by_query + by_key) / 2}[side]

    def _edges(
        self, values: Tensor, leaves: dict[tuple[str, int], Tensor]
    ) -> list[dict[str, float]]:
        """For each of ``values [n]``: its derivative with respect to every leaf, by node id."""
        gradients = torch.autograd.grad(
            values,
            list(leaves.values()),
            torch.eye(len(values), dtype=values.dtype),
            retain_graph=True,
            allow_unused=True,
            is_grads_batched=True,
        )
        edges: list[dict[str, float]] = [{} for _ in values]
        for (kind, layer), gradient in zip(leaves, gradients, strict=True):
            if gradient is None:
                continue
            where = gradient.nonzero()
            numbers = gradient[tuple(where.T)].tolist()
            for (row, *at), weight in zip(where.tolist(), numbers, strict=True):
                match kind:
                    case "embed" | "pos":
                        name = f"{kind}@{at[0]}"
                    case "attn":
                        name = f"attn:{layer}:{at[1]}@{at[0]}"
                    case "head":
                        name = f"head:{layer}.{at[1]}@{at[0]}"
                    case _:
                        name = f"{kind}:{layer}@{at[0]}"
                edges[row][name] = weight
        return edges

    def attribute(self, targets: Mapping[str, Any]) -> dict[str, Row]:
        """Edges, constant and value of every target, by autograd.

        Args:
            targets: by any name: ``("attn", layer, feature, position)``, ``("logit", token,
                position)``, ``("logit_diff", correct, wrong, position)``, ``("direction",
                vector, position)`` or ``("score", layer, head, query, key, side)``.
        """
        leaves = self._leaves()
        streams = self._streams(leaves)
        with torch.no_grad():
            nothing = self._streams({key: torch.zeros_like(leaf) for key, leaf in leaves.items()})
        live = {layer: self._frozen_pre(layer, streams[layer]) for layer in self.saes}
        empty = {layer: self._frozen_pre(layer, nothing[layer]).detach() for layer in self.saes}
        values, constants = [], []
        for target in targets.values():
            if target[0] == "attn":
                _, layer, feature, position = target
                values.append(live[layer][position, feature])
                constants.append(float(empty[layer][position, feature]))
            else:
                values.append(self._target(target, streams))
                constants.append(float(self._target(target, nothing)))
        edges = self._edges(torch.stack(values), leaves)
        return {
            name: Row(edges[i], constants[i], float(values[i].detach()))
            for i, name in enumerate(targets)
        }

    def edges_by_head(self, target: tuple[str, int, int, int]) -> dict[tuple[str, int], float]:
        """Edges into a feature by source and head: the derivative of what each head carries."""
        leaves = self._leaves()
        streams = self._streams(leaves)
        only = torch.eye(self.n_heads, dtype=torch.float64)
        values = torch.stack([self._target(target, streams, one) for one in only])
        return {
            (name, head): weight
            for head, edges in enumerate(self._edges(values, leaves))
            for name, weight in edges.items()
        }


@dataclass(frozen=True)
class Row:
    """One target: ``sum(edges) + constant == value``."""

    edges: dict[str, float]
    constant: float
    value: float
