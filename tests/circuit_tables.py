"""The tables of docs/circuits.md, from the circuits' own statements.

Run as a script, it writes them; a test checks that the page is current.
"""

from __future__ import annotations

import re
from pathlib import Path

from sae_attn_plugin.demo import circuits

PAGE = Path(__file__).parents[1] / "docs" / "circuits.md"


def table(circuit: circuits.Circuit) -> str:
    """The true edges of a circuit in Markdown."""
    prompt = " ".join(circuit.token_names[i] for i in circuit.prompt)
    answers = ", ".join(
        f"`{answer}` after `{circuit.token_names[circuit.prompt[position]]}`"
        for position, answer in circuit.answers.items()
    )
    rows = [
        f"| `{source}` | {_words(circuit, source)} | `{target}` | {_words(circuit, target)} | "
        f"{weight:.4f} |\n"
        for (source, target), weight in circuit.edges.items()
    ]
    head = "| source | what it is | target | what it is | weight |\n|---|---|---|---|---|\n"
    return f"`{prompt}`: {answers}.\n\n{head}{''.join(rows)}"


def _words(circuit: circuits.Circuit, node: str) -> str:
    words = circuit.meaning(node)
    return "" if words == node else words.replace("<bos>", "BOS")


def with_tables(text: str) -> str:
    """The page with the tables as they should be."""
    known = {make.__name__: make for make in circuits.CIRCUITS}

    def fill(match: re.Match[str]) -> str:
        return f"{match[1]}\n{table(known[match[2]]())}{match[3]}"

    return re.sub(r"(<!-- (\w+): begin -->).*?(<!-- \2: end -->)", fill, text, flags=re.DOTALL)


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
