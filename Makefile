# Everything runs in .venv, which any target builds when it is missing or older than pyproject.toml and constraints.txt.
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
SHELL := /bin/bash
.PHONY: help setup sweep status report bench test stress lint format constraints clean force

ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready

# PYTHON and TORCH, once given, hold for later set-ups of the same .venv too; given anew and different, they make it stale.
PYTHON ?= $(or $(shell cat $(VENV)/.python 2>/dev/null),python3)
MADE_WITH := $(shell cat $(VENV)/.torch 2>/dev/null)
ifeq ($(origin TORCH),undefined)
TORCH := $(MADE_WITH)
endif
ifneq ($(strip $(TORCH)),$(strip $(MADE_WITH)))
STALE := force
endif
ifneq ($(origin PYTHON),file)
ifneq ($(PYTHON),$(shell cat $(VENV)/.python 2>/dev/null))
STALE := force
CLEAR := --clear
endif
endif

help: ## this list
	@echo "dhtm: Dynamic Hierarchical Token Merging for Vision Transformers"
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'
	@echo
	@echo "  make sweep ARGS=\"backbone=deit_small data=imagenet data.root=/imagenet\"   overrides, as Hydra takes them"
	@echo "  make setup TORCH='torch==2.11.0 torchvision==0.26.0'                      another torch, for an older driver"

setup: $(STAMP) ## build .venv, if need be (a few minutes; PYTHON=python3.12 and TORCH='...' choose versions)

$(STAMP): export TORCH := $(TORCH)
$(STAMP): pyproject.toml constraints.txt $(STALE)
	@rm -f $@
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) is not there: make setup PYTHON=python3.12, say"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "$(PYTHON) is too old: Python 3.10 or newer is needed, make setup PYTHON=python3.12, say"; exit 1; }
	$(PYTHON) -m venv $(CLEAR) $(VENV)
	@if [ -n "$$TORCH" ]; then grep -vE '^(torch|torchvision|triton|nvidia-|cuda-|setuptools|sympy)' constraints.txt; else cat constraints.txt; fi > $(VENV)/constraints.txt
	$(BIN)/python -m pip install --disable-pip-version-check -c $(VENV)/constraints.txt $$TORCH -e '.[dev]'
	@echo "$$TORCH" > $(VENV)/.torch
	@echo '$(PYTHON)' > $(VENV)/.python
	@touch $@

sweep: $(STAMP) ## run every experiment, then make the tables and figures; ARGS="key=value ..." overrides
	@ARGS="$${ARGS-}" $(BIN)/python scripts/sweep.py

status: $(STAMP) ## how far the sweeps are, at any time, also while they run; ARGS="results_dir=DIR"
	@$(BIN)/python scripts/status.py $(ARGS)

report: $(STAMP) ## make the tables and figures from the runs that are there
	@$(BIN)/python scripts/report.py $(ARGS)

bench: $(STAMP) ## how fast the methods are on this machine; ARGS="backbone=deit_base batch_size=256 dtype=bfloat16"
	@$(BIN)/python scripts/benchmark.py $(ARGS)

test: $(STAMP) ## run the tests, two at a time; ARGS="-k merge" chooses
	@$(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)

stress: $(STAMP) ## run the tests that take too long for that: hundreds of kills, many ranks
	@$(BIN)/python -m pytest -m stress $(ARGS)

lint: $(STAMP) ## check style and formatting
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .

format: $(STAMP) ## mend what can be mended of both
	@$(BIN)/ruff check --fix . && $(BIN)/ruff format .

constraints: ## resolve constraints.txt anew from pyproject.toml (needs uv)
	@{ echo "# Exact versions that were tested. Made from pyproject.toml: make constraints"; \
	  uv pip compile pyproject.toml --extra dev --universal --python-version 3.10 --no-annotate --no-header -q --upgrade; } > .constraints.new
	@mv .constraints.new constraints.txt

clean: ## remove .venv and caches; results stay
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis *.egg-info

force:
