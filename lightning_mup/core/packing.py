"""Tensors of any dtypes in one row of bytes, as they are sent."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_ALIGNMENT = 16  # bytes, at which any dtype may start


def row_size(tensors: Sequence[Tensor]) -> tuple[list[int], int]:
    """Return where each tensor starts in a row of them, and how many bytes the row takes.

    Examples:
        >>> row_size([torch.ones(3), torch.ones(2, dtype=torch.bfloat16)])
        ([0, 16], 32)
    """
    starts, end = [], 0
    for x in tensors:
        starts.append(end)
        end += -(-x.nbytes // _ALIGNMENT) * _ALIGNMENT
    return starts, end


def row_views(buffer: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return the parts of a row of bytes that stand for tensors.

    Examples:
        >>> [view.dtype for view in row_views(torch.zeros(16, dtype=torch.uint8), [torch.ones(3)])]
        [torch.float32]
    """
    starts, _ = row_size(tensors)
    return [
        buffer[start : start + x.nbytes].view(x.dtype).view(x.shape) for start, x in zip(starts, tensors, strict=True)
    ]


def pack(buffer: Tensor, tensors: Sequence[Tensor]) -> None:
    """Copy tensors into a row of bytes.

    Examples:
        >>> row = torch.zeros(16, dtype=torch.uint8)
        >>> pack(row, [torch.ones(1)])
        >>> row_views(row, [torch.ones(1)])
        [tensor([1.])]
    """
    if tensors:
        torch._foreach_copy_(row_views(buffer, tensors), list(tensors))


def bytes_of(tensors: Sequence[Tensor]) -> Tensor | None:
    """Return the memory of a lone contiguous tensor, into which it can be sent without a copy.

    Examples:
        >>> bytes_of([torch.ones(1)]).tolist(), bytes_of([torch.ones(1)] * 2)
        ([0, 0, 128, 63], None)
    """
    alone = len(tensors) == 1 and tensors[0].is_contiguous()
    return tensors[0].detach().view(-1).view(torch.uint8) if alone else None
