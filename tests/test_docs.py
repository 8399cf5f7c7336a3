"""The code in the documentation runs."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
NEEDS_A_HUB = ("from_pretrained_no_processing", "gpt2-small-hook-z-kk")


def blocks() -> list[tuple[str, str]]:
    found = []
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        text = page.read_text(encoding="utf-8")
        for i, code in enumerate(re.findall(r"```python\n(.*?)```", text, re.DOTALL)):
            found.append((f"{page.relative_to(ROOT)}-{i}", code))
    return found


@pytest.mark.parametrize(("name", "code"), blocks(), ids=lambda value: value[:40])
def test_python_block(
    name: str, code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    compile(code, name, "exec")
    if not any(word in code for word in NEEDS_A_HUB):
        execute(code, tmp_path, {})


def execute(code: str, folder: Path, names: dict[str, Any]) -> dict[str, Any]:
    """Run code from a file, since nnsight reads the source of its traces."""
    # A name of its own, since nnsight remembers traces by file and line.
    path = folder / f"block_{zlib.crc32(code.encode()):08x}.py"
    path.write_text(code, encoding="utf-8")
    return runpy.run_path(str(path), init_globals=names, run_name="__main__")


def gotchas() -> list[tuple[str, str, str, str]]:
    """Title, wrong code, what it says, right code."""
    page = (ROOT / "docs" / "gotchas.md").read_text(encoding="utf-8")
    found = []
    for section in page.split("\n## ")[1:]:
        title = section.splitlines()[0]
        fences = dict(re.findall(r"```(\S+(?: title=\"\w+\")?)\n(.*?)```", section, re.DOTALL))
        kinds = ('python title="Wrong"', "text", 'python title="Right"')
        assert set(fences) == set(kinds), f"{title}: {sorted(fences)}"
        found.append((title, *(fences[kind] for kind in kinds)))
    return found


@pytest.fixture(scope="module")
def gotcha_names(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    setup = next(code for name, code in blocks() if name == f"{Path('docs', 'gotchas.md')}-0")
    names = execute(setup, tmp_path_factory.mktemp("gotchas"), {})
    return {name: names[name] for name in ("torch", "sap", "lens", "run")}


@pytest.mark.parametrize(("title", "wrong", "seen", "right"), gotchas(), ids=lambda v: v[:40])
def test_gotcha(
    title: str,  # noqa: ARG001 - the id
    wrong: str,
    seen: str,
    right: str,
    gotcha_names: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    try:
        execute(wrong, tmp_path, gotcha_names)
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
    else:
        said = capsys.readouterr().out
    assert seen.split() == said.split()[: len(seen.split())]
    execute(right, tmp_path, gotcha_names)


def test_the_readme_commands_are_what_ci_runs() -> None:
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in ("demo", "test"):
        assert f'"$(block {name})"' in script
        block = re.search(rf"<!-- {name} -->\n```bash\n(.+?)\n```\n<!-- /{name} -->", readme)
        assert block is not None
        assert subprocess.run(["bash", "-n", "-c", block[1]], check=False).returncode == 0


def test_links_between_pages() -> None:
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_site_builds_without_warnings(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-d", str(tmp_path)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    result = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert (tmp_path / "reference" / "index.html").is_file()
