# make bench   install and run the starter matrix to a leaderboard
# make test    install and run every test;  make test-fast leaves the slow ones out
# make docs    the site, in site/;  make test-docs runs every snippet of README and docs
# make test-vllm   the vLLM backend for real, on a CPU, in an environment of its own
# make lint    ruff, ruff format, mypy, the import-direction test

SHELL := /bin/bash
BIN := .venv/bin
INSTALLED := .venv/.installed
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false
ifneq ($(wildcard ../shared/data),)
export PZ_DATA ?= $(abspath ../shared/data)
endif

.PHONY: bench test test-fast test-vllm test-docs docs lint format clean install

install: $(INSTALLED)

$(INSTALLED): constraints.txt tools/install.sh pz_envs/pyproject.toml pz_agents/pyproject.toml pz_bench/pyproject.toml
	@bash tools/install.sh
	@touch $@

bench: $(INSTALLED)
	@$(BIN)/pz-bench run --matrix

test: $(INSTALLED)
	@$(BIN)/ruff check --quiet .
	@$(BIN)/pytest -n auto --dist worksteal

test-fast: $(INSTALLED)
	@$(BIN)/pytest -n auto --dist worksteal -m "not slow"

test-vllm:
	@bash tools/test-vllm.sh

docs: $(INSTALLED)
	@$(BIN)/pip install -q -c constraints.txt mkdocs-material 'mkdocstrings[python]'
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

test-docs: $(INSTALLED)
	@$(BIN)/pip install -q -c constraints.txt mkdocs-material 'mkdocstrings[python]'
	@PZ_DOCS=all NO_MKDOCS_2_WARNING=1 $(BIN)/pytest -n auto --dist worksteal tests/docs

lint: $(INSTALLED)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/pytest -q tests/integration/test_architecture.py

format: $(INSTALLED)
	@$(BIN)/ruff check --fix --quiet .
	@$(BIN)/ruff format .

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache
