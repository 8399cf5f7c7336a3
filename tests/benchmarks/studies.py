"""Every study on a random model of GPT-2-small shape with twelve 24,576-wide SAEs.

``python -m tests.benchmarks.studies`` shows that they run at that size: time and peak memory of
each. The numbers that the studies find mean nothing here.
"""

from __future__ import annotations

import argparse
import random
import resource
import tempfile
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

import sae_attn_plugin as sap
from sae_attn_plugin import studies
from sae_attn_plugin.demo import language
from tests.benchmarks.shape import gpt2_shape, wide_saes


def main() -> None:
    """Run them one after another in this process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--limit", type=int, default=4, help="prompts, rows, windows / 4")
    parser.add_argument("--only", default="", help="names, separated by commas")
    options = parser.parse_args()
    n = options.limit
    lens = sap.FeatureLens(
        gpt2_shape("eager"), wide_saes(), tokenizer=language.build_tokenizer(), prepend_bos=True
    )
    windows = torch.tensor(language.token_rows(random.Random(0), 4 * n, 128))
    prompts = torch.tensor(language.token_rows(random.Random(1), n, 16))
    runs = {
        "quality": lambda folder: studies.quality(lens, windows, batch_size=4, folder=folder),
        "prefix": lambda folder: studies.prefix(
            lens, [(5, 1), (5, 5)], n=n, windows=windows, min_attention=0.02, folder=folder
        ),
        "induction_feature": lambda folder: studies.induction_feature(
            lens, windows, 5, min_fires=2, folder=folder
        ),
        "ioi_features": lambda folder: studies.ioi_features(lens, [5], n=n, folder=folder),
        "ioi_positions": lambda folder: studies.ioi_positions(lens, (5, 6), n=n, folder=folder),
        "ioi_circuit": lambda folder: studies.ioi_circuit(
            lens, features=[(5, 7515), (5, 2044)], heads=[(7, 3), (8, 6)], n=n, folder=folder
        ),
        "qk_ioi": lambda folder: studies.qk_ioi(lens, [(7, 3)], n=max(4, n), folder=folder),
    }
    wanted = [name for name in runs if not options.only or name in options.only.split(",")]
    with torch.no_grad():
        lens.backend.forward(prompts)
        start = time.perf_counter()
        lens.backend.forward(prompts)
        forward = (time.perf_counter() - start) / prompts.numel()
    table = Table("study", "seconds", "forward passes of 16 tokens", "peak memory, GiB", "rows")
    for name in wanted:
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            study = runs[name](Path(folder))
            seconds = time.perf_counter() - start
            study.save(Path(folder) / "study.json")
            study.plot().savefig(Path(folder) / "study.png")
            again = studies.load_study(Path(folder) / "study.json")
            assert list(again.tables) == list(study.tables)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        passes = seconds / (16 * forward)
        rows = ", ".join(f"{len(frame)} {key}" for key, frame in study.tables.items())
        table.add_row(name, f"{seconds:.1f}", f"{passes:.0f}", f"{peak:.1f}", rows)
        Console().print(table)


if __name__ == "__main__":
    main()
