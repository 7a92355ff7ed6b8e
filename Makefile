# Two commands matter: `make demo` and `make test`. Both need only Python >= 3.10, make and a C++ compiler (Inductor's).
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt
# Needs Linux, for Triton, and no GPU.
COMPILE_OFFLINE := $(BIN)/python tests/compile_offline.py

.DEFAULT_GOAL := help
.PHONY: help demo test test-export test-all test-gpu kernels-offline coverage lint format bench bench-model bench-cpu paper-table clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 18

# torch is installed first and alone, so that no other requirement chooses its build.
$(VENV)/torch.stamp: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	@touch $@

$(VENV)/demo.stamp: pyproject.toml $(VENV)/torch.stamp
	$(PIP) --editable '.[demo]'
	@touch $@

$(VENV)/dev.stamp: pyproject.toml $(VENV)/torch.stamp
	$(PIP) --editable '.[dev]'
	@touch $@

$(VENV)/paper.stamp: pyproject.toml $(VENV)/torch.stamp
	$(PIP) --editable '.[gpu,paper]'
	@touch $@

demo: $(VENV)/demo.stamp ## install, then run a video transformer dense and with SLA2 (about three minutes)
	$(BIN)/python examples/quickstart.py

# A process per core, each with one thread: threads of several would spin on each other.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist worksteal

test: lint ## install, lint, type-check, run the tests, compile each kernel for six GPUs
	$(PYTEST) -m "not slow"
	$(COMPILE_OFFLINE) --quick

test-export: $(VENV)/dev.stamp ## third-party models exported in every format but the slowest packages (about three minutes)
	$(BIN)/python -m pytest tests/test_export_models.py -m slow -k "agrees_with_eager and (not aoti or wan)"

test-all: lint ## the same with the slow tests
	$(PYTEST)
	$(COMPILE_OFFLINE) --quick

test-gpu: $(VENV)/dev.stamp ## the tests that need a CUDA GPU (a few minutes on sixteen cores)
	$(PYTEST) -m gpu

kernels-offline: $(VENV)/dev.stamp ## compile all kernels for six GPUs without one (about half an hour; ARGS=--quick: two minutes)
	$(COMPILE_OFFLINE) $(ARGS)

coverage: $(VENV)/dev.stamp ## check some 130 models of other libraries and write docs/coverage.md (about ten minutes)
	PYTHONPATH=tests $(BIN)/python tests/families/write_page.py

lint: $(VENV)/dev.stamp ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/dev.stamp ## let ruff rewrite what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/dev.stamp ## time, stages and memory of the op against dense attention on this GPU (about five minutes)
	$(BIN)/python -m benchmarks.attention $(ARGS)

bench-model: $(VENV)/dev.stamp ## time and memory of one Wan2.1-1.3B denoising step on this GPU (under ten minutes)
	$(BIN)/python -m benchmarks.model $(ARGS)

bench-cpu: $(VENV)/dev.stamp ## time and memory of the op against dense attention on this CPU
	$(BIN)/python benchmarks/cpu_attention.py

paper-table: $(VENV)/paper.stamp ## 25 minutes of the paper's comparison on this GPU; again until it is done (ARGS=--tiny: CPU)
	$(BIN)/python -m examples.paper_table pictures $(ARGS)
	$(BIN)/python -m examples.paper_table run --budget-seconds 1500 $(ARGS)
	$(BIN)/python -m examples.paper_table report $(ARGS)

clean: ## remove the virtual environment, builds and caches
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
