# make demo | demo-quick | test | test-slow | test-vllm | lint: each does its own set-up first, and again when pyproject.toml changes.
#   PYTHON=python3.12   the interpreter a new environment is made with (3.11 or newer)
#   VENV=DIR            the environment to use; default: the active one, else .venv
#   VLLM_VENV=DIR       the environment of test-vllm, which cannot share one; default: .venv-vllm
#   OUT=DIR             where the demo writes

PYTHON ?= python3
VENV ?= $(or $(VIRTUAL_ENV),.venv)
VLLM_VENV ?= .venv-vllm
OUT ?= demo-out
BIN := $(VENV)/bin
SETUP_FILES := pyproject.toml constraints-cpu.txt constraints-test.txt .ci/setup

.PHONY: help demo demo-quick test test-slow test-vllm lint clean

help:
	@echo "make demo        the whole path on real text, then a report in $(OUT)/ (minutes)"
	@echo "make demo-quick  the same code with fewer steps"
	@echo "make test        the fast tests;  make test-slow: the others"
	@echo "make test-vllm   the tests of --backend vllm, in $(VLLM_VENV) (3.5 GB)"
	@echo "make lint        ruff, mypy, import layers"

# A full install serves the demo too, so `make demo` after `make test` installs nothing.
$(VENV)/.tide-test: $(SETUP_FILES)
	.ci/setup "$(PYTHON)" "$(VENV)" test
	touch "$@" "$(VENV)/.tide-report"

$(VENV)/.tide-report: $(SETUP_FILES)
	.ci/setup "$(PYTHON)" "$(VENV)" report
	touch "$@"

demo: $(VENV)/.tide-report
	$(BIN)/tide demo --out "$(OUT)"

demo-quick: $(VENV)/.tide-report
	$(BIN)/tide demo --quick --out "$(OUT)"

test: $(VENV)/.tide-test
	$(BIN)/python -m pytest -m "not slow" -n auto --maxprocesses 8 --dist worksteal

test-slow: $(VENV)/.tide-test
	$(BIN)/python -m pytest -m slow

$(VLLM_VENV)/.tide-vllm: $(SETUP_FILES)
	.ci/setup "$(PYTHON)" "$(VLLM_VENV)" vllm
	touch "$@"

test-vllm: $(VLLM_VENV)/.tide-vllm
	$(VLLM_VENV)/bin/python -m pytest tests/test_precompute_vllm.py

lint: $(VENV)/.tide-test
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy
	$(BIN)/lint-imports

clean:
	rm -rf .venv .venv-vllm .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache *.egg-info
