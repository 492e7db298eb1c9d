"""Draws a replayed step as SVG or PNG: for each role a row with its passes and, below, its communication. Imports matplotlib.

Boxes of the same colour that are closer together than a pixel are drawn as one, since a step has thousands of them.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from bagualu.comm.clock import COMPUTE, StreamSpan
from bagualu.parallel.pipeline.draw_svg import COLOURS, NAMES, WAITING
from bagualu.parallel.pipeline.schedules.schedule import PASSES
from bagualu.parallel.simulation.events import Section
from bagualu.parallel.simulation.replay import Replayed, ReplayedRole
from bagualu.parallel.simulation.trace_events import role_name

_OTHER = "#7b6a9c"
"""The colour of what a rank computes outside passes: the update, checks."""
_AXES = {"tensor": "#1b998b", "pipeline": "#474b4f", "expert": "#c2185b"}
"""The colours of communication by the group's axis."""
_REDUCTIONS = "#8c6d1f"
"""The colour of communication of the other axes, over which gradients and weights are summed and gathered."""

# Inches and points.
_ROW, _LEFT, _RIGHT, _TITLE, _CAPTION, _AXIS = 0.36, 2.3, 0.25, 0.72, 0.22, 0.52
_WIDTH, _DPI = 18.0, 130
_COMPUTES, _COMMUNICATES = (-0.42, 0.12), (0.15, 0.4)
"""Where, in a row of height 1 around 0, computation and communication are drawn."""


_EDGED = 4.0
"""The width in pixels from which a box has an edge."""


@dataclass(frozen=True)
class _Box:
    colour: str
    begin: float
    end: float
    section: int = 0
    """The index of the section in which that is."""


def draw_step(title: str, caption: Sequence[str], replayed: Replayed, out: Path | BinaryIO, format: str) -> None:
    """Writes the step to `out` as `format`, svg or png. `caption`: lines below the title. `replayed` has spans."""
    rows = len(replayed.roles)
    top = _TITLE + _CAPTION * len(caption)
    height = top + _ROW * rows + _AXIS
    figure = Figure(figsize=(_WIDTH, height), dpi=_DPI, facecolor="white")
    figure.text(0.02, 1 - 0.28 / height, title, fontsize=12, fontweight="bold", va="center")
    for line, text in enumerate(caption):
        figure.text(0.02, 1 - (0.56 + _CAPTION * line) / height, text, fontsize=9, color="#444", va="center")
    axes = figure.add_axes((_LEFT / _WIDTH, _AXIS / height, 1 - (_LEFT + _RIGHT) / _WIDTH, _ROW * rows / height))
    axes.set_xlim(0, replayed.step_seconds)
    axes.set_ylim(rows - 0.5, -0.5)
    axes.set_yticks(range(rows), list(map(role_name, replayed.roles)), fontsize=7)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=8)
    axes.set_xlabel("seconds", fontsize=8, labelpad=2)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    used = _draw_rows(axes, replayed)
    handles = [Patch(facecolor=colour, label=name) for name, colour in _legend().items() if colour in used]
    figure.legend(handles=handles, ncols=len(handles), loc="center left", bbox_to_anchor=(0.015, 1 - (top - 0.12) / height),
                  fontsize=8, borderpad=0, frameon=False, handlelength=1.2, handleheight=1.0, columnspacing=1.4)  # fmt: skip
    with rc_context({"svg.hashsalt": "bagualu"}):  # makes the file reproducible
        figure.savefig(out, format=format, metadata={"Date": None} if format == "svg" else {"Software": None})


def _draw_rows(axes: Axes, replayed: Replayed) -> set[str]:
    """Draws all roles and returns the colours that were used."""
    pixel = replayed.step_seconds / ((_WIDTH - _LEFT - _RIGHT) * _DPI)
    used = {WAITING}
    axes.add_collection(PolyCollection([_corners(row, 0.0, replayed.step_seconds, _COMPUTES) for row in range(len(replayed.roles))],
                                       facecolors=WAITING, edgecolors="none"))  # fmt: skip
    drawn: list[tuple[list[tuple[float, float]], _Box]] = []
    for row, role in enumerate(replayed.roles):
        streams = sorted({_colour_of(span) for span in role.spans if span.stream != COMPUTE})
        bands = [_COMPUTES, *_divided(_COMMUNICATES, len(streams))]
        kinds = [_computed(role), *(_called(role, colour) for colour in streams)]
        for band, boxes in zip(bands, kinds, strict=True):
            for box in _merged(boxes, pixel):
                drawn.append((_corners(row, box.begin, max(box.end, box.begin + pixel / 2), band), box))
    for edged in (False, True):
        some = [(corners, box.colour) for corners, box in drawn if (box.end - box.begin > _EDGED * pixel) is edged]
        if some:
            axes.add_collection(PolyCollection([corners for corners, _ in some], facecolors=[colour for _, colour in some],
                                               edgecolors="white" if edged else "none", linewidths=0.4))  # fmt: skip
    return used | {box.colour for _, box in drawn}


def _corners(row: int, begin: float, end: float, band: tuple[float, float]) -> list[tuple[float, float]]:
    low, high = row + band[0], row + band[1]
    return [(begin, low), (end, low), (end, high), (begin, high)]


def _divided(band: tuple[float, float], parts: int) -> list[tuple[float, float]]:
    low, high = band
    each = (high - low) / max(1, parts)
    return [(low + each * part, low + each * (part + 1)) for part in range(parts)]


def _computed(replayed: ReplayedRole) -> Iterator[_Box]:
    """Yields what the computation stream does, in the colour of the section in which it does so."""
    sections = list(replayed.passes())
    index = 0
    for span in (span for span in replayed.spans if span.stream == COMPUTE):
        while span.start >= sections[index][2] and index + 1 < len(sections):
            index += 1
        yield _Box(_colour_in(sections[index][0]), span.start, span.end, index)


def _called(replayed: ReplayedRole, colour: str) -> Iterator[_Box]:
    spans = (span for span in replayed.spans if span.stream != COMPUTE and _colour_of(span) == colour)
    return (_Box(colour, span.start, span.end) for span in sorted(spans, key=lambda span: span.start))


def _merged(boxes: Iterable[_Box], gap: float) -> Iterator[_Box]:
    """Yields `boxes`, which are in order, with those of the same colour as one that are less than `gap` apart and in the same
    section, or short."""
    last: _Box | None = None
    for box in boxes:
        if last is not None and box.colour == last.colour and box.begin - last.end < gap and _may_merge(last, box, gap):
            last = replace(last, end=max(last.end, box.end))
            continue
        if last is not None:
            yield last
        last = box
    if last is not None:
        yield last


def _may_merge(one: _Box, other: _Box, gap: float) -> bool:
    return one.section == other.section or max(one.end - one.begin, other.end - other.begin) < _EDGED * gap


def _colour_in(section: Section) -> str:
    return COLOURS[section.action.kind] if section.action is not None and section.action.kind in PASSES else _OTHER


def _colour_of(span: StreamSpan) -> str:
    return _AXES.get(span.stream.split()[0], _REDUCTIONS)


def _legend() -> dict[str, str]:
    """Returns the colour of each name in the legend."""
    passes = {NAMES[kind]: COLOURS[kind] for kind in COLOURS}
    axes = {f"{axis} communication": colour for axis, colour in _AXES.items()}
    return passes | {"update and the rest": _OTHER} | axes | {"data communication": _REDUCTIONS, "waits": WAITING}
