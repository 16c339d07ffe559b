"""Coordinate check: how the change of each layer's output, and each update, grows with width or depth."""

from __future__ import annotations

import csv
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal, cast

import numpy as np
from scipy.special import stdtrit

from lightning_mup.core.plan import aligned

Kind = Literal["output", "update"]
NO_CHANGE = "no change"
STREAM = "stream"
"""Group of residual blocks and of the whole model: what they put out is the residual stream."""
_INDEX = re.compile(r"^\d+$")
_CONFIDENCE = 0.95
_NAMED = 6  # layers in the verdict's line; the table has them all


@dataclass(frozen=True, slots=True)
class Coordinate:
    """One measured number.

    Args:
        size: width or depth of the model.
        seed: seed of the run.
        step: optimizer steps taken, 1 or more.
        kind: ``"output"``: RMS over all entries of ``h_t - h_0``, a module's outputs on a fixed batch; ``"update"``:
            spectral norm of ``W_t - W_(t-1)`` over the norm that the spectral condition wants.
        layer: canonical name of the module or of the parameter.
        value: the number (>= 0; not finite where training diverged).
        group: what the layer is, for pictures: a role, or ``"stream"`` for residual blocks.
    """

    size: int
    seed: int
    step: int
    kind: Kind
    layer: str
    value: float
    group: str = ""


@dataclass(frozen=True, slots=True)
class Slope:
    """How one layer's number grows with size at one step: the fitted ``d log(value) / d log(size)``.

    Args:
        layer: name of the layer; block numbers are ``*`` where the number of blocks varies.
        kind: ``"output"`` or ``"update"``.
        step: optimizer steps taken.
        slope: the slope; nan where none can be fitted.
        low: lower end of its 95% interval.
        high: upper end.
        passed: whether the slope is within the tolerance, or nothing changed at any size.
        note: why there is no slope, ``""`` where there is one.
        group: what the layer is.
    """

    layer: str
    kind: Kind
    step: int
    slope: float
    low: float
    high: float
    passed: bool
    note: str = ""
    group: str = ""

    def __str__(self) -> str:
        """Print the slope with its interval, or why there is none."""
        return self.note or f"{self.slope:+.2f} [{self.low:+.2f}, {self.high:+.2f}]"


@dataclass(frozen=True, slots=True)
class CoordinateReport:
    """The outcome of a coordinate check.

    Args:
        slopes: one per layer, kind and step.
        records: the numbers behind them, block numbers merged where the number of blocks varies.
        tolerance: largest slope, up or down, that passes (> 0).
        size: what varied, ``"width"`` or ``"depth"``.

    Examples:
        >>> records = [Coordinate(n, 0, 1, "output", "fc", float(n)) for n in (64, 128, 256)]
        >>> report = fit_slopes(records)
        >>> report.passed, [s.layer for s in report.failed]
        (False, ['fc'])
        >>> print(report.table())
        FAIL: 1 of 1 slopes over width 64..256 (seeds 0, step 1) exceed 0.1: fc +1.00
        layer  kind    step 1  worst                 verdict
        fc     output  +1.00   +1.00 [+1.00, +1.00]  FAIL
    """

    slopes: tuple[Slope, ...]
    records: tuple[Coordinate, ...]
    tolerance: float
    size: str = "width"

    @property
    def passed(self) -> bool:
        """Whether every layer passes at every step."""
        return all(s.passed for s in self.slopes)

    @property
    def failed(self) -> tuple[Slope, ...]:
        """The worst slope of each layer and kind that fails, the worst first."""
        return tuple(sorted((s for s in self.worst if not s.passed), key=_badness, reverse=True))

    @property
    def worst(self) -> tuple[Slope, ...]:
        """The worst slope of each layer and kind, over steps."""
        return tuple(max(group, key=_badness) for group in self._by_layer())

    @property
    def steps(self) -> tuple[int, ...]:
        """The steps at which slopes were fitted."""
        return tuple(sorted({s.step for s in self.slopes}))

    def rows(self) -> list[dict[str, object]]:
        """Return one plain dict per slope."""
        return [asdict(s) for s in self.slopes]

    def verdict(self) -> str:
        """Return one line: pass or fail, over what, and the layers that fail with their worst slopes."""
        count = sum(not s.passed for s in self.slopes)
        sizes, seeds = ({getattr(r, key) for r in self.records} for key in ("size", "seed"))
        over = f"{self.size} {_span(sizes)} (seeds {_span(seeds)}, {'steps' if len(self.steps) > 1 else 'step'} "
        over += f"{_span(self.steps)})"
        if self.passed:
            return f"PASS: all {len(self.slopes)} slopes over {over} are within {self.tolerance:g}"
        named = ", ".join(f"{s.layer} {s.note or format(s.slope, '+.2f')}" for s in self.failed[:_NAMED])
        named += f" and {more} more" if (more := len(self.failed) - _NAMED) > 0 else ""
        return f"FAIL: {count} of {len(self.slopes)} slopes over {over} exceed {self.tolerance:g}: {named}"

    def table(self) -> str:
        """Return the verdict and an aligned table, one line per layer and kind."""
        ends = sorted({self.steps[0], self.steps[-1]})
        header = ["layer", "kind", *(f"step {step}" for step in ends), "worst", "verdict"]
        if len(self.steps) > 1:
            header.insert(-1, "at step")
        return "\n".join([self.verdict(), *aligned([header, *(self._line(g, ends) for g in self._by_layer())])])

    def __str__(self) -> str:
        """Print the table."""
        return self.table()

    def _line(self, group: Sequence[Slope], ends: Sequence[int]) -> list[str]:
        worst = max(group, key=_badness)
        at = {s.step: s for s in group}
        shown = [s.note or f"{s.slope:+.2f}" if (s := at.get(step)) else "" for step in ends]
        verdict = "pass" if all(s.passed for s in group) else "FAIL"
        step = [str(worst.step)] if len(self.steps) > 1 else []
        return [worst.layer, worst.kind, *shown, str(worst), *step, verdict]

    def _by_layer(self) -> Iterable[list[Slope]]:
        groups: dict[tuple[str, str], list[Slope]] = defaultdict(list)
        for slope in self.slopes:
            groups[slope.kind, slope.layer].append(slope)
        return groups.values()


def fit_slopes(records: Iterable[Coordinate], *, tolerance: float = 0.1, size: str = "width") -> CoordinateReport:
    """Fit ``log value = slope x log size + c`` by least squares for each layer, kind and step.

    The interval is Student's, at 95%, over sizes x seeds. Where the number of blocks varies, block numbers are replaced
    by ``*`` and the blocks' values by their root mean square. A layer that changes at no size passes as "no change";
    one that changes at some sizes only, is missing at some, or is not finite somewhere, fails and says where.

    Args:
        records: what a :class:`~lightning_mup.callbacks.coordinate_check.CoordinateCheck` recorded at several sizes.
        tolerance: largest slope that passes (> 0).
        size: what varied, for the report.

    Raises:
        ValueError: there are fewer than two sizes, or the tolerance is not positive.

    Examples:
        >>> records = [Coordinate(n, 0, 1, "output", "fc", 3 * n**0.5) for n in (64, 128, 256)]
        >>> print(fit_slopes(records).slopes[0])
        +0.50 [+0.50, +0.50]

    Reference:
        Yang et al. 2022 (arXiv:2203.03466), Appendix D.1 (coordinate checking).
    """
    merged = merge_blocks(records)
    sizes = sorted({r.size for r in merged})
    if len(sizes) < 2:
        raise ValueError(f"a slope needs records at two sizes or more, got {sizes}; give several {size}s")
    if not tolerance > 0:
        raise ValueError(f"tolerance must be positive, got {tolerance!r}; 0.1 is usual for width")
    groups: dict[tuple[str, str, int], list[Coordinate]] = defaultdict(list)
    for record in merged:
        groups[record.kind, record.layer, record.step].append(record)
    return CoordinateReport(tuple(_fit(g, sizes, tolerance) for g in groups.values()), merged, tolerance, size)


def merge_blocks(records: Iterable[Coordinate]) -> tuple[Coordinate, ...]:
    """Replace block numbers by ``*`` where the number of blocks varies with size, and average such blocks' values.

    The average is the root mean square. What a residual block puts out is the stream at the block's end, which grows
    from block to block; half a block's growth is taken off, since else the average would fall with depth as 1 + 1/L.

    Examples:
        >>> records = [Coordinate(n, 0, 1, "output", f"layers.{i}.fc", 2.0) for n in (2, 4) for i in range(n)]
        >>> [(r.size, r.layer, r.value) for r in merge_blocks(records)]
        [(2, 'layers.*.fc', 2.0), (4, 'layers.*.fc', 2.0)]
    """
    records = list(records)
    names = _starred(records)
    groups: dict[tuple[int, int, int, Kind, str], list[Coordinate]] = defaultdict(list)
    for r in records:
        groups[r.size, r.seed, r.step, r.kind, names[r.layer]].append(r)
    return tuple(Coordinate(*key, _average(group), group[0].group) for key, group in groups.items())


def save_coordinates(records: Iterable[Coordinate], path: str | Path) -> None:
    """Write records as csv.

    Examples:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "check.csv"
        >>> save_coordinates([Coordinate(64, 0, 1, "output", "fc", 0.5, "hidden")], file)
        >>> load_coordinates(file)
        [Coordinate(size=64, seed=0, step=1, kind='output', layer='fc', value=0.5, group='hidden')]
    """
    with Path(path).open("w", newline="") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(Coordinate)])
        writer.writeheader()
        writer.writerows(asdict(r) for r in records)


def load_coordinates(path: str | Path) -> list[Coordinate]:
    """Read what :func:`save_coordinates` wrote; lists of several runs may be added and fitted together."""
    with Path(path).open(newline="") as file:
        return [_record(row) for row in csv.DictReader(file)]


def _record(row: Mapping[str, str]) -> Coordinate:
    numbers = (int(row["size"]), int(row["seed"]), int(row["step"]))
    return Coordinate(*numbers, cast(Kind, row["kind"]), row["layer"], float(row["value"]), row["group"])


def _starred(records: Iterable[Coordinate]) -> dict[str, str]:
    sizes_of: dict[str, set[int]] = defaultdict(set)
    for r in records:
        sizes_of[r.layer].add(r.size)
    names = {layer: layer.split(".") for layer in sizes_of}
    for position in range(max((len(parts) for parts in names.values()), default=0)):
        growing = _growing(names, sizes_of, position)
        for parts in names.values():
            if tuple(parts[:position]) in growing and len(parts) > position and _INDEX.match(parts[position]):
                parts[position] = "*"
    return {layer: ".".join(parts) for layer, parts in names.items()}


def _growing(names: Mapping[str, list[str]], sizes_of: Mapping[str, set[int]], position: int) -> set[tuple[str, ...]]:
    """Prefixes whose numbered children are not the same at every size that has the prefix."""
    children: dict[tuple[str, ...], dict[int, set[str]]] = defaultdict(lambda: defaultdict(set))
    for layer, parts in names.items():
        if len(parts) > position and _INDEX.match(parts[position]):
            for size in sizes_of[layer]:
                children[tuple(parts[:position])][size].add(parts[position])
    return {prefix for prefix, by_size in children.items() if len(set(map(frozenset, by_size.values()))) > 1}


def _fit(group: Sequence[Coordinate], sizes: Sequence[int], tolerance: float) -> Slope:
    note = _note(group, sizes)
    slope, low, high = (math.nan,) * 3 if note else _line_fit([(r.size, r.value) for r in group])
    passed = note == NO_CHANGE or abs(slope) <= tolerance
    last = max(group, key=lambda r: r.size)  # at the smallest size nothing tells a layer's role
    return Slope(last.layer, last.kind, last.step, slope, low, high, passed, note, last.group)


def _note(group: Sequence[Coordinate], sizes: Sequence[int]) -> str:
    missing = [n for n in sizes if all(r.size != n for r in group)]
    diverged = sorted({r.size for r in group if not math.isfinite(r.value)})
    still = sorted({r.size for r in group if r.value == 0})
    if diverged or missing:
        return f"not finite at {_list(diverged)}" if diverged else f"missing at {_list(missing)}"
    if all(r.value == 0 for r in group):
        return NO_CHANGE
    return f"{NO_CHANGE} at {_list(still)}" if still else ""


def _line_fit(points: Sequence[tuple[int, float]]) -> tuple[float, float, float]:
    x, y = np.log(np.array(points, dtype=np.float64)).T
    x, y = x - x.mean(), y - y.mean()
    slope = float(x @ y / (x @ x))
    freedom = len(points) - 2
    if freedom < 1:  # a line through two points: nothing tells how sure the slope is
        return slope, -math.inf, math.inf
    error = math.sqrt(float(np.square(y - slope * x).sum()) / freedom / float(x @ x))
    margin = error * float(stdtrit(freedom, (1 + _CONFIDENCE) / 2))
    return slope, slope - margin, slope + margin


def _badness(slope: Slope) -> float:
    if math.isnan(slope.slope):
        return -1.0 if slope.passed else math.inf
    return abs(slope.slope)


def _average(blocks: Sequence[Coordinate]) -> float:
    values = [r.value for r in blocks]
    if len(values) == 1:
        return values[0]
    growth = (values[-1] - values[0]) / (len(values) - 1) if blocks[0].group == STREAM else 0.0
    return math.sqrt(sum(v * v for v in values) / len(values)) - growth / 2


def _span(numbers: Iterable[int]) -> str:
    low, high = min(numbers := list(numbers)), max(numbers)
    return str(low) if low == high else f"{low}..{high}"


def _list(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))
