from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest

from lightning_mup.cli import main
from lightning_mup.commands import measure
from lightning_mup.core.method import all_methods

Result = Callable[..., tuple[int, str, str]]


@pytest.fixture
def lightning_mup(capsys: pytest.CaptureFixture[str]) -> Result:
    def run(*words: str) -> tuple[int, str, str]:
        code = main(words)
        return code, *capsys.readouterr()

    return run


def test_measure_compares_with_the_declaration(lightning_mup: Result) -> None:
    code, out, _ = lightning_mup("measure", "torch.optim:Muon", "--set", "lr=0.1")
    assert code == 0
    lines = dict(line.split(maxsplit=1) for line in out.splitlines())
    assert lines["update"] == "1"
    assert out.splitlines()[2].endswith("fan_in^-1/2 fan_out^1/2")
    assert lines["declared"] == "muon: 1, agrees"


def test_measure_gives_the_line_to_paste(lightning_mup: Result) -> None:
    code, out, _ = lightning_mup("measure", "torch.optim:Rprop")
    assert code == 0
    assert out.splitlines()[-1].split(maxsplit=1)[1] == (
        "Method(name='rprop', update_norm=Power(fan_in=1/2, fan_out=1/2), optimizers=(Rprop,))"
    )


def test_measure_leaves_an_epsilon_that_matters_to_the_user(lightning_mup: Result) -> None:
    code, out, _ = lightning_mup("measure", "torch.optim:Adadelta")
    assert code == 0
    assert "eps^0.500" in out
    assert out.endswith("optimizers=(Adadelta,))\n")


def test_measure_reports_a_declaration_that_differs(lightning_mup: Result, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "_agrees", lambda declared, found: False)
    code, out, _ = lightning_mup("measure", "torch.optim:SGD")
    assert (code, out.split()[-1]) == (1, "DIFFERS")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("torch.optim:Adamm",), "'torch.optim' has no 'Adamm'"),
        (("torch.optim:Adam", "--set", "betta=1"), "takes no 'betta'"),
        (("torch.optim:AdamW", "--set", "weight_decay=0.1"), "build it with weight_decay=0"),
        (("torch.optim:LBFGS",), "LBFGS cannot be measured"),
        (("builtins:list",), "must make a torch optimizer"),
    ],
)
def test_measure_says_what_is_wrong(lightning_mup: Result, words: Sequence[str], message: str) -> None:
    code, _, err = lightning_mup("measure", *words)
    assert (code, message in err) == (2, True)


def test_list_names_rules_and_methods(lightning_mup: Result) -> None:
    code, out, _ = lightning_mup("list")
    words = [line.split()[0] for line in out.splitlines()]
    assert code == 0
    assert {"rules", "mup", "complete_p", "methods", "adam", "muon"} <= set(words)
    assert "arXiv:2203.03466" in out


@pytest.mark.parametrize(("wrong", "code"), [({}, 0), ({"weight_degree": 0}, 1)])
def test_a_declaration_of_another_weight_degree_differs(
    wrong: dict[str, int], code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    declared = replace(all_methods()["adafactor"], **wrong)
    monkeypatch.setattr(measure, "all_methods", lambda: {"adafactor": declared})
    assert main(["measure", "torch.optim:Adafactor"]) == code
    assert ("DIFFERS" if code else "agrees") in capsys.readouterr().out
