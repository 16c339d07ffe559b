"""Tables of parametrizations: complete, composable, and equal where theory says so."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_mup.core.method import all_methods
from lightning_mup.core.plan import ParamPlan
from lightning_mup.core.power import Power
from lightning_mup.core.rules import Row, Rules, all_rules, depth_rows, find_rules
from lightning_mup.core.scaling import Choices, Scaling
from lightning_mup.core.spec import Dim, ParamSpec, Role

MATRICES = [Role.INPUT, Role.HIDDEN, Role.OUTPUT]
sizes = st.integers(min_value=1, max_value=64)


def spec(role: Role, fan_in: int, fan_out: int, depth: int = 1, *, branch: bool = False) -> ParamSpec:
    """A parameter of a model that is ``fan_in`` and ``fan_out`` times its base, as the role allows."""
    rows = Dim(8 * fan_out, 8) if role is not Role.OUTPUT else Dim(8, 8)
    columns = Dim(8 * fan_in, 8) if role in (Role.HIDDEN, Role.OUTPUT) else Dim(8, 8)
    return ParamSpec("w", role, (rows.size, columns.size), columns, rows, Dim(2 * depth, 2), branch=branch)


def planned(rules: object, method: str, of: ParamSpec, choices: Choices | None = None) -> ParamPlan:
    scaling = Scaling((of,), find_rules(rules), choices or Choices())  # type: ignore[arg-type]
    found = all_methods()[method]
    torch_muon = {"adjust_lr_fn": None} if method == "muon" else {}
    return scaling.param(of, found, {**dict.fromkeys(found.eps, 1.0), **torch_muon})


def test_every_rule_and_method_is_found() -> None:
    assert set(all_rules()) == {"sp", "mup", "ntk", "mean_field", "complete_p", "depth_mup", "sp_per_layer"}
    assert set(all_methods()) == {
        *("sgd", "adam", "adamw", "nadam", "radam", "adamax", "rmsprop", "adagrad", "adafactor"),
        *("adam_atan2", "muon", "muon_adam", "adamuon", "shampoo", "shampoo2", "soap"),
    }
    assert all(rules.reference for rules in all_rules().values())
    assert all(method.reference for method in all_methods().values())


@pytest.mark.parametrize("left_out", list(Role))
def test_leaving_a_role_out_does_not_load(left_out: Role) -> None:
    rows = {role: Row() for role in Role if role is not left_out}
    with pytest.raises(ValueError, match=rf"rules 'mine' say nothing about \['{left_out.value}'\]; give each role"):
        Rules("mine", rows, reference="none")


@pytest.mark.parametrize("name", sorted(all_rules()))
@pytest.mark.parametrize("method", sorted(all_methods()))
@pytest.mark.parametrize("role", list(Role))
def test_everything_is_one_at_the_base(name: str, method: str, role: Role) -> None:
    row = planned(name, method, spec(role, 1, 1)).row()
    numbers = [row[key] for key in ("init", "lr", "weight_decay", "group_weight_decay", "folded", "forward")]
    assert numbers == [1.0] * 6


@given(st.sampled_from(MATRICES), sizes, sizes)
def test_mup_is_the_papers_table(role: Role, n_in: int, n_out: int) -> None:
    of = spec(role, n_in, n_out)
    r_in, r_out = of.fan_in.ratio, of.fan_out.ratio
    want = {"adam": 1 / r_in, "adamw": 1 / r_in, "sgd": r_out / r_in}
    for method, multiplier in want.items():
        assert planned("mup", method, of).lr == pytest.approx(multiplier, rel=1e-12)
    assert planned("mup", "adam", of).eps["eps"] == pytest.approx(1 / r_out, rel=1e-12)


@given(st.sampled_from(MATRICES), sizes, sizes, st.sampled_from(["sgd", "adam", "adamw", "rmsprop"]))
def test_mean_field_is_mup_in_function_space(role: Role, n_in: int, n_out: int, method: str) -> None:
    of = spec(role, n_in, n_out)
    ours, theirs = planned("mup", method, of), planned("mean_field", method, of)
    assert theirs.lr == pytest.approx(ours.lr, rel=1e-12)
    assert theirs.init == pytest.approx(ours.init, rel=1e-12)
    assert theirs.group_weight_decay == pytest.approx(ours.group_weight_decay, rel=1e-12)
    assert dict(theirs.eps) == pytest.approx(dict(ours.eps), rel=1e-12)


@given(st.sampled_from(MATRICES), sizes, st.integers(min_value=1, max_value=64), st.booleans())
def test_complete_p_is_the_papers_table(role: Role, width: int, depth: int, branch: bool) -> None:
    of, hook = spec(role, width, width, depth, branch=branch), Choices(multipliers="hook")
    r_in, r_out = of.fan_in.ratio, of.fan_out.ratio
    adam, sgd = planned("complete_p", "adam", of, hook), planned("complete_p", "sgd", of, hook)
    assert adam.lr == pytest.approx(1 / r_in, rel=1e-12)
    assert adam.eps["eps"] == pytest.approx(1 / (depth * r_out), rel=1e-12)
    assert sgd.lr == pytest.approx(depth * r_out / r_in, rel=1e-12)
    assert adam.forward == pytest.approx(1 / depth if branch else 1, rel=1e-12)
    half = planned(["mup", "depth_mup"], "adam", of, hook)
    assert half.lr == pytest.approx(depth**-0.5 / r_in, rel=1e-12)
    assert planned("depth_mup", "sgd", of, hook).lr == pytest.approx(r_out / r_in, rel=1e-12)


@given(sizes)
def test_standard_parametrization_with_rates_per_layer(n: int) -> None:
    # Everett et al. 2024, standard parametrization, full alignment: Adam 1, 1/n, 1/n; SGD n^(1/2), n^(-1/2), 1/n.
    wanted = {Role.INPUT: (1, n**0.5), Role.HIDDEN: (1 / n, n**-0.5), Role.OUTPUT: (1 / n, 1 / n)}
    for role, (adam, sgd) in wanted.items():
        assert planned("sp_per_layer", "adam", spec(role, n, n)).lr == pytest.approx(adam, rel=1e-12)
        assert planned("sp_per_layer", "sgd", spec(role, n, n)).lr == pytest.approx(sgd, rel=1e-12)


@given(st.sampled_from(list(Role)), sizes, sizes, st.sampled_from(sorted(all_methods())))
def test_sp_leaves_the_optimizer_alone(role: Role, n_in: int, n_out: int, method: str) -> None:
    made = planned("sp", method, spec(role, n_in, n_out))
    assert made.weight_decay == 1
    assert all(value in (1.0, (1.0, 1.0)) for value in made.eps.values())
    assert (made.lr, made.group_weight_decay) == (1, 1)


def test_torch_muon_has_its_own_shape_factor_divided_out() -> None:
    of = spec(Role.HIDDEN, 4, 4)
    square = planned("mup", "muon", of)
    scaling = Scaling((of,), find_rules("mup"), Choices())
    matched = scaling.param(of, all_methods()["muon"], {"adjust_lr_fn": "match_rms_adamw"})
    assert square.lr == 1
    assert matched.lr == 0.5  # 0.2 sqrt(max(fan_out, fan_in)) has doubled
    tall = ParamSpec("w", Role.INPUT, (64, 8), Dim(8, 8), Dim(64, 8))
    assert planned("mup", "muon", tall).lr == pytest.approx(8**0.5 / 8**0.5)


def test_weight_decay_is_independent() -> None:
    made = planned("mup", "adamw", spec(Role.HIDDEN, 8, 8))
    assert made.weight_decay == 1 / 8
    assert made.lr * made.group_weight_decay == pytest.approx(made.weight_decay)


def test_a_rule_without_rates_refuses_a_depth_rule() -> None:
    with pytest.raises(ValueError, match=r"rules \['sp'\] leave the learning rate to the optimizer.*use 'mup'"):
        find_rules(["sp", "complete_p"])


def test_unknown_names() -> None:
    with pytest.raises(ValueError, match=r"unknown rules 'complet_p'; available: .*; did you mean 'complete_p'\?"):
        find_rules("complet_p")
    with pytest.raises(TypeError, match=r"rules must be a name or Rules, got 3; available: complete_p"):
        find_rules([3])  # type: ignore[list-item]
    with pytest.raises(ValueError, match=r"rules must name at least one parametrization, got \[\]; try 'mup'"):
        find_rules([])


def test_own_rules_compose() -> None:
    mine = Rules("mine", dict.fromkeys(Role, Row(update_norm=Power(fan_in=-1))), reference="a test")
    product = find_rules([mine, Rules("deep", depth_rows(0.75), reference="a test")])
    assert product.rows[Role.HIDDEN].update_norm == Power(fan_in=-1, depth=-0.25)
    assert product.uses_depth


@pytest.mark.parametrize(
    ("method", "eps", "lr", "decay"),
    [
        # A hidden matrix of 4 times the inputs and 16 times the outputs: gradient 1/16, weight 1/2, decay 1/4 per step.
        ("sgd", {}, 4, 1 / 16),
        ("adam", {"eps": 1 / 16}, 1 / 4, 1 / 8),
        ("adamw", {"eps": 1 / 16}, 1 / 4, 1),
        ("nadam", {"eps": 1 / 16}, 1 / 4, 1 / 8),
        ("radam", {"eps": 1 / 16}, 1 / 4, 1 / 8),
        ("adamax", {"eps": 1 / 16}, 1 / 4, 1 / 8),
        ("rmsprop", {"eps": 1 / 16}, 1 / 4, 1 / 8),
        ("adagrad", {"eps": 1 / 16}, 1 / 4, 1 / 8),
        ("adafactor", {"eps": (1 / 16, 1 / 2)}, 1 / 2, 1 / 2),
        ("muon", {"eps": 1 / 2}, 1, 1 / 4),  # its own factor has doubled
    ],
)
def test_every_method_under_mup(method: str, eps: dict[str, object], lr: float, decay: float) -> None:
    made = planned("mup", method, spec(Role.HIDDEN, 4, 16))
    assert dict(made.eps) == eps
    assert (made.lr, made.group_weight_decay) == pytest.approx((lr, decay), rel=1e-12)


@pytest.mark.parametrize("method", ["adam", "adamw"])
def test_epsilon_falls_with_the_root_of_the_batch(method: str) -> None:
    assert planned("mup", method, spec(Role.HIDDEN, 1, 1), Choices(batch=(64, 16))).eps["eps"] == 0.5


@pytest.mark.parametrize("method", ["sgd", "adam", "adamw", "rmsprop"])
def test_mean_field_treats_vectors_as_mup_does(method: str) -> None:
    ours, theirs = (planned(rules, method, spec(Role.VECTOR, 1, 4)) for rules in ("mup", "mean_field"))
    assert (
        (theirs.init, theirs.lr, theirs.weight_decay) == (ours.init, ours.lr, ours.weight_decay) == (1, ours.lr, 0.25)
    )
    assert (theirs.group_weight_decay, dict(theirs.eps)) == (ours.group_weight_decay, dict(ours.eps))


@pytest.mark.parametrize(
    ("rules", "factor"), [("mup", 1 / 4), ("mean_field", 1 / 4), ("ntk", 1 / 2), ("sp", 1), ("sp_per_layer", 1)]
)
def test_tied_readouts(rules: str, factor: float) -> None:
    of = replace(spec(Role.INPUT, 1, 4), readout=("head",))
    assert planned(rules, "adam", of).readout == factor
    assert planned(rules, "adam", spec(Role.INPUT, 1, 4)).readout == 1


@pytest.mark.parametrize(
    ("role", "eps"), [(Role.INPUT, 1 / 2), (Role.HIDDEN, 1 / 2), (Role.OUTPUT, 1), (Role.VECTOR, 1 / 2)]
)
def test_epsilon_of_rates_per_layer_follows_larger_gradients(role: Role, eps: float) -> None:
    # A readout of standard deviation fan_in^-1/2 sends back gradients of fan_out^-1/2 rather than 1/fan_out.
    assert planned("sp_per_layer", "adam", spec(role, 4, 4)).eps["eps"] == eps


@pytest.mark.parametrize("method", ["adam", "nadam", "radam"])
def test_decay_that_a_setting_decouples_is_independent_too(method: str) -> None:
    of = spec(Role.HIDDEN, 4, 16)
    scaling = Scaling((of,), find_rules("mup"), Choices())
    made = scaling.param(of, all_methods()[method], {"eps": 1e-8, "decoupled_weight_decay": True})
    assert made.lr * made.group_weight_decay == pytest.approx(made.weight_decay) == 1 / 4


@pytest.mark.parametrize("rules", ["ntk", "mean_field"])
def test_folding_is_training_the_bare_weight_under_a_hook(rules: str) -> None:
    """With W = a w the gradient of W is 1/a times that of w, and so must be epsilon and the L2 term's, over a."""
    of = spec(Role.HIDDEN, 4, 4)
    hooked = planned(rules, "adam", of, Choices(multipliers="hook"))
    folded = planned(rules, "adam", of)
    a = hooked.forward
    assert (a, hooked.folded, folded.forward, folded.folded) == (0.5, 1, 1, 0.5)
    assert folded.init == a * hooked.init
    assert folded.lr == a * hooked.lr
    assert folded.eps["eps"] == hooked.eps["eps"] / a
    assert folded.group_weight_decay == hooked.group_weight_decay / a**2


@pytest.mark.parametrize("settings", [{"adjust_lr_fn": None}, {"adjust_lr_fn": "match_rms_adamw"}])
def test_own_factors_see_fused_matrices_whole(settings: dict[str, object]) -> None:
    """torch's Muon looks at the tensor's shape, [3 fan_out, fan_in]."""
    of = ParamSpec("w", Role.HIDDEN, (96, 64), Dim(64, 16), Dim(32, 32), split=3)  # 96 x 64, at the base 96 x 16
    made = Scaling((of,), find_rules("mup"), Choices()).param(of, all_methods()["muon"], settings)
    wanted = 4**-0.5  # sqrt(fan_out/fan_in)
    before = 1 if settings["adjust_lr_fn"] else (96 / 16) ** 0.5 / (96 / 64) ** 0.5  # base's factor over this one's
    assert made.lr == pytest.approx(wanted * before)


def test_settings_that_are_off_have_no_factor() -> None:
    of = spec(Role.HIDDEN, 4, 4)
    scaling = Scaling((of,), find_rules("mup"), Choices())
    assert dict(scaling.param(of, all_methods()["adam"], {"eps": None}).eps) == {}
    assert dict(scaling.param(of, all_methods()["adam"], {}).eps) == {}


@pytest.mark.parametrize("method", sorted(all_methods()))
def test_mean_field_is_mup_in_function_space_for_every_method(method: str) -> None:
    of = spec(Role.HIDDEN, 4, 16)
    ours, theirs = planned("mup", method, of), planned("mean_field", method, of)
    assert theirs.folded == 0.5
    assert theirs.lr == pytest.approx(ours.lr, rel=1e-12)
    assert theirs.init == pytest.approx(ours.init, rel=1e-12)
    assert theirs.group_weight_decay == pytest.approx(ours.group_weight_decay, rel=1e-12)
    assert dict(theirs.eps) == {key: pytest.approx(value, rel=1e-12) for key, value in ours.eps.items()}
