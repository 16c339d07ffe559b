"""Sweeps grow their grids until the best value lies inside, repeat nothing, and lose nothing to a job that fails."""

from __future__ import annotations

import argparse
import itertools
import logging
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_module
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import assume, given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from lightning_mup.commands import sweep_file
from lightning_mup.ledger import read_ledger
from lightning_mup.sweep import Sweep, from_words
from lightning_mup.sweep_axes import Choice, Combination, folder_name, quoted, shortened
from lightning_mup.sweep_grid import Grid, Line
from tests.conf.valley.app import main

Program = Callable[..., None]


@pytest.fixture
def valley(monkeypatch: pytest.MonkeyPatch) -> Iterator[Program]:
    """The stand-in program, in this process."""
    root = logging.getLogger()
    before = root.handlers[:], root.level

    def program(*words: str) -> None:
        monkeypatch.setattr(sys, "argv", ["app.py", *words, "hydra/job_logging=none"])
        main()

    yield program
    root.handlers[:], level = before
    root.setLevel(level)


def _jobs(folder: str = "runs/width_lr") -> dict[str, float]:
    """Folder to value of every job that ended well."""
    return {path.parent.name: float(path.read_text()) for path in Path(folder).glob("*/result.txt")}


def _runs(folder: str = "runs/width_lr") -> list[int]:
    """How often each job was run."""
    return [len(path.read_text().splitlines()) for path in Path(folder).glob("*/ran.txt")]


# -- the grid ---------------------------------------------------------------------------------------------------------


def _settle(line: Line, loss: Callable[[int], float]) -> Line:
    for _ in range(100):
        for k in line.missing():
            assert k not in line.losses
            line.losses[k] = loss(k)
    assert line.missing() == ()
    return line


@given(
    bottom=st.integers(-12, 12),
    wall=st.integers(1, 20),
    radius=st.integers(1, 3),
    max_extend=st.integers(0, 14),
    margin=st.integers(1, 3),
    tilt=st.floats(-0.4, 0.4),
)
def test_a_grid_ends_around_the_bottom_or_says_that_it_does_not(
    bottom: int, wall: int, radius: int, max_extend: int, margin: int, tilt: float
) -> None:
    assume(margin <= 2 * radius)  # else the first round's best, at one edge, may want a point beyond the other
    first = Grid("lr", radius=radius).first(centre=1.0)
    line = _settle(
        Line(first, max_extend, margin), lambda k: math.inf if k >= bottom + wall else (k - bottom - tilt) ** 2
    )
    assert len(line.losses) <= len(first) + max_extend
    assert sorted(line.losses) == list(range(min(line.losses), max(line.losses) + 1))
    if line.state == "interior":
        assert line.best == bottom
        assert set(range(bottom - margin, bottom + min(margin, wall) + 1)) <= line.losses.keys()
    else:
        assert line.state == "edge"
        assert len(line.losses) == len(first) + max_extend
    needed = max(0, margin - bottom - radius) + max(0, bottom + min(margin, wall) - radius)
    assert (line.state == "interior") == (needed <= max_extend)


def test_where_everything_diverges_the_grid_goes_down() -> None:
    line = _settle(Line((-1, 0, 1), max_extend=3), lambda k: math.inf)
    assert (min(line.losses), max(line.losses), line.best, line.state) == (-4, 1, None, "edge")


def test_a_flat_bottom_at_both_edges_grows_on_both_sides() -> None:
    line = Line((-1, 0, 1), max_extend=5, losses={-1: 2.0, 0: 2.0, 1: 2.0})
    assert line.missing() == (-2, 2)


def test_points_are_added_until_the_margin_is_there() -> None:
    line = Line((-1, 0, 1), max_extend=5, margin=2, losses={-1: 3.0, 0: 2.0, 1: 2.5})
    assert (line.state, line.missing()) == ("open", (-2, 2))
    line.losses |= {-2: 4.0, 2: 3.0}
    assert (line.state, line.missing()) == ("interior", ())
    assert Line((-1, 0, 1), max_extend=1, margin=2, losses={-1: 3.0, 0: 2.5, 1: 2.0}).missing() == (2,)


def test_nothing_is_run_beyond_a_wall() -> None:
    line = Line((-1, 0, 1), max_extend=5, margin=2, losses={-1: 3.0, 0: 2.0, 1: math.inf})
    assert line.missing() == (-2,)


def test_a_failed_point_stops_its_line_alone() -> None:
    line = Line((-1, 0, 1), max_extend=5, losses={-1: 2.0, 0: 3.0}, failed={1})
    assert (line.state, line.missing()) == ("failed", ())


def test_steps_between_powers_of_two() -> None:
    grid = Grid("lr", step=0.5, radius=1)
    assert [grid.label(k) for k in grid.first(centre=0.25)] == ["2^-2.5", "2^-2", "2^-1.5"]
    assert [grid.value(k) for k in grid.first(centre=0.25)] == pytest.approx([2**-2.5, 0.25, 2**-1.5])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"radius": 0}, "radius >= 1"),
        ({"step": 0.0}, "step > 0"),
        ({"max_extend": -1}, "max_extend >= 0"),
        ({"margin": 0}, "margin >= 1"),
        ({"centre": 0.0}, "lr=0.0"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Grid("lr", **settings)  # type: ignore[arg-type]


# -- axes and names ---------------------------------------------------------------------------------------------------


def test_names_are_sorted_short_and_safe() -> None:
    made = Combination(
        (Choice("model.net.width", "64"), Choice("+a.b", "[x,'y z']"), Choice("sweep", "s", False, False)), (0,)
    )
    names = made.names(all_keys=["model.net.width", "+a.b", "lr"])
    assert folder_name(names) == "b=x+y%20z,width=64"
    assert shortened(["a.width", "b.width"]) == {"a.width": "a.width", "b.width": "b.width"}


@given(st.text(st.characters(codec="ascii", exclude_categories=["Cc"]), min_size=1))
def test_quoted_text_reaches_the_configuration_unchanged(text: str) -> None:
    assert OverridesParser.create().parse_override(f"x={quoted(text)}").value() == text


def test_combinations_with_one_name_are_refused() -> None:
    twice = [Combination((Choice("a", value),), (0,)) for value in ("[x,y]", "x+y")]
    with pytest.raises(ValueError, match=r"both called a=x\+y"):
        Sweep(Grid("lr"), twice, Path())


def test_the_command_line_replaces_and_adds_axes() -> None:
    _, sweep = from_words(
        ["sweep=width_lr", "model.net.width=32", "method=adamw,muon", "seed=range(0,3)", "method.lr=1"]
    )
    assert sweep is not None
    told = [(names["width"], names["method"], names["seed"]) for names in sweep.names]
    assert told == list(itertools.product(["32"], ["adamw", "muon"], "012"))
    assert {line.first for line in sweep.lines} == {(-2, -1, 0, 1, 2)}  # around method.lr=1, for both methods


def test_each_combination_has_the_centre_of_its_own_configuration() -> None:
    _, sweep = from_words(["sweep=width_lr", "model.net.width=64", "method=adamw,sgd"])
    assert sweep is not None
    with initialize_config_module("lightning_mup.conf", version_base="1.3"):
        rates = [compose("train", [f"method={method}"]).method.lr for method in ("adamw", "sgd")]
    assert [line.first[2] for line in sweep.lines] == [round(math.log2(rate)) for rate in rates]
    assert len({line.first for line in sweep.lines}) == 2


CONF = Path(__file__).parents[2] / "conf"


@pytest.mark.parametrize("name", sorted(path.stem for path in (CONF / "sweep").glob("*.yaml")))
def test_every_sweep_composes_and_is_called_by_its_name(name: str) -> None:
    large = ["model.net.width=2048"] if name == "telescope" else []  # enough to pay for the base's grid
    config, sweep = from_words([f"sweep={name}", "weight_decay=width", *large])
    if name == "none":
        assert (sweep, config.name, config.hydra.mode) == (None, "train", None)
        return
    assert sweep is not None
    assert (config.name, str(config.hydra.mode), str(sweep.folder)) == (name, "RunMode.MULTIRUN", f"runs/{name}")
    assert all(name not in folder_name(names) for names in sweep.names)
    assert len(sweep.next_jobs()) == {"grid": 5, "telescope": 9}.get(name, 15)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["method.lr=0.1,0.2"], "lists values of method.lr, which the grid varies"),
        (["seed=interval(0,1)"], "is no list of values"),
        (["+hydra.sweeper.axes.seed=3"], "axis seed must be a list"),
        (["hydra.sweeper.grid.key=weight_decay.weight_decay"], "needs a positive centre"),
        (["+hydra.sweeper.axes={method.lr:[1]}"], "leave it out of axes"),
    ],
)
def test_what_does_not_fit_is_refused(words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_words(["sweep=width_lr", *words])


# -- whole sweeps -----------------------------------------------------------------------------------------------------

SWEEP = ("sweep=width_lr", "model.net.width=64,512", "method=adamw,muon", "hydra.sweeper.grid.radius=1")


def test_a_sweep_finds_the_bottom_of_every_valley(valley: Program, capsys: pytest.CaptureFixture[str]) -> None:
    valley(*SWEEP)
    jobs = _jobs()
    for method, width in itertools.product(("adamw", "muon"), (64, 512)):
        values = {name: value for name, value in jobs.items() if name.startswith(f"method={method},width={width},")}
        bottom = -4 - round(math.log2(width / 64))
        assert min(values, key=values.__getitem__) == f"method={method},width={width},lr=2^{bottom}"
        for beside in (bottom - 1, bottom + 1):
            assert f"method={method},width={width},lr=2^{beside}" in values
    assert sorted(path.name for path in Path("runs").iterdir()) == ["ledger.jsonl", "width_lr"]
    assert not Path("multirun").exists()
    printed = capsys.readouterr().out
    assert "round 1: 12 jobs for 4 combinations" in printed
    last = printed[printed.rindex("after round") :]
    assert last.count("interior") == 4
    assert "diverged" in last
    valley(*SWEEP)  # the same command again
    assert _jobs() == jobs
    assert set(_runs()) == {1}


def test_an_interrupted_sweep_goes_on(valley: Program) -> None:
    Path("trouble").write_text("KeyboardInterrupt 0.06")
    command = (*SWEEP, "method=muon")
    with pytest.raises(KeyboardInterrupt):
        valley(*command)
    assert 0 < len(_jobs()) < len(_runs())
    Path("trouble").unlink()
    valley(*command)
    assert sorted(_runs())[:-1] == [1] * (len(_runs()) - 1)
    assert max(_runs()) == 2  # the one that was interrupted
    assert _jobs()["method=muon,width=512,lr=2^-7"] == 0


def test_a_job_that_fails_does_not_lose_the_others(valley: Program, capsys: pytest.CaptureFixture[str]) -> None:
    Path("trouble").write_text("ValueError 0.1")  # muon's first round, and where adamw's must grow to at width 64
    with pytest.raises(SystemExit) as ended:
        valley(*SWEEP)
    assert ended.value.code == 1
    told = capsys.readouterr()
    assert "jobs failed:" in told.err
    assert "runs/width_lr/method=muon,width=64,lr=2^-3: ValueError: lr=0.125 is too much" in told.err
    assert "Traceback" in told.out  # where the job failed
    jobs = _jobs()
    assert jobs["method=adamw,width=512,lr=2^-7"] == 0  # this valley's grid grew on
    assert "method=adamw,width=512,lr=2^-8" in jobs
    Path("trouble").unlink()
    valley(*SWEEP)
    assert _jobs()["method=muon,width=64,lr=2^-3"] == 1


def test_a_best_value_at_the_edge_is_told(valley: Program, capsys: pytest.CaptureFixture[str]) -> None:
    valley(*SWEEP[:1], "model.net.width=512", "method=muon", "hydra.sweeper.grid={radius:1,max_extend:1}")
    assert "too near the edge of the grid for method=muon,width=512" in capsys.readouterr().out


def test_a_job_must_return_a_number(valley: Program, capsys: pytest.CaptureFixture[str]) -> None:
    for label in ("2^-8", "2^-7", "2^-6"):
        stored = Path(f"runs/width_lr/method=adamw,width=64,lr={label}/result.txt")
        stored.parent.mkdir(parents=True)
        stored.write_text("nan")
    with pytest.raises(SystemExit):
        valley(*SWEEP[:1], "model.net.width=64", "method=adamw", "hydra.sweeper.grid.radius=1")
    assert "must return its loss, or inf where it diverged; it returned nan" in capsys.readouterr().err


PRODUCT = ("--multirun", "method.lr=0.01,0.1,8", "hydra.sweep.dir=runs/plain", "hydra.sweep.subdir=lr${method.lr}")


def test_a_plain_product_books_each_job_once(valley: Program) -> None:
    Path("trouble").write_text("ValueError 1")
    with pytest.raises(SystemExit):
        valley(*PRODUCT)
    first = read_ledger("runs/ledger.jsonl").entries
    assert {(e.sweep, e.folder, e.status) for e in first} == {
        ("plain", "plain/lr0.01", "finished"),
        ("plain", "plain/lr0.1", "finished"),
        ("plain", "plain/lr8", "failed"),
    }
    Path("trouble").unlink()
    valley(*PRODUCT)  # the same command again: the one that failed, which diverges now
    later = read_ledger("runs/ledger.jsonl").entries
    assert later[: len(first)] == first
    assert [(e.folder, e.status) for e in later[len(first) :]] == [("plain/lr8", "diverged")]
    valley("hydra.run.dir=runs/one")  # a single run is no sweep
    assert read_ledger("runs/ledger.jsonl").entries == later


# -- W&B --------------------------------------------------------------------------------------------------------------


def _points(file: dict[str, dict[str, dict[str, list[object]]]]) -> list[dict[str, object]]:
    parameters = file["parameters"]
    return [
        dict(zip(parameters, values, strict=True))
        for values in itertools.product(*(told["values"] for told in parameters.values()))
    ]


def test_wandb_sweeps_have_the_points_of_the_first_round(tmp_path: Path) -> None:
    parser = argparse.ArgumentParser()
    sweep_file.add_arguments(parser)
    words = ["sweep=width_lr", "model.net.width=64", "method=adamw,adam,sgd", "rules.names=[mup],[mup,complete_p]"]
    words += ["hydra.sweeper.grid.radius=1", "budget.steps=7"]
    assert sweep_file.run(parser.parse_args([*words, "--out", str(tmp_path / "out")])) == 0
    read = [yaml.safe_load(path.read_text()) for path in sorted((tmp_path / "out").glob("*.yaml"))]
    _, sweep = from_words(words)
    assert sweep is not None
    assert len(read) == len({line.first for line in sweep.lines})
    expected = [sweep.overrides(job) for job in sweep.next_jobs()]
    told = [
        (*file["command"][4:-1], *(f"{key}={value}" for key, value in point.items()))
        for file in read
        for point in _points(file)
    ]
    ours = [{word for word in job if not word.startswith("sweep=")} for job in expected]
    theirs = [{word for word in job if word not in {"name=width_lr", "logger=wandb", "hydra.mode=RUN"}} for job in told]
    assert sorted(map(sorted, theirs)) == sorted(map(sorted, ours))
    for file in read:
        assert file["command"][:4] == ["${env}", "${interpreter}", "-m", "lightning_mup.train"]
        assert file["command"][-1] == "${args_no_hyphens}"
        assert file["method"] == "grid"
    with initialize_config_module("lightning_mup.conf", version_base="1.3"):
        config = compose("train", [*told[0]], return_hydra_config=True)
    assert (config.name, config.budget.steps, str(config.hydra.mode)) == ("width_lr", 7, "RunMode.RUN")


def test_wandb_sweeps_of_an_experiment_are_its_own() -> None:
    (_, file), *_ = sweep_file.files(["experiment=depth_transfer"])
    parameters = file["parameters"]
    assert isinstance(parameters, dict)
    assert parameters["model.net.depth"] == {"values": [2, 4, 8, 16]}
    assert "model.net.width" not in parameters


def test_points_that_are_no_product_go_apart() -> None:
    def made(a: str, b: str, first: int) -> Combination:
        return Combination((Choice("a", a), Choice("b", b)), (first,))

    square = [made("1", "1", 0), made("1", "2", 1), made("2", "1", 1), made("2", "2", 0)]
    assert [len(group) for group in sweep_file._products(square)] == [1, 1, 1, 1]
    rows = [made("1", "1", 0), made("1", "2", 0), made("2", "1", 1), made("2", "2", 1)]
    assert [len(group) for group in sweep_file._products(rows)] == [2, 2]


def test_wandb_sweeps_need_a_grid() -> None:
    with pytest.raises(ValueError, match="has no grid; give sweep=width_lr"):
        list(sweep_file.files(["sweep=none"]))


def test_misspelt_words_are_explained() -> None:
    with pytest.raises(ValueError, match="unknown choice method=muonn; did you mean 'muon'"):
        list(sweep_file.files(["method=muonn"]))


def test_sweep_files_survive_omegaconf() -> None:
    (_, file), *_ = sweep_file.files(["method=muon"])
    assert yaml.safe_load(OmegaConf.to_yaml(OmegaConf.create(dict(file)))) == dict(file)
