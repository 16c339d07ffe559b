"""What a run costs: the steps that a budget pays for, a model's parameters, the FLOPs of a token."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn


def budget_steps(budget: Mapping[str, float | None], *, params: int, tokens_per_step: int) -> int:
    """Return the steps of a budget, whole steps that it pays for.

    Args:
        budget: exactly one of ``steps``, ``tokens`` and ``tokens_per_parameter``.
        params: number of parameters.
        tokens_per_step: tokens of one optimizer step.

    Raises:
        ValueError: none or several are given, or it does not pay for one step.

    Examples:
        >>> budget_steps({"tokens_per_parameter": 20}, params=185_680_896, tokens_per_step=131_072)
        28332
    """
    given = {key: value for key, value in budget.items() if value is not None}
    tokens_of = {"steps": tokens_per_step, "tokens": 1, "tokens_per_parameter": params}
    if len(given) != 1 or not given.keys() <= tokens_of.keys():
        raise ValueError(
            f"budget must be exactly one of {', '.join(tokens_of)}, got {given or 'none'}; set the others null"
        )
    ((key, amount),) = given.items()
    steps = int(amount * tokens_of[key] // tokens_per_step)
    if steps < 1:
        raise ValueError(f"budget.{key}={amount} is less than one step of {tokens_per_step} tokens; give more")
    return steps


def count(module: nn.Module, *, embeddings: bool = True) -> int:
    """Return the number of parameters, tied ones once; without embeddings and readout if so asked.

    Examples:
        >>> module = nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 4), nn.Linear(4, 8))
        >>> count(module), count(module, embeddings=False)
        (92, 20)
    """
    tables = {id(m.weight): m.num_embeddings for m in module.modules() if isinstance(m, nn.Embedding)}
    rows = max(tables.values(), default=-1)  # of the vocabulary
    left_out = set() if embeddings else tables.keys() | {id(p) for p in _readout(module, rows)}
    return sum(p.numel() for p in module.parameters() if id(p) not in left_out)


def _readout(module: nn.Module, rows: int) -> list[nn.Parameter]:
    found = [m for m in module.modules() if isinstance(m, nn.Linear) and m.out_features == rows]
    return [p for p in (found[-1].parameters() if found else ())]


def training_flops(net: nn.Module, context: int) -> float:
    """Return the FLOPs of a forward and a backward pass per token: three times the network's ``forward_flops``.

    A network that does not count them is taken as ``6 N``, with N its parameters beside embeddings and readout.
    """
    counted = getattr(net, "forward_flops", None)
    return 6.0 * count(net, embeddings=False) if counted is None else 3.0 * float(counted(context))
