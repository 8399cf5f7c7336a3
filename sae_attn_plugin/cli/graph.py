"""``sae-attn graph``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sae_attn_plugin.cli.loading import load_named
from sae_attn_plugin.cli.options import (
    Backend,
    DeviceOption,
    Dtype,
    DtypeOption,
    HostOption,
    Through,
    check_device,
    check_limits,
    parse_target,
    with_pruning,
    writable_files,
)
from sae_attn_plugin.cli.screen import session
from sae_attn_plugin.errors import InputError


def graph(
    model: Annotated[str, typer.Option(help="A folder in Hugging Face format, or a hub name.")],
    saes: Annotated[
        str, typer.Option(help="A folder with attention-z SAEs, or a sae_lens release.")
    ],
    prompt: Annotated[str, typer.Option(help="The text to explain.")],
    transcoders: Annotated[
        str | None,
        typer.Option(
            help="A folder with transcoders or SAEs on hook_mlp_out, or a sae_lens release."
        ),
    ] = None,
    mlp: Annotated[
        Through, typer.Option(help="Whether MLPs without a transcoder get in-edges.")
    ] = Through.terminal,
    heads: Annotated[
        Through, typer.Option(help="Whether heads of layers without an SAE get in-edges.")
    ] = Through.terminal,
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
    backend: HostOption = Backend.transformer_lens,
    out: Annotated[Path, typer.Option(help="The graph, .json.")] = Path("graph.json"),
    picture: Annotated[Path | None, typer.Option(help="A layered picture, .png.")] = None,
    page: Annotated[
        Path | None, typer.Option(help="A page to explore it in a browser, offline, .html.")
    ] = None,
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
    device: DeviceOption = "cpu",
    dtype: DtypeOption = Dtype.float32,
) -> None:
    """The attribution graph of a prompt, from the tokens to a logit or a feature."""
    with session() as screen:
        # What can be told wrong at once is told before a model is loaded.
        files = writable_files(out, picture, page)
        wanted = parse_target(target, wrong, position)
        check_limits(nodes, edges, max_nodes, node_budget)
        if not prompt:
            raise InputError("the prompt is empty; expected at least one token")
        screen.hush()
        check_device(device)
        lens = load_named(
            screen, model, saes, backend.value, device, dtype, transcoders, prepend_bos
        )
        with screen.busy("running the prompt"):
            run = lens.run(prompt)
        attribution = run.attribute(
            wanted,
            mlp=mlp.value,
            heads=heads.value,
            node_budget=node_budget,
            progress=screen.live,
        )
        with screen.busy("pruning"):
            pruned = attribution.prune(nodes, edges, max_nodes)
            result = with_pruning(pruned.to_networkx(), nodes, edges, max_nodes)
        screen.save(run, result, *files)

        screen.heading(f"{lens}")
        screen.prompt(run)
        screen.values(result)
        screen.strongest_nodes(pruned)
        first = result.graph["targets"][0]
        screen.heading(f"Strongest paths into {first}, shares among the edges kept")
        screen.paths("", result, target=first, n=5)
        screen.ledger(attribution)
        screen.written(result, *files)
