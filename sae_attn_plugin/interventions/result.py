"""What an intervention gives: an edited run beside the clean one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_attn_plugin.attribution.qk import check_pair, check_side
from sae_attn_plugin.backends.protocol import Site, uncapped_logits
from sae_attn_plugin.errors import InputError
from sae_attn_plugin.interventions import steps
from sae_attn_plugin.interventions.reading import clean_scores
from sae_attn_plugin.nodes import Feature, HeadScore, Logit, LogitDiff
from sae_attn_plugin.tokens import as_index

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from sae_attn_plugin.lens import Run, UnequalRun


Measured = Logit | LogitDiff | Feature | HeadScore


@dataclass(frozen=True, eq=False)
class InterventionResult:
    """An edited run beside the clean one.

    ``result[i]`` is the result of one prompt.

    Attributes:
        clean: the run that was edited.
        logits: ``[batch, position, d_vocab]`` of the edited run, as the model returns them, over
            the prompt's positions.
        z: by layer with an SAE, ``[batch, position, head, d_head]``, after the edits of that layer.
        read: by kind of feature and layer, what the dictionary reads: ``[batch, position, ...]``,
            before edits of its features, which change what is written and not what is read.
        values: every site that was read.
        feature_edits: likewise, the edits of features, as :mod:`interventions.steps` takes them.
        held: by frozen part, the layers where it was held.
        patterns: by layer, those asked for: ``[batch, head, query, key]`` after the edits.
        sides: by layer, each head's queries and keys after the edits, normalised and rotated, where
            scores were asked for: ``[batch, position, head, d_head]`` each.
        generated, clean_generated: ``[batch, new]`` ids that the edited and the clean model
            continued with; empty unless asked for.
    """

    clean: Run
    logits: Float[Tensor, "batch position d_vocab"]
    z: dict[int, Float[Tensor, "batch position head d_head"]]
    read: dict[tuple[str, int], Tensor] = field(repr=False)
    values: Mapping[Site, Tensor] = field(repr=False)
    feature_edits: Mapping[tuple[str, int], list[Any]] = field(default_factory=dict, repr=False)
    held: Mapping[str, frozenset[int]] = field(default_factory=dict, repr=False)
    patterns: Mapping[int, Float[Tensor, "batch head query key"]] = field(
        default_factory=dict, repr=False
    )
    sides: Mapping[int, tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)
    generated: Int[Tensor, "batch new"] | None = None
    clean_generated: Int[Tensor, "batch new"] | None = None

    def __len__(self) -> int:
        return len(self.clean)

    def __getitem__(self, index: int) -> InterventionResult:
        index = range(len(self))[index]
        part = slice(index, index + 1)
        new, old = self.generated, self.clean_generated
        return replace(
            self,
            clean=self.clean[index],
            logits=self.logits[part],
            z={layer: z[part] for layer, z in self.z.items()},
            read={key: x[part] for key, x in self.read.items()},
            feature_edits={
                key: [steps.of_prompt(edit, index) for edit in edits]
                for key, edits in self.feature_edits.items()
            },
            values={site: value[part] for site, value in self.values.items()},
            patterns={layer: pattern[part] for layer, pattern in self.patterns.items()},
            sides={layer: (q[part], k[part]) for layer, (q, k) in self.sides.items()},
            generated=None if new is None else new[part],
            clean_generated=None if old is None else old[part],
        )

    # -- what was measured -----------------------------------------------------------------------

    def value(self, target: Measured) -> Float[Tensor, " batch"]:
        """A target in the edited run: the logit or logit difference before any final soft-cap, the
        pre-activation (which edits of features of the same layer do not change), or the attention
        score before any soft-cap. ``HeadScore(side="query")`` has the edited query and the clean
        key, ``"key"`` the reverse, ``"both"`` both edited.

        Raises:
            InputError: a target that does not exist, or a score that was not asked for.
        """
        if isinstance(target, HeadScore):
            return self._score(target, self._sides(target.layer))
        return self._value(target, self.values, self.read)

    def clean_value(self, target: Measured) -> Float[Tensor, " batch"]:
        """The same target in the clean run."""
        if isinstance(target, HeadScore):
            self._sides(target.layer)
            clean = clean_scores(self.clean, target.layer)
            return self._score(target, (clean.q, clean.k))
        return self._value(target, self.clean.capture.values, self.clean.reads)

    def effect(self, target: Measured) -> Float[Tensor, " batch"]:
        """Edited minus clean."""
        return self.value(target) - self.clean_value(target)

    def scores(self, layer: int) -> Float[Tensor, "batch head query key"]:
        """Attention scores of a layer after the edits, before any soft-cap and without the mask.

        Raises:
            InputError: they were not asked for.
        """
        return clean_scores(self.clean, layer).weights.scores(*self._sides(layer))

    @property
    def metric(self) -> Float[Tensor, " batch"]:
        """What the run's data set measures, in the edited run: the logit of the correct answer
        minus that of the wrong one, or its log-probability where there is no wrong one.

        Raises:
            InputError: the run was not made from a data set.
        """
        return self.clean.roles.score(self.logits)

    @property
    def clean_metric(self) -> Float[Tensor, " batch"]:
        """The same of the clean run."""
        return self.clean.roles.score(self.clean.logits)

    def changed_features(self, least: float = 1e-6) -> pd.DataFrame:
        """Features whose activation the edits change, the most changed first: ``layer, position,
        token, feature, clean, edited, change``, with ``prompt`` first where there are several and
        ``kind`` after the layer where dictionaries of several kinds are given.

        Args:
            least: smallest change that counts, relative to the largest activation of the layer.
        """
        frames = [self._changed(i, least) for i in range(len(self))]
        if len(frames) == 1:
            return frames[0]
        whole = pd.concat(frames, keys=range(len(frames)), names=["prompt", None])
        return _by_size(whole.reset_index(level="prompt"))

    def continuations(self) -> list[tuple[str, str]]:
        """What each prompt was continued with, as text: by the clean and by the edited model.

        Raises:
            InputError: nothing was generated.
        """
        new, old = self.generated, self.clean_generated
        if new is None or old is None:
            raise InputError("nothing was generated; pass max_new_tokens= to lens.intervene")
        decode = self.clean.lens.tokenizer.decode
        return [(decode(a.tolist()), decode(b.tolist())) for a, b in zip(old, new, strict=True)]

    def plot(self, position: int = -1, prompt: int = 0, ax: Axes | None = None) -> Figure:
        """The change of the next token's probabilities.

        Args:
            position: after which token, negative from the end. prompt: of several, which.
            ax: axes to draw into. None: a figure of its own, which notebooks show.
        """
        from sae_attn_plugin.interventions.show import plot

        return plot(self, position, prompt, ax)

    def _repr_html_(self) -> str:
        from sae_attn_plugin.interventions.show import as_html

        return as_html(self)

    # -- inside ----------------------------------------------------------------------------------

    def _changed(self, index: int, least: float) -> pd.DataFrame:
        one = self[index]
        lens, device = one.clean.lens, one.clean.lens.backend.geometry.device
        frames = []
        clean = one.clean.reads
        kinds = {dictionary.kind for _, dictionary in lens.all_dictionaries()}
        for layer, dictionary in lens.all_dictionaries():
            kind = dictionary.kind
            edits = one.feature_edits.get((kind, layer), [])
            before, after = (
                steps.active_features(dictionary, x.to(device), of_x)
                for x, of_x in ((clean[kind, layer], []), (one.read[kind, layer], edits))
            )
            size = max([*before.values(), *after.values(), 0.0])
            for position, feature in sorted(before.keys() | after.keys()):
                was, now = (found.get((position, feature), 0.0) for found in (before, after))
                if abs(now - was) > least * size:
                    token = one.clean.token_strings[position]
                    frames.append((layer, kind, position, token, feature, was, now, now - was))
        columns = ["layer", "kind", "position", "token", "feature", "clean", "edited", "change"]
        frame = _by_size(pd.DataFrame(frames, columns=pd.Index(columns)))
        return frame.drop(columns="kind") if len(kinds) < 2 else frame

    def _sides(self, layer: int) -> tuple[Tensor, Tensor]:
        if layer not in self.sides:
            raise InputError(
                f"scores of layer {layer} were not kept; pass scores=[{layer}] to lens.intervene"
            )
        return self.sides[layer]

    def _score(self, target: HeadScore, sides: tuple[Tensor, Tensor]) -> Tensor:
        """A score from the sides it is followed on and, on the other one, the clean run."""
        run, (q, k) = self.clean, sides
        head, n_heads = as_index(target.head, "head"), q.shape[2]
        query, key = run.resolve_position(target.query), run.resolve_position(target.key)
        visible = steps.visible(run.capture["pattern", target.layer])[:, query].all(0)
        check_pair(target.layer, n_heads, visible, head, query, key)
        check_side(target.side)
        clean = clean_scores(run, target.layer)
        q = clean.q if target.side == "key" else q
        k = clean.k if target.side == "query" else k
        product = (q[:, query, head] * k[:, key, head]).sum(-1)
        return clean.weights.scale * product + clean.weights.alibi(query, key, head)

    def _value(
        self,
        target: Logit | LogitDiff | Feature,
        values: Mapping[Site, Tensor],
        read: Mapping[tuple[str, int], Tensor],
    ) -> Tensor:
        run = self.clean
        if not isinstance(target, Feature | Logit | LogitDiff):
            raise InputError(
                f"an intervention measures a Feature, Logit, LogitDiff or HeadScore, not {target!r}"
            )
        position = run.resolve_position(target.position)
        if isinstance(target, Feature):
            key = target.kind, target.layer
            dictionary = run.dictionary(target.layer, target.kind)
            index = torch.tensor([run.resolve_feature(target.layer, target.feature, target.kind)])
            at, flat = read[key][:, position], len(dictionary.input_shape)
            at = (at if at.dtype == torch.float64 else at.float()).flatten(-flat)
            _, scale, _ = dictionary.normalise(at)
            if target.layer in self.held.get("norms", ()):
                # Where norms are held, so is the normalisation of the dictionary's own input.
                clean = self.clean.reads[key][:, position].to(at).flatten(-flat)
                _, scale, _ = dictionary.normalise(clean)
            encoder = dictionary.encoder(index.to(at.device), at.dtype)[0].flatten()
            dot = at @ encoder / dictionary.input_scale(scale)[:, 0]
            return dot + dictionary.constants(index.to(at.device), at.dtype)
        tokens = [target.token] if isinstance(target, Logit) else [target.correct, target.wrong]
        ids = [run.resolve_token(token)[0] for token in tokens]
        at = uncapped_logits(run.lens.backend, values, ids, position)
        return at[:, 0] - at[:, 1] if len(ids) == 2 else at[:, 0]


class UnequalResult(InterventionResult):
    """Results of prompts of unequal length, side by side; ``result[i]`` is the result of one.

    ``logits``, ``z``, ``values`` and ``patterns`` would need padding and are not there; what is one
    number per prompt is.
    """

    def __init__(self, clean: UnequalRun, results: Sequence[InterventionResult]) -> None:
        # the frozen dataclass has no field to hold several
        for name, value in (("clean", clean), ("_results", tuple(results))):
            object.__setattr__(self, name, value)

    def __getattr__(self, name: str) -> Any:
        if name in ("logits", "z", "values", "patterns", "sides"):
            raise InputError(
                f"the prompts of this result differ in length, so {name} makes no rectangle; pick "
                "one: result[i]"
            )
        raise AttributeError(name)

    def __getitem__(self, index: int) -> InterventionResult:
        return self._results[index]

    def __repr__(self) -> str:
        return f"Results of {len(self)} prompts of unequal length"

    def value(self, target: Measured) -> Tensor:
        return torch.cat([result.value(target) for result in self._results])

    def clean_value(self, target: Measured) -> Tensor:
        return torch.cat([result.clean_value(target) for result in self._results])

    @property
    def metric(self) -> Tensor:
        return torch.cat([result.metric for result in self._results])

    @property
    def clean_metric(self) -> Tensor:
        return torch.cat([result.clean_metric for result in self._results])

    def continuations(self) -> list[tuple[str, str]]:
        return [pair for result in self._results for pair in result.continuations()]

    def _changed(self, index: int, least: float) -> pd.DataFrame:
        return self._results[index]._changed(0, least)


def _by_size(frame: pd.DataFrame) -> pd.DataFrame:
    """Rows with the largest change first."""
    order = frame["change"].abs().to_numpy().argsort(kind="stable")[::-1]
    return frame.iloc[order].reset_index(drop=True)
