"""Run a model with SAEs' reconstructions in place of z, on any host.

sae_lens splices by replacing a hook point with a wrapper and puts a new hook point there when done:
permanent hooks are lost, on a bridge the hook point stays broken, and a hook that does not exist is
skipped with a warning. Here nothing is replaced: forward hooks come and go.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Generator, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sae_attn_plugin.backends.protocol import lock_of
from sae_attn_plugin.errors import InputError

if TYPE_CHECKING:
    from jaxtyping import Float

    from sae_attn_plugin.saes import AttentionSAE

__all__ = ["Spliced", "splice"]

FeatureEdit = Callable[[Tensor, "AttentionSAE"], "Tensor | None"]


@dataclass(frozen=True)
class Spliced:
    """What is spliced into a model, and what it saw.

    Attributes:
        saes: the SAEs by layer, or by ``(layer, head)`` for those of one head.
        features: of the latest forward pass, keyed likewise: ``[batch, position, d_sae]``, before
            any edit.
    """

    saes: dict[Any, AttentionSAE]
    features: dict[Any, Float[Tensor, "batch position d_sae"]] = field(default_factory=dict)


@contextlib.contextmanager
def splice(
    model: Any, saes: Any, *, error_term: bool = False, edit: FeatureEdit | None = None
) -> Generator[Spliced]:
    """Within the context, the model runs with each SAE's reconstruction in place of its z.

    Args:
        model: ``HookedTransformer``, ``HookedSAETransformer``, ``TransformerBridge``,
            ``SAETransformerBridge``, a Hugging Face model, or one wrapped by nnsight.
        saes: sae_lens SAEs on attention z: one, a list, a dict, a folder or a release. Several may
            be of single heads of one layer; other heads pass through.
        error_term: add what each SAE leaves over, so that a run without edits is that of the model
            alone. It carries no gradient.
        edit: called with an SAE's features ``[batch, position, d_sae]`` and the SAE; returns the
            features to decode, or None to leave them.

    Yields:
        :class:`Spliced`.

    Raises:
        InputError: a layer the model does not have, heads that do not fit, two SAEs for one place,
            a model with an SAE attached there already.

    An SAE known to be trained on z without value biases (:func:`sap.releases`, ``value_biases``)
    is moved to the model's z.

    While the context is open, other threads that splice this model or run a lens on it wait. A
    thread that calls the model itself sees what is spliced in.
    """
    host = _host(model)
    placed: dict[int, list[AttentionSAE]] = {}
    for sae in _read(saes, host):
        layer = _layer(sae)
        for other in placed.setdefault(layer, []):
            if other.head is None or sae.head is None or other.head == sae.head:
                head = "" if sae.head is None else f", head {sae.head}"
                raise InputError(f"two SAEs for hook_z of layer {layer}{head}; give one")
        placed[layer].append(sae)
    spliced = Spliced(
        {
            layer if sae.head is None else (layer, sae.head): sae
            for layer, group in placed.items()
            for sae in group
        }
    )
    handles = []
    with lock_of(host.model):
        try:
            for layer, group in placed.items():
                module, side = host.place(layer)
                run = functools.partial(_replaced, spliced, layer, group, error_term, edit)
                if side == "input":
                    hook = functools.partial(_before, run)
                    handles.append(module.register_forward_pre_hook(hook))
                else:
                    handles.append(module.register_forward_hook(functools.partial(_after, run)))
            yield spliced
        finally:
            for handle in handles:
                handle.remove()


def _replaced(
    spliced: Spliced,
    layer: int,
    group: list[AttentionSAE],
    error_term: bool,
    edit: FeatureEdit | None,
    z: Tensor,
) -> Tensor:
    now = z.reshape(*z.shape[:2], group[0].n_heads, group[0].d_head)
    for sae in group:
        before = now
        features = sae.encode(before)
        clean = sae.decode(features)
        spliced.features[layer if sae.head is None else (layer, sae.head)] = features.detach()
        changed = None if edit is None else edit(features, sae)
        if changed is not None:
            sae.encode(before)  # what decode needs of it, again
        now = clean if changed is None else sae.decode(changed)
        if error_term:
            now = now + (before - clean).detach()
    return now.to(z.dtype).reshape(z.shape)


def _before(run: Callable[[Tensor], Tensor], module: nn.Module, args: tuple[Any, ...]) -> Any:  # noqa: ARG001
    return (run(args[0]), *args[1:])


def _after(run: Callable[[Tensor], Tensor], module: nn.Module, args: Any, out: Tensor) -> Tensor:  # noqa: ARG001
    return run(out)


def _read(saes: Any, host: _Host) -> Iterable[AttentionSAE]:
    from pathlib import Path

    from sae_lens import SAE

    from sae_attn_plugin.dictionaries import load_saes
    from sae_attn_plugin.heads import is_folded
    from sae_attn_plugin.saes import AttentionSAE, heads_of

    if isinstance(saes, str | Path):
        saes = load_saes(saes)
    if isinstance(saes, SAE):
        saes = [saes]
    found = list(saes.values() if isinstance(saes, Mapping) else saes)
    if not found:
        raise InputError("no SAEs given; expected at least one")
    for given in found:
        if not isinstance(given, SAE):
            raise InputError(f"expected sae_lens SAEs, got {type(given).__name__}")
        sae = AttentionSAE.of(given, n_heads=host.n_heads, d_head=host.d_head)
        layer = _layer(sae)
        if layer >= host.n_layers:
            raise InputError(
                f"the SAE on {sae.cfg.metadata.hook_name!r}: the model has only "
                f"{host.n_layers} layers"
            )
        if heads_of(sae.cfg) != (host.n_heads, host.d_head):
            raise InputError(
                f"the SAE on {sae.cfg.metadata.hook_name!r} is of {sae.n_heads} heads x "
                f"{sae.d_head}, the model has {host.n_heads} x {host.d_head}"
            )
        if is_folded(sae.cfg.metadata):
            sae = sae.shifted(host.value_bias_part(layer))
        yield sae


def _layer(sae: AttentionSAE) -> int:
    from sae_attn_plugin.saes import layer_of

    layer = layer_of(sae.cfg.metadata.hook_name)
    assert layer is not None  # AttentionSAE.of has checked
    return layer


# -- hosts ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Host:
    model: nn.Module  # whose lock it is
    n_layers: int
    n_heads: int
    d_head: int
    place: Callable[[int], tuple[nn.Module, str]]
    value_bias_part: Callable[[int], Tensor]


def _host(model: Any) -> _Host:
    names = {f"{cls.__module__.split('.')[0]}.{cls.__name__}" for cls in type(model).__mro__}
    if names & {"nnsight.NNsight", "nnsight.Envoy"}:
        return _host(model._module)
    if "transformers.PreTrainedModel" in names:
        return _huggingface(model)
    if "transformer_lens.TransformerBridge" in names:
        return _bridge(model)
    hooks = getattr(model, "hook_dict", {})
    if "blocks.0.attn.hook_z" in hooks or "transformer_lens.HookedTransformer" in names:
        return _hooked(model)
    raise InputError(
        f"{type(model).__module__}.{type(model).__qualname__} is not a model SAEs can be spliced "
        "into; expected a HookedTransformer, a TransformerBridge, a Hugging Face model or an "
        "nnsight model"
    )


def _hooked(model: Any) -> _Host:
    def place(layer: int) -> tuple[nn.Module, str]:
        return _free(model.blocks[layer].attn.hook_z, layer), "output"

    def value_bias_part(layer: int) -> Tensor:
        block = model.blocks[layer]
        bias = block.attn.b_V.detach()
        before = getattr(getattr(block, "ln1", None), "b", None)  # none where it was folded
        if before is not None:
            bias = bias + torch.einsum("d,hde->he", before.detach(), block.attn.W_V.detach())
        return bias

    cfg = model.cfg
    if not hasattr(model.blocks[0].attn, "b_V"):  # a HookedModel points at another, of any host
        behind = _host(model.model)
        return replace(behind, place=place)
    return _Host(model, cfg.n_layers, cfg.n_heads, cfg.d_head, place, value_bias_part)


def _bridge(model: Any) -> _Host:
    def place(layer: int) -> tuple[nn.Module, str]:
        return _free(model.blocks[layer].attn.o.hook_in, layer), "output"

    def value_bias_part(layer: int) -> Tensor:
        block = model.blocks[layer]
        W_V, b_V = block.attn.W_V.detach(), block.attn.b_V
        bias = W_V.new_zeros(W_V.shape[0], W_V.shape[2])
        if b_V is not None:
            bias = bias + b_V.detach().reshape(bias.shape)
        norm = getattr(getattr(block, "ln1", None), "original_component", None)
        before = getattr(norm, "bias", None)
        if before is not None:
            bias = bias + torch.einsum("d,kde->ke", before.detach(), W_V)
        return bias.repeat_interleave(model.cfg.n_heads // len(bias), dim=0)

    cfg = model.cfg
    return _Host(model, cfg.n_layers, cfg.n_heads, cfg.d_head, place, value_bias_part)


def _huggingface(model: Any) -> _Host:
    from sae_attn_plugin.backends.architectures import (
        check_modules,
        find_architecture,
        read_geometry,
        read_layer,
    )
    from sae_attn_plugin.backends.walk import submodule
    from sae_attn_plugin.heads import value_bias_part

    row = find_architecture(model.config.model_type)
    check_modules(model, row)
    geometry = read_geometry(model, row)
    blocks = submodule(model, row.blocks)
    return _Host(
        model,
        geometry.n_layers,
        geometry.n_heads,
        geometry.d_head,
        lambda layer: (submodule(blocks[layer], row.out_projection), "input"),
        lambda layer: value_bias_part(read_layer(model, row, geometry, layer)),
    )


def _free(hook_point: nn.Module, layer: int) -> nn.Module:
    if hasattr(hook_point, "sae"):
        raise InputError(
            f"sae_lens has an SAE attached at hook_z of layer {layer}; call model.reset_saes() "
            "first"
        )
    return hook_point
