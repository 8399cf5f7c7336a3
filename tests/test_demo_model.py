"""The shipped model and SAEs, measured again on a smaller sample than the report's."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from sae_lens import SAE
from transformers import AutoTokenizer

import sae_attn_plugin
from sae_attn_plugin.backends.hooked import HookedModel
from sae_attn_plugin.backends.loading import load_model
from sae_attn_plugin.demo import language
from sae_attn_plugin.demo.training import ioi_scores, repeat_scores
from sae_attn_plugin.evaluation import Evaluation, evaluate
from sae_attn_plugin.lens import FeatureLens

DEMO = Path(sae_attn_plugin.__file__).parent / "demo"
LAYERS = range(4)
REPORT = json.loads((DEMO / "report.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def model() -> HookedModel:
    return HookedModel(load_model(DEMO / "model", "nnsight"))


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def evaluation(model: HookedModel) -> Evaluation:
    rows = language.token_rows(random.Random("test saes"), 160, 128, held_out=True)
    lens = FeatureLens(model, DEMO / "saes")
    return evaluate(lens, torch.tensor(rows), rows_at_once=32, sae_lens=False, progress=False)


def test_size() -> None:
    files = [p for name in ("model", "saes") for p in (DEMO / name).rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) < 12_000_000
    assert {p.suffix for p in files} == {".json", ".safetensors"}


def test_the_prompt(model: HookedModel) -> None:
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "model", local_files_only=True)
    tokens = tokenizer(
        "When John and Mary went to the store, John gave a drink to", return_tensors="pt"
    ).input_ids
    assert tokenizer.decode(model(tokens)[0, -1].argmax()) == " Mary"
    assert dict(tokenizer.get_vocab()) == language.vocabulary()


def test_ioi(model: HookedModel) -> None:
    rng = random.Random("test ioi")
    examples = [language.ioi_example(rng, held_out=True) for _ in range(1000)]
    scores = ioi_scores(model, examples)
    assert scores.accuracy >= 0.95
    assert scores.worst_distractor >= 0.9
    assert scores.logit_difference > 2
    reported = REPORT["model"]["ioi"]
    assert scores.accuracy == pytest.approx(reported["accuracy"], abs=0.02)
    assert scores.logit_difference == pytest.approx(reported["logit_difference"], rel=0.1)


def test_induction(model: HookedModel) -> None:
    rng = random.Random("test repeats")
    rows = [language.repeated_random_tokens(rng, segment=30) for _ in range(64)]
    scores = repeat_scores(model, torch.tensor(rows))
    assert scores.second <= scores.first / 3


@pytest.mark.parametrize("layer", LAYERS)
def test_sae(evaluation: Evaluation, layer: int) -> None:
    sae = SAE.load_from_disk(DEMO / "saes" / f"blocks.{layer}.attn.hook_z")
    assert sae.cfg.metadata.hook_name == f"blocks.{layer}.attn.hook_z"
    assert sae.cfg.reshape_activations == "hook_z"
    scores = evaluation.wide().loc[layer]
    assert scores["l0"] <= 20
    assert scores["recovered_zero"] >= 0.95
    assert scores["recovered_mean"] >= 0.8
    reported = REPORT["saes"]["layers"][str(layer)]
    # Rare words have features of their own: a sample this small does not show all that are alive.
    assert reported["tokens"] > 200_000
    assert reported["dead"] < 0.2
    assert scores["dead"] < 0.4
    low, high = evaluation.table.loc[(layer, "l0"), ["low", "high"]]
    spread = high - low
    assert low - spread <= reported["l0"] <= high + spread
    assert scores["recovered_mean"] == pytest.approx(reported["recovered_mean"], abs=0.05)
