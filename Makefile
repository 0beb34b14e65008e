# Pretrain -> linear probe -> result table. `make` lists the targets. Every command resumes where it was
# interrupted, says so when there is nothing left to do, and refuses a folder that was made with other flags.

PYTHON  ?= .venv/bin/python
DATA    ?= data
CACHE   ?= cache
METHODS ?= simclr bassl npid
ARGS    ?=
PROBE   ?=
OUT     ?= runs

SETS   := shapes cifar10 cifar100 tinyimagenet imagenet100 imagenet1k
TABLES := $(patsubst results/%.sh,%,$(wildcard results/*.sh))
ENV    := $(if $(filter .venv/bin/python,$(PYTHON)),.venv/installed)
ifneq ($(words $(OUT)),1)
$(error OUT="$(OUT)": want one folder without a space in its name, which make would take for two)
endif
# In a recipe: where torch finds no accelerator, two runs stand side by side on half of the cores each.
ASK    = $(PYTHON) -c 'import torch; print(2 - torch.accelerator.is_available())' 2>/dev/null || echo 2
CORES  = env -u OMP_NUM_THREADS nproc 2>/dev/null || getconf _NPROCESSORS_ONLN
SIDES  = side=$$($(ASK)); \
         cores=$$($(CORES)); export OMP_NUM_THREADS=$$(( cores > side ? cores / side : 1 ))
FOUND  = --data '$(DATA)' --cache '$(CACHE)'

.DEFAULT_GOAL := help
.PHONY: help setup test test-1 test-2 soak bench demo force $(SETS) $(TABLES)
.SECONDARY:

help:
	@echo 'make setup         torch, torchvision, numpy and pytest into .venv'
	@echo 'make demo          that, draw a data set, pretrain, probe, print a table: minutes on two CPU cores'
	@echo 'make cifar10       pretrain -> probe -> table; likewise cifar100 tinyimagenet imagenet100 imagenet1k'
	@echo 'make NAME          the table of results/NAME.sh: $(TABLES)'
	@echo 'make test          the test suite          make soak    the checks that take longer'
	@echo 'make bench         a step of each method against the floor of its network'
	@echo 'variables, with their defaults (make NAME has data/, cache/ and runs/, which may be links):'
	@echo '  METHODS="$(METHODS)"   of these, moco byol simsiam swav barlow vicreg dino'
	@echo '  ARGS=""            further flags of every pretraining, as ARGS="--recipe cifar --seed 1"'
	@echo '  PROBE=""           further flags of every probe, as PROBE="--epochs 100"'
	@echo '  DATA=data CACHE=cache OUT=runs   folders of images, of decoded images, of products'
	@echo '  PYTHON=$(PYTHON)   an environment of your own'

setup: $(ENV)
.venv/installed: requirements.txt
	python3 -m venv .venv
	.venv/bin/python -m pip install --quiet -r requirements.txt
	touch $@

demo: shapes
$(SETS): $(ENV)
	+@$(SIDES); $(MAKE) --no-print-directory -j$$side \
	  $(METHODS:%=$(OUT)/$@/%/pretrained) $(patsubst %,$(OUT)/$@/%/probed,$(METHODS) random)
	@$(PYTHON) results/tables.py --rows $(patsubst %,$(OUT)/$@/%/results.jsonl,random $(METHODS))
	@echo 'Files below $(OUT)/$@/, a folder a method: log.jsonl, backbone.pt, results.jsonl'

# runs/cifar10/bassl/pretrained, .../probed: the set and the method are the names of the folders. No file has
# these names: the scripts themselves know what is done.
set    = $(notdir $(patsubst %/,%,$(dir $(@D))))
method = $(notdir $(@D))
script = $(if $(filter bassl,$(method)),bassl.py,$(if $(filter npid,$(method)),npid_distill.py,$(if \
         $(filter simclr,$(method)),bassl.py --layers 0,aug_study.py --methods $(method))))
$(OUT)/%/pretrained: force | $(ENV)
	$(PYTHON) $(script) --dataset $(set) $(FOUND) --out $(@D) $(ARGS)
# An untrained network like the first method's.
FIRST := $(firstword $(METHODS))
$(OUT)/%/random/probed: $(OUT)/%/$(FIRST)/pretrained
	$(PYTHON) linear_probe.py --random --backbone $(OUT)/$*/$(FIRST)/backbone.pt $(FOUND) --out $(@D) $(PROBE)
$(OUT)/%/probed: $(OUT)/%/pretrained
	$(PYTHON) linear_probe.py --backbone $(@D)/backbone.pt $(FOUND) $(PROBE)
force:

# Each is a list of commands that can be pasted, and ends in its table.
$(TABLES): $(ENV)
	$(SIDES); PATH="$(abspath $(dir $(PYTHON))):$$PATH" bash results/$@.sh

# In two halves side by side: most of a test's time is a script that starts.
# macOS's make has no -O.
SYNC := $(if $(filter output-sync,$(.FEATURES)),-O)
test: $(ENV)
	+@OMP_NUM_THREADS=1 $(MAKE) --no-print-directory -j2 $(SYNC) test-1 test-2
HALF := $(wildcard $(patsubst %,tests/test_%.py,cli bassl linear_probe recipes images cuda processes))
test-1:
	$(PYTHON) -m pytest -q $(HALF)
test-2:
	$(PYTHON) -m pytest -q $(filter-out $(HALF),$(wildcard tests/test_*.py))
soak: $(ENV)
	$(PYTHON) -m pytest -q tests -m soak
bench: $(ENV)
	$(PYTHON) tests/bench.py $(BENCH)
