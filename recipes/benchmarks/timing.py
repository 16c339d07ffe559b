"""Times one row in a process of its own: ``python -m recipes.benchmarks.timing '{"label": ..., "widths": ...}'``.

Each width gives one line of JSON. A sample is: the machine's matmul rate, the control, the row, the control, the rate.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from recipes.benchmarks.rows import CONTROL, FACTORIZATIONS, MODELS, ROWS, Row, Work, work_of

Shapes = Sequence[tuple[int, int]]
_GRADIENTS = 4  # sets of gradients, used in turn
_PROBE_SECONDS = 0.05


@dataclass(frozen=True)
class Task:
    """What one process times.

    Args:
        label: of the row.
        widths: widths of the model.
        model: name of the model.
        threads: number of threads that torch may use.
        seconds: shortest time of the control's and the row's steps, each.
        limit: widths whose floor says that they would take more seconds than this are left out.
    """

    label: str
    widths: tuple[int, ...]
    model: str = "squares"
    threads: int = 1
    seconds: float = 0.3
    limit: float = 120.0

    def dumps(self) -> str:
        """Return it as JSON."""
        return json.dumps(asdict(self))


class Stepper:
    """An optimizer of its own parameters, whose steps find gradients ready.

    Args:
        row: the optimizer.
        shapes: of the parameters.
        count: number of sets of gradients.
    """

    def __init__(self, row: Row, shapes: Shapes, count: int = _GRADIENTS) -> None:
        generator = torch.Generator().manual_seed(0)
        self.params = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
        self._gradients = [[_gradient(shape, generator) for shape in shapes] for _ in range(count)]
        self.optimizer, self._taken = row.build(self.params), 0
        torch.set_float32_matmul_precision("highest")  # a package may have lowered it

    def __call__(self, steps: int) -> None:
        """Take some steps."""
        for _ in range(steps):
            for p, gradient in zip(self.params, self._gradients[self._taken % len(self._gradients)], strict=True):
                p.grad = gradient
            self.optimizer.step()
            self._taken += 1

    def state_bytes(self) -> int:
        """Return the bytes of all tensors that the state holds, each storage once."""
        own = {p.untyped_storage().data_ptr() for p in self.params}
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors(self.optimizer.state)}
        return sum(size for at, size in storages.items() if at not in own)


def _gradient(shape: tuple[int, int], generator: torch.Generator) -> torch.Tensor:
    """Return random entries whose columns differ in size, so that no two eigenvalues are alike."""
    return torch.randn(shape, generator=generator) / torch.arange(1.0, shape[1] + 1).sqrt()


def tensors(found: object, depth: int = 8) -> Iterable[torch.Tensor]:
    """Return the tensors in nested containers and objects.

    Examples:
        >>> [t.item() for t in tensors({"a": [torch.tensor(1.0)], "b": (torch.tensor(2.0), None)})]
        [1.0, 2.0]
    """
    if isinstance(found, torch.Tensor):
        yield found
        return
    inner: Iterable[object] = ()
    if isinstance(found, dict):
        inner = found.values()
    elif isinstance(found, list | tuple):
        inner = found
    elif hasattr(found, "__dict__"):
        inner = vars(found).values()
    for part in inner if depth else ():
        yield from tensors(part, depth - 1)


def repeat(run: Callable[[], object], seconds: float) -> list[float]:
    """Return the seconds that each of several calls took, at least one, together at least ``seconds``."""
    times: list[float] = []
    begin = start = time.perf_counter()
    while not times or start - begin < seconds:
        run()
        now = time.perf_counter()
        times.append(now - start)
        start = now
    return times


def matmul_rate(width: int, dtype: torch.dtype) -> float:
    """Return the floating-point operations per second of a product of two square matrices."""
    a, b = (torch.randn(width, width).to(dtype) for _ in range(2))
    a @ b
    return 2.0 * width**3 / statistics.median(repeat(lambda: a @ b, _PROBE_SECONDS))


def factorization_seconds(unit: str, side: int) -> float:
    """Return the time of one factorization of a second moment."""
    gradient = _gradient((side, side), torch.Generator().manual_seed(1))
    moment = gradient @ gradient.mT
    FACTORIZATIONS[unit](moment)
    return statistics.median(repeat(lambda: FACTORIZATIONS[unit](moment), _PROBE_SECONDS))


def floor_of(work: Work, shapes: Shapes, rate: float) -> dict[str, float]:
    """Return the seconds per step of products at the machine's rate, and of factorizations, timed one by one."""
    counts = work.factorizations(shapes)
    factorizations = sum(factorization_seconds(*key) * count for key, count in counts.items())
    return {"products": work.flops(shapes) / rate, "factorizations": factorizations}


def sample(row: Row, width: int, task: Task) -> dict[str, Any]:
    """Return what one width gave, all times in seconds."""
    shapes, work = MODELS[task.model](width), work_of(row)
    found: dict[str, Any] = {"label": row.label, "width": width}
    before = matmul_rate(width, torch.float32)
    if work is not None:
        rate = before if work.dtype == torch.float32 else matmul_rate(width, work.dtype)
        floor = floor_of(work, shapes, rate)
        # Two periods at least are run: one warms up, one is timed.
        if (expected := 2 * row.period * sum(floor.values())) > task.limit:
            reason = f"would take {expected:.0f} s: products in {work.dtype} run at {rate / 1e9:.1f} GFLOP/s here"
            return {**found, "left_out": reason}
        found |= {"floor": floor}
    control, stepper = Stepper(ROWS[CONTROL], shapes), Stepper(row, shapes)
    control(3)
    stepper(max(2, row.period))
    first = statistics.median(repeat(lambda: control(1), task.seconds))
    times = repeat(lambda: stepper(row.period), task.seconds)
    second = statistics.median(repeat(lambda: control(1), task.seconds))
    return found | {
        "step": statistics.median(times) / row.period,
        "control": [first, second],
        "probes": [before, matmul_rate(width, torch.float32)],
        "state_bytes": stepper.state_bytes() / sum(m * n for m, n in shapes),
    }


def main() -> None:
    """Time what the only argument says, and print a line of JSON per width."""
    given = json.loads(sys.argv[1])
    task = Task(**{**given, "widths": tuple(given["widths"])})
    torch.set_num_threads(task.threads)
    for width in task.widths:
        print(json.dumps(sample(ROWS[task.label], width, task)), flush=True)


if __name__ == "__main__":
    main()
