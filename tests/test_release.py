"""What is built holds what a user needs, and nothing else."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import sae_attn_plugin as sap

ROOT = Path(__file__).parents[1]
DATA = (
    "py.typed",
    "demo/model/model.safetensors",
    "demo/model/config.json",
    "demo/saes/blocks.0.attn.hook_z/sae_weights.safetensors",
    "demo/report.json",
)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wheel and sdist, built without the network by the hatchling that is installed."""
    folder = tmp_path_factory.mktemp("dist")
    for target in ("wheel", "sdist"):
        command = [sys.executable, "-m", "hatchling", "build", "-t", target, "-d", str(folder)]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stdout + result.stderr
    return folder


def test_the_wheel(built: Path) -> None:
    (path,) = built.glob("*.whl")
    assert path.name == f"sae_attn_plugin-{sap.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(path) as wheel:
        names = set(wheel.namelist())
        metadata = wheel.read(f"sae_attn_plugin-{sap.__version__}.dist-info/METADATA").decode()
    package = ROOT / "sae_attn_plugin"
    shipped = {
        f"sae_attn_plugin/{p.relative_to(package).as_posix()}"
        for p in package.rglob("*")
        if p.is_file() and "__pycache__" not in p.parts and p.suffix != ".pyc"
    }
    assert shipped <= names, sorted(shipped - names)[:5]
    assert {f"sae_attn_plugin/{name}" for name in DATA} <= names
    others = {name.split("/")[0] for name in names}
    assert others == {"sae_attn_plugin", f"sae_attn_plugin-{sap.__version__}.dist-info"}
    assert path.stat().st_size < 20 * 2**20
    assert {*re.findall(r"^Provides-Extra: (.+)$", metadata, re.M)} >= {"docs", "explore", "test"}


def test_the_sdist(built: Path) -> None:
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as sdist:
        names = {name.split("/", 1)[1] for name in sdist.getnames() if "/" in name}
    for name in (
        "README.md",
        "CHANGELOG.md",
        "CONTRIBUTING.md",
        "CITATION.cff",
        "LICENSE",
        "constraints.txt",
        "mkdocs.yml",
        "docs/index.md",
        "examples/quickstart.py",
        "tests/test_release.py",
        "pyproject.toml",
        *(f"sae_attn_plugin/{name}" for name in DATA),
    ):
        assert name in names, name
    assert not [
        name for name in names if name.startswith((".ci", ".git/")) or "__pycache__" in name
    ]


def test_every_public_name_is_in_the_reference() -> None:
    page = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
    documented = re.findall(r"^::: (\S+)$(?:\n    options:\n      members: \[(.+)\])?", page, re.M)
    whole = {name for name, members in documented if not members}
    some = {f"{name}.{m.strip()}" for name, members in documented for m in members.split(",")}
    missing = []
    for name in sap.__all__:
        value = getattr(sap, name)
        home = getattr(value, "__module__", None) or getattr(value, "__name__", "")
        full = value.__name__ if hasattr(value, "__path__") else f"{home}.{name}"
        if hasattr(value, "__file__"):  # a module: it, or something in it
            found = any(entry.startswith(value.__name__) for entry in whole | some)
        else:
            found = full in whole | some or home in whole
        if not found:
            missing.append(full)
    assert not missing


# What sae_lens leaves untyped, and what is not parametrised yet.
UNTYPED = {
    "sae_attn_plugin.saes.AttentionTrainingSAEConfig.metadata",
    "sae_attn_plugin.training.RunnerConfig",
    "sae_attn_plugin.training.train",
}
CAUSES = ("missing type annotation", "Type unknown", "has unknown type", "Unknown, dict")


@pytest.mark.slow
def test_public_names_say_their_types() -> None:
    """By pyright's own measure; a name that only mentions another such name is not a cause."""
    command = [sys.executable, "-m", "pyright", "--verifytypes", "sae_attn_plugin"]
    command += ["--ignoreexternal", "--outputjson"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    symbols = json.loads(result.stdout)["typeCompleteness"]["symbols"]
    assert len(symbols) > 2000
    found = {
        symbol["name"]
        for symbol in symbols
        if symbol["isExported"]
        for one in symbol["diagnostics"]
        if any(cause in one["message"] for cause in CAUSES)
    }
    assert not found - UNTYPED, sorted(found - UNTYPED)
