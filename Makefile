# `make` lists the targets. Each sets .venv up first, if needed: see tools/install.sh for PYTHON, GPU and TORCH_INDEX.
SHELL := /bin/bash
BIN := .venv/bin

.PHONY: help setup reproduce test slow-test torture planted planted-table slurm-test browser-test lint lock clean distclean

ACCEPTED := Specify a conda environment or container for each rule

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' Makefile | expand -t 20

setup: .venv/.installed  ## install everything into .venv
.venv/.installed: requirements.lock requirements.in pyproject.toml kernels/pyproject.toml tools/install.sh
	@PYTHON="$(PYTHON)" GPU="$(GPU)" TORCH_INDEX="$(TORCH_INDEX)" tools/install.sh

reproduce: .venv/.installed  ## run a suite and print its verdicts: make reproduce SUITE=smoke
	@$(BIN)/lorafusion reproduce $(SUITE)

# One thread a process: two workers on two cores, and sums that do not depend on how many threads there were.
test: .venv/.installed  ## run the tests but for the slow ones; more options: make test ARGS="-k plan"
	@OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/pytest -n 2 $(ARGS)

slow-test: .venv/.installed  ## run the slow tests: whole workflows, kills, an installation from wheels
	@OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/pytest -n 2 -m slow $(ARGS)

torture: .venv/.installed  ## try the program with all that is hostile: make torture ARGS="--only NAME"
	@OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m tests.torture $(ARGS)

planted: .venv/.installed  ## put each planted error into the code and see that a test fails: make planted ARGS="-k NAME"
	@OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/pytest -n 2 -m "planted or not planted" $(ARGS) tests/planted

planted-table: .venv/.installed  ## write docs/reference/planted-errors.md anew
	@$(BIN)/python -m tests.planted.table

slurm-test: .venv/.installed  ## run the workflow on a toy Slurm cluster on this machine (root)
	@OMP_NUM_THREADS=1 $(BIN)/pytest -m slurm $(ARGS) tests/slurm

browser-test: .venv/.installed  ## click through the smoke suite's report in Chromium
	@$(BIN)/pytest -m browser $(ARGS) tests/browser

lint: .venv/.installed  ## check style, format and types, of Python and of the workflow
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/snakefmt --check Snakefile workflow
	@# Snakemake asks for an environment in each rule; all rules run in the workflow's own (workflow/common.smk).
	@lints=$$($(BIN)/snakemake --lint 2>&1 | grep -E '^ +\* |rror|Congrat'); grep -q "$(ACCEPTED)" <<< "$$lints" && \
		! grep -v "$(ACCEPTED)" <<< "$$lints"

lock:  ## resolve requirements.in anew; newer versions: make lock ARGS=--upgrade
	@tools/lock.sh $(ARGS)

clean:  ## remove caches; results and .venv stay
	rm -rf build dist kernels/build kernels/dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . \( -path ./.venv -o -path ./.git -o -path ./results \) -prune -o \
		\( -name __pycache__ -o -name '*.egg-info' \) -prune -exec rm -rf {} +

distclean: clean  ## remove all that a checkout does not have: .venv and the results of every run
	rm -rf .venv .venv.old .snakemake wandb
	if [ -d results ]; then find results -mindepth 1 -maxdepth 1 ! -name paper ! -name reference -exec rm -rf {} +; fi
