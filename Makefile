# Needs Python >= 3.10 with its venv module, and make; everything else goes into .venv.
# Another Python: make test PYTHON=python3.12      More arguments: make test ARGS="-k config"

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-cuda-standin lint type perf-check perf-accept gpu-numerics bench-gpu bench-compare gpu-wheels train-tiny clean
.DELETE_ON_ERROR:

help: ## Show this help
	@echo "cogx-fast: a fast CogVideoX video transformer for PyTorch"
	@echo
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-18s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))
	@echo
	@echo "The first target that needs it sets up $(VENV) with $(PYTHON). Variables: PYTHON, ARGS."

setup: $(STAMP) ## Set up .venv with the tested versions (constraints.txt)
	@echo "$(VENV) is ready"

demo: $(STAMP) ## Make a video with the tiny pipeline, beside diffusers
	@$(BIN)/cogx-fast demo $(ARGS)

# Three processes, which share the tests out by file: two cores do not idle while one of them sleeps or waits for a
# child. What -m chooses is timed or needs the whole GPU: one after another.
test: $(STAMP) ## Run the tests (those marked gpu or slow: ARGS="-m gpu", ARGS="-m slow")
	@$(BIN)/python -m pytest $(if $(filter -m,$(ARGS)),,-n 3 --dist loadfile --no-loadscope-reorder) $(ARGS)

# The CUDA build of torch (about 4 GB) from the package index, whatever pip is configured to prefer on this machine.
# Another torch: TORCH=2.11.0. An environment that is there already: STANDIN_VENV=/path.
TORCH ?= 2.13.0
STANDIN_VENV ?= .venv-cuda-$(TORCH)
STANDIN_STAMP := $(if $(filter file,$(origin STANDIN_VENV)),$(STANDIN_VENV)/.installed)

test-cuda-standin: $(STANDIN_STAMP) ## Run the tests that need a CUDA device on a stand-in (TORCH, STANDIN_VENV)
	@$(STANDIN_VENV)/bin/python -m tests.cuda_standin $(ARGS)

lint: $(STAMP) ## Check style, format and types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

type: $(STAMP) ## Check types only
	@$(BIN)/mypy

perf-check: $(STAMP) ## Time ours against diffusers here, run generated GPU code; fail where it is slower or wrong
	@$(BIN)/python -W ignore -m benchmarks.check $(ARGS)
	@$(BIN)/python -W ignore -m benchmarks.codegen --numerics --check
	@$(BIN)/python -W ignore -m benchmarks.codegen --numerics --faults

gpu-numerics: $(STAMP) ## Run the code generated for a GPU here, on the CPU, and hold its numbers
	@$(BIN)/python -W ignore -m benchmarks.codegen --numerics --check $(ARGS)

perf-accept: $(STAMP) ## Record what the compiler makes now: structure, generated GPU code, README's table
	@$(BIN)/python -W ignore -m benchmarks.structure --accept $(ARGS)
	@$(BIN)/python -W ignore -m benchmarks.codegen --accept $(ARGS)
	@$(BIN)/python -W ignore -m benchmarks.codegen --numerics --accept $(ARGS)
	@$(BIN)/python -m benchmarks.gpu.table

bench-gpu: $(STAMP) ## Hold ours beside diffusers on this machine's GPU against its table; ARGS=--accept records it
	@$(BIN)/python -W ignore -m benchmarks.gpu $(ARGS)

bench-compare: $(STAMP) ## Time the working tree against a revision: make bench-compare BASE=main
	@$(BIN)/python -W ignore -m benchmarks.compare $(or $(BASE),$(error name a revision: make bench-compare BASE=main)) $(ARGS)

gpu-wheels: $(STAMP) ## Collect in .wheels what a GPU machine without a network lacks (benchmarks/gpu/session.sh uses it)
	@$(BIN)/python -m benchmarks.gpu.wheels $(ARGS)

train-tiny: $(STAMP) ## Train the tiny model from nothing, on a GPU or two cores (up to two hours); goes on where it was stopped
	@$(BIN)/python -m benchmarks.tiny.train $(ARGS)

clean: ## Remove caches and build output (.venv stays)
	@rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .benchmarks .coverage htmlcov
	@find . -path ./$(VENV) -prune -o -path ./.git -prune -o -type d -name __pycache__ -prune -exec rm -rf {} +

# nvidia-cuda-cccl has the one header that packages need and torch does not bring. Of constraints.txt all but torch and what
# each torch has a version of its own of.
$(STANDIN_VENV)/.installed: pyproject.toml constraints.txt
	@"$(PYTHON)" -m venv $(STANDIN_VENV)
	@echo "Installing the CUDA build of torch $(TORCH) into $(STANDIN_VENV): about 4 GB"
	@grep -vE '^(torch|triton|setuptools)=' constraints.txt > $(STANDIN_VENV)/constraints.txt
	@export PIP_CONFIG_FILE=/dev/null PIP_FIND_LINKS= PIP_EXTRA_INDEX_URL= PIP_NO_INDEX= PIP_DISABLE_PIP_VERSION_CHECK=1; \
	  $(STANDIN_VENV)/bin/python -m pip install --quiet "torch==$(TORCH)" "nvidia-cuda-cccl>=13.0,<13.1" && \
	  $(STANDIN_VENV)/bin/python -m pip install --quiet --constraint $(STANDIN_VENV)/constraints.txt "torch==$(TORCH)" ".[all,dev]" && \
	  $(STANDIN_VENV)/bin/python -m pip uninstall --quiet --yes cogx-fast
	@touch $@

# hatchling and editables come first, so that the build needs no environment of its own.
$(STAMP): pyproject.toml constraints.txt
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || { \
	  command -v "$(PYTHON)" >/dev/null 2>&1 \
	    || { echo "error: '$(PYTHON)' is not there. Install Python >= 3.10, or name one: make PYTHON=/path/to/python3" >&2; exit 1; }; \
	  "$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	    || { echo "error: '$(PYTHON)' is $$("$(PYTHON)" -V 2>&1); Python >= 3.10 is needed. Name one: make PYTHON=/path/to/python3" >&2; exit 1; }; \
	  "$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null \
	    || { echo "error: '$(PYTHON)' has no venv module. On Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }; \
	  echo "Setting up $(VENV) with $$("$(PYTHON)" -V 2>&1)"; \
	  "$(PYTHON)" -m venv $(VENV); }
	@$(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	  || { echo "error: $(VENV) has $$($(BIN)/python -V); Python >= 3.10 is needed: remove $(VENV) and try again" >&2; exit 1; }
	@echo "Installing the tested versions into $(VENV) (the first time takes minutes)"
	@$(PIP) "pip>=23.0" hatchling editables
	@$(PIP) --no-build-isolation --editable ".[all,dev]"
	@touch $@
