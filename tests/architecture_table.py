"""The table of architectures and hosts in docs/hosts.md, from what works.

Run as a script, it writes the table; a test checks that the page is current.
"""

from __future__ import annotations

from pathlib import Path

from helpers import HOSTS

import sae_attn_plugin as sap

HOSTS_PAGE = Path(__file__).parents[1] / "docs" / "hosts.md"
_START, _END = "<!-- architectures: begin -->\n", "<!-- architectures: end -->\n"
ARCHITECTURE_NAMES = {
    "gpt2": "GPT-2",
    "gpt_neox": "GPT-NeoX (Pythia), parallel blocks",
    "gpt_neox_sequential": "GPT-NeoX, sequential blocks",
    "gptj": "GPT-J",
    "llama": "Llama",
    "mistral": "Mistral, sliding window",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "gemma": "Gemma",
    "gemma2": "Gemma 2",
    "gemma3_text": "Gemma 3, text",
    "olmo2": "OLMo-2, grouped-query attention",
    "olmo2_ungrouped": "OLMo-2",
    "phi3": "Phi-3",
}


def cell(name: str, host: str) -> str:
    """``exact`` if the ledger closes to the promise in both precisions, else ``refused``."""
    from test_architectures import attribution_of

    try:
        attribution_of(name, host, "float32").check_closure(1e-5)
        attribution_of(name, host, "float64").check_closure(1e-10)
    except sap.UnsupportedError:
        return "refused"
    return "exact"


def with_table(text: str) -> str:
    """The page with the table as it should be."""
    from architecture_models import RECIPES

    head = "| architecture | `model_type` | `HookedTransformer` | `TransformerBridge` | nnsight |\n"
    rows = [
        f"| {ARCHITECTURE_NAMES[name]} | `{recipe.config.model_type}` | "
        + " | ".join(cell(name, host) for host in HOSTS)
        + " |\n"
        for name, recipe in RECIPES.items()
    ]
    before, rest = text.split(_START)
    return before + _START + head + "|---" * 5 + "|\n" + "".join(rows) + _END + rest.split(_END)[1]


if __name__ == "__main__":
    page = HOSTS_PAGE.read_text(encoding="utf-8")
    HOSTS_PAGE.write_text(with_table(page), encoding="utf-8")
