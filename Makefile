# make demo: build xfast in a virtual environment and judge the snapshots in examples/.
# make test: build it with everything that the tests need, and run them.
# make san: build the engine with the address, undefined-behaviour and thread sanitizers, test that.
# make docs: the reference as a site in build/site.
# make lint: what reads the sources. make bench: the benchmarks beside numpy, some minutes.
# make fuzz TIME=60: fuzz every target for so many seconds (TARGETS="elfcore xen" for some).
# make fuzz-engine TIME=60: the same with the engine's C covered and under the address sanitizer;
# it needs clang.
# All need Python 3.11+ with venv and headers, make and a C compiler; nothing else.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := pyproject.toml setup.py $(wildcard xfast/_core.py[xi] xfast/_core.pxd xfast/engine/*.py[xi] xfast/engine/*.px[di] xfast/engine/*.h)

STUBBED := xfast._core $(patsubst xfast/engine/%.pyi,xfast.engine.%,$(wildcard xfast/engine/*.pyi))
SAN := build/san

.PHONY: demo test docs lint san bench fuzz fuzz-engine clean

demo: $(VENV)/.demo
	@echo
	@echo '$$ xfast check examples/snapshots --host examples/hosts intel-icelake-server@6.12'
	@$(BIN)/xfast check examples/snapshots --host examples/hosts intel-icelake-server@6.12; \
	  echo "exit code $$? (0: all can be restored, 1: something blocks, 3: something can't be judged)"
	@echo
	@echo '$$ xfast fix examples/snapshots/q72-kvm-pkru-leak-bv207.qemustate --host intel-broadwell@6.12 --dry-run'
	@$(BIN)/xfast fix examples/snapshots/q72-kvm-pkru-leak-bv207.qemustate --host intel-broadwell@6.12 --dry-run

test: $(VENV)/.test
	$(BIN)/python -m pytest -n 2 --dist worksteal --benchmark-disable

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

lint: $(VENV)/.test
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	PATH="$(CURDIR)/$(BIN):$$PATH" cython-lint xfast/ xfast/engine/*.px[id]  # runs pycodestyle by name
	$(BIN)/python -m mypy.stubtest --mypy-config-file pyproject.toml \
	  --allowlist tests/stubtest.txt --ignore-unused-allowlist --ignore-disjoint-bases $(STUBBED)

# A sanitizer's own allocator and handlers have to be there first. The thread sanitizer sees what the
# interpreter's lock orders, and needs address space randomization to be off.
san: $(VENV)/.test
	XFAST_SANITIZE=address,undefined $(BIN)/python setup.py -q build --build-base $(SAN) --build-lib $(SAN)/lib
	LD_PRELOAD="$$($(CC) -print-file-name=libasan.so)" ASAN_OPTIONS=detect_leaks=0 \
	  PYTHONMALLOC=malloc PYTHONSAFEPATH=1 PYTHONPATH=$(SAN)/lib XFAST_SANITIZED=address \
	  $(BIN)/python -m pytest -q -n 2 --benchmark-disable -p no:cacheprovider \
	  tests/engine/test_core.py tests/engine/test_core_bounds.py tests/engine/test_trial.py tests/xsave
	XFAST_SANITIZE=thread $(BIN)/python setup.py -q build --build-base $(SAN)/thread --build-lib $(SAN)/thread/lib
	LD_PRELOAD="$$($(CC) -print-file-name=libtsan.so)" TSAN_OPTIONS="halt_on_error=1 exitcode=66" \
	  PYTHONSAFEPATH=1 PYTHONPATH=$(SAN)/thread/lib XFAST_SANITIZED=thread \
	  $$(setarch -R true 2>/dev/null && echo setarch -R) \
	  $(BIN)/python -m pytest -q --benchmark-disable -p no:cacheprovider tests/xsave

bench: $(VENV)/.test
	$(BIN)/python -m pytest benchmarks

TIME ?= 60
TARGETS ?=
fuzz: $(VENV)/.fuzz
	$(BIN)/python fuzz/run.py --seconds $(TIME) $(TARGETS)

# libFuzzer's own library has to be there first, as the sanitizers have. PYTHONMALLOC=malloc: each
# object has an allocation of its own, whose end is watched.
FUZZED := build/fuzz
fuzz-engine: $(VENV)/.fuzz
	CC=clang LDSHARED="clang -shared" XFAST_SANITIZE=address,fuzzer-no-link \
	  $(BIN)/python setup.py -q build --build-base $(FUZZED) --build-lib $(FUZZED)/lib
	LD_PRELOAD="$$($(BIN)/python -c 'import atheris; print(atheris.path())')/asan_with_fuzzer.so" \
	  ASAN_OPTIONS=detect_leaks=0 PYTHONMALLOC=malloc XFAST_BUILT=$(FUZZED)/lib \
	  $(BIN)/python fuzz/run.py --seconds $(TIME) $(or $(TARGETS),core parsers)

clean:
	rm -rf $(VENV) build xfast/_core.c xfast/engine/*.c xfast/*.so xfast/engine/*.so *.egg-info

$(BIN)/pip:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip

$(VENV)/.demo: $(BIN)/pip $(SOURCES)
	PYTHONWARNINGS=ignore $(BIN)/pip install --quiet --editable '.[zstd]'
	@touch $@

$(VENV)/.test: $(BIN)/pip $(SOURCES)
	PYTHONWARNINGS=ignore $(BIN)/pip install --quiet --editable '.[dev]'
	@touch $(VENV)/.demo $@  # it holds all that the demo needs

$(VENV)/.fuzz: $(VENV)/.test
	PYTHONWARNINGS=ignore $(BIN)/pip install --quiet --editable '.[dev,fuzz]'
	@touch $@

$(VENV)/.docs: $(BIN)/pip pyproject.toml
	$(BIN)/pip install --quiet mkdocs-material 'mkdocstrings-python>=1.10'
	@touch $@
