# `make demo` and `make test` do all set-up themselves, in .venv, once: a later run starts at once unless pyproject.toml
# or a compiled source has changed. To override, on the command line or in the environment:
#   PYTHON       the interpreter that .venv is made with
#   TORCH        the PyTorch to install where .venv has none of 2.10 or newer
#   TORCH_INDEX  the package index to take it from (pip's own setting when empty)

TORCH ?= torch==2.13.0
TORCH_INDEX ?=

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
USABLE := import sys; sys.exit(sys.version_info < (3, 11))
HAS_TORCH := from importlib.metadata import version as v; assert [int(n) for n in v("torch").split(".")[:2]] >= [2, 10]

# What an install bakes in; the Python sources are read from the checkout and are not among it.
BUILD_INPUTS := pyproject.toml $(wildcard setup.py) \
	$(shell find kernels -name '*.cpp' -o -name '*.h' -o -name '*.hpp' -o -name '*.c')

.DEFAULT_GOAL := help
.PHONY: help demo test test-all test-sweeps lint format sanitize clean distclean

help: ## say what can be made
	@sed -n 's/^\([a-z-]*\):.*## /  make \1	/p' $(MAKEFILE_LIST)

demo: $(VENV)/.ready-demo ## set up, then compile and run the small model that comes with the repository
	@$(BIN)/kvpass demo

PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal --durations=10

test: lint ## set up, then ruff, mypy and the tests that take under 15 minutes on two cores
	@$(PYTEST) -m "not slow and not sweep"

test-all: $(VENV)/.ready-dev ## set up, then other tests that take under 45 minutes: more attacks, and builds of the package
	@$(PYTEST) -m "slow and not sweep"

test-sweeps: $(VENV)/.ready-dev ## set up, then what is left of the tests' longest tables (an hour and more)
	@$(PYTEST) -m sweep

lint: $(VENV)/.ready-dev ## set up, then ruff and mypy
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/mypy

format: $(VENV)/.ready-dev ## set up, then let ruff mend and format the sources
	@$(BIN)/ruff check --fix
	@$(BIN)/ruff format

sanitize: $(VENV)/.ready-dev ## set up, then run the tests of the native kernels under ASan and UBSan
	@$(BIN)/python benchmarks/sanitize_kernels.py

clean: ## remove what builds and tools leave behind, but not .venv
	@rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find . -path ./$(VENV) -prune -o -type d -name __pycache__ -exec rm -rf {} +

distclean: clean ## remove .venv as well
	@rm -rf $(VENV)

# pip and not python: it comes last, so a set-up that was broken off is taken up again.
$(BIN)/pip:
	@python="$(PYTHON)"; \
	for each in python3.11 python3.12 python3.13 python3; do \
		if [ -z "$$python" ] && $$each -c '$(USABLE)' 2>/dev/null; then python=$$each; fi; \
	done; \
	if [ -z "$$python" ] || ! $$python -c '$(USABLE)'; then \
		echo "kvpass needs Python 3.11 or newer; name one with: make PYTHON=..." >&2; exit 1; \
	fi; \
	echo "set-up: making $(VENV) with $$($$python --version)"; \
	$$python -m venv $(VENV)

# PyTorch comes first and by itself, so that the later installs find one and leave it alone.
$(VENV)/.ready-torch: | $(BIN)/pip
	@if ! $(BIN)/python -c '$(HAS_TORCH)' 2>/dev/null; then \
		echo "set-up: installing $(TORCH)"; \
		$(PIP) install -qq $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$(TORCH)"; \
	fi
	@touch $@

$(VENV)/.ready-demo: $(VENV)/.ready-torch $(BUILD_INPUTS)
	@echo "set-up: installing kvpass"
	@$(PIP) install -qq --editable .
	@touch $@

$(VENV)/.ready-dev: $(VENV)/.ready-torch $(BUILD_INPUTS)
	@echo "set-up: installing kvpass and the tools that test it"
	@$(PIP) install -qq --editable '.[dev]'
	@$(PIP) install -qq --editable '.[tensorrt]' || echo "set-up: tensorrt-rtx cannot be installed here, its tests are skipped"
	@touch $@ $(VENV)/.ready-demo
