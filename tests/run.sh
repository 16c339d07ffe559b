#!/usr/bin/env bash
# Usage: bash tests/run.sh [pytest arguments]
# Installs what the tests need into .venv, then checks style, types and behaviour. Works from any
# directory; paths in the arguments are relative to the repository.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../recipes/setup_venv.sh"

setup_venv plots,launchers,slurm,test,dev mup # mup 1.0.0 is a reference; it declares large dependencies that it does not import

echo "ruff check"
"$VENV_PYTHON" -m ruff check --quiet .
echo "ruff format"
"$VENV_PYTHON" -m ruff format --quiet --check . || fail "files are not formatted; run: .venv/bin/ruff format ."
echo "mypy"
"$VENV_PYTHON" -m mypy --no-error-summary
echo "pytest"
export OMP_NUM_THREADS=1 # two workers with a thread per core each would slow each other down
"$VENV_PYTHON" -m pytest --numprocesses 2 --dist loadgroup "$@"

echo "All checks passed. Next: see scaling at work with 'bash recipes/quickstart.sh',"
echo "or run one test with 'bash tests/run.sh -k NAME'."
