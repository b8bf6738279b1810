# CALM-PL. `make help` tells what there is.
.DEFAULT_GOAL := help
SHELL := /bin/bash

# What `make train` runs on; every one can be given on the command line.
DATASET  ?= synthetic
BACKBONE ?= calm-tiny
SHOTS    ?= 5
SEED     ?= 0
DEVICES  ?= 1
DATA_DIR ?=
RUN_DIR  ?=
LOGGER   ?=
SWEEP    ?= shots
ARGS     ?=

PYTHON ?= python3
CONSTRAINTS ?= constraints.txt
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.PHONY: help install train sweep figures report test lint format calm-tiny clean

help:  ## this text
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12
	@echo
	@echo "make train DATASET=$(DATASET) BACKBONE=$(BACKBONE) SHOTS=$(SHOTS) SEED=$(SEED) DEVICES=$(DEVICES) DATA_DIR= RUN_DIR= LOGGER= ARGS="

install: $(STAMP)  ## make .venv and install the package with its development tools

$(STAMP): setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13) and f"calm-pl needs Python 3.10 to 3.13, this is {sys.version.split()[0]}: make install PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --editable '.[dev]' --constraint $(CONSTRAINTS)
	@touch $@

train: $(STAMP)  ## few-shot classifier of DATASET with BACKBONE: fit, test, run folder
	$(BIN)/calm fit --data $(DATASET) --backbone $(BACKBONE) \
		--data.shots $(SHOTS) --data.seed $(SEED) --trainer.devices $(DEVICES) \
		$(if $(DATA_DIR),--data.recipe.init_args.data_dir "$(DATA_DIR)") \
		$(if $(RUN_DIR),--run_dir "$(RUN_DIR)") $(if $(LOGGER),--logger $(LOGGER)) $(ARGS)

sweep: $(STAMP)  ## every point of SWEEP (shots, methods, bayes) with DATASET and BACKBONE: table, CSV, plot
	$(BIN)/calm sweep $(SWEEP) --data $(DATASET) --backbone $(BACKBONE) --trainer.devices $(DEVICES) \
		$(if $(DATA_DIR),--data.recipe.init_args.data_dir "$(DATA_DIR)") \
		$(if $(RUN_DIR),--out "$(RUN_DIR)") $(ARGS)

figures: $(STAMP)  ## make the plots of the documentation again, with the built-in model and sounds
	$(BIN)/calm fit --run_dir build/figures/run
	$(BIN)/calm sweep shots --out build/figures/shots
	cp build/figures/run/plots/methods.png docs/images/methods.png
	cp build/figures/shots/plots/accuracy-over-shots.png docs/images/shots.png

report: $(STAMP)  ## remake the report of RUN_DIR
	$(BIN)/calm report "$(RUN_DIR)"

# Files of tests side by side, a core each: more threads than cores would only wait for one another.
test: $(STAMP)  ## run the tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses logical --maxprocesses 4 --dist loadfile

lint: $(STAMP)  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)  ## let ruff format the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# What calm-tiny is made from: Whisper-tiny.en, and ESC-10 to measure with (and to leave out of the corpus).
WHISPER ?= ../shared/models/whisper-tiny.en
ESC     ?= ../shared/data/esc10
WORK    ?= build/calm-tiny
MINUTES ?= 60

calm-tiny: $(STAMP)  ## make the built-in model again: hours; see pretraining/README.md
	$(BIN)/python -m pip install --quiet --editable '.[pretraining]'
	mkdir -p $(WORK)
	$(BIN)/python -m pretraining.corpus --work $(WORK) --esc50-names $(ESC)/audio
	$(BIN)/python -m pretraining.encode --work $(WORK) --whisper $(WHISPER)
	$(BIN)/python -m pretraining.train --work $(WORK) --whisper $(WHISPER) --minutes $(MINUTES)
	$(BIN)/python -m pretraining.export --work $(WORK)
	$(BIN)/python -m tests.test_calm_tiny
	$(BIN)/python -m pretraining.evaluate --data $(ESC)

clean:  ## remove what was built (not runs/)
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
