# setup, serve, test, check: each does what it needs first.
PYTHON ?= python3
BIN := .venv/bin
ARGS ?=

.PHONY: setup serve test test-slow check format gpu-suite clean

setup: ## virtual environment with everything
	@PYTHON=$(PYTHON) scripts/setup.sh dev

serve: ## serve the embedded model on 127.0.0.1:30000; make serve ARGS="--model-path M"
	@PYTHON=$(PYTHON) scripts/setup.sh run
	$(BIN)/python -m alchemist.server $(ARGS)

test: setup ## all tests but the slow ones
	$(BIN)/python -m pytest -m "not slow and not gpu" $(ARGS)

test-slow: setup ## kill tests, and those of the others that start a server each for one more case
	$(BIN)/python -m pytest -m "slow" $(ARGS)

check: setup ## lint, format, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@mkdir -p .mypy_src/alchemist && for d in protocol server trainer kernels; do ln -sfn ../../$$d .mypy_src/alchemist/$$d; done
	MYPYPATH=.mypy_src $(BIN)/mypy -p alchemist.protocol -m alchemist.server.config -m alchemist.server.options -m alchemist.server.pool -m alchemist.server.ledger

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

gpu-suite: ## checks and benchmarks that need a GPU, without network; see docs/gpu_suite.md
	$(PYTHON) scripts/gpu_suite.py $(ARGS)

clean:
	rm -rf .venv .mypy_src build *.egg-info
