"""The frozen run: one prompt, with attention patterns and norm scales held constant.

Everything downstream of it is linear. Only plain tensors live here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from sae_attn_plugin.backends.protocol import (
    Backend,
    Capture,
    LayerWeights,
    MlpWeights,
    Norm,
)
from sae_attn_plugin.dictionaries import Dictionary, Encoded
from sae_attn_plugin.errors import InputError


@dataclass(frozen=True)
class FrozenLayer:
    """One layer of a frozen run.

    Attributes:
        weights: in the algebra's dtype.
        pattern: ``[head, query, key]``.
        v: ``[position, n_kv, d_head]``; z: ``[position, head, d_head]``.
        scale: ``[position, 1]``, the frozen scale of the norm before attention.
        post_scale: ``[position, 1]`` of the norm after attention, where there is one.
        dictionary, encoded: the layer's SAE and its features, or None.
        error: what the SAE reads minus its reconstruction: ``[position, head, d_head]`` on z (all
            of z without an SAE), ``[position, d_model]`` on attn_out.
        attn_out: ``[position, d_model]``, what attention adds, where the SAE reads that.
        mlp: the layer's MLP, or None.
    """

    weights: LayerWeights
    pattern: Float[Tensor, "head query key"]
    v: Float[Tensor, "position n_kv d_head"]
    z: Float[Tensor, "position head d_head"]
    scale: Float[Tensor, "position 1"]
    post_scale: Float[Tensor, "position 1"] | None
    dictionary: Dictionary | None
    encoded: Encoded | None
    error: Float[Tensor, "position ..."]
    attn_out: Float[Tensor, "position d_model"] | None = None
    mlp: FrozenMlp | None = None

    @property
    def mlp_out(self) -> Float[Tensor, "position d_model"] | None:
        """What the MLP adds to the residual stream."""
        return None if self.mlp is None else self.mlp.out

    def to_residual(
        self, z: Float[Tensor, "n head d_head"], position: Tensor | slice
    ) -> Float[Tensor, "n d_model"]:
        """What ``z`` adds to the residual stream at ``position``, without b_O."""
        return self.after(z.flatten(-2) @ self.weights.W_O.flatten(0, 1), position)

    def after(
        self, out: Float[Tensor, "n d_model"], position: Tensor | slice
    ) -> Float[Tensor, "n d_model"]:
        """``out`` through the frozen post-norm, where the architecture has one."""
        if self.weights.post_norm is None or self.post_scale is None:
            return out
        return self.weights.post_norm.linear(out, self.post_scale[position])

    def before(self, rows: Float[Tensor, "n d_model"]) -> Float[Tensor, "n d_model"]:
        """Functionals of what attention adds as functionals of the output projection, without the
        scale of the post-norm between."""
        norm = self.weights.post_norm
        return rows if norm is None else norm.before(rows)

    @property
    def post_bias(self) -> Float[Tensor, " d_model"] | None:
        """What the post-norm adds."""
        return None if self.weights.post_norm is None else self.weights.post_norm.bias


@dataclass(frozen=True)
class FrozenMlp:
    """The MLP of one layer of a frozen run.

    Attributes:
        norm: what feeds it; scale: ``[position, 1]``, its frozen scale.
        stream: ``[position, d_model]``, the residual stream that the norm reads.
        post_norm, post_scale: of the norm after the MLP, where there is one.
        out: ``[position, d_model]``, what the MLP adds to the residual stream.
        dictionary, encoded: its transcoder or SAE and the features, or None.
        skip: ``[position, d_model]``, what the transcoder's skip connection adds, or None.
        error: ``[position, d_model]``, what the dictionary misses of ``out``.
    """

    norm: Norm
    scale: Float[Tensor, "position 1"]
    stream: Float[Tensor, "position d_model"]
    post_norm: Norm | None
    post_scale: Float[Tensor, "position 1"] | None
    out: Float[Tensor, "position d_model"]
    dictionary: Dictionary | None = None
    encoded: Encoded | None = None
    skip: Float[Tensor, "position d_model"] | None = None
    error: Float[Tensor, "position d_model"] | None = None

    @property
    def input(self) -> Float[Tensor, "position d_model"]:
        """The normalised stream: what the MLP itself reads."""
        return self.norm.apply(self.stream, self.scale)

    def read(self, dictionary: Dictionary) -> Float[Tensor, "position d_model"]:
        """What a dictionary of this MLP reads."""
        match dictionary.reads:
            case "mlp_out":
                return self.out
            case "mlp_stream":
                return self.stream
            case "mlp_normalised":
                return self.norm.centre(self.stream) / self.scale
            case _:
                return self.input

    def after(
        self, out: Float[Tensor, "n d_model"], position: Tensor | slice
    ) -> Float[Tensor, "n d_model"]:
        """The dictionary's output as it reaches the residual stream, through the frozen post-norm
        where it reconstructs what stands before that."""
        if not self._before_post_norm:
            return out
        assert self.post_norm is not None
        assert self.post_scale is not None
        return self.post_norm.linear(out, self.post_scale[position])

    @property
    def post_bias(self) -> Float[Tensor, " d_model"] | None:
        """What the post-norm adds to the dictionary's output."""
        return self.post_norm.bias if self._before_post_norm and self.post_norm else None

    @property
    def _before_post_norm(self) -> bool:
        return self.dictionary is not None and self.dictionary.writes == "mlp_raw"


def with_dictionary(mlp: FrozenMlp, dictionary: Dictionary) -> FrozenMlp:
    """The MLP with its output split by a transcoder or an SAE."""
    read = mlp.read(dictionary)
    encoded, skip = dictionary.encode(read), dictionary.skip(read)
    mlp = replace(mlp, dictionary=dictionary, encoded=encoded)
    everywhere = slice(None)
    known = mlp.after(dictionary.decode(encoded), everywhere)
    if mlp.post_bias is not None:
        known = known + mlp.post_bias
    if skip is not None:
        skip = mlp.after(skip, everywhere)
        known = known + skip
    return replace(mlp, skip=skip, error=_error(mlp.out, known, dictionary))


def _error(value: Tensor, reconstruction: Tensor, dictionary: Dictionary) -> Tensor:
    """What a dictionary leaves over."""
    error = value - reconstruction
    if not torch.isfinite(error).all():
        raise InputError(
            f"layer {dictionary.layer}, {dictionary.sae_id}: the reconstruction holds NaN or "
            "infinity on this prompt, though none of the parameters does; some are too large"
        )
    return error


@dataclass(frozen=True)
class LinearMlp:
    """An MLP with its activation ratios frozen: linear in its input at every position.

    ``raw = ((x W_in) * ratio) W_out + constant``. Without a gate ``ratio = activation(pre) / pre``;
    with one it is the gate itself.

    Attributes:
        W_in: ``[d_model, d_mlp]``; W_out: ``[d_mlp, d_model]``.
        ratio: ``[position, d_mlp]``; constant: ``[position, d_model]``, what no input carries.
    """

    W_in: Float[Tensor, "d_model d_mlp"]
    W_out: Float[Tensor, "d_mlp d_model"]
    ratio: Float[Tensor, "position d_mlp"]
    constant: Float[Tensor, "position d_model"]


def linearise(mlp: FrozenMlp, weights: MlpWeights) -> LinearMlp:
    """Freeze the activation ratios of an MLP on a prompt."""
    x = mlp.input
    weights = weights.to(x.dtype, x.device)
    pre, ratio = weights.pre(x), weights.gate(x)
    if ratio is None:
        hidden = weights.activation(pre)
        # At a pre-activation of 0 there is no ratio; what the hidden unit then holds is constant.
        live = pre.abs() > torch.finfo(pre.dtype).tiny ** 0.5
        ratio = torch.where(live, hidden / torch.where(live, pre, 1), 0)
    else:
        hidden = ratio * pre
    carried = (pre if weights.b_in is None else pre - weights.b_in) * ratio
    constant = (hidden - carried) @ weights.W_out
    if weights.b_out is not None:
        constant = constant + weights.b_out
    return LinearMlp(weights.W_in, weights.W_out, ratio, constant)


@dataclass(frozen=True)
class FrozenRun:
    """A whole frozen run of one prompt.

    Attributes:
        embed, pos_embed: ``[position, d_model]``; the latter where positions are learned.
        final_norm, final_scale: the norm before the unembedding, and its scale ``[position, 1]``.
        W_U: ``[d_model, d_vocab]``; b_U: ``[d_vocab]`` or None.
        resid_final: ``[position, d_model]``.
        parallel: attention and MLP of a layer read the same stream.
    """

    layers: tuple[FrozenLayer, ...]
    embed: Float[Tensor, "position d_model"]
    pos_embed: Float[Tensor, "position d_model"] | None
    resid_final: Float[Tensor, "position d_model"]
    final_norm: Norm
    final_scale: Float[Tensor, "position 1"]
    W_U: Float[Tensor, "d_model d_vocab"]
    b_U: Float[Tensor, " d_vocab"] | None
    normalization: str
    parallel: bool = False

    @property
    def n_positions(self) -> int:
        return self.embed.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        return self.embed.dtype


@dataclass(frozen=True)
class FrozenResidual:
    """The residual stream at one place of a frozen run, split by an SAE.

    Attributes:
        depth: of what reads the stream there: ``2l + 1`` attention of layer l (the final norm for
            ``l = n_layers``), ``2l + 2`` its MLP.
        stream: ``[position, d_model]``; error: what the SAE does not reconstruct of it.
    """

    depth: int
    dictionary: Dictionary
    encoded: Encoded
    stream: Float[Tensor, "position d_model"]
    error: Float[Tensor, "position d_model"]


def freeze_residuals(
    run: FrozenRun, capture: Capture, dictionaries: Iterable[Dictionary]
) -> dict[int, FrozenResidual]:
    """The stream at the place of every residual dictionary, by the depth of its readers."""
    found = {}
    for dictionary in dictionaries:
        number = dictionary.layer
        if dictionary.kind == "resid_mid":
            mlp = run.layers[number].mlp
            assert mlp is not None
            stream = mlp.stream
        elif number == len(run.layers):
            stream = run.resid_final
        else:
            stream = capture["resid_pre", number][0].to(run.embed)
        encoded = dictionary.encode(stream)
        depth = 2 * number + (2 if dictionary.kind == "resid_mid" else 1)
        error = _error(stream, dictionary.decode(encoded), dictionary)
        found[depth] = FrozenResidual(depth, dictionary, encoded, stream, error)
    return found


def algebra_dtype(model_dtype: torch.dtype) -> torch.dtype:
    """float64 models are attributed in float64, everything else in float32."""
    return torch.float64 if model_dtype == torch.float64 else torch.float32


# Positions that are encoded together: from here on the product costs what its arithmetic costs.
_ENCODE_POSITIONS = 512


class BatchEncoder:
    """Encodes the prompts of a batch some at a time, since a wide dictionary is read from memory in
    full for one position as for many.

    Args:
        capture: the batch; dictionaries: of attention, by layer.
    """

    def __init__(
        self, backend: Backend, capture: Capture, dictionaries: Mapping[int, Dictionary]
    ) -> None:
        self._backend, self._capture, self._dictionaries = backend, capture, dictionaries
        length = capture.tokens.shape[1]
        self._length, self._group = length, max(1, _ENCODE_POSITIONS // length)
        self._known: dict[int, Encoded] = {}
        self._first = -1

    def encoded(self, layer: int, prompt: int) -> Encoded:
        """The features of a layer on one prompt of the batch."""
        first = prompt // self._group * self._group
        if first != self._first:
            self._first, self._known = first, {}
        if layer not in self._known:
            dictionary, g = self._dictionaries[layer], self._backend.geometry
            site = "attn_out" if dictionary.reads == "attn_out" else "z"
            read = self._capture[site, layer][first : first + self._group]
            read = read.to(g.device, algebra_dtype(g.dtype))
            self._known[layer] = dictionary.encode(read.flatten(0, 1))
        start = (prompt - first) * self._length
        return self._known[layer].part(start, start + self._length)


def freeze(
    backend: Backend,
    capture: Capture,
    dictionaries: Mapping[int, Dictionary],
    prompt: int = 0,
    transcoders: Mapping[int, Dictionary] | None = None,
    encoded_as: tuple[BatchEncoder, int] | None = None,
) -> FrozenRun:
    """Freeze one prompt of a capture.

    Args:
        dictionaries: of attention, by layer; transcoders: of MLPs, by layer.
        encoded_as: the encoder of a larger batch, and the prompt's number there.

    Raises:
        InputError: if an activation is NaN or infinite, naming where it arose first.
    """
    g = backend.geometry
    dtype = algebra_dtype(g.dtype)

    def get(name: str, layer: int = -1) -> Tensor:
        value = capture[name, layer][prompt].to(g.device, dtype)
        if not torch.isfinite(value).all():
            where = name if layer < 0 else f"{name} of layer {layer}"
            raise InputError(f"{g.model_name}: {where} holds NaN or infinity on this prompt")
        return value

    layers = []
    for index in range(g.n_layers):
        weights = backend.layer_weights(index).to(dtype, g.device)
        resid_pre, z = get("resid_pre", index), get("z", index)
        dictionary = dictionaries.get(index)
        post = weights.post_norm
        attn_out, encoded, error = None, None, z
        if dictionary is not None:
            if dictionary.reads == "attn_out":
                attn_out = get("attn_out", index)
            read = z if attn_out is None else attn_out
            if encoded_as is None:
                encoded = dictionary.encode(read)
            else:
                encoder, number = encoded_as
                encoded = encoder.encoded(index, number)
            error = _error(read, dictionary.decode(encoded), dictionary)
        layers.append(
            FrozenLayer(
                weights=weights,
                pattern=get("pattern", index),
                v=get("v", index),
                z=z,
                scale=weights.norm.scale(resid_pre),
                post_scale=None if post is None else post.scale(weights.attn_out(z)),
                dictionary=dictionary,
                encoded=encoded,
                error=error,
                attn_out=attn_out,
                mlp=_freeze_mlp(backend, get, index, weights, (transcoders or {}).get(index))
                if g.has_mlp
                else None,
            )
        )
    final_norm = backend.final_norm().to(dtype, g.device)
    resid_final = get("resid_final")
    W_U, b_U = backend.unembed()
    return FrozenRun(
        layers=tuple(layers),
        embed=get("embed"),
        pos_embed=get("pos_embed") if g.learned_positions else None,
        resid_final=resid_final,
        final_norm=final_norm,
        final_scale=final_norm.scale(resid_final),
        W_U=W_U.to(g.device),
        b_U=None if b_U is None else b_U.to(g.device),
        normalization=g.normalization,
        parallel=g.parallel,
    )


def _freeze_mlp(
    backend: Backend,
    get: Callable[[str, int], Tensor],
    layer: int,
    weights: LayerWeights,
    dictionary: Dictionary | None,
) -> FrozenMlp:
    g, norm = backend.geometry, weights.mlp_norm or Norm("none")
    stream, post = get("resid_pre", layer), weights.mlp_post_norm
    if not g.parallel:
        stream = stream + get("attn_out", layer)
    mlp = FrozenMlp(
        norm=norm,
        scale=norm.scale(stream),
        stream=stream,
        post_norm=post,
        post_scale=None if post is None else post.scale(get("mlp_raw", layer)),
        out=get("mlp_out", layer),
    )
    return mlp if dictionary is None else with_dictionary(mlp, dictionary)
