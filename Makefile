# `make quickstart` and `make test` do all their set-up themselves, on a fresh clone.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Every version that was tested. Without it pip takes the newest of everything.
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: help quickstart test check clean

help:
	@echo "make quickstart   install into .venv, measure the quickstart matrix, print its table"
	@echo "make test         install into .venv, run all tests"
	@echo "make check        ruff and mypy"
	@echo "make clean        remove .venv (results are kept)"

$(BIN)/tunebench: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	@echo "installing torch, transformers, trl, lm-eval ... into $(VENV); a few minutes"
	$(PIP) torch
	$(PIP) --editable .
	@touch $@

$(BIN)/pytest: $(BIN)/tunebench
	$(PIP) --editable '.[dev]'
	@touch $@

quickstart: $(BIN)/tunebench
	$(BIN)/tunebench run quickstart
	$(BIN)/tunebench report results/quickstart

test: $(BIN)/pytest
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder --durations 30

check: $(BIN)/pytest
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV)
