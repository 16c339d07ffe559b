"""Llama computes what its formulas say, and what transformers' Llama computes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_mup.models.layers import RMSNorm, rotation
from lightning_mup.models.llama import Llama
from tests.models import generator

VOCABULARY = 13
Array = np.ndarray[Any, np.dtype[np.float64]]


def small(**changes: Any) -> Llama:  # noqa: ANN401 - any of its settings
    """A model with no zeros, in float64."""
    sizes: dict[str, Any] = {"width": 32, "depth": 2, "context": 8, "head_dim": 8, "zero_outputs": False} | changes
    torch.manual_seed(0)
    net = Llama(VOCABULARY, **sizes).double()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, dtype=torch.float64))  # gains, too
    return net


def tokens(length: int = 8, batch: int = 2, seed: int = 0) -> Tensor:
    return torch.randint(VOCABULARY, (batch, length), generator=generator(seed))


# -- an independent reference ------------------------------------------------------------------------------------------


def rms_norm(x: Array, gain: Array | float = 1.0, eps: float = 1e-6) -> Array:
    return gain * x / np.sqrt(np.mean(x**2) + eps)


def turned(x: Array, position: int, theta: float) -> Array:
    half = len(x) // 2
    out = np.empty_like(x)
    for i in range(half):
        angle = position / theta ** (2 * i / len(x))
        pair = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]) @ [x[i], x[i + half]]
        out[i], out[i + half] = pair
    return out


def attention(x: Array, weights: dict[str, Array], setup: dict[str, Any]) -> Array:
    size, queries = setup["head_dim"], x.shape[1] // setup["head_dim"]
    keys = setup.get("kv_heads") or queries

    def heads(kind: str, number: int, treated: bool) -> Array:
        found = (x @ weights[f"attention.{kind}_proj.weight"].T).reshape(len(x), number, size)
        for t, h in np.ndindex(len(x), number) if treated else ():
            found[t, h] = rms_norm(found[t, h]) if setup.get("qk_norm", True) else found[t, h]
            if setup.get("positions", "rotary") == "rotary":
                found[t, h] = turned(found[t, h], t, setup.get("rope_theta", 1e4))
        return found

    q, k, v = heads("q", queries, True), heads("k", keys, True), heads("v", keys, False)
    out = np.zeros_like(q)
    for t, h in np.ndindex(len(x), queries):
        shared = h // (queries // keys)
        scores = np.array([q[t, h] @ k[s, shared] for s in range(t + 1)]) / np.sqrt(size)
        chances = np.exp(scores - scores.max())
        out[t, h] = (chances / chances.sum()) @ v[: t + 1, shared]
    return out.reshape(x.shape) @ weights["attention.o_proj.weight"].T


def mlp(x: Array, weights: dict[str, Array], setup: dict[str, Any]) -> Array:
    up = x @ weights["mlp.up_proj.weight"].T
    if setup.get("mlp") == "gelu":
        hidden = up / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (up + 0.044715 * up**3)))
    else:
        gate = x @ weights["mlp.gate_proj.weight"].T
        hidden = gate / (1 + np.exp(-gate)) * up
    return hidden @ weights["mlp.down_proj.weight"].T


def reference(net: Llama, text: Tensor, setup: dict[str, Any]) -> Array:
    """Logits of one sequence."""
    weights = {name: p.detach().numpy() for name, p in net.state_dict().items()}
    x = weights["embedding.weight"][text.numpy()].copy()
    if setup.get("positions") == "learned":
        x += weights["positions.weight"][: len(text)]

    def normed(name: str) -> Array:
        return np.stack([rms_norm(row, weights.get(f"{name}.weight", 1.0)) for row in x])

    for layer in range(2):
        prefix = f"layers.{layer}."
        own = {name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)}
        x = x + attention(normed(f"{prefix}attention_norm"), own, setup)
        x = x + mlp(normed(f"{prefix}mlp_norm"), own, setup)
    out = weights["embedding.weight"] if setup.get("tied") else weights["readout.weight"]
    return normed("norm") @ out.T


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"norm_scale": True, "qk_norm": False, "kv_heads": 2, "rope_theta": 100.0, "tied": True},
        {"positions": "learned", "mlp": "gelu", "mlp_expansion": 1.0, "kv_heads": 1},
        {"mlp_expansion": 2.7, "head_dim": 16, "norm_scale": True, "positions": "learned"},
    ],
)
def test_equals_an_independent_reference(changes: dict[str, Any]) -> None:
    net, text = small(**changes), tokens()
    expected = np.stack([reference(net, row, {"head_dim": 8} | changes) for row in text])
    np.testing.assert_allclose(net(text).detach().numpy(), expected, rtol=0, atol=1e-10)


# -- transformers ------------------------------------------------------------------------------------------------------

RENAMED = {
    "model.embed_tokens": "embedding",
    "model.layers": "layers",
    "self_attn": "attention",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "mlp_norm",
    "model.norm": "norm",
    "lm_head": "readout",
}


@pytest.mark.parametrize(("kv_heads", "tied", "theta"), [(4, False, 1e4), (2, True, 5e5)])
def test_equals_transformers(kv_heads: int, tied: bool, theta: float) -> None:
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        rope_theta=theta,
        tie_word_embeddings=tied,
        initializer_range=0.3,
        rms_norm_eps=1e-5,
    )
    torch.manual_seed(0)
    theirs = transformers.LlamaForCausalLM(config)
    kinds: dict[str, Any] = {"norm_scale": True, "qk_norm": False, "norm_eps": 1e-5}
    sizes: dict[str, Any] = {"width": 32, "depth": 2, "context": 64, "head_dim": 8, "mlp_expansion": 3.0}
    ours = Llama(VOCABULARY, **sizes, kv_heads=kv_heads, tied=tied, rope_theta=theta, **kinds)
    weights = {}
    for name, value in theirs.state_dict().items():
        for old, new in RENAMED.items():
            name = name.replace(old, new)  # noqa: PLW2901 - renamed step by step
        weights[name] = value
    ours.load_state_dict(weights)
    text = tokens(64)
    logits, expected = ours(text), theirs(text).logits
    assert expected.std() > 0.3
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    for out in (logits, expected):
        F.cross_entropy(out.flatten(0, 1), text.roll(-1).flatten()).backward()
    torch.testing.assert_close(
        ours.layers[0].attention.k_proj.weight.grad,
        theirs.model.layers[0].self_attn.k_proj.weight.grad,
        rtol=1e-4,
        atol=1e-6,
    )


# -- properties --------------------------------------------------------------------------------------------------------


@settings(max_examples=15, deadline=None)
@given(
    changed=st.integers(1, 7),
    kv_heads=st.sampled_from([1, 2, 4]),
    positions=st.sampled_from(["rotary", "learned"]),
    kind=st.sampled_from(["swiglu", "gelu"]),
)
def test_causal(changed: int, kv_heads: int, positions: str, kind: str) -> None:
    net, text = small(kv_heads=kv_heads, positions=positions, mlp=kind), tokens()
    other = text.clone()
    other[:, changed] = (other[:, changed] + 1) % VOCABULARY
    before, after = net(text), net(other)
    torch.testing.assert_close(after[:, :changed], before[:, :changed], rtol=0, atol=1e-12)
    assert not torch.allclose(after[:, changed:], before[:, changed:])


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_grouped_queries_equal_repeated_heads(kv_heads: int) -> None:
    grouped, full = small(kv_heads=kv_heads), small()
    weights = grouped.state_dict()
    for name in [n for n in weights if "k_proj" in n or "v_proj" in n]:
        heads = weights[name].unflatten(0, (kv_heads, 8))
        weights[name] = heads.repeat_interleave(4 // kv_heads, dim=0).flatten(0, 1)
    full.load_state_dict(weights)
    torch.testing.assert_close(grouped(tokens()), full(tokens()), rtol=0, atol=1e-12)


def test_rotary_sees_distances_alone() -> None:
    """Attention between two positions does not change when both move."""
    attend = small(depth=1, norm_scale=False).layers[0].attention
    from_start = torch.randn(1, 4, 32, dtype=torch.float64, generator=generator(0))
    cosines, sines = rotation(10, 8, 1e4, from_start)
    here = attend(from_start, (cosines[:4], sines[:4]))
    torch.testing.assert_close(attend(from_start, (cosines[6:], sines[6:])), here, rtol=0, atol=1e-12)
    assert not torch.allclose(attend(from_start, None), here)


def test_rotary_goes_beyond_the_context() -> None:
    assert small(context=4)(tokens(8)).shape == (2, 8, VOCABULARY)


@pytest.mark.parametrize("positions", ["rotary", "learned"])
def test_checkpointed_gradients_are_the_same(positions: str) -> None:
    grads = []
    for flag in (False, True):
        net = small(positions=positions, checkpoint_activations=flag)
        ran = []
        net.layers[0].attention.register_forward_hook(lambda *_, ran=ran: ran.append(1))
        F.cross_entropy(net(tokens()).flatten(0, 1), tokens(seed=1).flatten()).backward()
        assert len(ran) == 1 + flag  # computed once more in the backward pass
        grads.append([p.grad for p in net.parameters()])
    for plain, again in zip(*grads, strict=True):
        assert torch.equal(plain, again)


def test_tied_shares_its_storage() -> None:
    net = small(tied=True)
    assert net.readout.weight is net.embedding.weight
    assert len(list(net.parameters())) == 2 + 2 * 7 - 1
    assert small().readout.weight is not small().embedding.weight


@pytest.mark.parametrize("positions", ["rotary", "learned"])
def test_bfloat16(positions: str) -> None:
    net = small(positions=positions, kv_heads=2, norm_scale=True)
    expected = net.float()(tokens())
    found = net.bfloat16()(tokens())
    assert found.dtype == torch.bfloat16
    assert (found - expected).square().mean().sqrt() < 0.03 * expected.square().mean().sqrt()
    found.float().logsumexp(-1).sum().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in net.parameters())


def test_autocast() -> None:
    net = small(norm_scale=True).float()
    expected = net(tokens())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = net(tokens())
    assert (found - expected).square().mean().sqrt() < 0.03 * expected.square().mean().sqrt()


def test_norm_is_that_of_torch() -> None:
    x = torch.randn(4, 6, dtype=torch.float64, generator=generator(0))
    own, theirs = RMSNorm(6, eps=1e-3).double(), torch.nn.RMSNorm(6, eps=1e-3).double()
    for norm in (own, theirs):
        torch.nn.init.uniform_(norm.weight, generator=generator(1))
    torch.testing.assert_close(own(x), theirs(x))


# -- initial values ----------------------------------------------------------------------------------------------------


def test_starts_at_zero_and_learns() -> None:
    torch.manual_seed(0)
    net = Llama(VOCABULARY, width=32, depth=2, context=8, head_dim=8)
    logits = net(tokens())
    assert torch.equal(logits, torch.zeros_like(logits))
    F.cross_entropy(logits.flatten(0, 1), tokens(seed=1).flatten()).backward()
    moved = {name for name, p in net.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert moved == {"readout.weight"}  # everything else waits for it
    at_zero = {name.split(".")[-2] for name, p in net.named_parameters() if not p.any()}
    assert at_zero == {"o_proj", "down_proj", "readout"}


def test_tied_leaves_the_embedding_alone() -> None:
    net = Llama(VOCABULARY, width=256, depth=1, context=8, tied=True, embedding_std=0.02)
    assert net.embedding.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert net(tokens()).any()


@pytest.mark.parametrize("at_zero", [True, False])
def test_initial_sizes(at_zero: bool) -> None:
    torch.manual_seed(0)
    changes: dict[str, Any] = {"positions": "learned", "norm_scale": True, "embedding_std": 0.3, "mlp_expansion": 2.0}
    net = Llama(100, width=128, depth=2, context=100, zero_outputs=at_zero, **changes)
    for name, parameter in net.named_parameters():
        kind = name.split(".")[-2]
        std = 128**-0.5
        if kind in ("embedding", "positions"):
            std = 0.3
        elif "norm" in kind:
            assert torch.equal(parameter, torch.ones(128))
            continue
        elif kind in ("o_proj", "down_proj", "readout"):
            std = 0.0 if at_zero else parameter.shape[1] ** -0.5
        assert parameter.detach().square().mean().sqrt().item() == pytest.approx(std, rel=0.03), name


def test_meta_device_then_values() -> None:
    torch.manual_seed(0)
    here = Llama(VOCABULARY, width=32, depth=1, context=8, head_dim=8, norm_scale=True)
    with torch.device("meta"):
        later = Llama(VOCABULARY, width=32, depth=1, context=8, head_dim=8, norm_scale=True)
    later.to_empty(device="cpu").reset_parameters()
    sizes = [[p.detach().norm().item() for p in net.parameters()] for net in (here, later)]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.2)
    assert not list(here.buffers())  # nothing else to fill in


# -- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 60}, r"width must be a multiple of head_dim=8, got 60; give width=64"),
        ({"width": 3}, r"give width=8"),
        ({"kv_heads": 3}, r"kv_heads must divide the 4 heads .*, got 3; give \[1, 2, 4\]"),
        ({"kv_heads": 8}, r"kv_heads must divide the 4 heads"),
        ({"kv_heads": 0}, r"kv_heads must divide the 4 heads"),
        ({"head_dim": 1}, r"head_dim must be even for rotary positions, got 1"),
        ({"depth": 0}, r"depth must be a whole number >= 1, got 0"),
        ({"context": 2.5}, r"context must be a whole number >= 1, got 2.5"),
        ({"mlp": "swigul"}, r"mlp must be one of \('swiglu', 'gelu'\), got 'swigul'"),
        ({"positions": "rope"}, r"positions must be one of \('rotary', 'learned'\), got 'rope'"),
        ({"rope_theta": 0.0}, r"rope_theta must be > 0, got 0.0"),
        ({"mlp_expansion": -1.0}, r"mlp_expansion must be > 0, got -1.0"),
        ({"norm_eps": float("nan")}, r"norm_eps must be >= 0, got nan"),
        ({"embedding_std": -0.1}, r"embedding_std must be >= 0, got -0.1"),
    ],
)
def test_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(**changes)


def test_an_odd_head_may_have_learned_positions() -> None:
    assert small(head_dim=1, width=4, positions="learned")(tokens()).shape == (2, 8, VOCABULARY)


def test_too_long_for_learned_positions() -> None:
    with pytest.raises(ValueError, match=r"learned positions end at context=4, got 8 tokens; .*context=8"):
        small(positions="learned", context=4)(tokens())


def test_tokens_without_a_batch() -> None:
    with pytest.raises(ValueError, match=r"tokens must be \[batch, context\], got shape \(8,\)"):
        small()(tokens()[0])
