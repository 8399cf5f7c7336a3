"""One graph as one HTML file: offline, self-contained, nothing to build.

``page_data`` gives the data, ``script`` and ``style`` the assets; a page of one's own calls
``SaeAttnGraph.mount(element, data, options)``. See ``docs/page.md``.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sae_attn_plugin.errors import InputError
from sae_attn_plugin.io import write_atomically
from sae_attn_plugin.nodes import TARGET_KINDS, Node, unquote

if TYPE_CHECKING:
    import networkx as nx

    from sae_attn_plugin.lens import Run

__all__ = [
    "Page", "graph_to_html", "inert", "page", "page_data", "page_html", "script", "show", "style",
]  # fmt: skip

_SCRIPTS = ("text.js", "model.js", "layout.js", "plot.js", "panel.js", "page.js")
_DIGITS = 7  # more than float32 holds
_NODE = (  # what the page reads of a node, where it is there
    "label", "activation", "pre_activation", "constant", "pruned_in", "internal", "members",
    "probability", "neuronpedia", "dfa", "qk", "examples",
)  # fmt: skip
_GRAPH = (
    "model", "revision", "backend", "dtype", "prompt", "tokens", "targets", "pruning",
    "worst_ledger_residual", "supernodes",
)  # fmt: skip
_PAGE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta name="referrer" content="no-referrer">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main id="sae-attn-page"></main>
<noscript>This page draws an attribution graph and needs JavaScript.</noscript>
<script type="application/json" id="sae-attn-data">{data}</script>
<script>{script}</script>
</body>
</html>
"""
_BODY = "html, body, #sae-attn-page { height: 100%; margin: 0; }\n"


@cache
def _asset(name: str) -> str:
    return (resources.files("sae_attn_plugin.graphs.html") / name).read_text(encoding="utf-8")


def script() -> str:
    """The page's JavaScript: defines ``window.SaeAttnGraph``, with ``mount(element, data,
    options)``. It loads nothing, stores nothing but the chosen colours, and writes no HTML."""
    return "\n".join(_asset(name) for name in _SCRIPTS)


def style() -> str:
    """The page's style sheet; every rule is below the class ``sag``."""
    return _asset("page.css")


def page_data(graph: nx.DiGraph[Any]) -> dict[str, Any]:
    """What ``SaeAttnGraph.mount`` shows, as plain JSON data; ``docs/page.md`` has the shape.

    Args:
        graph: from :meth:`Attribution.to_networkx`; parallel edges of heads are added up and kept
            as the edge's heads.

    Raises:
        InputError: no attribution graph, or an attribute that is no JSON.
    """
    from sae_attn_plugin.graphs.files import checked

    if not len(graph):
        raise InputError("the graph has no nodes; nothing to show")
    graph = checked(graph, "HTML")
    index = {name: i for i, name in enumerate(graph)}
    known = {key: graph.graph[key] for key in _GRAPH if graph.graph.get(key) is not None}
    if isinstance(groups := known.pop("supernodes", None), dict):
        members = {name: ids for name, ids in groups.items() if isinstance(ids, list)}
        known["supernodes"] = [{"name": name, "members": ids} for name, ids in members.items()]
    tokens = known.get("tokens")
    last = max(Node.parse(name).position for name in graph)
    if not isinstance(tokens, list) or len(tokens) <= last:
        at = {Node.parse(name).position: token for name, token in graph.nodes(data="token")}
        known["tokens"] = [str(at.get(position) or "") for position in range(last + 1)]
    return {
        "format": "sae-attn-page",
        "version": 1,
        "graph": _rounded(known),
        "nodes": [_node(name, attributes) for name, attributes in graph.nodes(data=True)],
        "edges": _edges(graph, index),
    }


def _node(name: str, attributes: Mapping[str, Any]) -> dict[str, Any]:
    node = Node.parse(name)
    row: dict[str, Any] = {"id": name, "kind": node.kind, "position": node.position}
    row |= {
        key: value
        for key in ("layer", "feature", "head")
        if (value := getattr(node, key)) is not None
    }
    row |= {key: attributes[key] for key in _NODE if attributes.get(key) is not None}
    row["influence"] = attributes.get("influence") or 0.0
    if node.kind == "score":
        followed = f", {node.label} side" if node.label else ""
        row["title"] = f"head {node.layer}.{node.head}, {node.position} to {node.key}{followed}"
    elif node.kind == "super" and node.label is not None:
        row.setdefault("label", str(unquote(node.label)[0]))
    elif node.kind in TARGET_KINDS and node.label is not None:
        parts = [part if isinstance(part, str) else f"#{part}" for part in unquote(node.label)]
        row["title"] = " − ".join(f"“{part}”" for part in parts)
    return _rounded(row)


def _edges(graph: nx.DiGraph[Any], index: Mapping[str, int]) -> list[list[Any]]:
    """``[source, target, weight, share]`` and, where known, the weights by head."""
    weights: dict[tuple[str, str], float] = {}
    heads: dict[tuple[str, str], dict[str, float]] = {}
    for source, target, attributes in graph.edges(data=True):
        pair, weight = (source, target), float(attributes["weight"])
        weights[pair] = weights.get(pair, 0.0) + weight
        if isinstance(by_head := attributes.get("by_head"), dict):
            heads[pair] = by_head
        elif "head" in attributes:
            layer = Node.parse(target).layer
            heads.setdefault(pair, {})[f"{layer}.{attributes['head']}"] = weight
    total: dict[str, float] = {}
    for (_, target), weight in weights.items():
        total[target] = total.get(target, 0.0) + abs(weight)
    rows = []
    for (source, target), weight in weights.items():
        share = abs(weight) / total[target] if total[target] else 0.0
        row: list[Any] = [index[source], index[target], weight, share]
        if (source, target) in heads:
            row.append(heads[source, target])
        rows.append(_rounded(row))
    return rows


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.{_DIGITS}g}")
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return value


def page_html(graph: nx.DiGraph[Any], *, title: str | None = None) -> str:
    """The file's text; see :func:`graph_to_html`."""
    data = page_data(graph)
    if title is None:
        shown = [node["title"] for node in data["nodes"] if "title" in node][:2]
        title = ", ".join(shown or data["graph"].get("targets", [])[:2]) or "attribution graph"
    code, look = script() + "\n" + _asset("start.js"), _BODY + style()
    for text, end in ((code, "</script"), (look, "</style")):
        assert end not in text.lower()
    policy = (
        f"default-src 'none'; script-src '{_digest(code)}'; style-src '{_digest(look)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    return _PAGE.format(
        policy=html.escape(policy, quote=True).replace("&#x27;", "'"),
        title=html.escape(_printable(title)),
        style=look,
        data=inert(data),
        script=code,
    )


def graph_to_html(graph: nx.DiGraph[Any], path: str | Path, *, title: str | None = None) -> None:
    """Write a graph as one HTML file that shows it, offline, in any browser of today.

    Tokens along the bottom, layers upward. Everything about a node that the graph holds is shown:
    with :func:`~sae_attn_plugin.graphs.enrich.enrich`, DFA by head and source, edges by head and
    QK pairs too. The file loads nothing, its content security policy allows its own script and
    style by their hashes and nothing else, and tokens are only ever text.

    Args:
        graph: from :meth:`Attribution.to_networkx`; parallel edges of heads are added up.
        path: a ``.html`` file; an existing one is replaced only once the new one is complete.
        title: of the window. None: the targets.

    Raises:
        InputError: an empty graph, an attribute that is no JSON, another ending.
        FileError: the file cannot be written.
    """
    show(graph, title=title).save(path)


@dataclass(frozen=True)
class Page:
    """A page that shows a graph: displayed by notebooks, or saved as a file.

    Attributes:
        html: the whole file.
        height: in a notebook, in pixels.
    """

    html: str = field(repr=False)
    height: int = 680

    def save(self, path: str | Path) -> None:
        """Write a ``.html`` file, whole or not at all.

        Raises:
            InputError: another ending.
            FileError: the file cannot be written.
        """
        if Path(path).suffix.lower() not in (".html", ".htm"):
            raise InputError(f"expected a path that ends in .html, got {str(path)!r}")
        data = self.html.encode("utf-8")
        write_atomically(path, lambda file: file.write(data))

    def _repr_html_(self) -> str:
        # A frame of its own, which can run its script and open links, and reach nothing else.
        return (
            f'<iframe sandbox="allow-scripts allow-popups" title="Attribution graph" '
            f'srcdoc="{html.escape(self.html, quote=True)}" '
            f'style="width:100%;height:{int(self.height)}px;border:1px solid #8886;'
            f'border-radius:10px"></iframe>'
        )


def show(graph: nx.DiGraph[Any], *, title: str | None = None, height: int = 680) -> Page:
    """A page for a graph, to look at in a notebook or to save.

    Args:
        graph: from :meth:`Run.graph` or :meth:`Attribution.to_networkx`.
        title: of the window. None: the targets.
        height: in a notebook, in pixels.

    Raises:
        InputError: an empty graph, or an attribute that is no JSON.
    """
    return Page(page_html(graph, title=title), height)


def page(run: Run, graph: nx.DiGraph[Any], *, title: str | None = None, **options: Any) -> Page:
    """A page for a graph with what the run knows besides: DFA, edges by head, QK pairs.

    Args:
        run: the run of the graph's prompt.
        graph: from :meth:`Run.graph` or :meth:`Attribution.to_networkx` on that run.
        title: of the window. None: the targets.
        options: of :func:`~sae_attn_plugin.graphs.enrich.enrich`: ``max_features``, ``heads``,
            ``qk``, ``examples``.

    Raises:
        InputError: a graph of another prompt or of other SAEs.
    """
    from sae_attn_plugin.graphs.enrich import enrich

    return show(enrich(graph, run, **options), title=title)


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode()


def inert(data: Any) -> str:
    """JSON that no parser of HTML takes for anything else: ASCII, without ``<``, ``>``, ``&``."""
    text = json.dumps(
        data, ensure_ascii=True, allow_nan=False, separators=(",", ":"), sort_keys=True
    )
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _printable(text: str) -> str:
    """Without controls, direction marks and half characters, which no title needs."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
