"""Repeats: where they are said to be, they are, and nowhere else."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch

from sae_attn_plugin import InputError
from sae_attn_plugin.demo import language
from sae_attn_plugin.tasks import InductionDataset

TOKENIZER = language.build_tokenizer()


def check_repeats(data: InductionDataset) -> None:
    for i in range(len(data.row)):
        row = data.tokens[int(data.row[i])].tolist()
        earlier, later = data.prefix_positions(i)
        assert [row[p] for p in earlier] == [row[p] for p in later]
        assert later[-1] == int(data.destination[i])
        assert earlier[-1] + 1 == int(data.source[i]) < later[-1]
        assert int(data.correct[i]) == row[int(data.source[i])]
        assert earlier[-1] < later[0]
        start = int(data.bos is not None)
        assert earlier[0] >= start
        # No token more repeats.
        if earlier[0] > start and later[0] - 1 > earlier[-1]:
            assert row[earlier[0] - 1] != row[later[0] - 1]


def test_random_repeats() -> None:
    data = InductionDataset.random_repeats(5, TOKENIZER, 0, segment=7, lead=2, gap=3)
    assert data.tokens.shape == (5, 1 + 2 + 7 + 3 + 7)
    assert data.mask.all()
    check_repeats(data)
    assert (data.tokens[:, 0] == 0).all()
    assert not (data.tokens[:, 1:] <= 1).any()  # neither BOS nor UNK
    assert torch.equal(data.tokens[:, 3:10], data.tokens[:, 13:20])
    assert all(len(set(row.tolist())) == 13 for row in data.tokens)
    assert data.prefix.tolist() == [1, 2, 3, 4, 5, 6] * 5
    assert data.destination[:6].tolist() == [13, 14, 15, 16, 17, 18]
    assert data.source[:6].tolist() == [4, 5, 6, 7, 8, 9]
    # Induction is right at every destination.
    nexts = data.tokens[data.row, data.destination + 1]
    assert torch.equal(nexts, data.correct)


def test_prefix_sweep() -> None:
    data = InductionDataset.prefix_sweep(300, 1000, 0, bos=17)
    assert data.tokens.shape == (2700, 128)
    assert (data.tokens[:, 0] == 17).all()
    assert not (data.tokens[:, 1:] == 17).any()
    assert 0 <= int(data.tokens.min()) <= int(data.tokens.max()) < 1000
    assert data.prefix.tolist() == [p for p in range(1, 10) for _ in range(300)]
    assert torch.equal(data.row, torch.arange(2700))
    check_repeats(data)
    # Distinct but for the copy: exactly `prefix` tokens occur twice.
    distinct = torch.tensor([len(set(row.tolist())) for row in data.tokens])
    assert torch.equal(distinct, 128 - data.prefix)
    first = data.source - data.prefix
    second = data.destination - data.prefix + 1
    for p in range(1, 10):
        mine = data.prefix == p
        a, b = first[mine], second[mine]
        assert int(a.min()) >= 1
        assert int(a.max()) <= 98
        assert (b > data.source[mine]).all()
        assert int(data.destination[mine].max()) < 127
        # Draws reach both ends of their range, and its middle is the mean of the first copy's.
        assert int(a.min()) <= 5
        assert int(a.max()) >= 94
        assert float(a.double().mean()) == pytest.approx(49.5, abs=6)
        assert int(b.max()) >= 128 - p - 1 - 3


def test_sweep_draws_every_place() -> None:
    data = InductionDataset.prefix_sweep(400, 40, 0, prefix_lengths=[2], length=19, bos=0)
    pairs = set(zip((data.source - 2).tolist(), (data.destination - 1).tolist(), strict=True))
    # length 19, prefix 2: the first copy starts at 1 to 3, the second after the source to 16.
    assert pairs == {(a, b) for a in (1, 2, 3) for b in range(a + 3, 17)}


def test_from_texts() -> None:
    texts = ["Yesterday John met Mary near the store. John met Tom.", "Then Tom met Tom."]
    data = InductionDataset.from_text(texts, TOKENIZER)
    check_repeats(data)
    assert data.bos == 0
    assert data.mask.sum(1).tolist() == [12 + 1, 5 + 1]
    found = {
        (int(r), int(d), int(s), int(p))
        for r, d, s, p in zip(data.row, data.destination, data.source, data.prefix, strict=True)
    }
    # 0 BOS, 1 Yesterday, 2 John, 3 met, 4 Mary, 5 near, 6 the, 7 store, 8 ., 9 John, 10 met,
    # 11 Tom, 12 .
    assert (0, 9, 3, 1) in found
    assert (0, 10, 4, 2) in found
    assert (0, 12, 9, 1) in found
    assert len([f for f in found if f[0] == 0]) == 3
    longer = InductionDataset.from_text(texts[:1], TOKENIZER, min_prefix=2)
    assert longer.destination.tolist() == [10]
    assert longer.readable(0) == (
        "<|endoftext|>Yesterday[ John met]* Mary* near the store.[ John met] Tom."
    )


def slow_repeats(row: list[int], body: int) -> list[tuple[int, int, int]]:
    """The definition, spelled out."""
    found = []
    for d in range(body, len(row)):
        best = (0, 0)
        for source in range(body + 1, d):
            p = 0
            while (
                source - 1 - p >= body and d - p > source - 1 and row[source - 1 - p] == row[d - p]
            ):
                p += 1
            best = max(best, (p, source))
        if best[0]:
            found.append((d, best[1], best[0]))
    return found


@pytest.mark.parametrize("bos", [None, 0])
def test_token_rows_against_the_definition(bos: int | None) -> None:
    rng = random.Random(0)
    rows = [[0, *(rng.randrange(1, 5) for _ in range(rng.randrange(8, 30)))] for _ in range(30)]
    data = InductionDataset.from_text(rows, bos=bos)
    expected = [
        (i, *found)
        for i, row in enumerate(rows)
        for found in slow_repeats(row, 0 if bos is None else 1)
    ]
    got = torch.stack((data.row, data.destination, data.source, data.prefix), 1).tolist()
    assert [tuple(g) for g in got] == expected
    assert data.lengths.tolist() == [len(row) for row in rows]


def test_arrays_and_windows() -> None:
    row = [3, 4, 5, 3, 4, 6]
    for texts in ([row, row], torch.tensor([row, row]), np.array([row, row])):
        data = InductionDataset.from_text(texts)  # type: ignore[arg-type]
        assert data.prefix.tolist() == [1, 2, 1, 2]
    cut = InductionDataset.from_text([row], length=4)
    assert cut.tokens.tolist() == [row[:4]]
    assert cut.prefix.tolist() == [1]
    assert cut.readable(0) == "[#3] *#4* #5 [#3]"


def test_vocabularies() -> None:
    ids = InductionDataset.random_repeats(3, [5, 6, 7, 8], 0, segment=4, prepend_bos=False)
    assert {t for row in ids.tokens.tolist() for t in row} == {5, 6, 7, 8}
    assert ids.bos is None
    with_bos = InductionDataset.random_repeats(3, 5, 0, segment=4, bos=2)
    assert sorted(set(with_bos.tokens.flatten().tolist())) == [0, 1, 2, 3, 4]
    assert (with_bos.tokens[:, 1:] != 2).all()


def test_reproducible_without_global_state() -> None:
    state = random.getstate()
    makers: list[Any] = [InductionDataset.random_repeats, InductionDataset.prefix_sweep]
    for make in makers:
        first, again, other = (make(4, TOKENIZER, seed) for seed in (1, 1, 2))
        assert torch.equal(first.tokens, again.tokens)
        assert torch.equal(first.repeats(), again.repeats())
        assert not torch.equal(first.tokens, other.tokens)
    assert random.getstate() == state


def test_bad_input() -> None:
    make, sweep = InductionDataset.random_repeats, InductionDataset.prefix_sweep
    text = InductionDataset.from_text
    with pytest.raises(InputError, match="24 distinct tokens are needed"):
        make(1, 20, 0, bos=0)
    with pytest.raises(InputError, match="no BOS id is known"):
        make(1, 100, 0)
    with pytest.raises(InputError, match="expected a tokenizer"):
        make(1, "abc", 0)
    with pytest.raises(InputError, match="segment must be"):
        make(1, 100, 0, segment=1, bos=0)
    with pytest.raises(InputError, match="n must be"):
        make(0, 100, 0, bos=0)
    with pytest.raises(InputError, match="too short for a prefix of 9 tokens; at least 31"):
        sweep(1, 100, 0, length=30, bos=0)
    assert len(sweep(1, 100, 0, length=31, bos=0)) == 9
    with pytest.raises(InputError, match="prefix length must be"):
        sweep(1, 200, 0, prefix_lengths=[0], bos=0)
    with pytest.raises(InputError, match="no prefix length"):
        sweep(1, 200, 0, prefix_lengths=[], bos=0)
    with pytest.raises(InputError, match="expected a list of texts"):
        text("one text")
    with pytest.raises(InputError, match="no tokenizer"):
        text(["a text"])
    with pytest.raises(InputError, match="rows of token ids"):
        text([[0.5, 1.0]])
    with pytest.raises(InputError, match="no repeat of 1 or more"):
        text([[1, 2, 3]])
