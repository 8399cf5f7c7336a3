"""sae_lens SAEs on attention z that know their heads.

sae_lens learns the head split from the first input and keeps it in a closure. Here it is written
down: ``n_heads`` and ``d_head`` are part of the SAE, so that decoding before encoding, copying,
pickling and a change of batch shape work, and an SAE of one head touches that head alone.

What is saved is a plain sae_lens SAE (the geometry travels in its metadata): it loads and splices
where this package is not installed.
"""

from __future__ import annotations

import copy
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
from sae_lens.saes.gated_sae import (
    GatedSAE,
    GatedSAEConfig,
    GatedTrainingSAE,
    GatedTrainingSAEConfig,
)
from sae_lens.saes.jumprelu_sae import (
    JumpReLUSAE,
    JumpReLUSAEConfig,
    JumpReLUTrainingSAE,
    JumpReLUTrainingSAEConfig,
)
from sae_lens.saes.matryoshka_batchtopk_sae import (
    MatryoshkaBatchTopKTrainingSAE,
    MatryoshkaBatchTopKTrainingSAEConfig,
)
from sae_lens.saes.sae import SAE, SAEConfig, SAEMetadata, TrainingSAE, TrainingSAEConfig
from sae_lens.saes.standard_sae import (
    StandardSAE,
    StandardSAEConfig,
    StandardTrainingSAE,
    StandardTrainingSAEConfig,
)
from sae_lens.saes.topk_sae import TopKSAE, TopKSAEConfig, TopKTrainingSAE, TopKTrainingSAEConfig
from torch import Tensor

from sae_attn_plugin.errors import InputError, UnsupportedError
from sae_attn_plugin.geometries import known_heads
from sae_attn_plugin.registration import register_when_loaded

if TYPE_CHECKING:
    from jaxtyping import Float

__all__ = [
    "ARCHITECTURES",
    "AttentionSAE",
    "AttentionTrainingSAEConfig",
    "heads_of",
    "layer_of",
    "repaired",
    "training_config",
]

_Z_HOOK = re.compile(r"blocks\.(\d+)\.(attn\.hook_z|attn\.o\.hook_in|hook_z)")
_LAYER_NORM_EPS = 1e-5  # sae_lens' run_time_activation_ln_in


def layer_of(hook_name: str | None) -> int | None:
    """The layer of an attention-z hook name, None for any other name."""
    match = _Z_HOOK.fullmatch(hook_name or "")
    return None if match is None else int(match.group(1))


def heads_of(
    cfg: SAEConfig, n_heads: int | None = None, d_head: int | None = None
) -> tuple[int, int]:
    """``(n_heads, d_head)`` of the attention layer an SAE reads.

    Args:
        cfg: the SAE's configuration.
        n_heads, d_head: what the caller knows; the rest comes from the metadata, from
            ``d_in`` and from the models this package knows by name.

    Raises:
        InputError: not known, or at odds with ``d_in``.
    """
    metadata, head = cfg.metadata, cfg.metadata.hook_head_index
    if n_heads is None and d_head is None:
        n_heads, d_head = metadata.n_heads, metadata.d_head
    if n_heads is None and d_head is None and (known := known_heads(metadata.model_name)):
        n_heads, d_head = known
    if d_head is None:
        d_head = cfg.d_in if head is not None else cfg.d_in // n_heads if n_heads else None
    if n_heads is None and d_head is not None and head is None:
        n_heads = cfg.d_in // d_head
    name = f"the SAE on {metadata.hook_name!r}" + ("" if head is None else f", head {head},")
    if n_heads is None or d_head is None:
        raise InputError(
            f"{name} of {metadata.model_name!r} does not say how many heads it spans; pass n_heads="
        )
    if cfg.d_in != (n_heads * d_head if head is None else d_head):
        raise InputError(
            f"{name} has d_in {cfg.d_in}, which is not that of {n_heads} heads x {d_head}"
        )
    if head is not None and not 0 <= head < n_heads:
        raise InputError(f"{name} cannot be: there are heads 0..{n_heads - 1}")
    return n_heads, d_head


class _HeadGeometry:
    """In front of a sae_lens class: heads flattened and restored by shapes that are written down.

    Holds no closures, hence can be copied and pickled.
    """

    cfg: Any
    hook_z_reshaping_mode: bool
    _statistics: tuple[Tensor, ...] | None = None
    _beside: Tensor | None = None  # z of the other heads, between encode and decode

    @property
    def n_heads(self) -> int:
        return int(self.cfg.metadata.n_heads)

    @property
    def d_head(self) -> int:
        return int(self.cfg.metadata.d_head)

    @property
    def head(self) -> int | None:
        """The head it acts on; None: all."""
        return self.cfg.metadata.hook_head_index

    # -- shapes ----------------------------------------------------------------------------------

    def turn_on_forward_pass_hook_z_reshaping(self) -> None:
        """Take and give ``[..., n_heads, d_head]``."""
        self.hook_z_reshaping_mode = True

    def turn_off_forward_pass_hook_z_reshaping(self) -> None:
        """Take and give ``[..., d_in]``, as trainers and ``run_evals`` do."""
        self.hook_z_reshaping_mode = False
        self._beside = None

    def _is_split(self, x: Tensor) -> bool:
        return tuple(x.shape[-2:]) == (self.n_heads, self.d_head)

    def _is_side_by_side(self, x: Tensor) -> bool:
        """z of all heads flat, as sae_lens' bridge gives it to an SAE of one head."""
        return x.shape[-1] == self.n_heads * self.d_head != self.cfg.d_in

    def process_sae_in(self, sae_in: Tensor) -> Tensor:
        # Before the cast to the SAE's dtype: other heads pass through untouched.
        if self.head is not None:
            whole = self._is_split if self.hook_z_reshaping_mode else self._is_side_by_side
            self._beside = sae_in if whole(sae_in) else None
        return super().process_sae_in(sae_in)  # type: ignore[misc]

    def reshape_fn_in(self, x: Tensor) -> Tensor:
        shape, heads = tuple(x.shape), (self.n_heads, self.d_head)
        if self.hook_z_reshaping_mode:
            if self._is_split(x):
                return x.flatten(-2) if self.head is None else x[..., self.head, :]
            if self.head is None and shape[-1] == self.cfg.d_in:
                return x
            flat, more = f" or [..., {self.cfg.d_in}]", ""
            if self.head is not None:
                flat, more = (
                    "",
                    "; for the head's z alone, call turn_off_forward_pass_hook_z_reshaping()",
                )
            raise InputError(
                f"{self._name()} takes z as [..., {heads[0]}, {heads[1]}] (heads, d_head){flat}, "
                f"got {shape}{more}"
            )
        if self.head is not None and self._is_side_by_side(x):
            return x.unflatten(-1, heads)[..., self.head, :]
        if shape[-1] != self.cfg.d_in:
            raise InputError(
                f"{self._name()} takes [..., {self.cfg.d_in}] while its reshaping is off, got "
                f"{shape}; turn_on_forward_pass_hook_z_reshaping() makes it take [..., "
                f"{heads[0]}, {heads[1]}]"
            )
        return x

    def reshape_fn_out(self, x: Tensor, d_head: int | None) -> Tensor:  # noqa: ARG002
        if self.head is None:
            split = self.hook_z_reshaping_mode
            return x.unflatten(-1, (self.n_heads, self.d_head)) if split else x
        beside, self._beside = self._beside, None
        if beside is None and not self.hook_z_reshaping_mode:
            return x
        lead = 2 if self.hook_z_reshaping_mode else 1
        if beside is None or beside.shape[:-lead] != x.shape[:-1]:
            raise InputError(
                f"{self._name()} leaves the other heads as they are, so decode needs the z that "
                "encode was given just before; for the head alone, call "
                "turn_off_forward_pass_hook_z_reshaping()"
            )
        out = beside.reshape(*x.shape[:-1], self.n_heads, self.d_head).clone()
        out[..., self.head, :] = x.to(out.dtype)
        return out.reshape(beside.shape)

    def forward(self, x: Tensor) -> Tensor:
        """The reconstruction of ``x``, in the shape of ``x``."""
        if not self.hook_z_reshaping_mode or self.head is not None or self._is_split(x):
            return super().forward(x)  # type: ignore[misc]
        self.reshape_fn_in(x)  # refuses other widths
        split = x.unflatten(-1, (self.n_heads, self.d_head))
        return super().forward(split).flatten(-2)  # type: ignore[misc]

    def _name(self) -> str:
        head = "" if self.head is None else f", head {self.head}"
        return f"the SAE on {self.cfg.metadata.hook_name!r}{head}"

    # -- normalisation of the input --------------------------------------------------------------

    def _setup_activation_normalization(self) -> None:
        """sae_lens' two functions are methods here."""

    def run_time_activation_norm_fn_in(self, x: Tensor) -> Tensor:
        match self.cfg.normalize_activations:
            case "layer_norm":
                mean = x.mean(-1, keepdim=True)
                scale = (x - mean).std(-1, keepdim=True)
                self._statistics = (scale, mean)
                return (x - mean) / (scale + _LAYER_NORM_EPS)
            case "constant_norm_rescale":
                scale = x.norm(dim=-1, keepdim=True) / self.cfg.d_in**0.5
                self._statistics = (scale, torch.zeros_like(scale))
                return x / scale
            case _:
                return x

    def run_time_activation_norm_fn_out(self, x: Tensor) -> Tensor:
        if self.cfg.normalize_activations not in ("layer_norm", "constant_norm_rescale"):
            return x
        if self._statistics is None:
            raise InputError(
                f"{self._name()} normalises its input ({self.cfg.normalize_activations}), so "
                "decode needs the scale of the z that encode was given just before"
            )
        (scale, mean), self._statistics = self._statistics, None
        return x * scale + mean

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_statistics": None, "_beside": None}


class AttentionSAE(_HeadGeometry, SAE[Any]):
    """A sae_lens SAE on z that knows its heads; see the module. Made by the class methods.

    ``encode`` takes ``[..., n_heads, d_head]`` or, for all heads, ``[..., d_in]``; ``decode``
    gives ``[..., n_heads, d_head]``; calling it gives the shape it was given. An SAE of one head
    (``metadata.hook_head_index``) gives back the other heads untouched.

    Is a :class:`sae_lens.SAE`: ``HookedSAETransformer``, ``run_evals``, ``save_model`` take it.
    """

    @classmethod
    def of(
        cls,
        sae: SAE[Any],
        *,
        n_heads: int | None = None,
        d_head: int | None = None,
        head: int | None = None,
    ) -> AttentionSAE:
        """A sae_lens SAE with its heads written down. Weights are shared, not copied.

        Args:
            sae: a loaded SAE on attention z; not changed.
            n_heads, d_head: where the SAE's metadata does not hold them.
            head: the head an SAE of one head belongs to, where its metadata does not say.

        Raises:
            InputError: no attention-z hook in the metadata, or heads that do not fit ``d_in``.
            UnsupportedError: a training SAE, or an architecture without a linear pre-activation.
        """
        if isinstance(sae, AttentionSAE):
            return sae
        architecture = sae.cfg.architecture()
        found = _INFERENCE.get(architecture)
        if isinstance(sae, TrainingSAE) or found is None:
            what = "a training SAE" if isinstance(sae, TrainingSAE) else f"a {architecture} SAE"
            raise UnsupportedError(
                f"{what} cannot be given heads; expected one of {', '.join(_INFERENCE)} "
                "(save a training SAE with save_inference_model and load it)"
            )
        cfg = copy.deepcopy(sae.cfg)
        if layer_of(cfg.metadata.hook_name) is None:
            raise InputError(
                f"the hook name {cfg.metadata.hook_name!r} is no attention z; expected "
                "'blocks.LAYER.attn.hook_z'"
            )
        if head is not None:
            cfg.metadata.hook_head_index = head
        cfg.metadata.n_heads, cfg.metadata.d_head = heads_of(cfg, n_heads, d_head)
        # An SAE of one head is saved as sae_lens writes it: it takes the head's z.
        cfg.reshape_activations = "none" if cfg.metadata.hook_head_index is not None else "hook_z"
        device, cfg.device = cfg.device, "meta"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # said when the SAE was loaded
            made = found(cfg)
        cfg.device, made.device = device, sae.device
        for name, parameter in sae.named_parameters():
            setattr(made, name, parameter)
        for name, buffer in sae.named_buffers():
            setattr(made, name, buffer)
        made._use_error_term = sae._use_error_term
        if "sparsity" in sae.__dict__:
            made.sparsity = sae.sparsity
        made.train(sae.training)
        return made

    @classmethod
    def load_from_disk(  # type: ignore[override]
        cls,
        path: str | Path,
        *args: Any,
        n_heads: int | None = None,
        d_head: int | None = None,
        **options: Any,
    ) -> AttentionSAE:
        """``SAE.load_from_disk``, then :meth:`of`. Repairs what plain sae_lens saved wrong."""
        loaded = SAE.load_from_disk(path, *args, **options)
        return cls.of(repaired(loaded), n_heads=n_heads, d_head=d_head)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        release: str,
        sae_id: str,
        *args: Any,
        n_heads: int | None = None,
        d_head: int | None = None,
        **options: Any,
    ) -> AttentionSAE:
        """``SAE.from_pretrained``, then :meth:`of`."""
        from sae_attn_plugin.pretrained import mark

        loaded = SAE.from_pretrained(release, sae_id, *args, **options)
        mark(loaded, release)
        return cls.of(repaired(loaded, release), n_heads=n_heads, d_head=d_head)

    def __init__(self, cfg: Any, use_error_term: bool = False) -> None:
        super().__init__(cfg, use_error_term)
        self.turn_on_forward_pass_hook_z_reshaping()

    @torch.no_grad()
    def shifted(self, offset: Float[Tensor, "n_heads d_head"]) -> AttentionSAE:
        """The same SAE for z that is larger by a constant: same features, reconstruction + offset.

        What value biases add to z, for an SAE trained where they were folded away; see
        ``docs/sae-lens.md``.

        Args:
            offset: ``[n_heads, d_head]``.

        Raises:
            UnsupportedError: the SAE normalises its input.
        """
        if self.cfg.normalize_activations in ("layer_norm", "constant_norm_rescale"):
            raise UnsupportedError(
                f"{self._name()} normalises its input ({self.cfg.normalize_activations}): a shift "
                "of z is no shift of what it reads"
            )
        new: Any = copy.deepcopy(self)
        flat = (offset.flatten() if self.head is None else offset[self.head]).to(self.b_dec)
        if not self.cfg.apply_b_dec_to_input:  # else b_dec takes it off
            moved = flat @ new.W_enc
            if new.b_enc is not None:
                new.b_enc -= moved
            else:
                new.b_gate -= moved
                new.b_mag -= moved * new.r_mag.exp()
        new.b_dec += flat
        return new


class AttentionStandardSAE(AttentionSAE, StandardSAE):
    """A standard (ReLU) SAE on z."""


class AttentionGatedSAE(AttentionSAE, GatedSAE):
    """A gated SAE on z."""


class AttentionTopKSAE(AttentionSAE, TopKSAE):
    """A TopK SAE on z."""


class AttentionJumpReLUSAE(AttentionSAE, JumpReLUSAE):
    """A JumpReLU SAE on z; BatchTopK and Matryoshka SAEs are saved as these."""


_INFERENCE: dict[str, type[AttentionSAE]] = {
    "standard": AttentionStandardSAE,
    "gated": AttentionGatedSAE,
    "topk": AttentionTopKSAE,
    "jumprelu": AttentionJumpReLUSAE,
}


def repaired(sae: SAE[Any], release: str | None = None) -> SAE[Any]:
    """An SAE on all of z that does not say so, made to take z as models give it.

    sae_lens' training configurations default to ``reshape_activations="none"``; an SAE saved so
    on ``hook_z`` cannot be spliced into ``HookedSAETransformer``.

    Args:
        sae: changed in place where it needs it, with a warning.
        release: where it is known that the release's configuration lacks it (Gemma Scope 2),
            no warning is given.
    """
    metadata = sae.cfg.metadata
    if (
        isinstance(sae, AttentionSAE)
        or sae.cfg.architecture() not in _INFERENCE
        or layer_of(metadata.hook_name) is None
        or metadata.hook_head_index is not None
        or sae.cfg.reshape_activations == "hook_z"
    ):
        return sae
    if not (release or "").startswith("gemma-scope-2-"):
        warnings.warn(
            f"the SAE on {metadata.hook_name!r} was saved with reshape_activations='none' and "
            "would not take z as [..., heads, d_head]; read as 'hook_z'",
            stacklevel=3,
        )
    metadata.hook_name = f"blocks.{layer_of(metadata.hook_name)}.attn.hook_z"
    sae.cfg.reshape_activations = "hook_z"
    sae.turn_on_forward_pass_hook_z_reshaping()
    return sae


# -- training -------------------------------------------------------------------------------------


class _CheckedMetadata(SAEMetadata):
    """Refuses what a runner says of an SAE where it is at odds with the SAE's configuration.

    sae_lens' runners write it when training starts, and check nothing.
    """

    def __init__(self, head: int | None, **fields: Any) -> None:
        self.__dict__["hook_head_index"] = head
        super().__init__(**fields)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "hook_name" and value is not None and layer_of(value) is None:
            raise InputError(
                f"an attention-z SAE cannot train on the hook {value!r}; expected "
                "'blocks.LAYER.attn.hook_z'"
            )
        if name == "hook_head_index" and value != self.hook_head_index:
            raise InputError(
                f"hook_head_index is {value}, but the SAE's configuration has "
                f"head={self.hook_head_index}; give both the same"
            )
        super().__setattr__(name, value)


@dataclass(kw_only=True)
class AttentionTrainingSAEConfig(TrainingSAEConfig):
    """The fields every attention-z training configuration adds to its sae_lens one.

    Attributes:
        n_heads, d_head: the attention layer's; they go into the metadata.
        head: train on this head's z alone (``d_in = d_head``); the runner's ``hook_head_index``
            must say the same. None: on all heads side by side (``d_in = n_heads * d_head``).

    ``reshape_activations`` is set to what the saved SAE needs.
    """

    inference: ClassVar[type[SAEConfig]]
    plain: ClassVar[str]
    d_in: int = 0
    d_sae: int = 0
    n_heads: int = 0
    d_head: int = 0
    head: int | None = None

    @classmethod
    def architecture(cls) -> str:
        return f"sae_attn_{cls.plain}"

    def __post_init__(self) -> None:
        if min(self.n_heads, self.d_head, self.d_sae) < 1:
            raise InputError(
                f"{type(self).__name__} needs n_heads, d_head and d_sae, got "
                f"{self.n_heads}, {self.d_head} and {self.d_sae}"
            )
        if self.head is not None and not 0 <= self.head < self.n_heads:
            raise InputError(f"no head {self.head}; there are: 0..{self.n_heads - 1}")
        width = self.d_head * (1 if self.head is not None else self.n_heads)
        if self.d_in not in (0, width):
            raise InputError(
                f"d_in {self.d_in} is not that of {self.n_heads} heads x {self.d_head}"
                + ("" if self.head is None else f", head {self.head}")
                + f": {width}; leave it out"
            )
        self.d_in = width
        self.reshape_activations = "hook_z" if self.head is None else "none"
        given = {**self.metadata.to_dict()}
        given.setdefault("hook_head_index", self.head)
        self.metadata = _CheckedMetadata(head=self.head, **given)
        self.metadata.n_heads, self.metadata.d_head = self.n_heads, self.d_head
        super().__post_init__()

    def get_inference_config_class(self) -> type[SAEConfig]:
        return self.inference

    def get_inference_sae_cfg_dict(self) -> dict[str, Any]:
        made = super().get_inference_sae_cfg_dict()
        layer = layer_of(self.metadata.hook_name)
        if layer is not None:
            # A bridge's name for the same place is refused by sae_lens where SAEs reshape.
            made["metadata"]["hook_name"] = f"blocks.{layer}.attn.hook_z"
        made["metadata"]["training_architecture"] = self.plain
        return made


@dataclass(kw_only=True)
class AttentionStandardTrainingSAEConfig(AttentionTrainingSAEConfig, StandardTrainingSAEConfig):
    inference = StandardSAEConfig
    plain = "standard"


@dataclass(kw_only=True)
class AttentionGatedTrainingSAEConfig(AttentionTrainingSAEConfig, GatedTrainingSAEConfig):
    inference = GatedSAEConfig
    plain = "gated"


@dataclass(kw_only=True)
class AttentionTopKTrainingSAEConfig(AttentionTrainingSAEConfig, TopKTrainingSAEConfig):
    inference = TopKSAEConfig
    plain = "topk"


@dataclass(kw_only=True)
class AttentionJumpReLUTrainingSAEConfig(AttentionTrainingSAEConfig, JumpReLUTrainingSAEConfig):
    inference = JumpReLUSAEConfig
    plain = "jumprelu"


@dataclass(kw_only=True)
class AttentionBatchTopKTrainingSAEConfig(AttentionTrainingSAEConfig, BatchTopKTrainingSAEConfig):
    inference = JumpReLUSAEConfig
    plain = "batchtopk"


@dataclass(kw_only=True)
class AttentionMatryoshkaTrainingSAEConfig(
    AttentionTrainingSAEConfig, MatryoshkaBatchTopKTrainingSAEConfig
):
    inference = JumpReLUSAEConfig
    plain = "matryoshka_batchtopk"


class AttentionStandardTrainingSAE(_HeadGeometry, StandardTrainingSAE):
    pass


class AttentionGatedTrainingSAE(_HeadGeometry, GatedTrainingSAE):
    pass


class AttentionTopKTrainingSAE(_HeadGeometry, TopKTrainingSAE):
    pass


class AttentionJumpReLUTrainingSAE(_HeadGeometry, JumpReLUTrainingSAE):
    pass


class AttentionBatchTopKTrainingSAE(_HeadGeometry, BatchTopKTrainingSAE):
    pass


class AttentionMatryoshkaTrainingSAE(_HeadGeometry, MatryoshkaBatchTopKTrainingSAE):
    pass


ARCHITECTURES: dict[str, tuple[type[Any], type[AttentionTrainingSAEConfig]]] = {
    config.plain: (sae, config)
    for sae, config in (
        (AttentionStandardTrainingSAE, AttentionStandardTrainingSAEConfig),
        (AttentionGatedTrainingSAE, AttentionGatedTrainingSAEConfig),
        (AttentionTopKTrainingSAE, AttentionTopKTrainingSAEConfig),
        (AttentionJumpReLUTrainingSAE, AttentionJumpReLUTrainingSAEConfig),
        (AttentionBatchTopKTrainingSAE, AttentionBatchTopKTrainingSAEConfig),
        (AttentionMatryoshkaTrainingSAE, AttentionMatryoshkaTrainingSAEConfig),
    )
}
"""sae_lens' name of a training architecture to this package's classes for it."""


def training_config(
    architecture: str = "batchtopk",
    *,
    n_heads: int,
    d_head: int,
    d_sae: int | None = None,
    head: int | None = None,
    **options: Any,
) -> AttentionTrainingSAEConfig:
    """A sae_lens training configuration for attention z, for any of its runners and trainers.

    Args:
        architecture: standard, gated, topk, jumprelu, batchtopk or matryoshka_batchtopk.
        n_heads, d_head: of the attention layer (query heads).
        d_sae: number of features; 8 times the input's width where not given.
        head: train on this head alone.
        options: further fields of sae_lens' configuration of that architecture.

    Raises:
        InputError: an unknown architecture or option, or numbers that do not fit.
    """
    found = ARCHITECTURES.get(architecture)
    if found is None:
        raise InputError(
            f"no training architecture {architecture!r} for attention z; there are: "
            f"{', '.join(ARCHITECTURES)}"
        )
    known = found[1].__dataclass_fields__
    if unknown := sorted(set(options) - set(known)):
        raise InputError(f"{architecture} has no option {unknown[0]!r}; it has: {', '.join(known)}")
    width = d_head * (1 if head is not None else n_heads)
    return found[1](n_heads=n_heads, d_head=d_head, d_sae=d_sae or 8 * width, head=head, **options)


LOADED = True
register_when_loaded()
