"""The prefix study against the engine's own edges, explicit forward passes and known circuits."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import sae_attn_plugin as sap
from sae_attn_plugin.demo import language
from sae_attn_plugin.errors import FileError, InputError
from sae_attn_plugin.studies import load_study, prefix
from sae_attn_plugin.studies.prefix import _in_text
from sae_attn_plugin.tasks import InductionDataset
from sae_attn_plugin.tasks.induction import fuzzy_classes, prefix_length


@pytest.fixture(scope="module")
def lens() -> sap.FeatureLens:
    """The demo model with an SAE in layer 0 only, so that heads above are writers."""
    saes = sap.demo.load_saes()
    return sap.FeatureLens(sap.demo.load_model("nnsight"), [next(iter(saes.values()))])


@pytest.fixture(scope="module")
def windows() -> torch.Tensor:
    return torch.tensor(language.token_rows(random.Random(3), 24, 96))


@given(st.lists(st.integers(0, 2), min_size=4, max_size=14), st.data())
def test_prefix_length_by_brute_force(row: list[int], data: st.DataObject) -> None:
    at = data.draw(st.integers(2, len(row) - 1))
    source = data.draw(st.integers(1, at))
    body = data.draw(st.integers(0, 1))
    best = 0
    for count in range(1, len(row)):
        earlier, later = range(source - count, source), range(at - count + 1, at + 1)
        if earlier.start < body or later.start < source:
            break
        if all(row[a] == row[b] for a, b in zip(earlier, later, strict=True)):
            best = count
    assert prefix_length(row, at, source, body) == best


def test_fuzzy_classes_ignore_case_and_a_leading_space(lens: sap.FeatureLens) -> None:
    classes = fuzzy_classes(lens.tokenizer, 490)
    ids = lens.tokenizer.convert_tokens_to_ids
    vocabulary = lens.tokenizer.get_vocab()
    pairs = [(word, " " + word.lower()) for word in vocabulary if " " + word.lower() in vocabulary]
    assert len(pairs) > 10
    for one, other in pairs:
        assert classes[ids(one)] == classes[ids(other)]
    assert len(classes.unique()) < 490
    assert (fuzzy_classes(None, 7) == torch.arange(7)).all()


def test_the_sweep_is_attention_and_the_engines_own_edges(lens: sap.FeatureLens) -> None:
    heads = [(1, 3), (1, 5), (3, 0)]
    study = prefix(lens, heads, n=2, prefix_lengths=(1, 3), length=64, seed=4)
    data = InductionDataset.prefix_sweep(
        2, lens.tokenizer, 4, prefix_lengths=(1, 3), length=64, prepend_bos=lens.prepend_bos
    )
    for (layer, head), length in [((1, 3), 1), ((1, 5), 3), ((3, 0), 3)]:
        attention, effect = [], []
        for row in (data.prefix == length).nonzero()[:, 0].tolist():
            at, source = int(data.destination[row]), int(data.source[row])
            run = lens.run(data.tokens[row])
            attention.append(float(run.capture["pattern", layer][0, head, at, source]))
            edges = run.attribute(sap.Logit(int(data.correct[row]), at)).edges
            target = edges["target"].astype(str).str.startswith("logit")
            mine = edges[target & (edges["source"].astype(str) == f"head:{layer}.{head}@{at}")]
            effect.append(float(mine["weight"].sum()))
        table = study.table.set_index(["layer", "head", "prefix"]).loc[(layer, head, length)]
        assert table["attention"] == pytest.approx(sum(attention) / 2, rel=1e-5)
        assert table["attribution"] == pytest.approx(sum(effect) / 2, rel=1e-4, abs=1e-5)


def test_both_hosts_agree(lens: sap.FeatureLens, windows: torch.Tensor) -> None:
    other = sap.demo.load("transformer_lens")
    made = [prefix(x, n=3, length=48, windows=windows, batch_size=7) for x in (lens, other)]
    for name in ("sweep", "corruption", "histogram"):
        ours, theirs = (study.tables[name] for study in made)
        pd.testing.assert_frame_equal(ours, theirs, rtol=1e-4, atol=1e-5)


def test_one_token_is_enough_for_the_induction_circuit_known_on_paper() -> None:
    """Its head 1.0 matches one token: without the token before it still looks at the source, at
    half strength where the token put there happens to be another copy of that one token."""
    lens = sap.demo.circuits.induction().lens()
    bos, a, b, c = range(4)
    rows = torch.tensor([[bos, a, b, c, a, b], [bos, c, a, b, c, a]])
    cut, found = set(), {}
    for seed in range(8):
        found = _in_text(lens, [(1, 0)], rows, torch.arange(4), bos, 0.3, seed)
        assert found["clean"].tolist() == pytest.approx([1.0, 1.0], abs=1e-3)
        cut |= {round(value, 2) for value in found["cut"].tolist()}
    assert cut == {0.5, 1.0}
    assert found["control"].isnan().all()  # no position is free
    # The first hit is the first repeat, of one token.
    assert found["first"].tolist() == [[0, 1], [0, 1]]


def test_a_study_goes_on_where_it_was(
    lens: sap.FeatureLens, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def make(seed: int = 0) -> sap.studies.Study:
        return prefix(
            lens, [(1, 3)], n=2, length=48, seed=seed, batch_size=4, folder=tmp_path / "parts"
        )

    calls, real = [], lens.backend.forward

    def counted(*args: object, **options: object) -> object:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(lens.backend, "forward", counted)
    with pytest.raises(KeyboardInterrupt):
        make()
    first = make()
    assert len(calls) == 3 + 3  # five parts, two of them kept
    pd.testing.assert_frame_equal(first.table, make().table)
    assert len(calls) == 6
    with pytest.raises(FileError, match="other settings"):
        make(seed=1)


def test_files_are_exact(lens: sap.FeatureLens, windows: torch.Tensor, tmp_path: Path) -> None:
    study = prefix(lens, [(0, 7), (1, 3)], n=2, length=48, windows=windows)
    study.save(tmp_path / "prefix.json")
    again = load_study(tmp_path / "prefix.json")
    assert again.settings == study.settings
    for name, table in study.tables.items():
        pd.testing.assert_frame_equal(again.tables[name], table, check_exact=True)
    figure = again.plot()
    lines = figure.axes[0].get_lines()
    assert [line.get_label() for line in lines] == ["0.7", "1.3"]
    for line, (_, rows) in zip(lines, study.table.groupby(["layer", "head"]), strict=True):
        assert np.asarray(line.get_ydata()).tolist() == list(rows["attention"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": [(4, 0)]}, "head 4.0 does not exist"),
        ({"heads": []}, "no head given"),
        ({"min_score": 1.1}, "the best is"),
        ({"heads": [(1, 0)], "length": 20}, "too short"),
        ({"heads": [(1, 0)], "length": 129}, "context"),
        ({"heads": [(1, 0)], "n": 0}, "at least 1"),
        (
            {"heads": [(1, 0)], "length": 48, "windows": torch.zeros(2, 400, dtype=torch.long)},
            "context",
        ),
    ],
)
def test_bad_input(lens: sap.FeatureLens, options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        prefix(lens, **{"n": 2, **options})


@pytest.mark.parametrize("text", ["{", "[]", '{"format": "x"}', '{"format": "sae-attn-study/1"}'])
def test_a_file_that_is_no_study(text: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(FileError):
        load_study(tmp_path / "x.json")
