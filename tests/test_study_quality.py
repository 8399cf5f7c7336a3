"""The quality study, and ``sae-attn study``."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import sae_attn_plugin as sap
from sae_attn_plugin import cli
from sae_attn_plugin.demo import language
from sae_attn_plugin.errors import InputError
from sae_attn_plugin.evaluation import METRICS
from sae_attn_plugin.studies import load_study, quality


@pytest.fixture(scope="module")
def lens() -> sap.FeatureLens:
    return sap.demo.load("nnsight")


@pytest.fixture(scope="module")
def windows() -> torch.Tensor:
    return torch.tensor(language.token_rows(random.Random(2), 12, 64))


def study(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(cli.app, ["study", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


def test_figures_are_those_of_evaluate(
    lens: sap.FeatureLens, windows: torch.Tensor, tmp_path: Path
) -> None:
    table = quality(lens, windows, seed=4).table
    measured = sap.evaluate(lens, windows, seed=4, sae_lens=False, progress=False).table
    for row in table.to_dict("records"):
        for name in METRICS:
            expected = measured.loc[(row["layer"], name), ["value", "low", "high"]].tolist()
            assert [row[f"{name}{end}"] for end in ("", "_low", "_high")] == pytest.approx(
                expected, nan_ok=True
            )
    kept = quality(lens, windows, seed=4, folder=tmp_path).table  # layer by layer
    assert len(list(tmp_path.iterdir())) == 4
    # The draws behind these intervals depend on which layers go together.
    drawn = [f"{name}{end}" for name in ("dense", "dead") for end in ("_low", "_high")]
    one, other = (x[[c for c in table if c not in drawn]] for x in (kept, table))
    assert np.allclose(one.to_numpy(), other.to_numpy(), rtol=1e-6, equal_nan=True)


def test_the_picture(lens: sap.FeatureLens, windows: torch.Tensor) -> None:
    found = quality(lens, windows, [1, 3])
    assert [tuple(axes.get_xticks()) for axes in found.plot().axes] == [(1, 3)] * 3


def test_bad_input(lens: sap.FeatureLens, windows: torch.Tensor) -> None:
    with pytest.raises(InputError, match="no SAE in layer 8; layers with one"):
        quality(lens, windows, [8])
    with pytest.raises(InputError, match="context"):
        quality(lens, torch.ones(2, 200, dtype=torch.long))


@pytest.mark.parametrize(
    "arguments",
    [
        ("quality",),
        ("prefix", "--set", "n=2", "--set", "heads=[[1,3]]"),
        ("induction-feature", "--set", "layer=1", "--set", "min_fires=1"),
        ("ioi-features", "--set", "layers=[3]"),
        ("ioi-positions", "--set", "layers=[1]", "--set", "conjunctions=[]"),
        ("ioi-circuit", "--set", "features=[[1,504]]"),
        ("qk-ioi", "--set", "heads=[[2,0]]", "--set", 'keys=["S2"]'),
    ],
    ids=lambda arguments: arguments[0],
)
def test_every_study_from_the_command_line(arguments: tuple[str, ...], tmp_path: Path) -> None:
    options = ["--model", "demo", "--limit", 4, "--context", 64, "--out", tmp_path / "a" / "new"]
    if arguments[0] == "induction-feature":
        options += ["--limit", 40]
    code, output = study(*arguments, *options)
    assert code == 0, output
    name = arguments[0]
    found = load_study(tmp_path / "a" / "new" / f"{name}.json")
    assert found.name == name.replace("-", "_")
    assert found.settings["model"] == "sae-attn-demo"
    assert (tmp_path / "a" / "new" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert next(iter(found.tables)) in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("quality",), "needs text"),
        (("ioi-features", "--model", "demo", "--set", "laers=3"), "NAME one of layers"),
        (("ioi-features", "--model", "demo", "--set", "layers"), "expected NAME=VALUE"),
        (("induction-feature", "--model", "demo"), "missing a required argument: 'layer'"),
        (("prefix", "--model", "demo", "--saes", "x"), "leave --saes out"),
        (("prefix", "--model", "x"), "give --saes"),
        (("prefix", "--model", "demo", "--limit", "0"), "at least 1"),
        (("prefix", "--model", "demo", "--out", "/dev/null/at/all"), "/dev/null is no folder"),
        (("ioi-positions", "--model", "demo", "--set", "role=S9"), "unknown role"),
    ],
)
def test_clear_errors(arguments: tuple[str, ...], message: str, tmp_path: Path) -> None:
    options = () if "--out" in arguments else ("--out", tmp_path)
    code, output = study(*arguments, *options)
    assert code == 2
    assert message in " ".join(output.split())
    assert not list(tmp_path.iterdir())
