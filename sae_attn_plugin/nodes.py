"""Node ids and targets.

A node id is a short typed string with a total round trip: ``Node.parse(str(node)) == node``.
An unknown form is an error, since an id selects a node and does not describe one.

=================  ==============================  ================================================
kind               id                              what it is
=================  ==============================  ================================================
``attn``           ``attn:5:7515@10``              attention SAE feature: layer, feature, position
``attn_err``       ``attn_err:5@10``               what the SAE of the layer does not reconstruct
``attn_bias``      ``attn_bias:5@10``              decoder bias (through W_O for z, and b_O)
``head``           ``head:5.1@10``                 a head's output, in a layer without a dictionary
``mlp``            ``mlp:3@10``                    raw MLP output
``tc``             ``tc:3:120@10``                 transcoder feature: layer, feature, position
``tc_skip``        ``tc_skip:3@10``                the transcoder's skip connection
``tc_err``         ``tc_err:3@10``                 what the transcoder misses of the MLP's output
``tc_bias``        ``tc_bias:3@10``                its decoder bias
``mlp_sae``        ``mlp_sae:3:120@10``            feature of an SAE on the MLP's output
``mlp_sae_err``    ``mlp_sae_err:3@10``            what that SAE does not reconstruct
``mlp_sae_bias``   ``mlp_sae_bias:3@10``           its decoder bias
``resid``          ``resid:5:120@10``              feature of an SAE on the residual stream before
                                                   a layer (after the last one: the final stream)
``resid_err``      ``resid_err:5@10``              what that SAE does not reconstruct
``resid_bias``     ``resid_bias:5@10``             its decoder bias
``resid_mid``      ``resid_mid:5:120@10``          feature of an SAE on the stream before the MLP of
                                                   a layer
``resid_mid_err``  ``resid_mid_err:5@10``          what that SAE does not reconstruct
``resid_mid_bias`` ``resid_mid_bias:5@10``         its decoder bias
``embed``          ``embed@4``                     token embedding
``pos``            ``pos@4``                       learned position embedding
``logit``          ``logit:" Mary"@14``            a logit; a token id is written ``logit:#5335@14``
``logit_diff``     ``logit_diff:" Mary"-" John"@14``  logit of the first minus the second
``direction``      ``direction:"name"@14``         a direction of the final normalised residual
``score``          ``score:7.3:10@14``             score of head 7.3 from query 14 to key 10;
                                                   ``score:7.3:10:query@14``: with the key held
``super``          ``super:5:"names"@10``          nodes merged into one, at the last one's place
``const``          ``const:attn:5:7515@10``        the constant of a target, a row of its ledger
=================  ==============================  ================================================
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from sae_attn_plugin.errors import InputError

if TYPE_CHECKING:
    import torch
    from jaxtyping import Float

__all__ = ["Direction", "Feature", "HeadScore", "Logit", "LogitDiff", "Node", "Target"]

FeatureKind = Literal["attn", "tc", "mlp_sae", "resid", "resid_mid"]

_NUMBER = r"(?:0|[1-9][0-9]{0,17})"  # as str(int) writes it
# kind -> what stands between its name and "@position"
_PATTERNS: dict[str, str] = {
    "attn": rf":(?P<layer>{_NUMBER}):(?P<feature>{_NUMBER})",
    "attn_err": rf":(?P<layer>{_NUMBER})",
    "attn_bias": rf":(?P<layer>{_NUMBER})",
    "head": rf":(?P<layer>{_NUMBER})\.(?P<head>{_NUMBER})",
    "mlp": rf":(?P<layer>{_NUMBER})",
    "tc": rf":(?P<layer>{_NUMBER}):(?P<feature>{_NUMBER})",
    "tc_skip": rf":(?P<layer>{_NUMBER})",
    "tc_err": rf":(?P<layer>{_NUMBER})",
    "tc_bias": rf":(?P<layer>{_NUMBER})",
    "mlp_sae": rf":(?P<layer>{_NUMBER}):(?P<feature>{_NUMBER})",
    "mlp_sae_err": rf":(?P<layer>{_NUMBER})",
    "mlp_sae_bias": rf":(?P<layer>{_NUMBER})",
    **{
        kind + part: rf":(?P<layer>{_NUMBER})" + (rf":(?P<feature>{_NUMBER})" if not part else "")
        for kind in ("resid", "resid_mid")
        for part in ("", "_err", "_bias")
    },
    "embed": "",
    "pos": "",
    "logit": r":(?P<label>.+)",
    "logit_diff": r":(?P<label>.+)",
    "direction": r":(?P<label>.+)",
    "score": rf":(?P<layer>{_NUMBER})\.(?P<head>{_NUMBER}):(?P<key>{_NUMBER})"
    r"(:(?P<label>query|key))?",
    "super": rf":(?:(?P<layer>{_NUMBER}):)?(?P<label>.+)",
}
KINDS: tuple[str, ...] = (*_PATTERNS, "const")
FEATURE_KINDS: tuple[FeatureKind, ...] = ("attn", "tc", "mlp_sae", "resid", "resid_mid")
# Of SAEs on the residual stream itself: a sum of what was written before, not one more writer.
RESIDUAL_KINDS: tuple[FeatureKind, ...] = ("resid", "resid_mid")
# Nodes that pass on what they read, on request; a vector each, where features are numbers.
PASSING_KINDS: tuple[str, ...] = ("head", "mlp", "tc_skip")
TARGET_KINDS: tuple[str, ...] = ("logit", "logit_diff", "direction", "score")
_KIND = re.compile(r"[a-z_]+")
_REGEX = {
    kind: re.compile(rf"{kind}{body}@(?P<position>{_NUMBER})", re.DOTALL)
    for kind, body in _PATTERNS.items()
}
_JSON = r'"(?:[^"\\]|\\.)*"'
_TOKEN = rf"(?:{_JSON}|#{_NUMBER})"
_LABELS = {
    "logit": re.compile(_TOKEN, re.DOTALL),
    "logit_diff": re.compile(rf"{_TOKEN}-{_TOKEN}", re.DOTALL),
    "direction": re.compile(_JSON, re.DOTALL),
    "score": re.compile("query|key"),
    "super": re.compile(_JSON, re.DOTALL),
}


@dataclass(frozen=True)
class Node:
    """One node of an attribution graph. ``str(node)`` is its id.

    ``label`` is the part of a logit, direction or merged node's id that is quoted as JSON, or the
    side a score is followed on; ``of`` is the target whose constant a ``const`` node is; ``key`` is
    the key position of a score.
    """

    kind: str
    position: int
    layer: int | None = None
    feature: int | None = None
    head: int | None = None
    label: str | None = None
    of: Node | None = None
    key: int | None = None

    def __str__(self) -> str:
        match self.kind:
            case "attn" | "tc" | "mlp_sae" | "resid" | "resid_mid":
                body = f":{self.layer}:{self.feature}"
            case (
                "attn_err"
                | "attn_bias"
                | "mlp"
                | "tc_skip"
                | "tc_err"
                | "tc_bias"
                | "mlp_sae_err"
                | "mlp_sae_bias"
                | "resid_err"
                | "resid_bias"
                | "resid_mid_err"
                | "resid_mid_bias"
            ):
                body = f":{self.layer}"
            case "head":
                body = f":{self.layer}.{self.head}"
            case "embed" | "pos":
                body = ""
            case "logit" | "logit_diff" | "direction":
                body = f":{self.label}"
            case "score":
                side = "" if self.label is None else f":{self.label}"
                body = f":{self.layer}.{self.head}:{self.key}{side}"
            case "super":
                body = f":{self.label}" if self.layer is None else f":{self.layer}:{self.label}"
            case "const":
                return f"const:{self.of}"
            case _:
                raise InputError(
                    f"unknown node kind {self.kind!r}; known kinds: {', '.join(KINDS)}"
                )
        return f"{self.kind}{body}@{self.position}"

    @classmethod
    def parse(cls, text: str) -> Node:
        """The node that an id names.

        Raises:
            InputError: if the text is not the id of any known kind.
        """
        if text.startswith("const:"):
            of = cls.parse(text.removeprefix("const:"))
            if of.kind not in (*FEATURE_KINDS, *PASSING_KINDS, *TARGET_KINDS):
                raise InputError(f"not a node id: {text!r}: only targets have a constant")
            return cls("const", of.position, of=of)
        start = _KIND.match(text)
        kind = start.group() if start else ""
        match = _REGEX[kind].fullmatch(text) if kind in _REGEX else None
        if match is None:
            raise InputError(
                f"not a node id: {text!r}; expected a form such as attn:5:7515@10, attn_err:5@10, "
                'embed@4 or logit:" Mary"@14'
            )
        fields = match.groupdict()
        label = fields.get("label")
        if label is not None and not (
            _LABELS[kind].fullmatch(label) and all(map(_is_canonical, re.findall(_TOKEN, label)))
        ):
            raise InputError(
                f"not a node id: {text!r}: {label!r} is not a quoted token of {kind!r}"
            )
        numbers: dict[str, Any] = {
            name: int(value)
            for name, value in fields.items()
            if name != "label" and value is not None
        }
        return cls(kind, label=label, **numbers)


def quote(token: str | int) -> str:
    """A token as it stands in a node id: JSON for a string, ``#id`` for a number."""
    return f"#{token}" if isinstance(token, int) else json.dumps(token, ensure_ascii=False)


def _is_canonical(token: str) -> bool:
    """Whether a token of a label is written as :func:`quote` writes it."""
    try:
        return token.startswith("#") or quote(json.loads(token)) == token
    except ValueError:
        return False


def unquote(label: str) -> list[str | int]:
    """The tokens in the label of a logit node: undoes :func:`quote`."""
    return [
        int(part[1:]) if part.startswith("#") else json.loads(part)
        for part in re.findall(_TOKEN, label, re.DOTALL)
    ]


@dataclass(frozen=True)
class Feature:
    """Target: the pre-activation of a feature at a position.

    ``kind``: ``"attn"`` (of the attention SAE of the layer), ``"tc"`` (transcoder), ``"mlp_sae"``
    (SAE on the MLP's output), ``"resid"`` (SAE on the residual stream before the layer) or
    ``"resid_mid"`` (before its MLP).
    """

    layer: int
    feature: int
    position: int
    kind: FeatureKind = "attn"


@dataclass(frozen=True)
class Logit:
    """Target: a logit, before any final soft-cap. ``token``: a one-token string or an id."""

    token: str | int
    position: int = -1


@dataclass(frozen=True)
class LogitDiff:
    """Target: the logit of ``correct`` minus the logit of ``wrong``, before any final soft-cap."""

    correct: str | int
    wrong: str | int
    position: int = -1


@dataclass(frozen=True, eq=False)
class Direction:
    """Target: ``vector . final_norm(residual)``; a column of W_U gives that logit without its bias.

    Args:
        vector: ``[d_model]``.
        position: where the final residual is read.
        name: stands in the node id.
    """

    vector: Float[torch.Tensor, " d_model"]
    position: int = -1
    name: str = "direction"


@dataclass(frozen=True)
class HeadScore:
    """Target: a head's pre-softmax score from a query to a key, before any soft-cap.

    The score is a product of what writes the query and what writes the key. ``side`` says who gets
    it: ``"query"`` (the key held), ``"key"`` (the query held), or ``"both"``, half of each. The
    ledger closes to the score each way.
    """

    layer: int
    head: int
    query: int
    key: int
    side: Literal["query", "key", "both"] = "both"

    @property
    def position(self) -> int:
        """The query's."""
        return self.query


Target = Feature | Logit | LogitDiff | Direction | HeadScore
