#!/bin/bash
# Add the system `longest-first` to this checkout, and plan a workload with it beside LoRAFusion.
set -euo pipefail
out=${1:-results/longest-first}
cp examples/add_a_system/longest_first.py baselines/
grep -q '^longest-first:' configs/systems.yaml || cat examples/add_a_system/entry.yaml >> configs/systems.yaml

lorafusion workload configs/workloads/heterogeneous.yaml --samples 16 --global-batch 4 --length-scale 16 \
    --out "$out/workload.json"
for system in lorafusion longest-first; do
    lorafusion plan "$out/workload.json" --system $system --stages 2 --capacity 256 --out "$out/$system.json"
    lorafusion plan show "$out/$system.json" --workload "$out/workload.json"
done
