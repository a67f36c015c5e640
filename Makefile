# Every command of the project. `make` alone lists them.

PYTHON ?= python3.11
SEEDS  ?= 200
BROKERS ?= 3
AUTH ?=
MONITORING ?=
ARGS   ?=

BIN := .venv/bin
DISTRIBUTIONS := sdk services/common services/coordinator services/broker testing
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help venv demo test test-all test-containers check check-format check-lint check-types check-imports check-tidy format sim sim-mutants chaos bench bench-compare up up-ha roll down wheels images lock docs clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# -- environment ------------------------------------------------------------------------------------

venv: .venv/.stamp ## the environment in .venv, with exactly the pinned versions

.venv/.stamp: requirements/dev.txt $(DISTRIBUTIONS:%=%/pyproject.toml) sdk/hatch_build.py $(wildcard sdk/codec/*)
	@echo "venv: installing into .venv; a minute or two"
	@$(PYTHON) -m venv .venv
	@$(PIP) install --require-hashes --requirement requirements/dev.txt
	@$(PIP) install --no-deps --no-build-isolation $(DISTRIBUTIONS:%=--editable %)
	@touch $@

lock: venv ## rewrite requirements/*.txt from requirements/*.in
	@scripts/lock $(ARGS)

docs: venv ## rewrite the pages that are made from code
	@$(BIN)/python scripts/error_table.py
	@$(BIN)/python scripts/dashboards.py
	@$(BIN)/python scripts/metric_table.py

# -- see it run -------------------------------------------------------------------------------------

demo: venv ## three brokers over TLS, 200,000 records, a kill -9 in the middle, and the count at the end
	@$(BIN)/ferryline demo $(ARGS)

bench: venv ## throughput and latency beside librdkafka, on this machine
	@$(BIN)/ferryline bench $(ARGS)

bench-compare: venv ## beside Kafka, RabbitMQ, NATS and Redis; installs what it can: make bench-compare ARGS=--quick, ARGS=--only-queues
	@scripts/peers/install
	@$(BIN)/python -m benchmarks.compare $(ARGS)

# -- prove it ---------------------------------------------------------------------------------------

test: venv ## all tests that need neither docker nor root
	@$(BIN)/python -m pytest $(ARGS)

test-all: venv ## all tests; installs and starts what they need (Debian, root)
	@scripts/install-parts etcd redis-server prometheus gcc chromium
	@scripts/install-oidc >/dev/null || echo "NOT RUN: logging in with an OIDC issuer from npm"
	@scripts/with-docker $(BIN)/python -m pytest --docker --root --slow --etcd --redis --prometheus $(ARGS)

test-containers: venv ## the tests of the compose cluster; installs and starts docker if need be (Debian, root)
	@scripts/with-docker $(BIN)/python -m pytest --docker -m docker $(ARGS) tests/integration

sim: venv ## the seeded simulation: make sim SEEDS=2000
	@$(BIN)/python -m tests.simulation --seeds $(SEEDS) --jobs 2 $(ARGS)

chaos: venv ## real processes broken by a seeded plan, every record accounted for: make chaos ARGS='--minutes 5 --seed 7'
	@$(BIN)/ferryline chaos --minutes 1 $(ARGS)

sim-mutants: venv ## every seeded bug, which the simulation must catch
	@$(BIN)/python -m tests.simulation.mutants $(ARGS)

check: check-format check-lint check-types check-imports check-tidy ## what must be clean before a commit (make -k check: all findings)
	@echo "check: clean"

check-format: venv
	@$(BIN)/ruff format --check --quiet --output-format concise .

check-lint: venv
	@$(BIN)/ruff check --quiet --output-format concise .

check-types: venv
	@$(BIN)/mypy

check-imports: venv
	@$(BIN)/lint-imports --no-logo >.venv/lint-imports.log || { cat .venv/lint-imports.log; exit 1; }
	@tail -n 1 .venv/lint-imports.log

check-tidy: venv
	@$(BIN)/python -m pytest -q -p no:randomly --no-header --tb=line tests/unit/test_tidy.py

format: venv ## let ruff format and mend what it can
	@$(BIN)/ruff check --quiet --fix . || true
	@$(BIN)/ruff format .

# -- containers -------------------------------------------------------------------------------------

wheels: venv ## the five distributions, in dist/: the same bytes from the same sources
	@rm -rf dist && mkdir dist
	@SOURCE_DATE_EPOCH=$${SOURCE_DATE_EPOCH:-$$(git log -1 --format=%ct 2>/dev/null || echo 1700000000)} \
	 $(PIP) wheel --no-deps --no-build-isolation --wheel-dir dist $(DISTRIBUTIONS:%=./%)
	@ls dist

images: export FERRYLINE_REVISION ?= $(shell git rev-parse HEAD 2>/dev/null || echo unknown)
images: ## the images of coordinator and broker
	@scripts/compose build

up: images ## a compose cluster: make up BROKERS=5; make up AUTH=1 MONITORING=1 with access control, Prometheus, Grafana
	@scripts/compose-prepare $(if $(AUTH),--auth)
	@scripts/compose $(if $(MONITORING),--profile monitoring) up --detach --scale broker=$(BROKERS)
	@scripts/compose exec -T coordinator python3 /usr/local/bin/ferryline-entrypoint python3 /usr/local/bin/ferryline-settled $(BROKERS)
	@scripts/compose ps
	@scripts/compose-prepare --say

up-ha: images ## the same with three coordinators on three etcd members; keep its data apart: FERRYLINE_VOLUMES=...
	@scripts/compose-prepare $(if $(AUTH),--auth)
	@FERRYLINE_STORE=etcd \
	 FERRYLINE_COORDINATORS=https://coordinator:8443,https://coordinator-2:8443,https://coordinator-3:8443 \
	 scripts/compose --profile ha up --detach --scale broker=$(BROKERS)

roll: images ## replace every container of the compose cluster by one of this tree, one at a time, under load
	@scripts/roll

down: ## stop the compose cluster; its data stays under docker_volumes/
	@scripts/compose --profile ha --profile monitoring down

clean: ## remove what was built and cached; data and .venv stay
	@rm -rf dist build .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	@find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +
