# make train and make test set everything up first: a virtual environment of their own in .venv.

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python

.PHONY: train test slow gpu bench lint setup clean

train: $(VENV)/ready
	$(RUN) -m ddpm.train --model gddm

test: $(VENV)/ready
	$(RUN) -m pytest

slow: $(VENV)/ready
	$(RUN) -m pytest -m slow

gpu: $(VENV)/ready
	$(RUN) -m pytest -m gpu

bench: $(VENV)/bench
	$(RUN) -m benchmarks.bench

lint: $(VENV)/ready
	$(RUN) -m ruff check .

setup: $(VENV)/ready

$(VENV)/ready: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "error: Python 3.11 or newer is needed; run make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

$(VENV)/bench: requirements-bench.txt $(VENV)/ready
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements-bench.txt
	touch $@

clean:
	rm -rf $(VENV)
