"""``sae-attn study``."""

from __future__ import annotations

import inspect
import json
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import sae_attn_plugin as sap
from sae_attn_plugin.cli.loading import load_lens
from sae_attn_plugin.cli.options import (
    Backend,
    DeviceOption,
    Dtype,
    DtypeOption,
    HostOption,
    check_counts,
    check_device,
    check_folder,
    check_results,
)
from sae_attn_plugin.cli.screen import Screen, session
from sae_attn_plugin.cli.text import DATA_HELP, DEMO, SAMPLE_HELP, check_text, full_name, sampled
from sae_attn_plugin.errors import InputError

if TYPE_CHECKING:
    from sae_attn_plugin.lens import FeatureLens
    from sae_attn_plugin.studies import Study

_ROWS = 12  # of a table on the screen
_COLUMNS = 9


class Name(str, Enum):
    quality = "quality"
    prefix = "prefix"
    induction_feature = "induction-feature"
    ioi_features = "ioi-features"
    ioi_positions = "ioi-positions"
    ioi_circuit = "ioi-circuit"
    qk_ioi = "qk-ioi"


_NEED_TEXT = (Name.quality, Name.induction_feature)
_TAKE_TEXT = (*_NEED_TEXT, Name.prefix)


def study(
    name: Annotated[Name, typer.Argument(help="Which study.")],
    model: Annotated[
        str, typer.Option(help="demo, a folder in Hugging Face format, or a hub name.")
    ] = "gpt2",
    saes: Annotated[
        str | None,
        typer.Option(help="A folder with attention SAEs, or a sae_lens release."),
    ] = None,
    data: Annotated[str | None, typer.Option(help=DATA_HELP)] = None,
    sample: Annotated[int | None, typer.Option(help=SAMPLE_HELP)] = None,
    rows: Annotated[int, typer.Option(help="Rows to read from --data.")] = 512,
    context: Annotated[int, typer.Option(help="Tokens in a row of text.")] = 128,
    limit: Annotated[
        int | None,
        typer.Option(help="A quick look: so many prompts, rows per prefix, or rows of text."),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="NAME=VALUE, an argument of the study, such as layers=[5,6]. Repeatable."
        ),
    ] = None,
    out: Annotated[
        Path, typer.Option(help="Folder for NAME.json and NAME.png.", show_default="here")
    ] = Path(),
    work: Annotated[
        Path | None,
        typer.Option(help="Folder for finished parts: an interrupted study goes on from there."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of prompts and draws.")] = 0,
    backend: HostOption = Backend.transformer_lens,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = Dtype.float32,
) -> None:
    """A study of the paper, on GPT-2 small or on any model and SAEs; offline with --model demo."""
    with session() as screen:
        check_text(data, sample)
        check_counts(rows=rows, context=context, limit=limit)
        key = name.value.replace("-", "_")
        files = out / f"{name.value}.json", out / f"{name.value}.png"
        check_results(out, files)
        given = full_name(model) == DEMO or data is not None or sample is not None
        if work is not None:
            check_folder(work, "--work")
        if name in _NEED_TEXT and not given:
            raise InputError(f"{name.value} needs text: give --data or --sample")
        screen.hush()
        function = getattr(sap.studies, key)
        options = _options(function, set_ or [])
        if "seed" in inspect.signature(function).parameters:
            options.setdefault("seed", seed)
        check_device(device)
        lens = load_lens(screen, model, saes, backend.value, device, dtype)
        arguments: list[Any] = [lens]
        if name in _TAKE_TEXT and given:
            n = rows if limit is None else min(rows, limit)
            text = _windows(lens, model, data, sample, n, context, seed, device)
            if name in _NEED_TEXT:
                arguments.append(text)
            else:
                options["windows"] = text
        if limit is not None and "n" in inspect.signature(function).parameters:
            options.setdefault("n", limit)
        try:
            inspect.signature(function).bind(*arguments, **options)
        except TypeError as error:
            raise InputError(f"{name.value}: {error}; give it with --set NAME=VALUE") from None
        result = function(*arguments, folder=work, progress=screen.live, **options)
        with screen.busy("drawing"):
            figure = result.plot()
        out.mkdir(parents=True, exist_ok=True)
        result.save(files[0])
        from sae_attn_plugin.graphs.picture import write_png

        write_png(figure, files[1])
        screen.heading(f"{name.value}: {lens}")
        _show(screen, result)
        screen.heading("Written")
        screen.lines(*map(str, files))


def _options(function: Any, pairs: list[str]) -> dict[str, Any]:
    """``NAME=VALUE`` pairs as arguments; values are JSON, or else strings."""
    known = [
        p
        for p in inspect.signature(function).parameters
        if p not in ("lens", "windows", "folder", "progress")
    ]
    found = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or key not in known:
            raise InputError(
                f"--set {pair!r}: expected NAME=VALUE with NAME one of {', '.join(known)}"
            )
        try:
            found[key] = json.loads(text)
        except json.JSONDecodeError:
            found[key] = text
    return found


def _windows(
    lens: FeatureLens,
    model: str,
    data: str | None,
    sample: int | None,
    n: int,
    context: int,
    seed: int,
    device: str,
) -> Any:
    if sample is not None:
        return sampled(lens.backend, model, sample, context, seed, device)
    if data is not None:
        from sae_attn_plugin.corpus.rows import read_rows

        with_bos = lens.prepend_bos
        return read_rows(data, lens.tokenizer, context, prepend_bos=with_bos, limit=n)
    import random

    import torch

    from sae_attn_plugin.demo.language import token_rows

    length = min(context, lens.backend.geometry.n_ctx)
    return torch.tensor(token_rows(random.Random(f"study {seed}"), n, length))


def _show(screen: Screen, result: Study) -> None:
    for title, table in result.tables.items():
        # Ends of intervals go beside their value.
        whole = [c for c in table.columns if not str(c).endswith(("_low", "_high"))]
        more = f", {_ROWS} of {len(table)} rows" if len(table) > _ROWS else ""
        screen.heading(f"{title}{more}")
        screen.table(
            [str(c) for c in whole],
            ([_cell(row, str(c)) for c in whole] for row in table.head(_ROWS).to_dict("records")),
        )


def _cell(row: dict[Any, Any], column: str) -> Any:
    value, low, high = (row.get(f"{column}{end}") for end in ("", "_low", "_high"))
    if low is None or high is None or low != low or value != value:
        return value
    return f"{value:.3f} [{low:.3f}, {high:.3f}]"
