"""Is a circuit enough? Keep only it, or all but it, and measure a task."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import networkx as nx
import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm

from sae_attn_plugin.backends.protocol import Norm, Site
from sae_attn_plugin.errors import InputError
from sae_attn_plugin.graphs.aligned import OTHER, AlignedAttribution
from sae_attn_plugin.interventions import steps
from sae_attn_plugin.interventions.datasets import batches
from sae_attn_plugin.interventions.reading import what_it_reads
from sae_attn_plugin.nodes import Node
from sae_attn_plugin.statistics import Interval, bootstrap

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from sae_attn_plugin.dictionaries import Dictionary
    from sae_attn_plugin.lens import Dataset, FeatureLens, Run

SHARES = (0.0, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)

Place = tuple[str, int]  # kind of dictionary and layer
Where = int | str | None  # a position, a role, everywhere
Component = tuple[str, int, int | None, Where]  # kind, layer, feature


@dataclass(frozen=True, eq=False)
class Faithfulness:
    """What a circuit does by itself on a task; see :func:`faithfulness`.

    Attributes:
        model, empty: mean metric of the whole model, and with nothing of the ablated kinds kept.
        circuit, complement: mean metric with only the circuit kept, and with all but it.
        faithful: ``(circuit - empty) / (model - empty)`` with its interval over prompts.
        complement_faithful: the same of the complement: what the model does without the circuit.
        curve: ``share, nodes, metric, faithfulness, low, high`` for ever larger parts.
        cpr, cmd: areas under the curve, and between it and 1.
        minimality: ``node, metric, drop``: the circuit without that node; ``drop`` is what is lost
            of the faithfulness. The largest first.
        nodes: the circuit's components, the most influential first: ``attn:1:105`` everywhere,
            ``attn:1:105@14`` at a position, ``attn:1:105@END`` at a role.
        about: how it was measured.
    """

    model: float
    empty: float
    circuit: float
    complement: float
    faithful: Interval
    complement_faithful: Interval
    curve: pd.DataFrame
    cpr: float
    cmd: float
    minimality: pd.DataFrame
    nodes: tuple[str, ...]
    about: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def __repr__(self) -> str:
        return (
            f"circuit of {len(self.nodes)} nodes: faithfulness {self.faithful}, complement "
            f"{self.complement_faithful}, CPR {self.cpr:.3f}, CMD {self.cmd:.3f} (metric: model "
            f"{self.model:.3f}, nothing kept {self.empty:.3f})"
        )

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON can hold it; NaN is None."""

        def plain(value: Any) -> Any:
            if isinstance(value, Interval):
                return {key: plain(x) for key, x in vars(value).items()}
            if isinstance(value, pd.DataFrame):
                return value.astype(object).where(value.notna(), None).to_dict("records")
            if isinstance(value, float):
                return value if math.isfinite(value) else None
            return dict(value) if isinstance(value, Mapping) else value

        return {
            key: list(value) if isinstance(value, tuple) else plain(value)
            for key, value in vars(self).items()
        }

    def save(self, path: str | Path) -> Path:
        """Write the report: ``.json``, or the curve as ``.png``, ``.svg`` or ``.pdf``.

        Raises:
            InputError: another ending. FileError: a place that cannot be written.
        """
        from sae_attn_plugin.interventions.pictures import save

        return save(self, path)

    def plot(self) -> Figure:
        """Faithfulness of ever larger parts of the circuit, with its interval."""
        from sae_attn_plugin.interventions.pictures import curve

        return curve(self)


def faithfulness(
    graph: nx.DiGraph[Any] | AlignedAttribution,
    lens: FeatureLens,
    data: Dataset,
    *,
    ablate: Literal["mean", "resample", "zero"] = "mean",
    reference: Dataset | None = None,
    kinds: Sequence[str] | None = None,
    errors: bool = True,
    positions: Literal["all", "same"] | Mapping[int, str] = "all",
    max_nodes: int | None = None,
    shares: Sequence[float] = SHARES,
    minimality: int | None = 20,
    batch_size: int | None = None,
    progress: bool | None = None,
) -> Faithfulness:
    """Keep only a circuit's features, ablate all others, and measure a task.

    With ``m(K)`` the mean metric of the data set when only the components ``K`` keep their live
    value, the faithfulness of ``K`` is ``(m(K) - m(nothing)) / (m(model) - m(nothing))``. Along the
    components ordered by influence, ``K`` grows from nothing to the circuit; with x the share of it
    that is kept, on [0, 1], ``CPR`` is the integral of the faithfulness over x and ``CMD`` that of
    ``|1 - faithfulness|``, by trapezoids between the shares measured (Mueller et al. 2025, MIB,
    arXiv:2504.13151, where x is the share of all edges of the model; here it is that of the
    circuit's own nodes). High CPR and low CMD are good. The complement keeps all but the circuit,
    and a node's minimality is what the circuit loses without it (Wang et al. 2022,
    arXiv:2211.00593, sections 4.1 and 4.2, with the empty set as K).

    Components are features of the SAEs and transcoders on attention and MLPs and, with ``errors``,
    what these do not reconstruct. Embeddings, biases, skip connections, and attention and MLPs
    without a dictionary stay live throughout, so that ``m(nothing)`` is what they do without
    features. SAEs on the residual stream split it and write nothing, so their features are none.

    Args:
        graph: of this model and SAEs, or the attributions of many prompts
            (:meth:`FeatureLens.attribute_many`); its nodes of these kinds are the circuit.
        data: ``IOIDataset`` or ``InductionDataset``, whose metric is measured.
        ablate: what an ablated component has: its mean over all prompts and positions of
            ``reference``, its value in the paired prompt of ``reference`` at the same position
            (prompts of equal length), or zero. Features that are silent on a prompt are ablated
            too: a mean puts them at their mean.
        reference: None: ``data.abc()`` of IOI prompts, else ``data`` itself.
        kinds: of components, among ``"attn"``, ``"tc"`` and ``"mlp_sae"``; dictionaries of others
            stay out of the way. None: all that the lens has.
        errors: whether the errors are components; if not they stay live.
        positions: where a component of the circuit is kept: ``"all"`` positions, the ``"same"``
            position as in the graph (prompts of the graph's length), or at roles, by position of
            the graph: ``{10: "S2", 14: "END"}``; then nodes elsewhere are not kept. Of many
            prompts, ``"same"`` is the same role, and nodes without a role are not kept.
        max_nodes: the circuit is only the most influential components, so many.
        shares: of the circuit, for the curve.
        minimality: of how many components, the most influential first; None: of all.

    Raises:
        InputError: a graph without such nodes, data that does not fit, or a model whose metric
            does not change when everything is ablated.
    """
    if ablate not in ("mean", "resample", "zero"):
        raise InputError(f"ablate must be 'mean', 'resample' or 'zero', got {ablate!r}")
    if positions not in ("all", "same") and not isinstance(positions, Mapping):
        raise InputError(f"positions={positions!r}: expected 'all', 'same', or roles by position")
    if max_nodes is not None and max_nodes < 1:
        raise InputError(f"max_nodes={max_nodes}: expected at least 1")
    if not all(0 <= share <= 1 for share in shares):
        raise InputError(f"shares must lie in [0, 1], got {list(shares)}")
    dictionaries = {
        (dictionary.kind, layer): dictionary
        for found in (lens.dictionaries, lens.transcoders)
        for layer, dictionary in found.items()
    }
    known = list(dict.fromkeys(kind for kind, _ in dictionaries))
    if kinds is not None:
        kinds = [kinds] if isinstance(kinds, str) else list(kinds)
        if not kinds or not set(kinds) <= set(known):
            raise InputError(f"kinds={kinds}: expected some of {', '.join(known)}, as the lens has")
        dictionaries = {place: d for place, d in dictionaries.items() if place[0] in kinds}
    if reference is None:
        reference = data.abc() if hasattr(data, "abc") else data  # type: ignore[union-attr]
    circuit = _components(_nodes(graph, positions), dictionaries, errors)[:max_nodes]
    job = _Job(lens, data, reference, dictionaries, ablate, errors, batch_size)
    chosen = circuit if minimality is None else circuit[:minimality]
    counts = sorted({math.ceil(share * len(circuit) - 1e-9) for share in shares})
    sets: dict[Any, tuple[frozenset[Component], bool]] = {
        ("curve", count): (frozenset(circuit[:count]), False)
        for count in {0, *counts, len(circuit)}
    }
    sets["complement"] = frozenset(circuit), True
    sets |= {("without", one): (frozenset(circuit) - {one}, False) for one in chosen}
    clean, found = job.run(sets, progress)
    empty, whole = found["curve", 0], found["curve", len(circuit)]
    if abs(float(np.mean(clean) - np.mean(empty))) < 1e-9:
        raise InputError(
            "the metric is the same with everything ablated as without, so no faithfulness is "
            "defined; is this the task of the graph?"
        )

    def faithful(values: np.ndarray) -> Interval:
        return bootstrap(np.stack([values, clean, empty], 1), _fraction)

    rows = []
    for count in counts:
        one = faithful(found["curve", count])
        share, metric = count / len(circuit), float(found["curve", count].mean())
        rows.append((share, count, metric, one.value, one.low, one.high))
    columns = ["share", "nodes", "metric", "faithfulness", "low", "high"]
    curve = pd.DataFrame(rows, columns=pd.Index(columns))
    x, y = curve["share"].to_numpy(), curve["faithfulness"].to_numpy()
    full = faithful(whole)
    drops = [(_name(one), float(found["without", one].mean())) for one in chosen]
    minimal = pd.DataFrame(drops, columns=pd.Index(["node", "metric"]))
    span = float(clean.mean() - empty.mean())
    minimal["drop"] = (float(whole.mean()) - minimal["metric"]) / span
    order = minimal["drop"].abs().to_numpy().argsort(kind="stable")[::-1]
    return Faithfulness(
        model=float(clean.mean()),
        empty=float(empty.mean()),
        circuit=float(whole.mean()),
        complement=float(found["complement"].mean()),
        faithful=full,
        complement_faithful=faithful(found["complement"]),
        curve=curve,
        cpr=float(np.trapezoid(y, x)),
        cmd=float(np.trapezoid(np.abs(1 - y), x)),
        minimality=minimal.iloc[order].reset_index(drop=True),
        nodes=tuple(map(_name, circuit)),
        about={
            "prompts": len(data),
            "ablate": ablate,
            "kinds": list(dict.fromkeys(kind for kind, _ in dictionaries)),
            "errors": errors,
            "positions": positions if isinstance(positions, str) else {**positions},
            "model": lens.backend.geometry.model_name,
        },
    )


def _fraction(means: np.ndarray) -> np.ndarray:
    return (means[..., 0] - means[..., 2]) / (means[..., 1] - means[..., 2])


def _nodes(
    graph: nx.DiGraph[Any] | AlignedAttribution, positions: Any
) -> Iterator[tuple[str, int | None, int | None, Where, float]]:
    """``kind, layer, feature, where, influence`` of every node."""
    if isinstance(graph, AlignedAttribution):
        if isinstance(positions, Mapping):
            raise InputError(
                "attributions of many prompts have roles already: give positions='same' or 'all'"
            )
        columns = [graph.nodes[name] for name in ("kind", "layer", "feature", "role", "influence")]
        for kind, layer, feature, role, influence in zip(*columns, strict=True):
            if positions == "all" or role != OTHER:
                number = None if pd.isna(feature) else int(feature)
                # one position can have several roles, here joined: one of them finds it
                at = None if positions == "all" else str(role).partition("=")[0]
                yield kind, None if pd.isna(layer) else int(layer), number, at, float(influence)
        return
    for name, data in graph.nodes(data=True):
        node, at = Node.parse(name), None
        if isinstance(positions, Mapping):
            if node.position not in positions:
                continue
            at = positions[node.position]
        elif positions == "same":
            at = node.position
        yield node.kind, node.layer, node.feature, at, data.get("influence") or 0.0


def _components(
    nodes: Iterable[tuple[str, int | None, int | None, Where, float]],
    dictionaries: Mapping[Place, Dictionary],
    errors: bool,
) -> list[Component]:
    """The circuit's components, the most influential first; the influence of one that stands for
    several nodes is the sum of theirs."""
    influence: dict[Component, float] = defaultdict(float)
    for kind, layer, feature, at, strength in nodes:
        of = kind.removesuffix("_err")
        if layer is None or (of, layer) not in dictionaries or (of != kind and not errors):
            continue
        influence[kind, layer, feature, at] += strength
    if not influence:
        raise InputError(
            f"the graph has no features of {_places(dictionaries)} (at these positions), so there "
            "is no circuit"
        )
    return sorted(influence, key=lambda one: -influence[one])


def _places(dictionaries: Iterable[Place]) -> str:
    """In words."""
    names = {"attn": "attention SAEs", "tc": "transcoders", "mlp_sae": "SAEs on MLPs"}
    return ", ".join(dict.fromkeys(names[kind] for kind, _ in dictionaries)) or "any dictionary"


def _name(component: Component) -> str:
    kind, layer, feature, position = component
    name = f"{kind}:{layer}" if feature is None else f"{kind}:{layer}:{feature}"
    return name if position is None else f"{name}@{position}"


def dense(dictionary: Dictionary, read: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Activations ``[prompt, position, d_sae]``, output scales ``[prompt, position]`` and errors
    ``[prompt, position, ...]``.

    Args:
        read: ``[prompt, position, ...]``, what the dictionary reads; value: what it reconstructs.
    """
    inputs, wanted = read.flatten(0, 1), value.flatten(0, 1)
    encoded, skip = dictionary.encode(inputs), dictionary.skip(inputs)
    acts = value.new_zeros(len(wanted), dictionary.d_sae)
    acts[encoded.position, encoded.feature] = encoded.activation
    known = dictionary.decode(encoded)
    error = wanted - (known if skip is None else known + skip)
    scale = dictionary.output_scale(encoded.scale)[:, 0]
    acts, scale, error = (x.unflatten(0, value.shape[:2]) for x in (acts, scale, error))
    return acts, scale, error


def _work(z: Tensor) -> Tensor:
    return z.to(torch.promote_types(z.dtype, torch.float32))


@dataclass
class _Job:
    """Measures a data set with sets of components kept."""

    lens: FeatureLens
    data: Dataset
    reference: Dataset
    dictionaries: Mapping[Place, Dictionary]
    ablate: str
    errors: bool
    batch_size: int | None

    def run(
        self, sets: Mapping[Any, tuple[frozenset[Component], bool]], progress: bool | None
    ) -> tuple[np.ndarray, dict[Any, np.ndarray]]:
        """The clean metric, and that of each set; a set is kept, or all but it (True)."""
        n, lens = len(self.data), self.lens
        if self.ablate == "resample" and len(self.reference) != n:
            raise InputError(
                f"ablate='resample' pairs prompts: {n} here, {len(self.reference)} in the reference"
            )
        means = self._means() if self.ablate == "mean" else None
        clean = np.full(n, np.nan)
        found = {name: clean.copy() for name in sets}
        disable = None if progress is None else not progress
        with tqdm(total=n * len(sets), desc="ablating", disable=disable, leave=False) as bar:
            for members in batches(lens, self.data, batch_size=self.batch_size):
                run = lens.run_rows(self.data, members)
                clean[members] = run.roles.score(run.logits).double().numpy(force=True)
                other = self._other(members, run) if means is None else means
                for name, (components, but) in sets.items():
                    edits = dict(self._edits(run, components, but, other))
                    logits = lens.backend.forward(run.tokens, edits)[Site("logits")]
                    found[name][members] = run.roles.score(logits).double().numpy(force=True)
                    bar.update(len(members))
        kept = ~np.isnan(clean)  # rows of repeats without any repeat have no metric
        return clean[kept], {name: values[kept] for name, values in found.items()}

    def _dense(self, place: Place, run: Run) -> tuple[Tensor, Tensor]:
        """Clean activations and errors of a dictionary."""
        dictionary, values = self.dictionaries[place], run.capture.values
        read = _work(what_it_reads(self.lens, dictionary, values))
        value = read
        if dictionary.kind == "tc":
            value = _work(values[Site(dictionary.writes, place[1])]).to(read)
        acts, _, error = dense(dictionary, read, value)
        return acts, error

    def _means(self) -> dict[Place, tuple[Tensor, Tensor]]:
        """Mean activations ``[d_sae]`` and mean error of each dictionary over the reference."""
        sums: dict[Place, list[Tensor]] = {}
        count = 0
        for members in batches(self.lens, self.reference, batch_size=self.batch_size):
            run = self.lens.run_rows(self.reference, members)
            count += run.tokens.numel()
            for place in self.dictionaries:
                found = [part.double().sum((0, 1)) for part in self._dense(place, run)]
                before = sums.get(place, [torch.zeros_like(part) for part in found])
                sums[place] = [a + b for a, b in zip(before, found, strict=True)]
        return {place: (acts / count, error / count) for place, (acts, error) in sums.items()}

    def _other(self, members: Sequence[int], run: Run) -> dict[Place, tuple[Tensor, Tensor]]:
        """Activations and errors that ablated components have."""
        if self.ablate == "zero":
            return {
                place: (torch.zeros(d.d_sae), torch.zeros(()))
                for place, d in self.dictionaries.items()
            }
        paired = self.lens.run_rows(self.reference, members)
        if len(set(paired.lengths)) > 1 or paired.tokens.shape != run.tokens.shape:
            raise InputError(
                "ablate='resample' takes what stands at the same position, so paired prompts "
                "need equal lengths; use ablate='mean'"
            )
        return {place: self._dense(place, paired) for place in self.dictionaries}

    def _edits(
        self,
        run: Run,
        components: Iterable[Component],
        but: bool,
        other: Mapping[Place, tuple[Tensor, Tensor]],
    ) -> Iterator[tuple[Site, Any]]:
        of_place: dict[Place, list[Component]] = defaultdict(list)
        for one in components:
            of_place[one[0].removesuffix("_err"), one[1]].append(one)
        shape, seen = run.tokens.shape, dict[Any, Tensor]()
        made: dict[Site, list[Any]] = defaultdict(list)
        watched: set[tuple[str, int]] = set()
        dtype = torch.promote_types(self.lens.backend.geometry.dtype, torch.float32)
        for place, dictionary in self.dictionaries.items():
            keep = torch.zeros(*shape, dictionary.d_sae, dtype=torch.bool)
            keep_error = torch.zeros(shape, dtype=torch.bool)
            for kind, _, feature, position in of_place[place]:
                where = self._where(run, position)
                if kind.endswith("_err"):
                    keep_error[where] = True
                else:
                    assert feature is not None
                    keep[..., feature][where] = True
            if but:
                keep, keep_error = ~keep, ~keep_error
            keep_error |= not self.errors
            read = None
            if dictionary.kind == "tc":
                sites = self._stream(place[1])
                watched.update(sites)
                norm = self.lens.backend.layer_weights(place[1]).mlp_norm or Norm("none")
                live = steps.stream(seen, sites)
                read = steps.mlp_reader(live, dictionary.reads, norm, None, dtype)
            step = keep_only(dictionary, keep, keep_error, *other[place], dtype, read)
            made[Site(dictionary.writes, place[1])].append(step)
        for name, layer in watched:  # after the edits of what is watched
            made[Site(name, layer)].append(steps.see(seen, (name, layer)))
        for site, found in made.items():
            yield site, steps.chain(found)

    def _stream(self, layer: int) -> list[tuple[str, int]]:
        """Sites whose sum an MLP reads, before its norm."""
        names = ["resid_pre"] if self.lens.backend.geometry.parallel else ["resid_pre", "attn_out"]
        return [(name, layer) for name in names]

    def _where(self, run: Run, position: Where) -> Any:
        """An index of ``[prompt, position]``."""
        if position is None:
            return slice(None), slice(None)
        if isinstance(position, str):
            return torch.arange(len(run)), torch.tensor(run.roles.find(position))
        if position >= run.tokens.shape[1]:
            raise InputError(
                f"positions='same': a node stands at position {position}, but a prompt has "
                f"{run.tokens.shape[1]} tokens; give roles, or positions='all'"
            )
        return slice(None), position


def keep_only(
    dictionary: Any,
    keep: Tensor,
    keep_error: Tensor,
    activation: Tensor,
    error: Tensor,
    dtype: torch.dtype,
    read: Any = None,
) -> Any:
    """What a dictionary writes, with the features and errors that are not kept exchanged.

    Args:
        keep: ``[prompt, position, d_sae]``; keep_error: ``[prompt, position]``.
        activation, error: what the others have, per prompt and position or one for all.
        read: gives what a transcoder reads; an SAE reads what it writes.
    """

    def step(value):  # pyright: ignore[reportMissingParameterType] - it may travel as text
        work = value.to(dtype)
        x = work if read is None else read().to(work)
        live, scale, was = dense(dictionary, x, work)
        change = torch.where(keep.to(value.device), 0, activation.to(live) - live)
        change = change * scale[..., None]
        rows = dictionary.decoder(torch.arange(dictionary.d_sae, device=value.device), dtype)
        moved = (change @ rows.flatten(1)).unflatten(-1, rows.shape[1:])
        gone = ~keep_error.to(value.device)
        gone = gone.reshape(*gone.shape, *[1] * (work.ndim - 2))
        moved = moved + torch.where(gone, error.to(was) - was, 0)
        return (work + moved).to(value.dtype)

    return step


__all__ = ["SHARES", "Faithfulness", "faithfulness"]
