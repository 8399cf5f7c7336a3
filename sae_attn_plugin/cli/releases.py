"""``sae-attn releases``."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

import sae_attn_plugin as sap
from sae_attn_plugin.cli.screen import session
from sae_attn_plugin.errors import InputError
from sae_attn_plugin.io import check_writable, write_atomically


class Hook(str, Enum):
    z = "z"
    attn_out = "attn_out"


def releases(
    model: Annotated[
        str | None, typer.Option(help="Only of models whose name holds this, such as gemma-2.")
    ] = None,
    hook: Annotated[
        Hook | None, typer.Option(help="Only before (z) or after the output projection.")
    ] = None,
    saes: Annotated[str | None, typer.Option(help="List the SAEs of this release instead.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write the table here as well, as .csv.")] = None,
) -> None:
    """List the releases of attention-output SAEs that sae_lens and this package know."""
    with session() as screen:
        if out is not None:
            if out.suffix.lower() != ".csv":
                raise InputError(f"expected a path that ends in .csv, got {str(out)!r}")
            check_writable(out)
        screen.hush()
        with screen.busy("reading the directory"):
            table: Any = sap.releases(by_sae=saes is not None)
        if saes is not None:
            if saes not in set(table["release"]):
                raise InputError(
                    f"no release {saes!r} of attention-output SAEs; sae-attn releases lists them"
                )
            table = table[table["release"] == saes].drop(columns=["release", "path"])
        if model is not None:
            table = table[table["model"].str.contains(model, case=False, regex=False)]
        if hook is not None:
            table = table[table["hook"] == hook.value]
        if out is not None:
            write_atomically(out, lambda file: table.to_csv(file, index=False))
        names = ["layer", "sae_id"] if saes is not None else ["release", "model", "hook", "layers"]
        shown = table[[*names, "d_sae", "l0"]]
        screen.table(shown.columns, ([_text(value) for value in row] for row in shown.to_numpy()))
        if out is not None:
            screen.heading("Written")
            screen.lines(str(out))


def _text(value: Any) -> Any:
    import pandas as pd

    if isinstance(value, tuple):
        if len(value) > 4 and value == tuple(range(value[0], value[-1] + 1)):
            return f"{value[0]}-{value[-1]}"
        return ", ".join(f"{item:g}" if isinstance(item, float) else str(item) for item in value)
    return "" if value is None or pd.isna(value) else str(value)
