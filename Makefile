# For users: make demo. For developers: make check, make test. Everything lives in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO ?= demo

.PHONY: help demo check test test-faults lint install wordnet chromium bench full-size gpu rehearsal clean
.DEFAULT_GOAL := help

help:
	@echo "make install    install into .venv"
	@echo "make demo       install into .venv and run the whole job, small"
	@echo "make check      linters, type checker, the tests that need no SLURM, browser, new process or trained model"
	@echo "make test       linters, type checker, every test"
	@echo "make test-faults  kills, preemption, full disks: no image is lost; a crowd of visitors; every synset exported; a sweep (25 minutes)"
	@echo "make bench      speed, as ratios against named peers"
	@echo "make full-size  Stable Diffusion 1.4's architecture, random weights, once through"
	@echo "make gpu        all that a GPU should show, checked and measured; a page benchmarks/gpu-CARD.md"
	@echo "make rehearsal  all 262,040 images, tiny, on a test cluster that is disturbed: under 45 minutes"
	@echo "make clean      remove the demo's run folder"

# pip keeps a torch that is there already (VENV_FLAGS=--system-site-packages for a site's own).
$(VENV)/installed: pyproject.toml
	@echo "Installing into $(VENV): about 7 GB on disk, most of it torch; 3 GB to download where pip has none of it yet."
	$(PYTHON) -m venv $(VENV_FLAGS) $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install -e '.[lite]'
	touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	touch $@

install: $(VENV)/installed

# WordNet comes from NLTK's data path or the system; as root on Debian it can be installed.
wordnet: $(VENV)/installed
	@$(BIN)/python -m sdwn.wordnet.corpus || ./tests/install-wordnet

demo: wordnet
	$(BIN)/sdwn run demo $(DEMO)
	@echo
	@echo "The command lives in $(VENV); activate it, then look at what was made:"
	@echo "    source $(BIN)/activate"
	@echo "    sdwn browse $(DEMO)/release"

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Where there is no browser, its tests are skipped and say so.
chromium:
	@./tests/install-chromium || true

# A file's tests stay in one process. Two processes may each have a SLURM of their own. Not
# --dist loadgroup: pytest 9.2 does not show pytest-xdist 3.8 the groups, and nothing says so.
PYTEST := $(BIN)/pytest -n auto --dist loadfile --no-loadscope-reorder

check: lint wordnet
	$(PYTEST) -m "not slurm and not browser and not process and not model and not long"

test: lint wordnet chromium
	$(PYTEST)

test-faults: wordnet $(VENV)/installed-dev
	$(BIN)/pytest tests/test_faults.py -m ""
	$(BIN)/pytest tests/test_browse.py tests/test_export.py tests/test_sweep.py -m long

bench: $(VENV)/installed-dev wordnet
	$(BIN)/python benchmarks/bench.py

full-size: wordnet
	$(BIN)/python benchmarks/full_size.py

gpu: $(VENV)/installed
	$(BIN)/sdwn selftest --page benchmarks/gpu-CARD.md

rehearsal: wordnet
	$(BIN)/python benchmarks/rehearsal.py

clean:
	rm -rf $(DEMO)
