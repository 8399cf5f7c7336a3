"""Measure what the package promises, on the demo model or on any model folder with SAEs:

    python examples/measure.py
    python examples/measure.py --model FOLDER --saes FOLDER

For every host, on random tokens: the worst ledger residual over all targets, for prompts up to the
context length; and, on the shorter prompts, where every feature is expanded, the largest difference
of an edge from the first host's, relative to the sum of |edges| of its target.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from tqdm.auto import tqdm

import sae_attn_plugin as sap
from sae_attn_plugin.attribution.table import Attribution
from sae_attn_plugin.backends.loading import HOSTS, Host

LENGTHS = (10, 32, 100)
COMPARED = 32  # up to here all features are expanded and hosts are compared edge by edge


def largest_difference(one: Attribution, other: Attribution) -> float:
    """Largest relative difference of an edge; both must have the same edges."""
    a, b = (x.edges.astype({"source": str, "target": str}) for x in (one, other))
    both = a.merge(b, on=["source", "target"], how="outer", suffixes=("", "_other"))
    if both.isna().any(axis=None):
        raise SystemExit(f"edges on one host only:\n{both[both.isna().any(axis=1)].head()}")
    size = a["weight"].abs().groupby(a["target"]).sum()
    difference = (both["weight"] - both["weight_other"]).abs()
    return float((difference / both["target"].map(size)).max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", type=Path, default=sap.demo.MODEL_PATH)
    parser.add_argument("--saes", type=Path, default=sap.demo.SAES_PATH)
    parser.add_argument("--budget", type=int, default=500, help="features expanded, long prompts")
    args = parser.parse_args()

    columns = ("host", "dtype", "tokens", "targets", "edges", "worst residual", "against first")
    table = Table(*columns)
    rounds: list[tuple[torch.dtype, Host]] = [
        (dtype, host) for dtype in (torch.float32, torch.float64) for host in HOSTS
    ]
    first: dict[tuple[torch.dtype, int], Attribution] = {}
    for dtype, host in tqdm(rounds, desc="hosts"):
        lens = sap.FeatureLens(sap.load_model(args.model, host, dtype=dtype), args.saes)
        g = lens.backend.geometry
        ids = torch.randint(g.d_vocab, (1, g.n_ctx), generator=torch.Generator().manual_seed(0))
        ids[0, 0] = lens.tokenizer.bos_token_id
        for length in sorted({n for n in LENGTHS if n < g.n_ctx} | {g.n_ctx}):
            run = lens.run(ids[:, :length])
            agreement = "-"
            if length <= COMPARED:
                att = run.attribute(node_budget=None)
                reference = first.setdefault((dtype, length), att)
                if att is not reference:
                    agreement = f"{largest_difference(reference, att):.1e}"
            else:
                att = run.attribute(node_budget=args.budget)
            table.add_row(
                lens.backend.host,
                str(dtype).removeprefix("torch."),
                str(length),
                f"{len(att.ledger):,}",
                f"{len(att.flow.weight):,}",
                f"{att.worst_residual:.1e}",
                agreement,
            )
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
