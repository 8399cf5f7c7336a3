"""A layered picture of an attribution graph: tokens along the bottom, layers upward."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matplotlib import font_manager
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.path import Path as Curve
from matplotlib.textpath import text_to_path

from sae_attn_plugin.errors import InputError
from sae_attn_plugin.io import write_atomically
from sae_attn_plugin.nodes import FEATURE_KINDS, RESIDUAL_KINDS, TARGET_KINDS, Node, unquote

if TYPE_CHECKING:
    import networkx as nx

__all__ = ["draw"]

# Colours are told apart with any colour vision (Okabe and Ito); signs also by the line's style.
_POSITIVE, _NEGATIVE = "#0072B2", "#D55E00"
_INK, _SOFT, _BAND, _GUIDE = "#222222", "#767676", "#F5F6F8", "#E6E8EC"
STYLES: dict[str, tuple[str, str, str]] = {  # kind -> marker, fill, name in the legend
    "attn": ("^", "#009E73", "attention feature"),
    "super": ("D", "#56B4E9", "supernode"),
    "head": ("h", "#F0E442", "head without SAE"),
    "attn_err": ("X", "#CC79A7", "attention error"),
    "attn_bias": ("d", "#C9C9C9", "attention bias"),
    "tc": ("v", "#56B4E9", "transcoder feature"),
    "mlp_sae": ("<", "#56B4E9", "MLP feature"),
    "resid": ("H", "#E69F00", "residual feature"),
    "resid_mid": ("H", "#F5CF85", "residual feature before the MLP"),
    "mlp": ("s", "#8C8C8C", "MLP"),
    "tc_skip": ("P", "#8C8C8C", "transcoder skip"),
    "tc_err": ("X", "#8C8C8C", "transcoder error"),
    "mlp_sae_err": ("X", "#8C8C8C", "MLP error"),
    "resid_err": ("X", "#E69F00", "residual error"),
    "resid_mid_err": ("X", "#F5CF85", "residual error before the MLP"),
    "resid_bias": ("D", "#E8DCC4", "residual bias"),
    "resid_mid_bias": ("D", "#E8DCC4", "residual bias before the MLP"),
    "tc_bias": ("D", "#C9C9C9", "transcoder bias"),
    "mlp_sae_bias": ("D", "#C9C9C9", "MLP bias"),
    "embed": ("o", "#FFFFFF", "token embedding"),
    "pos": ("p", "#E4DDF4", "position embedding"),
    "logit": ("*", "#222222", "logit"),
    "logit_diff": ("*", "#222222", "logit difference"),
    "direction": ("*", "#222222", "direction"),
    "score": ("*", "#222222", "attention score"),
}
_FONT = "DejaVu Sans"  # ships with matplotlib
_LABEL, _TOKEN, _TITLE = 7.0, 9.0, 12.0  # points
_SLOT, _LINE, _ROW_GAP, _MARGIN, _HEAD = 0.34, 0.46, 0.24, 1.15, 0.62  # inches
_PAD = 0.07  # of a band, above and below its row
_WIDE, _ASPECT = 13.0, 1.6
_LONGEST_TOKEN = 16


def draw(
    graph: nx.DiGraph[Any],
    path: str | Path | None = None,
    *,
    max_nodes: int = 250,
    max_edges: int = 400,
    font: str = _FONT,
    dpi: int = 160,
) -> Figure:
    """Draw an attribution graph in layers: tokens along the bottom, the target on top.

    The marker tells the kind of a node and its area the influence on the targets. Numbers are
    features of the row's layer. An edge is as wide as its share of its target's in-edges, blue and
    solid where it is positive, orange and dashed where it is negative; edges that carry more of the
    influence are more opaque.

    Args:
        graph: from :meth:`Attribution.to_networkx` (parallel edges of heads are added up).
        path: a ``.png`` file to write; the same graph gives the same bytes.
        max_nodes: draw at most so many nodes, the most influential; targets always.
        max_edges: draw at most so many edges, those that carry the most influence.
        font: family for all text, for tokens that DejaVu Sans cannot show.
        dpi: pixels per inch.

    Returns:
        A ``matplotlib`` figure of its own; pyplot knows nothing of it. What was left out, and any
        character the font lacks (shown as a box), the picture says.

    Raises:
        InputError: an empty graph, a path that does not end in ``.png``, a limit below 1.
        FileError: the file cannot be written.
    """
    if path is not None and Path(path).suffix.lower() != ".png":
        raise InputError(f"expected a path that ends in .png, got {str(path)!r}")
    for name, value in (("max_nodes", max_nodes), ("max_edges", max_edges), ("dpi", dpi)):
        if value < 1:
            raise InputError(f"draw({name}={value}): expected at least 1")
    if not len(graph):
        raise InputError("the graph has no nodes; nothing to draw")
    scene = _Scene(graph, Writing(font), max_nodes, max_edges)
    figure = scene.paint(dpi)
    if path is not None:
        write_png(figure, path)
    return figure


def write_png(figure: Figure, path: str | Path) -> None:
    """Write a figure whole or not at all; the same figure gives the same bytes."""
    canvas = FigureCanvasAgg(figure)
    # The default metadata names matplotlib's version.
    write_atomically(
        path, lambda file: canvas.print_png(file, metadata={"Software": "sae_attn_plugin"})
    )


# -- text ----------------------------------------------------------------------------------------


class Writing:
    """Text in one font, safe for anything a tokenizer can produce."""

    def __init__(self, family: str) -> None:
        try:
            self.file: str = font_manager.findfont(family, fallback_to_default=False)
        except ValueError:
            raise InputError(f"matplotlib knows no font {family!r}") from None
        self.glyphs: frozenset[int] = frozenset(font_manager.get_font(self.file).get_charmap())

    def properties(self, size: float, bold: bool = False) -> font_manager.FontProperties:
        if bold and self.file == font_manager.findfont(_FONT):
            return font_manager.FontProperties(family=_FONT, weight="bold", size=size)
        return font_manager.FontProperties(fname=self.file, size=size)

    def clean(self, text: str, longest: int | None = None) -> str:
        """Control characters spelled out, characters that the font lacks as a box."""
        shown = "".join(
            c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text
        )
        if longest is not None and len(shown) > longest:
            shown = shown[: longest - 1] + "…"
        return "".join(c if ord(c) in self.glyphs else "□" for c in shown)

    def token(self, text: str) -> str:
        """A token below the picture: without its leading space, blanks quoted."""
        bare = text[1:] if text.startswith(" ") and text.strip() else text
        return self.clean(bare if bare.strip() else f'"{bare}"', _LONGEST_TOKEN)

    def width(self, text: str, size: float) -> float:
        """In inches."""
        points, _, _ = text_to_path.get_text_width_height_descent(
            text, self.properties(size), ismath=False
        )
        return points / 72

    def write(self, axes: Any, x: float, y: float, text: str, size: float, **style: Any) -> Any:
        bold = style.pop("bold", False)
        style.setdefault("color", _INK)
        # Tokens such as "$" are no mathematics.
        return axes.text(
            x, y, text, fontproperties=self.properties(size, bold), parse_math=False,
            usetex=False, **style,
        )  # fmt: skip


# -- layout --------------------------------------------------------------------------------------


_SUBLAYERS = ("stream", "attention", "stream at MLP", "MLP")


@dataclass(order=True, frozen=True)
class _Row:
    """A row of the picture, from the bottom up."""

    layer: float
    sublayer: int

    @property
    def name(self) -> str:
        if self.layer < 0:
            return "embeddings"
        if math.isinf(self.layer):
            return "output"
        return f"{int(self.layer)} · {_SUBLAYERS[self.sublayer]}"


def _row_of(node: Node) -> _Row:
    if node.kind in TARGET_KINDS:
        return _Row(math.inf, 0)
    if node.layer is None:
        return _Row(-1, 0)
    if node.kind.startswith(RESIDUAL_KINDS):
        return _Row(node.layer, 2 if node.kind.startswith("resid_mid") else 0)
    return _Row(node.layer, 3 if node.kind.startswith(("mlp", "tc")) else 1)


@dataclass
class _Spot:
    """A node as it is drawn. Coordinates are inches."""

    node: Node
    influence: float
    label: str
    is_target: bool
    slot: float
    x: float = 0.0
    y: float = 0.0
    area: float = 0.0

    @property
    def row(self) -> _Row:
        return _row_of(self.node)


@dataclass
class _Layout:
    """Where columns and rows lie, for one number of slots per line."""

    width: float
    height: float
    left: dict[int, float]  # of each column
    columns: dict[int, float]  # widths
    bottom: dict[_Row, float]
    rows: dict[_Row, float]  # heights
    legend: int  # columns of the legend
    lines: dict[tuple[_Row, int], list[list[_Spot]]] = field(repr=False, default_factory=dict)


def _cost(layout: _Layout) -> float:
    area, aspect = layout.width * layout.height, layout.width / layout.height
    return math.log(area) + 2 * abs(math.log(aspect / _ASPECT))


@dataclass(frozen=True)
class _Edge:
    source: str
    target: str
    weight: float
    share: float
    flow: float


class _Scene:
    """What is drawn, and where."""

    def __init__(
        self, graph: nx.DiGraph[Any], writing: Writing, max_nodes: int, max_edges: int
    ) -> None:
        self.graph, self.writing = graph, writing
        targets = set(graph.graph.get("targets", []))
        names = sorted(
            graph,
            key=lambda v: (v not in targets, -float(graph.nodes[v].get("influence", 0)), v),
        )
        names = names[: max(max_nodes, len(targets & set(graph)))]
        self.spots = {name: self._spot(name, name in targets) for name in names}
        present = {spot.node.kind for spot in self.spots.values()}
        self.kinds = [kind for kind in STYLES if kind in present]
        edges = _edges(graph)
        self.edges = sorted(
            (e for e in edges if e.source in self.spots and e.target in self.spots),
            key=lambda e: (-e.flow, e.source, e.target),
        )[:max_edges]
        self.left_out = (len(graph) - len(self.spots), len(edges) - len(self.edges))
        tokens = graph.graph.get("tokens")
        last = max(spot.node.position for spot in self.spots.values())
        if not tokens or len(tokens) <= last:
            known = {s.node.position: graph.nodes[n].get("token") for n, s in self.spots.items()}
            tokens = [known.get(p) or "" for p in range(last + 1)]
        self.tokens = [writing.token(token) if token else "" for token in tokens]
        self.spell = sum(writing.width(t, _TOKEN) + 0.12 for t in self.tokens) > _WIDE
        self._size_nodes()
        # As many slots a line as give a small picture of a slide's proportions.
        layouts = [self._layout(per_line) for per_line in range(1, 17)]
        self.layout = min(layouts, key=_cost)
        self._place()

    def _spot(self, name: str, is_target: bool) -> _Spot:
        node = Node.parse(name)
        if node.kind in FEATURE_KINDS:
            label = str(node.feature)
        elif node.kind == "head":
            label = f"{node.layer}.{node.head}"
        elif node.kind == "score":
            side = "" if node.label is None else f" ({node.label} side)"
            label = f"{node.layer}.{node.head}: {node.position} → {node.key}{side}"
        elif node.kind == "super":
            label = self.writing.clean(str(unquote(node.label or "")[0]), 20)
        elif node.kind in TARGET_KINDS:
            label = self.writing.clean((node.label or "").replace('"-"', '" − "'), 40)
        else:
            label = ""
        size = _TOKEN if node.kind in TARGET_KINDS else _LABEL
        slot = max(_SLOT, self.writing.width(label, size) + 0.1) if label else _SLOT
        influence = float(self.graph.nodes[name].get("influence", 0.0))
        return _Spot(node, influence, label, is_target, slot)

    def _size_nodes(self) -> None:
        top = max((s.influence for s in self.spots.values() if not s.is_target), default=0)
        for spot in self.spots.values():
            part = min(spot.influence / top, 1.0) if top > 0 else 0.0
            spot.area = 240.0 if spot.is_target else 22 + 250 * part

    def _layout(self, per_line: int) -> _Layout:
        groups: dict[tuple[_Row, int], list[_Spot]] = defaultdict(list)
        for spot in self.spots.values():
            groups[spot.row, spot.node.position].append(spot)
        order = list(STYLES)
        lines = {}
        for place, spots in groups.items():
            # features first, strongest first, then the rest by kind
            spots.sort(key=lambda s: (order.index(s.node.kind), -s.influence, str(s.node)))
            count = math.ceil(len(spots) / per_line)
            size = math.ceil(len(spots) / count)  # lines of about equal length
            lines[place] = [spots[i : i + size] for i in range(0, len(spots), size)]
        columns = {}
        for position, token in enumerate(self.tokens):
            own = 0.2 if self.spell else self.writing.width(token, _TOKEN) + 0.12
            widths = [
                sum(s.slot for s in line) + 0.16
                for (_, at), block in lines.items()
                if at == position
                for line in block
            ]
            columns[position] = max([own, *widths])
        rows = {
            row: max(len(block) for (at, _), block in lines.items() if at == row) * _LINE
            + (0.12 if math.isinf(row.layer) else 0)  # labels of outputs stand above them
            for row in sorted({row for row, _ in lines})
        }
        left, x = {}, _MARGIN
        for position, width in columns.items():
            left[position] = x
            x += width
        token_height = 0.45
        if self.spell:
            token_height += max(self.writing.width(t, _TOKEN) for t in self.tokens)
        tall = token_height + sum(rows.values()) + len(rows) * _ROW_GAP + _HEAD + 0.6
        width = max(x + 0.2, 9.0, 1.4 * tall)
        columns_of_legend = max(1, min(len(self.kinds) + 2, int(width / 1.55)))
        foot = 0.42 + 0.19 * math.ceil((len(self.kinds) + 2) / columns_of_legend)
        bottom, y = {}, foot + token_height
        for row, height in rows.items():
            bottom[row] = y
            y += height + _ROW_GAP
        return _Layout(width, y + _HEAD, left, columns, bottom, rows, columns_of_legend, lines)

    def _place(self) -> None:
        a = self.layout
        spare = a.width - 0.2 - _MARGIN - sum(a.columns.values())
        if spare > 0:  # a narrow picture of many layers gives it to its columns
            used = {spot.node.position for spot in self.spots.values()}
            unit, x = spare / (len(a.columns) + 2 * len(used)), _MARGIN
            for position in a.columns:
                a.left[position] = x
                a.columns[position] += unit * (3 if position in used else 1)
                x += a.columns[position]
        for (row, position), block in a.lines.items():
            middle = a.left[position] + a.columns[position] / 2
            base = a.bottom[row] + a.rows[row] / 2
            shift = -0.1 if math.isinf(row.layer) else 0.06  # room for the labels
            for i, line in enumerate(block):
                x = middle - sum(spot.slot for spot in line) / 2
                for spot in line:
                    spot.x = x + spot.slot / 2
                    spot.y = base + (i - (len(block) - 1) / 2) * _LINE + shift
                    x += spot.slot

    # -- painting --------------------------------------------------------------------------------

    def paint(self, dpi: int) -> Figure:
        a = self.layout
        dpi = max(1, min(dpi, int(20_000 / max(a.width, a.height))))  # Agg's own limit is 2**16
        figure = Figure(figsize=(a.width, a.height), dpi=dpi, facecolor="white")
        figure.set_layout_engine("none")
        axes = figure.add_axes((0, 0, 1, 1), xlim=(0, a.width), ylim=(0, a.height))
        axes.set_axis_off()
        self._paint_rows(axes)
        self._paint_tokens(axes)
        self._paint_edges(axes)
        self._paint_nodes(axes)
        self._paint_title(axes)
        self._paint_legend(axes)
        return figure

    def _paint_rows(self, axes: Any) -> None:
        a = self.layout
        for row, bottom in a.bottom.items():
            y, height = bottom - _PAD, a.rows[row] + 2 * _PAD
            axes.add_patch(
                Rectangle((0.12, y), a.width - 0.24, height, color=_BAND, linewidth=0, zorder=0)
            )
            self.writing.write(
                axes, 0.22, bottom + a.rows[row] / 2, row.name, 8, color=_SOFT, va="center",
                zorder=6,
            )  # fmt: skip

    def _paint_tokens(self, axes: Any) -> None:
        a = self.layout
        top = max(a.bottom[row] + a.rows[row] for row in a.rows)
        floor = min(a.bottom.values()) - 0.2
        used = {spot.node.position for spot in self.spots.values()}
        for position, token in enumerate(self.tokens):
            x = a.left[position] + a.columns[position] / 2
            if position in used:
                axes.plot([x, x], [floor + 0.06, top], color=_GUIDE, linewidth=0.8, zorder=0.5)
            style: dict[str, Any] = {"color": _INK if position in used else _SOFT, "ha": "center"}
            if self.spell:
                style |= {"rotation": 90}
            below = self.writing.width(token, _TOKEN) if self.spell else 0.16
            self.writing.write(axes, x, floor, token, _TOKEN, va="top", **style)
            self.writing.write(
                axes, x, floor - below - 0.06, str(position), 6, va="top", ha="center", color=_SOFT
            )

    def _paint_edges(self, axes: Any) -> None:
        strongest = max((edge.flow for edge in self.edges), default=0) or 1.0
        drawn = self.edges[::-1]  # the strongest on top
        colours, widths, styles = [], [], []
        for edge in drawn:
            positive = edge.weight >= 0
            alpha = 0.08 + 0.82 * math.sqrt(edge.flow / strongest)
            red, green, blue = _rgb(_POSITIVE if positive else _NEGATIVE)
            colours.append((red, green, blue, alpha))
            widths.append(0.5 + 4.5 * edge.share)
            styles.append("-" if positive else (0, (2.4, 1.4)))
        axes.add_collection(
            PathCollection(
                [self._curve(self.spots[e.source], self.spots[e.target]) for e in drawn],
                facecolors="none",
                edgecolors=colours,
                linewidths=widths,
                linestyles=styles,
                capstyle="butt",
                zorder=2,
                gid="edges",
            ),
            autolim=False,
        )

    def _curve(self, source: _Spot, target: _Spot) -> Curve:
        """Upright at both ends, so that edges of one node fan out."""
        x0, y0, x1, y1 = source.x, source.y, target.x, target.y
        rise = 0.45 * (y1 - y0)
        bow = 0.0
        if abs(x1 - x0) < 0.3 and y1 - y0 > 2 * _LINE + 2 * _ROW_GAP:
            bow = -0.12 * (y1 - y0)  # round what lies between
        points = [(x0, y0), (x0 + bow, y0 + rise), (x1 + bow, y1 - rise), (x1, y1)]
        return Curve(points, [Curve.MOVETO, Curve.CURVE4, Curve.CURVE4, Curve.CURVE4])

    def _paint_nodes(self, axes: Any) -> None:
        by_kind: dict[tuple[str, bool], list[_Spot]] = defaultdict(list)
        for spot in self.spots.values():
            by_kind[spot.node.kind, spot.is_target].append(spot)
        for kind in STYLES:
            for is_target in (False, True):
                spots = by_kind.get((kind, is_target), [])
                if not spots:
                    continue
                marker, fill, _ = STYLES[kind]
                axes.scatter(
                    [s.x for s in spots],
                    [s.y for s in spots],
                    s=[s.area for s in spots],
                    marker=marker,
                    color=fill,
                    edgecolors=_INK,
                    linewidths=2.0 if is_target and kind not in TARGET_KINDS else 0.7,
                    zorder=3,
                    gid=f"nodes:{kind}",
                )
        for spot in self.spots.values():
            if not spot.label:
                continue
            if spot.node.kind in TARGET_KINDS:
                self.writing.write(
                    axes, spot.x, spot.y + 0.16, spot.label, _TOKEN, ha="center", va="bottom",
                    bold=True, zorder=5,
                )  # fmt: skip
            else:
                below = math.sqrt(spot.area) / 2 / 72 + 0.015
                paper = {"facecolor": "white", "alpha": 0.75, "pad": 0.4, "linewidth": 0}
                self.writing.write(
                    axes, spot.x, spot.y - below, spot.label, _LABEL, ha="center", va="top",
                    zorder=5, bbox=paper,
                )  # fmt: skip

    def _paint_title(self, axes: Any) -> None:
        a, graph, write = self.layout, self.graph, self.writing
        targets = list(graph.graph.get("targets", []))
        parts = []
        for target in targets[:3]:
            value = graph.nodes[target].get("pre_activation") if target in graph else None
            parts.append(f"{target} = {value:.4g}" if value is not None else target)
        more = f"  and {len(targets) - 3} more" if len(targets) > 3 else ""
        title = write.clean("   ".join(parts) + more) or "attribution graph"
        size = min(_TITLE, _TITLE * (a.width - 0.6) / max(write.width(title, _TITLE) * 1.1, 0.1))
        write.write(axes, 0.22, a.height - 0.2, title, size, bold=True, va="top")
        facts = [f"{len(self.spots)} nodes", f"{len(self.edges)} edges"]
        nodes, edges = self.left_out
        if nodes or edges:
            facts.append(f"not drawn: {nodes} nodes and {edges} edges of the least influence")
        residual = graph.graph.get("worst_ledger_residual")
        if residual is not None:
            facts.append(f"worst ledger residual {residual:.1e}")
        facts += [str(graph.graph[k]) for k in ("model", "backend") if graph.graph.get(k)]
        line = write.clean("  ·  ".join(facts))
        while len(line) > 20 and write.width(line, 8.5) > a.width - 0.4:
            line = line[:-2] + "…"
        write.write(axes, 0.22, a.height - 0.48, line, 8.5, va="top", color=_SOFT)

    def _paint_legend(self, axes: Any) -> None:
        handles = [
            Line2D(
                [], [], linestyle="none", marker=STYLES[kind][0], markersize=8,
                markerfacecolor=STYLES[kind][1], markeredgecolor=_INK, markeredgewidth=0.7,
                label=STYLES[kind][2],
            )
            for kind in self.kinds
        ]  # fmt: skip
        lines: list[tuple[str, Any, str]] = [
            (_POSITIVE, "-", "positive"),
            (_NEGATIVE, (0, (2.4, 1.4)), "negative"),
        ]
        handles += [
            Line2D([], [], color=colour, linestyle=style, linewidth=2.2, label=label)
            for colour, style, label in lines
        ]
        legend = axes.legend(
            handles=handles,
            loc="lower left",
            bbox_to_anchor=(0.12 / self.layout.width, 0.26 / self.layout.height),
            ncols=self.layout.legend,
            prop=self.writing.properties(8),
            frameon=False,
            borderpad=0,
            borderaxespad=0,
            handletextpad=0.5,
            columnspacing=1.6,
            labelcolor=_INK,
        )
        legend.set_zorder(7)
        for text in (*legend.get_texts(), legend.get_title()):
            text.set_usetex(False)
        self.writing.write(
            axes, 0.22, 0.14, "node area: influence on the target    edge width: share of the "
            "in-edges of its target    opacity: influence it carries", 7, color=_SOFT,
            va="center",
        )  # fmt: skip


def _edges(graph: nx.DiGraph[Any]) -> list[_Edge]:
    """Edges with the influence they carry; parallel ones added up."""
    weights: dict[tuple[str, str], float] = defaultdict(float)
    shares: dict[tuple[str, str], float] = {}
    for source, target, data in graph.edges(data=True):
        weights[source, target] += float(data["weight"])
        if "share" in data and not graph.is_multigraph():
            shares[source, target] = float(data["share"])
    total: dict[str, float] = defaultdict(float)
    for (_, target), weight in weights.items():
        total[target] += abs(weight)
    edges = []
    for (source, target), weight in weights.items():
        share = shares.get((source, target), abs(weight) / total[target] if total[target] else 0.0)
        influence = float(graph.nodes[target].get("influence", 1.0))
        edges.append(_Edge(source, target, weight, share, influence * share))
    return edges


@lru_cache
def _rgb(colour: str) -> tuple[float, float, float]:
    red, green, blue = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    return red, green, blue
