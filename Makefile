# make install   the environment in .venv (exactly pinned)     make demo    the whole path in minutes, on 2 CPU ranks
# make test      all tests                                     make check   lint, types, fast tests
# make chaos     50 random kill -9 over a tokenizer run and 50 over a transformer's: about 40 minutes on 2 cores
# make services  the Debian packages of tests/services, where this is root with apt-get
# Images of Linux often set it: each of the thousands of processes of the tests would then compile this package anew.
unexport PYTHONDONTWRITEBYTECODE
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check install --quiet --constraint constraints.txt
RUN := $(CURDIR)/runs/demo

PACKAGES = $(shell $(PYTHON) -c 'from tests.services import browser, radosgw, slurm; print(*browser.missing_packages(), *radosgw.missing_packages(), *slurm.missing_packages())')

.PHONY: install demo test chaos services check lint format constraints clean
.DELETE_ON_ERROR:

install: $(VENV)/.demo
demo: $(VENV)/.demo
	$(BIN)/ibq-scale demo --to $(RUN)

# The cores are for ranks and for tests side by side.
test chaos check: export OMP_NUM_THREADS = 1

# Two at a time, since much of it waits; a file stays in one process, which makes what its tests share once.
test: $(VENV)/.test
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not services and not alone"
	$(BIN)/python -m pytest -m "services or alone"

chaos: $(VENV)/.test
	$(BIN)/python -m tests.chaos --kills 50 --to runs/chaos.json

services:
	@if [ -n "$(PACKAGES)" ] && [ "$$(id -u)" = 0 ] && command -v apt-get > /dev/null; then \
	    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq --yes --no-install-recommends $(PACKAGES); \
	fi

check: $(VENV)/.dev lint
	$(BIN)/python -m pytest -n 2 -m "not slow and not distributed and not alone"

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# torch first: DeepSpeed asks for it while it is built, so its build runs in this environment and not in one of its own.
$(VENV)/.base: constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch torchvision setuptools wheel ninja packaging hatchling editables
	DS_BUILD_OPS=0 $(PIP) --no-build-isolation deepspeed
	@touch $@

$(VENV)/.demo $(VENV)/.test $(VENV)/.dev: $(VENV)/.%: $(VENV)/.base pyproject.toml
	$(PIP) --no-build-isolation --editable ".[$*]"
	@touch $@

constraints: $(VENV)/.dev
	{ sed -n '1,/^[^#]/{/^#/p}' constraints.txt; $(BIN)/pip freeze --exclude-editable; } > constraints.new
	mv constraints.new constraints.txt

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache
