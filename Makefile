# Every target makes or reuses the environment that it needs. Settings, as in `make VENV=/x test`:
PYTHON ?= python3#     Python 3.11 or newer that makes the environments
VENV ?= .venv#         main environment; holds no torchvision
PEERS ?= .venv-peers#  the same and open_clip, timm: tests/peers and benchmarks only
TF4 ?= .venv-tf4#      transformers 4.57 and sentence-transformers, no m2encoder: test-consumers
TF5 ?= .venv-tf5#      the same with the newest transformers
RUNS ?= runs#          where the demos write
TORCH_INDEX ?=#        a package index to take torch from, for example PyTorch's CPU wheels

BIN := $(VENV)/bin
PEERS_BIN := $(PEERS)/bin
TORCH := $(shell grep '^torch==' constraints.txt)
TORCHVISION := $(shell grep '^torchvision==' constraints-peers.txt)
QUICK := not slow and not gpu and not network
SLOW := slow and not gpu and not network
CONSUMERS := sentence-transformers transformers pillow
EMOJI := $(foreach artist,google twitter,build/emoji/emoji-datasource-$(artist)-16.0.0.tgz)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo demo-smoke demo-emoji test test-consumers test-slow check bench clean

help:
	@echo "make demo        draw pictures, train, evaluate, index, search; report in $(RUNS)/demo"
	@echo "make demo-smoke  the same in half a minute, to see that everything runs"
	@echo "make demo-emoji  train on one artist's emoji, search another's (needs npm)"
	@echo "make test        the tests"
	@echo "make test-consumers  model folders in other libraries, where m2encoder is not installed"
	@echo "make test-slow   the tests that take minutes"
	@echo "make check       formatting, lint, types and the import rule"
	@echo "make bench       the benchmark tables"
	@echo "make clean       remove caches and build products; keeps $(RUNS) and the environments"

demo: $(VENV)/.stamp
	$(BIN)/m2enc demo --out $(RUNS)/demo

demo-smoke: $(VENV)/.stamp
	$(BIN)/m2enc demo --smoke --out $(RUNS)/demo-smoke

demo-emoji: $(VENV)/.stamp $(EMOJI)
	$(BIN)/m2enc demo --source emoji --archives $(EMOJI) --out $(RUNS)/demo-emoji

test: $(VENV)/.stamp $(PEERS)/.stamp
	$(BIN)/python -m pytest -q -m "$(QUICK)" tests
	$(PEERS_BIN)/python -m pytest -q -m "$(QUICK)" tests/peers tests/test_foreign.py

test-consumers: $(VENV)/.stamp $(TF4)/.stamp $(TF5)/.stamp
	M2ENC_CONSUMERS=$(TF4):$(TF5) $(BIN)/python -m pytest -q tests/test_consumers.py tests/test_card.py

test-slow: $(VENV)/.stamp $(PEERS)/.stamp
	$(BIN)/python -m pytest -q -m "$(SLOW)" tests
	$(PEERS_BIN)/python -m pytest -q -m "$(SLOW)" tests/peers

check: $(VENV)/.stamp
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

bench: $(PEERS)/.stamp
	@set -e; for script in benchmarks/*.py; do \
	  echo "== $$script"; $(PEERS_BIN)/python $$script; \
	done

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find m2encoder/ eval/ data_pipeline/ tests/ benchmarks/ -name __pycache__ -prune -exec rm -rf {} +

# --- environments: made again when pyproject.toml or the pinned versions change ------------------

# $(call environment,FOLDER,PINNED PACKAGES,EXTRAS,CONSTRAINTS): one pip command, so that nothing
# installed later can replace the pinned torch. Editable by path: with an import hook, a Python started
# in the folder above a clone named m2encoder would take that folder for the package.
define environment
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else \
	  "m2encoder needs Python 3.11 or newer, $(PYTHON) is " + sys.version.split()[0] + \
	  "; run make PYTHON=/path/to/python3.11")'
	@echo "Making the environment $(1): a minute or several, mostly downloading torch."
	test -x $(1)/bin/pip || $(PYTHON) -m venv $(1)
	$(if $(TORCH_INDEX),$(1)/bin/pip install $(2) --index-url $(TORCH_INDEX))
	$(1)/bin/pip install $(2) -e ".[$(3)]" -c $(4) --config-settings editable_mode=compat
	@touch $@
endef

$(VENV)/.stamp: pyproject.toml constraints.txt
	$(call environment,$(VENV),$(TORCH),dev,constraints.txt)

$(PEERS)/.stamp: pyproject.toml constraints-peers.txt
	$(call environment,$(PEERS),$(TORCH) $(TORCHVISION),dev$(comma)peers,constraints-peers.txt)

# $(call consumer,FOLDER,CONSTRAINTS): an environment without m2encoder.
define consumer
	@echo "Making the environment $(1): a minute or several, mostly downloading torch."
	test -x $(1)/bin/pip || $(PYTHON) -m venv $(1)
	$(if $(TORCH_INDEX),$(1)/bin/pip install $(TORCH) --index-url $(TORCH_INDEX))
	$(1)/bin/pip install $(TORCH) $(CONSUMERS) -c $(2)
	@touch $@
endef

$(TF4)/.stamp: constraints.txt constraints-tf4.txt
	$(call consumer,$(TF4),constraints-tf4.txt)

$(TF5)/.stamp: constraints.txt constraints-tf5.txt
	$(call consumer,$(TF5),constraints-tf5.txt)

comma := ,

build/emoji/%-16.0.0.tgz:
	@command -v npm >/dev/null || { \
	  echo "make demo-emoji fetches the pictures with npm, which is not installed; get Node.js, or run make demo"; \
	  exit 1; }
	mkdir -p $(@D)
	cd $(@D) && npm pack --silent $*@16.0.0
