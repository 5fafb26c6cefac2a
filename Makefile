# Everything a newcomer needs: `make up` serves the demo model, `make test` runs the gates.
# ARGS goes to the command behind a target: make up ARGS="--decode 2 --port 8001", make test ARGS="-k hand_off".

SHELL := /bin/bash
VENV := .venv
ARGS ?=

INSTALLED_BY := pyproject.toml constraints.txt scripts/install scripts/install-torch

.DEFAULT_GOAL := help
.PHONY: help install dev up doctor browser test lint chaos compose-test wheels gpu-wheels clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(VENV)/.runtime ## make .venv with everything that serving needs; the command is .venv/bin/baton

dev: $(VENV)/.dev ## the same, with what the tests need

$(VENV)/.runtime: $(INSTALLED_BY)
	@scripts/install runtime
	@touch $@

$(VENV)/.dev: $(INSTALLED_BY)
	@scripts/install dev
	@touch $(VENV)/.runtime $@

up: install ## serve the demo model on port 8000; ARGS="--model ..." for another
	@$(VENV)/bin/baton up $(ARGS)

doctor: install ## say what this machine can do
	@$(VENV)/bin/baton doctor $(ARGS)

browser: ## install Chromium for the browser test, where apt and root allow it
	@scripts/install-browser

test: dev browser ## all gates: ruff, mypy, import-linter, pytest
	@scripts/check all $(ARGS)

lint: dev ## all gates but the tests
	@scripts/check lint

chaos: dev ## break a running fleet in every way, 20 times each, and print what its clients felt
	@PYTHONPATH=tests:. $(VENV)/bin/python -m chaos $(ARGS)

frameworks-test: dev ## install LiteLLM and LangChain into .venv, and test them against a running pipeline
	@$(VENV)/bin/python -m pip install --quiet -c constraints.txt -e ".[client,dev,frameworks]"
	@$(VENV)/bin/pytest tests/e2e/test_frameworks.py $(ARGS)

compose-test: dev ## build the image, run the fleet in containers, and kill one under load
	@$(VENV)/bin/python tests/compose/drive.py $(ARGS)

wheels: install ## download all wheels into deploy/wheels, for building the image without an index
	@scripts/fetch-wheels

gpu-wheels: install ## download into deploy/gpu-wheels what a GPU machine with its own PyTorch needs; ARGS=3.12 is its Python
	@scripts/fetch-gpu-wheels $(ARGS)

clean: ## remove .venv, caches and downloaded wheels
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis build *.egg-info
	rm -f deploy/wheels/*.whl deploy/gpu-wheels/*.whl
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
