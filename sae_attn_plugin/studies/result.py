"""What a study gives back: tables, the settings that made them, a picture, a file."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from sae_attn_plugin.errors import FileError, InputError
from sae_attn_plugin.io import read_json, write_json

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Study", "load_study"]

_FORMAT = "sae-attn-study/1"


@dataclass(frozen=True, eq=False)
class Study:
    """The result of a study.

    Attributes:
        name: of the study, as in ``sae-attn study NAME``.
        settings: everything that made it: model, SAEs, arguments, versions. JSON values.
        tables: by name, the main one first.
    """

    name: str
    settings: Mapping[str, Any]
    tables: Mapping[str, pd.DataFrame] = field(repr=False)

    @property
    def table(self) -> pd.DataFrame:
        """The main table."""
        return next(iter(self.tables.values()))

    def plot(self) -> Figure:
        """The study's picture."""
        module = importlib.import_module(f"sae_attn_plugin.studies.{self.name}")
        return module.plot(self)

    def save(self, path: str | Path) -> None:
        """Write the study as JSON, whole or not at all; :func:`load_study` reads it back exactly.

        Raises:
            FileError: the file cannot be written. InputError: a path that does not end in .json.
        """
        if Path(path).suffix.lower() != ".json":
            raise InputError(f"expected a path that ends in .json, got {str(path)!r}")
        document = {
            "format": _FORMAT,
            "name": self.name,
            "settings": self.settings,
            "tables": {
                name: {
                    "columns": {str(c): str(table[c].dtype) for c in table},
                    # not pandas' own JSON, which rounds to 15 digits
                    "rows": [list(map(_plain, row)) for row in table.itertuples(index=False)],
                }
                for name, table in self.tables.items()
            },
        }
        write_json(path, document)

    def _repr_html_(self) -> str:
        import html

        heading = html.escape(f"{self.name}: {self.settings.get('model', '')}")
        parts = [f"<h4>{html.escape(n)}</h4>{t.to_html(index=False)}" for n, t in self._shown()]
        return f"<div><h3>{heading}</h3>{''.join(parts)}</div>"

    def _shown(self) -> list[tuple[str, pd.DataFrame]]:
        return [(name, table.head(60)) for name, table in self.tables.items()]


def load_study(path: str | Path) -> Study:
    """Read what :meth:`Study.save` wrote.

    Raises:
        FileError: missing, damaged, or not a study.
    """
    document = read_json(path, "study", _FORMAT)
    try:
        if not isinstance(document["name"], str) or not isinstance(document["settings"], dict):
            raise TypeError("its name or its settings are of another type")
        tables = {
            name: pd.DataFrame(
                [_cells(row, len(part["columns"])) for row in part["rows"]],
                columns=list(part["columns"]),
                dtype=object,  # else pandas takes what is beyond int64 as uint64, and then wraps it
            ).astype(part["columns"])
            for name, part in document["tables"].items()
        }
        return Study(document["name"], document["settings"], tables)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise FileError(f"{path} is damaged: {type(error).__name__}: {error}") from error


def _cells(row: list[Any], width: int) -> list[Any]:
    if len(row) != width:
        raise ValueError(f"a row of {len(row)} cells, expected {width}")
    return [float("nan") if cell is None else cell for cell in row]


def _plain(value: Any) -> Any:
    """A cell as JSON; NaN as null."""
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and value != value else value
