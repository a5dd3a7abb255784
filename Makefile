# Everything that a person or a CI machine runs. Each target does its own set-up (system packages,
# .venv, the build), and is quick when there is nothing left to do.

PYTEST_ARGS ?=
WORKERS     ?= 2
COMMAND     ?=

VENV   := .venv/bin
PYTEST := $(VENV)/python -m pytest
SUITE  := $(PYTEST) -n $(WORKERS) --dist worksteal --benchmark-disable --durations 10 --durations-min 5

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test test-fast test-kvm bench bench-kvm lint format fresh setup build build-all wheel asan ubsan tsan clean distclean

help: ## this list
	@echo "polyvisor: make TARGET"
	@sed -n 's/^\([a-z -]*\):.*## \(.*\)/  \1|\2/p' $(MAKEFILE_LIST) | column -t -s '|' 2>/dev/null || \
	 sed -n 's/^\([a-z -]*\):.*## \(.*\)/  \1: \2/p' $(MAKEFILE_LIST)

demo: setup ## boot Debian's cloud kernel, run a command in it (COMMAND='uname -a'), say what happened
	@scripts/build pv_python
	@$(VENV)/python scripts/demo.py $(if $(COMMAND),-- $(COMMAND))

test: build-all ## the whole test suite (PYTEST_ARGS='-k name -x' for a part of it)
	@timeout --foreground -k 30 1800 $(SUITE) $(PYTEST_ARGS)

test-fast: build-all ## the tests that take seconds: no booted kernels, nothing marked slow
	@timeout --foreground -k 30 600 $(SUITE) -m "not slow and not boot" $(PYTEST_ARGS)

test-kvm: build-all ## the tests that need KVM, of a wheel, on the real kvm-amd in an emulated PC
	@scripts/system-packages rig
	@timeout --foreground -k 30 1200 tests/rig/suite tests $(PYTEST_ARGS)

bench: setup ## run the benchmarks, save them in .benchmarks/, compare with the last saved run
	@scripts/system-packages bench
	@scripts/build pv_python
	@$(PYTEST) benchmarks --benchmark-only --benchmark-storage=file://.benchmarks --benchmark-autosave \
	  $(if $(wildcard .benchmarks/*/*.json),--benchmark-compare) --benchmark-sort=fullname \
	  --benchmark-columns=min,mean,stddev,rounds -o timeout=1800 $(PYTEST_ARGS)

bench-kvm: setup ## the benchmarks of engine kvm, in the emulated PC of make test-kvm
	@scripts/system-packages rig bench
	@scripts/build pv_python
	@timeout --foreground -k 30 3600 tests/rig/suite benchmarks $(PYTEST_ARGS)

lint: setup ## ruff, mypy --strict, clang-format: checks only
	@scripts/style check

format: setup ## rewrite all sources in the project's format
	@scripts/style format

fresh: ## make demo and make test in a new minimal Debian 12, nothing preinstalled
	@scripts/fresh.py

setup: # system packages and .venv
	@scripts/system-packages build run test image
	@scripts/venv

build: setup ## the extension modules, into python/polyvisor
	@scripts/build pv_python

build-all: setup
	@scripts/build all

wheel: setup ## dist/polyvisor-*.whl
	@$(VENV)/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .

asan ubsan tsan: setup ## the native tests under a sanitizer
	@cmake --preset $@ --log-level=WARNING
	@cmake --build --preset $@
	@ctest --preset $@ --timeout 600

clean: ## remove what was built (not .venv, not downloads)
	@rm -rf build dist python/polyvisor/*.so python/polyvisor/guest/init-* python/polyvisor/guest/agent-*

distclean: clean ## remove everything that is not in git's tree
	@rm -rf .venv .cache .benchmarks .pytest_cache .mypy_cache .ruff_cache .hypothesis
