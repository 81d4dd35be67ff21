# `make demo` and `make test` set everything up by themselves; PYTHON chooses the interpreter (3.11 or later).
PYTHON ?= python3
BIN := .venv/bin
unexport PYTHONDONTWRITEBYTECODE # some machines set it: then every start would compile torch again
BENCHES := read stages extract replay gallery snapshot write scaling start growth gpu

.PHONY: install demo test test-slurm test-slurm-full check types bench clean soak upstream

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "$(PYTHON) is Python %d.%d; 3.11 or later is needed: make $(MAKECMDGOALS) PYTHON=python3.11" % sys.version_info[:2])'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --no-compile --constraint constraints.txt --editable '.[demo,test,dev]'
	# compiles what is imported; pip would compile eight times as much
	$(BIN)/python -c 'import saev_dist.extract, saev_dist.replay, slurm.launch, torch.distributed.run'
	touch $@

demo: install
	$(BIN)/saev-dist demo

# Most tests wait for processes of their own, so a few run side by side; a file stays on one worker.
test: install
	$(BIN)/pytest -n 3 --dist loadfile --no-loadscope-reorder

# The launcher's tests on a real Slurm of this machine's own; `test` runs them too, where Slurm is installed.
test-slurm: install
	.ci/install-slurm
	$(BIN)/pytest tests/test_slurm.py

# Also what takes minutes: real time limits, preemption, a node that goes down.
test-slurm-full: install
	.ci/install-slurm
	SLURM_FULL=1 $(BIN)/pytest tests/test_slurm.py

check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(MAKE) --jobs=2 types test

types: install
	$(BIN)/mypy

# One to two hours of a quiet machine; a line of JSON a measurement.
bench: SHELL := /bin/bash -o pipefail
bench: install
	set -e; for name in $(BENCHES); do $(BIN)/python -m tests.bench.$$name | tee -a bench.jsonl; done
	$(BIN)/python -m tests.bench.record bench.jsonl

soak: install
	$(BIN)/python -m tests.soak 200
	SOAK=1 $(BIN)/pytest tests/test_disk.py tests/test_replay_faults.py -k every_file_operation

# SAEs as other programs write them, read by ours: each program's newest release, and some older ones, in an environment of its own.
upstream: install
	$(BIN)/python -m tests.upstream

clean:
	rm -rf .venv build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
