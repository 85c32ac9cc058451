PYTHON ?= python3
BIN = .venv/bin
# LOCKED=1 installs exactly the versions of requirements.lock.
REQUIREMENTS = requirements.$(if $(LOCKED),lock,txt)
INSTALLED = .venv/installed$(if $(LOCKED),-locked)

.PHONY: help install demo cpu-hour test test-faults bench lint format lock release clean
help:
	@echo "make install  make .venv and install, no more"
	@echo "make demo    pretrain on the embedded digits, probe, draw (about a minute)"
	@echo "make cpu-hour  SimCLR on CIFAR-10, an hour on two cores; DATASET=path for a folder"
	@echo "make test    lint and tests"
	@echo "make test-faults  kills, full disks, damaged files: hours; FAULT_COUNT=20 for a sample"
	@echo "make bench   speed and memory beside the alternatives; DATASET=path for CIFAR-10"
	@echo "make reproduce-NAME  run a row of the README's table, or a sweep, again; DATASET=cifar10 for another source"
	@echo "make ... LOCKED=1  with exactly the versions that were tested, those of requirements.lock"
	@echo "make lock    write requirements.lock with the versions that .venv has"
	@echo "make release  encoders and checksums of reproduced runs, or of RUNS='folder ...', in release/"
	@echo "make format  let ruff format and mend the code"
	@echo "make clean   remove .venv and caches, keep data and results"

# uv takes 80 s where pip takes two to three minutes. It does not read pip's configuration: where that
# says what to install or from where, and where uv fails, pip installs.
PIP = $(BIN)/python -m pip --quiet --disable-pip-version-check
define install
	@echo "installing $(1) into .venv"
	@trap 'exit 130' INT; \
	! $(BIN)/python -m pip config list 2>/dev/null | grep -qE 'index|find-links|constraint' \
		&& $(PIP) install --only-binary uv uv \
		&& $(BIN)/python -m uv pip install --python $(BIN)/python --quiet --compile-bytecode -r $(1) \
		|| $(PIP) install -r $(1)
endef

NEW_ENOUGH = import sys; sys.version_info >= (3, 11) or sys.exit
$(INSTALLED): $(REQUIREMENTS)
	@$(PYTHON) -c '$(NEW_ENOUGH)("Python 3.11 or newer is needed: make PYTHON=python3.12 ...")'
	@[ ! -x $(BIN)/python ] || $(BIN)/python -c '$(NEW_ENOUGH)(".venv is of an older Python: make clean")'
	$(PYTHON) -m venv .venv
	$(call install,$(REQUIREMENTS))
	@touch $@

.venv/installed-dev: requirements-dev.txt $(INSTALLED)
	$(call install,requirements-dev.txt)
	@touch $@

install: $(INSTALLED)

# Digits must not be mirrored, hence no flip; the other settings were chosen on held-out training
# images.
demo: $(INSTALLED)
	$(BIN)/python simclr.py --dataset digits --encoder small --epochs 200 --batch-size 256 \
		--crop-scale-min 0.35 --flip-probability 0 --temperature 0.2 --pixel-baseline

# More or fewer --epochs take another time; the recipe stays.
cpu-hour: $(INSTALLED)
	$(BIN)/python simclr.py --dataset $(or $(DATASET),cifar10) --width 32 --view-size 16,16,16,24 \
		--epochs 64 --batch-size 256 --optimizer muon --learning-rate 0.01 --weight-decay 0.1 \
		--warmup-epochs 2 --temperature 0.2 --knn-every 0

lint: .venv/installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy *.py support

# Three on two cores: one of them often waits for a process that it has started.
test: lint
	$(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder

test-faults: .venv/installed-dev
	$(BIN)/python -m pytest -m slow

# kornia, openTSNE and pytorch-metric-learning only serve as rows of the tables.
bench: .venv/installed-dev
	$(PIP) install kornia openTSNE pytorch-metric-learning
	@set -e; export BENCHMARK_RESULTS=benchmarks/results; run="$(BIN)/python -W ignore benchmarks"; \
	data="$(if $(DATASET),--dataset $(DATASET))"; \
	$$run/augmentation.py $$data; $$run/randaugment.py; $$run/rnn_epoch.py $$data; \
	$$run/simclr_epoch.py $$data; $$run/simclr_epoch.py --stem cifar --batch-size 256 $$data; \
	$$run/simsiam_epoch.py; $$run/probe.py; $$run/tsne.py; $$run/nt_xent_memory.py; \
	$$run/embedding.py; $$run/startup.py $$data; $$run/growth.py

# make reproduce-simclr-digits; DATASET=cifar10 where the result names a folder of JPEG files
reproduce-%: $(INSTALLED)
	$(BIN)/python docs/results/reproduce.py $* $(if $(DATASET),--dataset $(DATASET))

# The lock holds for Linux, macOS and Windows, and for Python 3.11 and newer.
lock: .venv/installed-dev
	$(PIP) install uv
	$(PIP) freeze > .venv/tested.txt
	$(BIN)/python -m uv pip compile --quiet --universal --generate-hashes --no-annotate --python-version 3.11 \
		--constraint .venv/tested.txt --custom-compile-command "make lock" \
		--output-file requirements.lock requirements.txt

release: $(INSTALLED)
	$(BIN)/python docs/results/release.py $(RUNS)

format: .venv/installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -prune -exec rm -rf {} +
