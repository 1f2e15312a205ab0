#!/usr/bin/env bash
# requirements.in -> requirements.lock: one version of each package, the same for Python 3.11 to 3.13.
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
    --no-header --annotation-style line --generate-hashes --output-file "$draft" "$@" >/dev/null

# Of each package the hashes of all its files, so of the wheels for each Python. The CUDA libraries are no part of the
# lock: torch's CUDA build names the versions it wants, and its CPU build none. Nor is torch, whose builds for a CPU come
# from other places with other hashes: tools/install.sh takes the version that requirements.in names.
{
    echo "# Written by \`make lock\` from requirements.in, for Python 3.11 to 3.13. Installed by \`make\` (tools/install.sh)"
    echo "# with --require-hashes; torch, of which a machine takes one of several builds, is not in it."
    awk '/^[^ ]/ { kept = !/^((nvidia|cuda)-|torch==)|sys_platform == .win32.|os_name == .nt./ } kept' "$draft"
} >requirements.lock.new
mv requirements.lock.new requirements.lock
