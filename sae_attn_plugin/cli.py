"""The ``sae-attn`` command. Heavy libraries load only when a command needs them."""

from __future__ import annotations

import contextlib
import numbers
import re
import sys
import warnings
from collections.abc import Iterable, Iterator
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

import sae_attn_plugin as sap
from sae_attn_plugin.errors import InputError, SaeAttnError
from sae_attn_plugin.io import check_writable

if TYPE_CHECKING:
    import networkx as nx

    from sae_attn_plugin.attribution.table import Attribution
    from sae_attn_plugin.graphs.paths import Path as GraphPath
    from sae_attn_plugin.lens import FeatureLens, Run
    from sae_attn_plugin.nodes import Target

__all__ = ["app", "main"]

_FROZEN = ("patterns", "norms", "mlp", "attention")
_NOISY = ("transformers", "transformer_lens", "sae_lens", "nnsight", "torch", "huggingface_hub")
_FEATURE = re.compile(r"attn:(\d+):(\d+)@(-?\d+)")
_PICTURE_NODES = 60  # more than these do not fit a slide


class Backend(str, Enum):
    transformer_lens = "transformer_lens"
    transformer_bridge = "transformer_bridge"
    nnsight = "nnsight"


class Dtype(str, Enum):
    float32 = "float32"
    float64 = "float64"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Format(str, Enum):
    json = "json"
    graphml = "graphml"
    neuronpedia = "neuronpedia"


app = typer.Typer(
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


# -- commands ------------------------------------------------------------------------------------


@app.command()
def demo(
    out: Annotated[
        Path, typer.Option(help="Folder for graph.json and graph.png.", show_default="here")
    ] = Path(),
    backend: Annotated[Backend, typer.Option(help="What runs the model.")] = (
        Backend.transformer_lens
    ),
    prompt: Annotated[str | None, typer.Option(help="Default: an IOI sentence.")] = None,
    correct: Annotated[str | None, typer.Option(help='A token, such as " Mary".')] = None,
    wrong: Annotated[str | None, typer.Option(help='A token, such as " John".')] = None,
) -> None:
    """Who gave what to whom: a circuit of attention features in the demo model, offline."""
    with _session() as screen:
        files = _files(out / "graph.json", out / "graph.png")
        if prompt is not None and (correct is None or wrong is None):
            raise InputError("--prompt needs --correct and --wrong, the two tokens to compare")
        screen.hush()
        ioi = sap.demo.ioi_prompt()
        correct = ioi.correct if correct is None else correct
        wrong = ioi.wrong if wrong is None else wrong
        with screen.busy("loading the demo model"):
            lens = sap.demo.load(backend=backend.value)
        with screen.busy("running the prompt"):
            run = lens.run(str(ioi) if prompt is None else prompt)
        target = sap.LogitDiff(_token(correct), _token(wrong))
        with screen.busy("attributing the logit difference"):
            attribution = run.attribute(target, progress=False)
            everything = attribution.to_networkx()
            pruned = attribution.prune(max_nodes=_PICTURE_NODES)
            graph = _with_pruning(pruned.to_networkx(), 0.8, 0.98, _PICTURE_NODES)
        positions = _roles(run, correct, wrong)
        top = _top_feature(attribution)
        ablation = []
        if top is not None:
            with screen.busy("ablating the top feature"):
                ablation = _ablate(lens, run, attribution, target, top)
        screen.save(graph, *files)

        screen.heading(f"{lens}")
        screen.prompt(run)
        screen.logits(run, [target.correct, target.wrong])
        screen.active(run, attribution)
        if top is not None:
            screen.heads(lens, run, top)
        screen.heading("Strongest paths into the logit difference")
        screen.paths("from anywhere", everything, n=5)
        for role in ("IO", "S2"):
            if role in positions:
                label = f"from {role}, {_quoted(run.token_strings[positions[role]])}"
                screen.paths(f"{label}@{positions[role]}", everything, source=positions[role], n=2)
        if top is not None:
            screen.ablation(top, ablation)
        screen.ledger(attribution)
        screen.written(graph, *files)
        screen.heading("Next")
        screen.lines(
            "sae-attn demo --backend nnsight                  the same graph from the other host",
            'sae-attn demo --prompt TEXT --correct " Mary" --wrong " John"     your own sentence',
            "sae-attn graph --help                            your own model and SAEs",
            'python: import sae_attn_plugin as sap; graph = sap.load("graph.json")',
        )


@app.command()
def graph(
    model: Annotated[str, typer.Option(help="A folder in Hugging Face format, or a hub name.")],
    saes: Annotated[
        str, typer.Option(help="A folder with attention-z SAEs, or a sae_lens release.")
    ],
    prompt: Annotated[str, typer.Option(help="The text to explain.")],
    target: Annotated[
        str | None,
        typer.Option(
            help='What to explain: a token (" Mary", or #ID for a token id), or a feature '
            "(attn:LAYER:FEATURE@POSITION, the position negative from the end). Default: the top "
            "logits."
        ),
    ] = None,
    wrong: Annotated[
        str | None, typer.Option(help="A token: explain the target's logit minus this one's.")
    ] = None,
    position: Annotated[
        int | None,
        typer.Option(help="Where the logit is read, negative from the end. Default: the last."),
    ] = None,
    backend: Annotated[Backend, typer.Option(help="What runs the model.")] = (
        Backend.transformer_lens
    ),
    out: Annotated[Path, typer.Option(help="The graph, .json.")] = Path("graph.json"),
    picture: Annotated[Path | None, typer.Option(help="A layered picture, .png.")] = None,
    nodes: Annotated[float, typer.Option(help="Share of node influence to keep.")] = 0.8,
    edges: Annotated[float, typer.Option(help="Share of edge influence to keep.")] = 0.98,
    max_nodes: Annotated[int | None, typer.Option(help="Keep at most so many nodes.")] = None,
    node_budget: Annotated[
        int, typer.Option(help="How many features get in-edges, most influential first.")
    ] = 2000,
    prepend_bos: Annotated[
        bool | None,
        typer.Option(
            "--prepend-bos/--no-prepend-bos",
            help="Whether the prompt gets a BOS token. Default: as the SAEs or the tokenizer say.",
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="Where to compute, such as cpu or cuda.")] = "cpu",
    dtype: Annotated[Dtype, typer.Option(help="Of the model's weights.")] = Dtype.float32,
) -> None:
    """The attribution graph of a prompt, from the tokens to a logit or a feature."""
    with _session() as screen:
        # What can be told wrong at once is told before a model is loaded.
        files = _files(out, picture)
        wanted = _target(target, wrong, position)
        _check_limits(nodes, edges, max_nodes, node_budget)
        if not prompt:
            raise InputError("the prompt is empty; expected at least one token")
        screen.hush()
        import torch

        _check_device(device)
        with screen.busy(f"loading {model}"):
            loaded = sap.load_model(model, backend.value, device, getattr(torch, dtype.value))
        # A release shows bars of its own while it downloads.
        with screen.busy(f"loading {saes}") if Path(saes).is_dir() else contextlib.nullcontext():
            dictionaries = sap.load_saes(saes, device=device)
        with screen.busy("checking the model"):
            lens = sap.FeatureLens(loaded, dictionaries, prepend_bos=prepend_bos)
        with screen.busy("running the prompt"):
            run = lens.run(prompt)
        attribution = run.attribute(wanted, node_budget=node_budget, progress=screen.live)
        with screen.busy("pruning"):
            pruned = attribution.prune(nodes, edges, max_nodes)
            result = _with_pruning(pruned.to_networkx(), nodes, edges, max_nodes)
        screen.save(result, *files)

        screen.heading(f"{lens}")
        screen.prompt(run)
        screen.values(result)
        screen.strongest_nodes(pruned)
        first = result.graph["targets"][0]
        screen.heading(f"Strongest paths into {first}, shares among the edges kept")
        screen.paths("", result, target=first, n=5)
        screen.ledger(attribution)
        screen.written(result, *files)


@app.command()
def export(
    graph: Annotated[Path, typer.Argument(help="A graph file, .json or .graphml.")],
    out: Annotated[Path, typer.Argument(help="The file to write.")],
    format: Annotated[
        Format | None,
        typer.Option(help="neuronpedia, json or graphml. Default: by the ending of OUT."),
    ] = None,
    slug: Annotated[str | None, typer.Option(help="neuronpedia: the graph's short name.")] = None,
    scan: Annotated[
        str | None, typer.Option(help="neuronpedia: the model's name on Neuronpedia.")
    ] = None,
    source_set: Annotated[
        str | None,
        typer.Option(help="neuronpedia: the features' source set there, such as att-kk."),
    ] = None,
    no_feature: Annotated[
        int | None,
        typer.Option(help="neuronpedia: number of error nodes, -1 for circuit-tracer's reader."),
    ] = None,
) -> None:
    """A graph file in another format, for other programs and pages."""
    with _session() as screen:
        given = {"slug": slug, "scan": scan, "source_set": source_set, "no_feature": no_feature}
        options: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
        check_writable(out)
        loaded = sap.load(graph)
        if out.exists() and out.samefile(graph):
            raise InputError(f"{str(out)!r} is the graph itself; expected another file to write")
        sap.save(loaded, out, format=None if format is None else format.value, **options)
        screen.written(loaded, out)


# -- input ---------------------------------------------------------------------------------------


def _token(text: str) -> str | int:
    """``#5335`` is a token id, anything else the token itself."""
    return int(text[1:]) if re.fullmatch(r"#\d+", text) else text


def _target(target: str | None, wrong: str | None, position: int | None) -> Target | None:
    if target is None:
        for name, value in (("--wrong", wrong), ("--position", position)):
            if value is not None:
                raise InputError(f"{name} needs --target, the token it goes with")
        return None
    if not target or wrong == "":
        raise InputError("the target is empty; expected a token or attn:LAYER:FEATURE@POSITION")
    if target.startswith("attn:"):
        match = _FEATURE.fullmatch(target)
        if match is None:
            raise InputError(
                f"not a feature: {target!r}; expected attn:LAYER:FEATURE@POSITION, such as "
                "attn:5:7515@10 or attn:5:7515@-1"
            )
        if wrong is not None or position is not None:
            raise InputError(f"--wrong and --position go with a token, not with {target!r}")
        return sap.Feature(*(int(number) for number in match.groups()))
    at = -1 if position is None else position
    if wrong is not None:
        return sap.LogitDiff(_token(target), _token(wrong), at)
    return sap.Logit(_token(target), at)


def _files(graph: Path, picture: Path | None) -> tuple[Path, Path | None]:
    """The paths, known to be writable."""
    for path, ending in ((graph, ".json"), (picture, ".png")):
        if path is None:
            continue
        if path.suffix.lower() != ending:
            raise InputError(f"expected a path that ends in {ending}, got {str(path)!r}")
        check_writable(path)
    return graph, picture


def _check_limits(nodes: float, edges: float, max_nodes: int | None, node_budget: int) -> None:
    for name, share in (("--nodes", nodes), ("--edges", edges)):
        if not 0 < share <= 1:
            raise InputError(f"{name} {share}: expected a share in (0, 1]")
    if max_nodes is not None and max_nodes < 1:
        raise InputError(f"--max-nodes {max_nodes}: expected at least 1")
    if node_budget < 0:
        raise InputError(f"--node-budget {node_budget}: expected at least 0")


def _check_device(device: str) -> None:
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch asserts that CUDA is compiled in
        first = str(error).splitlines()[0]
        raise InputError(f"the device {device!r} cannot be used: {first}") from None


# -- what a command finds ------------------------------------------------------------------------


def _with_pruning(graph: nx.DiGraph, nodes: float, edges: float, limit: int | None) -> nx.DiGraph:
    graph.graph["pruning"] = {"nodes": nodes, "edges": edges, "max_nodes": limit}
    return graph


def _roles(run: Run, correct: str, wrong: str) -> dict[str, int]:
    """Where the sentence mentions the two: first the one, last the other.

    Read off the tokens, so that it holds with BOS and without.
    """
    tokens = run.tokens[0].tolist()
    roles = {}
    for role, token in (("IO", correct), ("S2", wrong)):
        number = run.resolve_token(_token(token))[0]
        found = [position for position, other in enumerate(tokens) if other == number]
        if found:
            roles[role] = found[0] if role == "IO" else found[-1]
    return roles


def _top_feature(attribution: Attribution) -> str | None:
    """The most influential feature that writes to the target itself."""
    root = str(next(iter(attribution.roots.values())))
    edges = attribution.edges
    direct = edges.loc[edges["target"] == root, "source"]
    nodes = attribution.nodes.loc[list(direct)]
    nodes = nodes[nodes["kind"] == "attn"]
    return None if nodes.empty else str(nodes["influence"].idxmax())


def _ablate(
    lens: FeatureLens, run: Run, attribution: Attribution, target: Any, name: str
) -> list[tuple[str, float]]:
    node = sap.Node.parse(name)
    assert node.layer is not None
    assert node.feature is not None
    edit = sap.AblateFeature(node.layer, node.feature, node.position)
    edges = attribution.edges
    root = str(next(iter(attribution.roots.values())))
    edge = edges[(edges["source"] == name) & (edges["target"] == root)]["weight"].item()
    frozen = lens.intervene(run, [edit], freeze=_FROZEN).effect(target).item()
    free = lens.intervene(run, [edit]).effect(target).item()
    return [
        ("predicted, direct: minus its edge", -edge),
        ("measured, all else frozen", frozen),
        ("measured, everything free", free),
    ]


# -- the screen ----------------------------------------------------------------------------------


def _quoted(token: str) -> str:
    from sae_attn_plugin.nodes import quote

    return _plain(quote(token))


def _plain(text: str) -> str:
    """Text that cannot steer a terminal."""
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text
    )


class _Screen:
    """Results on standard output, progress and errors on standard error."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        self._stack = stack
        # Tokens such as "[red]" or ":smile:" are text.
        safe: dict[str, Any] = {"markup": False, "highlight": False, "emoji": False}
        self.error = Console(stderr=True, soft_wrap=True, **safe)
        self.out = Console(**safe)
        if not self.out.is_terminal:
            self.out = Console(width=120, **safe)  # else 80, whatever the reader's width
        self.live = self.error.is_terminal

    def hush(self) -> None:
        """From here on the hosts keep quiet; loads transformers, which takes its time."""
        with self.busy("starting"):
            self._stack.enter_context(_quiet())

    @contextlib.contextmanager
    def busy(self, what: str) -> Iterator[None]:
        if not self.live:
            yield
            return
        with self.error.status(_plain(what)):
            yield

    def heading(self, text: str) -> None:
        self.out.print()
        self.out.print(Text(_plain(text), style="bold"))

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
            item = Text(f"{position}", style="dim").append(f" {_quoted(token)}  ", style="not dim")
            if line.cell_len and line.cell_len + item.cell_len > self.out.width - 2:
                self.lines(line)
                line = Text()
            line.append_text(item)
        self.lines(line)

    def logits(self, run: Run, tokens: list[Any]) -> None:
        logits = run.logits[0, -1].double()
        probabilities = logits.softmax(-1)
        rows = []
        for token in tokens:
            number = run.resolve_token(token)[0]
            rank = int((logits > logits[number]).sum()) + 1
            text = _quoted(run.lens.tokenizer.decode([number]))
            rows.append((text, float(logits[number]), f"{float(probabilities[number]):.1%}", rank))
        self.heading(f"Logit difference {rows[0][1] - rows[1][1]:+.4f}")
        self.table(("token", "logit", "probability", "rank"), rows)

    def active(self, run: Run, attribution: Attribution) -> None:
        features = run.features()
        counts = features.groupby("layer").size()
        last = features[features["position"] == run.tokens.shape[1] - 1].groupby("layer").size()
        per_layer = ", ".join(
            f"layer {layer}: {counts.get(layer, 0)} ({last.get(layer, 0)} at the last token)"
            for layer in run.lens.dictionaries
        )
        self.heading(f"{len(features)} active features")
        self.lines(per_layer)
        self.strongest_nodes(attribution, "attn", 10)

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
                (name, _quoted(token), activation, influence, direct.get(name))
                for name, token, activation, influence in zip(
                    nodes.index, nodes["token"], nodes["activation"], nodes["influence"],
                    strict=True,
                )
            ),
        )  # fmt: skip

    def heads(self, lens: FeatureLens, run: Run, name: str) -> None:
        node = sap.Node.parse(name)
        assert node.layer is not None
        assert node.feature is not None
        dfa = run.dfa(node.layer, node.feature, node.position)
        weights = sap.head_attribution(lens.dictionaries[node.layer]).loc[node.feature]
        by_head, by_source = dfa.by_head.tolist(), dfa.by_source.tolist()
        total = sum(map(abs, by_head)) or 1.0
        self.heading(
            f"Top feature {name}: pre-activation {dfa.pre_activation:.4f} = heads "
            f"{sum(by_head):+.4f}, constant {dfa.constant:+.4f}"
        )
        self.table(
            ("head", "DFA", "share of |DFA|", "share of decoder norm"),
            (
                (f"{node.layer}.{head}", value, f"{abs(value) / total:.1%}",
                 f"{float(weights[f'head_{head}']):.1%}")
                for head, value in sorted(enumerate(by_head), key=lambda item: -abs(item[1]))
            ),
        )  # fmt: skip
        self.out.print()
        strongest = sorted(enumerate(by_source), key=lambda item: -abs(item[1]))[:5]
        self.table(
            ("source", "token", "DFA"),
            ((position, _quoted(run.token_strings[position]), value)
             for position, value in strongest),
        )  # fmt: skip

    def paths(self, label: str, graph: nx.DiGraph, **options: Any) -> None:
        try:
            found: list[GraphPath] = sap.strongest_paths(graph, **options)
        except InputError as error:  # a graph may hold no path from there
            found, label = [], f"{label}: {error}"
        if label:
            self.lines(Text(_plain(label), style="dim"))
        for path in found:
            sign = "+" if path.sign > 0 else "-"
            self.lines(f"{sign} {path.share:7.2%}  {_plain(str(path))}")

    def ablation(self, name: str, rows: list[tuple[str, float]]) -> None:
        self.heading(f"Ablating {name} changes the logit difference by")
        self.table(("", ""), ((label, f"{value:+.6f}") for label, value in rows))

    def values(self, graph: nx.DiGraph) -> None:
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

    def save(self, graph: nx.DiGraph, file: Path, picture: Path | None) -> None:
        """Before anything is printed, so that ``| head`` costs no file."""
        if picture is None:
            sap.save(graph, file)
        else:
            from sae_attn_plugin.graphs.picture import write_png

            with self.busy("drawing"):
                figure = sap.draw(graph)  # before anything is written
            sap.save(graph, file)
            write_png(figure, picture)

    def written(self, graph: nx.DiGraph, *files: Path | None) -> None:
        self.heading(f"Written: {len(graph)} nodes, {graph.number_of_edges()} edges")
        self.lines(*(_plain(str(path)) for path in files if path is not None))


def _indented(content: Any) -> Any:
    from rich.padding import Padding

    return Padding(content, (0, 0, 0, 2), expand=False)


def _cell(value: Any) -> tuple[str, bool]:
    """The text of a table's cell, and whether it is a number."""
    if value is None or value != value:  # NaN
        return "", True
    if isinstance(value, numbers.Real) and not isinstance(value, numbers.Integral):
        return f"{float(value):.4f}", True
    text = _plain(str(value))
    return text, isinstance(value, numbers.Integral) or text.endswith("%") or text[:1] in ("+", "-")


# -- errors and noise ----------------------------------------------------------------------------


@contextlib.contextmanager
def _session() -> Iterator[_Screen]:
    """Errors of our own as one message, an interrupt as exit 130; anything else is a defect."""
    stack = contextlib.ExitStack()
    screen = _Screen(stack)
    try:
        with stack:
            yield screen
    except SaeAttnError as error:
        screen.error.print(Text("error: ", style="bold red").append(_plain(str(error))))
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        screen.error.print("interrupted")
        raise typer.Exit(130) from None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
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


if __name__ == "__main__":
    main()
