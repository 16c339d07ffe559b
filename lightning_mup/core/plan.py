"""The plan: one printable row per parameter, from which optimizer, callbacks and checkpoint all read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from lightning_mup.core.spec import ParamSpec

EpsValue = float | tuple[float, ...]
Row = dict[str, object]


@dataclass(frozen=True, slots=True)
class ParamPlan:
    """What is done to one parameter; every number is a factor on the value at the base, 1 where nothing changes.

    Args:
        spec: what the parameter is.
        method: name of the optimizer's declaration, ``""`` while none holds it.
        init: factor on the standard deviation of its initial values.
        lr: factor on the learning rate.
        eps: factor on each epsilon-like setting.
        weight_decay: factor on the fraction removed per step (independent weight decay).
        group_weight_decay: factor on the optimizer's own ``weight_decay`` setting that brings this about.
        folded: forward multiplier that is folded into the numbers above.
        forward: forward multiplier that a hook applies.
        readout: multiplier that a hook applies to the outputs of the modules that share it as a readout.

    Examples:
        >>> from torch import nn
        >>> from lightning_mup import plan
        >>> row = plan(nn.Linear(64, 2), base=lambda: nn.Linear(16, 2), method="adam")["weight"]
        >>> row.init, row.lr, row.weight_decay, dict(row.eps)
        (0.25, 0.25, 0.25, {'eps': 1.0})
    """

    spec: ParamSpec
    method: str = ""
    init: float = 1.0
    lr: float = 1.0
    eps: Mapping[str, EpsValue] = field(default_factory=dict)
    weight_decay: float = 1.0
    group_weight_decay: float = 1.0
    folded: float = 1.0
    forward: float = 1.0
    readout: float = 1.0

    def row(self) -> Row:
        """Return the row as plain values, rounded to 12 digits so that every machine agrees."""
        spec = self.spec
        numbers = {
            "init": self.init,
            "lr": self.lr,
            "weight_decay": self.weight_decay,
            "group_weight_decay": self.group_weight_decay,
            "folded": self.folded,
            "forward": self.forward,
            "readout": self.readout,
        }
        return {
            "name": spec.name,
            "role": spec.role.value,
            "method": self.method,
            "shape": list(spec.shape),
            "fan_out": str(spec.fan_out),
            "fan_in": str(spec.fan_in),
            "depth": str(spec.depth),
            "branch": spec.branch,
            "eps": {k: [_round(x) for x in v] if isinstance(v, tuple) else _round(v) for k, v in self.eps.items()},
            **{key: _round(value) for key, value in numbers.items()},
            "why": spec.why,
        }


@dataclass(frozen=True, slots=True)
class Plan:
    """Every trainable parameter exactly once, with what is done to it.

    Args:
        params: the rows.
        rules: name of the parametrization.

    Raises:
        ValueError: a parameter occurs twice.

    Examples:
        >>> from torch import nn
        >>> from lightning_mup import plan
        >>> made = plan(nn.Linear(8, 64), base=lambda: nn.Linear(8, 16), method="sgd")
        >>> made["weight"].lr, made.digest() == made.digest()
        (4.0, True)
    """

    params: tuple[ParamPlan, ...]
    rules: str

    def __post_init__(self) -> None:
        names = [p.spec.name for p in self.params]
        twice = sorted({n for n in names if names.count(n) > 1}) if len(set(names)) != len(names) else []
        if twice:
            raise ValueError(f"a plan holds every parameter once, these occur twice: {twice}")

    def __getitem__(self, name: str) -> ParamPlan:
        """Return the row of a parameter by name."""
        for param in self.params:
            if name == param.spec.name or name in param.spec.tied_to:
                return param
        raise KeyError(f"no parameter {name!r} in the plan")

    @property
    def changes_nothing(self) -> bool:
        """Whether every ratio is 1, so that nothing can be carried over."""
        return all(r == 1 for p in self.params for r in p.spec.ratios.values())

    def rows(self) -> list[Row]:
        """Return one plain dict per parameter."""
        return [param.row() for param in self.params]

    def to_json(self) -> str:
        """Return the plan as json, the same text on every machine."""
        return json.dumps({"rules": self.rules, "params": self.rows()}, indent=1)

    def digest(self) -> str:
        """Return a short fingerprint of everything but the reasons."""
        rows = [{k: v for k, v in row.items() if k != "why"} for row in self.rows()]
        return hashlib.sha256(json.dumps([self.rules, rows], sort_keys=True).encode()).hexdigest()[:16]

    def diff(self, other: Sequence[Row]) -> list[str]:
        """Return one line per value in which another plan's rows differ: ``name: key here (there)``.

        Examples:
            >>> from torch import nn
            >>> from lightning_mup import plan
            >>> one, two = (plan(nn.Linear(8, 64), base=lambda n=n: nn.Linear(8, n), method="sgd") for n in (16, 32))
            >>> one.diff(two.rows())[-1]
            'bias: group_weight_decay 0.25 (other: 0.5)'
        """
        mine, theirs = ({str(row["name"]): row for row in rows} for rows in (self.rows(), other))
        lines = [f"{name}: only here" for name in mine if name not in theirs]
        lines += [f"{name}: only in the other" for name in theirs if name not in mine]
        for name in mine.keys() & theirs.keys():
            pairs = ((key, value, theirs[name].get(key)) for key, value in mine[name].items() if key != "why")
            lines += [f"{name}: {key} {value} (other: {there})" for key, value, there in pairs if value != there]
        order = list(mine)
        return sorted(lines, key=lambda line: order.index(n) if (n := line.split(":")[0]) in mine else len(order))

    def table(self) -> str:
        """Return an aligned table, one line per kind of parameter, numbers as factors on the base's values.

        Examples:
            >>> from torch import nn
            >>> from lightning_mup import plan
            >>> print(plan(nn.Linear(8, 64), base=lambda: nn.Linear(8, 16), method="adam").table())
            rules=mup  params=2  factors on the values at the base
            role    n  fan_out  fan_in  method  init  lr  eps   wd    because  example
            input   1  64/16    8/8     adam    1     1   0.25  0.25  Linear   weight
            vector  1  64/16    1/1     adam    1     1   0.25  0.25  1-D      bias
        """
        header, lines = self.summary()
        title = f"rules={self.rules}  params={len(self.params)}  factors on the values at the base"
        return "\n".join([title, *aligned([header, *lines])])

    def summary(self) -> tuple[list[str], list[list[str]]]:
        """Return the header and the cells of :meth:`table`; a column in which all is usual is left out."""
        kinds: dict[tuple[str, ...], list[ParamPlan]] = {}
        for param in self.params:
            kinds.setdefault(_cells(param), []).append(param)
        header = ["role", "n", "fan_out", "fan_in", "depth", "method", "init", "lr", "eps", "wd", "forward", "because"]
        usual = {"depth": "1/1", "eps": "", "forward": "1", "method": ""}
        lines = [[cells[0], str(len(group)), *cells[1:]] for cells, group in kinds.items()]
        keep = [i for i, key in enumerate(header) if key not in usual or any(row[i] != usual[key] for row in lines)]
        examples = [group[0].spec.name for group in kinds.values()]
        body = [[row[i] for i in keep] + [name] for row, name in zip(lines, examples, strict=True)]
        return [header[i] for i in keep] + ["example"], body

    def __str__(self) -> str:
        """Print the table."""
        return self.table()


def aligned(rows: Iterable[Sequence[str]]) -> list[str]:
    """Return the rows as lines with left-aligned columns, two spaces apart.

    Examples:
        >>> aligned([["a", "long"], ["word", "x"]])
        ['a     long', 'word  x']
    """
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _cells(param: ParamPlan) -> tuple[str, ...]:
    spec = param.spec
    because = f"{spec.why}, ends branch" if spec.branch and param.folded * param.forward != 1 else spec.why
    several = len(param.eps) > 1
    eps = " ".join(f"{key}={_show(v)}" if several else _show(v) for key, v in param.eps.items())
    multiplier = _show(param.forward) if param.readout == 1 else f"readout {_show(param.readout)}"
    numbers = (_show(param.init), _show(param.lr), eps, _show(param.weight_decay), multiplier)
    depth = str(spec.depth) if spec.depth.ratio != 1 else "1/1"
    return (spec.role.value, str(spec.fan_out), str(spec.fan_in), depth, param.method, *numbers, because)


def _show(value: EpsValue) -> str:
    return "/".join(map(_show, value)) if isinstance(value, tuple) else f"{value:.4g}"


def _round(value: float) -> float:
    return float(f"{value:.12g}")
