"""The tables of a survey, a few hundred features at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sae_attn_plugin.errors import FileError

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["Columns", "Cursor", "TokenRows", "rounded", "splits"]

_BATCH = 4096  # rows read at once
_BUFFER = 1 << 18  # bytes of a column held while it is read
_LARGEST = 1 << 32

Columns = dict[str, Any]


def key(layer: int, feature: int) -> int:
    return layer * _LARGEST + feature


class Cursor:
    """A table sorted by layer and feature, read once from its start to its end.

    Args:
        path: a parquet file, or a folder of them whose names sort as their rows do.
        columns: to read; ``layer`` and ``feature`` are read besides.
        where: a column and the value it must have, for tables that are sorted only among such rows.

    Raises:
        FileError: no such table, damaged, without one of the columns, or in another order.
    """

    def __init__(
        self, path: Path, columns: Sequence[str], where: tuple[str, Any] | None = None
    ) -> None:
        import pyarrow as pa

        self.path: Path = path
        self.columns: list[str] = list(columns)
        self._where = where
        needed = ["layer", "feature", *columns, *([where[0]] if where else [])]
        try:
            self._batches = _batches(path, needed)
        except (OSError, pa.ArrowException) as error:
            raise FileError(f"cannot read the survey's table {path}: {error}") from error
        self._waiting: list[tuple[pa.RecordBatch, np.ndarray]] = []
        self._last = -1

    def take(self, layer: int, first: int, last: int) -> Columns:
        """The rows of features ``first`` to ``last`` of a layer, and their ``feature`` column.

        Numbers come as arrays, lists as one array of values with their ``splits``. Calls must
        follow the table's order; rows in between are passed over.
        """
        import pyarrow as pa

        low, high = key(layer, first), key(layer, last)
        found: list[pa.RecordBatch] = []
        while True:
            if not self._waiting and not self._read():
                break
            batch, keys = self._waiting.pop()
            start, stop = np.searchsorted(keys, [low, high + 1])
            if stop > start:
                found.append(batch.slice(start, stop - start))
            if stop < len(keys):
                self._waiting.append((batch.slice(stop), keys[stop:]))
                break
        if not found:
            return {}
        table = pa.Table.from_batches(found).combine_chunks()
        return {name: _column(table[name]) for name in ("feature", *self.columns)}

    def _read(self) -> bool:
        import pyarrow as pa
        import pyarrow.compute as pc

        try:
            batch = next(self._batches, None)
        except (OSError, pa.ArrowException) as error:
            raise FileError(f"the survey's table {self.path} is damaged: {error}") from error
        if batch is None:
            return False
        if self._where is not None:
            name, value = self._where
            batch = batch.filter(pc.equal(batch.column(name), value))  # type: ignore[attr-defined]
        layer = batch.column("layer").to_numpy(zero_copy_only=False).astype(np.int64)
        feature = batch.column("feature").to_numpy(zero_copy_only=False).astype(np.int64)
        keys = layer * _LARGEST + feature
        if len(keys):
            if keys[0] < self._last or (np.diff(keys) < 0).any():
                raise FileError(f"the survey's table {self.path} is not in order of its features")
            self._last = int(keys[-1])
        self._waiting.append((batch, keys))
        return True


def _batches(path: Path, columns: list[str]) -> Iterator[pa.RecordBatch]:
    import pyarrow.parquet as pq

    files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    opened = [pq.ParquetFile(file, buffer_size=_BUFFER) for file in files]
    for file, parquet in zip(files, opened, strict=True):
        missing = sorted(set(columns) - set(parquet.schema_arrow.names))
        if missing:
            raise FileError(f"the survey's table {file} has no column {', '.join(missing)}")

    def read() -> Iterator[pa.RecordBatch]:
        for parquet in opened:
            for group in range(parquet.num_row_groups):
                # one iterator for all would keep the read buffers of each
                yield from parquet.iter_batches(_BATCH, row_groups=[group], columns=columns)

    return read()


def _column(column: Any) -> Any:
    import pyarrow as pa

    kind = column.type
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        lists = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
        if isinstance(lists, pa.ChunkedArray):
            lists = pa.concat_arrays(lists.chunks)
        lengths = lists.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
        return lists.flatten().to_numpy(zero_copy_only=False), splits(lengths)
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_dictionary(kind):
        return np.array(column.to_pylist(), dtype=object)
    return column.to_numpy()


def splits(lengths: Any) -> np.ndarray:
    """Where lists of these lengths begin and end: ``[0, ..., sum]``."""
    return np.concatenate([[0], np.cumsum(np.asarray(lengths, dtype=np.int64))])


def rounded(values: Any, digits: int) -> np.ndarray:
    """Numbers to so many significant digits, as float64, whose decimal form is then short."""
    values = np.asarray(values, dtype=np.float64)
    size = np.abs(values)
    usable = np.isfinite(size) & (size > 0)
    exponent = digits - 1 - np.floor(np.log10(np.where(usable, size, 1.0)))
    # 10 ** n is exact for 0 <= n <= 22 alone, so it multiplies or divides, whichever is exact.
    up, down = 10.0 ** np.maximum(exponent, 0), 10.0 ** np.maximum(-exponent, 0)
    return np.where(usable, np.round(values * up / down) / up * down, values)


class TokenRows:
    """The corpus rows that a survey keeps, on disk: a corpus of any size costs no memory.

    Args:
        path: the table of rows, columns ``row`` and ``tokens``. store: a file to fill and map.
    """

    def __init__(self, path: Path, store: Path) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        numbers, lengths, vocabulary = [], [], np.zeros(0, dtype=np.int64)
        try:
            files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
            with open(store, "wb") as file:
                for name in files:
                    parquet = pq.ParquetFile(name)
                    for batch in parquet.iter_batches(_BATCH, columns=["row", "tokens"]):
                        values, ends = _column(batch.column("tokens"))
                        np.asarray(values, dtype=np.int32).tofile(file)
                        numbers.append(batch.column("row").to_numpy(zero_copy_only=False))
                        lengths.append(np.diff(ends))
                        vocabulary = np.union1d(vocabulary, values)
        except (OSError, pa.ArrowException, KeyError) as error:
            raise FileError(f"cannot read the survey's table {path}: {error}") from error
        number = np.concatenate(numbers) if numbers else np.zeros(0, dtype=np.int64)
        ends = splits(np.concatenate(lengths) if lengths else [])
        order = np.argsort(number, kind="stable")
        self._number, self._start, self._stop = number[order], ends[:-1][order], ends[1:][order]
        self._path = path
        self._tokens = (
            np.memmap(store, np.int32, "r").view(np.ndarray) if ends[-1] else np.zeros(0, np.int32)
        )
        self.vocabulary: list[int] = vocabulary.astype(np.int64).tolist()
        """All token ids that occur."""

    def __getitem__(self, row: int) -> np.ndarray:
        at = int(np.searchsorted(self._number, row))
        if at == len(self._number) or self._number[at] != row:
            raise FileError(
                f"the survey's table {self._path} has no row {row}, which is referred to"
            )
        return self._tokens[self._start[at] : self._stop[at]]


def token_table(path: Path) -> dict[int, str]:
    """Strings by token id; none where there is no such table.

    Raises:
        FileError: a damaged table.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not path.exists():
        return {}
    try:
        table = pq.read_table(path, columns=["token", "string"])
    except (OSError, pa.ArrowException, KeyError) as error:
        raise FileError(f"cannot read the survey's table {path}: {error}") from error
    pairs = zip(table["token"].to_pylist(), table["string"].to_pylist(), strict=True)
    return {token: string for token, string in pairs if string is not None}
