"""Hosts: TransformerLens and nnsight behind one small protocol."""

from __future__ import annotations

from typing import Any

from sae_attn_plugin.backends.protocol import Backend
from sae_attn_plugin.errors import InputError

__all__ = ["Backend", "as_backend"]


def as_backend(model: Any, tokenizer: Any = None, remote: bool | str = False) -> Backend:
    """The backend of a model, told by its class.

    Raises:
        InputError: for an object that is none of the known kinds of model, and for ``remote`` with
            a host other than nnsight.
    """
    if type(model).__name__ == "HookedModel":  # our own hook points, seen through
        tokenizer, model = tokenizer or model.tokenizer, model.model
    names = {f"{cls.__module__.split('.')[0]}.{cls.__name__}" for cls in type(model).__mro__}
    on_nnsight = names & {"transformers.PreTrainedModel", "nnsight.NNsight", "nnsight.Envoy"}
    if remote and not on_nnsight:
        raise InputError(
            f"remote={remote!r} needs an nnsight model, not {type(model).__qualname__}"
        )
    if names & {"transformer_lens.HookedTransformer", "transformer_lens.TransformerBridge"}:
        from sae_attn_plugin.backends.transformer_lens import TransformerLensBackend

        return TransformerLensBackend(model, tokenizer)
    if on_nnsight:
        from sae_attn_plugin.backends.huggingface import HuggingFaceBackend

        return HuggingFaceBackend(model, tokenizer, remote)
    if {"host", "geometry", "forward", "layer_weights"} <= set(dir(model)):
        return model
    raise InputError(
        f"{type(model).__module__}.{type(model).__qualname__} is not a model this package can "
        "host; expected a HookedTransformer, a TransformerBridge, an nnsight model or a Hugging "
        "Face model"
    )
