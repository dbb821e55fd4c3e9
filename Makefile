# Everything is made by `make`: the environment first, then the target.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# An index with other builds of torch, for example the CPU-only or a CUDA one (see README, "GPU").
TORCH_INDEX ?=

.DEFAULT_GOAL := help
.PHONY: help env run compare comparison systems test check format lint types bench clean

help:  ## show this help
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /|/' | awk -F'|' '{printf "  make %-8s %s\n", $$1, $$2}'

$(VENV)/installed: pyproject.toml requirements.lock
	@echo "making the environment in $(VENV) (once, a few minutes)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(if $(TORCH_INDEX),$(BIN)/pip install --quiet --constraint requirements.lock --index-url $(TORCH_INDEX) torch)
	$(BIN)/pip install --quiet --constraint requirements.lock --editable ".[dev]"
	@touch $@

env: $(VENV)/installed  ## make the environment

run: env  ## prune the embedded model: the whole job, with a table at the end (S="prune.sparsity=0.3 ..." overrides)
	$(BIN)/surgeon run $(foreach s,$(S),-S $(s))

compare: env  ## compare methods on the embedded model: tables and a plot in data/compare (minutes; S as for run)
	$(BIN)/surgeon compare compare.yaml $(foreach s,$(S),-S $(s))

comparison: env  ## make what docs/comparison.md shows, below data/comparison (an hour; needs SURGEON_TEXT_DIR)
	@test -f "$(SURGEON_TEXT_DIR)/valid.txt" || { echo "SURGEON_TEXT_DIR does not name a folder with WikiText-2"; exit 2; }
	mkdir -p data/comparison
	$(BIN)/surgeon compare benchmarks/comparison.yaml -p params.yaml -C data/comparison --engine inline \
		-S "calibrate.text={source: $(abspath $(SURGEON_TEXT_DIR))/valid.txt}" \
		-S "evaluate.text={source: $(abspath $(SURGEON_TEXT_DIR))/test.txt}"

systems: env  ## LLM Surgeon, LayerChop and Bonsai before and after training, below data/systems (needs SURGEON_TEXT_DIR)
	@test -f "$(SURGEON_TEXT_DIR)/valid.txt" || { echo "SURGEON_TEXT_DIR does not name a folder with WikiText-2"; exit 2; }
	mkdir -p data/systems
	$(BIN)/surgeon compare benchmarks/systems.yaml -p params.yaml -C data/systems --engine inline \
		-S "calibrate.text={source: $(abspath $(SURGEON_TEXT_DIR))/valid.txt}" \
		-S "evaluate.text={source: $(abspath $(SURGEON_TEXT_DIR))/test.txt}"

test: env  ## run all tests but the slow ones, a short run on the real model included
	$(BIN)/pytest

check: lint types env  ## format, lint, types and the fast tests
	$(BIN)/pytest -q -m "not real"

format: env  ## format the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lint: env  ## check format and lint
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: env  ## check types of surgeon and tasks
	$(BIN)/mypy

bench: env  ## measure speed and memory (needs SURGEON_TEXT_DIR; see docs/benchmarks.md)
	$(BIN)/python -m benchmarks.speed data/bench
	$(BIN)/python -m benchmarks.memory
	$(BIN)/python -m benchmarks.plan
	$(BIN)/python -m benchmarks.ablation data/bench

clean:  ## remove what runs produced, except fetched models
	rm -rf data/store data/run.zarr data/manifest.json data/stages data/timings data/metrics data/report data/export data/compare data/bench .prefect
