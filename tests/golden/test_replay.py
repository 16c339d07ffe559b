"""The numbers of the paper's authors: every case and row, through the public optimizers and multipliers."""

from __future__ import annotations

import copy
import json
from collections import Counter
from pathlib import Path

import pytest

from lightning_mup import AdamW, multipliers
from tests.golden.dialect import PECULIARITIES, Record
from tests.golden.replay import CLASSES, main, replay_case
from tests.golden.rows import ACCEPTED, EQUAL, FAILED, REFUSED, replay_row, replay_rows, row_question

HERE = Path(__file__).parent
MANIFEST = json.loads((HERE / "manifest.json").read_text())
TABLE = json.loads((HERE / "learning_rate_multipliers.json").read_text())
ROWS = [dict(zip(TABLE["columns"], row, strict=True)) for row in TABLE["rows"]]
BY_ID = {case["id"]: case for case in reversed(MANIFEST["cases"])}  # of two precisions, float64


def failed(case: Record) -> list[str]:
    return [f"{o.parameter}: {o.error:.1e} {o.note}" for o in replay_case(case, HERE) if o.failed]


@pytest.mark.parametrize("case", MANIFEST["cases"], ids=lambda c: f"{c['id']}-{c['dtype']}")
def test_case(case: Record) -> None:
    outcomes = replay_case(case, HERE)
    assert [o.parameter for o in outcomes] == [p["name"] for p in case["parameters"]]
    assert not failed(case)


def test_all_rows() -> None:
    assert len(MANIFEST["cases"]) == 148
    assert Counter(o.verdict for o in replay_rows(HERE)) == {EQUAL: 1050, REFUSED: 50, ACCEPTED: 50}


def test_rows_accepted_on_purpose_follow_the_same_formula() -> None:
    rows = [row for row in ROWS if row["rejected"] and row["optimizer"] in ("sgd", "adam")]
    assert len(rows) == 20
    for row in rows:
        (base_in, base_out), (size_in, size_out), depth = row["base_shape"], row["shape"], row["depth"]
        l_ratio = depth / row["base_depth"] if row["role"] == "hidden" else 1
        wanted = base_in / size_in * (size_out / base_out * l_ratio if row["optimizer"] == "sgd" else 1)
        assert multipliers(**row_question(row))["lr"] == pytest.approx(wanted, rel=1e-12)


def test_adamw_is_adam_apart_from_its_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CLASSES, "adam", AdamW)
    for name in ("adam.scaled_eps", "normalized_adam.warmup", "chain.adam_clipped"):
        assert not failed(BY_ID[name])


@pytest.mark.parametrize("tag", [tag for tag, p in PECULIARITIES.items() if p.asked or p.times or p.copied])
def test_a_peculiarity_is_needed(tag: str) -> None:
    tagged = [case for case in BY_ID.values() if tag in case["peculiarities"]]
    assert any(failed({**case, "peculiarities": [t for t in case["peculiarities"] if t != tag]}) for case in tagged)


def test_every_peculiarity_of_the_manifest_is_in_the_table() -> None:
    assert PECULIARITIES.keys() == MANIFEST["peculiarities_of_the_original"].keys()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"kind": "other"}, "unknown kind of case 'other'"),
        ({"peculiarities": ["other"]}, "unknown peculiarity 'other'"),
        ({"optimizer": "other"}, "unknown optimizer 'other'"),
        ({"hyperparameters": {"other": 1}}, "unknown setting of adam 'other'"),
        ({"hyperparameters": {"beta1": 0.9, "beta2": 0.9, "eps": 1e-8}}, "square: "),
        ({"parameters": []}, "no parameters"),
        ({"file": "other.npz"}, "other.npz"),
        ({"steps": 9}, "square: inf"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_what_is_unknown_or_wrong_fails_by_name(change: Record, said: str) -> None:
    assert said in failed({**BY_ID["adam.plain"], **change})[0]


def test_an_unknown_normalization_fails_by_name() -> None:
    case = copy.deepcopy(BY_ID["normalized_sgd.warmup"])
    case["normalization"]["readout"] = "fro"
    assert "unknown normalization 'fro' of readout" in failed(case)[0]


@pytest.mark.parametrize("change", [{"learning_rate": 0.3}, {"learning_rate_multiplier": 0.3}, {"optimizer": "other"}])
def test_a_wrong_row_fails(change: Record) -> None:
    assert replay_row(ROWS[0], TABLE).verdict == EQUAL
    assert replay_row({**ROWS[0], **change}, TABLE).verdict == FAILED


def test_a_preconditioner_that_forgets_its_limit_fails() -> None:
    refused = next(row for row in ROWS if row["rejected"] and row["optimizer"] == "soap")
    assert replay_row(refused, TABLE).verdict == REFUSED
    assert replay_row({**refused, "max_precond_dim": 10**6}, TABLE).note == "not refused"


@pytest.mark.parametrize(("change", "status"), [({}, 0), ({"kind": "other"}, 1)], ids=["good", "bad"])
def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], change: Record, status: int) -> None:
    case = BY_ID["adam.plain"]
    for name in (case["file"], "gradients_float64.npz"):
        (tmp_path / name).symlink_to(HERE / name)
    (tmp_path / "manifest.json").write_text(json.dumps({"cases": [{**case, **change}]}))
    (tmp_path / "learning_rate_multipliers.json").write_text(json.dumps({**TABLE, "rows": TABLE["rows"][:3]}))
    assert main([str(tmp_path)]) == status
    out = capsys.readouterr().out
    assert f"failed cases: {status}" in out
    assert "rows: 3, failed rows: 0" in out
