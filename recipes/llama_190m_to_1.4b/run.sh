#!/usr/bin/env bash
# Usage: bash recipes/llama_190m_to_1.4b/run.sh [--go] [data] [tune] [train]
# Prints the commands of section 4, in their order; with --go it carries them out, on a machine that can submit to Slurm.
# Every command may be given again: what is finished is not repeated, what was interrupted goes on.
set -euo pipefail

METHODS="${METHODS:-adam,muon,shampoo,soap}"
PARTITION="${PARTITION:-gpu}"  # of your cluster
DEVICES="${DEVICES:-8}"        # GPUs of a node; the batch of 128 sequences is shared among them
MINUTES="${MINUTES:-1440}"     # of a job, which is submitted again until its run is finished
TOKENS=28000000000             # the largest run needs 27,246,981,120; shorter runs read the first part

data=(data.source.subset=sample-100BT "data.source.tokens=$TOKENS" data.val_batches=40)
machine=("trainer.devices=$DEVICES" strategy=ddp)
slurm=(launcher=submitit_slurm "hydra.launcher.partition=$PARTITION" "hydra.launcher.timeout_min=$MINUTES")

main() {
    go=
    if [[ "${1:-}" == --go ]]; then go=yes && shift; fi
    if [[ $# -eq 0 ]]; then set -- data tune train; fi
    for step in "$@"; do
        case "$step" in
            data | tune | train) "step_$step" ;;
            *) echo "run.sh: unknown step '$step'; give data, tune, train, or nothing for all of them" >&2 && exit 2 ;;
        esac
    done
}

# Print a command as it could be typed, and carry it out if so asked.
say() {
    local line="" word
    for word in "$@"; do
        case "$word" in *'$'*) line+=" '$word'" ;; *) line+=" $word" ;; esac
    done
    echo "${line# }"
    if [[ -n "$go" ]]; then "$@"; fi
}

step_data() {
    say lightning-mup data prepare hub --set name=HuggingFaceFW/fineweb subset=sample-100BT "tokens=$TOKENS"
}

# At 190M: a grid of learning rates for each method, then one of weight decays. Leave it out to take the paper's numbers.
step_tune() {
    say lightning-mup train experiment=llama_190m "method=$METHODS" sweep=grid name=llama_190m_lr \
        "${data[@]}" "${machine[@]}" "${slurm[@]}"
    say lightning-mup train experiment=llama_190m "method=$METHODS" sweep=grid name=llama_190m_decay \
        hydra.sweeper.grid.key=weight_decay.weight_decay "${data[@]}" "${machine[@]}" "${slurm[@]}"
}

# All sizes with the numbers of 190M. Tuned your own? Then one method at a time, with method.lr=... of the base.
step_train() {
    local size
    for size in 190m 380m 640m 1.4b; do
        say lightning-mup train --multirun "experiment=llama_$size" "method=$METHODS" \
            'hydra.sweep.dir=runs/${name}' 'hydra.sweep.subdir=${method.name}' "${data[@]}" "${machine[@]}" "${slurm[@]}"
    done
}

main "$@"
