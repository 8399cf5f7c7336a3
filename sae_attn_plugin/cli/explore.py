"""``sae-attn explore``."""

from __future__ import annotations

import contextlib
import webbrowser
from pathlib import Path
from typing import Annotated

import typer

import sae_attn_plugin as sap
from sae_attn_plugin.cli.loading import check_demo_device, load_named
from sae_attn_plugin.cli.options import (
    Backend,
    DeviceOption,
    Dtype,
    DtypeOption,
    HostOption,
    check_device,
    check_folder,
)
from sae_attn_plugin.cli.screen import plain, session
from sae_attn_plugin.errors import InputError


def explore(
    model: Annotated[
        str | None,
        typer.Option(
            help="A folder in Hugging Face format, or a hub name.", show_default="the demo model"
        ),
    ] = None,
    saes: Annotated[
        str | None, typer.Option(help="A folder with attention-z SAEs, or a sae_lens release.")
    ] = None,
    backend: HostOption = Backend.transformer_lens,
    port: Annotated[int, typer.Option(help="On 127.0.0.1; 0 takes any free one.")] = 8765,
    sessions: Annotated[Path, typer.Option(help="Folder for saved sessions.")] = Path(
        "sae-attn-sessions"
    ),
    open_page: Annotated[
        bool, typer.Option("--open/--no-open", help="Open the page in a browser.")
    ] = False,
    prepend_bos: Annotated[
        bool | None,
        typer.Option(
            "--prepend-bos/--no-prepend-bos",
            help="Whether prompts get a BOS token. Default: as the SAEs or the tokenizer say.",
        ),
    ] = None,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = Dtype.float32,
) -> None:
    """A local page to explore any prompt: features, sources, graphs, interventions."""
    with session() as screen:
        if (model is None) != (saes is None):
            raise InputError("--model and --saes go together; without both, the demo model is used")
        check_folder(sessions, "--sessions")
        from sae_attn_plugin.explore.server import listen, need_extra, serve

        need_extra()
        with contextlib.closing(listen(port)) as socket:
            screen.hush()
            check_device(device)
            if model is None or saes is None:
                check_demo_device(device)
                with screen.busy("loading the demo model"):
                    lens = sap.demo.load(backend=backend.value)
            else:
                host = backend.value
                lens = load_named(screen, model, saes, host, device, dtype, prepend_bos=prepend_bos)
            address = f"http://127.0.0.1:{socket.getsockname()[1]}/"
            screen.heading(plain(str(lens)))
            screen.lines(f"{address}   (Ctrl-C stops it)", f"sessions in {plain(str(sessions))}")
            screen.out.file.flush()
            if open_page:
                webbrowser.open(address)
            serve(lens, sessions, socket)
