"""Edits as data: what to change in a run, and where."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class SetFeature:
    """Set an attention feature to ``value`` at a position (None: everywhere).

    The SAE's error term is kept: z changes by ``(value - activation) * decoder``.
    """

    layer: int
    feature: int
    position: int | None
    value: float


@dataclass(frozen=True)
class AblateFeature:
    """Set an attention feature to zero at a position (None: everywhere)."""

    layer: int
    feature: int
    position: int | None = None

    @property
    def value(self) -> float:
        return 0.0


@dataclass(frozen=True, eq=False)
class AddToStream:
    """Add ``vector`` ``[d_model]`` to what a component writes into the residual stream.

    Args:
        site: ``"embed"``, ``"attn_out"`` or ``"mlp_out"``.
        layer: of the component; ignored for ``"embed"``.
    """

    vector: Float[Tensor, " d_model"]
    position: int
    site: Literal["embed", "attn_out", "mlp_out"] = "embed"
    layer: int = -1


Edit = SetFeature | AblateFeature | AddToStream
