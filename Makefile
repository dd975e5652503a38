# Two commands for a fresh machine with Python ≥ 3.11: `make demo` and `make test`. Each sets itself up in .venv.
# `make demo DATA=file-or-folder` trains on other text than Python's own library.

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
  $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test lint generated clean

demo: $(VENV)/torch
	@mkdir -p out
	@for optimizer in adamw sgd; do for scaling in heads-fixed head-dim-fixed; do \
	  $(BIN)/widthwise derive gated_deltanet --optimizer $$optimizer --scaling $$scaling || exit 1; \
	  $(BIN)/widthwise derive gated_deltanet --optimizer $$optimizer --scaling $$scaling --format toml \
	    --output out/gated_deltanet-$$optimizer-$$scaling.toml || exit 1; \
	done; done
	@$(BIN)/widthwise explain gated_deltanet a_proj --optimizer sgd > out/proof-a_proj-sgd.txt
	@echo; echo "Under out/: the four rule tables as TOML, and the proof of one rule (proof-a_proj-sgd.txt), which ends:"
	@tail -n 4 out/proof-a_proj-sgd.txt
	@echo; echo "Now a minute of training, by the module and the model that these commands make (out/gated_deltanet_*.py):"
	@echo "    widthwise generate gated_deltanet"; echo "    widthwise generate gated_deltanet --emit model"
	$(BIN)/widthwise demo $(if $(DATA),--data "$(DATA)")

test: lint
	$(BIN)/python -m pytest

lint: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/mypy
	PYTHONPATH=src $(BIN)/lint-imports

generated: $(VENV)/dev
	$(BIN)/widthwise check --write tests/golden generated kernels

$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "widthwise needs Python 3.11 or newer: set PYTHON=/path/to/python3" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/torch: $(VENV)/bin/python pyproject.toml constraints.txt
	$(PIP) --editable '.[torch]'
	@touch $@

$(VENV)/dev: $(VENV)/bin/python pyproject.toml constraints.txt
	$(PIP) --editable '.[dev,torch,plot,peers]'
	$(PIP) --no-deps mup==1.0.0
	@touch $@ $(VENV)/torch

clean:
	rm -rf $(VENV) out build *.egg-info src/*.egg-info
