# make demo | demo-pairs | test | test-faults | lint | bench      each sets up .venv by itself the first time
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
OUT ?= $(CURDIR)/out

.PHONY: help venv demo demo-pairs test test-faults lint format bench clean
help:
	@sed -n '1p' Makefile

venv: $(STAMP)

$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[ray,train,evaluate,dev]'
	touch $(STAMP)

# Pairs, a one-step student, a report: the whole way on two CPU cores. Again: nothing is computed twice.
demo: $(STAMP)
	$(BIN)/python stages/demo.py --output $(OUT)/demo

# A Ray head of its own on free ports, the job, a check of the result; everything it started is stopped again.
demo-pairs: $(STAMP)
	$(BIN)/python stages/demo_pairs.py --output $(OUT)/demo-pairs

test: $(STAMP)
	$(BIN)/python -m pytest --numprocesses 3 --no-loadscope-reorder

# What make test has of them in short: dozens of runs of which something is killed. Some forty minutes, and a report.
# Whatever takes random inputs takes new ones.
test-faults: $(STAMP)
	FAULTS_REPORT=$(OUT)/faults $(BIN)/python -m pytest --hypothesis-profile new -m '' tests/faults tests/pipeline/test_demo.py::test_stopped_at_work_it_leaves_no_process

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP)
	$(BIN)/python -m tests.benchmarks.run

clean:
	rm -rf $(VENV) out
