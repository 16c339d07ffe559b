#!/usr/bin/env bash
# Usage: bash recipes/cluster/run.sh [--go] SIZE METHOD STRATEGY [overrides of conf/train.yaml]
#   SIZE 190m, 380m, 640m or 1.4b; METHOD adam, muon, shampoo or soap; STRATEGY ddp, mup_ddp, mup_fsdp or mup_hsdp
# Prints the command that trains it: through Slurm (a job that is submitted again until it is finished), or, with
# LAUNCHER=torchrun, on the nodes where it is called. With --go it carries it out. The same command again goes on.
set -euo pipefail

LAUNCHER="${LAUNCHER:-slurm}"
NODES="${NODES:-1}"
DEVICES="${DEVICES:-8}"        # GPUs of a node
PARTITION="${PARTITION:-gpu}"  # slurm: of your cluster
MINUTES="${MINUTES:-1440}"     # slurm: of a job
HOST="${HOST:-}"               # torchrun: a port of the first node, as node0:29500

fail() {
    echo "run.sh: $*" >&2
    exit 2
}

go=
if [[ "${1:-}" == --go ]]; then go=yes && shift; fi
[[ $# -ge 3 ]] || fail "give SIZE, METHOD and STRATEGY; the first lines of this file say what they may be"
size="$1" method="$2" strategy="$3"
shift 3
case "$size" in 190m | 380m | 640m | 1.4b) ;; *) fail "unknown size '$size'; give 190m, 380m, 640m or 1.4b" ;; esac
case "$method" in adam | muon | shampoo | soap) ;; *) fail "unknown method '$method'; give adam, muon, shampoo or soap" ;; esac
case "$strategy" in
    ddp | mup_ddp | mup_fsdp) divided=("strategy=$strategy") ;;
    mup_hsdp) divided=(strategy=mup_fsdp "trainer.strategy.replicas=$((NODES > 1 ? NODES : 2))") ;; # shards in a node
    *) fail "unknown strategy '$strategy'; give ddp, mup_ddp, mup_fsdp or mup_hsdp" ;;
esac
run=("experiment=llama_$size" "method=$method" "${divided[@]}" "trainer.devices=$DEVICES" "++trainer.num_nodes=$NODES")
run+=("name=llama_${size}_${method}_$strategy")
case "$LAUNCHER" in
    slurm)
        command=(lightning-mup train --multirun "${run[@]}" launcher=submitit_slurm)
        command+=("hydra.launcher.partition=$PARTITION" "hydra.launcher.timeout_min=$MINUTES") ;;
    torchrun)
        [[ -n "$HOST" || "$NODES" == 1 ]] || fail "give HOST=NODE:PORT, where the nodes meet"
        command=(torchrun "--nnodes=$NODES" "--nproc-per-node=$DEVICES" --rdzv-backend=c10d "--rdzv-endpoint=${HOST:-localhost:0}")
        command+=(-m lightning_mup.train "${run[@]}") ;;
    *) fail "unknown LAUNCHER '$LAUNCHER'; give slurm or torchrun" ;;
esac
printf '%q ' "${command[@]}" "$@" && echo
if [[ -n "$go" ]]; then "${command[@]}" "$@"; fi
