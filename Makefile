PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test test-fast test-versions lint docs aot build native-test lock clean

demo: build
	$(BIN)/python -m flamingo_kernels demo

# Triton is interpreted or not for a whole process: its tests have one of their own, beside the
# others. OpenMP threads that spin while they wait would take the cores from the other process.
test: export OMP_WAIT_POLICY = passive
test: build native-test
	$(BIN)/python -m pytest -q tests/triton > build/triton-tests.log 2>&1 & triton=$$!; \
	$(BIN)/python -m pytest -q --ignore=tests/triton; others=$$?; \
	wait $$triton; status=$$?; cat build/triton-tests.log; exit $$((others + status))

test-fast: build
	$(BIN)/python -m pytest -q -m "not slow" --ignore=tests/triton

# Before a release. Needs Python 3.11, git, and 20 GB of disk.
test-versions: $(STAMP)
	.ci/versions $(PYTHON) $(BIN)/python

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	find csrc -name '*.h' -o -name '*.cpp' | xargs $(BIN)/clang-format --dry-run -Werror

# The site of docs/, from Markdown and docstrings; a warning is a failure.
docs: $(STAMP)
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs build/docs
	@echo "== build/docs/index.html"

# Needs no GPU. Triton caches what it compiled, so that a second run is quick.
aot: $(STAMP)
	@echo "== compiling every Triton kernel for every architecture"
	$(BIN)/python -m flamingo_kernels.tools.aot --output benchmarks/results/aot.md

$(STAMP): requirements.lock requirements-peers.lock
	@echo "== installing the pinned packages into $(VENV) (downloads on the first run)"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -r requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps -r requirements-peers.lock
	@touch $@

# Ninja decides what is stale, so this runs every time; it takes a second when nothing changed.
build: $(STAMP)
	@echo "== building the native library"
	$(BIN)/python setup.py --quiet build_ext --inplace

WIDE_VECTORS := -DFLAMINGO_PORTABLE_VECTOR_BYTES=64 -DFLAMINGO_PORTABLE_TILE_VECTORS=4
# The second build also runs the tile shapes of AVX-512, lowered to what the machine has.
native-test: $(STAMP)
	@echo "== native tests: plain, then with the address and undefined-behaviour sanitizers"
	for options in "-DFLAMINGO_SANITIZE=OFF" \
	  "-DFLAMINGO_SANITIZE=ON $(WIDE_VECTORS)"; do \
	  PATH="$(abspath $(BIN)):$$PATH"; \
	  folder=build/native-tests-$$(echo $$options | cksum | cut -d' ' -f1); \
	  cmake -S . -B $$folder -G Ninja -DFLAMINGO_TESTS=ON $$options \
	  && cmake --build $$folder && ctest --test-dir $$folder --output-on-failure || exit 1; \
	done

# Pins for Python 3.10 and later, from the floors in pyproject.toml. Pins already in the file are
# kept (delete a line, or the file, to move it). Left out: what torch itself pins (CUDA), and
# packages of other systems.
lock:
	uv pip compile pyproject.toml --extra dev --universal --python-version 3.10 \
	  --no-annotate --no-header --quiet --output-file requirements.lock
	sed -i -E "/^(cuda|nvidia)-|sys_platform == '(win32|emscripten)'/d" requirements.lock

clean:
	rm -rf build dist *.egg-info flamingo_kernels/_cpp/libflamingo_cpu.so
	rm -rf .pytest_cache .ruff_cache .mypy_cache
