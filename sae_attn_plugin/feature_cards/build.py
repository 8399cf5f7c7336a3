"""From a survey's tables to the files of its site."""

from __future__ import annotations

import html
import json
import os
import secrets
import shutil
from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, cached_property
from importlib import resources
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm.auto import tqdm

from sae_attn_plugin.errors import FileError, InputError
from sae_attn_plugin.feature_cards.tables import Columns, Cursor, TokenRows, rounded, token_table
from sae_attn_plugin.graphs.html import inert
from sae_attn_plugin.graphs.html import style as graph_style

if TYPE_CHECKING:
    from sae_attn_plugin.corpus.survey import Survey
    from sae_attn_plugin.studies.result import Study

__all__ = ["cards"]

_FORMAT = "sae-attn-cards"
_VERSION = 1
_MARK = "site.json"
_OWN = {"index.html", "cards.css", "cards.js", "data", _MARK}
_SCRIPTS = ("store.js", "draw.js", "index.js", "head.js", "feature.js", "app.js")
_DIGITS = 6  # of activations; those of DFA by source and head one fewer
_LISTED = 20  # features on a head's card, by each of the two shares
_GRID = 12
_TOKENS = 3  # shown of a feature in lists
_QUANTILES = ("q10", "q25", "q50", "q75", "q90", "q99")
_FEATURE = (
    "fires",
    "density",
    "mean",
    "max",
    *_QUANTILES,
    "dfa_abs",
    "decoder_norm",
    "neuronpedia",
)
_HEAD = ("decoder_share", "dfa", "dfa_abs", "dfa_share", "weighted_share")
_EXAMPLE = (
    "row", "position", "activation", "pre_activation", "dfa_abs", "dfa_rest", "active", "heads",
    "sources", "dfa", "parts", "others", "same",
)  # fmt: skip
_FIRING = (
    "rank", "row", "position", "activation", "pre_activation", "dfa_by_head", "sources", "dfa",
    "dfa_rest", "by_distance", "roles", "dfa_abs", "active",
)  # fmt: skip
_LOGIT = ("rank", "token", "effect")
_CURSORS: dict[str, tuple[str, tuple[str, ...], tuple[str, Any] | None]] = {
    "features": ("features", _FEATURE, None),
    "heads": ("heads", ("head", *_HEAD), None),
    "top": ("examples", _FIRING, ("kind", "top")),
    "sample": ("examples", _FIRING, ("kind", "sample")),
    "cofiring": (
        "cofiring",
        ("other_layer", "other", "together", "fires_sample", "jaccard"),
        None,
    ),
    "raised": ("logits", _LOGIT, ("sign", 1)),
    "lowered": ("logits", _LOGIT, ("sign", -1)),
    "positions": ("positions_profile", ("position_bin", "fires"), None),
}
_PAGE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; script-src 'self' file:; \
style-src 'self' file:; base-uri 'none'; form-action 'none'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta name="referrer" content="no-referrer">
<title>{title}</title>
<link rel="stylesheet" href="cards.css">
</head>
<body>
<div id="cards"></div>
<noscript>These cards are drawn by a script and need JavaScript.</noscript>
<script src="cards.js"></script>
<script src="data/site.js"></script>
<script src="data/tokens.js"></script>
</body>
</html>
"""


def cards(
    survey: Survey | str | Path,
    folder: str | Path,
    *,
    layers: Sequence[int] | None = None,
    features: str | Mapping[int, Iterable[int]] = "live",
    examples: int = 10,
    context: tuple[int, int] = (24, 8),
    families: Study | None = None,
    heads: Study | None = None,
    min_fires: int | None = None,
    labels: Mapping[tuple[int, int], str] | None = None,
    tokenizer: Any = None,
    title: str | None = None,
    per_file: int = 256,
    progress: bool = True,
) -> Path:
    """Write a survey as a static site: an index, a card for each head and for each feature.

    The site opens from its folder, without a server; ``index.html#5/7515`` is a feature,
    ``index.html#5.3`` a head. Tables are read a few hundred features at a time, so memory does not
    grow with their number. The same survey and options give the same bytes.

    Args:
        survey: from :func:`survey` or :func:`load_survey`, or its folder.
        folder: to write. It may be missing or empty, or hold an earlier site, which is replaced
            once the new one is complete.
        layers: to show. None: all of the survey.
        features: ``"live"`` for those that fire, ``"all"``, or the ids by layer.
        examples: of each kind (strongest, sampled) per feature.
        context: tokens shown before and after a firing. Sources that lie outside are shown too,
            with a neighbour on each side.
        families: what ``sap.studies.families`` found, to show and to filter by.
        heads: what ``sap.studies.heads`` found, for how monosemantic heads are.
        min_fires: features with fewer firings are left out of heads' lists and agreement. None: as
            ``heads`` did, else 10.
        labels: a name for features that have one, by ``(layer, feature)``.
        tokenizer: for the tokens' strings. None: those that the survey keeps.
        title: of the site. None: the model's name.
        per_file: features in one data file.
        progress: whether to show a bar.

    Returns:
        The path of ``index.html``.

    Raises:
        InputError: an option out of its range, a layer or feature that the survey does not have.
        FileError: no survey there, a damaged one, or a folder that holds anything else.
    """
    scores, least = _monosemanticity(heads), _least(heads, min_fires)
    _check_options(examples, context, per_file, least)
    source = _Source.open(survey)
    chosen = _chosen(source, layers, features)
    target = _check_folder(Path(folder))
    with _whole(target) as made:
        (made / "data" / "features").mkdir(parents=True)
        store = made / ".rows"
        rows = TokenRows(source.table("rows"), store)
        site = _Site(
            source, rows, made, examples, context, per_file, least, labels or {},
            _Families(families), scores,
        )  # fmt: skip
        bar = tqdm(total=sum(map(len, chosen.values())), unit=" features", disable=not progress)
        with bar:
            for layer, ids in chosen.items():
                site.write_layer(layer, ids, bar)
        site.write_frame(title, tokenizer)
        del rows, site.rows
        store.unlink()
    return target / "index.html"


# -- what is asked for ---------------------------------------------------------------------------


def _check_options(examples: int, context: tuple[int, int], per_file: int, min_fires: int) -> None:
    numbers = {"examples": examples, "per_file": per_file, "min_fires": min_fires}
    for name, value in numbers.items():
        if not isinstance(value, int) or value < 1:
            raise InputError(f"{name} must be at least 1, got {value!r}")
    if len(context) != 2 or not all(isinstance(n, int) and n >= 0 for n in context):
        raise InputError(f"context must be (tokens before, tokens after), got {context!r}")


@dataclass(frozen=True)
class _Source:
    """A survey's folder.

    Attributes:
        facts: what its ``survey.json`` says.
    """

    folder: Path
    facts: Mapping[str, Any]

    @classmethod
    def open(cls, survey: Survey | str | Path) -> _Source:
        folder = Path(survey if isinstance(survey, (str, Path)) else survey.folder)
        path = folder / "survey.json"
        try:
            facts = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise FileError(
                f"{folder} holds no survey: cannot read {path}: {error.strerror}"
            ) from error
        except ValueError as error:
            raise FileError(f"{path} is damaged: {error}") from error
        if not isinstance(facts, dict) or facts.get("format") != "sae-attn-survey":
            raise FileError(f"{path} is no survey's; expected what sap.survey wrote")
        missing = [
            k
            for k in ("n_heads", "layers", "distance_edges", "position_edges", "roles")
            if k not in facts
        ]
        if missing:
            raise FileError(f"{path} is damaged: it does not say {', '.join(missing)}")
        return cls(folder, facts)

    def table(self, name: str) -> Path:
        folder = self.folder / name
        return folder if folder.is_dir() else self.folder / f"{name}.parquet"


def _chosen(
    source: _Source, layers: Sequence[int] | None, features: str | Mapping[int, Iterable[int]]
) -> dict[int, np.ndarray]:
    """The features of the site by layer, in order."""
    if isinstance(features, str) and features not in ("live", "all"):
        raise InputError(f"features must be 'live', 'all' or ids by layer, got {features!r}")
    known = [int(layer) for layer in source.facts["layers"]]
    wanted = known if layers is None else [int(layer) for layer in layers]
    if not isinstance(features, str):
        wanted = [int(layer) for layer in features] if layers is None else wanted
    strange = sorted(set(wanted) - set(known))
    if strange:
        raise InputError(f"the survey has layers {_list(known)}; got {_list(strange)}")
    cursor = Cursor(source.table("features"), ["fires"])
    chosen: dict[int, np.ndarray] = {}
    for layer in sorted(set(wanted)):
        rows = cursor.take(layer, 0, (1 << 31) - 1)
        ids = rows["feature"] if rows else np.zeros(0, dtype=np.int64)
        if features == "live":
            chosen[layer] = ids[rows["fires"] > 0] if rows else ids
            continue
        if features == "all":
            chosen[layer] = ids
            continue
        assert not isinstance(features, str)
        asked = np.unique(np.array(list(features.get(layer, ())), dtype=np.int64))
        unknown = np.setdiff1d(asked, ids)
        if len(unknown):
            raise InputError(f"layer {layer} of the survey has no feature {_list(unknown[:5])}")
        chosen[layer] = asked
    if not sum(map(len, chosen.values())):
        raise InputError("no feature is left to show: none of those asked for fires")
    return chosen


def _list(values: Iterable[Any]) -> str:
    return ", ".join(map(str, values))


class _Families:
    """The families that features belong to, from a study."""

    def __init__(self, study: Study | None) -> None:
        self.names: list[str] = []
        self.of: dict[tuple[int, int], list[list[Any]]] = {}
        if study is None:
            return
        table = study.tables.get("members")
        known = ("family", "score", "score_low", "score_high", "baseline")
        missing = [] if table is None else [c for c in known if c not in table]
        if table is None or missing:
            raise InputError(
                f"families must be what sap.studies.families found, got the study {study.name!r}"
            )
        self.names = sorted(set(table["family"]))
        number = {name: i for i, name in enumerate(self.names)}
        keys = zip(table["layer"], table["feature"], strict=True)
        rows = table[list(known)].itertuples(index=False)
        for (layer, feature), (family, *values) in zip(keys, rows, strict=True):
            entry = [number[family], *_numbers(values, 4)]
            self.of.setdefault((int(layer), int(feature)), []).append(entry)


def _monosemanticity(study: Study | None) -> dict[tuple[int, int], dict[str, Any]]:
    """By head: the score of its top features by DFA, and whether it is called monosemantic."""
    if study is None:
        return {}
    table = study.tables.get("heads")
    known = ("layer", "head", "score_dfa", "monosemantic_dfa", "agreement_low", "agreement_high")
    if table is None or any(column not in table for column in known):
        raise InputError(
            f"heads must be what sap.studies.heads found, got the study {study.name!r}"
        )
    found = {}
    for layer, head, score, called, low, high in table[list(known)].itertuples(index=False):
        numbers = dict(zip(("score", "low", "high"), _numbers([score, low, high], 4), strict=True))
        found[int(layer), int(head)] = {**numbers, "monosemantic": bool(called)}
    return found


def _least(heads: Study | None, min_fires: int | None) -> int:
    """Firings that a feature needs to count for its heads: as the study of heads had it."""
    if heads is None:
        return 10 if min_fires is None else min_fires
    theirs = heads.settings.get("min_fires", 10)
    if min_fires not in (None, theirs):
        raise InputError(f"heads were studied with min_fires={theirs}, got min_fires={min_fires}")
    return theirs


# -- the folder ----------------------------------------------------------------------------------


def _check_folder(folder: Path) -> Path:
    target = Path(os.path.realpath(folder))
    if target.exists() and not target.is_dir():
        raise FileError(f"cannot write {folder}: it is not a folder")
    parent = target.parent
    if not parent.is_dir():
        raise FileError(f"cannot write {folder}: the folder {parent} does not exist")
    if not os.access(parent, os.W_OK):
        raise FileError(f"cannot write {folder}: the folder {parent} is read-only")
    if target.is_dir() and any(target.iterdir()):
        strange = sorted({entry.name for entry in target.iterdir()} - _OWN)
        if strange or not _is_site(target):
            what = f"it holds {_list(strange[:3])}" if strange else "it holds no site of cards"
            raise FileError(
                f"cannot write {folder}: {what}. Give a new or empty folder, or one with an "
                "earlier site"
            )
    return target


def _is_site(folder: Path) -> bool:
    try:
        return json.loads((folder / _MARK).read_text(encoding="utf-8"))["format"] == _FORMAT
    except (OSError, ValueError, KeyError, TypeError):
        return False


@contextmanager
def _whole(target: Path) -> Generator[Path]:
    """A folder to fill, which takes the target's place once it is complete."""
    made = target.with_name(f".{secrets.token_hex(8)}.tmp")
    old = made.with_suffix(".old")
    try:
        made.mkdir()
        yield made
        if target.exists():
            target.rename(old)
        try:
            made.rename(target)
        except OSError:
            if old.exists():
                old.rename(target)
            raise
    except OSError as error:
        if isinstance(error, FileError):
            raise
        raise FileError(f"cannot write {target}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(made, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


@cache
def _asset(name: str) -> str:
    return (resources.files("sae_attn_plugin.feature_cards") / "page" / name).read_text(
        encoding="utf-8"
    )


# -- the data ------------------------------------------------------------------------------------


@dataclass
class _Site:
    source: _Source
    rows: TokenRows
    folder: Path
    examples: int
    context: tuple[int, int]
    per_file: int
    min_fires: int
    labels: Mapping[tuple[int, int], str]
    families: _Families
    scores: Mapping[tuple[int, int], Mapping[str, Any]]
    layers: list[dict[str, Any]] = field(default_factory=list)
    heads: list[dict[str, Any]] = field(default_factory=list)
    used: set[int] = field(default_factory=set)
    fires: int = 0
    _cursors: dict[str, Cursor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._cursors = {
            name: Cursor(self.source.table(table), columns, where)
            for name, (table, columns, where) in _CURSORS.items()
        }

    def write(self, name: str, data: Any) -> None:
        # An expression that is JSON: ASCII, no markup, no way out of the literal.
        text = f"SaeAttnCards.take({json.dumps(name)},{inert(data)});\n"
        (self.folder / "data" / f"{name}.js").write_bytes(text.encode("ascii"))

    # -- a layer ---------------------------------------------------------------------------------

    def write_layer(self, layer: int, ids: np.ndarray, bar: Any) -> None:
        n_heads = int(self.source.facts["n_heads"])
        shares = {name: np.full((len(ids), n_heads), np.nan) for name in _HEAD}
        distances = np.zeros((n_heads, len(self.source.facts["distance_edges"])))
        index: dict[str, list[Any]] = {
            name: []
            for name in ("feature", "fires", "density", "max", "tokens", "families", "label")
        }
        files: list[list[int]] = []
        for start in range(0, len(ids), self.per_file):
            some = ids[start : start + self.per_file]
            tables = {
                name: _Grouped(cursor.take(layer, int(some[0]), int(some[-1])), some)
                for name, cursor in self._cursors.items()
            }
            firings = [_Firings(tables[kind], self.source) for kind in ("top", "sample")]
            records = []
            for i, feature in enumerate(some.tolist()):
                self._fill_shares(shares, start + i, tables["heads"], i)
                record = self._feature(layer, feature, tables, firings, i, distances)
                records.append(record)
                self._index(index, record, firings[0], i)
            for name in _HEAD:
                part = shares[name][start : start + len(some)]
                flat = _numbers(part.ravel(), _DIGITS - 1)
                for i, record in enumerate(records):
                    record["heads"][name] = flat[i * n_heads : (i + 1) * n_heads]
            self.write(f"features/{layer:02d}-{len(files):04d}", {"features": records})
            files.append([int(some[0]), int(some[-1])])
            bar.update(len(some))
        self._finish_layer(layer, ids, index, shares, distances, files)

    def _fill_shares(
        self, shares: Mapping[str, np.ndarray], at: int, table: _Grouped, i: int
    ) -> None:
        rows = table.rows(i)
        which = table.columns["head"][rows].astype(np.int64) if table else []
        for name in _HEAD if len(which) else ():
            shares[name][at, which] = table.columns[name][rows]

    def _index(
        self, index: dict[str, list[Any]], record: dict[str, Any], top: _Firings, i: int
    ) -> None:
        for name in ("feature", "fires", "density", "max"):
            index[name].append(record[name])
        index["tokens"].append(self._top_tokens(top, i))
        index["families"].append([family for family, *_ in record["families"]])
        index["label"].append(record["label"])
        self.fires += record["fires"] or 0

    def _top_tokens(self, top: _Firings, i: int) -> list[int]:
        """The commonest tokens at the strongest firings; among equals, the strongest first."""
        ranked = top.ranked(top.rows(i))
        counts = Counter(int(self.rows[top.row[r]][top.position[r]]) for r in ranked)
        return [token for token, _ in counts.most_common(_TOKENS)]

    def _finish_layer(
        self, layer: int, ids: np.ndarray, index: dict[str, list[Any]],
        shares: Mapping[str, np.ndarray], distances: np.ndarray, files: list[list[int]],
    ) -> None:  # fmt: skip
        decoder, dfa = shares["decoder_share"], shares["dfa_share"]
        measured = np.isfinite(dfa).all(1)
        best = np.where(measured, np.nan_to_num(dfa).argmax(1), -1)
        fires = np.array([n or 0 for n in index["fires"]], dtype=np.float64)
        sizes = np.nan_to_num(shares["dfa_abs"]) * fires[:, None]
        often = np.flatnonzero(measured & (fires >= self.min_fires))
        heads = []
        for head in range(dfa.shape[1]):
            x, y = decoder[measured, head], dfa[measured, head]
            sides = (decoder[often, head], dfa[often, head])
            by = [often[np.lexsort((often, -side))][:_LISTED] for side in sides]
            listed = [
                [[int(i), *_numbers([decoder[i, head], dfa[i, head]], 4)] for i in order]
                for order in by
            ]
            total = sizes.sum()
            card = {
                "agreement": _agreement(*sides),
                "top": int((best == head).sum()),
                "share": _numbers([sizes[:, head].sum() / total], 4)[0] if total else None,
                "by_decoder": listed[0],
                "by_dfa": listed[1],
                "overlap": len(set(by[0].tolist()) & set(by[1].tolist())),
                "distance": _numbers(_parts(distances[head]), 4),
                "grid": _grid(x, y),
            }
            heads.append(card)
            few = [
                [int(ids[i]), index["tokens"][i], index["label"][i]] for i, *_ in card["by_dfa"][:3]
            ]
            card |= self.scores.get((layer, head), {})
            kept = ("agreement", "top", "share", "overlap", "score", "monosemantic")
            self.heads.append(
                {
                    "layer": layer,
                    "head": head,
                    "few": few,
                    **{k: card[k] for k in kept if k in card},
                }
            )
        for tokens in index["tokens"]:
            self.used.update(tokens)
        data = {
            **index,
            "head": best.tolist(),
            "share": _numbers(np.where(measured, np.nan_to_num(dfa).max(1), np.nan), 4),
            "heads": heads,
        }
        self.write(f"layer-{layer:02d}", data)
        self.layers.append(
            {
                "layer": layer,
                "features": len(ids),
                "live": int((fires > 0).sum()),
                "files": files,
                "families": [
                    sum(family in of for of in index["families"])
                    for family in range(len(self.families.names))
                ],
            }
        )

    # -- a feature -------------------------------------------------------------------------------

    def _feature(
        self, layer: int, feature: int, tables: Mapping[str, _Grouped],
        firings: Sequence[_Firings], i: int, distances: np.ndarray,
    ) -> dict[str, Any]:  # fmt: skip
        (values,) = tables["features"].zipped(i, _FEATURE)
        top, sample, profile = self._examples(firings[0], firings[1], i, distances)
        return {
            "feature": feature,
            **dict(zip(_FEATURE, values, strict=True)),
            "label": self.labels.get((layer, feature)),
            "families": self.families.of.get((layer, feature), []),
            "heads": {},
            "top": top,
            "sample": sample,
            **profile,
            "cofiring": [
                list(row) for row in tables["cofiring"].zipped(i, _CURSORS["cofiring"][1])
            ],
            "raised": self._logits(tables["raised"], i),
            "lowered": self._logits(tables["lowered"], i),
            "positions": self._positions(tables["positions"], i),
        }

    def _examples(
        self, top: _Firings, sample: _Firings, i: int, distances: np.ndarray
    ) -> tuple[list[list[Any]], list[list[Any]], dict[str, Any]]:
        strongest, drawn = top.rows(i), sample.rows(i)
        by_distance, whole = sample.by_distance[drawn], sample.sizes[drawn].sum()
        distances += sample.head_parts[drawn].T @ by_distance
        profile = {
            "distance": _numbers(_parts(by_distance.sum(0)), 4),
            "roles": _numbers(sample.roles[drawn].sum(0) / whole, 4) if whole else None,
            "sampled": drawn.stop - drawn.start,
        }
        known: dict[int, dict[int, float]] = {}
        for table, rows in ((top, strongest), (sample, drawn)):
            for r in range(rows.start, rows.stop):
                known.setdefault(table.row[r], {})[table.position[r]] = table.activation[r]
        chosen = sample.spread(drawn, self.examples)
        return (
            [self._example(top, r, known, same) for r, same in self._distinct(top, strongest)],
            [self._example(sample, r, known, 1) for r in chosen],
            profile,
        )

    def _distinct(self, top: _Firings, rows: slice) -> list[tuple[int, int]]:
        """The strongest firings whose texts differ, and how many are like each.

        Corpora repeat themselves: rows that begin alike give equal firings.
        """
        like: dict[tuple[float, bytes], list[int]] = {}
        for r in top.ranked(rows):
            at = top.position[r]
            text = self.rows[top.row[r]][max(at - self.context[0], 0) : at + 1]
            like.setdefault((top.activation[r], text.tobytes()), []).append(r)
        return [(found[0], len(found)) for found in list(like.values())[: self.examples]]

    def _example(
        self, table: _Firings, r: int, known: Mapping[int, Mapping[int, float]], same: int
    ) -> list[Any]:
        row, position, sources = table.row[r], table.position[r], table.sources[r]
        tokens = self.rows[row]
        parts = _shown(position, sources, len(tokens), *self.context)
        found = [[start, tokens[start:stop].tolist()] for start, stop in parts]
        for _, some in found:
            self.used.update(some)
        others = [
            [p, a]
            for p, a in sorted(known[row].items())
            if p != position and any(start <= p < stop for start, stop in parts)
        ]
        return [
            row, position, *(values[r] for values in table.numbers), table.active[r],
            table.dfa_by_head[r], sources, table.dfa[r], found, others, same,
        ]  # fmt: skip

    def _logits(self, table: _Grouped, i: int) -> list[list[Any]]:
        effects = sorted(table.zipped(i, _LOGIT))
        self.used.update(token for _, token, _ in effects)
        return [[token, effect] for _, token, effect in effects]

    def _positions(self, table: _Grouped, i: int) -> list[int]:
        counts = [0] * len(self.source.facts["position_edges"])
        for which, fires in table.zipped(i, ("position_bin", "fires")):
            counts[which] += fires
        return counts

    # -- the rest --------------------------------------------------------------------------------

    def write_frame(self, title: str | None, tokenizer: Any) -> None:
        facts = self.source.facts
        name = title or _unplaced(_provenance(facts).get("model")) or "Feature cards"
        strings = self._strings(tokenizer)
        used = sorted(self.used)
        self.write("tokens", {"ids": used, "strings": [strings.get(t) for t in used]})
        self.write(
            "site",
            {
                "format": _FORMAT,
                "version": _VERSION,
                "title": name,
                "facts": _about(facts),
                "fires": self.fires,
                "n_heads": facts["n_heads"],
                "distances": facts["distance_edges"],
                "roles": facts["roles"],
                "positions_by_bin": facts.get("positions_by_bin"),
                "positions": facts["position_edges"],
                "families": self.families.names,
                "min_fires": self.min_fires,
                "layers": self.layers,
                "heads": self.heads,
                "example": list(_EXAMPLE),
            },
        )
        code = "\n".join([_graph_asset("text.js"), *map(_asset, _SCRIPTS)])
        look = graph_style() + _asset("cards.css")
        shown = "".join(c if c.isprintable() else " " for c in name)
        texts = {
            "index.html": _PAGE.format(title=html.escape(shown)),
            "cards.js": code,
            "cards.css": look,
            _MARK: json.dumps({"format": _FORMAT, "version": _VERSION}) + "\n",
        }
        for file, text in texts.items():
            (self.folder / file).write_bytes(text.encode("utf-8"))

    def _strings(self, tokenizer: Any) -> dict[int, str]:
        if tokenizer is None:
            return token_table(self.source.table("tokens"))
        from sae_attn_plugin.tokens import token_string

        return {token: token_string(tokenizer, token) for token in sorted(self.used)}


def _graph_asset(name: str) -> str:
    return (resources.files("sae_attn_plugin.graphs.html") / name).read_text(encoding="utf-8")


class _Grouped:
    """Rows of a table for some features, by feature."""

    def __init__(self, columns: Columns, features: np.ndarray) -> None:
        self.columns = columns
        at = columns["feature"] if columns else np.zeros(0, dtype=np.int64)
        self._start = np.searchsorted(at, features, side="left")
        self._stop = np.searchsorted(at, features, side="right")

    def __bool__(self) -> bool:
        return bool(self.columns)

    @cached_property
    def values(self) -> dict[str, list[Any]]:
        """The columns as Python values, fractions rounded."""
        return {
            name: _numbers(column, _DIGITS) if column.dtype.kind == "f" else column.tolist()
            for name, column in self.columns.items()
        }

    def rows(self, i: int) -> slice:
        """Of the i-th feature."""
        return slice(int(self._start[i]), int(self._stop[i]))

    def zipped(self, i: int, names: Sequence[str]) -> Iterator[tuple[Any, ...]]:
        """The i-th feature's rows of some columns, as Python values."""
        if not self:
            return iter(())
        rows = self.rows(i)
        return zip(*(self.values[name][rows] for name in names), strict=True)


class _Firings:
    """Firings of one kind of some features, as Python values where they go to a file so."""

    def __init__(self, table: _Grouped, source: _Source) -> None:
        self.rows = table.rows
        self.columns = c = table.columns
        n = len(c["feature"]) if c else 0
        names = ("row", "position", "active")
        self.row, self.position, self.active = (c[k].tolist() if n else [] for k in names)
        names = ("activation", "pre_activation", "dfa_abs", "dfa_rest")
        self.numbers = [_numbers(c[k], _DIGITS) if n else [] for k in names]
        self.activation = self.numbers[0]
        self.sources, self.dfa = _items(c, "sources", None), _items(c, "dfa", _DIGITS - 1)
        self.dfa_by_head = _items(c, "dfa_by_head", _DIGITS - 1)
        heads = np.abs(_matrix(c, "dfa_by_head", n, int(source.facts["n_heads"]), source))
        total = heads.sum(1, keepdims=True)
        self.head_parts = np.divide(heads, total, out=np.zeros_like(heads), where=total > 0)
        self.by_distance = _matrix(c, "by_distance", n, len(source.facts["distance_edges"]), source)
        self.roles = _matrix(c, "roles", n, len(source.facts["roles"]), source)
        self.sizes = np.asarray(c["dfa_abs"] if n else [], dtype=np.float64)

    def ranked(self, rows: slice) -> list[int]:
        ranks = self.columns["rank"][rows] if self.columns else []
        return (rows.start + np.argsort(ranks, kind="stable")).tolist()

    def spread(self, rows: slice, n: int) -> list[int]:
        """At most ``n``, from the strongest to the weakest, evenly among the others."""
        if not self.columns:
            return []
        some = (self.columns[name][rows] for name in ("position", "row", "activation"))
        position, row, activation = some
        order = rows.start + np.lexsort((position, row, -activation))
        if len(order) > n:
            order = order[np.linspace(0, len(order) - 1, n).round().astype(int)]
        return order.tolist()


def _items(columns: Columns, name: str, digits: int | None) -> list[list[Any]]:
    if not columns:
        return []
    values, ends = columns[name]
    flat = values.tolist() if digits is None else _numbers(values, digits)
    at = ends.tolist()
    return [flat[start:stop] for start, stop in pairwise(at)]


def _matrix(columns: Columns, name: str, n: int, width: int, source: _Source) -> np.ndarray:
    if not n:
        return np.zeros((0, width))
    values, ends = columns[name]
    if (np.diff(ends) != width).any():
        raise FileError(
            f"the survey in {source.folder} is damaged: lists in {name!r} of its examples should "
            f"have {width} items"
        )
    return np.asarray(values, dtype=np.float64).reshape(n, width)


def _shown(
    position: int, sources: Sequence[int], length: int, before: int, after: int
) -> list[tuple[int, int]]:
    """Runs of positions: around the firing, and around each source outside."""
    start, stop = max(position - before, 0), min(position + after + 1, length)
    runs = [(max(s - 1, 0), min(s + 2, length)) for s in sources if not start <= s < stop]
    if not runs:
        return [(start, stop)]
    joined: list[tuple[int, int]] = []
    for begin, end in sorted([(start, stop), *runs]):
        if joined and begin <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((begin, end))
    return joined


def _numbers(values: Any, digits: int) -> list[Any]:
    short = rounded(values, digits)
    if np.isfinite(short).all():
        return short.tolist()
    return [value if np.isfinite(value) else None for value in short.tolist()]


def _parts(values: np.ndarray) -> np.ndarray:
    total = values.sum()
    return values / total if total else np.full_like(values, np.nan)


def _agreement(x: np.ndarray, y: np.ndarray) -> float | None:
    """Spearman's rank correlation."""
    if len(x) < 3:
        return None
    import pandas as pd

    a, b = (pd.Series(values).rank().to_numpy() for values in (x, y))
    if a.std() == 0 or b.std() == 0:
        return None
    return float(f"{np.corrcoef(a, b)[0, 1]:.4g}")


def _grid(x: np.ndarray, y: np.ndarray) -> list[int]:
    """Features by decoder share (columns) and DFA share (rows), in steps of one twelfth."""
    edges = np.linspace(0, 1, _GRID + 1)
    counts, _, _ = np.histogram2d(y, x, bins=(edges, edges))
    return counts.astype(np.int64).ravel().tolist()


# -- what the survey says of itself ---------------------------------------------------------------


def _provenance(facts: Mapping[str, Any]) -> Mapping[str, Any]:
    found = facts.get("provenance")
    return found if isinstance(found, dict) else {}


def _about(facts: Mapping[str, Any]) -> list[list[str]]:
    """What was surveyed and how, as lines of text."""
    made = _provenance(facts)
    settings = facts.get("settings") or {}
    saes = made.get("saes") or {}
    origin = _unplaced((made.get("sources") or {}).get("saes"))
    widths = sorted({f"{int(n):,}" for n in (facts.get("d_sae") or {}).values()})
    lines = [
        ("model", _joined(_unplaced(made.get("model")), _said("revision", made.get("revision")))),
        ("SAEs", _joined(origin, _run_of_names(saes), f"{' / '.join(widths)} features each")),
        (
            "corpus",
            _joined(
                _count(facts.get("rows"), "rows"), _count(facts.get("tokens"), "tokens"),
                _said("rows of", facts.get("context")),
            ),
        ),
        (
            "kept of each feature",
            _joined(
                _count(settings.get("keep"), "strongest firings"),
                _count(settings.get("sample"), "drawn uniformly"),
                _said("sources by |DFA|:", settings.get("sources")),
            ),
        ),
        ("computed by", _joined(made.get("backend"), made.get("dtype"), *_versions(made))),
    ]  # fmt: skip
    return [[name, text] for name, text in lines if text]


def _unplaced(name: Any) -> str:
    """A name to show to others: of a local folder only the last part."""
    text = str(name or "")
    return Path(text).name if text.startswith((os.sep, ".", "~")) or Path(text).drive else text


def _joined(*parts: Any) -> str:
    return " · ".join(str(part) for part in parts if part)


def _said(what: str, value: Any) -> str:
    return f"{what} {value}" if value is not None else ""


def _count(n: Any, what: str) -> str:
    return f"{int(n):,} {what}" if isinstance(n, int) else ""


def _run_of_names(saes: Mapping[str, Any]) -> str:
    names = [str(name) for name in saes.values()]
    return " to ".join(dict.fromkeys([*names[:1], *names[-1:]]))


def _versions(made: Mapping[str, Any]) -> list[str]:
    versions = made.get("versions") or {}
    return [f"{name} {versions[name]}" for name in ("sae-attn-plugin", "torch") if name in versions]
