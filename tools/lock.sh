#!/usr/bin/env bash
# requirements.in -> requirements.lock: one version of each package, the same for Python 3.11 and 3.12.
# Pins that still fit are kept; `tools/lock.sh --upgrade` looks for newer ones.
set -euo pipefail
cd "$(dirname "$0")/.."

uv --version >/dev/null 2>&1 || {
    echo "make lock needs uv: pip install uv" >&2
    exit 1
}
draft=$(mktemp)
trap 'rm -f "$draft"' EXIT
[ ! -e requirements.lock ] || cp requirements.lock "$draft"
uv pip compile requirements.in --universal --python-version 3.11 --fork-strategy fewest --quiet \
    --no-header --annotation-style line --output-file "$draft" "$@" >/dev/null

# The CUDA libraries are no part of the lock: torch's CUDA build names the versions it wants, and its CPU build none.
# A local version (+cpu) would tie the lock to one kind of machine.
{
    echo "# Written by \`make lock\` from requirements.in, for Python 3.11 and 3.12. Installed by \`make\` (tools/install.sh),"
    echo "# which adds the build of torch that fits the machine: on its own this file would take the CUDA build."
    grep -vE "^(nvidia|cuda)-|sys_platform == 'win32'|os_name == 'nt'" "$draft" | sed 's/^\(torch==[^+ ]*\)+[^ ]*/\1/'
} >requirements.lock.new
mv requirements.lock.new requirements.lock
