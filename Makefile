# make demo    build the example layer and train a small byte-level language model with it
# make test    the tests that need no GPU
# make help    every target
#
# PYTHON=python3.12 make ...  uses another interpreter for the environment in .venv (then `make clean` first).

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check
SPEC := specs/gated_linear_attention.spec
DEMO := build/demo
DEMO_ARGS ?=
BENCH_ARGS ?=
PYTEST_ARGS ?=

# Threads that wait must not spin: on two busy cores that makes small operations ten times slower.
export OMP_WAIT_POLICY ?= PASSIVE

.DEFAULT_GOAL := help
.PHONY: help venv demo test test-gpu bench lint clean

help:
	@echo "make demo      build $(SPEC), train a byte-level language model with it (about 4 minutes)"
	@echo "make test      run the tests that need no GPU"
	@echo "make test-gpu  run the tests that need an NVIDIA GPU"
	@echo "make bench     measure the table of speed on an NVIDIA GPU (less than 8 minutes)"
	@echo "make lint      run ruff and mypy"
	@echo "make venv      only set up $(VENV)"
	@echo "make clean     remove $(VENV), build and caches"

venv: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=...")'
	@echo "setting up $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) install -c constraints.txt -e ".[dev]"
	@touch $@

demo: $(STAMP)
	$(BIN)/chunkc build $(SPEC) -o $(DEMO)
	$(BIN)/python examples/train_bytes.py --out $(DEMO) $(DEMO_ARGS)

test: $(STAMP)
	$(BIN)/python -m pytest tests -m "not gpu and not interpreter" $(PYTEST_ARGS)
	TRITON_INTERPRET=1 $(BIN)/python -m pytest tests -m interpreter $(PYTEST_ARGS)

test-gpu: $(STAMP)
	$(BIN)/python tests/shards.py

bench: $(STAMP)
	$(BIN)/python benchmarks/suite.py --out build/speed $(BENCH_ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@$(BIN)/python tests/links.py > /dev/null
	$(BIN)/mypy
	$(BIN)/mypy examples
	$(BIN)/mypy benchmarks

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
