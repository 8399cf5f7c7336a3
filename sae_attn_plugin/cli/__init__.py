"""The ``sae-attn`` command. Heavy libraries load only when a command needs them.

One module per command; what they share is in ``options`` and ``screen``.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

import sae_attn_plugin as sap
from sae_attn_plugin.cli.cards import cards
from sae_attn_plugin.cli.demo import demo
from sae_attn_plugin.cli.evaluate import evaluate
from sae_attn_plugin.cli.explore import explore
from sae_attn_plugin.cli.export import export
from sae_attn_plugin.cli.faithfulness import faithfulness
from sae_attn_plugin.cli.features import features
from sae_attn_plugin.cli.graph import graph
from sae_attn_plugin.cli.heads import heads
from sae_attn_plugin.cli.releases import releases
from sae_attn_plugin.cli.reproduce import reproduce
from sae_attn_plugin.cli.study import study
from sae_attn_plugin.cli.train import train
from sae_attn_plugin.cli.validate import validate

__all__ = ["app", "main"]

app: typer.Typer = typer.Typer(
    name="sae-attn",
    help="Exact attribution graphs of attention-SAE features.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def main() -> None:
    """Run the command line."""
    for stream in (sys.stdout, sys.stderr):
        # Tokens may hold what the terminal's encoding cannot show.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # pyright: ignore[reportAttributeAccessIssue]
    app()


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"sae-attn {sap.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


for _command in (
    *(demo, graph, validate, faithfulness, reproduce, export, explore),
    *(train, evaluate, features, study, heads, cards, releases),
):
    app.command()(_command)
