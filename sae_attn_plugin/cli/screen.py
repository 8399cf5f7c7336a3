"""Results on standard output, progress and errors on standard error."""

from __future__ import annotations

import contextlib
import numbers
import warnings
from collections.abc import Generator, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

import sae_attn_plugin as sap
from sae_attn_plugin.errors import InputError, SaeAttnError

if TYPE_CHECKING:
    import networkx as nx

    from sae_attn_plugin.attribution.table import Attribution
    from sae_attn_plugin.graphs.paths import Path as GraphPath
    from sae_attn_plugin.lens import Run

_NOISY = ("transformers", "transformer_lens", "sae_lens", "nnsight", "torch", "huggingface_hub")


@contextlib.contextmanager
def session() -> Generator[Screen]:
    """Errors of our own as one message, an interrupt as exit 130; anything else is a defect."""
    stack = contextlib.ExitStack()
    screen = Screen(stack)
    try:
        with stack:
            yield screen
    except SaeAttnError as error:
        screen.error.print(Text("error: ", style="bold red").append(plain(str(error))))
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        screen.error.print("interrupted")
        raise typer.Exit(130) from None


@contextlib.contextmanager
def _quiet() -> Generator[None]:
    """Keep what the hosts say about themselves off the screen: notices, weight-loading bars."""
    with warnings.catch_warnings():
        for module in _NOISY:
            for category in (FutureWarning, DeprecationWarning):
                warnings.filterwarnings("ignore", category=category, module=rf"{module}(\.|$)")
        from transformers.utils import logging

        verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        try:
            yield
        finally:
            logging.set_verbosity(verbosity)
            if bars:
                logging.enable_progress_bar()


def quoted(token: str) -> str:
    from sae_attn_plugin.nodes import quote

    return plain(quote(token))


def plain(text: str) -> str:
    """Text that cannot steer a terminal."""
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text
    )


class Screen:
    """Results on standard output, progress and errors on standard error."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        self._stack = stack
        # Tokens such as "[red]" or ":smile:" are text.
        safe: dict[str, Any] = {"markup": False, "highlight": False, "emoji": False}
        self.error: Console = Console(stderr=True, soft_wrap=True, **safe)
        self.out: Console = Console(**safe)
        if not self.out.is_terminal:
            self.out = Console(width=120, **safe)  # else 80, whatever the reader's width
        self.live: bool = self.error.is_terminal

    def hush(self) -> None:
        """From here on the hosts keep quiet; loads transformers, which takes its time."""
        with self.busy("starting"):
            self._stack.enter_context(_quiet())

    @contextlib.contextmanager
    def busy(self, what: str) -> Generator[None]:
        if not self.live:
            yield
            return
        with self.error.status(plain(what)):
            yield

    def heading(self, text: str) -> None:
        self.out.print()
        self.out.print(Text(plain(text), style="bold"))

    def lines(self, *lines: str | Text) -> None:
        for line in lines:
            self.out.print("  ", line, sep="", soft_wrap=True)

    def table(self, columns: Iterable[str], rows: Iterable[Iterable[Any]]) -> None:
        """Numbers to the right."""
        cells = [[_cell(value) for value in row] for row in rows]
        columns = list(columns)
        style: dict[str, Any] = {"box": None, "pad_edge": False, "header_style": "dim"}
        table = Table(**style, padding=(0, 2, 0, 0), show_header=any(columns))
        for i, column in enumerate(columns):
            numeric = bool(cells) and cells[0][i][1]
            table.add_column(column, justify="right" if numeric else "left", overflow="fold")
        for row in cells:
            table.add_row(*(text for text, _ in row))
        self.out.print(_indented(table))

    def prompt(self, run: Run) -> None:
        self.heading("Prompt")
        line = Text()
        for position, token in enumerate(run.token_strings):
            item = Text(f"{position}", style="dim").append(f" {quoted(token)}  ", style="not dim")
            if line.cell_len and line.cell_len + item.cell_len > self.out.width - 2:
                self.lines(line)
                line = Text()
            line.append_text(item)
        self.lines(line)

    def strongest_nodes(
        self, attribution: Attribution, kind: str | None = None, n: int = 10
    ) -> None:
        nodes = attribution.nodes
        roots = {str(node) for node in attribution.roots.values()}
        nodes: Any = nodes[~nodes.index.isin(roots)]
        if kind is not None:
            nodes = nodes[nodes["kind"] == kind]
        nodes = nodes.sort_values("influence", ascending=False, kind="stable").head(n)
        edges = attribution.edges
        direct = edges[edges["target"].isin(roots)].groupby("source", observed=True)["weight"].sum()
        what = "features" if kind == "attn" else "nodes"
        self.heading(f"Most influential {what}")
        self.table(
            ("node", "token", "activation", "influence", "edge into the target"),
            (
                (name, quoted(token), activation, influence, direct.get(name))
                for name, token, activation, influence in zip(
                    nodes.index, nodes["token"], nodes["activation"], nodes["influence"],
                    strict=True,
                )
            ),
        )  # fmt: skip

    def paths(self, label: str, graph: nx.DiGraph[Any], **options: Any) -> None:
        try:
            found: list[GraphPath] = sap.strongest_paths(graph, **options)
        except InputError as error:  # a graph may hold no path from there
            found, label = [], f"{label}: {error}"
        if label:
            self.lines(Text(plain(label), style="dim"))
        for path in found:
            sign = "+" if path.sign > 0 else "-"
            self.lines(f"{sign} {path.share:7.2%}  {plain(str(path))}")

    def values(self, graph: nx.DiGraph[Any]) -> None:
        self.heading("Target")
        targets = graph.graph["targets"]
        self.table(
            ("target", "value", "constant", "pruned"),
            (
                (target, *(graph.nodes[target].get(key, 0.0) for key in
                           ("pre_activation", "constant", "pruned_in")))
                for target in targets
            ),
        )  # fmt: skip

    def ledger(self, attribution: Attribution) -> None:
        self.heading(
            f"Worst ledger residual {attribution.worst_residual:.1e} over "
            f"{len(attribution.ledger)} targets"
        )
        self.lines("sum of edges + constant = value for each, relative to the sum of sizes")

    def save(
        self, run: Run, graph: nx.DiGraph[Any], file: Path, picture: Path | None, page: Path | None
    ) -> None:
        """Before anything is printed, so that ``| head`` costs no file."""
        from sae_attn_plugin.graphs.picture import write_png

        figure = shown = None  # before anything is written
        if picture is not None:
            with self.busy("drawing"):
                figure = sap.draw(graph)
        if page is not None:
            with self.busy("making the page"):
                shown = sap.page(run, graph)
        sap.save(graph, file)
        if figure is not None and picture is not None:
            write_png(figure, picture)
        if shown is not None and page is not None:
            shown.save(page)

    def written(self, graph: nx.DiGraph[Any], *files: Path | None) -> None:
        self.heading(f"Written: {len(graph)} nodes, {graph.number_of_edges()} edges")
        self.lines(*(plain(str(path)) for path in files if path is not None))


def _indented(content: Any) -> Any:
    from rich.padding import Padding

    return Padding(content, (0, 0, 0, 2), expand=False)


def _cell(value: Any) -> tuple[str, bool]:
    """The text of a table's cell, and whether it is a number."""
    if value is None or value != value:  # NaN
        return "", True
    if isinstance(value, numbers.Real) and not isinstance(value, numbers.Integral):
        return f"{float(value):.4f}", True
    text = plain(str(value))
    return text, isinstance(value, numbers.Integral) or text.endswith("%") or text[:1] in ("+", "-")
