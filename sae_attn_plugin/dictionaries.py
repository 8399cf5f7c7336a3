"""sae_lens SAEs as the attribution engine sees them: linear maps with explicit head geometry.

sae_lens objects are read, never attached, moved or changed. Every architecture with a linear
pre-activation is brought to one form (:class:`Dictionary`):

    pre_i = encoder_scale_i * (W_enc[:, i] . (normalise(x) - b_in)) + b_enc_i
    f     = activation(pre)
    x_hat = denormalise(f @ (W_dec * decoder_scale) + b_dec)
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_attn_plugin.backends.protocol import Geometry
from sae_attn_plugin.errors import FileError, InputError, UnsupportedError
from sae_attn_plugin.heads import join, only_head

__all__ = ["Dictionary", "head_attribution", "load_saes", "place"]

_HOOK_NAMES = re.compile(r"blocks\.(\d+)\.(attn\.hook_z|attn\.o\.hook_in|hook_z)")
_NORMALISATIONS = ("none", "expected_average_only_in", "layer_norm", "constant_norm_rescale")
_LAYER_NORM_EPS = 1e-5  # sae_lens' run_time_activation_ln_in


@dataclass(frozen=True)
class Dictionary:
    """An attention-z SAE with its head geometry.

    Attributes:
        layer: the layer whose z it reads and writes.
        n_heads, d_head: how ``d_in`` splits, head-major as in ``hook_z.flatten(-2)``.
        W_enc: ``[d_in, d_sae]``, W_dec: ``[d_sae, d_in]``: the SAE's own tensors.
        b_enc: ``[d_sae]``; b_dec: ``[d_in]``; b_in: ``[d_in]`` or None, what is subtracted from
            the input (``b_dec`` where the SAE applies it).
        encoder_scale, decoder_scale: ``[d_sae]`` or None.
        activation: pre-activations ``[n, d_sae]`` and encoder inputs ``[n, d_in]`` to features.
        normalisation: sae_lens' ``normalize_activations``.
        log_density: log10 firing frequency per feature ``[d_sae]``, where known.
        sae_id, metadata: for provenance.
    """

    layer: int
    n_heads: int
    d_head: int
    architecture: str
    W_enc: Float[Tensor, "d_in d_sae"]
    b_enc: Float[Tensor, " d_sae"]
    W_dec: Float[Tensor, "d_sae d_in"]
    b_dec: Float[Tensor, " d_in"]
    b_in: Float[Tensor, " d_in"] | None
    activation: Callable[[Tensor, Tensor], Tensor] = field(repr=False)
    encoder_scale: Float[Tensor, " d_sae"] | None = None
    decoder_scale: Float[Tensor, " d_sae"] | None = None
    normalisation: str = "none"
    log_density: Float[Tensor, " d_sae"] | None = None
    sae_id: str = ""
    metadata: Mapping[str, Any] = field(default_factory=dict)

    @property
    def d_sae(self) -> int:
        return self.W_dec.shape[0]

    @property
    def prepend_bos(self) -> bool | None:
        return self.metadata.get("prepend_bos")

    def normalise(
        self, x: Float[Tensor, "... d_in"]
    ) -> tuple[Float[Tensor, "... d_in"], Float[Tensor, "... 1"], Float[Tensor, "... 1"]]:
        """Normalised input, and the scale and mean that attribution holds frozen."""
        zero, one = torch.zeros_like(x[..., :1]), torch.ones_like(x[..., :1])
        match self.normalisation:
            case "layer_norm":
                mean = x.mean(-1, keepdim=True)
                scale = (x - mean).std(-1, keepdim=True)
                return (x - mean) / (scale + _LAYER_NORM_EPS), scale, mean
            case "constant_norm_rescale":
                scale = x.norm(dim=-1, keepdim=True) / x.shape[-1] ** 0.5
                return x / scale, scale, zero
            case _:
                return x, one, zero

    def encode(self, z: Float[Tensor, "n head d_head"]) -> Encoded:
        """Features of ``z``; sae_lens' ``encode`` on the same input, with pre-activations kept."""
        x = z.flatten(-2)
        x, scale, mean = self.normalise(x)
        if self.b_in is not None:
            x = x - self.b_in.to(x.dtype)
        pre = x @ self.W_enc.to(x.dtype)
        if self.encoder_scale is not None:
            pre = pre * self.encoder_scale.to(x.dtype)
        pre = pre + self.b_enc.to(x.dtype)
        dense = self.activation(pre, x)
        position, feature = dense.nonzero(as_tuple=True)
        return Encoded(
            position=position,
            feature=feature,
            activation=dense[position, feature],
            pre_activation=pre[position, feature],
            scale=scale,
            mean=mean,
        )

    def encoder(
        self, features: Int[Tensor, " n"], dtype: torch.dtype
    ) -> Float[Tensor, "n head d_head"]:
        """Rows ``w_{i,h}`` with ``pre_i = sum_h w_{i,h} . z^h + c_i``, before normalisation scales.

        With ``layer_norm`` the rows are centred, since the mean is linear in the input.
        """
        rows = self.W_enc[:, features].T.to(dtype)
        if self.encoder_scale is not None:
            rows = rows * self.encoder_scale[features, None].to(dtype)
        if self.normalisation == "layer_norm":
            rows = rows - rows.mean(-1, keepdim=True)
        return rows.unflatten(-1, (self.n_heads, self.d_head))

    def constants(self, features: Int[Tensor, " n"], dtype: torch.dtype) -> Float[Tensor, " n"]:
        """``c_i``: what of the pre-activation no input carries."""
        constant = self.b_enc[features].to(dtype)
        if self.b_in is None:
            return constant
        shift = self.b_in.to(dtype) @ self.W_enc[:, features].to(dtype)
        if self.encoder_scale is not None:
            shift = shift * self.encoder_scale[features].to(dtype)
        return constant - shift

    def input_scale(self, scale: Float[Tensor, "... 1"]) -> Float[Tensor, "... 1"]:
        """What the frozen normalisation divides the input by."""
        return scale + _LAYER_NORM_EPS if self.normalisation == "layer_norm" else scale

    def decoder(
        self, features: Int[Tensor, " n"], dtype: torch.dtype
    ) -> Float[Tensor, "n head d_head"]:
        """Decoder rows, before the normalisation's output scale."""
        rows = self.W_dec[features].to(dtype)
        if self.decoder_scale is not None:
            rows = rows * self.decoder_scale[features, None].to(dtype)
        return rows.unflatten(-1, (self.n_heads, self.d_head))

    def bias(self, scale: Tensor, mean: Tensor) -> Float[Tensor, "... head d_head"]:
        """What the reconstruction holds without any feature, ``[..., head, d_head]``."""
        return (self.b_dec.to(scale.dtype) * scale + mean).unflatten(
            -1, (self.n_heads, self.d_head)
        )

    def decode(self, encoded: Encoded) -> Float[Tensor, "n head d_head"]:
        """The reconstruction of z from its sparse features."""
        out = self.bias(encoded.scale, encoded.mean).clone()
        rows = self.decoder(encoded.feature, encoded.activation.dtype)
        weights = (encoded.activation * encoded.scale[encoded.position, 0])[:, None, None]
        return out.index_add_(0, encoded.position, weights * rows)


@dataclass(frozen=True)
class Encoded:
    """Sparse features of one layer at every position of one prompt, sorted by position."""

    position: Int[Tensor, " n"]
    feature: Int[Tensor, " n"]
    activation: Float[Tensor, " n"]
    pre_activation: Float[Tensor, " n"]
    scale: Float[Tensor, "positions 1"]
    mean: Float[Tensor, "positions 1"]


# -- sae_lens architectures ----------------------------------------------------------------------


def _relu(pre: Tensor, _x: Tensor) -> Tensor:
    return pre.relu()


def _standard(sae: Any) -> dict[str, Any]:
    return {"b_enc": sae.b_enc, "activation": _relu}


def _jumprelu(sae: Any) -> dict[str, Any]:
    threshold = sae.threshold.detach()
    return {
        "b_enc": sae.b_enc,
        "activation": lambda pre, _x: pre.relu() * (pre > threshold.to(pre.dtype)),
    }


def _topk(sae: Any) -> dict[str, Any]:
    k = int(sae.cfg.k)

    def activation(pre: Tensor, _x: Tensor) -> Tensor:
        values, indices = pre.topk(k, dim=-1)
        return torch.zeros_like(pre).scatter_(-1, indices, values.relu())

    parts: dict[str, Any] = {"b_enc": sae.b_enc, "activation": activation}
    if sae.cfg.rescale_acts_by_decoder_norm:
        norms = sae.W_dec.detach().norm(dim=-1)
        parts |= {
            "b_enc": sae.b_enc * norms,
            "encoder_scale": norms,
            "decoder_scale": 1 / norms,
        }
    return parts


def _gated(sae: Any) -> dict[str, Any]:
    W_enc, b_gate = sae.W_enc.detach(), sae.b_gate.detach()

    def activation(pre: Tensor, x: Tensor) -> Tensor:
        # The magnitude path is the pre-activation; the gate only switches.
        gate = x @ W_enc.to(x.dtype) + b_gate.to(x.dtype)
        return pre.relu() * (gate > 0)

    return {
        "b_enc": sae.b_mag,
        "encoder_scale": sae.r_mag.detach().exp(),
        "activation": activation,
    }


_ARCHITECTURES: dict[str, Callable[[Any], dict[str, Any]]] = {
    "standard": _standard,
    "jumprelu": _jumprelu,
    "topk": _topk,
    "gated": _gated,
}


def from_sae(sae: Any, geometry: Geometry, layer: int | None = None) -> Dictionary:
    """See a sae_lens SAE as a dictionary of a model.

    Args:
        sae: a sae_lens SAE on ``hook_z``.
        geometry: the model it belongs to.
        layer: default: from the hook name in the SAE's metadata.

    Raises:
        InputError: hook name unknown or of another site, ``d_in`` that does not fit.
        UnsupportedError: an architecture or normalisation without a linear pre-activation.
    """
    cfg = sae.cfg
    metadata = cfg.metadata
    architecture = cfg.architecture()
    hook_name = metadata.hook_name
    name = f"the {architecture} SAE on {hook_name!r}"
    if architecture not in _ARCHITECTURES:
        reason = (
            "its pre-activation is not linear in its input"
            if architecture in ("temporal", "matching_pursuit")
            else "its architecture is not known"
        )
        raise UnsupportedError(
            f"{name} cannot be attributed: {reason}; supported: {', '.join(_ARCHITECTURES)} "
            "(sae_lens saves batchtopk and matryoshka SAEs as jumprelu: save and reload them)"
        )
    match = _HOOK_NAMES.fullmatch(hook_name or "")
    if match is None:
        raise InputError(
            f"unknown hook name {hook_name!r}; expected 'blocks.LAYER.attn.hook_z' in the SAE's "
            "metadata (sae.cfg.metadata.hook_name)"
        )
    found = int(match.group(1))
    if layer is not None and layer != found:
        raise InputError(f"{name} was given for layer {layer}, but its hook is in layer {found}")
    if found >= geometry.n_layers:
        raise InputError(f"{name}: {geometry.model_name} has only {geometry.n_layers} layers")
    head, whole = metadata.hook_head_index, geometry
    if head is not None:
        geometry, name = replace(geometry, n_heads=1), f"{name}, head {head}"
    width = geometry.n_heads * geometry.d_head
    if cfg.d_in != width:
        raise InputError(
            f"{name} has d_in {cfg.d_in}, but hook_z of {geometry.model_name} is "
            f"{geometry.n_heads} heads x {geometry.d_head} = {width} wide"
        )
    if cfg.normalize_activations not in _NORMALISATIONS:
        raise UnsupportedError(
            f"{name}: normalize_activations {cfg.normalize_activations!r} is not supported; "
            f"supported: {', '.join(_NORMALISATIONS)}"
        )
    with torch.no_grad():
        parts: dict[str, Any] = {
            key: value.detach() if isinstance(value, Tensor) else value
            for key, value in _ARCHITECTURES[architecture](sae).items()
        }
    for key, tensor in sae.state_dict().items():
        if not torch.isfinite(tensor).all():
            raise InputError(f"{name}: {key} holds NaN or infinity")
    b_dec = sae.b_dec.detach()
    density = getattr(sae, "sparsity", None)
    made = Dictionary(
        layer=found,
        n_heads=geometry.n_heads,
        d_head=geometry.d_head,
        architecture=architecture,
        W_enc=sae.W_enc.detach(),
        W_dec=sae.W_dec.detach(),
        b_dec=b_dec,
        b_in=b_dec if cfg.apply_b_dec_to_input else None,
        normalisation=cfg.normalize_activations,
        log_density=density if isinstance(density, Tensor) else None,
        sae_id=str(metadata.sae_id or metadata.hook_name),
        metadata=metadata.to_dict(),
        **parts,
    )
    return made if head is None else only_head(made, head, whole)


def place(saes: Any, geometry: Geometry) -> dict[int, Dictionary]:
    """Dictionaries by layer from what a user gives as SAEs.

    Args:
        saes: a release name or a folder, a list of sae_lens SAEs, or a dict keyed by layer, hook
            name or anything (the hook names in the SAEs' metadata say where they belong).

    Raises:
        InputError: nothing given, or two SAEs for one layer, unless they are of different heads.
    """
    if isinstance(saes, str | Path):
        saes = load_saes(saes, device=str(geometry.device))
    items: Iterable[tuple[Any, Any]]
    if isinstance(saes, Mapping):
        items = saes.items()
    elif isinstance(saes, Iterable) and not hasattr(saes, "cfg"):  # one SAE iterates too
        items = ((None, sae) for sae in saes)
    else:
        items = [(None, saes)]
    found: dict[int, list[Dictionary]] = {}
    for key, sae in items:
        if not hasattr(sae, "cfg") or not hasattr(sae, "W_dec"):
            raise InputError(
                f"expected sae_lens SAEs, a release name or a folder, got {type(sae).__name__}"
            )
        dictionary = from_sae(sae, geometry, key if isinstance(key, int) else None)
        found.setdefault(dictionary.layer, []).append(dictionary)
    if not found:
        raise InputError("no SAEs given; expected at least one")
    return {layer: join(found[layer]) for layer in sorted(found)}


def load_saes(source: str | Path, device: str = "cpu") -> dict[str, Any]:
    """Load every attention-z SAE of a release or a folder, by SAE id.

    Args:
        source: a sae_lens release name such as ``"gpt2-small-hook-z-kk"``, a folder that holds one
            SAE (``cfg.json`` in it), or a folder of such folders.
        device: where to put the weights.

    Raises:
        InputError: neither a folder with SAEs nor a known release.
        FileError: an SAE that is damaged, or that neither the hub nor the local cache can give.
    """
    import difflib

    from sae_lens import SAE
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory
    from tqdm.auto import tqdm

    path = Path(source)
    if path.is_dir():
        folders = (
            [path]
            if (path / "cfg.json").is_file()
            else sorted(child.parent for child in path.glob("*/cfg.json"))
        )
        if not folders:
            raise InputError(
                f"no SAE in the folder {path}; expected cfg.json and sae_weights.safetensors in it "
                "or in its subfolders"
            )
        found = {}
        for folder in folders:
            with _explain(f"the SAE in {folder}"):
                sae = _with_density(SAE.load_from_disk(folder, device=device), folder)
            found[folder.name] = _with_heads(sae)
        return found
    directory = get_pretrained_saes_directory()
    if str(source) not in directory:
        close = difflib.get_close_matches(str(source), directory, n=3)
        hint = f"; did you mean {' or '.join(close)}?" if close else ""
        raise InputError(f"{str(source)!r} is neither a folder nor a sae_lens release{hint}")
    loaded = {}
    for sae_id in tqdm(directory[str(source)].saes_map, desc=f"loading {source}", leave=False):
        with _explain(f"{sae_id!r} of the release {str(source)!r}"):
            sae, _config, density = SAE.from_pretrained_with_cfg_and_sparsity(
                str(source), sae_id, device=device
            )
        if density is not None:
            sae.sparsity = density
        loaded[sae_id] = _with_heads(sae, str(source))
    return loaded


@contextlib.contextmanager
def _explain(what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # sae_lens, safetensors, json and the hub each raise their own
        first = (str(error).strip().splitlines() or [""])[0]
        raise FileError(f"cannot load {what}: {type(error).__name__}: {first}") from error


def _with_heads(sae: Any, release: str | None = None) -> Any:
    """An SAE on z with its heads written down, where they are known; others as they are."""
    from sae_attn_plugin.pretrained import mark
    from sae_attn_plugin.saes import AttentionSAE, heads_of, layer_of, repaired

    if release is not None:
        mark(sae, release)
    if layer_of(sae.cfg.metadata.hook_name) is None:
        return sae
    sae = repaired(sae, release)
    try:
        heads_of(sae.cfg)
        return AttentionSAE.of(sae)
    except (InputError, UnsupportedError):
        return sae


def _with_density(sae: Any, folder: Path) -> Any:
    from safetensors.torch import load_file

    path = folder / "sparsity.safetensors"
    if path.is_file():
        sae.sparsity = load_file(path)["sparsity"]
    return sae


def head_attribution(
    sae: Any, n_heads: int | None = None, dead_below: float = 1e-6
) -> pd.DataFrame:
    """Weight-based head attribution (Kissane et al. 2024): share of each head in a decoder row.

    ``share_h = |d_{i,h}|_2 / sum_j |d_{i,j}|_2`` over the slices of the decoder row.

    Args:
        sae: a :class:`Dictionary` or a sae_lens SAE on hook_z.
        n_heads: needed for a sae_lens SAE whose metadata does not hold it.
        dead_below: a feature that fires on fewer tokens than this fraction is marked dead, where
            the SAE's density is known.

    Returns:
        One row per feature (the index): ``head_0 ... head_{n-1}`` summing to 1 (all 0 for a feature
        that writes nothing), ``top_head``, and ``dead`` (``<NA>`` where the density is not known).
    """
    density = getattr(sae, "log_density", getattr(sae, "sparsity", None))
    if not isinstance(sae, Dictionary):
        n_heads = n_heads or sae.cfg.metadata.n_heads
        if n_heads is None:
            raise InputError(
                "the SAE's metadata does not say how many heads it spans; pass n_heads="
            )
    else:
        n_heads = sae.n_heads
    rows = sae.W_dec.detach().float()
    if rows.shape[1] % n_heads:
        raise InputError(f"d_in {rows.shape[1]} does not divide into {n_heads} heads")
    norms = rows.unflatten(-1, (n_heads, -1)).norm(dim=-1)
    shares = norms / norms.sum(-1, keepdim=True).clamp_min(torch.finfo(norms.dtype).tiny)
    table = pd.DataFrame(shares.numpy(force=True), columns=[f"head_{h}" for h in range(n_heads)])
    table.index.name = "feature"
    table["top_head"] = shares.argmax(-1).numpy(force=True)
    if density is None:
        table["dead"] = pd.array([pd.NA] * len(table), dtype="boolean")
    else:
        dead = (density.float() < torch.tensor(dead_below).log10()).numpy(force=True)
        table["dead"] = pd.array(dead, dtype="boolean")
    return table
