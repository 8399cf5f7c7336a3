"""Hugging Face models through nnsight.

Sites are plain module inputs and outputs, never ``.source``, whose labels change between nnsight
versions. Reads and writes follow the order of execution, as a trace demands.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sae_attn_plugin.backends.architectures import (
    check_modules,
    execution_device,
    find_architecture,
    read_geometry,
    read_layer,
    read_matrix,
    read_norm,
    submodule,
)
from sae_attn_plugin.backends.protocol import (
    LAYER_SITES,
    READ_ONLY_SITES,
    Edit,
    LayerWeights,
    Norm,
    Site,
    self_check,
)
from sae_attn_plugin.errors import BackendError, InputError


class HuggingFaceBackend:
    """A Hugging Face causal language model, run by nnsight.

    Args:
        model: ``nnsight.NNsight``, ``TransformersModel`` / ``LanguageModel``, or the bare model.
        tokenizer: needed for string prompts where the model object has none.

    A model that does not return its attention weights (sdpa, flash attention) is switched to eager
    attention, with a warning, since attributions need the pattern.
    """

    host = "nnsight"

    def __init__(self, model: Any, tokenizer: Any = None) -> None:
        from nnsight import NNsight  # importing it patches object and torch: only when needed

        self._nn = NNsight(model) if isinstance(model, nn.Module) else model
        self.model: Any = self._nn._module
        self.tokenizer = tokenizer or getattr(self._nn, "tokenizer", None)
        if _is_offloaded(self.model):
            self._nn = _offloaded(self.model)
        self.revision: str | None = getattr(self.model.config, "_commit_hash", None)
        self._architecture = find_architecture(self.model.config.model_type)
        check_modules(self.model, self._architecture)
        self.geometry = read_geometry(self.model, self._architecture)
        # nnsight's tracing is bound to the thread that started it.
        self._lock = threading.Lock()
        if self.model.training:
            raise InputError(
                "the model is in training mode (dropout is on); call model.eval() first"
            )
        if self.model.config._attn_implementation != "eager":
            warnings.warn(
                f"{self.geometry.model_name} uses {self.model.config._attn_implementation!r} "
                "attention, which returns no attention weights: switched to 'eager'. Load it with "
                "attn_implementation='eager' to avoid this warning",
                stacklevel=3,
            )
            self.model.set_attn_implementation("eager")
        self_check(self)

    def layer_weights(self, layer: int) -> LayerWeights:
        return read_layer(self.model, self._architecture, self.geometry, layer)

    def final_norm(self) -> Norm:
        return read_norm(submodule(self.model, self._architecture.final_norm), self._architecture)

    def unembed(self) -> tuple[Tensor, Tensor | None]:
        return read_matrix(submodule(self.model, self._architecture.unembed))

    def forward(
        self,
        tokens: Tensor,
        edits: Mapping[Site, Edit] | None = None,
        reads: Iterable[Site] = (),
    ) -> dict[Site, Tensor]:
        edits = dict(edits or {})
        wanted = set(reads) | set(edits)
        if refused := [str(site) for site in edits if site.name in READ_ONLY_SITES]:
            raise InputError(f"these sites can be read but not edited: {', '.join(refused)}")
        found: dict[Site, Tensor] = {}
        with self._lock, torch.no_grad(), self._nn.trace(tokens, use_cache=False):
            self._body(wanted, edits, found)
        if missing := wanted - set(found):
            raise BackendError(f"not found in the model: {', '.join(map(str, missing))}")
        return found

    def _body(self, wanted: set[Site], edits: dict[Site, Edit], found: dict[Site, Tensor]) -> None:
        """Runs inside the trace, in the order of execution."""
        arch, root = self._architecture, self._nn

        def visit(site: Site, envoy: Any, side: str) -> None:
            if site in wanted:
                value = getattr(envoy, side)
                if site in edits:
                    value = edits[site](value)
                    setattr(envoy, side, value)
                found[site] = value

        visit(Site("embed"), submodule(root, arch.embed), "output")
        if arch.pos_embed is not None:
            visit(Site("pos_embed"), submodule(root, arch.pos_embed), "output")
        blocks = submodule(root, arch.blocks)
        layers = {site.layer for site in wanted if site.name in LAYER_SITES}
        for layer in sorted(layers):
            block = blocks[layer]
            visit(Site("resid_pre", layer), block, "input")
            if arch.norm is not None:
                visit(Site("attn_in", layer), submodule(block, arch.norm), "output")
            self._visit_values(
                Site("v", layer), submodule(block, arch.values), wanted, edits, found
            )
            projection = submodule(block, arch.out_projection)
            self._visit_z(Site("z", layer), projection, wanted, edits, found)
            if arch.post_norm is None:
                visit(Site("attn_out", layer), projection, "output")
            if Site("pattern", layer) in wanted:
                found[Site("pattern", layer)] = submodule(block, arch.attention).output[1]
            if arch.post_norm is not None:
                visit(Site("attn_out", layer), submodule(block, arch.post_norm), "output")
            mlp = submodule(block, arch.mlp)
            if arch.mlp_norm is not None:
                visit(Site("mlp_in", layer), mlp, "input")
            if arch.mlp_post_norm is None:
                visit(Site("mlp_out", layer), mlp, "output")
            else:
                visit(Site("mlp_raw", layer), mlp, "output")
                visit(Site("mlp_out", layer), submodule(block, arch.mlp_post_norm), "output")
        visit(Site("resid_final"), submodule(root, arch.final_norm), "input")
        visit(Site("unembed_in"), submodule(root, arch.final_norm), "output")
        found[Site("logits")] = root.output.logits

    def _visit_values(
        self,
        site: Site,
        envoy: Any,
        wanted: set[Site],
        edits: dict[Site, Edit],
        found: dict[Site, Tensor],
    ) -> None:
        if site not in wanted:
            return
        out = envoy.output
        value = self._architecture.select_values(out, self.geometry)
        if site in edits:
            value = edits[site](value)
            envoy.output = self._architecture.replace_values(out, value)
        found[site] = value

    def _visit_z(
        self,
        site: Site,
        envoy: Any,
        wanted: set[Site],
        edits: dict[Site, Edit],
        found: dict[Site, Tensor],
    ) -> None:
        if site not in wanted:
            return
        value = envoy.input.unflatten(-1, (self.geometry.n_heads, self.geometry.d_head))
        if site in edits:
            value = edits[site](value)
            envoy.input = value.flatten(-2)
        found[site] = value


def _is_offloaded(model: nn.Module) -> bool:
    """Whether accelerate keeps weights elsewhere until they are needed."""
    hooked = any(hasattr(module, "_hf_hook") for module in model.modules())
    return hooked and any(p.is_meta for p in model.parameters())


def _offloaded(model: nn.Module) -> Any:
    """A wrapper that sends inputs where the model computes, not where its first weight lies."""
    from nnsight import NNsight

    class Offloaded(NNsight):
        @property
        def device(self) -> torch.device | None:
            return execution_device(model.get_input_embeddings())  # type: ignore[operator]

    return Offloaded(model)
