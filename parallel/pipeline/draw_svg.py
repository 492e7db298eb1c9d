"""Draws timelines as SVG or PNG: a row per rank, a box per pass. Imports matplotlib."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection, PolyCollection
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.textpath import TextPath
from matplotlib.transforms import Affine2D

from bagualu.parallel.pipeline.schedules.schedule import Kind
from bagualu.parallel.pipeline.timeline import Span, Timeline

COLOURS = {
    Kind.FORWARD: "#2f6db3",
    Kind.BACKWARD: "#b5404a",
    Kind.INPUT_GRADIENT: "#e08a2c",
    Kind.WEIGHT_GRADIENT: "#3d9155",
}
NAMES = {
    Kind.FORWARD: "F forward",
    Kind.BACKWARD: "B backward",
    Kind.INPUT_GRADIENT: "I input gradient",
    Kind.WEIGHT_GRADIENT: "W weight gradient",
}
WAITING = "#eceef1"
_LIGHTEST = 0.6
"""The fraction of white in the colour of a rank's last chunk."""

# Inches and points.
_ROW, _GAP, _LEFT, _RIGHT, _TITLE, _CAPTION, _AXIS = 0.27, 0.09, 0.75, 0.25, 0.72, 0.24, 0.52
_NARROWEST, _WIDEST = 8.5, 64.0
_FONT, _DPI = 6.5, 130


@dataclass(frozen=True)
class Panel:
    """A timeline with its heading, caption and unit."""

    heading: str
    caption: list[str]
    """Lines below the heading."""
    timeline: Timeline
    unit: str
    """The unit of the time axis."""


def draw_picture(title: str, panels: list[Panel], chunks: int, path: Path) -> None:
    """Writes the panels, one above the other on a common scale, to `path`, in the format of its suffix (.svg or .png)."""
    width = max(_width(panel.timeline) for panel in panels)
    heights = [_height(panel) for panel in panels]
    total = _TITLE + sum(heights)
    figure = Figure(figsize=(width, total), dpi=_DPI, facecolor="white")
    figure.text(_LEFT / width, 1 - 0.3 / total, title, fontsize=13, fontweight="bold", va="center")
    top, end = total - _TITLE, max(float(panel.timeline.end) for panel in panels)
    for panel, height in zip(panels, heights, strict=True):
        _draw_panel(figure, panel, chunks, (width, total), top, end)
        top -= height
    _legend(figure, {span.action.kind for panel in panels for span in _spans(panel.timeline)}, chunks, _LEFT / width, total)
    with rc_context({"svg.hashsalt": "bagualu"}):  # makes the file reproducible
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else {"Software": None})


def _width(timeline: Timeline) -> float:
    """Returns a width of the picture, in inches, at which most boxes have room for the number of their micro-batch."""
    spans = list(_spans(timeline))
    digits = len(str(max(span.action.micro_batch for span in spans)))
    typical = sorted(float(span.end - span.start) for span in spans)[len(spans) // 4] or 1.0
    boxes = float(timeline.end) / typical
    return _LEFT + _RIGHT + min(_WIDEST, max(_NARROWEST, boxes * (0.055 + 0.06 * digits)))


def _height(panel: Panel) -> float:
    return _CAPTION * (1 + len(panel.caption)) + _ROW * len(panel.timeline.ranks) + _AXIS


def _spans(timeline: Timeline) -> Iterator[Span]:
    return (span for spans in timeline.ranks for span in spans)


def _draw_panel(figure: Figure, panel: Panel, chunks: int, size: tuple[float, float], top: float, end: float) -> None:
    width, total = size
    ranks = len(panel.timeline.ranks)
    for line, text in enumerate([panel.heading, *panel.caption]):
        y = (top - _CAPTION * (line + 0.5)) / total
        figure.text(_LEFT / width, y, text, fontsize=9 if line else 10, color="#444" if line else "black", va="center")
    bottom = top - _CAPTION * (1 + len(panel.caption)) - _ROW * ranks
    axes = figure.add_axes((_LEFT / width, bottom / total, 1 - (_LEFT + _RIGHT) / width, _ROW * ranks / total))
    axes.set_xlim(0, end)
    axes.set_ylim(ranks - 0.5, -0.5)
    axes.set_yticks(range(ranks), [f"rank {rank}" for rank in range(ranks)], fontsize=8)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=8)
    axes.set_xlabel(panel.unit, fontsize=8, labelpad=2)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    _draw_passes(axes, panel.timeline, chunks, (width - _LEFT - _RIGHT) * 72 / end)


def _draw_passes(axes: Axes, timeline: Timeline, chunks: int, points_per_time: float) -> None:
    ranks = range(len(timeline.ranks))
    waiting = [_corners(0.0, float(timeline.end), rank) for rank in ranks]
    axes.add_collection(PolyCollection(waiting, facecolors=WAITING, edgecolors="none"))
    boxes = [(rank, span) for rank in ranks for span in timeline.ranks[rank]]
    corners = [_corners(float(span.start), float(span.end), rank) for rank, span in boxes]
    colours = [_colour(span.action.kind, span.action.stage // len(ranks), chunks) for _, span in boxes]
    axes.add_collection(PolyCollection(corners, facecolors=colours, edgecolors="white", linewidths=0.5))
    _write_numbers(axes, boxes, chunks, points_per_time)


def _corners(start: float, end: float, rank: int) -> list[tuple[float, float]]:
    half = 0.5 - _GAP / _ROW / 2
    return [(start, rank - half), (end, rank - half), (end, rank + half), (start, rank + half)]


def _write_numbers(axes: Axes, boxes: list[tuple[int, Span]], chunks: int, points_per_time: float) -> None:
    """Writes the number of the micro-batch into every box that is wide enough, as outlines, because thousands of text objects would
    take minutes."""
    figure = axes.get_figure()
    assert figure is not None
    scale = Affine2D().scale(1 / 72) + figure.dpi_scale_trans
    for number, group in groupby(sorted(boxes, key=_number), key=_number):
        text = TextPath((0, 0), str(number), size=_FONT)
        extent = text.get_extents()
        outline = text.transformed(Affine2D().translate(-(extent.x0 + extent.x1) / 2, -(extent.y0 + extent.y1) / 2))
        fitting = [(rank, span) for rank, span in group if float(span.end - span.start) * points_per_time > extent.width + 1]
        if fitting:
            centres = [(float(span.start + span.end) / 2, rank) for rank, span in fitting]
            inks = [_ink(_colour(span.action.kind, span.action.stage // len(axes.get_yticks()), chunks)) for _, span in fitting]
            numbers = PathCollection([outline], offsets=centres, offset_transform=axes.transData, facecolors=inks, linewidths=0)
            numbers.set_transform(scale)
            axes.add_collection(numbers, autolim=False)


def _number(box: tuple[int, Span]) -> int:
    return box[1].action.micro_batch


def _colour(kind: Kind, chunk: int, chunks: int) -> tuple[float, float, float]:
    white = _LIGHTEST * chunk / (chunks - 1) if chunks > 1 else 0.0
    red, green, blue = (part + (1 - part) * white for part in to_rgb(COLOURS[kind]))
    return red, green, blue


def _ink(colour: tuple[float, float, float]) -> str:
    red, green, blue = colour
    return "white" if 0.299 * red + 0.587 * green + 0.114 * blue < 0.6 else "black"


def _legend(figure: Figure, kinds: set[Kind], chunks: int, left: float, total: float) -> None:
    """Adds a legend with each kind of pass, and with each chunk in its shade of the forward colour."""
    handles = [Patch(facecolor=_colour(kind, 0, chunks), label=NAMES[kind]) for kind in COLOURS if kind in kinds]
    if chunks > 1:
        handles += [
            Patch(facecolor=_colour(Kind.FORWARD, chunk, chunks), label=f"F of chunk {chunk}") for chunk in range(1, chunks)
        ]
    handles.append(Patch(facecolor=WAITING, label="waits"))
    figure.legend(handles=handles, ncols=len(handles), loc="center left", bbox_to_anchor=(left, 1 - 0.58 / total), fontsize=8,
                  borderpad=0, frameon=False, handlelength=1.2, handleheight=1.0, columnspacing=1.4)  # fmt: skip
