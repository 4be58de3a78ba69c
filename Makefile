# Everything runs in .venv, which the first target that needs it makes. Only Python >= 3.11 and make are assumed.
# `make demo SMALL=1` installs torch without CUDA and without what only the tests need: about 1 GB instead of 7.
PYTHON ?= python3
BIN := .venv/bin
# A full environment serves the demonstration too.
DEMO := $(if $(SMALL),$(if $(wildcard .venv/ready),.venv/ready,.venv/small),.venv/ready)
# Two processes with two threads each cost about ten times the CPU of two with one.
export OMP_NUM_THREADS ?= 1

.PHONY: demo test test-all lint check test-gpu bench fuzz format

demo: $(DEMO)  ## set up, then plant a backdoor in real digits and clean it out
	$(BIN)/sanitize demo --out runs/demo

test: .venv/ready  ## set up, then run the tests that are quick (CPU, no network), one process a core
	$(BIN)/python -m pytest -n auto --dist loadfile -m "not slow"

test-all: test  ## the same, then the slow tests: many kills and restarts, servers, Ray, long trainings
	$(BIN)/python -m pytest -n auto --dist load -m slow

lint: .venv/ready  ## ruff, mypy, import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

check: lint test-all  ## what continuous integration runs

format: .venv/ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test-gpu: .venv/ready  ## only the tests that need a CUDA device
	$(BIN)/python -m pytest -m gpu

bench: .venv/ready  ## the quick benchmarks; each fails where a target is missed
	$(BIN)/python -m benchmarks.detection --quick
	$(BIN)/python -m benchmarks.throughput --quick
	$(BIN)/python -m benchmarks.memory --quick

FUZZ_SECONDS ?= 300
FUZZ_SEED ?= 0

fuzz: .venv/ready  ## broken shards, then broken tables and imports; what fails is kept in runs/fuzz
	$(BIN)/python -m tests.fuzz.fuzz_shards --seconds $(FUZZ_SECONDS) --seed $(FUZZ_SEED)
	$(BIN)/python -m tests.fuzz.fuzz_tables --seconds $(FUZZ_SECONDS) --seed $(FUZZ_SEED)

.venv/bin/uv:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "sanitize needs Python 3.11 or newer; set PYTHON=")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade uv

# Compiled at install: where bytecode writing is switched off, imports would otherwise take twice as long.
INSTALL := $(BIN)/uv pip install --quiet --python $(BIN)/python --compile-bytecode

.venv/ready: pyproject.toml | .venv/bin/uv
	$(INSTALL) --editable '.[dev]'
	touch $@

.venv/small: pyproject.toml | .venv/bin/uv
	@$(INSTALL) --torch-backend cpu --editable . || { echo "SMALL=1: torch without CUDA could not be installed: the \
	index of CPU-only builds cannot be reached from this machine, or has none for it (the message above says which).\
	 Nothing was changed. Run 'make demo' without SMALL=1 for the CUDA build (about 7 GB)." >&2; exit 1; }
	touch $@
