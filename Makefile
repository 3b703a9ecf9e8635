# The index of the project. CI runs `make lint` and `make test`.
PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

# make train TASK=mnli [MODE=fixed|tte AGENT=.. TARGET=.. DATA=lab|hub|DIR STEPS=.. SEED=.. RUN=dir ARGS="key=value ..."]
TASK ?= mnli
OPTIONS = --task "$(TASK)" $(if $(AGENT),--agent "$(AGENT)") $(if $(TARGET),--target "$(TARGET)") \
	$(if $(DATA),--data "$(DATA)") $(if $(MODE),--mode "$(MODE)") $(if $(STEPS),--steps "$(STEPS)") $(if $(SEED),--seed "$(SEED)") \
	$(if $(RUN),--run "$(RUN)") $(if $(RESUME),--resume)
SEEDS ?= 0 1 2 3 4

.DEFAULT_GOAL := help
.PHONY: help setup train tasks compare landscape lab bench test fuzz lint mutate clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo
	@echo '  make train TASK=mnli [MODE=fixed|tte AGENT=folder|hub-id TARGET=folder|hub-id DATA=lab|hub|folder STEPS=n SEED=n RUN=folder]'
	@echo '                       [ARGS="appo.kl_coef=0.1 prompts=8 ..."]'

setup: $(READY) ## make .venv with the pinned dependencies

$(READY): constraints.txt setup.cfg pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test]'
	@touch $@

train: $(READY) ## tune a prompt: make train TASK=mnli
	@$(BIN)/python -m experiments.train $(OPTIONS) $(ARGS)

tasks: $(READY) ## list the tasks, or show one: make tasks SHOW=mnli
	@$(BIN)/python -m experiments.tasks $(if $(SHOW),--show "$(SHOW)") $(if $(DATA),--data "$(DATA)")

compare: $(READY) ## APPO against best-of-N over SEEDS, with a table: make compare TASK=mnli
	$(BIN)/python -m experiments.compare --task "$(TASK)" --seeds $(SEEDS) $(ARGS)

landscape: $(READY) ## measure the lab: accuracy under good and bad instructions, prior of a good one
	$(BIN)/python -m experiments.lab.landscape

lab: $(READY) ## rebuild the lab's data, tokenizers and models from nothing (about 80 minutes)
	$(BIN)/python -m experiments.lab.recipe

bench: $(READY) ## how fast scoring, sampling and updating are, against the plain way (about 8 minutes)
	$(BIN)/python -m experiments.bench $(ARGS)

test: $(READY) ## run the tests with coverage
	$(BIN)/python -m pytest --cov --cov-report=term

fuzz: $(READY) ## search for input that is neither taken nor refused in one line: make fuzz MINUTES=60
	@$(BIN)/python -m tests.fuzz $(MINUTES)

lint: $(READY) ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

mutate: $(READY) ## break the maths on purpose, one fault at a time; the tests must notice each
	$(BIN)/python -m tests.mutate

clean: ## remove the environment and caches, not the runs
	rm -rf $(VENV) *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage
