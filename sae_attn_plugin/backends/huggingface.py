"""Hugging Face models through nnsight.

Sites are plain module inputs and outputs, never ``.source``, whose labels change between nnsight
versions. Reads and writes follow the order of execution, as a trace demands.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from sae_attn_plugin.backends.architectures import (
    WeightSource,
    check_modules,
    execution_device,
    find_architecture,
    mlp_matrices,
    read_geometry,
    read_layer,
    read_matrix,
    read_mlp,
    read_norm,
)
from sae_attn_plugin.backends.protocol import (
    LAYER_SITES,
    Edit,
    Geometry,
    LayerWeights,
    MlpWeights,
    Norm,
    Site,
    check_editable,
    lock_of,
    self_check,
)
from sae_attn_plugin.backends.scores import ScoreWeights, read_scores, score_modules
from sae_attn_plugin.backends.walk import fetch, submodule, walk
from sae_attn_plugin.errors import BackendError, InputError


class HuggingFaceBackend:
    """A Hugging Face causal language model, run by nnsight.

    Args:
        model: ``nnsight.NNsight``, ``TransformersModel`` / ``LanguageModel``, or the bare model.
        tokenizer: needed for string prompts where the model object has none.
        remote: ``True`` (nnsight's remote service), its address, or ``"local"`` (serialise like a
            remote run, then run here): every forward pass is sent there, and what the algebra needs
            comes back. The weights it needs are fetched once.

    A model that does not return its attention weights (sdpa, flash attention) is switched to eager
    attention, with a warning, since attributions need the pattern.
    """

    host = "nnsight"

    def __init__(self, model: Any, tokenizer: Any = None, remote: bool | str = False) -> None:
        from nnsight import NNsight  # importing it patches object and torch: only when needed

        self._nn = NNsight(model) if isinstance(model, nn.Module) else model
        self.model: Any = self._nn._module
        self.remote = remote
        if remote and not hasattr(self._nn, "_remote_backend"):
            raise InputError(
                f"remote={remote!r} needs a model that nnsight can find on the other side; load it "
                f"as nnsight.TransformersModel(name), not as {type(model).__name__}"
            )
        self.tokenizer: Any = tokenizer or getattr(self._nn, "tokenizer", None)
        if not remote and _is_offloaded(self.model):
            self._nn = _offloaded(self.model)
        self.revision: str | None = getattr(self.model.config, "_commit_hash", None)
        self._architecture = find_architecture(self.model.config.model_type)
        check_modules(self.model, self._architecture)
        self.geometry: Geometry = read_geometry(self.model, self._architecture)
        self._lock = lock_of(self.model)
        self._source: WeightSource | None = None
        if remote:
            # The model here may hold no weights at all.
            self.geometry = replace(self.geometry, device=torch.device("cpu"))
            self._source = self._fetched
            training = self._fetch()
        else:
            training = self.model.training
        if training:
            raise InputError(
                "the model is in training mode (dropout is on); call model.eval() first"
            )
        if not remote and self.model.config._attn_implementation != "eager":
            warnings.warn(
                f"{self.geometry.model_name} uses {self.model.config._attn_implementation!r} "
                "attention, which returns no attention weights: switched to 'eager'. Load it with "
                "attn_implementation='eager' to avoid this warning",
                stacklevel=3,
            )
            self.model.set_attn_implementation("eager")
        self_check(self)

    def layer_weights(self, layer: int) -> LayerWeights:
        return read_layer(self.model, self._architecture, self.geometry, layer, self._source)

    def score_weights(self, layer: int, n_positions: int) -> ScoreWeights:
        row = self._architecture
        if self.remote:
            self._fetch_weights(score_modules(row, layer))
        return read_scores(self.model, row, self.geometry, layer, n_positions, self._source)

    def mlp_weights(self, layer: int) -> MlpWeights:
        row = self._architecture
        if self.remote:
            self._fetch_weights(mlp_matrices(row, layer))
        return read_mlp(self.model, row, layer, self._source)

    def final_norm(self) -> Norm:
        row = self._architecture
        return read_norm(submodule(self.model, row.final_norm), row, self._source)

    def unembed(self) -> tuple[Tensor, Tensor | None]:
        return read_matrix(submodule(self.model, self._architecture.unembed), self._source)

    def forward(
        self,
        tokens: Tensor,
        edits: Mapping[Site, Edit] | None = None,
        reads: Iterable[Site] = (),
    ) -> dict[Site, Tensor]:
        edits, reads = dict(edits or {}), set(reads)
        check_editable(edits)
        return self._found(tokens, edits, reads, logits=True)

    def read(self, tokens: Tensor, reads: Iterable[Site]) -> dict[Site, Tensor]:
        """Sites of a forward pass that ends at the last of them; a remote pass is a whole one."""
        reads = set(reads)
        found = self._found(tokens, {}, reads, logits=bool(self.remote) or Site("logits") in reads)
        return {site: found[site] for site in reads}

    def _found(
        self, tokens: Tensor, edits: dict[Site, Edit], reads: set[Site], logits: bool
    ) -> dict[Site, Tensor]:
        wanted = reads | set(edits)
        with self._lock:
            found: dict[Site, Any] = self._trace(tokens, wanted, edits, reads, logits)
        if missing := reads - set(found):
            raise BackendError(f"not found in the model: {', '.join(map(str, missing))}")
        if any(value is None for value in found.values()):
            raise BackendError(
                f"{self.geometry.model_name}: {self._architecture.attention!r} returned no "
                "attention weights, which attributions need; it must return (output, weights)"
            )
        return found

    def _trace(
        self,
        tokens: Tensor,
        wanted: set[Site],
        edits: dict[Site, Edit],
        reads: set[Site],
        logits: bool,
    ) -> dict[Site, Tensor]:
        # Only plain data enters the trace, since a remote one is sent elsewhere.
        g, root, remote = self.geometry, self._nn, self.remote
        row, shape = dict(vars(self._architecture)), (g.n_heads, g.n_kv_heads, g.d_head)
        layers = sorted({site.layer for site in wanted if site.name in LAYER_SITES})
        read_at = {(site.name, site.layer) for site in reads}
        edit_at = {(site.name, site.layer): edit for site, edit in edits.items()}
        results: dict[Any, Any] = {}
        options: dict[str, Any] = {"use_cache": False}
        if not remote:
            with torch.no_grad(), root.trace(tokens, **options) as tracer:
                results.update(walk(root, row, shape, layers, read_at, edit_at, False, logits))
                if not logits:
                    tracer.stop()  # pyright: ignore[reportAttributeAccessIssue]
        else:
            from nnsight import save

            with root.trace(tokens, remote=remote, **options):
                back = save(walk(root, row, shape, layers, read_at, edit_at, True))
            results.update(back)
        return {Site(*site): value for site, value in results.items()}

    # -- remote ----------------------------------------------------------------------------------

    def _fetch(self) -> bool:
        """Bring every weight the algebra needs from where the model is, once; tell whether the
        model is in training mode there."""
        from nnsight import ndif

        import sae_attn_plugin

        # What runs in a trace is sent by its source: the other side does not have this package.
        ndif.register(sae_attn_plugin)
        row = self._architecture
        in_block = (row.values, row.out_projection, row.norm, row.mlp_norm, row.post_norm)
        paths = [row.final_norm, row.unembed]
        for layer in range(self.geometry.n_layers):
            paths += [
                f"{row.blocks}.{layer}.{path}"
                for path in dict.fromkeys((*in_block, row.mlp_post_norm))
                if path is not None
            ]
        self._weights: dict[int, tuple[Tensor | None, Tensor | None]] = {}
        return self._fetch_weights(paths)

    def _fetch_weights(self, paths: list[str]) -> bool:
        """Bring the weights of some modules, where they are not here already."""
        from nnsight import save

        root, remote, device = self._nn, self.remote, self.geometry.device
        paths = [path for path in paths if id(submodule(self.model, path)) not in self._weights]
        if not paths:
            return False
        tokens = torch.ones(1, 1, dtype=torch.long)
        with self._lock, root.trace(tokens, remote=remote, use_cache=False):
            back = save(fetch(root, paths))
        found, training = back
        for path, (weight, bias) in found.items():
            pair = (weight.to(device), None if bias is None else bias.to(device))
            self._weights[id(submodule(self.model, path))] = pair
        return training

    def _fetched(self, module: nn.Module) -> tuple[Tensor | None, Tensor | None]:
        weight, bias = self._weights[id(module)]
        return weight, bias


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
