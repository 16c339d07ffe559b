"""Imports only go down: the table below says which part of the package may import which, and what else."""

import ast
import graphlib
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import pytest

PACKAGE = Path(__file__).parents[2] / "lightning_mup"

BOTTOM = {"core", "rules", "transforms", "methods", "decays"}
MIDDLE = BOTTOM | {"models", "data", "analysis", "metrics", "callbacks", "strategies"}

# part of the package (a folder or a top-level file) -> parts that it may import, itself included
MAY_IMPORT = {
    "core": {"core"},
    "rules": {"core", "rules"},
    "decays": {"core", "decays"},
    "transforms": {"core", "transforms"},
    "methods": {"core", "transforms", "methods"},
    "models": {"models"},
    "data": {"core", "data"},
    "analysis": BOTTOM | {"ledger", "analysis"},
    "metrics": {"core", "metrics"},
    "schedules": {"core", "schedules"},
    "horizon": {"core", "horizon"},
    "budget": {"budget"},
    "language": {"language"},
    "run_log": {"run_log"},
    "tracking": {"core", "tracking"},
    "compose_errors": {"core", "compose_errors"},
    "sweep_grid": {"sweep_grid"},
    "sweep_axes": {"sweep_grid", "sweep_axes"},
    "sweep": {"core", "ledger", "sweep_grid", "sweep_axes", "sweep"},
    "ledger": {"core", "ledger"},
    "sweep_ledger": {"ledger", "sweep_ledger"},
    "telescope": {"core", "analysis", "sweep_grid", "telescope"},
    "sweep_telescope": {"core", "analysis", "sweep", "sweep_axes", "sweep_grid", "telescope", "sweep_telescope"},
    "run_cost": {"budget", "train", "run_cost"},
    "launch": {"sweep_axes", "launch"},
    "callbacks": MIDDLE,
    "strategies": MIDDLE,
    "__init__": MIDDLE | {"run_log", "__init__"},
    "commands": MIDDLE | {"budget", "horizon", "compose_errors", "sweep", "sweep_axes", "train", "commands"},
    "cli": MIDDLE | {"__init__", "commands", "cli"},
    "train": MIDDLE | {"__init__", "budget", "language", "run_log", "tracking", "launch", "sweep_axes", "train"},
}
KNOWS_LIGHTNING = {"data", "callbacks", "strategies", "language", "run_log", "tracking", "launch"}
KNOWS_LIGHTNING |= {"__init__", "commands", "cli", "train"}
LIGHTNING = {"lightning", "lightning_fabric", "pytorch_lightning"}
KNOWS_HYDRA = {"compose_errors", "sweep", "sweep_axes", "launch", "commands", "train"}
KNOWS_HYDRA |= {"sweep_telescope", "sweep_ledger", "run_cost"}
HYDRA = {"hydra", "omegaconf"}
# third-party packages that a function may import, because they are extras or slow to load
MAY_HIDE = {"datasets", "hydra", "matplotlib", "omegaconf", "rich", "submitit", "tokenizers", "wandb"}

NEVER_EAGER = HYDRA | {"matplotlib", "wandb"}

Check = Callable[[Path], list[str]]


class Import(NamedTuple):
    """One imported module, as the source names it or, inside the package, as it resolves."""

    importer: str
    line: int
    target: str
    in_function: bool

    def __str__(self) -> str:
        return f"{self.importer}:{self.line} imports {self.target}"


def modules_of(package: Path) -> dict[str, Path]:
    """Module name -> file, for every module of the package; a package itself goes by the name `x.__init__`."""
    files = sorted(package.rglob("*.py"))
    return {".".join([package.name, *file.relative_to(package).with_suffix("").parts]): file for file in files}


def imports_of(package: Path) -> list[Import]:
    """Every import statement of the package, relative ones made absolute."""
    modules = modules_of(package)
    return [
        Import(name, line, _resolve(target, modules), in_function)
        for name, file in modules.items()
        for target, line, in_function in _statements(ast.parse(file.read_text()), name)
    ]


def _statements(tree: ast.Module, module: str) -> Iterator[tuple[str, int, bool]]:
    """Yield what each import statement names, its line, and whether it stands in a function."""
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    hidden = {id(node) for function in functions for node in ast.walk(function)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno, id(node) in hidden
        elif isinstance(node, ast.ImportFrom):
            base = module.split(".")[: -node.level] if node.level else []
            prefix = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                yield f"{prefix}.{alias.name}", node.lineno, id(node) in hidden


def _resolve(target: str, modules: Mapping[str, Path]) -> str:
    """Cut names defined inside a module off: `pkg.core.power.Power` -> `pkg.core.power`; else keep the target."""
    parts = target.split(".")
    for length in range(len(parts), 0, -1):
        candidate = ".".join(parts[:length])
        for name in (candidate, f"{candidate}.__init__"):
            if name in modules:
                return name
    return target


def _part(module: str) -> str:
    return module.split(".")[1]


def _root(module: str) -> str:
    return module.partition(".")[0]


def unknown_parts(package: Path) -> list[str]:
    """Parts of the package that the table does not know."""
    return sorted({_part(module) for module in modules_of(package)} - MAY_IMPORT.keys())


def upward_imports(package: Path) -> list[str]:
    """Imports inside the package that the table does not allow."""
    inside = [found for found in imports_of(package) if _root(found.target) == package.name]
    return [
        str(found)
        for found in inside
        if _part(found.importer) in MAY_IMPORT and _part(found.target) not in MAY_IMPORT[_part(found.importer)]
    ]


def foreign_imports(package: Path) -> list[str]:
    """Third-party imports by a part that may not know the third party."""
    return [str(found) for found in imports_of(package) if _is_foreign(found, package.name)]


def _is_foreign(found: Import, package: str) -> bool:
    part, root = _part(found.importer), _root(found.target)
    if part == "core":
        return root not in {"torch", package} | sys.stdlib_module_names
    return (root in LIGHTNING and part not in KNOWS_LIGHTNING) or (root in HYDRA and part not in KNOWS_HYDRA)


def hidden_imports(package: Path) -> list[str]:
    """Imports inside functions, of anything but an optional third-party package."""
    return [str(found) for found in imports_of(package) if found.in_function and _root(found.target) not in MAY_HIDE]


def import_cycle(package: Path) -> list[str]:
    """One import cycle of the package as a list of modules, or an empty list."""
    graph = graphlib.TopologicalSorter[str]()
    for found in imports_of(package):
        if _root(found.target) == package.name and found.target != found.importer:
            graph.add(found.importer, found.target)
    try:
        graph.prepare()
    except graphlib.CycleError as error:
        return list(error.args[1])
    return []


def eager_imports(package: Path) -> list[str]:
    """Imports of hydra, matplotlib or wandb that `import package` would run."""
    statements = [found for found in imports_of(package) if not found.in_function]
    reached: set[str] = set()
    queue = [f"{package.name}.__init__"]
    while queue:
        module = queue.pop()
        reached.add(module)
        queue += [found.target for found in statements if found.importer == module and found.target not in reached]
    return [str(found) for found in statements if found.importer in reached and _root(found.target) in NEVER_EAGER]


CHECKS = (unknown_parts, upward_imports, foreign_imports, hidden_imports, import_cycle, eager_imports)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_package_keeps_the_rule(check: Check) -> None:
    assert check(PACKAGE) == []


def _write(folder: Path, files: Mapping[str, str]) -> Path:
    """Write a package `pkg` whose files import each other as the test wants."""
    for name, source in files.items():
        path = folder / "pkg" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    return folder / "pkg"


GOOD = {
    "__init__.py": "from pkg.callbacks.a import A",
    "core/__init__.py": "",
    "core/power.py": "import math\nimport importlib.metadata\nimport torch.nn as nn\nP = 1",
    "core/plan.py": "from __future__ import annotations\nfrom pkg.core.power import P\nfrom . import power",
    "rules/mup.py": "from pkg.core.plan import P",
    "methods/sgd.py": "from pkg.core import power\nfrom pkg.transforms import momentum",
    "transforms/momentum.py": "from ..core.power import P",
    "callbacks/a.py": "import lightning as L\nimport pkg.core.plan\nA = 1\ndef f():\n    import rich.table",
    "train.py": "import hydra\nimport pkg",
}


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_check_accepts_a_clean_package(check: Check, tmp_path: Path) -> None:
    assert check(_write(tmp_path, GOOD)) == []


@pytest.mark.parametrize(
    ("check", "file", "source"),
    [
        (unknown_parts, "utils/x.py", ""),
        (upward_imports, "core/bad.py", "from pkg.rules.mup import P"),
        (upward_imports, "core/bad.py", "from pkg.rules import mup"),
        (upward_imports, "core/bad.py", "from ..rules import mup"),
        (upward_imports, "core/bad.py", "import pkg"),
        (upward_imports, "core/bad.py", "def f():\n    import pkg.callbacks.a"),
        (upward_imports, "rules/bad.py", "from pkg.methods.sgd import x"),
        (upward_imports, "methods/bad.py", "import pkg.rules.mup"),
        (upward_imports, "transforms/bad.py", "import pkg.methods.sgd"),
        (upward_imports, "callbacks/bad.py", "from pkg.train import main"),
        (upward_imports, "models/bad.py", "from pkg.core.power import P"),
        (foreign_imports, "core/bad.py", "import numpy as np"),
        (foreign_imports, "core/bad.py", "if True:\n    from lightning import Trainer"),
        (foreign_imports, "methods/bad.py", "import lightning.pytorch"),
        (foreign_imports, "analysis/bad.py", "from lightning import Trainer"),
        (foreign_imports, "callbacks/bad.py", "from hydra.utils import instantiate"),
        (foreign_imports, "cli.py", "def f():\n    import omegaconf"),
        (foreign_imports, "sweep_grid.py", "import hydra"),
        (hidden_imports, "core/bad.py", "def f():\n    import math"),
        (hidden_imports, "core/bad.py", "class A:\n    async def f(self):\n        from .power import P"),
        (hidden_imports, "callbacks/bad.py", "def f():\n    import lightning"),
        (import_cycle, "core/power.py", "from pkg.core.plan import P"),
        (import_cycle, "core/power.py", "def f():\n    from . import plan"),
        (eager_imports, "__init__.py", "import wandb"),
        (eager_imports, "callbacks/a.py", "import matplotlib.pyplot as plt"),
        (eager_imports, "core/power.py", "if True:\n    from hydra import main"),
    ],
)
def test_check_finds_a_breach(check: Check, file: str, source: str, tmp_path: Path) -> None:
    assert check(_write(tmp_path, GOOD | {file: source}))


def test_import_stays_light() -> None:
    """Lightning itself loads matplotlib where it is installed, so only what comes on top of Lightning counts."""
    code = (
        "import sys, lightning; before = set(sys.modules); import lightning_mup; "
        f"print(*sorted({NEVER_EAGER} & set(sys.modules) - before))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.split() == []
