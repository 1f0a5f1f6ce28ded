PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable

.PHONY: demo test test-full check format clean

demo: $(VENV)/.demo  ## train with Grokfast until it generalises; about a minute
	$(BIN)/forge-fit fit --config grokfast_modular.yaml

test: $(VENV)/.test  ## the whole test suite, without what is marked slow
	$(BIN)/python -m pytest -q -n 2 -m "not slow"

test-full: $(VENV)/.test  ## slow tests too
	$(BIN)/python -m pytest -q -n 2

check: $(VENV)/.test  ## format, lint, types, import rules
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.test
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

benchmark-%: $(VENV)/.test  ## benchmark-grokking, benchmark-filter_cost
	$(BIN)/python -m benchmarks.$*

$(VENV)/.demo: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) .
	touch $@

$(VENV)/.test: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) '.[test,dev]'
	touch $(VENV)/.demo $@

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache
