"""Train a transcoder for every MLP of the demo model with sae_lens' own trainer:

    python examples/train_transcoders.py --out sae_attn_plugin/demo/transcoders

sae_lens trains SAEs, which reconstruct what they read. Here its BatchTopK training class is given
the MLP's input and output side by side, encodes the one and is scored on the other; optimiser,
learning rate, sparsity and dead features stay those of sae_lens' trainer. What is saved are plain
sae_lens ``jumprelu_transcoder`` objects.
"""

from __future__ import annotations

import argparse
import random
import shutil
import uuid
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from sae_lens import SAE
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
from sae_lens.saes.sae import SAEMetadata, TrainStepInput, TrainStepOutput
from sae_lens.saes.transcoder import JumpReLUTranscoder, JumpReLUTranscoderConfig
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor
from tqdm.auto import tqdm

from sae_attn_plugin import demo
from sae_attn_plugin.backends import as_backend
from sae_attn_plugin.backends.protocol import Backend, Site
from sae_attn_plugin.demo import language
from sae_attn_plugin.registration import DEMO_MODEL_NAME


class TranscoderTraining(BatchTopKTrainingSAE):
    """Trained on ``[input | output]`` rows, of ``d_in`` columns each."""

    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        read, wanted = step_input.sae_in.chunk(2, dim=-1)
        acts, pre = self.encode_with_hidden_pre(read)
        out = self.decode(acts)
        mse = self.mse_loss_fn(out, wanted).sum(dim=-1).mean()
        aux = self.calculate_topk_aux_loss(
            sae_in=wanted, sae_out=out, hidden_pre=pre, dead_neuron_mask=step_input.dead_neuron_mask
        )
        self.update_topk_threshold(acts)
        losses = {"mse_loss": mse, "auxiliary_reconstruction_loss": aux}
        return TrainStepOutput(wanted, out, acts, pre, mse + aux, losses)


def tokens_of(seed: int, step: int, rows: int = 512) -> Tensor:
    """Rows of 64 tokens; every sixth batch has half as many rows of 128."""
    rng = random.Random(f"transcoders:{seed}:{step}")
    n, length = (rows // 2, 128) if step % 6 == 5 else (rows, 64)
    return torch.tensor(language.token_rows(rng, n, length, held_out=False))


def read(backend: Backend, tokens: Tensor) -> dict[int, tuple[Tensor, Tensor]]:
    """Input and output of every MLP, ``[activation, d_model]`` each."""
    layers = range(backend.geometry.n_layers)
    sites = [Site(name, layer) for layer in layers for name in ("mlp_in", "mlp_out")]
    found = backend.forward(tokens, reads=sites)
    return {
        n: (found[Site("mlp_in", n)].flatten(0, 1), found[Site("mlp_out", n)].flatten(0, 1))
        for n in layers
    }


def trainer(d_model: int, d_sae: int, k: float, steps: int, batch: int, lr: float) -> Any:
    config = BatchTopKTrainingSAEConfig(
        d_in=d_model,
        d_sae=d_sae,
        k=k,
        apply_b_dec_to_input=False,
        rescale_acts_by_decoder_norm=False,
        normalize_activations="none",
    )
    settings = SAETrainerConfig(
        total_training_samples=steps * batch,
        train_batch_size_samples=batch,
        lr=lr,
        lr_end=lr,
        lr_warm_up_steps=max(2, steps // 50),
        lr_decay_steps=int(0.3 * steps),
        dead_feature_window=200,
        feature_sampling_window=max(1, steps // 4),
        device="cpu",
    )
    return SAETrainer(settings, TranscoderTraining(config), data_provider=iter(()))


def finish(training: TranscoderTraining, scale: float, layer: int, out: Path, facts: Any) -> Path:
    """The plain sae_lens transcoder, with the scale of its training targets taken off."""
    hook = f"blocks.{layer}.mlp.hook_in"
    metadata = SAEMetadata(
        model_name=DEMO_MODEL_NAME,
        hook_name=hook,
        hook_name_out=f"blocks.{layer}.hook_mlp_out",
        prepend_bos=True,
        **facts,
    )
    config = JumpReLUTranscoderConfig(
        d_in=training.cfg.d_in,
        d_out=training.cfg.d_in,
        d_sae=training.cfg.d_sae,
        apply_b_dec_to_input=False,
        metadata=metadata,
    )
    made = JumpReLUTranscoder(config)
    with torch.no_grad():
        made.W_enc.copy_(training.W_enc)
        made.b_enc.copy_(training.b_enc)
        made.W_dec.copy_(training.W_dec / scale)
        made.b_dec.copy_(training.b_dec / scale)
        made.threshold.fill_(training.topk_threshold.item())
    target, draft = out / hook, out / f".{uuid.uuid4().hex}"
    try:
        made.save_model(draft)
        shutil.rmtree(target, ignore_errors=True)
        draft.replace(target)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return target


def show(backend: Backend, folders: dict[int, Path], seed: int) -> None:
    found = read(backend, tokens_of(seed + 1, 0, rows=1024))
    table = Table("layer", "L0", "dead", "explained")
    for layer, folder in folders.items():
        sae: Any = SAE.load_from_disk(folder)
        x, y = found[layer]
        with torch.no_grad():
            acts = sae.encode(x)
            left = (sae.decode(acts) - y).square().sum() / (y - y.mean(0)).square().sum()
        fired = (acts > 0).any(0).float().mean()
        numbers = f"{(acts > 0).sum(1).float().mean():.1f}", f"{1 - fired:.1%}", f"{1 - left:.1%}"
        table.add_row(str(layer), *numbers)
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True, help="folder for the transcoders")
    parser.add_argument("--tokens", type=int, default=1_500_000, help="activations to train on")
    parser.add_argument("--d-sae", type=int, default=384, help="number of features")
    parser.add_argument("--k", type=float, default=12, help="mean number of active features")
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    backend = as_backend(demo.load_model("nnsight"))
    d_model, layers = backend.geometry.d_model, range(backend.geometry.n_layers)
    args.out.mkdir(parents=True, exist_ok=True)
    steps = -(-args.tokens // args.batch)
    torch.manual_seed(args.seed)
    trainers = {n: trainer(d_model, args.d_sae, args.k, steps, args.batch, args.lr) for n in layers}
    scales: dict[int, float] = {}
    done, round_ = 0, 0
    with tqdm(total=steps, desc="transcoders", unit="step") as bar:
        while done < steps:
            found = read(backend, tokens_of(args.seed, round_))
            order = torch.randperm(len(found[0][0]))
            for rows in order.split(args.batch):
                if len(rows) < args.batch or done == steps:
                    continue
                for layer, one in trainers.items():
                    x, y = found[layer]
                    scale = scales.setdefault(layer, float(d_model**0.5 / y.norm(dim=-1).mean()))
                    one.maybe_reset_sparsity()
                    one.step(torch.cat([x[rows], y[rows] * scale], dim=-1))
                    one.n_training_steps += 1
                done += 1
                bar.update()
            round_ += 1
    facts = {"training_tokens": steps * args.batch, "seed": args.seed, "context_size": 128}
    folders = {n: finish(t.sae, scales[n], n, args.out, facts) for n, t in trainers.items()}
    show(backend, folders, args.seed)


if __name__ == "__main__":
    main()
