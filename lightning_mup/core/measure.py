"""Measure how large an optimizer's raw update is, to check a declaration or to get a rule nobody declared."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import product
from typing import Literal

import torch
from torch import nn
from torch.optim import Optimizer

from lightning_mup.core.method import Method, Settings, Size
from lightning_mup.core.power import SPECTRAL, Power
from lightning_mup.core.trial import SAMPLES, Factory, OwnFactor, Trial, checked, run

Eps = Mapping[str, Size | tuple[Size, ...]]

_WEIGHTS = (0.25, 1.0, 4.0)
_EPSILONS = (1.0, 0.25, 1 / 16)
_MAX_RESIDUAL = 0.1  # in log; the optimizers of torch stay below 0.05
_SNAP = 1 / 24  # half the smallest distance between fractions of denominators 3 and 4


@dataclass(frozen=True, slots=True)
class Measurement:
    """How large the update of an optimizer was found to be.

    Args:
        optimizer: its class.
        fitted: exponents of ``fan_in``, ``fan_out``, ``depth``, ``weight`` (and ``eps``) as they were fitted.
        residual: largest distance of a trial from the fit, in natural logarithm.
        trials: what was measured.
        settings: the optimizer's settings.
        own_factor: what was divided out.

    Examples:
        >>> found = measure_update_norm(lambda params: torch.optim.SGD(params, lr=0.1), widths=(16, 32))
        >>> print(found.power, "| lr:", found.lr_multiplier)
        fan_in^1/2 fan_out^-1/2 depth^-1 | lr: fan_in^-1 fan_out depth
    """

    optimizer: type[Optimizer]
    fitted: Mapping[str, float] = field(hash=False)
    residual: float
    trials: tuple[Trial, ...] = field(hash=False)
    settings: Settings = field(hash=False)
    own_factor: OwnFactor | None = None

    @property
    def power(self) -> Power:
        """The update's monomial; an exponent near a fraction of denominator 4 or less is taken to be that fraction."""
        return Power(*(_simple(self.fitted[name]) for name in ("fan_in", "fan_out", "depth")))

    @property
    def weight_degree(self) -> int:
        """The power of the weight's RMS in the update.

        Raises:
            ValueError: it is no integer.
        """
        degree = round(self.fitted["weight"])
        if abs(degree - self.fitted["weight"]) > 2 * _SNAP:
            raise ValueError(
                f"the update of {self.optimizer.__name__} goes as the weight's RMS to the power "
                f"{self.fitted['weight']:.3f}; only integers can be declared. Is weight decay off?"
            )
        return degree

    @property
    def lr_multiplier(self) -> Power:
        """The learning rate's monomial for a spectral update under mup with 1/L branches: ``SPECTRAL / power``."""
        return SPECTRAL / self.power

    def method(
        self, *, name: str | None = None, eps: Eps | None = None, decay: Literal["coupled", "l2"] = "coupled"
    ) -> Method:
        """Return the declaration, for ``Parametrize(declare=[...])``; see :func:`measure`.

        Raises:
            ValueError: a setting ``eps`` is no plain number or sets the update's size, and nobody says what it is
                compared with.
        """
        return Method(
            name=name or self.optimizer.__name__.lower(),
            update_norm=self.power,
            optimizers=(self.optimizer,),
            eps=self._eps() if eps is None else dict(eps),
            weight_degree=self.weight_degree,
            decay=decay,
            own_factor=self.own_factor,
            reference=f"measured: {self.exponents()}, residual {self.residual:.3f}",
        )

    def exponents(self) -> str:
        """Return the fitted exponents as text."""
        return " ".join(f"{name}^{round(value, 3) + 0.0:.3f}" for name, value in self.fitted.items())

    def declaration(self) -> str:
        """Return the line of Python that declares what was measured.

        Examples:
            >>> found = measure_update_norm(lambda params: torch.optim.Rprop(params, lr=0.1), widths=(64, 128))
            >>> print(found.declaration())
            Method(name='rprop', update_norm=Power(fan_in=1/2, fan_out=1/2), optimizers=(Rprop,))
        """
        powers = [(name, _simple(self.fitted[name])) for name in ("fan_in", "fan_out", "depth")]
        power = ", ".join(f"{name}={value}" for name, value in powers if value)
        parts = [f"name={self.optimizer.__name__.lower()!r}", f"update_norm=Power({power})"]
        parts.append(f"optimizers=({self.optimizer.__name__},)")
        parts += ["eps={'eps': Size(grad=1)}"] if self._negligible_eps else []
        parts += [f"weight_degree={self.weight_degree}"] if self.weight_degree else []
        return f"Method({', '.join(parts)})"

    @property
    def _negligible_eps(self) -> bool:
        return abs(self.fitted.get("eps", math.inf)) <= 2 * _SNAP

    def _eps(self) -> Eps:
        value = self.settings.get("eps")
        if value is None:
            return {}
        if not _is_number(value):
            raise ValueError(
                f"the setting eps={value!r} of {self.optimizer.__name__} is no plain number, so what it is compared "
                f"with must be said: eps={{'eps': (Size(grad=1), Size(weight=1))}}, say, or eps={{}} to leave it alone"
            )
        if not self._negligible_eps:
            raise ValueError(
                f"the setting eps={value!r} of {self.optimizer.__name__} matters even for large gradients: the update "
                f"goes as its power {self.fitted['eps']:.3f}; say eps={{}} to leave it alone, or what to compare with"
            )
        return {"eps": Size(grad=1)}


def measure(
    factory: Factory,
    *,
    name: str | None = None,
    eps: Eps | None = None,
    decay: Literal["coupled", "l2"] = "coupled",
    own_factor: OwnFactor | None = None,
    widths: Sequence[int] = (64, 128, 256, 512),
) -> Method:
    """Return the declaration of an optimizer that nobody declared, from a measurement of its update.

    The update is measured by :func:`measure_update_norm`; everything is said there about the regime in which the
    result holds. What cannot be measured so is taken from the arguments.

    Args:
        factory: makes the optimizer from a list of parameters, as for :func:`measure_update_norm`.
        name: what to call it; the class' name in lower case if not given.
        eps: per setting name, what it is compared with. Epsilon is negligible in the measurement; without an answer a
            setting named ``eps`` is taken to stand beside the root of a second moment, hence to scale as the gradient.
        decay: ``"coupled"`` where one step removes lr x weight_decay of the weight, ``"l2"`` where weight_decay x W
            is added to a gradient that is normalized afterwards.
        own_factor: the implementation's own factor on the learning rate, from (settings, fan_out, fan_in), where it is
            no monomial.
        widths: sizes to measure at.

    Raises:
        ValueError: the update is no monomial in the sizes, or cannot be measured.
        TypeError: the factory returns no optimizer.

    Examples:
        >>> class SignDescent(torch.optim.SGD):
        ...     def step(self, closure=None):
        ...         for p in self.param_groups[0]["params"]:
        ...             p.data -= self.param_groups[0]["lr"] * p.grad.sign()
        >>> method = measure(lambda params: SignDescent(params, lr=0.1))
        >>> print(method.name, "|", method.update_norm)
        signdescent | fan_in^1/2 fan_out^1/2
    """
    found = measure_update_norm(factory, widths=widths, own_factor=own_factor)
    return found.method(name=name, eps=eps, decay=decay)


def measure_update_norm(
    factory: Factory,
    *,
    widths: Sequence[int] = (64, 128, 256, 512),
    depths: Sequence[int] = (1, 4, 16, 64),
    steps: int = 8,
    own_factor: OwnFactor | None = None,
) -> Measurement:
    """Fit ``||update||_2 / lr = c fan_in^a fan_out^b depth^d weight^e`` to what an optimizer does to one matrix.

    Regime: early training, gradients of low rank that stay aligned from step to step, ``G = sum_s delta_s x_s^T`` with
    entries Theta(1) in x and Theta(1/(depth fan_out)) in delta, epsilon negligible. The exponents of ``fan_in`` and
    ``fan_out`` come from every pair of widths, those of ``depth`` and of the weight's RMS from the smallest matrix.
    Neither the global random state nor the caller's device is touched.

    Args:
        factory: makes the optimizer from a list of parameters, without weight decay, and with a learning rate so small
            that the weight (of RMS 1/4 to 4) hardly changes, if the update depends on it; 0.01 is right for most.
        widths: sizes of both sides, at least two, each >= 8.
        depths: factors 1/depth on the gradient, at least two; far apart, so that an update in which a threshold or an
            epsilon matters is seen to be no monomial.
        steps: number of steps; the last is measured. RAdam's first five (at beta2 = 0.999) are SGD's.
        own_factor: factor on the learning rate to divide out, from (settings, fan_out, fan_in).

    Raises:
        ValueError: the update is no monomial (the residual is said), weight decay is on, the step fails or changes
            nothing, or the sizes are too few.
        TypeError: the factory returns no optimizer.

    Examples:
        >>> found = measure_update_norm(lambda params: torch.optim.Adafactor(params, lr=0.1, weight_decay=0))
        >>> print(found.power, "| power of the weight's RMS:", found.weight_degree)
        fan_in^1/2 fan_out^1/2 | power of the weight's RMS: 1

    Reference:
        arXiv:2512.05620, section 3.1 (sizes of gradients) and App. B.7 (spectral norms of updates).
    """
    _check_sizes(widths, depths, steps)
    side = min(widths)
    plan = [
        [Trial(fan_in, fan_out) for fan_in, fan_out in product(widths, repeat=2)],
        [Trial(side, side, depth=depth) for depth in depths],
        [Trial(side, side, weight=weight) for weight in _WEIGHTS],
    ]
    with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.enable_grad():
        optimizer = checked(factory([nn.Parameter(torch.zeros(side, side))]))
        if _is_number(optimizer.param_groups[0].get("eps")):
            plan.append([Trial(side, side, eps=eps) for eps in _EPSILONS])
        done = [[run(factory, trial, steps, own_factor) for trial in part] for part in plan]
        return _refuse_misfit(_fit(done, optimizer, own_factor))


def _check_sizes(widths: Sequence[int], depths: Sequence[int], steps: int) -> None:
    if len(set(widths)) < 2 or min(widths) < 2 * SAMPLES:
        raise ValueError(f"widths must be at least two sizes >= {2 * SAMPLES}, got {widths}; try (64, 128, 256)")
    if len(set(depths)) < 2 or min(depths) < 1:
        raise ValueError(f"depths must be at least two numbers >= 1, got {depths}; try (1, 4, 16)")
    if steps < 1:
        raise ValueError(f"steps must be >= 1, got {steps}")


def _fit(done: Sequence[Sequence[Trial]], optimizer: Optimizer, own_factor: OwnFactor | None) -> Measurement:
    scans: list[tuple[Callable[[Trial], tuple[float, ...]], tuple[str, ...]]] = [
        (lambda t: (t.fan_in, t.fan_out), ("fan_in", "fan_out")),
        (lambda t: (t.depth,), ("depth",)),
        (lambda t: (t.weight,), ("weight",)),
        (lambda t: (t.eps,), ("eps",)),
    ]
    fitted: dict[str, float] = {}
    residual = 0.0
    for trials, (sizes, names) in zip(done, scans, strict=False):  # not every optimizer has an epsilon
        slopes, off = _slopes(trials, sizes)
        fitted |= zip(names, slopes, strict=True)
        residual = max(residual, off)
    return Measurement(
        optimizer=type(optimizer),
        fitted=fitted,
        residual=residual,
        trials=tuple(trial for part in done for trial in part),
        settings={key: value for key, value in optimizer.param_groups[0].items() if key != "params"},
        own_factor=own_factor,
    )


def _refuse_misfit(found: Measurement) -> Measurement:
    if found.residual > _MAX_RESIDUAL:
        raise ValueError(
            f"the update of {found.optimizer.__name__} is no monomial in the sizes: the best fit, "
            f"{found.exponents()}, is off by {found.residual:.2f} in log norm (allowed {_MAX_RESIDUAL}). If the "
            f"optimizer has a shape factor of its own, pass own_factor=; else declare a Method whose update_norm is a "
            f"function of the spec"
        )
    return found


def _slopes(trials: Sequence[Trial], sizes: Callable[[Trial], tuple[float, ...]]) -> tuple[list[float], float]:
    """Return the least-squares slopes of log norm against log sizes, and the largest residual."""
    columns = torch.tensor([[*map(math.log, sizes(trial)), 1.0] for trial in trials], dtype=torch.float64)
    norms = torch.tensor([[math.log(trial.norm)] for trial in trials], dtype=torch.float64)
    solution = torch.linalg.lstsq(columns, norms).solution
    return solution[:-1, 0].tolist(), float((columns @ solution - norms).abs().max())


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float))


def _simple(value: float) -> Fraction:
    simple = Fraction(value).limit_denominator(4)
    return simple if abs(value - simple) <= _SNAP else Fraction(value).limit_denominator(100)
