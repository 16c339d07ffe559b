"""Learning-rate multipliers against the numbers of the paper's authors, every row of sgd and adam."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from lightning_mup.core.method import find_method
from lightning_mup.core.power import SPECTRAL
from lightning_mup.core.rules import find_rules
from lightning_mup.core.scaling import Choices, Scaling
from lightning_mup.core.spec import Dim, ParamSpec, Role

FILE = json.loads((Path(__file__).parent / "learning_rate_multipliers.json").read_text())
ROWS = [dict(zip(FILE["columns"], row, strict=True)) for row in FILE["rows"]]
OURS = [row for row in ROWS if row["optimizer"] in ("sgd", "adam")]
FACTORS = {
    "embedding": FILE["embedding_learning_rate_factor"],
    "readout": FILE["readout_learning_rate_factor"],
    "hidden": 1.0,
}


def spec_of(row: dict) -> ParamSpec:
    (base_in, base_out), (size_in, size_out) = row["base_shape"], row["shape"]
    depth = Dim(row["depth"], row["base_depth"]) if row["role"] == "hidden" else Dim(1, 1)
    return ParamSpec(
        name=row["role"],
        role=Role(row["role"]),
        shape=(size_out, size_in),
        fan_in=Dim(size_in, base_in),
        fan_out=Dim(size_out, base_out),
        depth=depth,
    )


def multiplier(row: dict) -> float:
    spec = spec_of(row)
    rules = "sp" if not row["width_scaling"] else "complete_p" if row["depth_scaling_of_learning_rate"] else "mup"
    scaling = Scaling((spec,), find_rules(rules), Choices(), {}, {spec.name: FACTORS[row["role"]]})
    method = find_method(row["optimizer"])
    if row["spectral_normalization"]:  # the step already has the wanted norm, in absolute dimensions
        method = replace(method, update_norm=SPECTRAL)
    return scaling.param(spec, method, {}).lr


def test_the_file_has_all_rows() -> None:
    assert len(ROWS) == 1150
    assert len(OURS) == 230


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_multipliers_equal_the_authors(optimizer: str) -> None:
    rows = [row for row in OURS if row["optimizer"] == optimizer and not row["rejected"]]
    assert len(rows) > 100
    for row in rows:
        assert multiplier(row) == pytest.approx(row["learning_rate_multiplier"], rel=1e-12), row
        assert FILE["base_learning_rate"] * multiplier(row) == pytest.approx(row["learning_rate"], rel=1e-12), row


def test_rejected_rows_follow_the_same_formula() -> None:
    # The original refuses them for every optimizer because of a preconditioner's size limit, which sgd and adam do
    # not have: here they are accepted on purpose.
    rejected = [row for row in OURS if row["rejected"]]
    assert len(rejected) == 20
    for row in rejected:
        spec = spec_of(row)
        width = spec.fan_out.ratio / spec.fan_in.ratio * spec.depth.ratio
        wanted = width if row["optimizer"] == "sgd" else 1 / spec.fan_in.ratio
        assert multiplier(row) == pytest.approx(wanted * FACTORS[row["role"]], rel=1e-12)


def test_the_wrong_rules_give_other_numbers() -> None:
    wide = next(row for row in OURS if row["optimizer"] == "adam" and row["shape"] == [1024, 1024])
    assert multiplier(wide) != multiplier({**wide, "width_scaling": False})
    assert multiplier(wide) != multiplier({**wide, "optimizer": "sgd"})
