# Each verb is one command; `make help` lists them. The first use sets up .venv (setup.sh).
# Variables count only when typed on make's command line: the environment may hold a DATA or MODEL of its own.

MAKEFLAGS += --no-print-directory --no-builtin-rules
.DEFAULT_GOAL := help
.NOTPARALLEL:
.SUFFIXES:

# ---- what each verb takes

training  := MODEL REFINERY PRETRAINED DATA EPOCHS RESOLUTION BATCH DECODER RECIPE SEED OUT
variables := $(training) MODELS TABLES RUNS CHECKPOINT IMAGES ONLY QUICK PROFILE PAIRS THREADS A B ARGS PYTHON

takes.train    := $(training) ARGS
takes.chain    := MODELS $(filter-out MODEL OUT,$(training)) ARGS
takes.tables   := TABLES DATA OUT ARGS
takes.convert  := DATA OUT ARGS
takes.evaluate := CHECKPOINT DATA RESOLUTION BATCH DECODER OUT ARGS
takes.predict  := CHECKPOINT IMAGES RESOLUTION ARGS
takes.runs     := OUT ARGS
takes.report   := RUNS DATA OUT ARGS
takes.bench    := ONLY QUICK PROFILE PAIRS REFINERY DATA RESOLUTION BATCH EPOCHS THREADS OUT ARGS
takes.bench-compare := A B
takes.kernels  := ARGS
takes.test     := ARGS
takes.test-all := ARGS
takes.test-gpu := ARGS
verbs := help setup train chain tables convert evaluate predict runs report bench bench-compare kernels test test-all test-gpu lint types format

# ---- make's command line

is_typed = $(filter command,$(firstword $(origin $1)))
typed := $(strip $(foreach v,$(.VARIABLES),$(if $(call is_typed,$v),$v)))

unknown := $(filter-out $(variables),$(typed))
ifneq ($(unknown),)
  $(error unknown: $(unknown). Known are $(variables))
endif

hollow := $(strip $(foreach v,$(filter-out ARGS,$(typed)),$(if $(strip $(value $v)),,$v)))
ifneq ($(hollow),)
  $(error $(hollow) is empty: give it a value or leave it out)
endif

asked := $(filter-out help,$(filter $(verbs),$(MAKECMDGOALS)))
ifneq ($(asked),)
  taken := $(strip $(foreach verb,$(asked),$(takes.$(verb))) PYTHON)
  astray := $(filter-out $(taken),$(typed))
  ifneq ($(astray),)
    $(error make $(asked) does not take $(astray); it takes $(taken))
  endif
endif

# A value as one word for the shell, whatever it holds; $(value ...) leaves a $ in it alone.
quoted = '$(subst ','\'',$(value $1))'
# " --option VALUE" if VARIABLE was typed
option = $(if $(call is_typed,$2), $1 $(call quoted,$2))
# " --option" if VARIABLE was typed, and not as 0
flag = $(if $(call is_typed,$2),$(if $(filter-out 0,$(value $2)), $1))
# " VALUE" if VARIABLE was typed
operand = $(if $(call is_typed,$1), $(call quoted,$1))
# ARGS is the one exception: raw words
args = $(if $(call is_typed,ARGS), $(value ARGS))

# What was typed goes to programs as options, not also through their environment.
unexport $(typed) MAKEFLAGS MFLAGS

# The command as typed, for programs that say how to go on; values are quoted where a shell would want it.
empty :=
space := $(empty) $(empty)
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

Verbs, and the variables they take
  train       train a network                     all of the training variables
  chain       generations of networks, each learning from the one before
                                                  MODELS and the training variables but MODEL OUT
  tables      the tables of the paper, anew       TABLES DATA OUT
  convert     write images as a converted set     DATA OUT   (train does it when needed)
  evaluate    top-1 and top-5 of a checkpoint     CHECKPOINT DATA RESOLUTION BATCH DECODER OUT
  predict     the five likeliest classes          CHECKPOINT IMAGES RESOLUTION
  runs        a table of all runs                 OUT
  report      figures of what runs have learned   RUNS DATA OUT
  bench       how fast, and against what limit    ONLY QUICK PROFILE PAIRS REFINERY DATA RESOLUTION
              and which peers                     BATCH EPOCHS THREADS OUT
  bench-compare  two of its results (.json)       A B
  kernels     compiles the GPU kernels, without a GPU, and tells what they take
  test        the quick tests                     test-all: the slow ones too; test-gpu: on a GPU
  lint        ruff                                types: mypy; format: let ruff order the code
  setup       make .venv from requirements.lock   (every verb does it by itself, once)

Training variables (typed on make's command line; the environment does not count)
  MODEL       network to train: alexnet, mobilenet, mobilenet0.25, resnet18, timm:NAME,
              torchvision:NAME, ...;
              MODEL="A B C" trains several on the labels of one refinery's pass
  REFINERY    who writes the labels: a network's name (trained first if need be), a run folder,
              NETWORK:FILE, or published weights as timm:NAME:pretrained, torchvision:NAME:pretrained;
              left out: the labels are the ground truth
  PRETRAINED  weights that MODEL starts from: a file, or timm or torchvision, which publish them
  DATA        an image folder, a converted set, or cifar10, svhn, imagenette;
              left out: scenes, a set drawn by code
  EPOCHS      passes over the images              RESOLUTION  side of a crop, in pixels
  BATCH       crops a step                        DECODER     auto, ffcv, dali, torchvision
  RECIPE      quick, label-refinery, ...          SEED        fixes crops and first weights
  OUT         where the result goes

Other variables
  MODELS      a chain's networks: "alexnet alexnet alexnet"
  TABLES      which tables of the paper: 1,4
  RUNS        run folders: "runs/scenes/A runs/scenes/B"
  CHECKPOINT  a run's best.pt or last.pt, or what REFINERY takes but a name alone
  IMAGES      a file or a folder
  ONLY        parts of the bench, with commas: machine, loaders, networks, loop, thrift
  QUICK       1: the bench in three minutes       PROFILE     1: trace one step instead
  PAIRS       resnet50:mobilenet,...              THREADS     that decode (bench)
  ARGS        anything else, as raw words, with every verb that runs a program or tests:
              ARGS='--print_config', ARGS='-k plan'
  PYTHON      an interpreter that has the packages: used as it is; no .venv, no set-up
endef

help: ; @: $(info $(help_text))

setup:
ifeq ($(ready),)
	@echo "PYTHON was given: it is used as it is, and there is nothing to set up."
else
	@bash setup.sh && echo ".venv is ready."
endif

.venv/.ready: requirements.lock setup.sh $(if $(wildcard .venv/bin/python),,again)
	@bash setup.sh

train_options = $(call option,--model,MODEL)$(call option,--refinery,REFINERY)$(call option,--pretrained,PRETRAINED) \
    $(call option,--data,DATA)$(call option,--epochs,EPOCHS)$(call option,--resolution,RESOLUTION) \
    $(call option,--batch,BATCH)$(call option,--decoder,DECODER)$(call option,--recipe,RECIPE) \
    $(call option,--seed,SEED)$(call option,--out,OUT)

evaluate_options = $(call option,--checkpoint,CHECKPOINT)$(call option,--data,DATA) \
    $(call option,--resolution,RESOLUTION)$(call option,--batch,BATCH)$(call option,--decoder,DECODER)$(call option,--out,OUT)

train: $(ready)
	$(run) train$(train_options)$(args)

chain: $(ready)
	$(run) train.chain$(call option,--models,MODELS)$(train_options)$(args)

tables: $(ready)
	$(run) train.tables$(call option,--tables,TABLES)$(call option,--data,DATA)$(call option,--out,OUT)$(args)

convert: $(ready)
	$(run) data.convert$(call option,--data,DATA)$(call option,--out,OUT)$(args)

evaluate: $(ready)
	$(run) train.evaluate$(evaluate_options)$(args)

predict: $(ready)
	$(run) train.predict$(call option,--checkpoint,CHECKPOINT)$(call option,--images,IMAGES)$(call option,--resolution,RESOLUTION)$(args)

runs: $(ready)
	$(run) train.runs$(call option,--folder,OUT)$(args)

report: $(ready)
	$(run) train.report$(call option,--runs,RUNS)$(call option,--data,DATA)$(call option,--out,OUT)$(args)

bench_options = $(call option,--only,ONLY)$(call flag,--quick,QUICK)$(call flag,--profile,PROFILE) \
    $(call option,--pairs,PAIRS)$(call option,--refinery,REFINERY) \
    $(call option,--data,DATA)$(call option,--resolution,RESOLUTION) \
    $(call option,--batch,BATCH)$(call option,--epochs,EPOCHS)$(call option,--threads,THREADS)$(call option,--out,OUT)

bench: $(ready)
	$(run) bench$(bench_options)$(args)

bench-compare: $(ready)
	$(run) bench.compare$(call operand,A)$(call operand,B)

kernels: $(ready)
	$(run) kernels$(args)

test: $(ready)
	$(run) pytest -m "not slow and not gpu"$(args)

test-all: $(ready)
	$(run) pytest -m "not gpu"$(args)

test-gpu: $(ready)
	$(run) pytest -m gpu$(args)

lint: $(ready)
	$(run) ruff check .
	$(run) ruff format --check .

types: $(ready)
	$(run) mypy

format: $(ready)
	$(run) ruff check --fix .
	$(run) ruff format .
