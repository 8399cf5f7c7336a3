"""What this package adds to sae_lens.

- training architectures ``sae_attn_standard``, ``..._gated``, ``_topk``, ``_jumprelu``,
  ``_batchtopk``, ``_matryoshka_batchtopk``: attention-z SAEs with explicit heads, saved as plain
  sae_lens SAEs (:mod:`sae_attn_plugin.saes`);
- releases (:mod:`sae_attn_plugin.pretrained`): the demo model's SAEs, the paper authors' SAEs that
  sae_lens does not list, Gemma Scope 2 as it takes z from models, and what
  :func:`register_release` adds.

Entries that are there already, sae_lens' own or another plugin's, are left as they are.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import wrapt

if TYPE_CHECKING:
    from pathlib import Path

DEMO_RELEASE = "sae-attn-demo"
DEMO_MODEL_NAME = "sae-attn-demo"

_KEEPER = "_sae_attn_plugin_keeps_releases"


def register() -> None:
    """Add this package's architectures, loaders and releases to sae_lens' registries.

    Runs by itself when sae_lens is imported. Safe to call again; what is registered stays
    registered when ``get_pretrained_saes_directory.cache_clear()`` is called.
    """
    from sae_lens import registry
    from sae_lens.loading import pretrained_sae_loaders as loaders

    from sae_attn_plugin import pretrained, saes

    for name, (sae, config) in saes.ARCHITECTURES.items():
        registry.SAE_TRAINING_CLASS_REGISTRY.setdefault(f"sae_attn_{name}", (sae, config))
    for name, (load, read_config) in pretrained.LOADERS.items():
        loaders.NAMED_PRETRAINED_SAE_LOADERS.setdefault(name, load)
        loaders.NAMED_PRETRAINED_SAE_CONFIG_GETTERS.setdefault(name, read_config)
    _add_releases()
    _survive_cache_clear()


def _add_releases() -> None:
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    from sae_attn_plugin import pretrained

    directory = get_pretrained_saes_directory()
    for name, lookup in pretrained.added(directory).items():
        directory.setdefault(name, lookup)


def _survive_cache_clear() -> None:
    """Releases live in a cached dict; whoever clears the cache finds them in the next one."""
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    cached: Any = get_pretrained_saes_directory
    if hasattr(cached, _KEEPER):
        return
    clear = cached.cache_clear

    def cache_clear() -> None:
        clear()
        _add_releases()

    cached.cache_clear = cache_clear
    setattr(cached, _KEEPER, clear)


def register_when_imported() -> None:
    """Register now if sae_lens is imported already, else right after it is."""
    wrapt.register_post_import_hook(lambda _module: register_when_loaded(), "sae_lens")


def register_when_loaded() -> None:
    """Register, unless one of the modules that hold what is registered is half way through.

    They import sae_lens themselves, and call this when they are done.
    """
    for name in ("pretrained", "saes"):
        module = sys.modules.get(f"{__package__}.{name}")
        if module is not None and not hasattr(module, "LOADED"):
            return
    register()


def register_release(name: str, model: str, saes: Mapping[str, str | Path]) -> None:
    """Give SAEs on disk a release name, for this process.

    ``SAE.from_pretrained(name, sae_id)``, ``FeatureLens(model, name)``, :func:`load_saes` and
    :func:`releases` then know them.

    Args:
        name: of the release.
        model: name of the model the SAEs belong to.
        saes: SAE id to where it is: a folder with ``cfg.json`` and ``sae_weights.safetensors``
            (sae_lens' own format), or a ``.pt`` file with its ``_cfg.json`` beside it (the format
            of Kissane et al.).

    Raises:
        InputError: no SAEs, or a release of that name that holds something else.
        FileError: a path with no SAE in it.
    """
    from sae_attn_plugin import pretrained

    register()
    pretrained.add_local(name, model, saes)
    _add_releases()
