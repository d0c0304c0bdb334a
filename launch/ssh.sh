#!/usr/bin/env bash
# One torchrun a host, over ssh. Copy and edit; it is what this starts, after it has looked at the hosts:
#   python train.py strategy=zero3 run.dir=/shared/runs/first launch=ssh launch.hostfile=launch/hostfile.example
#     launch.engine=torchrun launch.address=node01 launch.port=29500
# Of this shell's variables nothing reaches the hosts: keys belong into files there (`wandb login`, `hf auth login`).
set -uo pipefail
cd "$(dirname "$0")/.."
run=/shared/runs/first

ssh -T -o BatchMode=yes -o ClearAllForwardings=yes -o ConnectTimeout=10 -o ServerAliveInterval=5 -o ServerAliveCountMax=4 \
  -- node01 "cd $PWD && exec env CUDA_VISIBLE_DEVICES=0,1,2,3,4,5,6,7 python -m torch.distributed.run --nnodes=2 \
  --node-rank=0 --nproc-per-node=8 --master-addr=node01 --master-port=29500 \
  train.py strategy=zero3 run.dir=$run" &
ssh -T -o BatchMode=yes -o ClearAllForwardings=yes -o ConnectTimeout=10 -o ServerAliveInterval=5 -o ServerAliveCountMax=4 \
  -- node02 "cd $PWD && exec env CUDA_VISIBLE_DEVICES=0,1,2,3,4,5,6,7 python -m torch.distributed.run --nnodes=2 \
  --node-rank=1 --nproc-per-node=8 --master-addr=node01 --master-port=29500 \
  train.py strategy=zero3 run.dir=$run" &

code=0
for process in $(jobs -p); do wait "$process" || code=$?; done
exit $code
