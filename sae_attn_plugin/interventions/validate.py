"""Is a graph true? Every edge predicted by it, against the same removal measured on the model."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, cast

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm

from sae_attn_plugin.backends.protocol import Site
from sae_attn_plugin.errors import InputError
from sae_attn_plugin.interventions.apply import FREEZABLE, InterventionResult, intervene, read_by
from sae_attn_plugin.interventions.edits import AddToStream
from sae_attn_plugin.nodes import (
    FEATURE_KINDS,
    PASSING_KINDS,
    Feature,
    FeatureKind,
    Logit,
    LogitDiff,
    Node,
    unquote,
)

if TYPE_CHECKING:
    import networkx as nx
    from matplotlib.figure import Figure

    from sae_attn_plugin.lens import FeatureLens, Run

_SiteName = Literal["embed", "attn_out", "mlp_out"]
_SITES: dict[str, _SiteName] = {
    "embed": "embed",
    "pos": "embed",
    "attn": "attn_out",
    "attn_err": "attn_out",
    "attn_bias": "attn_out",
    "head": "attn_out",
    "mlp": "mlp_out",
    **dict.fromkeys(("tc", "tc_skip", "tc_err", "tc_bias"), "mlp_out"),
    **dict.fromkeys(("mlp_sae", "mlp_sae_err", "mlp_sae_bias"), "mlp_out"),
}


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

    def by_kind(self) -> pd.DataFrame:
        """The same figures for each kind of source."""
        parts = {str(kind): Agreement(part) for kind, part in self.table.groupby("kind")}
        return pd.DataFrame(
            {
                kind: {
                    "edges": len(part.table),
                    "max_error": part.max_error,
                    "r2": part.r2,
                    "rank_correlation": part.rank_correlation,
                    "sign_agreement": part.sign_agreement,
                }
                for kind, part in parts.items()
            }
        ).T

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
    """

    frozen: Agreement
    free: Agreement

    def __repr__(self) -> str:
        return f"frozen: {self.frozen}\nfree:   {self.free}"

    def plot(self) -> Figure:
        """Predicted against measured effects of every edge, frozen and free, by kind of source."""
        from sae_attn_plugin.plots import scatter

        panels = []
        for name, part in (("all else held", self.frozen), ("everything live", self.free)):
            frame = part.table
            predicted, measured = frame["predicted"].to_numpy(), frame["measured"].to_numpy()
            title = f"{name}: R² {part.r2:.4f}, max error {part.max_error:.1e}"
            panels.append((title, predicted, measured, frame["kind"].tolist()))
        return scatter(panels, x="predicted by the edge", y="measured on the model")

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
    graph: nx.DiGraph,
    lens: FeatureLens,
    *,
    max_sources: int | None = None,
    progress: bool | None = None,
) -> Validation:
    """Remove each source of a graph's edges on the model and compare with what its edges predict.

    Args:
        graph: from :meth:`Run.graph` or :meth:`Attribution.to_networkx` of this model and SAEs.
        lens: the model and SAEs the graph was made with.
        max_sources: only the sources with the largest influence; None: all. Each costs two forward
            passes.
        progress: show a bar; None: on a terminal.

    Raises:
        InputError: a graph of another model, or of a kind of node that cannot be removed.
    """
    if "token_ids" not in graph.graph or not graph.graph.get("targets"):
        raise InputError(
            "the graph does not say which prompt it is of; expected one of this package"
        )
    run = lens.run([graph.graph["token_ids"]])
    rows = run.writers.rows()
    edges = _edges(graph)
    sources = list(dict.fromkeys(source for source, _ in edges))
    if max_sources is not None:
        if max_sources < 1:
            raise InputError(f"validate(max_sources={max_sources}): expected at least 1")
        influence = {name: graph.nodes[name].get("influence", 0.0) for name in sources}
        sources = sorted(sources, key=lambda name: -influence[name])[:max_sources]
    measure = _Measure(run, graph)
    measured: dict[str, dict[tuple[str, str], float]] = {"frozen": {}, "free": {}}
    disable = None if progress is None else not progress
    for name in tqdm(sources, desc="validating", unit="source", disable=disable, leave=False):
        node = Node.parse(name)
        if node not in rows:
            raise InputError(
                f"{name} writes nothing on this prompt with this model and these SAEs; the graph "
                "was made with others"
            )
        vector = run.writers.full(np.array([rows[node]]))[0]
        edit = AddToStream(-vector, node.position, _SITES[node.kind], node.layer or 0)
        targets = [target for source, target in edges if source == name]
        for label, freeze in (("frozen", FREEZABLE), ("free", ())):
            result = intervene(lens, run, [edit], freeze, reads=measure.reads)
            for target in targets:
                measured[label][name, target] = measure(result, Node.parse(target))
    return Validation(*(_agreement(edges, measured[label]) for label in ("frozen", "free")))


def _edges(graph: nx.DiGraph) -> dict[tuple[str, str], float]:
    """Weight by ``(source, target)``, with the heads of a ``MultiDiGraph`` summed."""
    edges: dict[tuple[str, str], float] = defaultdict(float)
    for source, target, weight in graph.edges(data="weight"):
        edges[source, target] += weight
    if not edges:
        raise InputError("the graph has no edges to validate")
    return dict(edges)


class _Measure:
    """What an intervention does to a node.

    A feature or a logit is measured as it is. A node that passes on what it reads is a vector: it
    is measured along the direction that the graph's own edges are about, which is found by
    attributing the graph's targets again. What the MLP makes of its input is measured from the
    model's live residual stream, with its activation ratios held where MLPs are.
    """

    def __init__(self, run: Run, graph: nx.DiGraph) -> None:
        self.run = run
        targets = {Node.parse(target) for _, target in graph.edges()}
        kinds = {node.kind for node in targets}
        self.reads = {
            Site(name, node.layer)
            for node in targets
            if node.layer is not None and node.kind in ("head", "mlp", "mlp_sae")
            for name in (("z",) if node.kind == "head" else ("resid_pre", "attn_out", "mlp_out"))
        }
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
        return float(result.effect(_as_target(node)))

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


def _directions(run: Run, graph: nx.DiGraph) -> dict[Node, Tensor]:
    """The gradient of the graph's targets at every node that passes on what it reads."""
    known = graph.graph
    targets = [_as_target(Node.parse(name)) for name in known["targets"]]
    att = run.attribute(
        targets,
        weights=known.get("target_weights"),
        mlp=known.get("mlp", "terminal"),
        heads=known.get("heads", "terminal"),
        node_budget=known.get("node_budget"),
    )
    flow = att.flow
    if flow.passing is None or flow.directions is None:
        return {}
    return {
        att.writers.node(int(row)): torch.from_numpy(direction)
        for row, direction in zip(flow.passing, flow.directions, strict=True)
    }


def _as_target(node: Node) -> Feature | Logit | LogitDiff:
    if node.kind in FEATURE_KINDS:
        assert node.layer is not None
        assert node.feature is not None
        return Feature(node.layer, node.feature, node.position, cast(FeatureKind, node.kind))
    if node.kind == "score":
        raise InputError(f"{node} cannot be measured: interventions do not read attention scores")
    if node.kind == "direction":
        raise InputError(f"{node} cannot be measured: the graph does not hold its vector")
    first, *second = unquote(node.label or "")
    return LogitDiff(first, second[0], node.position) if second else Logit(first, node.position)


def _agreement(
    edges: dict[tuple[str, str], float], measured: dict[tuple[str, str], float]
) -> Agreement:
    size: dict[str, float] = defaultdict(float)
    for (_, target), weight in edges.items():
        size[target] += abs(weight)
    return Agreement(
        pd.DataFrame(
            {
                "source": source,
                "target": target,
                "kind": Node.parse(source).kind,
                "predicted": -edges[source, target],
                "measured": effect,
                "error": abs(effect + edges[source, target]) / size[target],
            }
            for (source, target), effect in measured.items()
        )
    )
