# make install   the environment in .venv (exactly pinned)     make demo    the whole path in minutes, on 2 CPU ranks
# make check     lint, types, fast tests                       make test    what a change must pass, real S3 and Slurm included
# make test-all  also what takes minutes a test                make chaos   50 random kill -9 over each kind of run: 40 minutes
# make services  the Debian packages of tests/services, where this is root with apt-get
# Container images often set it. Each of the thousands of test processes would then compile this package anew.
unexport PYTHONDONTWRITEBYTECODE
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check install --quiet --constraint constraints.txt
RUN := $(CURDIR)/runs/demo

PACKAGES = $(shell $(PYTHON) -c 'from tests.services import browser, prometheus, radosgw, slurm; print(*browser.missing_packages(), *prometheus.missing_packages(), *radosgw.missing_packages(), *slurm.missing_packages())')

.PHONY: install demo test test-all chaos services check lint format constraints clean
.DELETE_ON_ERROR:

install: $(VENV)/.demo
demo: $(VENV)/.demo
	$(BIN)/ibq-scale demo --to $(RUN)

# The cores are for ranks and for tests side by side.
test test-all chaos check: export OMP_NUM_THREADS = 1

# More workers than the two cores, since the tests of Slurm and of hangs mostly wait.
WORKERS := 4
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --dist loadscope --no-loadscope-reorder

test: $(VENV)/.test
	$(PYTEST) -m "not long"

test-all: $(VENV)/.test
	$(PYTEST)

chaos: $(VENV)/.test
	$(BIN)/python -m tests.chaos --kills 50 --to runs/chaos.json

services:
	@if [ -n "$(PACKAGES)" ] && [ "$$(id -u)" = 0 ] && command -v apt-get > /dev/null; then \
	    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq --yes --no-install-recommends $(PACKAGES); \
	fi

check: $(VENV)/.dev lint
	$(BIN)/python -m pytest -n 2 -m "not (slow or long or distributed or services)"

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
