"""No network, fixed seeds, and lenses that are built once."""

from __future__ import annotations

import functools
import gc
import os
import random
import socket
from collections.abc import Callable, Iterator
from typing import Any

os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"

import hypothesis
import numpy as np
import pytest
import torch
from helpers import TINY, on_host, random_saes, word_tokenizer

from sae_attn_plugin import FeatureLens

torch.set_num_threads(1)  # tiny matrices
# What the hosts' imports leave need not be gone through again and again: a sixth of the time.
gc.freeze()
gc.set_threshold(10_000, 50, 100)

# The same examples in every run of the suite; SAE_ATTN_FUZZ=N looks N times longer, at random.
FUZZ = int(os.environ.get("SAE_ATTN_FUZZ", "0"))
hypothesis.settings.register_profile(
    "here",
    derandomize=not FUZZ,
    database=None,
    deadline=None,
    suppress_health_check=list(hypothesis.HealthCheck),  # pyright: ignore[reportArgumentType]
    print_blob=True,
)
hypothesis.settings.load_profile("here")

LensMaker = Callable[..., FeatureLens]


@pytest.fixture(autouse=True)
def _seeds() -> None:
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - host libraries use the global generator
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def _no_network() -> Iterator[None]:
    """Connections leave this machine in no test."""
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: Any) -> None:
        local = self.family == getattr(socket, "AF_UNIX", None) or (
            isinstance(address, tuple) and address[0] in ("127.0.0.1", "::1", "localhost")
        )
        if not local:
            raise RuntimeError(f"a test tried to connect to {address}")
        connect(self, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", guarded)
        yield


@pytest.fixture(scope="session")
def lens_of() -> LensMaker:
    """``lens_of(model, host, dtype, architecture, **sae_config)``, built once each.

    The lens has a word tokenizer. Tests that change a model build their own.
    """

    @functools.cache
    def build(
        model: str = "gpt2",
        host: str = "hooked_transformer",
        dtype: torch.dtype = torch.float32,
        architecture: str = "standard",
        **config: Any,
    ) -> FeatureLens:
        plain = TINY[model](dtype)
        saes = random_saes(plain, architecture, **config)
        tokenizer = word_tokenizer()
        return FeatureLens(on_host(plain, host, tokenizer), saes, tokenizer=tokenizer)

    return build
