"""``python -m tests.benchmarks``: what everything costs, as ratios to a plain forward pass.

The forward pass is the plain Hugging Face one (sdpa) of the same weights on the same prompt, in the
same process; methods take turns, and medians are compared.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from tqdm.auto import tqdm

import sae_attn_plugin as sap
from sae_attn_plugin.attribution.dfa import attribution_by_source
from sae_attn_plugin.attribution.frozen import freeze
from sae_attn_plugin.attribution.writers import write_table

from . import corpus, rivals, shape
from .bounds import skippable
from .measure import (
    LARGE_PRODUCT_FLOP,
    CountFlop,
    in_fresh_memory,
    in_kept_memory,
    interleaved,
    large_product,
    page_faults,
    peak_memory,
    resident,
)

_TARGET, _GIB = sap.Logit(5), 2**30
_CLOCK: list[Callable[[], float]] = [time.perf_counter]


@dataclass(frozen=True)
class Row:
    """One measurement; ``forwards``: seconds over those of a plain forward pass on the prompt."""

    part: str
    what: str
    tokens: int
    seconds: float
    forwards: float | None = None
    peak_mib: float | None = None
    note: str = ""


def _forward(tokens: torch.Tensor) -> Callable[[], Any]:
    model = shape.gpt2_shape("sdpa")
    return lambda: model(tokens)


def _measure(
    part: str,
    tokens: int,
    calls: dict[str, Callable[[], Any]],
    rounds: int,
    memory: bool = True,
    notes: dict[str, str] | None = None,
) -> list[Row]:
    """Rows of the calls; the one named ``forward`` is the denominator."""
    seconds = interleaved(calls, rounds, clock=_CLOCK[0])
    rows = []
    for name, call in calls.items():
        peak = peak_memory(call) / 2**20 if memory else None
        note = (notes or {}).get(name, "")
        forwards = seconds[name] / seconds["forward"]
        rows.append(Row(part, name, tokens, seconds[name], forwards, peak, note))
    return rows


def stages(lengths: list[int], rounds: int) -> list[Row]:
    """Every step from the forward pass to a saved graph."""
    rows, lens = [], shape.wide_lens()
    for length in tqdm(lengths, desc="stages"):
        tokens = shape.tokens_of(length)
        run = lens.run(tokens)
        frozen = run.frozen
        att = run.attribute(_TARGET, memory_budget=2 * _GIB)
        pruned = att.prune()
        graph = pruned.to_networkx()
        path = Path(tempfile.mkdtemp()) / "graph.json"
        feature = sap.Feature(11, int(run.features(11, -1)["feature"].iloc[0]), length - 1)

        def encode(frozen: Any = frozen) -> Any:
            return [layer.dictionary.encode(layer.z) for layer in frozen.layers]

        def freshly_frozen(run: Any = run) -> Any:
            return freeze(lens.backend, run.capture, lens.dictionaries)

        calls: dict[str, Callable[[], Any]] = {
            "forward": _forward(tokens),
            "capture": lambda t=tokens: lens.run(t),
            "encode twelve SAEs": encode,
            "freeze, with encoding": freshly_frozen,
            "writers": lambda f=frozen: write_table(f),
            "dfa of one feature": lambda r=run, f=feature: r.dfa(f.layer, f.feature, f.position),
            "dfa of twenty features": lambda r=run, f=feature: [
                r.dfa(f.layer, number, f.position) for number in range(20)
            ],
            "attribute, 2,000 nodes": lambda r=run: r.attribute(_TARGET, memory_budget=2 * _GIB),
            "graph, 2,000 nodes": lambda r=run: r.graph(_TARGET),
            "to_networkx": lambda p=pruned: sap.Attribution.to_networkx(_fresh(p)),
            "save": lambda g=graph, p=path: sap.save(g, p),
        }
        notes = {
            "attribute, 2,000 nodes": f"{att.flow.n_edges:,} edges",
            "graph, 2,000 nodes": f"{len(graph):,} nodes, {graph.number_of_edges():,} edges",
        }
        if length <= 32:
            full = run.attribute(_TARGET, node_budget=None)
            notes["attribute, all nodes"] = f"{full.flow.n_edges:,} edges"
            calls["attribute, all nodes"] = lambda r=run: r.attribute(_TARGET, node_budget=None)
            calls["node and ledger tables"] = lambda a=full: _tables(_fresh(a))
            calls["edge table"] = lambda a=full: _fresh(a).edges
        worst = att.worst_residual
        notes["attribute, 2,000 nodes"] += f", worst ledger residual {worst:.1e}"
        few = rounds if length <= 64 else max(2, rounds // 2) if length <= 256 else 1
        rows += _measure("stages", length, calls, few, notes=notes)
    return rows


def _fresh(attribution: Any) -> Any:
    """The attribution without what it remembers."""
    import dataclasses

    flow = dataclasses.replace(attribution.flow)
    return dataclasses.replace(attribution, flow=flow)


def _tables(attribution: Any) -> Any:
    return attribution.nodes, attribution.ledger


def against_autograd(rounds: int, length: int = 32) -> list[Row]:
    """Every edge of a prompt, by the engine and by autograd."""
    run = shape.wide_lens().run(shape.tokens_of(length))
    frozen, table = run.frozen, run.writers
    _check_rivals(run)

    def sweep() -> Any:
        return run.attribute(_TARGET, node_budget=None)

    def whole() -> Any:
        att = run.attribute(_TARGET, node_budget=None)
        return att.nodes, att.ledger

    def with_edges() -> Any:
        return run.attribute(_TARGET, node_budget=None).edges

    calls: dict[str, Callable[[], Any]] = {
        "forward": _forward(run.tokens),
        "large matrix product": large_product(),
        "engine: the sweep": sweep,
        "engine: edges, node and ledger tables": whole,
        "engine: one table of all edges": with_edges,
    }
    calls |= {
        f"autograd: {name}": lambda way=way: rivals.all_edges(way, frozen, table)
        for name, way in {
            "by layer and query, causal slice": rivals.grouped_autograd,
            "is_grads_batched, all positions": rivals.batched_autograd,
            "one backward pass per target": rivals.plain_autograd,
        }.items()
    }
    with CountFlop() as count:
        sweep()
    rows = _measure("against autograd", length, calls, rounds, memory=False)
    seconds = {row.what: row.seconds for row in rows}
    engine = seconds["engine: edges, node and ledger tables"]
    reached = count.flop / seconds["engine: the sweep"]
    best = LARGE_PRODUCT_FLOP / seconds["large matrix product"]
    found = []
    for row in rows:
        note = f"{row.seconds / engine:.1f} x the engine" if "autograd" in row.what else ""
        if row.what == "large matrix product":
            note = (
                f"{best / 1e9:.0f} GFLOP/s; the sweep reaches {reached / 1e9:.0f} "
                f"({reached / best:.0%}) on {count.flop / 1e9:.1f} GFLOP"
            )
        found.append(Row(**{**asdict(row), "note": note}))
    return found


def _check_rivals(run: Any) -> None:
    """That the ways compared give the same numbers."""
    table, frozen = run.writers, run.frozen
    layer, query, edges = next(iter(rivals.grouped_autograd(frozen, table)))
    encoded = frozen.layers[layer].encoded
    feature = int(encoded.feature[encoded.position == query][0])
    att = run.attribute(sap.Feature(layer, feature, query), node_budget=0)
    expected = edges[0].sum(), edges[0].abs().sum()
    for got, wanted in zip((att.flow.in_sum[0], att.flow.abs_sum[0]), expected, strict=True):
        if abs(float(got) - float(wanted)) > 1e-4 * float(expected[1]):
            raise AssertionError(f"autograd and the engine differ: {got} and {wanted}")


def against_dfa(rounds: int) -> list[Row]:
    """DFA of one feature and of twenty, at one destination and at all of them.

    The head-wide way allocates 48 MiB and more at once. What that costs depends on the process, so
    it is measured both ways: glibc maps what is larger than 32 MiB anew, a page fault for every 4
    KiB, unless there is a hole of that size in its heap. 6 GiB are never kept.
    """
    within = {"kept": in_kept_memory, "fresh": in_fresh_memory}
    rows, lens = [], shape.wide_lens(n_layers=1)  # every layer costs the same
    for length in (128, 1024):
        run = lens.run(shape.tokens_of(length))
        layer = run.frozen.layers[0]
        one, twenty = torch.tensor([7]), torch.arange(7, 27)
        torch.testing.assert_close(
            attribution_by_source(layer, one), rivals.every_destination_dfa(layer, one)
        )
        ours = {
            "run.dfa": (one, lambda r=run: r.dfa(0, 7, -1)),
            "one feature, all destinations": (one, lambda r=run, f=one: r.dfa_by_source(0, f)),
            "twenty features, all destinations": (
                twenty,
                lambda r=run, f=twenty: r.dfa_by_source(0, f),
            ),
        }
        calls: dict[str, Callable[[], Any]] = {"forward": _forward(run.tokens)}
        calls |= {name: call for name, (_, call) in ours.items()}
        notes, states = {}, ("kept", "fresh") if length < 1000 else ("fresh",)
        for features, what in ((one, "one feature"), (twenty, "twenty features")):

            def head_wide(x: Any = layer, f: Tensor = features) -> Tensor:
                return rivals.every_destination_dfa(x, f)

            for state in states:
                name = f"head-wide, {what}, {state} memory"
                calls[name] = functools.partial(within[state], head_wide)
                notes[name] = f"{page_faults(calls[name]):,} page faults"
        measured = _measure("dfa", length, calls, rounds if length < 1000 else 3, notes=notes)
        seconds = {row.what: row.seconds for row in measured}
        for row in measured:
            if row.what in ours:
                what = "one feature" if ours[row.what][0] is one else "twenty features"
                factors = (
                    f"{seconds[f'head-wide, {what}, {state} memory'] / row.seconds:,.0f} ({state})"
                    for state in states
                )
                row = replace(row, note=f"{', '.join(factors)} times faster than head-wide")
            rows.append(row)
    return rows


def curves(rounds: int, lengths: list[int]) -> list[Row]:
    """How the cost grows with each of the four sizes, the others held."""
    rows = []

    def one(part: str, size: int, run: Any, **options: Any) -> None:
        att = run.attribute(_TARGET, memory_budget=2 * _GIB, **options)
        calls = {
            "forward": _forward(run.tokens),
            f"{size:,}": lambda: run.attribute(_TARGET, memory_budget=2 * _GIB, **options),
        }
        notes = {f"{size:,}": f"{att.flow.n_edges:,} edges"}
        few = rounds if run.tokens.shape[1] < 256 else 1
        rows.append(_measure(part, run.tokens.shape[1], calls, few, notes=notes)[1])

    lens = shape.wide_lens()
    for length in tqdm(lengths, desc="tokens"):
        one("curve: tokens (500 nodes)", length, lens.run(shape.tokens_of(length)), node_budget=500)
    run = lens.run(shape.tokens_of(64))
    for budget in tqdm((250, 500, 1000, 2000, 4000, 8000), desc="node budget"):
        one("curve: node budget (64 tokens)", budget, run, node_budget=budget)
    for layers in tqdm((3, 6, 12), desc="layers"):
        run = shape.wide_lens(n_layers=layers).run(shape.tokens_of(32))
        one("curve: layers (32 tokens, all nodes)", layers, run, node_budget=None)
    for active in tqdm((5, 10, 20, 40), desc="active features"):
        run = shape.wide_lens(active).run(shape.tokens_of(32))
        one("curve: active features (32 tokens, all nodes)", active, run, node_budget=None)
    return rows


def bounds(lengths: tuple[int, ...] = (32, 128)) -> list[Row]:
    """What upper bounds on the edges of a source position could leave out."""
    demo = sap.demo.load(backend="transformer_lens")
    data = sap.tasks.IOIDataset(1, demo.tokenizer, 0, prepend_bos=demo.prepend_bos)
    (_, tokens), *_ = data.groups(at_once=1)
    runs = {"demo model, IOI": demo.run(tokens)}
    for n in lengths:
        runs[f"GPT-2-small shape, {n}"] = shape.wide_lens().run(shape.tokens_of(n))
    rows = []
    for what, run in runs.items():
        start = _CLOCK[0]()
        found = {share: skippable(run, share) for share in (0.01, 0.1)}
        note = "; ".join(
            f"{share:.0%} of |edges| lost: bounds leave out {a:.1%} of the edges, hindsight {b:.0%}"
            for share, (a, b) in found.items()
        )
        seconds = _CLOCK[0]() - start
        rows.append(Row("bounds", what, run.tokens.shape[1], seconds, note=note))
    return rows


def loading() -> list[Row]:
    """Own memory after a run on twelve dictionaries from a folder: mapped, and as copies. Pages of
    mapped files come on top, which the system takes back when it needs them."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for layer, sae in shape.wide_saes().items():
            sae.save_model(Path(folder) / f"layer_{layer}")
        for what in ("", "mapped", "copied"):  # the first makes what every later one finds made
            start, before = _CLOCK[0](), resident()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                saes = list(sap.load_saes(folder).values())
            if what == "copied":
                for sae in saes:
                    for value in sae.parameters():
                        value.data = value.data.clone()
            lens = sap.FeatureLens(shape.gpt2_shape("eager"), saes)
            run = lens.run(shape.tokens_of(32))
            assert run.frozen is not None
            seconds, after = _CLOCK[0]() - start, resident()
            own, mapped = (after[i] - before[i] for i in (0, 1))
            note = f"pages of the files in memory: {mapped / 2**20:,.0f} MiB"
            if what:
                rows.append(Row("loading", what, 32, seconds, peak_mib=own / 2**20, note=note))
            del saes, lens, run
    return rows


def prompts(number: int = 1000) -> list[Row]:
    """Graphs of many IOI prompts on the demo model, prompts of one length together."""
    lens = sap.demo.load(backend="transformer_lens")
    data = sap.tasks.IOIDataset(number, lens.tokenizer, 0, prepend_bos=lens.prepend_bos)
    start, edges, length = time.perf_counter(), 0, 0
    with tqdm(total=number, desc="graphs of IOI prompts") as bar:
        for _, tokens in data.groups(at_once=100):
            batch = lens.run(tokens)
            for i in range(len(batch)):
                edges += batch[i].graph().number_of_edges()
                bar.update()
            length = max(length, tokens.shape[1])
    seconds = time.perf_counter() - start
    note = f"{1e3 * seconds / number:.1f} ms each, {edges / number:,.0f} edges on average"
    return [Row("prompts", f"{number:,} IOI graphs, demo model", length, seconds, note=note)]


def surveys(rounds: int) -> list[Row]:
    """One batch of a corpus through a survey, and the memory of surveys of two lengths."""
    seconds, notes = corpus.time_of_batches(rounds, _CLOCK[0])
    rows = [
        Row("corpus", name, corpus.TOKENS, value, value / seconds["forward"], None, notes[name])
        for name, value in seconds.items()
    ]
    for tokens, (spent, peak) in corpus.peak_of_lengths().items():
        what = "whole process, small reservoirs"
        rows.append(Row("corpus: memory", what, tokens, spent, None, peak))
    return rows


def show(rows: list[Row]) -> None:
    console = Console(width=150)
    for part in dict.fromkeys(row.part for row in rows):
        table = Table(title=part)
        for column in ("what", "tokens", "ms", "forwards", "peak MiB", "note"):
            table.add_column(column, justify="left" if column in ("what", "note") else "right")
        for row in (row for row in rows if row.part == part):
            forwards = "" if row.forwards is None else f"{row.forwards:.4g}"
            peak = "" if row.peak_mib is None else f"{row.peak_mib:,.0f}"
            ms = f"{1e3 * row.seconds:,.2f}"
            table.add_row(row.what, f"{row.tokens:,}", ms, forwards, peak, row.note)
        console.print(table)


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def main() -> None:
    parts = ("stages", "autograd", "dfa", "curves", "bounds", "loading", "prompts", "corpus")
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(parts)}; all")
    parser.add_argument("--json", type=Path, help="where to write the numbers")
    parser.add_argument("--plot", type=Path, help="where to draw the curves (PNG)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--tokens", type=int, nargs="+", default=[16, 32, 64, 128, 256, 512, 1024])
    parser.add_argument("--prompts", type=int, default=1000, help="how many IOI prompts")
    parser.add_argument("--cpu", action="store_true", help="processor seconds, not wall time")
    options = parser.parse_args()
    if unknown := set(options.parts) - set(parts):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; known: {', '.join(parts)}")
    torch.set_num_threads(options.threads)
    _CLOCK[0] = time.process_time if options.cpu else time.perf_counter
    wanted, began = options.parts or parts, time.perf_counter()
    calls: dict[str, Callable[[], list[Row]]] = {
        "stages": lambda: stages(options.tokens, options.rounds),
        "autograd": lambda: against_autograd(options.rounds),
        "dfa": lambda: against_dfa(4 * options.rounds),
        "curves": lambda: curves(options.rounds, options.tokens),
        "bounds": bounds,
        "loading": loading,
        "prompts": lambda: prompts(options.prompts),
        "corpus": lambda: surveys(options.rounds),
    }
    machine = {
        "processor": _processor(),
        "threads": options.threads,
        "clock": "cpu" if options.cpu else "wall",
        "torch": torch.__version__,
        "load": os.getloadavg()[0],
    }
    rows: list[Row] = []
    for part in (name for name in calls if name in wanted):
        with torch.no_grad():
            found = calls[part]()
        show(found)
        rows += found
        if options.json:  # what is there already, should a later part fail
            document = {"machine": machine, "rows": [asdict(row) for row in rows]}
            options.json.write_text(json.dumps(document, indent=1) + "\n")
        seconds = time.perf_counter() - began
        Console().print(f"{_processor()}, {options.threads} threads, {seconds:.0f} s so far")
    if options.plot:
        from .plot import draw

        draw(rows, options.plot)


if __name__ == "__main__":
    main()
