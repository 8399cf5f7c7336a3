"""``sae-attn demo``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import sae_attn_plugin as sap
from sae_attn_plugin.cli.options import (
    Backend,
    HostOption,
    check_results,
    parse_token,
    with_pruning,
)
from sae_attn_plugin.cli.screen import Screen, quoted, session
from sae_attn_plugin.errors import InputError

if TYPE_CHECKING:
    from sae_attn_plugin.attribution.table import Attribution
    from sae_attn_plugin.lens import FeatureLens, Run

_FROZEN = ("patterns", "norms", "mlp", "attention")
_PICTURE_NODES = 60  # more than these do not fit a slide


def demo(
    out: Annotated[
        Path,
        typer.Option(help="Folder for graph.json, graph.png and graph.html.", show_default="here"),
    ] = Path(),
    backend: HostOption = Backend.transformer_lens,
    prompt: Annotated[str | None, typer.Option(help="Default: an IOI sentence.")] = None,
    correct: Annotated[str | None, typer.Option(help='A token, such as " Mary".')] = None,
    wrong: Annotated[str | None, typer.Option(help='A token, such as " John".')] = None,
) -> None:
    """Who gave what to whom: a circuit of attention features in the demo model, offline."""
    with session() as screen:
        files = out / "graph.json", out / "graph.png", out / "graph.html"
        check_results(out, files)
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
        target = sap.LogitDiff(parse_token(correct), parse_token(wrong))
        with screen.busy("attributing the logit difference"):
            attribution = run.attribute(target, progress=False)
            everything = attribution.to_networkx()
            pruned = attribution.prune(max_nodes=_PICTURE_NODES)
            graph = with_pruning(pruned.to_networkx(), 0.8, 0.98, _PICTURE_NODES)
        positions = _roles(run, correct, wrong)
        top = _top_feature(attribution)
        ablation = []
        if top is not None:
            with screen.busy("ablating the top feature"):
                ablation = _ablate(lens, run, attribution, target, top)
        out.mkdir(parents=True, exist_ok=True)
        screen.save(run, graph, *files)

        screen.heading(f"{lens}")
        screen.prompt(run)
        _logits(screen, run, [target.correct, target.wrong])
        _active(screen, run, attribution)
        if top is not None:
            _heads(screen, lens, run, top)
        screen.heading("Strongest paths into the logit difference")
        screen.paths("from anywhere", everything, n=5)
        for role in ("IO", "S2"):
            if role in positions:
                label = f"from {role}, {quoted(run.token_strings[positions[role]])}"
                screen.paths(f"{label}@{positions[role]}", everything, source=positions[role], n=2)
        if top is not None:
            _ablation(screen, top, ablation)
        screen.ledger(attribution)
        screen.written(graph, *files)
        screen.heading("Next")
        screen.lines(
            "sae-attn demo --backend nnsight                  the same graph from the other host",
            'sae-attn demo --prompt TEXT --correct " Mary" --wrong " John"     your own sentence',
            "sae-attn validate graph.json                     every edge against its removal",
            "sae-attn graph --help                            your own model and SAEs",
            'python: import sae_attn_plugin as sap; graph = sap.load("graph.json")',
        )


def _roles(run: Run, correct: str, wrong: str) -> dict[str, int]:
    """Where the sentence mentions the two: first the one, last the other.

    Read off the tokens, so that it holds with BOS and without.
    """
    tokens = run.tokens[0].tolist()
    roles = {}
    for role, token in (("IO", correct), ("S2", wrong)):
        number = run.resolve_token(parse_token(token))[0]
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


def _logits(screen: Screen, run: Run, tokens: list[Any]) -> None:
    logits = run.logits[0, -1].double()
    probabilities = logits.softmax(-1)
    rows = []
    for token in tokens:
        number = run.resolve_token(token)[0]
        rank = int((logits > logits[number]).sum()) + 1
        text = quoted(run.lens.tokenizer.decode([number]))
        rows.append((text, float(logits[number]), f"{float(probabilities[number]):.1%}", rank))
    screen.heading(f"Logit difference {rows[0][1] - rows[1][1]:+.4f}")
    screen.table(("token", "logit", "probability", "rank"), rows)


def _active(screen: Screen, run: Run, attribution: Attribution) -> None:
    features = run.features()
    counts = features.groupby("layer").size()
    last = features[features["position"] == run.tokens.shape[1] - 1].groupby("layer").size()
    per_layer = ", ".join(
        f"layer {layer}: {counts.get(layer, 0)} ({last.get(layer, 0)} at the last token)"
        for layer in run.lens.dictionaries
    )
    screen.heading(f"{len(features)} active features")
    screen.lines(per_layer)
    screen.strongest_nodes(attribution, "attn", 10)


def _heads(screen: Screen, lens: FeatureLens, run: Run, name: str) -> None:
    node = sap.Node.parse(name)
    assert node.layer is not None
    assert node.feature is not None
    dfa = run.dfa(node.layer, node.feature, node.position)
    weights = lens.head_attribution(node.layer).loc[node.feature]
    by_head, by_source = dfa.by_head.tolist(), dfa.by_source.tolist()
    total = sum(map(abs, by_head)) or 1.0
    screen.heading(
        f"Top feature {name}: pre-activation {dfa.pre_activation:.4f} = heads "
        f"{sum(by_head):+.4f}, constant {dfa.constant:+.4f}"
    )
    screen.table(
        ("head", "DFA", "share of |DFA|", "share of decoder norm"),
        (
            (f"{node.layer}.{head}", value, f"{abs(value) / total:.1%}",
             f"{float(weights[f'head_{head}']):.1%}")
            for head, value in sorted(enumerate(by_head), key=lambda item: -abs(item[1]))
        ),
    )  # fmt: skip
    screen.out.print()
    strongest = sorted(enumerate(by_source), key=lambda item: -abs(item[1]))[:5]
    screen.table(
        ("source", "token", "DFA"),
        ((position, quoted(run.token_strings[position]), value)
         for position, value in strongest),
    )  # fmt: skip


def _ablation(screen: Screen, name: str, rows: list[tuple[str, float]]) -> None:
    screen.heading(f"Ablating {name} changes the logit difference by")
    screen.table(("", ""), ((label, f"{value:+.6f}") for label, value in rows))
