# What one does with a checkout. `make` alone lists it.

PYTHON ?= python3
JOBS ?= 4
MINUTES ?= 30

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
DEVELOPED := $(VENV)/.developed
PROTO := fedsplit/transport/fedsplit.proto

export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Where it is set, each of the suite's many processes compiles every module anew.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help install run test test-all test-bits faults soak smol check docs deploy-check format proto release-check clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

install: $(INSTALLED) ## make .venv and install what constraints.txt pins

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "fedsplit needs Python 3.11 or newer, but $(PYTHON) is $$($(PYTHON) --version 2>&1);" \
	    "try: make install PYTHON=python3.11" >&2; exit 1; }
	@echo "Installing fedsplit into $(VENV). Its largest downloads are torch and Flower's Ray."
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt -e .
	@touch $@

$(DEVELOPED): $(INSTALLED)
	@echo "Installing what the tests and checks need, the extra dev."
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev]'
	@touch $@

run: install ## train the default experiment through `flwr run`; leaves runs/<name>/
	$(BIN)/python -m simulations.run launch=flwr

test: $(DEVELOPED) ## run all tests but the slow ones
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m "not slow"

test-all: $(DEVELOPED) ## run the whole suite
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal

# In a folder of its own: where peft finds bitsandbytes, each process that imports it takes seconds more.
test-bits: $(DEVELOPED) ## run the tests of quantized weights and 8-bit optimizers, with bitsandbytes
	$(BIN)/python -m pip install -q -c constraints.txt --no-deps --upgrade --target build/bits bitsandbytes
	PYTHONPATH=build/bits $(BIN)/python -m pytest -n $(JOBS) tests/core/test_quantization.py \
	  tests/core/test_eight_bit.py tests/edge/test_resume.py -k "quantiz or bit"

faults: $(DEVELOPED) ## kill processes of runs at every named point, and compare the weights
	mkdir -p runs
	$(BIN)/python -m simulations.bench faults --rows runs/faults.jsonl --json runs/faults.json

soak: $(DEVELOPED) ## train and generate under random faults for MINUTES; leaves runs/soak.png
	mkdir -p runs
	$(BIN)/python -m simulations.bench soak --minutes $(MINUTES) --json runs/soak.json

smol: $(DEVELOPED) ## train, serve and chat with a real model, and compare with transformers
	mkdir -p runs
	$(BIN)/python -m simulations.smol runs/smol --json runs/smol.json

check: $(DEVELOPED) ## format, lint, types, import rules
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(DEVELOPED) ## build the pages in docs/ as a site; a warning or a dead link is an error
	$(BIN)/sphinx-build -W --keep-going -q -c docs -d build/doctrees . build/docs

deploy-check: $(DEVELOPED) ## check the files in deploy/, with the tools that are installed
	$(BIN)/python -m pytest -rs -m "not slow" tests/edge/test_deploy.py

format: $(DEVELOPED) ## rewrite the code as `make check` wants it
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

proto: $(DEVELOPED) ## generate the code of the wire's schema again
	$(BIN)/python -m grpc_tools.protoc -I . --python_out=. --pyi_out=. $(PROTO)

release-check: $(DEVELOPED) ## build the sdist and the wheel, and use them with each Python there is
	$(BIN)/python -m simulations.release

clean: ## remove .venv and every cache; runs/ stays
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find fedsplit strategies simulations conf tests -name __pycache__ -type d -prune -exec rm -rf {} +
