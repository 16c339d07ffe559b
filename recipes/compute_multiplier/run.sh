#!/usr/bin/env bash
# Usage: bash recipes/compute_multiplier/run.sh [overrides of conf/train.yaml], in an environment with this package.
# Trains each method at four sizes and two seeds with the settings tuned at width 64, and reports what each saves.
# A run that is there already is not repeated, so the same command goes on where it stopped.
set -euo pipefail

export OMP_NUM_THREADS=1 # two runs side by side would slow each other down with more threads
settings=(
  "method=adamw method.lr=0.00546"
  "method=muon_adam method.lr=0.0594"
  "method=spectral_soap method.lr=0.0605"
)
for words in "${settings[@]}"; do
  # shellcheck disable=SC2086 # two words each
  python -m lightning_mup.cli train experiment=compute_multiplier sweep=none hydra.mode=MULTIRUN launcher=joblib \
    verbose=false trainer.enable_progress_bar=false $words weight_decay.weight_decay=0.001953125 \
    model.net.width=192,128,96,64 seed=0,1 "$@"
done
python -m lightning_mup.cli report runs/compute_multiplier --out runs/compute_multiplier_report
