"""What carries the demo model's logit difference, with and without features of MLPs:

    python examples/measure_mlp.py

The table of docs/mlp.md.
"""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

import sae_attn_plugin as sap

_GROUPS = {
    "features": ("attn", "tc", "mlp_sae"),
    "embeddings": ("embed", "pos"),
    "raw MLPs": ("mlp",),
    "errors": ("attn_err", "tc_err", "mlp_sae_err"),
    "biases": ("attn_bias", "tc_bias", "mlp_sae_bias", "tc_skip"),
}


def shares(attribution: Any) -> dict[str, float]:
    """Share of the sum of |edges| into the logit difference, by group."""
    root = str(next(iter(attribution.roots.values())))
    edges = attribution.edges
    edges = edges[edges["target"] == root]
    kinds = edges["source"].astype(str).map(lambda name: sap.Node.parse(name).kind)
    size = edges["weight"].abs()
    return {
        name: float(size[kinds.isin(group)].sum() / size.sum()) for name, group in _GROUPS.items()
    }


def main() -> None:
    prompt = sap.demo.ioi_prompt()
    target = sap.LogitDiff(prompt.correct, prompt.wrong)
    plain = sap.demo.load().run(prompt)
    whole = sap.demo.load(transcoders=True).run(prompt)
    table = Table("graph", *_GROUPS, "targets", "worst ledger residual", "nodes kept")
    for name, attribution in (
        ("attention SAEs", plain.attribute(target)),
        ("attention SAEs, MLPs linearised", plain.attribute(target, mlp="linearise")),
        ("attention SAEs and transcoders", whole.attribute(target)),
    ):
        parts = (f"{share:.1%}" for share in shares(attribution).values())
        kept = len(attribution.prune().nodes)
        figures = len(attribution.ledger), f"{attribution.worst_residual:.1e}", kept
        table.add_row(name, *parts, *map(str, figures))
    console = Console(width=140)
    console.print(table)
    graph = whole.graph(target)
    console.print(repr(sap.validate(graph, whole.lens, max_sources=25)))


if __name__ == "__main__":
    main()
