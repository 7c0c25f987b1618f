# The two commands: `make train` and `make test`. Each sets .venv up when it is missing.
# `make test-all` runs the slow tests too: four and eight processes, kills.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
ARGS ?=
# Three on two cores: some tests wait, for a timeout or for other processes.
JOBS ?= 3
TESTS := OMP_NUM_THREADS=1 $(RUN) -m pytest -n $(JOBS) --no-loadscope-reorder

.PHONY: train test test-all install clean

train: install  ## train NVLM-H on the embedded pages; ARGS="arch=xattn seed=2" for others
	$(RUN) launch/train.py resume=auto $(ARGS)

test: install
	$(VENV)/bin/ruff check nvlm launch tests benchmarks
	$(TESTS) -m "not slow" $(ARGS)

test-all: install
	$(VENV)/bin/ruff check nvlm launch tests benchmarks
	$(TESTS) $(ARGS)

install: $(VENV)/.installed

$(VENV)/.installed: setup.py constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 12) and "Python 3.12 or later is needed: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet -e '.[test,demo]' -c constraints.txt
# Transformer Engine's Python alone, for tests: out of sight, because without its libraries it does not load.
	$(VENV)/bin/pip install --quiet --no-deps --upgrade --target $(VENV)/engine transformer-engine -c constraints.txt
	touch $@

clean:
	rm -rf $(VENV) runs build *.egg-info
