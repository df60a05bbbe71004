# make demo: train, look, write.   make test: everything CI runs.   make fast: two thirds of the tests, in about two minutes.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# processes that run the tests; each takes up to 3 GiB
JOBS ?= 2
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

# the beginning that is given; the samples in examples/demo.toml continue the same
define DEMO_PROMPT
def read_file(path, mode='r'):
    """Read a file and return its lines."""
    if
endef
export DEMO_PROMPT

.PHONY: demo test fast lint install tables docs clean

demo: $(VENV)/.demo
	rm -rf runs/demo
	$(BIN)/hgrn2 train --config examples/demo.toml --out runs/demo --compressors
	@echo; echo "A function it writes after its first lines were given:"; echo
	@$(BIN)/hgrn2 generate runs/demo --prompt "$$DEMO_PROMPT" --max-tokens 160 --temperature 0.4 --top-p 0.9 --seed 3 \
		--stop '\n\n\n' '\ndef ' '\nclass ' '\n    def '
	@echo; echo "The whole run on one page: runs/demo/report.html"

test: $(VENV)/.dev lint
	$(BIN)/python -m pytest --shards $(JOBS)

# while working: every room, without the tests that take long
fast: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/python -m pytest --shards $(JOBS) -m "not slow and not gpu"

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright --level error
	$(BIN)/lint-imports

install: $(VENV)/.dev

# tables of README and docs, from the committed results
tables: $(VENV)/.dev
	$(BIN)/python benchmarks/tables.py README.md docs/kernel-tables.md docs/measurements.md

docs: $(VENV)/.dev
	$(PIP_INSTALL) mkdocs
	$(BIN)/mkdocs build --strict

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "hgrn2 needs Python 3.11 or newer: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP_INSTALL) torch
	$(PIP_INSTALL) --editable '.[train]'
	touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP_INSTALL) torch
	$(PIP_INSTALL) --editable '.[train,data,hf,eval,tensorboard,onnx,serve,dev]'
	touch $@ $(VENV)/.demo

clean:
	rm -rf $(VENV) build dist site .pytest_cache .ruff_cache .hypothesis .import_linter_cache
