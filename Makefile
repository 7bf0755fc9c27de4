# Everything runs in .venv, which any target builds when it is missing or older than pyproject.toml and constraints.txt.
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
SHELL := /bin/bash
.PHONY: help setup sweep report test lint format constraints clean force

PYTHON ?= python3
ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready
EXPERIMENTS := $(sort $(basename $(notdir $(wildcard configs/experiment/*.yaml))))

# TORCH, once given, holds for later set-ups of the same .venv too.
INSTALLED_TORCH := $(shell cat $(VENV)/.torch 2>/dev/null)
TORCH ?= $(INSTALLED_TORCH)

help: ## this list
	@echo "dhtm: Dynamic Hierarchical Token Merging for Vision Transformers"
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'
	@echo
	@echo "  make sweep ARGS=\"backbone=deit_small data=imagenet data.root=/imagenet\"   overrides, as Hydra takes them"
	@echo "  make setup TORCH='torch==2.11.0 torchvision==0.26.0'                      another torch, for an older driver"

setup: $(STAMP) ## build .venv, if need be (a few minutes; PYTHON=python3.12 and TORCH='...' choose versions)

$(STAMP): pyproject.toml constraints.txt $(if $(filter-out $(INSTALLED_TORCH),$(TORCH)),force)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "$(PYTHON) is too old: Python 3.10 or newer is needed, make setup PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@if [ -n "$(TORCH)" ]; then grep -vE '^(torch|torchvision|triton|nvidia-|cuda-)' constraints.txt; else cat constraints.txt; fi > $(VENV)/constraints.txt
	$(BIN)/python -m pip install --disable-pip-version-check -c $(VENV)/constraints.txt $(TORCH) -e '.[dev]'
	@echo '$(TORCH)' > $(VENV)/.torch
	@touch $@

sweep: $(STAMP) ## run every experiment, then make the tables and figures; ARGS="key=value ..." overrides
	@for experiment in $(EXPERIMENTS); do \
	  $(BIN)/python scripts/evaluate.py -m experiment=$$experiment $(filter-out output_dir=%,$(ARGS)) || exit $$?; \
	done
	@$(BIN)/python scripts/report.py $(filter results_dir=% output_dir=% tracker=% tracker.%,$(ARGS))

report: $(STAMP) ## make the tables and figures from the runs that are there
	@$(BIN)/python scripts/report.py $(ARGS)

test: $(STAMP) ## run the tests; ARGS="-k merge" chooses
	@$(BIN)/python -m pytest $(ARGS)

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
