"""Direct feature attribution (DFA): a pre-activation, split by head and source position."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_attn_plugin.attribution.frozen import FrozenLayer
from sae_attn_plugin.attribution.readers import through_output, z_readers, z_scale
from sae_attn_plugin.backends.protocol import repeat_kv

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


_AT_ONCE = 2**18  # numbers multiplied at once: they stay in the cache
_SEVERAL = 8  # features from which on one product for all is faster than one sum for each


@dataclass(frozen=True, eq=False)
class DFA:
    """Direct feature attribution of one feature at one destination position.

    ``by_head_and_source.sum() + constant == pre_activation``, up to rounding.

    Attributes:
        by_head_and_source: ``[n_heads, n_positions]``: ``pattern[h, q, p] * (w_h . v_p^h)``. The
            value bias is part of ``v``, as in Kissane et al. (2024).
        constant: encoder bias and ``-b_dec . w``, which no head and no source carries.
        pre_activation: as the SAE computes it from z.
        tokens: the prompt's tokens, by source position.
    """

    layer: int
    feature: int
    position: int
    by_head_and_source: Float[Tensor, "n_heads n_positions"]
    constant: float
    pre_activation: float
    tokens: tuple[str, ...]

    @property
    def by_head(self) -> Float[Tensor, " n_heads"]:
        """``[n_heads]``, equal to ``w_h . z^h``."""
        return self.by_head_and_source.sum(1)

    @property
    def by_source(self) -> Float[Tensor, " n_positions"]:
        """``[n_positions]``."""
        return self.by_head_and_source.sum(0)

    @property
    def residual(self) -> float:
        """What the split fails to explain; rounding only."""
        return self.pre_activation - self.constant - float(self.by_head_and_source.sum())

    def plot(self, ax: Axes | None = None) -> Figure:
        """A heat map of heads by source positions, in units of the pre-activation.

        Args:
            ax: axes to draw into. None: a figure of its own, which notebooks show.
        """
        from sae_attn_plugin.plots import heat_map

        seen = self.position + 1
        token = self.tokens[self.position]
        return heat_map(
            self.by_head_and_source[:, :seen].double().numpy(force=True),
            [f"{self.layer}.{head}" for head in range(len(self.by_head))],
            self.tokens[:seen],
            title=f"Feature {self.layer}/{self.feature} at {token!r} ({self.position})",
            name="attribution",
            ax=ax,
        )

    def _repr_html_(self) -> str:
        from sae_attn_plugin import display

        by_head = self.by_head.double()
        frame = pd.DataFrame(
            {
                "head": [f"{self.layer}.{head}" for head in range(len(by_head))],
                "attribution": by_head.numpy(force=True),
            }
        )
        strongest = frame["attribution"].abs().sort_values(ascending=False, kind="stable").index
        total, token = float(by_head.sum()), self.tokens[self.position]
        return display.card(
            f"Feature {self.layer}/{self.feature} at {token!r} ({self.position})",
            [
                f"pre-activation {display.number(self.pre_activation)}",
                f"heads {display.number(total, True)}",
                f"constant {display.number(self.constant, True)}",
            ],
            display.coloured(self.tokens, self.by_source[: self.position + 1].double().tolist()),
            display.table(
                frame.loc[strongest], ["head", "attribution"], bars="attribution", rows=8
            ),
        )

    def to_frame(self) -> pd.DataFrame:
        """Sources as rows, heads as columns, with the token of each source."""
        frame = pd.DataFrame(
            self.by_head_and_source.T.numpy(force=True),
            columns=[f"{self.layer}.{head}" for head in range(len(self.by_head))],
        )
        frame.index.name = "position"
        frame.insert(0, "token", list(self.tokens[: len(frame)]))
        return frame


def direct_feature_attribution(
    layer: FrozenLayer, feature: int, position: int
) -> tuple[Float[Tensor, "n_heads n_positions"], float, float]:
    """``(by_head_and_source, constant, pre_activation)`` of a feature at a destination.

    Values are projected on the encoder first, so the cost is ``n_heads * n_positions`` numbers.
    """
    index, at = (torch.tensor([number], device=layer.z.device) for number in (feature, position))
    reader = z_readers(layer, index, torch.zeros_like(index), at)
    encoder = reader.encoder if reader.scale is None else reader.encoder / reader.scale
    split = layer.pattern[:, position] * _through_values(layer, encoder)[:, 0]
    return split, float(reader.constant[0]), float(reader.value[0])


def attribution_by_source(
    layer: FrozenLayer, features: Int[Tensor, " n"]
) -> Float[Tensor, "n destination source"]:
    """DFA by source of some features of a layer at every destination, summed over heads.

    ``out[i, q].sum() + constant == pre_activation`` of feature ``i`` at ``q``. Values are projected
    on the encoders first, so that nothing of size destination x source x d_model is formed.
    """
    dictionary = layer.dictionary
    assert dictionary is not None
    encoder = dictionary.encoder(features, layer.z.dtype)
    if dictionary.reads == "attn_out":
        encoder = through_output(layer, encoder)
    projected = _through_values(layer, encoder)
    mix = _by_product if len(features) >= _SEVERAL else _by_sums
    return mix(layer.pattern, projected).div_(z_scale(layer))


def _by_sums(
    pattern: Float[Tensor, "n_heads destination source"],
    projected: Float[Tensor, "n_heads feature source"],
) -> Float[Tensor, "feature destination source"]:
    """``pattern * projected``, summed over heads, one feature after the other."""
    n_positions = pattern.shape[1]
    split = projected.new_zeros(projected.shape[1], n_positions, n_positions)
    for some, seen in _blocks(pattern):
        block = pattern[:, some, seen]
        product = torch.empty_like(block)
        for one, out in zip(projected.unbind(1), split, strict=True):
            torch.mul(block, one[:, None, seen], out=product)
            torch.sum(product, 0, out=out[some, seen])
    return split


def _by_product(
    pattern: Float[Tensor, "n_heads destination source"],
    projected: Float[Tensor, "n_heads feature source"],
) -> Float[Tensor, "feature destination source"]:
    """The same as one matrix product for each source, all features at once."""
    n_heads, n_features, n_positions = projected.shape
    by_source = projected.permute(2, 0, 1).contiguous()
    split = projected.new_zeros(n_positions, n_positions, n_features)
    for some, seen in _blocks(pattern):
        block = pattern[:, some, seen]
        last = block.reshape(n_heads, -1).T.contiguous().view(*block.shape[1:], n_heads)
        split[seen, some] = torch.bmm(last.transpose(0, 1), by_source[seen])
    return split.permute(2, 1, 0)


def _blocks(pattern: Float[Tensor, "n_heads destination source"]) -> Iterator[tuple[slice, slice]]:
    """A few destinations at a time, and the sources that they see."""
    n_heads, n_positions = pattern.shape[:2]
    step = max(1, _AT_ONCE // (n_heads * n_positions))
    for low in range(0, n_positions, step):
        high = min(low + step, n_positions)
        yield slice(low, high), slice(0, high)


def _through_values(
    layer: FrozenLayer, encoder: Float[Tensor, "feature n_heads d_head"]
) -> Float[Tensor, "n_heads feature source"]:
    """What each encoder reads from each head's value at each source."""
    values = repeat_kv(layer.v, encoder.shape[1]).permute(1, 2, 0)
    return torch.bmm(encoder.transpose(0, 1), values)
