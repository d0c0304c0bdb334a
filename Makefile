# For everyone: `make train` and `make test`. Both first make .venv, which takes a few minutes once and nothing later.
#
#   make train ARGS="max_steps=20 log=none"    more words for train.py
#   make test ARGS="tests/unit -k log"         more words for pytest
#   make train PYTHON=/usr/bin/python3.12      another interpreter for .venv
#   make train TORCH_INDEX=file:///…/simple    where PyTorch's CPU build comes from (used where there is no NVIDIA GPU)

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.DELETE_ON_ERROR:
.PHONY: train test faults lint ci install clean

PYTHON ?= python3
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
ARGS ?=
BIN := .venv/bin
# Compiling everything that pip unpacks costs more than compiling what is imported.
PIP := $(BIN)/python -m pip install --disable-pip-version-check --no-input --no-compile --constraint constraints.txt \
	$(if $(CI),--quiet)
export PATH := $(CURDIR)/$(BIN):$(PATH)
# Runs and tests are many processes: without bytecode on the disk each compiles torch and all else that it imports anew.
unexport PYTHONDONTWRITEBYTECODE

train: .venv/.runtime
	@deepspeed train.py $(ARGS)

# All tests on up to four workers; some of them in this process, where a debugger works.
ALL_TESTS := --numprocesses logical --maxprocesses 4 --dist loadscope --no-loadscope-reorder

test: .venv/.dev
	@python -m pytest $(or $(ARGS),$(ALL_TESTS))

# Every fault trial in its long form, one after another (or those of the files in ARGS), and the table of their results.
faults: .venv/.dev
	@python -m pytest --all-faults --table docs/reliability.md $(or $(ARGS),tests/faults)

lint: .venv/.dev
	@ruff check .
	@ruff format --check --quiet .
	mypy
	lint-imports

ci:
	@bash .ci/run

install: .venv/.dev

clean:
	@rm -rf .venv build dist *.egg-info

# The stamps: with the tests' tools, and without them.
.venv/.dev: setup.py constraints.txt | $(BIN)/python
	@$(install_torch)
	$(PIP) --editable '.[dev]'
	touch .venv/.runtime $@

.venv/.runtime: setup.py constraints.txt | $(BIN)/python
	@$(install_torch)
	$(PIP) --editable .
	touch $@

# Without an NVIDIA GPU: PyTorch's CPU build, some 200 MB instead of gigabytes, from its own index if that answers. Where
# it does not, the pin below takes what pip is configured to find.
define install_torch
if ! nvidia-smi --list-gpus >/dev/null 2>&1 && ! $(BIN)/python -c 'import torch' >/dev/null 2>&1; then
	if [[ "$(TORCH_INDEX)" == file:* ]] || $(BIN)/python -c \
		'import sys, urllib.request as r; r.urlopen(sys.argv[1] + "/torch/", timeout=5)' "$(TORCH_INDEX)" 2>/dev/null; then
		$(PIP) --no-deps --index-url "$(TORCH_INDEX)" torch
	else
		echo "PyTorch's CPU index does not answer; pip takes the version that it finds."
	fi
fi
endef

$(BIN)/python:
	@if ! command -v "$(PYTHON)" >/dev/null; then
		echo "There is no $(PYTHON). Install Python 3.11 or 3.12, or name one: make train PYTHON=/path/to/python3.12" >&2
		exit 1
	fi
	if ! "$(PYTHON)" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))'; then
		echo "distft needs Python 3.11 or 3.12, and $(PYTHON) is $$("$(PYTHON)" --version)." \
			"Name another: make train PYTHON=/usr/bin/python3.12" >&2
		exit 1
	fi
	echo "Making .venv with $$("$(PYTHON)" --version); installing the pinned versions takes a few minutes, once."
	if ! "$(PYTHON)" -m venv .venv; then
		rm -rf .venv
		echo "The venv module is missing: apt-get install python3-venv" >&2
		exit 1
	fi
