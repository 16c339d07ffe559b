"""Updates of fixed size: spectral norm by power iteration that goes on from step to step, or root mean square.

Shapes: N matrices of a stack, O outputs (rows), I inputs (columns), K vectors that are iterated together.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lightning_mup.core.linalg import check_stack, power_iteration, widened
from lightning_mup.core.transform import ELEMENTWISE, Context, State

_EPS = 1e-10  # as in the authors' code
_WARMUP_ITERATIONS = 5
_POWERS = (16, 16, 16)  # of a matrix of few rows: among 16^3 factors, eigenvalues below the largest by 0.2% are lost


@dataclass(frozen=True, slots=True)
class SpectralNormalize:
    """``u (fan_out/fan_in)^(1/2) / sigma``, with sigma the largest singular value.

    Args:
        iterations: power iterations a step (>= 1), after the warm-up.
        warmup_steps: number of first steps that take five iterations each (>= 0).
        vectors: how many are iterated together (>= 1): one is the paper's estimate, several are
            :func:`block_iteration`.
        name: key of the state.

    Raises:
        ValueError: a setting is out of range.

    Examples:
        >>> normalize, u = SpectralNormalize(), torch.diag(torch.tensor([2.0, 1.0]))[None]
        >>> state = normalize.init(u)
        >>> for step in range(1, 20):
        ...     out = normalize.update(u, state, Context(step))
        >>> torch.linalg.matrix_norm(out, ord=2).round(decimals=3)
        tensor([1.])

    Reference:
        arXiv:2512.05620, App. F.
    """

    iterations: int = 1
    warmup_steps: int = 50
    vectors: int = 1
    name: str = "spectral_normalize"

    def __post_init__(self) -> None:
        if self.iterations < 1 or self.warmup_steps < 0:
            raise ValueError(f"iterations must be >= 1, warmup_steps >= 0, got {self.iterations}, {self.warmup_steps}")
        if self.vectors < 1:
            raise ValueError(f"vectors must be >= 1, got {self.vectors}; 1 is the paper's, 4 follow most steps")

    def init(self, param_NOI: torch.Tensor) -> State:
        """Return the vectors on the output side, from which the iteration goes on: [N, O], of several [N, K, O]."""
        count, rows, columns = param_NOI.shape
        generator = torch.Generator().manual_seed(0)
        shape = (rows,) if self.vectors == 1 else (min(self.vectors, rows, columns), rows)
        start = torch.randn(shape, generator=generator, dtype=torch.float64)
        unit = start / torch.linalg.vector_norm(start, dim=-1, keepdim=True)
        return {"v": unit.to(param_NOI).repeat(count, *[1] * len(shape))}

    def factors(self, u_NOI: torch.Tensor, state: State, ctx: Context, *, unit: float = 1.0) -> torch.Tensor:
        """Return what brings each matrix to spectral norm ``(fan_out/fan_in)^(1/2)``; of a zero matrix 0.

        Shape:
            ``[N, O, I]`` -> ``[N, 1, 1]``.

        Args:
            u_NOI: the stack.
            state: the vectors, which go on.
            ctx: the step.
            unit: what counts as 1 in the matrices (> 0); sigma is taken as ``sigma + 1e-10 unit``.
        """
        iterations = _WARMUP_ITERATIONS if ctx.step <= self.warmup_steps else self.iterations
        estimate = power_iteration if state["v"].ndim == 2 else block_iteration
        sigma_N, v_new = estimate(u_NOI, state["v"], iterations=iterations)
        state["v"].copy_(v_new)
        return _quotient((u_NOI.shape[-2] / u_NOI.shape[-1]) ** 0.5, sigma_N, unit)

    def update(self, u_NOI: torch.Tensor, state: State, ctx: Context) -> torch.Tensor:
        """Return the stack at spectral norm ``(fan_out/fan_in)^(1/2)``."""
        return u_NOI * self.factors(u_NOI, state, ctx)

    def work(self, rows: int, columns: int) -> float:
        """Return the operations per step for one matrix, after the warm-up."""
        return (4.0 * self.iterations * self.vectors + ELEMENTWISE) * rows * columns


@dataclass(frozen=True, slots=True)
class RmsNormalize:
    """``u / rms(u)``, or ``u / (sqrt(fan_in) rms(u))`` where the inputs add up.

    Args:
        over_inputs: whether to divide by ``sqrt(fan_in)``, too; embeddings, which look rows up, do not.
        name: key of the state, of which there is none.

    Examples:
        >>> RmsNormalize().update(torch.tensor([[[3.0, -3.0]]]), {}, Context(step=1))
        tensor([[[ 1., -1.]]])

    Reference:
        arXiv:2512.05620, App. F.
    """

    over_inputs: bool = False
    name: str = "rms_normalize"

    def init(self, param_NOI: torch.Tensor) -> State:
        """Return nothing: there is no state."""
        return {}

    def factors(self, u_NOI: torch.Tensor, state: State, ctx: Context, *, unit: float = 1.0) -> torch.Tensor:
        """Return what brings each matrix to its root mean square; of a zero matrix 0.

        Shape:
            ``[N, O, I]`` -> ``[N, 1, 1]``.

        Args:
            u_NOI: the stack.
            state: not used.
            ctx: not used.
            unit: what counts as 1 in the matrices (> 0); the root mean square is taken as ``rms + 1e-10 unit``.
        """
        rows, columns = u_NOI.shape[-2:]
        rms_N = torch.linalg.vector_norm(u_NOI, dim=(1, 2)) / (rows * columns) ** 0.5
        return _quotient(columns**-0.5 if self.over_inputs else 1.0, rms_N, unit)

    def update(self, u_NOI: torch.Tensor, state: State, ctx: Context) -> torch.Tensor:
        """Return the stack at fixed root mean square."""
        return u_NOI * self.factors(u_NOI, state, ctx)

    def work(self, rows: int, columns: int) -> float:
        """Return the operations per step for one matrix."""
        return ELEMENTWISE * rows * columns


def block_iteration(
    a_NOI: torch.Tensor, v_NKO: torch.Tensor, *, iterations: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """Estimate the largest singular values from several vectors each, which turn towards the first singular vectors.

    ``Q = orthonormal(A^T V); Z = A Q; sigma = ||Z||_2; V <- Z``: the largest value that A reaches on the span of
    ``A^T V``, hence never too large, and exact for K = min(O, I). Where singular values are nearly alike, or the first
    ones change places from step to step, K vectors have among them what a single one would first have to turn to. A is
    read as often as by :func:`~lightning_mup.core.linalg.power_iteration`, twice an iteration. A matrix of zeros, or
    with an entry that is not finite, leaves its vectors.

    Shape:
        ``[N, O, I]``, ``[N, K, O]`` -> sigma ``[N]`` in float32 at least, v ``[N, K, O]``.

    Args:
        a_NOI: the stack.
        v_NKO: vectors, kept from call to call, K <= min(O, I); random at the start.
        iterations: number of updates of the vectors (>= 1).

    Raises:
        ValueError: ``v_NKO`` does not fit ``a_NOI``, or there are no iterations.

    Examples:
        >>> block_iteration(torch.tensor([[[3.0, 0.0, 0.0], [0.0, 4.0, 0.0]]]), torch.eye(2)[None])[0]
        tensor([4.])

    Reference:
        Halko, Martinsson & Tropp 2011 (arXiv:0909.4061), Algorithm 4.4, with vectors that go on from step to step.
    """
    check_stack("a_NOI", a_NOI)
    (count, rows, columns), most = a_NOI.shape, min(a_NOI.shape[1:])
    fits = v_NKO.ndim == 3 and (len(v_NKO), v_NKO.shape[2]) == (count, rows) and 1 <= v_NKO.shape[1] <= most
    if not fits or iterations < 1:
        raise ValueError(
            f"v must have shape ({count}, 1 to {most}, {rows}) and iterations be >= 1, got {tuple(v_NKO.shape)} and "
            f"{iterations} beside matrices of {rows} x {columns}"
        )
    work_NOI, vectors_NKO = widened(a_NOI, v_NKO.dtype), widened(v_NKO, a_NOI.dtype)
    for _ in range(iterations):
        y_NKI = vectors_NKO @ work_NOI
        # No square is taken before entries are of order 1: that of 1e-30 vanishes, that of 1e30 overflows.
        q_NIK = torch.linalg.qr((y_NKI / _positive(_largest(y_NKI))).mT).Q
        z_NKO = q_NIK.mT @ work_NOI.mT
        size_N11 = _largest(z_NKO)
        unit_NKO = z_NKO / _positive(size_N11)
        vectors_NKO = torch.where((size_N11 > 0) & (size_N11 < torch.inf), unit_NKO, vectors_NKO)
    # Where the vectors stayed, they are finite, and the size is 0 or not finite: so is the product.
    top_N = _largest_eigenvalues(vectors_NKO @ vectors_NKO.mT)
    return top_N.sqrt() * size_N11.view(-1), vectors_NKO.to(v_NKO.dtype)


def _largest(x_NKI: torch.Tensor) -> torch.Tensor:
    return x_NKI.abs().amax((1, 2), keepdim=True)  # a CPU takes several times as long to a norm of order infinity


def _positive(x_N11: torch.Tensor) -> torch.Tensor:
    return x_N11.clamp_min(torch.finfo(x_N11.dtype).tiny)


def _largest_eigenvalues(gram_NKK: torch.Tensor) -> torch.Tensor:
    """Return the largest eigenvalue of each; on a GPU, which ``eigvalsh`` would wait for, to 0.1% by powers."""
    if gram_NKK.device.type == "cpu":
        values_NK: torch.Tensor = torch.linalg.eigvalsh(gram_NKK)
        return values_NK[:, -1]
    return _by_powers(gram_NKK)


def _by_powers(gram_NKK: torch.Tensor) -> torch.Tensor:
    power_NKK = gram_NKK
    for power in _POWERS:
        power_NKK = torch.linalg.matrix_power(power_NKK / _positive(_largest(power_NKK)), power)
    total_N = power_NKK.diagonal(dim1=1, dim2=2).sum(1)
    return (gram_NKK * power_NKK).sum((1, 2)) / _positive(total_N)


def _quotient(wanted: float, size_N: torch.Tensor, unit: float) -> torch.Tensor:
    # A step so small that the sum rounds to 0 is not moved to infinity; NaN stays what it is.
    factor_N = torch.where(size_N == 0, 0.0, wanted / (size_N + _EPS * unit))
    return factor_N.view(-1, 1, 1)
