"""Residual blocks as people write them, and models that repeat them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH = 16


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c_attn = nn.Linear(WIDTH, 3 * WIDTH)
        self.c_proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.c_attn(x).split(WIDTH, dim=-1)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.c_proj(y)


def mlp(inner: int = 64) -> nn.Sequential:
    return nn.Sequential(nn.Linear(WIDTH, inner), nn.GELU(), nn.Linear(inner, WIDTH), nn.Dropout(0.1))


class NanoGPT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attn, self.mlp = Attention(), mlp()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class Parallel(NanoGPT):
    def forward(self, x: Tensor) -> Tensor:
        h = self.ln_1(x)
        return x + self.attn(h) + self.mlp(h)


class ThroughMethods(NanoGPT):
    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))

    def first(self, x: Tensor) -> Tensor:
        return torch.add(x, self.attn(self.ln_1(x)))

    def second(self, x: Tensor) -> Tensor:
        x += self.mlp(self.ln_2(x))
        return x


class PostNorm(NanoGPT):
    def forward(self, x: Tensor) -> Tensor:
        x = self.ln_1(x + self.attn(x))
        return self.ln_2(x + self.mlp(x))


class NormInBranch(NanoGPT):
    def forward(self, x: Tensor) -> Tensor:
        x = x + self.ln_1(self.attn(x))
        return x + self.ln_2(self.mlp(x))


class Expansion1(NanoGPT):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = mlp(WIDTH)


class ProjectedOnce(NanoGPT):
    """One branch of attention, a projection and a MLP behind each other."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.proj(self.attn(self.ln_1(x)))
        return x + self.mlp(self.ln_2(x))


class UnseenSum(NanoGPT):
    """One of the two sums is written so that nobody reads it."""

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return torch.stack([x, self.mlp(self.ln_2(x))]).sum(0)


class ProjectedIn(ProjectedOnce):
    """The block changes the stream itself, before its branches."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.proj(x)
        return x + self.mlp(self.ln_2(x))


class Normalized(NanoGPT):
    def forward(self, x: Tensor) -> Tensor:
        x = x + F.layer_norm(self.attn(x), (WIDTH,))
        return x + self.mlp(self.ln_2(x))


class Bent(NanoGPT):
    """A nonlinearity behind the last matrix: a factor on the matrix is not a factor on the branch."""

    def forward(self, x: Tensor) -> Tensor:
        return x + F.gelu(self.mlp(x)) + self.attn(x)


class AllInTheBlock(nn.Module):
    """Attention and MLP side by side in the block itself, as leaves."""

    def __init__(self, inner: int = 64) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.wq, self.wk, self.wv, self.wo = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))
        self.w1, self.w2 = nn.Linear(WIDTH, inner, bias=False), nn.Linear(inner, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        x = x + self.wo(F.scaled_dot_product_attention(self.wq(h), self.wk(h), self.wv(h)))
        return x + self.w2(F.silu(self.w1(self.norm2(x))))


class AllInTheBlockUnseen(AllInTheBlock):
    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        x = x + self.wo(F.scaled_dot_product_attention(self.wq(h), self.wk(h), self.wv(h)))
        return torch.lerp(x, self.w2(F.silu(self.w1(self.norm2(x)))), 0.5)


class LlamaMLP(nn.Module):
    """Meta's own names: w2 is the last one, although w3 is registered behind it."""

    def __init__(self, inner: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(WIDTH, inner, bias=False)
        self.w2 = nn.Linear(inner, WIDTH, bias=False)
        self.w3 = nn.Linear(WIDTH, inner, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class WithLlamaMLP(NanoGPT):
    def __init__(self, inner: int = 64) -> None:
        super().__init__()
        self.mlp = LlamaMLP(inner)


class PreActivation(nn.Module):
    """A ResNet block whose batch norms come first."""

    def __init__(self) -> None:
        super().__init__()
        self.bn1, self.bn2 = nn.BatchNorm2d(8), nn.BatchNorm2d(8)
        self.conv1, self.conv2 = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(F.relu(self.bn1(x)))
        return self.conv2(F.relu(self.bn2(out))) + x


class PostActivation(PreActivation):
    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + x)


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, 4)
        self.experts = nn.ModuleList(mlp() for _ in range(4))
        self.shared_expert = mlp()

    def forward(self, x: Tensor) -> Tensor:
        weights = self.gate(x).softmax(-1)
        out = self.shared_expert(x)
        for i, expert in enumerate(self.experts):
            out = out + weights[..., i : i + 1] * expert(x)
        return out


class WithExperts(NanoGPT):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = Experts()


class Head(nn.Module):
    def __init__(self, width: int, size: int) -> None:
        super().__init__()
        self.key, self.query, self.value = (nn.Linear(width, size, bias=False) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(self.query(x), self.key(x), self.value(x))


class HeadsInAList(nn.Module):
    """As the well-known lecture has it: one module per head, joined and projected."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = nn.ModuleList([Head(width, 4) for _ in range(width // 4)])
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(torch.cat([head(x) for head in self.heads], dim=-1))


class LectureBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.sa, self.ln = HeadsInAList(width), nn.LayerNorm(width)
        self.ffwd = nn.Sequential(nn.Linear(width, 4 * width), nn.ReLU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.sa(x)
        return x + self.ffwd(self.ln(x))


class Model(nn.Module):
    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class ResidualModel(Model):
    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x
