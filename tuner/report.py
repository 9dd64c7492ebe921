"""What the records of a log folder say, as one HTML page: each task's way to its best tile, and a roofline."""

import html
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tilewright.compiler.errors import UserError
from tilewright.compiler.targets import RECORDS, measured
from tilewright.schedules.records import Record, read_file

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem; color: #1b1f24; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .25rem .6rem; border-bottom: 1px solid #d8dee4; vertical-align: middle; }
th:first-child, td:first-child, td.tile { text-align: left; }
td.tile { font: 12px ui-monospace, monospace; color: #57606a; max-width: 22rem; }
svg { display: block; } svg text { font: 11px system-ui, sans-serif; fill: #57606a; }
.line { fill: none; stroke: #0969da; stroke-width: 1.5; } .roof { fill: none; stroke: #cf222e; stroke-width: 1.5; }
.default { fill: #8c959f; } .best { fill: #0969da; } .axis { stroke: #8c959f; stroke-width: 1; }
@media (prefers-color-scheme: dark) {
  body { background: #0d1117; color: #e6edf3; } th, td { border-color: #30363d; }
  td.tile, svg text { color: #9198a1; fill: #9198a1; }
}
"""
_WIDTH, _HEIGHT = 760, 420  # of the roofline, in pixels
_CURVE = 140, 32
_LONG = 120  # letters of a field


def write_report(logs: Path, output: Path) -> list[str]:
    """Writes the page. Returns what is wrong with lines that are no records, a sentence each. Raises UserError where
    there is no record, or the page can't be written."""
    records: list[Record] = []
    problems: list[str] = []
    for file in sorted(logs.glob("*/*.jsonl")):
        found, _, wrong = read_file(file)
        records += found
        problems += wrong
    if not records:
        raise UserError(f"{logs} has no tuning records; run tilewright tune MODEL first")
    devices = sorted({record.device for record in records})
    body = "".join(_device(device, [r for r in records if r.device == device]) for device in devices)
    page = f"<!doctype html><meta charset=utf-8><title>Tuning</title><style>{_STYLE}</style><h1>Tuning</h1>{body}\n"
    try:
        output.write_text(page)
    except OSError as error:
        raise UserError(f"{output} can't be written ({error.strerror}); name another place with -o") from None
    return problems


def _device(device: str, records: Sequence[Record]) -> str:
    tasks: dict[tuple[object, ...], list[Record]] = {}
    for record in records:
        tasks.setdefault((*record.task, record.space), []).append(record)
    ordered = [sorted(group, key=lambda r: r.trial) for _, group in sorted(tasks.items())]
    failures = Counter(record.failure for record in records if record.failure)
    failed = ", ".join(f"{count} {kind}" for kind, count in sorted(failures.items())) or "none"
    rows = "".join(_row(group) for group in ordered)
    head = "".join(f"<th>{name}</th>" for name in _COLUMNS)
    return (
        f"<h2>{html.escape(device)}</h2><p>{len(ordered)} tasks, {len(records)} candidates, failed: {failed}</p>"
        f"{_roofline(device, ordered)}<table><tr>{head}</tr>{rows}</table>"
    )


_COLUMNS = (
    *("task", "rows", "default, us", "best, us", "gain", "of floor"),
    *("tried", "failed", "best so far", "best tile"),
)


def _row(group: Sequence[Record]) -> str:
    best = _best(group)
    default = next((r.us for r in group if r.trial == 1), None)
    gain = f"{1 - best.us / default:.1%}" if best and best.us and default else ""
    cells = [
        f"{group[0].schedule} {words(group[0].facts)}",
        str(group[0].rows),
        f"{default:.4g}" if default else "",
        f"{best.us:.4g}" if best else "",
        gain,
        f"{best.of_floor:.0%}" if best and best.of_floor else "",
        str(len(group)),
        str(sum(bool(r.failure) for r in group)),
    ]
    texts = "".join(f"<td>{html.escape(cell)}</td>" for cell in cells)
    tile = html.escape(words(best.tile)) if best else ""
    return f"<tr>{texts}<td>{_curve(group)}</td><td class=tile>{tile}</td></tr>"


def _best(group: Sequence[Record]) -> Record | None:
    return min((r for r in group if r.us is not None), key=lambda r: r.us or 0.0, default=None)


def words(text: str) -> str:
    """The fields of facts or a tile that say something, without their nesting; long ones, as traces are, cut off."""
    words: list[str] = []

    def visit(name: str, value: object) -> None:
        if isinstance(value, Mapping):
            for key, inner in value.items():
                visit(key, inner)
        elif value not in (None, False, ""):
            said = str(value)
            words.append(name if value is True else f"{name} {said if len(said) <= _LONG else said[:_LONG] + '...'}")

    visit("", {k: v for k, v in json.loads(text).items() if k != "is"})
    return ", ".join(words)


def _curve(group: Sequence[Record]) -> str:
    """The best time so far, trial by trial, from the default's down."""
    width, height = _CURVE
    best, points = math.inf, []
    for record in group:
        best = min(best, record.us or math.inf)
        if best < math.inf:
            points.append((record.trial, best))
    if len(points) < 2:
        return ""
    most, least = points[0][1], points[-1][1]
    last = max(trial for trial, _ in points)

    def place(trial: int, us: float) -> str:
        down = (most - us) / (most - least) if most > least else 0.0
        return f"{2 + (width - 4) * trial / last:.1f},{2 + (height - 4) * down:.1f}"

    line = " ".join(place(trial, us) for trial, us in points)
    return f'<svg width={width} height={height}><polyline class=line points="{line}"/></svg>'


@dataclass(frozen=True)
class _Dot:
    """intensity: operations a byte. rate: 10^12 operations a second. kind: "default" or "best"."""

    intensity: float
    rate: float
    kind: str
    title: str


@dataclass(frozen=True)
class _Plane:
    """Both axes in powers of ten, from `low` to `high` of each."""

    low: tuple[int, int]
    high: tuple[int, int]

    @staticmethod
    def around(dots: Sequence[_Dot]) -> "_Plane":
        values = [[math.log10(dot.intensity) for dot in dots], [math.log10(dot.rate) for dot in dots]]
        low, high = ([f(g(v) + up) for v in values] for f, g, up in ((math.floor, min, 0.0), (math.ceil, max, 0.3)))
        return _Plane((low[0], low[1]), (high[0], high[1]))

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Pixels."""
        across = (math.log10(x) - self.low[0]) / (self.high[0] - self.low[0])
        up = (math.log10(y) - self.low[1]) / (self.high[1] - self.low[1])
        return 60 + across * (_WIDTH - 80), _HEIGHT - 40 - up * (_HEIGHT - 60)

    def line(self, kind: str, points: Sequence[tuple[float, float]]) -> str:
        inside = [self.at(x, y) for x, y in points if 10.0 ** self.low[1] <= y <= 10.0 ** self.high[1]]
        return f'<polyline class={kind} fill=none points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in inside)}"/>'

    def axes(self) -> str:
        (x0, y0), (x1, y1) = ((10.0**x, 10.0**y) for x, y in (self.low, self.high))
        parts = [self.line("axis", [(x0, y1), (x0, y0), (x1, y0)])]
        for power in range(self.low[0], self.high[0] + 1):
            across, down = self.at(10.0**power, y0)
            parts.append(f"<text x={across:.1f} y={down + 18:.1f} text-anchor=middle>{10.0**power:g}</text>")
        for power in range(self.low[1], self.high[1] + 1):
            across, down = self.at(x0, 10.0**power)
            parts.append(f"<text x={across - 6:.1f} y={down + 4:.1f} text-anchor=end>{10.0**power:g}</text>")
        (right, bottom), (left, top) = self.at(x1, y0), self.at(x0, y1)
        parts.append(f"<text x={right:.1f} y={bottom + 34:.1f} text-anchor=end>operations a byte</text>")
        parts.append(f"<text x={left + 6:.1f} y={top + 4:.1f}>10^12 operations a second</text>")
        return "".join(parts)


def _roofline(device: str, groups: Sequence[Sequence[Record]]) -> str:
    """Operations a second over operations a byte, both logarithmic: defaults in grey, the best tiles in colour."""
    dots = [dot for group in groups for dot in _dots(group)]
    if not dots:
        return ""
    plane = _Plane.around(dots)
    parts = [f"<svg width={_WIDTH} height={_HEIGHT}>", plane.axes()]
    roof = _ceilings(device, groups[0][0].target)
    if roof:
        bytes_s, tops = roof
        span = plane.high[0] - plane.low[0]
        steps = [10 ** (plane.low[0] + i * span / 60) for i in range(61)]
        parts.append(plane.line("roof", [(x, min(x * bytes_s / 1e12, tops or math.inf)) for x in steps]))
    for dot in dots:
        x, y = plane.at(dot.intensity, dot.rate)
        title = f"<title>{html.escape(dot.title)}</title>"
        parts.append(f"<circle class={dot.kind} cx={x:.1f} cy={y:.1f} r=4>{title}</circle>")
    return "".join([*parts, "</svg>"])


def _dots(group: Sequence[Record]) -> list[_Dot]:
    found = []
    for kind, record in (("default", next((r for r in group if r.trial == 1), None)), ("best", _best(group))):
        if record and record.us and record.bytes and record.operations:
            title = f"{record.schedule} m={record.rows}: {record.us:.4g} us"
            found.append(_Dot(record.operations / record.bytes, record.operations / record.us / 1e6, kind, title))
    return found


def _ceilings(device: str, target: str) -> tuple[float, float | None] | None:
    """Bytes a second and 10^12 operations a second: as measured on the device here, else as its record says."""
    found = measured.read(device)
    if found is not None:
        return found.ceilings.bandwidth_gbs * 1e9, found.ceilings.matrix_tops
    record = RECORDS.get(target.split(" ", 1)[0])
    return (record.bandwidth_gbs * 1e9, record.matrix_tops) if record and record.bandwidth_gbs else None
