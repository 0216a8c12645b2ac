# Every target sets up what it needs by itself: the virtual environment, the pinned packages and, where a test needs
# a server that is missing, Debian's package of it (as root; otherwise it says what to install).

.DEFAULT_GOAL := help
.PHONY: help run test check bench clean lock

BIN := .venv/bin

help:  ## What can be done here
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 14

run: .venv/run.stamp  ## Start SutazAI on http://127.0.0.1:10010
	@$(BIN)/sutazai up

test: check .venv/servers.stamp  ## Every check and every test
	@scripts/test

check: .venv/dev.stamp  ## Format, lint, types, import contracts
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

bench: .venv/dev.stamp .venv/servers.stamp  ## Measure the request path beside its peers (about 20 minutes)
	@scripts/setup bench
	@$(BIN)/python -m bench.run
	@$(BIN)/python -m bench.traffic
	@$(BIN)/python -m bench.task_queues
	@$(BIN)/python -m bench.task_latency

lock:  ## Pin the newest versions that pyproject.toml allows
	@scripts/lock

clean:  ## Remove everything that was made here
	@rm -rf .venv .venv-bench .venv-patroni node_modules .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache dist

.venv/run.stamp: requirements.lock pyproject.toml scripts/setup
	@scripts/setup run

.venv/dev.stamp: requirements-dev.lock pyproject.toml scripts/setup
	@scripts/setup dev

.venv/servers.stamp: scripts/setup tests/patroni.lock .venv/dev.stamp
	@scripts/setup servers
