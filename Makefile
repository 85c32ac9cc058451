PYTHON ?= python3
BIN = .venv/bin

.PHONY: help install demo test test-faults lint format clean
help:
	@echo "make demo    pretrain on the embedded digits, probe, draw (about a minute)"
	@echo "make test    lint and tests"
	@echo "make test-faults  kills, full disks, damaged files: hours; FAULT_COUNT=20 for a sample"
	@echo "make format  let ruff format and mend the code"
	@echo "make clean   remove .venv and caches, keep data and results"

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

.venv/installed-dev: requirements-dev.txt .venv/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@

install: .venv/installed

# Digits must not be mirrored, hence no flip; the other settings were chosen on held-out training
# images.
demo: .venv/installed
	$(BIN)/python simclr.py --dataset digits --encoder small --epochs 200 --batch-size 256 \
		--crop-scale-min 0.35 --flip-probability 0 --temperature 0.2 --pixel-baseline

lint: .venv/installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

test: lint
	$(BIN)/python -m pytest

test-faults: .venv/installed-dev
	$(BIN)/python -m pytest -m slow

format: .venv/installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv .pytest_cache .ruff_cache
	find . -name __pycache__ -prune -exec rm -rf {} +
