"""Run a model again with edits, with parts of it frozen at the clean run."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sae_attn_plugin.backends.protocol import (
    Site,
)
from sae_attn_plugin.errors import InputError
from sae_attn_plugin.interventions.edits import (
    Edit,
    Freeze,
)
from sae_attn_plugin.interventions.plan import Plan
from sae_attn_plugin.interventions.result import InterventionResult, UnequalResult
from sae_attn_plugin.interventions.sources import Sources

if TYPE_CHECKING:
    from sae_attn_plugin.lens import FeatureLens, Run


Frozen = str | Freeze | Iterable[str | Freeze]


def intervene(
    lens: FeatureLens,
    run: Run,
    edits: Sequence[Edit],
    freeze: Frozen = (),
    *,
    sources: Mapping[str, Any] | None = None,
    max_new_tokens: int = 0,
    patterns: Iterable[int] = (),
    scores: Iterable[int] = (),
    reads: Iterable[Site] = (),
) -> InterventionResult:
    """Run the model again with edits.

    Args:
        run: the clean run, of one prompt or several; its prompts are run again.
        edits: what to change. Edits of one site are taken in the order given. Error terms are
            kept, so without edits the run is unchanged.
        freeze: parts held at the clean run, each by name or as a :class:`Freeze` of some layers:
            ``"patterns"`` (attention weights), ``"norms"`` (the scale of every norm), ``"mlp"`` and
            ``"attention"`` (what MLPs and attention blocks add to the residual stream, the edits
            apart; z itself stays live, so features can still be read). With all four, an edit has
            its direct effect and no other.
        sources: by name, the runs (or data sets) that :class:`From` and :class:`Mean` speak of.
        max_new_tokens: continue every prompt by so many most likely tokens, with and without the
            edits. Edits without a position act on new tokens too; what is frozen is held over the
            prompt and live after it.
        patterns: layers whose attention patterns to keep; those of heads whose queries or keys an
            edge changes are the changed ones.
        scores: layers whose attention scores to keep, so that ``result.effect(HeadScore(...))`` and
            ``result.scores(layer)`` can be asked for.
        reads: further sites to keep in ``values``.

    Raises:
        InputError: an edit, a source or a freeze that does not fit the model or the run.
        UnsupportedError, BackendError: scores of this model that are not known here.
    """
    edits = [edits] if isinstance(edits, Edit) else list(edits)
    held = resolve_freeze(freeze, lens.backend.geometry.n_layers)
    given = Sources(lens, sources or {})
    if max_new_tokens < 0:
        raise InputError(f"max_new_tokens={max_new_tokens}: expected at least 0")
    for edit in edits:
        if not isinstance(edit, Edit):
            raise InputError(f"expected an edit such as AblateFeature(...), got {edit!r}")
    layers = [[run._resolve_any_layer(layer) for layer in some] for some in (patterns, scores)]
    parts = equal_parts(run)
    found: dict[int, InterventionResult] = {}
    for members, part in parts:
        plan = Plan(lens, part, held, edits, given, members, len(run))
        result = plan.run_once(max_new_tokens, reads, *layers)
        if len(parts) == 1:
            return result
        found |= {i: result[k] for k, i in enumerate(members)}
    return UnequalResult(run, [found[i] for i in range(len(run))])  # type: ignore[arg-type]


def resolve_freeze(freeze: Frozen, n_layers: int) -> dict[str, frozenset[int]]:
    """By part, the layers where it is held; the final norm is layer ``n_layers``."""
    given = [freeze] if isinstance(freeze, str | Freeze) else list(freeze)
    held: dict[str, frozenset[int]] = {}
    for one in given:
        if not isinstance(one, str | Freeze):
            raise InputError(f"cannot freeze {one!r}; expected a name or Freeze(...)")
        item = Freeze(one) if isinstance(one, str) else one  # type: ignore[arg-type]
        every = range(n_layers + (item.part == "norms"))
        chosen = every if item.layers is None else item.layers
        if outside := sorted({*chosen, *item.but} - set(every)):
            raise InputError(f"{item}: layer {outside[0]} is out of range: 0..{every[-1]}")
        held[item.part] = held.get(item.part, frozenset()) | (set(chosen) - set(item.but))
    return held


def equal_parts(run: Run) -> list[tuple[list[int], Run]]:
    """The prompts of a run in parts of equal length, with their numbers."""
    lengths = run.lengths
    if len(set(lengths)) == 1 and not hasattr(run, "_runs"):
        return [(list(range(len(run))), run)]
    groups: defaultdict[int, list[int]] = defaultdict(list)
    for i, length in enumerate(lengths):
        groups[length].append(i)
    return [(members, run.pick(members)) for members in groups.values()]
