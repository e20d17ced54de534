# One command each: `make demo`, `make test`, `make check`. All set-up is theirs: a virtual environment
# in .venv with the versions that constraints.txt pins. Set PYTHON to choose an interpreter (3.11, 3.12).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export PIP_CONSTRAINT := constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Only the CPU kernels of the tests and the demo need this; CUDA machines run as they are.
export OMP_NUM_THREADS ?= 1

.PHONY: help demo test test-quick mutants chaos check bench clean

help:
	@echo "make demo        train on real digits and draw them, from images to a score (2 to 5 minutes)"
	@echo "make test        lint, type check and run the tests (about 15 minutes on 2 cores)"
	@echo "make test-quick  the unit, property and golden tests alone (2 to 3 minutes)"
	@echo "make mutants     100 small changes of the pure layers that their tests must notice"
	@echo "make chaos       kill, stop and preempt training, encoding, SLURM nodes and pods (about three hours)"
	@echo "make check       ruff and mypy"
	@echo "make bench       the benchmarks of encoding, training, saving and loading, in small (about a minute)"
	@echo "make clean       remove the virtual environment and the demo's run"

$(VENV)/torch: constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "no $(PYTHON): install Python 3.11 or 3.12, or set PYTHON="; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' \
		|| { echo "$(PYTHON) is $$($(PYTHON) -V): this project runs on Python 3.11 and 3.12; set PYTHON="; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null \
		|| { echo "no venv module: apt-get install python3-venv (or python3.11-venv)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@bash demo/install_torch.sh $(BIN)/pip
	@touch $@

# What the demo needs; `ready` adds what the tests need.
$(VENV)/demo: $(VENV)/torch pyproject.toml
	@echo "set-up 2/3: DeepSpeed, Ray, diffusers and their dependencies (about 300 MB)"
	@$(BIN)/pip install --quiet --editable '.[demo]'
	@touch $@

$(VENV)/ready: $(VENV)/demo
	@echo "set-up 3/3: what the tests need besides (about 100 MB)"
	@$(BIN)/pip install --quiet --editable '.[dev]'
	@touch $@

demo: $(VENV)/demo
	@PATH="$(CURDIR)/$(BIN):$$PATH" bash demo/run.sh

check: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# In three processes, because many tests wait most of the time; tests/conftest.py says which run side by side.
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

bench: $(VENV)/ready
	$(BIN)/python benchmarks/encode.py --smoke
	$(BIN)/python benchmarks/train_step.py --smoke
	$(BIN)/python benchmarks/save.py --smoke
	$(BIN)/python benchmarks/loader.py --smoke

clean:
	rm -rf $(VENV) runs/demo
