"""Parts of a corpus surveyed by several processes or machines: tasks of Ray.

A shard is a contiguous range of whole batches. Its rows go to a task, its sketch comes back and is
written to the survey's folder before anything else happens to it, so that finished shards outlive
workers and the driver. In the end all are merged, in their order.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tqdm.auto import tqdm

from sae_attn_plugin.corpus.survey import (
    Corpus,
    Plan,
    Spool,
    Survey,
    Work,
    batches,
    finish,
    load_sketch,
    read_json,
    save_sketch,
    write_json,
)
from sae_attn_plugin.errors import BackendError, FileError, InputError, SaeAttnError

if TYPE_CHECKING:
    from sae_attn_plugin.backends.loading import Host
    from sae_attn_plugin.lens import FeatureLens

__all__ = ["LensRecipe", "survey_shards"]

_BATCHES = 64  # in a shard of a stream
_SHARDS_PER_WORKER = 4


@dataclass(frozen=True)
class LensRecipe:
    """How a worker makes the lens: a model and its SAEs by folder or name.

    Attributes:
        model: a folder in Hugging Face format, a hub name, or ``sae-attn-demo``.
        saes: a folder with SAEs, or a sae_lens release.
        backend: ``"transformer_lens"``, ``"transformer_bridge"`` or ``"nnsight"``.
        device, dtype: of the weights.
        prepend_bos: as in :class:`~sae_attn_plugin.FeatureLens`.
    """

    model: str
    saes: str
    backend: Host = "nnsight"
    device: str = "cpu"
    dtype: str = "float32"
    prepend_bos: bool | None = None

    def __call__(self) -> FeatureLens:
        import sae_attn_plugin as sap
        from sae_attn_plugin.registration import DEMO_MODEL_NAME

        if self.model == DEMO_MODEL_NAME:
            model = sap.demo.load_model(self.backend)
        else:
            named = Path(self.model).name if Path(self.model).is_dir() else None
            dtype = getattr(torch, self.dtype)
            model = sap.load_model(self.model, self.backend, self.device, dtype, model_name=named)
        saes = sap.load_saes(self.saes, device=self.device)
        return sap.FeatureLens(model, saes, prepend_bos=self.prepend_bos)


def survey_shards(
    make_lens: Callable[[], FeatureLens],
    plan: Plan,
    corpus: Corpus,
    work: Work,
    *,
    workers: int,
    shards: int | None,
    address: str | None,
    ray_options: Mapping[str, Any] | None,
    progress: bool,
) -> Survey:
    """Survey a corpus by tasks of Ray.

    Args:
        make_lens: called once in every worker process; must make the lens of ``plan``.
        workers: tasks that run at once.
        shards: how many parts; default: four for each worker, and 64 batches in each of a corpus
            whose length is not known.
        address: of a Ray cluster; None: this machine.
        ray_options: of the tasks, such as ``{"num_gpus": 1}``.

    Raises:
        InputError: Ray is not installed, or numbers out of range.
        BackendError: a worker died again and again.
    """
    size = _rows_in_shard(plan, corpus, work, workers, shards)
    spools: list[Spool] = []
    with contextlib.ExitStack() as stack:
        bar = stack.enter_context(
            tqdm(total=corpus.n_rows, desc="surveying", unit="row", disable=not progress)
        )
        tasks = _Tasks(make_lens, plan, workers, address, ray_options, stack)
        for number, tokens in enumerate(_shards(corpus, size)):
            shard = _Shard(work.folder / f"shard-{number:05d}", number * size, len(tokens))
            spools.append(shard.spool(plan.context))
            if shard.is_done(tokens):
                bar.update(shard.n_rows)
                continue
            tasks.submit(shard, tokens)
            for done in tasks.done(wait_above=workers - 1):
                bar.update(done.n_rows)
        for done in tasks.done(wait_above=0):
            bar.update(done.n_rows)
    if not spools:
        raise InputError("the data is empty; expected at least one row")
    sketch = plan.sketch()
    folders = sorted(work.folder.glob("shard-*"))[: len(spools)]
    for folder, spool in zip(
        tqdm(folders, desc="merging", unit="shard", disable=not progress), spools, strict=True
    ):
        facts = read_json(folder / "shard.json")
        part = sketch.empty()
        load_sketch(folder, 0, part, facts["sketch"])
        spool.n_rows = facts["rows"]
        spool.digest = facts["digest"]
        sketch.add(part)
    return finish(plan, sketch, spools, work, progress)


def _rows_in_shard(plan: Plan, corpus: Corpus, work: Work, workers: int, shards: int | None) -> int:
    """Rows in a shard; those of the call that began the survey stay."""
    for name, value in (("workers", workers), ("shards", shards)):
        if value is not None and (not isinstance(value, int) or value < 1):
            raise InputError(f"{name}={value!r}: expected an integer of at least 1")
    path = work.folder / "shards.json"
    if path.exists():
        return int(read_json(path)["rows"])
    if corpus.n_rows is None:
        if shards is not None:
            raise InputError(
                "shards= needs to know how many rows there are; give limit=, or rows in memory"
            )
        n_batches = _BATCHES
    else:
        every = -(-corpus.n_rows // plan.rows_at_once)
        n_batches = -(-every // (shards or _SHARDS_PER_WORKER * workers))
    size = n_batches * plan.rows_at_once
    write_json(path, {"rows": size})
    return size


def _shards(corpus: Corpus, size: int) -> Iterator[torch.Tensor]:
    rows = corpus.rows()
    while some := list(itertools.islice(rows, size)):
        yield torch.stack(some).int()


@dataclass(frozen=True)
class _Shard:
    folder: Path
    first_row: int
    n_rows: int

    def spool(self, context: int) -> Spool:
        return Spool(self.folder / "tokens.bin", context, self.first_row)

    def is_done(self, tokens: torch.Tensor) -> bool:
        path = self.folder / "shard.json"
        if not path.exists():
            return False
        if read_json(path)["digest"] != _digest(tokens):
            raise FileError(
                f"the survey in {self.folder.parents[1]} was begun on other data: rows "
                f"{self.first_row}..{self.first_row + self.n_rows - 1} are not those given now; "
                "give the same data, another folder, or resume=False to start anew"
            )
        return True

    def write(self, result: Mapping[str, Any], tokens: torch.Tensor) -> None:
        """Last of all the file that says it is whole."""
        self.folder.mkdir(exist_ok=True)
        save_sketch(self.folder, 0, result["parts"].items())
        (self.folder / "tokens.bin").write_bytes(tokens.numpy().tobytes())
        facts = {"rows": self.n_rows, "digest": _digest(tokens), "sketch": result["facts"]}
        write_json(self.folder / "shard.json", facts)


def _digest(tokens: torch.Tensor) -> str:
    return hashlib.sha256(tokens.numpy().tobytes()).hexdigest()


class _Tasks:
    """Tasks of Ray, at most so many in flight; Ray itself is started with the first."""

    def __init__(
        self,
        make_lens: Callable[[], FeatureLens],
        plan: Plan,
        workers: int,
        address: str | None,
        options: Mapping[str, Any] | None,
        stack: contextlib.ExitStack,
    ) -> None:
        self._make, self._plan, self._stack = make_lens, plan, stack
        self._workers, self._address = workers, address
        self._options = dict(options or {})
        self._running: dict[Any, tuple[_Shard, torch.Tensor]] = {}
        self._remote: Any = None

    def _start(self) -> Any:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        try:
            import ray
        except ImportError:
            raise InputError(
                "workers= needs Ray, which is not installed: pip install sae-attn-plugin[ray]"
            ) from None
        import logging

        cpus = os.cpu_count() or 1
        if not ray.is_initialized():
            quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
            if self._address is None:
                quiet |= {"num_cpus": max(cpus, self._workers), "include_dashboard": False}
            try:
                ray.init(self._address or "local", **quiet)
            except (ConnectionError, RuntimeError, ValueError) as error:
                first = (str(error).strip().splitlines() or [type(error).__name__])[0]
                raise InputError(
                    f"cannot reach Ray at {self._address or 'this machine'}: {first}"
                ) from error
            self._stack.callback(ray.shutdown)
        if self._address is None:
            self._options.setdefault("num_cpus", max(1, cpus // self._workers))
        # A worker that dies is replaced, and its task run again.
        self._options.setdefault("max_retries", 3)
        self._remote = ray.remote(**self._options)(_survey_rows)
        settings = {
            "layers": list(self._plan.dictionaries),
            "rows_at_once": self._plan.rows_at_most,
            "keep": self._plan.keep,
            "sample": self._plan.sample,
            "sources": self._plan.sources,
            "positions": self._plan.n_positions,
            "seed": self._plan.seed,
            "exclude_tokens": list(self._plan.excluded),
            "cofiring": self._plan.cofiring,
            "logits": self._plan.logits,
        }
        # The recipe travels once; workers tell by its key whether they have made the lens already.
        from ray import cloudpickle

        recipe = cloudpickle.dumps(self._make)  # pyright: ignore[reportPrivateImportUsage]
        known_as = json.loads(json.dumps(self._plan.settings))
        key = hashlib.sha256(recipe).hexdigest() + json.dumps(known_as, sort_keys=True)
        self._shared = (ray.put(recipe), key, settings, known_as)
        return self._remote

    def submit(self, shard: _Shard, tokens: torch.Tensor) -> None:
        remote = self._remote or self._start()
        task = remote.remote(*self._shared, tokens.numpy(), shard.first_row)
        self._running[task] = (shard, tokens)

    def done(self, wait_above: int) -> Iterator[_Shard]:
        """Shards that are finished, written; waits until no more than so many are running."""
        while len(self._running) > wait_above:
            import ray

            ready, _ = ray.wait(list(self._running), num_returns=1)
            for task in ready:
                shard, tokens = self._running.pop(task)
                shard.write(self._result(task, shard), tokens)
                yield shard

    def _result(self, task: Any, shard: _Shard) -> Any:
        import ray
        from ray.exceptions import RayError, RayTaskError

        try:
            return ray.get(task)
        except RayTaskError as error:
            cause = getattr(error, "cause", None)
            if isinstance(cause, SaeAttnError):
                raise cause from None
            raise
        except RayError as error:
            rows = f"rows {shard.first_row}..{shard.first_row + shard.n_rows - 1}"
            raise BackendError(
                f"the worker of {rows} died {self._options['max_retries'] + 1} times "
                f"({type(error).__name__}): out of memory, perhaps. Finished shards are kept; the "
                "same call goes on, with fewer workers or a smaller keep and sample if need be"
            ) from error


_PLANS: dict[str, tuple[Plan, Any]] = {}


def _survey_rows(
    recipe: bytes,
    key: str,
    options: Mapping[str, Any],
    settings: Mapping[str, Any],
    tokens: np.ndarray,
    first_row: int,
) -> dict[str, Any]:
    """What a worker does: the sketch of some rows, as arrays."""
    from sae_attn_plugin.corpus.survey import make_plan

    if key not in _PLANS:
        from ray import cloudpickle

        _PLANS.clear()
        lens = cloudpickle.loads(recipe)()
        plan = make_plan(lens, **options).of(tokens.shape[1])
        mine = json.loads(json.dumps(plan.settings))
        if other := [name for name in mine if mine[name] != settings[name]]:
            name = other[0]
            raise InputError(
                f"a worker made another lens than the driver: {name} is {mine[name]!r} there and "
                f"{settings[name]!r} here; the function that makes it must give the same each time"
            )
        _PLANS[key] = (plan, plan.gatherer())
    plan, gather = _PLANS[key]
    sketch = plan.sketch()
    for some in batches(iter(torch.from_numpy(tokens.astype(np.int64))), plan.rows_at_once):
        gather(sketch, some, first_row)
        first_row += len(some)
    return {"parts": dict(sketch.parts()), "facts": sketch.facts()}
