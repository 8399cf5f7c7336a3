"""Recipes, the trainer that runs them, rows of text, and the commands on top."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import TINY, random_saes, tiny_gpt2, word_tokenizer
from sae_lens import SAE, LanguageModelSAETrainingRunner, StandardTrainingSAEConfig
from safetensors.torch import load_file
from typer.testing import CliRunner

import sae_attn_plugin as sap
from sae_attn_plugin import cli
from sae_attn_plugin.corpus.rows import Rounds, StreamedRounds, read_rows, row_stream, sample_rows
from sae_attn_plugin.errors import FileError, InputError, UnsupportedError
from sae_attn_plugin.training import recipe, train

ROWS = torch.randint(2, 61, (40, 16), generator=torch.Generator().manual_seed(0))
SMALL: dict[str, Any] = {
    "context_size": 16,
    "training_tokens": 64 * 40,
    "train_batch_size_tokens": 64,
    "n_batches_in_buffer": 16,
    "store_batch_size_prompts": 5,
    "d_sae": 48,
    "k": 5,
}


def recipes_of(model: Any, layers: Any = (0, 2), **changes: Any) -> list[Any]:
    return [recipe(model, layer, **{**SMALL, **changes}) for layer in layers]


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "sae_weights.safetensors")


# -- recipes ---------------------------------------------------------------------------------------


def test_the_papers_settings() -> None:
    """Kissane et al. 2024, released configurations."""
    cfg = recipe("gpt2-small", layer=5)
    assert (cfg.model_name, cfg.hook_name) == ("gpt2-small", "blocks.5.attn.hook_z")
    assert (cfg.sae.d_in, cfg.sae.d_sae, cfg.sae.l1_coefficient) == (768, 49152, 1.0)
    assert (cfg.lr, cfg.adam_beta1, cfg.adam_beta2) == (1.2e-3, 0.9, 0.99)
    assert (cfg.context_size, cfg.training_tokens) == (128, 2_000_000_000)
    assert (cfg.train_batch_size_tokens, cfg.lr_warm_up_steps) == (4096, 1000)
    assert cfg.n_batches_in_buffer * cfg.context_size == 1_572_864
    assert cfg.dataset_path == "Skylion007/openwebtext"
    assert cfg.sae.reshape_activations == "hook_z"
    l1 = [recipe("gpt2-small", layer).sae.l1_coefficient for layer in range(12)]
    assert l1 == [1.8, 0.8, 1.0, 0.9, 1.1, 1.0, 1.1, 1.1, 1.3, 1.2, 1.3, 3.0]
    widths = [recipe("gpt2-small", layer).sae.d_sae for layer in range(12)]
    assert [layer for layer, width in enumerate(widths) if width == 49152] == [5, 7]
    assert sorted(set(widths)) == [24576, 49152]
    gelu = recipe("gelu-2l", 1)
    assert (gelu.sae.d_sae, gelu.lr, gelu.sae.l1_coefficient) == (16384, 1e-3, 2.0)
    gemma = recipe("gemma-2b", 6)
    assert (gemma.sae.d_in, gemma.sae.d_sae) == (2048, 16384)


def test_recipes_are_checked() -> None:
    for name, layer in (("gpt2-small", 12), ("gelu-2l", 0), ("gemma-2b", 7), ("sae-attn-demo", 4)):
        with pytest.raises(InputError, match=f"layer {layer}"):
            recipe(name, layer)
    with pytest.raises(InputError, match="no recipe for 'opt'"):
        recipe("opt", 0)
    with pytest.raises(InputError, match="unknown field 'learning_rate'"):
        recipe("gpt2-small", 0, learning_rate=1)
    with pytest.raises(InputError, match="no layer 3"):
        recipe(tiny_gpt2(), 3)
    named = recipe("opt", 0, d_in=64, training_tokens=4096, train_batch_size_tokens=128)
    assert (named.sae.d_in, named.lr_decay_steps) == (64, 9)


def test_a_recipe_runs_in_sae_lens_own_runner(tmp_path: Path) -> None:
    from datasets import Dataset

    model = sap.hooked(tiny_gpt2(), word_tokenizer())
    warnings.filterwarnings("ignore", message="The training dataset|All samples|To copy construct")
    data = Dataset.from_dict({"input_ids": ROWS.tolist()})
    cfg = recipe(model, 1, **SMALL, output_path=str(tmp_path), is_dataset_tokenized=True)
    LanguageModelSAETrainingRunner(cfg, data, model).run()
    sae = SAE.load_from_disk(tmp_path)
    assert sae.cfg.architecture() == "jumprelu"
    assert sap.FeatureLens(model, [sae]).dictionaries[1].d_sae == 48


# -- training --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", TINY)
def test_the_same_saes_on_every_host(kind: str, tmp_path: Path) -> None:
    """Through the hook points of a Hugging Face model, and of a HookedTransformer."""
    model = TINY[kind]()
    hosts = {"hf": sap.hooked(model), "tl": sap.backends.loading.to_hooked_transformer(model)}  # type: ignore[attr-defined]
    folders = {
        name: train(recipes_of(host), host, ROWS, out=tmp_path / name, progress=False)
        for name, host in hosts.items()
    }
    alone = train(recipes_of(model, [2]), model, ROWS, out=tmp_path / "alone", progress=False)
    for layer in (0, 2):
        one, other = (weights_of(folders[name][layer]) for name in hosts)
        for key in one:
            torch.testing.assert_close(one[key], other[key], atol=1e-3, rtol=1e-2)
    one, other = weights_of(folders["hf"][2]), weights_of(alone[2])
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_widths_and_settings_may_differ_by_layer(tmp_path: Path) -> None:
    model = sap.hooked(tiny_gpt2(), word_tokenizer())
    wide = StandardTrainingSAEConfig(d_in=30, d_sae=64, l1_coefficient=0.5)
    runs = [*recipes_of(model, [0]), recipe(model, 1, **{**SMALL, "sae": wide})]
    runs = [replace(run, exclude_special_tokens=True) for run in runs]
    rows = ROWS.clone()
    rows[:, 0] = 0
    folders = train(runs, model, rows, out=tmp_path, progress=False)
    first, second = (SAE.load_from_disk(folders[layer]) for layer in (0, 1))
    assert (first.cfg.d_sae, second.cfg.d_sae) == (48, 64)
    assert second.cfg.architecture() == "standard"
    assert second.cfg.metadata.exclude_special_tokens is True
    assert second.cfg.metadata.context_size == 16
    # What was trained without special tokens is measured without them.
    lens = sap.FeatureLens(model, folders[0].parent)
    found = sap.evaluate(lens, rows[:8], resamples=5, sae_lens=False, progress=False)
    assert found.facts["positions_counted"] == 8 * 15


def test_what_would_be_ignored_is_refused(tmp_path: Path) -> None:
    model = sap.hooked(tiny_gpt2())
    (good,) = recipes_of(model, [1])

    def run(*recipes: Any, data: Any = ROWS) -> None:
        train(recipes, model, data, out=tmp_path, progress=False)

    for change in ({"compile_llm": True}, {"seqpos_slice": (1, 5)}, {"n_checkpoints": 2}):
        with pytest.raises(UnsupportedError, match=next(iter(change))):
            run(replace(good, **change))
    with pytest.raises(UnsupportedError, match="all heads"):
        run(replace(good, hook_head_index=1))
    with pytest.raises(UnsupportedError, match="all heads"):
        run(replace(good, hook_name="blocks.1.hook_mlp_out"))
    for recipes, message in (
        ((), "no recipes"),
        ((good, good), "two recipes for layer 1"),
        ((good, recipe(model, 0, **{**SMALL, "lr": 1e-2})), "differ in lr"),
        ((replace(good, hook_name="blocks.5.attn.hook_z"),), r"layers 0\.\.2"),
        ((recipe("x", 1, d_in=31, **SMALL),), "d_in 31"),
        ((replace(good, context_size=41),), "longer than the context"),
    ):
        with pytest.raises(InputError, match=message):
            run(*recipes)
    for data, message in (
        (ROWS[:, :12], "rows of 12 tokens"),
        (ROWS + 100, "token ids"),
        (None, "names no data set"),
        ("missing.txt", "no such file"),
    ):
        with pytest.raises(InputError, match=message):
            run(good, data=data)
    assert not list(tmp_path.iterdir())


def test_training_resumes_to_the_same_weights(tmp_path: Path) -> None:
    model = sap.hooked(tiny_gpt2())
    whole = train(recipes_of(model), model, ROWS, out=tmp_path / "whole", progress=False)
    source = Rounds(ROWS, 16, recipes_of(model)[0].seed)
    checkpoint = tmp_path / "state.safetensors"

    def interrupted(round_: int) -> torch.Tensor:
        if round_ == 6:
            raise KeyboardInterrupt
        return source(round_)

    options: dict[str, Any] = {
        "out": tmp_path / "resumed",
        "checkpoint": checkpoint,
        "checkpoint_every": 2,
        "progress": False,
    }
    with pytest.raises(KeyboardInterrupt):
        train(recipes_of(model), model, interrupted, **options)
    assert checkpoint.exists()
    with pytest.raises(FileError, match="other settings"):
        train(recipes_of(model, lr=5e-3), model, source, **options)
    resumed = train(recipes_of(model), model, source, **options)
    assert not checkpoint.exists()
    for layer in (0, 2):
        one, other = weights_of(whole[layer]), weights_of(resumed[layer])
        assert all(torch.equal(one[key], other[key]) for key in one)


# -- rows ------------------------------------------------------------------------------------------


def test_rounds_are_pure_and_cover_every_epoch() -> None:
    rows = torch.arange(10)[:, None].expand(10, 3)
    rounds = Rounds(rows, 4, seed=1)
    numbers = torch.cat([rounds(i)[:, 0] for i in range(5)])
    assert sorted(numbers[:10].tolist()) == sorted(numbers[10:].tolist()) == list(range(10))
    assert torch.equal(rounds(3), Rounds(rows, 4, seed=1)(3))
    assert not torch.equal(rounds(0), Rounds(rows, 4, seed=2)(0))
    big = Rounds(rows, 25, seed=1)(1)
    assert sorted(torch.bincount(big[:, 0]).tolist()) == [2] * 5 + [3] * 5


def test_streams_go_on_and_start_over() -> None:
    rounds = StreamedRounds(lambda: (torch.tensor([i]) for i in range(5)), 2)
    wanted = {0: [0, 1], 1: [2, 3], 2: [4, 0], 7: [4, 0]}
    for round_ in (0, 1, 2, 0, 7, 2):
        assert rounds(round_)[:, 0].tolist() == wanted[round_]
    with pytest.raises(InputError, match="single row"):
        StreamedRounds(list, 2)(0)


@pytest.mark.parametrize("ending", ["txt", "jsonl", "folder", "tokens"])
def test_text_becomes_rows(ending: str, tmp_path: Path) -> None:
    from datasets import Dataset

    texts = ["w3 w4 w5 w6", "w7 w8", "w9 w10 w11 w12 w13"]
    path = tmp_path / f"text.{ending}"
    if ending == "txt":
        path.write_text("\n".join(texts))
    elif ending == "jsonl":
        path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    elif ending == "folder":
        Dataset.from_dict({"text": texts}).save_to_disk(path)
    else:
        Dataset.from_dict({"input_ids": ROWS.tolist()}).save_to_disk(path)
        assert torch.equal(read_rows(path, None, 16, limit=3), ROWS[:3])
        with pytest.raises(InputError, match="rows of 16 tokens"):
            read_rows(path, None, 17)
        return
    rows = read_rows(path, word_tokenizer(), 4)
    assert rows.tolist() == [[0, 3, 4, 5], [0, 6, 7, 8], [0, 9, 10, 11]]
    bare = read_rows(path, word_tokenizer(), 4, prepend_bos=False, separator=1, limit=2)
    assert bare.tolist() == [[3, 4, 5, 6], [7, 8, 1, 9]]
    assert len(list(row_stream(path, word_tokenizer(), 2))) == 11
    with pytest.raises(InputError, match="single row"):
        read_rows(path, word_tokenizer(), 40)


def test_text_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text\nw3")
    (tmp_path / "a.jsonl").write_text('{"body": "w3"}')
    (tmp_path / "empty.txt").write_text("")
    for path, message in (
        (tmp_path / "a.csv", "ends in"),
        (tmp_path / "a.jsonl", "columns body"),
        (tmp_path / "empty.txt", "empty"),
        (tmp_path / "none.txt", "no such file"),
        (tmp_path, "cannot read"),
    ):
        with pytest.raises(InputError, match=message):
            read_rows(path, word_tokenizer(), 4)


def test_sampled_rows() -> None:
    model = tiny_gpt2()
    state = torch.random.get_rng_state()
    rows = sample_rows(model, 5, 12, seed=3, at_once=2, progress=False)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert rows.shape == (5, 12)
    assert (rows[:, 0] == 0).all()
    assert torch.equal(rows, sample_rows(model, 5, 12, seed=3, at_once=2, progress=False))
    assert not torch.equal(rows, sample_rows(model, 5, 12, seed=4, at_once=2, progress=False))
    with pytest.raises(InputError, match="context"):
        sample_rows(model, 5, 41)


# -- commands --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("commands")
    model = tiny_gpt2()
    model.save_pretrained(folder / "model")
    word_tokenizer().save_pretrained(folder / "model")
    words = [" ".join(f"w{i}" for i in row.tolist()) for row in ROWS]
    (folder / "text.txt").write_text("\n".join(words))
    for layer, sae in enumerate(random_saes(model)):
        sae.save_model(folder / "saes" / f"blocks.{layer}.attn.hook_z")
    return folder


def call(*arguments: object) -> Any:
    result = CliRunner().invoke(cli.app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def train_options(files: Path, out: Path) -> list[Any]:
    options = {
        "model": files / "model",
        "data": files / "text.txt",
        "out": out,
        "layers": "0,2",
        "tokens": 64 * 20,
        "batch": 64,
        "context": 16,
        "rows-in-buffer": 16,
        "k": 5,
        "d-sae": 48,
        "checkpoint-every": 1,
    }
    return [item for name, value in options.items() for item in (f"--{name}", value)]


def test_train_resumes_to_identical_weights_and_evaluates(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sae_attn_plugin import training

    done = call("train", *train_options(files, tmp_path / "whole"))
    assert done.exit_code == 0, done.output
    assert "2 SAEs of 48 features" in done.stdout

    steps = []
    shuffled = training._shuffled

    def stop_early(*arguments: Any, **options: Any) -> Any:
        steps.append(1)
        if len(steps) == 4:
            raise KeyboardInterrupt
        return shuffled(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(training, "_shuffled", stop_early)
        assert call("train", *train_options(files, tmp_path / "cut")).exit_code == 130
    assert [p.name for p in (tmp_path / "cut").iterdir()] == ["checkpoint.safetensors"]
    again = call("train", *train_options(files, tmp_path / "cut"))
    assert "going on from" in again.stderr
    for layer in (0, 2):
        name = f"blocks.{layer}.attn.hook_z"
        one, other = (weights_of(tmp_path / run / name) for run in ("whole", "cut"))
        assert all(torch.equal(one[key], other[key]) for key in one)
    assert not (tmp_path / "cut" / "checkpoint.safetensors").exists()
    refused = call("train", *train_options(files, tmp_path / "cut"))
    assert refused.exit_code == 2
    assert "is there already" in " ".join(refused.stderr.split())

    out, picture = tmp_path / "e.json", tmp_path / "e.png"
    shown = call(
        *("evaluate", "--model", files / "model", "--saes", tmp_path / "cut"),
        *("--data", files / "text.txt", "--context", 16, "--rows", 8),
        *("--out", out, "--picture", picture),
    )
    assert shown.exit_code == 0, shown.output
    assert "run_evals" in shown.stdout
    read = json.loads(out.read_text())
    assert (read["facts"]["sequences"], read["facts"]["model"]) == (8, "model")
    assert sorted(read["facts"]["saes"]) == ["0", "2"]
    assert picture.exists()


def test_sample_as_text(files: Path, tmp_path: Path) -> None:
    options = train_options(files, tmp_path / "saes")
    at = options.index("--data")
    options[at : at + 2] = ["--sample", 20]
    assert call("train", *options, "--backend", "transformer_lens").exit_code == 0
    shown = call(
        *("evaluate", "--model", files / "model", "--saes", tmp_path / "saes", "--sample", 4),
        *("--context", 12, "--no-sae-lens", "--layers", "2", "--backend", "nnsight"),
        *("--out", tmp_path / "e.json"),
    )
    assert shown.exit_code == 0, shown.output
    assert sorted(json.loads((tmp_path / "e.json").read_text())["facts"]["saes"]) == ["2"]


@pytest.mark.parametrize(
    ("command", "options", "message"),
    [
        ("train", ["--layers", "0,7"], "no layer 7"),
        ("train", ["--layers", "x"], "expected all, or numbers"),
        ("train", ["--recipe", "opt"], "expected generic"),
        ("train", ["--k", "0"], "expected more than 0"),
        ("train", ["--sample", "3"], "give one"),
        ("train", ["--data", "none.txt"], "no such file"),
        ("train", ["--context", "50"], "longer than the context"),
        ("evaluate", ["--context", "50"], "context is 40"),
        ("evaluate", ["--rows", "0"], "expected at least 1"),
        ("evaluate", ["--out", "e.txt"], "ends in .json"),
        ("evaluate", ["--layers", "1-9"], "no layer"),
        ("evaluate", ["--sample", "3"], "give one"),
    ],
)
def test_refusals(
    files: Path, tmp_path: Path, command: str, options: list[str], message: str
) -> None:
    given = {
        "train": train_options(files, tmp_path / "out"),
        "evaluate": [
            *("--model", files / "model", "--saes", files / "saes", "--context", 16),
            *("--data", files / "text.txt", "--out", tmp_path / "e.json"),
        ],
    }[command]
    result = call(command, *given, *options)
    assert result.exit_code == 2, result.output
    assert message in " ".join(result.stderr.split())
    assert not list(tmp_path.iterdir())
