"""How good attention SAEs are: sparsity, reconstruction, and what splicing them in costs the model.

Data goes by in batches. What stays of a sequence is ten sums, which the bootstrap resamples. The
densities of features are resampled as the data goes by, with Poisson(1) weights for the sequences
(Chamandy et al. 2012), so that memory does not grow with the number of sequences times features.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from sae_attn_plugin.backends.protocol import Backend, Site
from sae_attn_plugin.dictionaries import Dictionary, chosen_layers
from sae_attn_plugin.errors import InputError, UnsupportedError
from sae_attn_plugin.heads import is_folded
from sae_attn_plugin.io import write_json
from sae_attn_plugin.statistics import Interval, bootstrap
from sae_attn_plugin.tokens import check_ids, special_tokens

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from sae_attn_plugin.lens import FeatureLens

__all__ = ["METRICS", "Evaluation", "evaluate"]

METRICS: dict[str, str] = {
    "l0": "mean number of active features",
    "l1": "mean sum of the absolute activations",
    "mse": "mean squared error of z (or of what else the SAE reads), summed over its components",
    "fvu": "fraction of the variance of z unexplained",
    "ce_clean": "cross-entropy of the model as it is, nats per token",
    "ce_spliced": "with the reconstruction in place of z",
    "ce_zero": "with zeros in place of z",
    "ce_mean": "with the mean of z over the data in its place",
    "recovered_zero": "(ce_zero - ce_spliced) / (ce_zero - ce_clean)",
    "recovered_mean": "(ce_mean - ce_spliced) / (ce_mean - ce_clean)",
    "dead": "share of features that fire nowhere in the data",
    "dense": "share of features that fire at more than a tenth of the positions",
}
"""What is measured, and what it means."""

DENSE = 0.1
_SUMS = ("positions", "targets", "l0", "l1", "squared_error", "variance", "clean", "spliced")
_SUMS = (*_SUMS, "zero", "mean")
_EDGES = np.linspace(-6, 0, 25)  # of log10 density, a quarter of a decade each
_DENSITY_RESAMPLES = 200
_AT_ONCE = 2**25  # positions times features decoded together, which gathers decoder rows
# our name -> run_evals' group and name
_SAE_LENS = {
    "l0": ("sparsity", "l0"),
    "l1": ("sparsity", "l1"),
    "mse": ("reconstruction_quality", "mse"),
    "ce_clean": ("model_performance_preservation", "ce_loss_without_sae"),
    "ce_spliced": ("model_performance_preservation", "ce_loss_with_sae"),
    "ce_zero": ("model_performance_preservation", "ce_loss_with_ablation"),
    "recovered_zero": ("model_performance_preservation", "ce_loss_score"),
}

Batches = Callable[[], Iterable[Tensor]]


@dataclass(frozen=True)
class Evaluation:
    """What :func:`evaluate` measured.

    Attributes:
        table: one row per ``(layer, metric)``: ``value``, the interval ``low`` to ``high``, and
            ``sae_lens``, the same figure from sae_lens' ``run_evals`` (NaN where it has none: mean
            ablation, dead and dense features, SAEs of single heads or of z without value biases).
            The metrics are those of :data:`METRICS`.
        densities: layer to the share of positions at which each feature fires, ``[d_sae]``.
        histogram: how many features of a layer have a density in each quarter of a decade:
            ``layer, log10_from, log10_to, features, low, high``. Features below the first edge, the
            dead ones too, are not in it.
        facts: what is needed to load the same model and SAEs again (``lens.provenance``), the SAEs
            measured, number of sequences and tokens, and how the intervals were made.
    """

    table: pd.DataFrame
    densities: Mapping[int, Float[np.ndarray, " d_sae"]] = field(repr=False)
    histogram: pd.DataFrame = field(repr=False)
    facts: Mapping[str, Any] = field(repr=False)

    @property
    def layers(self) -> list[int]:
        return sorted(self.densities)

    def wide(self, column: str = "value") -> pd.DataFrame:
        """One row per layer, one column per metric."""
        values: Any = self.table[column]
        return values.unstack("metric")[list(METRICS)]

    def to_dict(self) -> dict[str, Any]:
        """Everything but the densities of single features, ready for JSON."""
        rows = self.table.reset_index().to_dict("records")
        bars = self.histogram.to_dict("records")
        return {
            "facts": dict(self.facts),
            "metrics": METRICS,
            "table": [{k: None if v != v else v for k, v in row.items()} for row in rows],
            "histogram": bars,
        }

    def save(self, path: str | Path) -> None:
        """Write :meth:`to_dict` as JSON, whole or not at all."""
        write_json(path, self.to_dict())

    def draw(self) -> Figure:
        """Cross-entropy recovered, sparsity and error by layer, and feature densities."""
        return _draw(self)


def evaluate(
    lens: FeatureLens,
    data: Tensor | Sequence[Any] | Batches,
    *,
    layers: Sequence[int] | None = None,
    rows_at_once: int = 16,
    exclude_tokens: bool | Sequence[int] | None = None,
    resamples: int = 1000,
    level: float = 0.95,
    sae_lens: bool | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Evaluation:
    """Measure the SAEs of a lens, each spliced in alone, with intervals over sequences.

    Two passes are made over the data, the first for the mean of z. Each layer then costs three
    forward passes: with the reconstruction, with zeros, and with the mean in place of z.

    Args:
        lens: a model with its SAEs.
        data: token ids ``[row, position]``, a list of texts or of rows of token ids, or a function
            without arguments that gives batches ``[row, position]`` one after another, the same
            each time it is called (for data that does not fit in memory).
        layers: default: all with an SAE.
        rows_at_once: rows in one forward pass.
        exclude_tokens: positions that hold one of these tokens are not counted and keep their z
            when the reconstruction is spliced in, as in sae_lens; True: the tokenizer's special
            tokens. Ablations replace z everywhere. Default: as the SAEs' metadata says
            (``exclude_special_tokens``), else nothing is excluded.
        resamples: how often the bootstrap resamples the sequences; densities, of which ``dense``
            and the histogram are made, at most 200 times.
        level: of the intervals.
        sae_lens: whether sae_lens' own ``run_evals`` measures the same rows, which takes as long
            again. Default: where it can (rows of one length, no remote model).
        seed: of the bootstrap.
        progress: show a progress bar.

    Returns:
        The measurement. Intervals are percentile intervals of the bootstrap; the mean of z is held
        fixed. A recovered share has none (NaN) where the interval of what the ablation costs holds
        0. That of ``dead`` is symmetric, from the delete-one jackknife: a bootstrap sample has
        fewer distinct sequences than the data, and so always more features that fire nowhere.

    Raises:
        InputError: empty data, rows of fewer than two tokens or longer than the context, a layer
            without an SAE, data that can be read only once.
    """
    dictionaries = {n: lens.dictionaries[n] for n in chosen_layers(lens.dictionaries, layers)}
    if resamples < 1 or not 0 < level < 1 or rows_at_once < 1:
        raise InputError(
            f"resamples={resamples}, level={level}, rows_at_once={rows_at_once}: expected at least "
            "1, a share between 0 and 1, at least 1"
        )
    batches = _batches(lens, data, rows_at_once)
    excluded = _excluded(lens, dictionaries, exclude_tokens)
    means, n_rows, n_tokens, lengths = _means(lens.backend, dictionaries, batches, excluded)
    rng = np.random.default_rng(seed)
    sums = {
        layer: _Sums(dictionary.d_sae, min(resamples, _DENSITY_RESAMPLES))
        for layer, dictionary in dictionaries.items()
    }
    with tqdm(
        total=n_rows * len(dictionaries), desc="evaluating", unit="row", disable=not progress
    ) as bar:
        for tokens in batches():
            drawn = (min(resamples, _DENSITY_RESAMPLES), len(tokens))
            weights = rng.poisson(1.0, drawn).astype(np.float32)
            for layer, row_sums, fired in _measure(
                lens.backend, dictionaries, means, tokens, excluded
            ):
                sums[layer].add(row_sums, fired, weights)
                bar.update(len(tokens))
    compare = sae_lens
    if compare is None:
        compare = len(lengths) == 1 and not getattr(lens.backend, "remote", False)
    theirs: dict[int, dict[str, float]] = {}
    if compare:
        theirs = _run_evals(lens, dictionaries, batches, lengths, excluded, rows_at_once, progress)
    values = {layer: found.values(level, resamples, seed) for layer, found in sums.items()}
    first = next(iter(sums.values()))
    provenance = dict(lens.provenance)
    versions = provenance.pop("versions")
    return Evaluation(
        _table(values, theirs),
        {layer: found.density for layer, found in sums.items()},
        pd.DataFrame([bar for n, found in sums.items() for bar in found.histogram(n, level)]),
        {
            **provenance,
            "saes": {
                str(layer): {"id": d.sae_id, "architecture": d.architecture, "d_sae": d.d_sae}
                for layer, d in dictionaries.items()
            },
            "sequences": n_rows,
            "tokens": n_tokens,
            "positions_counted": int(first.positions),
            "excluded_tokens": list(excluded),
            "level": level,
            "resamples": resamples,
            "versions": versions,
        },
    )


def _excluded(
    lens: FeatureLens,
    dictionaries: Mapping[int, Dictionary],
    given: bool | Sequence[int] | None,
) -> list[int]:
    if given is None:
        said = [d.metadata.get("exclude_special_tokens") or False for d in dictionaries.values()]
        if any(one != said[0] for one in said):
            raise InputError(
                "the SAEs disagree on exclude_special_tokens; pass exclude_tokens=True, False or "
                "token ids"
            )
        given = said[0]
    if isinstance(given, bool) or given is None:
        return special_tokens(lens.tokenizer) if given else []
    return [int(token) for token in given]


# -- data ------------------------------------------------------------------------------------------


def _batches(lens: FeatureLens, data: Any, rows_at_once: int) -> Batches:
    """The data as batches of rows of one length, each time the same."""
    g = lens.backend.geometry
    if callable(data) and not isinstance(data, Tensor):
        stream: Any = data

        def streamed() -> Iterator[Tensor]:
            for batch in stream():
                yield from _checked(check_ids(batch, g.d_vocab, g.n_ctx, g.device)).split(
                    rows_at_once
                )

        return streamed
    if isinstance(data, Iterator):
        raise InputError(
            "the data can be read only once, but is read twice; give a list, a tensor, or a "
            "function that makes the iterator"
        )
    if isinstance(data, str):
        raise InputError("expected rows of token ids or a list of texts, got one string")
    if len(data) == 0:
        raise InputError("the data is empty; expected at least one row of two tokens")
    groups: dict[int, list[Tensor]] = {}
    for row in lens._to_rows(data):
        groups.setdefault(len(row), []).append(row)
    stacked = [_checked(torch.stack(rows)) for _, rows in sorted(groups.items())]
    return lambda: (part for rows in stacked for part in rows.split(rows_at_once))


def _checked(tokens: Tensor) -> Tensor:
    if tokens.shape[1] < 2:
        raise InputError("a row has one token; cross-entropy needs at least two")
    return tokens


def _kept(tokens: Int[Tensor, "row pos"], excluded: Sequence[int]) -> Tensor:
    if not excluded:
        return torch.ones_like(tokens, dtype=torch.bool)
    return ~torch.isin(tokens, torch.tensor(list(excluded), device=tokens.device))


def _means(
    backend: Backend,
    dictionaries: Mapping[int, Dictionary],
    batches: Batches,
    excluded: Sequence[int],
) -> tuple[dict[int, Tensor], int, int, set[int]]:
    """Mean of what each SAE reads at a position, and how many rows and tokens there are."""
    totals: dict[int, Tensor] = {}
    n_rows = n_tokens = counted = 0
    lengths: set[int] = set()
    for tokens in batches():
        kept = _kept(tokens, excluded)
        found = backend.forward(tokens, reads=_sites(dictionaries))
        for layer, dictionary in dictionaries.items():
            z = found[Site(dictionary.reads, layer)]
            total = z[kept.to(z.device)].double().sum(0)
            totals[layer] = totals[layer] + total if layer in totals else total
        n_rows, n_tokens = n_rows + len(tokens), n_tokens + tokens.numel()
        counted += int(kept.sum())
        lengths.add(tokens.shape[1])
    if not n_rows:
        raise InputError("the data is empty; expected at least one row of two tokens")
    if not counted:
        raise InputError("exclude_tokens leaves no position to measure")
    return {layer: total / counted for layer, total in totals.items()}, n_rows, n_tokens, lengths


# -- measuring -------------------------------------------------------------------------------------


def _measure(
    backend: Backend,
    dictionaries: Mapping[int, Dictionary],
    means: Mapping[int, Tensor],
    tokens: Int[Tensor, "row pos"],
    excluded: Sequence[int],
) -> Iterator[tuple[int, Float[np.ndarray, "row sum"], Float[np.ndarray, "row d_sae"]]]:
    """Per layer: the sums of each row, and how often each feature fires in it."""
    kept = _kept(tokens, excluded)
    # As sae_lens counts it: the loss of predicting from a position that is kept.
    predicts = kept[:, :-1]
    found = backend.forward(tokens, reads=_sites(dictionaries))

    def losses(logits: Tensor) -> Tensor:
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        loss = F.cross_entropy(
            logits[:, :-1].flatten(0, 1),
            tokens[:, 1:].flatten().to(logits.device),
            reduction="none",
        )
        return (loss.view_as(predicts).double() * predicts.to(loss.device)).sum(1)

    def spliced(site: Site, own: Tensor, value: Tensor) -> Tensor:
        edit = {site: lambda z: torch.where(own, value.to(z), z)}
        return losses(backend.forward(tokens, edit)[Site("logits")])

    clean = losses(found[Site("logits")])
    for layer, dictionary in dictionaries.items():
        site = Site(dictionary.reads, layer)
        z = found[site]
        here, own = kept.to(z.device), _own(dictionary).to(z.device)
        features, activations, recons = _reconstruct(dictionary, z, here)
        error = ((recons - z) * own).double().square().flatten(2).sum(-1) * here
        spread = ((z.double() - means[layer].to(z.device)) * own).square().flatten(2).sum(-1) * here
        kept_here = here.view(*here.shape, *[1] * (z.ndim - 2))
        columns = (
            here.sum(1),
            predicts.sum(1),
            features.sum(1),
            activations,
            error.sum(1),
            spread.sum(1),
            clean,
            spliced(site, own, torch.where(kept_here, recons, z)),
            spliced(site, own, torch.zeros_like(z)),
            spliced(site, own, means[layer].expand_as(z)),
        )
        rows = torch.stack([column.double().cpu() for column in columns], dim=1)
        yield layer, rows.numpy(), features.cpu().numpy()


def _sites(dictionaries: Mapping[int, Dictionary]) -> list[Site]:
    return [Site(dictionary.reads, layer) for layer, dictionary in dictionaries.items()]


def _own(dictionary: Dictionary) -> Tensor:
    """Which part of its site a dictionary is of: of z, the heads it spans, ``[head, 1]``."""
    heads = [part["head"] for part in dictionary.metadata.get("heads", ())]
    if (one := dictionary.metadata.get("hook_head_index")) is not None:
        heads = heads or [one]
    if dictionary.reads != "z" or not heads:
        return torch.ones(1, dtype=torch.bool)
    own = torch.zeros(dictionary.n_heads, 1, dtype=torch.bool)
    own[heads] = True
    return own


def _reconstruct(
    dictionary: Dictionary, z: Float[Tensor, "row pos ..."], kept: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """How often each feature fires in a row, the row's sum of |activations|, reconstructions."""
    n_rows, length = z.shape[:2]
    fired = torch.zeros(n_rows, dictionary.d_sae, device=z.device)
    size = torch.zeros(n_rows, dtype=torch.float64, device=z.device)
    recons = []
    step = max(1, _AT_ONCE // (length * dictionary.d_sae))
    for start in range(0, n_rows, step):
        part = z[start : start + step]
        encoded = dictionary.encode(part.flatten(0, 1))
        recons.append(dictionary.decode(encoded).view_as(part))
        counts = kept[start : start + step].flatten()[encoded.position]
        row = encoded.position[counts] // length + start
        fired.index_put_((row, encoded.feature[counts]), fired.new_ones(()), accumulate=True)
        size.index_add_(0, row, encoded.activation[counts].abs().double())
    return fired, size, torch.cat(recons)


class _Sums:
    """What one layer leaves of the sequences that went by."""

    def __init__(self, d_sae: int, n_replicates: int) -> None:
        self.rows: list[Float[np.ndarray, "row sum"]] = []
        self.n = 0
        self.positions = 0.0
        self.fired = np.zeros(d_sae)
        self.replicates = np.zeros((n_replicates, d_sae), dtype=np.float32)
        self.replicate_positions = np.zeros((n_replicates, 1))
        # how many sequences a feature fires in, and the last of them
        self.sequences = np.zeros(d_sae, dtype=np.int64)
        self.last = np.zeros(d_sae, dtype=np.int64)

    def add(
        self,
        rows: Float[np.ndarray, "row sum"],
        fired: Float[np.ndarray, "row d_sae"],
        weights: Float[np.ndarray, "replicate row"],
    ) -> None:
        self.rows.append(rows)
        self.positions += rows[:, 0].sum()
        self.fired += fired.sum(0)
        here = fired.any(0).nonzero()[0]
        self.replicates[:, here] += weights @ fired[:, here]
        self.replicate_positions += weights @ rows[:, :1]
        self.sequences += (fired > 0).sum(0)
        row, feature = fired.nonzero()  # sorted by row, so the last one stays
        self.last[feature] = self.n + row
        self.n += len(rows)

    @property
    def density(self) -> Float[np.ndarray, " d_sae"]:
        return self.fired / self.positions

    def values(self, level: float, resamples: int, seed: int) -> dict[str, Interval]:
        rows = np.concatenate(self.rows)
        found = {
            name: bootstrap(rows, ratio, level=level, resamples=resamples, seed=seed)
            for name, ratio in _RATIOS.items()
        }
        for ablated in ("zero", "mean"):
            found[f"recovered_{ablated}"] = self._recovered(rows, ablated, level, resamples, seed)
        dead = float((self.sequences == 0).mean())
        margin = dead_margin(self.sequences, self.last, self.n, level)
        found["dead"] = Interval(dead, max(0.0, dead - margin), min(1.0, dead + margin), self.n)
        replicates = self.replicates / np.maximum(self.replicate_positions, 1)
        dense = (replicates > DENSE).mean(1)
        low, high = np.quantile(dense, [(1 - level) / 2, (1 + level) / 2])
        value = float((self.density > DENSE).mean())
        found["dense"] = Interval(value, float(low), float(high), self.n)
        return found

    @staticmethod
    def _recovered(
        rows: Float[np.ndarray, "row sum"], ablated: str, level: float, resamples: int, seed: int
    ) -> Interval:
        """Share of what an ablation costs that the SAE keeps."""
        worst, here, clean = (_SUMS.index(name) for name in (ablated, "spliced", "clean"))

        def cost(means: np.ndarray) -> np.ndarray:
            return means[..., worst] - means[..., clean]

        def share(means: np.ndarray) -> np.ndarray:
            return (means[..., worst] - means[..., here]) / cost(means)

        # A share of what may be nothing has no interval.
        spread = bootstrap(rows, cost, level=level, resamples=resamples, seed=seed)
        if not (spread.low > 0 or spread.high < 0):
            value = share(rows.mean(0)) if spread.value else np.nan
            return Interval(float(value), np.nan, np.nan, len(rows))
        return bootstrap(rows, share, level=level, resamples=resamples, seed=seed)

    def histogram(self, layer: int, level: float) -> list[dict[str, Any]]:
        replicates = self.replicates / np.maximum(self.replicate_positions, 1)
        counts = np.stack([_histogram(density) for density in replicates])
        low, high = np.quantile(counts, [(1 - level) / 2, (1 + level) / 2], axis=0)
        return [
            {
                "layer": layer,
                "log10_from": float(_EDGES[i]),
                "log10_to": float(_EDGES[i + 1]),
                "features": int(count),
                "low": float(low[i]),
                "high": float(high[i]),
            }
            for i, count in enumerate(_histogram(self.density))
        ]


def _histogram(density: Float[np.ndarray, " d_sae"]) -> Int[np.ndarray, " bin"]:
    # a feature that fires everywhere, whatever its rounding, is in the last bin
    return np.histogram(np.log10(density[density > 0]).clip(max=-1e-9), _EDGES)[0]


def _per(name: str, of: str) -> Callable[[np.ndarray], np.ndarray]:
    top, bottom = _SUMS.index(name), _SUMS.index(of)
    return lambda means: means[..., top] / means[..., bottom]


_RATIOS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "l0": _per("l0", "positions"),
    "l1": _per("l1", "positions"),
    "mse": _per("squared_error", "positions"),
    "fvu": _per("squared_error", "variance"),
    **{f"ce_{name}": _per(name, "targets") for name in ("clean", "spliced", "zero", "mean")},
}


def _table(
    values: Mapping[int, Mapping[str, Interval]], theirs: Mapping[int, Mapping[str, float]]
) -> pd.DataFrame:
    rows = [
        (layer, name, found.value, found.low, found.high, theirs.get(layer, {}).get(name, np.nan))
        for layer, intervals in values.items()
        for name, found in ((name, intervals[name]) for name in METRICS)
    ]
    table = pd.DataFrame(rows, columns=["layer", "metric", "value", "low", "high", "sae_lens"])
    return table.set_index(["layer", "metric"])


def dead_margin(
    sequences: Int[np.ndarray, " d_sae"], last: Int[np.ndarray, " d_sae"], n: int, level: float
) -> float:
    """Half the interval of the share of dead features, by the delete-one jackknife: without one
    sequence, the features that fire only in it are dead too."""
    from statistics import NormalDist

    if n < 2:
        return float(len(sequences))
    alone = np.bincount(last[sequences == 1], minlength=n)
    variance = (n - 1) / n * np.square(alone - alone.mean()).sum()
    return NormalDist().inv_cdf((1 + level) / 2) * variance**0.5 / len(sequences)


# -- sae_lens --------------------------------------------------------------------------------------


def _run_evals(
    lens: FeatureLens,
    dictionaries: Mapping[int, Dictionary],
    batches: Batches,
    lengths: set[int],
    excluded: Sequence[int],
    rows_at_once: int,
    progress: bool,
) -> dict[int, dict[str, float]]:
    """The figures of sae_lens' ``run_evals`` on the same rows."""
    from sae_attn_plugin.backends.hooked import hooked

    if getattr(lens.backend, "remote", False):
        raise UnsupportedError("sae_lens' run_evals cannot run a remote model; pass sae_lens=False")
    if len(lengths) != 1:
        raise InputError(
            f"sae_lens' run_evals takes rows of one length, these have {min(lengths)} to "
            f"{max(lengths)} tokens; pass sae_lens=False"
        )
    model: Any = hooked(lens.backend.model, lens.tokenizer)  # pyright: ignore[reportAttributeAccessIssue]
    device = lens.backend.geometry.device
    rows = torch.cat([tokens.cpu() for tokens in batches()])
    # run_evals reads whole batches, and goes over the rows once for each half of what it measures.
    batch = max(n for n in range(1, min(rows_at_once, len(rows)) + 1) if len(rows) % n == 0)
    found = {}
    for layer, dictionary in tqdm(
        dictionaries.items(), desc="sae_lens' run_evals", unit="layer", disable=not progress
    ):
        sae = dictionary.source
        hook_name: Any = None if sae is None else sae.cfg.metadata.hook_name
        if hook_name not in model.hook_dict or not bool(_own(dictionary).all()):
            continue  # single heads, which run_evals sees as another size; names it does not have
        if is_folded(dictionary.metadata):
            continue  # trained on another z than the model's, which run_evals cannot know
        with warnings.catch_warnings():
            # of rows that are tensors already
            warnings.filterwarnings("ignore", message="To copy construct from a tensor")
            metrics = _run_evals_on(model, sae, rows, batch, hook_name, excluded, device)
        found[layer] = {name: metrics[group][key] for name, (group, key) in _SAE_LENS.items()}
        found[layer]["fvu"] = 1 - metrics["reconstruction_quality"]["explained_variance"]
    return found


@contextlib.contextmanager
def _padding_on_the_right(tokenizer: Any) -> Generator[None]:
    """HookedTransformer masks every token that looks like padding on its tokenizer's padding side,
    and nnsight turns that to the left in a tokenizer it is given: no row here is padded."""
    side = getattr(tokenizer, "padding_side", None)
    if side is None:
        yield
        return
    tokenizer.padding_side = "right"
    try:
        yield
    finally:
        tokenizer.padding_side = side


def _run_evals_on(
    model: Any,
    sae: Any,
    rows: Int[Tensor, "row pos"],
    batch: int,
    hook_name: str,
    excluded: Sequence[int],
    device: torch.device,
) -> dict[str, Any]:
    from datasets import Dataset
    from sae_lens.evals import EvalConfig, run_evals
    from sae_lens.training.activation_scaler import ActivationScaler
    from sae_lens.training.activations_store import ActivationsStore

    store = ActivationsStore(
        model=model,
        dataset=Dataset.from_dict({"input_ids": rows.tolist()}),
        streaming=False,
        hook_name=hook_name,
        hook_head_index=None,
        context_size=rows.shape[1],
        d_in=sae.cfg.d_in,
        n_batches_in_buffer=1,
        total_training_tokens=len(rows),
        store_batch_size_prompts=batch,
        train_batch_size_tokens=batch,
        prepend_bos=False,
        normalize_activations="none",
        device=device,
        dtype=str(sae.cfg.dtype),
    )
    reshapes = sae.hook_z_reshaping_mode
    try:
        with _padding_on_the_right(getattr(model, "tokenizer", None)):
            metrics, _ = run_evals(
                sae,
                store,
                model,
                ActivationScaler(),
                EvalConfig(
                    batch_size_prompts=batch,
                    n_eval_reconstruction_batches=len(rows) // batch,
                    n_eval_sparsity_variance_batches=len(rows) // batch,
                    compute_ce_loss=True,
                    compute_sparsity_metrics=True,
                    compute_variance_metrics=True,
                ),
                exclude_special_tokens=list(excluded) or False,
            )
    finally:
        # An error inside leaves the SAE without its reshaping.
        if reshapes and not sae.hook_z_reshaping_mode:
            sae.turn_on_forward_pass_hook_z_reshaping()
    return metrics


# -- picture ---------------------------------------------------------------------------------------


def _draw(evaluation: Evaluation) -> Figure:
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    layers = evaluation.layers
    figure = Figure(figsize=(11, 7), layout="constrained")
    panels = figure.subplots(2, 2)

    def intervals(panel: Any, name: str, label: str, shift: float, color: str) -> None:
        rows: Any = evaluation.table.xs(name, level="metric").loc[layers]
        spans = np.abs(rows[["low", "high"]].to_numpy().T - rows["value"].to_numpy())
        panel.errorbar(
            np.array(layers) + shift,
            rows["value"],
            yerr=spans,
            fmt="o",
            capsize=3,
            color=color,
            label=label,
        )

    recovered, sparsity, error, density = panels.flat
    intervals(recovered, "recovered_zero", "against zero ablation", -0.06, "C0")
    intervals(recovered, "recovered_mean", "against mean ablation", 0.06, "C1")
    recovered.axhline(1, color="0.8", zorder=0)
    recovered.set(title="Cross-entropy recovered", ylabel="share")
    recovered.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    recovered.legend(frameon=False)
    intervals(sparsity, "l0", "L0", 0, "C0")
    sparsity.set(title="Active features per position (L0)", ylabel="features")
    sparsity.set_ylim(bottom=0)
    intervals(error, "fvu", "variance unexplained", -0.06, "C0")
    intervals(error, "dead", "dead features", 0, "C3")
    intervals(error, "dense", f"features above {DENSE:.0%} density", 0.06, "C2")
    error.set(title="Unexplained variance, dead and dense features", ylabel="share")
    error.set_ylim(bottom=0)
    error.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    error.legend(frameon=False)
    for panel in (recovered, sparsity, error):
        panel.set_xlabel("layer")
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    for i, layer in enumerate(layers):
        bars: Any = evaluation.histogram[evaluation.histogram["layer"] == layer]
        edges = [*bars["log10_from"], bars["log10_to"].iloc[-1]]
        shade = f"C{i}" if len(layers) <= 10 else (0.1 + 0.8 * i / len(layers), 0.2, 0.6)
        density.stairs(bars["features"], edges, label=f"layer {layer}", color=shade)
    density.set(title="Feature densities", xlabel="log10 share of positions", ylabel="features")
    density.legend(frameon=False, ncols=1 + len(layers) // 7)
    for panel in panels.flat:
        panel.spines[["top", "right"]].set_visible(False)
    facts = evaluation.facts
    figure.suptitle(
        f"SAEs of {facts['model']}: {facts['sequences']} sequences, {facts['tokens']} tokens; "
        f"bars: {facts['level']:.0%} intervals over sequences",
        fontsize=11,
    )
    return figure
