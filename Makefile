# The oldest Python that is supported, if it is there. `make test PYTHON=python3.13` picks another.
PYTHON ?= $(shell python3.11 -c 'import sys; print(sys.executable)' 2>/dev/null || echo python3)
RUN = .venv/bin/python -m
# How many processes the tests run in: more than there may be cores, for many tests wait for others.
# `make test JOBS=` runs them in one, as a debugger wants it.
JOBS ?= --numprocesses 3 --dist worksteal

.PHONY: help
help: ## Show this help
	@sed -n 's/^\([a-z0-9-]*\):.* ## \(.*\)/\1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

.PHONY: demo
demo: .venv/installed ## Run the example app and a worker; Ctrl-C ends both (PORT=..., ONCE=1)
	@$(RUN) tests.postgres --data .postgres/demo -- $(RUN) example_app.demo

.PHONY: shell
shell: .venv/installed ## Open a shell with the package and a throw-away PostgreSQL
	@PATH="$(CURDIR)/.venv/bin:$$PATH" $(RUN) tests.postgres -- bash --norc

.PHONY: test
test: .venv/installed ## Run the tests but the slow ones (ARGS="-k name" picks some)
	@$(RUN) tests.postgres --fast -- $(RUN) pytest $(JOBS) -m "not slow" $(ARGS)

.PHONY: test-all
test-all: .venv/installed ## Run all tests, with coverage
	@$(RUN) coverage erase
	@$(RUN) tests.postgres --fast -- $(RUN) coverage run -m pytest $(JOBS) $(ARGS); status=$$?; \
	$(RUN) coverage combine --quiet; $(RUN) coverage report; exit $$status

.PHONY: test-psycopg
test-psycopg: .venv/installed ## Run them with psycopg 3, on PostgreSQL 16
	@TEST_DRIVER=psycopg $(RUN) tests.postgres --fast --version 16 -- $(RUN) pytest $(JOBS) -m "not slow" $(ARGS)

.PHONY: test-sqlalchemy20 test-lowest
test-sqlalchemy20: ## Run them with SQLAlchemy 2.0
test-lowest: ## Run them with the oldest releases that are supported
test-sqlalchemy20 test-lowest: test-%: .venv-%/installed
	@.venv-$*/bin/python -m tests.postgres --fast -- .venv-$*/bin/python -m pytest $(JOBS) -m "not slow" $(ARGS)

# PostgreSQL 15 is Debian's (postgresql-15), where PyPI has none. `make test-matrix VERSIONS=16` runs a part.
VERSIONS ?= 15 16 18
DRIVERS ?= psycopg2 psycopg
.PHONY: test-matrix
test-matrix: .venv/installed .venv-sqlalchemy20/installed ## Run them on each PostgreSQL, SQLAlchemy and driver
	@failed=0; for version in $(VERSIONS); do for venv in .venv .venv-sqlalchemy20; do \
	for driver in $(DRIVERS); do \
		echo "PostgreSQL $$version, $$venv, $$driver"; \
		TEST_DRIVER=$$driver $$venv/bin/python -m tests.postgres --fast --version $$version -- \
			$$venv/bin/python -m pytest $(JOBS) --quiet -m "not slow and not browser" $(ARGS) || failed=1; \
	done; done; done; exit $$failed

.PHONY: bench
bench: .venv-bench/installed ## Measure this queue beside bare loops and other queues
	@.venv-bench/bin/python -m tests.postgres -- .venv-bench/bin/python -m benchmarks.redis -- \
		.venv-bench/bin/python -m benchmarks.run $(ARGS)

.PHONY: bench-quick
bench-quick: .venv/installed ## Measure this queue beside bare loops, in a few minutes
	@$(RUN) tests.postgres -- $(RUN) benchmarks.run --quick $(ARGS)

.PHONY: chaos
chaos: .venv/installed ## Put the queue through faults under load (ARGS="--list" lists them)
	@$(RUN) tests.chaos $(ARGS)

.PHONY: soak
soak: .venv/installed ## Let a worker work at full speed, and see what grows (ARGS="--minutes 60")
	@$(RUN) tests.chaos.soak $(ARGS)

.PHONY: chaos-others
chaos-others: .venv-bench/installed ## Put other queues through the same: killed workers, a crashed database
	@for system in beanqueue procrastinate; do \
		.venv-bench/bin/python -m tests.chaos --system $$system \
			$(if $(OUTPUT),--output $(OUTPUT)-$$system.json) \
			$(or $(ARGS),"PostgreSQL crashes" "a worker killed" "a worker frozen") || true; \
	done

.PHONY: lint
lint: .venv/installed ## Check the style
	@$(RUN) ruff check
	@$(RUN) ruff format --check

.PHONY: format
format: .venv/installed ## Mend the style
	@$(RUN) ruff check --fix
	@$(RUN) ruff format

.PHONY: types
types: .venv/installed ## Check the types
	@$(RUN) mypy

.PHONY: clean
clean: ## Remove everything that make, Python and the tools made
	rm -rf .venv .venv-* .postgres build dist htmlcov .coverage .coverage.*
	rm -rf .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -prune -exec rm -rf {} +

# SQLAlchemy 2.0.16 is the oldest that Flask-SQLAlchemy 3.1 takes; the package's own lower bounds
# are read from pyproject.toml, so that what is promised there is what is tested.
.venv/installed: INSTALL = '.[dev]'
.venv-sqlalchemy20/installed: INSTALL = '.[test]' 'sqlalchemy<2.1'
.venv-lowest/installed: INSTALL = '.[test]' 'sqlalchemy==2.0.16' \
	$(shell sed -n '/^dependencies/,/^]/s/.*"\(.*\)>=\([^"]*\)".*/\1==\2/p' pyproject.toml)
.venv-bench/installed: INSTALL = . --requirement benchmarks/requirements.txt
.venv-bench/installed: benchmarks/requirements.txt

.venv/installed .venv-sqlalchemy20/installed .venv-lowest/installed .venv-bench/installed: pyproject.toml
	@echo "Installing into $(@D)"
	@$(PYTHON) -m venv $(@D)
	@$(@D)/bin/python -m pip install --quiet --disable-pip-version-check --editable $(INSTALL)
	@touch $@
