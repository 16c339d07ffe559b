"""What cannot be read raises, and the message says what, what it got, what is allowed and what to write next."""

from __future__ import annotations

import itertools
import re
import warnings
from collections.abc import Callable, Mapping

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

from lightning_mup import Choices, Layout, Role, plan
from lightning_mup.core.infer import RoleLike
from lightning_mup.core.patterns import match
from tests.unit.blocks import AllInTheBlockUnseen, LectureBlock, Model, UnseenSum
from tests.unit.reading import Bare, meta, read


def message(model: nn.Module, base: nn.Module, roles: Mapping[str, RoleLike] | None = None) -> str:
    with pytest.raises(ValueError, match=r".+") as error:
        read(model, base, roles)
    return str(error.value)


def pasted(text: str) -> dict[str, RoleLike]:
    """The ``roles={...}`` of a message, as if pasted into a call."""
    found = re.search(r"roles=(\{.*\})", text)
    assert found, text
    roles = eval(found[1], {"Layout": Layout})  # noqa: S307 - as Python reads it
    assert isinstance(roles, dict)
    return roles


def linears(*sizes: int) -> nn.Module:
    return meta(lambda: nn.Sequential(*[nn.Linear(i, o) for i, o in itertools.pairwise(sizes)]))


# -- parameters that say nothing of themselves -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "base", "role"),
    [
        ((16, 8), (8, 4), Role.HIDDEN),
        ((1, 9, 8), (1, 9, 4), Role.INPUT),
        ((9, 8), (9, 4), Role.INPUT),
        ((8, 3), (4, 3), Role.INPUT),
        ((8, 1), (4, 1), Role.OUTPUT),
        ((1, 8), (1, 4), Role.INPUT),
        ((5, 8, 8), (5, 4, 4), Role.HIDDEN),
        ((8, 8, 3), (4, 4, 3), Role.HIDDEN),  # a kernel: torch's order of axes
        ((9, 8), (9, 8), Role.HIDDEN),
        ((1, 9, 8), (1, 9, 8), Role.INPUT),
    ],
)
def test_bare_parameter_and_the_line_that_settles_it(shape: tuple[int, ...], base: tuple[int, ...], role: Role) -> None:
    text = message(Bare(*shape), Bare(*base))
    assert text.startswith("cannot tell what 1 parameter does:\n  w: a bare parameter")
    assert f"of shape {shape}, base {base}" in text
    assert "allowed: input (looked up, or added to the stream), hidden, output (a readout), vector, scalar" in text
    (spec,) = read(Bare(*shape), Bare(*base), pasted(text)).values()
    assert spec.role is role


def test_every_bare_parameter_in_one_message() -> None:
    def many(n: int) -> nn.Module:
        return nn.ModuleDict({f"part{i}": Bare(n, n) for i in range(20)} | {"read": Bare(3, n)})

    text = message(many(8), many(4))
    assert text.startswith("cannot tell what 21 parameters do:")
    assert "... and 9 more" in text
    assert list(pasted(text)) == [*(f"part{i}.w" for i in range(20)), "read.w"]
    found = read(many(8), many(4), pasted(text))
    assert (len(found), found["read.w"].role) == (21, Role.INPUT)


def test_one_line_for_all_blocks() -> None:
    def blocks(n: int) -> nn.Module:
        made = [nn.ModuleDict({"a": Bare(n, n), "b": Bare(3, n), "norm": nn.LayerNorm(n)}) for _ in range(5)]
        return Model(*made)

    text = message(blocks(8), blocks(4))
    assert pasted(text) == {"blocks.*.a.w": "hidden", "blocks.*.b.w": "input"}
    assert len(read(blocks(8), blocks(4), pasted(text))) == 20


def test_a_line_matches_nothing_but_what_it_is_for() -> None:
    """A star in it would take the readable weight of another block along."""

    def blocks(n: int) -> nn.Module:
        class Own(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.weight = nn.Parameter(torch.empty(n, n))

        return Model(Own(), nn.Linear(n, n), Own())

    text = message(blocks(8), blocks(4))
    assert pasted(text) == {"blocks.0.weight": "hidden", "blocks.2.weight": "hidden"}
    assert len(read(blocks(8), blocks(4), pasted(text))) == 4


def test_router_weight_is_suggested_as_a_readout() -> None:
    class Router(nn.Module):
        def __init__(self, n: int) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.empty(4, n))

    assert pasted(message(Router(8), Router(4))) == {"weight": "output"}


@pytest.mark.parametrize(("groups", "base_groups", "role"), [(8, 4, Role.INPUT), (2, 2, Role.HIDDEN)])
def test_transposed_convolution_in_groups(groups: int, base_groups: int, role: Role) -> None:
    """Its shape does not say how many groups the base has."""
    model, base = nn.ConvTranspose2d(8, 8, 3, groups=groups), nn.ConvTranspose2d(4, 4, 3, groups=base_groups)
    text = message(model, base)
    assert "a transposed convolution in groups" in text
    spec = read(model, base, pasted(text))["weight"]
    assert (spec.role, spec.fan_in.ratio) == (role, 1 if role is Role.INPUT else 2)


def test_heads_in_a_list() -> None:
    text = message(Model(LectureBlock(32)), Model(LectureBlock(16)))
    assert "one of the parts of 'blocks.0.sa.heads', which grow in number" in text
    found = read(Model(LectureBlock(32)), Model(LectureBlock(16)), pasted(text))
    assert found["blocks.0.sa.heads.3.query.weight"].role is Role.HIDDEN


# -- roles that cannot be ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ["hiden", "matrix", 3])
def test_unknown_role(role: RoleLike) -> None:
    text = message(linears(8, 8), linears(4, 4), {"0.weight": role})
    near = "; did you mean 'hidden'?" if role == "hiden" else ""
    allowed = "input (or embedding), hidden, output (or readout), vector, scalar"
    assert text == f"unknown role {role!r}; allowed: {allowed}{near}"


def test_pattern_that_matches_nothing() -> None:
    text = message(linears(8, 8), linears(4, 4), {"0.wieght": "hidden"})
    assert text == "roles: pattern '0.wieght' matches no parameter; did you mean '0.weight'?"


def test_pattern_matched_twice() -> None:
    text = message(linears(8, 8), linears(4, 4), {"*.weight": "hidden", "0.*": "vector"})
    assert text == "roles: '0.weight' is matched by '*.weight' and by '0.*'; make the patterns disjoint"


def test_one_parameter_of_two_names_is_matched_once() -> None:
    assert match({"*.w": 1}, [["a.w", "b.w"]], "roles") == {"a.w": 1}
    with pytest.raises(ValueError, match=r"'a.w' is matched by 'a.w' and by 'b.w'"):
        match({"a.w": 1, "b.w": 2}, [["a.w", "b.w"]], "roles")


@pytest.mark.parametrize(
    ("shape", "base", "role"),
    [
        ((8, 8, 3), (4, 4, 3), "hidden"),  # a kernel, not stacked matrices
        ((9, 8), (9, 4), "hidden"),
        ((16, 8), (8, 4), "output"),
        ((8, 3, 5), (4, 3, 5), "hidden"),
        ((8, 8, 3), (4, 4, 3), "input"),
    ],
)
def test_a_word_that_does_not_fit_the_growth(shape: tuple[int, ...], base: tuple[int, ...], role: str) -> None:
    text = message(Bare(*shape), Bare(*base), {"w": role})
    assert f"roles: {role!r} does not tell the axes of 'w', of shape {shape}, in which axes [" in text
    assert "allowed: input and output with one growing axis, hidden with the last two" in text
    (spec,) = read(Bare(*shape), Bare(*base), pasted(text)).values()
    assert spec.role is Role(role)


@pytest.mark.parametrize(
    ("layout", "problem"),
    [
        (Layout(fan_out=(2,)), "names axes [2]"),
        (Layout(fan_out=(0,), fan_in=()), "says nothing of axes [1]"),
    ],
)
def test_layout_that_does_not_fit_the_shape(layout: Layout, problem: str) -> None:
    text = message(Bare(8, 8), Bare(4, 4), {"w": layout})
    assert text.startswith(
        f"the Layout of 'w' {problem}, but its shape is (8, 8); each axis from 0 to 1 must be in one"
    )


@pytest.mark.parametrize("axes", [(0, 0), (-1,)])
def test_layout_with_impossible_axes(axes: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"counted from 0 and given once, got fan_out=.* write Layout\(stack=\(0,\)"):
        Layout(fan_out=axes)


@pytest.mark.parametrize(("model", "base"), [((8, 10), (4, 5)), ((9, 8), (5, 4))])
def test_rows_that_do_not_split(model: tuple[int, int], base: tuple[int, int]) -> None:
    text = message(Bare(*model), Bare(*base), {"w": Layout(split=3)})
    assert re.search(
        r"'w' has \d rows in shape \(\d, \d+\), which do not split into 3 equal blocks; give split=1", text
    )
    with pytest.raises(ValueError, match=r"split must be a positive number of row blocks, got 0; use split=1"):
        Layout(split=0)


# -- bases that do not fit ---------------------------------------------------------------------------------------------


def test_no_counterpart() -> None:
    class Named(nn.Module):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.add_module(name, nn.Linear(4, 4))

    text = message(Named("project"), Named("projection"))
    assert text.startswith("parameter 'project.weight' of shape (4, 4) has no counterpart 'project.weight' in the base")
    assert "did you mean 'projection.weight'?" in text
    assert "the base must be the same model at another size (only repeated blocks of one class" in text


def test_deeper_model_of_unlike_layers() -> None:
    def deep(depth: int) -> nn.Module:
        return nn.Sequential(*[part for _ in range(depth) for part in (nn.Linear(4, 4), nn.ReLU())])

    assert "'4.weight' of shape (4, 4) has no counterpart" in message(deep(3), deep(2))


def test_other_number_of_axes() -> None:
    text = message(nn.Conv2d(8, 8, 3), nn.Conv1d(4, 4, 3))
    assert text.startswith("parameter 'weight' has shape (8, 8, 3, 3), its counterpart 'weight' in the base (4, 4, 3)")
    assert "the number of axes must agree" in text


def test_unlike_blocks_of_one_base_block() -> None:
    def blocks(*widths: int) -> nn.Module:
        return Model(*[nn.Sequential(nn.LayerNorm(4), nn.Linear(4, w), nn.Linear(w, 4)) for w in widths])

    text = message(blocks(8, 16, 8), blocks(4))
    assert "'blocks.0.1.weight' (8, 4) and 'blocks.1.1.weight' (16, 4) both map onto 'blocks.0.1.weight'" in text
    assert "give the base as many blocks, or one of each shape" in text


# -- modules that cannot be read ---------------------------------------------------------------------------------------


def test_flattened_module_is_refused() -> None:
    """FSDP1 wants an accelerator to be built, so the wrapper is put together by hand."""
    wrapper = FullyShardedDataParallel.__new__(FullyShardedDataParallel)
    nn.Module.__init__(wrapper)
    wrapper._fsdp_wrapped_module = nn.Linear(4, 4)
    text = message(nn.ModuleDict({"net": wrapper}), linears(4, 4))
    assert text.startswith("module 'net' is wrapped by FSDP1, which flattens parameters so that their shapes are lost")
    assert "use FSDP2 (strategy='mup_fsdp', or torch.distributed.fsdp.fully_shard)" in text


def test_lazy_parameters() -> None:
    text = message(nn.Sequential(nn.LazyLinear(4)), linears(4, 4))
    assert text.startswith("parameter '0.weight' of Sequential is lazy and has no shape yet; run one batch through")


# -- branches ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("block", "branches"),
    [
        (UnseenSum, ["blocks.*.attn.c_proj.weight", "blocks.*.mlp.2.weight"]),
        (AllInTheBlockUnseen, ["blocks.*.wo.weight", "blocks.*.w2.weight"]),
    ],
)
def test_unclear_branches_under_a_depth_rule(block: Callable[[], nn.Module], branches: list[str]) -> None:
    model, base = Model(*[block() for _ in range(4)]), Model(*[block() for _ in range(2)])
    with pytest.raises(ValueError, match=r"cannot tell where the residual branches of 'blocks.0' end") as error:
        plan(model, base, rules="complete_p")
    named = [branch.replace("*", "0") for branch in branches]
    assert all(name in str(error.value) for name in named)
    assert "branches=[...]" in str(error.value)
    made = plan(model, base, rules="complete_p", choices=Choices(branches=branches))
    ends = {p.spec.name for p in made.params if p.spec.branch and p.spec.name.endswith("weight")}
    assert ends == {branch.replace("*", str(i)) for branch in branches for i in range(4)}
    assert all(made[name].folded == 0.5 for name in ends)


def test_branches_must_be_a_list() -> None:
    with pytest.raises(
        TypeError, match=r"branches must be a list of patterns, got '\*.wo'; write branches=\['\*.wo'\]"
    ):
        read(linears(8, 8), linears(4, 4), branches="*.wo")


def test_branch_pattern_that_matches_nothing() -> None:
    with pytest.raises(
        ValueError, match=r"branches: pattern '0.wieght' matches no parameter; did you mean '0.weight'?"
    ):
        read(linears(8, 8), linears(4, 4), branches=["0.wieght"])


# -- warnings ----------------------------------------------------------------------------------------------------------


def test_heads_that_grow() -> None:
    model, base = nn.MultiheadAttention(32, 2), nn.MultiheadAttention(16, 2)
    with pytest.warns(UserWarning, match=r"1 attention modules have larger heads.*head_dim 16 against 8") as caught:
        plan(model, base)
    assert "Keep head_dim and let the number of heads grow, or" in str(caught[0].message)


def test_heads_that_grow_in_number() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plan(nn.MultiheadAttention(32, 4), nn.MultiheadAttention(16, 2))


def test_nothing_to_carry_over() -> None:
    with pytest.warns(UserWarning, match=r"every parameter of Linear has the base's shape.*say base='self', else give"):
        plan(nn.Linear(4, 4), lambda: nn.Linear(4, 4))
