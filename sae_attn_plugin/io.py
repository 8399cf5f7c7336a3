"""Files are written whole or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from sae_attn_plugin.errors import FileError

__all__ = ["check_writable", "write_atomically"]


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


def _sync_folder(folder: Path) -> None:
    # The rename itself survives a power cut only once the folder is on disk. Not every system can.
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
