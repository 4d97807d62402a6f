# The project's commands. `make help` lists them.
#
#   make benchmark                                    everything, from a fresh machine
#   make benchmark ARGS="-p seed=1 -p preset=paper"   ARGS go to `prefect deployment run`
#   make benchmark PREFECT_PORT=4300 MLFLOW_PORT=5300 GPU_SLOTS=2 EXTRAS=text

PYTHON ?= python3
VENV ?= .venv
EXTRAS ?=
ARGS ?=

PY := $(VENV)/bin/python
empty :=
comma := ,
INSTALLED := $(VENV)/.installed$(if $(EXTRAS),-$(subst $(comma),-,$(EXTRAS)))
INSTALLED_TEST := $(VENV)/.installed-test
INSTALLED_DOCS := $(VENV)/.installed-docs
AUDIT := $(VENV)/audit

# Nothing that is run from here reports to anyone.
export DO_NOT_TRACK = 1
export PREFECT_SERVER_ANALYTICS_ENABLED = false
export MLFLOW_DISABLE_TELEMETRY = true
export HF_HUB_DISABLE_TELEMETRY = 1

.DEFAULT_GOAL := help
.PHONY: help benchmark up deploy status stop install test lint style types tests format docs pictures audit clean

help: ## this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

benchmark: $(INSTALLED) ## install, start the local stack, run the benchmark, print the comparison
	@$(PY) -m infra.local benchmark $(ARGS)

up: $(INSTALLED) ## install and start the local stack only
	@$(PY) -m infra.local up

deploy: $(INSTALLED) ## start what does not run, and deploy again
	@$(PY) -m infra.local up --deploy

status: $(INSTALLED) ## what of the stack runs, and where
	@$(PY) -m infra.local status || [ $$? -eq 3 ]  # 3: not all of it runs

stop: ## end what the stack started
	@if [ -x $(PY) ]; then $(PY) -m infra.local down; \
	 else echo "mta: no $(VENV), so nothing was started from here"; fi

install: $(INSTALLED) ## only the environment

# mypy takes one core, and tests wait for servers: side by side, and who fails is said at the end.
test: $(INSTALLED_TEST) ## lint, types, tests
	@$(MAKE) --no-print-directory style
	@$(MAKE) --no-print-directory -j2 types tests

lint: $(INSTALLED_TEST) ## ruff, which folder imports which, mypy
	@$(MAKE) --no-print-directory style
	@$(MAKE) --no-print-directory types

style:
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(VENV)/bin/lint-imports --no-logo

types:
	$(PY) -m mypy

tests:
	@$(PY) -m pytest -n 3 --dist loadfile --no-loadscope-reorder

docs: $(INSTALLED_DOCS) ## write the generated pages, build the site in site/, check its links
	@$(PY) -m tests.unit.docs.reference
	@NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict --quiet

pictures: $(INSTALLED_TEST) ## make the docs' pictures anew from the last run of the benchmark
	@$(PY) -m tests.benchmarks.pictures

format: $(INSTALLED_TEST) ## let ruff rewrite the code
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

# In an environment of its own: what it needs must not decide the versions that are run.
audit: ## known vulnerabilities of the pinned versions (asks PyPI)
	@test -x $(AUDIT)/bin/pip-audit || { $(PYTHON) -m venv $(AUDIT) && \
	  $(AUDIT)/bin/python -m pip install --quiet --disable-pip-version-check 'pip-audit>=2.10,<3'; }
	@$(AUDIT)/bin/pip-audit --strict --requirement constraints.txt --disable-pip --no-deps

clean: ## remove everything the stack keeps (.mta); refused while it runs
	@if [ -x $(PY) ]; then $(PY) -m infra.local clean; \
	 elif ls .mta/run/*.json >/dev/null 2>&1; then \
	   echo "mta: the stack may still run and $(VENV) is gone: end it by the pids in .mta/run" >&2; exit 1; \
	 else rm -rf .mta prefect.toml; fi

# One stamp for each set of extras: pip runs only when what is asked for has changed.
$(INSTALLED): WANT = $(if $(EXTRAS),.[$(EXTRAS)],.)
$(INSTALLED_TEST): WANT = .[test]
$(INSTALLED_DOCS): WANT = .[docs]
$(sort $(INSTALLED) $(INSTALLED_TEST) $(INSTALLED_DOCS)): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "mta: needs Python 3.11 or later, and '$(PYTHON)' is not: make PYTHON=python3.12" >&2; exit 1; }
	@test -x $(PY) || { echo "mta: creating $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@echo "mta: installing '$(WANT)' into $(VENV); the first time takes some minutes"
	@$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '$(WANT)'
	@touch $@
	@echo "mta: installed; '. $(VENV)/bin/activate' makes the command mta known"
