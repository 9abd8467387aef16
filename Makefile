# Everything runs in .venv, which is made on first use from the versions in constraints.txt.
PYTHON ?= python3
BIN := .venv/bin
UV := $(BIN)/uv
INSTALL := $(UV) pip install --quiet --constraint constraints.txt --build-constraint constraints.txt
export UV_SYSTEM_CERTS ?= 1

.PHONY: demo test check check-lock lock format bench clean

demo: .venv/.demo
	$(BIN)/python examples/demo.py

test: .venv/.dev
	$(BIN)/pytest -q -n auto --dist worksteal

check: .venv/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(MAKE) check-lock
	$(MAKE) test

check-lock: $(UV)
	$(BIN)/python .ci/check_lock.py

# Keeps the pins that still fit; `make lock UPGRADE=1` takes the newest.
lock: $(UV)
	UV_CUSTOM_COMPILE_COMMAND="make lock" $(UV) pip compile --quiet $(if $(UPGRADE),--upgrade) \
		--universal --python-version 3.10 --no-python-downloads --only-binary :all: --no-annotate \
		--extra dev --group build --output-file constraints.txt pyproject.toml
	$(MAKE) check-lock

format: .venv/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: .venv/.dev
	$(BIN)/python benchmarks/startup.py
	$(BIN)/python benchmarks/memory.py
	$(BIN)/python benchmarks/apply.py
	$(BIN)/python benchmarks/rehearsal.py
	$(BIN)/python benchmarks/stream.py
	$(BIN)/python benchmarks/training.py

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(UV): constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt uv
	touch $@

# What a user installs, with what compiles the codec.
.venv/.demo: $(UV) pyproject.toml
	$(INSTALL) --editable '.[jit]'
	touch $@

# The CPU build of torch where its index can be reached; else the build that pip finds, which can take gigabytes.
.venv/.dev: .venv/.demo
	UV_HTTP_RETRIES=0 $(INSTALL) --torch-backend cpu torch \
		|| $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(INSTALL) --editable '.[dev]'
	touch $@

# The codec on processors that qemu-user emulates: two x86-64 ones that lack what newer ones have, and arm64.
EMULATED := -m pytest -q -n 2 --dist worksteal tests/codec tests/test_fixtures.py tests/test_roundtrip.py
.PHONY: test-cpus test-arm64

test-cpus: build/x86-64-v2/.installed build/x86-64-v3/.installed
	build/x86-64-v2/bin/python $(EMULATED)
	build/x86-64-v3/bin/python $(EMULATED)

test-arm64: build/arm64/.installed
	build/arm64/bin/python $(EMULATED)

build/%/.installed: tests/processors/emulate.sh .venv/.installed
	tests/processors/emulate.sh $* build/$*
	touch $@
