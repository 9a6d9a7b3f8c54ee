# `make` alone lists the targets. Everything is installed into .venv, at the versions in constraints.txt.

PYTHON ?= python3
PORT ?= 8000
MODEL ?= embedded
ARGS ?=
TORCH_ARGS ?=

BIN := .venv/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help serve test clients install check tables gpu smol smol-results

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile
	@echo
	@echo "  PORT=8000       where to serve          PYTHON=python3  makes .venv: 3.11 or later"
	@echo "  MODEL=embedded  what to serve: embedded, embedded-dense, smol or a directory"
	@echo "  ARGS=...        more arguments for what the target runs"
	@echo "  TORCH_ARGS=...  more arguments for 'pip install torch', such as --index-url for another build"

serve: .venv/.installed ## serve MODEL on PORT
	@$(BIN)/espalier serve $(MODEL) --port $(PORT) $(ARGS)

test: .venv/.installed-dev ## run the tests, two files at a time
	@$(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

clients: .venv/.installed ## OpenAI's clients and those built on it, in .venv-clients, against a server of .venv
	$(PYTHON) -m venv .venv-clients
	.venv-clients/bin/python -m pip install -q --disable-pip-version-check -r tests/clients/requirements.txt
	PATH="$(CURDIR)/.venv-clients/bin:$$PATH" npm --prefix tests/clients/js ci --silent
	PATH="$(CURDIR)/.venv-clients/bin:$$PATH" SERVER_PYTHON=$(BIN)/python .venv-clients/bin/python -m pytest -q --confcutdir=tests/clients -o filterwarnings=default \
		$(ARGS) tests/clients

tables: .venv/.installed-dev ## make the pages of results in docs/ from the stored runs
	@$(BIN)/python -m evals.pruning_report
	@$(BIN)/python -m evals.routing_report
	@$(BIN)/python -m evals.smol_report
	@$(BIN)/python -m evals.pruning_report --runs docs/runs/smol_pruning.jsonl --out docs/smol_pruning_results.md

smol-results: .venv/.installed-data ## run what docs/smol_results.md lacks, on a GPU if ARGS says so; stopped, it goes on
	@$(BIN)/python -m evals.smol_sweep $(ARGS)

gpu: ## on a CUDA card, in nine minutes: tests, parity, and speed at 7B against transformers and the card's limits
	@python=$(PYTHON); if ! $$python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2> /dev/null; then \
		python=$(BIN)/python; [ -e .venv/.installed-dev ] || $(MAKE) .venv/.installed-dev; fi; \
	$$python -m benchmarks.gpu $(ARGS)

smol: .venv/.installed-data ## train smol in runs/smol: 16 minutes on an H200 and 15 cores that draw; stopped, it goes on where it was
	@$(BIN)/python -m checkpoints.smol.train $(ARGS)

install: .venv/.installed ## prepare .venv, nothing else

check: .venv/.installed-dev ## ruff, mypy and the import arrows: what CI runs beside the tests
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_layering.py

# torch comes first and pinned: a loose range would pull several gigabytes of another build.
.venv/.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) $(TORCH_ARGS) "$$(grep '^torch==' constraints.txt)"
	$(PIP) setuptools
	$(PIP) --no-build-isolation -e .
	@touch $@

.venv/.installed-dev: .venv/.installed
	$(PIP) --no-build-isolation -e '.[dev]'
	@touch $@

.venv/.installed-data: .venv/.installed
	$(PIP) --no-build-isolation -e '.[data]'
	@touch $@

$(BIN)/python:
	@command -v $(PYTHON) > /dev/null || { echo "$(PYTHON) not found: install Python 3.11 or later, or say make PYTHON=/path/to/python" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit("Espalier needs Python 3.11 or later, and $(PYTHON) is %d.%d; say make PYTHON=/path/to/python" % v[:2])'
	@$(PYTHON) -m venv .venv || { rm -rf .venv; echo "$(PYTHON) cannot make a virtual environment; on Debian and Ubuntu, install python3-venv" >&2; exit 1; }
