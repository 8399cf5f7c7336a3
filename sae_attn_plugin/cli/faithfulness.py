"""``sae-attn faithfulness``."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import sae_attn_plugin as sap
from sae_attn_plugin.cli.loading import (
    Dictionaries,
    Host,
    lens_of_graph,
    load_graph,
    load_lens,
)
from sae_attn_plugin.cli.options import (
    DeviceOption,
    Dtype,
    check_counts,
    check_device,
    check_reports,
)
from sae_attn_plugin.cli.screen import plain, session
from sae_attn_plugin.errors import InputError

if TYPE_CHECKING:
    from sae_attn_plugin.interventions.faithfulness import Faithfulness
    from sae_attn_plugin.lens import Dataset, FeatureLens

_SHOWN = 10


class Task(str, Enum):
    ioi = "ioi"
    induction = "induction"


class Ablate(str, Enum):
    mean = "mean"
    resample = "resample"
    zero = "zero"


class Positions(str, Enum):
    all = "all"
    same = "same"


def faithfulness(
    graph: Annotated[
        Path | None,
        typer.Argument(
            help="A graph file, .json, .safetensors, .graphml or .gexf. Left out: the mean "
            "attributions of prompts of the task, on --model."
        ),
    ] = None,
    task: Annotated[Task, typer.Option(help="What is measured.")] = Task.ioi,
    prompts: Annotated[int, typer.Option(help="How many to measure it on.")] = 64,
    average: Annotated[
        int, typer.Option(help="Without a graph: average so many other IOI prompts.")
    ] = 24,
    model: Annotated[
        str | None,
        typer.Option(help="demo, a folder or hub name. Default: as the graph file says."),
    ] = None,
    saes: Dictionaries = None,
    transcoders: Dictionaries = None,
    residual_saes: Dictionaries = None,
    backend: Host = None,
    device: DeviceOption = "cpu",
    ablate: Annotated[
        Ablate, typer.Option(help="What features get that are not kept.")
    ] = Ablate.mean,
    kinds: Annotated[
        list[str] | None,
        typer.Option(help="Of components: attn, tc, mlp_sae. Repeatable. Default: all there are."),
    ] = None,
    errors: Annotated[
        bool, typer.Option(help="Whether what SAEs do not reconstruct is a component.")
    ] = True,
    positions: Annotated[
        Positions, typer.Option(help="Where a component is kept; same: as in the graph.")
    ] = Positions.all,
    max_nodes: Annotated[
        int | None, typer.Option(help="Only so many components, the most influential ones.")
    ] = None,
    minimality: Annotated[
        int, typer.Option(help="Measure the circuit without each of the first so many.")
    ] = 20,
    seed: Annotated[int, typer.Option(help="Of the prompts.")] = 0,
    out: Annotated[
        list[Path] | None,
        typer.Option(help="Write the report, .json, or its curve, .png, .svg, .pdf. Repeatable."),
    ] = None,
) -> None:
    """Keep only a circuit's features, ablate all others, and measure a task."""
    with session() as screen:
        check_counts(prompts=prompts, average=average, max_nodes=max_nodes)
        if minimality < 0:
            raise InputError(f"--minimality {minimality}: expected at least 0")
        files = out or []
        check_reports(files, graph)
        if graph is None:
            if model is None:
                raise InputError("give a graph file, or --model to average its attributions")
            if task is not Task.ioi:
                raise InputError(
                    f"--task {task.value} has no roles to average by: give a graph file"
                )
            if residual_saes is not None:
                raise InputError("--residual-saes go with a graph file that names some")
        loaded = None if graph is None else load_graph(graph)
        screen.hush()
        check_device(device)
        if loaded is None:
            assert model is not None
            host = "transformer_lens" if backend is None else backend.value
            lens = load_lens(screen, model, saes, host, device, Dtype.float32, transcoders)
        else:
            given = {"saes": saes, "transcoders": transcoders, "residual_saes": residual_saes}
            lens = lens_of_graph(screen, loaded.graph, model, given, backend, device)
        data = _data(lens, task, prompts, seed)
        circuit: Any = loaded
        if circuit is None:
            others = _data(lens, task, average, seed + 1)
            circuit = lens.attribute_many(others, nodes=1, edges=1, progress=screen.live)
        found = sap.faithfulness(
            circuit,
            lens,
            data,
            ablate=ablate.value,
            kinds=kinds or None,
            errors=errors,
            positions=positions.value,
            max_nodes=max_nodes,
            minimality=minimality,
            progress=screen.live,
        )
        for path in files:
            found.save(path)

        screen.heading(f"{lens}")
        _show(screen, found, task)
        if files:
            screen.heading("Written")
            screen.lines(*(plain(str(path)) for path in files))


def _data(lens: FeatureLens, task: Task, n: int, seed: int) -> Dataset:
    tokenizer, bos = lens.tokenizer, lens.prepend_bos
    if task is Task.ioi:
        return sap.tasks.IOIDataset(n, tokenizer, seed, prepend_bos=bos)
    return sap.tasks.InductionDataset.random_repeats(n, tokenizer, seed, prepend_bos=bos)


def _show(screen: Any, found: Faithfulness, task: Task) -> None:
    about = found.about
    screen.heading(
        f"{len(found.nodes)} components on {about['prompts']} {task.value} prompts, "
        f"the others {_HOW[about['ablate']]}"
    )
    rows = (
        ("the whole model", found.model, ""),
        ("only the circuit", found.circuit, str(found.faithful)),
        ("all but the circuit", found.complement, str(found.complement_faithful)),
        ("nothing kept", found.empty, ""),
    )
    screen.table(("", "metric", "faithfulness"), rows)
    screen.heading(f"Ever larger parts: CPR {found.cpr:.3f}, CMD {found.cmd:.3f}")
    screen.table(
        ("components", "metric", "faithfulness"),
        (
            (row["nodes"], row["metric"], f"{row['faithfulness']:.3f} [{row['low']:.3f}, "
             f"{row['high']:.3f}]")
            for row in found.curve.to_dict("records")
        ),
    )  # fmt: skip
    if len(found.minimality):
        screen.heading("What is lost of the faithfulness without one component")
        best = found.minimality.head(_SHOWN).to_dict("records")
        screen.table(("", "lost"), ((plain(row["node"]), row["drop"]) for row in best))


_HOW = {"mean": "at their mean", "resample": "as in another prompt", "zero": "at zero"}
