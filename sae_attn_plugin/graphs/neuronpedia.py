"""Attribution graphs in Neuronpedia's graph JSON, the schema 1.0.0 that circuit-tracer writes too.

What the public pages do with a file decided some choices here. They find nodes by ``jsNodeId``, so
it is unique. They drop whatever repeats one (layer, feature) at more than two thirds of the
positions, so nodes that are no features carry numbers of their own. They split the label of a logit
at ``(p=``, so every logit has one. They write their own label on token embeddings and MLP errors,
so position embeddings have a type of their own.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from sae_attn_plugin.errors import InputError
from sae_attn_plugin.nodes import TARGET_KINDS, Node, quote, unquote

if TYPE_CHECKING:
    import networkx as nx

__all__ = ["to_neuronpedia"]

_URL = re.compile(
    r"(?P<base>https://www\.neuronpedia\.org/(?P<model>[^/]+)/(?P<layer>\d+)-(?P<set>[^/]+))/\d+"
)
# kind -> feature_type; what reads "error" is drawn as one and has no page of its own
_TYPES = {
    "attn": "lorsa",
    "attn_err": "lorsa error",
    "attn_bias": "bias",
    "head": "lorsa error",  # no dictionary, hence all of it unexplained
    "mlp": "mlp reconstruction error",
    "tc": "cross layer transcoder",  # the pages' name for MLP features of any transcoder
    "tc_skip": "bias",
    "tc_err": "mlp reconstruction error",
    "tc_bias": "bias",
    "mlp_sae": "cross layer transcoder",
    "mlp_sae_err": "mlp reconstruction error",
    "mlp_sae_bias": "bias",
    # The pages know no features of the residual stream; these are drawn as features of the MLP
    # before it, with numbers and ids of their own.
    "resid": "cross layer transcoder",
    "resid_err": "mlp reconstruction error",
    "resid_bias": "bias",
    "resid_mid": "cross layer transcoder",
    "resid_mid_err": "mlp reconstruction error",
    "resid_mid_bias": "bias",
    "embed": "embedding",
    "pos": "position embedding",
    "logit": "logit",
    "logit_diff": "logit",
    "direction": "logit",
    "score": "logit",
    "const": "bias",
    "super": "supernode",
}


def to_neuronpedia(
    graph: nx.DiGraph[Any],
    *,
    slug: str | None = None,
    scan: str | None = None,
    source_set: str | None = None,
    no_feature: int | None = None,
    cantor: bool = True,
    create_time_ms: int | None = None,
) -> dict[str, Any]:
    """A graph as a Neuronpedia document (schema 1.0.0); the same graph gives the same document.

    Attention features are of the type ``"lorsa"``, the pages' attention features, those of
    transcoders and MLP SAEs of the type ``"cross layer transcoder"``, with numbers paired as Cantor
    does (``schema_version`` 1). ``influence`` is cumulative, as the pages' slider
    wants it: the share of the influence in the file that a node holds together with those above it,
    so small means important; it is None on targets, which are always shown. The extra keys
    ``sae_attn_id`` and ``sae_attn_kind`` say what a node is; links of a graph by head carry
    ``by_head``.

    Groups in ``graph.graph["supernodes"]``, a list of ``{"name": ..., "members": [node ids]}``, are
    the page's supernodes.

    A logit's label ends in its probability, or in ``(p=n/a)`` where the node holds none, as a logit
    difference or a direction.

    Args:
        graph: from :meth:`Attribution.to_networkx`; parallel edges are summed.
        slug: the graph's short name in addresses. None: from the prompt and a digest of the graph.
        scan: the model's name on Neuronpedia. None: as the features' Neuronpedia addresses say,
            else the last part of the model's name.
        source_set: the features' source set on Neuronpedia, such as ``"att-kk"``. None: as their
            addresses say, else none, and the pages show no examples.
        no_feature: what stands as the feature of error nodes. circuit-tracer's reader refuses None
            and takes -1.
        cantor: whether a feature's number is Cantor's pair of layer and feature, which the schema
            calls version 1 and the public pages read. False: the feature's own number, and no
            schema version.
        create_time_ms: time of creation, milliseconds since 1970. None: left out.

    Raises:
        InputError: no prompt tokens, a position outside them, a number that is not finite, or
            addresses of several models or source sets where one has to be named.
    """
    from sae_attn_plugin.graphs.files import checked

    graph = checked(graph, "Neuronpedia JSON")
    known = graph.graph
    tokens = known.get("tokens")
    if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
        raise InputError("the graph has no prompt: its attribute 'tokens' is no list of strings")
    nodes = {name: Node.parse(name) for name in graph}
    for name, node in nodes.items():
        if node.position >= len(tokens):
            raise InputError(f"the node {name} is outside the prompt of {len(tokens)} tokens")
    urls = {
        name: match
        for name, url in graph.nodes(data="neuronpedia")
        if url and (match := _URL.fullmatch(str(url)))
    }
    sources = list(urls.values())
    of_mlps = [match for name, match in urls.items() if nodes[name].kind in ("tc", "mlp_sae")]
    of_attention = [match for name, match in urls.items() if nodes[name].kind == "attn"]
    if scan is None:
        scan = _the_one(sources, "model", "scan") or _model_name(known.get("model"))
    if source_set is None:
        source_set = _the_one(of_attention, "set", "source_set")
    mlp_set = _the_one(of_mlps, "set", None)
    links = _links(graph)
    writer = _Writer(graph, nodes, no_feature, cantor)
    document = {
        "metadata": {
            "slug": slug if slug is not None else "",
            "scan": scan,
            "transcoder_list": [],
            "prompt_tokens": tokens,
            "prompt": _text(known.get("prompt"), "".join(tokens)),
            "schema_version": 1,
            "info": _info(sources, create_time_ms),
            "generation_settings": _generation_settings(known),
        },
        "qParams": {
            "pinnedIds": [], "supernodes": _supernodes(known, writer.ids), "linkType": "both",
            "clickedId": "", "sg_pos": "",
        },
        "nodes": [writer.node(name) for name in graph],
        "links": [
            {"source": writer.ids[source], "target": writer.ids[target], **link}
            for (source, target), link in links.items()
        ],
    }  # fmt: skip
    metadata = document["metadata"]
    if not cantor:
        del metadata["schema_version"]
    details = {"neuronpedia_lorsa_source_set": source_set, "neuronpedia_source_set": mlp_set}
    if known_details := {key: value for key, value in details.items() if value is not None}:
        metadata["feature_details"] = known_details
    if isinstance(pruning := known.get("pruning"), dict):
        metadata["pruning_settings"] = _pruning_settings(pruning)
    if slug is None:
        metadata["slug"] = _slug(document)
    return document


def cantor_pair(layer: int, feature: int) -> int:
    """One number for a layer and a feature: ``(L + f)(L + f + 1) / 2 + f``."""
    return (layer + feature) * (layer + feature + 1) // 2 + feature


# -- nodes and links -----------------------------------------------------------------------------


class _Writer:
    def __init__(
        self, graph: nx.DiGraph[Any], nodes: dict[str, Node], no_feature: int | None, cantor: bool
    ) -> None:
        self.graph = graph
        self.cantor = cantor
        self.nodes = nodes
        self.no_feature = no_feature
        self.tokens = graph.graph["tokens"]
        token_ids = graph.graph.get("token_ids")
        fits = isinstance(token_ids, list) and len(token_ids) == len(self.tokens)
        self.token_ids: Any = token_ids if fits else ["token"] * len(self.tokens)
        named = graph.graph.get("targets")
        self.targets = set(named if isinstance(named, list) else ()) | {
            name for name, node in nodes.items() if node.kind in TARGET_KINDS
        }
        layers = [node.layer for node in nodes.values() if node.layer is not None]
        saes = graph.graph.get("saes")
        layers += [int(key) for key in (saes if isinstance(saes, dict) else ()) if key.isdecimal()]
        self.top = 1 + max(layers, default=0)  # the row of the logits
        # Labels of logits may hold anything, so their place in the graph stands for them.
        self.place = {name: i for i, name in enumerate(nodes)}
        self.ids = {name: self.node_id(name) for name in nodes}
        self.cumulative = self._cumulative_influence()

    def node_id(self, name: str) -> str:
        """Typed, hence free of collisions: ``5_lor_7515_10``, ``5_error_attn_10``, ``E_335_4``."""
        node = self.nodes[name]
        match node.kind:
            case "attn":
                body = f"{node.layer}_lor_{node.feature}"
            case "attn_err":
                body = f"{node.layer}_error_attn"
            case "attn_bias":
                body = f"{node.layer}_bias_attn"
            case "head":
                body = f"{node.layer}_head_{node.head}"
            case "mlp" | "tc_err" | "mlp_sae_err":
                body = f"{node.layer}_error_mlp"
            case "tc" | "mlp_sae":  # one dictionary for each MLP
                body = f"{node.layer}_{node.feature}"
            case "tc_skip":
                body = f"{node.layer}_skip_mlp"
            case "resid" | "resid_mid":
                body = f"{node.layer}_{node.kind.replace('_', '-')}_{node.feature}"
            case "tc_bias" | "mlp_sae_bias":
                body = f"{node.layer}_bias_mlp"
            case "embed":
                body = f"E_{self.token_ids[node.position]}"
            case "pos":
                body = "E_pos"
            case kind:
                body = f"{self.layer(name)}_{kind.replace('_', '-')}_{self.place[name]}"
        return f"{body}_{node.position}"

    def layer(self, name: str) -> str:
        node = self.nodes[name]
        if node.kind in ("embed", "pos"):
            return "E"
        of = node.of or node
        return str(self.top if of.layer is None else of.layer)

    def feature(self, name: str) -> int | None:
        node = self.nodes[name]
        match node:
            case Node(layer=int(layer), feature=int(feature)):
                return cantor_pair(layer, feature) if self.cantor else feature
            case Node(kind="embed"):
                return node.position
            case Node(kind="logit", label=str(label)):
                (token,) = unquote(label)
                if isinstance(token, int):
                    return token
        if "error" in _TYPES[node.kind]:
            return self.no_feature  # the pages tell errors apart by position
        return -2 - self.place[name]

    def label(self, name: str) -> str:
        """What the pages show."""
        node = self.nodes[name]
        token = quote(self.tokens[node.position])
        match node.kind:
            case "attn" | "tc" | "mlp_sae" | "resid" | "resid_mid":
                return _text(self.graph.nodes[name].get("label"), "")
            case "attn_err":
                return f"Err: attention {node.layer} {token}"
            case "attn_bias":
                return f"Bias: attention {node.layer} {token}"
            case "head":
                return f"Head {node.layer}.{node.head} {token}"
            case "mlp":
                return f"MLP {node.layer} {token}"
            case "tc_skip":
                return f"Skip: MLP {node.layer} {token}"
            case "tc_err" | "mlp_sae_err":
                return f"Err: MLP {node.layer} {token}"
            case "tc_bias" | "mlp_sae_bias":
                return f"Bias: MLP {node.layer} {token}"
            case "resid_err" | "resid_mid_err" | "resid_bias" | "resid_mid_bias":
                what = "Err" if node.kind.endswith("_err") else "Bias"
                before = "MLP" if node.kind.startswith("resid_mid") else "layer"
                return f"{what}: stream before {before} {node.layer} {token}"
            case "embed":
                return f"Emb: {token}"
            case "pos":
                return f"Pos: {node.position}"
            case "const":
                return f"Constant: {node.of}"
            case "score":
                shown = f"{quote(self.tokens[node.key or 0])}, key {node.key}"
                side = "" if node.label is None else f" ({node.label} side)"
                return f"Score of head {node.layer}.{node.head}: {token} looks at {shown}{side}"
            case "super":
                return str(unquote(node.label or "")[0])
        assert node.label is not None
        parts = [
            f'"{part}"' if isinstance(part, str) else f"#{part}" for part in unquote(node.label)
        ]
        probability = self.probability(name)
        chance = "n/a" if probability is None else f"{probability:.3f}"
        shown = " - ".join(parts).replace("(p=", "(p =")  # a token may read so
        what = "Direction" if node.kind == "direction" else "Output"
        return f"{what} {shown} (p={chance})"

    def probability(self, name: str) -> float | None:
        value: Any = self.graph.nodes[name].get("probability")
        return float(value) if type(value) in (int, float) else None

    def _cumulative_influence(self) -> dict[str, float]:
        influence: Any = self.graph.nodes(data="influence")
        found = {
            name: value
            for name, value in influence
            if name not in self.targets and type(value) in (int, float)
        }
        total = math.fsum(found.values())
        if total <= 0:
            return {}
        cumulative, so_far = {}, 0.0
        for name in sorted(found, key=lambda name: -found[name]):  # stable: ties in graph order
            so_far += found[name]
            cumulative[name] = min(so_far / total, 1.0)
        return cumulative

    def node(self, name: str) -> dict[str, Any]:
        node, attributes = self.nodes[name], self.graph.nodes[name]
        row: dict[str, Any] = {
            "node_id": self.ids[name],
            "feature": self.feature(name),
            "layer": self.layer(name),
            "ctx_idx": node.position,
            "feature_type": _TYPES[node.kind],
            "jsNodeId": self.ids[name],
            "clerp": self.label(name),
            "influence": self.cumulative.get(name),
            "is_target_logit": name in self.targets and node.kind in TARGET_KINDS,
            "token": self.tokens[node.position],
            "sae_attn_id": name,
            "sae_attn_kind": node.kind,
        }
        if (value := attributes.get("activation")) is not None:
            row["activation"] = _number(value, f"the activation of {name}")
        if (probability := self.probability(name)) is not None:
            row["token_prob"] = probability
        if node.feature is not None:
            row["sae_attn_feature"] = node.feature
        kept = ("pre_activation", "constant", "pruned_in", "neuronpedia")
        row |= {key: attributes[key] for key in kept if key in attributes}
        if "influence" in attributes:
            row["sae_attn_influence"] = attributes["influence"]
        return row


def _links(graph: nx.DiGraph[Any]) -> dict[tuple[str, str], dict[str, Any]]:
    """One link per pair, as the pages expect: heads summed, and kept beside the sum."""
    if not graph.is_multigraph():
        return {
            (source, target): {
                "weight": _number(weight, f"the weight of {source} -> {target}"),
            }
            for source, target, weight in graph.edges(data="weight")
        }
    weights: dict[tuple[str, str], list[float]] = {}
    by_head: dict[tuple[str, str], dict[str, float]] = {}
    edges: Any = graph.edges
    for source, target, key, attributes in edges(keys=True, data=True):
        weights.setdefault((source, target), []).append(attributes["weight"])
        if "head" in attributes:  # edges into logits pass through none
            by_head.setdefault((source, target), {})[str(key)] = attributes["weight"]
    return {
        pair: {
            "weight": _number(math.fsum(parallel), f"the weight of {' -> '.join(pair)}"),
            **({"by_head": by_head[pair]} if pair in by_head else {}),
        }
        for pair, parallel in weights.items()
    }


# -- metadata ------------------------------------------------------------------------------------


def _supernodes(known: dict[str, Any], ids: dict[str, str]) -> list[list[str]]:
    """The groups of ``graph["supernodes"]`` whose members the graph still has."""
    groups = known.get("supernodes")
    rows = []
    for group in groups if isinstance(groups, list) else ():
        if isinstance(group, dict) and isinstance(group.get("members"), list):
            members = [ids[name] for name in group["members"] if name in ids]
            rows += [[str(group.get("name", "")), *members]] if members else []
    return rows


def _info(sources: Iterable[re.Match[str]], create_time_ms: int | None) -> dict[str, Any]:
    from sae_attn_plugin import __version__

    info: dict[str, Any] = {
        "generator": {"name": "sae-attn-plugin", "version": __version__},
        "source_urls": sorted({match["base"] for match in sources}),
    }
    if create_time_ms is not None:
        info["create_time_ms"] = _number(create_time_ms, "create_time_ms")
    return info


def _generation_settings(known: dict[str, Any]) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    if type(budget := known.get("node_budget")) is int:
        settings["max_feature_nodes"] = budget
    elsewhere = ("tokens", "prompt", "pruning")
    # In a room of its own, so that no name of ours means something else there.
    settings["sae_attn"] = {key: known[key] for key in sorted(known) if key not in elsewhere}
    return settings


def _pruning_settings(pruning: dict[str, Any]) -> dict[str, Any]:
    names = {"nodes": "node_threshold", "edges": "edge_threshold"}
    return {
        names.get(key, key): pruning[key] for key in sorted(pruning) if pruning[key] is not None
    }


def _the_one(sources: Iterable[re.Match[str]], group: str, option: str | None) -> str | None:
    """What all sources share; several are refused, or none is named where no option picks one."""
    found = sorted({match[group] for match in sources})
    if len(found) > 1 and option is None:
        return None
    if len(found) > 1:
        raise InputError(
            f"the features are of several sources on Neuronpedia ({', '.join(found)}), and a graph "
            f"names one; pass {option}="
        )
    return found[0] if found else None


def _model_name(model: Any) -> str:
    name = re.split(r"[/\\]", model.rstrip("/\\"))[-1] if isinstance(model, str) else ""
    if not name:
        raise InputError("the graph does not name its model; pass scan=, its name on Neuronpedia")
    return name


def _slug(document: dict[str, Any]) -> str:
    words = re.findall(r"[a-z0-9]+", document["metadata"]["prompt"].lower())
    text = json.dumps(document, sort_keys=True, ensure_ascii=True)
    digest = hashlib.sha256(text.encode("ascii")).hexdigest()[:8]
    return f"{'-'.join(words)[:40].strip('-') or 'graph'}-{digest}"


def _text(value: Any, otherwise: str) -> str:
    return value if isinstance(value, str) else otherwise


def _number(value: Any, what: str) -> Any:
    if type(value) not in (int, float) or not math.isfinite(value):
        raise InputError(f"{what} is {value!r}; expected a finite number")
    return value
