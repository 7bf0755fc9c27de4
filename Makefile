# Everything runs in .venv. Every target builds it if it is missing or older than pyproject.toml or constraints.txt.
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
SHELL := /bin/bash
.PHONY: help setup sweep status report bench test docs stress lint format constraints clean force

ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready

# PYTHON and TORCH are remembered for later set-ups of the same .venv. A different value makes it stale.
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

help: ## list the targets
	@echo "dhtm: Dynamic Hierarchical Token Merging for Vision Transformers"
	@list() { grep -hE "^[a-z]+:.*##" $(MAKEFILE_LIST) | grep $$1 -E "^(sweep|test|report|status|bench):" | awk -F ":.*## " '{printf "  make %-12s %s\n", $$1, $$2}'; }; \
	echo "Start with:"; list -s; echo "Also:"; list -v
	@echo
	@echo "  make sweep ARGS=\"backbone=deit_small data=imagenet data.root=/imagenet\"   Hydra overrides"
	@echo "  make setup TORCH='torch==2.11.0 torchvision==0.26.0'                      another PyTorch, for an older driver"

setup: $(STAMP) ## build .venv if needed (a few minutes; PYTHON=python3.12 and TORCH='...' choose versions)

$(STAMP): export TORCH := $(TORCH)
$(STAMP): pyproject.toml constraints.txt $(STALE)
	@rm -f $@
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) was not found; choose another, for example: make setup PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "$(PYTHON) is too old, Python 3.10 or newer is required; choose another, for example: make setup PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(CLEAR) $(VENV)
	@if [ -n "$$TORCH" ]; then grep -vE '^(torch|torchvision|triton|nvidia-|cuda-|setuptools|sympy)' constraints.txt; else cat constraints.txt; fi > $(VENV)/constraints.txt
	$(BIN)/python -m pip install --disable-pip-version-check -c $(VENV)/constraints.txt $$TORCH -e '.[dev]'
	@echo "$$TORCH" > $(VENV)/.torch
	@echo '$(PYTHON)' > $(VENV)/.python
	@touch $@

sweep: $(STAMP) ## run the experiments of the paper, then make the tables and figures; ARGS="key=value ..." sets overrides
	@ARGS="$${ARGS-}" $(BIN)/python scripts/sweep.py

status: $(STAMP) ## show the progress of all sweeps, at any time; ARGS="results_dir=DIR"
	@$(BIN)/python scripts/status.py $(ARGS)

report: $(STAMP) ## make the tables and figures from the finished runs
	@$(BIN)/python scripts/report.py $(ARGS)

bench: $(STAMP) ## measure the speed of every method on this machine; ARGS="backbone=deit_base batch_size=256 dtype=bfloat16"
	@$(BIN)/python scripts/benchmark.py $(ARGS)

test: $(STAMP) ## run the tests in two processes; ARGS="-k merge" selects some
	@$(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)

docs: $(STAMP) ## build the documentation with the API, build/docs/index.html
	@$(BIN)/sphinx-build -q -W --keep-going -j auto docs build/docs

stress: $(STAMP) ## run the tests that take many minutes: hundreds of kills, many ranks
	@$(BIN)/python -m pytest -m stress -n 2 --dist worksteal $(ARGS)

lint: $(STAMP) ## check style and formatting
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .

format: $(STAMP) ## fix style and formatting
	@$(BIN)/ruff check --fix . && $(BIN)/ruff format .

constraints: ## resolve constraints.txt again from pyproject.toml (requires uv)
	@{ echo "# Exact versions that were tested. Made from pyproject.toml: make constraints"; \
	  uv pip compile pyproject.toml --extra dev --universal --python-version 3.10 --no-annotate --no-header -q --upgrade; } > .constraints.new
	@mv .constraints.new constraints.txt

clean: ## remove .venv and the caches of tools; results stay
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis *.egg-info

force:
