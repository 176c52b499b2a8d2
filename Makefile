# Two commands on a fresh machine (Python >= 3.10 and g++ >= 11): `make bench` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
JOBS := $(shell nproc 2>/dev/null || echo 2)
# What development was tested with; the package itself asks for torch >= 2.10.
TORCH := torch==2.13.0
export MAX_JOBS ?= $(JOBS)

INSTALLED := $(VENV)/installed
BUILD_INPUTS := $(wildcard csrc/*.* csrc/*/*.*) CMakeLists.txt setup.py pyproject.toml

.PHONY: bench test acceptance wheel lint clean
.DEFAULT_GOAL := help

help:
	@echo "make bench | test | acceptance | wheel | lint | clean"

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip "setuptools>=77" wheel

$(INSTALLED): $(BIN)/python $(BUILD_INPUTS)
	$(BIN)/pip install --quiet $(TORCH) "pybind11>=2.13" "cmake>=3.24" ninja
	$(BIN)/pip install --quiet --no-build-isolation -e ".[dev]" $(TORCH)
	@touch $@

# The main job: RealNVP on real data with the kernels and with the reference, samples, every op against its rivals.
bench: $(INSTALLED)
	@rm -rf run/fused run/reference; mkdir -p run
	$(BIN)/pyflowgen train realnvp --data digits --path fused --out run/fused
	$(BIN)/pyflowgen train realnvp --data digits --path reference --out run/reference
	$(BIN)/pyflowgen evaluate run/fused
	$(BIN)/pyflowgen sample run/fused -n 64 --grid run/samples.png
	$(BIN)/pyflowgen gallery --out run/gallery.png --seconds 3
	$(BIN)/pyflowgen bench --quick --minutes 4 --rows run/rows.csv --html run/report.html \
		--run fused=run/fused --run reference=run/reference --samples run/samples.png --gallery run/gallery.png

# Two processes, each with whole files (some take 2 GB): most of the time goes to programs of one thread that tests compile and run.
test: $(INSTALLED)
	$(BIN)/python -m pytest -q -n 2 --dist loadfile

# The long rows of trained systems, fused and reference.
acceptance: $(INSTALLED)
	$(BIN)/python -m pytest -q -m slow

# For machines other than this one: manylinux, torch's own libraries left out.
wheel: $(INSTALLED)
	rm -rf build/wheel
	$(BIN)/pip wheel --quiet --no-deps --no-build-isolation -w build/wheel .
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/auditwheel repair --exclude 'libtorch*' --exclude 'libc10*' -w dist build/wheel/*.whl
	@ls dist

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'csrc/*.cuh')

clean:
	rm -rf build dist run *.egg-info pyflowgen/*.so $(INSTALLED)
