"""Sessions of the explorer as files: one folder, one JSON file each, nothing outside it."""

from __future__ import annotations

import contextlib
import json
import re
from pathlib import Path
from typing import Any

from sae_attn_plugin.errors import FileError, InputError
from sae_attn_plugin.io import write_atomically

__all__ = ["Sessions"]

FORMAT, VERSION = "sae-attn-session", 1
_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9 _-]{0,58}[A-Za-z0-9_-])?")
_LONGEST = 1_000_000  # bytes


class Sessions:
    """What a reader did, by name: prompt, trail, edits, target. The folder is made when needed."""

    def __init__(self, folder: str | Path) -> None:
        self.folder: Path = Path(folder)

    def names(self) -> list[str]:
        """Sorted."""
        found = self.folder.glob("*.json") if self.folder.is_dir() else ()
        return sorted(path.stem for path in found if _NAME.fullmatch(path.stem))

    def load(self, name: str) -> dict[str, Any]:
        """The state that :meth:`save` wrote.

        Raises:
            InputError: no session of that name. FileError: it is foreign or damaged.
        """
        path = self._path(name)
        try:
            text = path.read_text(encoding="utf-8")
            document = json.loads(text)
        except FileNotFoundError:
            raise InputError(f"no session named {name!r}") from None
        except (OSError, ValueError, RecursionError) as error:
            raise FileError(f"cannot read the session {name!r}: {error}") from None
        if not isinstance(document, dict) or document.get("format") != FORMAT:
            raise FileError(f"{path.name} is no session of the explorer")
        if document.get("version") != VERSION or not isinstance(document.get("state"), dict):
            raise FileError(
                f"{path.name} has version {document.get('version')!r}; expected {VERSION}"
            )
        return document["state"]

    def save(self, name: str, state: Any) -> None:
        """Write a session whole or not at all; one of the same name is replaced.

        Raises:
            InputError: a name or a state that cannot be stored. FileError: cannot be written.
        """
        path = self._path(name)
        if not isinstance(state, dict):
            raise InputError("expected the state of a session, an object")
        document = {"format": FORMAT, "version": VERSION, "state": state}
        data = (json.dumps(document, sort_keys=True, indent=1) + "\n").encode("ascii")
        if len(data) > _LONGEST:
            raise InputError(f"the session has {len(data)} bytes; at most {_LONGEST} are stored")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise FileError(f"cannot make the folder {self.folder}: {error.strerror}") from None
        write_atomically(path, lambda file: file.write(data))

    def delete(self, name: str) -> None:
        """Remove a session; one that is not there is no error."""
        with contextlib.suppress(FileNotFoundError):
            self._path(name).unlink()

    def _path(self, name: str) -> Path:
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise InputError(
                "a session's name has 1 to 60 letters, digits, spaces, '-' or '_', got "
                f"{name!r:.80}"
            )
        path = self.folder / f"{name}.json"
        if path.is_symlink():
            raise InputError(f"the session {name!r} is a link, which is not followed")
        return path
