# Every target sets up what it needs: a virtual environment in .venv with the versions pinned in
# constraints.txt. Set PYTHON to choose an interpreter (3.11 or 3.12). `make help` lists the targets.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export PIP_CONSTRAINT := constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# For the CPU kernels of the tests and the demo; it does not affect CUDA.
export OMP_NUM_THREADS ?= 1

.PHONY: help demo test test-quick mutants chaos tour check bench bench-gpu docs clean

help:
	@echo "make demo        encode, train, sample and score on handwritten digits (2 to 5 minutes)"
	@echo "make test        lint, check types, and run all tests (25 to 50 minutes on 2 cores)"
	@echo "make test-quick  run the unit, property, golden and architecture tests only (2 to 3 minutes)"
	@echo "make mutants     mutation testing: apply 100 small changes that the tests must detect"
	@echo "make chaos       long fault-injection campaigns: training, encoding, SLURM, pods (about 3 hours)"
	@echo "make tour        run every command of docs/tour.md in a fresh clone (about 15 minutes)"
	@echo "make check       run ruff and mypy"
	@echo "make bench       run the benchmarks in their short form (about a minute)"
	@echo "make bench-gpu   measure training, sampling and encoding on a GPU, into runs/bench (under 10 minutes)"
	@echo "make docs        build the documentation as a site into build/site"
	@echo "make vendor      fetch uPlot, the library of the report's charts, from npm (after a change of its version)"
	@echo "make clean       remove the virtual environment and the demo run"

$(VENV)/torch: constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "no $(PYTHON): install Python 3.11 or 3.12, or set PYTHON="; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' \
		|| { echo "$(PYTHON) is $$($(PYTHON) -V): this project runs on Python 3.11 and 3.12; set PYTHON="; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null \
		|| { echo "no venv module: apt-get install python3-venv (or python3.11-venv)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@bash demo/install_torch.sh $(BIN)/pip
	@touch $@

# Dependencies of the demo; `ready` adds those of the tests.
$(VENV)/demo: $(VENV)/torch pyproject.toml
	@echo "set-up 2/3: DeepSpeed, Ray, diffusers and their dependencies (about 300 MB)"
	@$(BIN)/pip install --quiet --editable '.[demo]'
	@touch $@

$(VENV)/ready: $(VENV)/demo
	@echo "set-up 3/3: additional dependencies of the tests (about 450 MB)"
	@$(BIN)/pip install --quiet --editable '.[dev]'
	@$(BIN)/pip install --quiet --no-deps trackio # it asks for Pillow < 13, but runs with 13
	@touch $@

demo: $(VENV)/demo
	@PATH="$(CURDIR)/$(BIN):$$PATH" bash demo/run.sh

check: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Three processes, because many tests mostly wait; tests/support/scheduling.py decides which run in parallel.
test: check
	$(BIN)/python -m pytest -n 3 --no-loadscope-reorder

test-quick: $(VENV)/ready
	$(BIN)/python -m pytest -n 2 tests/unit tests/property tests/golden tests/architecture

mutants: $(VENV)/ready
	$(BIN)/python -m tests.mutants

chaos: $(VENV)/ready
	$(BIN)/python -m pytest -m long
	$(BIN)/python -m tests.chaos.campaign
	$(BIN)/python -m tests.chaos.outside
	$(BIN)/python -m tests.chaos.encode_campaign
	$(BIN)/python -m tests.chaos.restarts
	$(BIN)/python -m tests.chaos.quiet
	$(BIN)/python -m tests.chaos.prediction
	$(BIN)/python -m pytest tests/chaos/slurm_nodes.py
	$(BIN)/python -m pytest tests/chaos/kubernetes_pods.py

tour: $(VENV)/demo
	$(BIN)/python -m tests.tour

bench: $(VENV)/ready
	$(BIN)/python -m benchmarks.encode --smoke
	$(BIN)/python -m benchmarks.train_step --smoke
	$(BIN)/python -m benchmarks.peers --smoke
	$(BIN)/python -m benchmarks.save --smoke
	$(BIN)/python -m benchmarks.loader --smoke
	$(BIN)/python -m benchmarks.sample --smoke
	$(BIN)/python -m benchmarks.sinks --smoke

bench-gpu: $(VENV)/ready
	$(BIN)/python -m benchmarks.gpu

# The charts of `dit-scale report`; tests/unit/test_report_pictures.py knows their digests.
UPLOT := 1.6.32
vendor:
	mkdir -p build/uplot
	cd build/uplot && tar xzf $$(npm pack --silent uplot@$(UPLOT))
	cp build/uplot/package/LICENSE build/uplot/package/dist/uPlot.iife.min.js \
		build/uplot/package/dist/uPlot.min.css dit_scale/report/page/vendor

$(VENV)/docs: $(VENV)/demo
	@echo "set-up: Material for MkDocs (about 30 MB)"
	@$(BIN)/pip install --quiet --editable '.[docs]'
	@touch $@

docs: $(VENV)/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict
	@echo "the documentation is in $(CURDIR)/build/site/index.html"

clean:
	rm -rf $(VENV) runs/demo
