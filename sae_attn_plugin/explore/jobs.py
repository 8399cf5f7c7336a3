"""Work done one piece after another, with progress and cancel: one queue, one worker."""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from sae_attn_plugin.errors import InputError, SaeAttnError

__all__ = ["Cancelled", "Job", "Jobs", "Progress"]

State = Literal["queued", "running", "done", "failed", "cancelled"]
Progress = Callable[[float, str], None]  # share done, what is being done; raises Cancelled
Work = Callable[[Progress], Any]

_log = logging.getLogger(__name__)


class Cancelled(Exception):
    """Raised inside work whose job was cancelled."""


class Busy(SaeAttnError):
    """The queue is full."""


@dataclass
class Job:
    """A piece of work. Only :class:`Jobs` changes it, under its lock.

    Attributes:
        share: how much is done, in [0, 1]; what: what is being done.
        result: JSON data, once done; error: a message, once failed.
    """

    id: str
    kind: str
    work: Work | None
    state: State = "queued"
    share: float = 0.0
    what: str = ""
    result: Any = None
    error: str | None = None
    finished: float = 0.0
    cancel: threading.Event = field(default_factory=threading.Event)

    @property
    def is_over(self) -> bool:
        return self.state in ("done", "failed", "cancelled")


class Jobs:
    """A queue and its worker, a thread that ends with the process.

    Args:
        limit: how many jobs may wait; more are refused.
        keep: how many finished jobs are kept for those who asked; keep_seconds: for how long.
    """

    def __init__(self, limit: int = 200, keep: int = 256, keep_seconds: float = 300) -> None:
        self.limit: int = limit
        self.keep: int = keep
        self.keep_seconds: float = keep_seconds
        self._jobs: OrderedDict[str, Job] = OrderedDict()
        self._wake = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="explorer", daemon=True)
        self._thread.start()

    def submit(self, kind: str, work: Work) -> Job:
        """Queue a piece of work.

        Raises:
            Busy: the queue is full.
        """
        with self._wake:
            if sum(job.state == "queued" for job in self._jobs.values()) >= self.limit:
                raise Busy(f"{self.limit} requests wait already; try again in a moment")
            job = Job(secrets.token_hex(8), kind, work)
            self._jobs[job.id] = job
            self._wake.notify()
        return job

    def cancel(self, identifier: str) -> None:
        """Stop a job: at once if it waits, at its next sign of progress if it runs.

        Raises:
            InputError: no such job.
        """
        with self._wake:
            job = self._get(identifier)
            job.cancel.set()
            if job.state == "queued":
                self._finish(job, "cancelled")

    def show(self, identifier: str) -> dict[str, Any]:
        """A job as JSON data; ``ahead`` counts the jobs before it.

        Raises:
            InputError: no such job.
        """
        with self._wake:
            job = self._get(identifier)
            shown: dict[str, Any] = {
                "id": job.id,
                "kind": job.kind,
                "state": job.state,
                "share": job.share,
                "what": job.what,
            }
            if job.state == "queued":
                before = list(self._jobs.values())
                ahead = before[: before.index(job)]
                shown["ahead"] = sum(not other.is_over for other in ahead)
            if job.state == "done":
                shown["result"] = job.result
            if job.error is not None:
                shown["error"] = job.error
            return shown

    def forget(self, identifier: str) -> None:
        """Drop a finished job whose result has arrived."""
        with self._wake:
            if (job := self._jobs.get(identifier)) is not None and job.is_over:
                del self._jobs[identifier]

    def counts(self) -> dict[str, int]:
        """How many jobs wait, run and are kept."""
        with self._wake:
            states = [job.state for job in self._jobs.values()]
        return {state: states.count(state) for state in ("queued", "running", "done")}

    def _get(self, identifier: str) -> Job:
        job = self._jobs.get(identifier)
        if job is None:
            raise InputError("no such request; the server may have started anew since")
        return job

    def _finish(self, job: Job, state: State) -> None:
        job.state, job.finished, job.work = state, time.monotonic(), None
        over = [other for other in self._jobs.values() if other.is_over]
        for i, other in enumerate(over):
            if len(over) - i > self.keep or job.finished - other.finished > self.keep_seconds:
                del self._jobs[other.id]

    def _next(self) -> Job:
        with self._wake:
            while True:
                for job in self._jobs.values():
                    if job.state == "queued":
                        job.state = "running"
                        return job
                self._wake.wait()

    def _run(self) -> None:
        while True:
            job = self._next()

            def progress(share: float, what: str, job: Job = job) -> None:
                if job.cancel.is_set():
                    raise Cancelled
                with self._wake:
                    job.share, job.what = min(max(share, job.share), 1.0), what

            state: State = "failed"
            result, message = None, None
            try:
                assert job.work is not None
                progress(0.0, "starting")
                result = job.work(progress)
                state = "done"
            except Cancelled:
                state = "cancelled"
            except SaeAttnError as error:
                message = str(error)
            except MemoryError:
                message = "out of memory; try a shorter prompt or fewer nodes"
            except Exception as error:
                # A defect: the reader gets a message, the terminal the traceback.
                _log.exception("request of kind %s failed", job.kind)
                message = f"the server could not do this ({type(error).__name__}); see its terminal"
            with self._wake:
                job.result, job.error = result, message
                self._finish(job, state)
