"""Releases of attention-output SAEs: which there are, and how those sae_lens lacks are loaded."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import huggingface_hub
import torch
from sae_lens.loading.pretrained_saes_directory import (
    PretrainedSAELookup,
    get_pretrained_saes_directory,
)

from sae_attn_plugin.errors import FileError, InputError
from sae_attn_plugin.geometries import known_heads, plain_name
from sae_attn_plugin.io import read_json
from sae_attn_plugin.registration import (
    DEMO_MODEL_NAME,
    DEMO_RELEASE,
    register,
    register_when_loaded,
)

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["LOADERS", "add_local", "added", "mark", "releases"]

_DISK, _PAPER = "sae_attn_plugin", "sae_attn_plugin_paper"
_DEMO_SAES = Path(__file__).parent / "demo" / "saes"
_LOCAL: dict[str, PretrainedSAELookup] = {}

# Kissane et al. 2024. Where a file's name is not known, "find:" says what its _cfg.json holds.
_PAPER_RELEASES = {
    "gelu-2l-hook-z-kk": (
        "gelu-2l",
        "ckkissane/tinystories-1M-SAES",
        {
            "blocks.1.hook_z": "concat-z-gelu-21-l1-lr-sweep-3/gelu-2l_L1_Hcat_z_lr1.00e-03_"
            "l12.00e+00_ds16384_bs4096_dc1.00e-07_rie50000_nr4_v78.pt"
        },
    ),
    "gemma-2b-hook-z-kk": (
        "gemma-2b",
        "attention-saes-paper/attention-saes-paper-weights",
        {"blocks.6.hook_z": "find:gemma-2b:6"},
    ),
}
_FOLDED = ("gpt2-small-hook-z-kk", *_PAPER_RELEASES)


def mark(sae: Any, release: str) -> None:
    """Note in an SAE's metadata what is known of its release and not in its configuration.

    Kissane et al. train and analyse on ``HookedTransformer.from_pretrained``, whose default
    processing folds value biases into ``b_O``: their SAEs read z without them.
    """
    if release in _FOLDED and "value_biases" not in sae.cfg.metadata:
        sae.cfg.metadata.value_biases = "folded"


def _lookup(
    release: str, repo_id: str, model: str, loader: str | None, saes: Mapping[str, str], **more: Any
) -> PretrainedSAELookup:
    fields: dict[str, Any] = {
        "expected_var_explained": {},
        "expected_l0": {},
        "neuronpedia_id": {},
        "norm_scaling_factor": {},
        "config_overrides": None,
    }
    return PretrainedSAELookup(
        release=release,
        repo_id=repo_id,
        model=model,
        conversion_func=loader,
        saes_map=dict(saes),
        **{**fields, **more},
    )


def added(directory: Mapping[str, PretrainedSAELookup]) -> dict[str, PretrainedSAELookup]:
    """The releases this package adds to sae_lens' directory."""
    found = {
        DEMO_RELEASE: _lookup(
            DEMO_RELEASE,
            DEMO_RELEASE,
            DEMO_MODEL_NAME,
            _DISK,
            {path.name: str(path) for path in sorted(_DEMO_SAES.glob("blocks.*.attn.hook_z"))},
        )
    }
    for name, (model, repo_id, saes) in _PAPER_RELEASES.items():
        found[name] = _lookup(name, repo_id, model, _PAPER, saes)
    for name, lookup in directory.items():
        overrides: dict[str, Any] = {**(lookup.config_overrides or {})}
        # Their configuration has z flat (reshape_activations "none"), as no model gives it.
        flat = lookup.conversion_func == "gemma_3" and "reshape_activations" not in overrides
        if flat and _site(lookup) == "z":
            overrides["reshape_activations"] = "hook_z"
            again = f"{name}-hook-z"
            found[again] = replace(lookup, release=again, config_overrides=overrides)
    return {**found, **_LOCAL}


def add_local(name: str, model: str, saes: Mapping[str, str | Path]) -> None:
    """See :func:`sae_attn_plugin.register_release`."""
    if not saes:
        raise InputError(f"the release {name!r} has no SAEs; expected {{sae_id: path}}")
    paths = {}
    for sae_id, given in saes.items():
        path = Path(given).resolve()
        needed = _files_of(path)
        if missing := [file for file in needed if not file.is_file()]:
            raise FileError(
                f"no SAE at {given} ({sae_id!r} of the release {name!r}): {missing[0]} is not "
                "there; expected a folder with cfg.json and sae_weights.safetensors, or a .pt "
                "file with its _cfg.json beside it"
            )
        paths[sae_id] = str(path)
    lookup = _lookup(name, name, model, _DISK, paths)
    existing = get_pretrained_saes_directory().get(name)
    if existing is not None and existing != lookup:
        raise InputError(
            f"there is a release {name!r} already, of {len(existing.saes_map)} SAEs on "
            f"{existing.model}; choose another name"
        )
    _LOCAL[name] = lookup


def _files_of(path: Path) -> tuple[Path, Path]:
    if path.suffix == ".pt":
        return path, _config_beside(path)
    return path / "cfg.json", path / "sae_weights.safetensors"


def _config_beside(path: Path) -> Path:
    return path.with_name(f"{path.stem}_cfg.json")


# -- loaders, by sae_lens' protocol ---------------------------------------------------------------


def _disk_config(
    repo_id: str,
    folder_name: str,
    device: str = "cpu",
    force_download: bool = False,  # noqa: ARG001 - sae_lens' protocol
    cfg_overrides: dict[str, Any] | None = None,
) -> dict[str, Any]:
    path = Path(folder_name)
    missing = [file for file in _files_of(path) if not file.is_file()]
    if missing:
        raise FileError(f"the release {repo_id!r} is not where it was: no file {missing[0]}")
    if path.suffix == ".pt":
        return _paper_dict(_config_beside(path), device, cfg_overrides)
    config = read_json(path / "cfg.json", "SAE configuration")
    return {**config, "device": device, **(cfg_overrides or {})}


def _disk_load(
    repo_id: str,
    folder_name: str,
    device: str = "cpu",
    force_download: bool = False,
    cfg_overrides: dict[str, Any] | None = None,
) -> tuple[dict[str, Any], dict[str, torch.Tensor], torch.Tensor | None]:
    from safetensors.torch import load_file

    config = _disk_config(repo_id, folder_name, device, force_download, cfg_overrides)
    path = Path(folder_name)
    if path.suffix == ".pt":
        return config, _paper_weights(path, config, device), None
    sparsity = path / "sparsity.safetensors"
    return (
        config,
        load_file(path / "sae_weights.safetensors", device=device),
        load_file(sparsity, device=device)["sparsity"] if sparsity.is_file() else None,
    )


def _paper_config(
    repo_id: str,
    folder_name: str,
    device: str = "cpu",
    force_download: bool = False,
    cfg_overrides: dict[str, Any] | None = None,
) -> dict[str, Any]:
    path = _find(repo_id, folder_name, force_download)
    config = _download(repo_id, f"{path.removesuffix('.pt')}_cfg.json", force_download)
    return _paper_dict(config, device, cfg_overrides)


def _paper_load(
    repo_id: str,
    folder_name: str,
    device: str = "cpu",
    force_download: bool = False,
    cfg_overrides: dict[str, Any] | None = None,
) -> tuple[dict[str, Any], dict[str, torch.Tensor], torch.Tensor | None]:
    path = _find(repo_id, folder_name, force_download)
    config = _paper_config(repo_id, path, device, force_download, cfg_overrides)
    weights = _download(repo_id, path, force_download)
    return config, _paper_weights(weights, config, device), None


LOADERS = {_DISK: (_disk_load, _disk_config), _PAPER: (_paper_load, _paper_config)}
"""Loader and configuration getter of each conversion function this package adds to sae_lens."""


def _download(repo_id: str, filename: str, force_download: bool) -> Path:
    return Path(
        huggingface_hub.hf_hub_download(
            repo_id=repo_id, filename=filename, force_download=force_download
        )
    )


def _find(repo_id: str, path: str, force_download: bool) -> str:
    """The path of a ``.pt`` file whose ``_cfg.json`` names a model and a layer."""
    if not path.startswith("find:"):
        return path
    _, model, layer = path.split(":")
    folder = Path(
        huggingface_hub.snapshot_download(
            repo_id, allow_patterns=["*_cfg.json"], force_download=force_download
        )
    )
    seen = {
        str(file.relative_to(folder)): read_json(file, "SAE configuration")
        for file in sorted(folder.rglob("*_cfg.json"))
    }
    hits = [
        name
        for name, config in seen.items()
        if plain_name(str(config.get("model_name"))) == model
        and str(config.get("layer", _layer(str(config.get("act_name"))))) == layer
    ]
    if len(hits) != 1:
        raise FileError(
            f"{repo_id} has {len(hits)} SAEs of {model}, layer {layer}, expected one: "
            f"{', '.join(hits or seen) or 'no _cfg.json at all'}. Download the one you want and "
            "give it a name with sap.register_release"
        )
    return f"{hits[0].removesuffix('_cfg.json')}.pt"


def _paper_dict(path: Path, device: str, overrides: dict[str, Any] | None) -> dict[str, Any]:
    """A ``_cfg.json`` of Kissane et al. as a sae_lens configuration."""
    found = read_json(path, "SAE configuration")
    needed = ("act_name", "act_size", "dict_size", "model_name")
    if missing := [name for name in needed if name not in found]:
        raise FileError(f"{path.name} is no SAE configuration: it has no {missing[0]!r}")
    layer = _layer(found["act_name"])
    if (
        layer is None
        or not found["act_name"].endswith("hook_z")
        or not found.get("concat_heads", 1)
    ):
        raise FileError(
            f"{path.name} is of {found['act_name']!r}"
            + ("" if found.get("concat_heads", 1) else ", heads not concatenated")
            + "; expected an SAE on all heads of an attn.hook_z"
        )
    metadata = {
        # With a version here, sae_lens keeps what else is here.
        "sae_lens_version": "6.0.0",
        "sae_lens_training_version": None,
        "model_name": found["model_name"],
        "hook_name": f"blocks.{layer}.attn.hook_z",
        "hook_head_index": None,
        "prepend_bos": True,
        "context_size": found.get("seq_len", 128),
        "value_biases": "folded",
    }
    if (heads := known_heads(found["model_name"])) and heads[0] * heads[1] == found["act_size"]:
        metadata["n_heads"], metadata["d_head"] = heads
    overrides = dict(overrides or {})
    if "neuronpedia_id" in overrides:
        metadata["neuronpedia_id"] = overrides.pop("neuronpedia_id")
    return {
        "architecture": "standard",
        "d_in": found["act_size"],
        "d_sae": found["dict_size"],
        "dtype": "float32",
        "device": device,
        # The published code of the authors has one SAE class, which subtracts b_dec.
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "hook_z",
        "metadata": metadata,
        **overrides,
    }


def _paper_weights(path: Path, config: Mapping[str, Any], device: str) -> dict[str, torch.Tensor]:
    try:
        found = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # torch, pickle and zipfile each raise their own
        first = (str(error).strip().splitlines() or [""])[0]
        raise FileError(f"cannot read {path}: {type(error).__name__}: {first}") from error
    d_in, d_sae = config["d_in"], config["d_sae"]
    shapes = {"W_enc": (d_in, d_sae), "W_dec": (d_sae, d_in), "b_enc": (d_sae,), "b_dec": (d_in,)}
    for name, shape in shapes.items():
        given = tuple(found[name].shape) if name in found else "nothing"
        if given != shape:
            raise FileError(f"{path.name}: {name} should be {shape}, is {given}")
    from sae_lens.util import str_to_dtype

    return {name: found[name].to(str_to_dtype(config["dtype"])) for name in shapes}


# -- the list -------------------------------------------------------------------------------------

_Z = re.compile(r"hook_z|attn_out(_all)?/layer")  # Gemma Scope 2 keeps z under attn_out
_OUT = re.compile(r"hook_attn_out|L\d+A-")


def _site(lookup: PretrainedSAELookup) -> Literal["z", "attn_out"] | None:
    """Which side of the output projection a release's SAEs read, None for other releases."""
    names = [f"{sae_id} {path}" for sae_id, path in lookup.saes_map.items()]
    if not names:
        return None
    if lookup.conversion_func == "gemma_2":  # says so in the repository's name
        return "z" if lookup.repo_id.endswith("-att") else None
    if all(_OUT.search(name) for name in names):
        return "attn_out"
    if lookup.conversion_func != "gemma_3" and any("attn_out" in name for name in names):
        return None
    return "z" if all(_Z.search(name) for name in names) else None


def _layer(name: str) -> int | None:
    match = re.search(r"(?:blocks\.|layer_|\bl|\bL)(\d+)", name)
    return None if match is None else int(match.group(1))


def _d_sae(lookup: PretrainedSAELookup, path: str) -> int | None:
    if match := re.search(r"width_(\d+)(k|m)", path):  # powers of two, named in decimal
        return 2 ** round(math.log2(int(match.group(1)) * {"k": 1e3, "m": 1e6}[match.group(2)]))
    if match := re.search(r"_ds(\d+)_", path):
        return int(match.group(1))
    if match := re.search(r"(\d+)k\b", lookup.repo_id):
        return int(match.group(1)) * 1024
    if match := re.search(r"LXA-(\d+)x", lookup.repo_id):
        return 4096 * int(match.group(1))
    config = Path(path) / "cfg.json"
    return read_json(config, "SAE configuration")["d_sae"] if config.is_file() else None


def releases(*, by_sae: bool = False) -> pd.DataFrame:
    """Attention-output SAE releases: every one that sae_lens knows, and those added to it.

    Args:
        by_sae: one row per SAE instead of one per release.

    Returns:
        DataFrame with the columns ``release``, ``model``, ``hook`` (``"z"``: before the output
        projection; ``"attn_out"``: after it), ``saes`` (how many), ``layers``, ``d_in``,
        ``d_sae``, ``l0`` and ``variance_explained`` where listed, ``transcoders`` (releases of
        MLP transcoders for the same model) and ``value_biases`` (``"folded"`` where the SAEs
        were trained on z without them). Numbers that differ within a release are tuples
        ``(smallest, largest)``, or for ``layers`` and ``d_sae`` the values there are. With
        ``by_sae``: ``release``, ``sae_id``, ``model``, ``hook``, ``layer``, ``d_in``, ``d_sae``,
        ``l0``, ``variance_explained``, ``path``.

    ``d_in`` and ``d_sae`` come from names of models and files, not from the weights; they are
    missing where those do not say.
    """
    import pandas as pd

    register()
    directory = get_pretrained_saes_directory()
    rows, summary = [], []
    for name, lookup in directory.items():
        site = _site(lookup) or ("z" if name in _LOCAL else None)
        if site is None:
            continue
        heads = known_heads(lookup.model)
        widths = {"z": heads[0] * heads[1] if heads else None, "attn_out": _d_model(lookup.model)}
        mine = []
        for sae_id, path in lookup.saes_map.items():
            # 0 and 1 are what sae_lens puts where nothing is listed.
            l0 = lookup.expected_l0.get(sae_id) or None
            explained = lookup.expected_var_explained.get(sae_id, 1.0)
            mine.append(
                {
                    "release": name,
                    "sae_id": sae_id,
                    "model": lookup.model,
                    "hook": site,
                    "layer": _first(_layer(path), _layer(sae_id)),
                    "d_in": widths[site],
                    "d_sae": _d_sae(lookup, path),
                    "l0": l0,
                    "variance_explained": None if explained == 1.0 else explained,
                    "path": path,
                }
            )
        rows += mine
        summary.append(
            {
                "release": name,
                "model": lookup.model,
                "hook": site,
                "saes": len(mine),
                "layers": tuple(_values(mine, "layer")),
                "d_in": widths[site],
                "d_sae": tuple(_values(mine, "d_sae")),
                "l0": _range(mine, "l0"),
                "variance_explained": _range(mine, "variance_explained"),
                "transcoders": tuple(_transcoders(directory, lookup.model)),
                "value_biases": "folded" if name in _FOLDED else None,
            }
        )
    table = pd.DataFrame(rows if by_sae else summary)
    whole = ("layer", "d_in", "d_sae") if by_sae else ("d_in",)
    return table.astype(dict.fromkeys(whole, "Int64"))


def _d_model(model: str) -> int | None:
    return {"gpt2-small": 768, "pythia-70m": 512, "llama-3.1-8b": 4096}.get(plain_name(model))


def _first(*values: int | None) -> int | None:
    return next((value for value in values if value is not None), None)


def _values(rows: list[dict[str, Any]], column: str) -> list[Any]:
    return sorted({row[column] for row in rows if row[column] is not None})


def _range(rows: list[dict[str, Any]], column: str) -> tuple[float, float] | None:
    found = _values(rows, column)
    return (float(found[0]), float(found[-1])) if found else None


def _transcoders(directory: Mapping[str, PretrainedSAELookup], model: str) -> list[str]:
    return [
        name
        for name, lookup in directory.items()
        if _same_model(lookup.model, model)
        and ("transcoder" in name or "-clt-" in name or "transcoder" in str(lookup.conversion_func))
    ]


def _same_model(one: str, other: str) -> bool:
    return one.rsplit("/", 1)[-1].lower() == other.rsplit("/", 1)[-1].lower()


LOADED = True
register_when_loaded()
