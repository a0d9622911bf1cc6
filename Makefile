# make demo   installs into .venv and trains the embedded default
# make test   installs the test extra and runs the tests, of what is a matrix a part: for while one works
# make test-full   all of them, the whole matrix of methods, shapes and peft's options: what CI runs
# make check  linter, formatter, type checker, and that imports lead down
# make lock   resolves pyproject.toml into requirements.lock and requirements-oldest.lock; what is locked already
#             stays where it may, LOCK_ARGS=--upgrade takes the newest of everything
# make test-oldest, make test-newest   the contract on both ends of pyproject.toml's ranges; -fast: a part of it
# make test-machines   what is sensitive to the last bit, as other processors would compute it
# make contract   runs the contract tests and writes their table into docs/contract.md
# make backbones  verifies methods on every causal LM of transformers; writes iapt/verified.json, docs/backbones.md
# make docs     makes the pages that come from the code anew, then the site, into site/
# make mutants    breaks the engine on purpose, in a copy; every break must fail a contract test
# Everything lives in .venv (.venv-oldest, .venv-newest, .venv-lock); the stamp files in them make a second call quick.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-full check lock test-oldest test-oldest-fast test-newest test-newest-fast test-machines contract backbones docs mutants clean

demo: .venv/installed
	$(BIN)/iapt-train

# One thread each: the workers share the cores, and small tensors gain nothing from more.
PYTEST := -m pytest -n auto --maxprocesses 4 --durations=15

test: .venv/installed-test
	OMP_NUM_THREADS=1 $(BIN)/python $(PYTEST)

test-full: test
	OMP_NUM_THREADS=1 $(BIN)/python $(PYTEST) --full -m full

check: .venv/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

contract: .venv/installed-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 2 --durations=15 --full -p tests.contracts.table \
	  tests/contracts --deselect tests/contracts/test_table.py --contract-table docs/contract.md

backbones: .venv/installed-test
	OMP_NUM_THREADS=1 $(BIN)/python -m scripts.verify_backbones

docs: .venv/installed-test
	$(BIN)/python -m scripts.settings_page
	$(BIN)/python -m scripts.methods_page
	$(BIN)/mkdocs build --strict

mutants: .venv/installed-test
	OMP_NUM_THREADS=1 $(BIN)/python scripts/mutants.py

# Fewer vector units, other kernels and other thread counts give sums of another order, as another processor would.
test-machines: .venv/installed-test
	OMP_NUM_THREADS=1 ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 $(BIN)/python $(PYTEST) --full $(SENSITIVE)
	OMP_NUM_THREADS=2 ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 $(BIN)/python $(PYTEST) --full $(SENSITIVE)

SENSITIVE := $$(grep -rlE 'torch\.(equal|testing|allclose)' tests)

clean:
	rm -rf .venv .venv-oldest .venv-newest .venv-lock

# The locks are constraints, not requirements: pip takes the locked version of what it needs and nothing else, so one
# file serves the bare install, every extra and every platform. As environment variables they also reach the build of
# source distributions (the second one since pip 25.3), which `-c` does not.
install = PIP_CONSTRAINT=$(1) PIP_BUILD_CONSTRAINT=$(1) $(2)/bin/python -m pip install
# CUDA's libraries are left out: every build of torch names the versions it needs, and a CPU build needs none.
compile = .venv-lock/bin/uv pip compile -q --universal --python-version 3.11 --no-annotate \
  --custom-compile-command 'make lock' pyproject.toml -o $(1) $(2) && sed -i.all -E '/^(nvidia-|cuda-|triton)/d' $(1)

.venv/bin/python .venv-oldest/bin/python .venv-newest/bin/python .venv-lock/bin/python:
	$(PYTHON) -m venv $(@:/bin/python=)

.venv/installed: pyproject.toml requirements.lock | .venv/bin/python
	$(call install,requirements.lock,.venv) -e .
	touch $@

.venv/installed-test: pyproject.toml requirements.lock | .venv/bin/python
	$(call install,requirements.lock,.venv) -e '.[test]'
	touch $@ .venv/installed

.venv-lock/bin/uv: | .venv-lock/bin/python
	.venv-lock/bin/python -m pip install -q uv

lock: .venv-lock/bin/uv
	$(call compile,requirements.lock,--all-extras $(LOCK_ARGS))
	$(call compile,requirements-oldest.lock,--extra test --resolution lowest-direct $(LOCK_ARGS))
	sed -i.all '/^torch==/d' requirements-oldest.lock
	rm requirements.lock.all requirements-oldest.lock.all

# The oldest end: the lowest version of every range (on Python 3.11 or 3.12, which those versions know). Torch is not
# in its lock: on PyPI the older releases bring gigabytes of CUDA to a machine that may have no GPU, so it is the locked
# one unless another is asked for (make test-oldest TORCH=2.11.0).
TORCH ?= $(shell sed -n 's/^torch==\([^ ;]*\).*/\1/p' requirements.lock)

.venv-oldest/installed-$(TORCH): pyproject.toml requirements-oldest.lock | .venv-oldest/bin/python
	$(call install,requirements-oldest.lock,.venv-oldest) torch==$(TORCH) -e '.[test]'
	rm -f .venv-oldest/installed-*
	touch $@

# The contract, and the commands. The fast form: all methods, with rotary and with learned positions.
test-oldest test-newest: SELECTED := --full tests/contracts tests/test_releases.py
test-oldest-fast test-newest-fast: SELECTED := --full tests/contracts tests/test_releases.py \
  -k 'llama or gpt2 or releases'

test-oldest test-oldest-fast: .venv-oldest/installed-$(TORCH)
	OMP_NUM_THREADS=1 .venv-oldest/bin/python $(PYTEST) $(SELECTED)

# The newest end: what the ranges allow today. Where that is what is locked, `make test-full` has tested it.
test-newest test-newest-fast: .venv-lock/bin/uv .venv-newest/bin/python
	$(call compile,.venv-newest/requirements.lock,--all-extras --upgrade)
	@if diff requirements.lock .venv-newest/requirements.lock; then \
	  echo "test-newest: skipped, the newest versions that the ranges allow are the locked ones"; \
	else \
	  $(call install,.venv-newest/requirements.lock,.venv-newest) -q -e '.[test]' && \
	  OMP_NUM_THREADS=1 .venv-newest/bin/python $(PYTEST) $(SELECTED); \
	fi
