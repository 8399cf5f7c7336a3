"""What the explorer can ask: JSON in, JSON out. Every question names its prompt, so none depends on
an earlier one, and a page that was left open goes on after the server was started anew."""

from __future__ import annotations

import base64
import math
import re
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sae_attn_plugin.errors import InputError
from sae_attn_plugin.explore.jobs import Progress
from sae_attn_plugin.interventions.edits import AblateFeature, ScaleFeature, SetFeature
from sae_attn_plugin.nodes import Feature, Logit, LogitDiff, Node, Target

if TYPE_CHECKING:
    import networkx as nx

    from sae_attn_plugin.lens import FeatureLens, Run

__all__ = ["KINDS", "Questions"]

_KEPT_RUNS = 4
_TOP_TOKENS = 12
_LONGEST_PROMPT = 20_000  # characters; the model's context is the limit that counts
_MOST_EDITS, _MOST_NEW_TOKENS, _MOST_NODES = 64, 60, 5_000
_SOURCES = 200  # writers listed at a source position
_EXPORTS = {  # format -> ending
    "json": ".json",
    "native": ".safetensors",
    "graphml": ".graphml",
    "gexf": ".gexf",
    "neuronpedia": ".json",
    "mib": ".json",
    "html": ".html",
}
Question = Callable[[Mapping[str, Any], Progress], Any]


class Questions:
    """A lens that answers JSON with JSON.

    Raises:
        SaeAttnError: from every question, what was wrong with it.
    """

    def __init__(self, lens: FeatureLens) -> None:
        self.lens = lens
        self._runs: OrderedDict[tuple[int, ...], Run] = OrderedDict()
        self._lock = threading.Lock()
        self.kinds: dict[str, Question] = {
            "open": self.open,
            "dfa": self.dfa,
            "sources": self.sources,
            "qk": self.qk,
            "graph": self.graph,
            "export": self.export,
            "intervene": self.intervene,
        }

    def info(self) -> dict[str, Any]:
        """The model, for the page's title."""
        g = self.lens.backend.geometry
        return {
            "model": str(g.model_name),
            "host": self.lens.backend.host,
            "n_layers": g.n_layers,
            "n_heads": g.n_heads,
            "n_ctx": g.n_ctx,
            "saes": {str(layer): d.d_sae for layer, d in self.lens.dictionaries.items()},
            "formats": list(_EXPORTS),
        }

    def ask(self, kind: str, asked: Mapping[str, Any], progress: Progress) -> Any:
        """Answer one question.

        Raises:
            InputError: an unknown kind, among others.
        """
        if kind not in self.kinds:
            raise InputError(f"unknown question {kind!r:.60}; known: {', '.join(self.kinds)}")
        return self.kinds[kind](asked, progress)

    # -- the questions ---------------------------------------------------------------------------

    def open(self, asked: Mapping[str, Any], progress: Progress) -> dict[str, Any]:
        """Tokens, active features of every layer and position, the most likely next tokens."""
        run = self._run(asked, progress)
        progress(0.6, "reading the features")
        frame = run.features()
        columns = ("layer", "position", "feature", "activation", "pre_activation")
        urls = {
            layer: f"https://www.neuronpedia.org/{d.metadata['neuronpedia_id']}"
            for layer, d in self.lens.dictionaries.items()
            if d.metadata.get("neuronpedia_id")
        }
        return {
            "tokens": list(run.token_strings),
            "layers": list(self.lens.dictionaries),
            "features": [
                [_short(value) for value in row]
                for row in zip(*(frame[name].tolist() for name in columns), strict=True)
            ],
            "neuronpedia": {str(layer): url for layer, url in urls.items()},
            "next": self._top(run.logits[0, -1]),
        }

    def dfa(self, asked: Mapping[str, Any], progress: Progress) -> dict[str, Any]:
        """A feature's pre-activation, by head and source position."""
        run = self._run(asked, progress)
        layer, feature, position = _place(asked)
        found = run.dfa(layer, feature, position)
        split = found.by_head_and_source[:, : found.position + 1].double()
        active = run.features(layer=layer, position=position)
        found_at = active["feature"].tolist()
        values = active["activation"].tolist()
        activation = dict(zip(found_at, values, strict=True)).get(feature, 0.0)
        return {
            "layer": found.layer,
            "feature": found.feature,
            "position": found.position,
            "by_head_and_source": [[_short(v) for v in row] for row in split.tolist()],
            "constant": _short(found.constant),
            "pre_activation": _short(found.pre_activation),
            "residual": _short(found.residual),
            "activation": _short(activation),
        }

    def sources(self, asked: Mapping[str, Any], progress: Progress) -> dict[str, Any]:
        """Who writes what a feature reads at one source position, strongest first."""
        run = self._run(asked, progress)
        layer, feature, position = _place(asked)
        source = run.resolve_position(_int(asked, "source"))
        progress(0.4, "attributing the feature")
        attribution = run.attribute(Feature(layer, feature, position), node_budget=0)
        activations = attribution.nodes["activation"].to_dict()
        names, weights = (attribution.edges[name].tolist() for name in ("source", "weight"))
        here = [
            (name, weight)
            for name, weight in zip(names, weights, strict=True)
            if Node.parse(name).position == source
        ]
        here.sort(key=lambda pair: -abs(pair[1]))
        rows = []
        for name, weight in here[:_SOURCES]:
            row: dict[str, Any] = {"id": str(name), "weight": _short(weight)}
            if math.isfinite(activations[name]):
                row["activation"] = _short(activations[name])
            rows.append(row)
        ledger = attribution.ledger.iloc[0]
        return {
            "source": source,
            "rows": rows,
            "left_out": max(len(here) - _SOURCES, 0),
            "here": _short(math.fsum(weight for _, weight in here)),
            "constant": _short(float(ledger["constant"])),
            "value": _short(float(ledger["value"])),
        }

    def qk(self, asked: Mapping[str, Any], progress: Progress) -> dict[str, Any]:
        """Why a head looks at a key: its score, term by term."""
        run = self._run(asked, progress)
        names = ("layer", "head", "query", "key")
        found = run.qk(*(_int(asked, name) for name in names))
        progress(0.7, "sorting its terms")
        top = found.top(20)
        return {
            **{name: getattr(found, name) for name in names},
            "score": _short(found.score),
            "relative_score": _short(found.relative_score),
            "pattern": _short(found.pattern),
            "n_terms": len(found.query_nodes) * len(found.key_nodes),
            "row": [
                [position, _short(weight)]
                for position, weight in zip(found.row_keys, found.row_pattern.tolist(), strict=True)
            ],
            "terms": [
                [str(query), str(key), _short(float(weight))]
                for query, key, weight in zip(
                    *(top[name].tolist() for name in ("query_node", "key_node", "weight")),
                    strict=True,
                )
            ],
        }

    def graph(self, asked: Mapping[str, Any], progress: Progress) -> dict[str, Any]:
        """The attribution graph, as the page component takes it."""
        from sae_attn_plugin.graphs.html import page_data

        run, graph = self._graph(asked, progress)
        progress(0.8, "reading what its nodes read")
        graph = self._enriched(graph, run)
        progress(0.95, "packing")
        return {"data": page_data(graph)}

    def export(self, asked: Mapping[str, Any], progress: Progress) -> dict[str, Any]:
        """The same graph as a file."""
        from sae_attn_plugin.graphs.files import save

        wanted = _text(asked, "format", 20)
        if wanted not in _EXPORTS:
            raise InputError(f"unknown format {wanted!r}; known: {', '.join(_EXPORTS)}")
        run, graph = self._graph(asked, progress)
        progress(0.8, "writing the file")
        ending = _EXPORTS[wanted]
        if wanted == "html":
            graph = self._enriched(graph, run)
        options = {"run": run} if wanted == "mib" else {}
        with tempfile.TemporaryDirectory(prefix="sae-attn-") as folder:
            path = Path(folder) / f"graph{ending}"
            save(graph, path, format=None if wanted == "html" else wanted, **options)
            data = path.read_bytes()
        return {"name": f"graph-{wanted}{ending}", "base64": base64.b64encode(data).decode("ascii")}

    def intervene(self, asked: Mapping[str, Any], progress: Progress) -> dict[str, Any]:
        """Ablate, scale or set features: the next token and the text, before and after."""
        run = self._run(asked, progress)
        given = asked.get("edits")
        if not isinstance(given, list) or not 1 <= len(given) <= _MOST_EDITS:
            raise InputError(f"expected 1 to {_MOST_EDITS} edits")
        edits = [_edit(one) for one in given]
        n = _int(asked, "new_tokens", default=0)
        if not 0 <= n <= _MOST_NEW_TOKENS:
            raise InputError(f"new_tokens={n}: expected 0 to {_MOST_NEW_TOKENS}")
        n = min(n, self.lens.backend.geometry.n_ctx - run.tokens.shape[1])
        progress(0.3, "running the model with the edits")
        result = self.lens.intervene(run, edits, max_new_tokens=max(n, 0))
        clean, edited = run.logits[0, -1].double(), result.logits[0, -1].double()
        first, second = clean.log_softmax(-1), edited.log_softmax(-1)
        shown = torch.cat([clean.topk(_TOP_TOKENS).indices, edited.topk(_TOP_TOKENS).indices])
        order = sorted(set(shown.tolist()), key=lambda t: -max(float(first[t]), float(second[t])))
        answer: dict[str, Any] = {
            "tokens": [
                {
                    "token": self._token(number),
                    "clean": _short(float(clean[number])),
                    "edited": _short(float(edited[number])),
                    "clean_probability": _short(float(first[number].exp())),
                    "edited_probability": _short(float(second[number].exp())),
                }
                for number in order
            ],
            "kl": _short(float((first.exp() * (first - second)).sum())),
        }
        if n > 0:
            answer["clean_text"], answer["edited_text"] = result.continuations()[0]
        return answer

    # -- inside ----------------------------------------------------------------------------------

    def _run(self, asked: Mapping[str, Any], progress: Progress) -> Run:
        prompt = _text(asked, "prompt", _LONGEST_PROMPT)
        if not prompt:
            raise InputError("the prompt is empty; type some text")
        tokens = self.lens.to_tokens(prompt)
        key = tuple(tokens[0].tolist())
        if len(key) > self.lens.backend.geometry.n_ctx:
            raise InputError(
                f"the prompt has {len(key)} tokens, and the model takes at most "
                f"{self.lens.backend.geometry.n_ctx}"
            )
        with self._lock:
            if key in self._runs:
                self._runs.move_to_end(key)
                return self._runs[key]
        progress(0.1, "running the prompt")
        run = self.lens.run(prompt)
        with self._lock:
            self._runs[key] = run
            while len(self._runs) > _KEPT_RUNS:
                self._runs.popitem(last=False)
        return run

    def _graph(self, asked: Mapping[str, Any], progress: Progress) -> tuple[Run, nx.DiGraph[Any]]:
        run = self._run(asked, progress)
        target = _target(asked.get("target"))
        share = _number(asked, "nodes", 0.8)
        edges = _number(asked, "edges", 0.98)
        most = _int(asked, "max_nodes", default=200)
        if not 1 <= most <= _MOST_NODES:
            raise InputError(f"max_nodes={most}: expected 1 to {_MOST_NODES}")

        def done(layers: int, of: int) -> None:
            progress(0.2 + 0.5 * layers / of, f"attributing: {layers} of {of} layers")

        attribution = run.attribute(target, progress=done)
        progress(0.72, "pruning")
        graph = attribution.prune(share, edges, most).to_networkx()
        graph.graph["pruning"] = {"nodes": share, "edges": edges, "max_nodes": most}
        return run, graph

    def _enriched(self, graph: nx.DiGraph[Any], run: Run) -> nx.DiGraph[Any]:
        from sae_attn_plugin.errors import UnsupportedError
        from sae_attn_plugin.graphs.enrich import enrich

        try:
            return enrich(graph, run, max_features=150)
        except UnsupportedError:  # scores that are not known here
            return enrich(graph, run, max_features=150, qk=False)

    def _top(self, logits: torch.Tensor) -> list[dict[str, Any]]:
        probabilities = logits.double().softmax(-1)
        top = probabilities.topk(min(_TOP_TOKENS, len(probabilities)))
        return [
            {
                "token": self._token(number),
                "logit": _short(float(logits[number])),
                "probability": _short(p),
            }
            for number, p in zip(top.indices.tolist(), top.values.tolist(), strict=True)
        ]

    def _token(self, number: int) -> dict[str, Any]:
        return {"id": number, "text": str(self.lens.tokenizer.decode([number]))}


KINDS = ("open", "dfa", "sources", "qk", "graph", "export", "intervene")


# -- reading what was asked ------------------------------------------------------------------------


def _short(value: float) -> float | int | None:
    """Seven digits, more than float32 holds; what is not finite has no JSON."""
    if isinstance(value, int):
        return value
    return float(f"{value:.7g}") if math.isfinite(value) else None


def _int(asked: Mapping[str, Any], name: str, default: int | None = None) -> int:
    value = asked.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int) or not -(2**31) <= value < 2**31:
        raise InputError(f"{name} is {value!r:.60}; expected a whole number")
    return value


def _number(asked: Mapping[str, Any], name: str, default: float | None = None) -> float:
    value = asked.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise InputError(f"{name} is {value!r:.60}; expected a number")
    return float(value)


def _text(asked: Mapping[str, Any], name: str, longest: int) -> str:
    value = asked.get(name)
    if not isinstance(value, str):
        raise InputError(f"{name} is missing; expected a text")
    if len(value) > longest:
        raise InputError(f"{name} has {len(value)} characters; at most {longest} are taken")
    if any("\ud800" <= c <= "\udfff" for c in value):
        raise InputError(f"{name} holds half a character, which no tokenizer takes")
    return value


def _place(asked: Mapping[str, Any]) -> tuple[int, int, int]:
    return _int(asked, "layer"), _int(asked, "feature"), _int(asked, "position")


def _token_of(given: Mapping[str, Any], name: str) -> str | int:
    """``#5335`` is a token id, anything else the token itself."""
    text = _text(given, name, 200)
    if not text:
        raise InputError(f"{name} is empty; expected a token, such as ' Mary' with its space")
    return int(text[1:]) if re.fullmatch(r"#\d{1,9}", text) else text


def _target(given: Any) -> Target | None:
    if given is None:
        return None
    if not isinstance(given, Mapping):
        raise InputError("expected a target, or none for the most likely next tokens")
    if "node" in given:
        node = Node.parse(_text(given, "node", 200))
        if node.kind != "attn" or node.layer is None or node.feature is None:
            raise InputError(f"{node} is no attention feature; expected one, or a token")
        return Feature(node.layer, node.feature, node.position)
    position = _int(given, "position", default=-1)
    if given.get("wrong"):
        return LogitDiff(_token_of(given, "token"), _token_of(given, "wrong"), position)
    return Logit(_token_of(given, "token"), position)


def _edit(given: Any) -> AblateFeature | ScaleFeature | SetFeature:
    if not isinstance(given, Mapping):
        raise InputError("expected an edit: an object with layer, feature, position and how")
    layer, feature = _int(given, "layer"), _int(given, "feature")
    position = None if given.get("position") is None else _int(given, "position")
    match given.get("how"):
        case "ablate":
            return AblateFeature(layer, feature, position)
        case "scale":
            return ScaleFeature(layer, feature, position, _number(given, "amount"))
        case "set":
            return SetFeature(layer, feature, position, _number(given, "amount"))
        case how:
            raise InputError(f"how is {how!r:.40}; expected 'ablate', 'scale' or 'set'")
