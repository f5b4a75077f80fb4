# `make demo` and `make test` are all that a newcomer needs; the rest is for those who change the code.
#
#   PYTHON=python3.12        the interpreter that makes the environment
#   TORCH=2.11.0             another version of torch
#   PIP_FLAGS=...            more flags for pip, such as an index with CPU wheels of torch, which are smaller
PYTHON ?= python3
TORCH ?= 2.13.0
VENV ?= .venv
PIP_FLAGS ?=
DEMO ?=
PYTEST ?=
# Interpreters and versions of torch for `make matrix`.
MATRIX ?= python3.10:2.11.0 python3.12:2.12.0 python3.13:2.14.0

CODE := src tests benchmarks
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check --no-warn-script-location

.PHONY: help demo test test-gpu matrix lint format bench clean

help:
	@echo "make demo      quantize a real language model in every format; HTML report (DEMO=--quick: under a minute)"
	@echo "make test      the tests that need no GPU        make test-gpu  the tests that need one"
	@echo "make lint      ruff and mypy                     make format    let ruff rewrite"
	@echo "make bench     kernels against bf16 on a GPU     make matrix    the tests for other Pythons and torches"
	@echo "make clean     remove everything made here"

# Threads that spin only briefly while they wait: on a machine that does other things too, long spinning takes the cores
# away from the threads that they wait for; sleeping at once costs a wake-up for each of a token's many small products.
demo: $(VENV)/.cli
	GOMP_SPINCOUNT=10000 $(BIN)/lowbit demo $(DEMO)

test: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto -m "not gpu" $(PYTEST)

test-gpu: $(VENV)/.test
	$(BIN)/python -m pytest -m gpu $(PYTEST)

# The tests under every pair of MATRIX, each in an environment of its own below .matrix; stops at the first that fails.
matrix:
	@set -e; for pair in $(MATRIX); do \
		echo "== $$pair"; $(MAKE) test PYTHON=$${pair%:*} TORCH=$${pair#*:} VENV=.matrix/$${pair%:*}-$${pair#*:}; done

lint: $(VENV)/.lint
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/mypy

format: $(VENV)/.lint
	$(BIN)/ruff check --fix $(CODE)
	$(BIN)/ruff format $(CODE)

bench: $(VENV)/.cli
	$(BIN)/python benchmarks/gpu_smoke.py

# One stamp per set of packages: nothing is installed twice, and pyproject.toml decides when something is stale.
$(VENV)/.torch:
	@echo "making $(VENV) and installing torch $(TORCH); this takes minutes the first time"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "lowbit needs Python 3.10 or newer; give one with PYTHON=..."; exit 2; }
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) $(PIP_FLAGS) "torch==$(TORCH)"
	@touch $@

$(VENV)/.cli: $(VENV)/.torch pyproject.toml
	@echo "installing lowbit[cli]"
	@$(PIP) $(PIP_FLAGS) -e ".[cli]"
	@touch $@

$(VENV)/.test: $(VENV)/.torch pyproject.toml
	@echo "installing lowbit[test]"
	@$(PIP) $(PIP_FLAGS) -e ".[test]"
	@touch $@

$(VENV)/.lint: $(VENV)/.torch pyproject.toml
	@echo "installing lowbit[cli,lint]"
	@$(PIP) $(PIP_FLAGS) -e ".[cli,lint]"
	@touch $@

clean:
	rm -rf $(VENV) .matrix build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis lowbit-demo.html lowbit-demo.json
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
