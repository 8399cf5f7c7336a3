"""The tables of a corpus survey by brute force: every firing kept, float64, no sketches.

Built on :class:`oracle.Oracle`, which reads a Hugging Face GPT-2 or Llama anew in plain torch, one
row at a time; nothing of the package is used. It is slow and meant for small models and few rows.

What the columns mean where words leave room:

- DFA by source is summed over heads first; ``dfa_abs`` of an example, ``by_distance`` and ``roles``
  sum its absolute values. ``dfa_abs`` of a feature sums absolute values over *heads*, and so does
  ``dfa_share``.
- A source is a ``duplicate`` if it is before the destination and holds the same token; a source is
  ``induction`` if the position before it is a duplicate, so it can be the destination itself.
- Bin i of distance or position holds ``edges[i] <= x < edges[i + 1]``, the last one all beyond.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import torch
from oracle import Oracle
from torch import Tensor

ROLES = ("self", "previous", "first", "duplicate", "induction")
QUANTILES = (10, 25, 50, 75, 90, 99)


def distance_edges(n_positions: int) -> list[int]:
    """0, 1, 2, 3, 5, 9, 17, ...: as many as ``n_positions`` needs."""
    edges = [0, 1, 2]
    while edges[-1] < n_positions:
        edges.append(2 * (edges[-1] - 1) + 1)
    return edges[:-1] if edges[-1] >= n_positions else edges


def position_edges(n_positions: int) -> list[int]:
    """0 to 15 singly, then doubling: 16, 32, 64, ..."""
    edges = list(range(16))
    while (step := 16 * 2 ** (len(edges) - 16)) < n_positions:
        edges.append(step)
    return [edge for edge in edges if edge < n_positions]


def bin_of(values: Any, edges: list[int]) -> np.ndarray:
    return np.searchsorted(edges, values, side="right") - 1


def role_masks(tokens: list[int], destination: int) -> np.ndarray:
    """``[role, source]`` over sources 0 .. destination."""
    n = destination + 1
    masks = np.zeros((len(ROLES), n), bool)
    for source in range(n):
        duplicate = source < destination and tokens[source] == tokens[destination]
        after = source > 0 and tokens[source - 1] == tokens[destination]
        masks[:, source] = (
            source == destination,
            source == destination - 1,
            source == 0,
            duplicate,
            after and source - 1 < destination,
        )
    return masks


class ReferenceSurvey:
    """All firings of all features over rows of tokens.

    Args:
        model: a Hugging Face GPT-2 or Llama. saes: sae_lens SAEs on z, by layer.
        rows: ``[row, position]``, or rows of unequal length.

    Attributes:
        firings: one row per firing, in order of layer, row, position, feature: ``layer, feature,
            row, position, activation, pre_activation, dfa_by_head, dfa`` (all sources, in order),
            ``by_distance, roles, dfa_abs, active``.
    """

    def __init__(self, model: Any, saes: Mapping[int, Any], rows: Any) -> None:
        self.model, self.saes = model, dict(saes)
        self.token_rows = [list(map(int, row)) for row in rows]
        longest = max(map(len, self.token_rows))
        self.distance_edges = distance_edges(longest)
        self.position_edges = position_edges(longest)
        self.layers = sorted(self.saes)
        parts = []
        for number, tokens in enumerate(self.token_rows):
            self.oracle = Oracle(model, self.saes, tokens)
            self.n_heads = self.oracle.n_heads
            for layer in self.layers:
                parts += self._fired(number, layer)
        order = ["layer", "row", "position", "feature"]
        self.firings = pd.DataFrame(parts).sort_values(order).reset_index(drop=True)

    def _encoder(self, layer: int) -> Tensor:
        """``[head, d_head, d_sae]``, so that ``sum over heads of z . w`` is the pre-activation less
        its constant."""
        sae = self.saes[layer]
        assert sae.cfg.normalize_activations == "none", "the reference has no normalisation"
        weights = sae.W_enc.detach().double()
        if sae.cfg.architecture() == "gated":
            weights = weights * sae.r_mag.detach().double().exp()
        if getattr(sae.cfg, "rescale_acts_by_decoder_norm", False):
            weights = weights * sae.W_dec.detach().double().norm(dim=-1)
        return weights.unflatten(0, (self.n_heads, -1))

    def decoder(self, layer: int) -> Tensor:
        """``[d_sae, head, d_head]``, what one unit of activation writes."""
        sae = self.saes[layer]
        weights = sae.W_dec.detach().double()
        if getattr(sae.cfg, "rescale_acts_by_decoder_norm", False):
            weights = weights / weights.norm(dim=-1, keepdim=True)
        return weights.unflatten(1, (self.n_heads, -1))

    def _fired(self, row: int, layer: int) -> list[dict[str, Any]]:
        oracle, encoder = self.oracle, self._encoder(layer)
        seen = oracle.layers[layer]
        stream = oracle._norm(
            seen.resid_pre, oracle._first_norm(layer), oracle._sigma(seen.resid_pre)
        )
        values = oracle._values(layer, stream)  # [head, source, d_head], value biases included
        acts, pre = oracle.acts(layer), oracle.pre_activations(layer)
        found = []
        for position, feature in (acts > 0).nonzero().tolist():
            projected = torch.einsum("hsd,hd->hs", values, encoder[:, :, feature])
            dfa = seen.pattern[:, position, : position + 1] * projected[:, : position + 1]
            by_source = dfa.sum(0).numpy()
            size = np.abs(by_source)
            bins = bin_of(position - np.arange(position + 1), self.distance_edges)
            found.append(
                {
                    "layer": layer,
                    "feature": feature,
                    "row": row,
                    "position": position,
                    "activation": float(acts[position, feature]),
                    "pre_activation": float(pre[position, feature]),
                    "dfa_by_head": dfa.sum(1).numpy(),
                    "dfa": by_source,
                    "by_distance": np.bincount(
                        bins, weights=size, minlength=len(self.distance_edges)
                    ),
                    "roles": role_masks(self.token_rows[row], position) @ size,
                    "dfa_abs": float(size.sum()),
                    "active": int((acts[position] > 0).sum()),
                }
            )
        return found

    @property
    def tokens(self) -> int:
        return sum(map(len, self.token_rows))

    def _all(self) -> list[tuple[int, int]]:
        return [(layer, i) for layer in self.layers for i in range(self.saes[layer].cfg.d_sae)]

    @functools.cached_property
    def _groups(self) -> dict[tuple[int, int], pd.DataFrame]:
        return {(int(k[0]), int(k[1])): g for k, g in self.firings.groupby(["layer", "feature"])}  # type: ignore[index]

    @functools.cached_property
    def features(self) -> pd.DataFrame:
        rows = []
        for layer, feature in self._all():
            group = self._groups.get((layer, feature))
            norm = float(self.decoder(layer)[feature].norm())
            row: dict[str, Any] = {"layer": layer, "feature": feature, "fires": 0, "density": 0.0}
            row |= {name: math.nan for name in ("mean", "max")}
            row |= {f"q{q}": math.nan for q in QUANTILES} | {"dfa_abs": math.nan}
            if group is not None:
                acts = group["activation"].to_numpy()
                by_head = np.stack(group["dfa_by_head"].tolist())
                row |= {"fires": len(group), "density": len(group) / self.tokens}
                row |= {"mean": acts.mean(), "max": acts.max()}
                row |= {f"q{q}": np.quantile(acts, q / 100) for q in QUANTILES}
                row["dfa_abs"] = np.abs(by_head).sum(1).mean()
            row |= {"decoder_norm": norm, "dead": group is None, "neuronpedia": None}
            rows.append(row)
        return pd.DataFrame(rows)

    @functools.cached_property
    def heads(self) -> pd.DataFrame:
        rows = []
        for layer, feature in self._all():
            slices = self.decoder(layer)[feature].norm(dim=-1).numpy()
            group = self._groups.get((layer, feature))
            nothing = np.full(self.n_heads, math.nan)
            mean = absolute = share = weighted = nothing
            if group is not None:
                by_head = np.stack(group["dfa_by_head"].tolist())
                size = np.abs(by_head)
                acts = group["activation"].to_numpy()[:, None]
                mean, absolute = by_head.mean(0), size.mean(0)
                share = size.sum(0) / size.sum()
                weighted = (acts * size).sum(0) / (acts * size).sum()
            for head in range(self.n_heads):
                rows.append(
                    {
                        "layer": layer,
                        "feature": feature,
                        "head": head,
                        "decoder_share": slices[head] / slices.sum(),
                        "dfa": mean[head],
                        "dfa_abs": absolute[head],
                        "dfa_share": share[head],
                        "weighted_share": weighted[head],
                    }
                )
        return pd.DataFrame(rows)

    def examples(self, keep: int, sample: int, sources: int, seed: int = 0) -> pd.DataFrame:
        """The ``keep`` strongest firings of each feature and ``sample`` drawn at random."""
        rng = np.random.default_rng(seed)
        parts = []
        for group in self._groups.values():
            top = group.sort_values(
                ["activation", "row", "position"], ascending=[False, True, True]
            )
            parts.append(self._kept(top.head(keep), "top", sources))
            drawn = rng.permutation(len(group))[:sample]
            parts.append(self._kept(group.iloc[drawn], "sample", sources))
        return pd.concat(parts, ignore_index=True)

    def _kept(self, group: pd.DataFrame, kind: str, sources: int) -> pd.DataFrame:
        kept = group.copy()
        kept.insert(2, "kind", kind)
        kept.insert(3, "rank", np.arange(len(kept)))
        strongest = [np.argsort(-np.abs(dfa), kind="stable")[:sources] for dfa in group["dfa"]]
        kept["sources"] = strongest
        kept["dfa_rest"] = [
            float(dfa.sum() - dfa[s].sum()) for dfa, s in zip(group["dfa"], strongest, strict=True)
        ]
        kept["dfa"] = [dfa[s] for dfa, s in zip(group["dfa"], strongest, strict=True)]
        return kept

    def sample(self, places: list[tuple[int, int]]) -> pd.DataFrame:
        """The active features at some positions ``(row, position)``."""
        wanted = pd.DataFrame(places, columns=["row", "position"])
        found: Any = self.firings.merge(wanted, on=["row", "position"])
        return found[["row", "position", "layer", "feature", "activation"]]

    def cofiring(self, places: list[tuple[int, int]], most: int = 10) -> pd.DataFrame:
        """Pairs of features of one layer that are active at the same of these positions."""
        sample = self.sample(places)
        rows = []
        for layer in self.layers:
            mine = sample[sample["layer"] == layer]
            at = {
                int(f): set(zip(g["row"], g["position"], strict=True))  # type: ignore[arg-type]
                for f, g in mine.groupby("feature")
            }
            for one, here in at.items():
                pairs = []
                for other, there in at.items():
                    both = len(here & there)
                    if other != one and both:
                        jaccard = both / len(here | there)
                        pairs.append((-jaccard, other, both, jaccard))
                for _, other, both, jaccard in sorted(pairs)[:most]:
                    rows.append((layer, one, layer, other, both, len(here), jaccard))
        columns = ["layer", "feature", "other_layer", "other", "together", "fires_sample"]
        return pd.DataFrame(rows, columns=[*columns, "jaccard"])

    @functools.cached_property
    def logit_effects(self) -> dict[int, Tensor]:
        """By layer ``[d_sae, d_vocab]``: decoder row through W_O, the last norm's gain (centred for
        LayerNorm, without its scale), and the unembedding centred over the vocabulary."""
        o = self.oracle
        gain, W_U = o.w[f"{o._last_norm}.weight"], o.w["lm_head.weight"].T
        found = {}
        for layer in self.layers:
            written = o._out(layer, self.decoder(layer).flatten(1))
            if o.gpt2:
                written = written - written.mean(-1, keepdim=True)
            found[layer] = (written * gain) @ (W_U - W_U.mean(-1, keepdim=True))
        return found

    def logits(self, tokenizer: Any = None, most: int = 10) -> pd.DataFrame:
        """The ``most`` tokens each feature lifts and lowers most."""
        rows = []
        for layer, feature in self._all():
            effect = self.logit_effects[layer][feature]
            for sign in (1, -1):
                order = (sign * effect).argsort(descending=True, stable=True)[:most].tolist()
                for rank, token in enumerate(order):
                    text = f"#{token}" if tokenizer is None else tokenizer.decode([token])
                    rows.append((layer, feature, rank, sign, token, text, float(effect[token])))
        columns = ["layer", "feature", "rank", "sign", "token", "string", "effect"]
        return pd.DataFrame(rows, columns=columns)

    @functools.cached_property
    def positions_profile(self) -> pd.DataFrame:
        counted = self.firings.assign(
            position_bin=bin_of(self.firings["position"], self.position_edges)
        )
        sizes: Any = counted.groupby(["layer", "feature", "position_bin"]).size()
        return sizes.rename("fires").reset_index()

    @functools.cached_property
    def rows(self) -> pd.DataFrame:
        return pd.DataFrame({"row": range(len(self.token_rows)), "tokens": self.token_rows})
