"""Run a model again with edits, with parts of it frozen at the clean run."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from sae_attn_plugin.backends.protocol import (
    Capture,
    LayerWeights,
    Norm,
    Site,
    uncapped_logits,
)
from sae_attn_plugin.backends.protocol import Edit as SiteEdit
from sae_attn_plugin.errors import InputError
from sae_attn_plugin.interventions import steps
from sae_attn_plugin.interventions.edits import AblateFeature, AddToStream, Edit, SetFeature
from sae_attn_plugin.nodes import Feature, Logit, LogitDiff

if TYPE_CHECKING:
    from sae_attn_plugin.lens import FeatureLens, Run

FREEZABLE = ("patterns", "norms", "mlp", "attention")


@dataclass(frozen=True, eq=False)
class InterventionResult:
    """An edited run beside the clean one.

    Attributes:
        clean: the run that was edited.
        logits: ``[batch, position, d_vocab]`` of the edited run, as the model returns them.
        z: by layer with an SAE, ``[batch, position, head, d_head]``, after the edits of that layer.
        values: every site that was read.
    """

    clean: Run
    logits: Float[Tensor, "batch position d_vocab"]
    z: dict[int, Float[Tensor, "batch position head d_head"]]
    values: Mapping[Site, Tensor] = field(repr=False)

    def value(self, target: Logit | LogitDiff | Feature) -> Float[Tensor, " batch"]:
        """A target in the edited run: the logit or logit difference before any final soft-cap, or
        the pre-activation."""
        return self._value(target, self.values)

    def clean_value(self, target: Logit | LogitDiff | Feature) -> Float[Tensor, " batch"]:
        """The same target in the clean run."""
        return self._value(target, self.clean.capture.values)

    def effect(self, target: Logit | LogitDiff | Feature) -> Float[Tensor, " batch"]:
        """Edited minus clean."""
        return self.value(target) - self.clean_value(target)

    def _value(self, target: Logit | LogitDiff | Feature, values: Mapping[Site, Tensor]) -> Tensor:
        run = self.clean
        position = run.resolve_position(target.position)
        if isinstance(target, Feature):
            dictionary = run.lens.dictionaries[run.resolve_layer(target.layer)]
            index = torch.tensor([run.resolve_feature(target.layer, target.feature)])
            at = values[Site("z", target.layer)][:, position]
            at = at if at.dtype == torch.float64 else at.float()
            _, scale, _ = dictionary.normalise(at.flatten(-2))
            encoder = dictionary.encoder(index.to(at.device), at.dtype)[0]
            dot = (at * encoder).sum((-2, -1)) / dictionary.input_scale(scale)[:, 0]
            return dot + dictionary.constants(index.to(at.device), at.dtype)
        tokens = [target.token] if isinstance(target, Logit) else [target.correct, target.wrong]
        ids = [run.resolve_token(token)[0] for token in tokens]
        at = uncapped_logits(run.lens.backend, values, ids, position)
        return at[:, 0] - at[:, 1] if len(ids) == 2 else at[:, 0]


def intervene(
    lens: FeatureLens, run: Run, edits: Sequence[Edit], freeze: Iterable[str] = ()
) -> InterventionResult:
    """Run the model again with edits.

    Args:
        run: the clean run; its prompts are run again.
        edits: what to change. Error terms are kept, so without edits the run is unchanged.
        freeze: parts held at the clean run: ``"patterns"`` (attention weights), ``"norms"`` (the
            scale of every norm), ``"mlp"`` and ``"attention"`` (what MLPs and attention blocks add
            to the residual stream, the edits apart; z itself stays live, so features can still be
            read). With all four, an edit has its direct effect and no other.

    Raises:
        InputError: an edit or a freeze that does not fit the model.
    """
    frozen = {freeze} if isinstance(freeze, str) else set(freeze)
    if unknown := frozen - set(FREEZABLE):
        raise InputError(
            f"cannot freeze {', '.join(sorted(unknown))}; known: {', '.join(FREEZABLE)}"
        )
    hooks = _Hooks(lens, run, frozen)
    for edit in edits:
        hooks.check(edit)
    reads = [Site("z", layer) for layer in lens.dictionaries]
    if lens.backend.geometry.logit_soft_cap is not None:
        reads.append(Site("unembed_in"))
    found = lens.backend.forward(run.tokens, hooks.build(edits), reads)
    return InterventionResult(
        clean=run,
        logits=found[Site("logits")],
        z={layer: found[Site("z", layer)] for layer in lens.dictionaries},
        values=found,
    )


class _Hooks:
    """The site edits of one intervention; ``seen`` holds live values within the forward pass."""

    def __init__(self, lens: FeatureLens, run: Run, frozen: set[str]) -> None:
        self.lens, self.run, self.frozen = lens, run, frozen
        self.clean: Capture = run.capture
        self.seen: dict[Any, Tensor] = {}
        self.watched: set[tuple[str, int]] = set()
        self.steps: defaultdict[Site, list[SiteEdit]] = defaultdict(list)
        self.changed: dict[int, Tensor] = {}  # layer -> what feature edits add to z

    def check(self, edit: Edit) -> None:
        run = self.run
        if isinstance(edit, AddToStream):
            run.resolve_position(edit.position)
            g = self.lens.backend.geometry
            if edit.site not in ("embed", "attn_out", "mlp_out"):
                raise InputError(f"cannot add at {edit.site!r}; known: embed, attn_out, mlp_out")
            if edit.site != "embed" and not 0 <= edit.layer < g.n_layers:
                raise InputError(f"layer {edit.layer} is out of range: 0..{g.n_layers - 1}")
            if tuple(edit.vector.shape) != (g.d_model,):
                raise InputError(
                    f"AddToStream: expected a vector [{g.d_model}], got {list(edit.vector.shape)}"
                )
        elif isinstance(edit, SetFeature | AblateFeature):
            run.resolve_feature(run.resolve_layer(edit.layer), edit.feature)
            if edit.position is not None:
                run.resolve_position(edit.position)
        else:
            raise InputError(f"expected an edit such as AblateFeature(...), got {edit!r}")

    def build(self, edits: Sequence[Edit]) -> dict[Site, SiteEdit]:
        """One edit per site; each records what it leaves where a later one asks for it."""
        g = self.lens.backend.geometry
        for layer in range(g.n_layers):
            weights = self.lens.backend.layer_weights(layer)
            if "patterns" in self.frozen:
                v, pattern = self._watch("v", layer), self.clean["pattern", layer]
                self.add("z", layer, steps.mix(self.seen, v, pattern))
            if "norms" in self.frozen:
                self._freeze_norms(layer, weights)
            if "attention" in self.frozen:
                self.add("attn_out", layer, self._held_attention(weights, layer))
            if "mlp" in self.frozen and g.has_mlp:
                self.add("mlp_out", layer, steps.constant(self.clean["mlp_out", layer]))
            of_layer = [
                e for e in edits if isinstance(e, SetFeature | AblateFeature) and e.layer == layer
            ]
            if of_layer:
                self.add("z", layer, self._set_features(layer, of_layer))
        if "norms" in self.frozen:
            # The final residual is rebuilt from the live sites of the last layer.
            stream = self._stream(g.n_layers - 1, *["attn_out", "mlp_out"][: 1 + g.has_mlp])
            clean = self.clean["resid_final", -1]
            self._freeze_norm("unembed_in", -1, self.lens.backend.final_norm(), clean, stream)
        for edit in edits:
            if isinstance(edit, AddToStream):
                position = self.run.resolve_position(edit.position)
                layer = -1 if edit.site == "embed" else edit.layer
                self.add(edit.site, layer, steps.add(edit.vector, position))
        for name, layer in self.watched:
            self.add(name, layer, steps.see(self.seen, (name, layer)))
        return {site: steps.chain(found) for site, found in self.steps.items()}

    def add(self, name: str, layer: int, step: SiteEdit) -> None:
        self.steps[Site(name, layer)].append(step)

    def _freeze_norms(self, layer: int, weights: LayerWeights) -> None:
        """Hold the scales of a layer's norms, before and after its blocks."""
        g, clean = self.lens.backend.geometry, self.clean
        resid_pre = clean["resid_pre", layer]
        self._freeze_norm("attn_in", layer, weights.norm, resid_pre, self._stream(layer))
        if weights.post_norm is not None:
            z = self._watch("z", layer)
            raw = weights.attn_out(clean["z", layer].to(weights.W_O))
            live = steps.projected(self.seen, z, weights.W_O, weights.b_O)
            self._freeze_norm("attn_out", layer, weights.post_norm, raw, live)
        if not g.has_mlp:
            return
        if weights.mlp_norm is not None and g.parallel:
            self._freeze_norm("mlp_in", layer, weights.mlp_norm, resid_pre, self._stream(layer))
        elif weights.mlp_norm is not None:
            middle = resid_pre + clean["attn_out", layer]
            stream = self._stream(layer, "attn_out")
            self._freeze_norm("mlp_in", layer, weights.mlp_norm, middle, stream)
        if weights.mlp_post_norm is not None:
            raw = self._watch("mlp_raw", layer)
            norm, value = weights.mlp_post_norm, clean["mlp_raw", layer]
            self._freeze_norm("mlp_out", layer, norm, value, steps.stream(self.seen, [raw]))

    def _freeze_norm(
        self, name: str, layer: int, norm: Norm, clean: Tensor, live: Callable[[], Tensor]
    ) -> None:
        """Give ``name`` the norm of ``live()`` with the scale it had on ``clean``."""
        if norm.kind == "none":
            return
        scale = norm.scale(clean.to(torch.promote_types(clean.dtype, torch.float32)))
        step = steps.normalised(live, norm.kind == "layer", norm.weight, norm.bias, scale)
        self.add(name, layer, step)

    def _held_attention(self, weights: LayerWeights, layer: int) -> SiteEdit:
        """What attention added in the clean run, and what the edits of this layer change in it."""
        clean, norm, scale = self.clean["attn_out", layer], weights.post_norm, None
        gain = None if norm is None else norm.weight
        if norm is not None:
            raw = weights.attn_out(self.clean["z", layer].to(weights.W_O))
            scale = norm.scale(raw.to(torch.promote_types(raw.dtype, torch.float32)))
        centred = norm is not None and norm.kind == "layer"
        return steps.held_attention(clean, self.changed, layer, weights.W_O, centred, gain, scale)

    def _stream(self, layer: int, *written: str) -> Callable[[], Tensor]:
        """The live residual stream of a layer, after the blocks named."""
        sites = [self._watch(name, layer) for name in ("resid_pre", *written)]
        return steps.stream(self.seen, sites)

    def _watch(self, name: str, layer: int) -> tuple[str, int]:
        self.watched.add((name, layer))
        return name, layer

    def _set_features(self, layer: int, edits: Sequence[SetFeature | AblateFeature]) -> SiteEdit:
        dtype = torch.promote_types(self.lens.backend.geometry.dtype, torch.float32)
        resolve = self.run.resolve_position
        plain = [
            (e.feature, None if e.position is None else resolve(e.position), float(e.value))
            for e in edits
        ]
        return steps.set_features(self.lens.dictionaries[layer], plain, dtype, self.changed)
