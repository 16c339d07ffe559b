"""Every parameter's role and dimensions, by what grows, layer by layer."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from transformers.pytorch_utils import Conv1D

from lightning_mup import Choices, Layout, Role, plan
from lightning_mup.core.infer import RoleLike, shared_names
from lightning_mup.core.layout import layout_of
from tests.unit.blocks import LectureBlock, Model
from tests.unit.reading import Bare, facts, meta, read

Make = Callable[[int], nn.Module]


# -- one layer ---------------------------------------------------------------------------------------------------------

LAYERS: dict[str, tuple[Make, dict[str, tuple[str, str, str, int]]]] = {
    "Linear in": (
        lambda n: nn.Linear(3, n),
        {"weight": ("input", "8/4", "3/3", 1), "bias": ("vector", "8/4", "1/1", 1)},
    ),
    "Linear": (lambda n: nn.Linear(n, 3 * n, bias=False), {"weight": ("hidden", "24/12", "8/4", 1)}),
    "Linear out": (
        lambda n: nn.Linear(n, 3),
        {"weight": ("output", "3/3", "8/4", 1), "bias": ("vector", "3/3", "1/1", 1)},
    ),
    "to a single number": (
        lambda n: nn.Linear(n, 1),
        {"weight": ("output", "1/1", "8/4", 1), "bias": ("scalar", "1/1", "1/1", 1)},
    ),
    "Bilinear": (lambda n: nn.Bilinear(n, 2, n, bias=False), {"weight": ("hidden", "8/4", "16/8", 1)}),
    "Embedding": (lambda n: nn.Embedding(9, n), {"weight": ("input", "8/4", "9/9", 1)}),
    "Embedding, larger vocabulary": (lambda n: nn.Embedding(n, n), {"weight": ("input", "8/4", "8/8", 1)}),
    "EmbeddingBag": (lambda n: nn.EmbeddingBag(9, n), {"weight": ("input", "8/4", "9/9", 1)}),
    "Conv1d": (lambda n: nn.Conv1d(n, n, 5, bias=False), {"weight": ("hidden", "8/4", "40/20", 1)}),
    "Conv2d in": (lambda n: nn.Conv2d(3, n, 3, bias=False), {"weight": ("input", "8/4", "27/27", 1)}),
    "Conv3d": (lambda n: nn.Conv3d(n, 2 * n, 2, bias=False), {"weight": ("hidden", "16/8", "64/32", 1)}),
    "Conv2d, fixed groups": (
        lambda n: nn.Conv2d(n, n, 3, groups=2, bias=False),
        {"weight": ("hidden", "8/4", "36/18", 1)},
    ),
    "Conv2d, depthwise": (
        lambda n: nn.Conv2d(n, n, 3, groups=n, bias=False),
        {"weight": ("input", "8/4", "9/9", 1)},  # each output sums over nine entries at every width
    ),
    "ConvTranspose2d": (
        lambda n: nn.ConvTranspose2d(n, 3, 2, bias=False),
        {"weight": ("output", "3/3", "32/16", 1)},
    ),
    "MultiheadAttention": (
        lambda n: nn.MultiheadAttention(n, 2, bias=False),
        {"in_proj_weight": ("hidden", "8/4", "8/4", 3), "out_proj.weight": ("hidden", "8/4", "8/4", 1)},
    ),
    "MultiheadAttention, other keys": (
        lambda n: nn.MultiheadAttention(n, 2, kdim=5, vdim=6, add_bias_kv=True),
        {
            "q_proj_weight": ("hidden", "8/4", "8/4", 1),
            "k_proj_weight": ("input", "8/4", "5/5", 1),
            "v_proj_weight": ("input", "8/4", "6/6", 1),
            "in_proj_bias": ("vector", "24/12", "1/1", 1),
            "bias_k": ("vector", "8/4", "1/1", 1),
            "bias_v": ("vector", "8/4", "1/1", 1),
            "out_proj.weight": ("hidden", "8/4", "8/4", 1),
            "out_proj.bias": ("vector", "8/4", "1/1", 1),
        },
    ),
    "RNN": (
        lambda n: nn.RNN(3, n, bias=False),
        {"weight_ih_l0": ("input", "8/4", "3/3", 1), "weight_hh_l0": ("hidden", "8/4", "8/4", 1)},
    ),
    "LSTM, projected": (
        lambda n: nn.LSTM(3, n, proj_size=2, bias=False),
        {
            "weight_ih_l0": ("input", "8/4", "3/3", 4),
            "weight_hh_l0": ("input", "8/4", "2/2", 4),
            "weight_hr_l0": ("output", "2/2", "8/4", 1),
        },
    ),
    "GRU": (
        lambda n: nn.GRU(n, n, bias=False),
        {"weight_ih_l0": ("hidden", "8/4", "8/4", 3), "weight_hh_l0": ("hidden", "8/4", "8/4", 3)},
    ),
    "LSTMCell": (
        lambda n: nn.LSTMCell(n, n, bias=False),
        {"weight_ih": ("hidden", "8/4", "8/4", 4), "weight_hh": ("hidden", "8/4", "8/4", 4)},
    ),
    "LayerNorm": (nn.LayerNorm, {"weight": ("vector", "8/4", "1/1", 1), "bias": ("vector", "8/4", "1/1", 1)}),
    "LayerNorm over two axes": (
        lambda n: nn.LayerNorm((5, n), bias=False),
        {"weight": ("vector", "40/20", "1/1", 1)},
    ),
    "RMSNorm": (nn.RMSNorm, {"weight": ("vector", "8/4", "1/1", 1)}),
    "GroupNorm": (
        lambda n: nn.GroupNorm(2, n),
        {"weight": ("vector", "8/4", "1/1", 1), "bias": ("vector", "8/4", "1/1", 1)},
    ),
    "BatchNorm": (nn.BatchNorm2d, {"weight": ("vector", "8/4", "1/1", 1), "bias": ("vector", "8/4", "1/1", 1)}),
    "PReLU": (lambda n: nn.PReLU(), {"weight": ("scalar", "1/1", "1/1", 1)}),
    "Hugging Face Conv1D": (
        lambda n: Conv1D(3 * n, n),
        {"weight": ("hidden", "24/12", "8/4", 1), "bias": ("vector", "24/12", "1/1", 1)},
    ),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layer(name: str) -> None:
    make, expected = LAYERS[name]
    found = read(meta(lambda: make(8)), meta(lambda: make(4)))
    assert {n: facts(spec) for n, spec in found.items()} == expected
    assert all(spec.why for spec in found.values())


def test_subclasses_read_like_their_base() -> None:
    class Scaled(nn.Linear):
        pass

    (spec,) = read(Scaled(8, 3, bias=False), Scaled(4, 3, bias=False)).values()
    assert (spec.role, spec.why) == (Role.OUTPUT, "Scaled")


def test_unknown_attributes_of_known_modules_are_not_guessed() -> None:
    assert layout_of(nn.Linear(2, 2), "weight_v") is None


# -- roles and layouts -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "base", "role", "expected"),
    [
        ((1, 16, 8), (1, 16, 4), "input", ("input", "8/4", "16/16", 1)),
        ((1, 32, 8), (1, 16, 4), "embedding", ("input", "8/4", "32/32", 1)),  # longer too: nothing is summed over
        ((8, 3), (4, 3), "input", ("input", "8/4", "3/3", 1)),  # as torch has it
        ((3, 8), (3, 4), "output", ("output", "3/3", "8/4", 1)),
        ((8, 3), (4, 3), "readout", ("output", "3/3", "8/4", 1)),  # used as x @ w
        ((8,), (4,), "output", ("output", "1/1", "8/4", 1)),
        ((16, 8), (8, 4), "hidden", ("hidden", "16/8", "8/4", 1)),
        ((8, 5), (4, 5), "vector", ("vector", "40/20", "1/1", 1)),
        ((1,), (1,), "scalar", ("scalar", "1/1", "1/1", 1)),
        ((8, 4), (8, 4), "hidden", ("hidden", "8/8", "4/4", 1)),
        ((16, 8), (8, 4), Layout(fan_out=(1,)), ("hidden", "8/4", "16/8", 1)),
        ((16, 3), (8, 3), Layout(fan_in=(0,)), ("output", "3/3", "16/8", 1)),
        ((24, 8), (12, 4), Layout(split=3), ("hidden", "8/4", "8/4", 3)),
        ((5, 8, 2), (5, 4, 2), Layout("hidden", fan_in=(1,), fan_out=(0, 2)), ("hidden", "10/10", "8/4", 1)),
    ],
)
def test_bare_parameters(shape: tuple[int, ...], base: tuple[int, ...], role: RoleLike, expected: object) -> None:
    (spec,) = read(Bare(*shape), Bare(*base), roles={"w": role}).values()
    assert facts(spec) == expected
    assert spec.why == "roles"


@pytest.mark.parametrize(
    ("shape", "role"), [((8,), "vector"), ((1, 1, 8), "vector"), ((8, 1, 1), "vector"), ((), "scalar")]
)
def test_bare_parameters_that_need_no_word(shape: tuple[int, ...], role: str) -> None:
    base = [4 if size == 8 else size for size in shape]
    (spec,) = read(Bare(*shape), Bare(*base)).values()
    assert spec.role.value == role


def test_stacked_experts() -> None:
    (spec,) = read(Bare(5, 16, 8), Bare(5, 8, 4), roles={"w": "hidden"}).values()
    assert (facts(spec), spec.stack) == (("hidden", "16/8", "8/4", 1), 5)
    axes = Layout(stack=(0,), fan_in=(1,), fan_out=(2,))
    (spec,) = read(Bare(5, 16, 8), Bare(5, 8, 4), roles={"w": axes}).values()
    assert (facts(spec), spec.stack) == (("hidden", "8/4", "16/8", 1), 5)


@pytest.mark.parametrize(("role", "init"), [("output", 0.5), ("hidden", 0.5**0.5), ("input", 1)])
def test_a_word_overrules_growth(role: str, init: float) -> None:
    made = plan(nn.Linear(8, 3), base=lambda: nn.Linear(4, 3), choices=Choices(roles={"weight": role}), method="sgd")[
        "weight"
    ]
    assert (made.spec.role.value, made.spec.why, made.init) == (role, "roles", pytest.approx(init))


def test_a_layout_leaves_what_it_does_not_say_to_the_module() -> None:
    """``split`` alone does not turn Hugging Face's transposed weight around."""
    (weight, _) = read(Conv1D(24, 8), Conv1D(12, 4), roles={"weight": Layout(split=3)}).values()
    assert facts(weight) == ("hidden", "8/4", "8/4", 3)


def test_roles_for_tied_parameters_by_any_name() -> None:
    def tied(n: int) -> nn.Module:
        made = nn.ModuleDict({"a": nn.Linear(n, n, bias=False), "b": nn.Linear(n, n, bias=False)})
        made["b"].weight = made["a"].weight
        return made

    (spec,) = read(tied(8), tied(4), roles={"b.weight": "output"}).values()
    assert (spec.name, spec.tied_to, spec.role) == ("a.weight", ("b.weight",), Role.OUTPUT)


@pytest.mark.parametrize("readout_first", [False, True])
def test_tied_embedding_is_read_as_an_embedding(readout_first: bool) -> None:
    """Whichever of the two was registered first."""

    def tied(n: int) -> nn.Module:
        parts = {"embedding": nn.Embedding(9, n), "readout": nn.Linear(n, 9, bias=False)}
        made = nn.ModuleDict(dict(reversed(parts.items())) if readout_first else parts)
        made["readout"].weight = made["embedding"].weight
        return made

    (spec,) = read(tied(8), tied(4)).values()
    assert facts(spec) == ("input", "8/4", "9/9", 1)
    assert spec.readout == ("readout",)
    assert spec.why.endswith("tied readout")


def test_two_lookups_of_one_table_are_no_readout() -> None:
    def tied(n: int) -> nn.Module:
        made = nn.ModuleDict({"a": nn.Embedding(9, n), "b": nn.Embedding(9, n)})
        made["b"].weight = made["a"].weight
        return made

    (spec,) = read(tied(8), tied(4)).values()
    assert (spec.role, spec.readout, spec.tied_to) == (Role.INPUT, (), ("b.weight",))


def test_frozen_parameters_are_left_out_and_need_no_role() -> None:
    def make(n: int) -> nn.Module:
        made = Bare(n, n)
        made.w.requires_grad_(False)
        made.readout = nn.Linear(n, 2)
        return made

    assert list(read(make(8), make(4))) == ["readout.weight", "readout.bias"]


def test_heads_in_a_list_are_settled_by_a_word() -> None:
    """One head maps a growing stream to a fixed size; joined with its growing siblings it is hidden."""
    roles = {"*.heads.*.weight": "hidden"}
    found = read(Model(LectureBlock(32)), Model(LectureBlock(16)), roles=roles)
    assert {s.role.value for n, s in found.items() if n.endswith("weight") and ".ln." not in n} == {"hidden"}


# -- the base run ------------------------------------------------------------------------------------------------------


def mlp(n: int) -> nn.Module:
    return nn.Sequential(nn.Linear(8, n), nn.ReLU(), nn.Linear(n, n), nn.ReLU(), nn.Linear(n, 2))


def test_base_run_guesses_unless_it_sees_a_wider_model() -> None:
    guessed = read(mlp(8), mlp(8))
    assert {s.role for n, s in guessed.items() if n.endswith("weight")} == {Role.HIDDEN}
    assert {s.certain for n, s in guessed.items() if n.endswith("weight")} == {False}
    assert all("nothing grows" in s.why for n, s in guessed.items() if n.endswith("weight"))
    seen = read(mlp(8), mlp(8), wider=mlp(16))
    assert [s.role.value for n, s in seen.items() if n.endswith("weight")] == ["input", "hidden", "output"]
    assert all(s.certain and set(s.ratios.values()) == {1} for s in seen.values())


# -- wrappers ----------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")  # torch.compile's own imports
def test_wrappers_do_not_change_names() -> None:
    plain = read(mlp(16), mlp(8))
    checkpointed = mlp(16)
    checkpointed[2] = checkpoint_wrapper(checkpointed[2])
    wrapped = [checkpointed, nn.DataParallel(mlp(16)), torch.compile(mlp(16)), mlp(16).compile() or mlp(16)]
    compiled = mlp(16)
    compiled[4] = torch.compile(compiled[4])
    for model in [*wrapped, compiled]:
        assert read(model, mlp(8)) == plain
        assert [names[0] for names, _ in shared_names(model)] == list(plain)
    assert read(mlp(16), nn.DataParallel(mlp(8))) == plain


def test_one_number_here_and_several_in_the_base_are_a_vector() -> None:
    (spec,) = read(Bare(1), Bare(4)).values()
    assert facts(spec) == ("vector", "1/4", "1/1", 1)


def test_a_wider_model_of_another_kind_tells_nothing() -> None:
    (spec,) = read(nn.Linear(8, 3, bias=False), nn.Linear(8, 3, bias=False), wider=nn.Conv1d(8, 6, 1)).values()
    assert (spec.role, spec.certain) == (Role.HIDDEN, False)


class Part(nn.Module):
    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part


def parts(name: str, count: int, make: Callable[[], nn.Module]) -> nn.Module:
    made = nn.Module()
    made.add_module(name, nn.ModuleList([Part(make()) for _ in range(count)]))
    return made


def test_tables_of_heads_that_grow_in_number_are_embeddings() -> None:
    """What is looked up is not joined with its siblings' rows."""
    found = read(parts("heads", 4, lambda: nn.Embedding(9, 8)), parts("heads", 2, lambda: nn.Embedding(9, 4)))
    assert {facts(spec) for spec in found.values()} == {("input", "8/4", "9/9", 1)}


def test_experts_that_grow_in_number_are_matrices_of_their_own() -> None:
    found = read(
        parts("experts", 4, lambda: nn.Linear(8, 3, bias=False)),
        parts("experts", 2, lambda: nn.Linear(4, 3, bias=False)),
    )
    assert {facts(spec) for spec in found.values()} == {("output", "3/3", "8/4", 1)}


@pytest.mark.parametrize(("cell", "count"), [(nn.RNNCell, 1), (nn.GRUCell, 3), (nn.LSTMCell, 4)])
def test_cells_have_a_matrix_per_gate(cell: Callable[..., nn.Module], count: int) -> None:
    found = read(meta(lambda: cell(3, 8, bias=False)), meta(lambda: cell(3, 4, bias=False)))
    assert facts(found["weight_ih"]) == ("input", "8/4", "3/3", count)
    assert facts(found["weight_hh"]) == ("hidden", "8/4", "8/4", count)


@pytest.mark.parametrize("table", [nn.Embedding, nn.EmbeddingBag])
def test_what_is_looked_up_sums_over_nothing_however_long_it_is(table: Callable[..., nn.Module]) -> None:
    model, base = table(18, 8), table(9, 4)
    for roles in (None, {"weight": "input"}, {"weight": Layout("input")}, {"weight": Layout(split=2)}):
        (spec,) = read(model, base, roles=roles).values()
        assert (spec.role, str(spec.fan_in)) == (Role.INPUT, "18/18")
