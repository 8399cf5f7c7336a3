"""The package's exceptions: each says what was given, what was expected and what to do."""

from __future__ import annotations


class SaeAttnError(Exception):
    """Base class of every error this package raises on purpose."""


class InputError(SaeAttnError, ValueError):
    """A value the caller gave cannot be used: position, feature, token, prompt, path, option."""


class UnsupportedError(SaeAttnError, NotImplementedError):
    """A model, dictionary or option whose algebra this package does not know."""


class BackendError(SaeAttnError, RuntimeError):
    """A model does not behave as its architecture says; the message names what failed."""


class FileError(SaeAttnError, OSError):
    """A file is missing, foreign, damaged or cannot be written."""
