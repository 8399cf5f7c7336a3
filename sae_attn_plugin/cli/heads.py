"""``sae-attn heads``."""

from __future__ import annotations

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
    check_results,
)
from sae_attn_plugin.cli.screen import Screen, session
from sae_attn_plugin.cli.text import DATA_HELP, DEMO, check_text, full_name, parse_layers
from sae_attn_plugin.errors import InputError
from sae_attn_plugin.registration import DEMO_MODEL_NAME

if TYPE_CHECKING:
    from sae_attn_plugin.corpus.survey import Survey
    from sae_attn_plugin.lens import FeatureLens
    from sae_attn_plugin.studies import Study


def heads(
    folder: Annotated[
        Path,
        typer.Argument(help="Of a corpus survey; made first if --data or --model demo is given."),
    ],
    model: Annotated[
        str | None,
        typer.Option(
            help="demo, a folder in Hugging Face format, or a hub name: for decoder directions, "
            "and for a survey."
        ),
    ] = None,
    saes: Annotated[
        str | None, typer.Option(help="A folder with attention-z SAEs, or a sae_lens release.")
    ] = None,
    data: Annotated[str | None, typer.Option(help=DATA_HELP)] = None,
    rows: Annotated[int, typer.Option(help="Rows of text to survey.")] = 512,
    context: Annotated[int, typer.Option(help="Tokens in a row of text.")] = 128,
    sample: Annotated[
        int, typer.Option(help="Firings of each feature that a survey draws for the tests.")
    ] = 40,
    layers: Annotated[str, typer.Option(help="all, or numbers such as 0,2-4.")] = "all",
    top: Annotated[int, typer.Option(help="Features of a head to look at.")] = 10,
    threshold: Annotated[
        float, typer.Option(help="Of the score from which a head is called monosemantic.")
    ] = 0.2,
    family_threshold: Annotated[
        float, typer.Option(help="Share of firings that makes a feature a member of a family.")
    ] = 0.5,
    min_fires: Annotated[int, typer.Option(help="Leave out features that fire less.")] = 10,
    out: Annotated[
        Path,
        typer.Option(help="Folder for heads and families, .json and .png.", show_default="here"),
    ] = Path(),
    seed: Annotated[int, typer.Option(help="Of random sets and text.")] = 0,
    backend: HostOption = (Backend.transformer_lens),
    device: DeviceOption = "cpu",
    dtype: DtypeOption = Dtype.float32,
) -> None:
    """What every head does, by its features: agreement, monosemanticity, feature families."""
    with session() as screen:
        check_text(data, None)
        check_counts(rows=rows, context=context, sample=sample)
        files = [out / f"{name}.{end}" for name in ("heads", "families") for end in ("json", "png")]
        check_results(out, files)
        screen.hush()
        check_device(device)
        lens = None
        if model is not None:
            lens = load_lens(screen, model, saes, backend.value, device, dtype)
        elif saes is not None or data is not None:
            raise InputError("--saes and --data need --model")
        survey = _survey(screen, folder, lens, model, data, rows, context, sample, seed)
        if lens is None and survey.facts["provenance"]["model"] == DEMO_MODEL_NAME:
            lens = load_lens(screen, "demo", None, backend.value, device, dtype)
        known = survey.layers
        wanted = known if layers == "all" else parse_layers(layers, max(known) + 1)
        with screen.busy("testing families"):
            families = sap.studies.families(
                survey, layers=wanted, threshold=family_threshold, min_firings=min_fires
            )
        with screen.busy("comparing features of heads"):
            found = sap.studies.heads(
                survey,
                lens=lens,
                families=families,
                layers=wanted,
                top=top,
                threshold=threshold,
                min_fires=min_fires,
                seed=seed,
            )
        from sae_attn_plugin.graphs.picture import write_png

        for study, json, png in ((found, *files[:2]), (families, *files[2:])):
            with screen.busy("drawing"):
                figure = study.plot()
            out.mkdir(parents=True, exist_ok=True)
            study.save(json)
            write_png(figure, png)
        facts = survey.facts
        screen.heading(f"{facts['provenance']['model']}: {facts['tokens']} tokens surveyed")
        if lens is None:
            screen.lines(
                "without --model and --saes, decoder directions are left out of monosemanticity"
            )
        _show(screen, found, families, top)
        screen.heading("Written")
        screen.lines(*map(str, files))


_SHOWN = 64  # heads


def _show(screen: Screen, found: Study, families: Study, top: int) -> None:
    table: Any = found.tables["heads"]
    more = f", {_SHOWN} of {len(table)}" if len(table) > _SHOWN else ""
    screen.heading(f"Heads{more}; * is called monosemantic")
    screen.table(
        ("head", "of layer", "agreement", "overlap", "alike by decoder", "by DFA", "families"),
        (
            (
                f"{row['layer']}.{row['head']}",
                f"{row['dfa_share']:.0%}",
                f"{row['agreement']:.2f} [{row['agreement_low']:.2f}, {row['agreement_high']:.2f}]",
                f"{row['overlap'] * top:.0f}/{top}",
                *(
                    f"{row[f'score_{by}']:.2f}{'*' if row[f'monosemantic_{by}'] else ''}"
                    for by in ("decoder", "dfa")
                ),
                row["families"].replace("_", " "),
            )
            for row in table.head(_SHOWN).to_dict("records")
        ),
    )
    screen.heading("Share of heads called monosemantic")
    sensitivity: Any = found.tables["sensitivity"]
    grid = sensitivity.pivot(index=["by", "top"], columns="threshold", values="share")
    screen.table(
        ("features", *(f"from {threshold:g}" for threshold in grid.columns)),
        ((f"top {n} by {by}", *(f"{x:.0%}" for x in row)) for (by, n), row in grid.iterrows()),
    )
    by_layer: Any = families.tables["layers"]
    for title, column in (("features", "share"), ("firings", "firings_share")):
        screen.heading(f"Families: share of {title} by layer")
        grid = by_layer.pivot(index="family", columns="layer", values=column)
        names = [name for name in (*families.settings["families"], "none") if name in grid.index]
        screen.table(
            ("family", *map(str, grid.columns)),
            (
                (name.replace("_", " "), *("" if x != x else f"{x:.1%}" for x in grid.loc[name]))
                for name in names
            ),
        )


def _survey(
    screen: Screen,
    folder: Path,
    lens: FeatureLens | None,
    model: str | None,
    data: str | None,
    rows: int,
    context: int,
    sample: int,
    seed: int,
) -> Survey:
    """The survey of a folder, made or gone on with where text was given."""
    finished = (folder / "survey.json").is_file()
    if lens is None or (data is None and (finished or full_name(model) != DEMO)):
        return sap.load_survey(folder)
    text: Any = data
    if data is None:
        import torch

        from sae_attn_plugin.demo.language import held_out_rows

        context = min(context, lens.backend.geometry.n_ctx)
        text = torch.tensor(held_out_rows(rows, context, seed))
    return sap.survey(
        lens,
        text,
        folder,
        sample=sample,
        context=context if data is not None else None,
        limit=rows,
        progress=screen.live,
    )
