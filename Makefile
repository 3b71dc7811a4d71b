# make serve            the demo model, gRPC on localhost:50051 and HTTP on :8000; flags: ARGS="--port=8600 --layout=tp2x2"
# make test             the whole suite by two processes (WORKERS=0: in one); a part with ARGS="tests/meshes -k layout"
# make test-accelerator steps compiled for TPUs and GPUs that are not there (docs/accelerators.md); long downloads
# make lint             ruff, mypy and buildifier
# make bench            tokens per second against the bare executable (and what else is installed)
# make study            the goodput study (hours; ARGS="--config=quick" for a part; docs/simulator/simulator.md)
# make ladder           what can be deployed today against each part of this project (hours; docs/results/ladder.md)
# make demo             adaptive control against static layouts, live on a paced cell (ARGS=--quick: minutes)
# make cluster-demo     two cells behind one front door; one is killed under load, and the streams go on
# make gpu-check        numbers, bits and step times of an accelerator (EXTRA=cuda12); run again, it goes on; gpu-check.md
# make serve EXTRA=cuda12 (or cuda13, tpu) installs JAX for that accelerator; without it JAX runs on the CPU.
# PYTHON=/path/to/python3 chooses the interpreter that the virtual environment .venv is made with, and with it the JAX
# (constraints.txt); an environment of another interpreter is made anew.

PYTHON ?=
EXTRA ?=
ARGS ?=
# Where JAX finds no accelerator the CPU acts as this many devices.
DEVICES ?= 4
# Processes that run the tests; each needs about 2 GB, and one of them 11 GB for a while.
WORKERS ?= 2
BUILDIFIER ?= $(shell command -v buildifier 2>/dev/null)
BUILDIFIER_NPM := @bazel/buildifier@8.2.1
BUILDIFIER_ARGS = -mode=check -lint=warn MODULE.bazel $(shell find BUILD nitsum_jax tests tools benchmarks -name BUILD)

BIN := .venv/bin
RUNTIME := .venv/.runtime-$(EXTRA)
DEV := .venv/.dev-$(EXTRA)
PIP := PIP_NO_INPUT=1 PIP_DISABLE_PIP_VERSION_CHECK=1 $(BIN)/python -m pip install --quiet -c constraints.txt
comma := ,

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help serve test test-accelerator lint format bench study ladder gpu-check proto demo cluster-demo build-files
.PHONY: install clean

help:
	@sed -n '1,11s/^# //p' Makefile

serve: $(RUNTIME)
	exec env JAX_NUM_CPU_DEVICES=$(DEVICES) $(BIN)/nitsum-serve --model=smollm2-135m --http_port=8000 $(ARGS)

# A file is tested by one process, so that what its tests share is made once.  Without the last flag the files with the
# fewest tests would come last, and those are the longest.
test: $(DEV)
	$(BIN)/python -m pytest -n $(WORKERS) --dist=loadfile --no-loadscope-reorder $(ARGS)

# An environment for each compiler: JAX loads one kind of accelerator at a time, and what this needs is large.  Where it
# cannot be installed nothing is wrong with the project.
test-accelerator: .venv/.made
	@status=0; for extra in tpu cuda12; do \
		if $(MAKE) --no-print-directory .venv-$$extra/.made; then \
			.venv-$$extra/bin/python -m pytest -n $(WORKERS) --dist=loadgroup tests/accelerator $(ARGS) || status=1; \
		else \
			echo "steps are not compiled for $$extra: jax[$$extra] cannot be installed here (see above)"; \
		fi; \
	done; exit $$status

.venv-%/.made: .venv/.made pyproject.toml constraints.txt
	@rm -rf .venv-$* && .venv/bin/python -m venv .venv-$*
	@PIP_NO_INPUT=1 PIP_DISABLE_PIP_VERSION_CHECK=1 .venv-$*/bin/python -m pip install --quiet -c constraints.txt \
		-e '.[$*]' hypothesis pytest pytest-xdist || { rm -rf .venv-$*; exit 1; }
	@touch $@

study: $(DEV)
	$(BIN)/python -m nitsum_jax.sim.study.main $(ARGS)

ladder: $(DEV)
	$(BIN)/python -m nitsum_jax.sim.study.ladder.main $(ARGS)

gpu-check: $(RUNTIME)
	$(BIN)/nitsum-bench gpu-check --markdown=gpu-check.md --json=gpu-check.json $(ARGS)

lint: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python tools/generate_build.py --check
	@if [ -n "$(BUILDIFIER)" ]; then set -x; "$(BUILDIFIER)" $(BUILDIFIER_ARGS); \
	elif command -v npx >/dev/null 2>&1; then set -x; npx --yes $(BUILDIFIER_NPM) $(BUILDIFIER_ARGS); \
	else echo "buildifier is not installed: the form of the BUILD files was not checked (BUILDIFIER=path names one)"; fi

format: $(DEV)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(RUNTIME)
	$(BIN)/python benchmarks/engine/decode.py $(ARGS)

# The stubs of the gRPC service; they are committed, so that only those who change the .proto need the compiler.
proto: $(DEV)
	$(BIN)/python -m nitsum_jax.server.proto.generate

# Adaptive control against static layouts, live at the pace of 8 accelerators; ARGS=--quick is shorter.
demo: $(DEV)
	$(BIN)/nitsum-bench demo $(ARGS)

# Two cells of a tiny model, 32 streams, and kill -9 in their midst.
cluster-demo: $(DEV)
	$(BIN)/python -m benchmarks.server.cluster_demo $(ARGS)

build-files: $(DEV)
	$(BIN)/python tools/generate_build.py

install: $(DEV)

clean:
	rm -rf .venv .venv-* build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find nitsum_jax tests tools benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

# Not up to date where PYTHON names another interpreter than it was made with.
ASK := -c 'import sys; print(sys.version, sys.base_prefix)'
ifneq ($(PYTHON),)
ifneq ($(shell "$(PYTHON)" $(ASK)),$(shell test -x .venv/bin/python && .venv/bin/python $(ASK)))
.PHONY: .venv/.made
endif
endif

# The first interpreter that is new enough, unless PYTHON names one.
.venv/.made:
	@set -e; for python in $(or $(PYTHON),python3 python3.13 python3.12 python3.11); do \
		if "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then found=$$python; break; fi; \
	done; \
	if [ -z "$$found" ]; then \
		echo "nitsum-jax needs Python 3.11 or newer and found none: install one, or name it with PYTHON=/path/to/python3" >&2; \
		exit 1; \
	fi; \
	if ! "$$found" -m venv --clear .venv; then \
		rm -rf .venv; \
		echo "$$found could not make a virtual environment: install its venv module (on Debian: python3-venv)" >&2; \
		exit 1; \
	fi; \
	touch $@

# A stamp per set of extras: installed again only when what it was made from changes.
$(RUNTIME): .venv/.made pyproject.toml constraints.txt
	$(PIP) -e '.$(if $(EXTRA),[$(EXTRA)])'
	@touch $@

$(DEV): $(RUNTIME)
	$(PIP) -e '.[dev$(if $(EXTRA),$(comma)$(EXTRA))]'
	@$(PIP) -e '.[ray]' || echo "ray cannot be installed here (see above): tests of nitsum-cluster are skipped"
	@touch $@
