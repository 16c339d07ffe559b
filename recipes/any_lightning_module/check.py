"""The plan of a LightningModule, and the check that it is right.

The script prints the plan that carries a width-64 proxy over to width 512, trains both parametrizations for ten steps
at four widths, and leaves tables and the picture in the folder of ``--out``.

Usage, from the repository's root: ``python -m recipes.any_lightning_module.check``. See the README in this folder.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch

import lightning_mup as mup
from lightning_mup.analysis.plots import plot_coordinates
from recipes.any_lightning_module.tiny_lm import TinyLM

WIDTHS = (64, 128, 256, 512)
RESULTS = Path(__file__).parent / "results"


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the plan, run the coordinate check under mup and sp, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for tables and picture")
    out: Path = parser.parse_args(arguments).out
    out.mkdir(parents=True, exist_ok=True)

    with torch.device("meta"):
        print(mup.plan(TinyLM(512), base=lambda: TinyLM(64), method="adamw"), end="\n\n")

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        warnings.filterwarnings("ignore", message=".*LeafSpec.*")  # Lightning calls what torch 2.13 deprecates
        reports = {
            rules: mup.coordinate_check(TinyLM, widths=WIDTHS, rules=rules, method="adamw", lr=5e-3)
            for rules in ("mup", "sp")
        }
    for rules, report in reports.items():
        print(f"\n{rules}: {'passed' if report.passed else 'FAILED'}\n{report.table()}")
        (out / f"coordinate_check_{rules}.txt").write_text(report.table() + "\n")
    plot_coordinates(reports, out / "coordinate_check.png")
    print(f"\nThe picture: {out / 'coordinate_check.png'}")


if __name__ == "__main__":
    main()
