"""Direct feature attribution (DFA): a pre-activation, split by head and source position."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from sae_attn_plugin.attribution.frozen import FrozenLayer
from sae_attn_plugin.backends.protocol import repeat_kv


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
    dictionary, encoded = layer.dictionary, layer.encoded
    assert dictionary is not None
    assert encoded is not None
    index = torch.tensor([feature], device=layer.z.device)
    encoder = dictionary.encoder(index, layer.z.dtype)[0]
    encoder = encoder / dictionary.input_scale(encoded.scale)[position, 0]
    constant = float(dictionary.constants(index, layer.z.dtype)[0])
    projected = torch.einsum("phe,he->hp", repeat_kv(layer.v, len(encoder)), encoder)
    return (
        layer.pattern[:, position] * projected,
        constant,
        constant + float((encoder * layer.z[position]).sum()),
    )
