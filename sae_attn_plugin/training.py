"""Training attention-z SAEs for every layer of a model, and measuring what they keep.

:func:`train_saes` drives sae_lens' own trainer, one per layer, from one pass over the model, and
saves plain sae_lens SAEs. It is resumable to the bit: what a step sees depends on the seed and the
step alone.
"""

from __future__ import annotations

import math
import shutil
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

from sae_attn_plugin.backends import as_backend
from sae_attn_plugin.backends.protocol import Backend, Site
from sae_attn_plugin.checkpoints import (
    load_state,
    optimizer_state,
    restore_optimizer,
    save_state,
    under,
)
from sae_attn_plugin.errors import InputError

if TYPE_CHECKING:
    from sae_lens.saes.sae import SAE, TrainingSAEConfig
    from sae_lens.training.sae_trainer import SAETrainer

__all__ = ["FlatZ", "SAEScores", "ZSource", "attention_z_config", "sae_scores", "train_saes"]

ZSource = Callable[[Tensor], Mapping[int, Tensor]]
"""Tokens ``[batch, position]`` to z of each layer, ``[batch, position, n_heads * d_head]``."""

TokenSource = Callable[[int], Tensor]
"""The number of a round (or step) to its tokens ``[batch, position]``: the same each time."""

ZEdit = Callable[[Tensor], Tensor]


class FlatZ:
    """z of a model as trainers take it: heads side by side.

    Args:
        model: any model that :class:`FeatureLens` takes, or its backend.
    """

    def __init__(self, model: Any) -> None:
        self.backend: Backend = as_backend(model)

    def z(self, tokens: Int[Tensor, "batch pos"]) -> dict[int, Float[Tensor, "batch pos d_in"]]:
        """z of every layer, without gradients: a :data:`ZSource`."""
        layers = range(self.backend.geometry.n_layers)
        found = self.backend.forward(tokens, reads=[Site("z", layer) for layer in layers])
        return {layer: found[Site("z", layer)].flatten(-2) for layer in layers}

    def logits(
        self, tokens: Int[Tensor, "batch pos"], edits: Mapping[int, ZEdit] | None = None
    ) -> Float[Tensor, "batch pos d_vocab"]:
        """Logits, with z of some layers replaced by ``edit(z)``; without gradients."""
        n_layers = self.backend.geometry.n_layers
        if missing := [layer for layer in edits or {} if not 0 <= layer < n_layers]:
            raise InputError(f"no layer {missing[0]}; there are: 0..{n_layers - 1}")
        sites = {
            Site("z", layer): lambda z, edit=edit: edit(z.flatten(-2)).reshape(z.shape)
            for layer, edit in (edits or {}).items()
        }
        return self.backend.forward(tokens, sites)[Site("logits")]


# SAEs ----------------------------------------------------------------------------------------


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

    options = {"normalize_activations": "expected_average_only_in", **options}
    return BatchTopKTrainingSAEConfig(d_in=d_in, d_sae=d_sae or 8 * d_in, k=k, **options)


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
    """Train an attention-z SAE for every layer, all from the same pass over the model.

    The model runs in rounds. A round's activations, all positions with BOS, are shuffled and served
    to each layer's ``sae_lens`` trainer in batches. Adam, learning rate schedule, sparsity and
    dead-feature bookkeeping are sae_lens' own.

    Args:
        z: the model, as a function from tokens to z of each layer (see :class:`FlatZ`).
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
    out = Path(out)
    checkpoint = None if checkpoint is None else Path(checkpoint)
    n_steps = math.ceil(n_tokens / batch_size)
    rise = int(warm_up * n_steps)
    trainers = {
        layer: _trainer(
            replace(deepcopy(sae), reshape_activations="hook_z"),
            {
                "model_name": model_name,
                "hook_name": f"blocks.{layer}.attn.hook_z",
                "hook_head_index": None,
                "context_size": context_size,
                "prepend_bos": prepend_bos,
                "training_tokens": n_steps * batch_size,
                "seed": seed,
                **(metadata or {}),
            },
            dict(
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
            seed=seed + layer,
        )
        for layer in layers
    }
    settings = {
        "sae": sae.to_dict(),
        "layers": list(layers),
        "run": [model_name, n_steps, batch_size, lr, warm_up, decay, dead_feature_window, seed],
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

    # Layers are independent, and a step has long serial parts: one thread each, as cores allow.
    workers = max(1, min(len(trainers), torch.get_num_threads()))
    with (
        tqdm(total=n_steps, initial=done, desc="SAEs", unit="step", disable=not progress) as bar,
        ThreadPoolExecutor(workers) as pool,
    ):
        while done < n_steps:
            batches = _shuffled(z, tokens(round_), layers, sae.d_in, batch_size, seed, round_)
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


def _trainer(
    sae: TrainingSAEConfig, metadata: dict[str, Any], run: dict[str, Any], seed: int
) -> SAETrainer[Any, Any]:
    from sae_lens.config import SAETrainerConfig
    from sae_lens.saes.sae import SAEMetadata, TrainingSAE
    from sae_lens.training.sae_trainer import SAETrainer

    sae.metadata = SAEMetadata(**metadata)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        training_sae = TrainingSAE.from_dict(sae.to_dict())
    # The trainer is driven by its step(), as sae_lens' own MultiSAETrainer does it.
    return SAETrainer(SAETrainerConfig(**run), training_sae, data_provider=iter(()))


def _shuffled(
    z: ZSource,
    tokens: Tensor,
    layers: Sequence[int],
    d_in: int,
    batch_size: int,
    seed: int,
    round_: int,
) -> dict[int, Float[Tensor, "step batch d_in"]]:
    """One round's activations of every layer, in the same shuffled order."""
    found = z(tokens)
    if missing := [layer for layer in layers if layer not in found]:
        raise InputError(f"no z for layers {missing}; the source gives {sorted(found)}")
    n = tokens.numel() // batch_size
    if n == 0:
        raise InputError(
            f"round {round_} has {tokens.numel()} activations, fewer than one batch of {batch_size}"
        )
    order = torch.randperm(
        tokens.numel(), generator=torch.Generator().manual_seed(seed * 1_000_003 + round_)
    )[: n * batch_size]
    batches = {}
    for layer in layers:
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
        if target.exists():
            shutil.rmtree(target)
        draft.replace(target)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return target


@dataclass(frozen=True)
class SAEScores:
    """What an SAE keeps, measured by splicing its reconstruction in at every position.

    Attributes:
        layer: which layer's z was replaced.
        tokens: how many activations were seen.
        l0: mean number of active features.
        dead: share of features that fired on none of the ``tokens``.
        explained: share of the variance of z explained.
        ce_clean, ce_spliced, ce_zero, ce_mean: mean next-token cross-entropy in nats of the model
            as it is, with the reconstruction, with zeros, and with the mean over positions and
            data in place of z.
    """

    layer: int
    tokens: int
    l0: float
    dead: float
    explained: float
    ce_clean: float
    ce_spliced: float
    ce_zero: float
    ce_mean: float

    @property
    def recovered_zero(self) -> float:
        """Share of the cross-entropy that zero ablation costs and the SAE keeps."""
        return (self.ce_zero - self.ce_spliced) / (self.ce_zero - self.ce_clean)

    @property
    def recovered_mean(self) -> float:
        """The same against mean ablation."""
        return (self.ce_mean - self.ce_spliced) / (self.ce_mean - self.ce_clean)


def sae_scores(
    model: FlatZ,
    sae: SAE[Any],
    tokens: Int[Tensor, "batch pos"],
    *,
    layer: int,
    rows_at_once: int = 64,
) -> SAEScores:
    """Measure one SAE on some rows of tokens. See :class:`SAEScores`.

    Args:
        model: the model.
        sae: a loaded sae_lens SAE on z of ``layer``.
        tokens: rows that start with BOS.
        rows_at_once: rows in one forward pass.
    """
    sae.turn_off_forward_pass_hook_z_reshaping()  # z is flat here
    try:
        parts = tokens.split(rows_at_once)
        zs = [model.z(part)[layer] for part in parts]
        flat = torch.cat([z.flatten(0, 1) for z in zs])
        mean = flat.mean(0)
        fired = torch.zeros(sae.cfg.d_sae, dtype=torch.bool, device=flat.device)
        active, left = 0.0, 0.0
        for z in zs:
            with torch.no_grad():
                features = sae.encode(z)
                fired |= (features != 0).flatten(0, 1).any(0)
                active += (features != 0).sum().item()
                left += (sae.decode(features) - z).square().sum().item()

        def loss(edit: ZEdit | None) -> float:
            total = 0.0
            for part in parts:
                logits = model.logits(part, {} if edit is None else {layer: edit})
                total += F.cross_entropy(
                    logits[:, :-1].flatten(0, 1), part[:, 1:].flatten(), reduction="sum"
                ).item()
            return total / tokens[:, 1:].numel()

        return SAEScores(
            layer=layer,
            tokens=len(flat),
            l0=active / len(flat),
            dead=1 - fired.float().mean().item(),
            explained=1 - left / (flat - mean).square().sum().item(),
            ce_clean=loss(None),
            ce_spliced=loss(lambda z: sae.decode(sae.encode(z))),
            ce_zero=loss(torch.zeros_like),
            ce_mean=loss(lambda z: mean.expand_as(z)),
        )
    finally:
        if sae.cfg.reshape_activations == "hook_z":
            sae.turn_on_forward_pass_hook_z_reshaping()


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
