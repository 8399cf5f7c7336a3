"""Frozen validation of whole graphs on every model at hand.

Run as a script, it writes the table in docs/validation.md.
"""

from __future__ import annotations

import functools
import warnings
from pathlib import Path
from typing import Any

from architecture_models import RECIPES
from architecture_table import ARCHITECTURE_NAMES
from helpers import STORIES, on_host, random_saes, word_tokenizer

import sae_attn_plugin as sap
from sae_attn_plugin.interventions.validate import Agreement

HOSTS = ("transformer_lens", "nnsight")
MODELS = ("demo", "stories260K", *RECIPES)
TOKENS = [5, 9, 3, 17, 40, 22]  # longer than the windows of the random models
PAGE = Path(__file__).parents[1] / "docs" / "validation.md"
_START, _END = "<!-- frozen edges: begin -->\n", "<!-- frozen edges: end -->\n"
_NAMES = {"demo": "the demo model, its own SAEs", **ARCHITECTURE_NAMES}
_PRUNING: Any = {"nodes": 0.95, "edges": 0.999, "max_nodes": 40}
_NO_HOOKED = ("olmo2", "phi3")  # what HookedTransformer cannot hold runs on the bridge


def host_of(model: str, host: str) -> str:
    """The host's own name."""
    if host == "nnsight":
        return host
    return "transformer_bridge" if model in _NO_HOOKED else "hooked_transformer"


@functools.cache
def _recipe(name: str) -> tuple[Any, list[Any]]:
    """A random model with random SAEs of twelve features, about four of them active."""
    model = RECIPES[name].build()
    return model, random_saes(model, d_sae=12)


@functools.cache
def _stories_saes() -> list[Any]:
    return random_saes(sap.load_model(STORIES, "nnsight")._module, d_sae=12)


def graph_of(model: str, host: str) -> tuple[Any, sap.FeatureLens]:
    """A graph of some hundreds of edges in float32, with its lens."""
    if model == "demo":
        lens = sap.demo.load(backend=host)  # pyright: ignore[reportArgumentType]
        run = lens.run(sap.demo.ioi_prompt())
        return run.graph(sap.LogitDiff(" Mary", " John"), **_PRUNING), lens
    if model == "stories260K":
        lens = sap.FeatureLens(sap.load_model(STORIES, host), _stories_saes())  # type: ignore[arg-type]
        run = lens.run("Once upon a time, there was")
        return run.graph(**_PRUNING), lens
    plain, saes = _recipe(model)
    hosted = on_host(plain, host_of(model, host))
    lens = sap.FeatureLens(hosted, saes, tokenizer=word_tokenizer())
    return lens.run([TOKENS]).graph(sap.LogitDiff(7, 9), **_PRUNING), lens


def frozen(model: str, host: str) -> tuple[Any, Agreement]:
    """The graph, and every edge of it against the removal of its source."""
    graph, lens = graph_of(model, host)
    return graph, sap.validate(graph, lens, baseline=False, progress=False).frozen


def table() -> str:
    """The worst errors as Markdown."""
    lines = ["| model | edges | largest error, TransformerLens | largest error, nnsight |"]
    lines.append("|---|---|---|---|")
    for model in MODELS:
        found = [frozen(model, host)[1] for host in HOSTS]
        counts = " and ".join(dict.fromkeys(str(len(one.table)) for one in found))
        bridge = " (bridge)" if host_of(model, HOSTS[0]) == "transformer_bridge" else ""
        errors = f"{found[0].max_error:.1e}{bridge} | {found[1].max_error:.1e}"
        lines.append(f"| {_NAMES.get(model, model)} | {counts} | {errors} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    found = table()
    before, rest = PAGE.read_text(encoding="utf-8").split(_START)
    PAGE.write_text(before + _START + found + _END + rest.split(_END)[1], encoding="utf-8")
