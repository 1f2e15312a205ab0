#!/usr/bin/env bash
# Put into .venv what requirements.lock pins, by its hashes, the build of torch that fits this machine, and lorafusion and
# fused_lora as editable installs. Called by make; may be called at any time and by several at once.
#
#   PYTHON       the Python to use (the first of python3.12, python3.11, python3 that works)
#   GPU          1 or 0: take torch's CUDA or CPU build, whatever nvidia-smi says (1 on a cluster's login node)
#   TORCH_INDEX  where torch's CPU build comes from, unless pip's own configuration knows of one
set -euo pipefail
cd "$(dirname "$0")/.."
torch_index=${TORCH_INDEX:-https://download.pytorch.org/whl/cpu}
torch=$(sed -n 's/^torch==\([^ ]*\).*/\1/p' requirements.in)
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1
started=$SECONDS

fail() {
    echo "setup: $*" >&2
    exit 1
}
pip() { .venv/bin/python -m pip --quiet --quiet "$@"; } # errors only

find_python() {
    local python
    for python in ${PYTHON:-python3.12 python3.11 python3}; do
        # Asked, not believed: a pyenv shim may stand for a version that is not installed, and Debian's Python may
        # come without ensurepip.
        if "$python" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' \
            >/dev/null 2>&1; then
            echo "$python"
            return
        fi
    done
    fail "no working Python 3.12 or 3.11 with venv (Debian: apt-get install python3-venv); or name one: make PYTHON=..."
}

install_torch() {
    if [ "$build" = cuda ]; then
        echo "[2/3] torch $torch, CUDA build (gigabytes: this can take minutes)"
        pip install "torch==$torch" # what it needs besides CUDA is there by now
        return
    fi
    echo "[2/3] torch $torch, CPU build (nvidia-smi lists no GPU)"
    # "+cpu" can be met by no CUDA build. pip's own configuration (an index, find-links) is asked first, so that a
    # machine that does not reach PyTorch's index need not wait for it.
    local log=.venv/torch.log
    local pip=(.venv/bin/python -m pip install --no-deps "torch==$torch+cpu")
    "${pip[@]}" >"$log" 2>&1 ||
        "${pip[@]}" --index-url "$torch_index" --retries 1 --timeout 15 >>"$log" 2>&1 ||
        fail "no CPU build of torch $torch for $(.venv/bin/python -V) found, nor at $torch_index (see $log);" \
            "name another index: make TORCH_INDEX=..."
}

verify() {
    .venv/bin/python -m pip check >.venv/check.log || {
        cat .venv/check.log >&2
        fail "the installed packages do not fit together"
    }
    .venv/bin/python - "$build" <<'PYTHON' || fail "remove .venv and try again"
import importlib.metadata
import sys

import torch

cuda = sorted(d.name for d in importlib.metadata.distributions() if d.name.startswith(("nvidia", "cuda")))
if sys.argv[1] == "cpu" and (cuda or torch.version.cuda):
    sys.exit(f"setup: CUDA on a machine without a GPU: torch {torch.__version__} {' '.join(cuda)}")
if sys.argv[1] == "cuda" and not torch.version.cuda:
    sys.exit(f"setup: torch {torch.__version__} is no CUDA build")
PYTHON
}

# The checkout's path counts, since a virtual environment cannot be moved.
case ${GPU:-} in
1) build=cuda ;;
0) build=cpu ;;
*) if nvidia-smi -L 2>/dev/null | grep -q '^GPU '; then build=cuda; else build=cpu; fi ;;
esac
place="$build $PWD"
state="$place $(cat requirements.lock requirements.in pyproject.toml kernels/pyproject.toml "$0" | sha256sum | cut -c1-16)"

# One install at a time; the lock goes when this process does.
if command -v flock >/dev/null; then
    exec 9<"$0"
    flock --nonblock 9 || { echo "waiting for another setup of .venv" && flock 9; }
fi
if [ "$(cat .venv/.installed 2>/dev/null)" = "$state" ]; then
    touch .venv/.installed
    exit
fi

start_again() {
    echo "$1: starting again"
    mv .venv .venv.old # at once, so that no half of it can be taken for a whole one
    rm -rf .venv.old
}
rm -rf .venv.old
# .installing: an install was interrupted, and may have left half a package that pip takes for a whole one.
if [ -e .venv/.installing ]; then
    start_again "the last setup was interrupted"
elif [ -e .venv/.place ] && [ "$(cat .venv/.place)" != "$place" ]; then
    start_again "the .venv here is for another place or build of torch"
elif [ -e .venv ] && ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
    start_again "the Python of .venv is gone"
fi
python=$(find_python)
mkdir -p .venv
touch .venv/.installing
rm -f .venv/.installed
echo "$place" >.venv/.place
[ -x .venv/bin/python ] || "$python" -m venv .venv

echo "[1/3] $(grep -c == requirements.lock) packages of requirements.lock"
pip install --require-hashes --no-deps --requirement requirements.lock
install_torch
echo "[3/3] lorafusion and fused_lora, editable"
pip install --no-deps --no-build-isolation --editable kernels --editable .
verify

echo "$state" >.venv/.installed
rm .venv/.installing
echo "ready in $((SECONDS - started)) s: $(.venv/bin/python -V), torch $torch ($build)"
