"""What a decoder is made of: norm, rotary embedding, attention, MLP, block. No biases anywhere."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Rotation = tuple[Tensor, Tensor]
"""Cosines and signed sines, each ``[context, 1, head_dim]``; see :func:`rotation`."""


class RMSNorm(nn.RMSNorm):
    """``y = x / sqrt(mean_i x_i^2 + eps)``, times a gain where there is one.

    As torch's, but the gain is a product of its own, whose backward pass takes half of the time on a CPU.

    Examples:
        >>> RMSNorm(2, eps=0.0)(torch.tensor([3.0, 3.0])).tolist()
        [1.0, 1.0]
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalize along the last axis."""
        normed = F.rms_norm(x, self.normalized_shape, eps=self.eps)
        return normed if self.weight is None else normed * self.weight


def rotation(context: int, head_dim: int, theta: float, like: Tensor) -> Rotation:
    """Return the tables of a rotary embedding: ``angle[t, i] = t theta^(-2i / head_dim)`` for ``i < head_dim / 2``.

    They are computed anew in every forward pass, which costs next to nothing: a buffer would lose its precision when
    the model is cast, and its values when it is built on the meta device.

    Args:
        context: number of positions t.
        head_dim: size of a head, even.
        theta: base of the wavelengths.
        like: tensor whose device to use, and whose dtype if it is finer than float32.

    Examples:
        >>> cosines, sines = rotation(2, 4, 100.0, torch.zeros(()))
        >>> sines[1, 0]  # the first half is negated
        tensor([-0.8415, -0.0998,  0.8415,  0.0998])

    Reference:
        Su et al. 2021 (arXiv:2104.09864), equation 34, with halves in place of neighbours as in Llama's weights.
    """
    dtype = torch.promote_types(like.dtype, torch.float32)
    even = torch.arange(0, head_dim, 2, device=like.device, dtype=dtype)
    angle = torch.arange(context, device=like.device, dtype=dtype)[:, None] * theta ** (-even / head_dim)
    sines = angle.sin()
    return angle.cos().repeat(1, 2)[:, None], torch.cat((-sines, sines), dim=-1)[:, None]


def rotate(x: Tensor, by: Rotation) -> Tensor:
    """Turn ``(x_i, x_{i + head_dim/2})`` of queries or keys ``[batch, context, heads, head_dim]`` by their angles.

    Examples:
        >>> quarter = torch.tensor([0.0, 0.0]), torch.tensor([-1.0, 1.0])
        >>> rotate(torch.tensor([1.0, 0.0]), quarter)
        tensor([0., 1.])
    """
    cosines, sines = by
    return torch.addcmul(x * cosines, x.roll(x.shape[-1] // 2, -1), sines).type_as(x)


class SelfAttention(nn.Module):
    """``softmax(q k^T / sqrt(head_dim)) v`` over earlier positions, in heads, then an output matrix.

    The scale is right under muP because the size of a head stays while their number grows.

    Args:
        width: size of the residual stream.
        head_dim: size of a head, a divisor of ``width``.
        kv_heads: number of heads of keys and values, a divisor of the number of heads; each serves as many queries.
        qk_norm: whether queries and keys are brought to a root mean square of 1 per head, before they are rotated.
        norm_eps: added to the mean square.

    Examples:
        >>> attention = SelfAttention(64, head_dim=16, kv_heads=2)
        >>> attention(torch.ones(1, 3, 64)).shape, tuple(attention.k_proj.weight.shape)
        (torch.Size([1, 3, 64]), (32, 64))

    Reference:
        Ainslie et al. 2023 (arXiv:2305.13245) for fewer heads of keys; Henry et al. 2020 (arXiv:2010.04245) for
        normalized queries and keys.
    """

    def __init__(
        self, width: int, *, head_dim: int, kv_heads: int, qk_norm: bool = True, norm_eps: float = 1e-6
    ) -> None:
        super().__init__()
        self.head_dim, self.qk_norm, self.norm_eps = head_dim, qk_norm, norm_eps
        self.grouped = kv_heads < width // head_dim
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, kv_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(width, kv_heads * head_dim, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, turn: Rotation | None = None) -> Tensor:
        """Attend within ``x`` ``[batch, context, width]``; ``turn`` rotates queries and keys."""
        query = self.q_proj(x).unflatten(-1, (-1, self.head_dim))
        key = self.k_proj(x).unflatten(-1, (-1, self.head_dim))
        value = self.v_proj(x).unflatten(-1, (-1, self.head_dim))
        if self.qk_norm:
            query = F.rms_norm(query, (self.head_dim,), eps=self.norm_eps)
            key = F.rms_norm(key, (self.head_dim,), eps=self.norm_eps)
        if turn is not None:
            query, key = rotate(query, turn), rotate(key, turn)
        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=self.grouped)
        out: Tensor = self.o_proj(mixed.transpose(1, 2).flatten(2))
        return out


class MLP(nn.Module):
    """``W_down (silu(W_gate x) * W_up x)`` with a gate (SwiGLU), ``W_down gelu(W_up x)`` without.

    Args:
        width: size of the residual stream.
        hidden: size in between.
        gated: whether there is a gate.

    Examples:
        >>> [name for name, _ in MLP(4, 8, gated=False).named_parameters()]
        ['up_proj.weight', 'down_proj.weight']

    Reference:
        Shazeer 2020 (arXiv:2002.05202), equation 6.
    """

    def __init__(self, width: int, hidden: int, *, gated: bool = True) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, hidden, bias=False) if gated else None
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[..., width]`` to ``[..., width]``."""
        if self.gate_proj is None:
            hidden = F.gelu(self.up_proj(x), approximate="tanh")
        else:
            hidden = F.silu(self.gate_proj(x)) * self.up_proj(x)
        out: Tensor = self.down_proj(hidden)
        return out


class Block(nn.Module):
    """``x + attention(norm(x))``, then ``x + mlp(norm(x))``.

    Args:
        attention: maps ``[batch, context, width]`` and a rotation to the same shape.
        mlp: maps ``[batch, context, width]`` to the same shape.
        norms: the norms before the two.

    Examples:
        >>> block = Block(SelfAttention(32, head_dim=16, kv_heads=2), MLP(32, 64), norms=(RMSNorm(32), RMSNorm(32)))
        >>> block(torch.ones(1, 3, 32)).shape
        torch.Size([1, 3, 32])
    """

    def __init__(self, attention: SelfAttention, mlp: MLP, *, norms: tuple[RMSNorm, RMSNorm]) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = norms
        self.attention, self.mlp = attention, mlp

    def forward(self, x: Tensor, turn: Rotation | None = None) -> Tensor:
        """Add both branches to the stream ``[batch, context, width]``."""
        x = x + self.attention(self.attention_norm(x), turn)
        out: Tensor = x + self.mlp(self.mlp_norm(x))
        return out

    def ends(self) -> tuple[nn.Linear, nn.Linear]:
        """Return the last matrices of the two branches.

        Examples:
            >>> block = Block(SelfAttention(32, head_dim=16, kv_heads=2), MLP(32, 64), norms=(RMSNorm(32), RMSNorm(32)))
            >>> [end.in_features for end in block.ends()]
            [32, 64]
        """
        return self.attention.o_proj, self.mlp.down_proj
