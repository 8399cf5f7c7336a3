"""Rows of token ids to train and measure on: from text, from data sets, from the model itself."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from tqdm.auto import tqdm

from sae_attn_plugin.errors import InputError
from sae_attn_plugin.tokens import need_tokenizer

__all__ = ["Rounds", "StreamedRounds", "read_rows", "row_stream", "sample_rows"]

_READERS = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}
_TEXT_COLUMNS = ("text", "problem")
_TOKEN_COLUMNS = ("tokens", "input_ids")


def row_stream(
    source: str | Path,
    tokenizer: Any,
    context_size: int,
    *,
    prepend_bos: bool = True,
    separator: int | None = None,
    split: str = "train",
) -> Iterator[Int[Tensor, " context"]]:
    """Rows of ``context_size`` tokens from text, one after another.

    Documents are concatenated as sae_lens' ``ActivationsStore`` does it.

    Args:
        source: a file (``.txt`` with one document per line, ``.jsonl`` or ``.parquet`` with a
            ``text`` column), a folder saved by ``datasets``, or the name of a data set on the hub,
            which is streamed. Columns ``tokens`` or ``input_ids`` are taken as they are, cut to
            ``context_size``.
        tokenizer: for text.
        prepend_bos: whether each row starts with BOS.
        separator: token id between two documents, if any.
        split: of a data set with several.

    Raises:
        InputError: no such file or data set, no column with text or tokens, rows too short.
    """
    documents = _open(source, split)
    first = next(iter(documents), None)
    if first is None:
        raise InputError(f"{source} is empty; expected text")
    tokens_in = next((name for name in _TOKEN_COLUMNS if name in first), None)
    if tokens_in is not None:
        if len(first[tokens_in]) < context_size:
            raise InputError(
                f"{source} has rows of {len(first[tokens_in])} tokens, fewer than the context of "
                f"{context_size}"
            )
        return (torch.as_tensor(row[tokens_in][:context_size]).long() for row in documents)
    text_in = next((name for name in _TEXT_COLUMNS if name in first), None)
    if text_in is None:
        raise InputError(
            f"{source} has the columns {', '.join(first)}; expected one of "
            f"{', '.join(_TEXT_COLUMNS + _TOKEN_COLUMNS)}"
        )
    from sae_lens.tokenization_and_batching import concat_and_batch_sequences

    tokenizer = need_tokenizer(tokenizer)
    if prepend_bos and tokenizer.bos_token_id is None:
        raise InputError("prepend_bos=True, but the tokenizer has no BOS token")

    def encoded() -> Iterator[Tensor]:
        for row in documents:
            ids = tokenizer(row[text_in], add_special_tokens=False)["input_ids"]
            if ids:
                yield torch.tensor(ids, dtype=torch.long)

    return concat_and_batch_sequences(
        encoded(),
        context_size,
        begin_batch_token_id=tokenizer.bos_token_id if prepend_bos else None,
        sequence_separator_token_id=separator,
    )


def read_rows(
    source: str | Path,
    tokenizer: Any,
    context_size: int,
    *,
    prepend_bos: bool = True,
    separator: int | None = None,
    limit: int | None = None,
) -> Int[Tensor, "row context"]:
    """The rows of :func:`row_stream`, at most ``limit`` of them, as one tensor."""
    stream = row_stream(
        source, tokenizer, context_size, prepend_bos=prepend_bos, separator=separator
    )
    rows = list(itertools.islice(stream, limit))
    if not rows:
        raise InputError(
            f"{source} does not fill a single row of {context_size} tokens; give more text or a "
            "shorter context"
        )
    return torch.stack(rows)


def sample_rows(
    model: Any, n: int, length: int, *, seed: int = 0, at_once: int = 128, progress: bool = True
) -> Int[Tensor, "n length"]:
    """Rows that a Hugging Face model writes itself after BOS, at temperature 1.

    Args:
        model: the bare model.
        n, length: how many rows, of how many tokens with BOS.
        seed: the same rows each time, on the same machine. The global generator is left alone.
        at_once: rows written side by side.
    """
    bos = model.config.bos_token_id
    if bos is None:
        raise InputError("the model has no BOS token to write from; give text instead")
    limit = getattr(model.config, "max_position_embeddings", length)
    if not 2 <= length <= limit:
        raise InputError(f"rows of {length} tokens; expected 2..{limit}, the model's context")
    rows, bar = [], tqdm(total=n, desc="sampling text", unit="row", disable=not progress)
    with torch.random.fork_rng(), torch.no_grad(), bar:
        torch.manual_seed(seed)
        for start in range(0, n, at_once):
            prompt = torch.full((min(at_once, n - start), 1), bos, device=model.device)
            rows.append(
                model.generate(
                    prompt,
                    attention_mask=torch.ones_like(prompt),
                    do_sample=True,
                    top_k=0,
                    top_p=1.0,
                    temperature=1.0,
                    min_new_tokens=length - 1,
                    max_new_tokens=length - 1,
                    pad_token_id=bos,
                )
            )
            bar.update(len(prompt))
    return torch.cat(rows)


class Rounds:
    """Rows in memory, shuffled anew for every epoch, some at a time.

    Calling it with the number of a round gives that round's rows ``[rows_at_once, context]``: the
    same each time, whatever was asked before.
    """

    def __init__(self, rows: Int[Tensor, "row context"], rows_at_once: int, seed: int = 0) -> None:
        if rows.ndim != 2 or not len(rows):
            raise InputError(f"expected rows [row, context], got shape {tuple(rows.shape)}")
        self.rows: Tensor = rows
        self.rows_at_once: int = rows_at_once
        self.seed: int = seed

    def __call__(self, round_: int) -> Int[Tensor, "rows_at_once context"]:
        n = len(self.rows)
        start, stop = round_ * self.rows_at_once, (round_ + 1) * self.rows_at_once
        picked = []
        for epoch in range(start // n, (stop - 1) // n + 1):
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            order = torch.randperm(n, generator=generator)
            picked.append(order[max(start - epoch * n, 0) : stop - epoch * n])
        return self.rows[torch.cat(picked)]


class StreamedRounds:
    """Rows from a stream, some at a time, for text that does not fit in memory.

    A later round is reached by reading on, an earlier one by starting over; when the stream ends it
    starts anew. The same stream gives the same rounds each time.
    """

    def __init__(
        self, stream: Callable[[], Iterable[Int[Tensor, " context"]]], rows_at_once: int
    ) -> None:
        self._stream = stream
        self.rows_at_once: int = rows_at_once
        self._restart()

    def _restart(self) -> None:
        self._next = 0
        self._rows = self._forever()

    def _forever(self) -> Iterator[Tensor]:
        while True:
            found = False
            for row in self._stream():
                found = True
                yield row
            if not found:
                raise InputError("the text does not fill a single row; give more of it")

    def __call__(self, round_: int) -> Int[Tensor, "rows_at_once context"]:
        if round_ < self._next:
            self._restart()
        for _ in range((round_ - self._next) * self.rows_at_once):
            next(self._rows)
        self._next = round_ + 1
        return torch.stack([next(self._rows) for _ in range(self.rows_at_once)])


def _open(source: str | Path, split: str) -> Iterable[dict[str, Any]]:
    """Documents of a source, as dictionaries; can be read more than once."""
    import datasets

    path = Path(source)
    options: Any = {"split": split}
    found: Any
    try:
        if path.is_file():
            reader = _READERS.get(path.suffix.lower())
            if reader is None:
                raise InputError(
                    f"cannot read {path}: expected a file that ends in {', '.join(_READERS)}"
                )
            found = datasets.load_dataset(reader, data_files=str(path), streaming=True, **options)
            return found
        if path.is_dir():
            found = datasets.load_from_disk(str(path))
            found = found[split] if isinstance(found, datasets.DatasetDict) else found
            return found
        if str(source).startswith((".", "/", "~")) or path.suffix.lower() in _READERS:
            raise InputError(f"no such file: {source}")
        found = datasets.load_dataset(str(source), streaming=True, **options)
        return found
    except (OSError, ValueError, ConnectionError, KeyError) as error:
        if isinstance(error, InputError):
            raise
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"cannot read {source}: it is neither a file, nor a folder saved by datasets, nor a "
            f"data set that the hub or the local cache can give ({first})"
        ) from error
