"""What an intervention did, to look at."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd

from sae_attn_plugin.errors import InputError
from sae_attn_plugin.tokens import token_label

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from sae_attn_plugin.interventions.result import InterventionResult

_EACH = 6  # most probable tokens of the clean and of the edited run


def next_tokens(result: InterventionResult, position: int = -1, prompt: int = 0) -> pd.DataFrame:
    """The most probable next tokens of both runs: ``token, clean, edited, change``, probabilities.

    Args:
        position: after which token, negative from the end. prompt: of several, which.
    """
    if not 0 <= prompt < len(result.clean):
        raise InputError(f"prompt {prompt} is out of range: the run holds {len(result.clean)}")
    one = result[prompt]
    run = one.clean
    at = run.resolve_position(position)
    clean = run.logits[0, at].double().softmax(-1).cpu()
    edited = one.logits[0, at].double().softmax(-1).cpu()
    count = min(_EACH, len(clean))
    ids = list(
        dict.fromkeys([*clean.topk(count).indices.tolist(), *edited.topk(count).indices.tolist()])
    )
    tokenizer, d_vocab = run.lens.tokenizer, run.lens.backend.geometry.d_vocab
    frame = pd.DataFrame(
        {
            "token": [str(token_label(tokenizer, number, d_vocab)) for number in ids],
            "clean": clean[ids].numpy(),
            "edited": edited[ids].numpy(),
        }
    )
    frame["change"] = frame["edited"] - frame["clean"]
    order = frame["change"].abs().sort_values(ascending=False, kind="stable").index
    return frame.loc[order].reset_index(drop=True)


def as_html(result: InterventionResult) -> str:
    from sae_attn_plugin import display

    several = len(result.clean) > 1
    run = result.clean[0]
    at = run.resolve_position(-1)
    return display.card(
        "Intervention",
        [
            f"next token after {run.token_strings[at]!r} ({at})",
            f"first of {len(result.clean)} prompts" if several else "",
        ],
        display.table(
            next_tokens(result), ["token", "clean", "edited", "change"], bars="change", rows=10
        ),
    )


def plot(
    result: InterventionResult, position: int = -1, prompt: int = 0, ax: Axes | None = None
) -> Figure:
    from sae_attn_plugin.plots import bars

    frame = next_tokens(result, position, prompt)
    run = result.clean[prompt]
    at = run.resolve_position(position)
    return bars(
        frame["token"].tolist(),
        frame["change"].tolist(),
        title=f"Next token after {run.token_strings[at]!r} ({at})",
        name="edited − clean probability",
        ax=ax,
    )
