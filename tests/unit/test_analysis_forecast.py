from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lightning_mup.analysis.forecast import (
    Checklist,
    compare_forecast,
    export,
    make_forecast,
    read_forecast,
    write_forecast,
)
from lightning_mup.analysis.isoflop import fit_isoflop
from lightning_mup.analysis.scaling_law import ScalingLaw, fit_compute, fit_joint, fit_loss

from .transfer_runs import Planted, facts_of, write_run

WORDS = Checklist(
    metric="val_loss",
    loss="last step, 1M tokens of validation text",
    data="text-3fe1",
    runs="runs/sizes, 100 runs",
    params="all, embeddings included",
    tokens="seen, none repeated",
    flops="6ND",
    training="lr tuned at width 64 and transferred by muP, cosine to the run's end",
    selection="final losses, all runs of the sweep",
)
PARAMS, TOKENS = 12 * 256**2, 200 * 1024  # those of the run that write_run writes


def planted(n: np.ndarray | float, d: np.ndarray | float) -> np.ndarray:
    return np.asarray(1.5 + (np.asarray(n) / 1e4) ** -0.3 + (np.asarray(d) / 2e3) ** -0.3)


@pytest.fixture(scope="module")
def law() -> ScalingLaw:
    random = np.random.default_rng(0)
    n, d = np.exp(random.uniform(9, 12, 100)), np.exp(random.uniform(9, 11.5, 100))
    return fit_loss(n, d, planted(n, d) * np.exp(0.004 * random.standard_normal(100)), draws=300)


def finish(folder: Path, loss: float | None, **changes: object) -> None:
    """Write the planned run's files into the folder that holds its forecast."""
    made = write_run(folder.parent / "made", facts_of(Planted(changes=changes), 256, -7, 0), loss)
    for file in made.iterdir():
        file.rename(folder / file.name)
    made.rmdir()


def test_export_carries_the_checklist_and_the_points(law: ScalingLaw) -> None:
    found = json.loads(export(law, WORDS))
    assert found["form"] == "L = E + (N/N0)^-a + (D/D0)^-b"
    assert found["checklist"]["data"] == "text-3fe1"
    assert found["fitting"]["points"] == len(found["points"]["loss"]) == 100
    assert {"left_out", "start", "objective", "optimizer", "intervals", "agreeing"} <= found["fitting"].keys()
    assert found["estimates"]["E"]["low"] < 1.5 < found["estimates"]["E"]["high"]


@pytest.mark.parametrize("name", ["metric", "loss", "data", "runs", "params", "tokens", "training", "selection"])
def test_export_is_refused_without_any_one_item(law: ScalingLaw, name: str) -> None:
    for empty in ("", "  "):
        with pytest.raises(ValueError, match=f"whole checklist, it lacks {name} \\("):
            export(law, replace(WORDS, **{name: empty}))
        with pytest.raises(ValueError, match=f"lacks {name} \\("):
            make_forecast(law, replace(WORDS, **{name: empty}), params=1e9, tokens=1e10)


def test_export_names_all_that_is_missing_and_asks_for_no_more_than_the_law_has(law: ScalingLaw) -> None:
    with pytest.raises(
        ValueError, match=r"lacks metric \(which loss\), loss .*, data .*, runs .*, params .*, selection"
    ):
        export(law, Checklist())
    export(law, replace(WORDS, flops=""))
    with pytest.raises(ValueError, match="got 'val_los'; did you mean 'val_loss'"):
        export(law, replace(WORDS, metric="val_los"))


def test_joint_laws_and_isoflop_are_exported_alike() -> None:
    c = np.geomspace(1e17, 1e20, 6)
    joint = fit_joint({"muon": (c, 1.7 + (c / 1e19) ** -0.2), "soap": (c, 1.7 + (c / 2e19) ** -0.2)}, draws=100)
    found = json.loads(export(joint, replace(WORDS, params="", tokens="")))
    assert found["E"]["value"] == pytest.approx(1.7, rel=1e-3)
    assert found["laws"]["soap"]["estimates"]["C0"]["value"] == pytest.approx(2e19, rel=0.01)
    with pytest.raises(ValueError, match="lacks flops"):
        export(joint, replace(WORDS, flops=""))
    iso = fit_isoflop([1e18] * 2, [1e7, 2e7], [1e18 / 6e7, 1e18 / 12e7], [3.0, 2.9])
    found = json.loads(export(iso, WORDS))
    assert found["estimates"]["p"] == {"value": "nan", "low": "-inf", "high": "inf"}
    assert found["budgets"][0]["bracketed"] is False
    with pytest.raises(ValueError, match="lacks params"):
        export(iso, replace(WORDS, params=""))


def test_forecast_goes_round_by_the_run_directory(law: ScalingLaw, tmp_path: Path) -> None:
    made = make_forecast(law, WORDS, params=PARAMS, tokens=TOKENS)
    assert made.low < float(planted(PARAMS, TOKENS)) < made.high
    assert made.beyond["params"] > 1
    assert "beyond the largest fitted: params" in str(made)
    path = write_forecast(tmp_path / "run", made)
    assert path.name == "forecast.json"
    assert "NaN" not in path.read_text()
    assert read_forecast(tmp_path / "run") == made


def test_interval_of_one_run_is_wider_than_that_of_the_law(law: ScalingLaw) -> None:
    mean, one = law.loss_at(PARAMS, TOKENS), law.loss_of_run(PARAMS, TOKENS)
    assert one.value == mean.value
    noise = 2 * 1.96 * 0.004 * one.value
    assert one.high - one.low > 0.9 * noise
    assert one.high - one.low > mean.high - mean.low
    assert one.high - one.low < 1.2 * math.hypot(noise, mean.high - mean.low)


def test_forecast_is_compared_within_above_and_below(law: ScalingLaw, tmp_path: Path) -> None:
    made = make_forecast(law, WORDS, params=PARAMS, tokens=TOKENS)
    truth = float(planted(PARAMS, TOKENS))
    for name, loss, inside, words in (
        ("a", truth, True, "within the 95% interval"),
        ("b", made.high + 0.1, False, "above, by 0.1000, the 95% interval"),
        ("c", made.low - 0.2, False, "below, by 0.2000, the 95% interval"),
        ("d", math.inf, False, "the run diverged"),
    ):
        folder = tmp_path / name / "run"
        write_forecast(folder, made)
        finish(folder, loss)
        found = compare_forecast(folder)
        assert found.inside is inside
        assert words in str(found)
        assert found.off == pytest.approx(loss / made.loss - 1)
        assert found.loss == loss


def test_another_run_than_the_planned_one_is_no_test_of_the_forecast(law: ScalingLaw, tmp_path: Path) -> None:
    write_forecast(tmp_path / "run", make_forecast(law, WORDS, params=PARAMS, tokens=2 * TOKENS))
    finish(tmp_path / "run", 2.0)
    found = compare_forecast(tmp_path / "run")
    assert found.inside is None
    assert "not the planned run: tokens 2.048e+05, planned 4.096e+05" in found.words


def test_forecast_of_flops_and_of_the_training_loss(tmp_path: Path) -> None:
    c = np.geomspace(1e9, 1e11, 20)
    random = np.random.default_rng(0)
    law = fit_compute(c, (1.7 + (c / 1e10) ** -0.2) * np.exp(0.003 * random.standard_normal(20)), draws=200)
    flops = 60.0 * 256**2 * 200 * 1024
    write_forecast(tmp_path / "run", make_forecast(law, replace(WORDS, metric="train_loss"), flops=flops))
    truth = 1.7 + (flops / 1e10) ** -0.2
    finish(tmp_path / "run", truth - 0.1)  # write_run's training loss is 0.1 above
    assert compare_forecast(tmp_path / "run").inside
    assert compare_forecast(tmp_path / "run").loss == pytest.approx(truth)


@pytest.mark.parametrize(("name", "words"), [("metrics.jsonl", "has started"), ("result.json", "has ended")])
def test_forecast_after_the_start_is_refused(law: ScalingLaw, tmp_path: Path, name: str, words: str) -> None:
    (tmp_path / name).write_text("{}")
    with pytest.raises(ValueError, match=f"{words} .*written before"):
        write_forecast(tmp_path, make_forecast(law, WORDS, params=1e9, tokens=1e10))
    assert not (tmp_path / "forecast.json").exists()


def test_forecast_is_not_written_twice(law: ScalingLaw, tmp_path: Path) -> None:
    made = make_forecast(law, WORDS, params=1e9, tokens=1e10)
    write_forecast(tmp_path, made)
    with pytest.raises(ValueError, match="has a forecast already"):
        write_forecast(tmp_path, made)


def test_comparison_is_refused_where_there_is_nothing_to_compare(law: ScalingLaw, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot read .*write_forecast"):
        compare_forecast(tmp_path)
    made = make_forecast(law, WORDS, params=PARAMS, tokens=TOKENS)
    write_forecast(tmp_path / "a" / "run", made)
    finish(tmp_path / "a" / "run", None)
    with pytest.raises(ValueError, match=r"has no result\.json yet"):
        compare_forecast(tmp_path / "a" / "run")
    write_forecast(tmp_path / "b" / "run", made)
    finish(tmp_path / "b" / "run", 2.0, data="other-1")
    with pytest.raises(ValueError, match=r"on data 'text-3fe1', the run in .* saw 'other-1'"):
        compare_forecast(tmp_path / "b" / "run")
    (tmp_path / "b" / "run" / "forecast.json").write_text('{"loss": 1}')
    with pytest.raises(ValueError, match="is no forecast"):
        compare_forecast(tmp_path / "b" / "run")


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"params": 1e9}, "needs params and tokens, got params"),
        ({"flops": 1e20}, "got flops"),
        ({}, "got nothing"),
        ({"params": 1e9, "tokens": -1.0}, "give positive params and tokens, got 1000000000.0, -1.0"),
        ({"params": math.nan, "tokens": 1e9}, "give positive"),
    ],
)
def test_forecast_of_no_size_is_refused(law: ScalingLaw, sizes: dict[str, float], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make_forecast(law, WORDS, **sizes)
