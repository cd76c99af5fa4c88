# Everything on a fresh machine: make quickstart, make test.
#
#   PYTHON=python3.12      the interpreter that creates the virtual environment (3.11 or newer)
#   VENV=/path/to/env      use this environment as it is, and install nothing (for a machine without a package index)
#   ARGS="seed=1 --output runs/seed1"   passed on to `rpo quickstart`, or to benchmarks/gpu.py

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
WORKERS ?= 2

# One thread per worker: more only compete for the same cores.
TEST_ENV := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive
CHECKED := $(wildcard rpo examples benchmarks scripts)

ifeq ($(VENV),.venv)
READY := .venv/.installed
endif

.DEFAULT_GOAL := help
.PHONY: help quickstart test lint unit slow analytic bench gpu docs clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile

.venv/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "$$($(PYTHON) --version) is too old: rpo needs 3.11 or newer; run: make PYTHON=python3.12 ..." >&2; exit 1; }
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --disable-pip-version-check -c constraints.txt -e ".[dev,docs]"
	touch $@

quickstart: $(READY) ## Align the embedded model and write runs/quickstart/report.html; continues a killed run
	$(BIN)/python -m rpo.cli quickstart --resume $(ARGS)

test: lint ## Lint, then run the default tests
	$(TEST_ENV) $(BIN)/python -m pytest -n $(WORKERS) --durations=10

lint: $(READY) ## Run ruff, pydoclint and pyright
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/flake8 $(CHECKED)
	$(BIN)/pyright --pythonpath $(BIN)/python

unit: $(READY) ## Run the default tests only
	$(TEST_ENV) $(BIN)/python -m pytest -n $(WORKERS)

slow: $(READY) ## Run the slow tests
	$(TEST_ENV) $(BIN)/python -m pytest -n $(WORKERS) -m slow

analytic: $(READY) ## Check processes, gradients and training against closed forms (a few minutes)
	$(TEST_ENV) $(BIN)/python -m pytest -n $(WORKERS) -m analytic

bench: $(READY) ## Time one DPO update; prints JSON
	$(BIN)/python benchmarks/dpo_step.py

gpu: $(READY) ## Check and measure on a GPU, nine minutes; without one, rehearse
	$(BIN)/python benchmarks/gpu.py $(ARGS)

docs: $(READY) ## Build the documentation in build/site; a warning is an error
	$(BIN)/python -m zensical build --strict --clean

clean: ## Remove the environment, caches and build outputs; runs/ stays
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache
	find rpo tests -name __pycache__ -prune -exec rm -rf {} +
