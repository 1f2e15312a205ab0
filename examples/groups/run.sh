#!/bin/bash
# Divide four adapters between two groups, and train each as a task of a Slurm array does. It needs no Slurm.
set -euo pipefail
here=$(dirname "$0") groups=${1:-results/groups}
lorafusion plan propose "$here/jobs.yaml" --gpus 2 --write "$groups"
for file in "$groups"/group-*.yaml; do
    task=${file##*group-}
    SLURM_ARRAY_TASK_ID=$((10#${task%.yaml})) bash "$here/group.sbatch" "$groups"
done
find results/example-groups -name adapter_model.safetensors
