# make demo | test | test-gpu | gpu-report | bench | claims | lint | sanitize | clean.
# Each makes .venv, installs and builds what is missing first.
# Another torch:  make TORCH="torch" ...

TORCH ?= torch==2.13.0
PYTHON ?= python3
WORKERS ?= 2

# Extras of pyproject.toml. The tests' are 1.5 GB (triton, transformers), so the demo does without them.
DEMO_EXTRAS ?= demo graphs
TEST_EXTRAS ?= demo graphs test transformers

VENV := .venv
PY := $(VENV)/bin/python
# Modules compile when they are first imported: pip would compile all of torch's and sympy's, half of its time.
PIP := $(PY) -m pip install --quiet --disable-pip-version-check --no-compile
# By files, in the order of collection: the longest are first.
PYTEST = $(PY) -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder
DEPENDENCIES := $(VENV)/dependencies.stamp
TEST_DEPENDENCIES := $(VENV)/test-dependencies.stamp
LINT_DEPENDENCIES := $(VENV)/lint-dependencies.stamp
BUILD := build/build.stamp
SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh') setup.py
CPP_FILES = $(shell git ls-files '*.cpp' '*.h' '*.cu' '*.cuh')

.PHONY: build demo test test-gpu test-gpu-full gpu-report bench claims lint format sanitize clean

build: $(BUILD)

$(PY):
	$(PYTHON) -m venv $(VENV)

# The .pth file puts this folder on the path of the environment: an editable install that needs no second build.
$(DEPENDENCIES): pyproject.toml .ci/requirements.py Makefile | $(PY)
	$(PIP) "$(TORCH)"
	$(PIP) $$($(PY) .ci/requirements.py $(DEMO_EXTRAS))
	$(PY) -c "import sysconfig, pathlib; pathlib.Path(sysconfig.get_path('purelib'), 'compsparse_kernels.pth').write_text('$(CURDIR)\n')"
	touch $@

$(TEST_DEPENDENCIES): $(DEPENDENCIES)
	$(PIP) $$($(PY) .ci/requirements.py $(TEST_EXTRAS))
	touch $@

$(LINT_DEPENDENCIES): pyproject.toml .ci/requirements.py | $(PY)
	$(PIP) $$($(PY) .ci/requirements.py lint)
	touch $@

$(BUILD): $(DEPENDENCIES) $(SOURCES)
	@mkdir -p build
	$(PY) setup.py --quiet build_clib build_ext --inplace
	touch $@

demo: build
	$(PY) -m compsparse_kernels demo --report report

test: build $(TEST_DEPENDENCIES)
	$(PYTEST)

# Evidence about GPU kernels; none of it needs a GPU (python_tests/gpu/README.md).
test-gpu: build $(TEST_DEPENDENCIES)
	$(PYTEST) python_tests/gpu

test-gpu-full: build $(TEST_DEPENDENCIES)
	$(PYTEST) python_tests/gpu -m "long or not long"

gpu-report: build $(TEST_DEPENDENCIES)
	$(PY) -m python_tests.gpu.report

bench: build
	$(PY) -m benchmarks.run --suite quick

# The paper's claims as experiments, into benchmarks/results/claims.
claims: build $(TEST_DEPENDENCIES)
	$(PY) -m benchmarks.claims --json --plot

sanitize:
	$(MAKE) -C python_tests/sanitize -j2

lint: $(LINT_DEPENDENCIES)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/clang-format --dry-run --Werror $(CPP_FILES)

format: $(LINT_DEPENDENCIES)
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	$(VENV)/bin/clang-format -i $(CPP_FILES)

clean:
	rm -rf build dist *.egg-info report .pytest_cache .ruff_cache .hypothesis
	rm -f compsparse_kernels/*.so
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
