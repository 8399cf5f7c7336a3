"""The survey of a corpus against the same tables by brute force, and what holds of any survey."""

from __future__ import annotations

import functools
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import TrueFloat64, on_host, random_saes, tiny_gpt2, tiny_llama, word_tokenizer
from reference_survey import ReferenceSurvey

import sae_attn_plugin as sap
from sae_attn_plugin.corpus import sketches, tables
from sae_attn_plugin.corpus.sketches import RELATIVE_ERROR, Sketch, merge

pytestmark = pytest.mark.filterwarnings("ignore:.*'eager'.*")

ROWS, CONTEXT = 14, 12
KEEP, SAMPLE, SOURCES = 4, 5, 6


@functools.cache
def corpus(rows: int = ROWS, context: int = CONTEXT) -> torch.Tensor:
    # few distinct tokens, so that rows hold duplicates
    tokens = torch.randint(3, 15, (rows, context), generator=torch.Generator().manual_seed(1))
    tokens[:, 0] = 0
    return tokens


@functools.cache
def model_of(name: str) -> Any:
    return {"gpt2": tiny_gpt2, "llama": tiny_llama}[name](torch.float64)


@functools.cache
def saes_of(name: str, architecture: str) -> Any:
    return random_saes(model_of(name), architecture, dtype="float64")


@functools.cache
def lens_of(name: str, architecture: str = "standard") -> sap.FeatureLens:
    model = on_host(model_of(name), "transformers_model", word_tokenizer())
    return sap.FeatureLens(model, saes_of(name, architecture))


@functools.cache
def reference(name: str, architecture: str) -> Any:
    saes = dict(enumerate(saes_of(name, architecture)))
    return ReferenceSurvey(model_of(name), saes, corpus())


@pytest.fixture(
    scope="module",
    params=["gpt2-standard", "llama-jumprelu", "gpt2-topk_rescaled", "gpt2-gated"],
)
def pair(request: Any, tmp_path_factory: Any) -> tuple[Any, Any]:
    name, architecture = request.param.split("-")
    folder = tmp_path_factory.mktemp("corpus") / "survey"
    with TrueFloat64():
        found = small(lens_of(name, architecture), corpus(), folder, logits=10, cofiring=10)
    return found, reference(name, architecture)


def small(lens: Any, data: Any, folder: Path, **options: Any) -> Any:
    given: dict[str, Any] = {
        "keep": KEEP, "sample": SAMPLE, "sources": SOURCES, "positions": 60, "rows_at_once": 4,
        "logits": 3, "progress": False,
    }  # fmt: skip
    return sap.survey(lens, data, folder, **given | options)


def close(a: Any, b: Any, atol: float = 1e-9) -> None:
    np.testing.assert_allclose(
        np.asarray(a, dtype=float), np.asarray(b, dtype=float), rtol=1e-9, atol=atol
    )


def test_every_table_is_that_of_brute_force(pair: Any) -> None:
    survey, truth = pair
    features, expected = survey.features, truth.features
    for name in ("layer", "feature", "fires", "dead"):
        assert features[name].tolist() == expected[name].tolist()
    for name in ("density", "mean", "max", "dfa_abs", "decoder_norm"):
        close(features[name], expected[name])
    assert features["neuronpedia"].isna().all()

    heads, expected = survey.heads, truth.heads
    assert heads[["layer", "feature", "head"]].to_numpy().tolist() == (
        expected[["layer", "feature", "head"]].to_numpy().tolist()
    )
    for name in ("dfa", "dfa_abs", "dfa_share", "weighted_share"):
        close(heads[name], expected[name])
    close(heads["decoder_share"], expected["decoder_share"], atol=1e-6)  # made in float32

    merged = survey.positions_profile.merge(
        truth.positions_profile, on=["layer", "feature", "position_bin"], how="outer"
    )
    assert (merged["fires_x"] == merged["fires_y"]).all()
    assert survey.facts["position_edges"] == truth.position_edges
    assert survey.facts["distance_edges"] == truth.distance_edges

    expected = truth.logits()
    alive = features[~features["dead"]][["layer", "feature"]]
    expected = expected.merge(alive, on=["layer", "feature"])
    both = survey.logits.merge(expected, on=["layer", "feature", "sign", "rank"], how="outer")
    close(both["effect_x"], both["effect_y"])
    assert (both["token_x"] == both["token_y"]).all()

    rows = survey.rows.set_index("row")["tokens"]
    for row, tokens in rows.items():
        assert list(tokens) == corpus()[row].tolist()  # type: ignore[index]


def test_the_strongest_firings_are_those_of_brute_force(pair: Any) -> None:
    survey, truth = pair
    top = survey.examples[survey.examples["kind"] == "top"]
    expected = truth.examples(KEEP, SAMPLE, SOURCES)
    expected = expected[expected["kind"] == "top"]
    both = top.merge(expected, on=["layer", "feature", "rank"], how="outer")
    assert len(both) == len(top) == len(expected)
    close(both["activation_x"], both["activation_y"])
    # rounding may order equal activations (of BOS, say) otherwise
    same = (both["row_x"] == both["row_y"]) & (both["position_x"] == both["position_y"])
    assert same.mean() > 0.8
    compare_examples(both[same])


def test_sampled_firings_are_firings_and_their_dfa_is_exact(pair: Any) -> None:
    survey, truth = pair
    drawn = survey.examples[survey.examples["kind"] == "sample"]
    everything = truth.examples(10**6, 1, SOURCES)
    everything = everything[everything["kind"] == "top"]
    both = drawn.merge(everything, on=["layer", "feature", "row", "position"], how="left")
    compare_examples(both)
    fires = survey.features.set_index(["layer", "feature"])["fires"]
    count = drawn.groupby(["layer", "feature"]).size()
    assert (count == fires.clip(upper=SAMPLE)[count.index]).all()
    assert not drawn.duplicated(["layer", "feature", "row", "position"]).any()
    assert len(count) == (fires > 0).sum()


def compare_examples(both: Any) -> None:
    assert len(both)
    for name in ("activation", "pre_activation", "dfa_rest", "dfa_abs"):
        close(both[f"{name}_x"], both[f"{name}_y"])
    assert (both["active_x"] == both["active_y"]).all()
    for name in ("dfa_by_head", "by_distance", "roles", "dfa"):
        for mine, theirs in zip(both[f"{name}_x"], both[f"{name}_y"], strict=True):
            close(mine, theirs)
    for mine, theirs in zip(both["sources_x"], both["sources_y"], strict=True):
        assert list(mine) == list(theirs)


def test_cofiring_and_the_sample_are_those_of_brute_force(pair: Any) -> None:
    survey, truth = pair
    places = list(survey.positions.itertuples(index=False, name=None))
    assert len(set(places)) == 60 == survey.facts["drawn_positions"]
    order = ["row", "position", "layer", "feature"]
    mine, theirs = (
        x.sort_values(order).reset_index(drop=True) for x in (survey.sample, truth.sample(places))
    )
    assert mine[order].to_numpy().tolist() == theirs[order].to_numpy().tolist()
    np.testing.assert_allclose(mine["activation"], theirs["activation"], rtol=1e-6)
    expected = truth.cofiring(places)
    key = ["layer", "feature"]
    assert survey.cofiring.groupby(key).size().equals(expected.groupby(key).size())
    rank = [frame.groupby(key).cumcount() for frame in (survey.cofiring, expected)]
    both = survey.cofiring.assign(rank=rank[0]).merge(
        expected.assign(rank=rank[1]), on=[*key, "rank"]
    )
    close(both["jaccard_x"], both["jaccard_y"])
    assert (both["fires_sample_x"] == both["fires_sample_y"]).all()
    pairs = survey.cofiring.merge(
        truth.cofiring(places, 10**6), on=["layer", "feature", "other_layer", "other"], how="left"
    )
    assert (pairs["together_x"] == pairs["together_y"]).all()


def test_dfa_of_examples_is_that_of_a_run(tmp_path: Path) -> None:
    lens = lens_of("gpt2")
    survey = small(lens, corpus(), tmp_path / "s")
    picked = survey.examples.sample(25, random_state=0)
    for example in picked.itertuples():
        run = lens.run(corpus()[example.row : example.row + 1])
        dfa = run.dfa(example.layer, example.feature, example.position)
        close(example.dfa_by_head, dfa.by_head, 1e-6)
        close(example.dfa, dfa.by_source[list(example.sources)], 1e-6)
        close(example.pre_activation, dfa.pre_activation, 1e-6)
        close(sum(example.dfa) + example.dfa_rest, dfa.by_source.sum(), 1e-6)


def test_one_forward_pass_for_everything(tmp_path: Path) -> None:
    lens = lens_of("gpt2")
    passed: list[torch.Tensor] = []
    model = model_of("gpt2")
    handle = model.transformer.wte.register_forward_pre_hook(
        lambda _module, args: passed.append(args[0].clone())
    )
    try:
        survey = small(lens, corpus(), tmp_path / "s")
    finally:
        handle.remove()
    assert torch.equal(torch.cat(passed), corpus())
    assert survey.facts["forwards"] == len(passed) == 4
    assert survey.facts["tokens"] == corpus().numel()
    assert survey.facts["rows"] == ROWS


# -- what any order, batch and host gives ----------------------------------------------------------

EXACT = ("features", "heads", "examples", "positions", "positions_profile", "sample", "cofiring")


def same_tables(a: Any, b: Any, names: Any = EXACT, rtol: float = 1e-6) -> None:
    for name in (*names, "rows", "logits", "tokens"):
        mine, theirs = a.table(name), b.table(name)
        assert list(mine.columns) == list(theirs.columns)
        assert len(mine) == len(theirs), name
        for column in mine.columns:
            x, y = mine[column], theirs[column]
            if x.dtype == object and len(x) and isinstance(x.iloc[0], np.ndarray):
                lengths = [[len(v) for v in c] for c in (x, y)]
                assert lengths[0] == lengths[1], (name, column)
                x, y = np.concatenate(x.tolist()), np.concatenate(y.tolist())
            if x.dtype.kind == "f":
                np.testing.assert_allclose(x, y, rtol=rtol, atol=rtol, err_msg=f"{name}.{column}")
            else:
                pd.testing.assert_series_equal(pd.Series(x), pd.Series(y), check_names=False)


@pytest.mark.parametrize("rows_at_once", [1, 5, 100])
def test_any_batch_size_gives_the_same_tables(tmp_path: Path, rows_at_once: int) -> None:
    one = small(lens_of("gpt2"), corpus(), tmp_path / "a")
    other = small(lens_of("gpt2"), corpus(), tmp_path / "b", rows_at_once=rows_at_once)
    same_tables(one, other)
    assert other.facts["forwards"] == -(-ROWS // rows_at_once)


def test_hosts_give_the_same_tables(tmp_path: Path) -> None:
    model = tiny_gpt2()
    saes = random_saes(model)
    found = [
        small(
            sap.FeatureLens(
                on_host(model, host, word_tokenizer()), saes, tokenizer=word_tokenizer()
            ),
            corpus(),
            tmp_path / host,
        )
        for host in ("nnsight", "hooked_transformer", "transformer_bridge")
    ]
    for other in found[1:]:
        counts = [s.features[["layer", "feature", "fires"]] for s in (found[0], other)]
        pd.testing.assert_frame_equal(*counts)
        for name in ("mean", "max", "dfa_abs"):
            np.testing.assert_allclose(
                found[0].features[name], other.features[name], rtol=2e-5, atol=1e-6
            )
        sampled = [s.examples[s.examples["kind"] == "sample"] for s in (found[0], other)]
        key = ["layer", "feature", "rank", "row", "position"]
        assert sampled[0][key].to_numpy().tolist() == sampled[1][key].to_numpy().tolist()


def test_given_as_batches_texts_or_files(tmp_path: Path) -> None:
    lens = lens_of("gpt2")
    one = small(lens, corpus(), tmp_path / "tensor")
    streamed = small(lens, lambda: corpus().split([3, 6, 5]), tmp_path / "stream")
    same_tables(one, streamed)
    limited = small(lens, corpus(), tmp_path / "limit", limit=8)
    assert limited.facts["rows"] == 8
    same_tables(small(lens, corpus()[:8], tmp_path / "eight"), limited)
    words = [w for w in word_tokenizer().get_vocab() if not w.startswith("<")]
    texts = [" ".join(itertools.islice(itertools.cycle(words[i:]), 9)) for i in range(12)]
    (tmp_path / "text.txt").write_text("\n".join(texts))
    from_list = small(lens, texts, tmp_path / "list", context=8)
    from_file = small(lens, str(tmp_path / "text.txt"), tmp_path / "file", context=8)
    assert from_list.facts["context"] == 8
    same_tables(from_list, from_file)


# -- sketches --------------------------------------------------------------------------------------


def sketch_of(tokens: torch.Tensor, first_row: int, **options: Any) -> Sketch:
    from sae_attn_plugin.corpus import survey as module

    given: dict[str, Any] = {
        "layers": None, "rows_at_once": 4, "keep": KEEP, "sample": SAMPLE, "sources": SOURCES,
        "positions": 50, "seed": 0, "exclude_tokens": None, "cofiring": 5, "logits": 2,
    }  # fmt: skip
    plan = module.make_plan(lens_of("gpt2"), **given | options).of(CONTEXT)
    sketch, gather = plan.sketch(), plan.gatherer()
    for start in range(0, len(tokens), 4):
        gather(sketch, tokens[start : start + 4], first_row + start)
    return sketch


def same_sketch(a: Sketch, b: Sketch) -> None:
    assert a.facts() == b.facts()
    for (name, mine), (other, theirs) in zip(a.parts(), b.parts(), strict=True):
        assert name == other
        assert mine.keys() == theirs.keys()
        for key in mine:
            if mine[key].dtype.kind == "f":
                np.testing.assert_allclose(mine[key], theirs[key], rtol=1e-12, atol=1e-12)
            else:
                np.testing.assert_array_equal(mine[key], theirs[key], err_msg=f"{name} {key}")


def test_merging_is_associative_and_commutative() -> None:
    a, b, c = (sketch_of(corpus()[i : i + 4], i) for i in (0, 4, 8))
    whole = sketch_of(corpus()[:12], 0)
    left = merge(merge(a, b), c)
    same_sketch(left, whole)
    same_sketch(merge(a, merge(b, c)), left)
    same_sketch(merge(merge(c, a), b), left)
    same_sketch(merge(a, a.empty()), a)
    with pytest.raises(sap.InputError, match="different settings"):
        merge(a, sketch_of(corpus()[:4], 0, keep=KEEP + 1))


def test_a_sketch_survives_being_written() -> None:
    one = sketch_of(corpus(), 0)
    again = one.empty()
    for name, arrays in one.parts():
        again.load_part(name, arrays)
    for name, value in one.facts().items():
        setattr(again, name, value)
    same_sketch(one, again)


def test_firings_are_drawn_uniformly() -> None:
    """Each of the firings of a feature is kept as often as any other, whatever its place."""
    n, k, seeds = 60, 6, 3000
    place = torch.arange(n)
    counts = np.zeros(n)
    reservoir = sketches.Reservoir(seeds, k, {}, torch.device("cpu"))
    for some in torch.arange(n).split(7):  # batches
        feature = torch.arange(seeds).repeat_interleave(len(some))
        at = place[some].repeat(seeds)
        priority = sketches.hash_of(sketches.hash_of(feature, 3), sketches.hash_of(9, at, at % 5))
        reservoir.offer(feature, priority, at)
    kept = reservoir.place.flatten().numpy()
    counts = np.bincount(kept, minlength=n)
    expected = seeds * k / n
    # a binomial each; chi-square of 59 degrees of freedom
    chi2 = ((counts - expected) ** 2 / (expected * (1 - k / n))).sum()
    assert 30 < chi2 < 100
    together = (reservoir.place == 3).any(1) & (reservoir.place == 4).any(1)
    share = k * (k - 1) / (n * (n - 1))  # of any pair
    assert abs(float(together.float().mean()) - share) < 5 * (share / seeds) ** 0.5


def test_the_reservoir_keeps_the_smallest_in_any_order() -> None:
    rng = np.random.default_rng(0)
    n, k = 400, 7
    feature, priority = rng.integers(0, 9, n), rng.integers(0, 30, n)  # many ties
    place = np.arange(n)
    expected = sorted(zip(feature, priority, place, strict=True))
    for attempt in range(4):
        order = np.arange(n) if not attempt else rng.permutation(n)
        reservoir = sketches.Reservoir(9, k, {"it": ((), torch.int64)}, torch.device("cpu"))
        for some in np.array_split(order, 1 + 3 * attempt):
            f, p, at = (torch.from_numpy(x[some]) for x in (feature, priority, place))
            came, slots = reservoir.offer(f, p, at)
            reservoir.write(slots, {"it": at[came] * 3})
        slots = reservoir.filled
        got = [
            (int(s) // k, int(reservoir.priority.flatten()[s]), int(reservoir.place.flatten()[s]))
            for s in slots
        ]
        wanted = []
        for i in range(9):
            wanted += [(int(f), int(p), int(q)) for f, p, q in expected if f == i][:k]
        assert got == wanted
        assert (reservoir.details["it"][slots] == reservoir.place.flatten()[slots] * 3).all()


def test_quantiles_keep_their_bound() -> None:
    rng = np.random.default_rng(0)
    shares = list(tables.QUANTILES.values())
    samples = [
        rng.lognormal(mu, sigma, n) for mu, sigma, n in ((0, 1, 5000), (-6, 0.2, 77), (5, 2, 3))
    ]
    histogram = np.zeros((len(samples) + 1, sketches.N_BINS), np.int32)
    for row, values in zip(histogram, samples, strict=False):
        np.add.at(row, sketches.log_bin(torch.from_numpy(values)).numpy(), 1)
    found = sketches.quantiles(histogram, shares)
    assert np.isnan(found[-1]).all()
    for got, values in zip(found, samples, strict=False):
        exact = np.sort(values)[np.floor(np.array(shares) * (len(values) - 1)).astype(int)]
        assert (np.abs(got / exact - 1) <= RELATIVE_ERROR * (1 + 1e-9)).all()


def test_quantiles_of_a_survey_keep_their_bound(tmp_path: Path) -> None:
    survey = small(lens_of("gpt2"), corpus(), tmp_path / "s")
    firings = reference("gpt2", "standard").firings
    features = survey.features.set_index(["layer", "feature"])
    for key, group in firings.groupby(["layer", "feature"]):
        values = np.sort(group["activation"])
        for name, share in tables.QUANTILES.items():
            exact = values[int(np.floor(share * (len(values) - 1)))]
            assert abs(features.loc[key, name] / exact - 1) <= RELATIVE_ERROR * (1 + 1e-9)
