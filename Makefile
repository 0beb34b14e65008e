# Pretrain -> linear probe -> result table. `make` lists the targets; every product is a file, made once, and an interrupted run goes on.
#   make cifar10 DATA=~/images EPOCHS=20 LIMIT=20000 ARCH=resnet10 STEM=imagenet ARGS="--optimizer adamw --lr 0.004" PROBE="--epochs 0"

PYTHON ?= .venv/bin/python
DATA   ?= data
# The control holds the gate open: a learned one may take longer than a short run to find the shortcut that it would open for.
CONTROL_GATE ?= 3

# The named data sets run at the recipe of each script unless a variable says otherwise.
NAMED := $(filter cifar10 cifar100 tinyimagenet imagenet100 imagenet1k,$(MAKECMDGOALS))
ifneq ($(word 2,$(NAMED)),)
$(error one data set at a time, not $(NAMED))
endif
ifneq ($(NAMED),)
DATASET := $(NAMED)
endif
# The papers' recipes beside CIFAR: ResNet-18 at 64 px, ResNet-50 at 224, batch 256. (--size and the stem follow from the data set.)
ifneq ($(filter tinyimagenet imagenet100 imagenet1k,$(NAMED)),)
ARCH   ?= $(if $(filter tinyimagenet,$(NAMED)),resnet18,resnet50)
BATCH  ?= 256
endif
# A bank of 1.28 million rows: NPID's own width there (Wu et al. 2018), 0.7 GB in place of 10.5.
ifneq ($(filter imagenet1k,$(NAMED)),)
NPID   ?= --dim 128
endif
# The demo and the studies default to a budget of minutes on two CPU cores. NPID wants epochs more than images, and its official SGD;
# 5120 is a multiple of every batch size of `make batches`, so that all of them see the same images.
ifneq ($(filter demo,$(MAKECMDGOALS)),)
NPID   ?= --dim 512 --optimizer sgd --lr 0.5 --cutmix 0 --limit 1000 --epochs 60
endif
ifneq ($(filter npid-ablation,$(MAKECMDGOALS)),)
EPOCHS ?= 60
LIMIT  ?= 1000
endif
# The study compares: each method at its published learning rate, two seeds; LARGER= leaves the larger backbone out.
ifneq ($(filter study study-%,$(MAKECMDGOALS)),)
EPOCHS ?= 3
LIMIT  ?= 2560
ARGS   ?=
endif
LARGER ?= resnet18
comma  := ,
STUDY  ?= --methods simclr,moco,byol,barlow --augs simclr,byol,multicrop --switch-methods simclr,byol --archs $(ARCH)$(if $(LARGER),$(comma)$(LARGER)) \
          --seeds 0,1 --knn-every 0 --probe-fraction 0.2
ifneq ($(filter demo study study-% control layers batches npid-ablation efficiency,$(MAKECMDGOALS)),)
ARCH   ?= resnet10
STEM   ?= imagenet
EPOCHS ?= 8
LIMIT  ?= 5120
BATCH  ?= 128
ARGS   ?= --optimizer adamw --lr 0.004
PROBE  ?= --epochs 0
NPID   ?= --dim 512 --optimizer sgd --lr 0.5
endif
DATASET ?= shapes

FLAGS = --dataset $(DATASET) --data $(DATA) $(if $(ARCH),--arch $(ARCH)) $(if $(STEM),--stem $(STEM)) $(if $(EPOCHS),--epochs $(EPOCHS)) \
        $(if $(LIMIT),--limit $(LIMIT)) $(if $(BATCH),--batch $(BATCH)) $(if $(SEED),--seed $(SEED)) $(if $(SIZE),--size $(SIZE)) \
        $(if $(CACHE),--cache $(CACHE)) $(if $(DEVICE),--device $(DEVICE)) $(ARGS)
PROBE_FLAGS = --dataset $(DATASET) --data $(DATA) $(if $(SEED),--seed $(SEED)) $(if $(SIZE),--size $(SIZE)) \
              $(if $(CACHE),--cache $(CACHE)) $(if $(DEVICE),--device $(DEVICE)) $(PROBE)
# What changes a result is part of the folder's name, so that another setting never meets the products of this one.
TAG  = $(if $(ARCH),-$(ARCH))$(if $(STEM),-$(STEM))$(if $(EPOCHS),-e$(EPOCHS))$(if $(LIMIT),-n$(LIMIT))$(if $(BATCH),-b$(BATCH))$(if $(SEED),-s$(SEED))$(if \
       $(SIZE),-$(SIZE)px)$(if $(ARGS),-$(call sum,$(ARGS)))
sum = $(shell echo '$(1)' | cksum | cut -d' ' -f1)
N  := $(if $(NPID),-$(call sum,$(NPID)))
P  := probe$(if $(PROBE),-$(call sum,$(PROBE)))
OUT ?= runs/$(DATASET)$(TAG)
export CONTROL_GATE DATASET DATA ARCH STEM EPOCHS LIMIT BATCH SEED SIZE CACHE DEVICE ARGS NPID PROBE STUDY LARGER OUT PYTHON
ENV := $(if $(filter .venv/bin/python,$(PYTHON)),.venv/installed)
# Two runs side by side, each on half of the cores, finish sooner than one after the other on all of them. (make efficiency takes times
# that count, so it runs one at a time.)
PAIRED = OMP_NUM_THREADS=$$($(PYTHON) -c 'import os; print(max(1, os.cpu_count() // 2))') $(MAKE) --no-print-directory -j2

.DEFAULT_GOAL := help
.PHONY: help setup test test-1 test-2 soak bench bench-data demo table seeds control layers batches npid-ablation efficiency study study-1 study-2 cifar10 cifar100 tinyimagenet imagenet100 imagenet1k clean

help:
	@echo 'make demo         install, draw shapes, pretrain, probe, print a table: minutes on two CPU cores'
	@echo 'make cifar10      pretrain -> probe -> table on CIFAR-10; likewise cifar100 tinyimagenet imagenet100 imagenet1k'
	@echo 'make seeds        the same for SEEDS="0 1 2" of DATASET, in one table'
	@echo 'make control      BA-SSL: what each fusion lets a network cheat, and what it gives on real pairs'
	@echo 'make layers       BA-SSL: 0 to 4 Embedding Layers          make batches   BA-SSL: batch sizes 32 to 512'
	@echo 'make npid-ablation  NPID and its terms, one added at a time   make efficiency NPID against MoCo v2: time, images, network'
	@echo 'make study        methods x augmentations x seeds in one template, their effects beside the published ones (STUDY="its flags")'
	@echo 'make test         the test suite                           make soak      the checks that take longer'
	@echo 'make bench        a step against the floor of its network    make bench-data PHOTOS=DIR   the stages of reading large images'
	@echo 'variables: DATASET DATA EPOCHS ARCH STEM LIMIT BATCH SEED SIZE CACHE DEVICE, ARGS="further flags of the scripts",'
	@echo '           NPID="further flags of npid_distill.py alone", PROBE="flags of linear_probe.py", OUT=folder of the products, PYTHON=an environment of your own'

setup: $(ENV)
.venv/installed: requirements.txt
	python3 -m venv .venv
	.venv/bin/python -m pip install --quiet -r requirements.txt
	touch $@

# In two halves side by side: most of a test's time is a script that starts. What a half prints comes whole at its end.
test: $(ENV)
	+@$(PAIRED) -O test-1 test-2
TESTS := $(wildcard tests/test_*.py)
FIRST := $(patsubst %,tests/test_%.py,cli bassl speed linear_probe data npid_distill)
test-1:
	$(PYTHON) -m pytest -q $(FIRST)
test-2:
	$(PYTHON) -m pytest -q $(filter-out $(FIRST),$(TESTS))
soak: $(ENV)
	$(PYTHON) -m pytest -q tests -m soak
# BENCH="flags of tests/bench.py"
BENCH ?= --batch 256
bench: $(ENV)
	$(PYTHON) tests/bench.py $(BENCH)
bench-data: $(ENV)
	$(PYTHON) tests/bench.py --photos $(or $(PHOTOS),$(error set PHOTOS to a folder of photos)) --arch resnet50 --batch 32

# $(call run,folder,script,flags): a pretraining run, resumed by its script where it was interrupted
define run
$(OUT)/$(1)/backbone.pt: | $(ENV)
	$(PYTHON) $(2) $(FLAGS) $(3) --out $(OUT)/$(1)
endef
$(eval $(call run,simclr,bassl.py,--layers 0))
$(eval $(call run,bassl,bassl.py,))
$(eval $(call run,npid$(N),npid_distill.py,$(NPID)))
FUSIONS := plain shuffled one
$(eval $(call run,control/none-unpaired,bassl.py,--layers 0 --unpaired))
$(eval $(call run,control/adversarial-unpaired,bassl.py,--unpaired --gate $(CONTROL_GATE)))
$(foreach f,$(FUSIONS),$(eval $(call run,control/$(f),bassl.py,--fuse $(f))))
$(foreach f,$(FUSIONS),$(eval $(call run,control/$(f)-unpaired,bassl.py,--fuse $(f) --unpaired --gate $(CONTROL_GATE))))
LAYERS := 2 3 4
$(foreach n,$(LAYERS),$(eval $(call run,layers/$(n),bassl.py,--layers $(n))))
BATCHES := $(filter-out $(BATCH),32 64 128 256 512)
$(foreach b,$(BATCHES),$(eval $(call run,batches/$(b),bassl.py,--batch $(b))))
$(foreach b,$(BATCHES),$(eval $(call run,batches/$(b)-none,bassl.py,--batch $(b) --layers 0)))
ABLATION := 1-npid 2-calibration 3-gradient 4-distillation 5-cutmix
$(eval $(call run,ablation$(N)/1-npid,npid_distill.py,$(NPID) --init random --update ema --lambda-kl 0 --cutmix 0))
$(eval $(call run,ablation$(N)/2-calibration,npid_distill.py,$(NPID) --update ema --lambda-kl 0 --cutmix 0))
$(eval $(call run,ablation$(N)/3-gradient,npid_distill.py,$(NPID) --lambda-kl 0 --cutmix 0))
$(eval $(call run,ablation$(N)/4-distillation,npid_distill.py,$(NPID) --cutmix 0))
$(eval $(call run,ablation$(N)/5-cutmix,npid_distill.py,$(NPID)))
# Efficiency: NPID and MoCo v2 at equal epochs, on shares of the images and on networks from small to large.
MOCO    := --framework moco --layers 0
SHARES  := 10 25 50 100
ARCHS   ?= resnet10 resnet18 resnet34
SETTINGS := $(SHARES:%=images-%) $(filter-out network-$(ARCH),$(ARCHS:%=network-%))
share    = --limit $(shell expr $(or $(LIMIT),50000) \* $(1) / 100)
$(foreach n,$(SHARES),$(eval $(call run,efficiency$(N)/npid-images-$(n),npid_distill.py,$(NPID) $(call share,$(n)))))
$(foreach n,$(SHARES),$(eval $(call run,efficiency/moco-images-$(n),bassl.py,$(MOCO) $(call share,$(n)))))
$(foreach a,$(ARCHS),$(eval $(call run,efficiency$(N)/npid-network-$(a),npid_distill.py,$(NPID) --arch $(a))))
$(foreach a,$(ARCHS),$(eval $(call run,efficiency/moco-network-$(a),bassl.py,$(MOCO) --arch $(a))))

$(OUT)/random/$(P)/results.jsonl: | $(ENV)
	$(PYTHON) linear_probe.py --random $(if $(ARCH),--arch $(ARCH)) $(if $(STEM),--stem $(STEM)) $(PROBE_FLAGS) --out $(@D)
$(OUT)/%/$(P)/results.jsonl: $(OUT)/%/backbone.pt
	$(PYTHON) linear_probe.py --backbone $< $(PROBE_FLAGS) --out $(@D)

RUNS = $(patsubst %,$(OUT)/%/$(P)/results.jsonl,random simclr bassl npid$(N))
# The plain framework and the default fusion are part of every study.
BASE = $(patsubst %,$(OUT)/%/$(P)/results.jsonl,random simclr bassl)
$(OUT)/table.md: $(RUNS)
$(OUT)/control.md: $(BASE) $(patsubst %,$(OUT)/control/%/$(P)/results.jsonl,$(FUSIONS) $(patsubst %,%-unpaired,none $(FUSIONS) adversarial))
$(OUT)/layers.md: $(BASE) $(LAYERS:%=$(OUT)/layers/%/$(P)/results.jsonl)
$(OUT)/batches.md: $(BASE) $(foreach b,$(BATCHES),$(OUT)/batches/$(b)-none/$(P)/results.jsonl $(OUT)/batches/$(b)/$(P)/results.jsonl)
$(OUT)/npid-ablation.md: $(OUT)/random/$(P)/results.jsonl $(ABLATION:%=$(OUT)/ablation$(N)/%/$(P)/results.jsonl)
$(OUT)/efficiency.md: $(foreach s,$(SETTINGS),$(OUT)/efficiency$(N)/npid-$(s)/$(P)/results.jsonl $(OUT)/efficiency/moco-$(s)/$(P)/results.jsonl)
	@$(PYTHON) linear_probe.py --table $^ --figure $(OUT)/efficiency.png > $@.tmp && mv $@.tmp $@
$(OUT)/%.md:
	@$(PYTHON) linear_probe.py --table $^ > $@.tmp && mv $@.tmp $@

table: $(OUT)/table.md
	@cat $<; echo; echo "Files: $(OUT)/{random,simclr,bassl,npid$(N)}/: log.jsonl, backbone.pt, results.jsonl; the table: $<"
demo: $(ENV)
	+@$(PAIRED) $(RUNS)
	+@$(MAKE) --no-print-directory table
SEEDS ?= 0 1 2
seeds: $(ENV)
	+@for s in $(SEEDS); do $(PAIRED) table SEED=$$s OUT=$(OUT)/seed-$$s || exit; done
	$(PYTHON) linear_probe.py --table '$(OUT)/seed-*/*/$(P)/results.jsonl' | tee $(OUT)/seeds.md
control layers batches npid-ablation: $(ENV)
	+@$(PAIRED) $(OUT)/$@.md
	@cat $(OUT)/$@.md
# Two processes share the cells; either can be killed, and the same command goes on.
study: $(ENV)
	@mkdir -p $(OUT)/study
	+@$(PAIRED) study-1 study-2
study-1:
	$(PYTHON) aug_study.py --study $(FLAGS) $(STUDY) --out $(OUT)/study
study-2:
	@$(PYTHON) aug_study.py --study $(FLAGS) $(STUDY) --out $(OUT)/study > $(OUT)/study/second.log
efficiency: $(ENV)
	+@$(MAKE) --no-print-directory $(OUT)/$@.md
	@cat $(OUT)/$@.md
cifar10 cifar100 tinyimagenet imagenet100 imagenet1k: table

clean:
	rm -rf runs
