# One command per duty; CI runs the same ones. Every target sets up what it needs.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
DEMO := runs/demo-3bit

.PHONY: help install demo test test-all check fix docs bench

help: ## this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

install: $(READY) ## make .venv with the project and all that its tests need

$(READY): pyproject.toml .ci/constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or later is needed; set PYTHON=") if sys.version_info < (3, 11) else 0'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint .ci/constraints.txt --editable '.[dev]'
	@touch $@

demo: $(READY) ## compress the built-in model to 3 bits, evaluate original and compressed, print one table
	$(BIN)/llmsqueeze quantize demo --bits 3 --out $(DEMO) --overwrite
	$(BIN)/llmsqueeze eval $(DEMO) --baseline demo --tasks demo_stories

test: $(READY) ## run the tests, but for those marked as thorough
	$(BIN)/python -m pytest -m "not thorough" --numprocesses auto --maxprocesses 4 --dist loadfile

test-all: $(READY) ## run all tests
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile

check: $(READY) ## lint, formatting and strict types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

fix: $(READY) ## repair what the linter and formatter can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY) ## quality of every method on the built-in model at 2, 3 and 4 bits
	$(BIN)/python evals/methods.py demo demo demo --limit 100

docs: $(READY) ## write the tables of recipes/README.md and cli/schema/README.md from the code
	$(BIN)/python -m llmsqueeze.recipe.markdown recipes/README.md
	$(BIN)/python -m llmsqueeze.cli.schema.markdown
