"""Timing that other work on the machine disturbs little, and peak memory that counts tensors."""

from __future__ import annotations

import ctypes
import gc
import resource
import statistics
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import torch
from torch.utils._python_dispatch import TorchDispatchMode

_MATRIX = 2048
# A call is repeated within its turn for so long: one of a millisecond would mostly time how the
# call before has left the caches.
_TURN = 0.05
_PRODUCTS = ("mm", "bmm", "addmm", "mv", "baddbmm")


def interleaved(
    calls: Mapping[str, Callable[[], Any]],
    rounds: int = 5,
    at_most: float = 120.0,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Median seconds of each call, all of them taking turns (short ones several times in a row).

    Args:
        rounds: how often each is called, after one call that is not counted (if more than once).
        at_most: no further round starts after this many seconds.
        clock: ``time.process_time`` counts processor seconds, which other work disturbs less.
    """
    began = time.perf_counter()
    for call in calls.values() if rounds > 1 else ():
        call()
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start, n, passed = clock(), 0, 0.0
            while passed < _TURN:
                call()
                n, passed = n + 1, clock() - start
            seconds[name].append(passed / n)
        if time.perf_counter() - began > at_most:
            break
    return {name: statistics.median(values) for name, values in seconds.items()}


def large_product() -> Callable[[], Any]:
    """A square matrix product of 17 GFLOP: what the machine can do at best."""
    matrix = torch.randn(_MATRIX, _MATRIX)
    return lambda: matrix @ matrix


LARGE_PRODUCT_FLOP = 2 * _MATRIX**3


class CountFlop(TorchDispatchMode):
    """Counts the floating-point operations of matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.flop = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in _PRODUCTS:
            left = args[1] if name in ("addmm", "baddbmm") else args[0]
            self.flop += 2 * out.numel() * left.shape[-1]
        return out


def peak_memory(call: Callable[[], Any]) -> int:
    """Bytes by which the process grew at its highest while ``call`` ran (Linux)."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before = psutil.Process().memory_info().rss
    kept = call()
    status = Path("/proc/self/status").read_text()
    (peak,) = (int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
    del kept
    return max(0, peak * 1024 - before)


def page_faults(call: Callable[[], Any]) -> int:
    """Page faults of a call, after one that is not counted."""
    call()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    call()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


# mallopt's numbers (malloc.h), and what glibc arrives at by itself where large blocks come and go.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
_USUAL = {_MMAP_THRESHOLD: 32 * 2**20, _TRIM_THRESHOLD: 64 * 2**20, _MMAP_MAX: 65_536}


def in_kept_memory(call: Callable[[], Any]) -> Any:
    """Call with large tensors in memory that malloc keeps from call to call (glibc)."""
    libc = ctypes.CDLL("libc.so.6")
    libc.mallopt(_TRIM_THRESHOLD, 2**31 - 1)
    libc.mallopt(_MMAP_MAX, 0)
    try:
        return call()
    finally:
        for name, value in _USUAL.items():
            libc.mallopt(name, value)


def in_fresh_memory(call: Callable[[], Any]) -> Any:
    """Call with large tensors in pages new from the system (glibc): a new thread's heap has no hole
    to put them in."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(call).result()


def resident() -> tuple[int, int]:
    """Bytes of memory of its own, and of files that are mapped, that are in memory (Linux)."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    status = Path("/proc/self/status").read_text().splitlines()
    found = dict(line.split(":", 1) for line in status)
    own, mapped = (int(found[name].split()[0]) * 1024 for name in ("RssAnon", "RssFile"))
    return own, mapped
