"""The examples run as they are, offline, on the demo model."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import matplotlib
import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
# The others train or measure for long; docs name what they made.
WITH_CELLS = (
    "quickstart",
    "dfa",
    "ioi_circuit",
    "induction_heads",
    "induction_features",
    "feature_families",
    "qk",
    "training",
    "nnsight_hosts",
)


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.slow] * (n == "feature_families")) for n in WITH_CELLS],
)
def test_example(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    matplotlib.use("Agg")
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    assert len(capsys.readouterr().out) > 200


def test_every_example_with_cells_runs_and_says_how_it_runs_on_gpt2() -> None:
    with_cells = {p.stem for p in EXAMPLES.glob("*.py") if "\n# %%" in p.read_text("utf-8")}
    assert with_cells == set(WITH_CELLS)
    for name in with_cells:
        text = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8")
        documented = re.search(r'^    (.*"gpt2".*)$', text, re.MULTILINE)
        assert documented is not None, f"{name} does not show its line for GPT-2"
        compile(documented[1], name, "exec")
        variable = documented[1].split("=")[0].strip()
        marked = [line for line in text.splitlines() if "line to change for GPT-2" in line]
        assert len(marked) == 1
        assert re.search(rf"^{re.escape(variable)} = ", text, re.MULTILINE)
