"""Training with few resources: attention-z SAEs for every layer, and the small demo model.

:func:`train_saes` drives sae_lens' own trainer, one per layer, from one pass over the model, and
saves plain sae_lens SAEs. :func:`train_model` is the plain language-model loop that made the demo
model. Both are resumable to the bit: what a step sees depends on the seed and the step alone, and a
checkpoint is one safetensors file with JSON in its header, written whole or not at all.

The rest is what both need: :class:`ZHooks`, z of a torch model through hooks on its output
projections, and :func:`sae_scores`, what an SAE keeps of the model's loss.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from sae_attn_plugin.errors import FileError, InputError

if TYPE_CHECKING:
    from sae_lens.saes.sae import SAE, TrainingSAEConfig
    from sae_lens.training.sae_trainer import SAETrainer

    from sae_attn_plugin.demo.language import IOIExample

__all__ = [
    "IOIScores",
    "ModelRecipe",
    "RepeatScores",
    "SAEScores",
    "ZHooks",
    "ZSource",
    "attention_z_config",
    "ioi_scores",
    "repeat_scores",
    "sae_scores",
    "train_model",
    "train_saes",
]

ZSource = Callable[[Tensor], Mapping[int, Tensor]]
"""Tokens ``[batch, position]`` to z of each layer, ``[batch, position, n_heads * d_head]``."""

TokenSource = Callable[[int], Tensor]
"""The number of a round (or step) to its tokens ``[batch, position]``: the same each time."""

ZEdit = Callable[[Tensor], Tensor]


# Hooks ---------------------------------------------------------------------------------------


class ZHooks:
    """z of a torch language model, read and edited at the input of its output projections.

    Args:
        model: called with token ids; returns an object with ``logits``.
        projections: layer to the module whose input is z, ``[batch, position, n_heads * d_head]``:
            ``attn.c_proj`` in GPT-2, ``self_attn.o_proj`` in Llama.
    """

    def __init__(self, model: nn.Module, projections: Mapping[int, nn.Module]) -> None:
        self.model = model
        self.projections = dict(projections)

    def z(self, tokens: Int[Tensor, "batch pos"]) -> dict[int, Float[Tensor, "batch pos d_in"]]:
        """z of every layer, without gradients: a :data:`ZSource`."""
        found: dict[int, Tensor] = {}

        def keep(layer: int) -> ZEdit:
            def read(z: Tensor) -> Tensor:
                found[layer] = z
                return z

            return read

        self.logits(tokens, {layer: keep(layer) for layer in self.projections})
        return found

    def logits(
        self, tokens: Int[Tensor, "batch pos"], edits: Mapping[int, ZEdit] | None = None
    ) -> Float[Tensor, "batch pos d_vocab"]:
        """Logits, with z of some layers replaced by ``edit(z)``; without gradients."""
        with self._edited(edits or {}), torch.no_grad():
            return self.model(tokens).logits

    @contextmanager
    def _edited(self, edits: Mapping[int, ZEdit]) -> Iterator[None]:
        handles = []
        try:
            for layer, edit in edits.items():
                if layer not in self.projections:
                    raise InputError(f"no layer {layer}; there are: {sorted(self.projections)}")
                hook = _pre_hook(edit)
                handles.append(self.projections[layer].register_forward_pre_hook(hook))
            yield
        finally:
            for handle in handles:
                handle.remove()


def _pre_hook(edit: ZEdit) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
    return lambda _module, args: (edit(args[0]), *args[1:])


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
        z: the model, as a function from tokens to z of each layer (see :class:`ZHooks`).
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
        tensors, facts = _load_state(checkpoint, settings)
        done, round_ = facts["done"], facts["round"]
        for layer, trainer in trainers.items():
            _restore_trainer(trainer, _under(tensors, f"{layer}."), facts["trainers"][str(layer)])

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
                _save_state(
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
    model: ZHooks,
    sae: SAE[Any],
    tokens: Int[Tensor, "batch pos"],
    *,
    layer: int,
    rows_at_once: int = 64,
) -> SAEScores:
    """Measure one SAE on some rows of tokens. See :class:`SAEScores`.

    Args:
        model: the model with hooks at its output projections.
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


# The model -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelRecipe:
    """How the demo model is trained: AdamW, linear warm-up, cosine decay to 2 %."""

    steps: int
    lr: float = 2e-3
    warm_up: int = 200
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.98)
    clip: float = 1.0


def train_model(
    model: nn.Module,
    tokens: TokenSource,
    recipe: ModelRecipe,
    *,
    checkpoint: Path | str | None = None,
    checkpoint_every: int = 500,
    progress: bool = True,
) -> float:
    """Train a language model in place on next-token prediction.

    Args:
        model: called with token ids ``[batch, position]``; returns an object with ``logits``.
            With dropout, a resumed run differs from an uninterrupted one.
        tokens: step number to its tokens; a pure function of the number.
        recipe: optimiser and schedule.
        checkpoint: file to resume from where it exists, and to write every ``checkpoint_every``
            steps.
        progress: show a progress bar.

    Returns:
        Mean loss in nats over the last 100 steps (or those of this call, where fewer).

    Raises:
        FileError: the checkpoint was made with another recipe or model.
    """
    checkpoint = None if checkpoint is None else Path(checkpoint)
    named = dict(model.named_parameters())  # tied weights appear once
    decayed = [p for p in named.values() if p.ndim >= 2]
    plain = [p for p in named.values() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": plain}],
        lr=recipe.lr,
        betas=recipe.betas,
        weight_decay=0.0,
    )
    settings = {"recipe": json.loads(json.dumps(asdict(recipe)))}
    start = 0
    if checkpoint is not None and checkpoint.exists():
        saved, facts = _load_state(checkpoint, settings)
        start = facts["done"]
        with torch.no_grad():
            for name, parameter in named.items():
                parameter.copy_(saved[f"model.{name}"])
        _restore_optimizer(optimizer, _under(saved, "optimizer."), facts["optimizer"])
    losses: list[float] = []
    model.train()
    with tqdm(
        total=recipe.steps, initial=start, desc="Model", unit="step", disable=not progress
    ) as bar:
        for step in range(start, recipe.steps):
            for group in optimizer.param_groups:
                group["lr"] = _learning_rate(recipe, step)
            batch = tokens(step)
            logits = model(batch).logits
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(named.values(), recipe.clip)
            optimizer.step()
            losses = [*losses[-99:], loss.item()]
            bar.update()
            if step % 20 == 0:
                bar.set_postfix(loss=f"{sum(losses) / len(losses):.3f}")
            done = step + 1
            if checkpoint is not None and (done % checkpoint_every == 0 or done == recipe.steps):
                tensors, facts = _optimizer_state(optimizer)
                _save_state(
                    checkpoint,
                    {
                        **{f"model.{n}": p.detach() for n, p in named.items()},
                        **{f"optimizer.{n}": t for n, t in tensors.items()},
                    },
                    {"settings": settings, "done": done, "optimizer": facts},
                )
    model.eval()
    return sum(losses) / len(losses) if losses else math.nan


def _learning_rate(recipe: ModelRecipe, step: int) -> float:
    rise = min(1.0, (step + 1) / recipe.warm_up)
    return recipe.lr * rise * (0.02 + 0.49 * (1 + math.cos(math.pi * step / recipe.steps)))


# What the demo model can do ------------------------------------------------------------------


@dataclass(frozen=True)
class IOIScores:
    """Indirect object identification over ``n`` prompts.

    ``accuracy``: share of prompts whose most likely next token is the indirect object.
    ``logit_difference``: mean of logit(IO) - logit(S). ``worst_distractor``: the lowest accuracy
    among the kinds of distractor.
    """

    n: int
    accuracy: float
    logit_difference: float
    worst_distractor: float


def ioi_scores(
    logits: Callable[[Tensor], Tensor], examples: Sequence[IOIExample], at_once: int = 256
) -> IOIScores:
    """Measure IOI on sentences of the demo language; ``logits`` maps tokens to logits."""
    from sae_attn_plugin.demo.language import encode

    right: dict[str, list[bool]] = {}
    difference = 0.0
    for start in range(0, len(examples), at_once):
        part = examples[start : start + at_once]
        prompts = [[0, *encode(example.prompt)] for example in part]
        width = max(map(len, prompts))
        # Padding on the right is never seen by what is before it.
        padded = torch.tensor([prompt + [0] * (width - len(prompt)) for prompt in prompts])
        ends = torch.tensor([len(prompt) - 1 for prompt in prompts])
        last = logits(padded)[torch.arange(len(part)), ends]
        for example, row in zip(part, last, strict=True):
            io, subject = encode(f" {example.io} {example.subject}")
            difference += (row[io] - row[subject]).item()
            right.setdefault(example.distractor, []).append(row.argmax().item() == io)
    flat = [hit for hits in right.values() for hit in hits]
    return IOIScores(
        n=len(flat),
        accuracy=sum(flat) / len(flat),
        logit_difference=difference / len(flat),
        worst_distractor=min(sum(hits) / len(hits) for hits in right.values()),
    )


@dataclass(frozen=True)
class RepeatScores:
    """Mean loss in nats per token on the two copies of a random segment."""

    n: int
    first: float
    second: float


def repeat_scores(
    logits: Callable[[Tensor], Tensor], tokens: Int[Tensor, "batch pos"]
) -> RepeatScores:
    """Measure copying. ``tokens``: BOS, a random segment, and the same segment again.

    The first token of the second copy is left out: nothing announces it.
    """
    segment = (tokens.shape[1] - 1) // 2
    loss = F.cross_entropy(logits(tokens)[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none")
    first, second = loss[:, :segment], loss[:, segment + 1 :]
    return RepeatScores(len(tokens), first.mean().item(), second.mean().item())


# Checkpoints ---------------------------------------------------------------------------------


def _save_state(path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Tensors and JSON in one safetensors file, written whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(contiguous, draft, metadata={"state": json.dumps(facts)})
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def _load_state(path: Path, settings: Mapping[str, Any]) -> tuple[dict[str, Tensor], Any]:
    with safe_open(path, framework="pt") as file:
        facts = json.loads((file.metadata() or {}).get("state", "{}"))
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if facts.get("settings") != json.loads(json.dumps(settings)):
        raise FileError(
            f"{path} was made with other settings; give the same ones, or remove it to start anew"
        )
    return tensors, facts


def _under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def _optimizer_state(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], Any]:
    state = optimizer.state_dict()
    tensors = {f"{i}.{n}": t for i, values in state["state"].items() for n, t in values.items()}
    return tensors, state["param_groups"]


def _restore_optimizer(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], groups: Any
) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        index, _, key = name.partition(".")
        state.setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _trainer_state(trainer: SAETrainer[Any, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What ``SAETrainer.save_trainer_state`` keeps, without its pickle."""
    optimizer, groups = _optimizer_state(trainer.optimizer)
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
    trainer.sae.load_state_dict(_under(tensors, "sae."))
    _restore_optimizer(trainer.optimizer, _under(tensors, "optimizer."), facts["optimizer"])
    trainer.lr_scheduler.load_state_dict(facts["lr_scheduler"])
    for name, state in facts["coefficients"].items():
        trainer.coefficient_schedulers[name].load_state_dict(state)
    trainer.activation_scaler.scaling_factor = facts["scaling_factor"]
    trainer.act_freq_scores = tensors["act_freq_scores"]
    trainer.n_forward_passes_since_fired = tensors["n_forward_passes_since_fired"]
    for name in ("n_training_steps", "n_training_samples", "n_frac_active_samples"):
        setattr(trainer, name, facts[name])
