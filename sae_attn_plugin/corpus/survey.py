"""One pass over a corpus: what every feature of every layer does, where from, and with whom.

The pass fills sketches of bounded size (:mod:`sae_attn_plugin.corpus.sketches`) batch by batch. A
folder holds its state between batches, so that a pass can be stopped and gone on with, and in the
end the tables.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Int
from torch import Tensor
from tqdm.auto import tqdm

from sae_attn_plugin.attribution.frozen import algebra_dtype
from sae_attn_plugin.corpus import tables
from sae_attn_plugin.corpus.gather import Gatherer
from sae_attn_plugin.corpus.rows import row_stream
from sae_attn_plugin.corpus.sketches import (
    BINS_PER_OCTAVE,
    RELATIVE_ERROR,
    ROLES,
    Shape,
    Sketch,
    distance_edges,
    merge,
    position_edges,
)
from sae_attn_plugin.dictionaries import chosen_layers
from sae_attn_plugin.errors import FileError, InputError, UnsupportedError
from sae_attn_plugin.evaluation import _excluded
from sae_attn_plugin.io import write_atomically
from sae_attn_plugin.tokens import check_ids, encode_prompt, need_tokenizer

if TYPE_CHECKING:
    from sae_attn_plugin.dictionaries import Dictionary
    from sae_attn_plugin.lens import FeatureLens

__all__ = ["Survey", "load_survey", "merge", "survey"]

FORMAT, VERSION = "sae-attn-survey", 1
_FACTS = "survey.json"
_UNFINISHED = "unfinished"
_PATTERN_BYTES = 2**30  # of all layers in one forward pass
_DEFAULT_CONTEXT = 128

Batches = Callable[[], Iterable[Tensor]]


@dataclass(frozen=True)
class Survey:
    """What :func:`survey` found, read from its folder as it is asked for.

    Tables are DataFrames; ``docs/corpus.md`` names their columns. Those of wide SAEs are large:
    :meth:`table` reads single layers and columns.

    Attributes:
        folder: where it lies.
        facts: model, SAEs, settings, counts, and the edges of bins.
    """

    folder: Path
    facts: Mapping[str, Any] = field(repr=False)

    @property
    def layers(self) -> list[int]:
        return list(self.facts["layers"])

    def table(
        self, name: str, *, layer: int | None = None, columns: Sequence[str] | None = None
    ) -> pd.DataFrame:
        """One table, or the part of it that a layer and some columns are.

        Raises:
            InputError: no such table, or a layer that was not surveyed.
            FileError: its file is missing or damaged.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        if name not in tables.TABLES:
            raise InputError(f"no table {name!r}; there are: {', '.join(tables.TABLES)}")
        if layer is not None and layer not in self.layers:
            known = ", ".join(map(str, self.layers))
            raise InputError(f"layer {layer} was not surveyed; layers: {known}")
        path = self.folder / f"{name}.parquet"
        filters = None if layer is None else [("layer", "==", layer)]
        try:
            found = pq.read_table(path, columns=list(columns) if columns else None, filters=filters)
        except (OSError, pa.ArrowException) as error:
            raise FileError(f"cannot read {path}: {error}") from error
        return found.to_pandas()

    @functools.cached_property
    def features(self) -> pd.DataFrame:
        """One row per feature: how often and how strongly it fires."""
        return self.table("features")

    @functools.cached_property
    def heads(self) -> pd.DataFrame:
        """One row per feature and head: shares of the decoder and of DFA."""
        return self.table("heads")

    @functools.cached_property
    def examples(self) -> pd.DataFrame:
        """The strongest firings of each feature, and a uniform sample, with their DFA."""
        return self.table("examples")

    @functools.cached_property
    def cofiring(self) -> pd.DataFrame:
        """Features of a layer that fire together, in the sample of positions."""
        return self.table("cofiring")

    @functools.cached_property
    def logits(self) -> pd.DataFrame:
        """Tokens that a feature's decoder adds to most and least."""
        return self.table("logits")

    @functools.cached_property
    def sample(self) -> pd.DataFrame:
        """All features active at the drawn positions."""
        return self.table("sample")

    @functools.cached_property
    def positions(self) -> pd.DataFrame:
        """The drawn positions."""
        return self.table("positions")

    @functools.cached_property
    def positions_profile(self) -> pd.DataFrame:
        """Firings by position."""
        return self.table("positions_profile")

    @functools.cached_property
    def rows(self) -> pd.DataFrame:
        """Tokens of the rows that examples and drawn positions refer to."""
        return self.table("rows")

    @functools.cached_property
    def tokens(self) -> pd.DataFrame:
        """The strings of all tokens in :attr:`rows` and :attr:`logits`."""
        return self.table("tokens")

    def cards(self, folder: str | Path, **options: Any) -> Path:
        """Write a static site with a card for every feature and head; see :func:`cards`."""
        from sae_attn_plugin.feature_cards.build import cards

        return cards(self, folder, **options)


def load_survey(folder: str | Path) -> Survey:
    """Open the folder of a finished survey.

    Raises:
        FileError: no such folder, an unfinished pass, a foreign or damaged file.
    """
    folder = Path(folder)
    path = folder / _FACTS
    if not path.is_file():
        if (folder / _UNFINISHED).is_dir():
            raise FileError(
                f"the survey in {folder} is not finished; go on with the call that began it"
            )
        raise FileError(f"no survey in {folder}: {path} is missing")
    try:
        facts = json.loads(path.read_text())
        found = facts["format"], facts["version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FileError(f"{path} is not the file of a survey, or is damaged ({error})") from error
    if found != (FORMAT, VERSION):
        raise FileError(
            f"{path} is {found[0]} version {found[1]}; this version of the package reads "
            f"{FORMAT} version {VERSION}"
        )
    return Survey(folder, facts)


def survey(
    lens: FeatureLens | Callable[[], FeatureLens],
    data: Tensor | Sequence[Any] | Batches | str | Path,
    folder: str | Path,
    *,
    layers: Sequence[int] | None = None,
    rows_at_once: int = 16,
    keep: int = 20,
    sample: int = 20,
    sources: int = 16,
    positions: int = 32768,
    seed: int = 0,
    context: int | None = None,
    limit: int | None = None,
    exclude_tokens: bool | Sequence[int] | None = None,
    cofiring: int = 10,
    logits: int = 10,
    checkpoint_every: int = 100,
    workers: int = 0,
    shards: int | None = None,
    address: str | None = None,
    ray_options: Mapping[str, Any] | None = None,
    resume: bool = True,
    progress: bool = True,
) -> Survey:
    """Survey every feature of every layer over a corpus, in one pass.

    Each token goes through the model once, for all layers and heads. Memory is bounded by the
    number of features times ``keep + sample``, and by ``positions``, whatever the corpus' length.

    Args:
        lens: a model with SAEs on z; with ``workers``, a function without arguments that makes it,
            such as a :class:`~sae_attn_plugin.corpus.shards.LensRecipe`.
        data: token ids ``[row, position]``; a list of texts or of rows of token ids; a function
            without arguments that gives batches ``[row, position]`` one after another, the same
            each time it is called; or what :func:`~sae_attn_plugin.corpus.rows.row_stream` reads: a
            file, a folder saved by ``datasets``, a data set on the hub.
        folder: for the result, and for the state of an unfinished pass.
        layers: default: all with an SAE.
        rows_at_once: rows in one forward pass, fewer where the attention patterns of all layers
            would take more than 1 GiB.
        keep: strongest firings kept of each feature; sample: firings drawn uniformly of each.
        sources: source positions kept of each of these firings, by size of their DFA.
        positions: drawn uniformly from the corpus, with all features active there.
        seed: of what is drawn.
        context: tokens in a row, for text; default: 128, or the model's context where that is
            less. Texts are then joined to rows as documents; without it, a list of texts must have
            one length.
        limit: rows to read at most.
        exclude_tokens: positions that hold one of these tokens are not counted, as in
            :func:`~sae_attn_plugin.evaluate`.
        cofiring: partners kept of each feature; logits: tokens kept on each side.
        checkpoint_every: batches between writes of the state.
        workers: tasks of Ray that share the work, each with a model of its own; 0: this process
            alone. Counts and samples are the same either way, sums up to rounding.
        shards: parts of the corpus, with workers; default: four for each worker, and of data whose
            length is not known parts of 64 batches.
        address: of a Ray cluster; default: this machine. ray_options: of Ray's tasks, such as
            ``{"num_gpus": 1}``.
        resume: go on where an earlier call of the same settings and data was stopped; False: start
            anew.
        progress: show a progress bar.

    Returns:
        The survey, written to ``folder``.

    Raises:
        InputError: empty data, rows of unequal length, numbers out of range, NaN in the model.
        UnsupportedError: an SAE that does not read z.
        FileError: a folder that holds something else, or a survey of other settings.
    """
    make_lens = None
    if callable(lens):
        make_lens, lens = lens, lens()
    if workers and make_lens is None:
        raise InputError(
            "with workers=, give a function that makes the lens instead of the lens: every worker "
            "makes its own (sae_attn_plugin.corpus.shards.LensRecipe is such a function)"
        )
    if not workers and (shards, address, ray_options) != (None, None, None):
        raise InputError("shards=, address= and ray_options= go with workers=")
    plan = make_plan(
        lens,
        layers=layers,
        rows_at_once=rows_at_once,
        keep=keep,
        sample=sample,
        sources=sources,
        positions=positions,
        seed=seed,
        exclude_tokens=exclude_tokens,
        cofiring=cofiring,
        logits=logits,
    )
    if checkpoint_every < 1:
        raise InputError(f"checkpoint_every={checkpoint_every}: expected at least 1")
    corpus = Corpus(lens, data, context, limit, plan.bos)
    plan = plan.of(corpus.context)
    work = Work(Path(folder), plan.settings, resume)
    if work.finished is not None:
        work.check_data(corpus.rows())
        return work.finished
    work.check_kind(bool(workers))
    if make_lens is not None and workers:
        from sae_attn_plugin.corpus.shards import survey_shards

        return survey_shards(
            make_lens, plan, corpus, work, workers=workers, shards=shards, address=address,
            ray_options=ray_options, progress=progress,
        )  # fmt: skip
    sketch = plan.sketch()
    gather = plan.gatherer()
    spool = Spool(work.folder / "tokens.bin", corpus.context)
    first_row = work.restore(sketch, spool)
    stream = corpus.rows()
    spool.check(stream, first_row)
    with tqdm(
        total=corpus.n_rows,
        initial=first_row,
        desc="surveying",
        unit="row",
        disable=not progress,
    ) as bar:
        for number, tokens in enumerate(batches(stream, plan.rows_at_once), 1):
            gather(sketch, tokens, first_row)
            spool.append(tokens)
            first_row += len(tokens)
            bar.update(len(tokens))
            if number % checkpoint_every == 0:
                work.save(sketch, spool)
    if not sketch.rows:
        raise InputError("the data is empty; expected at least one row")
    return finish(plan, sketch, [spool], work, progress)


# -- what is asked for -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """A survey's settings, checked; ``context`` is known once the data is."""

    lens: FeatureLens
    dictionaries: Mapping[int, Dictionary]
    rows_at_most: int
    keep: int
    sample: int
    sources: int
    n_positions: int
    seed: int
    excluded: tuple[int, ...]
    cofiring: int
    logits: int
    context: int = 0

    @property
    def bos(self) -> bool:
        return self.lens.prepend_bos

    def of(self, context: int) -> Plan:
        import dataclasses

        return dataclasses.replace(self, context=context)

    @property
    def rows_at_once(self) -> int:
        g = self.lens.backend.geometry
        pattern = g.n_heads * self.context**2 * g.dtype.itemsize * len(self.dictionaries)
        return max(1, min(self.rows_at_most, _PATTERN_BYTES // pattern))

    @property
    def shape(self) -> Shape:
        return Shape(
            context=self.context,
            n_heads=self.lens.backend.geometry.n_heads,
            d_sae={layer: d.d_sae for layer, d in self.dictionaries.items()},
            keep=self.keep,
            sample=self.sample,
            sources=min(self.sources, self.context),
            positions=self.n_positions,
        )

    @property
    def settings(self) -> dict[str, Any]:
        """What makes two surveys of the same data the same."""
        fingerprints = self.lens.provenance["fingerprints"]
        return {
            "context": self.context,
            "layers": list(self.dictionaries),
            "rows_at_once": self.rows_at_once,
            "keep": self.keep,
            "sample": self.sample,
            "sources": self.sources,
            "positions": self.n_positions,
            "seed": self.seed,
            "exclude_tokens": list(self.excluded),
            "cofiring": self.cofiring,
            "logits": self.logits,
            "dtype": str(self.lens.backend.geometry.dtype).removeprefix("torch."),
            "backend": self.lens.backend.host,
            "model": fingerprints["model"],
            "saes": {str(n): fingerprints["saes"][str(n)] for n in self.dictionaries},
        }

    def sketch(self) -> Sketch:
        g = self.lens.backend.geometry
        return Sketch(self.shape, self.seed, algebra_dtype(g.dtype), g.device)

    def gatherer(self) -> Gatherer:
        return Gatherer(
            self.lens.backend,
            self.dictionaries,
            self.context,
            self.shape.sources,
            self.seed,
            self.excluded,
        )


def make_plan(
    lens: FeatureLens,
    *,
    layers: Sequence[int] | None,
    rows_at_once: int,
    keep: int,
    sample: int,
    sources: int,
    positions: int,
    seed: int,
    exclude_tokens: bool | Sequence[int] | None,
    cofiring: int,
    logits: int,
) -> Plan:
    """Settings, checked."""
    for name, value, least in (
        ("rows_at_once", rows_at_once, 1),
        ("keep", keep, 1),
        ("sample", sample, 1),
        ("sources", sources, 1),
        ("positions", positions, 1),
        ("cofiring", cofiring, 0),
        ("logits", logits, 0),
    ):
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise InputError(f"{name}={value!r}: expected an integer of at least {least}")
    if not -(2**63) <= seed < 2**63:
        raise InputError(f"seed={seed}: expected a number of 64 bits")
    dictionaries = {n: lens.dictionaries[n] for n in chosen_layers(lens.dictionaries, layers)}
    for layer, dictionary in dictionaries.items():
        if dictionary.reads != "z":
            raise UnsupportedError(
                f"a survey needs SAEs on hook_z; that of layer {layer}, {dictionary.sae_id!r}, is "
                f"on hook_{dictionary.reads}; give layers= without it"
            )
    excluded = tuple(_excluded(lens, dictionaries, exclude_tokens))
    return Plan(
        lens, dictionaries, rows_at_once, keep, sample, sources, positions, seed, excluded,
        cofiring, logits,
    )  # fmt: skip


# -- data ------------------------------------------------------------------------------------------


class Corpus:
    """Rows of one length, from whatever a user gives.

    Attributes:
        context: tokens in a row; n_rows: how many rows, where that is known.
    """

    context: int

    def __init__(
        self, lens: FeatureLens, data: Any, context: int | None, limit: int | None, bos: bool
    ) -> None:
        g = lens.backend.geometry
        self._geometry, self._limit = g, limit
        if limit is not None and limit < 1:
            raise InputError(f"limit={limit}: expected at least 1")
        if context is not None and not 2 <= context <= g.n_ctx:
            raise InputError(f"context={context}: expected 2..{g.n_ctx}, the model's context")
        self.n_rows: int | None = None
        for_text = context or min(_DEFAULT_CONTEXT, g.n_ctx)
        if isinstance(data, str | Path):
            need_tokenizer(lens.tokenizer)
            self._source = lambda: row_stream(data, lens.tokenizer, for_text, prepend_bos=bos)
            self.context = for_text
        elif callable(data) and not isinstance(data, Tensor):
            stream: Any = data
            self._source = lambda: itertools.chain.from_iterable(map(self._checked, stream()))
            first = next(iter(self._source()), None)
            if first is None:
                raise InputError("the data is empty; expected at least one row of two tokens")
            self.context = len(first)
        elif isinstance(data, Iterator):
            raise InputError(
                "the data can be read only once, and a survey that is stopped reads it again; give "
                "a list, a tensor, or a function that makes the iterator"
            )
        elif len(data) == 0:
            raise InputError("the data is empty; expected at least one row of two tokens")
        else:
            rows = self._in_memory(lens, data, context, bos)
            self._source = lambda: iter(rows)
            self.context, self.n_rows = rows.shape[1], len(rows)
            if limit is not None:
                self.n_rows = min(limit, len(rows))
        if context is not None and context != self.context:
            raise InputError(
                f"context={context}, but the rows have {self.context} tokens; leave it out, or cut "
                "the rows"
            )
        if self.context < 2:
            raise InputError("rows have one token; attention needs at least two")

    def _in_memory(self, lens: FeatureLens, data: Any, context: int | None, bos: bool) -> Tensor:
        texts = not hasattr(data, "shape") and all(isinstance(text, str) for text in data)
        if texts and context is not None:
            found = list(_joined(lens.tokenizer, data, context, bos))
            if not found:
                raise InputError(
                    f"the texts do not fill a single row of {context} tokens; give more of them or "
                    "a smaller context"
                )
            return torch.stack(found)
        rows = lens._to_rows(data)
        lengths = sorted({len(row) for row in rows})
        if len(lengths) > 1:
            raise InputError(
                f"the rows have {lengths[0]} to {lengths[-1]} tokens; a survey takes rows of one "
                "length (for texts, context= joins them to such rows)"
            )
        return torch.stack(rows)

    def _checked(self, batch: Any) -> Tensor:
        g = self._geometry
        return check_ids(batch, g.d_vocab, g.n_ctx, torch.device("cpu"))

    def rows(self) -> Iterator[Int[Tensor, " context"]]:
        """The rows, from the first."""
        for number, row in enumerate(itertools.islice(self._source(), self._limit)):
            if len(row) != self.context:
                raise InputError(
                    f"row {number} has {len(row)} tokens, those before it {self.context}; a survey "
                    "takes rows of one length"
                )
            if not number:  # all of one source, so the first tells
                self._checked(row)
            yield row.cpu()


def _joined(tokenizer: Any, texts: Sequence[str], context: int, bos: bool) -> Iterator[Tensor]:
    from sae_lens.tokenization_and_batching import concat_and_batch_sequences

    tokenizer = need_tokenizer(tokenizer)
    return concat_and_batch_sequences(
        (torch.tensor(encode_prompt(tokenizer, text, False)) for text in texts if text),
        context,
        begin_batch_token_id=tokenizer.bos_token_id if bos else None,
    )


def batches(rows: Iterator[Tensor], size: int) -> Iterator[Int[Tensor, "row pos"]]:
    """Rows, some at a time."""
    while some := list(itertools.islice(rows, size)):
        yield torch.stack(some)


# -- state -----------------------------------------------------------------------------------------


class Spool:
    """The tokens that went by, in a file: examples refer to some of them in the end."""

    def __init__(self, path: Path, context: int, first_row: int = 0) -> None:
        self.path: Path = path
        self.context: int = context
        self.first_row: int = first_row
        self.n_rows: int = 0
        self.digest: str = hashlib.sha256().hexdigest()  # of all rows so far
        self._hash = hashlib.sha256()

    def start(self, n_rows: int = 0, digest: str | None = None) -> None:
        """Go on after so many rows."""
        self._expected = (n_rows, digest)
        if not n_rows:
            self.path.write_bytes(b"")
        else:
            with open(self.path, "r+b") as file:
                file.truncate(n_rows * self.context * 4)

    def check(self, rows: Iterator[Tensor], n_rows: int) -> None:
        """Read on to where an earlier pass was stopped.

        Raises:
            FileError: other rows than that pass read.
        """
        for row in itertools.islice(rows, n_rows):
            self._hash.update(_bytes(row))
            self.n_rows += 1
        self.digest = self._hash.hexdigest()
        if n_rows and (self.n_rows, self.digest) != self._expected:
            raise FileError(
                f"the survey in {self.path.parent.parent} was begun on other data: its first "
                f"{n_rows} rows are not those given now; give the same data, another folder, or "
                "resume=False to start anew"
            )

    def append(self, tokens: Int[Tensor, "row pos"]) -> None:
        data = _bytes(tokens)
        self._hash.update(data)
        self.digest = self._hash.hexdigest()
        with open(self.path, "ab") as file:
            file.write(data)
        self.n_rows += len(tokens)

    def read(self, rows: Int[np.ndarray, " n"]) -> Int[np.ndarray, "n position"]:
        """The tokens of rows, by their numbers in the corpus."""
        return np.asarray(self._held()[rows - self.first_row])

    def contents(self) -> memoryview:
        """All tokens."""
        return self._held().data.cast("B")

    def _held(self) -> np.memmap:
        return np.memmap(self.path, np.int32, "r", shape=(self.n_rows, self.context))


def _digest(parts: Iterable[bytes | memoryview]) -> str:
    found = hashlib.sha256()
    for part in parts:
        found.update(part)
    return found.hexdigest()


def _bytes(tokens: Tensor) -> bytes:
    return tokens.cpu().int().contiguous().numpy().tobytes()


class Work:
    """The folder of a survey: finished, unfinished or new.

    Attributes:
        finished: the survey, where there is one of these settings.
        folder: of the unfinished state.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], resume: bool) -> None:
        self.root: Path = folder
        self.settings: dict[str, Any] = json.loads(json.dumps(settings))
        self.folder: Path = folder / _UNFINISHED
        self.finished: Survey | None = None
        if folder.exists() and not folder.is_dir():
            raise FileError(f"cannot write to {folder}: it is not a folder")
        if folder.exists() and not resume:
            self._forget()
        if (folder / _FACTS).exists():
            found = load_survey(folder)
            self._same(found.facts["settings"], "holds a survey")
            self.finished = found
        elif self.folder.exists():
            path = self.folder / "settings.json"
            if path.exists():
                self._same(read_json(path), "holds an unfinished survey")
        elif folder.exists() and any(folder.iterdir()):
            raise FileError(f"{folder} is not empty and holds no survey; give another folder")
        if self.finished is None:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise FileError(f"cannot write to {folder}: {error.strerror}") from error
            write_json(self.folder / "settings.json", self.settings)

    def _forget(self) -> None:
        """Remove what an earlier survey left, and nothing else."""
        (self.root / _FACTS).unlink(missing_ok=True)
        for name in tables.TABLES:
            (self.root / f"{name}.parquet").unlink(missing_ok=True)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _same(self, found: Mapping[str, Any], what: str) -> None:
        other = [name for name in self.settings if found.get(name) != self.settings[name]]
        if other:
            name = other[0]
            raise FileError(
                f"{self.root} {what} of other settings: {name} is {found.get(name)!r} there and "
                f"{self.settings[name]!r} here; give the same, another folder, or resume=False to "
                "start anew"
            )

    def check_data(self, rows: Iterator[Tensor]) -> None:
        """Refuse rows that are not those of the finished survey.

        Raises:
            FileError: other rows, or more or fewer of them.
        """
        assert self.finished is not None
        facts = self.finished.facts
        if _digest(map(_bytes, rows)) != facts["data"]:
            raise FileError(
                f"{self.root} holds a survey of other data: {facts['rows']} rows that are not "
                "those given now; open it with load_survey, or give the same data, another folder, "
                "or resume=False to start anew"
            )

    def check_kind(self, sharded: bool) -> None:
        """Refuse to go on with workers where the work was begun without, and the other way."""
        if (self.folder / ("checkpoint.json" if sharded else "shards.json")).exists():
            began, here = (
                ("without", "leave workers= out") if sharded else ("with", "give workers=")
            )
            raise FileError(
                f"the unfinished survey in {self.root} was begun {began} workers; {here}, or "
                "resume=False to start anew"
            )

    def restore(self, sketch: Sketch, spool: Spool) -> int:
        """Bring back the state of an earlier pass; returns how many rows it has seen."""
        path = self.folder / "checkpoint.json"
        if not path.exists():
            spool.start()
            return 0
        facts = read_json(path)
        load_sketch(self.folder, facts["generation"], sketch, facts["sketch"])
        spool.start(facts["rows"], facts["digest"])
        return facts["rows"]

    def save(self, sketch: Sketch, spool: Spool) -> None:
        """Write the state; an earlier one stays until this one is whole."""
        path = self.folder / "checkpoint.json"
        before = read_json(path)["generation"] if path.exists() else -1
        generation = before + 1
        save_sketch(self.folder, generation, sketch.parts())
        facts = {
            "generation": generation,
            "rows": spool.n_rows,
            "digest": spool.digest,
            "sketch": sketch.facts(),
        }
        write_json(path, facts)
        for old in self.folder.glob("*.safetensors"):
            if old.stem.split(".")[-1] != str(generation):
                old.unlink()

    def clean(self) -> None:
        """Remove the unfinished state."""
        shutil.rmtree(self.folder, ignore_errors=True)


def save_sketch(
    folder: Path, generation: int, parts: Iterable[tuple[str, Mapping[str, np.ndarray]]]
) -> None:
    """Write the parts of a sketch, one file for each."""
    from safetensors.numpy import save

    for name, arrays in parts:
        contiguous = {key: np.ascontiguousarray(a) for key, a in arrays.items()}
        path = folder / f"{name}.{generation}.safetensors"
        write_atomically(path, lambda file, held=contiguous: file.write(save(held)))


def load_sketch(folder: Path, generation: int, sketch: Sketch, facts: Mapping[str, int]) -> None:
    """Undo :func:`save_sketch`, into an empty one."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    for name in [*(f"layer-{layer}" for layer in sketch.layers), "positions"]:
        path = folder / f"{name}.{generation}.safetensors"
        try:
            sketch.load_part(name, load_file(path))
        except (OSError, SafetensorError, KeyError) as error:
            raise FileError(
                f"{path} is missing or damaged ({error}); resume=False starts anew"
            ) from error
    for name, value in facts.items():
        setattr(sketch, name, value)


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise FileError(f"{path} is damaged ({error}); resume=False starts anew") from error


def write_json(path: Path, value: Any) -> None:
    text = json.dumps(value, indent=1, allow_nan=False) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


# -- the end ---------------------------------------------------------------------------------------


def finish(
    plan: Plan, sketch: Sketch, spools: Sequence[Spool], work: Work, progress: bool
) -> Survey:
    """Write the tables, then the file that says they are whole."""
    folder, lens = work.root, plan.lens
    sketch.drawn.compact()
    strings = tables.Strings(lens.tokenizer)
    counted = sketch.positions_counted
    if not counted:
        raise InputError("exclude_tokens leaves no position to count")

    def by_layer(make: Callable[[int], Any]) -> Iterator[Any]:
        return (make(layer) for layer in sketch.layers)

    def layer_of(n: int) -> tuple[Any, Any]:
        return sketch.layers[n], plan.dictionaries[n]

    def logits() -> Iterator[Any]:
        yield tables.empty_logits()
        for n, dictionary in plan.dictionaries.items():
            alive = sketch.layers[n].fires.nonzero()[:, 0].numpy(force=True)
            if plan.logits and len(alive):
                yield from tables.logits_table(
                    n, lens.backend, dictionary, alive, plan.logits, strings
                )

    def rows() -> Iterator[Any]:
        reservoirs = [r for x in sketch.layers.values() for r in (x.top, x.sample)]

        def read(some: np.ndarray) -> np.ndarray:
            parts = []
            for spool in spools:
                own = (some >= spool.first_row) & (some < spool.first_row + spool.n_rows)
                if own.any():
                    parts.append(spool.read(some[own]))
            found = np.concatenate(parts) if parts else np.zeros((0, plan.context), np.int32)
            strings(np.unique(found))
            return found

        return tables.rows_tables(tables.rows_in(reservoirs, sketch.drawn), read)

    made: dict[str, Callable[[], Iterator[Any]]] = {
        "features": lambda: by_layer(lambda n: tables.features_table(n, *layer_of(n), counted)),
        "heads": lambda: by_layer(lambda n: tables.heads_table(n, *layer_of(n))),
        "examples": lambda: by_layer(lambda n: tables.examples_table(n, sketch.layers[n])),
        "positions_profile": lambda: by_layer(
            lambda n: tables.positions_profile_table(n, sketch.layers[n])
        ),
        "sample": lambda: by_layer(lambda n: tables.sample_table(n, sketch.drawn)),
        "positions": lambda: iter([tables.positions_table(sketch.drawn)]),
        "cofiring": lambda: by_layer(
            lambda n: tables.cofiring_table(
                n, sketch.drawn, plan.dictionaries[n].d_sae, plan.cofiring
            )
        ),
        "logits": logits,
        "rows": rows,
        "tokens": lambda: iter([strings.table()]),
    }
    with (
        torch.no_grad(),
        tqdm(made.items(), desc="writing tables", unit="table", disable=not progress) as bar,
    ):
        for name, parts in bar:
            bar.set_postfix_str(name)
            tables.write_table(folder / f"{name}.parquet", parts())
    tokenizer = lens.tokenizer
    facts = {
        "format": FORMAT,
        "version": VERSION,
        "settings": work.settings,
        "provenance": json.loads(json.dumps(dict(lens.provenance))),
        **sketch.facts(),
        "positions_counted": counted,
        "positions_by_bin": sketch.positions_by_bin.tolist(),
        "drawn_positions": len(sketch.drawn.place),
        "data": _digest(spool.contents() for spool in spools),
        "layers": list(sketch.layers),
        "n_heads": plan.shape.n_heads,
        "d_sae": {str(n): d.d_sae for n, d in plan.dictionaries.items()},
        "context": plan.context,
        "bos": getattr(tokenizer, "bos_token_id", None),
        "roles": list(ROLES),
        "distance_edges": distance_edges(plan.context),
        "position_edges": position_edges(plan.context),
        "quantiles": tables.QUANTILES,
        "quantile_relative_error": RELATIVE_ERROR,
        "bins_per_octave": BINS_PER_OCTAVE,
    }
    write_json(folder / _FACTS, facts)
    work.clean()
    return load_survey(folder)
