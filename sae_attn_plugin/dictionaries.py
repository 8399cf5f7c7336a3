"""sae_lens SAEs and transcoders as the attribution engine sees them: linear maps with a place.

sae_lens objects are read, never attached, moved or changed. Every architecture with a linear
pre-activation is brought to one form (:class:`Dictionary`):

    pre_i = encoder_scale_i * (W_enc[:, i] . (normalise(x) - b_in)) + b_enc_i
    f     = activation(pre)
    y_hat = denormalise(f @ (W_dec * decoder_scale) + b_dec) + x @ W_skip

An SAE reads what it writes. A transcoder reads the MLP's input, writes its output, and does not
denormalise.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_attn_plugin.backends.protocol import Geometry
from sae_attn_plugin.errors import FileError, InputError, UnsupportedError
from sae_attn_plugin.heads import join, only_head
from sae_attn_plugin.nodes import FeatureKind
from sae_attn_plugin.registration import DEMO_RELEASE

__all__ = ["Dictionary", "head_attribution", "load_saes", "place", "place_mlp", "place_residual"]

# Where a dictionary reads and writes. ``mlp_stream`` is the residual stream that the MLP's norm
# reads, ``mlp_normalised`` that stream centred and scaled but without the norm's gain and bias
# (TransformerLens' ln2.hook_normalized), ``mlp_in`` the input of the MLP itself; ``mlp_raw`` is
# the MLP's output before a post-norm, ``mlp_out`` what it adds to the residual stream.
# ``resid_pre`` and ``resid_mid`` are the residual stream before a layer's attention and MLP; before
# layer ``n_layers``, which is not there, stands the final stream.
Reads = Literal[
    "z",
    "attn_out",
    "mlp_stream",
    "mlp_normalised",
    "mlp_in",
    "mlp_out",
    "resid_pre",
    "resid_mid",
]
Writes = Literal["z", "attn_out", "mlp_raw", "mlp_out", "resid_pre", "resid_mid"]

_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")
_ATTENTION_HOOKS: dict[str, Reads] = {
    "attn.hook_z": "z",
    "attn.o.hook_in": "z",
    "hook_z": "z",
    "hook_attn_out": "attn_out",
    "ln1_post.hook_out": "attn_out",
}
_MLP_INPUT_HOOKS: dict[str, Reads] = {
    "hook_resid_mid": "mlp_stream",
    "hook_mlp_in": "mlp_stream",
    "ln2.hook_in": "mlp_stream",
    "ln2.hook_normalized": "mlp_normalised",
    "mlp.hook_in": "mlp_in",
    "ln2.hook_out": "mlp_in",
}
_MLP_OUTPUT_HOOKS: dict[str, Writes] = {
    "hook_mlp_out": "mlp_out",
    "ln2_post.hook_out": "mlp_out",
    "mlp.hook_out": "mlp_raw",
}
_RESIDUAL_HOOKS: dict[str, tuple[Literal["resid_pre", "resid_mid"], int]] = {  # and layers on
    "hook_resid_pre": ("resid_pre", 0),
    "hook_in": ("resid_pre", 0),
    "hook_resid_mid": ("resid_mid", 0),
    "hook_resid_post": ("resid_pre", 1),
    "hook_out": ("resid_pre", 1),
}
_NORMALISATIONS = ("none", "expected_average_only_in", "layer_norm", "constant_norm_rescale")
_LAYER_NORM_EPS = 1e-5  # sae_lens' run_time_activation_ln_in
# Of pre-activations at once: enough for a large product, few enough to stay near the processor.
_ENCODE_BYTES = 24 * 2**20
_TOP_GROUPS = 1024


@dataclass(frozen=True)
class Dictionary:
    """An SAE or transcoder of one layer, with the head geometry of the model.

    Attributes:
        layer: the layer it belongs to.
        n_heads, d_head: of the model; z splits by them, head-major as in ``hook_z.flatten(-2)``.
        W_enc: ``[d_in, d_sae]``, W_dec: ``[d_sae, d_out]``: the SAE's own tensors; ``d_out`` is
            ``d_in`` but for transcoders.
        b_enc: ``[d_sae]``; b_dec: ``[d_out]``; b_in: ``[d_in]`` or None, what is subtracted from
            the input (``b_dec`` where the SAE applies it).
        encoder_scale, decoder_scale: ``[d_sae]`` or None.
        activation: pre-activations ``[n, d_sae]`` and encoder inputs ``[n, d_in]`` to features.
        normalisation: sae_lens' ``normalize_activations``.
        log_density: log10 firing frequency per feature ``[d_sae]``, where known.
        sae_id, metadata: for provenance; source: the sae_lens SAE itself.
        reads, writes: the sites of its input and output.
        W_skip: ``[d_in, d_out]`` of a transcoder with a skip connection, which takes the input
            before any normalisation of the transcoder's own; else None.
        active: a shorter way to what ``activation`` leaves: pre-activations ``[n, d_sae]`` to
            position and feature of what is not zero, sorted by both, where activations are the
            pre-activations themselves.
    """

    layer: int
    n_heads: int
    d_head: int
    architecture: str
    W_enc: Float[Tensor, "d_in d_sae"]
    b_enc: Float[Tensor, " d_sae"]
    W_dec: Float[Tensor, "d_sae d_in"]
    b_dec: Float[Tensor, " d_in"]
    b_in: Float[Tensor, " d_in"] | None
    activation: Callable[[Tensor, Tensor], Tensor] = field(repr=False)
    encoder_scale: Float[Tensor, " d_sae"] | None = None
    decoder_scale: Float[Tensor, " d_sae"] | None = None
    normalisation: str = "none"
    log_density: Float[Tensor, " d_sae"] | None = None
    sae_id: str = ""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    reads: Reads = "z"
    writes: Writes = "z"
    W_skip: Float[Tensor, "d_in d_out"] | None = None
    active: Callable[[Tensor], tuple[Tensor, Tensor]] | None = field(default=None, repr=False)
    source: Any = field(default=None, repr=False, compare=False)

    def __getstate__(self) -> dict[str, Any]:
        # What travels to a remote model is plain data: no object of sae_lens.
        return {**self.__dict__, "source": None, "active": None}

    @property
    def kind(self) -> FeatureKind:
        """Of its features' nodes."""
        if self.writes in ("z", "attn_out"):
            return "attn"
        if self.writes in ("resid_pre", "resid_mid"):
            return "resid" if self.writes == "resid_pre" else "resid_mid"
        return "mlp_sae" if self.reads == self.writes else "tc"

    @property
    def hook(self) -> str:
        """Where it belongs, in words."""
        if self.kind == "tc":
            return f"transcoders from {self.reads} to {self.writes}"
        if self.reads == "resid_pre":  # "layers" are then those that it stands before
            return "SAEs on the residual stream"
        return f"SAEs on hook_{self.reads}"

    @property
    def shape(self) -> tuple[int, ...]:
        """Of what it reconstructs at one position: ``(n_heads, d_head)`` or ``(d_out,)``."""
        if self.writes == "z":
            return self.n_heads, self.d_head
        return (self.W_dec.shape[1],)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Of what it reads at one position."""
        return (self.n_heads, self.d_head) if self.reads == "z" else (self.W_enc.shape[0],)

    @property
    def d_sae(self) -> int:
        return self.W_dec.shape[0]

    @property
    def prepend_bos(self) -> bool | None:
        return self.metadata.get("prepend_bos")

    def normalise(
        self, x: Float[Tensor, "... d_in"]
    ) -> tuple[Float[Tensor, "... d_in"], Float[Tensor, "... 1"], Float[Tensor, "... 1"]]:
        """Normalised input, and the scale and mean that attribution holds frozen."""
        zero, one = torch.zeros_like(x[..., :1]), torch.ones_like(x[..., :1])
        match self.normalisation:
            case "layer_norm":
                mean = x.mean(-1, keepdim=True)
                scale = (x - mean).std(-1, keepdim=True)
                return (x - mean) / (scale + _LAYER_NORM_EPS), scale, mean
            case "constant_norm_rescale":
                scale = x.norm(dim=-1, keepdim=True) / x.shape[-1] ** 0.5
                return x / scale, scale, zero
            case _:
                return x, one, zero

    def encode(self, x: Float[Tensor, "n ..."]) -> Encoded:
        """Features of what it reads; sae_lens' ``encode`` on the same input, with pre-activations
        kept."""
        rows = max(1, _ENCODE_BYTES // (self.d_sae * x.element_size()))
        parts = [self._encode(part) for part in x.flatten(-len(self.input_shape)).split(rows)]
        if len(parts) == 1:
            return parts[0]
        for i, part in enumerate(parts):
            part.position.add_(i * rows)
        columns = (vars(part).values() for part in parts)
        return Encoded(*(torch.cat(column) for column in zip(*columns, strict=True)))

    def _encode(self, x: Float[Tensor, "n d_in"]) -> Encoded:
        x, scale, mean = self.normalise(x)
        if self.b_in is not None:
            x = x - self.b_in.to(x.dtype)
        W_enc, b_enc = self.W_enc.to(x.dtype), self.b_enc.to(x.dtype)
        if self.encoder_scale is None:
            pre = torch.addmm(b_enc, x, W_enc)
        else:
            pre = (x @ W_enc).mul_(self.encoder_scale.to(x.dtype)).add_(b_enc)
        if self.active is not None:
            position, feature = self.active(pre)
            found = activation = pre[position, feature]
        else:
            dense = self.activation(pre, x)
            position, feature = dense.nonzero(as_tuple=True)
            found, activation = pre[position, feature], dense[position, feature]
        return Encoded(position, feature, activation, found, scale, mean)

    def read(
        self, features: Int[Tensor, " n"], dtype: torch.dtype
    ) -> tuple[Float[Tensor, "n ..."], Float[Tensor, " n"]]:
        """Rows ``w_i`` and constants ``c_i`` with ``pre_i = w_i . x + c_i``, before normalisation
        scales; rows of z are split by head. ``c_i`` is what of the pre-activation no input carries.

        With ``layer_norm`` the rows are centred, since the mean is linear in the input.
        """
        rows = self._rows(features, dtype)
        constant = self.b_enc.index_select(0, features).to(dtype)
        if self.b_in is not None:
            constant = constant - rows @ self.b_in.to(dtype)
        return self._split(rows), constant

    def encoder(self, features: Int[Tensor, " n"], dtype: torch.dtype) -> Float[Tensor, "n ..."]:
        """The rows of :meth:`read` alone."""
        return self._split(self._rows(features, dtype))

    def _rows(self, features: Int[Tensor, " n"], dtype: torch.dtype) -> Float[Tensor, "n d_in"]:
        rows = self.W_enc.index_select(1, features).T.to(dtype)
        if self.encoder_scale is not None:
            rows = rows * self.encoder_scale.index_select(0, features)[:, None].to(dtype)
        return rows

    def _split(self, rows: Float[Tensor, "n d_in"]) -> Float[Tensor, "n ..."]:
        if self.normalisation == "layer_norm":
            rows = rows - rows.mean(-1, keepdim=True)
        return rows.unflatten(-1, self.input_shape)

    def constants(self, features: Int[Tensor, " n"], dtype: torch.dtype) -> Float[Tensor, " n"]:
        """The constants of :meth:`read` alone."""
        return self.read(features, dtype)[1]

    def input_scale(self, scale: Float[Tensor, "... 1"]) -> Float[Tensor, "... 1"]:
        """What the frozen normalisation divides the input by."""
        return scale + _LAYER_NORM_EPS if self.normalisation == "layer_norm" else scale

    def output_scale(self, scale: Float[Tensor, "... 1"]) -> Float[Tensor, "... 1"]:
        """What the frozen normalisation multiplies the output with; transcoders have none."""
        return torch.ones_like(scale) if self.kind == "tc" else scale

    def decoder(self, features: Int[Tensor, " n"], dtype: torch.dtype) -> Float[Tensor, "n ..."]:
        """Decoder rows, before the normalisation's output scale."""
        rows = self.W_dec.index_select(0, features.to(self.W_dec.device)).to(dtype)
        if self.decoder_scale is not None:
            rows = rows * self.decoder_scale[features, None].to(dtype)
        return rows.unflatten(-1, self.shape)

    def bias(self, scale: Tensor, mean: Tensor) -> Float[Tensor, "n ..."]:
        """What the reconstruction holds without any feature (and without a skip connection)."""
        b_dec = self.b_dec.to(scale.dtype)
        if self.kind == "tc":
            return b_dec.expand(len(scale), -1)
        return (b_dec * scale + mean).unflatten(-1, self.shape)

    def strength(self, encoded: Encoded) -> Float[Tensor, " n"]:
        """What each active feature multiplies its decoder row with."""
        return encoded.activation * self.output_scale(encoded.scale)[encoded.position, 0]

    def decode(self, encoded: Encoded) -> Float[Tensor, "n ..."]:
        """The reconstruction from sparse features, without a skip connection."""
        out = self.bias(encoded.scale, encoded.mean).clone()
        rows = self.decoder(encoded.feature, encoded.activation.dtype)
        weights = self.strength(encoded).reshape(-1, *[1] * len(self.shape))
        return out.index_add_(0, encoded.position, weights * rows)

    def skip(self, x: Float[Tensor, "n d_in"]) -> Float[Tensor, "n d_out"] | None:
        """What the skip connection writes, if there is one."""
        return None if self.W_skip is None else x @ self.W_skip.to(x.dtype)


@dataclass(frozen=True)
class Encoded:
    """Sparse features of one layer at every position of a prompt (or of several, one after the
    other), sorted by position."""

    position: Int[Tensor, " n"]
    feature: Int[Tensor, " n"]
    activation: Float[Tensor, " n"]
    pre_activation: Float[Tensor, " n"]
    scale: Float[Tensor, "positions 1"]
    mean: Float[Tensor, "positions 1"]

    def part(self, first: int, last: int) -> Encoded:
        """The features at positions ``first .. last - 1``, counted from there."""
        bounds = torch.tensor([first, last], device=self.position.device)
        low, high = torch.searchsorted(self.position, bounds).tolist()
        return Encoded(
            self.position[low:high] - first,
            self.feature[low:high],
            self.activation[low:high],
            self.pre_activation[low:high],
            self.scale[first:last],
            self.mean[first:last],
        )


# -- sae_lens architectures ----------------------------------------------------------------------


def _relu(pre: Tensor, _x: Tensor) -> Tensor:
    return pre.relu()


def _standard(sae: Any) -> dict[str, Any]:
    return {"b_enc": sae.b_enc, "activation": _relu}


def _jumprelu(sae: Any) -> dict[str, Any]:
    threshold = sae.threshold.detach()
    return {
        "b_enc": sae.b_enc,
        "activation": lambda pre, _x: pre.relu() * (pre > threshold.to(pre.dtype)),
    }


def _topk(sae: Any) -> dict[str, Any]:
    k = int(sae.cfg.k)

    def activation(pre: Tensor, _x: Tensor) -> Tensor:
        values, indices = pre.topk(k, dim=-1)
        return torch.zeros_like(pre).scatter_(-1, indices, values.relu())

    def active(pre: Tensor) -> tuple[Tensor, Tensor]:
        values, indices = top_of_rows(pre, k)
        indices, order = indices.sort(dim=-1)
        positive = values.gather(-1, order) > 0
        return positive.nonzero()[:, 0], indices[positive]

    parts: dict[str, Any] = {"b_enc": sae.b_enc, "activation": activation, "active": active}
    if sae.cfg.rescale_acts_by_decoder_norm:
        norms = sae.W_dec.detach().norm(dim=-1)
        parts |= {
            "b_enc": sae.b_enc * norms,
            "encoder_scale": norms,
            "decoder_scale": 1 / norms,
        }
    return parts


def top_of_rows(x: Float[Tensor, "n m"], k: int) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"]]:
    """``x.topk(k)``, in less time for long rows on a processor.

    The ``k`` largest of a row lie in the ``k`` of its groups with the largest maxima; only these
    are searched. Rows where the last value taken and the first left out are equal go through
    ``topk`` itself, so that the same columns are taken.
    """
    n, m = x.shape
    if x.device.type != "cpu" or m % _TOP_GROUPS or m < 8 * _TOP_GROUPS or 8 * k > _TOP_GROUPS:
        return x.topk(k, dim=-1)
    groups = x.view(n, m // _TOP_GROUPS, _TOP_GROUPS).amax(1).topk(k + 1, dim=1).indices
    starts = torch.arange(0, m, _TOP_GROUPS, device=x.device)
    columns = (groups[:, None] + starts[:, None]).flatten(1)
    values, place = x.gather(1, columns).topk(k + 1, dim=1)
    indices = columns.gather(1, place)
    ties = (values[:, k - 1] == values[:, k]).nonzero()[:, 0]
    values, indices = values[:, :k], indices[:, :k]
    if len(ties):
        values, indices = values.contiguous(), indices.contiguous()
        values[ties], indices[ties] = x[ties].topk(k, dim=-1)
    return values, indices


def _gated(sae: Any) -> dict[str, Any]:
    W_enc, b_gate = sae.W_enc.detach(), sae.b_gate.detach()

    def activation(pre: Tensor, x: Tensor) -> Tensor:
        # The magnitude path is the pre-activation; the gate only switches.
        gate = x @ W_enc.to(x.dtype) + b_gate.to(x.dtype)
        return pre.relu() * (gate > 0)

    return {
        "b_enc": sae.b_mag,
        "encoder_scale": sae.r_mag.detach().exp(),
        "activation": activation,
    }


_ARCHITECTURES: dict[str, Callable[[Any], dict[str, Any]]] = {
    "standard": _standard,
    "jumprelu": _jumprelu,
    "topk": _topk,
    "gated": _gated,
}
_TRANSCODERS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "transcoder": _standard,
    "skip_transcoder": _standard,
    "jumprelu_transcoder": _jumprelu,
    "jumprelu_skip_transcoder": _jumprelu,
}


def from_sae(sae: Any, geometry: Geometry, layer: int | None = None) -> Dictionary:
    """See a sae_lens SAE of an attention layer as a dictionary of a model.

    Args:
        sae: a sae_lens SAE on ``hook_z`` or ``hook_attn_out``.
        geometry: the model it belongs to.
        layer: default: from the hook name in the SAE's metadata.

    Raises:
        InputError: hook name unknown or of another site, ``d_in`` that does not fit.
        UnsupportedError: an architecture or normalisation without a linear pre-activation.
    """
    g, cfg = geometry, sae.cfg
    hook_name = cfg.metadata.hook_name
    name = f"the {cfg.architecture()} SAE on {hook_name!r}"
    if cfg.architecture() in _TRANSCODERS:
        raise InputError(f"{name} is a transcoder; give it as FeatureLens(..., transcoders=)")
    _check_architecture(cfg.architecture(), _ARCHITECTURES, name)
    found, site = _split_hook_name(hook_name)
    if site in ("hook_mlp_out", "ln2_post.hook_out", "mlp.hook_out"):
        raise InputError(f"{name} is of an MLP; give it as FeatureLens(..., transcoders=)")
    if site not in _ATTENTION_HOOKS:
        hint = "; give it as FeatureLens(..., residual_saes=)" if site in _RESIDUAL_HOOKS else ""
        raise InputError(
            f"unknown hook name {hook_name!r}; expected 'blocks.LAYER.attn.hook_z' or "
            "'blocks.LAYER.hook_attn_out' in the SAE's metadata (sae.cfg.metadata.hook_name)" + hint
        )
    _check_layer(found, layer, g, name)
    reads, head, whole = _ATTENTION_HOOKS[site], cfg.metadata.hook_head_index, g
    if head is not None:
        name = f"{name}, head {head},"
        if reads != "z":
            raise InputError(f"{name} reads what all heads write together; expected 'attn.hook_z'")
        g = replace(g, n_heads=1)
    width = g.n_heads * g.d_head if reads == "z" else g.d_model
    if cfg.d_in != width:
        what = (
            f"hook_z of {g.model_name} is {g.n_heads} heads x {g.d_head} = {width} wide"
            if reads == "z"
            else f"hook_attn_out of {g.model_name} is {width} wide"
        )
        raise InputError(f"{name} has d_in {cfg.d_in}, but {what}")
    made = _read(sae, _ARCHITECTURES, g, found, name, {"reads": reads, "writes": reads})
    return made if head is None else only_head(made, head, whole)


def from_mlp(sae: Any, geometry: Geometry, layer: int | None = None) -> Dictionary:
    """See a sae_lens transcoder, or an SAE on ``hook_mlp_out``, as a dictionary of a model.

    A cross-layer transcoder that was loaded as per-layer transcoders is one of these.

    Raises:
        InputError: hook names that are not an MLP's input and output of one layer, widths that do
            not fit.
        UnsupportedError: an architecture or normalisation without a linear pre-activation.
    """
    g, cfg = geometry, sae.cfg
    metadata, architecture = cfg.metadata, cfg.architecture()
    name = f"the {architecture} SAE on {metadata.hook_name!r}"
    if architecture not in _TRANSCODERS:
        _check_architecture(architecture, _ARCHITECTURES, name)
    if not g.has_mlp:
        raise InputError(f"{name}: {g.model_name} has no MLPs")
    found, site = _split_hook_name(metadata.hook_name)
    if architecture not in _TRANSCODERS:
        if site in _ATTENTION_HOOKS:
            raise InputError(f"{name} is of attention; give it as FeatureLens(model, saes)")
        out = _MLP_OUTPUT_HOOKS.get(site)
        if out is None or (out == "mlp_raw" and g.mlp_post_norm):
            raise InputError(
                f"unknown hook name {metadata.hook_name!r}; expected 'blocks.LAYER.hook_mlp_out' "
                "for an SAE given as transcoders= (sae.cfg.metadata.hook_name)"
            )
        _check_layer(found, layer, g, name)
        _check_widths(name, g, cfg.d_in, cfg.d_in)
        places: dict[str, Any] = {"reads": "mlp_out", "writes": "mlp_out"}
        return _read(sae, _ARCHITECTURES, g, found, name, places)
    out_name = metadata.hook_name_out
    name = f"the {architecture} from {metadata.hook_name!r} to {out_name!r}"
    found_out, site_out = _split_hook_name(out_name)
    reads = _mlp_input(site, metadata.hf_hook_name, g)
    if reads is None:
        parallel = "; this model's MLP reads resid_pre" if g.parallel else ""
        raise InputError(
            f"{name}: its input is not that of an MLP; expected one of "
            f"{', '.join(_MLP_INPUT_HOOKS)} under 'blocks.LAYER.' in its metadata (hook_name)"
            + parallel
        )
    if site_out not in _MLP_OUTPUT_HOOKS:
        raise InputError(
            f"{name}: its output is not that of an MLP; expected 'blocks.LAYER.hook_mlp_out' in "
            "its metadata (hook_name_out)"
        )
    if found != found_out:
        raise InputError(
            f"{name} reads layer {found} and writes layer {found_out}; only transcoders of one "
            "layer are supported (sae_lens loads a cross-layer transcoder as one per layer)"
        )
    _check_layer(found, layer, g, name)
    _check_widths(name, g, cfg.d_in, cfg.d_out)
    writes = _MLP_OUTPUT_HOOKS[site_out]
    skip = getattr(sae, "W_skip", None)
    places = {
        "reads": reads,
        "writes": writes if g.mlp_post_norm else "mlp_out",
        "W_skip": None if skip is None else skip.detach().T,
    }
    return _read(sae, _TRANSCODERS, g, found, name, places)


def from_residual(sae: Any, geometry: Geometry, layer: int | None = None) -> Dictionary:
    """See a sae_lens SAE on the residual stream as a dictionary of a model.

    ``hook_resid_post`` of a layer is ``hook_resid_pre`` of the next, and the dictionary's layer is
    the latter: what reads the stream there. After the last layer it is ``n_layers``.

    Raises:
        InputError: another hook, a stream that the model does not have, a width that does not fit.
        UnsupportedError: an architecture or normalisation without a linear pre-activation.
    """
    g, cfg = geometry, sae.cfg
    hook_name, architecture = cfg.metadata.hook_name, cfg.architecture()
    name = f"the {architecture} SAE on {hook_name!r}"
    found, site = _split_hook_name(hook_name)
    if architecture in _TRANSCODERS:
        raise InputError(f"{name} is a transcoder; give it as FeatureLens(..., transcoders=)")
    if site in _ATTENTION_HOOKS:
        raise InputError(f"{name} is of attention; give it as FeatureLens(model, saes)")
    if site in _MLP_OUTPUT_HOOKS:
        raise InputError(f"{name} is of an MLP; give it as FeatureLens(..., transcoders=)")
    _check_architecture(architecture, _ARCHITECTURES, name)
    if site not in _RESIDUAL_HOOKS:
        raise InputError(
            f"unknown hook name {hook_name!r}; expected 'blocks.LAYER.hook_resid_pre', "
            "'hook_resid_mid' or 'hook_resid_post' for an SAE given as residual_saes= "
            "(sae.cfg.metadata.hook_name)"
        )
    _check_layer(found, layer, g, name)
    where, later = _RESIDUAL_HOOKS[site]
    if where == "resid_mid" and (g.parallel or not g.has_mlp):
        why = "attention and MLP read the same stream" if g.parallel else "there is no MLP"
        raise InputError(f"{name}: {g.model_name} has no such place, {why}; use hook_resid_pre")
    _check_widths(name, g, cfg.d_in, cfg.d_in)
    places: dict[str, Any] = {"reads": where, "writes": where}
    return _read(sae, _ARCHITECTURES, g, found + later, name, places)


def _mlp_input(site: str, hf_hook_name: str | None, geometry: Geometry) -> Reads | None:
    """What an input hook of a transcoder stands for in this model."""
    if site == "hook_mlp_in" and hf_hook_name:
        # sae_lens calls Gemma Scope 2's inputs so; the name at the source says what they are.
        if re.search(r"(layernorm\.output|mlp\.input)$", hf_hook_name):
            return "mlp_in"
        return None
    if geometry.parallel:
        if site == "hook_resid_pre":
            return "mlp_stream"
        if site == "hook_resid_mid":
            return None
    return _MLP_INPUT_HOOKS.get(site)


def _split_hook_name(hook_name: str | None) -> tuple[int, str]:
    match = _BLOCK.fullmatch(hook_name or "")
    return (int(match.group(1)), match.group(2)) if match else (-1, "")


def _check_architecture(architecture: str, known: Iterable[str], name: str) -> None:
    if architecture in known:
        return
    reason = (
        "its pre-activation is not linear in its input"
        if architecture in ("temporal", "matching_pursuit")
        else "its architecture is not known"
    )
    raise UnsupportedError(
        f"{name} cannot be attributed: {reason}; supported: {', '.join(known)} "
        "(sae_lens saves batchtopk and matryoshka SAEs as jumprelu: save and reload them)"
    )


def _check_layer(found: int, layer: int | None, geometry: Geometry, name: str) -> None:
    if layer is not None and layer != found:
        raise InputError(f"{name} was given for layer {layer}, but its hook is in layer {found}")
    if found >= geometry.n_layers:
        raise InputError(f"{name}: {geometry.model_name} has only {geometry.n_layers} layers")


def _check_widths(name: str, geometry: Geometry, d_in: int, d_out: int) -> None:
    if (d_in, d_out) != (geometry.d_model, geometry.d_model):
        raise InputError(
            f"{name} has d_in {d_in} and d_out {d_out}, but the residual stream of "
            f"{geometry.model_name} is {geometry.d_model} wide"
        )


def _read(
    sae: Any,
    architectures: Mapping[str, Callable[[Any], dict[str, Any]]],
    geometry: Geometry,
    layer: int,
    name: str,
    places: Mapping[str, Any],
) -> Dictionary:
    """The dictionary of an SAE that fits its place."""
    cfg = sae.cfg
    if cfg.normalize_activations not in _NORMALISATIONS:
        raise UnsupportedError(
            f"{name}: normalize_activations {cfg.normalize_activations!r} is not supported; "
            f"supported: {', '.join(_NORMALISATIONS)}"
        )
    with torch.no_grad():
        parts: dict[str, Any] = {
            key: value.detach() if isinstance(value, Tensor) else value
            for key, value in architectures[cfg.architecture()](sae).items()
        }
    for key, tensor in sae.state_dict().items():
        if not torch.isfinite(tensor).all():
            raise InputError(f"{name}: {key} holds NaN or infinity")
    scale = parts.get("encoder_scale")
    if scale is not None and not torch.isfinite(scale).all():
        raise InputError(
            f"{name}: what scales its encoder (exp(r_mag), or the decoder's norm) is infinite"
        )
    b_dec = sae.b_dec.detach()
    density = getattr(sae, "sparsity", None)
    return Dictionary(
        layer=layer,
        n_heads=geometry.n_heads,
        d_head=geometry.d_head,
        architecture=cfg.architecture(),
        W_enc=sae.W_enc.detach(),
        W_dec=sae.W_dec.detach(),
        b_dec=b_dec,
        b_in=b_dec if cfg.apply_b_dec_to_input else None,
        normalisation=cfg.normalize_activations,
        log_density=density if isinstance(density, Tensor) else None,
        sae_id=str(cfg.metadata.sae_id or cfg.metadata.hook_name),
        metadata=cfg.metadata.to_dict(),
        source=sae,
        **parts,
        **places,
    )


def place(saes: Any, geometry: Geometry) -> dict[int, Dictionary]:
    """Attention dictionaries by layer from what a user gives as SAEs.

    Args:
        saes: a release name or a folder, a list of sae_lens SAEs, or a dict keyed by layer, hook
            name or anything (the hook names in the SAEs' metadata say where they belong). An empty
            dict: none, and every layer is split by head.

    Raises:
        InputError: nothing given, or two SAEs for one layer, unless they are of different heads.
    """
    placed = _place(saes, geometry, from_sae)
    if not placed and not isinstance(saes, Mapping):
        raise InputError("no SAEs given; expected at least one, or saes={} for none")
    return placed


def place_mlp(transcoders: Any, geometry: Geometry) -> dict[int, Dictionary]:
    """MLP dictionaries by layer, from transcoders or SAEs on ``hook_mlp_out``; None: none."""
    return {} if transcoders is None else _place(transcoders, geometry, from_mlp)


def place_residual(saes: Any, geometry: Geometry) -> dict[tuple[FeatureKind, int], Dictionary]:
    """Residual dictionaries by kind and layer; None: none.

    Raises:
        InputError: two SAEs for one place of the stream.
    """
    placed: dict[tuple[FeatureKind, int], Dictionary] = {}
    for found in _given({} if saes is None else saes, geometry, from_residual):
        if (at := (found.kind, found.layer)) in placed:
            where = "the MLP of layer" if found.kind == "resid_mid" else "layer"
            raise InputError(
                f"two SAEs for the residual stream before {where} {found.layer}: "
                f"{placed[at].sae_id!r} and {found.sae_id!r}; give one (hook_resid_post of a layer "
                "is hook_resid_pre of the next)"
            )
        placed[at] = found
    return dict(sorted(placed.items(), key=lambda item: (item[0][1], item[0][0])))


def _place(
    saes: Any, geometry: Geometry, read: Callable[[Any, Geometry, int | None], Dictionary]
) -> dict[int, Dictionary]:
    found: dict[int, list[Dictionary]] = {}
    for dictionary in _given(saes, geometry, read):
        found.setdefault(dictionary.layer, []).append(dictionary)
    return {layer: _the_one_of(found[layer]) for layer in sorted(found)}


def _given(
    saes: Any, geometry: Geometry, read: Callable[[Any, Geometry, int | None], Dictionary]
) -> Iterator[Dictionary]:
    if isinstance(saes, str | Path):
        saes = load_saes(saes, device=str(geometry.device))
    items: Iterable[tuple[Any, Any]]
    if isinstance(saes, Mapping):
        items = saes.items()
    elif isinstance(saes, Iterable) and not hasattr(saes, "cfg"):  # one SAE iterates too
        items = ((None, sae) for sae in saes)
    else:
        items = [(None, saes)]
    for key, sae in items:
        if not hasattr(sae, "cfg") or not hasattr(sae, "W_dec"):
            raise InputError(
                f"expected sae_lens SAEs, a release name or a folder, got {type(sae).__name__}"
            )
        yield read(sae, geometry, key if isinstance(key, int) else None)


def _the_one_of(given: list[Dictionary]) -> Dictionary:
    """The dictionary of a layer; several are one only where each is of another head."""
    if all(d.reads == "z" for d in given):
        return join(given)
    if len(given) > 1:
        block = "attention" if given[0].kind == "attn" else "the MLP"
        raise InputError(
            f"two dictionaries for {block} of layer {given[0].layer}: {given[0].sae_id!r} and "
            f"{given[1].sae_id!r}; give one"
        )
    return given[0]


def load_saes(source: str | Path, device: str = "cpu") -> dict[str, Any]:
    """Load every SAE of a release or a folder, by SAE id.

    SAEs on z come as :class:`AttentionSAE` where their heads are known; one that was saved without
    reshaping is repaired with a warning.

    Args:
        source: a sae_lens release name such as ``"gpt2-small-hook-z-kk"``, a folder that holds one
            SAE (``cfg.json`` in it), or a folder of such folders.
        device: where to put the weights.

    Raises:
        InputError: neither a folder with SAEs nor a known release.
        FileError: an SAE that is damaged, or that neither the hub nor the local cache can give.
    """
    from sae_lens import SAE
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory
    from tqdm.auto import tqdm

    if folders := sae_folders(source):
        found = {}
        for folder in folders:
            with _explain(f"the SAE in {folder}"):
                sae = _with_density(SAE.load_from_disk(folder, device=device), folder)
            found[folder.name] = _from(_with_heads(sae), _known_as(Path(source)))
        return found
    directory = get_pretrained_saes_directory()
    loaded = {}
    for sae_id in tqdm(directory[str(source)].saes_map, desc=f"loading {source}", leave=False):
        with _explain(f"{sae_id!r} of the release {str(source)!r}"):
            sae, _config, density = SAE.from_pretrained_with_cfg_and_sparsity(
                str(source), sae_id, device=device
            )
        if density is not None:
            sae.sparsity = density
        loaded[sae_id] = _from(_with_heads(sae, str(source)), str(source))
    return loaded


def sae_folders(source: str | Path) -> list[Path]:
    """The folders of SAEs that a source means, or none where it is a known release.

    Nothing is loaded, so that a wrong name is told before work that takes its time.

    Raises:
        InputError: neither a folder with SAEs nor a known release.
    """
    path = Path(source)
    if path.is_dir():
        if (path / "cfg.json").is_file():
            return [path]
        if folders := sorted(child.parent for child in path.glob("*/cfg.json")):
            return folders
        raise InputError(
            f"no SAE in the folder {path}; expected cfg.json and sae_weights.safetensors in it or "
            "in its subfolders"
        )
    what = f"{str(source)!r} is neither a folder nor a sae_lens release"
    if isinstance(source, Path) or source.startswith((".", "/", "~")):
        raise InputError(what)  # without sae_lens, which takes seconds to import
    import difflib

    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    directory = get_pretrained_saes_directory()
    if source not in directory:
        close = difflib.get_close_matches(source, directory, n=3)
        raise InputError(f"{what}; did you mean {' or '.join(close)}?" if close else what)
    return []


def _from(sae: Any, source: str) -> Any:
    """An SAE that knows where it was loaded from; its configuration stays as it is."""
    sae.sae_attn_source = source
    return sae


def _known_as(folder: Path) -> str:
    """A folder as it was given; those in the package by name, wherever the package is."""
    from sae_attn_plugin import demo

    inside = {demo.SAES_PATH: "", demo.TRANSCODERS_PATH: "/transcoders"}
    return f"{DEMO_RELEASE}{inside[folder]}" if folder in inside else str(folder)


@contextlib.contextmanager
def _explain(what: str) -> Generator[None]:
    try:
        yield
    except Exception as error:  # sae_lens, safetensors, json and the hub each raise their own
        first = (str(error).strip().splitlines() or [""])[0]
        raise FileError(f"cannot load {what}: {type(error).__name__}: {first}") from error


def _with_heads(sae: Any, release: str | None = None) -> Any:
    """An SAE on z with its heads written down, where they are known; others as they are."""
    from sae_attn_plugin.pretrained import mark
    from sae_attn_plugin.saes import AttentionSAE, heads_of, layer_of, repaired

    if release is not None:
        mark(sae, release)
    if layer_of(sae.cfg.metadata.hook_name) is None:
        return sae
    sae = repaired(sae, release)
    try:
        heads_of(sae.cfg)
        return AttentionSAE.of(sae)
    except (InputError, UnsupportedError):
        return sae


def _with_density(sae: Any, folder: Path) -> Any:
    from safetensors.torch import load_file

    path = folder / "sparsity.safetensors"
    if path.is_file():
        sae.sparsity = load_file(path)["sparsity"]
    return sae


def chosen_layers(
    dictionaries: Mapping[int, Dictionary], layers: Iterable[int] | None = None
) -> list[int]:
    """The layers asked for, in order; None: all that have a dictionary.

    Raises:
        InputError: none, or one without a dictionary.
    """
    if not dictionaries:
        raise InputError("the lens has no attention SAEs")
    known = sorted(dictionaries)
    chosen = known if layers is None else sorted({int(layer) for layer in layers})
    if not chosen:
        raise InputError("no layers given; expected at least one")
    if missing := [str(layer) for layer in chosen if layer not in dictionaries]:
        raise InputError(
            f"no SAE in layer{'s' * (len(missing) > 1)} {', '.join(missing)}; layers with one: "
            + ", ".join(map(str, known))
        )
    return chosen


def head_attribution(
    sae: Any,
    n_heads: int | None = None,
    dead_below: float = 1e-6,
    W_O: Float[Tensor, "n_heads d_head d_model"] | None = None,
) -> pd.DataFrame:
    """Weight-based head attribution (Kissane et al. 2024): share of each head in a decoder row.

    ``share_h = |d_{i,h}|_2 / sum_j |d_{i,j}|_2`` over the slices of the decoder row.

    The decoder of an SAE on ``hook_attn_out`` has no slices by head. With ``W_O``, its shares are
    those of the encoder instead, ``|W_O^h w_i|_2``: how strongly the feature reads each head.
    :meth:`FeatureLens.head_attribution` brings the ``W_O``.

    Args:
        sae: a :class:`Dictionary` or a sae_lens SAE on hook_z.
        n_heads: needed for a sae_lens SAE whose metadata does not hold it.
        dead_below: a feature that fires on fewer tokens than this fraction is marked dead, where
            the SAE's density is known.
        W_O: of the SAE's layer, for SAEs on ``hook_attn_out``; with a norm's gain between folded
            in, where the architecture has one.

    Returns:
        One row per feature (the index): ``head_0 ... head_{n-1}`` summing to 1 (all 0 for a feature
        that writes nothing), ``top_head``, and ``dead`` (``<NA>`` where the density is not known).
    """
    density = getattr(sae, "log_density", getattr(sae, "sparsity", None))
    if isinstance(sae, Dictionary):
        reads, what = sae.reads, sae.hook
    else:
        what = f"the SAE on {sae.cfg.metadata.hook_name!r}"
        site = _split_hook_name(sae.cfg.metadata.hook_name)[1]
        # An SAE that does not say where it belongs is taken at its word: n_heads is given then.
        reads = _ATTENTION_HOOKS.get(site, "" if site in _MLP_OUTPUT_HOOKS else "z")
    if reads not in ("z", "attn_out"):
        raise UnsupportedError(f"head attribution is for attention SAEs, got {what}")
    if reads == "attn_out" and W_O is None:
        raise InputError(
            f"{what}: a decoder row in the residual stream has no slices by head; pass W_O= "
            "[n_heads, d_head, d_model] for the shares of what the feature reads, or call "
            "lens.head_attribution(layer)"
        )
    if W_O is not None and reads == "attn_out":
        n_heads = len(W_O)
    elif not isinstance(sae, Dictionary):
        n_heads = n_heads or sae.cfg.metadata.n_heads
        if n_heads is None:
            raise InputError(
                "the SAE's metadata does not say how many heads it spans; pass n_heads="
            )
    else:
        n_heads = sae.n_heads
    if W_O is not None and reads == "attn_out":
        encoder = sae.W_enc.detach().float()
        norms = torch.stack([(W.float() @ encoder).norm(dim=0) for W in W_O], dim=-1)
    else:
        rows = sae.W_dec.detach().float()
        if rows.shape[1] % n_heads:
            raise InputError(f"d_in {rows.shape[1]} does not divide into {n_heads} heads")
        norms = rows.unflatten(-1, (n_heads, -1)).norm(dim=-1)
    shares = norms / norms.sum(-1, keepdim=True).clamp_min(torch.finfo(norms.dtype).tiny)
    table = pd.DataFrame(shares.numpy(force=True), columns=[f"head_{h}" for h in range(n_heads)])
    table.index.name = "feature"
    table["top_head"] = shares.argmax(-1).numpy(force=True)
    if density is None:
        table["dead"] = pd.array([pd.NA] * len(table), dtype="boolean")
    else:
        dead = (density.float() < torch.tensor(dead_below).log10()).numpy(force=True)
        table["dead"] = pd.array(dead, dtype="boolean")
    return table
