"""What stays of a corpus: counts, sums, histograms and samples of bounded size that can be merged.

Every sketch is a function of the *set* of firings it saw, not of their order: merging the sketches
of two halves of a corpus gives the sketch of the whole, counts and samples bit for bit, sums up to
rounding. Tensors live on one device; keys and hashes are int64, since torch knows no arithmetic
of unsigned numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae_attn_plugin.errors import InputError

__all__ = [
    "BINS_PER_OCTAVE",
    "RELATIVE_ERROR",
    "ROLES",
    "LayerSketch",
    "PositionSample",
    "Reservoir",
    "Shape",
    "Sketch",
    "distance_edges",
    "hash_of",
    "log_bin",
    "merge",
    "place_of",
    "position_edges",
    "quantiles",
]

ROLES = ("self", "previous", "first", "duplicate", "induction")
"""What a source position can be to a destination; see :mod:`sae_attn_plugin.corpus.gather`."""

BINS_PER_OCTAVE = 8
_LOWEST, _OCTAVES = -18, 32  # bins cover activations from 2**-18 to 2**14
N_BINS = BINS_PER_OCTAVE * _OCTAVES
RELATIVE_ERROR = 2 ** (0.5 / BINS_PER_OCTAVE) - 1
"""Of the quantiles of activations, for activations between 2**-18 and 2**14."""

_LAST = torch.iinfo(torch.int64).max
_POSITION_BITS = 20  # a place is row * 2**20 + position
_MASK63 = _LAST


# -- places, hashes, bins --------------------------------------------------------------------------


def place_of(row: Tensor, position: Tensor) -> Int[Tensor, " n"]:
    """Row and position as one number that sorts as the corpus does."""
    return (row.long() << _POSITION_BITS) + position


def row_and_position(place: Any) -> tuple[Any, Any]:
    """Undo :func:`place_of`, for tensors and arrays."""
    return place >> _POSITION_BITS, place & ((1 << _POSITION_BITS) - 1)


def _signed(constant: int) -> int:
    return constant - 2**64 if constant >= 2**63 else constant


_GAMMA = _signed(0x9E3779B97F4A7C15)
_MIX1, _MIX2 = _signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB)


def _mix(x: Tensor) -> Tensor:
    """The finaliser of splitmix64 (Steele et al. 2014), in wrapping signed arithmetic."""
    for shift, factor in ((30, _MIX1), (27, _MIX2)):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return x ^ ((x >> 31) & ((1 << 33) - 1))


def hash_of(*parts: int | Int[Tensor, " n"]) -> Int[Tensor, " n"]:
    """A 63-bit hash of integers (or of tensors of them, elementwise): the same everywhere."""
    state: Tensor = torch.tensor(0, dtype=torch.int64)
    for part in parts:
        tensor = part.long() if isinstance(part, Tensor) else torch.tensor(part, dtype=torch.int64)
        if tensor.ndim and state.device != tensor.device:
            state = state.to(tensor.device)
        state = _mix((state ^ tensor.to(state.device)) + _GAMMA)
    return state & _MASK63


def log_bin(activation: Float[Tensor, " n"]) -> Int[Tensor, " n"]:
    """The bin of the log-histogram that each positive activation falls into."""
    exact = ((activation.double().log2() - _LOWEST) * BINS_PER_OCTAVE).floor()
    return exact.clamp_(0, N_BINS - 1).long()


def quantiles(
    histogram: Int[np.ndarray, "n bin"], shares: Sequence[float]
) -> Float[np.ndarray, "n share"]:
    """Quantiles of rows of log-histograms; NaN for empty ones.

    Each is within :data:`RELATIVE_ERROR` of the value of rank ``floor(share * (n - 1))``.
    """
    total = histogram.sum(1, dtype=np.int64)
    cumulative = np.cumsum(histogram, axis=1, dtype=np.int64)
    found = np.full((len(histogram), len(shares)), np.nan)
    for column, share in enumerate(shares):
        rank = np.floor(share * np.maximum(total - 1, 0)).astype(np.int64)
        at = (cumulative <= rank[:, None]).sum(1)
        middle = np.exp2((at + 0.5) / BINS_PER_OCTAVE + _LOWEST)
        found[:, column] = np.where(total > 0, middle, np.nan)
    return found


def distance_edges(context: int) -> list[int]:
    """First distance of each bin: 0, 1, 2, 3, 5, 9, 17, ... below ``context``."""
    edges = [0, 1, 2]
    while edges[-1] < context:
        edges.append(2 * edges[-1] - 1 if edges[-1] > 2 else 3)
    return [edge for edge in edges if edge < context]


def position_edges(context: int) -> list[int]:
    """First position of each bin: 0 .. 15 singly, then 16, 32, 64, ... below ``context``."""
    edges = [*range(16), *(16 * 2**i for i in range(_POSITION_BITS))]
    return [edge for edge in edges if edge < context]


def bin_of(edges: Sequence[int], n: int) -> Int[np.ndarray, " n"]:
    """The bin of each of ``0 .. n - 1``."""
    return np.searchsorted(np.asarray(edges), np.arange(n), side="right") - 1


def zeros(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros; on the processor their memory is taken only as it is written to."""
    if device.type == "cpu":
        numpy_dtype = torch.empty(0, dtype=dtype).numpy().dtype
        return torch.from_numpy(np.zeros(shape, numpy_dtype))
    return torch.zeros(shape, dtype=dtype, device=device)


# -- the smallest of many --------------------------------------------------------------------------


class Reservoir:
    """The ``k`` firings of each feature with the smallest priority, with details of each.

    Ties go to the firing that stands first in the corpus, so that the same firings are kept in
    whatever order they come.

    Args:
        n: features; k: firings of each.
        details: of a firing: name to shape and dtype.
    """

    n: int
    k: int
    device: torch.device
    priority: Tensor
    place: Tensor
    details: dict[str, Tensor]

    def __init__(
        self,
        n: int,
        k: int,
        details: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
        device: torch.device,
    ) -> None:
        self.n, self.k, self.device = n, k, device
        self.priority = torch.full((n, k), _LAST, device=device)
        self.place = torch.full((n, k), _LAST, device=device)
        # of the firing that goes next
        self._worst = torch.full((n,), _LAST, device=device)
        self._worst_place = torch.full((n,), _LAST, device=device)
        self.details = {
            name: zeros(n * k, *shape, dtype=dtype, device=device)
            for name, (shape, dtype) in details.items()
        }

    def enters(
        self, feature: Int[Tensor, " n"], priority: Int[Tensor, " n"], place: Int[Tensor, " n"]
    ) -> Int[Tensor, " m"]:
        """Which firings could enter, judged one by one."""
        worst = self._worst[feature]
        passes = priority < worst
        ties = priority == worst
        if bool(ties.any()):
            passes |= ties & (place < self._worst_place[feature])
        return passes.nonzero()[:, 0]

    def offer(
        self, feature: Int[Tensor, " n"], priority: Int[Tensor, " n"], place: Int[Tensor, " n"]
    ) -> tuple[Int[Tensor, " m"], Int[Tensor, " m"]]:
        """Let firings in that belong to the smallest.

        Returns:
            Which of them are in now, and the slots their details belong to (see :meth:`write`).
        """
        index = self.enters(feature, priority, place)
        if not len(index):
            return index, index
        for key in (place, priority, feature):  # least significant first; sorts are stable
            index = index[torch.argsort(key[index], stable=True)]
        touched, segment, count = torch.unique_consecutive(
            feature[index], return_inverse=True, return_counts=True
        )
        start = count.cumsum(0) - count
        rank = torch.arange(len(index), device=self.device) - start[segment]
        index, segment, rank = (x[rank < self.k] for x in (index, segment, rank))

        def beside(mine: Tensor, theirs: Tensor) -> Tensor:
            padded = mine.new_full((len(touched), self.k), _LAST)
            padded[segment, rank] = theirs[index]
            return torch.cat([mine[touched], padded], dim=1)

        priorities, places = beside(self.priority, priority), beside(self.place, place)
        order = torch.argsort(places, dim=1, stable=True)
        order = order.gather(1, torch.argsort(priorities.gather(1, order), dim=1, stable=True))
        inside = torch.zeros_like(priorities, dtype=torch.bool)
        inside.scatter_(1, order[:, : self.k], True)
        # As many go as come, feature by feature: each newcomer takes the slot of one that goes.
        row, slot = (~inside[:, : self.k]).nonzero(as_tuple=True)
        slots = touched[row] * self.k + slot
        new_row, new_rank = inside[:, self.k :].nonzero(as_tuple=True)
        where = torch.full_like(inside[:, : self.k], -1, dtype=torch.int64)
        where[segment, rank] = index
        came = where[new_row, new_rank]
        self.priority.view(-1)[slots] = priority[came]
        self.place.view(-1)[slots] = place[came]
        last = order[:, self.k - 1 : self.k]
        self._worst[touched] = priorities.gather(1, last)[:, 0]
        self._worst_place[touched] = places.gather(1, last)[:, 0]
        return came, slots

    def write(self, slots: Int[Tensor, " m"], details: Mapping[str, Tensor]) -> None:
        """Details of the firings that came in, in the order of ``slots``."""
        for name, kept in self.details.items():
            kept[slots] = details[name].to(kept.dtype)

    @property
    def filled(self) -> Int[Tensor, " m"]:
        """The slots that hold a firing, by feature and from the smallest priority up."""
        slots = (self.place.view(-1) != _LAST).nonzero()[:, 0]
        for key in (self.place.view(-1), self.priority.view(-1)):
            slots = slots[torch.argsort(key[slots], stable=True)]
        return slots[torch.argsort(slots // self.k, stable=True)]

    def add(self, other: Reservoir) -> None:
        """Let in what another one kept."""
        slots = other.filled
        came, where = self.offer(
            slots // other.k, other.priority.view(-1)[slots], other.place.view(-1)[slots]
        )
        self.write(where, {name: d[slots[came]] for name, d in other.details.items()})

    def arrays(self) -> dict[str, np.ndarray]:
        """What it holds, as arrays."""
        slots = self.filled
        held = {"priority": self.priority.view(-1)[slots], "place": self.place.view(-1)[slots]}
        held |= {name: kept[slots] for name, kept in self.details.items()}
        return {"feature": _numpy(slots // self.k), **{n: _numpy(x) for n, x in held.items()}}

    def load(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Undo :meth:`arrays`, into an empty one."""
        given = {name: torch.from_numpy(a).to(self.device) for name, a in arrays.items()}
        came, slots = self.offer(given["feature"].long(), given["priority"], given["place"])
        self.write(slots, {name: given[name][came] for name in self.details})


# -- one layer -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """Sizes of the sketches.

    Attributes:
        context: tokens in a row; n_heads: of the model.
        d_sae: features by layer.
        keep, sample: strongest and random firings kept of each feature; sources: source positions
            kept of each.
        positions: drawn positions.
    """

    context: int
    n_heads: int
    d_sae: Mapping[int, int]
    keep: int
    sample: int
    sources: int
    positions: int

    @property
    def n_distances(self) -> int:
        return len(distance_edges(self.context))

    @property
    def n_positions(self) -> int:
        return len(position_edges(self.context))

    def details(self, dtype: torch.dtype) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Of a kept firing."""
        return {
            "activation": ((), dtype),
            "pre_activation": ((), dtype),
            "dfa_by_head": ((self.n_heads,), dtype),
            "sources": ((self.sources,), torch.int16 if self.context < 2**15 else torch.int32),
            "dfa": ((self.sources,), dtype),
            "dfa_rest": ((), dtype),
            "by_distance": ((self.n_distances,), dtype),
            "roles": ((len(ROLES),), dtype),
            "dfa_abs": ((), dtype),
            "active": ((), torch.int32),
        }


class LayerSketch:
    """What stays of the firings of one layer.

    Attributes:
        by_position: ``[d_sae, bin]`` firings by position; their sum is the number of firings.
        histogram: ``[d_sae, bin]`` firings by activation.
        total: ``[d_sae]`` sum of activations.
        dfa, dfa_abs, dfa_weighted: ``[d_sae, n_heads]`` sums over all firings of the DFA by head,
            of its size, and of its size times the activation.
        top, sample: the strongest firings, and a uniform sample of all.
    """

    SUMS = ("total", "dfa", "dfa_abs", "dfa_weighted")
    COUNTS = ("by_position", "histogram")

    by_position: Tensor
    histogram: Tensor
    total: Tensor
    dfa: Tensor
    dfa_abs: Tensor
    dfa_weighted: Tensor
    top: Reservoir
    sample: Reservoir

    def __init__(self, d_sae: int, shape: Shape, dtype: torch.dtype, device: torch.device) -> None:
        f64, i64 = torch.float64, torch.int64

        def empty(*size: int, dtype: torch.dtype) -> Tensor:
            return zeros(d_sae, *size, dtype=dtype, device=device)

        self.d_sae = d_sae
        self.by_position = empty(shape.n_positions, dtype=i64)
        self.histogram = empty(N_BINS, dtype=torch.int32)
        self.total = empty(dtype=f64)
        self.dfa, self.dfa_abs, self.dfa_weighted = (
            empty(shape.n_heads, dtype=f64) for _ in range(3)
        )
        details = shape.details(dtype)
        self.top = Reservoir(d_sae, shape.keep, details, device)
        self.sample = Reservoir(d_sae, shape.sample, details, device)

    @property
    def fires(self) -> Int[Tensor, " d_sae"]:
        return self.by_position.sum(1)

    def count(
        self,
        feature: Int[Tensor, " n"],
        activation: Float[Tensor, " n"],
        position_bin: Int[Tensor, " n"],
    ) -> None:
        """Count firings."""
        flat = feature * self.by_position.shape[1] + position_bin
        self.by_position.view(-1).index_add_(0, flat, torch.ones_like(flat))
        flat = feature * N_BINS + log_bin(activation)
        ones = torch.ones(len(flat), dtype=self.histogram.dtype, device=flat.device)
        self.histogram.view(-1).index_add_(0, flat, ones)
        self.total.index_add_(0, feature, activation.double())

    def attribute(
        self,
        feature: Int[Tensor, " n"],
        activation: Float[Tensor, " n"],
        by_head: Float[Tensor, "n head"],
    ) -> None:
        """Add the DFA by head of firings."""
        by_head = by_head.double()
        size = by_head.abs()
        self.dfa.index_add_(0, feature, by_head)
        self.dfa_abs.index_add_(0, feature, size)
        self.dfa_weighted.index_add_(0, feature, size * activation.double()[:, None])

    def widen(self) -> None:
        """Count in 64 bits from here on."""
        self.histogram = self.histogram.long()

    def add(self, other: LayerSketch) -> None:
        """Take in what another one saw."""
        for name in (*self.SUMS, *self.COUNTS):
            mine, theirs = getattr(self, name), getattr(other, name)
            setattr(self, name, mine.add_(theirs) if mine.dtype == theirs.dtype else mine + theirs)
        self.top.add(other.top)
        self.sample.add(other.sample)

    def arrays(self) -> dict[str, np.ndarray]:
        """What it holds, as arrays; histograms without their zeros."""
        at = self.histogram.view(-1).nonzero()[:, 0]
        held = {name: _numpy(getattr(self, name)) for name in (*self.SUMS, "by_position")}
        held |= {
            "histogram.at": _numpy(at),
            "histogram.count": _numpy(self.histogram.view(-1)[at]),
        }
        for name in ("top", "sample"):
            held |= {f"{name}.{key}": a for key, a in getattr(self, name).arrays().items()}
        return held

    def load(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Undo :meth:`arrays`, into an empty one."""
        for name in (*self.SUMS, "by_position"):
            getattr(self, name).copy_(torch.from_numpy(arrays[name]))
        if arrays["histogram.count"].dtype == np.int64:
            self.widen()
        device = self.histogram.device
        at, count = (torch.from_numpy(arrays[f"histogram.{n}"]) for n in ("at", "count"))
        self.histogram.view(-1)[at.to(device)] = count.to(device)
        for name in ("top", "sample"):
            own = {k.removeprefix(f"{name}."): a for k, a in arrays.items() if k.startswith(name)}
            getattr(self, name).load(own)


# -- positions -------------------------------------------------------------------------------------


class PositionSample:
    """Positions drawn uniformly from the corpus, and all features that are active there.

    A position is drawn when the hash of its place is among the ``k`` smallest.
    """

    def __init__(self, k: int, seed: int) -> None:
        self.k: int = k
        self.seed: int = seed
        self.limit: int = _LAST  # no hash above it can be among the smallest
        self.place: Tensor = torch.zeros(0, dtype=torch.int64)
        self.entries: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        self._new: list[Tensor] = []
        self._new_entries: dict[int, list[tuple[Tensor, Tensor, Tensor]]] = {}
        self._waiting = 0

    def hash(self, place: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
        return hash_of(self.seed, -1, *row_and_position(place))

    def choose(self, place: Int[Tensor, " n"]) -> Bool[Tensor, " n"]:
        """Which places may be among the drawn."""
        return self.hash(place) <= self.limit

    def draw(self, place: Int[Tensor, " n"]) -> None:
        """Take in chosen places; :meth:`note` what is active there first."""
        self._new.append(place.cpu())
        self._waiting += len(place)
        if self._waiting > max(self.k // 4, 4096):
            self.compact()

    def note(
        self,
        layer: int,
        place: Int[Tensor, " n"],
        feature: Int[Tensor, " n"],
        activation: Float[Tensor, " n"],
    ) -> None:
        """What is active at chosen places."""
        entry = (place.cpu(), feature.int().cpu(), activation.float().cpu())
        self._new_entries.setdefault(layer, []).append(entry)

    def compact(self) -> None:
        """Drop what is not among the smallest."""
        place = torch.cat([self.place, *self._new])
        hashes = self.hash(place)
        order = torch.argsort(place)
        order = order[torch.argsort(hashes[order], stable=True)][: self.k]
        if len(place) >= self.k:
            self.limit = int(hashes[order[-1]])
        self.place = place[order].sort().values
        self._new, self._waiting = [], 0
        for layer in sorted({*self.entries, *self._new_entries}):
            parts = [self.entries[layer]] if layer in self.entries else []
            parts += self._new_entries.get(layer, [])
            at, feature, activation = (torch.cat(column) for column in zip(*parts, strict=True))
            if len(self.place):
                found = torch.searchsorted(self.place, at).clamp_max(len(self.place) - 1)
                kept = (self.place[found] == at).nonzero()[:, 0]
            else:
                kept = at.new_zeros(0)
            kept = kept[torch.argsort(feature[kept], stable=True)]
            kept = kept[torch.argsort(at[kept], stable=True)]
            self.entries[layer] = (at[kept], feature[kept], activation[kept])
        self._new_entries = {}

    def add(self, other: PositionSample) -> None:
        """Take in what another one drew."""
        other.compact()
        for layer, entry in other.entries.items():
            self._new_entries.setdefault(layer, []).append(entry)
        self._new.append(other.place)
        self.compact()

    def arrays(self) -> dict[str, np.ndarray]:
        """What it holds, as arrays."""
        self.compact()
        held = {"place": _numpy(self.place)}
        for layer, entry in self.entries.items():
            for name, column in zip(("place", "feature", "activation"), entry, strict=True):
                held[f"{layer}.{name}"] = _numpy(column)
        return held

    def load(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Undo :meth:`arrays`, into an empty one."""
        self.place = torch.from_numpy(arrays["place"])
        layers = {int(name.split(".")[0]) for name in arrays if "." in name}
        for layer in sorted(layers):
            place, feature, activation = (
                torch.from_numpy(arrays[f"{layer}.{name}"])
                for name in ("place", "feature", "activation")
            )
            self.entries[layer] = (place, feature, activation)
        self.compact()


# -- the whole -------------------------------------------------------------------------------------


@dataclass
class Sketch:
    """What stays of a corpus, for all layers.

    Attributes:
        rows, tokens, forwards: that went through the model.
        positions_by_bin: positions counted, by bin of position.
    """

    shape: Shape
    seed: int
    dtype: torch.dtype
    device: torch.device
    layers: dict[int, LayerSketch] = field(init=False)
    drawn: PositionSample = field(init=False)
    positions_by_bin: Int[np.ndarray, " bin"] = field(init=False)
    rows: int = 0
    tokens: int = 0
    forwards: int = 0

    def __post_init__(self) -> None:
        shape = self.shape
        self.layers = {
            layer: LayerSketch(d_sae, shape, self.dtype, self.device)
            for layer, d_sae in shape.d_sae.items()
        }
        self.drawn = PositionSample(shape.positions, self.seed)
        self.positions_by_bin = np.zeros(shape.n_positions, dtype=np.int64)

    COUNTS = ("rows", "tokens", "forwards")

    @property
    def positions_counted(self) -> int:
        return int(self.positions_by_bin.sum())

    def saw(self, rows: int, tokens: int, positions_by_bin: Int[np.ndarray, " bin"]) -> None:
        """Count one forward pass."""
        self.rows, self.tokens, self.forwards = (
            self.rows + rows,
            self.tokens + tokens,
            self.forwards + 1,
        )
        self._count(positions_by_bin)

    def _count(self, positions_by_bin: Int[np.ndarray, " bin"]) -> None:
        self.positions_by_bin = self.positions_by_bin + positions_by_bin
        if self.positions_counted > torch.iinfo(torch.int32).max:
            for layer in self.layers.values():
                if layer.histogram.dtype != torch.int64:
                    layer.widen()

    def add(self, other: Sketch) -> None:
        """Take in what another one saw of other rows.

        Raises:
            InputError: sketches of other sizes, or of another seed.
        """
        if (self.shape, self.seed) != (other.shape, other.seed):
            raise InputError(
                "sketches of different settings cannot be merged; expected the same layers, keep, "
                "sample, sources, positions, context and seed"
            )
        for name in self.COUNTS:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self._count(other.positions_by_bin)
        for layer, sketch in self.layers.items():
            sketch.add(other.layers[layer])
        self.drawn.add(other.drawn)

    def empty(self) -> Sketch:
        """One of the same settings that has seen nothing."""
        return Sketch(self.shape, self.seed, self.dtype, self.device)

    # One part for each layer and one for the rest, so that no copy of everything is ever needed.

    def parts(self) -> Iterable[tuple[str, dict[str, np.ndarray]]]:
        """What it holds, as named sets of arrays."""
        for layer, sketch in self.layers.items():
            yield f"layer-{layer}", sketch.arrays()
        yield "positions", {**self.drawn.arrays(), "positions_by_bin": self.positions_by_bin}

    def facts(self) -> dict[str, int]:
        """Its counts."""
        return {name: getattr(self, name) for name in self.COUNTS}

    def load_part(self, name: str, arrays: Mapping[str, np.ndarray]) -> None:
        """Undo one of :meth:`parts`, into an empty one."""
        if name == "positions":
            held = dict(arrays)
            self._count(held.pop("positions_by_bin"))
            self.drawn.load(held)
        else:
            self.layers[int(name.removeprefix("layer-"))].load(arrays)


def merge(a: Sketch, b: Sketch) -> Sketch:
    """The sketch of all rows that ``a`` and ``b`` saw; both stay as they are.

    Associative and commutative: in counts and samples exactly, in sums up to rounding.

    Raises:
        InputError: sketches of different settings.
    """
    merged = a.empty()
    merged.add(a)
    merged.add(b)
    return merged


def _numpy(x: Tensor) -> np.ndarray:
    return x.numpy(force=True)
