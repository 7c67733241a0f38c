# The two commands of this repository are `make reproduce` and `make test`. Each sets up what it needs (the virtual
# environment .venv) and then does its job; a second call finds the set-up done.
# `make PYTHON=/path/to/python ...` chooses the Python.

SHELL := /bin/bash
.DELETE_ON_ERROR:
.PHONY: help reproduce reproduce-all models test test-all coverage test-tl4 lint docs pins bench notebooks clean

RECENT := import sys; sys.exit(sys.version_info < (3, 10))
PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11 python3.10; do \
	$$python -c '$(RECENT)' 2>/dev/null && echo $$python && break; done)

# $(1) virtual environment, $(2) constraints, $(3) what to install
define install
	@$(if $(PYTHON),$(PYTHON),false) -c '$(RECENT)' || { echo "p0circuit needs Python 3.10 or newer, and" \
		"'$(or $(PYTHON),python3)' is not; name one: make PYTHON=/path/to/python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@echo "Installing $(3) into $(1) as pinned in $(2): a few minutes, once."
	@$(PYTHON) -m venv $(1)
	@$(1)/bin/python -m pip install --quiet --disable-pip-version-check --constraint $(2) --editable '$(3)'
	@touch $@
endef

help:
	@echo "make reproduce      test every claim on SmolLM2-135M (downloaded once), p0-nano and the training runs; see out/report.html"
	@echo "make reproduce-all  the same on Gemma 3 270M, wired and all shipped models too, with 1,024 prompts: hours"
	@echo "make models         download the named real models, checked by hash (about 330 MB)"
	@echo "make test           lint, types and the quick tests: at most 10 minutes on two cores"
	@echo "make test-all       all tests, with the slow ones, the notebooks and the documentation"
	@echo "make coverage       the same, and the coverage of the package by lines and branches"
	@echo "make test-tl4       models and backends on TransformerLens 4, in an environment of its own"
	@echo "make lint           ruff, pyright, import-linter and codespell alone"
	@echo "make docs           the documentation site, which opens offline: site/index.html"
	@echo "make notebooks      build the shipped notebooks, with outputs, from their Python sources"
	@echo "make bench          measure speed and memory; writes docs/performance.md"
	@echo "make pins           resolve all pinned versions anew: uv.lock and the constraints (needs uv)"
	@echo "make clean          remove what make made"

reproduce: .venv/.runtime
	.venv/bin/p0circuit reproduce

reproduce-all: .venv/.runtime
	.venv/bin/p0circuit reproduce --all

models: .venv/.runtime
	.venv/bin/p0circuit fetch smollm2-135m gemma3-270m

# One process per core, one thread in each: the models are small.
PYTEST := OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n logical --dist loadfile

test: lint
	$(PYTEST) -m "not slow and not docs"

test-all: lint
	$(PYTEST)

coverage: .venv/.dev
	$(PYTEST) --cov --cov-report=term:skip-covered --cov-report=json:.coverage.json

test-tl4: .venv-tl4/.dev
	.venv-tl4/bin/python -m pytest tests/backends tests/models

lint: .venv/.dev
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	PYRIGHT_PYTHON_IGNORE_WARNINGS=1 .venv/bin/pyright --pythonpath .venv/bin/python
	.venv/bin/lint-imports
	.venv/bin/codespell p0circuit tests benchmarks notebooks docs *.md

docs: .venv/.dev
	NO_MKDOCS_2_WARNING=1 .venv/bin/python -m mkdocs build --strict --quiet
	@echo "site/index.html opens in a browser, without a network"

notebooks: .venv/.dev
	.venv/bin/p0circuit notebooks build --all

bench: .venv/.dev
	.venv/bin/p0circuit bench --into docs/performance.md
	.venv/bin/python -m benchmarks.growth docs/performance.md

# The one place where versions are chosen. uv is not among the pinned tools: install it with `pip install uv`.
pins:
	uv lock --upgrade
	{ grep '^#' constraints.txt; uv export --quiet --frozen --all-extras --no-hashes --no-annotate --no-header \
		--no-emit-project; } > .constraints.tmp && mv .constraints.tmp constraints.txt
	{ grep '^#' constraints-tl4.txt; uv pip compile --quiet --universal --python-version 3.10 --extra dev --no-header \
		--no-annotate -c <(printf 'torch==2.13.0\ntransformer-lens==4.3.0\n') --no-config pyproject.toml; \
		} > .constraints.tmp && mv .constraints.tmp constraints-tl4.txt

clean:
	rm -rf .venv .venv-tl4 out site dist .cache .pytest_cache .ruff_cache notebooks/.ruff_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +

# `reproduce` waits for no test tool; the first of each pair holds what the second adds to.
.venv/.runtime: pyproject.toml constraints.txt
	$(call install,.venv,constraints.txt,.)

.venv/.dev: .venv/.runtime
	$(call install,.venv,constraints.txt,.[dev])

.venv-tl4/.dev: pyproject.toml constraints-tl4.txt
	$(call install,.venv-tl4,constraints-tl4.txt,.[dev])
