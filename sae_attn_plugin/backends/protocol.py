"""What the engine needs from a host, and nothing more.

A backend gives the geometry of the model, its weights as plain tensors, and one forward pass that
reads and edits named sites. Everything else is shared. Adding a host means writing this protocol.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_attn_plugin.errors import BackendError, InputError

if TYPE_CHECKING:
    from sae_attn_plugin.backends.scores import ScoreWeights

Edit = Callable[[Tensor], Tensor]


class Site(NamedTuple):
    """A place in the forward pass, in the order of execution within a layer.

    ================  ==============================  ==============================================
    name              shape                           what
    ================  ==============================  ==============================================
    ``embed``         ``[batch, pos, d_model]``       token embedding (scaled where the model does)
    ``pos_embed``     ``[batch, pos, d_model]``       learned position embedding, where there is one
    ``resid_pre``     ``[batch, pos, d_model]``       residual stream before a layer
    ``attn_in``       ``[batch, pos, d_model]``       normalised input of attention
    ``v``             ``[batch, pos, n_kv, d_head]``  values (with their bias)
    ``z``             ``[batch, pos, head, d_head]``  TransformerLens' ``hook_z``
    ``pattern``       ``[batch, head, query, key]``   attention weights; read only
    ``attn_out``      ``[batch, pos, d_model]``       what attention adds to the residual stream
    ``mlp_in``        ``[batch, pos, d_model]``       input of the MLP, normalised where a norm is
    ``mlp_raw``       ``[batch, pos, d_model]``       output of the MLP before its post-norm
    ``mlp_out``       ``[batch, pos, d_model]``       what the MLP adds to the residual stream
    ``resid_final``   ``[batch, pos, d_model]``       input of the final norm; read only
    ``unembed_in``    ``[batch, pos, d_model]``       output of the final norm
    ``logits``        ``[batch, pos, d_vocab]``       after any soft-cap; read only
    ================  ==============================  ==============================================

    ``attn_in`` exists where a norm feeds attention, ``mlp_raw`` where a norm follows the MLP. With
    post-norms, ``attn_out`` and ``mlp_out`` are their outputs.
    """

    name: str
    layer: int = -1

    def __str__(self) -> str:
        return self.name if self.layer < 0 else f"{self.name}[{self.layer}]"


LAYER_SITES = (
    "resid_pre",
    "attn_in",
    "v",
    "z",
    "pattern",
    "attn_out",
    "mlp_in",
    "mlp_raw",
    "mlp_out",
)
MODEL_SITES = ("embed", "pos_embed", "resid_final", "unembed_in", "logits")
READ_ONLY_SITES = ("pattern", "resid_final", "logits")


@dataclass(frozen=True)
class Geometry:
    """Shape of a model.

    ``normalization``: ``"layer"``, ``"rms"`` or ``"none"``. ``parallel``: attention and MLP read
    the same residual stream. ``mlp_post_norm``: a norm follows the MLP. ``logit_soft_cap``: ``c``
    where the model returns ``c * tanh(logits / c)``, else None.
    """

    model_name: str
    architecture: str
    n_layers: int
    d_model: int
    n_heads: int
    n_kv_heads: int
    d_head: int
    d_vocab: int
    n_ctx: int
    learned_positions: bool
    normalization: str
    parallel: bool
    has_mlp: bool
    dtype: torch.dtype
    device: torch.device
    mlp_post_norm: bool = False
    logit_soft_cap: float | None = None


@dataclass(frozen=True)
class Norm:
    """A normalisation, split into the scale that is frozen and the linear rest.

    ``apply(x, scale) = weight * centre(x) / scale + bias``; ``weight`` is what multiplies (Gemma's
    ``1 + w`` already added), ``[d]``; ``None`` stands for ones and zeros.
    """

    kind: str
    eps: float = 0.0
    weight: Float[Tensor, " d"] | None = None
    bias: Float[Tensor, " d"] | None = None

    def centre(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        return x - x.mean(-1, keepdim=True) if self.kind == "layer" else x

    def scale(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... 1"]:
        if self.kind == "none":
            return torch.ones_like(x[..., :1])
        return (self.centre(x).square().mean(-1, keepdim=True) + self.eps).sqrt()

    def apply(
        self, x: Float[Tensor, "... d"], scale: Float[Tensor, "... 1"] | None = None
    ) -> Float[Tensor, "... d"]:
        """``x`` normalised, with its own scale or a frozen one."""
        y = self.linear(x, self.scale(x) if scale is None else scale)
        return y if self.bias is None else y + self.bias

    def linear(
        self, x: Float[Tensor, "... d"], scale: Float[Tensor, "... 1"]
    ) -> Float[Tensor, "... d"]:
        """The part of ``apply`` that is linear in ``x`` once ``scale`` is frozen."""
        y = self.centre(x) / scale
        return y if self.weight is None else y * self.weight

    def before(self, rows: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        """Functionals of the norm's output as functionals of its input, without its scale."""
        return self.centre(rows if self.weight is None else rows * self.weight)

    def as_host(
        self, x: Float[Tensor, "... d"], scale: Float[Tensor, "... 1"] | None = None
    ) -> Float[Tensor, "... d"]:
        """``apply`` in the dtype and on the device of ``x``, as hosts do: half precision is
        normalised in float32."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        scale = None if scale is None else scale.to(x.device, dtype)
        return self.to(dtype, x.device).apply(x.to(dtype), scale).to(x.dtype)

    def to(self, dtype: torch.dtype, device: torch.device | None = None) -> Norm:
        weight = None if self.weight is None else self.weight.to(device, dtype)
        bias = None if self.bias is None else self.bias.to(device, dtype)
        return replace(self, weight=weight, bias=bias)


@dataclass(frozen=True)
class LayerWeights:
    """Weights of one layer's attention, and the norms around it, as plain tensors.

    ``W_V [n_kv, d_model, d_head]``, ``b_V [n_kv, d_head]``, ``W_O [n_heads, d_head, d_model]``,
    ``b_O [d_model]``. ``norm`` feeds attention; ``mlp_norm`` feeds the MLP; ``post_norm`` and
    ``mlp_post_norm`` act on the blocks' outputs before they are added, where the model has them.
    """

    W_V: Float[Tensor, "n_kv d_model d_head"]
    b_V: Float[Tensor, "n_kv d_head"]
    W_O: Float[Tensor, "n_heads d_head d_model"]
    b_O: Float[Tensor, " d_model"]
    norm: Norm
    mlp_norm: Norm | None
    post_norm: Norm | None = None
    mlp_post_norm: Norm | None = None

    def to(self, dtype: torch.dtype, device: torch.device | None = None) -> LayerWeights:
        changed: dict[str, Any] = {
            name: value.to(dtype, device) if isinstance(value, Norm) else value.to(device, dtype)
            for name, value in vars(self).items()
            if value is not None
        }
        return replace(self, **changed)

    def values(self, normalised: Float[Tensor, "... d_model"]) -> Float[Tensor, "... n_kv d_head"]:
        """Values from the normalised residual stream."""
        return torch.einsum("...d,kde->...ke", normalised, self.W_V) + self.b_V

    def attn_out(self, z: Float[Tensor, "... n_heads d_head"]) -> Float[Tensor, "... d_model"]:
        """``z`` through the output projection, before any post-norm."""
        return z.flatten(-2) @ self.W_O.flatten(0, 1) + self.b_O


@dataclass(frozen=True)
class MlpWeights:
    """Weights of one MLP as plain tensors.

    ``raw = hidden(x) W_out + b_out`` with ``hidden = activation(x W_in + b_in)``, or with a gate
    ``hidden = activation(x W_gate + b_gate) * (x W_in + b_in)``. ``W_in, W_gate [d_model, d_mlp]``,
    ``W_out [d_mlp, d_model]``; missing biases are None.
    """

    W_in: Float[Tensor, "d_model d_mlp"]
    W_out: Float[Tensor, "d_mlp d_model"]
    activation: Edit
    b_in: Float[Tensor, " d_mlp"] | None = None
    b_out: Float[Tensor, " d_model"] | None = None
    W_gate: Float[Tensor, "d_model d_mlp"] | None = None
    b_gate: Float[Tensor, " d_mlp"] | None = None

    def to(self, dtype: torch.dtype, device: torch.device | None = None) -> MlpWeights:
        changed: dict[str, Any] = {
            name: value.to(device, dtype)
            for name, value in vars(self).items()
            if isinstance(value, Tensor)
        }
        return replace(self, **changed)

    def pre(self, x: Float[Tensor, "n d_model"]) -> Float[Tensor, "n d_mlp"]:
        """What ``W_in`` gives."""
        return x @ self.W_in if self.b_in is None else x @ self.W_in + self.b_in

    def gate(self, x: Float[Tensor, "n d_model"]) -> Float[Tensor, "n d_mlp"] | None:
        """What the gate multiplies with, after its activation; None without a gate."""
        if self.W_gate is None:
            return None
        gate = x @ self.W_gate
        return self.activation(gate if self.b_gate is None else gate + self.b_gate)

    def raw(self, x: Float[Tensor, "n d_model"]) -> Float[Tensor, "n d_model"]:
        """The MLP's output before any post-norm, from its input."""
        gate = self.gate(x)
        hidden = self.activation(self.pre(x)) if gate is None else gate * self.pre(x)
        out = hidden @ self.W_out
        return out if self.b_out is None else out + self.b_out


@dataclass(frozen=True)
class Capture:
    """One forward pass, every tensor the algebra needs. Shapes as in :class:`Site`."""

    tokens: Int[Tensor, "batch pos"]
    values: Mapping[Site, Tensor]

    def __getitem__(self, site: tuple[str, int]) -> Tensor:
        return self.values[Site(*site)]

    @property
    def logits(self) -> Float[Tensor, "batch pos d_vocab"]:
        return self.values[Site("logits")]


class Backend(Protocol):
    """A model seen by the engine. ``host`` names the library it runs on, ``revision`` the commit
    of its weights where the hub told it."""

    host: str
    geometry: Geometry
    tokenizer: Any
    revision: str | None

    def layer_weights(self, layer: int) -> LayerWeights:
        """Weights of one layer, on the model's device, in the model's dtype."""
        ...

    def score_weights(self, layer: int, n_positions: int) -> ScoreWeights:
        """What one layer's attention scores are made of, for a prompt of ``n_positions``."""
        ...

    def mlp_weights(self, layer: int) -> MlpWeights:
        """Weights of one layer's MLP, on the model's device, in the model's dtype.

        Raises:
            UnsupportedError: an MLP of another form, or an architecture whose row does not say.
        """
        ...

    def final_norm(self) -> Norm: ...

    def unembed(self) -> tuple[Float[Tensor, "d_model d_vocab"], Float[Tensor, " d_vocab"] | None]:
        """``W_U`` and its bias."""
        ...

    def forward(
        self,
        tokens: Int[Tensor, "batch pos"],
        edits: Mapping[Site, Edit] | None = None,
        reads: Iterable[Site] = (),
    ) -> dict[Site, Tensor]:
        """One forward pass without gradients.

        Each edit gets the value of its site and returns what stands there instead; a read gives
        the value after the edit. Sites are visited in the order of execution, so an edit may use
        what an earlier one has seen. ``Site("logits")`` is always in the result.
        """
        ...


def check_editable(edits: Iterable[Site]) -> None:
    """Refuse edits of sites that can only be read."""
    if refused := [str(site) for site in edits if site.name in READ_ONLY_SITES]:
        raise InputError(f"these sites can be read but not edited: {', '.join(refused)}")


def read_sites(
    backend: Backend, tokens: Int[Tensor, "batch pos"], reads: Iterable[Site]
) -> dict[Site, Tensor]:
    """Sites of a forward pass that goes no further than the last of them: the unembedding, which
    may cost as much as several layers, is left out.

    A backend that can do so has a method ``read(tokens, reads)``; others run a whole pass.
    """
    read = getattr(backend, "read", None)
    if read is not None:
        return read(tokens, reads)
    reads = set(reads)
    found = backend.forward(tokens, reads=reads)
    return {site: found[site] for site in reads}


def capture_sites(geometry: Geometry) -> list[Site]:
    """The sites of a full capture."""
    g = geometry
    layer = ["resid_pre", "v", "z", "pattern", "attn_out"]
    layer += ["mlp_out"] * g.has_mlp + ["mlp_raw"] * (g.has_mlp and g.mlp_post_norm)
    model = ["embed", "resid_final"] + ["pos_embed"] * g.learned_positions
    model += ["unembed_in"] * (g.logit_soft_cap is not None)
    return [Site(n) for n in model] + [Site(n, i) for i in range(g.n_layers) for n in layer]


def capture(
    backend: Backend, tokens: Int[Tensor, "batch pos"], more: Iterable[Site] = ()
) -> Capture:
    """Run the model once and keep everything the algebra needs, on the device of its input."""
    found = backend.forward(tokens, reads=[*capture_sites(backend.geometry), *more])
    # Position embeddings come once for the whole batch on some hosts.
    values = {
        site: value.expand(len(tokens), *value.shape[1:]).to(backend.geometry.device)
        for site, value in found.items()
    }
    _check_finite(backend, values)
    return Capture(tokens, values)


_ORDER = (
    "resid_pre", "attn_in", "v", "pattern", "z", "attn_out", "mlp_in", "mlp_raw", "mlp_out",
)  # fmt: skip


def _check_finite(backend: Backend, values: Mapping[Site, Tensor]) -> None:
    """Refuse NaN and infinity, naming the first site in the order of execution that holds them."""
    wrong = [site for site, value in values.items() if not torch.isfinite(value).all()]
    if not wrong:
        return

    def when(site: Site) -> tuple[int, int]:
        if site.name in _ORDER:
            return site.layer, _ORDER.index(site.name)
        return (-1, 0) if site.name in ("embed", "pos_embed") else (backend.geometry.n_layers, 0)

    first = min(wrong, key=when)
    where = "" if first.name not in _ORDER else f" of layer {first.layer}"
    model = getattr(backend, "model", None)
    named = model.named_parameters() if isinstance(model, torch.nn.Module) else ()
    names = [name for name, p in named if not p.is_meta and not torch.isfinite(p).all()]
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    reason = (
        f"so do its parameters {', '.join(names[:5])}{more}; load sound weights"
        if names
        else f"its parameters are finite, so the values overflow {backend.geometry.dtype}; load "
        "the model in a wider dtype"
    )
    raise BackendError(
        f"{_who(backend)}: {first.name}{where} holds NaN or infinity, and nothing before it; "
        f"{reason}"
    )


_LOCKS: weakref.WeakKeyDictionary[Any, threading.RLock] = weakref.WeakKeyDictionary()  # pyright: ignore[reportInvalidTypeForm]
_LOCKS_LOCK = threading.Lock()


def lock_of(model: Any) -> Any:
    """The lock that every forward pass with hooks on a model holds.

    Hooks sit on the model, which threads and lenses share: without it one would read the values of
    another.
    """
    with _LOCKS_LOCK:
        return _LOCKS.setdefault(model, threading.RLock())


def uncapped_logits(
    backend: Backend, values: Mapping[Site, Tensor], tokens: list[int], position: int
) -> Float[Tensor, "batch token"]:
    """The host's logits of some tokens at one position, before any final soft-cap.

    A soft-cap cannot be undone exactly once rounded, so with one the host's final normalised
    residual stream (``unembed_in``) goes through the unembedding again. Half precision is promoted
    to float32.
    """
    logits = values[Site("logits")]
    dtype = torch.promote_types(logits.dtype, torch.float32)
    if backend.geometry.logit_soft_cap is None:
        return logits[:, position, tokens].to(dtype)
    W_U, b_U = backend.unembed()
    normalised = values[Site("unembed_in")][:, position].to(W_U.device, dtype)
    capped = normalised @ W_U[:, tokens].to(dtype)
    return capped if b_U is None else capped + b_U[tokens].to(dtype)


def repeat_kv(v: Float[Tensor, "... n_kv d_head"], n_heads: int) -> Tensor:
    """Values for every head, from the values of its key/value group; ``v`` itself if each head
    has its own."""
    repeats = n_heads // v.shape[-2]
    return v if repeats == 1 else v.repeat_interleave(repeats, dim=-2)


def mix_values(
    pattern: Float[Tensor, "*batch head query key"], v: Float[Tensor, "*batch key n_kv d_head"]
) -> Float[Tensor, "*batch query head d_head"]:
    """``z = pattern @ v``, with grouped values shared by their heads."""
    v = repeat_kv(v, pattern.shape[-3])
    return torch.einsum("...hqk,...khe->...qhe", pattern, v)


def self_check(backend: Backend) -> None:
    """Check on a short input that the model is what its geometry and weights say.

    Raises:
        BackendError: naming the identity that failed, and by how much.
    """
    g = backend.geometry
    tokens = _check_tokens(g)
    weights_of = [backend.layer_weights(i).to(g.dtype, g.device) for i in range(g.n_layers)]
    mlp_in = [Site("mlp_in", i) for i, w in enumerate(weights_of) if g.has_mlp and w.mlp_norm]
    run = capture(backend, tokens, mlp_in)
    same = functools.partial(_same, backend)
    stream = run["embed", -1]
    if g.learned_positions:
        stream = stream + run["pos_embed", -1]
    for layer, weights in enumerate(weights_of):
        resid, v, z = (run[name, layer] for name in ("resid_pre", "v", "z"))
        same(f"writers sum to resid_pre in layer {layer}", stream, resid)
        values = weights.values(weights.norm.as_host(resid))
        same(f"v = N(resid_pre) W_V + b_V in layer {layer}", values, v)
        same(f"z = pattern @ v in layer {layer}", mix_values(run["pattern", layer].to(v), v), z)
        out = weights.attn_out(z)
        if weights.post_norm is not None:
            out = weights.post_norm.as_host(out)
        same(f"z W_O + b_O = what attention adds in layer {layer}", out, run["attn_out", layer])
        if weights.mlp_norm is not None and g.has_mlp:
            middle = resid if g.parallel else resid + run["attn_out", layer]
            out = weights.mlp_norm.as_host(middle)
            same(f"N(residual) = input of the MLP in layer {layer}", out, run["mlp_in", layer])
        if weights.mlp_post_norm is not None and g.has_mlp:
            out = weights.mlp_post_norm.as_host(run["mlp_raw", layer])
            same(f"the MLP's post-norm in layer {layer}", out, run["mlp_out", layer])
        stream = resid + run["attn_out", layer]
        if g.has_mlp:
            stream = stream + run["mlp_out", layer]
    same("writers sum to the final residual", stream, run["resid_final", -1])
    W_U, b_U = (None if w is None else w.to(g.device) for w in backend.unembed())
    assert W_U is not None
    logits = backend.final_norm().as_host(stream) @ W_U
    logits = logits if b_U is None else logits + b_U
    if g.logit_soft_cap is not None:
        logits = g.logit_soft_cap * (logits / g.logit_soft_cap).tanh()
    same("logits = N(resid_final) W_U + b_U", logits, run.logits)

    last = Site("z", g.n_layers - 1)
    edited = backend.forward(tokens, {last: lambda z: torch.zeros_like(z) + 3 * z.flip(-1)})
    if torch.equal(edited[Site("logits")], run.logits):
        raise BackendError(
            f"{_who(backend)}: an edit at {last} does not change the logits. {_ADVICE}"
        )


def check_mlps(backend: Backend) -> None:
    """Check on a short input that each MLP is what its weights say.

    Raises:
        BackendError: naming the layer that is not, and by how much.
        UnsupportedError: MLPs of another form.
    """
    g = backend.geometry
    run = capture(backend, _check_tokens(g))
    for layer in range(g.n_layers):
        weights = backend.mlp_weights(layer).to(g.dtype, g.device)
        norm = backend.layer_weights(layer).mlp_norm or Norm("none")
        stream = run["resid_pre", layer]
        if not g.parallel:
            stream = stream + run["attn_out", layer]
        expected = run["mlp_raw" if g.mlp_post_norm else "mlp_out", layer]
        what = f"the MLP from its weights in layer {layer}"
        _same(backend, what, weights.raw(norm.as_host(stream)), expected)


def _check_tokens(geometry: Geometry) -> Tensor:
    """Distinct tokens, away from id 0, so that position and token mistakes show."""
    g = geometry
    return (torch.arange(1, 7, device=g.device) * 37 % g.d_vocab)[None, : g.n_ctx]


def _same(backend: Backend, name: str, got: Tensor, expected: Tensor) -> None:
    tolerance = 1e-4 if backend.geometry.dtype.itemsize >= 4 else 5e-2
    if got.shape != expected.shape:
        raise BackendError(
            f"{_who(backend)}: {name} failed: shapes {tuple(got.shape)} and "
            f"{tuple(expected.shape)} differ. {_ADVICE}"
        )
    size = expected.abs().max().item()
    error = (got.double() - expected.double()).abs().max().item()
    if not error <= tolerance * max(size, 1e-6):
        raise BackendError(
            f"{_who(backend)}: {name} failed: largest difference {error:.3g}, largest value "
            f"{size:.3g}, allowed {tolerance:g} of it. {_ADVICE}"
        )


_ADVICE = "The model is refused, since attributions on it would be wrong."


def _who(backend: Backend) -> str:
    return f"{backend.geometry.model_name} on {backend.host}"
