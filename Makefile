# Everything that a developer or a newcomer runs. `make help` lists the targets.
VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= python3
PYTEST := $(BIN)/python -m pytest
# Most tests wait for packets and clocks, so a file more than this machine has cores runs at a time.
PARALLEL := --numprocesses 3 --dist loadfile
VM_TIMEOUT ?= 1800

.PHONY: help setup demo test test-vm check lint plugin manifests bench fuzz lock format clean
.DEFAULT_GOAL := help

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: $(VENV)/.ready ## install system packages (as root) and make .venv with all commands

$(VENV)/.ready: pyproject.toml requirements.lock install/development-packages.sh
	install/development-packages.sh
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes --requirement requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	touch $@

plugin: setup ## build the CNI plugin bundle: dist/trireme/trireme
	$(BIN)/python -m PyInstaller --noconfirm --log-level ERROR --distpath dist --workpath build cni_plugin/trireme.spec

demo: plugin ## two nodes, real pods, a policy change: who may reach whom (as root)
	$(BIN)/triremectl lab run --plugin dist/trireme/trireme demo

test: plugin lint ## all tests that this kernel can run (as root)
	$(PYTEST) $(PARALLEL) tests

test-vm: plugin ## tests marked stock_kernel, on Debian's own kernel under qemu (as root)
	install/vm-packages.sh
	$(BIN)/python tests/vm/suite.py --prepare
	$(BIN)/python tests/vm/boot.py --timeout $(VM_TIMEOUT) .venv/bin/python tests/vm/suite.py

check: lint ## format, lint, types, import rules, unit tests and what they cover: no root
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest --quiet --numprocesses auto --dist loadfile tests/unit tests/property
	$(BIN)/coverage combine --quiet
	$(BIN)/python -m tests.covered

lint: $(VENV)/.ready
	$(BIN)/ruff format --check --quiet .
	$(BIN)/ruff check --quiet .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

format: setup ## format and mend what ruff can
	$(BIN)/ruff check --quiet --fix .
	$(BIN)/ruff format --quiet .

manifests: setup ## render the Helm chart to plain manifests, and the settings to their file, schema and page
	$(BIN)/python install/settings_files.py
	$(BIN)/python install/render.py

bench: setup ## cost against no agent, alternating in one run (as root)
	$(BIN)/python -m benchmarks

fuzz: setup ## look for inputs that break a decoder: make fuzz TARGET=exchange SECONDS=600
	$(BIN)/python -m pip install --quiet --disable-pip-version-check atheris
	$(BIN)/python -m tests.fuzz $(or $(TARGET),exchange) --seconds $(or $(SECONDS),60)

lock: $(VENV)/.ready ## resolve requirements.lock anew from pyproject.toml
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip compile --quiet --upgrade --universal --python-version 3.11 --generate-hashes \
	    --custom-compile-command "make lock" --group pyproject.toml:dev pyproject.toml -o requirements.lock

clean: ## remove what the targets made
	rm -rf build dist trireme.egg-info $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache .coverage*
