# The commands of keven_core. Everything installs what it needs into .venv; `make help` lists them.
SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python
NODES ?= 1
SOURCES := $(wildcard src_cython/*.pxd src_cython/keven_core/_native/*.pyx src_cython/keven_core/_native/*.pxd)

.PHONY: help demo test bench soak lint debug asan tsan kafka kafka-stop clean doctor

help:  ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

doctor:
	@PYTHON="$(PYTHON)" tools/doctor

$(VENV)/.installed: pyproject.toml
	@PYTHON="$(PYTHON)" tools/doctor
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --upgrade pip
	$(PY) -m pip install --quiet 'setuptools>=77' 'cython>=3.1,<4'
	touch $@

# An editable install that builds the compiled modules in place; again when a source changes.
$(VENV)/.built: $(VENV)/.installed $(SOURCES) setup.py
	$(PY) -m pip install --quiet --no-build-isolation --editable '.[demo]'
	$(PY) setup.py --quiet build_ext --inplace -j2
	touch $@

$(VENV)/.test: $(VENV)/.built
	$(PY) -m pip install --quiet --no-build-isolation --editable '.[demo,test]'
	touch $@

demo: $(VENV)/.built  ## build, then 200 000 events through registered handlers
	$(PY) -m keven_core.demo

test: $(VENV)/.test  ## everything needed, then all tests, in parts side by side
	@tools/rdkafka-headers
	$(PY) tools/test_in_parts.py

$(VENV)/.bench: $(VENV)/.test
	$(PY) -m pip install --quiet --no-build-isolation --editable '.[demo,test,bench]'
	touch $@

bench: $(VENV)/.bench  ## the benchmarks, on KAFKA or a broker of their own
	$(PY) -m benchmarks

soak: $(VENV)/.bench  ## long runs: memory over 10^7 messages read and 10^8 written, long fault runs
	$(PY) -m benchmarks.consume --soak
	$(PY) -m benchmarks.produce --soak
	$(PY) -m pytest -m soak --timeout 7200

$(VENV)/.lint: $(VENV)/.test
	$(PY) -m pip install --quiet --no-build-isolation --editable '.[demo,test,lint,bench]'
	touch $@

lint: $(VENV)/.lint  ## ruff, cython-lint, mypy --strict, stubtest
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	PATH="$(abspath $(VENV))/bin:$$PATH" cython-lint src_cython
	$(VENV)/bin/mypy
	$(PY) -m mypy.stubtest keven_core._native --concise --allowlist tools/stubtest-allowlist

debug: $(VENV)/.test  ## -O0 build with bounds checks, then unit, embedded and memory tests on it
	rm -rf build/debug && mkdir -p build/debug
	KEVEN_DEBUG=1 $(PY) setup.py --quiet build_ext --build-lib build/debug --build-temp build/debug/temp -j2
	tools/with-build build/debug $(VENV)/bin/pytest tests/unit tests/embedded tests/memory

asan: $(VENV)/.test  ## AddressSanitizer and UBSan build, then unit, embedded and memory tests on it
	tools/asan $(VENV)/bin

tsan: $(VENV)/.test  ## ThreadSanitizer build, then embedded and memory tests on it (Linux)
	tools/tsan $(VENV)/bin

kafka: $(VENV)/.test  ## start a real Kafka on this machine (NODES=3 for three)
	$(PY) -m keven_core.testing.real_kafka start --nodes $(NODES)

kafka-stop: $(VENV)/.test  ## end it and wipe its data
	$(PY) -m keven_core.testing.real_kafka stop

clean:  ## remove builds and the virtual environment
	rm -rf build $(VENV) keven_core/_native/*.so
