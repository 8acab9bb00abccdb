# Recipes that people and CI share. `make demo MODEL=... PROMPT="..."`, `make chat`, `make test`, `make lint`, `make docs`.

# The first Python that is new enough and can make virtual environments (Debian splits ensurepip off into python3-venv).
PYTHON ?= $(shell for python in python3 python3.11 python3.12 python3.13; do \
	$$python -c 'import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	&& echo $$python && break; done)

export MODEL PROMPT

.PHONY: demo chat test test-rest test-all test-quick lint docs format size bench-quick soak attack
.DELETE_ON_ERROR:

demo: .venv/all.stamp
	@.venv/bin/splitnet demo $${MODEL:+"$$MODEL"} $${PROMPT:+--prompt="$$PROMPT"}

chat: .venv/all.stamp
	@.venv/bin/splitnet demo $${MODEL:+"$$MODEL"} --serve --port $(or $(PORT),8000)

# Which tests these run, the tests say: see tests/tiers.py. `test-all` is `test` and `test-rest` in one.
test: .venv/dev.stamp
	@.venv/bin/python -m pytest -q

test-rest: .venv/dev.stamp
	@.venv/bin/python -m pytest -q --tier=rest

test-all: .venv/dev.stamp
	@.venv/bin/python -m pytest -q --tier=all

# In one process: `make test-quick FILE=tests/unit/wire/test_codecs.py` or `FILE="tests/unit -k codecs"`.
test-quick: .venv/dev.stamp
	@.venv/bin/python -m pytest -q -n0 --durations=0 --durations-min=1 $(FILE)

lint: .venv/dev.stamp
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/pyright

docs: .venv/dev.stamp
	@NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --strict

# How large the product is, and what one decode token passes; for the figures before a change: `.venv/bin/python -m benchmarks.size ROOT`.
size: .venv/dev.stamp
	@.venv/bin/python -m benchmarks.size --trace

# How fast blocks decode on this processor, beside transformers and the memory; fails below its bounds. A minute.
bench-quick: .venv/dev.stamp
	@.venv/bin/python -W ignore -m benchmarks.quick

# Needs root on Linux, see docs/netlab.md.
soak: .venv/dev.stamp
	OMP_NUM_THREADS=1 .venv/bin/python -m benchmarks.soak $${MODEL:+"$$MODEL"} --minutes $(or $(MINUTES),10)

# Ten minutes of known attacks on daemons and a gateway of this machine, beside honest clients.
attack: .venv/dev.stamp
	OMP_NUM_THREADS=1 .venv/bin/python -m benchmarks.attack $${MODEL:+"$$MODEL"} --minutes $(or $(MINUTES),10)

format: .venv/dev.stamp
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

.venv/bin/python:
	@test -n "$(PYTHON)" || { echo "No Python 3.11 or newer with venv found:" \
		"install it (Debian: apt install python3 python3-venv) or name one with PYTHON=..." >&2; exit 1; }
	@echo "Creating .venv with $(PYTHON)"
	@$(PYTHON) -m venv .venv

# Kernels for one version of Python alone, as they were before, would be taken before those for all.
.venv/all.stamp: pyproject.toml $(wildcard splitnet/native/*) | .venv/bin/python
	@echo "Installing splitnet into .venv (some minutes the first time)"
	@rm -f splitnet/quant/_kernels.cpython-*
	@.venv/bin/python -m pip install --disable-pip-version-check --editable ".[all]"
	@touch $@

.venv/dev.stamp: pyproject.toml $(wildcard splitnet/native/*) | .venv/bin/python
	@echo "Installing splitnet and its development tools into .venv (some minutes the first time)"
	@rm -f splitnet/quant/_kernels.cpython-*
	@.venv/bin/python -m pip install --quiet --disable-pip-version-check --editable ".[dev]"
	@touch .venv/all.stamp $@
