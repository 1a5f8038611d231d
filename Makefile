# `make quickstart` and `make test` do all the set-up they need.

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest

.PHONY: help install browser quickstart test coverage test-slow check docs format clean

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

browser: # a Chromium for the tests of the page of `bksdm demo`; without one they are skipped
	@command -v chromium chromium-browser google-chrome > /dev/null \
		|| { [ "$$(id -u)" = 0 ] && command -v apt-get > /dev/null && apt-get update -qq && apt-get install -qq -y chromium > /dev/null; } \
		|| echo 'no Chromium here, so the tests of the page are skipped; apt-get install chromium mends that'

test: $(INSTALLED) browser ## the tests
	$(PYTEST) --numprocesses 2 --dist loadfile

coverage: $(INSTALLED) browser ## the same, half as slow again, with their coverage
	$(PYTEST) --numprocesses 2 --dist loadfile --cov --cov-report=term --cov-fail-under=90

test-slow: $(INSTALLED) ## the long checks
	$(PYTEST) -m slow

check: $(INSTALLED) ## lint, format, types, import floors
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(PYTEST) tests/test_imports.py

docs: $(INSTALLED) ## the documentation site in site/, built strictly
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

format: $(INSTALLED) ## rewrite the code in its one format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove everything that was made here
	rm -rf .venv runs site build dist .pytest_cache .mypy_cache .ruff_cache
