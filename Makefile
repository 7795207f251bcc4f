# Each verb is one command; `make help` lists them. The first use sets up .venv (setup.sh).
# Variables count only when typed on make's command line: the environment may hold a DATA or MODEL of its own.

MAKEFLAGS += --no-print-directory --no-builtin-rules
.DEFAULT_GOAL := help
.NOTPARALLEL:
.SUFFIXES:

# ---- the verbs: what each does, the command it is, and the variables that it takes
#
# A variable becomes the option of its name in lower case; `option.VERB.VARIABLE` names another one.

training := MODEL REFINERY PRETRAINED DATA EPOCHS RESOLUTION BATCH DECODER RECIPE SEED OUT

about.train         := train a network
runs.train          := train
takes.train         := $(training) LABELS GPUS ARGS
option.train.LABELS := --labels.stored
about.label         := store what a refinery says of every crop
runs.label          := train.label
takes.label         := $(filter-out PRETRAINED,$(training)) GPUS ARGS
about.maps          := store what a refinery says of every part of each image
runs.maps           := train.maps
takes.maps          := REFINERY DATA BATCH DECODER RECIPE SEED OUT GPUS ARGS
about.chain         := generations of networks, each learning from the one before
runs.chain          := train.chain
takes.chain         := MODELS $(filter-out MODEL OUT,$(training)) GPUS ARGS
about.tables        := the tables of the papers, on any images
runs.tables         := train.tables
takes.tables        := TABLES DATA OUT GPUS ARGS
about.convert       := write images as a converted set (train does it when needed)
runs.convert        := data.convert
takes.convert       := DATA OUT ARGS
about.look          := one page of images, crops, labels and duplicates, and of curves and mistakes of a checkpoint
runs.look           := train.look
takes.look          := DATA REFINERY CHECKPOINT RESOLUTION BATCH OUT ARGS
about.evaluate      := top-1 and top-5 of a checkpoint
runs.evaluate       := train.evaluate
takes.evaluate      := CHECKPOINT WHICH DATA RESOLUTION BATCH DECODER PREDICTIONS OUT ARGS
about.predict       := the five likeliest classes of images
runs.predict        := train.predict
takes.predict       := CHECKPOINT WHICH IMAGES RESOLUTION BATCH FORMAT OUT ARGS
about.export        := a checkpoint as a folder that other programs use
runs.export         := train.export
takes.export        := CHECKPOINT FORMAT INT8 DATA RESOLUTION BATCH DECODER OUT ARGS
about.runs          := a table of all runs
runs.runs           := train.runs
takes.runs          := OUT FIGURE ARGS
option.runs.OUT     := --folder
about.clean-runs    := what failed and stopped runs take, and, with ARGS=--yes, removing them
runs.clean-runs     := train.runs.clean
takes.clean-runs    := OUT ARGS
option.clean-runs.OUT := --folder
about.report        := figures of what runs have learned
runs.report         := train.report
takes.report        := RUNS DATA OUT ARGS
about.bench         := how fast, against what limit and which peers
runs.bench          := bench
takes.bench         := ONLY QUICK PROFILE PAIRS REFINERY DATA RESOLUTION BATCH EPOCHS THREADS GPUS OUT ARGS
about.bench-compare := two results of the bench (.json), row by row
runs.bench-compare  := bench.compare
takes.bench-compare := A B
about.records       := the records that figures of README and docs rest on, and whose code has changed since
runs.records        := bench.records
takes.records       := ARGS
about.compare-labels := stored labels, maps, their refinery and the ground truth, on the same crops
runs.compare-labels := bench.compare_labels
takes.compare-labels := LABELS REFINERY DATA MODEL EPOCHS RESOLUTION BATCH OUT ARGS
about.kernels       := compile the GPU kernels, without a GPU, and show the registers they take
runs.kernels        := kernels
takes.kernels       := ARGS
about.test          := the quick tests
runs.test           := pytest -m "not slow and not gpu"
takes.test          := ARGS
about.test-all      := the slow tests too
runs.test-all       := pytest -m "not gpu"
takes.test-all      := ARGS
about.test-gpu      := the tests that need a GPU
runs.test-gpu       := pytest -m gpu
takes.test-gpu      := ARGS
about.gpu           := what to type first on a machine with a GPU: kernels, tests, bench and trainings, on one page
runs.gpu            := tests.gpu
takes.gpu           := DEVICE ONLY MINUTES OUT ARGS
about.test-wheel    := build the package, install it in an empty environment, and try it
runs.test-wheel     := pytest tests/test_wheel.py
takes.test-wheel    := ARGS
about.kills         := kill commands again and again, and compare what they leave in the end
runs.kills          := tests.kills
takes.kills         := ONLY KILLS SEED ARGS
about.soak          := train for an hour in one process, changing storage and decoder: does memory stay flat?
runs.soak           := tests.soak
takes.soak          := MINUTES ONLY OUT ARGS
about.mutants       := plant small mistakes in a file, in a copy of the code: which does no test notice?
runs.mutants        := tests.mutants
takes.mutants       := FILE SAMPLE SEED ARGS
about.lint          := ruff
about.types         := mypy
about.format        := let ruff order the code
about.setup         := make .venv from requirements.lock (every verb does it by itself, once)
about.help          := this text

commands := train label maps chain tables convert look evaluate predict export runs clean-runs report bench bench-compare records compare-labels kernels test test-all test-gpu gpu test-wheel kills soak mutants
verbs := $(commands) lint types format setup help

flags := QUICK PROFILE INT8
operands := A B
unique = $(if $1,$(firstword $1) $(call unique,$(filter-out $(firstword $1),$1)))
variables := $(call unique,$(foreach verb,$(commands),$(filter-out ARGS,$(takes.$(verb))))) ARGS PYTHON

# ---- make's command line

empty :=
space := $(empty) $(empty)
is_typed = $(filter command,$(firstword $(origin $1)))
typed := $(strip $(foreach v,$(.VARIABLES),$(if $(call is_typed,$v),$v)))

unknown := $(filter-out $(variables),$(typed))
ifneq ($(unknown),)
  # The nearest names, where the system has a Python to find them.
  close := import difflib, sys; print(*difflib.get_close_matches(sys.argv[1].upper(), sys.argv[2:], 2))
  near := $(shell python3 -c "$(close)" '$(subst ','\'',$(firstword $(unknown)))' $(variables) 2>/dev/null)
  $(error unknown: $(unknown).$(if $(near), Did you mean $(subst $(space), or ,$(near))?) Known are $(variables))
endif

empty_values := $(strip $(foreach v,$(filter-out ARGS,$(typed)),$(if $(strip $(value $v)),,$v)))
ifneq ($(empty_values),)
  $(error $(empty_values) is empty: give it a value or leave it out)
endif

asked := $(filter-out help,$(filter $(verbs),$(MAKECMDGOALS)))
ifneq ($(asked),)
  taken := $(strip $(foreach verb,$(asked),$(takes.$(verb))) PYTHON)
  not_taken := $(filter-out $(taken),$(typed))
  ifneq ($(not_taken),)
    $(error make $(asked) does not take $(not_taken); it takes $(taken))
  endif
endif

# A value as one word for the shell, whatever it holds; $(value ...) leaves a $ in it alone.
quoted = '$(subst ','\'',$(value $1))'
# What variable $2 becomes in the command of verb $1: raw words for ARGS; " VALUE" for an operand; " --option" for a flag
# that was not typed as 0; else " --option VALUE".
option = $(or $(option.$1.$2),--$(shell printf %s $2 | tr A-Z a-z))
typed_option = $(if $(filter ARGS,$2), $(value ARGS),$(if $(filter $2,$(operands)), $(call quoted,$2),$(if $(filter \
    $2,$(flags)),$(if $(filter-out 0,$(value $2)), $(call option,$1,$2)), $(call option,$1,$2) $(call quoted,$2))))
typed_options = $(foreach v,$(takes.$1),$(if $(call is_typed,$v),$(call typed_option,$1,$v)))

# What was typed goes to programs as options, not also through their environment.
unexport $(typed) MAKEFLAGS MFLAGS

# The command as typed, for programs that say how to go on; values are quoted where a shell would want it.
special := ' " $$ ` \ * ? ( ) [ ] { } < > | & ; ~ ! \#
is_special = $(strip $(foreach c,$(special),$(findstring $c,$(subst $(space),?,$(value $1)))))
as_typed = $(if $(call is_special,$1),$(quoted),$(value $1))
ifneq ($(CURDIR),$(PWD))
  elsewhere := -C $(call as_typed,CURDIR)
endif
export TYPED_COMMAND := make $(if $(elsewhere),$(elsewhere) )$(MAKECMDGOALS)$(if $(typed), )$(foreach v,$(filter $(typed),$(variables)),$v=$(call as_typed,$v))

# ---- the interpreter

ifneq ($(call is_typed,PYTHON),)
  python := $(call quoted,PYTHON)
  ready :=
else
  python := .venv/bin/python
  ready := .venv/.ready
endif

# exec: signals reach the program itself, not a shell around it
run = @exec $(python) -m

# ---- the verbs

.PHONY: $(verbs) again

define help_text
Train image classifiers on labels that a better network writes for every crop.

  make train MODEL=mobilenet REFINERY=resnet50    the first thing to try: no data needed, minutes
  make test                                       the tests

Variables (typed on make's command line; the environment does not count)
  MODEL       network to train: alexnet, mobilenet, mobilenet0.25, resnet18, timm:NAME,
              torchvision:NAME, ...;
              MODEL="A B C" trains several on the labels of one refinery's pass
  REFINERY    who writes the labels: a network's name (trained first if need be), a run folder,
              NETWORK:FILE, or published weights as timm:NAME:pretrained, torchvision:NAME:pretrained;
              left out: the labels are the ground truth
  LABELS      a folder that make label or make maps wrote, in place of REFINERY: labels are read, not computed
  PRETRAINED  weights that MODEL starts from: a file, or timm or torchvision, which publish them
  DATA        an image folder or an archive of one, a .csv of file and class, a folder of ImageNet's
              tars or of Parquet files, a converted set, or cifar10, svhn, imagenette;
              left out: scenes, a set drawn by code
  EPOCHS      passes over the images              RESOLUTION  side of a crop, in pixels
  BATCH       crops a step                        DECODER     auto, ffcv, dali, torchvision
  RECIPE      quick, label-refinery, ...          SEED        fixes crops and first weights
  OUT         where the result goes
  GPUS        devices of this machine that work together: GPUS=8 (bench: in ONLY=devices)
  MODELS      a chain's networks: "alexnet alexnet alexnet"
  TABLES      which tables of the papers: 1,4,relabel-labels
  RUNS        run folders: "runs/scenes/A runs/scenes/B"
  CHECKPOINT  a run's best.pt or last.pt, or what REFINERY takes except a name alone
  WHICH       best or last, of a CHECKPOINT that is a run folder: last
  IMAGES      a file, a folder, a pattern, @list.txt with one path a line, or several of these
  PREDICTIONS a file for each image's label and likeliest classes: .csv, .json or .jsonl
  FIGURE      accuracy against milliseconds of all runs, as .svg or .png
  FORMAT      onnx, safetensors                   INT8        1: quantised too (onnx)
              (of predictions: text, csv, json, jsonl)
  ONLY        parts of the bench, with commas: machine, loaders, cold, networks, loop,
              batches, devices, refinery_cost, pooling; scale, only if it is named;
              or of the kills: conversion, training, validation, labels, maps, make;
              or of the soak: jpeg-ffcv, blocks-ffcv, ...; or stages of gpu
  KILLS       how many of each of these parts     MINUTES     how long the soak trains: 60;
                                                  when this call of gpu is to end
  DEVICE      of gpu: cuda, or cpu, which only tries its stages
  FILE        whose tests are tried (mutants)     SAMPLE      how many mistakes: 20
  QUICK       1: the bench in a few minutes       PROFILE     1: trace one step instead
  PAIRS       resnet50:mobilenet,...              THREADS     that decode (bench): 4, or 1,2,4
  A, B        results of the bench to compare
  ARGS        any other options, as raw words: ARGS='--print_config', ARGS='-k plan'
  PYTHON      an interpreter that has the packages: used as it is; no .venv, no set-up

Verbs, and the variables they take
endef

help:
	@: $(info $(help_text))
	@$(foreach verb,$(verbs),printf '  %-15s%s\n' $(verb) '$(about.$(verb))';$(if \
	    $(takes.$(verb)), printf '%17s%s\n' '' '$(takes.$(verb))';))

setup:
ifeq ($(ready),)
	@echo "PYTHON was given: it is used as it is, and there is nothing to set up."
else
	@bash setup.sh && echo ".venv is ready."
endif

.venv/.ready: requirements.lock setup.sh $(if $(wildcard .venv/bin/python),,again)
	@bash setup.sh

$(commands): $(ready)
	$(run) $(runs.$@)$(call typed_options,$@)

lint: $(ready)
	$(run) ruff check .
	$(run) ruff format --check .

types: $(ready)
	$(run) mypy

format: $(ready)
	$(run) ruff check --fix .
	$(run) ruff format .
