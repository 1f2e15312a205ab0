#!/usr/bin/env bash
# Measure a kernel suite on a GPU machine that has no Snakemake, as the workflow would: the check, then every bench in a
# process of its own, until the time is over. What has a result of the suite as it is now stays, so that the command may
# be repeated; the check is made again when a source file has changed.
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
lorafusion() { python3 -m lorafusion.cli.main "$@"; }
mkdir -p "$folder"

benches=$(lorafusion kernels benches --suite "$suite" --missing "$folder" | grep -E "$pattern" || true)
tree="$suite $(lorafusion tree-hash)"
if [ ! -s "$folder/check.json" ] || [ "$(cat "$folder/check.tree" 2> /dev/null)" != "$tree" ]; then
    lorafusion check kernels --suite "$suite" --out "$folder/check.json"
    echo "$tree" > "$folder/check.tree"
fi
for bench in $benches; do
    out="$folder/$bench/repeat~1.json"
    if [ $SECONDS -ge $((minutes * 60)) ]; then
        echo "$bench: not measured, the time is over"
    else
        lorafusion kernels measure --suite "$suite" --bench "$bench" --out "$out" || echo "$bench: failed"
    fi
done
