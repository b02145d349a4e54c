# Every target first creates the virtual environment .venv, with versions from the constraints file.
PYTHON ?= python3
CONSTRAINTS ?= constraints-cpu.txt
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet -c $(CONSTRAINTS)
export OMP_WAIT_POLICY ?= PASSIVE
# Tests compute with one thread each; as many run side by side as there are cores.
PARALLEL := -n auto --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help setup demo bench paper test test-all lint hosts docs pictures mutants clean

help:  ## Show this list.
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: $(VENV)/.ready  ## Create .venv with everything for development.

# torch comes first and alone: basicsr's build needs the setuptools that it brings, and without build isolation nothing
# can pull a second torch.
$(VENV)/.ready: pyproject.toml $(CONSTRAINTS)
	@echo "setting up $(VENV) (a few minutes the first time)"
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch setuptools wheel hatchling editables
	$(PIP) --no-build-isolation -e ".[dev]"
	@touch $@

demo: setup  ## Train LCoAN-light x2, and a network without attention, on real photographs; show the results.
	$(BIN)/python demo/prepare.py
	cd demo && ../$(BIN)/sparse-sr train -opt train.yml
	cd demo && ../$(BIN)/sparse-sr train -opt train_plain.yml
	$(BIN)/python demo/report.py

# See docs/benchmarks-method.md; with the other allocator too: make bench BENCH=--allocators
BENCH ?=
bench: setup  ## Measure time and memory of layers, training and networks; results and plots go to bench/.
	$(BIN)/python -m benchmarks.speed $(BENCH) --json bench/layers.json --plot bench/layers.png
	$(BIN)/python -m benchmarks.speed $(BENCH) --passes forward+backward --sizes 48 96 128 --limit 3 --json bench/training.json --plot bench/training.png
	$(BIN)/python -m benchmarks.speed $(BENCH) --networks --json bench/networks.json --plot bench/networks.png

# See docs/paper.md; for example: make paper DATA="DIV2K_train_HR" VAL="Set5" PAPER="--device cuda --budget full"
PAPER ?=
paper: setup  ## Repeat the papers' experiments on the folders DATA and VAL; tables and plots go to paper/.
	$(BIN)/python -m benchmarks.paper all --data $(DATA) --val $(VAL) $(PAPER)

test: setup  ## Run the tests (about 8 minutes on two cores).
	$(BIN)/python -m pytest -m "not slow" $(PARALLEL)

test-all: setup lint  ## Run all tests, including the slow ones (about half an hour).
	$(BIN)/python -m pytest $(PARALLEL) --hypothesis-profile=explore
	$(BIN)/python -m pytest $(PARALLEL) -m "not slow" --jaxtyping tests/functional tests/layers

lint: setup  ## Check style and types.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# HOSTS is a folder with checkouts KAIR, traiNNer-redux, neosr and EDSR-PyTorch; each test works on a copy.
hosts: setup  ## Run the recipes of docs/recipes.md in the code bases in the folder HOSTS (about ten minutes).
	$(PIP) -e ".[hosts]"
	SPARSE_SR_HOSTS=$(abspath $(HOSTS)) $(BIN)/python -m pytest -m hosts

docs: setup  ## Build the documentation into site/.
	$(BIN)/mkdocs build --strict

notebooks: setup  ## Run the notebooks of docs/notebooks and write them with their outputs.
	$(BIN)/python docs/notebooks/execute.py

pictures: setup  ## Draw the pictures of docs/concepts.md.
	$(BIN)/python docs/draw.py

# For example: make mutants FILE=sparse_sr_attn/functional/kmeans.py TESTS=tests/functional/test_kmeans.py
MUTANTS := build/mutants
mutants: setup  ## Break FILE in many small ways, in a copy of the last commit, and list what TESTS do not notice (hours).
	$(PIP) -e ".[mutants]"
	rm -rf $(MUTANTS) && mkdir -p $(MUTANTS) && git archive HEAD | tar -x -C $(MUTANTS)
	sed 's|FILE|$(FILE)|; s|PYTHON|$(abspath $(BIN)/python)|; s|TESTS|$(TESTS)|' tests/mutants.toml > $(MUTANTS)/run.toml
	cd $(MUTANTS) && $(abspath $(BIN)/cosmic-ray) init run.toml run.sqlite
	cd $(MUTANTS) && PYTHONPATH=.:integrations $(abspath $(BIN)/cosmic-ray) exec run.toml run.sqlite
	$(BIN)/cr-report --show-diff --surviving-only $(MUTANTS)/run.sqlite

clean:  ## Remove what the targets made, except .venv.
	rm -rf site build dist bench demo/data demo/experiments demo/results demo/tb_logger demo/*.json demo/*.png
