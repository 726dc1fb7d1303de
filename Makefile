PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
WORKERS ?= 2
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: help demo compare picture bench gpu gpu-env test test-faults test-all lint types docs docs-serve reference load-plots \
  package try-package clean

help: ## this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

# A stamp per kind of installation: pip runs again only when what is declared changes.
$(VENV)/.base: pyproject.toml setup.py constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL) --editable '.[plots]'
	touch $@

$(VENV)/.dev: pyproject.toml setup.py constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL) --editable '.[dev]'
	touch $@ $(VENV)/.base

$(VENV)/.docs: $(VENV)/.dev
	$(INSTALL) --editable '.[docs]'
	touch $@

demo: $(VENV)/.base ## train the demo; says at the end where to look
	$(BIN)/moe-train experiment=demo

compare: $(VENV)/.base ## loss-free against auxiliary loss and none, three seeds each
	$(BIN)/moe-study demo --csv runs/study/demo/comparison.csv
	$(BIN)/python -m moe_plugin.apps.study.study_table runs/study/demo/comparison.csv

picture: $(VENV)/.base ## docs/load.png from the runs of make compare
	$(BIN)/python -m moe_plugin.plots "no balancing=runs/study/demo/none/seed_0" \
	  "auxiliary loss 0.01=runs/study/demo/aux_loss_0.01/seed_0" "loss-free=runs/study/demo/loss_free/seed_0" \
	  --out docs/load.png

bench: $(VENV)/.dev ## speed of everything, as ratios to named peers; CASES="router layer" for some
	$(BIN)/python -m benchmarks $(CASES)

# Installs nothing: the environment of gpu-env if it is there, else that of the other targets, else the machine's own.
GPU_PYTHON ?= $(firstword $(wildcard build/gpu/bin/python $(BIN)/python) $(PYTHON))
GPU_OUT ?= runs/gpu/$(shell date +%Y%m%d-%H%M%S)

gpu: ## every figure that only a GPU can give, in ten minutes; DRY=1 rehearses it on a CPU
	$(GPU_PYTHON) -m benchmarks.gpu --out $(GPU_OUT) $(if $(DRY),--dry)

gpu-env: ## an environment for make gpu: the newest torch with CUDA, transformers and triton
	test -x build/gpu/bin/python || $(PYTHON) -m venv build/gpu
	build/gpu/bin/python -m pip install --quiet --disable-pip-version-check --upgrade --editable '.[hf,triton]' pytest hypothesis

test: $(VENV)/.dev ## the tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) -m "not slow"

test-faults: $(VENV)/.dev ## faults: damaged and hostile files, signals, full disks, wrong command lines; 2,000 drawn routers
	GENERATED_ROUTERS=2000 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) tests/faults tests/attach/generated

test-all: $(VENV)/.dev ## the tests, slow ones too
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS)

lint: $(VENV)/.dev ## ruff: rules and format
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(VENV)/.dev ## pyright
	$(BIN)/pyright

docs: $(VENV)/.docs ## build the docs site into build/site; a broken link is an error
	$(BIN)/mkdocs build --strict

docs-serve: $(VENV)/.docs ## the docs site at localhost:8000, built again when a page changes
	$(BIN)/mkdocs serve

reference: $(VENV)/.dev ## write the generated pages, docs/reference
	$(BIN)/python -m docs.generate

load-plots: $(VENV)/.dev ## the pictures of docs/load_plots.md: four runs, about two minutes of one core
	$(BIN)/python -m docs.generate.load_plots

package: $(VENV)/.dev ## build the wheel and the source archive into dist/, and check both
	rm -rf dist
	$(BIN)/python -m build --no-isolation --outdir dist . > /dev/null
	$(BIN)/twine check --strict dist/*
	$(BIN)/validate-pyproject pyproject.toml
	$(BIN)/check-wheel-contents dist/*.whl
	$(BIN)/pyroma --min 9 --skip-tests AuthorEmail .  # the project has no address

try-package: package ## install the wheel without extras into an environment of its own, and train 20 steps
	rm -rf build/try && $(PYTHON) -m venv build/try
	build/try/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt dist/*.whl
	cd build/try && bin/moe-train experiment=smoke trainer.max_steps=20 data=stdlib
	build/try/bin/python tests/missing_extras.py

clean: ## remove the environment and caches; runs stay
	rm -rf $(VENV) build dist *.egg-info .cache .pytest_cache .ruff_cache .hypothesis
