# make demo: build xfast in a virtual environment and judge the snapshots in examples/.
# make test: build it with everything that the tests need, and run them.
# make fuzz TIME=60: fuzz every target for so many seconds (TARGETS="elfcore xen" for some).
# All need Python 3.11+ with venv and headers, make and a C compiler; nothing else.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := pyproject.toml setup.py $(wildcard xfast/_core.py[xi] xfast/_core.pxd xfast/engine/*.py[xi] xfast/engine/*.px[di] xfast/engine/*.h)

.PHONY: demo test lint bench fuzz clean

demo: $(VENV)/.demo
	@echo
	@echo '$$ xfast check examples/snapshots --host examples/hosts intel-icelake-server@6.12'
	@$(BIN)/xfast check examples/snapshots --host examples/hosts intel-icelake-server@6.12; \
	  echo "exit code $$? (0: all can be restored, 1: something blocks, 2: something can't be judged)"
	@echo
	@echo '$$ xfast fix examples/snapshots/q72-kvm-pkru-leak-bv207.qemustate --host intel-broadwell@6.12 --dry-run'
	@$(BIN)/xfast fix examples/snapshots/q72-kvm-pkru-leak-bv207.qemustate --host intel-broadwell@6.12 --dry-run

test: $(VENV)/.test
	$(BIN)/python -m pytest

lint: $(VENV)/.test
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	PATH="$(CURDIR)/$(BIN):$$PATH" cython-lint xfast/  # it runs pycodestyle by name

bench: $(VENV)/.test
	$(BIN)/python -m pytest benchmarks

TIME ?= 60
TARGETS ?=
fuzz: $(VENV)/.fuzz
	$(BIN)/python fuzz/run.py --seconds $(TIME) $(TARGETS)

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
	@touch $@

$(VENV)/.fuzz: $(VENV)/.test
	PYTHONWARNINGS=ignore $(BIN)/pip install --quiet --editable '.[dev,fuzz]'
	@touch $@
