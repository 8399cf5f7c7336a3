"""Bootstrap intervals: how far a mean, or a function of means, could be off by chance."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sae_attn_plugin.errors import InputError

__all__ = ["NOTHING", "Interval", "bootstrap", "wilson"]

_AT_ONCE = 2**24  # numbers drawn at a time


@dataclass(frozen=True)
class Interval:
    """An estimate with its percentile bootstrap interval; ``low`` and ``high`` are NaN for one
    sample, which tells nothing about spread."""

    value: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.value:.4g} [{self.low:.4g}, {self.high:.4g}]"

    def columns(self, name: str) -> dict[str, float]:
        """``name``, ``name_low`` and ``name_high``, for a row of a table."""
        return {name: self.value, f"{name}_low": self.low, f"{name}_high": self.high}


NOTHING = Interval(float("nan"), float("nan"), float("nan"), 0)
"""The interval of no samples."""


def bootstrap(
    values: npt.ArrayLike,
    statistic: Callable[[np.ndarray], np.ndarray] | None = None,
    *,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap of a mean, or of a function of several means (Efron 1979).

    Rows are resampled whole, so columns of one row stay paired.

    Args:
        values: ``[n]``, or ``[n, columns]``: one row per independent sample (a prompt, a sequence).
        statistic: maps means ``[..., columns]`` to ``[...]``; default: the mean of ``[n]`` itself.
            A recovered fraction is ``lambda m: (m[..., 0] - m[..., 1]) / (m[..., 0] - m[..., 2])``.
        level: of the interval. resamples: drawn with replacement, from ``seed``.

    Raises:
        InputError: no sample, or values that are not finite.
    """
    rows = np.asarray(values, dtype=np.float64)
    if rows.ndim not in (1, 2) or not len(rows):
        raise InputError(f"expected values [n] or [n, columns] with n > 0, got {list(rows.shape)}")
    if not np.isfinite(rows).all():
        raise InputError("the values to resample hold NaN or infinity")
    if rows.ndim == 1:
        rows = rows[:, None]
    if statistic is None:
        if rows.shape[1] > 1:
            raise InputError(f"{rows.shape[1]} columns need a statistic of their means")
        statistic = _first
    n = len(rows)
    value = float(statistic(rows.mean(0)))
    if n == 1:
        return Interval(value, float("nan"), float("nan"), 1)
    rng = np.random.default_rng(seed)
    found = []
    step = max(1, _AT_ONCE // n)
    for start in range(0, resamples, step):
        count = min(step, resamples - start)
        drawn = rng.multinomial(n, np.full(n, 1 / n), size=count)
        with np.errstate(divide="ignore", invalid="ignore"):
            found.append(statistic(drawn @ rows / n))
    tail = (1 - level) / 2
    low, high = np.nanquantile(np.concatenate(found), [tail, 1 - tail])
    return Interval(value, float(low), float(high), n)


def _first(means: np.ndarray) -> np.ndarray:
    return means[..., 0]


def wilson(
    hits: npt.ArrayLike, n: npt.ArrayLike, level: float = 0.95
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Shares ``hits / n`` with Wilson score intervals (Wilson 1927), elementwise.

    Unlike a bootstrap, the interval is not empty where all samples agree. Where ``n`` is 0, all
    three are NaN.

    Returns:
        Share, lower end, upper end.
    """
    from scipy.special import ndtri

    z2 = float(ndtri((1 + level) / 2)) ** 2
    k, n = np.asarray(hits, dtype=np.float64), np.asarray(n, dtype=np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        share = k / n
        middle = (share + z2 / (2 * n)) / (1 + z2 / n)
        half = np.sqrt(z2 * (share * (1 - share) / n + z2 / (4 * n * n))) / (1 + z2 / n)
    low, high = np.where(k == 0, 0.0, middle - half), np.where(k == n, 1.0, middle + half)
    return share, np.where(n > 0, low, np.nan), np.where(n > 0, high, np.nan)
