#!/usr/bin/env bash
# Measure a kernel suite on a GPU machine that has no Snakemake, as the workflow would: the check, then every bench in a
# process of its own, until the time is over. What has a result already stays, so that the command may be repeated.
#
#   tools/measure_kernels.sh FOLDER [SUITE [MINUTES [PATTERN]]]      PATTERN: of the benches' names, for grep -E
set -euo pipefail
if [ $# -lt 1 ]; then
    sed -n 's/^#   //p' "$0" >&2
    exit 2
fi
folder=$1 suite=${2:-h200} minutes=${3:-600} pattern=${4:-.}
cd "$(dirname "$0")/.."
export PYTHONPATH=.:kernels${PYTHONPATH:+:$PYTHONPATH}
lorafusion() { python3 -m lorafusion.cli "$@"; }
mkdir -p "$folder"

benches=$(lorafusion kernels benches --suite "$suite" | grep -E "$pattern")
if [ ! -s "$folder/check.json" ]; then
    lorafusion check kernels --suite "$suite" --out "$folder/check.json"
fi
for bench in $benches; do
    out="$folder/$bench/repeat~1.json"
    if [ -s "$out" ]; then
        echo "$bench: has a result"
    elif [ $SECONDS -ge $((minutes * 60)) ]; then
        echo "$bench: not measured, the time is over"
    else
        lorafusion kernels measure --suite "$suite" --bench "$bench" --out "$out" || echo "$bench: failed"
    fi
done
