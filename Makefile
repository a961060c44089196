# make demo    PPO on real text, start to finish, from nothing but python3 and a C++ compiler
# make test    every test
# make lint    ruff, clang-format, mypy
# make docs    regenerate the tables that come from the code
#
# All of them work in .venv, made on first use. PYTHON chooses the interpreter, TORCH what pip installs as torch.

PYTHON ?= python3
TORCH ?= $(shell grep '^torch' constraints.txt)
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
SOURCES := $(shell git ls-files 'csrc/*.h' 'csrc/*.cpp' 2>/dev/null)

.PHONY: demo test lint format docs clean

demo: .venv/installed
	$(BIN)/ppo-kernels demo

test: .venv/installed
	$(BIN)/python -m pytest

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(SOURCES)
	$(BIN)/mypy

format: .venv/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(SOURCES)

docs: .venv/installed
	$(BIN)/python python_tests/readme.py --write

# An editable install that rebuilds the C++ part on import after a change.
.venv/installed: pyproject.toml constraints.txt
	test -d .venv || $(PYTHON) -m venv .venv
	$(PIP) install -q "$(TORCH)"
	$(PIP) install -q -c constraints.txt scikit-build-core pybind11 cmake ninja
	$(PIP) install -q -c constraints.txt --no-build-isolation -e ".[trainer,dev]" \
		-C editable.rebuild=true -C editable.verbose=false
	touch $@

clean:
	rm -rf .venv build
