.PHONY: demo test lint format clean

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
OFFLINE := HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

# libgomp's threads spin at barriers: on cores that others use too, that makes two of them slower than one. The demo's
# threads sleep instead; tests run on one thread in each of two processes.

# Quantize the bundled model, draw four pictures in 16 and in 4 bits: out/demo/contact-sheet.png and a table.
demo: $(STAMP)
	$(OFFLINE) GOMP_SPINCOUNT=0 $(BIN)/python demo/run.py

# The gate: everything that must hold before a change is taken.
test: lint
	OMP_NUM_THREADS=1 $(OFFLINE) $(BIN)/pytest -n 2 --dist worksteal

lint: $(STAMP)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

# Installed once, and again when the requirements change.
$(STAMP): pyproject.toml constraints.txt
	@set -e; for python in python3 python3.13 python3.12 python3.11 python3.14; do \
	  if "$$python" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then found=$$python; break; fi; \
	done; \
	if [ -z "$$found" ]; then echo "tonfa needs Python 3.11 or later with its venv module; none of python3 and python3.11 to python3.14 is one" >&2; exit 1; fi; \
	[ -x $(BIN)/python ] || "$$found" -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) out .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
