"""Models as users have them, inside plain LightningModules, with the role of every parameter."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.demos import Transformer
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    ResNetConfig,
    ResNetForImageClassification,
)

from lightning_mup.core.infer import RoleLike

VOCABULARY, CLASSES, STEPS = 48, 5, 3


class Plain(L.LightningModule):
    """What users write: a network, a loss and an optimizer."""

    def __init__(self, net: nn.Module, batch: Callable[[], Any], loss: Callable[[nn.Module, Any], Tensor]) -> None:
        super().__init__()
        self.net = net
        self._batch, self._loss = batch, loss
        self.losses: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:  # noqa: ANN401 - as each model has it
        loss = self._loss(self.net, batch)
        self.losses.append(float(loss.detach()))
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader([self._batch() for _ in range(STEPS)], batch_size=None)


def text() -> Tensor:
    return torch.randint(VOCABULARY, (2, 8))


def images() -> tuple[Tensor, Tensor]:
    return torch.randn(4, 3, 16, 16), torch.randint(CLASSES, (4,))


def next_word(net: nn.Module, batch: Tensor) -> Tensor:
    return F.cross_entropy(net(batch).flatten(0, 1), batch.flatten())


def demo_loss(net: nn.Module, batch: Tensor) -> Tensor:
    return F.nll_loss(net(batch, batch), batch.flatten())


def hugging_face_loss(net: nn.Module, batch: Tensor) -> Tensor:
    loss: Tensor = net(input_ids=batch, labels=batch).loss
    return loss


def classify(net: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    logits = net(batch[0])
    return F.cross_entropy(logits if isinstance(logits, Tensor) else logits.logits, batch[1])


# -- models written by hand --------------------------------------------------------------------------------------------


class ViT(nn.Module):
    """Patch convolution, class token and position parameter around torch's own encoder."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(0.02 * torch.randn(1, 17, width))
        layer = nn.TransformerEncoderLayer(width, width // 8, 4 * width, 0.0, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, depth, nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        patches = self.patches(x).flatten(2).transpose(1, 2)
        h = torch.cat([self.cls_token.expand(len(x), -1, -1), patches], dim=1) + self.positions
        return self.head(self.encoder(h)[:, 0])


class BasicBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample: nn.Module | None = None
        if inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += identity
        return F.relu(out)


class ResNet(nn.Module):
    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = self.stage(width, width, 1, depth)
        self.layer2 = self.stage(width, 2 * width, 2, depth)
        self.fc = nn.Linear(2 * width, CLASSES)

    def stage(self, inputs: int, outputs: int, stride: int, depth: int) -> nn.Sequential:
        rest = [BasicBlock(outputs, outputs, 1) for _ in range(depth - 1)]
        return nn.Sequential(BasicBlock(inputs, outputs, stride), *rest)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        return self.fc(self.layer2(self.layer1(x)).mean((2, 3)))


class Recurrent(nn.Module):
    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.lstm = nn.LSTM(width, width, num_layers=depth, batch_first=True)
        self.gru = nn.GRU(width, width, batch_first=True, bidirectional=True)
        self.readout = nn.Linear(2 * width, VOCABULARY)

    def forward(self, x: Tensor) -> Tensor:
        return self.readout(self.gru(self.lstm(self.embedding(x))[0])[0])


def llama(width: int, depth: int, *, tied: bool, kv_heads: int | None = None) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=width,
            intermediate_size=3 * width,
            num_hidden_layers=depth,
            num_attention_heads=width // 8,
            num_key_value_heads=kv_heads or width // 16,
            head_dim=8,
            tie_word_embeddings=tied,
        )
    )


def gpt2(width: int, depth: int, *, tied: bool) -> GPT2LMHeadModel:
    heads = width // 8
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY,
            n_positions=16,
            n_embd=width,
            n_layer=depth,
            n_head=heads,
            tie_word_embeddings=tied,
            bos_token_id=0,
            eos_token_id=0,
        )
    )


def resnet(width: int, depth: int, kind: str) -> ResNetForImageClassification:
    sizes = [width, 2 * width]
    config = ResNetConfig(
        embedding_size=width, hidden_sizes=sizes, depths=[depth, depth], layer_type=kind, num_labels=CLASSES
    )
    return ResNetForImageClassification(config)


# -- what is expected --------------------------------------------------------------------------------------------------


@dataclass
class Case:
    """A model family, the role of every parameter by pattern, and which of them end residual branches."""

    build: Callable[[int, int], nn.Module]
    batch: Callable[[], Any]
    loss: Callable[[nn.Module, Any], Tensor]
    expected: Mapping[str, str]
    branches: Sequence[str] = ()
    roles: Mapping[str, RoleLike] = field(default_factory=dict)
    deepens: bool = True


ENCODER_LAYER = {
    "*.self_attn.in_proj_weight": "hidden",
    "*.self_attn.out_proj.weight": "hidden",
    "*.linear[12].weight": "hidden",
    "*.layers.*.norm?.weight": "vector",
    "*.layers.*bias": "vector",
}
LLAMA = {
    "net.model.embed_tokens.weight": "input",
    "*.self_attn.[qkvo]_proj.weight": "hidden",
    "*.mlp.*_proj.weight": "hidden",
    "*norm.weight": "vector",
}
GPT2 = {
    "net.transformer.wte.weight": "input",
    "net.transformer.wpe.weight": "input",
    "*.attn.c_*.weight": "hidden",
    "*.mlp.c_*.weight": "hidden",
    "*.ln_?.weight": "vector",
    "*.bias": "vector",
}
LLAMA_ENDS = ("*.o_proj.weight", "*.down_proj.weight")
GPT2_ENDS = ("*.c_proj.weight", "*.c_proj.bias")

CASES = {
    "lightning demo transformer": Case(
        lambda width, depth: Transformer(VOCABULARY, width, width // 8, 2 * width, depth, dropout=0.0),
        text,
        demo_loss,
        {
            "net.embedding.weight": "input",
            "*.layers.*_proj_weight": "hidden",
            "*.layers.*out_proj.weight": "hidden",
            "*.layers.*.linear?.weight": "hidden",
            "*norm*.weight": "vector",
            "*.transformer.*bias": "vector",
            "net.decoder.weight": "output",
            "net.decoder.bias": "vector",
        },
        branches=("*out_proj.weight", "*out_proj.bias", "*.linear2.*"),
    ),
    "llama": Case(
        lambda width, depth: llama(width, depth, tied=False),
        text,
        hugging_face_loss,
        {**LLAMA, "net.lm_head.weight": "output"},
        LLAMA_ENDS,
    ),
    "llama, tied": Case(
        lambda width, depth: llama(width, depth, tied=True), text, hugging_face_loss, LLAMA, LLAMA_ENDS
    ),
    "gpt2": Case(
        lambda width, depth: gpt2(width, depth, tied=False),
        text,
        hugging_face_loss,
        {**GPT2, "net.lm_head.weight": "output"},
        GPT2_ENDS,
    ),
    "gpt2, tied": Case(lambda width, depth: gpt2(width, depth, tied=True), text, hugging_face_loss, GPT2, GPT2_ENDS),
    "vit": Case(
        ViT,
        images,
        classify,
        {
            **ENCODER_LAYER,
            "net.patches.weight": "input",
            "net.patches.bias": "vector",
            "net.cls_token": "vector",
            "net.positions": "input",
            "net.encoder.norm.*": "vector",
            "net.head.weight": "output",
            "net.head.bias": "vector",
        },
        branches=("*out_proj.weight", "*out_proj.bias", "*.linear2.*"),
        roles={"*.positions": "input"},
    ),
    "resnet": Case(
        ResNet,
        images,
        classify,
        {
            "net.conv1.weight": "input",
            "net.bn1.*": "vector",
            "*.layer?.*.conv?.weight": "hidden",
            "*.layer?.*.bn?.*": "vector",
            "*.downsample.0.weight": "hidden",
            "*.downsample.1.*": "vector",
            "net.fc.weight": "output",
            "net.fc.bias": "vector",
        },
        branches=("*.layer?.*.bn2.*",),
    ),
    "hugging face resnet": Case(
        lambda width, depth: resnet(width, depth, "basic"),
        images,
        classify,
        {
            "*.embedder.embedder.convolution.weight": "input",
            "*.stages.*.convolution.weight": "hidden",
            "*.normalization.*": "vector",
            "net.classifier.1.weight": "output",
            "net.classifier.1.bias": "vector",
        },
        branches=("*.layer.1.normalization.*",),
    ),
    "lstm": Case(
        Recurrent,
        text,
        next_word,
        {
            "net.embedding.weight": "input",
            "net.lstm.weight_*": "hidden",
            "net.gru.weight_*": "hidden",
            "net.*.bias_*": "vector",
            "net.readout.weight": "output",
            "net.readout.bias": "vector",
        },
        deepens=False,
    ),
}
