"""Where residual branches end: found in full, or not at all."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from lightning_mup import Layout
from lightning_mup.core.branches import branch_ends
from tests.unit.blocks import (
    WIDTH,
    AllInTheBlock,
    AllInTheBlockUnseen,
    Bent,
    Expansion1,
    LectureBlock,
    Model,
    NanoGPT,
    Normalized,
    NormInBranch,
    Parallel,
    PostActivation,
    PostNorm,
    PreActivation,
    ProjectedIn,
    ProjectedOnce,
    ResidualModel,
    ThroughMethods,
    UnseenSum,
    WithExperts,
    WithLlamaMLP,
)


def reading(model: nn.Module, block: str) -> tuple[list[str], str]:
    """The ends of one block, without its name, and why they are unclear."""
    ends, unclear = branch_ends(model, [block])
    return sorted(end.removeprefix(f"{block}.") for end in ends), unclear.get(block, "")


def hugging_face(kind: str, **config: object) -> nn.Module:
    cls = getattr(transformers, kind)
    with torch.device("meta"):
        model: nn.Module = cls(cls.config_class(**config))
    return model


def decoder(kind: str, *, inner: int = 64, **config: object) -> nn.Module:
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return hugging_face(kind, **sizes, intermediate_size=inner, **config)


# -- Hugging Face ------------------------------------------------------------------------------------------------------

LLAMA = ["mlp.down_proj.weight", "self_attn.o_proj.weight"]
KNOWN: dict[str, tuple[Callable[[], nn.Module], str, list[str]]] = {
    "llama": (lambda: decoder("LlamaModel"), "layers.0", LLAMA),
    "llama, expansion 1": (lambda: decoder("LlamaModel", inner=32), "layers.0", LLAMA),
    "qwen3": (lambda: decoder("Qwen3Model", num_key_value_heads=1), "layers.1", LLAMA),
    "phi3, fused": (lambda: decoder("Phi3Model", pad_token_id=0), "layers.0", LLAMA),
    "cohere, parallel": (lambda: decoder("CohereModel", num_key_value_heads=1), "layers.0", LLAMA),
    "neox, parallel": (
        lambda: decoder("GPTNeoXModel"),
        "layers.0",
        ["attention.dense.bias", "attention.dense.weight", "mlp.dense_4h_to_h.bias", "mlp.dense_4h_to_h.weight"],
    ),
    "gpt2, cross-attention": (
        lambda: hugging_face("GPT2Model", n_embd=32, n_head=2, n_layer=1, add_cross_attention=True),
        "h.0",
        [f"{part}.c_proj.{what}" for part in ("attn", "crossattention", "mlp") for what in ("bias", "weight")],
    ),
    "bert, post-norm": (
        lambda: decoder("BertModel"),
        "encoder.layer.0",
        ["attention.output.dense.bias", "attention.output.dense.weight", "output.dense.bias", "output.dense.weight"],
    ),
    "modern bert, fused": (
        lambda: decoder("ModernBertModel", pad_token_id=0),
        "layers.0",
        ["attn.Wo.weight", "mlp.Wo.weight"],
    ),
    "vit": (
        lambda: hugging_face("ViTModel", hidden_size=32, intermediate_size=64, num_attention_heads=2),
        "layers.0",
        ["attention.o_proj.bias", "attention.o_proj.weight", "mlp.fc2.bias", "mlp.fc2.weight"],
    ),
    "dinov2, layer scale": (
        lambda: hugging_face("Dinov2Model", hidden_size=32, num_attention_heads=2),
        "encoder.layer.0",
        ["attention.o_proj.bias", "attention.o_proj.weight", "mlp.fc2.bias", "mlp.fc2.weight"],
    ),
    "t5 encoder": (
        lambda: hugging_face("T5Model", d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=2),
        "encoder.block.0",
        ["layer.0.SelfAttention.o.weight", "layer.1.DenseReluDense.wo.weight"],
    ),
    "t5 decoder": (
        lambda: hugging_face("T5Model", d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=2),
        "decoder.block.1",
        ["layer.0.SelfAttention.o.weight", "layer.1.EncDecAttention.o.weight", "layer.2.DenseReluDense.wo.weight"],
    ),
    "resnet, bottleneck": (
        lambda: hugging_face("ResNetModel", embedding_size=8, hidden_sizes=[32, 64], depths=[2, 2]),
        "encoder.stages.1.layers.0",
        ["layer.2.normalization.bias", "layer.2.normalization.weight"],
    ),
    "convnext": (
        lambda: hugging_face("ConvNextModel", hidden_sizes=[8, 16], depths=[2, 2], num_stages=2),
        "encoder.stages.1.layers.1",
        ["pwconv2.bias", "pwconv2.weight"],
    ),
}


@pytest.mark.parametrize("name", KNOWN)
def test_ends_of_library_blocks(name: str) -> None:
    build, block, expected = KNOWN[name]
    assert reading(build(), block) == (expected, "")


# The norm behind the branch makes a factor on the matrix before it void; a gain may be stored as 1 + w.
@pytest.mark.parametrize("kind", ["Gemma2Model", "Gemma3TextModel", "Olmo2Model"])
def test_norms_inside_the_branch_are_refused(kind: str) -> None:
    ends, why = reading(decoder(kind, pad_token_id=0), "layers.0")
    assert ends == []
    assert "'post_attention_layernorm' rescales the branch" in why


def test_swin_of_the_second_version_is_refused() -> None:
    """Its norms have the names of the first version's, but come after attention and MLP."""
    sizes = {"embed_dim": 16, "depths": [1, 1], "num_heads": [1, 2], "image_size": 32, "window_size": 4}
    ends, why = reading(hugging_face("Swinv2Model", **sizes), "encoder.layers.0.blocks.0")
    assert (ends, bool(why)) == ([], True)


def test_bert_of_expansion_1_is_refused() -> None:
    ends, why = reading(decoder("BertModel", inner=32), "encoder.layer.0")
    assert ends == []
    assert "'intermediate.dense.weight' may end a branch" in why


# -- torch -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("inner", [64, WIDTH])
def test_torch_encoder_layer(norm_first: bool, inner: int) -> None:
    layer = nn.TransformerEncoderLayer(WIDTH, 2, inner, norm_first=norm_first)
    model = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
    ends = ["linear2.bias", "linear2.weight", "self_attn.out_proj.bias", "self_attn.out_proj.weight"]
    assert reading(model, "layers.0") == (ends, "")


@pytest.mark.parametrize("norm_first", [True, False])
def test_torch_decoder_layer(norm_first: bool) -> None:
    model = nn.TransformerDecoder(nn.TransformerDecoderLayer(WIDTH, 2, 64, norm_first=norm_first), 1)
    parts = ("linear2", "multihead_attn.out_proj", "self_attn.out_proj")
    assert reading(model, "layers.0") == ([f"{p}.{what}" for p in parts for what in ("bias", "weight")], "")


# -- by hand -----------------------------------------------------------------------------------------------------------


def weights_and_biases(*parts: str) -> list[str]:
    return [f"{part}.{what}" for part in parts for what in ("bias", "weight")]


BY_HAND: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "nanoGPT": (NanoGPT, weights_and_biases("attn.c_proj", "mlp.2")),
    "parallel": (Parallel, weights_and_biases("attn.c_proj", "mlp.2")),
    "through methods": (ThroughMethods, weights_and_biases("attn.c_proj", "mlp.2")),
    "post-norm": (PostNorm, weights_and_biases("attn.c_proj", "mlp.2")),
    "norm inside the branch": (NormInBranch, weights_and_biases("ln_1", "ln_2")),
    "expansion 1": (Expansion1, weights_and_biases("attn.c_proj", "mlp.2")),
    "in a row": (ProjectedOnce, weights_and_biases("mlp.2", "proj")),
    "all in the block": (AllInTheBlock, ["w2.weight", "wo.weight"]),
    "all in the block, expansion 1": (lambda: AllInTheBlock(WIDTH), ["w2.weight", "wo.weight"]),
    "meta's names": (WithLlamaMLP, ["attn.c_proj.bias", "attn.c_proj.weight", "mlp.w2.weight"]),
    "meta's names, expansion 1": (
        lambda: WithLlamaMLP(WIDTH),
        ["attn.c_proj.bias", "attn.c_proj.weight", "mlp.w2.weight"],
    ),
    "pre-activation": (PreActivation, weights_and_biases("conv2")),
    "post-activation": (PostActivation, weights_and_biases("bn2")),
    "experts": (
        WithExperts,
        weights_and_biases("attn.c_proj", *(f"mlp.experts.{i}.2" for i in range(4)), "mlp.shared_expert.2"),
    ),
    "heads in a list": (lambda: LectureBlock(WIDTH), weights_and_biases("ffwd.2", "sa.proj")),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_ends_of_blocks_by_hand(name: str) -> None:
    build, expected = BY_HAND[name]
    assert reading(Model(build(), build()), "blocks.1") == (expected, "")


@pytest.mark.parametrize(
    ("build", "why"),
    [
        (UnseenSum, "'mlp.2.weight' may end a branch, but forward is not seen to add it"),
        (AllInTheBlockUnseen, "'w2.weight' may end a branch, but forward is not seen to add it"),
        (Bent, "which of ['mlp'] forward adds to the stream"),
        (Normalized, "which of ['attn'] forward adds to the stream"),
        (ProjectedIn, "'proj' may carry the stream itself"),
    ],
)
def test_half_a_reading_is_none(build: Callable[[], nn.Module], why: str) -> None:
    ends, found = reading(Model(build()), "blocks.0")
    assert ends == []
    assert why in found


def test_block_without_source_is_unclear() -> None:
    namespace: dict[str, Callable[..., Tensor]] = {}
    exec("def forward(self, x):\n    return x + self.mlp(x)", namespace)  # noqa: S102 - code without a file
    unknown = type("Unknown", (NanoGPT,), {"forward": namespace["forward"]})
    assert reading(Model(unknown()), "blocks.0") == ([], "the source of Unknown.forward cannot be read")


def test_sum_outside_of_the_blocks() -> None:
    """Blocks that are plain functions are branches only where the model adds them to the stream."""
    block = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH))
    assert reading(ResidualModel(block), "blocks.0") == (["1.bias", "1.weight"], "")
    ends, why = reading(Model(block), "blocks.0")
    assert ends == []
    assert "neither the block nor the forward of Model" in why


def test_norm_at_the_end_of_a_sequential() -> None:
    block = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH))
    assert reading(ResidualModel(block), "blocks.0") == (["1.bias", "1.weight"], "")
    bent = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh())
    assert "a nonlinearity Tanh ends" in reading(ResidualModel(bent), "blocks.0")[1]
    kinked = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU())  # a positive factor goes through
    assert reading(ResidualModel(kinked), "blocks.0") == (["0.bias", "0.weight"], "")


def test_given_layouts_are_read() -> None:
    """Raw experts are unclear, until their axes are given."""

    class Raw(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Parameter(torch.zeros(4, WIDTH, 64))
            self.down = nn.Parameter(torch.zeros(4, 64, WIDTH))

        def forward(self, x: Tensor) -> Tensor:
            return torch.einsum("...i,eij,ejk->...k", x, self.up, self.down)

    class WithRaw(NanoGPT):
        def __init__(self) -> None:
            super().__init__()
            self.mlp = nn.ModuleDict({"experts": Raw()})

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.attn(self.ln_1(x))
            return x + self.mlp["experts"](self.ln_2(x))

    model = Model(WithRaw())
    assert "'mlp.experts.up' of shape (4, 16, 64) is a bare parameter" in reading(model, "blocks.0")[1]
    axes = Layout(stack=(0,), fan_in=(1,), fan_out=(2,))
    ends, unclear = branch_ends(model, ["blocks.0"], {f"blocks.0.mlp.experts.{n}": axes for n in ("up", "down")})
    assert not unclear
    assert sorted(ends) == ["blocks.0.attn.c_proj.bias", "blocks.0.attn.c_proj.weight", "blocks.0.mlp.experts.down"]


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")  # torch.compile's own imports
def test_wrapped_blocks_read_alike() -> None:
    expected = weights_and_biases("attn.c_proj", "mlp.2")
    assert reading(Model(checkpoint_wrapper(NanoGPT())), "blocks.0") == (expected, "")
    compiled = Model(NanoGPT())
    compiled.blocks[0].mlp = torch.compile(compiled.blocks[0].mlp)
    compiled.blocks[0] = torch.compile(compiled.blocks[0])
    assert reading(compiled, "blocks.0") == (expected, "")


class BentPart(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(WIDTH, 64), nn.Linear(64, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.fc2(torch.relu(self.fc1(x))))


class WithBentPart(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(WIDTH), BentPart()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.norm(x))


def test_a_nonlinearity_behind_the_last_matrix_is_refused() -> None:
    ends, why = reading(Model(WithBentPart()), "blocks.0")
    assert ends == []
    assert "a nonlinearity follows 'fc2'" in why


class BentSum(Model):
    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + torch.tanh(block(x))
        return x


def test_a_nonlinearity_between_block_and_sum_is_refused() -> None:
    block = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH))
    ends, why = reading(BentSum(block), "blocks.0")
    assert ends == []
    assert "neither the block nor the forward of BentSum" in why
