"""Evaluation: against sae_lens' own run_evals, plain forward passes, and known distributions."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import HOSTS, TINY, hooks_on, on_host, random_sae, tiny_gpt2, word_tokenizer

import sae_attn_plugin as sap
from sae_attn_plugin.errors import FileError, InputError
from sae_attn_plugin.evaluation import METRICS, _Sums, dead_margin
from sae_attn_plugin.graphs.picture import write_png

ROWS = torch.randint(2, 61, (12, 14), generator=torch.Generator().manual_seed(0))
ROWS[:, 0] = 0
ROWS[3, 5] = 0
# Sums over float32 activations in another order: what both measure agrees to 1e-5 of its size.
AGREE = 1e-5


def lens_of(kind: str = "gpt2", host: str = "nnsight", **config: Any) -> Any:
    model = TINY[kind]()
    d_in = {"gpt2": 30, "llama": 48}[kind]
    saes = [random_sae(layer, d_in, **config) for layer in (0, 2)]
    hosted = on_host(model, host, word_tokenizer())
    return sap.FeatureLens(hosted, saes, tokenizer=word_tokenizer())


@cache
def evaluated(kind: str, host: str) -> sap.Evaluation:
    options: dict[str, Any] = {"rows_at_once": 5, "resamples": 50, "progress": False}
    return sap.evaluate(lens_of(kind, host), ROWS, **options)


def test_a_tokenizer_that_pads_on_the_left_hides_no_token_from_run_evals() -> None:
    """Rows full of the padding token's id; HookedTransformer would mask it on that side."""
    lens = lens_of("gpt2", "hooked_transformer")
    tokenizer = lens.backend.model.tokenizer  # pyright: ignore[reportAttributeAccessIssue]
    rows = ROWS.clone()
    rows[:, ::3] = tokenizer.pad_token_id
    side, tokenizer.padding_side = tokenizer.padding_side, "left"
    try:
        found = sap.evaluate(lens, rows, rows_at_once=5, resamples=20, progress=False)
        assert tokenizer.padding_side == "left"
    finally:
        tokenizer.padding_side = side
    both = found.table.dropna(subset="sae_lens")
    assert len(both)
    assert_agrees(both)


def assert_agrees(both: Any) -> None:
    for (layer, metric), row in both.iterrows():
        tolerance = AGREE * abs(row["sae_lens"])
        if metric == "recovered_zero":  # a quotient of small differences of cross-entropies
            zero, clean = (both.loc[(layer, name), "value"] for name in ("ce_zero", "ce_clean"))
            tolerance = AGREE * (1 + abs(row["sae_lens"])) * clean / abs(zero - clean)
        assert abs(row["value"] - row["sae_lens"]) <= tolerance, (layer, metric)


@pytest.mark.parametrize("kind", TINY)
@pytest.mark.parametrize("host", HOSTS)
def test_agrees_with_run_evals_on_every_host(kind: str, host: str) -> None:
    table = evaluated(kind, host).table
    both = table.dropna(subset="sae_lens")
    assert set(both.index.get_level_values("metric")) == set(METRICS) - {
        "ce_mean",
        "recovered_mean",
        "dead",
        "dense",
    }
    assert_agrees(both)
    first = evaluated(kind, HOSTS[0]).table
    for column in ("value", "low", "high"):
        same = table[column].drop(index=["recovered_zero", "recovered_mean"], level="metric")
        np.testing.assert_allclose(same, first[column].loc[same.index], rtol=1e-5)
        np.testing.assert_allclose(table[column], first[column], rtol=1e-2)


@pytest.mark.parametrize("architecture", ["jumprelu", "topk_rescaled", "gated"])
def test_agrees_with_run_evals_without_special_tokens(architecture: str) -> None:
    lens = lens_of(architecture=architecture)
    options: dict[str, Any] = {"rows_at_once": 4, "resamples": 10, "progress": False}
    without = sap.evaluate(lens, ROWS, exclude_tokens=True, **options)
    both = without.table.dropna(subset="sae_lens")
    assert len(both) == 16
    assert_agrees(both)
    assert without.facts["positions_counted"] == int(((ROWS != 0) & (ROWS != 1)).sum())
    assert 0 in without.facts["excluded_tokens"]
    everything = sap.evaluate(lens, ROWS, sae_lens=False, **options)
    assert everything.facts["positions_counted"] == ROWS.numel()
    assert everything.table["sae_lens"].isna().all()
    assert not np.allclose(everything.wide()["mse"], without.wide()["mse"])
    for layer in (0, 2):  # left as they were, for the next user
        assert lens.dictionaries[layer].source.hook_z_reshaping_mode


def test_numbers_against_plain_forward_passes() -> None:
    """L0, error, mean ablation and densities, by torch hooks on the bare model."""
    model = tiny_gpt2()
    sae: Any = random_sae(1, 30)
    found = sap.evaluate(
        sap.FeatureLens(model, [sae]), ROWS, rows_at_once=5, resamples=10, progress=False
    )
    seen: list[torch.Tensor] = []
    projection = model.transformer.h[1].attn.c_proj

    def loss(replace: Any) -> float:
        handle = projection.register_forward_pre_hook(lambda _m, args: (replace(args[0]),))
        with torch.no_grad():
            logits = model(ROWS).logits
        handle.remove()
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), ROWS[:, 1:].flatten()).item()

    clean = loss(lambda z: seen.append(z) or z)
    z = seen[0].flatten(0, 1).double()
    pre = (z - sae.b_dec.double()) @ sae.W_enc.double() + sae.b_enc.double()
    recons = (pre.relu() @ sae.W_dec.double() + sae.b_dec.double()).detach()
    error = (z - recons).square().sum(-1)
    expected = {
        "l0": (pre > 0).sum(-1).double().mean().item(),
        "l1": pre.relu().sum(-1).mean().item(),
        "mse": error.mean().item(),
        "fvu": (error.sum() / (z - z.mean(0)).square().sum()).item(),
        "ce_clean": clean,
        "ce_spliced": loss(lambda value: recons.view_as(value).to(value)),
        "ce_zero": loss(torch.zeros_like),
        "ce_mean": loss(lambda value: z.mean(0).to(value).expand_as(value)),
        "dead": (~(pre > 0).any(0)).double().mean().item(),
        "dense": ((pre > 0).double().mean(0) > 0.1).double().mean().item(),
    }
    got = found.wide().loc[1]
    for name, value in expected.items():
        assert got[name] == pytest.approx(value, rel=1e-5, abs=1e-7), name
    share = (expected["ce_mean"] - expected["ce_spliced"]) / (expected["ce_mean"] - clean)
    assert got["recovered_mean"] == pytest.approx(share, rel=1e-3)
    density = (pre > 0).double().mean(0)
    np.testing.assert_allclose(found.densities[1], density.numpy(), atol=1e-12)
    assert found.histogram["features"].sum() == int((density > 0).sum())
    assert hooks_on(model) == 0


def test_a_perfect_and_an_empty_sae() -> None:
    model = tiny_gpt2()
    sae: Any = random_sae(1, 30, d_sae=60)
    with torch.no_grad():  # z = relu(z) - relu(-z)
        sae.W_enc.copy_(torch.cat([torch.eye(30), -torch.eye(30)], 1))
        sae.W_dec.copy_(sae.W_enc.T)
        sae.b_enc.zero_()
        sae.b_dec.zero_()
    options: dict[str, Any] = {"resamples": 20, "progress": False}
    perfect = sap.evaluate(sap.FeatureLens(model, [sae]), ROWS, **options)
    assert perfect.wide()["recovered_zero"].item() == pytest.approx(1, abs=1e-4)
    assert perfect.wide()["recovered_mean"].item() == pytest.approx(1, abs=1e-4)
    assert perfect.wide()["fvu"].item() < 1e-10
    with torch.no_grad():
        sae.W_enc.zero_()
        sae.b_enc.fill_(-1)
    empty = sap.evaluate(sap.FeatureLens(model, [sae]), ROWS, **options).wide().loc[1]
    assert empty["ce_spliced"] == pytest.approx(empty["ce_zero"], rel=1e-6)
    assert empty["recovered_zero"] == pytest.approx(0, abs=1e-4)
    assert (empty["dead"], empty["dense"], empty["l0"]) == (1, 0, 0)


def test_single_heads_leave_the_others_alone() -> None:
    """An SAE of one head: z of the other heads is kept in every forward pass."""
    model = tiny_gpt2()
    sae = random_sae(1, 6, reshape_activations="none")
    sae.cfg.metadata.hook_head_index = 2
    lens = sap.FeatureLens(model, [sae])
    found = sap.evaluate(lens, ROWS, resamples=5, progress=False).table
    hook = ("blocks.1.attn.hook_z", lambda z, hook: z.index_fill(2, torch.tensor(2), 0))  # noqa: ARG005
    with torch.no_grad():
        loss: Any = sap.hooked(model).run_with_hooks(ROWS, return_type="loss", fwd_hooks=[hook])
    assert found.loc[(1, "ce_zero"), "value"] == pytest.approx(loss.item(), rel=1e-5)
    assert found["sae_lens"].isna().all()


def test_an_error_in_run_evals_leaves_the_sae_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    import sae_lens.evals

    def fail(*_args: Any, **_options: Any) -> None:
        raise RuntimeError("out of memory")

    lens = lens_of()
    monkeypatch.setattr(sae_lens.evals, "get_downstream_reconstruction_metrics", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        sap.evaluate(lens, ROWS, resamples=5, progress=False)
    assert lens.dictionaries[0].source.hook_z_reshaping_mode


def test_streams_and_batches_give_the_same() -> None:
    lens = lens_of()
    options: dict[str, Any] = {"resamples": 20, "sae_lens": False, "progress": False}
    whole = sap.evaluate(lens, ROWS, rows_at_once=12, **options)
    for data, at_once in ((lambda: iter(ROWS.split(5)), 5), (ROWS.tolist(), 12), (ROWS, 12)):
        part = sap.evaluate(lens, data, rows_at_once=at_once, **options)
        np.testing.assert_allclose(part.wide(), whole.wide(), rtol=1e-6)
    texts = ["w3 w4 w5 w9", "w7 w8", "w9 w9 w2 w2"]
    unequal = sap.evaluate(lens, texts, resamples=5, progress=False)
    assert unequal.facts["sequences"] == 3
    assert unequal.facts["tokens"] == 10
    assert unequal.table["sae_lens"].isna().all()
    with pytest.raises(InputError, match="one length"):
        sap.evaluate(lens, texts, sae_lens=True, progress=False)


# -- intervals -------------------------------------------------------------------------------------


def test_intervals_are_ordered_and_shrink_with_data() -> None:
    lens = lens_of()
    options: dict[str, Any] = {"resamples": 200, "sae_lens": False, "progress": False}
    few = sap.evaluate(lens, ROWS[:6], **options).table
    many = sap.evaluate(lens, torch.randint(2, 61, (96, 14)), **options).table
    for table in (few, many):
        # A recovered share has no interval where the ablation may cost nothing.
        unknown = table["low"].isna()
        names = table[unknown].index.get_level_values("metric")
        assert set(names) <= {"recovered_zero", "recovered_mean"}
        inside = (table["low"] <= table["value"]) & (table["value"] <= table["high"])
        assert (inside | unknown).all(), table[~inside]
    names = ["l0", "mse", "ce_clean", "ce_spliced"]
    width = [(t["high"] - t["low"]).unstack("metric")[names] for t in (few, many)]
    assert (width[1] < width[0]).all(axis=None)


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    """Sequences drawn from a known distribution, in a share of which a feature fires."""
    n, d_sae, length, trials = 40, 300, 10, 120
    rng = np.random.default_rng(0)
    chance = rng.beta(0.3, 6.0, d_sae)
    # What a fresh sample of n sequences gives on average: the truth of a share of dead features.
    dead = ((1 - chance) ** n).mean()
    hits = dict.fromkeys(("dead", "l0"), 0)
    for _ in range(trials):
        fires = rng.random((n, d_sae)) < chance
        counts = fires * float(length)
        rows = np.ones((n, 10))
        rows[:, 0] = length
        rows[:, 2] = counts.sum(1)
        sums = _Sums(d_sae, 20)
        for start in range(0, n, 16):
            part = slice(start, start + 16)
            weights = rng.poisson(1.0, (20, len(rows[part]))).astype(np.float32)
            sums.add(rows[part], counts[part].astype(np.float32), weights)
        found = sums.values(0.95, 200, 0)
        hits["dead"] += found["dead"].low <= dead <= found["dead"].high
        hits["l0"] += found["l0"].low <= chance.sum() <= found["l0"].high
    assert 0.88 <= hits["l0"] / trials <= 1
    assert 0.9 <= hits["dead"] / trials <= 1


def test_no_interval_of_a_share_of_nothing() -> None:
    rows = np.random.default_rng(0).normal(5, 1, (30, 10))
    rows[:, 8] = rows[:, 6] + np.random.default_rng(1).normal(0, 1, 30)  # zero costs 0 +- noise
    found = _Sums._recovered(rows, "zero", 0.95, 200, 0)
    assert np.isfinite(found.value)
    assert np.isnan([found.low, found.high]).all()
    rows[:, 8] = rows[:, 6] + 1
    rows[:, 7] = rows[:, 6] + 0.2
    sure = _Sums._recovered(rows, "zero", 0.95, 200, 0)
    assert (sure.low, sure.value, sure.high) == pytest.approx((0.8, 0.8, 0.8))


def test_dead_margin_is_the_jackknife() -> None:
    """Against leaving each sequence out by hand."""
    fires = np.random.default_rng(1).random((15, 50)) < 0.06
    last = np.array([np.flatnonzero(column).max(initial=0) for column in fires.T])
    margin = dead_margin(fires.sum(0), last, 15, 0.95)
    without = [(~np.delete(fires, i, axis=0).any(0)).mean() for i in range(15)]
    variance = 14 / 15 * np.square(np.array(without) - np.mean(without)).sum()
    assert margin == pytest.approx(1.959964 * variance**0.5, rel=1e-6)


# -- files and refusals ----------------------------------------------------------------------------


def test_files(tmp_path: Path) -> None:
    found = evaluated("gpt2", "nnsight")
    found.save(tmp_path / "e.json")
    read = json.loads((tmp_path / "e.json").read_text())
    assert len(read["table"]) == 2 * len(METRICS)
    assert read["facts"]["sequences"] == 12
    lens = lens_of("gpt2", "nnsight")
    for name in ("model", "revision", "backend", "dtype", "sources", "fingerprints", "versions"):
        assert read["facts"][name] == lens.provenance[name], name
    assert read["metrics"] == METRICS
    row = next(r for r in read["table"] if r["layer"] == 2 and r["metric"] == "l0")
    assert row["value"] == found.table.loc[(2, "l0"), "value"]
    with pytest.raises(FileError, match="does not exist"):
        found.save(tmp_path / "no" / "e.json")
    write_png(found.draw(), tmp_path / "e.png")
    assert (tmp_path / "e.png").read_bytes()[:4] == b"\x89PNG"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["e.json", "e.png"]


def test_bad_input() -> None:
    lens = lens_of()
    given: list[tuple[Any, str]] = [
        ([], "empty"),
        (torch.zeros(0, 5, dtype=torch.long), "empty"),
        (list, "empty"),
        (torch.ones(2, 1, dtype=torch.long), "one token"),
        (torch.ones(2, 41, dtype=torch.long), "context is 40"),
        (torch.full((2, 4), 99), "token ids"),
        ("w3 w4", "one string"),
        (iter([ROWS]), "only once"),
    ]
    for data, message in given:
        with pytest.raises(InputError, match=message):
            sap.evaluate(lens, data, progress=False)
    with pytest.raises(InputError, match="no SAE in layer 1"):
        sap.evaluate(lens, ROWS, layers=[1], progress=False)
    with pytest.raises(InputError, match="no layers"):
        sap.evaluate(lens, ROWS, layers=[], progress=False)
    with pytest.raises(InputError, match="leaves no position"):
        sap.evaluate(lens, ROWS, exclude_tokens=range(61), progress=False)
    with pytest.raises(InputError, match="resamples=0"):
        sap.evaluate(lens, ROWS, resamples=0, progress=False)
    with pytest.raises(InputError, match="wide"):  # an SAE of another width
        sap.FeatureLens(tiny_gpt2(), [random_sae(0, 31)])
