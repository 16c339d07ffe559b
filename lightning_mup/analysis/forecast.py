"""What a fit must say of itself to be exported, and forecasts: written before a run starts, compared after it.

The checklist is that of "(Mis)Fitting": a law is worth as much as what is known of how it was made.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, get_args

from lightning_mup.analysis.isoflop import IsoFlop
from lightning_mup.analysis.optimum import CONFIDENCE
from lightning_mup.analysis.runs import METRICS, RESULT, Metric, Run, read_run
from lightning_mup.analysis.scaling_law import JointLaw, ScalingLaw
from lightning_mup.analysis.transfer import plain
from lightning_mup.core.registry import near

FORECAST = "forecast.json"
Law = ScalingLaw | JointLaw | IsoFlop
_OTHER = 0.02  # a run whose tokens or parameters differ from the plan by more than this fraction is another run


@dataclass(frozen=True, slots=True)
class Checklist:
    """What only the one who made the runs can say; what was fitted and how is written by the fit.

    Args:
        metric: which loss: ``"val_loss"`` or ``"train_loss"``.
        loss: on what it was measured and over how many tokens, as a sentence.
        data: fingerprint of the data that all runs saw, as ``run.json`` has it.
        runs: which runs, so that others can find them: folders, names or a table.
        params: how parameters were counted (with embeddings or without); ``""`` where the law has none.
        tokens: how tokens were counted (repeated or not, last step or mean); ``""`` where the law has none.
        flops: how FLOPs were counted (6ND or with attention); ``""`` where the law has none.
        training: how hyperparameters, batch and schedule were chosen at each size.
        selection: how the runs were chosen: final losses or points along a run, the best of a sweep or all.

    Reference:
        arXiv:2502.18969, appendix with the checklist.
    """

    metric: str = ""
    loss: str = ""
    data: str = ""
    runs: str = ""
    params: str = ""
    tokens: str = ""
    flops: str = ""
    training: str = ""
    selection: str = ""


@dataclass(frozen=True, slots=True)
class Forecast:
    """The loss of a planned run, with its 95% interval.

    Args:
        metric: which loss.
        data: fingerprint of the data that the law is of.
        sizes: the run's size by name: params and tokens, or flops.
        loss: the law's loss there.
        low: lower end of the interval for one run.
        high: upper end.
        beyond: how many times each size exceeds the largest fitted one; below 1 where it does not.
        law: the fit as :func:`export` writes it, checklist included.
    """

    metric: Metric
    data: str
    sizes: Mapping[str, float]
    loss: float
    low: float
    high: float
    beyond: Mapping[str, float]
    law: Mapping[str, object]

    def __str__(self) -> str:
        """Say the forecast in a sentence."""
        size = ", ".join(f"{name} {value:.3g}" for name, value in self.sizes.items())
        far = ", ".join(f"{name} {ratio:.3g}x" for name, ratio in self.beyond.items() if ratio > 1)
        text = f"{self.metric} {self.loss:.4f} [{self.low:.4f}, {self.high:.4f}] at {size}"
        return f"{text}; beyond the largest fitted: {far}" if far else text


@dataclass(frozen=True, slots=True)
class Comparison:
    """A forecast beside what the run reached.

    Args:
        forecast: what was written before the run.
        loss: what the run reached; inf where it diverged.
        inside: whether that is within the interval; None where another run was done than was planned.
        off: loss over the forecast one, less 1; inf where the run diverged.
        words: the same in a sentence.
    """

    forecast: Forecast
    loss: float
    inside: bool | None
    off: float
    words: str

    def __str__(self) -> str:
        """Print the sentence."""
        return self.words


def export(law: Law, checklist: Checklist) -> str:
    """Return a fit as JSON: form, parameters with intervals, how it was fitted, the points, and the checklist.

    Numbers that are not finite become the strings "nan", "inf" and "-inf".

    Args:
        law: what a fit returned.
        checklist: what the fit itself cannot know.

    Raises:
        ValueError: the checklist lacks something; the message names what.

    Examples:
        >>> from lightning_mup.analysis.scaling_law import fit_compute
        >>> law = fit_compute([1e18, 1e19, 1e20, 1e21], [2.7, 2.4, 2.2, 2.06])
        >>> words = Checklist("val_loss", "last step", "text-3fe1", "all of sweep", training="muP", flops="6ND")
        >>> export(law, words)
        Traceback (most recent call last):
        ...
        ValueError: a fit of flops is exported with a whole checklist, it lacks selection (how the runs were chosen)

    Reference:
        arXiv:2502.18969.
    """
    return json.dumps(as_table(law, checklist), indent=1, allow_nan=False)


def as_table(law: Law, checklist: Checklist) -> dict[str, object]:
    """Return what :func:`export` writes, as plain values.

    Raises:
        ValueError: the checklist lacks something; the message names what.
    """
    _check(checklist, _sizes(law))
    stated = {name: text for name, text in asdict(checklist).items() if text}
    found = plain({**_fit_table(law), "checklist": stated})
    assert isinstance(found, dict)
    return found


def make_forecast(
    law: ScalingLaw,
    checklist: Checklist,
    *,
    params: float | None = None,
    tokens: float | None = None,
    flops: float | None = None,
) -> Forecast:
    """Forecast the loss of one planned run: the law's loss, the uncertainty of its parameters, and one run's noise.

    Args:
        law: of params and tokens, or of flops.
        checklist: of the fit, see :func:`export`.
        params: parameters of the run (> 0), counted as in the fit.
        tokens: its tokens (> 0).
        flops: its FLOPs (> 0).

    Raises:
        ValueError: a size of the law is missing or not positive, another one is given, or the checklist lacks
            something.

    Examples:
        >>> from lightning_mup.analysis.scaling_law import fit_compute
        >>> law = fit_compute([1e18, 1e19, 1e20, 1e21], [1.7 + x**-0.15 for x in (0.1, 1, 10, 100)])
        >>> checklist = Checklist(
        ...     "val_loss",
        ...     "last step, 10M tokens",
        ...     "text-3fe1",
        ...     "sweep",
        ...     training="tuned at 19M",
        ...     flops="6ND",
        ...     selection="all runs of the sweep",
        ... )
        >>> print(make_forecast(law, checklist, flops=1e22))
        val_loss 2.0548 [2.0548, 2.0548] at flops 1e+22; beyond the largest fitted: flops 10x
    """
    given = {"params": params, "tokens": tokens, "flops": flops}
    sizes = {name: value for name, value in given.items() if value is not None}
    if tuple(sizes) != law.sizes:
        raise ValueError(f"this law needs {' and '.join(law.sizes)}, got {', '.join(sizes) or 'nothing'}")
    table = as_table(law, checklist)
    found = law.loss_of_run(*sizes.values())
    beyond = {name: value / largest for (name, value), largest in zip(sizes.items(), law.largest, strict=True)}
    return Forecast(
        metric="train_loss" if checklist.metric == "train_loss" else "val_loss",
        data=checklist.data,
        sizes=sizes,
        loss=found.value,
        low=found.low,
        high=found.high,
        beyond=beyond,
        law=table,
    )


def write_forecast(folder: str | Path, forecast: Forecast) -> Path:
    """Write ``forecast.json`` into the directory of a run that has not started, and return its path.

    Raises:
        ValueError: the run has logged or ended already, or has a forecast.
    """
    folder = Path(folder)
    for name, why in ((METRICS, "has started"), (RESULT, "has ended"), (FORECAST, "has a forecast already")):
        if (folder / name).exists():
            raise ValueError(f"the run in {folder} {why} ({name}), and a forecast is written before; give a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / FORECAST
    with path.open("x") as file:
        json.dump(plain({**asdict(forecast), "confidence": CONFIDENCE}), file, indent=1, allow_nan=False)
    return path


def read_forecast(folder: str | Path) -> Forecast:
    """Read the ``forecast.json`` of a run's directory.

    Raises:
        ValueError: there is none, or it is broken.
    """
    path = Path(folder) / FORECAST
    try:
        found: dict[str, Any] = json.loads(path.read_text())
        values = {f.name: found[f.name] for f in fields(Forecast)}
        return Forecast(**{**values, **{name: float(values[name]) for name in ("loss", "low", "high")}})
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error}; write_forecast writes it before the run") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no forecast ({error!r}); write it again before the run starts") from error


def compare_forecast(folder: str | Path) -> Comparison:
    """Compare what a run reached with what was forecast in its directory.

    Raises:
        ValueError: there is no forecast, the run has not ended, or it saw other data than the law's runs.
    """
    forecast, run = read_forecast(folder), read_run(folder)
    if run.result is None:
        raise ValueError(f"the run in {folder} has no {RESULT} yet; compare it once it has ended")
    if run.data != forecast.data:
        raise ValueError(
            f"the law was fitted on data {forecast.data!r}, the run in {folder} saw {run.data!r}; their losses cannot "
            "be compared"
        )
    loss = run.loss(forecast.metric)
    off = loss / forecast.loss - 1
    if loss == math.inf:
        return Comparison(forecast, loss, False, off, f"the run diverged; forecast was {forecast}")
    reached = f"{forecast.metric} {loss:.4f}, {off:+.2%} against the forecast {forecast.loss:.4f}"
    if other := _other_run(forecast, run):
        return Comparison(forecast, loss, None, off, f"{reached}; but not the planned run: {other}")
    inside = forecast.low <= loss <= forecast.high
    end = forecast.high if loss > forecast.high else forecast.low
    where = "within" if inside else f"{'above' if loss > end else 'below'}, by {abs(loss - end):.4f},"
    words = f"{reached}; {where} the {CONFIDENCE:.0%} interval [{forecast.low:.4f}, {forecast.high:.4f}]"
    return Comparison(forecast, loss, inside, off, words)


def _other_run(forecast: Forecast, run: Run) -> str:
    """Say in what the run that was done differs from the planned one, or nothing."""
    assert run.result is not None
    done = {"params": (run.params, run.non_embedding_params), "tokens": (run.result.tokens,), "flops": (run.flops,)}
    differ = {name: done[name] for name, planned in forecast.sizes.items() if not _near_any(planned, done[name])}
    return "; ".join(
        f"{name} {' or '.join(f'{x:.4g}' for x in found)}, planned {forecast.sizes[name]:.4g}"
        for name, found in differ.items()
    )


def _near_any(planned: float, found: tuple[float, ...]) -> bool:
    return any(abs(x / planned - 1) <= _OTHER for x in found)


def _check(checklist: Checklist, sizes: tuple[str, ...]) -> None:
    asked = {
        "metric": "which loss",
        "loss": "on what the loss was measured",
        "data": "the data's fingerprint",
        "runs": "which runs these are",
        "params": "how parameters were counted",
        "tokens": "how tokens were counted",
        "flops": "how FLOPs were counted",
        "training": "how hyperparameters, batch and schedule were chosen at each size",
        "selection": "how the runs were chosen",
    }
    needed = [name for name in asked if name not in {"params", "tokens", "flops"} - set(sizes)]
    if missing := [name for name in needed if not str(getattr(checklist, name)).strip()]:
        words = ", ".join(f"{name} ({asked[name]})" for name in missing)
        raise ValueError(f"a fit of {' and '.join(sizes)} is exported with a whole checklist, it lacks {words}")
    if checklist.metric not in get_args(Metric):
        allowed = get_args(Metric)
        raise ValueError(
            f"metric must be one of {', '.join(allowed)}, got {checklist.metric!r}{near(checklist.metric, allowed)}"
        )


def _sizes(law: Law) -> tuple[str, ...]:
    if isinstance(law, JointLaw):
        return ("flops",)
    return law.sizes if isinstance(law, ScalingLaw) else ("params", "tokens", "flops")


def _fit_table(law: Law) -> dict[str, object]:
    if isinstance(law, JointLaw):
        return {"E": asdict(law.irreducible), "laws": {label: _fit_table(one) for label, one in law.laws.items()}}
    if isinstance(law, IsoFlop):
        exponents = {"p": asdict(law.params_exponent), "q": asdict(law.tokens_exponent)}
        return {
            "form": "N ~ C^p, D ~ C^q",
            "estimates": exponents,
            "budgets": [asdict(budget) for budget in law.budgets],
            "fitting": asdict(law.fitting),
            "notes": list(law.notes),
            "points": law.table,
        }
    return {
        "form": law.form,
        "estimates": {name: asdict(value) for name, value in law.estimates.items()},
        "fitting": asdict(law.fitting),
        "notes": list(law.notes),
        "points": law.table,
    }
