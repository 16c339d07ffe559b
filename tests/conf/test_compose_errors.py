"""Misspelt words on the command line are answered by what there is."""

from __future__ import annotations

import os

import pytest
from hydra.errors import MissingConfigException

from lightning_mup.compose_errors import explain, run_plainly
from lightning_mup.train import main


@pytest.mark.parametrize(
    ("word", "answer"),
    [
        ("model.net.widht=3", "unknown key model.net.widht; did you mean 'model.net.width'? in model.net there are: "),
        ("method=muonn", "unknown choice method=muonn; did you mean 'muon'? there are: adam, "),
        (
            "trainer.max_step=3",
            "unknown key trainer.max_step; did you mean 'trainer.max_steps'? in trainer there are: ",
        ),
        ("methd=muon", "unknown key methd; did you mean 'method'? "),
        ("lr=0.1", "unknown key lr; did you mean 'method.lr'? "),
        ("zzz=0.1", "unknown key zzz; on top there are: "),
        ("trainer.zzz=1", "unknown key trainer.zzz; in trainer there are: "),
        ("~trainer.devces", "unknown key trainer.devces; did you mean 'trainer.devices'? "),
        ("experiment=llama_190", "unknown choice experiment=llama_190; did you mean 'llama_190m'? "),
        ("launcher=jobib", "unknown choice launcher=jobib; did you mean 'joblib'? "),
        ("nogroup/x@y=1", "unknown key nogroup/x; "),
        ("+seed=3", "seed is there already; write seed=VALUE, without the +"),
        ("+method=muon", "method is chosen already; write method=CHOICE, without the +"),
        ("method=muon +method=muon", "method is chosen already; write method=CHOICE, without the +"),
        ("seed=1,2", "seed=1,2 are several values; add --multirun for one run each, or write seed=[1,2]"),
        ("seed", "'seed' is no override; write KEY=VALUE"),
        ("name=a=b", "cannot read the override 'name=a=b' ("),
        ("--config-name=tran", "there is no configuration called tran"),
    ],
)
def test_what_is_wrong_is_said_with_what_there_is(word: str, answer: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_plainly(main, word.split(), name="lightning-mup train", script="train.py") == 2
    told = capsys.readouterr().err
    assert told.startswith(f"lightning-mup train: {answer}")
    assert "HYDRA_FULL_ERROR" not in os.environ


def test_keys_are_those_of_the_groups_that_were_chosen(capsys: pytest.CaptureFixture[str]) -> None:
    run_plainly(main, ["data=folder", "data.pth=x"], name="lightning-mup train", script="train.py")
    assert "did you mean 'data.source.path'" in capsys.readouterr().err


def test_a_key_that_one_method_of_a_sweep_lacks_is_told_from_a_misspelt_one(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["sweep=width_lr", "method=adamw,muon_adam", "method.lr_multipliers.output=2"]
    assert run_plainly(main, words, name="lightning-mup train", script="train.py") == 2
    told = capsys.readouterr().err
    assert "method.lr_multipliers.output is not there with every choice that the sweep makes; ++method" in told


def test_a_constructor_that_refuses_is_quoted(capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        run_plainly(main, ["model.net.width=33", "data=synthetic"], name="lightning-mup train", script="train.py") == 2
    )
    told = capsys.readouterr().err.splitlines()[-1]
    assert "width must be a multiple of head_dim=32, got 33" in told
    assert "Traceback" not in told


def test_a_launcher_that_is_not_installed_names_its_extra() -> None:
    error = MissingConfigException("", "hydra/launcher/joblib", ["basic"])
    assert explain(error) == "launcher joblib is not installed; pip install 'lightning_mup[launchers]'"
