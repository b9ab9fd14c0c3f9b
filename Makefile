# make demo: train a style and show it. make test: set up and run the tests. Both make their own environment.
# make clients: prove the files in stable-diffusion.cpp, which is built for it; apart, as it takes minutes and gigabytes.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint clients setup clean

demo: setup
	$(BIN)/loratune quickstart

test: setup
	$(BIN)/python -m pytest -n auto

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clients: setup
	$(BIN)/pip install --quiet --disable-pip-version-check stable-diffusion-cpp-python==0.4.7
	$(BIN)/python tests/clients/run.py

setup: $(VENV)/.done

$(VENV)/.done: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "loratune needs Python 3.11 or newer")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV)
