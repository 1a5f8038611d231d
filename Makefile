# `make quickstart` and `make test` do all the set-up they need.

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest

.PHONY: help install quickstart test test-slow check format clean

help:
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' Makefile

install: $(INSTALLED) ## install into .venv

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; call make with PYTHON=...")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,emoji]'
	touch $@

quickstart: $(INSTALLED) ## the whole story on the embedded model; ends with runs/quickstart/report.html
	$(BIN)/bksdm quickstart runs/quickstart

test: $(INSTALLED) ## the tests, with their coverage
	$(PYTEST) --numprocesses 2 --dist loadgroup --cov --cov-report=term --cov-fail-under=90

test-slow: $(INSTALLED) ## the long checks
	$(PYTEST) -m slow

check: $(INSTALLED) ## lint, format, types, import floors
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(PYTEST) tests/test_imports.py

format: $(INSTALLED) ## rewrite the code in its one format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove everything that was made here
	rm -rf .venv runs build dist .pytest_cache .mypy_cache .ruff_cache
