"""Llama: the decoder of the paper's experiments, of Llama 3, and by other arguments of GPT-style models."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_mup.models.layers import MLP, Block, RMSNorm, SelfAttention, rotation


class Llama(nn.Module):
    """A pre-norm decoder from tokens to logits: ``x += attention(norm(x))``, ``x += mlp(norm(x))``, a readout.

    Attention logits are divided by ``sqrt(head_dim)``, which muP allows as long as ``head_dim`` stays and the number of
    heads grows; so the width is a multiple of it. ``kv_heads`` may be a number that stays, too. Embeddings start as
    ``N(0, embedding_std^2)``, matrices as ``N(0, 1 / fan_in)``, the last matrix of each branch and the readout at 0.

    Args:
        vocab_size: number of tokens (>= 1).
        width: size of the residual stream, a multiple of ``head_dim``.
        depth: number of blocks (>= 1).
        context: number of positions that it is made for (>= 1). Rotary embeddings take any, learned ones no more.
        head_dim: size of an attention head; even where it is rotated.
        kv_heads: number of heads of keys and values, a divisor of the number of heads; None for as many.
        qk_norm: whether queries and keys are normalized per head, without a gain.
        mlp: ``"swiglu"`` (three matrices) or ``"gelu"`` (two).
        mlp_expansion: hidden size of the MLP over the width (> 0); the product is rounded.
        positions: ``"rotary"``, or ``"learned"`` (an embedding that is added to the tokens').
        rope_theta: base of the rotary wavelengths (> 0).
        norm_scale: whether norms have a gain.
        norm_eps: added to the mean square in norms (>= 0).
        tied: whether the readout is the embedding's matrix; it then starts like that.
        zero_outputs: whether attention outputs, MLP outputs and an untied readout start at 0.
        embedding_std: initial standard deviation of the embeddings (>= 0).
        checkpoint_activations: whether a block's activations are computed again in the backward pass, for memory.

    Raises:
        ValueError: a setting is out of range, or tokens are not ``[batch, context]`` or too many.

    Examples:
        >>> net = Llama(vocab_size=11, width=64, depth=2, context=8, head_dim=16)
        >>> tokens = torch.tensor([[1, 2, 3]])
        >>> net(tokens).shape, bool((net(tokens) == 0).all())
        (torch.Size([1, 3, 11]), True)
        >>> with torch.device("meta"):
        ...     large = Llama(50257, width=512, depth=32, context=1024)  # the paper's 190M
        >>> sum(p.numel() for p in large.parameters()), large.non_embedding_params
        (185680896, 134217728)

    Reference:
        Touvron et al. 2023 (arXiv:2302.13971); arXiv:2512.05620, section 4, for QK-norm, initial values and sizes.
    """

    def __init__(  # noqa: PLR0913 - each argument is a decision of its own
        self,
        vocab_size: int,
        *,
        width: int,
        depth: int,
        context: int,
        head_dim: int = 64,
        kv_heads: int | None = None,
        qk_norm: bool = True,
        mlp: Literal["swiglu", "gelu"] = "swiglu",
        mlp_expansion: float = 4.0,
        positions: Literal["rotary", "learned"] = "rotary",
        rope_theta: float = 1e4,
        norm_scale: bool = False,
        norm_eps: float = 1e-6,
        tied: bool = False,
        zero_outputs: bool = True,
        embedding_std: float = 0.1,
        checkpoint_activations: bool = False,
    ) -> None:
        super().__init__()
        _check_counts(vocab_size=vocab_size, width=width, depth=depth, context=context, head_dim=head_dim)
        _check_choice("mlp", mlp, ("swiglu", "gelu"))
        _check_choice("positions", positions, ("rotary", "learned"))
        _check_ranges(rope_theta=rope_theta, mlp_expansion=mlp_expansion)
        _check_ranges(or_zero=True, norm_eps=norm_eps, embedding_std=embedding_std)
        heads = _heads(width, head_dim, rotary=positions == "rotary")
        kv_heads = _kv_heads(heads, kv_heads)
        hidden = max(1, round(mlp_expansion * width))
        self.context, self.head_dim, self.rope_theta = context, head_dim, rope_theta
        self.tied, self.zero_outputs, self.embedding_std = tied, zero_outputs, embedding_std
        self.checkpoint_activations = checkpoint_activations

        def norm() -> RMSNorm:
            return RMSNorm(width, eps=norm_eps, elementwise_affine=norm_scale)

        def block() -> Block:
            attention = SelfAttention(width, head_dim=head_dim, kv_heads=kv_heads, qk_norm=qk_norm, norm_eps=norm_eps)
            return Block(attention, MLP(width, hidden, gated=mlp == "swiglu"), norms=(norm(), norm()))

        self.embedding = nn.Embedding(vocab_size, width)
        self.positions = nn.Embedding(context, width) if positions == "learned" else None
        self.layers = nn.ModuleList(block() for _ in range(depth))
        self.norm = norm()
        self.readout = nn.Linear(width, vocab_size, bias=False)
        if tied:
            self.readout.weight = self.embedding.weight
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the initial values anew, as after ``to_empty`` for a model that was built on the meta device.

        Examples:
            >>> with torch.device("meta"):
            ...     net = Llama(11, width=64, depth=1, context=8)
            >>> net.to_empty(device="cpu").reset_parameters()
            >>> round(net.embedding.weight.std().item(), 1)
            0.1
        """
        ends = {self.readout, *(end for m in self.modules() if isinstance(m, Block) for end in m.ends())}
        for module in self.modules():
            if isinstance(module, nn.Linear):
                at_zero = self.zero_outputs and module in ends
                nn.init.normal_(module.weight, std=0.0 if at_zero else module.in_features**-0.5)
            elif isinstance(module, RMSNorm):
                module.reset_parameters()
        for table in (self.embedding, self.positions):  # after the readout, which may be the same tensor
            if table is not None:
                nn.init.normal_(table.weight, std=self.embedding_std)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits ``[batch, context, vocab_size]`` of the next token after each of ``[batch, context]``."""
        if tokens.ndim != 2:
            raise ValueError(f"tokens must be [batch, context], got shape {tuple(tokens.shape)}; add a batch axis")
        length = tokens.shape[1]
        x = self.embedding(tokens)
        turn = None
        if self.positions is None:
            turn = rotation(length, self.head_dim, self.rope_theta, x)
        else:
            _check_length(length, self.context)
            x = x + self.positions(torch.arange(length, device=tokens.device))
        for layer in self.layers:
            if self.checkpoint_activations:
                x = checkpoint(layer, x, turn, use_reentrant=False, preserve_rng_state=False)
            else:
                x = layer(x, turn)
        logits: Tensor = self.readout(self.norm(x))
        return logits

    @property
    def non_embedding_params(self) -> int:
        """Number of parameters of the blocks and the last norm: without embeddings and readout."""
        return sum(p.numel() for part in (self.layers, self.norm) for p in part.parameters())

    def forward_flops(self, context: int) -> int:
        """Return the floating-point operations of a forward pass per token.

        ``N [2 P + 4 L D + 3 L H] + 2 D V``: two per entry of a block's matrices (P of them, ``3 D F + 4 D^2`` with a
        gate and as many key heads as query heads), scores, weighted values and softmax over all ``L`` positions (none
        is left out for causality), and the readout. A backward pass takes twice as many.

        Args:
            context: number of positions L (>= 1).

        Examples:
            >>> with torch.device("meta"):
            ...     net = Llama(50257, width=512, depth=32, context=1024)
            >>> 3 * net.forward_flops(1024) * 3_713_617_920  # of the paper's training run
            4320355351737139200

        Reference:
            arXiv:2512.05620, section 4 (FLOPs of its figures 6 and 11 to 13).
        """
        vocab_size, width = self.readout.weight.shape
        matrices = sum(m.weight.numel() for m in self.layers.modules() if isinstance(m, nn.Linear))
        attention = 4 * context * width + 3 * context * (width // self.head_dim)
        return 2 * matrices + len(self.layers) * attention + 2 * width * vocab_size


def _heads(width: int, head_dim: int, *, rotary: bool) -> int:
    if width % head_dim:
        near = max(1, round(width / head_dim)) * head_dim
        raise ValueError(
            f"width must be a multiple of head_dim={head_dim}, got {width}; give width={near}, or another head_dim "
            f"(the same in the base)"
        )
    if rotary and head_dim % 2:
        raise ValueError(f"head_dim must be even for rotary positions, got {head_dim}; give {head_dim + 1}")
    return width // head_dim


def _kv_heads(heads: int, kv_heads: int | None) -> int:
    if kv_heads is None:
        return heads
    if not 1 <= kv_heads <= heads or heads % kv_heads:
        allowed = [n for n in range(1, heads + 1) if heads % n == 0]
        raise ValueError(f"kv_heads must divide the {heads} heads (width / head_dim), got {kv_heads}; give {allowed}")
    return kv_heads


def _check_length(length: int, context: int) -> None:
    if length > context:
        raise ValueError(
            f"learned positions end at context={context}, got {length} tokens; build the model with context={length}, "
            f"or give positions='rotary'"
        )


def _check_counts(**counts: int) -> None:
    for name, count in counts.items():
        if not isinstance(count, int) or count < 1:
            raise ValueError(f"{name} must be a whole number >= 1, got {count!r}")


def _check_choice(name: str, choice: str, allowed: tuple[str, ...]) -> None:
    if choice not in allowed:
        raise ValueError(f"{name} must be one of {allowed}, got {choice!r}")


def _check_ranges(*, or_zero: bool = False, **numbers: float) -> None:
    for name, number in numbers.items():
        if not (number > 0 or (or_zero and number == 0)):
            raise ValueError(f"{name} must be {'>=' if or_zero else '>'} 0, got {number!r}")
