# Every target works on a fresh clone: it makes .venv first, and again whenever
# pyproject.toml or constraints.txt change.
#
#   make demo     train a small network, then average its snapshots    (out: demo/)
#   make test     the tests             (more: WORKERS=8 PYTEST_ARGS="-k average")
#   make lowest   the tests with the oldest versions that pyproject.toml allows  (in .venv-lowest)
#   make lint     ruff and mypy
#   make check    lint and test
#   make docs     write docs/cli.md from the code
#   make format   apply what ruff can repair by itself
#   make clean    remove what these targets made
#
# Another interpreter (3.11 or newer): make test PYTHON=python3.13

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PYTEST_ARGS ?=
WORKERS ?= 2

.DEFAULT_GOAL := check
.PHONY: demo test lowest lint check docs format clean

# The venv is made anew, so that a dependency which left the list leaves the environment too.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "ensemblekit needs Python 3.11 or newer: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@echo "Installing into $(VENV): some minutes the first time, about 2 GB of disk."
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install -qq --constraint constraints.txt --editable '.[test,dev]'
	@touch $@

demo: $(READY)
	$(BIN)/ensemblekit demo --force demo

# Two processes of one thread each. Tests that hold limits of time and memory run by themselves.
test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --ignore tests/faults $(PYTEST_ARGS) \
		|| [ $$? -eq 5 ]  # none of them was asked for
	$(BIN)/python -m pytest tests/faults $(PYTEST_ARGS) || [ $$? -eq 5 ]

lowest: .venv-lowest/.ready
	OMP_NUM_THREADS=1 .venv-lowest/bin/python -m pytest -n $(WORKERS) --ignore tests/faults $(PYTEST_ARGS)

.venv-lowest/.ready: pyproject.toml constraints-lowest.txt
	$(PYTHON) -m venv --clear .venv-lowest
	.venv-lowest/bin/python -m pip install -qq --constraint constraints-lowest.txt --editable '.[test]'
	@touch $@

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# One after the other, also under `make -j`: the cheap half fails first.
check:
	@$(MAKE) --no-print-directory lint
	@$(MAKE) --no-print-directory test

docs: $(READY)
	$(BIN)/python docs/make_cli.py

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .venv-lowest demo build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find ensemblekit tests -name __pycache__ -type d -prune -exec rm -rf {} +
