"""Is a graph true? Every edge predicted by it, against the same removal measured on the model."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm

from sae_attn_plugin.backends.protocol import Site
from sae_attn_plugin.errors import InputError
from sae_attn_plugin.interventions.apply import intervene
from sae_attn_plugin.interventions.edits import FREEZABLE, AddToStream
from sae_attn_plugin.interventions.reading import clean_scores, queries_and_keys, read_by
from sae_attn_plugin.interventions.result import InterventionResult
from sae_attn_plugin.nodes import (
    FEATURE_KINDS,
    PASSING_KINDS,
    RESIDUAL_KINDS,
    Feature,
    HeadScore,
    Logit,
    LogitDiff,
    Node,
    unquote,
)

if TYPE_CHECKING:
    import networkx as nx
    from matplotlib.figure import Figure

    from sae_attn_plugin.interventions.apply import Frozen
    from sae_attn_plugin.lens import FeatureLens, Run

_SiteName = Literal["embed", "attn_out", "mlp_out"]
_Held = Mapping[str, frozenset[int]]  # by frozen part, the layers where it is held


@dataclass(frozen=True, eq=False)
class Agreement:
    """Predicted against measured effects of removing the source of each edge.

    Attributes:
        table: one row per edge: ``source, target, kind`` (of the source), ``predicted`` (minus the
            edge), ``measured`` (change of the target's pre-activation or logit) and ``error``,
            |measured - predicted| over the sum of |edges| into the target.
    """

    table: pd.DataFrame

    @property
    def max_error(self) -> float:
        """The largest relative error."""
        return float(self.table["error"].max())

    @property
    def slope(self) -> float:
        """Of the least-squares line through the origin, measured on predicted: 1 where effects
        have the predicted size."""
        measured, predicted = self.table["measured"], self.table["predicted"]
        size = float((predicted**2).sum())
        return float((measured * predicted).sum()) / size if size else float("nan")

    @property
    def r2(self) -> float:
        """1 - residual over total sum of squares of the measured effects; NaN if they are equal."""
        measured, predicted = self.table["measured"], self.table["predicted"]
        total = float(((measured - measured.mean()) ** 2).sum())
        return 1 - float(((measured - predicted) ** 2).sum()) / total if total else float("nan")

    @property
    def rank_correlation(self) -> float:
        """Spearman's; NaN where one side is constant."""
        ranks = self.table[["predicted", "measured"]].rank()
        return float(ranks["predicted"].corr(ranks["measured"]))

    @property
    def sign_agreement(self) -> float:
        """Share of edges whose measured effect has the predicted sign."""
        return float((np.sign(self.table["predicted"]) == np.sign(self.table["measured"])).mean())

    def figures(self) -> dict[str, float]:
        """All figures by name, with the number of edges."""
        names = ("max_error", "r2", "slope", "rank_correlation", "sign_agreement")
        return {"edges": len(self.table), **{name: getattr(self, name) for name in names}}

    def by_kind(self) -> pd.DataFrame:
        """The same figures for each kind of source."""
        parts = self.table.groupby("kind")
        return pd.DataFrame({str(kind): Agreement(part).figures() for kind, part in parts}).T

    def __repr__(self) -> str:
        return (
            f"{len(self.table)} edges: max error {self.max_error:.1e}, R2 {self.r2:.4f}, rank "
            f"correlation {self.rank_correlation:.4f}, sign agreement {self.sign_agreement:.1%}"
        )


@dataclass(frozen=True, eq=False)
class Validation:
    """What removing the sources of a graph's edges does.

    Attributes:
        frozen: with patterns, norm scales and all other writers held: the edge's own claim, which
            must hold up to rounding.
        free: with everything live, so that indirect paths, patterns and norms respond too.
        random: the same as ``free`` for as many random edges: each source exchanged for another
            one of its kind and layer that the graph does not have, their edges computed likewise.
            None where none was asked for.
        others: by name, what else was asked to be held.
        about: what was validated.
    """

    frozen: Agreement
    free: Agreement
    random: Agreement | None = None
    others: Mapping[str, Agreement] = field(default_factory=dict)
    about: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def __repr__(self) -> str:
        return "\n".join(f"{name + ':':<8}{part}" for name, part in self.parts().items())

    def parts(self) -> dict[str, Agreement]:
        """Every agreement by name."""
        random = {} if self.random is None else {"random": self.random}
        return {"frozen": self.frozen, "free": self.free, **self.others, **random}

    def summary(self) -> pd.DataFrame:
        """One row per condition with its figures: ``edges, max_error, r2, slope, rank_correlation,
        sign_agreement``, and ``mean_effect``, the mean of |measured|."""
        rows = {
            name: {**part.figures(), "mean_effect": float(part.table["measured"].abs().mean())}
            for name, part in self.parts().items()
        }
        return pd.DataFrame(rows).T.astype({"edges": int})

    def gap(self) -> pd.DataFrame:
        """How much of the distance between prediction and truth each held part takes away.

        ``distance`` is the root mean square of measured minus predicted; ``closed`` the share of
        its square that is gone, against ``free``. One row per condition.
        """
        rows = {}
        for name, part in self.parts().items():
            if name != "random":
                error = part.table["measured"] - part.table["predicted"]
                rows[name] = float((error**2).mean() ** 0.5)
        free = max(rows["free"], 1e-300)
        return pd.DataFrame(
            {
                "distance": pd.Series(rows),
                "closed": pd.Series({name: 1 - (d / free) ** 2 for name, d in rows.items()}),
            }
        )

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON can hold it; NaN is None."""
        return {
            "about": dict(self.about),
            "summary": _records(self.summary().reset_index(names="condition")),
            "edges": {name: _records(part.table) for name, part in self.parts().items()},
        }

    def save(self, path: str | Path) -> Path:
        """Write the report: ``.json``, or the picture as ``.png``, ``.svg`` or ``.pdf``.

        Raises:
            InputError: another ending. FileError: a place that cannot be written.
        """
        from sae_attn_plugin.interventions.pictures import save

        return save(self, path)

    def plot(self) -> Figure:
        """Measured against predicted effects of every edge, one panel per condition, by kind of
        source."""
        from sae_attn_plugin.interventions.pictures import scatter

        return scatter(self)

    def _repr_html_(self) -> str:
        from sae_attn_plugin import display

        rows = [("all else held", self.frozen), ("everything live", self.free)]
        frame = pd.DataFrame(
            {
                "": [name for name, _ in rows],
                "edges": [len(part.table) for _, part in rows],
                "max error": [f"{part.max_error:.1e}" for _, part in rows],
                "R²": [part.r2 for _, part in rows],
                "rank correlation": [part.rank_correlation for _, part in rows],
                "signs": [f"{part.sign_agreement:.1%}" for _, part in rows],
            }
        )
        return display.card(
            "Validation",
            ["each source of an edge removed on the model, against what the edge predicts"],
            display.table(frame, list(frame)),
        )


def validate(
    graph: nx.DiGraph[Any],
    lens: FeatureLens,
    *,
    max_sources: int | None = None,
    baseline: bool = True,
    freezes: Mapping[str, Frozen] | None = None,
    seed: int = 0,
    progress: bool | None = None,
) -> Validation:
    """Remove each source of a graph's edges on the model and compare with what its edges predict.

    Args:
        graph: from :meth:`Run.graph` or :meth:`Attribution.to_networkx` of this model and SAEs.
        lens: the model and SAEs the graph was made with.
        max_sources: only the sources with the largest influence; None: all. Each costs one forward
            pass for every condition.
        baseline: measure random edges too.
        freezes: by name, further parts to hold, one condition each, such as
            ``{"patterns": "patterns", "norms": "norms"}``.
        seed: of the random edges.
        progress: show a bar; None: on a terminal.

    Raises:
        InputError: a graph of another model, or one without an edge that can be measured.
    """
    if "token_ids" not in graph.graph or not graph.graph.get("targets"):
        raise InputError(
            "the graph does not say which prompt it is of; expected one of this package"
        )
    if taken := {"frozen", "free", "random"} & set(freezes or {}):
        raise InputError(f"freezes: the names {', '.join(sorted(taken))} are taken")
    run = lens.run([graph.graph["token_ids"]])
    rows = run.all_writers.rows()
    edges = _edges(graph)
    sources = list(dict.fromkeys(source for source, _ in edges))
    if max_sources is not None:
        if max_sources < 1:
            raise InputError(f"validate(max_sources={max_sources}): expected at least 1")
        influence = {name: graph.nodes[name].get("influence", 0.0) for name in sources}
        sources = sorted(sources, key=lambda name: -influence[name])[:max_sources]
    for name in sources:
        if Node.parse(name) not in rows:
            raise InputError(
                f"{name} writes nothing on this prompt with this model and these SAEs; the graph "
                "was made with others"
            )
    effect_on = _Measure(run, graph)
    chosen = set(sources)
    pairs = [(s, t) for s, t in edges if s in chosen]
    conditions: dict[str, Frozen] = {"frozen": FREEZABLE, "free": (), **(freezes or {})}
    swapped = _swap(rows, sources, pairs, seed) if baseline else []
    total = len(sources) * len(conditions) + len({source for source, _ in swapped})
    size: dict[str, float] = defaultdict(float)
    for (_, target), weight in edges.items():
        size[target] += abs(weight)
    disable = None if progress is None else not progress
    with tqdm(total=total, desc="validating", unit="pass", disable=disable, leave=False) as bar:

        def measure(pairs: Sequence[tuple[str, str]], freeze: Frozen) -> list[float]:
            found: dict[tuple[str, str], float] = {}
            for name in dict.fromkeys(source for source, _ in pairs):
                edit = _removal(run, rows, name)
                result = intervene(lens, run, [edit], freeze, reads=effect_on.reads)
                for source, target in pairs:
                    if source == name:
                        found[source, target] = effect_on(result, Node.parse(target))
                bar.update()
            return [found[pair] for pair in pairs]

        parts = {
            name: _agreement(pairs, [edges[pair] for pair in pairs], measure(pairs, freeze), size)
            for name, freeze in conditions.items()
        }
        random = None
        if swapped:
            weights = _weights(run, swapped, graph)
            random = _agreement(swapped, weights, measure(swapped, ()), size)
    about = {
        key: graph.graph.get(key) for key in ("model", "backend", "dtype", "prompt", "targets")
    }
    return Validation(
        frozen=parts.pop("frozen"),
        free=parts.pop("free"),
        random=random,
        others=parts,
        about={**about, "sources": len(sources), "seed": seed},
    )


def _edges(graph: nx.DiGraph[Any]) -> dict[tuple[str, str], float]:
    """Weight by ``(source, target)``, with the heads of a ``MultiDiGraph`` summed."""
    edges: dict[tuple[str, str], float] = defaultdict(float)
    for source, target, weight in graph.edges(data="weight"):
        edges[source, target] += weight
    if not edges:
        raise InputError("the graph has no edges to validate")
    return dict(edges)


def _removal(run: Run, rows: Mapping[Node, int], name: str) -> AddToStream:
    """The edit that takes a writer out of the residual stream."""
    node = Node.parse(name)
    vector = run.all_writers.full(np.array([rows[node]]))[0]
    return AddToStream(-vector, node.position, *_site(node, run))


def _site(node: Node, run: Run) -> tuple[_SiteName, int]:
    """Where to take a node out of the stream. A term of the stream itself is taken out of what was
    written to it last."""
    layer = node.layer or 0
    if node.kind in ("embed", "pos"):
        return "embed", 0
    if node.kind.startswith(RESIDUAL_KINDS) and not node.kind.startswith("resid_mid"):
        if layer == 0:
            return "embed", 0
        return ("mlp_out" if run.lens.backend.geometry.has_mlp else "attn_out"), layer - 1
    of_attention = node.kind.startswith(("attn", "head", "resid_mid"))
    return ("attn_out" if of_attention else "mlp_out"), layer


class _Measure:
    """What an intervention does to a node.

    A feature or a logit is measured as it is. A node that passes on what it reads is a vector: it
    is measured along the direction that the graph's own edges are about, which is found by
    attributing the graph's targets again. What the MLP makes of its input is measured from the
    model's live residual stream, with its activation ratios held where MLPs are.
    """

    def __init__(self, run: Run, graph: nx.DiGraph[Any]) -> None:
        self.run = run
        targets = {Node.parse(target) for _, target in graph.edges()}
        kinds = {node.kind for node in targets}
        self.reads = {
            Site(name, node.layer)
            for node in targets
            if node.layer is not None and node.kind in ("head", "mlp", "mlp_sae")
            for name in (("z",) if node.kind == "head" else ("resid_pre", "attn_out", "mlp_out"))
        }
        self.reads |= {Site("resid_pre", n.layer or 0) for n in targets if n.kind == "score"}
        self.linear = None
        if kinds & {"mlp", "mlp_sae"}:
            self.linear = run.linear_mlps
        self.directions: dict[Node, Tensor] = {}
        if kinds & set(PASSING_KINDS):
            self.directions = _directions(run, graph)

    def __call__(self, result: InterventionResult, node: Node) -> float:
        held = node.layer in result.held.get("mlp", ())
        if node.kind in PASSING_KINDS:
            if node not in self.directions:
                raise InputError(
                    f"{node} is not expanded when the graph's targets are attributed again; the "
                    "graph was made with other settings"
                )
            direction = self.directions[node]
            live, clean = (
                self._written(node, values, result.held)
                for values in (result.values, self.run.capture.values)
            )
            return float((live - clean) @ direction.to(live))
        if node.kind == "mlp_sae" and held:
            assert node.layer is not None
            d = self.run.dictionary(node.layer, "mlp_sae")
            live, clean = (
                self._mlp(node, values, result.held)
                for values in (result.values, self.run.capture.values)
            )
            frozen_mlp = self.run.frozen.layers[node.layer].mlp
            assert frozen_mlp is not None
            assert frozen_mlp.encoded is not None
            row = d.encoder(torch.tensor([node.feature], device=live.device), live.dtype)[0]
            scale = d.input_scale(frozen_mlp.encoded.scale)[node.position]
            return float((live - clean) @ row / scale)
        if node.kind == "score":
            return self._score(node, result.values, result.held) - self._score(
                node, self.run.capture.values, result.held
            )
        target = _as_target(node)
        assert not isinstance(target, HeadScore)
        return float(result.effect(target))

    def _score(self, node: Node, values: Mapping[Site, Tensor], held: _Held) -> float:
        """A head's score, of the side that is followed live and of the other one clean; of both
        sides, the mean of the two. The norms of the layer, of queries and keys too, have the clean
        scale where norms are held."""
        assert node.layer is not None
        assert node.head is not None
        assert node.key is not None
        clean = clean_scores(self.run, node.layer)
        hold = node.layer in held.get("norms", ())
        x = values[Site("resid_pre", node.layer)]
        q, k = (side[0, :, node.head] for side in queries_and_keys(self.run, node.layer, x, hold))
        found = []
        if node.label in ("query", None):
            found.append(q[node.position] @ clean.k[0, node.key, node.head])
        if node.label in ("key", None):
            found.append(clean.q[0, node.position, node.head] @ k[node.key])
        return clean.weights.scale * float(torch.stack(found).mean())

    def _written(self, node: Node, values: Mapping[Site, Tensor], held: _Held) -> Tensor:
        """``[d_model]``, what a node adds to the residual stream, from the sites of a run."""
        assert node.layer is not None
        layer, at = self.run.frozen.layers[node.layer], node.position
        if node.kind == "head":
            z = values[Site("z", node.layer)][0, at, node.head].to(layer.z)
            return layer.after((z @ layer.weights.W_O[node.head])[None], slice(at, at + 1))[0]
        if node.kind == "mlp":
            return self._mlp(node, values, held)
        mlp = layer.mlp
        assert mlp is not None
        assert mlp.dictionary is not None
        read = read_by(self.run, mlp.dictionary, values, held)[0, at].to(mlp.out)
        skip = mlp.dictionary.skip(read)
        assert skip is not None
        return mlp.after(skip[None], slice(at, at + 1))[0]

    def _mlp(self, node: Node, values: Mapping[Site, Tensor], held: _Held) -> Tensor:
        assert node.layer is not None
        mlp, at = self.run.frozen.layers[node.layer].mlp, node.position
        assert mlp is not None
        assert self.linear is not None
        if node.layer not in held.get("mlp", ()):
            return values[Site("mlp_out", node.layer)][0, at].to(mlp.out)
        linear, g = self.linear[node.layer], self.run.lens.backend.geometry
        stream = values[Site("resid_pre", node.layer)][0, at].to(mlp.out)
        if not g.parallel:
            stream = stream + values[Site("attn_out", node.layer)][0, at].to(mlp.out)
        read = mlp.norm.apply(stream, mlp.scale[at])
        out = ((read @ linear.W_in) * linear.ratio[at]) @ linear.W_out
        if mlp.post_norm is None or mlp.post_scale is None:
            return out
        return mlp.post_norm.linear(out, mlp.post_scale[at])


def _directions(run: Run, graph: nx.DiGraph[Any]) -> dict[Node, Tensor]:
    """The gradient of the graph's targets at every node that passes on what it reads."""
    known = graph.graph
    targets = [_as_target(Node.parse(name)) for name in known["targets"]]
    att = run.attribute(
        targets,
        weights=known.get("target_weights"),
        mlp=known.get("mlp", "terminal"),
        heads=known.get("heads", "terminal"),
        expand=known.get("expand", "writers"),
        residual=known.get("residual", "terminal"),
        node_budget=known.get("node_budget"),
    )
    flow = att.flow
    if flow.passing is None or flow.directions is None:
        return {}
    return {
        att.writers.node(int(row)): torch.from_numpy(direction)
        for row, direction in zip(flow.passing, flow.directions, strict=True)
    }


def _as_target(node: Node) -> Feature | Logit | LogitDiff | HeadScore:
    if node.kind in FEATURE_KINDS:
        assert node.layer is not None
        assert node.feature is not None
        return Feature(node.layer, node.feature, node.position, node.kind)
    if node.kind == "score":
        assert node.layer is not None
        assert node.head is not None
        assert node.key is not None
        side: Any = node.label or "both"
        return HeadScore(node.layer, node.head, node.position, node.key, side)
    if node.kind == "direction":
        raise InputError(f"{node} cannot be measured: the graph does not hold its vector")
    first, *second = unquote(node.label or "")
    return LogitDiff(first, second[0], node.position) if second else Logit(first, node.position)


def _swap(
    rows: Mapping[Node, int],
    sources: Sequence[str],
    pairs: Sequence[tuple[str, str]],
    seed: int,
) -> list[tuple[str, str]]:
    """The edges with each source exchanged for a random one of its kind and layer that is no source
    of the graph and not after the target; edges without such a one are left out."""
    rng = np.random.default_rng(seed)
    known = {Node.parse(name) for name in sources}
    others: dict[tuple[str, int | None], list[Node]] = defaultdict(list)
    for node in rows:
        if node not in known:
            others[node.kind, node.layer].append(node)
    found: dict[tuple[str, str], None] = {}
    for source, target in pairs:
        one, last = Node.parse(source), Node.parse(target)
        if last.kind in (*PASSING_KINDS, "mlp_sae"):
            continue  # what passes on is a vector, whose direction only the graph has
        candidates = [
            node
            for node in others[one.kind, one.layer]
            if node.position in _positions_read(last) and (str(node), target) not in found
        ]
        if candidates:
            found[str(candidates[rng.integers(len(candidates))]), target] = None
    return list(found)


def _positions_read(node: Node) -> Collection[int]:
    """A reader of the stream sees its own position only; attention all before it too."""
    if node.kind == "attn":
        return range(node.position + 1)
    if node.kind == "score":
        sides = {"query": node.position, "key": node.key}
        return [at for side, at in sides.items() if at is not None and node.label in (side, None)]
    return (node.position,)


def _weights(run: Run, pairs: Sequence[tuple[str, str]], graph: nx.DiGraph[Any]) -> list[float]:
    """The edges between given pairs, zero where there is none."""
    targets = [_as_target(Node.parse(target)) for _, target in pairs]
    expand = graph.graph.get("expand", "writers")
    attribution = run.attribute(list(dict.fromkeys(targets)), expand=expand, node_budget=0)
    frame = attribution.edges
    wanted = {source for source, _ in pairs}
    frame = frame[frame["source"].isin(wanted)]
    columns = (frame["source"], frame["target"], frame["weight"].tolist())
    weights = {(str(s), str(t)): w for s, t, w in zip(*columns, strict=True)}
    return [weights.get(pair, 0.0) for pair in pairs]


def _agreement(
    pairs: Sequence[tuple[str, str]],
    weights: Sequence[float],
    measured: Sequence[float],
    size: Mapping[str, float],
) -> Agreement:
    return Agreement(
        pd.DataFrame(
            {
                "source": source,
                "target": target,
                "kind": Node.parse(source).kind,
                "predicted": -weight,
                "measured": effect,
                "error": abs(effect + weight) / size[target],
            }
            for (source, target), weight, effect in zip(pairs, weights, measured, strict=True)
        )
    )


def _records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows as JSON holds them; NaN is None."""
    return frame.astype(object).where(frame.notna(), None).to_dict("records")
