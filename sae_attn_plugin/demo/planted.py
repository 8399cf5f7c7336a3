"""Circuits hidden in random transformers: how much noise does it take until they are not found?

A seeded generator draws a graph of features, builds a GPT-2 and its attention-z SAEs that compute
exactly it, turns every space by a random rotation, and then adds noise to every weight. Without
noise the attribution graph is the drawn one, weights included; with noise, precision and recall of
what is found tell when attribution stops finding what is there.

*What is drawn.* ``width`` features in each of ``depth`` layers, one per head. From each position a
head looks at one position up to it, drawn at random. Features of layer 0 read the token there, with
a random weight for each token of the vocabulary; later ones read ``parents`` features of earlier
layers, at least one of them of the layer before; a logit at the last position reads ``parents``
features of the last layer.

*How it is hidden.* Tokens, positions and features have orthonormal directions in the residual
stream, drawn at random; within a head, queries and keys, and z, are turned by random rotations. The
SAEs hold all directions of z in random order, the drawn features among them.

*What noise is.* Every weight matrix (embeddings, queries, keys, values, output projections,
unembedding, encoders and decoders) gets independent Gaussian noise of ``noise`` times the root mean
square of its entries; the MLPs, which write nothing in the drawn circuit, get random weights whose
output has about ``noise`` times the norm of the embeddings.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm

from sae_attn_plugin.demo.circuits import Comparison, reached
from sae_attn_plugin.errors import InputError
from sae_attn_plugin.nodes import Logit

if TYPE_CHECKING:
    from sae_attn_plugin.attribution.table import Attribution
    from sae_attn_plugin.lens import FeatureLens

__all__ = ["LEAST_SHARE", "Planted", "plant", "recovery"]

LEAST_SHARE = 0.05  # of a target's |in-edges|: an edge below is not counted as found
_EPSILON = 1e-5  # of every norm
_GAP = 30.0  # by which the score of the position looked at is ahead
_VOCABULARY = 8
_THRESHOLD = 1e-3  # of a feature; what rounding leaves of silent ones is far below


@dataclass(frozen=True, eq=False)
class Planted:
    """A random transformer with a known circuit in it.

    Attributes:
        model: a Hugging Face GPT-2; saes: one per layer, on ``hook_z``.
        tokens: the prompt; target: what the graph explains.
        edges: the circuit without noise, weight by ``(source, target)`` node ids.
        noise, seed: as given.
    """

    model: Any
    saes: tuple[Any, ...]
    tokens: tuple[int, ...]
    target: Logit
    edges: Mapping[tuple[str, str], float]
    noise: float
    seed: int

    def lens(self) -> FeatureLens:
        """The model on a ``HookedTransformer``."""
        from sae_attn_plugin.backends.loading import to_hooked_transformer
        from sae_attn_plugin.lens import FeatureLens

        return FeatureLens(to_hooked_transformer(self.model), self.saes)

    def found(
        self, attribution: Attribution, least_share: float = LEAST_SHARE
    ) -> dict[tuple[str, str], float]:
        """Edges with at least this share of their target's |in-edges|, from the target down."""
        return reached(attribution, attribution.edges["share"] >= least_share)

    def compare(self, attribution: Attribution, least_share: float = LEAST_SHARE) -> Comparison:
        """What is found beside what is there."""
        return Comparison.of(self.found(attribution, least_share), self.edges)


def plant(
    seed: int,
    *,
    depth: int = 3,
    width: int = 4,
    parents: int = 2,
    noise: float = 0.0,
    length: int = 8,
    dtype: torch.dtype = torch.float32,
) -> Planted:
    """Draw a circuit and hide it in a random transformer.

    Args:
        seed: of everything; the same circuit at every noise.
        depth: layers. width: heads, and features, per layer. parents: of each feature.
        noise: relative size of the noise on every weight.
        length: tokens of the prompt.

    Raises:
        InputError: sizes that make no circuit.
    """
    sizes = {"depth": depth, "width": width, "parents": parents, "length": length}
    if wrong := [name for name, value in sizes.items() if value < 1] or parents > width:
        raise InputError(
            f"plant: expected sizes of at least 1 and parents of at most width, got {sizes}"
            + (f" ({', '.join(wrong)})" if isinstance(wrong, list) else "")
        )
    if not noise >= 0:
        raise InputError(f"plant(noise={noise}): expected at least 0")
    rng = np.random.default_rng([seed, 0])
    drawn = _draw(rng, depth, width, parents, length)
    weights = _weights(rng, drawn)
    _disturb(np.random.default_rng([seed, 1]), weights, noise)
    return Planted(
        model=_model(drawn, weights, dtype),
        saes=tuple(_sae(drawn, weights, layer, dtype) for layer in range(depth)),
        tokens=tuple(drawn.tokens.tolist()),
        target=Logit(0, length - 1),
        edges=drawn.edges,
        noise=noise,
        seed=seed,
    )


def recovery(
    noises: Iterable[float],
    seeds: Iterable[int] = range(10),
    *,
    least_share: float = LEAST_SHARE,
    progress: bool | None = None,
    **sizes: int,
) -> pd.DataFrame:
    """Precision and recall of planted edges: one row per noise and seed, ``noise, seed, edges,
    precision, recall``.

    Args:
        sizes: of :func:`plant`: depth, width, parents, length.
    """
    cases = [(noise, seed) for noise in noises for seed in seeds]
    disable = None if progress is None else not progress
    rows = []
    for noise, seed in tqdm(cases, desc="planting", disable=disable, leave=False):
        planted = plant(seed, noise=noise, **sizes)  # type: ignore[arg-type]
        run = planted.lens().run([list(planted.tokens)])
        one = planted.compare(run.attribute(planted.target, node_budget=None), least_share)
        rows.append((noise, seed, len(planted.edges), one.precision, one.recall))
    return pd.DataFrame(rows, columns=pd.Index(["noise", "seed", "edges", "precision", "recall"]))


# -- drawing -------------------------------------------------------------------------------------

_Part = tuple[int, int]  # layer and feature; (-1, t) is the token t


@dataclass
class _Drawn:
    """A circuit: who reads whom from where, with which weight, and the numbers that follow."""

    depth: int
    width: int
    d_head: int
    tokens: np.ndarray
    source: np.ndarray  # [layer, head, position]
    reads: dict[_Part, dict[_Part, float]]
    unembed: dict[_Part, float]
    sharpness: list[float]
    feature: np.ndarray  # [layer, head], its number in the SAE
    edges: dict[tuple[str, str], float]

    @property
    def d_model(self) -> int:
        return self.width * self.d_head


def _draw(rng: np.random.Generator, depth: int, width: int, parents: int, length: int) -> _Drawn:
    directions = 1 + _VOCABULARY + length + depth * width  # and that of the mean
    d_head = max(length, math.ceil(directions / width), 16)
    d_model = width * d_head
    tokens = rng.integers(1, _VOCABULARY, length)
    source = np.stack(
        [[[rng.integers(q + 1) for q in range(length)] for _ in range(width)] for _ in range(depth)]
    )
    feature = np.stack([rng.permutation(d_model)[:width] for _ in range(depth)])
    content: list[dict[_Part, float]] = [{(-1, int(t)): 1.0} for t in tokens]
    reads: dict[_Part, dict[_Part, float]] = {}
    into: dict[str, dict[str, float]] = {}
    sharpness = []

    def scales() -> list[float]:
        # the position's own direction is one more coordinate of size 1
        sums = [1 + sum(v * v for v in at.values()) for at in content]
        return [math.sqrt(total / d_model + _EPSILON) for total in sums]

    def node(part: _Part, position: int) -> str:
        layer, index = part
        return (
            f"embed@{position}" if layer < 0 else f"attn:{layer}:{feature[layer, index]}@{position}"
        )

    for layer in range(depth):
        scale = scales()
        sharpness.append(_GAP * max(scale) ** 2 * math.sqrt(d_head))
        written: list[dict[_Part, float]] = [{} for _ in tokens]
        for head in range(width):
            if layer == 0:
                chosen: list[_Part] = [(-1, t) for t in range(_VOCABULARY)]
            else:
                pool = [(m, i) for m in range(layer) for i in range(width)]
                first = (layer - 1, int(rng.integers(width)))
                pool.remove(first)
                rest = rng.permutation(len(pool))[: parents - 1]
                chosen = [first, *(pool[i] for i in rest)]
            count = 1 if layer == 0 else parents
            size = math.sqrt((2 + layer * width) / d_model) / count
            reads[layer, head] = {part: size * rng.uniform(0.5, 1.5) for part in chosen}
            for q in range(len(tokens)):
                p = int(source[layer, head, q])
                inward = {
                    node(part, p): weight * content[p][part] / scale[p]
                    for part, weight in reads[layer, head].items()
                    if part in content[p]
                }
                into[node((layer, head), q)] = inward
                written[q][layer, head] = sum(inward.values())
        for q, more in enumerate(written):
            content[q] |= more
    last, scale = length - 1, scales()
    chosen = [(depth - 1, int(i)) for i in rng.permutation(width)[:parents]]
    unembed = {part: rng.uniform(0.5, 1.5) for part in chosen}
    root = f"logit:#0@{last}"
    into[root] = {
        node(part, last): u * content[last][part] / scale[last] for part, u in unembed.items()
    }
    edges: dict[tuple[str, str], float] = {}
    pending = [root]
    while pending:
        target = pending.pop()
        for name, weight in into.pop(target, {}).items():
            edges[name, target] = weight
            pending.append(name)
    return _Drawn(depth, width, d_head, tokens, source, reads, unembed, sharpness, feature, edges)


# -- building ------------------------------------------------------------------------------------


def _rotation(rng: np.random.Generator, n: int) -> np.ndarray:
    """A random orthonormal basis, as rows."""
    q, r = np.linalg.qr(rng.standard_normal((n, n)))
    return (q * np.sign(np.diag(r))).T


def _weights(rng: np.random.Generator, drawn: _Drawn) -> dict[str, np.ndarray]:
    """Every matrix of model and SAEs without noise, by name."""
    d, e, width = drawn.d_model, drawn.d_head, drawn.width
    length = len(drawn.tokens)
    # Directions are orthogonal to (1, ..., 1), so that LayerNorm has nothing to centre.
    mixed = np.concatenate([np.ones((d, 1)), rng.standard_normal((d, d - 1))], axis=1)
    basis = np.linalg.qr(mixed)[0].T[1:]
    basis = basis[rng.permutation(d - 1)]
    token, place = basis[:_VOCABULARY], basis[_VOCABULARY : _VOCABULARY + length]
    rest = iter(basis[_VOCABULARY + length :])
    direction: dict[_Part, np.ndarray] = {(-1, t): token[t] for t in range(_VOCABULARY)}
    direction |= {(m, i): next(rest) for m in range(drawn.depth) for i in range(width)}
    weights = {"embed": token.copy(), "pos": place.copy()}
    for layer in range(drawn.depth):
        parts: dict[str, list[np.ndarray]] = {name: [] for name in "qkvo"}
        turned = [_rotation(rng, e) for _ in range(width)]
        for head in range(width):
            codes = _rotation(rng, e)[:length] * math.sqrt(drawn.sharpness[layer])
            wanted = codes[drawn.source[layer, head]]
            read = sum(w * direction[part] for part, w in drawn.reads[layer, head].items())
            parts["q"].append(place.T @ wanted)
            parts["k"].append(place.T @ codes)
            parts["v"].append(np.outer(read, turned[head][0]))
            parts["o"].append(np.outer(turned[head][0], direction[layer, head]))
        for name in "qkv":
            weights[f"{name}{layer}"] = np.concatenate(parts[name], axis=1)
        weights[f"o{layer}"] = np.concatenate(parts["o"], axis=0)
        # All directions of z, with the drawn ones at their numbers and the others anywhere.
        rows = np.zeros((d, d))
        others = [n for n in rng.permutation(d) if n not in drawn.feature[layer]]
        for head in range(width):
            own = slice(head * e, (head + 1) * e)
            rows[drawn.feature[layer, head], own] = turned[head][0]
            for row in turned[head][1:]:
                rows[others.pop(), own] = row
        weights[f"enc{layer}"], weights[f"dec{layer}"] = rows.T.copy(), rows.copy()
    unembed = np.zeros((d, _VOCABULARY))
    unembed[:, 0] = sum(u * direction[part] for part, u in drawn.unembed.items())
    weights["unembed"] = unembed
    return weights


def _disturb(rng: np.random.Generator, weights: dict[str, np.ndarray], noise: float) -> None:
    """Noise on every matrix, and random MLPs."""
    for name, matrix in weights.items():
        size = noise * math.sqrt(float((matrix**2).mean()))
        weights[name] = matrix + size * rng.standard_normal(matrix.shape)
    d = weights["unembed"].shape[0]
    for layer in range(sum(name.startswith("o") for name in weights)):
        weights[f"in{layer}"] = rng.standard_normal((d, 4 * d)) / math.sqrt(d)
        # The norm of what goes in is sqrt(d), so hidden units are about gelu(N(0, 1)): 0.65 rms.
        size = noise * math.sqrt(2) / (0.65 * math.sqrt(4 * d) * math.sqrt(d))
        weights[f"out{layer}"] = size * rng.standard_normal((4 * d, d))


def _model(drawn: _Drawn, weights: Mapping[str, np.ndarray], dtype: torch.dtype) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    config: Any = GPT2Config(
        vocab_size=_VOCABULARY,
        n_positions=len(drawn.tokens),
        n_embd=drawn.d_model,
        n_layer=drawn.depth,
        n_head=drawn.width,
        layer_norm_epsilon=_EPSILON,
        tie_word_embeddings=False,
        attn_implementation="eager",  # pyright: ignore[reportCallIssue]
        bos_token_id=0,
        eos_token_id=0,
    )
    model: Any = GPT2LMHeadModel(config)
    model = model.to(dtype).eval()

    def put(parameter: Tensor, value: np.ndarray) -> None:
        parameter.copy_(torch.from_numpy(value))

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "ln_" not in name:
                parameter.zero_()
        put(model.transformer.wte.weight, weights["embed"])
        put(model.transformer.wpe.weight, weights["pos"])
        put(model.lm_head.weight, weights["unembed"].T)
        for layer, block in enumerate(model.transformer.h):
            qkv = np.concatenate([weights[f"{name}{layer}"] for name in "qkv"], axis=1)
            put(block.attn.c_attn.weight, qkv)
            put(block.attn.c_proj.weight, weights[f"o{layer}"])
            put(block.mlp.c_fc.weight, weights[f"in{layer}"])
            put(block.mlp.c_proj.weight, weights[f"out{layer}"])
    return model


def _sae(drawn: _Drawn, weights: Mapping[str, np.ndarray], layer: int, dtype: torch.dtype) -> Any:
    from sae_lens.saes.jumprelu_sae import JumpReLUSAE, JumpReLUSAEConfig
    from sae_lens.saes.sae import SAEMetadata

    d = drawn.d_model
    metadata = SAEMetadata(
        model_name="planted",
        hook_name=f"blocks.{layer}.attn.hook_z",
        prepend_bos=False,
        n_heads=drawn.width,
        d_head=drawn.d_head,
    )
    config = JumpReLUSAEConfig(
        d_in=d,
        d_sae=d,
        dtype=str(dtype).removeprefix("torch."),
        device="cpu",
        apply_b_dec_to_input=False,
        normalize_activations="none",
        reshape_activations="hook_z",
        metadata=metadata,
    )
    sae = JumpReLUSAE(config)
    with torch.no_grad():
        sae.W_enc.copy_(torch.from_numpy(weights[f"enc{layer}"]))
        sae.W_dec.copy_(torch.from_numpy(weights[f"dec{layer}"]))
        sae.b_enc.zero_()
        sae.b_dec.zero_()
        sae.threshold.fill_(_THRESHOLD)
    return sae
