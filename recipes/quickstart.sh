#!/usr/bin/env bash
# Usage: bash recipes/quickstart.sh [overrides of conf/train.yaml]
# Installs the package into .venv, then tunes learning rates at several widths, under the standard parametrization and
# under muP, and reports which best rate stands. No network is needed but for the installation, and no GPU.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup_venv.sh"

setup_venv plots,launchers,slurm

echo "training small language models on Python's own source text, two at a time; each line is one run"
export OMP_NUM_THREADS=1 # two runs with a thread per core each would slow each other down
"$VENV_PYTHON" -m lightning_mup.cli transfer experiment=quickstart launcher=joblib "$@"

echo "Open runs/quickstart/report/report.html: where the curves' lowest points stand above one another, the learning"
echo "rate that was tuned on the small model is right for the large one. recipes/quickstart/README.md reads it with you."
