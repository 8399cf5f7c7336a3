"""Bootstrap intervals against what is known of them."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from sae_attn_plugin.errors import InputError
from sae_attn_plugin.statistics import bootstrap


def test_mean_agrees_with_scipy() -> None:
    values = np.random.default_rng(0).gamma(2.0, size=80)
    ours = bootstrap(values, resamples=20_000)
    theirs = stats.bootstrap((values,), np.mean, n_resamples=20_000, method="percentile", rng=1)
    assert ours.value == pytest.approx(values.mean(), rel=1e-12)
    assert ours.low == pytest.approx(theirs.confidence_interval.low, rel=0.01)
    assert ours.high == pytest.approx(theirs.confidence_interval.high, rel=0.01)


def test_interval_covers_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    hits = 0
    for trial in range(300):
        found = bootstrap(rng.normal(3.0, 2.0, size=60), resamples=500, seed=trial)
        hits += found.low <= 3.0 <= found.high
    assert 0.90 <= hits / 300 <= 0.99


def test_rows_stay_paired() -> None:
    """A fraction of paired columns that is 0.5 in every row has no spread at all."""
    clean = np.random.default_rng(2).normal(5.0, 1.0, size=40)
    rows = np.stack([clean, clean / 2, np.zeros(40)], 1)
    found = bootstrap(rows, lambda m: (m[..., 1] - m[..., 2]) / (m[..., 0] - m[..., 2]))
    assert found.low == pytest.approx(0.5)
    assert found.high == pytest.approx(0.5)


def test_one_sample_has_no_interval() -> None:
    found = bootstrap([2.0])
    assert found.value == 2.0
    assert np.isnan(found.low)
    assert np.isnan(found.high)


@pytest.mark.parametrize("values", [[], [1.0, float("nan")], [[[1.0]]], [[1.0, 2.0]]])
def test_bad_values(values: list) -> None:
    with pytest.raises(InputError):
        bootstrap(values)
