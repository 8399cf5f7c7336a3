"""Long- and short-prefix induction heads (Kissane et al. 2024, section on heads 5.1 and 5.5).

An induction head attends from a token to what followed its earlier copy. Does it need one repeated
token for that, or several? Three measurements answer, for any heads:

- *sweep*: random distinct tokens in which exactly 1 to 9 repeat once; attention to the source, and
  the head's direct effect on the logit of the token there.
- *corruption*: windows of text in which the head attends to an induction source; the second-to-last
  token of the earlier copy is replaced. A head that needs only one token does not mind.
- *histogram*: how long the repeated prefix is where the head attends to a source in text.

Two flaws of the paper's code are not repeated: labels belong to their heads, and random tokens
come from the vocabulary. A control that the paper lacks is added to *corruption*: a token outside
both copies is replaced instead, which shows how much attention falls by any change of the window.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from sae_attn_plugin.attribution.frozen import algebra_dtype
from sae_attn_plugin.backends.protocol import Site
from sae_attn_plugin.errors import InputError
from sae_attn_plugin.statistics import NOTHING, bootstrap
from sae_attn_plugin.studies.attention import check_heads
from sae_attn_plugin.studies.parts import fingerprint, in_parts
from sae_attn_plugin.studies.result import Study
from sae_attn_plugin.tasks.induction import InductionDataset, fuzzy_classes, prefix_length
from sae_attn_plugin.tasks.metrics import head_scores
from sae_attn_plugin.tasks.rows import check_count
from sae_attn_plugin.tokens import check_ids

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from sae_attn_plugin.lens import FeatureLens

__all__ = ["plot", "prefix"]

Head = tuple[int, int]


def prefix(
    lens: FeatureLens,
    heads: Sequence[Head] | None = None,
    *,
    n: int = 400,
    prefix_lengths: Sequence[int] = tuple(range(1, 10)),
    length: int | None = None,
    windows: Tensor | None = None,
    min_attention: float = 0.3,
    min_score: float = 0.3,
    seed: int = 0,
    batch_size: int = 16,
    folder: Path | None = None,
    progress: bool | None = None,
) -> Study:
    """How many repeated tokens induction heads need.

    Args:
        lens: the model; its SAEs are not used.
        heads: ``(layer, head)`` pairs. None: all whose induction score on repeated random tokens is
            at least ``min_score``.
        n: rows per prefix length of the sweep.
        length: tokens per row; default: 128, or the model's context.
        windows: token ids ``[window, position]`` of text for *corruption* and *histogram*, which
            are left out without.
        min_attention: what counts as attending, to positions other than 0. *histogram* takes the
            first hit of each window, as the paper does; *corruption* the first one whose prefix is
            two tokens or more (the paper: the first hit, if its prefix is).
        folder: keeps finished parts, so that an interrupted study goes on where it was.

    Returns:
        Tables ``sweep`` (layer, head, prefix, attention and attribution with 95 % bootstrap
        intervals over rows), ``corruption`` (mean attention as it is, with the prefix cut, and
        with another token replaced, each with an interval, and paired changes; hits whose prefix
        is at least 2) and ``histogram`` (layer, head, prefix, windows, share).

    Raises:
        InputError: a head that does not exist, none found, rows longer than the context.
    """
    g = lens.backend.geometry
    length = min(128, g.n_ctx) if length is None else check_count(length, "length")
    check_count(batch_size, "batch_size")
    vocabulary = g.d_vocab if lens.tokenizer is None else lens.tokenizer
    with_bos = lens.tokenizer is not None and lens.prepend_bos
    chosen = _heads(lens, heads, vocabulary, with_bos, min_score, seed)
    settings = {
        **lens.provenance,
        "heads": [list(head) for head in chosen],
        "n": n,
        "prefix_lengths": list(prefix_lengths),
        "length": length,
        "windows": None if windows is None else fingerprint(windows),
        "min_attention": min_attention,
        "min_score": None if heads is not None else min_score,
        "seed": seed,
    }
    data = InductionDataset.prefix_sweep(
        n, vocabulary, seed, prefix_lengths=prefix_lengths, length=length, prepend_bos=with_bos
    )
    parts = torch.arange(len(data)).split(batch_size)
    common: dict[str, Any] = {"folder": folder, "settings": settings, "progress": progress}
    swept = in_parts(
        len(parts),
        lambda i: _attend(lens, chosen, data, parts[i]),
        name="prefix-sweep",
        **common,
    )
    tables = {"sweep": _sweep_table(chosen, data.prefix, swept)}
    if windows is not None:
        rows = check_ids(windows, g.d_vocab, g.n_ctx, g.device)
        classes = fuzzy_classes(lens.tokenizer, g.d_vocab).to(rows.device)
        bos = None if lens.tokenizer is None else lens.tokenizer.bos_token_id
        chunks = rows.split(batch_size)
        found = in_parts(
            len(chunks),
            lambda i: _in_text(lens, chosen, chunks[i], classes, bos, min_attention, seed + i),
            name="prefix-text",
            **common,
        )
        tables |= {
            "corruption": _corruption_table(chosen, found),
            "histogram": _histogram(chosen, found),
        }
    return Study("prefix", settings, tables)


def _heads(
    lens: FeatureLens,
    heads: Sequence[Head] | None,
    vocabulary: Any,
    with_bos: bool,
    min_score: float,
    seed: int,
) -> list[Head]:
    g = lens.backend.geometry
    if heads is not None:
        if not heads:
            raise InputError("no head given; pass heads=[(layer, head), ...] or None")
        return check_heads(lens, heads)
    segment = min(24, (g.n_ctx - with_bos) // 2)
    repeats = InductionDataset.random_repeats(
        64, vocabulary, seed, segment=segment, prepend_bos=with_bos
    )
    scores = head_scores(lens, repeats)["induction"]
    named: dict[Any, float] = scores.to_dict()
    found: list[Head] = [head for head, score in named.items() if score >= min_score]
    if not found:
        layer, head = max(named, key=lambda head: named[head])
        raise InputError(
            f"no head has an induction score of {min_score} or more; the best is {layer}.{head} "
            f"with {scores.max():.3f}. Lower min_score, or pass heads="
        )
    return found


def _attend(
    lens: FeatureLens, heads: list[Head], data: InductionDataset, rows: Tensor
) -> dict[str, Tensor]:
    """Attention to the source, and direct effect on its token's logit: ``[row, head]``."""
    backend, g = lens.backend, lens.backend.geometry
    tokens = check_ids(data.tokens[rows], g.d_vocab, g.n_ctx, g.device)
    every = torch.arange(len(rows), device=tokens.device)
    at, source = (x[rows].to(tokens.device) for x in (data.destination, data.source))
    layers = sorted({layer for layer, _ in heads})
    reads = [Site(name, layer) for layer in layers for name in ("pattern", "z")]
    run = backend.forward(tokens, reads=[*reads, Site("resid_final")])
    dtype = algebra_dtype(g.dtype)
    norm = backend.final_norm().to(dtype, g.device)
    final = run[Site("resid_final")].to(g.device)[every, at].to(dtype)
    W_U = backend.unembed()[0].to(g.device)
    unembedding = W_U[:, data.correct[rows].to(g.device)].T.to(dtype)
    attention, effect = [], []
    for layer, head in heads:
        weights = backend.layer_weights(layer).to(dtype, g.device)
        pattern = run[Site("pattern", layer)].to(g.device)
        z = run[Site("z", layer)].to(g.device)[every, at].to(dtype)
        out = z[:, head] @ weights.W_O[head]
        if weights.post_norm is not None:
            scale = weights.post_norm.scale(weights.attn_out(z))
            out = weights.post_norm.linear(out, scale)
        attention.append(pattern[every, head, at, source].to(dtype))
        effect.append((norm.linear(out, norm.scale(final)) * unembedding).sum(-1))
    return {"attention": torch.stack(attention, 1), "attribution": torch.stack(effect, 1)}


def _in_text(
    lens: FeatureLens,
    heads: list[Head],
    tokens: Tensor,
    classes: Tensor,
    bos: int | None,
    min_attention: float,
    seed: int,
) -> dict[str, Tensor]:
    """The prefix of every head's first hit in every window; of the first hit whose prefix is two or
    more, the attention before and after tokens are replaced."""
    layers = sorted({layer for layer, _ in heads})
    run = lens.backend.forward(tokens, reads=[Site("pattern", layer) for layer in layers])
    same = classes[tokens].cpu().numpy()
    rng = random.Random(f"prefix {seed}")
    first, hits, cut, control = [], [], [], []
    for number, (layer, head) in enumerate(heads):
        pattern = run[Site("pattern", layer)][:, head].to(tokens.device)
        for row in range(len(tokens)):
            body = int(bos is not None and int(tokens[row, 0]) == bos)
            attended = (pattern[row] > min_attention).tril()
            attended[:, 0] = False
            places = attended.nonzero().cpu().numpy()
            if not len(places):
                continue
            ids = same[row]

            def seen(at: int, source: int, ids: Any = ids, body: int = body) -> int:
                return prefix_length(ids, at, source, body)

            first.append((number, seen(*places[0])))
            at, source = places.T
            twice = (ids[at] == ids[source - 1]) & (ids[at - 1] == ids[source - 2])
            found = next((hit for hit in places[twice].tolist() if seen(*hit) >= 2), None)
            if found is None:
                continue
            at, source = found
            repeated = seen(at, source)
            hits.append((number, row, at, source, float(pattern[row, at, source])))
            copies = {*range(source - repeated, source + 1), *range(at - repeated + 1, at + 1)}
            free = [p for p in range(body, at) if p not in copies]
            cut.append((len(hits) - 1, source - 2))
            if free:
                control.append((len(hits) - 1, rng.choice(free)))
    replaced = {"cut": cut, "control": control}
    after = {name: torch.full((len(hits),), torch.nan, dtype=torch.float64) for name in replaced}
    for name, places in replaced.items():
        for chunk in (places[i : i + len(tokens)] for i in range(0, len(places), len(tokens))):
            rows = torch.stack([tokens[hits[hit][1]] for hit, _ in chunk])
            for i, (_, position) in enumerate(chunk):
                rows[i, position] = _other(rng, classes, rows[i], position, bos)
            again = lens.backend.forward(rows, reads=[Site("pattern", layer) for layer in layers])
            for i, (hit, _) in enumerate(chunk):
                (layer, head), at, source = heads[hits[hit][0]], hits[hit][2], hits[hit][3]
                after[name][hit] = float(again[Site("pattern", layer)][i, head, at, source])
    columns = torch.tensor(hits, dtype=torch.float64).reshape(-1, 5)
    return {
        "first": torch.tensor(first).reshape(-1, 2),
        "head": columns[:, 0].long(),
        "clean": columns[:, 4],
        **after,
    }


def _other(rng: random.Random, classes: Tensor, row: Tensor, position: int, bos: int | None) -> int:
    """A random token that makes no new repeat: of a class that the row does not hold, or, in a tiny
    vocabulary, of another class than the token it replaces."""
    ordinary = torch.arange(len(classes), device=classes.device) != (-1 if bos is None else bos)
    new = ordinary & ~torch.isin(classes, classes[row])
    if not new.any():
        new = ordinary & (classes != classes[row[position]])
    ids = new.nonzero()[:, 0]
    return int(ids[rng.randrange(len(ids))])


# -- tables --------------------------------------------------------------------------------------


def _sweep_table(heads: list[Head], prefixes: Tensor, swept: dict[str, Tensor]) -> pd.DataFrame:
    rows = []
    for number, (layer, head) in enumerate(heads):
        for length in prefixes.unique().tolist():
            mine = prefixes == length
            row: dict[str, Any] = {"layer": layer, "head": head, "prefix": length}
            for name in ("attention", "attribution"):
                row |= bootstrap(swept[name][mine, number].numpy()).columns(name)
            rows.append({**row, "n": int(mine.sum())})
    return pd.DataFrame(rows)


def _corruption_table(heads: list[Head], found: dict[str, Tensor]) -> pd.DataFrame:
    rows = []
    for number, (layer, head) in enumerate(heads):
        mine = found["head"] == number
        clean = found["clean"][mine].numpy()
        cut, control = found["cut"][mine].numpy(), found["control"][mine].numpy()
        row: dict[str, Any] = {"layer": layer, "head": head, "n": len(clean)}
        known = np.isfinite(control)
        for name, values in (
            ("clean", clean),
            ("cut", cut),
            ("control", control[known]),
            ("change", cut - clean),
            ("control_change", (control - clean)[known]),
        ):
            row |= (bootstrap(values) if len(values) else NOTHING).columns(name)
        rows.append(row)
    return pd.DataFrame(rows)


def _histogram(heads: list[Head], found: dict[str, Tensor]) -> pd.DataFrame:
    rows = []
    for number, (layer, head) in enumerate(heads):
        mine = found["first"][found["first"][:, 0] == number, 1]
        for length, count in enumerate(torch.bincount(mine).tolist() if len(mine) else []):
            row = {"layer": layer, "head": head, "prefix": length, "windows": count}
            rows.append({**row, "share": count / len(mine)})
    return pd.DataFrame(rows, columns=["layer", "head", "prefix", "windows", "share"])


# -- picture -------------------------------------------------------------------------------------


def plot(study: Study) -> Figure:
    """Attention and direct effect against prefix length; then, with text, what a cut prefix does
    and how long prefixes are."""
    from matplotlib.figure import Figure

    sweep = study.tables["sweep"]
    corruption, histogram = study.tables.get("corruption"), study.tables.get("histogram")
    panels = 2 if corruption is None else 4
    figure = Figure(figsize=(5.2 * 2, 3.8 * (panels // 2)), layout="constrained")
    axes = np.atleast_1d(figure.subplots(panels // 2, 2)).ravel()
    colours = [f"C{i % 10}" for i in range(sweep.groupby(["layer", "head"]).ngroups)]
    for colour, (head, rows) in zip(colours, sweep.groupby(["layer", "head"]), strict=True):
        label = f"{head[0]}.{head[1]}"  # pyright: ignore[reportIndexIssue]
        for axis, name in zip(axes, ("attention", "attribution"), strict=False):
            axis.plot(rows["prefix"], rows[name], marker="o", ms=3, color=colour, label=label)
            low, high = rows[f"{name}_low"], rows[f"{name}_high"]
            axis.fill_between(rows["prefix"], low, high, color=colour, alpha=0.2, lw=0)
    axes[0].set(xlabel="repeated tokens", ylabel="attention to the source", ylim=(0, 1))
    axes[1].set(xlabel="repeated tokens", ylabel="direct effect on the source's logit")
    axes[0].legend(title="head", fontsize=7, ncols=2)
    if corruption is not None and histogram is not None:
        names = [f"{a}.{b}" for a, b in zip(corruption["layer"], corruption["head"], strict=True)]
        places = np.arange(len(names))
        for i, (name, label) in enumerate(
            (("clean", "as it is"), ("cut", "prefix cut"), ("control", "another token replaced"))
        ):
            error = [
                corruption[name] - corruption[f"{name}_low"],
                corruption[f"{name}_high"] - corruption[name],
            ]
            axes[2].bar(
                places + 0.27 * (i - 1), corruption[name], 0.26, yerr=error, label=label, capsize=2
            )
        axes[2].set(ylabel="attention to the source", xlabel="head", ylim=(0, 1))
        axes[2].set_xticks(places, names)
        axes[2].legend(fontsize=7)
        for colour, (_, rows) in zip(colours, histogram.groupby(["layer", "head"]), strict=False):
            axes[3].plot(rows["prefix"], rows["share"], marker="o", ms=3, color=colour)
        axes[3].set(xlabel="repeated tokens where the head attends", ylabel="share of windows")
    return figure
