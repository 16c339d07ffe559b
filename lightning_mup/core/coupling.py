"""Between independent weight decay and torch's, which the learning rate multiplies."""

from __future__ import annotations

from lightning_mup.core.factors import multipliers
from lightning_mup.core.method import Method, find_method
from lightning_mup.core.scaling import RulesLike
from lightning_mup.core.spec import Role

Sizes = tuple[int, int]


def coupled_weight_decay(
    independent: float,
    *,
    lr: float,
    method: str | Method = "adamw",
    fan_in: Sizes = (1, 1),
    fan_out: Sizes = (1, 1),
    depth: Sizes = (1, 1),
    role: str | Role = "hidden",
    rules: RulesLike = "mup",
) -> float:
    """Return ``weight_decay = lambda / (lr m)``, with the method's own learning-rate multiplier ``m`` at these sizes.

    One step of torch's AdamW removes ``lr m weight_decay`` of the matrix, hence ``lambda``. A decay that falls as
    1/width is a constant coupled one under Adam, whose rate falls as 1/width, and falls as 1/width under Muon.

    Args:
        independent: fraction of this matrix removed per step at the peak of its schedule (>= 0).
        lr: learning rate at the base (> 0).
        method: the optimizer.
        fan_in: (size, base).
        fan_out: (size, base).
        depth: (size, base), for a matrix inside of a residual block.
        role: what the matrix is.
        rules: parametrization by name.

    Raises:
        ValueError: a value is out of range, or the method adds its decay to a gradient that it then normalizes.

    Examples:
        >>> sizes = {"fan_in": (1024, 128), "fan_out": (1024, 128)}
        >>> [coupled_weight_decay(1e-4 / 8, lr=0.01, method=name, **sizes) for name in ("adamw", "muon")]
        [0.01, 0.00125]

    Reference:
        arXiv:2512.05620, section 4; Loshchilov & Hutter 2019 (arXiv:1711.05101), Algorithm 2.
    """
    return _not_negative(independent) / _rate(lr, method, fan_in, fan_out, depth, role, rules)


def independent_weight_decay(
    coupled: float,
    *,
    lr: float,
    method: str | Method = "adamw",
    fan_in: Sizes = (1, 1),
    fan_out: Sizes = (1, 1),
    depth: Sizes = (1, 1),
    role: str | Role = "hidden",
    rules: RulesLike = "mup",
) -> float:
    """Return ``lambda = lr m weight_decay``, the inverse of :func:`coupled_weight_decay`.

    Args:
        coupled: the optimizer's ``weight_decay`` (>= 0).
        lr: learning rate at the base (> 0).
        method: the optimizer.
        fan_in: (size, base).
        fan_out: (size, base).
        depth: (size, base), for a matrix inside of a residual block.
        role: what the matrix is.
        rules: parametrization by name.

    Raises:
        ValueError: a value is out of range, or the method adds its decay to a gradient that it then normalizes.

    Examples:
        >>> independent_weight_decay(0.1, lr=1e-3, fan_in=(512, 128))
        2.5e-05

    Reference:
        arXiv:2512.05620, section 4.
    """
    return _not_negative(coupled) * _rate(lr, method, fan_in, fan_out, depth, role, rules)


def _rate(
    lr: float, method: str | Method, fan_in: Sizes, fan_out: Sizes, depth: Sizes, role: str | Role, rules: RulesLike
) -> float:
    found = find_method(method)
    if found.decay == "l2":
        raise ValueError(
            f"{found.name} adds weight_decay x W to the gradient and normalizes, so that no coupled value stands for "
            f"an independent one; use method='adamw'"
        )
    if not lr > 0:
        raise ValueError(f"lr must be positive, got {lr!r}; give the rate tuned at the base")
    multiplier = multipliers(found, fan_in, fan_out, depth, role=role, rules=rules)["lr"]
    assert isinstance(multiplier, float)
    return lr * multiplier


def _not_negative(weight_decay: float) -> float:
    if not weight_decay >= 0:
        raise ValueError(f"weight decay must be >= 0, got {weight_decay!r}")
    return weight_decay
