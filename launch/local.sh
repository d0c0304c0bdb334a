#!/usr/bin/env bash
# One machine, three ways to start the ranks. Copy and edit.
set -euo pipefail
cd "$(dirname "$0")/.."
ranks=${RANKS:-2}
way=${1:-distft}
[ "$#" -eq 0 ] || shift

case "$way" in
  distft) exec python train.py "launch.ranks=$ranks" "$@" ;;  # exit codes as documented, signals reach every rank
  deepspeed) exec deepspeed --num_gpus "$ranks" train.py "$@" ;;
  torchrun) exec torchrun --nproc_per_node "$ranks" train.py "$@" ;;
  *) echo "usage: launch/local.sh [distft|deepspeed|torchrun] [key=value …]" >&2; exit 2 ;;
esac
