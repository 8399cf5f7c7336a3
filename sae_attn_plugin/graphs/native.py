"""The native form: one safetensors file that holds a graph or a whole attribution, exactly.

One file, so that numbers and their description cannot come apart. Numbers are its tensors, bit for
bit; the rest is JSON in the file's metadata, under the one key ``sae_attn`` (safetensors writes
several keys in no fixed order), with a SHA-256 of the JSON and of every tensor, so that damage is
found and named.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from sae_attn_plugin.errors import InputError
from sae_attn_plugin.graphs.files import (
    Damaged,
    check_version,
    graph_of,
    node_link,
    plain,
    refuse_constant,
)
from sae_attn_plugin.nodes import Node

if TYPE_CHECKING:
    import networkx as nx
    import torch

    from sae_attn_plugin.attribution.table import Attribution
    from sae_attn_plugin.attribution.writers import WriterTable

FORMAT = "sae-attn"
VERSION = 1
_KEY = "sae_attn"
_INT64 = range(-(2**63), 2**63)


def write(content: nx.DiGraph[Any] | Attribution, heads: bool = True) -> bytes:
    """The file of a graph or an attribution; the same content gives the same bytes.

    Args:
        content: what to write.
        heads: of an attribution, whether to write every edge's split by head, ``[edge, head]``.
            Without it, ``edges_by_head()`` of what is loaded is refused.
    """
    from sae_attn_plugin.attribution.table import Attribution

    if isinstance(content, Attribution):
        document, tensors = _pack_attribution(content, heads)
        return _dump("attribution", document, tensors)
    document, tensors = _pack_graph(node_link(content, "safetensors"))
    return _dump("graph", document, tensors)


def read(data: bytes) -> nx.DiGraph[Any] | Attribution:
    """What :func:`write` wrote.

    Raises:
        Damaged: it is foreign or damaged; says where.
    """
    kind, document, tensors = _parse(data)
    unpack = {"graph": _unpack_graph, "attribution": _unpack_attribution}.get(kind)
    if unpack is None:
        raise Damaged(f"it holds a {kind!r}; expected a graph or an attribution")
    try:
        return unpack(document, _Tensors(tensors))
    except (KeyError, TypeError, AttributeError, IndexError, ValueError, OverflowError) as error:
        # The digests held, so it was written like this: by another program, or another version.
        raise Damaged(f"its {kind} is incomplete: {type(error).__name__}: {error}") from error


# -- the file ------------------------------------------------------------------------------------


def _dump(kind: str, document: Any, tensors: Mapping[str, torch.Tensor]) -> bytes:
    from safetensors.torch import save

    text = _text(document)
    tensors = {name: tensors[name].contiguous() for name in sorted(tensors)}
    header = {
        "format": FORMAT,
        "version": VERSION,
        "kind": kind,
        "document": document,
        "sha256": {"document": _digest(text.encode("ascii"))}
        | {f"tensor {name}": _digest(_bytes(tensor)) for name, tensor in tensors.items()},
    }
    return save(tensors, metadata={_KEY: _text(header)})


def _parse(data: bytes) -> tuple[str, Any, dict[str, torch.Tensor]]:
    from safetensors import SafetensorError
    from safetensors.torch import load

    size = int.from_bytes(data[:8], "little")
    if len(data) < 8 or size > len(data) - 8:
        raise Damaged(f"not a safetensors file, or cut short: it has {len(data)} bytes")
    try:
        outer = json.loads(data[8 : 8 + size])
    except (ValueError, RecursionError) as error:
        raise Damaged(f"not a safetensors file: its header is no JSON ({error})") from error
    metadata = outer.get("__metadata__") if isinstance(outer, dict) else None
    if not isinstance(metadata, dict) or not isinstance(metadata.get(_KEY), str):
        raise Damaged(f"not a file of this package: its metadata lack {_KEY!r}")
    try:
        header = json.loads(metadata[_KEY], parse_constant=refuse_constant)
    except (ValueError, RecursionError) as error:
        raise Damaged(f"the metadata {_KEY!r} are no JSON ({error})") from error
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise Damaged(f'not a file of this package: the marker "format": "{FORMAT}" is missing')
    check_version(header.get("version"), VERSION)
    digests = header.get("sha256")
    if not isinstance(digests, dict) or "document" not in header:
        raise Damaged("its metadata lack the document or its digests")
    try:
        tensors = load(data)
    except (SafetensorError, ValueError) as error:
        raise Damaged(f"cut short or damaged: {error}") from error
    found = {"document": _digest(_text(header["document"]).encode("ascii"))}
    found |= {f"tensor {name}": _digest(_bytes(tensor)) for name, tensor in tensors.items()}
    for name in sorted(digests.keys() | found.keys()):
        if digests.get(name) != found.get(name):
            state = "missing" if name not in found else "damaged: its SHA-256 does not fit"
            raise Damaged(f"the {name} is {state}")
    return str(header.get("kind")), header["document"], tensors


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True, allow_nan=False, ensure_ascii=True)


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _bytes(tensor: torch.Tensor) -> bytes:
    import torch

    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


class _Tensors:
    """Tensors by name, as numpy arrays; says which is missing."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self.tensors = tensors

    def __getitem__(self, name: str) -> np.ndarray:
        return self.tensor(name).numpy()

    def tensor(self, name: str) -> torch.Tensor:
        if name not in self.tensors:
            raise Damaged(f"the tensor {name} is missing")
        return self.tensors[name]


def _tensor(values: Any) -> torch.Tensor:
    import torch

    return torch.from_numpy(np.ascontiguousarray(values))


# -- graphs: columns of one type as tensors, the rest as JSON --------------------------------------


def _pack_graph(link: dict[str, Any]) -> tuple[Any, dict[str, torch.Tensor]]:
    tensors: dict[str, torch.Tensor] = {}
    names = [node.pop("id") for node in link["nodes"]]
    number = {name: i for i, name in enumerate(names)}
    ends = [[number[edge.pop(end)] for end in ("source", "target")] for edge in link["edges"]]
    tensors["edges"] = _tensor(np.array(ends, dtype=np.int64).reshape(-1, 2))
    document: dict[str, Any] = {
        "multigraph": link["multigraph"],
        "graph": link["graph"],
        "nodes": names,
        "node_attributes": _pack_columns("node", link["nodes"], tensors),
    }
    if link["multigraph"]:
        document["keys"] = [edge.pop("key") for edge in link["edges"]]
    document["edge_attributes"] = _pack_columns("edge", link["edges"], tensors)
    return document, tensors


def _pack_columns(
    what: str, rows: list[dict[str, Any]], tensors: dict[str, torch.Tensor]
) -> list[Any]:
    """Each column as ``[name, values or the dtype of its tensor, rows that have it or null]``.

    Attributes of a row keep their order: columns are listed in an order that agrees with all rows
    where there is one, and equality of dicts does not depend on it.
    """
    columns: dict[str, tuple[list[int], list[Any]]] = {}
    for i, row in enumerate(rows):
        for name, value in row.items():
            at, values = columns.setdefault(name, ([], []))
            at.append(i)
            values.append(value)
    packed = []
    for i, (name, (at, values)) in enumerate(columns.items()):
        place = f"{what}.{i}"
        body: Any = values
        if (dtype := _dtype(values)) is not None:
            body = place
            tensors[place] = _tensor(np.array(values, dtype=dtype))
        everywhere = len(at) == len(rows)
        if not everywhere:
            tensors[f"{place}.rows"] = _tensor(np.array(at, dtype=np.int64))
        packed.append([name, body, None if everywhere else f"{place}.rows"])
    return packed


def _dtype(values: list[Any]) -> Any:
    """The type of a tensor that gives every value back with its type, if there is one."""
    kinds = {type(value) for value in values}
    if kinds == {float}:
        return np.float64
    if kinds == {bool}:
        return np.bool_
    return np.int64 if kinds == {int} and all(value in _INT64 for value in values) else None


def _unpack_graph(document: Any, tensors: _Tensors) -> nx.DiGraph[Any]:
    names = document["nodes"]
    nodes: list[dict[str, Any]] = [{"id": name} for name in names]
    _unpack_columns(document["node_attributes"], nodes, tensors)
    edges: list[dict[str, Any]] = [
        {"source": names[source], "target": names[target]}
        for source, target in tensors["edges"].tolist()
    ]
    if document["multigraph"]:
        for edge, key in zip(edges, document["keys"], strict=True):
            edge["key"] = key
    _unpack_columns(document["edge_attributes"], edges, tensors)
    return graph_of(
        {
            "directed": True,
            "multigraph": document["multigraph"],
            "graph": document["graph"],
            "nodes": nodes,
            "edges": edges,
        }
    )


def _unpack_columns(columns: Iterable[Any], rows: list[dict[str, Any]], tensors: _Tensors) -> None:
    for name, body, where in columns:
        values = tensors[body].tolist() if isinstance(body, str) else body
        at = range(len(rows)) if where is None else tensors[where].tolist()
        for i, value in zip(at, values, strict=True):
            rows[i][name] = value


# -- attributions: their dataclasses field by field ------------------------------------------------


def _pack_attribution(content: Attribution, heads: bool) -> tuple[Any, dict[str, torch.Tensor]]:
    tensors: dict[str, torch.Tensor] = {}
    try:
        document = {
            "roots": [[number, str(node)] for number, node in content.roots.items()],
            "tokens": list(content.tokens),
            "provenance": plain(content.provenance, "provenance"),
            "neuronpedia": [[*key, url] for key, url in content.neuronpedia.items()],
            "probabilities": [
                [number, plain(p, "probability")] for number, p in content.probabilities.items()
            ],
            "flow": _pack_fields("flow", content.flow, tensors),
            "writers": _pack_fields("writers", _whole(content.writers), tensors),
            "heads": None,
        }
    except Damaged as error:
        raise InputError(f"the attribution cannot be saved: {error}") from None
    if heads:
        document["heads"] = layers = []
        for layer, (feature, position, source) in _edges_into_features(content).items():
            layers.append(layer)
            split = content.head_split(layer, feature, position, source)
            tensors[f"heads.{layer}"] = _tensor(split)
    return document, tensors


def _whole(writers: WriterTable) -> WriterTable:
    """With the vectors in memory, as they go into the file."""
    return dataclasses.replace(writers, vectors=writers.vectors.whole())


def _pack_fields(what: str, value: Any, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Arrays of a dataclass as tensors, the rest for the document."""
    import torch

    rest: dict[str, Any] = {}
    for field in dataclasses.fields(value):
        one = getattr(value, field.name)
        if isinstance(one, np.ndarray):
            tensors[f"{what}.{field.name}"] = _tensor(one)
        elif isinstance(one, torch.Tensor):
            tensors[f"{what}.{field.name}"] = one.detach().cpu()
        elif dataclasses.is_dataclass(one):
            rest[field.name] = _pack_fields(f"{what}.{field.name}", one, tensors)
        elif field.name == "pieces":
            for name in ("row", "source", "weight"):
                tensors[f"{what}.{name}"] = _tensor(getattr(value, name))
        elif isinstance(one, tuple):
            rest[field.name] = plain(list(one), f"{what}.{field.name}")
        else:
            rest[field.name] = plain(one, f"{what}.{field.name}")
    return rest


def _unpack_fields(
    what: str, kind: Any, rest: Mapping[str, Any], tensors: _Tensors, **parts: Any
) -> Any:
    """The dataclass again; a field that the file lacks keeps its default, if it has one.

    Args:
        parts: fields that are no arrays, already built.
    """
    values: dict[str, Any] = dict(parts)
    for field in dataclasses.fields(kind):
        name = f"{what}.{field.name}"
        if field.name in parts:
            continue
        if name in tensors.tensors:
            is_torch = str(field.type).startswith(("Float", "Int", "Tensor"))
            values[field.name] = tensors.tensor(name) if is_torch else tensors[name]
        elif field.name in rest:
            value = rest[field.name]
            values[field.name] = tuple(value) if isinstance(value, list) else value
        elif field.default is dataclasses.MISSING:
            raise Damaged(f"{name} is missing")
    return kind(**values)


def _unpack_attribution(document: Any, tensors: _Tensors) -> Attribution:
    from sae_attn_plugin.attribution.rdfa import Flow, Loose
    from sae_attn_plugin.attribution.table import Attribution
    from sae_attn_plugin.attribution.writers import WriterTable, WriterVectors

    edges = Loose(*(tensors[f"flow.{name}"] for name in ("row", "source", "weight")))
    flow = _unpack_fields("flow", Flow, document["flow"], tensors, pieces=(edges,))
    vectors = _unpack_fields(
        "writers.vectors", WriterVectors, document["writers"]["vectors"], tensors
    )
    writers = _unpack_fields("writers", WriterTable, document["writers"], tensors, vectors=vectors)
    _check_flow(flow, len(writers))
    content = Attribution(
        flow=flow,
        writers=writers,
        roots={number: Node.parse(name) for number, name in document["roots"]},
        tokens=tuple(document["tokens"]),
        provenance=document["provenance"],
        head_split=_no_heads,
        # earlier files name the layer only, since all features were of attention
        neuronpedia={
            ("attn", key[0]) if len(key) == 1 else (key[0], key[1]): url
            for *key, url in document["neuronpedia"]
        },
        probabilities=dict(document["probabilities"]),
    )
    if document["heads"] is None:
        return content
    return dataclasses.replace(content, head_split=_stored_split(content, document, tensors))


def _check_flow(flow: Any, n_writers: int) -> None:
    """That its indices point into it: numpy would take a negative one in silence."""
    edges, rows = len(flow.weight), len(flow.target)
    per_row = ("depth", "in_sum", "abs_sum", "constant", "value", "dropped")
    sizes = {"source": edges, "row": edges, "root_weight": len(flow.influence)}
    for name, size in {**sizes, **dict.fromkeys(per_row, rows)}.items():
        if getattr(flow, name).shape != (size,):
            raise Damaged(f"the tensor flow.{name} has the wrong length; expected {size}")
    if len(flow.row) and not 0 <= flow.row.min() <= flow.row.max() < rows:
        raise Damaged("the tensor flow.row points outside the targets")
    if (np.diff(flow.depth[flow.row]) > 0).any():
        raise Damaged("the edges are not in the order of their targets' depth")
    if len(flow.influence) < n_writers:
        raise Damaged("the tensor flow.influence is shorter than the writers")
    for name in ("source", "target"):
        numbers = getattr(flow, name)
        if len(numbers) and not 0 <= numbers.min() <= numbers.max() < len(flow.influence):
            raise Damaged(f"the tensor flow.{name} points outside the nodes")


def _edges_into_features(
    content: Attribution,
) -> dict[int, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """``(feature, position, source)`` of the edges into each layer's features, in edge order."""
    flow = content.flow
    targets = [content.roots.get(int(n)) or content.writers.node(int(n)) for n in flow.target]
    row = flow.row
    found = {}
    layer = np.array([-1 if t.kind != "attn" else t.layer for t in targets], dtype=np.int64)
    feature = np.array([-1 if t.feature is None else t.feature for t in targets], dtype=np.int64)
    position = np.array([t.position for t in targets], dtype=np.int64)
    for number in np.unique(layer[layer >= 0]):
        at = np.flatnonzero(layer[row] == number)
        found[int(number)] = (feature[row[at]], position[row[at]], flow.source[at])
    return found


def _no_heads(*_: Any) -> np.ndarray:
    raise InputError(
        "this attribution was saved without its edges by head (heads=False); save it again with "
        "them, or attribute the prompt again"
    )


def _stored_split(
    content: Attribution, document: Any, tensors: _Tensors
) -> Callable[[int, np.ndarray, np.ndarray, np.ndarray], np.ndarray]:
    """Edges by head as they stand in the file, found again by target and source."""
    edges = _edges_into_features(content)
    splits = {layer: tensors[f"heads.{layer}"] for layer in document["heads"]}
    if splits.keys() != edges.keys():
        raise Damaged(f"it holds edges by head of the layers {sorted(splits)}, not {sorted(edges)}")
    for layer, stored in splits.items():
        if stored.ndim != 2 or len(stored) != len(edges[layer][2]):
            raise Damaged(f"the tensor heads.{layer} does not have a row for every edge")

    def split(
        layer: int, feature: np.ndarray, position: np.ndarray, source: np.ndarray
    ) -> np.ndarray:
        known, wanted = np.stack(edges[layer]), np.stack([feature, position, source])
        # One number per edge: targets and sources are small, their product fits.
        size = tuple((np.maximum(known.max(1), wanted.max(1)) + 1).tolist())
        known_key = np.asarray(np.ravel_multi_index(tuple(known), size))
        wanted_key = np.asarray(np.ravel_multi_index(tuple(wanted), size))
        order = np.argsort(known_key, kind="stable")
        found = np.searchsorted(known_key[order], wanted_key)
        at = order[np.minimum(found, len(order) - 1)]
        if not np.array_equal(known_key[at], wanted_key):
            raise InputError("an edge is not among those saved by head")
        return splits[layer][at]

    return split
