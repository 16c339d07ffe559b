import csv
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest

from lightning_mup.analysis.coordinate import Coordinate, CoordinateReport, fit_slopes
from lightning_mup.cli import main
from lightning_mup.commands import check
from lightning_mup.commands.words import pair
from lightning_mup.core.scaling import Choices

ROOT = Path(__file__).parents[2]
Result = Callable[..., tuple[int, str, str]]

SOURCE = """
import torch, lightning
from torch import nn

def mlp(width, act="relu", *, hidden=1):
    middle = [layer for _ in range(hidden) for layer in (nn.Linear(width, width), nn.ReLU())]
    return nn.Sequential(nn.Linear(8, width), nn.ReLU(), *middle, nn.Linear(width, 2))

class Lit(lightning.LightningModule):
    def __init__(self, width, depth=1):
        super().__init__()
        self.width, self.depth, self.net = width, depth, None

    def configure_model(self):
        if self.net is None:
            self.net = mlp(self.width)

    def training_step(self, batch, batch_idx):
        return self.net(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters())

    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.randn(64, 8, generator=torch.Generator().manual_seed(0)), 16)

class Bare(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.table = nn.Parameter(torch.zeros(4, width))

def broken(width):
    raise RuntimeError(f"no width {width} today")

def rest(**sizes):
    return mlp(sizes["width"])

number = 3
"""


@pytest.fixture
def lightning_mup(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Result:
    """Run the command in a folder that holds `toy_models.py`."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "toy_models", raising=False)
    (tmp_path / "toy_models.py").write_text(SOURCE)

    def run(*words: str) -> tuple[int, str, str]:
        code = main(words)
        return code, *capsys.readouterr()

    return run


# -- plan -------------------------------------------------------------------------------------------------------------


def test_plan_prints_the_table(lightning_mup: Result) -> None:
    code, out, err = lightning_mup("plan", "toy_models:mlp", "--base", "width=16", "--set", "width=64", "act=gelu")
    assert (code, err) == (0, "")
    lines = [line.split() for line in out.splitlines()]
    assert lines[0][:2] == ["rules=mup", "params=6"]
    assert {(words[0], words[-1]) for words in lines[2:]} >= {("hidden", "2.weight"), ("output", "4.weight")}
    assert "64/16" in out


@pytest.mark.parametrize("target", ["toy_models:Lit", "toy_models:rest"])
def test_plan_takes_late_builders_and_open_factories(lightning_mup: Result, target: str) -> None:
    code, out, _ = lightning_mup("plan", target, "--base", "width=16", "--set", "width=64", "--method", "sgd")
    assert code == 0
    assert "hidden" in out
    assert "sgd" in out


def test_plan_multiplies_rules(lightning_mup: Result) -> None:
    words = ("plan", "toy_models:mlp", "--base", "width=16", "--set", "width=64", "--rules", "mup", "complete_p")
    code, out, _ = lightning_mup(*words)
    assert (code, out.split()[0]) == (0, "rules=mup")
    assert out.startswith("rules=mup x complete_p")


def test_plan_as_json_and_its_difference(lightning_mup: Result, tmp_path: Path) -> None:
    words = ("plan", "toy_models:mlp", "--base", "width=16", "--set", "width=64")
    code, out, _ = lightning_mup(*words, "--json")
    assert code == 0
    assert [row["name"] for row in json.loads(out)["params"]][:2] == ["0.weight", "0.bias"]
    (tmp_path / "plan.json").write_text(out)

    assert lightning_mup(*words, "--diff", "plan.json")[:2] == (0, "the plan is the one in plan.json\n")
    code, out, _ = lightning_mup(
        "plan", "toy_models:mlp", "--base", "width=32", "--set", "width=64", "--diff", "plan.json"
    )
    assert code == 1
    assert "2.weight: lr 0.5 (other: 0.25)" in out
    code, out, _ = lightning_mup(*words, "--rules", "sp", "--diff", "plan.json")
    assert (code, out.splitlines()[0]) == (1, "rules sp (other: mup)")


def test_plan_as_csv(lightning_mup: Result) -> None:
    _, out, _ = lightning_mup("plan", "toy_models:mlp", "--base", "width=16", "--set", "width=64", "--csv")
    rows = list(csv.DictReader(out.splitlines()))
    found = {row["name"]: (json.loads(row["shape"]), float(row["lr"]), json.loads(row["eps"])) for row in rows}
    assert found["2.weight"] == ([64, 64], 0.25, {"eps": 0.25})


def test_plan_takes_roles(lightning_mup: Result) -> None:
    words = ("plan", "toy_models:Bare", "--base", "width=16", "--set", "width=64")
    code, _, err = lightning_mup(*words)
    assert code == 2
    assert "cannot tell what" in err
    code, out, _ = lightning_mup(*words, "--role", "table=input")
    assert code == 0
    assert "input" in out


def test_plan_says_warnings_in_one_line(lightning_mup: Result) -> None:
    code, _, err = lightning_mup("plan", "toy_models:mlp", "--base", "width=64", "--set", "width=64")
    assert code == 0
    assert err.startswith("warning: every parameter of Sequential has the base's shape")
    assert err.count("\n") == 1


def test_plan_is_coloured_on_a_terminal(lightning_mup: Result, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "200")
    _, out, _ = lightning_mup("plan", "toy_models:mlp", "--base", "width=16", "--set", "width=64")
    assert "\x1b[" in out
    assert "2.weight" in out
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    _, out, _ = lightning_mup("plan", "toy_models:mlp", "--base", "width=16", "--set", "width=64")
    assert "\x1b[" not in out


WIDTHS = ("--base", "width=16", "--set", "width=64")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("toy_models", *WIDTHS), "'toy_models' must be package.module:name"),
        (("toy_model:mlp", *WIDTHS), "no module 'toy_model' in .*; did you mean 'toy_models'"),
        (("toy_models.deep:mlp", *WIDTHS), r"no module 'toy_models\.deep'|'toy_models' is not a package"),
        (("toy_models:mlpp", *WIDTHS), "'toy_models' has no 'mlpp'; .*did you mean 'mlp'"),
        (("toy_models:number", *WIDTHS), "'toy_models:number' must be a class or a function, got 3"),
        (
            ("toy_models:broken", *WIDTHS),
            r"broken called with \(width=64\) failed with RuntimeError: no width 64",
        ),
        (("toy_models:nn.Linear", *WIDTHS), "toy_models:nn.Linear takes no 'width'; it takes in_features"),
        (("toy_models:mlp", "--base", "widht=16"), "failed with TypeError: .*missing 1 required .*'width'"),
        (("toy_models:mlp", "--base", "widht=16", "--set", "width=64"), "takes no 'widht'; .*did you mean 'width'"),
        (("toy_models:mlp", "--base", "width=1", "--set", "widht=64"), "takes no 'widht'; .*did you mean 'width'"),
        (("builtins:dict", *WIDTHS), r"builtins:dict must make a torch module, got \{'width': 64\}"),
        (("toy_models:mlp", *WIDTHS, "--rules", "mupp"), "unknown rules 'mupp'; .*did you mean 'mup'"),
        (("toy_models:mlp", *WIDTHS, "--method", "adamm"), "unknown method 'adamm'; .*did you mean 'adam'"),
        (("toy_models:mlp", *WIDTHS, "--role", "tabel=input"), "tabel"),
        (
            ("toy_models:mlp", *WIDTHS, "--diff", "none.json"),
            r"read a plan from none\.json .*--json > none\.json",
        ),
        (("toy_models:mlp", *WIDTHS, "--diff", "toy_models.py"), r"cannot read a plan from toy_models\.py"),
    ],
    ids=lambda value: " ".join(value[:1]) if isinstance(value, tuple) else None,
)
def test_plan_says_what_is_wrong(lightning_mup: Result, words: Sequence[str], message: str) -> None:
    code, out, err = lightning_mup("plan", *words)
    assert (code, out) == (2, "")
    assert err.startswith("lightning-mup plan: ")
    assert "Traceback" not in err
    with pytest.raises(ValueError, match=message):
        raise ValueError(err)


def test_module_that_fails_to_import(lightning_mup: Result, tmp_path: Path) -> None:
    for source, message in (
        ("import no_such_thing", "No module named 'no_such_thing'"),
        ("1 / 0", "ZeroDivisionError"),
    ):
        (tmp_path / f"toy_{len(source)}.py").write_text(source)
        code, _, err = lightning_mup("plan", f"toy_{len(source)}:x", *WIDTHS)
        assert (code, message in err, f"importing 'toy_{len(source)}' failed" in err) == (2, True, True)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("plan", "toy_models:mlp", "--base", "width"), "'width' is not NAME=VALUE; write width=128"),
        (("plan", "toy_models:mlp", "--base", "=3"), "'=3' is not NAME=VALUE"),
        (("plan", "toy_models:mlp", *WIDTHS, "--json", "--csv"), "not allowed with"),
        (("check", "toy_models:Lit", "--widths", "64,big"), "'64,big' is no list of whole numbers; write 64,128,256"),
        ((), "required: command"),
    ],
)
def test_words_that_are_not_understood(words: Sequence[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_a_factory_needs_a_base(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "toy_models:mlp", "--set", "width=3"]) == 2
    assert "toy_models:mlp needs --base NAME=VALUE" in capsys.readouterr().err


def test_plan_of_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "experiment=llama_1.4b", "method=muon"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"hidden\s+128\s+1536/512\s+1536/512\s+muon_adam\s+1\s+1 ", out.replace("0.5774", "1"))
    assert re.search(r"output\s+1\s+50257/50257\s+1536/512\s+adam .*0.5333", out)


def test_options_of_hydra_go_to_hydra_alone(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["list", "--multirun"])
    assert stopped.value.code == 2
    assert "unrecognized arguments: --multirun" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["train", "transfer", "report", "plan", "check", "measure", "data", "list"])
def test_help_shows_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    assert re.search(f"examples?: lightning-mup {command}", " ".join(capsys.readouterr().out.split()))


def test_values_are_python_or_words() -> None:
    pairs = [pair(text) for text in ("a=3", "b=0.5", "c=True", "d=(1, 2)", "e=gelu", "f=x=y", "*.w=hidden", "g=")]
    assert dict(pairs) == {
        "a": 3, "b": 0.5, "c": True, "d": (1, 2), "e": "gelu", "f": "x=y", "*.w": "hidden", "g": "",
    }  # fmt: skip


# -- check ------------------------------------------------------------------------------------------------------------


class Stand:
    """In place of the real check and the real picture: notes what it is called with."""

    def __init__(self, slopes: Mapping[str, float]) -> None:
        self.slopes = slopes
        self.calls: list[dict[str, object]] = []
        self.drawn: list[tuple[list[str], Path]] = []

    def check(self, factory: object, **given: object) -> CoordinateReport:
        self.calls.append(given)
        slope = self.slopes[" ".join(given["rules"])]  # type: ignore[arg-type]
        axis = "width" if given["widths"] else "depth"
        sizes: Sequence[int] = given[f"{axis}s"]  # type: ignore[assignment]
        return fit_slopes([Coordinate(n, 0, 1, "output", "fc", float(n) ** slope) for n in sizes], size=axis)

    def draw(self, reports: Mapping[str, CoordinateReport], path: Path) -> None:
        self.drawn.append((list(reports), path))


@pytest.fixture
def stand(monkeypatch: pytest.MonkeyPatch) -> Stand:
    made = Stand({"mup": 0.0, "sp": 1.0, "ntk": 0.5, "mup complete_p": 0.0})
    monkeypatch.setattr(check, "coordinate_check", made.check)
    monkeypatch.setattr(check, "plot_coordinates", made.draw)
    return made


def test_check_passes_with_its_options(lightning_mup: Result, stand: Stand, tmp_path: Path) -> None:
    code, out, err = lightning_mup(
        "check", "toy_models:Lit", "--widths", "16,32", "--lr", "0.1", "--steps", "3", "--seeds", "0,1",
        "--out", "check.png", "--csv", "check.csv", "--method", "sgd", "--role", "table=input", "--set", "depth=2",
    )  # fmt: skip
    assert (code, err) == (0, "")
    assert out.index("mup, width: PASS") < out.index("sp, width: FAIL") < out.index("drawn in check.png")
    assert [call["rules"] for call in stand.calls] == [["mup"], ["sp"]]
    first = stand.calls[0]
    assert [first[key] for key in ("widths", "depths", "method", "lr", "steps")] == [(16, 32), None, "sgd", 0.1, 3]
    assert first["sweep"].seeds == (0, 1)  # type: ignore[attr-defined]
    assert first["sweep"].choices == Choices(roles={"table": "input"})  # type: ignore[attr-defined]
    assert stand.drawn == [(["mup, width", "sp, width"], Path("check.png"))]
    rows = list(csv.DictReader((tmp_path / "check.csv").read_text().splitlines()))
    assert [(row["rules"], row["layer"]) for row in rows] == [("mup, width", "fc"), ("sp, width", "fc")]


def test_check_fails_by_the_rules_checked_alone(lightning_mup: Result, stand: Stand) -> None:
    assert lightning_mup("check", "toy_models:Lit", "--rules", "sp", "--against", "mup")[0] == 1
    assert lightning_mup("check", "toy_models:Lit", "--against", "ntk")[0] == 0
    assert [call["rules"] for call in stand.calls] == [["sp"], ["mup"], ["mup"], ["ntk"]]


def test_check_without_comparison_uses_the_usual_widths(lightning_mup: Result, stand: Stand) -> None:
    assert lightning_mup("check", "toy_models:Lit", "--against", "none")[0] == 0
    assert [call["widths"] for call in stand.calls] == [(64, 128, 256, 512)]
    assert stand.drawn == []


def test_check_varies_depth(lightning_mup: Result, stand: Stand) -> None:
    words = ("check", "toy_models:Lit", "--rules", "mup", "complete_p", "--against", "none", "--depths", "1,2")
    assert lightning_mup(*words, "--set", "width=16")[0] == 0
    assert lightning_mup(*words, "--widths", "16,32")[0] == 2  # at one depth no width is given
    assert [(call["widths"], call["depths"]) for call in stand.calls] == [(None, (1, 2)), ((16, 32), None)]


def test_check_says_what_is_wrong_before_it_trains(lightning_mup: Result, stand: Stand) -> None:
    code, _, err = lightning_mup("check", "toy_models:broken")
    assert code == 2
    assert "failed with RuntimeError: no width 64 today" in err
    code, _, err = lightning_mup("check", "toy_models:Lit", "--depths", "1,2")
    assert code == 2
    assert "missing 1 required" in err
    assert stand.calls == []


def test_check_needs_matplotlib_to_draw(lightning_mup: Result, stand: Stand, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    code, _, err = lightning_mup("check", "toy_models:Lit", "--out", "check.png")
    assert (code, "needs matplotlib" in err, stand.calls) == (2, True, [])


def test_check_for_real(lightning_mup: Result, tmp_path: Path) -> None:
    code, out, err = lightning_mup(
        "check", "toy_models:Lit", "--widths", "32,64,128", "--steps", "2", "--seeds", "0,1", "--out", "check.png",
        "--method", "sgd", "--lr", "0.05",
    )  # fmt: skip
    assert code in (0, 1)
    assert "deprecated" not in err
    assert "mup, width: " in out
    assert "sp, width: " in out
    assert (tmp_path / "check.png").read_bytes().startswith(b"\x89PNG")


# -- process -----------------------------------------------------------------------------------------------------------


def test_command_in_a_process_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "toy_models.py").write_text(SOURCE)
    code = "import sys; from lightning_mup.cli import main; sys.exit(main())"
    words = ["plan", "toy_models:mlp", "--base", "width=16", "--set", "width=64"]
    done = subprocess.run(
        [sys.executable, "-c", code, *words],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("rules=mup  params=6")


def test_the_base_differs_in_what_is_named_alone(
    lightning_mup: Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "narrow", raising=False)
    source = "from torch import nn\n\n\ndef net(width=8, out=2):\n    return nn.Linear(width, out)\n"
    (tmp_path / "narrow.py").write_text(source)
    code, out, _ = lightning_mup(*("plan", "narrow:net", "--base", "width=16", "--set", "width=64", "out=5", "--json"))
    row = json.loads(out)["params"][0]
    assert (code, row["fan_in"], row["fan_out"]) == (0, "64/16", "5/5")
