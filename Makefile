# Every target first makes the checkout ready: Debian packages, .venv and the build (.ci/setup), only what is missing.
# `make PYTHON=/path/to/python3.12 test` chooses the interpreter.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

# Neither an active virtual environment nor these variables may reach the tools of .venv.
unexport PYTHONPATH PYTHONHOME PYTHONSTARTUP PYTHONOPTIMIZE PYTHONDONTWRITEBYTECODE VIRTUAL_ENV
PYTHON ?=
export PYTHON

BIN := .venv/bin
DEMO_ARGS ?=
PYTEST_ARGS ?=
BENCH_ARGS ?=
ATTACK_ARGS ?=
FAULTS_ARGS ?=
FUZZ_ARGS ?=
MOVES_ARGS ?=
# Tests wait for their processes a lot, so that some workers more than there are processors keep those busy.
WORKERS := $(shell n=$$(nproc); echo $$((n < 3 ? n + 2 : 4)))

.PHONY: help
help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-15s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: demo
demo: ## start a real local cluster and show what it does (DEMO_ARGS="--keep" keeps its files)
	@.ci/setup
	@$(BIN)/keyquorum demo $(DEMO_ARGS)

.PHONY: test
test: lint ## lint, then every test, on four workers (PYTEST_ARGS="-k token" chooses some, "-n 0" takes none)
	@$(BIN)/python -m pytest --numprocesses=$(WORKERS) --dist=loadfile --no-loadscope-reorder --timeout=600 $(PYTEST_ARGS)

.PHONY: lint
lint: ## ruff, mypy, import-linter and stubtest; any finding fails
	@.ci/setup test,lint
	@echo "lint: ruff"; $(BIN)/ruff check --quiet --output-format=concise . && $(BIN)/ruff format --check --quiet .
	@echo "lint: mypy"; $(BIN)/python -m mypy
	@echo "lint: import-linter"; $(BIN)/lint-imports --no-cache
	@echo "lint: stubtest"; MYPYPATH=src $(BIN)/python -m mypy.stubtest --mypy-config-file pyproject.toml \
		engine._fastshamir engine.client._fastline engine.client._histogram engine.client._router engine.client._zmtp \
		engine.protocol._fastlines engine.protocol._fastwire engine.protocol._nodestate \
		nodes._fastpath nodes._fasttoken nodes._usebuffer

.PHONY: bench
bench: ## run the benchmarks, saved as build/bench/latest.json (PYTEST_ARGS="--benchmark-save=before" keeps them)
	@.ci/setup test,lint
	@mkdir -p build/bench
	@$(BIN)/python -m pytest bench --benchmark-enable --benchmark-only --benchmark-json=build/bench/latest.json $(PYTEST_ARGS)

.PHONY: bench-compare
bench-compare: ## compare the ratios to their floors with the committed baseline
	@.ci/setup test,lint
	@$(BIN)/python bench/compare.py

.PHONY: bench-shamir
bench-shamir: ## measure the Shamir core beside its rivals (needs nasm, libisal2, libgfshare2); build/bench/shamir.json
	@.ci/setup test,bench
	@$(BIN)/python bench/shamir.py $(BENCH_ARGS)

.PHONY: bench-recycling
bench-recycling: ## a million loads of keys into a token, and what the memory grows by (10 minutes); build/bench/recycling.json
	@.ci/setup test,lint
	@$(BIN)/python bench/recycling.py $(BENCH_ARGS)

.PHONY: bench-resilience
bench-resilience: ## measure dead and stopped nodes, idle connections and floods (6 minutes); build/bench/resilience.json
	@.ci/setup test
	@$(BIN)/python bench/resilience.py $(BENCH_ARGS)

.PHONY: bench-datapath
bench-datapath: ## measure warm and cold operations beside the bare token, a bare echo and p11-kit; build/bench/datapath.json
	@.ci/setup test,bench
	@$(BIN)/python bench/datapath.py $(BENCH_ARGS)

.PHONY: bench-balancer
bench-balancer: ## measure forecast, programs, ticks and simulated routing beside their peers; build/bench/balancer.json
	@.ci/setup test,bench
	@$(BIN)/python bench/control_loop.py $(BENCH_ARGS)

.PHONY: bench-routing
bench-routing: ## slow tokens and kill nodes beside rivals, on a real cluster and in the simulator (5 minutes); build/bench/routing.json
	@.ci/setup test,bench
	@$(BIN)/python bench/routing.py $(BENCH_ARGS)

.PHONY: bench-lifecycle
bench-lifecycle: ## move 10,000 keys, refresh and create over their fsyncs, service meanwhile (10 minutes); build/bench/lifecycle.json
	@.ci/setup test,bench
	@$(BIN)/python bench/lifecycle.py $(BENCH_ARGS)

.PHONY: bench-scale
bench-scale: ## make up to 100,000 keys on 15 nodes, and the books of 50 (an hour; BENCH_ARGS="--keys 5000"); build/bench/scale.json
	@.ci/setup test,bench
	@$(BIN)/python bench/scale.py $(BENCH_ARGS)

.PHONY: stages
stages: ## say where the time of a warm AES-GCM goes, in client and node (BENCH_ARGS="--flame flame.svg --markdown")
	@.ci/setup test,bench
	@$(BIN)/python bench/stages.py $(BENCH_ARGS)

.PHONY: soak
soak: ## ten minutes of mixed load at 80 % of capacity while nodes die and come back (BENCH_ARGS="--seconds 60")
	@.ci/setup test
	@$(BIN)/python bench/soak.py $(BENCH_ARGS)

.PHONY: assurance
assurance: ## the long proofs: valgrind, timing, NEON, sanitizers, a million changed messages (20 minutes)
	@.ci/setup test,lint
	@tests/assurance/tools
	@KEYQUORUM_ASSURANCE=1 $(BIN)/python -m pytest tests/assurance tests/nodes/test_tampering.py tests/test_bench.py \
		tests/simulation --verbose $(PYTEST_ARGS)

.PHONY: moves
moves: ## 12,000 seeds of the simulation in which keys move (1.5 hours of two cores); MOVES_ARGS="--count 500" runs fewer
	@.ci/setup test
	@PYTHONHASHSEED=0 $(BIN)/python tests/simulation/run.py --moves --jobs $$(nproc) --count 12000 $(MOVES_ARGS)

.PHONY: attack
attack: ## attack a cluster that it starts (2 minutes); build/attack/report.md and .json; ATTACK_ARGS="--quick"
	@.ci/setup
	@$(BIN)/keyquorum attack --local --report build/attack/report $(ATTACK_ARGS)

.PHONY: fuzz
fuzz: ## ten million changed inputs for every decoder, and planted bugs; build/fuzz/report.txt (FUZZ_ARGS="--list")
	@.ci/setup test,lint
	@PYTHONHASHSEED=0 $(BIN)/python tests/fuzz/run.py $(FUZZ_ARGS)

.PHONY: crash
crash: ## kill -9 of each party at every named step, at random ones, power cuts (root); KEYQUORUM_CRASH_S bounds what is random
	@.ci/setup test,lint
	@KEYQUORUM_ASSURANCE=1 $(BIN)/python -m pytest -s tests/engine/test_cluster_matrix.py tests/engine/test_cluster_crashes.py \
		tests/engine/test_cluster_reshare.py tests/engine/test_cluster_faults.py tests/nodes/test_crash_points.py \
		tests/nodes/test_power_cut.py tests/nodes/test_rotation.py $(PYTEST_ARGS)

.PHONY: upgrade
upgrade: ## a rolling upgrade under load from the release before, which it builds from git's history (4 minutes)
	@.ci/setup test
	@KEYQUORUM_ASSURANCE=1 $(BIN)/python -m pytest -s tests/engine/test_cluster_upgrade.py $(PYTEST_ARGS)

.PHONY: faults
faults: ## play each fault of docs/faults.md on real processes (45 minutes); FAULTS_ARGS="--only NAME --seed N" runs one
	@.ci/setup test,lint
	@tests/faults/tools
	@$(BIN)/python tests/faults/matrix.py $(FAULTS_ARGS)

.PHONY: dist
dist: ## build the sdist and the wheel into dist/
	@.ci/setup test,lint
	@rm -rf dist
	@$(BIN)/python -m build --outdir dist .

.PHONY: clean
clean: ## remove everything that was built, .venv too
	@rm -rf .venv build dist *.egg-info src/*.egg-info src/engine/*.so src/engine/*/*.so nodes/*.so
	@rm -rf .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis .benchmarks
	@find src nodes balancer tests bench -name __pycache__ -type d -prune -exec rm -rf {} +
