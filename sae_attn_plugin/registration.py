"""What this package adds to sae_lens.

The release ``sae-attn-demo``: the attention-z SAEs of the demo model, one per layer, shipped with
the package. ``SAE.from_pretrained("sae-attn-demo", "blocks.0.attn.hook_z")`` loads them offline.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import wrapt

if TYPE_CHECKING:
    import torch

DEMO_RELEASE = "sae-attn-demo"
DEMO_MODEL_NAME = "sae-attn-demo"
_LOADER = "sae_attn_plugin"
_DEMO_SAES = Path(__file__).parent / "demo" / "saes"


def register() -> None:
    """Add this package's releases and loaders to sae_lens' registries. Safe to call again."""
    from sae_lens.loading import pretrained_sae_loaders as loaders
    from sae_lens.loading import pretrained_saes_directory as directory

    loaders.NAMED_PRETRAINED_SAE_LOADERS.setdefault(_LOADER, _load_packaged)
    loaders.NAMED_PRETRAINED_SAE_CONFIG_GETTERS.setdefault(_LOADER, _packaged_config)
    sae_ids = sorted(path.name for path in _DEMO_SAES.glob("blocks.*.attn.hook_z"))
    directory.get_pretrained_saes_directory().setdefault(
        DEMO_RELEASE,
        directory.PretrainedSAELookup(
            release=DEMO_RELEASE,
            repo_id=DEMO_RELEASE,
            model=DEMO_MODEL_NAME,
            conversion_func=_LOADER,
            saes_map={sae_id: sae_id for sae_id in sae_ids},
            expected_var_explained={},
            expected_l0={},
            neuronpedia_id={},
            norm_scaling_factor={},
            config_overrides=None,
        ),
    )


def register_when_imported() -> None:
    """Register now if sae_lens is imported already, else right after it is."""
    wrapt.register_post_import_hook(lambda _module: register(), "sae_lens")


def _packaged_config(
    repo_id: str,
    folder_name: str,
    device: str = "cpu",
    force_download: bool = False,  # noqa: ARG001 - sae_lens' loader protocol
    cfg_overrides: dict[str, Any] | None = None,
) -> dict[str, Any]:
    from sae_attn_plugin.errors import InputError

    folder = _DEMO_SAES / folder_name
    if repo_id != DEMO_RELEASE or not (folder / "cfg.json").is_file():
        known = ", ".join(sorted(path.name for path in _DEMO_SAES.iterdir()))
        raise InputError(f"release {repo_id!r} has no SAE {folder_name!r}; it has: {known}")
    config = json.loads((folder / "cfg.json").read_text(encoding="utf-8"))
    return {**config, "device": device, **(cfg_overrides or {})}


def _load_packaged(
    repo_id: str,
    folder_name: str,
    device: str = "cpu",
    force_download: bool = False,
    cfg_overrides: dict[str, Any] | None = None,
) -> tuple[dict[str, Any], dict[str, torch.Tensor], torch.Tensor | None]:
    from safetensors.torch import load_file

    config = _packaged_config(repo_id, folder_name, device, force_download, cfg_overrides)
    folder = _DEMO_SAES / folder_name
    sparsity = folder / "sparsity.safetensors"
    return (
        config,
        load_file(folder / "sae_weights.safetensors", device=device),
        load_file(sparsity, device=device)["sparsity"] if sparsity.is_file() else None,
    )
