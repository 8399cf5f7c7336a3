"""sae_lens runner configs with the settings of published attention-z trainings."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sae_attn_plugin.errors import InputError
from sae_attn_plugin.registration import DEMO_MODEL_NAME

if TYPE_CHECKING:
    from sae_lens.config import LanguageModelSAERunnerConfig
    from sae_lens.saes.sae import TrainingSAEConfig

__all__ = ["RECIPES", "attention_z_config", "recipe"]

RECIPES = ("gpt2-small", "gelu-2l", "gemma-2b", DEMO_MODEL_NAME)
"""Models whose recipe :func:`recipe` knows by name; any other gets the generic one."""

# Kissane et al. 2024: layer -> (width, L1 coefficient, cutoff below which a feature is dead).
_GPT2 = {
    0: (24576, 1.8, 1e-6),
    1: (24576, 0.8, 1e-6),
    2: (24576, 1.0, 1e-6),
    3: (24576, 0.9, 1e-6),
    4: (24576, 1.1, 1e-6),
    5: (49152, 1.0, 1e-6),
    6: (24576, 1.1, 1e-6),
    7: (49152, 1.1, 1e-6),
    8: (24576, 1.3, 1e-5),
    9: (24576, 1.2, 1e-6),
    10: (24576, 1.3, 1e-5),
    11: (24576, 3.0, 3.16e-6),
}


def attention_z_config(
    d_in: int, d_sae: int | None = None, k: float = 16, **options: Any
) -> TrainingSAEConfig:
    """A sae_lens training config that suits attention z: BatchTopK, saved as JumpReLU.

    Args:
        d_in: ``n_heads * d_head``.
        d_sae: number of features; 8 times ``d_in`` where not given.
        k: mean number of active features.
        options: further fields of ``BatchTopKTrainingSAEConfig``.
    """
    from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAEConfig

    options = {
        "normalize_activations": "expected_average_only_in",
        "reshape_activations": "hook_z",
        **options,
    }
    return BatchTopKTrainingSAEConfig(d_in=d_in, d_sae=d_sae or 8 * d_in, k=k, **options)


def recipe(
    model: Any,
    layer: int,
    *,
    sae: TrainingSAEConfig | None = None,
    d_in: int | None = None,
    d_sae: int | None = None,
    k: float = 16,
    device: str = "cpu",
    **changes: Any,
) -> LanguageModelSAERunnerConfig[Any]:
    """A sae_lens runner config that trains an attention-z SAE on one layer.

    It runs in :func:`sap.training.train` and in sae_lens' own ``LanguageModelSAETrainingRunner``
    (with ``override_model=sap.hooked(model)`` for models that sae_lens cannot load).

    ``"gpt2-small"`` (layers 0 to 11) and ``"gelu-2l"`` (layer 1) follow Kissane et al. 2024:
    widths, L1 coefficient of each layer, learning rate, Adam's betas, batch, context, token budget
    and text. What sae_lens' ``standard`` trainer does otherwise:

    - *Decoder norm.* The paper keeps decoder rows at norm 1 and penalises the sum of activations.
      sae_lens leaves the norms free and weighs each activation with its row's norm. Both describe
      the same functions at the same penalty; the optimiser takes another way there.
    - *Resampling.* The paper resamples dead features four times, every 25,000 steps, by loss, and
      resets their Adam state. sae_lens has no resampling for this architecture: expect more dead
      features. The generic recipe (BatchTopK) has an auxiliary loss against them instead.
    - *Schedule.* The released configurations say cosine, 1,000 steps of warm-up, factor 0.1. Here
      the rate rises linearly over 1,000 steps and falls on a cosine to a tenth of itself.
    - *Buffer.* The paper keeps 1,572,864 activations in bfloat16 and refills it at half. Here as
      many are held in the SAE's dtype; set ``n_batches_in_buffer`` (rows of ``context_size``
      tokens) to fit your memory, above all for many layers at once.
    - *Precision.* The model runs under bfloat16 autocast on a GPU, as in the paper, and in float32
      on a CPU.

    For GELU-2L the betas, the schedule and the token budget are those of GPT-2, since only width,
    rate, L1 coefficient and batch are published. ``"gemma-2b"`` (layer 6) was trained with the loss
    of Anthropic's April 2024 update: its rate, betas, L1 coefficient of 5 with warm-up over 5 % of
    the steps, decay over the last 20 % and input scale are taken from there, since the authors
    published only width, model and text. sae_lens does not clip the gradient, which that update
    does.

    ``"sae-attn-demo"`` trained the SAEs of the demo model. Any other model gets the generic recipe:
    BatchTopK with ``8 * d_in`` features of which ``k`` are active on average, on 2 million
    activations, which suits small models; raise ``training_tokens`` for large ones.

    Args:
        model: one of :data:`RECIPES`; any other name (with ``d_in``); or a model that
            :func:`sap.hooked` takes.
        layer: which layer.
        sae: another SAE than the recipe's.
        d_in: ``n_heads * d_head``, for a name that is not known.
        d_sae, k: width and mean number of active features of the generic recipe; ``d_sae`` also
            of the others.
        device: of SAE, activations and model.
        changes: any other field of ``LanguageModelSAERunnerConfig``.

    Raises:
        InputError: a layer that was not trained, an unknown name without ``d_in``, an unknown
            field.
    """
    from dataclasses import fields

    from sae_lens.config import LanguageModelSAERunnerConfig, LoggingConfig

    known = {field.name for field in fields(LanguageModelSAERunnerConfig)}
    if unknown := sorted(set(changes) - known):
        raise InputError(
            f"unknown field {unknown[0]!r}; expected one of {', '.join(sorted(known))}"
        )
    name = model if isinstance(model, str) else None
    match name:
        case "gpt2-small" | "gpt2":
            config, settings = _kissane_gpt2(layer, d_sae)
        case "gelu-2l":
            config, settings = _kissane_gelu(layer, d_sae)
        case "gemma-2b":
            config, settings = _gemma(layer, d_sae, changes)
        case _ if name == DEMO_MODEL_NAME:
            config, settings = _demo(layer, d_sae)
        case _:
            config, settings = _generic(model, layer, d_in, d_sae, k, changes)
    config = config if sae is None else sae
    config.device = device
    settings = {
        "hook_name": f"blocks.{layer}.attn.hook_z",
        "device": device,
        "autocast_lm": name in RECIPES[:3] and not device.startswith("cpu"),
        "prepend_bos": True,
        # Documents follow each other without a boundary; each row starts with BOS.
        "sequence_separator_token": None,
        "is_dataset_tokenized": False,
        "streaming": True,
        # Centring and folding leave z as it is, or are off.
        "model_from_pretrained_kwargs": {},
        "verbose": False,
        "logger": LoggingConfig(log_to_wandb=False),
        **settings,
        **changes,
    }
    return LanguageModelSAERunnerConfig(sae=config, **settings)


def _standard(d_in: int, d_sae: int, l1_coefficient: float, **options: Any) -> TrainingSAEConfig:
    from sae_lens.saes.standard_sae import StandardTrainingSAEConfig

    return StandardTrainingSAEConfig(
        d_in=d_in,
        d_sae=d_sae,
        l1_coefficient=l1_coefficient,
        reshape_activations="hook_z",
        apply_b_dec_to_input=True,
        **options,
    )


def _kissane_gpt2(layer: int, d_sae: int | None) -> tuple[TrainingSAEConfig, dict[str, Any]]:
    if layer not in _GPT2:
        raise InputError(f"no recipe for layer {layer} of gpt2-small; expected 0..11")
    width, l1, dead = _GPT2[layer]
    return _standard(768, d_sae or width, l1), {
        **_KISSANE,
        "model_name": "gpt2-small",
        "dataset_path": "Skylion007/openwebtext",
        "lr": 1.2e-3,
        "dead_feature_threshold": dead,
    }


def _kissane_gelu(layer: int, d_sae: int | None) -> tuple[TrainingSAEConfig, dict[str, Any]]:
    if layer != 1:
        raise InputError(f"no recipe for layer {layer} of gelu-2l; only layer 1 was trained")
    return _standard(512, d_sae or 16384, 2.0), {
        **_KISSANE,
        "model_name": "gelu-2l",
        # 80 % C4, 20 % code
        "dataset_path": "NeelNanda/c4-code-tokenized-2b",
        "is_dataset_tokenized": True,
        "lr": 1e-3,
        "dead_feature_threshold": 1e-6,
    }


_KISSANE: dict[str, Any] = {
    "context_size": 128,
    "training_tokens": 2_000_000_000,
    "train_batch_size_tokens": 4096,
    "adam_beta1": 0.9,
    "adam_beta2": 0.99,
    "lr_scheduler_name": "cosineannealing",
    "lr_warm_up_steps": 1000,
    "seed": 49,
    "n_batches_in_buffer": 1_572_864 // 128,
    "store_batch_size_prompts": 512,
    # what the paper looks back on to call a feature dead
    "dead_feature_window": 12_500,
    "feature_sampling_window": 12_500,
}


def _gemma(
    layer: int, d_sae: int | None, changes: dict[str, Any]
) -> tuple[TrainingSAEConfig, dict[str, Any]]:
    if layer != 6:
        raise InputError(f"no recipe for layer {layer} of gemma-2b; only layer 6 was trained")
    tokens, batch = _budget(changes, 2_000_000_000, 4096)
    steps = tokens // batch
    return _standard(
        2048,
        d_sae or 16384,
        5.0,
        l1_warm_up_steps=steps // 20,
        normalize_activations="expected_average_only_in",
    ), {
        "model_name": "gemma-2b",
        "dataset_path": "HuggingFaceFW/fineweb",
        "context_size": 128,
        "training_tokens": tokens,
        "train_batch_size_tokens": batch,
        "lr": 5e-5,
        "adam_beta1": 0.9,
        "adam_beta2": 0.999,
        "lr_decay_steps": steps // 5,
        "n_batches_in_buffer": 4096,
        "store_batch_size_prompts": 128,
    }


def _demo(layer: int, d_sae: int | None) -> tuple[TrainingSAEConfig, dict[str, Any]]:
    if layer not in range(4):
        raise InputError(f"no recipe for layer {layer} of {DEMO_MODEL_NAME}; expected 0..3")
    tokens, batch = 4_000_000, 2048
    return attention_z_config(128, d_sae or 1024, 16), {
        **_small(batch, -(-tokens // batch), 128),
        "model_name": DEMO_MODEL_NAME,
        "dataset_path": DEMO_MODEL_NAME,  # sentences written as they are needed
        "training_tokens": tokens,
        "lr": 2e-3,
        "lr_end": 2e-3,
        "seed": 1,
    }


def _generic(
    model: Any,
    layer: int,
    d_in: int | None,
    d_sae: int | None,
    k: float,
    changes: dict[str, Any],
) -> tuple[TrainingSAEConfig, dict[str, Any]]:
    context = 128
    if isinstance(model, str):
        if d_in is None:
            raise InputError(
                f"no recipe for {model!r}; known: {', '.join(RECIPES)}. For the generic one give "
                "d_in=n_heads * d_head, or the model itself"
            )
        name = model
    else:
        from sae_attn_plugin.backends.hooked import hooked

        cfg: Any = hooked(model).cfg
        width = cfg.n_heads * cfg.d_head
        if d_in not in (None, width):
            raise InputError(f"d_in={d_in}, but hook_z of {cfg.model_name} is {width} wide")
        if not 0 <= layer < cfg.n_layers:
            raise InputError(f"no layer {layer}; {cfg.model_name} has 0..{cfg.n_layers - 1}")
        name, d_in, context = str(cfg.model_name), int(width), min(context, cfg.n_ctx)
    tokens, batch = _budget(changes, 2_000_000, 2048)
    steps = -(-tokens // batch)
    context = changes.get("context_size", context)
    assert d_in is not None
    return attention_z_config(d_in, d_sae, k), {
        "model_name": name,
        "training_tokens": tokens,
        **_small(batch, steps, context),
    }


def _small(batch: int, steps: int, context: int) -> dict[str, Any]:
    """What suits a small model: rise over 2 % of the steps, decay over the last 30 %."""
    rise = int(0.02 * steps)
    return {
        "context_size": context,
        "train_batch_size_tokens": batch,
        "lr": 1e-3,
        "lr_end": 1e-3,
        "lr_warm_up_steps": rise if rise > 1 else 0,
        "lr_decay_steps": int(0.3 * steps),
        "dead_feature_window": 200,
        "feature_sampling_window": max(1, steps // 4),
        # rows held and shuffled at once: 16 batches
        "n_batches_in_buffer": max(1, 16 * batch // context),
        "store_batch_size_prompts": 32,
        "n_batches_for_norm_estimate": 16,
    }


def _budget(changes: dict[str, Any], tokens: int, batch: int) -> tuple[int, int]:
    """Schedules follow the number of steps, so they must know it."""
    return changes.get("training_tokens", tokens), changes.get("train_batch_size_tokens", batch)
