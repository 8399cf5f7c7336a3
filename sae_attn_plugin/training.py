"""Training attention-z SAEs: recipes, and a trainer for every layer of a model at once.

:func:`recipe` gives a sae_lens runner config with the settings of a published training.
:func:`train` runs some of them from one pass over the model: sae_lens' own trainers, one per layer,
driven step by step. It saves plain sae_lens SAEs and is resumable to the bit: what a step sees
depends on the seed and the step alone.
"""

from __future__ import annotations

import math
import re
import shutil
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

from sae_attn_plugin.checkpoints import (
    load_state,
    optimizer_state,
    restore_optimizer,
    save_state,
    under,
)
from sae_attn_plugin.corpus.rows import Rounds, StreamedRounds, row_stream
from sae_attn_plugin.errors import InputError, UnsupportedError
from sae_attn_plugin.recipes import RECIPES, attention_z_config, recipe
from sae_attn_plugin.registration import DEMO_MODEL_NAME
from sae_attn_plugin.tokens import check_ids, need_tokenizer, special_tokens

if TYPE_CHECKING:
    from datasets import Dataset
    from sae_lens.config import (
        CacheActivationsRunnerConfig,
        LanguageModelSAERunnerConfig,
        SAETrainerConfig,
    )
    from sae_lens.saes.sae import TrainingSAEConfig
    from sae_lens.training.sae_trainer import SAETrainer

    RunnerConfig = LanguageModelSAERunnerConfig[Any]

__all__ = [
    "RECIPES",
    "TokenSource",
    "ZSource",
    "attention_z_config",
    "cache_activations",
    "recipe",
    "train",
    "train_saes",
    "z_source",
]

ZSource = Callable[[Tensor], Mapping[int, Tensor]]
"""Tokens ``[batch, position]`` to z of each layer, ``[batch, position, n_heads * d_head]``."""

TokenSource = Callable[[int], Tensor]
"""The number of a round (or step) to its tokens ``[batch, position]``: the same each time."""


def z_source(
    model: Any,
    layers: Sequence[int] | None = None,
    *,
    rows_at_once: int | None = None,
    autocast: bool = False,
) -> ZSource:
    """z of a model through its hook points, heads side by side, without gradients.

    One pass over the model gives every layer, and computes no further than the last of them.

    Args:
        model: what :func:`sap.hooked` takes.
        layers: default: all.
        rows_at_once: rows in one forward pass; default: all at once.
        autocast: run the model in bfloat16.
    """
    from sae_attn_plugin.backends.hooked import HookedModel, hooked

    model = hooked(model)
    n_layers = model.cfg.n_layers  # pyright: ignore[reportAttributeAccessIssue]
    layers = list(range(n_layers)) if layers is None else list(layers)
    if missing := [layer for layer in layers if not 0 <= layer < n_layers]:
        raise InputError(f"no z for layers {missing}; the model has 0..{n_layers - 1}")
    names = {f"blocks.{layer}.attn.hook_z": layer for layer in layers}

    def z(tokens: Int[Tensor, "batch pos"]) -> dict[int, Float[Tensor, "batch pos d_in"]]:
        parts: dict[int, list[Tensor]] = {layer: [] for layer in layers}
        for part in tokens.to(model.cfg.device).split(rows_at_once or max(len(tokens), 1)):
            options: dict[str, Any] = {"return_type": "logits", "stop_at_layer": max(layers) + 1}
            if not isinstance(model, HookedModel):
                # A tokenizer that pads on the left makes TransformerLens hide tokens without it.
                options["attention_mask"] = torch.ones_like(part)
            with (
                torch.no_grad(),
                torch.autocast(part.device.type, torch.bfloat16, enabled=autocast),
            ):
                _, cache = model.run_with_cache(part, names_filter=list(names), **options)
            for name, layer in names.items():
                parts[layer].append(cache[name].flatten(-2))
        return {layer: torch.cat(found) for layer, found in parts.items()}

    return z


# SAEs ----------------------------------------------------------------------------------------


def train(
    recipes: RunnerConfig | Sequence[RunnerConfig],
    model: Any = None,
    data: TokenSource | Int[Tensor, "row context"] | str | Path | None = None,
    *,
    out: Path | str,
    checkpoint: Path | str | None = None,
    checkpoint_every: int = 20,
    progress: bool = True,
) -> dict[int, Path]:
    """Train the SAEs of some recipes, one per layer, all from the same pass over the model.

    sae_lens' own ``MultiSAETrainingRunner`` trains several SAEs from one pass too. What it cannot
    do is go on after an interruption as if nothing had happened: its checkpoints hold neither the
    activations in its mixing buffer nor the state of its random numbers. So this drives the same
    trainers step by step (``SAETrainer.step``), and feeds them batches that depend on the seed and
    the step alone. Adam, schedules, losses and dead-feature bookkeeping are sae_lens' own.

    Args:
        recipes: see :func:`recipe`. They must agree in everything but the layer and the SAE.
        model: what :func:`sap.hooked` takes; default: loaded by the recipe's ``model_name``.
        data: rows of token ids, or a function from the number of a round to its rows, or what
            :func:`sae_attn_plugin.corpus.rows.row_stream` reads; default: the recipe's
            ``dataset_path``.
        out: folder for the SAEs, one ``blocks.{layer}.attn.hook_z`` folder each.
        checkpoint: file to resume from where it exists, and to write every ``checkpoint_every``
            rounds. It is removed when training is done. A resumed run gives the same weights.
        progress: show a progress bar.

    Returns:
        Layer to the folder of its SAE: a plain sae_lens SAE, as from :func:`train_saes`.

    Raises:
        InputError: recipes that differ, a model they do not fit, data that cannot be read.
        UnsupportedError: a field of the recipe that this trainer would ignore.
        FileError: the checkpoint was made with other settings.
    """
    from sae_attn_plugin import demo
    from sae_attn_plugin.backends.hooked import hooked
    from sae_attn_plugin.backends.loading import load_model

    runs = _one_per_layer([recipes] if not isinstance(recipes, Sequence) else recipes)
    cfg = next(iter(runs.values()))
    if model is None and cfg.model_name == DEMO_MODEL_NAME:
        model = demo.load_model("nnsight")
    elif model is None:
        model = load_model(cfg.model_name, "nnsight", cfg.device)
    model = hooked(model)
    _check_fit(model, runs)
    source = cfg.dataset_path if data is None else data
    if source == DEMO_MODEL_NAME:
        source = _demo_text(cfg)
    elif isinstance(source, str | Path):
        if not str(source):
            raise InputError("the recipe names no data set; pass data=")
        source = _streamed(source, model, cfg)
    elif isinstance(source, Tensor):
        _check_rows(source, model, cfg.context_size)
        source = Rounds(source, cfg.n_batches_in_buffer, cfg.seed)
    excluded = _excluded(cfg.exclude_special_tokens, model.tokenizer)
    return _train(
        z_source(
            model, list(runs), rows_at_once=cfg.store_batch_size_prompts, autocast=cfg.autocast_lm
        ),
        source,
        {layer: run.sae for layer, run in runs.items()},
        replace(
            cfg.to_sae_trainer_config(),
            # whole batches, at least what was asked for
            total_training_samples=math.ceil(cfg.training_tokens / cfg.train_batch_size_tokens)
            * cfg.train_batch_size_tokens,
            n_checkpoints=0,
            checkpoint_path=None,
        ),
        {
            name: getattr(cfg, name)
            for name in (
                *("model_name", "model_class_name", "dataset_path", "hook_head_index"),
                *("context_size", "seqpos_slice", "prepend_bos", "exclude_special_tokens"),
                *("sequence_separator_token", "disable_concat_sequences"),
                *("training_tokens", "seed"),
            )
        },
        out=Path(out),
        seed=cfg.seed,
        exclude_tokens=excluded,
        checkpoint=None if checkpoint is None else Path(checkpoint),
        checkpoint_every=checkpoint_every,
        progress=progress,
    )


def train_saes(
    z: ZSource,
    tokens: TokenSource,
    sae: TrainingSAEConfig,
    *,
    layers: Sequence[int],
    out: Path | str,
    model_name: str,
    context_size: int,
    prepend_bos: bool = True,
    n_tokens: int,
    batch_size: int = 2048,
    lr: float = 1e-3,
    warm_up: float = 0.02,
    decay: float = 0.3,
    dead_feature_window: int = 200,
    seed: int = 0,
    metadata: Mapping[str, Any] | None = None,
    checkpoint: Path | str | None = None,
    checkpoint_every: int = 20,
    progress: bool = True,
) -> dict[int, Path]:
    """Train an attention-z SAE for every layer from any source of z, all from the same pass.

    The model runs in rounds. A round's activations, all positions with BOS, are shuffled and served
    to each layer's ``sae_lens`` trainer in batches. Adam, learning rate schedule, sparsity and
    dead-feature bookkeeping are sae_lens' own. :func:`train` does the same from recipes.

    Args:
        z: the model, as a function from tokens to z of each layer (see :func:`z_source`).
        tokens: round number to the tokens of that round. Must be a pure function of the number.
        sae: any sae_lens training config with the ``d_in`` of z; it is copied for every layer, and
            ``reshape_activations`` is set so that the saved SAE takes ``hook_z`` as it is.
        layers: which layers.
        out: folder for the SAEs, one ``blocks.{layer}.attn.hook_z`` folder each.
        model_name, context_size, prepend_bos, metadata: go into the saved metadata.
        n_tokens: activations to train on, rounded up to whole batches.
        batch_size: activations in a step.
        lr, warm_up, decay: learning rate; shares of the steps over which it rises and falls to 0.
        dead_feature_window: steps without firing after which sae_lens calls a feature dead.
        checkpoint: file to resume from where it exists, and to write every ``checkpoint_every``
            rounds. It is removed when training is done.
        progress: show a progress bar.

    Returns:
        Layer to the folder of its SAE. Each is a plain sae_lens SAE: ``cfg.json``,
        ``sae_weights.safetensors`` and ``sparsity.safetensors`` (log10 firing frequency over the
        last full quarter of training).

    Raises:
        InputError: a layer without z, a shape that does not fit ``d_in``, a round with fewer
            activations than a batch.
        FileError: the checkpoint was made with other settings.
    """
    from sae_lens.config import SAETrainerConfig

    n_steps = math.ceil(n_tokens / batch_size)
    rise = int(warm_up * n_steps)
    return _train(
        z,
        tokens,
        dict.fromkeys(layers, sae),
        SAETrainerConfig(
            total_training_samples=n_steps * batch_size,
            train_batch_size_samples=batch_size,
            lr=lr,
            lr_end=lr,
            lr_warm_up_steps=rise if rise > 1 else 0,
            lr_decay_steps=int(decay * n_steps),
            dead_feature_window=dead_feature_window,
            feature_sampling_window=max(1, n_steps // 4),
            device=sae.device,
        ),
        {
            "model_name": model_name,
            "hook_head_index": None,
            "context_size": context_size,
            "prepend_bos": prepend_bos,
            "training_tokens": n_steps * batch_size,
            "seed": seed,
            **(metadata or {}),
        },
        out=Path(out),
        seed=seed,
        checkpoint=None if checkpoint is None else Path(checkpoint),
        checkpoint_every=checkpoint_every,
        progress=progress,
    )


def _train(
    z: ZSource,
    tokens: TokenSource,
    saes: Mapping[int, TrainingSAEConfig],
    run: SAETrainerConfig,
    metadata: Mapping[str, Any],
    *,
    out: Path,
    seed: int,
    checkpoint: Path | None,
    checkpoint_every: int,
    progress: bool,
    exclude_tokens: Sequence[int] = (),
) -> dict[int, Path]:
    """:func:`train_saes` in sae_lens' own terms."""
    layers, batch_size = list(saes), run.train_batch_size_samples
    n_steps = run.total_training_samples // batch_size
    trainers = {
        layer: _trainer(
            replace(deepcopy(sae), reshape_activations="hook_z"),
            {"hook_name": f"blocks.{layer}.attn.hook_z", **metadata},
            run,
            seed=seed + layer,
        )
        for layer, sae in saes.items()
    }
    settings = {
        "saes": {str(layer): sae.to_dict() for layer, sae in saes.items()},
        "run": {k: v for k, v in vars(run).items() if k != "logger"},
        "metadata": dict(metadata),
        "exclude_tokens": list(exclude_tokens),
        "seed": seed,
    }
    done = round_ = 0
    if checkpoint is not None and checkpoint.exists():
        tensors, facts = load_state(checkpoint, settings)
        done, round_ = facts["done"], facts["round"]
        for layer, trainer in trainers.items():
            _restore_trainer(trainer, under(tensors, f"{layer}."), facts["trainers"][str(layer)])

    def advance(layer: int, batch: Tensor) -> Any:
        trainer = trainers[layer]
        trainer.maybe_reset_sparsity()
        step = trainer.step(batch)
        trainer.n_training_steps += 1
        return step

    d_ins = {layer: sae.d_in for layer, sae in saes.items()}
    # Layers are independent, and a step has long serial parts: one thread each, as cores allow.
    workers = max(1, min(len(trainers), torch.get_num_threads()))
    with (
        tqdm(total=n_steps, initial=done, desc="SAEs", unit="step", disable=not progress) as bar,
        ThreadPoolExecutor(workers) as pool,
    ):
        while done < n_steps:
            batches = _shuffled(z, tokens(round_), d_ins, batch_size, seed, round_, exclude_tokens)
            for layer, trainer in trainers.items():
                _set_scale(trainer, batches[layer])
            for i in range(min(len(batches[layers[0]]), n_steps - done)):
                steps = list(pool.map(advance, layers, [batches[n][i] for n in layers]))
                done += 1
                bar.update()
                if done % 20 == 0:
                    left = zip(layers, map(_unexplained, steps), strict=True)
                    bar.set_postfix({f"L{n}": f"{share:.3f}" for n, share in left})
            round_ += 1
            if checkpoint is not None and done < n_steps and round_ % checkpoint_every == 0:
                states = {layer: _trainer_state(trainer) for layer, trainer in trainers.items()}
                save_state(
                    checkpoint,
                    {f"{n}.{key}": t for n, (ts, _) in states.items() for key, t in ts.items()},
                    {
                        "settings": settings,
                        "done": done,
                        "round": round_,
                        "trainers": {n: facts for n, (_, facts) in states.items()},
                    },
                )
    folders = {layer: _finish(trainer, out) for layer, trainer in trainers.items()}
    if checkpoint is not None:
        checkpoint.unlink(missing_ok=True)
    return folders


# What sae_lens' runner does with these fields, this trainer does not; at any other value a recipe
# would be trained otherwise than it says.
_NOT_HERE = {
    "use_chat_formatting": False,
    "use_cached_activations": False,
    "from_pretrained_path": None,
    "seqpos_slice": (None,),
    "disable_concat_sequences": False,
    "compile_llm": False,
    "compile_sae": False,
    "n_checkpoints": 0,
    "save_final_checkpoint": False,
    "resume_from_checkpoint": None,
}


def _one_per_layer(recipes: Sequence[RunnerConfig]) -> dict[int, RunnerConfig]:
    """Recipes by layer, checked against each other and for what would be ignored."""
    runs: dict[int, RunnerConfig] = {}
    for cfg in recipes:
        match = re.fullmatch(r"blocks\.(\d+)\.attn\.hook_z", cfg.hook_name)
        if match is None or cfg.hook_head_index is not None:
            raise UnsupportedError(
                f"hook_name {cfg.hook_name!r}, hook_head_index {cfg.hook_head_index}: this trainer "
                "trains on all heads of blocks.LAYER.attn.hook_z; use sae_lens' "
                "LanguageModelSAETrainingRunner with override_model=sap.hooked(model) for others"
            )
        for name, expected in _NOT_HERE.items():
            if getattr(cfg, name) != expected:
                raise UnsupportedError(
                    f"{name}={getattr(cfg, name)!r} is not supported here; expected {expected!r}, "
                    "or use sae_lens' LanguageModelSAETrainingRunner with "
                    "override_model=sap.hooked(model)"
                )
        if cfg.logger.log_to_wandb:
            raise UnsupportedError("nothing is logged to W&B here; set log_to_wandb=False")
        layer = int(match.group(1))
        if layer in runs:
            raise InputError(f"two recipes for layer {layer}; give one")
        runs[layer] = cfg
    if not runs:
        raise InputError("no recipes given; expected at least one")
    first, *others = runs.values()
    for cfg in others:
        # run_name and checkpoint_path are drawn or derived for each
        different = [
            name
            for name, value in vars(first).items()
            if name not in ("sae", "hook_name", "logger", "checkpoint_path")
            and getattr(cfg, name) != value
        ]
        if different:
            raise InputError(
                f"recipes trained in one pass must agree; those of {first.hook_name} and "
                f"{cfg.hook_name} differ in {', '.join(different)}"
            )
    return dict(sorted(runs.items()))


def _check_fit(model: Any, runs: Mapping[int, RunnerConfig]) -> None:
    width = model.cfg.n_heads * model.cfg.d_head
    for layer, cfg in runs.items():
        if layer >= model.cfg.n_layers:
            raise InputError(
                f"a recipe for layer {layer}, but {model.cfg.model_name} has layers "
                f"0..{model.cfg.n_layers - 1}"
            )
        if cfg.sae.d_in != width:
            raise InputError(
                f"the recipe of layer {layer} has d_in {cfg.sae.d_in}, but hook_z of "
                f"{model.cfg.model_name} is {model.cfg.n_heads} heads x {model.cfg.d_head} = "
                f"{width} wide"
            )
        if cfg.context_size > model.cfg.n_ctx:
            raise InputError(
                f"context_size {cfg.context_size} is longer than the context of "
                f"{model.cfg.model_name}, {model.cfg.n_ctx}"
            )


def _check_rows(rows: Tensor, model: Any, context_size: int) -> None:
    rows = check_ids(rows, model.cfg.d_vocab, model.cfg.n_ctx, rows.device)
    if rows.shape[1] != context_size:
        raise InputError(
            f"rows of {rows.shape[1]} tokens, but the recipe has context_size {context_size}"
        )


def _streamed(source: str | Path, model: Any, cfg: RunnerConfig) -> StreamedRounds:
    separator = cfg.sequence_separator_token
    if isinstance(separator, str):
        separator = getattr(need_tokenizer(model.tokenizer), f"{separator}_token_id")
    return StreamedRounds(
        lambda: row_stream(
            source,
            model.tokenizer,
            cfg.context_size,
            prepend_bos=cfg.prepend_bos,
            separator=separator,
        ),
        cfg.n_batches_in_buffer,
    )


def _demo_text(cfg: RunnerConfig) -> TokenSource:
    from sae_attn_plugin.demo import language

    rows = cfg.n_batches_in_buffer * cfg.context_size // 64
    return lambda round_: torch.tensor(language.training_batch(cfg.seed, round_, rows))


def _excluded(given: bool | list[int], tokenizer: Any) -> list[int]:
    if isinstance(given, bool):
        return special_tokens(tokenizer) if given else []
    return list(given)


def _trainer(
    sae: TrainingSAEConfig, metadata: dict[str, Any], run: SAETrainerConfig, seed: int
) -> SAETrainer[Any, Any]:
    from sae_lens.saes.sae import SAEMetadata, TrainingSAE
    from sae_lens.training.sae_trainer import SAETrainer

    sae.metadata = SAEMetadata(**metadata)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        training_sae = TrainingSAE.from_dict(sae.to_dict())
    # The trainer is driven by its step(), as sae_lens' own MultiSAETrainer does it.
    return SAETrainer(run, training_sae, data_provider=iter(()))


def _shuffled(
    z: ZSource,
    tokens: Tensor,
    d_ins: Mapping[int, int],
    batch_size: int,
    seed: int,
    round_: int,
    exclude_tokens: Sequence[int] = (),
) -> dict[int, Float[Tensor, "step batch d_in"]]:
    """One round's activations of every layer, in the same shuffled order."""
    found = z(tokens)
    if missing := [layer for layer in d_ins if layer not in found]:
        raise InputError(f"no z for layers {missing}; the source gives {sorted(found)}")
    kept = torch.arange(tokens.numel())
    if exclude_tokens:
        kept = kept[~torch.isin(tokens.flatten().cpu(), torch.tensor(list(exclude_tokens)))]
    n = len(kept) // batch_size
    if n == 0:
        raise InputError(
            f"round {round_} has {len(kept)} activations, fewer than one batch of {batch_size}"
        )
    generator = torch.Generator().manual_seed(seed * 1_000_003 + round_)
    order = kept[torch.randperm(len(kept), generator=generator)[: n * batch_size]]
    batches = {}
    for layer, d_in in d_ins.items():
        if found[layer].shape != (*tokens.shape, d_in):
            raise InputError(
                f"z of layer {layer} has shape {tuple(found[layer].shape)}, expected "
                f"{(*tokens.shape, d_in)}: batch, position, d_in"
            )
        flat = found[layer].detach().reshape(-1, d_in)
        batches[layer] = flat[order.to(flat.device)].view(n, batch_size, d_in)
    return batches


def _set_scale(trainer: SAETrainer[Any, Any], batches: Float[Tensor, "step batch d_in"]) -> None:
    """sae_lens' input scale, ``sqrt(d_in) / mean norm``, from the first round."""
    if (
        trainer.sae.cfg.normalize_activations == "expected_average_only_in"
        and trainer.activation_scaler.scaling_factor is None
    ):
        mean_norm = batches.norm(dim=-1).mean().item()
        trainer.activation_scaler.scaling_factor = batches.shape[-1] ** 0.5 / max(mean_norm, 1e-12)


def _unexplained(step: Any) -> float:
    """Share of the variance of a batch that the SAE leaves over."""
    centred = step.sae_in - step.sae_in.mean(0)
    return ((step.sae_out - step.sae_in).square().sum() / centred.square().sum()).item()


def _finish(trainer: SAETrainer[Any, Any], out: Path) -> Path:
    """What ``SAETrainer.fit`` does at its end, then save the inference SAE, whole or not at all."""
    from sae_lens.constants import SPARSITY_FILENAME

    sae = trainer.sae
    if trainer.activation_scaler.scaling_factor is not None:
        sae.fold_activation_norm_scaling_factor(trainer.activation_scaler.scaling_factor)
    trainer.set_final_sae_metadata()
    target = out / sae.cfg.metadata.hook_name
    draft = out / f".{target.name}.{uuid.uuid4().hex}"
    try:
        sae.save_inference_model(draft)
        save_file({"sparsity": trainer.log_feature_sparsity}, draft / SPARSITY_FILENAME)
        _replace_folder(draft, target)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return target


def _replace_folder(new: Path, target: Path) -> None:
    """Put a finished folder in the place of another, which comes back if that fails."""
    old = target.with_name(f".{target.name}.{uuid.uuid4().hex}.old")
    moved = False
    try:
        if target.exists():
            target.replace(old)
            moved = True
        new.replace(target)
    except BaseException:  # Ctrl-C too
        if moved and not target.exists():
            old.replace(target)
        raise
    finally:
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)


# Activations on disk ----------------------------------------------------------------------------


def cache_activations(
    cfg: CacheActivationsRunnerConfig, model: Any, dataset: Any = None
) -> Dataset:
    """sae_lens' ``CacheActivationsRunner`` on a model that sae_lens cannot load itself.

    Args:
        cfg: sae_lens' own, with a ``hook_name`` such as ``blocks.0.attn.hook_z``.
        model: what :func:`sap.hooked` takes.
        dataset: instead of ``cfg.dataset_path``.

    Returns:
        The activations, as sae_lens' trainers read them (``use_cached_activations=True``).

    Raises:
        InputError: a hook name the model does not have.
    """
    import sae_lens.cache_activations_runner as caching
    from datasets import Array2D, Features, Value
    from datasets import Sequence as Items

    from sae_attn_plugin.backends.hooked import hooked

    model = hooked(model)
    if cfg.hook_name not in model.hook_dict:
        raise InputError(f"no hook point {cfg.hook_name!r} on {model.cfg.model_name}")
    g = model.cfg
    if cfg.hook_name.endswith("hook_z") and cfg.d_in != g.n_heads * g.d_head:
        raise InputError(
            f"d_in {cfg.d_in}, but hook_z of {g.model_name} is {g.n_heads} heads x {g.d_head} = "
            f"{g.n_heads * g.d_head} wide; sae_lens caches all heads of a layer, never one"
        )
    # Its __init__ would load a model by name; the rest is as sae_lens has it.
    runner = object.__new__(caching.CacheActivationsRunner)
    runner.cfg, runner.model = cfg, model
    runner.activations_store = caching._mk_activations_store(model, cfg, override_dataset=dataset)
    runner.context_size = runner._get_sliced_context_size(cfg.context_size, cfg.seqpos_slice)
    shape = (runner.context_size, cfg.d_in)
    runner.features = Features(
        {
            cfg.hook_name: Array2D(shape=shape, dtype=str(cfg.dtype)),
            "token_ids": Items(Value(dtype="int32"), length=runner.context_size),
        }
    )
    return runner.run()


# State of a trainer ----------------------------------------------------------------------------


def _trainer_state(trainer: SAETrainer[Any, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What ``SAETrainer.save_trainer_state`` keeps, without its pickle."""
    optimizer, groups = optimizer_state(trainer.optimizer)
    tensors = {
        **{f"sae.{n}": t for n, t in trainer.sae.state_dict().items()},
        **{f"optimizer.{n}": t for n, t in optimizer.items()},
        "act_freq_scores": trainer.act_freq_scores,
        "n_forward_passes_since_fired": trainer.n_forward_passes_since_fired,
    }
    return tensors, {
        "optimizer": groups,
        "lr_scheduler": trainer.lr_scheduler.state_dict(),
        "coefficients": {n: s.state_dict() for n, s in trainer.coefficient_schedulers.items()},
        "scaling_factor": trainer.activation_scaler.scaling_factor,
        "n_training_steps": trainer.n_training_steps,
        "n_training_samples": trainer.n_training_samples,
        "n_frac_active_samples": trainer.n_frac_active_samples,
    }


def _restore_trainer(
    trainer: SAETrainer[Any, Any], tensors: Mapping[str, Tensor], facts: Mapping[str, Any]
) -> None:
    trainer.sae.load_state_dict(under(tensors, "sae."))
    restore_optimizer(trainer.optimizer, under(tensors, "optimizer."), facts["optimizer"])
    trainer.lr_scheduler.load_state_dict(facts["lr_scheduler"])
    for name, state in facts["coefficients"].items():
        trainer.coefficient_schedulers[name].load_state_dict(state)
    trainer.activation_scaler.scaling_factor = facts["scaling_factor"]
    trainer.act_freq_scores = tensors["act_freq_scores"]
    trainer.n_forward_passes_since_fired = tensors["n_forward_passes_since_fired"]
    for name in ("n_training_steps", "n_training_samples", "n_frac_active_samples"):
        setattr(trainer, name, facts[name])
