#!/usr/bin/env bash
# Usage: bash recipes/quickstart.sh
# Installs the package into .venv, then runs recipes/quickstart.py. Works from any directory.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup_venv.sh"

setup_venv plots

echo "running recipes/quickstart.py"
"$VENV_PYTHON" recipes/quickstart.py --out recipes/results

echo "Done; the results are in recipes/results/."
echo "Next: read recipes/quickstart.py, then put its callback into your own Trainer."
