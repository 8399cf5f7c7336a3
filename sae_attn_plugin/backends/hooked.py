"""Hook points of attention for models that sae_lens would otherwise see only module by module.

sae_lens hosts Hugging Face models as ``HookedProxyLM``, whose hook points are module outputs. z is
the *input* of the output projection, so it has none. Here z, v, the pattern and what attention adds
get TransformerLens' names and head shapes, on Hugging Face models and on ``TransformerBridge``.
"""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint
from transformer_lens.HookedRootModule import HookedRootModule
from transformer_lens.HookedTransformer import Output
from transformer_lens.utils import lm_cross_entropy_loss

from sae_attn_plugin.backends.architectures import (
    Architecture,
    check_modules,
    find_architecture,
    read_geometry,
    read_layer,
)
from sae_attn_plugin.backends.protocol import Geometry, Site, lock_of, mix_values
from sae_attn_plugin.backends.walk import replace_values, select_values, submodule
from sae_attn_plugin.errors import BackendError, InputError, UnsupportedError
from sae_attn_plugin.tokens import need_tokenizer, own_convention

__all__ = ["HOOKS", "HookedModel", "hooked"]

HOOKS = (
    "hook_resid_pre",
    "attn.hook_v",
    "attn.hook_z",
    "attn.hook_pattern",
    "hook_attn_out",
    "hook_mlp_out",
    "hook_resid_post",
)
"""Hook points of a block, under ``blocks.{layer}.``, as a Hugging Face model runs them."""


@dataclass(frozen=True)
class _Tap:
    """Where a hook point is in the host: which side of which module, and how its tensor is shaped.

    ``path`` is followed anew for every forward pass, since sae_lens replaces modules of a bridge.
    ``take`` gives the hook point's tensor; ``put`` the module's own from the old one and the new
    tensor, or is None where the host does not read the value again.
    """

    path: str
    side: Literal["input", "output"]
    take: Callable[[Any], Any]
    put: Callable[[Any, Tensor], Any] | None


class _Stop(Exception):
    """Ends a forward pass early, with the residual stream it has reached."""

    def __init__(self, residual: Tensor) -> None:
        self.residual = residual


class HookedModel(HookedRootModule):
    """A Hugging Face model or a TransformerBridge with attention's hook points.

    It is what sae_lens expects of a model: ``ActivationsStore``, ``override_model=`` of the
    training runners and ``run_evals`` take it, and so does :func:`cache_activations`. Hook points
    of every layer, named and shaped as TransformerLens has them:

    ====================================  ==========================================
    ``blocks.{layer}.attn.hook_z``        ``[batch, position, n_heads, d_head]``
    ``blocks.{layer}.attn.hook_v``        ``[batch, position, n_kv_heads, d_head]``
    ``blocks.{layer}.attn.hook_pattern``  ``[batch, n_heads, query, key]``
    ``blocks.{layer}.hook_attn_out``      ``[batch, position, d_model]``, as added to the stream
    ``blocks.{layer}.hook_resid_pre``, ``hook_resid_post``, ``hook_mlp_out``   likewise
    ====================================  ==========================================

    Hooks read and replace, forward and backward, as on ``HookedTransformer``. On a Hugging Face
    model the pattern is only a by-product: it can be read, under eager attention, but a hook that
    returns another one is refused; set ``hook_z`` instead. The model itself carries hooks only
    while a forward pass runs.

    Args:
        model: a Hugging Face causal language model of a known architecture (also one wrapped by
            nnsight), or a ``TransformerBridge``.
        tokenizer: default: the model object's own. Needed for strings only.

    Raises:
        InputError, UnsupportedError, BackendError: the model is unknown, in training mode, or fails
            a check of its hook points on a short input (``z W_O + b_O`` = what attention adds).
    """

    tokenizer: Any
    cfg: Geometry
    blocks: nn.ModuleList
    mod_dict: dict[str, nn.Module]
    hook_dict: dict[str, HookPoint]

    def __init__(self, model: Any, tokenizer: Any = None) -> None:
        super().__init__()
        kinds = {f"{cls.__module__.split('.')[0]}.{cls.__name__}" for cls in type(model).__mro__}
        if kinds & {"nnsight.NNsight", "nnsight.Envoy"}:
            tokenizer = tokenizer or getattr(model, "tokenizer", None)
            model = model._module
            kinds |= {
                f"{cls.__module__.split('.')[0]}.{cls.__name__}" for cls in type(model).__mro__
            }
        if not kinds & {"transformers.PreTrainedModel", "transformer_lens.TransformerBridge"}:
            raise InputError(
                f"{type(model).__module__}.{type(model).__qualname__} has no hook points to offer; "
                "expected a Hugging Face model or a TransformerBridge"
            )
        if model.training:
            raise InputError(
                "the model is in training mode (dropout is on); call model.eval() first"
            )
        self.model = model
        self.tokenizer = tokenizer or getattr(model, "tokenizer", None)
        self._bridge = "transformer_lens.TransformerBridge" in kinds
        row: Architecture | None = None
        if self._bridge:
            self.cfg, taps, self._stops = _bridge_taps(model)
        else:
            row = find_architecture(model.config.model_type)
            check_modules(model, row)
            self.cfg = read_geometry(model, row)
            taps, self._stops = _huggingface_taps(model, row, self.cfg)
        self._taps = taps
        self.blocks = nn.ModuleList(_Block() for _ in range(self.cfg.n_layers))
        self.setup()
        if row is not None:  # the bridge was checked by its backend
            self._check(row)

    def setup(self) -> None:
        """Name the hook points. The host's own modules, and hook points, are not among them."""
        self.mod_dict, self.hook_dict = {}, {}
        for layer, block in enumerate(self.blocks):
            for name in HOOKS:
                if (name, layer) in self._taps:
                    point = submodule(block, name)
                    point.name = f"blocks.{layer}.{name}"
                    self.mod_dict[point.name] = self.hook_dict[point.name] = point

    # -- what HookedTransformer has ---------------------------------------------------------------

    def forward(
        self,
        input: str | list[str] | Int[Tensor, "batch pos"],
        return_type: Literal["logits", "loss", "both"] | None = "logits",
        loss_per_token: bool = False,
        stop_at_layer: int | None = None,
        prepend_bos: bool | None = None,
        **options: Any,
    ) -> Any:
        """As ``HookedTransformer.forward``.

        Args:
            input: token ids or text.
            return_type: ``"logits"``, ``"loss"``, ``"both"`` or None.
            loss_per_token: loss as ``[batch, position - 1]`` instead of its mean.
            stop_at_layer: return the residual stream before that layer instead, and compute no
                further.
            prepend_bos: for text.
            options: of the host's own forward, such as ``attention_mask``.

        Raises:
            InputError: more tokens than the context.
        """
        tokens = input if isinstance(input, Tensor) else self.to_tokens(input, prepend_bos)
        if tokens.shape[-1] > self.cfg.n_ctx:
            raise InputError(
                f"the prompt has {tokens.shape[-1]} tokens, but the model's context is "
                f"{self.cfg.n_ctx}; shorten it"
            )
        if return_type not in ("logits", "loss", "both", None):
            raise InputError(f"return_type={return_type!r}; known: logits, loss, both, None")
        if stop_at_layer is not None:
            layer = stop_at_layer + self.cfg.n_layers * (stop_at_layer < 0)
            if not 0 <= layer <= self.cfg.n_layers:
                raise InputError(
                    f"stop_at_layer {stop_at_layer}; the model has {self.cfg.n_layers} layers"
                )
            stop_at_layer = layer
        logits = residual = None
        # The host carries hooks while it runs, and lenses and other threads share it.
        with lock_of(self.model), self._tapped(stop_at_layer):
            try:
                logits = self._logits(tokens, options)
            except _Stop as stop:
                residual = stop.residual
        if logits is None:
            return residual
        if return_type is None:
            return None
        if return_type == "logits":
            return logits
        loss = lm_cross_entropy_loss(logits, tokens.to(logits.device), per_token=loss_per_token)
        return loss if return_type == "loss" else Output(logits, loss)

    def _logits(self, tokens: Tensor, options: dict[str, Any]) -> Tensor:
        if self._bridge:
            # Without a mask, a tokenizer that pads on the left makes TransformerLens hide tokens.
            options.setdefault("attention_mask", torch.ones_like(tokens))
            return self.model(tokens, return_type="logits", **options)
        return self.model(tokens, use_cache=False, **options).logits

    def to_tokens(
        self,
        input: str | list[str],
        prepend_bos: bool | None = None,
        padding_side: str | None = None,
        move_to_device: bool = True,
        truncate: bool = True,
    ) -> Int[Tensor, "batch pos"]:
        """Token ids of a text, or of texts of equal length; nothing is padded."""
        tokenizer = need_tokenizer(self.tokenizer)
        if padding_side is not None:
            raise InputError("nothing is padded here; leave padding_side=None")
        if prepend_bos is None:
            prepend_bos = own_convention(tokenizer)
        start = [tokenizer.bos_token_id] if prepend_bos else []
        rows = []
        for text in [input] if isinstance(input, str) else input:
            ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
            ids = ids if ids[:1] == start else start + ids
            rows.append(ids[: self.cfg.n_ctx] if truncate else ids)
        if len({len(row) for row in rows}) > 1:
            raise InputError("the texts have unequal numbers of tokens and make no rectangle")
        tokens = torch.tensor(rows, dtype=torch.long)
        return tokens.to(self.cfg.device) if move_to_device else tokens

    def run_with_cache(self, *args: Any, names_filter: Any = None, **kwargs: Any) -> Any:
        """Output and ``{hook name: activation}``, as on ``HookedTransformer``.

        Raises:
            InputError: a name that does not exist, or a filter that finds none.
        """
        wanted: Any = [names_filter] if isinstance(names_filter, str) else names_filter
        if callable(wanted):
            if not any(map(wanted, self.hook_dict)):
                raise InputError(
                    f"names_filter finds no hook point; there are: {self._known_names()}"
                )
        elif wanted is not None:
            wanted = [self._known(name) for name in wanted]
        return super().run_with_cache(*args, names_filter=cast(Any, wanted), **kwargs)

    @contextlib.contextmanager
    def hooks(self, *args: Any, **kwargs: Any) -> Generator[Any]:
        """As on ``HookedTransformer``; of threads that hook one model, each waits for the others,
        so that hooks see their own thread's pass only."""
        with lock_of(self.model), super().hooks(*args, **kwargs) as model:
            yield model

    def add_hook(self, name: Any, *args: Any, **kwargs: Any) -> None:
        """As on ``HookedTransformer``; an unknown name raises :class:`InputError`."""
        super().add_hook(self._known(name) if isinstance(name, str) else name, *args, **kwargs)

    def _enable_hook(self, name: Any, hook: Any, dir: Literal["fwd", "bwd"]) -> None:
        if isinstance(name, str):
            self._known(name)
        elif not any(map(name, self.hook_dict)):
            raise InputError(f"the filter finds no hook point; there are: {self._known_names()}")
        super()._enable_hook(name, hook, dir)

    def _known(self, name: str) -> str:
        if name in self.hook_dict:
            return name
        close = difflib.get_close_matches(name, self.hook_dict, n=2)
        hint = f"; did you mean {' or '.join(close)}?" if close else ""
        raise InputError(f"no hook point {name!r}; there are: {self._known_names()}{hint}")

    def _known_names(self) -> str:
        last = self.cfg.n_layers - 1
        here = [name for name in HOOKS if (name, 0) in self._taps]
        return f"blocks.LAYER.NAME with layers 0..{last} and names {', '.join(here)}"

    # -- taps --------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _tapped(self, stop: int | None) -> Generator[None]:
        """Connect the hook points that have hooks with the host, for one forward pass."""
        handles, waiting = [], set()
        try:
            for (name, layer), tap in self._taps.items():
                point = self.hook_dict[f"blocks.{layer}.{name}"]
                if not point._forward_hooks and not point._backward_hooks:
                    continue
                module = submodule(self.model, tap.path)
                if tap.side == "input":
                    hook = _input_hook(tap, point, waiting)
                    handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
                else:
                    handles.append(module.register_forward_hook(_output_hook(tap, point, waiting)))
                if stop is None or layer < stop:
                    waiting.add(point.name)
            if stop is not None:
                # Last of all, so that hooks at the same place have seen their value.
                handles.append(self._stops[stop].register_forward_pre_hook(_stop, with_kwargs=True))
            yield
            if waiting:
                raise BackendError(
                    f"{self.cfg.model_name}: these hook points were never reached, although the "
                    f"model ran: {', '.join(sorted(waiting))}. Load the model afresh"
                )
        finally:
            for handle in handles:
                handle.remove()

    def _check(self, row: Architecture) -> None:
        """What is hooked is what the names say, on a short input."""
        g = self.cfg
        tokens = (torch.arange(1, 7, device=g.device) * 37 % g.d_vocab)[None, : g.n_ctx]
        eager = self.model.config._attn_implementation == "eager"
        names = [name for name in self.hook_dict if eager or not name.endswith("pattern")]
        with torch.no_grad():
            logits, cache = self.run_with_cache(tokens, names_filter=names)
        tolerance = 1e-4 if g.dtype.itemsize >= 4 else 5e-2

        def same(what: str, got: Tensor, expected: Tensor) -> None:
            error = (got.double() - expected.double()).abs().max().item()
            if not error <= tolerance * max(expected.abs().max().item(), 1e-6):
                raise BackendError(
                    f"{g.model_name}: {what} failed: largest difference {error:.3g}. The model is "
                    "refused, since its hook points would not be what their names say"
                )

        for layer in range(g.n_layers):
            at = {name: cache.get(f"blocks.{layer}.{name}") for name in HOOKS}
            weights = read_layer(self.model, row, g, layer).to(g.dtype, g.device)
            out = weights.attn_out(at["attn.hook_z"])
            out = out if weights.post_norm is None else weights.post_norm.as_host(out)
            same(f"z W_O + b_O = what attention adds in layer {layer}", at["hook_attn_out"], out)
            values = weights.values(weights.norm.as_host(at["hook_resid_pre"]))
            same(f"v = N(resid_pre) W_V + b_V in layer {layer}", at["attn.hook_v"], values)
            if eager:
                z = mix_values(at["attn.hook_pattern"].to(values), at["attn.hook_v"])
                same(f"z = pattern @ v in layer {layer}", at["attn.hook_z"], z)
        last = f"blocks.{g.n_layers - 1}.attn.hook_z"
        with torch.no_grad():
            edited = self.run_with_hooks(
                tokens,
                fwd_hooks=[(last, lambda z, hook: 3 * z.flip(-1))],  # noqa: ARG005
            )
        if torch.equal(edited, logits):
            raise BackendError(f"{g.model_name}: an edit at {last} does not change the logits")


class _Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.hook_v, self.hook_z, self.hook_pattern = HookPoint(), HookPoint(), HookPoint()


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = _Attention()
        self.hook_resid_pre, self.hook_attn_out = HookPoint(), HookPoint()
        self.hook_mlp_out, self.hook_resid_post = HookPoint(), HookPoint()


def hooked(model: Any, tokenizer: Any = None) -> HookedRootModule:
    """A model as sae_lens takes it, with ``blocks.{layer}.attn.hook_z`` on every host.

    Args:
        model: a Hugging Face or nnsight model or a ``TransformerBridge``, which becomes a
            :class:`HookedModel`; a ``HookedTransformer`` has its hook points and comes back as it
            is.
        tokenizer: default: the model object's own.
    """
    if isinstance(model, HookedModel):
        return model
    kinds = {f"{cls.__module__.split('.')[0]}.{cls.__name__}" for cls in type(model).__mro__}
    if "transformer_lens.HookedTransformer" in kinds:
        return model
    return HookedModel(model, tokenizer)


# -- hosts ---------------------------------------------------------------------------------------

_Taps = dict[tuple[str, int], _Tap]


def _same(value: Any) -> Any:
    return value


def _new(_old: Any, value: Tensor) -> Tensor:
    return value


def _first(value: Any) -> Any:
    """Some versions and models return tuples from their blocks."""
    return value[0] if isinstance(value, tuple) else value


def _put_first(old: Any, value: Tensor) -> Any:
    return (value, *old[1:]) if isinstance(old, tuple) else value


def _huggingface_taps(
    model: nn.Module, row: Architecture, g: Geometry
) -> tuple[_Taps, list[nn.Module]]:
    taps: _Taps = {}
    blocks = submodule(model, row.blocks)

    def heads(value: Tensor) -> Tensor:
        return value.unflatten(-1, (g.n_heads, g.d_head))

    for layer in range(g.n_layers):
        block = f"{row.blocks}.{layer}"
        found = {
            "hook_resid_pre": _Tap(block, "input", _same, _new),
            "attn.hook_v": _Tap(
                f"{block}.{row.values}",
                "output",
                lambda out: select_values(out, row.layout, g.n_kv_heads, g.d_head),
                lambda out, v: replace_values(out, row.layout, v),
            ),
            "attn.hook_z": _Tap(
                f"{block}.{row.out_projection}", "input", heads, lambda _old, z: z.flatten(-2)
            ),
            "attn.hook_pattern": _Tap(
                f"{block}.{row.attention}", "output", lambda out: out[1], None
            ),
            "hook_attn_out": _Tap(
                f"{block}.{row.post_norm or row.out_projection}", "output", _first, _put_first
            ),
            "hook_mlp_out": _Tap(
                f"{block}.{row.mlp_post_norm or row.mlp}", "output", _first, _put_first
            ),
            "hook_resid_post": _Tap(block, "output", _first, _put_first),
        }
        taps |= {(name, layer): tap for name, tap in found.items()}
    return taps, [*blocks, submodule(model, row.final_norm)]


def _bridge_taps(bridge: Any) -> tuple[Geometry, _Taps, list[nn.Module]]:
    # The backend knows the bridge's canonical names and checks them; hooks at its alias names never
    # fire on some of its subclasses, and nothing says so.
    from sae_attn_plugin.backends.transformer_lens import TransformerLensBackend

    backend = TransformerLensBackend(bridge)
    g = backend.geometry
    sites = {
        "hook_resid_pre": "resid_pre",
        "attn.hook_v": "v",
        "attn.hook_z": "z",
        "attn.hook_pattern": "pattern",
        "hook_attn_out": "attn_out",
        "hook_mlp_out": "mlp_out",
    }
    shapes = {"attn.hook_z": (g.n_heads, g.d_head), "attn.hook_v": (g.n_kv_heads, g.d_head)}
    taps: _Taps = {}
    for layer in range(g.n_layers):
        paths = {name: backend.hook_name(Site(site, layer)) for name, site in sites.items()}
        paths["hook_resid_post"] = f"blocks.{layer}.hook_out"
        for name, path in paths.items():
            if name in shapes:
                tap = _Tap(path, "output", _reshaped(shapes[name]), _as_before)
            else:
                tap = _Tap(path, "output", _first, _put_first)
            taps[name, layer] = tap
    return g, taps, [*bridge.blocks, bridge.ln_final]


def _reshaped(shape: tuple[int, int]) -> Callable[[Tensor], Tensor]:
    return lambda value: value.reshape(*value.shape[:2], *shape)


def _as_before(old: Tensor, value: Tensor) -> Tensor:
    return value.reshape(old.shape)


# -- torch hooks ---------------------------------------------------------------------------------


def _through(tap: _Tap, point: HookPoint, whole: Any) -> Any:
    value = tap.take(whole)
    if value is None:
        raise BackendError(
            f"{point.name}: the model returned no attention weights; load it with "
            "attn_implementation='eager', or call model.set_attn_implementation('eager')"
        )
    result = point(value)
    if result is value and _is_view(value, _first(whole)):
        return whole  # an edit in place has reached it
    if tap.put is not None:
        return tap.put(whole, result)
    if result is not value:
        raise UnsupportedError(
            f"{point.name} can only be read on a Hugging Face model, whose attention does not read "
            "it again; set blocks.LAYER.attn.hook_z to the other pattern @ v instead"
        )
    return whole


def _is_view(value: Tensor, whole: Tensor) -> bool:
    return value.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()


def _input_hook(tap: _Tap, point: HookPoint, waiting: set[str | None]) -> Any:
    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        waiting.discard(point.name)
        if args:
            return (_through(tap, point, args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": _through(tap, point, kwargs["hidden_states"])}

    return hook


def _output_hook(tap: _Tap, point: HookPoint, waiting: set[str | None]) -> Any:
    def hook(_module: nn.Module, _args: Any, out: Any) -> Any:
        waiting.discard(point.name)
        return _through(tap, point, out)

    return hook


def _stop(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    raise _Stop(cast(Tensor, args[0] if args else kwargs["hidden_states"]))
