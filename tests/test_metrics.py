"""Metrics against computations by hand, and the demo model's heads on two hosts."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor

import sae_attn_plugin as sap
from sae_attn_plugin.backends.protocol import Site
from sae_attn_plugin.tasks import (
    InductionDataset,
    IOIDataset,
    end_logits,
    head_scores,
    ioi_scores,
    kl_divergence,
    logit_difference,
    metrics,
    probability,
    recovered_fraction,
)
from sae_attn_plugin.tasks.ioi import TEMPLATES

HOSTS = ("nnsight", "transformer_lens")


@pytest.fixture(scope="module")
def lenses() -> dict[str, sap.FeatureLens]:
    return {host: sap.demo.load(host) for host in HOSTS}


def test_logit_difference_and_probability() -> None:
    logits = torch.tensor([[0.0, math.log(3), 0.0], [2.0, 1.0, -1.0]])
    found = logit_difference(logits, torch.tensor([1, 2]), torch.tensor([0, 0]))
    assert found.tolist() == pytest.approx([math.log(3), -3.0])
    assert probability(logits, torch.tensor([1, 0])).tolist() == pytest.approx(
        [0.6, math.exp(2) / (math.exp(2) + math.e + math.exp(-1))]
    )
    assert probability(logits.bfloat16(), torch.tensor([1, 0])).dtype == torch.float32


def test_kl_divergence() -> None:
    clean = torch.tensor([[0.5, 0.25, 0.25], [0.5, 0.5, 0.0]]).log()
    edited = torch.tensor([[0.25, 0.5, 0.25], [0.25, 0.25, 0.5]]).log()
    # 0.5 ln 2 - 0.25 ln 2; ln 2
    expected = [0.25 * math.log(2), math.log(2)]
    assert kl_divergence(clean, edited).tolist() == pytest.approx(expected)
    assert kl_divergence(clean + 3, clean).tolist() == pytest.approx([0, 0], abs=1e-6)
    assert kl_divergence(edited, clean).tolist()[1] == math.inf


def test_recovered_fraction() -> None:
    clean, corrupted = torch.tensor([4.0, 2.0]), torch.tensor([1.0, -3.0])
    assert recovered_fraction(clean, corrupted, clean) == 1
    assert recovered_fraction(clean, corrupted, corrupted) == 0
    # Means 3, -1 and 2: the fraction of means, not the mean of fractions.
    assert recovered_fraction(clean, corrupted, torch.tensor([0.0, 4.0])) == pytest.approx(0.75)


class Played:
    """A backend that returns given patterns, and logits that tell token and position."""

    host = "played"
    tokenizer = None
    revision = None

    def __init__(self, geometry: Any, patterns: dict[tuple[int, ...], Tensor]) -> None:
        self.geometry = geometry
        self.patterns = patterns  # by the tokens of a row: [layer, head, query, key]
        self.calls: list[int] = []

    def layer_weights(self, layer: int) -> Any:
        raise NotImplementedError

    def forward(
        self, tokens: Tensor, edits: Any = None, reads: Iterable[Site] = ()
    ) -> dict[Site, Tensor]:
        assert not edits
        self.calls.append(len(tokens))
        logits = torch.zeros(*tokens.shape, self.geometry.d_vocab)
        size = 1.0 + torch.arange(tokens.shape[1]).expand(tokens.shape)
        logits.scatter_(2, tokens[..., None], size[..., None])
        found = {Site("logits"): logits}
        stacked = [self.patterns.get(tuple(row.tolist())) for row in tokens]
        for site in reads:
            found[site] = torch.stack([p[site.layer] for p in stacked if p is not None])
        return found


@pytest.fixture
def geometry(lenses: dict[str, sap.FeatureLens]) -> Any:
    return replace(lenses["nnsight"].backend.geometry, n_layers=2, n_heads=3, d_vocab=500)


@pytest.mark.parametrize("batch_size", [1, 16])
def test_head_scores_by_hand(geometry: Any, batch_size: int) -> None:
    rows = [[9, 3, 4, 5, 3, 4], [9, 6, 6, 7, 6], [9, 8, 2, 8, 1]]
    generator = torch.Generator().manual_seed(0)
    patterns = {
        tuple(row): torch.rand(2, 3, len(row), len(row), generator=generator) for row in rows
    }
    data = InductionDataset.from_text(rows, bos=9)
    # by row: (destination, source) of every repeat
    repeats = [(0, 4, 2), (0, 5, 3), (1, 4, 3), (2, 3, 2)]
    assert data.repeats().tolist() == [list(r) for r in repeats]
    played = Played(geometry, patterns)
    found = head_scores(played, data, batch_size=batch_size)
    assert list(found.columns) == ["induction", "duplicate_token", "previous_token"]
    before = [(r, q) for r, row in enumerate(rows) for q in range(2, len(row))]
    for layer in range(2):
        for head in range(3):
            at = [patterns[tuple(row)][layer, head] for row in rows]
            expected = {
                "induction": sum(float(at[r][d, s]) for r, d, s in repeats) / 4,
                "duplicate_token": sum(float(at[r][d, s - 1]) for r, d, s in repeats) / 4,
                "previous_token": sum(float(at[r][q, q - 1]) for r, q in before) / len(before),
            }
            assert found.loc[(layer, head)].to_dict() == pytest.approx(expected, abs=1e-6)
    assert max(played.calls) == min(2, batch_size)


def test_batches_fit_the_memory(geometry: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [[9, 3, 4, 3, token] for token in range(10, 30)]
    data = InductionDataset.from_text(rows)
    patterns = {tuple(row): torch.full((2, 3, 5, 5), row[-1] / 30) for row in rows}
    row_bytes = 4 * 5 * (500 + 2 * 3 * 5)
    monkeypatch.setattr(metrics, "_MEMORY", 7 * row_bytes)
    played = Played(geometry, patterns)
    found = head_scores(played, data)
    assert played.calls == [7, 7, 6]
    assert found.to_numpy() == pytest.approx(19.5 / 30)
    monkeypatch.setattr(metrics, "_MEMORY", 1)
    played = Played(geometry, patterns)
    pd.testing.assert_frame_equal(head_scores(played, data), found)
    assert set(played.calls) == {1}


def test_scores_on_ioi_roles(lenses: dict[str, sap.FeatureLens], geometry: Any) -> None:
    data = IOIDataset(2, lenses["nnsight"].tokenizer, 0, templates=TEMPLATES[:1])
    length = int(data.lengths[0])
    patterns = {}
    for i in range(2):
        pattern = torch.zeros(2, 3, length, length)
        s1, s2 = int(data.positions["S1"][i]), int(data.positions["S2"][i])
        pattern[1, 2, s2, s1] = 0.25 + 0.5 * i
        pattern[0, 1, s2, s1 + 1] = 0.125
        patterns[tuple(data.tokens[i].tolist())] = pattern
    found = head_scores(Played(geometry, patterns), data)
    assert found.loc[(1, 2), "duplicate_token"] == 0.5
    assert found.loc[(0, 1), "induction"] == 0.125
    assert found.to_numpy().sum() == 0.625


def test_end_logits_are_in_the_order_of_the_prompts(
    lenses: dict[str, sap.FeatureLens], geometry: Any
) -> None:
    data = IOIDataset(40, lenses["nnsight"].tokenizer, 0)
    logits = end_logits(Played(geometry, {}), data, batch_size=4)
    last = data.tokens[torch.arange(40), data.positions["END"]]
    assert torch.equal(logits.argmax(-1), last)
    assert torch.equal(logits.max(-1).values, data.lengths.float())


def test_demo_model_solves_ioi_on_both_hosts(lenses: dict[str, sap.FeatureLens]) -> None:
    found = []
    for lens in lenses.values():
        data = IOIDataset(200, lens.tokenizer, 0, prepend_bos=lens.prepend_bos)
        scores = ioi_scores(lens, data)
        assert scores.accuracy >= 0.99
        assert scores.preferred >= 0.99
        assert 8 < float(scores.logit_difference.mean()) < 10.5
        run = lens.run(data.texts[0])
        assert torch.equal(run.tokens[0], data.tokens[0, : int(data.lengths[0])])
        expected = run.logits[0, -1, data.correct[0]] - run.logits[0, -1, data.wrong[0]]
        assert float(scores.logit_difference[0]) == pytest.approx(float(expected), abs=1e-4)
        corrupted = ioi_scores(lens, data.abc())
        assert abs(float(corrupted.logit_difference.mean())) < 1
        found.append(scores)
    assert torch.allclose(found[0].logit_difference, found[1].logit_difference, atol=1e-4)
    assert torch.allclose(found[0].probability, found[1].probability, atol=1e-5)


def test_demo_heads_are_found_on_both_hosts(lenses: dict[str, sap.FeatureLens]) -> None:
    frames = []
    for lens in lenses.values():
        data = InductionDataset.random_repeats(64, lens.tokenizer, 0)
        scores = head_scores(lens.backend, data)
        assert set(scores.index[scores["induction"] > 0.75]) == {(1, h) for h in (0, 2, 3, 4, 5)}
        assert scores["induction"].max() < 0.95
        assert scores["previous_token"].idxmax() == (0, 7)
        assert scores.loc[(0, 7), "previous_token"] == pytest.approx(0.9, abs=0.03)
        assert scores["previous_token"].drop((0, 7)).max() < 0.3
        assert scores["duplicate_token"].max() < 0.1
        frames.append(scores)
    pd.testing.assert_frame_equal(*frames, atol=1e-5)


def test_a_plain_model_is_taken(lenses: dict[str, sap.FeatureLens]) -> None:
    lens = lenses["transformer_lens"]
    data = InductionDataset.prefix_sweep(1, lens.tokenizer, 0, prefix_lengths=[3], length=40)
    model = sap.demo.load_model("transformer_lens")
    pd.testing.assert_frame_equal(head_scores(model, data), head_scores(lens, data))


def test_bad_input(lenses: dict[str, sap.FeatureLens]) -> None:
    lens = lenses["transformer_lens"]
    with pytest.raises(sap.InputError, match="context is 128"):
        head_scores(lens, InductionDataset.random_repeats(1, lens.tokenizer, 0, segment=80))
    with pytest.raises(sap.InputError, match=r"must lie in 0\.\.489"):
        head_scores(lens, InductionDataset.from_text([[600, 1, 600, 1]]))
    with pytest.raises(sap.InputError, match="batch_size must be"):
        head_scores(lens, InductionDataset.from_text([[3, 1, 3, 1]]), batch_size=0)
    with pytest.raises(sap.InputError, match="not a model"):
        head_scores(7, InductionDataset.from_text([[3, 1, 3, 1]]))
    with pytest.raises(sap.InputError, match="both average 1"):
        recovered_fraction(torch.ones(2), torch.ones(2), torch.ones(2))
    with pytest.raises(sap.InputError, match="at least one value"):
        recovered_fraction(torch.ones(0), torch.ones(2), torch.ones(2))
    with pytest.raises(sap.InputError, match="one token id for each"):
        probability(torch.zeros(2, 5), torch.tensor([1]))
    with pytest.raises(sap.InputError, match=r"must lie in 0\.\.4"):
        logit_difference(torch.zeros(1, 5), torch.tensor([1]), torch.tensor([5]))
    with pytest.raises(sap.InputError, match="equal shape"):
        kl_divergence(torch.zeros(2, 5), torch.zeros(1, 5))
