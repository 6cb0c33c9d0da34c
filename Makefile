# What developers need day to day. The two commands of the README: make demo, make test.
#
#   PYTHON=/path/to/python3   the interpreter to use (else the first fit one: scripts/pythons)
#   ARGS="-k plug -x"         passed on to pytest (make test) or to the demo (make demo)
#   SECONDS=3600 SEED=7       how long make soak goes on (600), and which seed it begins with (a new one)

VENV := .venv
BIN := $(VENV)/bin
ARGS ?=
export PYTHON

# A change of any of these means the shim or the metadata must be built again; plain Python is used in place.
BUILD_INPUTS := pyproject.toml setup.py MANIFEST.in $(shell find sparsemem/_sys/shim -name '*.[ch]') sparsemem/_sys/_build.py

.DEFAULT_GOAL := help
SECONDS ?= 600
SEED ?=

.PHONY: help demo test soak sanitize reliability docs-test fuzz lint format types wheel clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

demo: $(VENV)/.installed ## plug and unplug real memory on every kind of mapping, checked against the kernel
	$(BIN)/sparsemem demo $(ARGS)

test: $(VENV)/.testable ## run the tests (what needs root or huge pages is skipped with a reason)
	$(BIN)/python -m pytest $(ARGS)

soak: $(VENV)/.testable ## the state machine for SECONDS, over every kind of mapping; prints how to replay a failure
	SPARSEMEM_SOAK_SECONDS=$(SECONDS) SPARSEMEM_SOAK_SEED=$(SEED) $(BIN)/python -m pytest tests/stateful/soak.py $(ARGS)

sanitize: $(VENV)/.testable ## tests with the shim under AddressSanitizer and UBSan; the C harness under these and TSan
	scripts/sanitized-tests $(BIN)/python $(ARGS)
	$(BIN)/python -m pytest tests/sanitizers

reliability: $(VENV)/.testable ## run every test that shows a promise, and write docs/reliability.md
	SPARSEMEM_EVIDENCE=$(CURDIR)/build/evidence.json $(BIN)/python -m pytest -m promise $(ARGS)
	$(BIN)/python -m tests.support.reliability build/evidence.json docs/reliability.md

docs-test: $(VENV)/.testable ## run the examples of the README and the docs
	$(BIN)/python -m pytest tests/test_docs.py $(ARGS)

fuzz: $(VENV)/.testable ## a hostile guest and frontend: a million cases (about an hour; ARGS="--seed 7 --cases 1000")
	$(BIN)/python -m tests.virtio.fuzzing $(ARGS)

lint: $(VENV)/.tools ## style and common mistakes
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.tools ## put the code in order
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(VENV)/.tools ## mypy --strict
	$(BIN)/mypy

wheel: $(VENV)/.tools ## sdist and wheel in dist/, checked to be one wheel for every Python from 3.10 on
	rm -rf build dist
	$(BIN)/python -m build
	@ls dist/*-cp310-abi3-*.whl >/dev/null 2>&1 || { echo "not a cp310-abi3 wheel:"; ls dist; exit 1; }
	$(BIN)/abi3audit --strict --report dist/*.whl

clean: ## remove everything that was built, the environment too
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	rm -f sparsemem/_sys/_shim*.so sparsemem/_sys/_shim.c
	find sparsemem -name "*.o" -delete
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.python: scripts/pythons scripts/make-venv
	@python=$$(scripts/pythons) && echo "private environment in $(VENV), made with $$python" && \
		scripts/make-venv "$$python" $(VENV)
	@touch $@

# setuptools compares dates of the sources that it knows of only: the old build is removed, so a changed header counts.
$(VENV)/.installed: $(VENV)/.python $(BUILD_INPUTS)
	rm -rf build sparsemem/_sys/_shim*.so
	$(BIN)/python -m pip install --quiet --editable .
	@touch $@

$(VENV)/.testable: $(VENV)/.python $(BUILD_INPUTS)
	rm -rf build sparsemem/_sys/_shim*.so
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	@touch $(VENV)/.installed $@

$(VENV)/.tools: pyproject.toml | $(VENV)/.testable
	$(BIN)/python -m pip install --quiet --editable '.[test,dev]'
	@touch $@
