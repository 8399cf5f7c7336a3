"""Edits as data: what to change in a run, and where.

Every edit is a frozen dataclass of plain values: edits can be compared, hashed, and written to JSON
(``edit.to_dict()``, ``Edit.from_dict(d)``). What other runs they take values from is said by name
(:class:`From`, :class:`Mean`), and the runs themselves are given to ``lens.intervene(...,
sources=...)``.

*Positions.* ``position`` of an edit is

- a number, counted from the end where negative: that position of every prompt;
- a role such as ``"S2"``: the position of the role in each prompt of a run made from a data set;
- a tuple: one position **per prompt**, prompt by prompt. Several positions of one prompt are
  several edits, so positions of one prompt never meet another's;
- None: every position.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from sae_attn_plugin.errors import InputError

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

__all__ = [
    "FREEZABLE",
    "AblateError",
    "AblateFeature",
    "AblateHead",
    "AddToStream",
    "Edit",
    "Freeze",
    "From",
    "Mean",
    "PatchEdge",
    "PatchSite",
    "ScaleFeature",
    "SetFeature",
    "Steer",
]

Position = int | str | tuple[int, ...] | None
Kind = Literal["attn", "tc", "mlp_sae"]
KINDS = ("attn", "tc", "mlp_sae")

FREEZABLE = ("patterns", "norms", "mlp", "attention")
PATCHABLE = ("embed", "resid_pre", "v", "z", "attn_out", "mlp_out")

_NUMBER = r"(?:0|[1-9][0-9]{0,17})"
_CONSTANT = ("attn_bias", "tc_bias", "tc_skip", "mlp_sae_bias", "pos")
_WRITER = re.compile(
    r"(?:(?P<whole>embed|pos)|(?P<part>attn_err|attn_bias|attn_out|mlp|tc_err|tc_bias|tc_skip"
    rf"|mlp_sae_err|mlp_sae_bias):(?P<at>{_NUMBER})"
    rf"|(?P<dictionary>attn|tc|mlp_sae):(?P<layer>{_NUMBER}):(?P<feature>{_NUMBER})"
    rf"|head:(?P<of>{_NUMBER})\.(?P<head>{_NUMBER}))"
)
_READER = re.compile(
    rf"(?:(?P<whole>final)|(?P<part>query|key|value|mlp):(?P<at>{_NUMBER})"
    rf"|(?P<dictionary>attn|tc):(?P<layer>{_NUMBER}):(?P<feature>{_NUMBER})"
    rf"|(?P<side>query|key|value):(?P<of>{_NUMBER})\.(?P<head>{_NUMBER}))"
)


@dataclass(frozen=True)
class From:
    """The same thing in another run, prompt by prompt.

    Args:
        source: its name in ``sources``. It has as many prompts as the edited run, or one for all.
        position: where it stands there; None: where the edit stands (a role is looked up in the
            source, so S2 is taken from S2 wherever it is).
    """

    source: str = "source"
    position: Position = None

    def __post_init__(self) -> None:
        _fix(self)


@dataclass(frozen=True)
class Mean:
    """Its mean over all prompts of another run; over their positions too where the edit has none.

    Args:
        source, position: as of :class:`From`.
    """

    source: str = "source"
    position: Position = None

    def __post_init__(self) -> None:
        _fix(self)


@dataclass(frozen=True)
class Edit:
    """One change of a run; the base of all edits."""

    _kinds: ClassVar[dict[str, type[Edit]]] = {}

    def __init_subclass__(cls) -> None:
        Edit._kinds[cls.__name__] = cls

    def __post_init__(self) -> None:
        _fix(self)

    def to_dict(self) -> dict[str, Any]:
        """The edit as JSON can hold it; :meth:`from_dict` gives it back."""
        values = {f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self)}
        return {"edit": type(self).__name__, **values}

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Edit:
        """The edit that :meth:`to_dict` wrote.

        Raises:
            InputError: an unknown edit, a field it does not have, a value that does not fit.
        """
        if not isinstance(data, Mapping) or data.get("edit") not in Edit._kinds:
            raise InputError(
                f"not an edit: {data!r}; expected a dict with 'edit' one of "
                f"{', '.join(sorted(Edit._kinds))}"
            )
        kind = Edit._kinds[data["edit"]]
        known = {f.name for f in dataclasses.fields(kind)}
        values = {name: _rich(value) for name, value in data.items() if name != "edit"}
        if unknown := sorted(set(values) - known):
            raise InputError(
                f"{kind.__name__} has no {', '.join(unknown)}; it has {', '.join(sorted(known))}"
            )
        try:
            return kind(**values)
        except TypeError as error:
            raise InputError(f"not a {kind.__name__}: {data!r}: {error}") from None


@dataclass(frozen=True)
class SetFeature(Edit):
    """Set a feature to ``value`` at a position (None: everywhere).

    The error term of the dictionary is kept: its output changes by
    ``(value - activation) * decoder``.

    Args:
        kind: ``"attn"`` for features of attention, ``"tc"`` for those of a transcoder,
            ``"mlp_sae"`` for those of an SAE on what the MLP writes.
    """

    layer: int
    feature: int
    position: Position
    value: float
    kind: Kind = "attn"


@dataclass(frozen=True)
class AblateFeature(Edit):
    """Set a feature to zero, to its mean over a set, or to what it is in another run.

    Args:
        to: None for zero, :class:`Mean`, or :class:`From` (a patch, or a resample ablation).
    """

    layer: int
    feature: int
    position: Position = None
    to: Mean | From | None = None
    kind: Kind = "attn"


@dataclass(frozen=True)
class ScaleFeature(Edit):
    """Multiply a feature's activation by ``factor``."""

    layer: int
    feature: int
    position: Position
    factor: float
    kind: Kind = "attn"


@dataclass(frozen=True)
class Steer(Edit):
    """Add ``amount`` times a feature's decoder direction, active or not.

    ``amount`` is in units of the feature's activation: on an inactive feature this is
    ``SetFeature(..., value=amount)``.
    """

    layer: int
    feature: int
    position: Position
    amount: float
    kind: Kind = "attn"


@dataclass(frozen=True)
class AblateError(Edit):
    """Take away what the dictionary of a layer does not reconstruct, or put another's there.

    With ``to=None`` and no other edit, the layer then writes its reconstruction.
    """

    layer: int
    position: Position = None
    to: Mean | From | None = None
    kind: Kind = "attn"


@dataclass(frozen=True)
class AblateHead(Edit):
    """Set a head's z to zero, to its mean over a set, or to what it is in another run."""

    layer: int
    head: int
    position: Position = None
    to: Mean | From | None = None


@dataclass(frozen=True)
class PatchSite(Edit):
    """Replace what stands at a site of a layer, as a whole.

    Args:
        site: ``"embed"``, ``"resid_pre"``, ``"v"``, ``"z"``, ``"attn_out"`` or ``"mlp_out"``.
        layer: ignored for ``"embed"``.
        to: :class:`From` (a patch), :class:`Mean`, or None for zero.
    """

    site: Literal["embed", "resid_pre", "v", "z", "attn_out", "mlp_out"]
    layer: int = -1
    position: Position = None
    to: Mean | From | None = dataclasses.field(default_factory=From)


@dataclass(frozen=True)
class PatchEdge(Edit):
    """Change what one reader sees of one writer, and nothing else (path patching; Wang et al. 2022,
    arXiv:2211.00593, section 3.1).

    The reader reads the residual stream with the writer's contribution at ``position`` taken away
    (``to=None``) or replaced; every other reader sees the writer as it is. The norm in front of the
    reader has the scale of the changed stream, unless norms are frozen. Patterns are those of the
    run, but for a head whose query or key reads: its scores are computed anew. With norms and
    patterns frozen a value, a feature or a logit then changes by minus the edge of the attribution
    graph, and with norms frozen a score does.

    Args:
        writer: ``attn:LAYER:FEATURE``, ``attn_err:LAYER``, ``attn_bias:LAYER``,
            ``head:LAYER.HEAD``, ``attn_out:LAYER`` (the whole block), ``mlp:LAYER``,
            ``tc:LAYER:FEATURE``, ``tc_err:LAYER``, ``tc_bias:LAYER``, ``tc_skip:LAYER``, the same
            with ``mlp_sae``, ``embed`` or ``pos``.
        reader: ``query:LAYER.HEAD``, ``key:LAYER.HEAD`` or ``value:LAYER.HEAD`` (that input of a
            head), ``query:LAYER``, ``key:LAYER`` or ``value:LAYER`` (of all heads),
            ``attn:LAYER:FEATURE`` (the feature's pre-activation, through values), ``mlp:LAYER``,
            ``tc:LAYER:FEATURE``, or ``final`` (the unembedding).
        position: where the writer writes, which is where the reader reads.
        to: None takes the contribution away; :class:`From` and :class:`Mean` replace it.
        reader_position: of a feature that reads: its own position (None: every one).
    """

    writer: str
    reader: str
    position: Position = None
    to: Mean | From | None = None
    reader_position: Position = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for pattern, text, what in (
            (_WRITER, self.writer, "writer"),
            (_READER, self.reader, "reader"),
        ):
            if not isinstance(text, str) or not pattern.fullmatch(text):
                raise InputError(f"PatchEdge({what}={text!r}): not a {what}; see its docstring")
        if self.to is not None and self.writer.partition(":")[0] in _CONSTANT:
            raise InputError(
                f"PatchEdge(writer={self.writer!r}, to={self.to!r}): this writer can "
                "only be taken away (to=None)"
            )
        if self.reader_position is not None and self.target.kind not in ("attn", "tc"):
            raise InputError(
                f"PatchEdge(reader={self.reader!r}): only a feature has a reader_position; other "
                "readers read where the writer writes"
            )

    @property
    def source(self) -> End:
        """The writer, taken apart."""
        return _end(_WRITER, self.writer)

    @property
    def target(self) -> End:
        """The reader, taken apart."""
        return _end(_READER, self.reader)

    @classmethod
    def between(cls, source: str, target: str, to: Mean | From | None = None) -> PatchEdge:
        """The edge of an attribution graph, from its two node ids.

        Raises:
            InputError: not node ids, or a target that reads nothing. A score of which both sides
                are followed is no single reader.
        """
        from sae_attn_plugin.nodes import Node

        writer, reader = Node.parse(source), Node.parse(target)
        at = str(writer).rpartition("@")[0]
        if reader.kind in ("logit", "logit_diff", "direction"):
            return cls(at, "final", writer.position, to)
        if reader.kind == "score":
            if reader.label is None:
                raise InputError(
                    f"{target} reads as query and as key, which are two edges; follow one side: "
                    "HeadScore(..., side='query')"
                )
            at_side = reader.position if reader.label == "query" else reader.key
            if writer.position != at_side:
                raise InputError(f"{target} does not read position {writer.position}")
            return cls(at, f"{reader.label}:{reader.layer}.{reader.head}", writer.position, to)
        if reader.kind not in ("attn", "tc"):
            raise InputError(f"{target} reads nothing: expected a feature or a logit")
        return cls(
            at, str(reader).rpartition("@")[0], writer.position, to, reader_position=reader.position
        )


@dataclass(frozen=True)
class End:
    """One end of a :class:`PatchEdge`: ``index`` is a feature or a head."""

    kind: str
    layer: int = -1
    index: int | None = None


@dataclass(frozen=True, eq=False)
class AddToStream(Edit):
    """Add ``vector`` ``[d_model]`` to what a component writes into the residual stream.

    Args:
        site: ``"embed"``, ``"attn_out"`` or ``"mlp_out"``.
        layer: of the component; ignored for ``"embed"``.
    """

    vector: Float[Tensor, " d_model"]
    position: Position
    site: Literal["embed", "attn_out", "mlp_out"] = "embed"
    layer: int = -1

    def __post_init__(self) -> None:
        import torch

        if isinstance(self.vector, Mapping):
            dtype = getattr(torch, str(self.vector.get("dtype")), torch.float32)
            vector = torch.tensor(self.vector.get("values"), dtype=dtype)
            object.__setattr__(self, "vector", vector)
        super().__post_init__()

    def _key(self) -> tuple[Any, ...]:
        vector = self.vector.detach().cpu()
        return (
            tuple(vector.double().flatten().tolist()),
            str(vector.dtype),
            *(self.position, self.site, self.layer),
        )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, AddToStream) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())


@dataclass(frozen=True)
class Freeze:
    """A part of the model held at the clean run, in some layers.

    Args:
        part: ``"patterns"``, ``"norms"``, ``"mlp"`` or ``"attention"``.
        layers: those held; None: all. The final norm counts as one more layer, after the last.
        but: layers that stay live.
    """

    part: Literal["patterns", "norms", "mlp", "attention"]
    layers: tuple[int, ...] | None = None
    but: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.part not in FREEZABLE:
            raise InputError(f"cannot freeze {self.part}; known: {', '.join(FREEZABLE)}")
        for name in ("layers", "but"):
            value = getattr(self, name)
            if value is not None:
                whole = (value,) if isinstance(value, int) else tuple(value)
                object.__setattr__(self, name, whole)


# -- values --------------------------------------------------------------------------------------


def _fix(edit: Any) -> None:
    """Bring positions to their plain form, and refuse values of the wrong kind."""
    name = type(edit).__name__
    for key in ("position", "reader_position"):
        if hasattr(edit, key):
            object.__setattr__(edit, key, _position(getattr(edit, key), name))
    for key in ("layer", "feature", "head"):
        value = getattr(edit, key, 0)
        if isinstance(value, bool) or not hasattr(value, "__index__"):
            raise InputError(f"{name}: {key} must be a whole number, got {value!r}")
        if hasattr(edit, key):
            object.__setattr__(edit, key, value.__index__())
    for key in ("value", "factor", "amount"):
        if hasattr(edit, key):
            try:
                value = float(getattr(edit, key))
            except (TypeError, ValueError, OverflowError):
                value = math.nan
            if not math.isfinite(value):
                raise InputError(
                    f"{name}: {key} must be a finite number, got {getattr(edit, key)!r}"
                )
            object.__setattr__(edit, key, value)
    if not isinstance(getattr(edit, "to", None), Mean | From | None):
        raise InputError(f"{name}: to must be None (zero), Mean(...) or From(...), got {edit.to!r}")
    if getattr(edit, "kind", "attn") not in KINDS:
        raise InputError(f"{name}: kind must be one of {', '.join(KINDS)}, got {edit.kind!r}")
    if isinstance(edit, PatchSite) and edit.site not in PATCHABLE:
        raise InputError(f"cannot patch {edit.site!r}; known: {', '.join(PATCHABLE)}")


def _position(value: Any, name: str) -> Position:
    if value is None or isinstance(value, str):
        return value
    if hasattr(value, "tolist"):
        value = value.tolist()  # a tensor or an array of positions
    if not isinstance(value, bool) and hasattr(value, "__index__"):
        return value.__index__()
    if isinstance(value, Iterable):
        found = tuple(value)
        if found and all(hasattr(p, "__index__") and not isinstance(p, bool) for p in found):
            return tuple(p.__index__() for p in found)
    raise InputError(
        f"{name}: position must be a number, a role such as 'S2', one number per prompt, or None "
        f"for everywhere, got {value!r}"
    )


def _end(pattern: re.Pattern[str], text: str) -> End:
    match = pattern.fullmatch(text)
    assert match is not None
    found = match.groupdict()
    if found["whole"]:
        return End(found["whole"])
    if found["part"]:
        return End(found["part"], int(found["at"]))
    if found["dictionary"]:
        return End(found["dictionary"], int(found["layer"]), int(found["feature"]))
    return End(found.get("side") or "head", int(found["of"]), int(found["head"]))


def _plain(value: Any) -> Any:
    """A field as JSON holds it."""
    if isinstance(value, From | Mean):
        where = {"source": value.source, "position": _plain(value.position)}
        return {"from" if isinstance(value, From) else "mean": where}
    if isinstance(value, tuple):
        return list(value)
    if hasattr(value, "dtype"):
        dtype = str(value.dtype).removeprefix("torch.")
        return {"dtype": dtype, "values": value.detach().cpu().double().tolist()}
    return value


def _rich(value: Any) -> Any:
    """A field from what JSON holds."""
    if isinstance(value, Mapping):
        for name, kind in (("from", From), ("mean", Mean)):
            if set(value) == {name} and isinstance(value[name], Mapping):
                try:
                    return kind(**value[name])
                except TypeError as error:
                    raise InputError(f"not a {kind.__name__}: {value[name]!r}: {error}") from None
    return tuple(value) if isinstance(value, list) else value
