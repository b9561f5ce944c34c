"""The results as an SVG, written by hand: three panels need no plotting library."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from html import escape

from benchmarks.results import (
    BUDGET,
    COLD,
    CONTENDERS,
    COPY,
    GB,
    MERGEKIT,
    SERVICE,
    Line,
    Results,
    Scale,
    lines,
    scales,
)
from benchmarks.results import select as chosen

COLORS = {COPY: "#9aa0a6", SERVICE: "#1a73e8", COLD: "#8ab4f8", MERGEKIT: "#e8710a"}
LABELS = {COPY: "plain copy", SERVICE: "Mergemill, up", COLD: "Mergemill, cold", MERGEKIT: "mergekit"}
SERIES = ("#1a73e8", "#188038", "#e8710a", "#9334e6", "#d93025")

WIDTH = 760
BAR = 12
LEFT = 120
PLOT = 320
"""Height of a panel with axes."""
MIB = 2**20


@dataclass(frozen=True, slots=True)
class Axis:
    """A range of values on a range of pixels."""

    low: float
    """The value at the first pixel."""
    high: float
    """The value at the last one."""
    start: float
    """First pixel."""
    end: float
    """Last pixel."""
    log: bool = True
    """Whether distances are ratios."""

    def at(self, value: float) -> float:
        """The pixel of a value."""
        low, high, here = (
            map(math.log10, (self.low, self.high, value)) if self.log else (self.low, self.high, value)
        )
        return self.start + (here - low) / (high - low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Values to mark: powers of ten, or quarters."""
        if not self.log:
            return [self.low + (self.high - self.low) * part / 4 for part in range(5)]
        return [10.0**power for power in range(round(math.log10(self.low)), round(math.log10(self.high)) + 1)]


def decades(values: Iterable[float], start: float, end: float) -> Axis:
    """A logarithmic axis over whole powers of ten that holds all values."""
    known = list(values)
    low, high = math.floor(math.log10(min(known))), math.ceil(math.log10(max(known)))
    return Axis(10.0**low, 10.0 ** max(high, low + 1), start, end)


def picture(found: Sequence[Results]) -> str:
    """Bars of wall time for every size and store, then cost and memory against size."""
    body: list[str] = []
    y = 10.0
    for results in found:
        for store in dict.fromkeys(run.store for run in results.runs):
            rows = [line for line in lines(results) if line.store == store]
            if rows:
                drawn, y = _bars(f"{results.size} on {store}: wall seconds", rows, y)
                body += drawn
    series = scales(
        [run for results in found for run in chosen(results.runs, what=BUDGET)], lambda run: run.size
    )
    if series:
        body += _lines(series, y)
        y += PLOT
    return "\n".join(
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y:.0f}" width="{WIDTH}" height="{y:.0f}" '
            'font-family="sans-serif" font-size="11">',
            _rectangle(0, 0, WIDTH, y, "white"),
            *body,
            "</svg>\n",
        )
    )


def _bars(title: str, rows: Sequence[Line], top: float) -> tuple[list[str], float]:
    """One panel of bars, and where it ends."""
    values = [bound for row in rows for bound in (row.wall.least, row.wall.most)]
    axis = decades([min(values) / 2, *values], LEFT, WIDTH - 60)  # the shortest bar has a length too
    body = [_text(10, top + 14, title, weight="bold")]
    body += _legend(dict.fromkeys(row.what for row in rows), top + 14)
    y = top + 28
    first = y
    for method in dict.fromkeys(row.method for row in rows):
        of_method = [row for row in rows if row.method == method]
        body.append(_text(LEFT - 8, y + BAR * len(of_method) / 2 + 4, method, anchor="end"))
        for row in of_method:
            end = axis.at(row.wall.median)
            body.append(_rectangle(LEFT, y, max(end - LEFT, 1), BAR - 2, COLORS[row.what]))
            body.append(_line(axis.at(row.wall.least), y + 5, axis.at(row.wall.most), y + 5, "#202124"))
            body.append(_text(axis.at(row.wall.most) + 4, y + 9, f"{row.wall.median:.3g}"))
            y += BAR
        y += 6
    grid = [_line(axis.at(tick), first - 4, axis.at(tick), y, "#e0e0e0") for tick in axis.ticks()]
    marks = [_text(axis.at(tick), y + 12, f"{tick:g} s", anchor="middle") for tick in axis.ticks()]
    return [*grid, *body, *marks], y + 26


def _legend(kinds: Iterable[str], y: float) -> Iterator[str]:
    wanted = set(kinds)
    x = 300.0
    for kind in CONTENDERS:
        if kind in wanted:
            yield _rectangle(x, y - 9, 10, 10, COLORS[kind])
            yield _text(x + 14, y, LABELS[kind])
            x += 112


def _lines(series: Sequence[Scale], top: float) -> list[str]:
    """CPU seconds and a worker's peak memory, both against gigabytes of input."""
    half = WIDTH / 2
    sizes = [scale.input_bytes / GB for scale in series]
    bottom, ceiling = top + PLOT - 50, top + 40
    costs = decades((scale.cpu.median * scale.input_bytes / GB for scale in series), bottom, ceiling)
    highest = max(max(scale.worker_peak_bytes, scale.priced_peak_bytes) for scale in series) / MIB
    memory = Axis(0, 256 * math.ceil(highest / 256), bottom, ceiling, log=False)
    body = []
    for left, title, axis in (
        (50.0, "CPU seconds against GB of input, 1 GiB budget", costs),
        (half + 50, "a worker's peak, MiB (promised: dashed)", memory),
    ):
        across = decades(sizes, left, left + half - 80)
        body.append(_text(left - 40, top + 20, title, weight="bold"))
        for tick in across.ticks():
            body.append(_line(across.at(tick), bottom, across.at(tick), ceiling, "#e0e0e0"))
            body.append(_text(across.at(tick), bottom + 14, f"{tick:g} GB", anchor="middle"))
        for tick in axis.ticks():
            body.append(_line(left, axis.at(tick), left + half - 80, axis.at(tick), "#e0e0e0"))
            body.append(_text(left - 4, axis.at(tick) + 4, f"{tick:g}", anchor="end"))
        for number, method in enumerate(dict.fromkeys(scale.method for scale in series)):
            own = sorted((s for s in series if s.method == method), key=lambda scale: scale.input_bytes)
            color = SERIES[number % len(SERIES)]
            body.append(_text(left + 6, ceiling + 12 + 13 * number, method, fill=color))
            if axis is costs:
                body += _path(
                    [(s.input_bytes / GB, s.cpu.median * s.input_bytes / GB) for s in own],
                    across,
                    axis,
                    color,
                )
            else:
                body += _path(
                    [(s.input_bytes / GB, s.worker_peak_bytes / MIB) for s in own], across, axis, color
                )
                promised = [(s.input_bytes / GB, s.priced_peak_bytes / MIB) for s in own]
                body += _path(promised, across, axis, color, dashed=True)
    return body


def _path(
    points: Sequence[tuple[float, float]], across: Axis, up: Axis, color: str, dashed: bool = False
) -> Iterator[str]:
    places = [(across.at(x), up.at(y)) for x, y in points]
    dash = ' stroke-dasharray="4 3"' if dashed else ""
    shown = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    yield f'<polyline points="{shown}" fill="none" stroke="{color}" stroke-width="1.5"{dash}/>'
    if not dashed:
        for x, y in places:
            yield f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{color}"/>'


def _line(x1: float, y1: float, x2: float, y2: float, color: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{color}"/>'


def _rectangle(x: float, y: float, width: float, height: float, color: str) -> str:
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" fill="{color}"/>'


def _text(
    x: float, y: float, text: str, anchor: str = "start", weight: str = "normal", fill: str = "#202124"
) -> str:
    where = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-weight="{weight}" fill="{fill}"'
    return f"<text {where}>{escape(text)}</text>"
