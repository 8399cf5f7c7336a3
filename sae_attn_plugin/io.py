"""Files are written whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from sae_attn_plugin.errors import FileError

__all__ = ["check_writable", "read_json", "write_atomically", "write_json"]


def check_writable(path: str | Path) -> Path:
    """The real path of a file to write, told early: before the work whose result it will hold.

    Raises:
        FileError: the folder is missing or read-only, or the path is no regular file.
    """
    real = Path(os.path.realpath(path))  # a link is written through, not replaced
    if not real.parent.is_dir():
        raise FileError(f"cannot write {path}: the folder {real.parent} does not exist")
    if real.exists() and not real.is_file():
        what = "a folder" if real.is_dir() else "not a regular file"
        raise FileError(f"cannot write {path}: it is {what}")
    if not os.access(real.parent, os.W_OK):
        raise FileError(f"cannot write {path}: the folder {real.parent} is read-only")
    return real


def write_atomically(path: str | Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file through a temporary one beside it, so that readers see all of it or nothing.

    Args:
        path: where; an existing file is replaced only when ``write`` is done.
        write: called once with the open binary file.

    Raises:
        FileError: the file cannot be written. Whatever ``write`` itself raises passes through.
        Either way nothing is left behind, and an existing file stays as it was.
    """
    real = check_writable(path)
    temporary = real.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, real)
    except BaseException as error:  # Ctrl-C too
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and not isinstance(error, FileError):
            raise FileError(f"cannot write {path}: {error.strerror or error}") from error
        raise
    _sync_folder(real.parent)


def write_json(path: str | Path, document: Any, *, indent: int | None = 1) -> None:
    """Write a value as JSON, whole or not at all.

    Raises:
        FileError: the file cannot be written. ValueError: NaN or infinity.
    """
    text = json.dumps(document, indent=indent, allow_nan=False)
    write_atomically(path, lambda file: file.write(f"{text}\n".encode("ascii")))


def read_json(path: str | Path, what: str, format: str | None = None) -> dict[str, Any]:
    """The object that a JSON file holds.

    Args:
        what: it is, for messages. format: what its ``format`` must be.

    Raises:
        FileError: missing, damaged, or something else.
    """
    try:
        document = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise FileError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise FileError(f"{path} is damaged or holds no {what}: {error}") from error
    if not isinstance(document, dict) or (format and document.get("format") != format):
        expected = "a JSON object" if format is None else f"JSON with format {format!r}"
        raise FileError(f"{path} holds no {what}; expected {expected}")
    return document


def _sync_folder(folder: Path) -> None:
    # The rename itself survives a power cut only once the folder is on disk. Not every system can.
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
