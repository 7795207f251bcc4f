# Each verb is one command; `make help` lists them. The first use sets up .venv (setup.sh).
# Only variables on make's command line are used, since the environment may define its own DATA or MODEL.

MAKEFLAGS += --no-print-directory --no-builtin-rules
.DEFAULT_GOAL := help
.NOTPARALLEL:
.SUFFIXES:

# ---- the verbs: description, command, and variables
#
# A variable becomes the option of its name in lower case; `option.VERB.VARIABLE` names another one.

training := MODEL REFINERY PRETRAINED DATA EPOCHS RESOLUTION BATCH DECODER RECIPE SEED OUT

about.train         := train a network
runs.train          := train
takes.train         := $(training) LABELS GPUS ARGS
option.train.LABELS := --labels.stored
about.label         := store the labels that a refinery gives to every crop
runs.label          := train.label
takes.label         := $(filter-out PRETRAINED,$(training)) GPUS ARGS
about.maps          := store the labels that a refinery gives to every part of each image
runs.maps           := train.maps
takes.maps          := REFINERY DATA BATCH DECODER RECIPE SEED OUT GPUS ARGS
about.chain         := generations of networks, each learning from the previous one
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
about.predict       := the five most likely classes of images
runs.predict        := train.predict
takes.predict       := CHECKPOINT WHICH IMAGES RESOLUTION BATCH FORMAT OUT ARGS
about.export        := export a checkpoint as a folder for other programs
runs.export         := train.export
takes.export        := CHECKPOINT FORMAT INT8 DATA RESOLUTION BATCH DECODER OUT ARGS
about.runs          := a table of all runs
runs.runs           := train.runs
takes.runs          := OUT FIGURE ARGS
option.runs.OUT     := --folder
about.clean-runs    := list failed and stopped runs with their sizes; with ARGS=--yes remove them
runs.clean-runs     := train.runs.clean
takes.clean-runs    := OUT ARGS
option.clean-runs.OUT := --folder
about.report        := figures of what runs have learned
runs.report         := train.report
takes.report        := RUNS DATA OUT ARGS
about.bench         := measure speed, against limits and other loaders
runs.bench          := bench
takes.bench         := ONLY QUICK PROFILE PAIRS REFINERY DATA RESOLUTION BATCH EPOCHS THREADS GPUS OUT ARGS
about.bench-compare := compare two results of the bench (.json), row by row
runs.bench-compare  := bench.compare
takes.bench-compare := A B
about.records       := the records behind the figures in README and docs, and which of their code has changed
runs.records        := bench.records
takes.records       := ARGS
about.compare-labels := compare stored labels, maps, their refinery and the ground truth on the same crops
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
about.gpu           := first command on a machine with a GPU: kernels, tests, bench and trainings, on one page
runs.gpu            := tests.gpu
takes.gpu           := DEVICE ONLY MINUTES OUT ARGS
about.test-wheel    := build the package, install it in an empty environment, and try it
runs.test-wheel     := pytest tests/test_wheel.py
takes.test-wheel    := ARGS
about.kills         := kill commands at random, start them again, and compare their results
runs.kills          := tests.kills
takes.kills         := ONLY KILLS SEED ARGS
about.soak          := train for an hour in one process, changing storage and decoder, and check memory use
runs.soak           := tests.soak
takes.soak          := MINUTES ONLY OUT ARGS
about.mutants       := make small mistakes in a file, in a copy of the code, and list those that no test detects
runs.mutants        := tests.mutants
takes.mutants       := FILE SAMPLE SEED ARGS
about.lint          := ruff
about.types         := mypy
about.format        := format the code with ruff
about.setup         := make .venv from requirements.lock (every verb does this automatically, once)
about.help          := print this text

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
  # Suggests similar names if the system has a Python.
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

# A value as one shell word, whatever it contains; $(value ...) does not expand a $ in it.
quoted = '$(subst ','\'',$(value $1))'
# Variable $2 in the command of verb $1: raw words for ARGS; " VALUE" for an operand; " --option" for a flag that is not 0;
# otherwise " --option VALUE".
option = $(or $(option.$1.$2),--$(shell printf %s $2 | tr A-Z a-z))
typed_option = $(if $(filter ARGS,$2), $(value ARGS),$(if $(filter $2,$(operands)), $(call quoted,$2),$(if $(filter \
    $2,$(flags)),$(if $(filter-out 0,$(value $2)), $(call option,$1,$2)), $(call option,$1,$2) $(call quoted,$2))))
typed_options = $(foreach v,$(takes.$1),$(if $(call is_typed,$v),$(call typed_option,$1,$v)))

# Variables are passed to programs as options, not through their environment.
unexport $(typed) MAKEFLAGS MFLAGS

# The command as typed, for messages on how to continue; values are quoted if a shell requires it.
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

# exec: signals reach the program directly instead of a shell
run = @exec $(python) -m

# ---- the verbs

.PHONY: $(verbs) again

define help_text
Train image classifiers on labels that a better network gives to every crop.

  make train MODEL=mobilenet REFINERY=resnet50    the first thing to try: no data needed, minutes
  make test                                       the tests

Variables (typed on make's command line; the environment is ignored)
  MODEL       network to train: alexnet, mobilenet, mobilenet0.25, resnet18, timm:NAME,
              torchvision:NAME, ...;
              MODEL="A B C" trains several on the labels of one refinery's pass
  REFINERY    the network that labels: its name (trained first if necessary), a run folder,
              NETWORK:FILE, or published weights as timm:NAME:pretrained, torchvision:NAME:pretrained;
              default: none, the labels are the ground truth
  LABELS      a folder written by make label or make maps, instead of REFINERY: labels are read, not computed
  PRETRAINED  weights that MODEL starts from: a file, or timm or torchvision, which publish them
  DATA        an image folder or an archive of one, a .csv of file and class, a folder of ImageNet's
              tars or of Parquet files, a converted set, or cifar10, svhn, imagenette;
              default: scenes, a set drawn by code
  EPOCHS      passes over the images              RESOLUTION  side of a crop, in pixels
  BATCH       crops per step                      DECODER     auto, ffcv, dali, torchvision
  RECIPE      quick, label-refinery, ...          SEED        of crops and first weights
  OUT         where the result goes
  GPUS        number of this machine's devices to use together: GPUS=8 (bench: in ONLY=devices)
  MODELS      a chain's networks: "alexnet alexnet alexnet"
  TABLES      which tables of the papers: 1,4,relabel-labels
  RUNS        run folders: "runs/scenes/A runs/scenes/B"
  CHECKPOINT  a run's best.pt or last.pt, or what REFINERY takes except a name alone
  WHICH       best or last, of a CHECKPOINT that is a run folder: last
  IMAGES      a file, a folder, a pattern, @list.txt with one path per line, or several of these
  PREDICTIONS a file for each image's label and most likely classes: .csv, .json or .jsonl
  FIGURE      accuracy against milliseconds of all runs, as .svg, .png or .pdf
  FORMAT      onnx, safetensors                   INT8        1: also quantised (onnx)
              (of predictions: text, csv, json, jsonl)
  ONLY        parts of the bench, separated by commas: machine, loaders, cold, networks, loop,
              batches, devices, refinery_cost, pooling, depthwise; scale, only if it is named;
              or of the kills: conversion, training, validation, labels, maps, make;
              or of the soak: jpeg-ffcv, blocks-ffcv, ...; or stages of gpu
  KILLS       number of kills per part            MINUTES     length of the soak: 60;
                                                  time limit of this call of gpu
  DEVICE      of gpu: cuda, or cpu, which only tries its stages
  FILE        whose tests are tried (mutants)     SAMPLE      how many mistakes: 20
  QUICK       1: the bench in a few minutes       PROFILE     1: trace one step instead
  PAIRS       resnet50:mobilenet,...              THREADS     that decode (bench): 4, or 1,2,4
  A, B        results of the bench to compare
  ARGS        any other options, as raw words: ARGS='--print_config', ARGS='-k plan'
  PYTHON      an interpreter that has the packages; it is used without .venv and without set-up

Verbs, and the variables they take
endef

help:
	@: $(info $(help_text))
	@$(foreach verb,$(verbs),printf '  %-15s%s\n' $(verb) '$(about.$(verb))';$(if \
	    $(takes.$(verb)), printf '%17s%s\n' '' '$(takes.$(verb))';))

setup:
ifeq ($(ready),)
	@echo "PYTHON was given: that interpreter is used without set-up."
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
