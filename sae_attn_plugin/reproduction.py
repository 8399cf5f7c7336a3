"""Make a graph again from what its file says, and compare it with the file edge by edge."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sae_attn_plugin.errors import InputError
from sae_attn_plugin.graphs.compare import GraphComparison, compare_graphs
from sae_attn_plugin.nodes import (
    FEATURE_KINDS,
    Direction,
    Feature,
    HeadScore,
    Logit,
    LogitDiff,
    Node,
    Target,
    unquote,
)

if TYPE_CHECKING:
    import networkx as nx

    from sae_attn_plugin.lens import FeatureLens

__all__ = ["Reproduction", "reproduce"]

_MADE_OTHERWISE = ("aggregate_of", "difference_of", "supernodes", "aligned")


@dataclass(frozen=True)
class Reproduction:
    """A graph made again, beside the one it was made from.

    Attributes:
        graph: the new one.
        comparison: of the given graph (first) with the new one (second).
        changed: what is not as it was: each line names a setting, a version or weights, with what
            the file says and what is here.
        tolerance: up to which two graphs count as the same.
    """

    graph: Any
    comparison: GraphComparison
    changed: tuple[str, ...]
    tolerance: float

    @property
    def same(self) -> bool:
        """The same nodes and edges, and no number off by more than the tolerance."""
        c = self.comparison
        return c.equal(self.tolerance) and not c.edges_only_first and not c.edges_only_second

    def __bool__(self) -> bool:
        return self.same


def reproduce(
    graph: nx.DiGraph[Any], lens: FeatureLens, *, tolerance: float = 1e-5
) -> Reproduction:
    """Run a graph's prompt again and compare what comes out with the graph.

    Tokens, targets and their weights, node budget, treatment of MLPs and heads, and pruning are
    those the graph's attributes say.

    Args:
        graph: from :meth:`Run.graph` or :meth:`Attribution.to_networkx`, or a file of one.
        lens: the same model and SAEs.
        tolerance: relative to each target's scale, as in :class:`GraphComparison`.

    Raises:
        InputError: the graph lacks something that is needed, or was not made in one run (a mean, a
            difference, merged nodes); SAEs of other layers or with other ids.
    """
    about = graph.graph
    for name in _MADE_OTHERWISE:
        if name in about:
            raise InputError(
                f"this graph has {name!r}: it was made from other graphs, not in one run; "
                "reproduce those"
            )
    ids, targets = needed(about, "token_ids", list), needed(about, "targets", list)
    for kind in ("saes", "transcoders", "residual_saes"):
        _check_dictionaries(kind, about.get(kind, {}), lens.provenance.get(kind, {}))
    run = lens.run([ids])
    options: dict[str, Any] = {
        name: about[name]
        for name in ("mlp", "heads", "residual", "expand", "node_budget", "edges_per_target")
        if name in about
    }
    wanted = [_target(name, about, lens) for name in targets]
    attribution = run.attribute(
        wanted, weights=about.get("target_weights"), progress=False, **options
    )
    for step in (*about.get("pruned_before", ()), about.get("pruning")):
        if step is not None:
            attribution = attribution.prune(**_pruning(step))
    again = attribution.to_networkx(by="head" if graph.is_multigraph() else None)
    return Reproduction(
        again, compare_graphs(graph, again), tuple(_changed(about, again.graph, lens)), tolerance
    )


def needed(about: Mapping[str, Any], name: str, kind: type) -> Any:
    """An attribute that a graph cannot be made again without."""
    value = about.get(name)
    if not isinstance(value, kind) or not value:
        raise InputError(
            f"the graph does not say its {name}, so it cannot be made again; it was written by "
            "another program, or by an older version"
        )
    return value


def _check_dictionaries(kind: str, said: Any, here: Mapping[str, str]) -> None:
    if not isinstance(said, Mapping):
        raise InputError(f"the graph's {kind} are {said!r}; expected a dict of layer to id")
    for layer in sorted({*said, *here}):
        if said.get(layer) != here.get(layer):
            there, found = (
                "none" if one is None else repr(one) for one in (said.get(layer), here.get(layer))
            )
            raise InputError(
                f"{kind} of layer {layer}: the graph was made with {there}, here is {found}; "
                "give those it was made with"
            )


def _target(name: str, about: Mapping[str, Any], lens: FeatureLens) -> Target:
    node = Node.parse(name)
    if node.kind in FEATURE_KINDS:
        assert node.layer is not None
        assert node.feature is not None
        return Feature(node.layer, node.feature, node.position, node.kind)  # pyright: ignore[reportArgumentType]
    if node.kind == "logit":
        (token,) = unquote(node.label or "")
        return Logit(token, node.position)
    if node.kind == "logit_diff":
        correct, wrong = unquote(node.label or "")
        return LogitDiff(correct, wrong, node.position)
    if node.kind == "score":
        assert node.layer is not None
        assert node.head is not None
        assert node.key is not None
        side: Any = node.label or "both"
        return HeadScore(node.layer, node.head, node.position, node.key, side)
    vectors = about.get("directions", {})
    if node.kind != "direction" or not isinstance(vectors, Mapping) or name not in vectors:
        raise InputError(f"the graph does not say what its target {name} is")
    import torch

    try:
        vector = torch.tensor(vectors[name], dtype=torch.float64)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        raise InputError(f"the vector of {name} is no list of numbers") from None
    (label,) = unquote(node.label or "")
    vector = vector.to(lens.backend.geometry.dtype)
    return Direction(vector, node.position, str(label))


def _pruning(step: Any) -> dict[str, Any]:
    if not isinstance(step, Mapping) or not step.keys() <= {"nodes", "edges", "max_nodes"}:
        raise InputError(
            f"the graph's pruning is {step!r}; expected a dict of nodes, edges and max_nodes"
        )
    return dict(step)


def _changed(said: Mapping[str, Any], here: Mapping[str, Any], lens: FeatureLens) -> list[str]:
    lines = []
    for name in ("model", "revision", "backend", "dtype", "device"):
        if name in said and said[name] != here.get(name):
            lines.append(f"{name}: {said[name]} in the file, {here.get(name)} here")
    for name in ("versions", "fingerprints"):
        before = said.get(name)
        if not isinstance(before, Mapping):
            lines.append(f"{name}: not in the file")
            continue
        before, now = _flat(before), _flat(here.get(name, {}))
        lines += [
            f"{name} of {key}: {before[key]} in the file, {now.get(key, 'none')} here"
            for key in sorted(before)
            if before[key] != now.get(key)
        ]
    prompt = said.get("prompt")
    if isinstance(prompt, str) and lens.tokenizer is not None:
        try:
            ids = lens.to_tokens(prompt)[0].tolist()
        except InputError as error:
            ids = str(error)
        if ids != said["token_ids"]:
            lines.append(f"prompt: {said['token_ids']} in the file, {ids} from this tokenizer")
    return lines


def _flat(table: Mapping[str, Any], start: str = "") -> dict[str, Any]:
    rows: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, Mapping):
            rows |= _flat(value, f"{start}{key} ")
        else:
            rows[f"{start}{key}"] = value
    return rows


def chosen(saes: Mapping[str, Any], said: Any) -> Sequence[Any]:
    """Those of a release or folder whose ids a graph names; all, where it names none of them."""
    names = said.values() if isinstance(said, Mapping) else ()
    ids = {part for name in names if isinstance(name, str) for part in (name, *name.split("+"))}
    found = [
        sae
        for sae in saes.values()
        if str(sae.cfg.metadata.sae_id or sae.cfg.metadata.hook_name) in ids
    ]
    return found or list(saes.values())
