# make train   set up .venv, then train the demo: a small GPT, offline, in minutes
# make test    set up .venv with the test packages, then run the tests
# make test-all  and those that take minutes
# make notebooks  set up .venv with Jupyter and GPT-2's vocabulary, then open the notebooks
# make PYTHON=python3.12 ...  picks an interpreter
# make bench   speed of training, data, start-up and ranks on this machine, in under 15 minutes
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: train test test-all notebooks bench clean

train: .venv/run
	$(BIN)/python train.py
	@echo "how all of this works, in ten stops: docs/learn.md (in Chinese: docs/learn.zh-CN.md)"

test: .venv/dev
	$(BIN)/python -m pytest -n auto --maxprocesses=8

test-all: .venv/dev
	$(BIN)/python -m pytest -n auto --maxprocesses=8 -m 'not network and not gpu'

notebooks: .venv/notebooks
	@$(BIN)/python bpe.py encode < /dev/null > /dev/null || \
		echo "without GPT-2's vocabulary notebook 02 leaves out some cells, and says which"
	$(BIN)/jupyter lab --ServerApp.root_dir="$(CURDIR)" notebooks/01_model.ipynb

bench: .venv/dev
	$(BIN)/python -m bench

.venv/run: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "oneloop needs Python 3.10 or newer; name one: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 2; }
	@echo "setting up .venv (PyTorch is large; this takes some minutes the first time)"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(PIP) torch
	@$(PIP) -e ".[plots]"
	@touch $@

.venv/dev: .venv/run
	@$(PIP) -e ".[dev]"
	@touch $@

.venv/notebooks: .venv/run
	@$(PIP) -e ".[notebooks]"
	@touch $@

clean:
	rm -rf .venv out
