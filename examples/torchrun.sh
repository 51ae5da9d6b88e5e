#!/bin/bash
# A run on all GPUs of one machine:  examples/torchrun.sh my_run.yaml parallel.dp_shard=-1
# Ctrl-C or SIGTERM: all processes end their update, save and leave, and the same line goes on from there. torchrun
# itself waits for them for so many seconds, before it kills them, and then always ends with status 1.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}
exec torchrun --standalone --nproc-per-node "${PROCESSES:-gpu}" -m jvpgraph.trainer.cli train "$@"
