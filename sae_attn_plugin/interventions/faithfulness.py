"""Is a circuit enough? Keep only it, or all but it, and measure a task."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm

from sae_attn_plugin.backends.protocol import Site
from sae_attn_plugin.errors import InputError, UnsupportedError
from sae_attn_plugin.interventions.datasets import batches
from sae_attn_plugin.nodes import Node
from sae_attn_plugin.statistics import Interval, bootstrap

if TYPE_CHECKING:
    import networkx as nx
    from matplotlib.figure import Figure

    from sae_attn_plugin.dictionaries import Dictionary
    from sae_attn_plugin.lens import Dataset, FeatureLens, Run

SHARES = (0.0, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
_KINDS = ("attn", "attn_err")

Component = tuple[str, int, int | None, int | None]  # kind, layer, feature, position


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
        nodes: the circuit's components, the most influential first.
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
    graph: nx.DiGraph[Any],
    lens: FeatureLens,
    data: Dataset,
    *,
    ablate: Literal["mean", "resample", "zero"] = "mean",
    reference: Dataset | None = None,
    errors: bool = True,
    positions: Literal["all", "same"] | Mapping[int, str] = "all",
    shares: Sequence[float] = SHARES,
    minimality: int | None = 20,
    batch_size: int | None = None,
    progress: bool | None = None,
) -> Faithfulness:
    """Keep only a circuit's attention features, ablate all others, and measure a task.

    With ``m(K)`` the mean metric of the data set when only the components ``K`` keep their live
    value, the faithfulness of ``K`` is ``(m(K) - m(nothing)) / (m(model) - m(nothing))``. Along the
    components ordered by influence, ``K`` grows from nothing to the circuit; with x the share of it
    that is kept, on [0, 1], ``CPR`` is the integral of the faithfulness over x and ``CMD`` that of
    ``|1 - faithfulness|``, by trapezoids between the shares measured (Mueller et al. 2025, MIB,
    arXiv:2504.13151, where x is the share of all edges of the model; here it is that of the
    circuit's own nodes). High CPR and low CMD are good. The complement keeps all but the circuit,
    and a node's minimality is what the circuit loses without it (Wang et al. 2022,
    arXiv:2211.00593, sections 4.1 and 4.2, with the empty set as K).

    Components are features of the attention SAEs and, with ``errors``, what these do not
    reconstruct. Embeddings, biases, MLPs, and attention layers without an SAE stay live throughout,
    so that ``m(nothing)`` is what they do without attention features.

    Args:
        graph: of this model and SAEs; its ``attn`` and ``attn_err`` nodes are the circuit.
        data: ``IOIDataset`` or ``InductionDataset``, whose metric is measured.
        ablate: what an ablated component has: its mean over all prompts and positions of
            ``reference``, its value in the paired prompt of ``reference`` at the same position
            (prompts of equal length), or zero. Features that are silent on a prompt are ablated
            too: a mean puts them at their mean.
        reference: None: ``data.abc()`` of IOI prompts, else ``data`` itself.
        errors: whether the errors are components; if not they stay live.
        positions: where a component of the circuit is kept: ``"all"`` positions, the ``"same"``
            position as in the graph (prompts of the graph's length), or at roles, by position of
            the graph: ``{10: "S2", 14: "END"}``; then nodes elsewhere are not kept.
        shares: of the circuit, for the curve.
        minimality: of how many components, the most influential first; None: of all.

    Raises:
        InputError: a graph without such nodes, data that does not fit, or a model whose metric
            does not change when everything is ablated.
    """
    if ablate not in ("mean", "resample", "zero"):
        raise InputError(f"ablate must be 'mean', 'resample' or 'zero', got {ablate!r}")
    if not all(0 <= share <= 1 for share in shares):
        raise InputError(f"shares must lie in [0, 1], got {list(shares)}")
    for layer, dictionary in lens.dictionaries.items():
        if dictionary.writes != "z":
            raise UnsupportedError(
                f"faithfulness needs SAEs on hook_z; that of layer {layer} is on {dictionary.reads}"
            )
    if reference is None:
        reference = data.abc() if hasattr(data, "abc") else data  # type: ignore[union-attr]
    circuit = _components(graph, errors, positions)
    means = None if ablate != "mean" else _means(lens, reference, batch_size)
    job = _Job(lens, data, reference, ablate, errors, positions, means, batch_size)
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
            "errors": errors,
            "positions": positions if isinstance(positions, str) else {**positions},
            "model": graph.graph.get("model"),
        },
    )


def _fraction(means: np.ndarray) -> np.ndarray:
    return (means[..., 0] - means[..., 2]) / (means[..., 1] - means[..., 2])


def _components(graph: nx.DiGraph[Any], errors: bool, positions: Any) -> list[Component]:
    """The circuit's components, the most influential first; the influence of one that stands for
    several nodes is the sum of theirs."""
    influence: dict[Component, float] = defaultdict(float)
    for name, data in graph.nodes(data=True):
        node = Node.parse(name)
        if node.kind not in (_KINDS if errors else _KINDS[:1]):
            continue
        assert node.layer is not None
        if isinstance(positions, Mapping) and node.position not in positions:
            continue
        at = None if positions == "all" else node.position
        influence[node.kind, node.layer, node.feature, at] += data.get("influence") or 0.0
    if not influence:
        raise InputError(
            "the graph has no attention features (at these positions), so there is no circuit"
        )
    return sorted(influence, key=lambda one: -influence[one])


def _name(component: Component) -> str:
    kind, layer, feature, position = component
    name = f"{kind}:{layer}" if feature is None else f"{kind}:{layer}:{feature}"
    return name if position is None else f"{name}@{position}"


@dataclass(frozen=True)
class _Means:
    """Mean activations ``[d_sae]`` and mean error ``[head, d_head]`` of each layer."""

    activation: dict[int, Tensor]
    error: dict[int, Tensor]


def dense(dictionary: Dictionary, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Activations ``[prompt, position, d_sae]``, output scales ``[prompt, position]`` and errors
    ``[prompt, position, head, d_head]`` of z."""
    acts = z.new_zeros(*z.shape[:2], dictionary.d_sae)
    scale, error = z.new_ones(z.shape[:2]), torch.zeros_like(z)
    for number, prompt in enumerate(z):
        encoded = dictionary.encode(prompt)
        acts[number, encoded.position, encoded.feature] = encoded.activation
        scale[number] = dictionary.output_scale(encoded.scale)[:, 0]
        error[number] = prompt - dictionary.decode(encoded)
    return acts, scale, error


def _means(lens: FeatureLens, reference: Dataset, batch_size: int | None) -> _Means:
    acts: dict[int, Tensor] = {}
    errors: dict[int, Tensor] = {}
    count = 0
    for members in batches(lens, reference, batch_size=batch_size):
        run = lens.run_rows(reference, members)
        count += run.tokens.numel()
        for layer, dictionary in lens.dictionaries.items():
            z = _work(run.capture["z", layer])
            live, _, error = dense(dictionary, z)
            one, other = live.double().sum((0, 1)), error.double().sum((0, 1))
            acts[layer] = acts[layer] + one if layer in acts else one
            errors[layer] = errors[layer] + other if layer in errors else other
    return _Means(
        {layer: total / count for layer, total in acts.items()},
        {layer: total / count for layer, total in errors.items()},
    )


def _work(z: Tensor) -> Tensor:
    return z.to(torch.promote_types(z.dtype, torch.float32))


@dataclass
class _Job:
    """Measures a data set with sets of components kept."""

    lens: FeatureLens
    data: Dataset
    reference: Dataset
    ablate: str
    errors: bool
    positions: Any
    means: _Means | None
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
        clean = np.full(n, np.nan)
        found = {name: clean.copy() for name in sets}
        disable = None if progress is None else not progress
        with tqdm(total=n * len(sets), desc="ablating", disable=disable, leave=False) as bar:
            for members in batches(lens, self.data, batch_size=self.batch_size):
                run = lens.run_rows(self.data, members)
                clean[members] = run.roles.score(run.logits).double().numpy(force=True)
                other = self._other(members, run)
                for name, (components, but) in sets.items():
                    edits = dict(self._edits(run, components, but, other))
                    logits = lens.backend.forward(run.tokens, edits)[Site("logits")]
                    found[name][members] = run.roles.score(logits).double().numpy(force=True)
                    bar.update(len(members))
        kept = ~np.isnan(clean)  # rows of repeats without any repeat have no metric
        return clean[kept], {name: values[kept] for name, values in found.items()}

    def _other(self, members: Sequence[int], run: Run) -> dict[int, tuple[Tensor, Tensor]]:
        """By layer, activations and errors that ablated components have."""
        layers = self.lens.dictionaries.items()
        if self.ablate == "resample":
            paired = self.lens.run_rows(self.reference, members)
            if len(set(paired.lengths)) > 1 or paired.tokens.shape != run.tokens.shape:
                raise InputError(
                    "ablate='resample' takes what stands at the same position, so paired prompts "
                    "need equal lengths; use ablate='mean'"
                )
            return {
                layer: tuple(dense(d, _work(paired.capture["z", layer]))[i] for i in (0, 2))  # type: ignore[misc]
                for layer, d in layers
            }
        if self.means is not None:
            return {n: (self.means.activation[n], self.means.error[n]) for n, _ in layers}
        return {n: (torch.zeros(d.d_sae), torch.zeros(d.shape)) for n, d in layers}

    def _edits(
        self,
        run: Run,
        components: Iterable[Component],
        but: bool,
        other: Mapping[int, tuple[Tensor, Tensor]],
    ) -> Iterator[tuple[Site, Any]]:
        of_layer: dict[int, list[Component]] = defaultdict(list)
        for one in components:
            of_layer[one[1]].append(one)
        shape = run.tokens.shape
        for layer, dictionary in self.lens.dictionaries.items():
            keep = torch.zeros(*shape, dictionary.d_sae, dtype=torch.bool)
            keep_error = torch.zeros(shape, dtype=torch.bool)
            for kind, _, feature, position in of_layer[layer]:
                where = self._where(run, position)
                if kind == "attn_err":
                    keep_error[where] = True
                else:
                    assert feature is not None
                    keep[..., feature][where] = True
            if but:
                keep, keep_error = ~keep, ~keep_error
            keep_error |= not self.errors
            dtype = torch.promote_types(self.lens.backend.geometry.dtype, torch.float32)
            yield (
                Site("z", layer),
                keep_only(dictionary, keep, keep_error, *other[layer], dtype),
            )

    def _where(self, run: Run, position: int | None) -> Any:
        """An index of ``[prompt, position]``."""
        if position is None:
            return slice(None), slice(None)
        if isinstance(self.positions, Mapping):
            at = run.roles.find(self.positions[position])
            return torch.arange(len(run)), torch.tensor(at)
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
) -> Any:
    """z with the features and errors that are not kept exchanged.

    Args:
        keep: ``[prompt, position, d_sae]``; keep_error: ``[prompt, position]``.
        activation, error: what the others have, per prompt and position or one for all.
    """

    def step(z):  # pyright: ignore[reportMissingParameterType] - it may travel as text
        work = z.to(dtype)
        live, scale, was = dense(dictionary, work)
        change = torch.where(keep.to(z.device), 0, activation.to(live) - live)
        change = change * scale[..., None]
        rows = dictionary.decoder(torch.arange(dictionary.d_sae, device=z.device), dtype)
        moved = (change @ rows.flatten(1)).unflatten(-1, dictionary.shape)
        gone = ~keep_error.to(z.device)[..., None, None]
        moved = moved + torch.where(gone, error.to(was) - was, 0)
        return (work + moved).to(z.dtype)

    return step


__all__ = ["SHARES", "Faithfulness", "faithfulness"]
