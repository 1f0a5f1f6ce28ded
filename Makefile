PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
EXTRAS ?= test,dev
BIN := $(VENV)/bin
GPU_TESTS := $(addprefix tests/,calibration dream edge geometry grokfast muon self_model stages telemetry temperature)
INSTALL := $(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check --constraint $(CONSTRAINTS) --editable

.DEFAULT_GOAL := help
.PHONY: help notebooks demo test test-gpu test-full test-oldest check docs format clean claims claims-quick soak soak-full mutants

help:  ## what there is to make
	@grep -hE '^[a-z%_-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([^:]+):.*## */\1\t/' | expand -t 18

demo: $(VENV)/.demo  ## train until it generalises; a quarter of a minute on a CPU
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/forge-fit fit --config grokking_fast.yaml

test: $(VENV)/.test  ## the whole test suite, without what is marked slow
	$(BIN)/python -m pytest -q -n 2 --dist loadgroup -m "not slow" $(WARNINGS)

test-full: $(VENV)/.test  ## slow tests too
	$(BIN)/python -m pytest -q -n 2 --dist loadgroup

test-gpu: $(VENV)/.test  ## the contract and the callbacks' tests on a GPU
	$(BIN)/python -m pytest -q -n 4 --accelerator gpu -m "not slow" tests/contract tests/models $(GPU_TESTS)

test-oldest:  ## the same with the oldest releases that pyproject.toml admits, in a venv of its own
	$(MAKE) VENV=.venv-oldest CONSTRAINTS=constraints-oldest.txt EXTRAS=test WARNINGS='-W default' test

check: $(VENV)/.test  ## format, lint, types, import rules
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python .ci/words.py

docs: $(VENV)/.test  ## the pages of docs, with the API, into docs/_build; a warning is an error
	$(BIN)/sphinx-build -q -W --keep-going -b html docs docs/_build

format: $(VENV)/.test  ## mend format and simple lint
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

benchmark-%: $(VENV)/.test  ## benchmark-grokking, benchmark-filter_cost, benchmark-gpu
	$(BIN)/python -m benchmarks.$*

claims: $(VENV)/.test  ## every run behind CLAIMS.md that is not stored, then the page; hours (FORGE_MBPP names MBPP's file)
	$(BIN)/python -m benchmarks.claims run

claims-quick: $(VENV)/.test  ## the page from stored runs, and three of the runs once more, to compare; minutes
	$(BIN)/python -m benchmarks.claims quick

soak: $(VENV)/.test  ## 3,000 steps with everything on, and everything that can end a run; minutes
	$(BIN)/python -m benchmarks.soak --steps 3000
	$(BIN)/python -m pytest -q tests/faults

mutants: $(VENV)/.test  ## changes of single operators and numbers that the tests must catch; a quarter of an hour
	$(BIN)/python .ci/mutants.py

soak-full: $(VENV)/.test  ## 100,000 steps, half an hour
	$(BIN)/python -m benchmarks.soak
	$(BIN)/python -m pytest -q tests/faults

$(VENV)/.demo: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) '.[all]'
	touch $@

$(VENV)/.test: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) '.[$(EXTRAS)]'
	touch $(VENV)/.demo $@

notebooks: $(VENV)/.test  ## run the notebooks, and keep their outputs and pictures; minutes
	$(BIN)/python .ci/notebooks.py

clean:  ## remove environments, caches and built pages
	rm -rf $(VENV) .venv-oldest docs/_build build dist .mypy_cache .ruff_cache .pytest_cache
