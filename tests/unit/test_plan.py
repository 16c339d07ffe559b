"""The plan: complete, printable, stable, comparable; and the choices that lead to it."""

from __future__ import annotations

import json
import warnings
from typing import Literal

import pytest
import torch
from torch import nn

from lightning_mup import Base, Choices, Layout, Plan, Power, plan
from lightning_mup.core.scaling import Scaling
from tests.models import MLP, ResidualMLP, TransformerLM


def mlp(width: int, depth: int = 2) -> nn.Module:
    return MLP(width, depth)


def made(choices: Choices | None = None, width: int = 256, rules: object = "mup", method: str = "adam") -> Plan:
    return plan(mlp(width), lambda: mlp(64), rules=rules, method=method, choices=choices)  # type: ignore[arg-type]


def test_every_trainable_parameter_exactly_once() -> None:
    model = TransformerLM(128, 2)
    model.readout.bias.requires_grad_(False)
    rows = plan(model, lambda: TransformerLM(64, 2)).rows()
    assert [row["name"] for row in rows] == [n for n, p in model.named_parameters() if p.requires_grad]


def test_a_parameter_twice_is_refused() -> None:
    param = made().params[0]
    with pytest.raises(ValueError, match=r"every parameter once, these occur twice: \['net\.0\.weight'\]"):
        Plan((param, param), "mup")


def test_lookup_by_name() -> None:
    assert made()["net.2.weight"].lr == 0.25
    with pytest.raises(KeyError, match=r"no parameter 'net\.3\.weight' in the plan"):
        made()["net.3.weight"]


def test_json_is_plain_and_round() -> None:
    rows = json.loads(made(width=192).to_json())["params"]
    assert rows[2]["name"] == "net.2.weight"
    assert rows[2]["lr"] == 0.333333333333
    assert rows == made(width=192).rows()


def test_digest_tells_plans_apart() -> None:
    plans = [made(), made(width=128), made(rules="sp"), made(method="sgd"), made(Choices(lr_multipliers={"output": 2}))]
    assert len({p.digest() for p in plans}) == len(plans)
    assert made().digest() == made().digest()


def test_diff_names_what_differs() -> None:
    lines = made().diff(made(Choices(lr_multipliers={"net.2.weight": 2})).rows())
    assert lines == ["net.2.weight: lr 0.25 (other: 0.5)"]
    assert made().diff(made().rows()) == []
    assert made().diff([]) == [f"{row['name']}: only here" for row in made().rows()]


def test_the_table_has_a_line_per_kind_and_leaves_usual_columns_out() -> None:
    lines = made().table().splitlines()
    assert lines[0] == "rules=mup  params=6  factors on the values at the base"
    assert lines[1].split()[:5] == ["role", "n", "fan_out", "fan_in", "method"]
    assert lines[1].split()[5:] == ["init", "lr", "eps", "wd", "because", "example"]
    assert len(lines) == 2 + 5
    deep = plan(ResidualMLP(64, 8), lambda: ResidualMLP(64, 2), rules="complete_p").table()
    assert "depth" in deep
    assert "ends branch" in deep


@pytest.mark.parametrize("word", ["input", "embedding"])
def test_rate_multipliers_by_role(word: str) -> None:
    found = made(Choices(lr_multipliers={word: 0.1, "readout": 3}))
    assert found["net.0.weight"].lr == pytest.approx(0.1)
    assert found["net.4.weight"].lr == pytest.approx(3 / 4)
    assert found["net.2.weight"].lr == pytest.approx(1 / 4)


def test_rate_multipliers_leave_the_decay_per_step_alone() -> None:
    plain, scaled = (
        [
            plan(mlp(256), lambda: mlp(64), method="adamw", settings={"decay": decay}, choices=c)["net.2.weight"]
            for decay in ("coupled", "independent")
        ]
        for c in (None, Choices(lr_multipliers={"hidden": 8}))
    )
    assert scaled[0].lr * scaled[0].group_weight_decay == pytest.approx(plain[0].lr * plain[0].group_weight_decay)
    assert scaled[1].group_weight_decay == plain[1].group_weight_decay == plain[1].weight_decay


def test_powers_of_ones_own_multiply_the_rules() -> None:
    """A width four times the base, Adam's 1/fan_in: what is asked for beside comes on top, by role and by name."""
    found = made(Choices(lr_powers={"hidden": Power(fan_in=1 / 2), "net.4.weight": Power(fan_in=-1)}))
    assert found["net.2.weight"].lr == pytest.approx(1 / 4 * 2)
    assert found["net.4.weight"].lr == pytest.approx(1 / 4 / 4)
    assert found["net.0.weight"].lr == pytest.approx(1)
    assert found["net.2.weight"].weight_decay == made()["net.2.weight"].weight_decay


def test_epsilons_can_be_kept() -> None:
    assert made()["net.2.weight"].eps == {"eps": pytest.approx(1 / 4)}
    assert made(Choices(eps="keep"))["net.2.weight"].eps == {"eps": 1}
    assert made(Choices(eps="keep"))["net.2.weight"].lr == made()["net.2.weight"].lr
    with pytest.raises(ValueError, match="eps must be 'scale' or 'keep', got 'drop'"):
        Choices(eps="drop")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        (Choices(lr_multipliers={"scalar": 2}), r"lr_multipliers name \['scalar'\], but the model has only \['hidden'"),
        (
            Choices(lr_multipliers={"net.7.weight": 2}),
            r"lr_multipliers: pattern 'net\.7\.weight' matches no parameter; ",
        ),
        (Choices(lr_multipliers={"hidden": 2, "net.2.weight": 3}), r"name \['net\.2\.weight'\] by role and by pattern"),
        (Choices(lr_powers={"net.7.weight": Power()}), r"lr_powers: pattern 'net\.7\.weight' matches no parameter"),
        (Choices(forward={"net.9.weight": Power(fan_in=1)}), r"forward: pattern 'net\.9\.weight' matches no parameter"),
    ],
)
def test_choices_that_hit_nothing(choices: Choices, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        made(choices)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"multipliers": "folded"}, r"multipliers must be 'fold' or 'hook', got 'folded'"),
        ({"batch": (0, 8)}, r"batch must be \(batch size, base batch size\), both positive, got \(0, 8\)"),
        ({"lr_multipliers": {"hidden": 0}}, r"lr_multipliers must be positive, got \{'hidden': 0\}; freeze"),
    ],
)
def test_choices_that_make_no_sense(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Choices(**arguments)  # type: ignore[arg-type]


def test_a_larger_batch_lowers_adams_epsilon() -> None:
    assert made(Choices(batch=(64, 16)))["net.2.weight"].eps["eps"] == pytest.approx(0.25 / 2)


def test_nothing_to_carry_over_warns() -> None:
    with pytest.warns(UserWarning, match=r"every parameter of MLP has the base's shape.*say base='self'"):
        plan(mlp(64), lambda: mlp(64))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert plan(mlp(64), "self").changes_nothing
        assert plan(mlp(64), {"width": 64}).changes_nothing


def test_a_base_run_knows_its_roles_from_doubled_overrides() -> None:
    at_base, wide = plan(mlp(64), {"width": 64}), plan(mlp(256), {"width": 64})
    assert [p.spec.role for p in at_base.params] == [p.spec.role for p in wide.params]
    scaled = plan(mlp(64), {"width": 64}, choices=Choices(lr_multipliers={"output": 3}))
    assert scaled["net.4.weight"].lr == 3


def test_guessed_roles_are_not_used_silently() -> None:
    with pytest.raises(
        ValueError, match=r"nothing grows against the base.*guesses; name them: (roles=\{.*\}), or"
    ) as error:
        plan(mlp(64), "self", choices=Choices(lr_multipliers={"output": 3}))
    assert '"net.4.weight": "hidden"' in str(error.value)
    roles = {"net.0.weight": "input", "net.2.weight": "hidden", "net.4.weight": "output"}
    settled = plan(mlp(64), "self", choices=Choices(roles=roles, lr_multipliers={"output": 3}))
    assert settled["net.4.weight"].lr == 3


def test_depth_without_a_depth_rule_warns() -> None:
    with pytest.warns(UserWarning, match=r"has 8 blocks and the base 2, but rules 'mup' say nothing about depth; use"):
        plan(ResidualMLP(64, 8), lambda: ResidualMLP(64, 2))


def test_a_forward_multiplier_that_the_model_lacks() -> None:
    # The model multiplies its embedding by sqrt(width); muP wants it left alone.
    choices = Choices(forward={"tokens.weight": Power(fan_out=-1 / 2)})
    found = plan(TransformerLM(256, 1), lambda: TransformerLM(64, 1), choices=choices)["tokens.weight"]
    assert (found.init, found.lr, found.folded) == (0.5, 0.5, 0.5)


def test_tied_embedding_gets_a_readout_multiplier() -> None:
    def tied(width: int) -> nn.Module:
        model = nn.ModuleDict({"embed": nn.Embedding(32, width), "head": nn.Linear(width, 32, bias=False)})
        model["head"].weight = model["embed"].weight
        return model

    found = plan(tied(256), lambda: tied(64))["embed.weight"]
    assert (found.init, found.lr, found.readout) == (1, 1, 0.25)
    assert found.spec.readout == ("head",)
    assert plan(tied(256), lambda: tied(64), rules="sp")["head.weight"].readout == 1


def test_meta_models_need_no_memory() -> None:
    with torch.device("meta"):
        huge = nn.Sequential(nn.Linear(8, 2**16), nn.Linear(2**16, 2**16), nn.Linear(2**16, 8))
        small = nn.Sequential(nn.Linear(8, 64), nn.Linear(64, 64), nn.Linear(64, 8))
    assert plan(huge, small)["1.weight"].lr == 2**-10


def test_experts_are_matrices_of_their_own() -> None:
    class Experts(nn.Module):
        def __init__(self, width: int, count: int) -> None:
            super().__init__()
            self.up = nn.Parameter(torch.zeros(count, width, 2 * width))  # [experts, in, out]

    choices = Choices(roles={"up": Layout(stack=(0,), fan_in=(1,), fan_out=(2,))})
    found = plan(Experts(64, 8), lambda: Experts(16, 4), choices=choices)["up"]
    assert (found.spec.stack, found.spec.role.value, found.lr) == (8, "hidden", 0.25)


def test_reasons_are_no_part_of_the_fingerprint() -> None:
    said = made(Choices(roles={"net.2.weight": "hidden"}))
    assert (said["net.2.weight"].spec.why, made()["net.2.weight"].spec.why) == ("roles", "Linear")
    assert said.digest() == made().digest()
    assert said.diff(made().rows()) == []


class OwnNorm(nn.Module):
    """Multiplies by 1 + weight, which starts at 0."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4))


class NormLast(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.fc, self.norm = nn.Linear(4, 4), norm

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.norm(self.fc(x))


@pytest.mark.parametrize("norm", [nn.LayerNorm, OwnNorm])
def test_gains_that_start_at_zero_and_end_a_branch(norm: type[nn.Module]) -> None:
    """torch's norms multiply by the gain itself (as ResNets with zero-init-residual have it); others may add 1."""

    def model(depth: int) -> nn.Module:
        parts = [NormLast(nn.LayerNorm(4) if norm is nn.LayerNorm else OwnNorm()) for _ in range(depth)]
        for part in parts:
            nn.init.zeros_(part.norm.weight)
        made = nn.Module()
        made.blocks = nn.ModuleList(parts)
        return made

    def read(how: Literal["fold", "hook"]) -> Scaling:
        choices = Choices(branches=["blocks.*.norm.weight"], multipliers=how)
        return Scaling.read(model(4), Base.of(model(2)), "complete_p", choices)

    assert read("hook").specs
    if norm is nn.LayerNorm:
        (gain,) = [spec for spec in read("fold").specs if spec.name == "blocks.0.norm.weight"]
        assert read("fold").multiplier(gain) == 0.5
    else:
        with pytest.raises(ValueError, match=r"'blocks\.0\.norm\.weight' of a .* starts at 0.*multipliers='hook'"):
            read("fold")


def test_a_foreign_gain_that_starts_at_one_takes_a_multiplier() -> None:
    def model(depth: int) -> nn.Module:
        made = nn.Module()
        made.blocks = nn.ModuleList(NormLast(OwnNorm()) for _ in range(depth))
        for block in made.blocks:
            nn.init.ones_(block.norm.weight)
        return made

    choices = Choices(branches=["blocks.*.norm.weight"])
    found = Scaling.read(model(4), Base.of(model(2)), "complete_p", choices)
    assert {found.multiplier(s) for s in found.specs if s.branch} == {0.5}
