# The commands of this project. Each sets up what it needs by itself, in a virtual environment in this folder.
#   make demo | test | test-fast | test-slow | test-chaos | test-gpu | lint          make test PYTHON=python3.12

PYTHON ?= python3
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
VENV ?= .venv-py$(VERSION)
BIN := $(CURDIR)/$(VENV)/bin
STORAGE ?= runs
PYTEST_ARGS ?=
PYTEST := $(BIN)/python -m pytest $(PYTEST_ARGS)

# What the tools compile or fetch at run time stays in this folder too.
export TORCH_EXTENSIONS_DIR := $(CURDIR)/$(VENV)/cache/torch_extensions
export PYRIGHT_PYTHON_CACHE_DIR := $(CURDIR)/$(VENV)/cache/pyright
export MPLCONFIGDIR := $(CURDIR)/$(VENV)/cache/matplotlib

.PHONY: demo test test-fast test-slow test-chaos test-gpu lint install

demo: install
	@PATH="$(BIN):$$PATH" $(BIN)/python -m dico_ray.demo --storage $(STORAGE)

test: install
	$(PYTEST) -m "not slow and not chaos and not gpu"

test-fast: install
	$(PYTEST) -m "not ray and not long and not slow and not chaos and not gpu"

test-slow: install
	$(PYTEST) -m "slow and not chaos and not gpu"

test-chaos: install
	$(PYTEST) -m chaos -s

test-gpu: install
	$(PYTEST) -m gpu

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "dico-ray needs Python 3.11 or newer; '$(PYTHON)' is $(VERSION): make ... PYTHON=python3.12"; exit 1; }
	@echo "Setting up $(VENV) (PyTorch is about 3 GB: this takes minutes, once)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[demo,dev,evaluate,gs,s3,sweep,track]"
	@touch $@
