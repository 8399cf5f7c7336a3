"""Train an attention-z SAE for every layer of any small model, on text it writes itself:

    python examples/train_saes.py --model FOLDER --out saes

The SAEs are plain sae_lens SAEs. Afterwards, for example:

    sae-attn graph --model FOLDER --saes saes --prompt "Once upon a time"
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from sae_lens import SAE
from tqdm.auto import trange

import sae_attn_plugin as sap
from sae_attn_plugin.training import FlatZ, attention_z_config, sae_scores, train_saes


def sample(model: Any, n: int, length: int, seed: int, at_once: int = 256) -> torch.Tensor:
    """``[n, length]`` tokens that the model writes after BOS, at temperature 1."""
    torch.manual_seed(seed)
    rows = []
    for start in trange(0, n, at_once, desc="sampling text", unit="batch"):
        prompt = torch.full((min(at_once, n - start), 1), model.config.bos_token_id)
        rows.append(
            model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                do_sample=True,
                top_k=0,
                min_new_tokens=length - 1,
                max_new_tokens=length - 1,
                pad_token_id=model.config.eos_token_id,
            )
        )
    return torch.cat(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", type=Path, required=True, help="folder in Hugging Face format")
    parser.add_argument("--out", type=Path, required=True, help="folder for the SAEs")
    parser.add_argument("--rows", type=int, default=2048, help="sampled texts")
    parser.add_argument("--length", type=int, default=128, help="tokens in a text")
    parser.add_argument("--tokens", type=int, default=2_000_000, help="activations to train on")
    parser.add_argument("--k", type=float, default=12, help="mean number of active features")
    parser.add_argument("--d-sae", type=int, help="number of features; 8 times d_in by default")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    model = FlatZ(sap.load_model(args.model, "nnsight"))
    g = model.backend.geometry
    text = sample(model.backend.model, args.rows + 128, args.length, args.seed)  # type: ignore[attr-defined]
    held_out, text = text[:128], text[128:]
    rows_at_once = max(16, 32_768 // args.length)

    def tokens(round_: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(args.seed * 1_000_003 + round_)
        return text[torch.randint(len(text), (rows_at_once,), generator=generator)]

    layers = range(g.n_layers)
    folders = train_saes(
        model.z,
        tokens,
        attention_z_config(g.n_heads * g.d_head, args.d_sae, args.k),
        layers=layers,
        out=args.out,
        model_name=args.model.name,
        context_size=args.length,
        n_tokens=args.tokens,
        seed=args.seed,
        checkpoint=args.out / "checkpoint.safetensors",
    )
    table = Table("layer", "L0", "dead", "CE clean", "CE spliced", "CE zero", "recovered (zero)")
    for layer in layers:
        sae = SAE.load_from_disk(folders[layer])
        scores = sae_scores(model, sae, held_out, layer=layer)
        table.add_row(
            str(layer),
            f"{scores.l0:.1f}",
            f"{scores.dead:.1%}",
            *(f"{ce:.3f}" for ce in (scores.ce_clean, scores.ce_spliced, scores.ce_zero)),
            f"{scores.recovered_zero:.1%}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
