"""Run a model again with edits, with parts of it frozen at the clean run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from sae_attn_plugin.backends.protocol import Capture, LayerWeights, Site, mix_values
from sae_attn_plugin.backends.protocol import Edit as SiteEdit
from sae_attn_plugin.errors import InputError
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
        logits: ``[batch, position, d_vocab]`` of the edited run.
        z: by layer with an SAE, ``[batch, position, head, d_head]``, after the edits of that layer.
    """

    clean: Run
    logits: Float[Tensor, "batch position d_vocab"]
    z: dict[int, Float[Tensor, "batch position head d_head"]]

    def value(self, target: Logit | LogitDiff | Feature) -> Float[Tensor, " batch"]:
        """A target in the edited run: the logit, logit difference or pre-activation."""
        return self._value(target, self.logits, self.z)

    def clean_value(self, target: Logit | LogitDiff | Feature) -> Float[Tensor, " batch"]:
        """The same target in the clean run."""
        clean_z = {layer: self.clean.capture["z", layer] for layer in self.z}
        return self._value(target, self.clean.logits, clean_z)

    def effect(self, target: Logit | LogitDiff | Feature) -> Float[Tensor, " batch"]:
        """Edited minus clean."""
        return self.value(target) - self.clean_value(target)

    def _value(
        self, target: Logit | LogitDiff | Feature, logits: Tensor, z: dict[int, Tensor]
    ) -> Tensor:
        run = self.clean
        position = run.resolve_position(target.position)
        if isinstance(target, Feature):
            dictionary = run.lens.dictionaries[run.resolve_layer(target.layer)]
            index = torch.tensor([run.resolve_feature(target.layer, target.feature)])
            at = z[target.layer][:, position]
            at = at if at.dtype == torch.float64 else at.float()
            _, scale, _ = dictionary.normalise(at.flatten(-2))
            encoder = dictionary.encoder(index.to(at.device), at.dtype)[0]
            dot = (at * encoder).sum((-2, -1)) / dictionary.input_scale(scale)[:, 0]
            return dot + dictionary.constants(index.to(at.device), at.dtype)
        tokens = [target.token] if isinstance(target, Logit) else [target.correct, target.wrong]
        first, *second = (run.resolve_token(token)[0] for token in tokens)
        at = logits[:, position]
        at = at if at.dtype == torch.float64 else at.float()
        return at[:, first] - at[:, second[0]] if second else at[:, first]


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
    found = lens.backend.forward(run.tokens, hooks.build(edits), reads)
    return InterventionResult(
        clean=run,
        logits=found[Site("logits")],
        z={layer: found[Site("z", layer)] for layer in lens.dictionaries},
    )


class _Hooks:
    """The site edits of one intervention; ``seen`` holds live values within the forward pass."""

    def __init__(self, lens: FeatureLens, run: Run, frozen: set[str]) -> None:
        self.lens, self.run, self.frozen = lens, run, frozen
        self.clean: Capture = run.capture
        self.seen: dict[Site, Tensor] = {}
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
        g = self.lens.backend.geometry
        hooks: dict[Site, SiteEdit] = {}
        for layer in range(g.n_layers):
            weights = self.lens.backend.layer_weights(layer)
            resid_pre, attn_out = Site("resid_pre", layer), Site("attn_out", layer)
            if "norms" in self.frozen:
                if weights.post_norm is not None or weights.mlp_post_norm is not None:
                    raise InputError("freezing post-norms is not supported")
                clean_mid = self.clean[resid_pre]
                scale = weights.norm.scale(clean_mid)
                hooks[resid_pre] = self._see(resid_pre)
                hooks[Site("attn_in", layer)] = lambda _x, w=weights, s=scale, at=resid_pre: (
                    w.norm.apply(self.seen[at], s)
                )
                if weights.mlp_norm is not None:
                    if not g.parallel:
                        clean_mid = clean_mid + self.clean[attn_out]
                        hooks[attn_out] = self._see(attn_out)
                    mlp_scale = weights.mlp_norm.scale(clean_mid)
                    hooks[Site("mlp_in", layer)] = self._frozen_mlp_in(
                        weights.mlp_norm, mlp_scale, layer
                    )
            if "patterns" in self.frozen:
                value = Site("v", layer)
                hooks[value] = self._see(value)
                hooks[Site("z", layer)] = lambda _z, at=value, n=layer: mix_values(
                    self.clean["pattern", n], self.seen[at]
                )
            if "attention" in self.frozen:
                held = self._held_attention(weights, layer)
                hooks[attn_out] = self._then(held, attn_out)
            if "mlp" in self.frozen and g.has_mlp:
                hooks[Site("mlp_out", layer)] = lambda _x, n=layer: self.clean["mlp_out", n]
            if layer in self.lens.dictionaries:
                of_layer = [
                    e
                    for e in edits
                    if isinstance(e, SetFeature | AblateFeature) and e.layer == layer
                ]
                if of_layer:
                    site = Site("z", layer)
                    hooks[site] = _chain(hooks.get(site), self._set_features(layer, of_layer))
        if "norms" in self.frozen:
            norm = self.lens.backend.final_norm()
            scale = norm.scale(self.clean["resid_final", -1])
            last, site = g.n_layers - 1, Site("unembed_in")
            # The final residual is rebuilt from the live sites of the last layer.
            for name in ("attn_out", "mlp_out")[: 1 + g.has_mlp]:
                at = Site(name, last)
                hooks[at] = _chain(hooks.get(at), self._see(at))
            hooks[site] = lambda _x: norm.apply(self._final_residual(last), scale)
        for edit in edits:
            if isinstance(edit, AddToStream):
                site = Site(edit.site, -1 if edit.site == "embed" else edit.layer)
                hooks[site] = _chain(hooks.get(site), self._add(edit), self._see(site))
        return hooks

    def _see(self, site: Site) -> SiteEdit:
        def see(value: Tensor) -> Tensor:
            self.seen[site] = value
            return value

        return see

    def _then(self, edit: SiteEdit, site: Site) -> SiteEdit:
        return _chain(edit, self._see(site))

    def _held_attention(self, weights: LayerWeights, layer: int) -> SiteEdit:
        """What attention added in the clean run, and what the edits of this layer change in it."""

        def held(_x: Tensor) -> Tensor:
            clean = self.clean["attn_out", layer]
            if layer not in self.changed:
                return clean
            if weights.post_norm is not None:
                raise InputError(
                    "freezing attention while features are edited is not supported with post-norms"
                )
            change = self.changed[layer].flatten(-2).to(clean.dtype)
            return clean + change @ weights.W_O.flatten(0, 1).to(clean.dtype)

        return held

    def _frozen_mlp_in(self, norm: object, scale: Tensor, layer: int) -> SiteEdit:
        def edit(_x: Tensor) -> Tensor:
            x = self.seen[Site("resid_pre", layer)]
            if not self.lens.backend.geometry.parallel:
                x = x + self.seen[Site("attn_out", layer)]
            return norm.apply(x, scale)  # type: ignore[attr-defined]

        return edit

    def _final_residual(self, last: int) -> Tensor:
        x = self.seen[Site("resid_pre", last)] + self.seen[Site("attn_out", last)]
        return x + self.seen[Site("mlp_out", last)] if self.lens.backend.geometry.has_mlp else x

    def _add(self, edit: AddToStream) -> SiteEdit:
        position = self.run.resolve_position(edit.position)

        def add(value: Tensor) -> Tensor:
            value = value.clone()
            value[:, position] += edit.vector.to(value)
            return value

        return add

    def _set_features(self, layer: int, edits: Sequence[SetFeature | AblateFeature]) -> SiteEdit:
        dictionary = self.lens.dictionaries[layer]

        def splice(z: Tensor) -> Tensor:
            dtype = z.dtype if z.dtype == torch.float64 else torch.float32
            work = z.to(dtype, copy=True)
            for prompt in work:
                encoded = dictionary.encode(prompt)
                live, wanted = {}, {}
                for edit in edits:  # a later edit of the same feature wins
                    if edit.feature not in live:
                        hit = encoded.feature == edit.feature
                        at = torch.zeros(len(prompt), dtype=dtype, device=z.device)
                        at[encoded.position[hit]] = encoded.activation[hit]
                        live[edit.feature], wanted[edit.feature] = at, at.clone()
                    where = (
                        slice(None)
                        if edit.position is None
                        else self.run.resolve_position(edit.position)
                    )
                    wanted[edit.feature][where] = edit.value
                for feature, at in live.items():
                    row = dictionary.decoder(torch.tensor([feature], device=z.device), dtype)[0]
                    delta = (wanted[feature] - at) * encoded.scale[:, 0]
                    prompt += delta[:, None, None] * row
            self.changed[layer] = work - z
            return work.to(z.dtype)

        return splice


def _chain(*edits: SiteEdit | None) -> SiteEdit:
    steps = [edit for edit in edits if edit is not None]

    def run(value: Tensor) -> Tensor:
        for step in steps:
            value = step(value)
        return value

    return run
