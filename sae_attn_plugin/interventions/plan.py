"""The site edits of one intervention, from edits as data."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sae_attn_plugin.backends.protocol import (
    Capture,
    Geometry,
    LayerWeights,
    Norm,
    Site,
    mix_values,
)
from sae_attn_plugin.backends.protocol import Edit as SiteEdit
from sae_attn_plugin.errors import InputError, UnsupportedError
from sae_attn_plugin.interventions import steps
from sae_attn_plugin.interventions.edits import (
    KINDS,
    AblateError,
    AblateFeature,
    AblateHead,
    AddToStream,
    Edit,
    End,
    PatchEdge,
    PatchSite,
    ScaleFeature,
    SetFeature,
    Steer,
)
from sae_attn_plugin.interventions.reading import (
    clean_scores,
    queries_and_keys,
    read_by,
    scale_of,
    score_weights,
    sites_of_stream,
)
from sae_attn_plugin.interventions.result import InterventionResult
from sae_attn_plugin.interventions.sources import Quantity, Sources, positions_of

if TYPE_CHECKING:
    from sae_attn_plugin.dictionaries import Dictionary
    from sae_attn_plugin.lens import FeatureLens, Run


OF_FEATURES = (SetFeature, AblateFeature, ScaleFeature, Steer, AblateError)


@dataclass(frozen=True)
class Resolved:
    """An edit with its places and values as plain tensors."""

    edit: Edit
    where: Tensor | None
    new: Tensor | None = None
    reader_where: Tensor | None = None


class Plan:
    """The site edits of one intervention on prompts of equal length; ``seen`` holds live values
    within the forward pass."""

    def __init__(
        self,
        lens: FeatureLens,
        run: Run,
        held: Mapping[str, frozenset[int]],
        edits: Sequence[Edit],
        sources: Sources,
        members: list[int],
        total: int,
    ) -> None:
        self.lens: FeatureLens = lens
        self.run: Run = run
        self.held: Mapping[str, frozenset[int]] = held
        self.g: Geometry = lens.backend.geometry
        self.dtype: torch.dtype = torch.promote_types(self.g.dtype, torch.float32)
        self.clean: Capture = run.capture
        self.seen: dict[Any, Tensor] = {}
        self.watched: set[tuple[str, int]] = set()
        self.steps: defaultdict[Site, list[SiteEdit]] = defaultdict(list)
        self.members: list[int] = members
        self.total: int = total
        self.sources: Sources = sources
        self.edits: list[Resolved] = [self._resolve(edit) for edit in edits]

    # -- running ---------------------------------------------------------------------------------

    def run_once(
        self,
        max_new_tokens: int = 0,
        more: Iterable[Site] = (),
        patterns: Sequence[int] = (),
        scores: Sequence[int] = (),
    ) -> InterventionResult:
        wanted = [Site("pattern", layer) for layer in patterns]
        for layer in scores:
            clean_scores(self.run, layer)
            wanted.append(Site("resid_pre", layer))
        reads = list(dict.fromkeys([*more, *wanted, *self._reads()]))
        found = self.forward(self.run.tokens, reads)
        seen = {layer: self._pattern_of(layer, found) for layer in patterns}
        sides = {layer: self._sides_of(layer, found) for layer in scores}
        generated = clean = None
        if max_new_tokens:
            n_ctx, length = self.g.n_ctx, self.run.tokens.shape[1]
            if length + max_new_tokens > n_ctx + 1:
                raise InputError(
                    f"max_new_tokens={max_new_tokens} after {length} tokens is more than the "
                    f"model's context of {n_ctx}"
                )
            generated = self._continue(found[Site("logits")], max_new_tokens, self.forward)
            plain = self.lens.backend.forward
            clean = self._continue(self.run.logits, max_new_tokens, plain)
        return InterventionResult(
            clean=self.run,
            logits=found[Site("logits")],
            z={layer: found[Site("z", layer)] for layer in self.lens.dictionaries},
            read={
                (d.kind, layer): self._as_read(d, found)
                for layer, d in self.lens.all_dictionaries()
            },
            values=found,
            feature_edits=self._feature_edits(),
            held=self.held,
            patterns=seen,
            sides=sides,
            generated=generated,
            clean_generated=clean,
        )

    def _reads(self) -> list[Site]:
        """What a result needs to have read."""
        reads = [Site("z", layer) for layer in self.lens.dictionaries]
        edited = self._feature_edits()
        reads += [
            Site(name, layer)
            for kind, layer in edited
            if kind == "attn" and self.lens.dictionaries[layer].reads == "z"
            for name in ("v", "pattern")
        ]
        for layer, d in self.lens.transcoders.items():
            names = ["mlp_out"] if d.kind == "mlp_sae" else ["resid_pre"]
            names += ["attn_out"] * (d.kind == "tc" and not self.g.parallel)
            reads += [Site(name, layer) for name in names]
        for d in self.lens.residual_saes.values():
            reads += sites_of_stream(d, self.g)
        if self.g.logit_soft_cap is not None:
            reads.append(Site("unembed_in"))
        return list(dict.fromkeys(reads))

    def _feature_edits(self) -> dict[tuple[str, int], list[Any]]:
        """By kind and layer, the edits of dictionaries."""
        found: defaultdict[tuple[str, int], list[Any]] = defaultdict(list)
        for r in self.edits:
            if isinstance(r.edit, OF_FEATURES):
                found[r.edit.kind, r.edit.layer].append(_plain(r))
        return dict(found)

    def _as_read(self, dictionary: Dictionary, found: Mapping[Site, Tensor]) -> Tensor:
        """What a dictionary reads, before the edits of its own features."""
        layer, edited = dictionary.layer, self._feature_edits()
        if dictionary.reads == "z" and ("attn", layer) in edited:
            before = self.seen.get(("before", "attn", layer))
            return self._z_as_read(layer, found) if before is None else before
        if dictionary.kind == "mlp_sae" and ("mlp_sae", layer) in edited:
            # What the MLP wrote cannot be had again from what it writes now.
            return self.seen.get(("before", "mlp_sae", layer), found[Site("mlp_out", layer)])
        return read_by(self.run, dictionary, found, self.held)

    def _pattern_of(self, layer: int, found: Mapping[Site, Tensor]) -> Tensor:
        """Attention weights after the edits."""
        if self._holds("patterns", layer):
            return self.clean["pattern", layer]
        pattern = found[Site("pattern", layer)].clone()
        for head in self._heads_with_new_patterns(layer):
            if ("pattern", layer, head) not in self.seen:
                raise UnsupportedError(
                    f"the pattern of head {layer}.{head}, whose query or key an edge changes, does "
                    "not come back from a remote model"
                )
            pattern[:, head] = self.seen["pattern", layer, head].to(pattern)
        return pattern

    def _sides_of(self, layer: int, found: Mapping[Site, Tensor]) -> tuple[Tensor, Tensor]:
        """Each head's queries and keys after the edits."""
        x, hold = found[Site("resid_pre", layer)], self._holds("norms", layer)
        sides = queries_and_keys(self.run, layer, x, hold)
        for head in self._heads_with_new_patterns(layer):
            if ("query", layer, head) not in self.seen:
                raise UnsupportedError(
                    f"the scores of head {layer}.{head}, whose query or key an edge changes, do "
                    "not come back from a remote model"
                )
            for side, name in zip(sides, ("query", "key"), strict=True):
                side[:, :, head] = self.seen[name, layer, head].to(side)
        return sides

    def _z_as_read(self, layer: int, found: Mapping[Site, Tensor]) -> Tensor:
        """z before the edits of the layer's dictionary, and after those of heads before them, where
        it was not seen: a remote model sends sites back and nothing else."""
        if any(end.layer == layer and self._mixed_into_z(end) for end in self._readers()):
            raise UnsupportedError(
                f"layer {layer}: edits of features together with an edge into single heads of the "
                "same layer do not run on a remote model, which does not say what the features read"
            )
        held = self._holds("patterns", layer)
        pattern = self.clean["pattern", layer] if held else found[Site("pattern", layer)]
        v = found[Site("v", layer)]
        before = mix_values(pattern.to(v), v).to(found[Site("z", layer)])
        for r in self.edits:
            if _edited_layer(r.edit) == layer:
                if isinstance(r.edit, OF_FEATURES) and r.edit.kind == "attn":
                    break
                if isinstance(r.edit, AblateHead | PatchSite):
                    before = _of_z(r)(before)
        return before

    def forward(self, tokens: Tensor, reads: Sequence[Site] = ()) -> dict[Site, Tensor]:
        """One edited pass; edges that need live patterns take one more each layer they read in."""
        known: dict[int, Tensor] = {}
        for layer in self._layers_that_need_patterns():
            site = Site("pattern", layer)
            known[layer] = self.lens.backend.forward(tokens, self.build(known), [site])[site]
        return self.lens.backend.forward(tokens, self.build(known), reads)

    def _continue(
        self, logits: Tensor, count: int, forward: Callable[[Tensor], dict[Site, Tensor]]
    ) -> Tensor:
        """The most likely continuation, token by token."""
        tokens, start = self.run.tokens, self.run.tokens.shape[1]
        eos = getattr(self.lens.tokenizer, "eos_token_id", None)
        done = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
        for number in range(count):
            following = logits[:, -1].argmax(-1).to(tokens.device)
            if eos is not None:
                following = torch.where(done, eos, following)
                done |= following == eos
            tokens = torch.cat([tokens, following[:, None]], 1)
            if number + 1 < count and not done.all():
                logits = forward(tokens)[Site("logits")]
            elif done.all():
                break
        return tokens[:, start:]

    # -- resolving -------------------------------------------------------------------------------

    def _resolve(self, edit: Edit) -> Resolved:
        self._check(edit)
        position = getattr(edit, "position", None)
        where = self._where(position, type(edit).__name__)
        to = getattr(edit, "to", None)
        new = None
        if to is not None:
            values = self.sources.values(
                to, position, self._quantity(edit), self.members, self.total
            )
            new = values.to(self.g.device)
            if where is None and new.ndim > 0 and to.position is None:
                self._check_lengths(edit, new)
        reader = getattr(edit, "reader_position", None)
        return Resolved(edit, where, new, self._where(reader, type(edit).__name__))

    def _where(self, position: Any, name: str) -> Tensor | None:
        found = positions_of(self.run, position, name, self.members, self.total)
        return None if found is None else torch.tensor(found, device=self.g.device)

    def _check_lengths(self, edit: Edit, new: Tensor) -> None:
        from sae_attn_plugin.interventions.edits import From

        length = self.run.tokens.shape[1]
        if isinstance(getattr(edit, "to", None), From) and new.shape[1] != length:
            raise InputError(
                f"{edit}: patching everywhere needs prompts of equal length; here {length} tokens, "
                f"{new.shape[1]} in the source. Give positions or a role"
            )

    def _check(self, edit: Edit) -> None:
        """Whether an edit fits the model."""
        match edit:
            case AddToStream():
                if edit.site not in ("embed", "attn_out", "mlp_out"):
                    raise InputError(
                        f"cannot add at {edit.site!r}; known: embed, attn_out, mlp_out"
                    )
                if edit.site != "embed":
                    self._check_layer(edit.layer)
                if tuple(edit.vector.shape) != (self.g.d_model,):
                    raise InputError(
                        f"AddToStream: expected a vector [{self.g.d_model}], got "
                        f"{list(edit.vector.shape)}"
                    )
            case SetFeature() | AblateFeature() | ScaleFeature() | Steer():
                self._check_feature(edit.kind, edit.layer, edit.feature)
            case AblateError():
                self.run.resolve_layer(edit.layer, edit.kind)
            case AblateHead():
                self._check_head(edit.layer, edit.head)
            case PatchSite():
                if edit.site != "embed":
                    self._check_layer(edit.layer)
                if edit.site == "mlp_out" and not self.g.has_mlp:
                    raise InputError(f"{self.g.model_name} has no MLP to patch")
            case PatchEdge():
                self._check_end(edit, edit.source, "writer")
                self._check_end(edit, edit.target, "reader")
                self._check_order(edit)
            case _:
                raise InputError(f"expected an edit such as AblateFeature(...), got {edit!r}")

    def _check_layer(self, layer: int) -> None:
        if not 0 <= layer < self.g.n_layers:
            raise InputError(f"layer {layer} is out of range: 0..{self.g.n_layers - 1}")

    def _check_head(self, layer: int, head: int) -> None:
        self._check_layer(layer)
        if not 0 <= head < self.g.n_heads:
            raise InputError(f"head {head} is out of range: 0..{self.g.n_heads - 1}")

    def _check_feature(self, kind: Any, layer: int, feature: int) -> None:
        self.run.resolve_feature(self.run.resolve_layer(layer, kind), feature, kind)

    def _check_end(self, edit: PatchEdge, end: End, what: str) -> None:
        match end.kind:
            case "attn" | "tc" | "mlp_sae":
                assert end.index is not None
                self._check_feature(end.kind, end.layer, end.index)
            case "attn_err":
                self.run.resolve_layer(end.layer)
            case "tc_err" | "tc_bias" | "tc_skip" | "mlp_sae_err" | "mlp_sae_bias":
                kind: Any = end.kind.rpartition("_")[0]
                self.run.resolve_layer(end.layer, kind)
                if end.kind == "tc_skip" and self.run.dictionary(end.layer, kind).W_skip is None:
                    raise InputError(f"the transcoder of layer {end.layer} has no skip connection")
            case "head" | "value":
                self._check_head(end.layer, end.index or 0)
            case "query" | "key":
                self._check_head(end.layer, end.index or 0)
                if self._holds("patterns", end.layer):
                    raise InputError(
                        f"{edit}: the patterns of layer {end.layer} are held, so what its queries "
                        "and keys read changes nothing; leave them live: "
                        f"Freeze('patterns', but=({end.layer},))"
                    )
                self._check_sinks(end.layer)
                clean_scores(self.run, end.layer)
            case "pos":
                if not self.g.learned_positions:
                    raise InputError(
                        f"PatchEdge({what}='pos'): {self.g.model_name} has no learned positions"
                    )
            case "mlp":
                self._check_layer(end.layer)
                if not self.g.has_mlp:
                    raise InputError(f"{self.g.model_name} has no MLP: {edit}")
            case "attn_bias" | "attn_out":
                self._check_layer(end.layer)

    def _check_sinks(self, layer: int) -> None:
        """Whether attention weights are a softmax of scores and nothing else."""
        if float((self.clean["pattern", layer].sum(-1) - 1).abs().max()) > 1e-2:
            raise UnsupportedError(
                f"{self.g.model_name} on {self.lens.backend.host}, layer {layer}: attention "
                "weights of a query do not sum to 1 (attention sinks), so edges into queries and "
                "keys are not known; edges into values are"
            )

    def _check_order(self, edit: PatchEdge) -> None:
        """The reader must come after the writer."""
        writer, reader = edit.source, edit.target
        written = -1 if writer.layer < 0 else 2 * writer.layer + _of_mlp(writer.kind)
        read = 2 * self.g.n_layers if reader.layer < 0 else 2 * reader.layer
        if reader.layer >= 0 and _of_mlp(reader.kind) and not self.g.parallel:
            read += 1
        if written >= read:
            raise InputError(f"{edit.reader} does not read {edit.writer}: it comes before it")

    # -- building --------------------------------------------------------------------------------

    def build(self, patterns: Mapping[int, Tensor]) -> dict[Site, SiteEdit]:
        """One edit per site; each records what it leaves where a later one asks for it.

        Args:
            patterns: the live ones known so far, by layer; edges that need others are left out.
        """
        g = self.g
        self.seen.clear()
        self.watched.clear()
        self.steps.clear()
        for layer in range(g.n_layers):
            weights = self.lens.backend.layer_weights(layer)
            of_layer = [r for r in self.edits if _edited_layer(r.edit) == layer]
            known = patterns.get(layer)
            if self._holds("patterns", layer):
                known = self.clean["pattern", layer]
                self.add("z", layer, steps.mix(self.seen, self._watch("v", layer), known))
            if self._holds("norms", layer):
                self._freeze_norms(layer, weights)
            self.add("resid_pre", layer, *self._steps("resid_pre", layer, of_layer))
            self.add("v", layer, *self._steps("v", layer, of_layer))
            edits_of_z = self._read_values(of_layer, layer, weights, known)
            edits_of_z += self._read_scores(of_layer, layer, weights, known)
            edits_of_z += self._steps("z", layer, of_layer, weights, known)
            self.add("z", layer, *edits_of_z)
            if self._holds("attention", layer):
                self.add("attn_out", layer, self._held_attention(weights, layer, edits_of_z))
            self.add("attn_out", layer, *self._steps("attn_out", layer, of_layer, weights, known))
            if not g.has_mlp:
                continue
            self._read_mlp(of_layer, layer, weights)
            raw = self._steps("mlp_raw", layer, of_layer, weights)
            self.add("mlp_raw", layer, *raw)
            if self._holds("mlp", layer):
                self.add("mlp_out", layer, steps.hold(self.clean["mlp_out", layer]))
                if raw:
                    clean, norm = self.clean["mlp_raw", layer], weights.mlp_post_norm
                    scale = self._scales(layer, weights)["mlp_out"]
                    self.add("mlp_out", layer, steps.held_raw(clean, raw, norm, scale))
            self.add("mlp_out", layer, *self._steps("mlp_out", layer, of_layer, weights))
        ends = [r for r in self.edits if _edited_layer(r.edit) == -1]
        self.add("embed", -1, *self._steps("embed", -1, ends))
        self._final(ends)
        for name, layer in self.watched:
            self.add(name, layer, steps.see(self.seen, (name, layer)))
        return {site: steps.chain(found) for site, found in self.steps.items()}

    def add(self, name: str, layer: int, *made: SiteEdit) -> None:
        self.steps[Site(name, layer)] += made

    def _holds(self, part: str, layer: int) -> bool:
        return layer in self.held.get(part, ())

    def _watch(self, name: str, layer: int) -> tuple[str, int]:
        self.watched.add((name, layer))
        return name, layer

    def _stream(self, layer: int, *written: str) -> Callable[[], Tensor]:
        """The live residual stream of a layer, after the blocks named."""
        sites = [self._watch(name, layer) for name in ("resid_pre", *written)]
        return steps.stream(self.seen, sites)

    # -- norms and attention ---------------------------------------------------------------------

    def _freeze_norms(self, layer: int, weights: LayerWeights) -> None:
        """Hold the scales of a layer's norms, before and after its blocks."""
        scales = self._scales(layer, weights)
        self._freeze_norm("attn_in", layer, weights.norm, scales["attn_in"], self._stream(layer))
        if weights.post_norm is not None:
            live = steps.projected(self.seen, self._watch("z", layer), weights.W_O, weights.b_O)
            self._freeze_norm("attn_out", layer, weights.post_norm, scales["attn_out"], live)
        if not self.g.has_mlp:
            return
        if weights.mlp_norm is not None:
            self._freeze_norm(
                "mlp_in", layer, weights.mlp_norm, scales["mlp_in"], self._middle(layer)
            )
        if weights.mlp_post_norm is not None:
            live = steps.stream(self.seen, [self._watch("mlp_raw", layer)])
            self._freeze_norm("mlp_out", layer, weights.mlp_post_norm, scales["mlp_out"], live)

    def _scales(self, layer: int, weights: LayerWeights) -> dict[str, Tensor]:
        """The clean scales of a layer's norms, by the site that each norm writes to."""
        clean, resid_pre = self.clean, self.clean["resid_pre", layer]
        found = {"attn_in": scale_of(weights.norm, resid_pre)}
        if weights.post_norm is not None:
            raw = weights.attn_out(clean["z", layer].to(weights.W_O))
            found["attn_out"] = scale_of(weights.post_norm, raw)
        if weights.mlp_norm is not None and self.g.has_mlp:
            middle = resid_pre if self.g.parallel else resid_pre + clean["attn_out", layer]
            found["mlp_in"] = scale_of(weights.mlp_norm, middle)
        if weights.mlp_post_norm is not None and self.g.has_mlp:
            found["mlp_out"] = scale_of(weights.mlp_post_norm, clean["mlp_raw", layer])
        return found

    def _held_scale(self, name: str, layer: int, weights: LayerWeights) -> Tensor | None:
        """The clean scale of a norm where norms are held, else None."""
        return self._scales(layer, weights).get(name) if self._holds("norms", layer) else None

    def _freeze_norm(
        self, name: str, layer: int, norm: Norm, scale: Tensor, live: Callable[[], Tensor]
    ) -> None:
        """Give ``name`` the norm of ``live()`` with a held scale."""
        if norm.kind != "none":
            self.add(name, layer, steps.normalised(live, norm, scale))

    def _middle(self, layer: int) -> Callable[[], Tensor]:
        """What the MLP of a layer reads, before its norm."""
        return self._stream(layer) if self.g.parallel else self._stream(layer, "attn_out")

    def _held_attention(self, weights: LayerWeights, layer: int, edits: list[SiteEdit]) -> SiteEdit:
        clean, z, norm = self.clean["attn_out", layer], self.clean["z", layer], weights.post_norm
        scale = None if norm is None else self._scales(layer, weights)["attn_out"]
        return steps.held_attention(self.seen, layer, clean, z, edits, weights.W_O, norm, scale)

    def _final(self, edits: Sequence[Resolved]) -> None:
        """The norm before the unembedding, and what reads it."""
        n, norm = self.g.n_layers, self.lens.backend.final_norm()
        changes = [self._change(r) for r in edits if isinstance(r.edit, PatchEdge)]
        if not changes and not self._holds("norms", n):
            return
        # The final residual is rebuilt from the live sites of the last layer.
        live = self._stream(n - 1, *["attn_out", "mlp_out"][: 1 + self.g.has_mlp])
        scale = None
        if self._holds("norms", n):
            scale = scale_of(norm, self.clean["resid_final", -1])
            self._freeze_norm("unembed_in", -1, norm, scale, live)
        if changes:
            moved = steps.normed_change(live, [], changes, norm, scale)
            self.add("unembed_in", -1, steps.add_change(moved))

    # -- edits of a site -------------------------------------------------------------------------

    def _steps(
        self,
        site: str,
        layer: int,
        edits: Sequence[Resolved],
        weights: LayerWeights | None = None,
        pattern: Tensor | None = None,
    ) -> list[SiteEdit]:
        """Edits of a site in the order given; neighbouring ones of its dictionary share one
        reading."""
        made: list[SiteEdit] = []
        pending: list[Any] = []
        seen: set[Any] = set()
        dictionary = self._dictionary_of(site, layer)

        def flush() -> None:
            if pending and dictionary is not None:
                read = self._transcoder_reads(dictionary) if dictionary.kind == "tc" else None
                made.append(steps.set_features(dictionary, list(pending), self.dtype, read))
                pending.clear()

        for r in edits:
            edit, step = r.edit, None
            if isinstance(edit, OF_FEATURES):
                if dictionary is not None and edit.kind == dictionary.kind:
                    before: Any = ("before", dictionary.kind, layer)
                    if dictionary.kind != "tc" and before not in seen:
                        seen.add(before)
                        made.append(steps.see_first(self.seen, before))
                    pending.append(_plain(r))
                continue
            if isinstance(edit, AddToStream) and edit.site == site:
                step = steps.add(edit.vector, r.where)
            elif isinstance(edit, PatchSite) and edit.site == site:
                step = steps.replace(r.where, 0.0 if r.new is None else r.new)
            elif isinstance(edit, AblateHead) and site == "z":
                step = _of_z(r)
            elif (
                isinstance(edit, PatchEdge)
                and dictionary is not None
                and weights is not None
                and edit.target.kind == dictionary.kind
            ):
                step = self._read_feature(r, dictionary, weights, pattern)
            if step is not None:
                flush()
                made.append(step)
        flush()
        return made

    def _dictionary_of(self, site: str, layer: int) -> Dictionary | None:
        """The dictionary that writes to a site of a layer."""
        for found in (self.lens.dictionaries.get(layer), self.lens.transcoders.get(layer)):
            if found is not None and found.writes == site:
                return found
        return None

    def _transcoder_reads(self, dictionary: Dictionary) -> Any:
        """A maker of what a transcoder reads, live or where its MLP is held, of the clean run."""
        layer, g = dictionary.layer, self.g
        weights = self.lens.backend.layer_weights(layer)
        norm, live = weights.mlp_norm or Norm("none"), self._middle(layer)
        scale = self._held_scale("mlp_in", layer, weights)
        if self._holds("mlp", layer):
            clean = self.clean["resid_pre", layer]
            clean = clean if g.parallel else clean + self.clean["attn_out", layer]
            live, scale = steps.with_held(live, clean), self._scales(layer, weights).get("mlp_in")
        return steps.mlp_reader(live, dictionary.reads, norm, scale, self.dtype)

    # -- edges -----------------------------------------------------------------------------------

    @property
    def _grouped(self) -> bool:
        """Whether heads share keys and values."""
        return self.g.n_kv_heads != self.g.n_heads

    def _readers(self) -> list[End]:
        """Of all edges."""
        return [r.edit.target for r in self.edits if isinstance(r.edit, PatchEdge)]

    def _mixed_into_z(self, end: End) -> bool:
        """Whether an edge into heads changes z itself, and not the values it is made of."""
        if end.kind == "value":
            return self._grouped and end.index is not None
        return end.kind in ("query", "key")

    def _layers_that_need_patterns(self) -> list[int]:
        """Layers in which an edge is mixed into z itself, whose patterns are live."""
        asked = [end for end in self._readers() if end.kind == "attn" or self._mixed_into_z(end)]
        return sorted({end.layer for end in asked if not self._holds("patterns", end.layer)})

    def _heads_with_new_patterns(self, layer: int) -> list[int]:
        heads: set[int] = set()
        for end in self._readers():
            if end.kind in ("query", "key") and end.layer == layer:
                heads |= set(range(self.g.n_heads)) if end.index is None else {end.index}
        return sorted(heads)

    def _change(self, r: Resolved) -> tuple[Any, Tensor | None, Tensor | None]:
        """What an edge changes in the residual stream that its reader sees."""
        assert isinstance(r.edit, PatchEdge)
        end = r.edit.source
        layer, dtype, seen = end.layer, self.dtype, self.seen
        match end.kind:
            case "embed" | "pos":
                site = self._watch("embed" if end.kind == "embed" else "pos_embed", -1)
                change = steps.site_change(seen, site, self._watch("embed", -1), dtype)
            case "mlp" | "attn_out":
                site = self._watch("mlp_out" if end.kind == "mlp" else "attn_out", layer)
                change = steps.site_change(seen, site, site, dtype)
            case _:
                change = self._written(end)
        return change, r.where, r.new

    def _written(self, end: End) -> Any:
        """What an edge changes of a writer that is part of a block's output."""
        of_mlp = _of_mlp(end.kind)
        found = (self.lens.transcoders if of_mlp else self.lens.dictionaries).get(end.layer)
        if of_mlp:
            assert found is not None
            return self._written_by_mlp(end, found)
        layer, dtype, seen = end.layer, self.dtype, self.seen
        # Where attention is held, the stream has what the clean z wrote.
        held = self._holds("attention", layer)
        z = self._watch("z", layer)
        z = ("held_z", layer) if held else z
        w = self.lens.backend.layer_weights(layer)
        on_z = found is None or found.writes == "z" or end.kind == "head"
        if end.kind == "head":
            change = steps.head_change(seen, z, end.index or 0, dtype)
        elif found is None:  # the biases alone
            change = steps.no_change(steps.live_value(seen, z, dtype))
        else:
            site = z if on_z else self._watch("attn_out", layer)
            change = _part(end, found, steps.live_value(seen, site, dtype), None)
        if not on_z:
            return change
        with_bias = end.kind == "attn_bias"
        change = steps.through_output(change, w.W_O, w.b_O, with_bias)
        scale = None
        if w.post_norm is not None and (held or self._holds("norms", layer)):
            scale = self._scales(layer, w)["attn_out"]
        raw = steps.projected(seen, z, w.W_O, w.b_O)
        return steps.through_norm(change, raw, w.post_norm, scale, with_bias)

    def _written_by_mlp(self, end: End, dictionary: Dictionary) -> Any:
        layer, dtype, seen = end.layer, self.dtype, self.seen
        raw = dictionary.writes == "mlp_raw"
        value = steps.live_value(seen, self._watch(dictionary.writes, layer), dtype)
        read = self._transcoder_reads(dictionary) if dictionary.kind == "tc" else value
        if raw and self._holds("mlp", layer):
            raise UnsupportedError(
                f"an edge from {end.kind} of layer {layer} while its MLP is held: the transcoder "
                "writes in front of a norm; hold norms and patterns instead"
            )
        change = _part(end, dictionary, read, value)
        if not raw:
            return change
        w = self.lens.backend.layer_weights(layer)
        scale = self._scales(layer, w)["mlp_out"] if self._holds("norms", layer) else None
        return steps.through_norm(change, value, w.mlp_post_norm, scale, end.kind.endswith("_bias"))

    def _read_values(
        self,
        edits: Sequence[Resolved],
        layer: int,
        weights: LayerWeights,
        pattern: Tensor | None,
    ) -> list[SiteEdit]:
        """Edges into the value input of heads: at the values, or at z for one head of a group."""
        by_head: defaultdict[int | None, list[Any]] = defaultdict(list)
        for r in edits:
            if isinstance(r.edit, PatchEdge) and r.edit.target.kind == "value":
                by_head[r.edit.target.index].append(self._change(r))
        if not by_head:
            return []
        live, norm = self._stream(layer), weights.norm
        scale = self._held_scale("attn_in", layer, weights)
        whole = by_head.pop(None, [])
        made: list[SiteEdit] = []
        alone = set() if self._grouped else set(by_head)
        rest = [group for group in range(self.g.n_kv_heads) if group not in alone]
        if rest and whole:
            moved = steps.normed_change(live, [], whole, norm, scale)
            self.add("v", layer, steps.change_values(moved, weights.W_V, rest))
        for head, changes in by_head.items():
            assert head is not None
            if not self._grouped:
                moved = steps.normed_change(live, [], [*whole, *changes], norm, scale)
                self.add("v", layer, steps.change_values(moved, weights.W_V, [head]))
            elif pattern is not None:
                moved = steps.normed_change(live, whole, changes, norm, scale)
                group = head // (self.g.n_heads // self.g.n_kv_heads)
                made.append(steps.change_head(moved, weights.W_V[group], pattern, head))
        return made

    def _read_scores(
        self,
        edits: Sequence[Resolved],
        layer: int,
        weights: LayerWeights,
        pattern: Tensor | None,
    ) -> list[SiteEdit]:
        """Edges into queries and keys: at z, of which the heads' patterns are mixed anew."""
        heads = self._heads_with_new_patterns(layer)
        if not heads or pattern is None:
            return []
        given: defaultdict[tuple[str, int | None], list[Any]] = defaultdict(list)
        for r in edits:
            if isinstance(r.edit, PatchEdge):
                end = r.edit.target
                given[end.kind, end.index].append(self._change(r))
        live, scale = self._stream(layer), self._held_scale("attn_in", layer, weights)
        of_all = {side: steps.total(given[side, None]) for side in ("query", "key")}
        changes = []
        for head in heads:
            query, key = (
                steps.total([*given[side, None], *given[side, head]])
                if given[side, head]
                else (of_all[side] if given[side, None] else None)
                for side in ("query", "key")
            )
            value, whole, own = None, given["value", None], given["value", head]
            if self._grouped and own:  # which are not in the group's values
                moved = steps.normed_change(live, whole, own, weights.norm, scale)
                value = moved, weights.W_V[head // (self.g.n_heads // self.g.n_kv_heads)]
            changes.append((head, query, key, value))
        clean, n = clean_scores(self.run, layer), pattern.shape[-1]
        known = n == clean.q.shape[1]  # else there are new tokens
        scores = clean.weights if known else score_weights(self.lens, layer, n)
        held = (clean.q_scale, clean.k_scale) if self._holds("norms", layer) else (None, None)
        return [
            steps.change_patterns(
                self.seen,
                live,
                weights.norm,
                scale,
                scores,
                held,
                steps.visible(pattern),
                self._watch("v", layer),
                changes,
                self.dtype,
            )
        ]

    def _read_feature(
        self,
        r: Resolved,
        dictionary: Dictionary,
        weights: LayerWeights,
        pattern: Tensor | None,
    ) -> SiteEdit | None:
        """An edge into one feature, at the site that its dictionary writes to."""
        assert isinstance(r.edit, PatchEdge)
        layer, feature = dictionary.layer, r.edit.target.index or 0
        change = self._change(r)
        if dictionary.kind == "tc":
            read = self._transcoder_reads(dictionary)
            moved = steps.total([change])
            return steps.change_mlp_feature(
                moved, read, dictionary, feature, r.reader_where, self.dtype
            )
        if pattern is None:
            return None
        scale = self._held_scale("attn_in", layer, weights)
        moved = steps.normed_change(self._stream(layer), [], [change], weights.norm, scale)
        project = None
        if dictionary.reads == "attn_out":
            raw = steps.projected(self.seen, self._watch("z", layer), weights.W_O, weights.b_O)
            after = None
            if weights.post_norm is not None:
                after = self._held_scale("attn_out", layer, weights)
            project = steps.projector(weights.W_O, raw, weights.post_norm, after)
        where, W_V = r.reader_where, weights.W_V
        return steps.change_reader(
            moved, W_V, pattern, dictionary, feature, where, self.dtype, project
        )

    def _read_mlp(self, edits: Sequence[Resolved], layer: int, weights: LayerWeights) -> None:
        changes = [
            self._change(r)
            for r in edits
            if isinstance(r.edit, PatchEdge) and r.edit.target.kind == "mlp"
        ]
        if changes:
            norm = weights.mlp_norm or Norm("none")
            scale = self._held_scale("mlp_in", layer, weights)
            moved = steps.normed_change(self._middle(layer), [], changes, norm, scale)
            self.add("mlp_in", layer, steps.add_change(moved))

    def _quantity(self, edit: Edit) -> Quantity:
        """What an edit replaces."""
        match edit:
            case AblateFeature():
                return Quantity("feature", edit.layer, edit.feature, edit.kind)
            case AblateError():
                return Quantity("error", edit.layer, of=edit.kind)
            case AblateHead():
                return Quantity("head", edit.layer, edit.head)
            case PatchSite():
                return Quantity(edit.site, -1 if edit.site == "embed" else edit.layer)
            case PatchEdge():
                end = edit.source
                if end.kind in KINDS:
                    return Quantity("feature", end.layer, end.index or 0, end.kind)
                if end.kind.endswith("_err"):
                    return Quantity("error", end.layer, of=end.kind.removesuffix("_err"))
                return Quantity(
                    "mlp_out" if end.kind == "mlp" else end.kind, end.layer, end.index or 0
                )
        raise InputError(f"{edit} takes no value from another run")


def _of_z(r: Resolved) -> SiteEdit:
    """A replacement of z, of one head or of all."""
    if isinstance(r.edit, PatchSite) and r.edit.site != "z":
        return steps.chain([])
    return steps.replace(r.where, 0.0 if r.new is None else r.new, getattr(r.edit, "head", None))


def _part(end: End, dictionary: Dictionary, read: Any, value: Any) -> Any:
    """A maker of changes of what one part of a dictionary's output writes."""
    if end.kind.endswith("_err"):
        return steps.error_change(read, value or read, dictionary)
    if end.kind.endswith(("_bias", "_skip")):
        return steps.bias_change(read, dictionary, end.kind.endswith("_skip"))
    return steps.feature_change(read, dictionary, end.index or 0)


def _of_mlp(kind: str) -> bool:
    return kind.startswith(("mlp", "tc"))


def _edited_layer(edit: Edit) -> int:
    """The layer whose sites an edit changes; -1 for embedding and unembedding."""
    if isinstance(edit, PatchEdge):
        return edit.target.layer
    if getattr(edit, "site", None) == "embed":
        return -1
    return edit.layer  # type: ignore[attr-defined]


def _plain(r: Resolved) -> tuple[str, int, Tensor | None, Any]:
    """An edit of a dictionary as :func:`steps.set_features` takes it."""
    match r.edit:
        case SetFeature(feature=feature, value=value):
            return "set", feature, r.where, value
        case AblateFeature(feature=feature):
            return "set", feature, r.where, 0.0 if r.new is None else r.new
        case ScaleFeature(feature=feature, factor=factor):
            return "scale", feature, r.where, factor
        case Steer(feature=feature, amount=amount):
            return "add", feature, r.where, amount
    return "error", -1, r.where, 0.0 if r.new is None else r.new
