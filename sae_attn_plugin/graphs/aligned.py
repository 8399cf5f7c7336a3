"""Many prompts as one table: edges between the same roles, over a data set.

Attributions are taken in one by one and only their edges by role are kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd

from sae_attn_plugin.errors import FileError, InputError
from sae_attn_plugin.io import read_json, write_json
from sae_attn_plugin.nodes import TARGET_KINDS, Node

if TYPE_CHECKING:
    import networkx as nx

    from sae_attn_plugin.attribution.table import Attribution

__all__ = ["AlignedAttribution", "AlignedContrast", "Aligner"]

OTHER = "other"
_FORMAT = "sae-attn-plugin aligned attribution"
_DENSE = 2**22  # numbers held at once when edges are resampled
_LEDGER = ("in_sum", "constant", "pruned", "dropped", "value")


@dataclass(frozen=True, eq=False)
class AlignedAttribution:
    """Attributions of many prompts, their nodes named by role: ``attn:1:665@END``.

    An edge that a prompt does not have is 0 there. Statistics treat prompts as independent.

    Attributes:
        roles: names; ``@other`` is every position without one, summed within a prompt.
        node_ids: names of the nodes; targets: those of them that were asked for.
        source, target: ``[edge]`` into ``node_ids``.
        prompt, edge, weight: ``[entry]``: the edges of each prompt.
        n_prompts: how many.
        node_table, ledger_table: sums over prompts (see :attr:`nodes` and :attr:`ledger`).
        dropped: share of the absolute edge weight that was left out with positions without a role.
        settings: what it was made with. pairs: equal for sets that correspond prompt by prompt.
    """

    roles: tuple[str, ...]
    node_ids: tuple[str, ...]
    targets: tuple[str, ...]
    source: np.ndarray
    target: np.ndarray
    prompt: np.ndarray
    edge: np.ndarray
    weight: np.ndarray
    n_prompts: int
    node_table: Mapping[str, tuple[int, float, float, int]]
    ledger_table: Mapping[str, tuple[float, ...]]
    dropped: float = 0.0
    settings: Mapping[str, Any] = field(default_factory=dict)
    pairs: str | None = None

    def __repr__(self) -> str:
        return (
            f"AlignedAttribution of {', '.join(self.targets)} over {self.n_prompts} prompts: "
            f"{len(self.node_ids)} nodes, {len(self.source)} edges between {', '.join(self.roles)}"
            + ("" if self.dropped == 0 else f"; {self.dropped:.1%} of the weight left out")
        )

    # -- tables ----------------------------------------------------------------------------------

    def table(self, *, level: float = 0.95, resamples: int = 2000, seed: int = 0) -> pd.DataFrame:
        """One row per edge, strongest mean first: ``source, target, mean, se, low, high, present``.

        ``mean`` over all prompts (absent = 0); ``se``, its standard error (NaN for one prompt);
        ``low``, ``high``, percentile bootstrap interval over prompts; ``present``, share of prompts
        that have the edge.

        Args:
            level: of the interval. resamples: of the prompts, drawn from ``seed``.
        """
        columns = _statistics(self, None, level, resamples, seed)
        return _edge_frame(self.node_ids, self.source, self.target, columns)

    @cached_property
    def edges(self) -> pd.DataFrame:
        """:meth:`table` with its defaults."""
        return self.table()

    @cached_property
    def nodes(self) -> pd.DataFrame:
        """Per node: ``kind, layer, feature, role, present`` (share of prompts), ``influence``
        (mean, absent = 0), ``activation`` (mean where present; features only)."""
        rows = []
        for name in self.node_ids:
            present, influence, activation, count = self.node_table[name]
            body, role = name.rsplit("@", 1)
            kind, *numbers = body.split(":")
            layer = numbers[0].split(".")[0] if numbers and kind not in TARGET_KINDS else None
            rows.append(
                {
                    "kind": kind,
                    "layer": None if layer is None else int(layer),
                    "feature": int(numbers[1]) if len(numbers) == 2 and layer else None,
                    "role": role,
                    "present": present / self.n_prompts,
                    "influence": influence / self.n_prompts,
                    "activation": activation / count if count else float("nan"),
                }
            )
        frame = pd.DataFrame(rows, index=pd.Index(self.node_ids, name="node"))
        return frame.astype({"layer": "Int64", "feature": "Int64"})

    @cached_property
    def ledger(self) -> pd.DataFrame:
        """Per target, means over all prompts (absent = 0): ``in_sum + constant + pruned + dropped =
        value``, up to rounding; ``dropped`` is what came from positions that were left out."""
        rows = np.array(list(self.ledger_table.values()), dtype=np.float64) / self.n_prompts
        frame = pd.DataFrame(rows, index=list(self.ledger_table), columns=list(_LEDGER))
        frame["residual"] = frame["value"] - frame[list(_LEDGER[:-1])].sum(axis=1)
        frame.index.name = "target"
        return frame

    def weights(self) -> pd.DataFrame:
        """Every entry: ``prompt, source, target, weight``, for statistics of your own."""
        ids = pd.Index(self.node_ids)
        return pd.DataFrame(
            {
                "prompt": self.prompt,
                "source": pd.Categorical.from_codes(self.source[self.edge], categories=ids),
                "target": pd.Categorical.from_codes(self.target[self.edge], categories=ids),
                "weight": self.weight,
            }
        )

    # -- contrast --------------------------------------------------------------------------------

    def contrast(self, other: AlignedAttribution, *, paired: bool | None = None) -> AlignedContrast:
        """This set minus another, edge by edge (clean minus corrupted).

        Args:
            paired: take differences prompt by prompt. None: where both come from the same data set
                (one of them a counterpart of the other).

        Raises:
            InputError: pairs of sets of unequal size.
        """
        same = self.pairs is not None and self.pairs == other.pairs
        if paired is None:
            paired = same and self.n_prompts == other.n_prompts
        if paired and self.n_prompts != other.n_prompts:
            raise InputError(
                f"cannot pair {self.n_prompts} prompts with {other.n_prompts}; pass paired=False"
            )
        return AlignedContrast(self, other, paired)

    # -- graphs and files ------------------------------------------------------------------------

    def to_networkx(self, *, min_present: float = 0.0, certain: bool = False) -> nx.DiGraph[Any]:
        """A ``DiGraph`` of the roles: ``weight`` is the mean, beside ``se, low, high, present``.

        Args:
            min_present: only edges that at least this share of prompts has.
            certain: only edges whose interval excludes 0.
        """
        if not 0 <= min_present <= 1:
            raise InputError(f"to_networkx(min_present={min_present}): expected a share in 0..1")
        import networkx as nx

        edges = self.edges
        keep = edges["present"] >= min_present
        if certain:
            keep &= (edges["low"] > 0) | (edges["high"] < 0)
        graph = nx.DiGraph()
        graph.graph.update(self.settings)
        graph.graph.update(
            n_prompts=self.n_prompts, roles=list(self.roles), targets=list(self.targets)
        )
        records = self.nodes.to_dict("index")
        chosen: Any = edges[keep]
        names = {*self.targets, *chosen["source"].astype(str), *chosen["target"].astype(str)}
        for name in self.node_ids:
            if name in names:
                known = {k: _plain(v) for k, v in records[name].items() if not pd.isna(v)}
                graph.add_node(name, **known)
        for row in chosen.to_dict("records"):
            numbers = {k: float(row[k]) for k in ("se", "low", "high", "present")}
            graph.add_edge(str(row["source"]), str(row["target"]), weight=row["mean"], **numbers)
        return graph

    def save(self, path: str | Path) -> None:
        """All of it as JSON, written whole or not at all; :meth:`load` gives it back exactly.

        Raises:
            FileError: the file cannot be written.
        """
        document = {
            "format": _FORMAT,
            "version": 1,
            "roles": list(self.roles),
            "targets": list(self.targets),
            "n_prompts": self.n_prompts,
            "dropped": self.dropped,
            "pairs": self.pairs,
            "settings": dict(self.settings),
            "nodes": [[name, *self.node_table[name]] for name in self.node_ids],
            "ledger": [[name, *row] for name, row in self.ledger_table.items()],
            "edges": {"source": self.source.tolist(), "target": self.target.tolist()},
            "entries": {
                "prompt": self.prompt.tolist(),
                "edge": self.edge.tolist(),
                "weight": self.weight.tolist(),
            },
        }
        write_json(path, document, indent=None)

    @classmethod
    def load(cls, path: str | Path) -> AlignedAttribution:
        """What :meth:`save` wrote.

        Raises:
            FileError: missing, foreign or damaged.
        """
        document = read_json(path, "aligned attribution of this package", _FORMAT)
        if document.get("version") != 1:
            raise FileError(f"{path} has version {document.get('version')!r}; known: 1")
        try:
            edges, entries = document["edges"], document["entries"]
            found = cls(
                roles=tuple(document["roles"]),
                node_ids=tuple(name for name, *_ in document["nodes"]),
                targets=tuple(document["targets"]),
                source=np.array(edges["source"], dtype=np.int64),
                target=np.array(edges["target"], dtype=np.int64),
                prompt=np.array(entries["prompt"], dtype=np.int64),
                edge=np.array(entries["edge"], dtype=np.int64),
                weight=np.array(entries["weight"], dtype=np.float64),
                n_prompts=int(document["n_prompts"]),
                node_table={name: tuple(row) for name, *row in document["nodes"]},
                ledger_table={name: tuple(row) for name, *row in document["ledger"]},
                dropped=float(document["dropped"]),
                settings=document["settings"],
                pairs=document["pairs"],
            )
            _check(found)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise FileError(f"{path} is damaged: {error!r}") from error
        return found


@dataclass(frozen=True, eq=False)
class AlignedContrast:
    """One set of prompts minus another, edge by edge.

    Attributes:
        first, second: the sets. paired: whether differences are taken prompt by prompt.
    """

    first: AlignedAttribution
    second: AlignedAttribution
    paired: bool

    def __repr__(self) -> str:
        how = "prompt by prompt" if self.paired else "between means"
        return (
            f"AlignedContrast of {self.first.n_prompts} and {self.second.n_prompts} prompts, "
            f"{how}: {len(self.edges)} edges"
        )

    def table(self, *, level: float = 0.95, resamples: int = 2000, seed: int = 0) -> pd.DataFrame:
        """One row per edge of either set, largest difference first: ``source, target, first,
        second`` (means), ``difference, se, low, high`` and the shares ``present_first``,
        ``present_second``. Pairs are resampled together, unpaired sets each by itself."""
        ids, source, target, first, second = _joined(self.first, self.second)
        columns = _statistics(first, second, level, resamples, seed, self.paired)
        return _edge_frame(ids, source, target, columns)

    @cached_property
    def edges(self) -> pd.DataFrame:
        """:meth:`table` with its defaults."""
        return self.table()


class Aligner:
    """Takes attributions in, one prompt at a time.

    Args:
        roles: names. other: ``"bucket"`` sums positions without a role under ``@other``, ``"drop"``
            leaves them out and counts what is lost.
    """

    def __init__(self, roles: Sequence[str], other: Literal["bucket", "drop"] = "bucket") -> None:
        if other not in ("bucket", "drop"):
            raise InputError(f"other={other!r}: expected 'bucket' or 'drop'")
        self.roles: tuple[str, ...] = tuple(roles)
        self.drop: bool = other == "drop"
        self._codes: dict[str, int] = {}
        self._nodes: dict[str, list[Any]] = {}
        self._ledger: dict[str, np.ndarray] = {}
        self._targets: dict[str, None] = {}
        self._entries: list[tuple[np.ndarray, np.ndarray]] = []  # (pair code, weight) per prompt
        self._lost = self._total = 0.0

    def add(self, attribution: Attribution, roles: Mapping[str, int]) -> None:
        """One prompt; ``roles`` gives the position of each role in it."""
        flow, writers = attribution.flow, attribution.writers
        names: dict[int, list[str]] = {}
        for role, position in roles.items():
            names.setdefault(position, []).append(role)
        # Several roles at one place are a place of their own, not a choice between them.
        at = {position: "=".join(found) for position, found in names.items()}
        numbers = np.unique(np.concatenate([flow.target, flow.source]))
        # what has no place has no code
        codes = np.full(len(flow.influence), -1, dtype=np.int64)
        influence = flow.influence + flow.root_weight
        seen: set[int] = set()
        several = len(attribution.roots) > 1
        order = {number: i for i, number in enumerate(attribution.roots)}
        for number in numbers.tolist():
            node = attribution.roots.get(number) or writers.node(number)
            name = self._name(node, at, order.get(number) if several else None)
            if name is None:
                continue
            code = codes[number] = self._codes.setdefault(name, len(self._codes))
            row = self._nodes.setdefault(name, [0, 0.0, 0.0, 0])
            row[0] += code not in seen
            row[1] += float(influence[number])
            if number < len(writers) and np.isfinite(writers.activation[number]):
                row[2] += float(writers.activation[number])
                row[3] += 1
            if number in attribution.roots:
                self._targets[name] = None
            seen.add(code)
        target = flow.target[flow.row]
        live = flow.weight != 0
        a, b = codes[flow.source], codes[target]
        inside = live & (a >= 0) & (b >= 0)
        weight = flow.weight.astype(np.float64)
        self._total += float(np.abs(weight).sum())
        self._lost += float(np.abs(weight[live & ~inside]).sum())
        pair, where = np.unique((a[inside] << 32) | b[inside], return_inverse=True)
        self._entries.append(
            (pair, np.bincount(where, weights=weight[inside], minlength=len(pair)))
        )
        self._add_ledger(attribution, codes, np.where(inside, weight, 0.0), weight)

    def _add_ledger(
        self, attribution: Attribution, codes: np.ndarray, kept: np.ndarray, weight: np.ndarray
    ) -> None:
        flow = attribution.flow
        row = flow.row
        in_sum = np.bincount(row, weights=kept, minlength=len(flow.target))
        whole = np.bincount(row, weights=weight, minlength=len(flow.target))
        ids = list(self._codes)
        columns = (in_sum, flow.constant, flow.dropped, whole - in_sum, flow.value)
        for number, values in zip(flow.target, np.stack(columns, axis=1), strict=True):
            if codes[number] >= 0:
                name = ids[codes[number]]
                self._ledger[name] = self._ledger.get(name, np.zeros(len(_LEDGER))) + values

    def _name(self, node: Node, at: Mapping[int, str], order: int | None) -> str | None:
        place = at.get(node.position)
        if place is None:
            if self.drop:
                return None
            place = OTHER
        if node.kind in ("logit", "logit_diff"):  # its tokens differ from prompt to prompt
            return f"{node.kind}{'' if order is None else f':{order}'}@{place}"
        if node.kind == "score":
            key = at.get(-1 if node.key is None else node.key, OTHER)
            side = "" if node.label is None else f":{node.label}"
            return f"score:{node.layer}.{node.head}:{key}{side}@{place}"
        return f"{str(node).rsplit('@', 1)[0]}@{place}"

    def finish(
        self, settings: Mapping[str, Any] | None = None, pairs: str | None = None
    ) -> AlignedAttribution:
        """What has been taken in so far."""
        every = np.concatenate([pair for pair, _ in self._entries])
        pair, edge = np.unique(every, return_inverse=True)
        counts = [len(found) for found, _ in self._entries]
        return AlignedAttribution(
            roles=self.roles,
            node_ids=tuple(self._codes),
            targets=tuple(self._targets),
            source=pair >> 32,
            target=pair & 0xFFFFFFFF,
            prompt=np.repeat(np.arange(len(counts)), counts),
            edge=edge,
            weight=np.concatenate([weight for _, weight in self._entries]),
            n_prompts=len(counts),
            node_table={name: tuple(row) for name, row in self._nodes.items()},
            ledger_table={name: tuple(row.tolist()) for name, row in self._ledger.items()},
            dropped=self._lost / self._total if self._total else 0.0,
            settings=dict(settings or {}),
            pairs=pairs,
        )


# -- statistics ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Entries:
    prompt: np.ndarray
    edge: np.ndarray
    weight: np.ndarray
    n_prompts: int
    n_edges: int

    def blocks(self, width: int) -> Iterator[np.ndarray]:
        """``[prompt, edge]`` with absent edges 0, some edges at a time."""
        order = np.argsort(self.edge, kind="stable")
        edge = self.edge[order]
        for first in range(0, self.n_edges, width):
            a, b = np.searchsorted(edge, [first, first + width])
            at = order[a:b]
            block = np.zeros((self.n_prompts, min(width, self.n_edges - first)))
            block[self.prompt[at], self.edge[at] - first] = self.weight[at]
            yield block


def _entries(one: AlignedAttribution | _Entries) -> _Entries:
    if isinstance(one, _Entries):
        return one
    return _Entries(one.prompt, one.edge, one.weight, one.n_prompts, len(one.source))


def _statistics(
    first: AlignedAttribution | _Entries,
    second: AlignedAttribution | _Entries | None,
    level: float,
    resamples: int,
    seed: int,
    paired: bool = False,
) -> dict[str, np.ndarray]:
    """Columns of a table: of one set, or of the difference of two."""
    if not 0 < level < 1:
        raise InputError(f"level={level}: expected a share between 0 and 1")
    if resamples < 1:
        raise InputError(f"resamples={resamples}: expected at least 1")
    a = _entries(first)
    b = None if second is None else _entries(second)
    rng = np.random.default_rng(seed)
    draw_a = _draws(rng, a.n_prompts, resamples)
    draw_b = None if b is None or paired else _draws(rng, b.n_prompts, resamples)
    tail = [(1 - level) / 2, (1 + level) / 2]
    width = max(1, _DENSE // max(resamples, a.n_prompts))
    found: dict[str, list[np.ndarray]] = {}

    def keep(**columns: np.ndarray) -> None:
        for name, column in columns.items():
            found.setdefault(name, []).append(column)

    others = iter(()) if b is None else b.blocks(width)
    for x in a.blocks(width):
        if b is None:
            low, high = np.quantile(draw_a @ x, tail, axis=0)
            keep(mean=x.mean(0), se=_error(x), low=low, high=high, present=(x != 0).mean(0))
            continue
        y = next(others)
        difference = x.mean(0) - y.mean(0)
        if paired:
            resampled, se = draw_a @ (x - y), _error(x - y)
        else:
            assert draw_b is not None
            resampled = draw_a @ x - draw_b @ y
            se = np.sqrt(_error(x) ** 2 + _error(y) ** 2)
        low, high = np.quantile(resampled, tail, axis=0)
        keep(first=x.mean(0), second=y.mean(0), difference=difference, se=se, low=low, high=high)
        keep(present_first=(x != 0).mean(0), present_second=(y != 0).mean(0))
    return {name: np.concatenate(columns) for name, columns in found.items()}


def _draws(rng: np.random.Generator, n: int, resamples: int) -> np.ndarray:
    """Weights of each prompt in each resample, NaN where one prompt tells nothing of spread."""
    if n == 1:
        return np.full((resamples, 1), np.nan)
    return rng.multinomial(n, np.full(n, 1 / n), size=resamples) / n


def _error(x: np.ndarray) -> np.ndarray:
    """Standard error of the mean."""
    n = len(x)
    return np.full(x.shape[1], np.nan) if n == 1 else x.std(0, ddof=1) / np.sqrt(n)


def _edge_frame(
    ids: Sequence[str], source: np.ndarray, target: np.ndarray, columns: Mapping[str, np.ndarray]
) -> pd.DataFrame:
    names = pd.Index(ids)
    frame = pd.DataFrame(
        {
            "source": pd.Categorical.from_codes(source, categories=names),
            "target": pd.Categorical.from_codes(target, categories=names),
            **columns,
        }
    )
    by = "difference" if "difference" in columns else "mean"
    order = np.argsort(-np.abs(frame[by].to_numpy()), kind="stable")
    return frame.iloc[order].reset_index(drop=True)


def _joined(
    first: AlignedAttribution, second: AlignedAttribution
) -> tuple[list[str], np.ndarray, np.ndarray, _Entries, _Entries]:
    """Both sets over the union of their edges."""
    ids = list(dict.fromkeys((*first.node_ids, *second.node_ids)))
    code = {name: i for i, name in enumerate(ids)}
    keys = []
    for one in (first, second):
        own = np.array([code[name] for name in one.node_ids], dtype=np.int64)
        keys.append((own[one.source] << 32) | own[one.target])
    union = np.unique(np.concatenate(keys))
    a, b = (
        _Entries(
            one.prompt,
            np.searchsorted(union, key)[one.edge],
            one.weight,
            one.n_prompts,
            len(union),
        )
        for one, key in zip((first, second), keys, strict=True)
    )
    return ids, union >> 32, union & 0xFFFFFFFF, a, b


def _check(one: AlignedAttribution) -> None:
    n, m = len(one.node_ids), len(one.source)
    if len(one.target) != m or not len(one.prompt) == len(one.edge) == len(one.weight):
        raise ValueError("its columns differ in length")
    for name, values, top in (
        ("source", one.source, n),
        ("target", one.target, n),
        ("edge", one.edge, m),
        ("prompt", one.prompt, one.n_prompts),
    ):
        if len(values) and not 0 <= values.min() <= values.max() < top:
            raise ValueError(f"{name} points outside the file")


def _plain(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else value
