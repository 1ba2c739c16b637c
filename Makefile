# Two commands do everything on a fresh machine with Python 3.11 or newer: `make demo` and `make test`.
# The first Python of the list that is new enough is taken; `make PYTHON=... demo` names another.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; exit; }; done; echo python3)
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
TESTABLE := $(VENV)/.testable

.DEFAULT_GOAL := help
.PHONY: help demo test lint bench bench-gpu clean

help: ## Show this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 10

# The stamp is written last: an install that was interrupted is done again.
$(INSTALLED): requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: diffusers 0.42 needs Python 3.11 or newer, and this is " + sys.version.split()[0] + ": install one, or name it with make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

$(TESTABLE): $(INSTALLED) requirements-tests.txt requirements-ray.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-tests.txt
	@touch $@

demo: $(INSTALLED) ## Train the toy editor on photographs, edit others with it, show the grid (10 minutes on 2 cores)
	$(BIN)/python demo.py

test: $(TESTABLE) ## Run every test
	$(BIN)/python -m pytest -n logical --maxprocesses=8 --dist worksteal

lint: $(TESTABLE) ## Check the style with ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: $(INSTALLED) ## Measure speed on the CPU beside diffusers' example: make bench PEER=diffusers/examples/instruct_pix2pix
	@test -d "$(PEER)" || { echo "error: PEER must name diffusers' examples/instruct_pix2pix, such as make bench PEER=../diffusers/examples/instruct_pix2pix"; exit 2; }
	$(BIN)/python benchmarks/training.py --peer $(PEER) --cells toy depth
	$(BIN)/python benchmarks/loader.py
	$(BIN)/python benchmarks/optimizer.py --size toy
	$(BIN)/python benchmarks/checkpoints.py --sizes toy
	$(BIN)/python benchmarks/performance_page.py

bench-gpu: $(INSTALLED) ## The same on a GPU with 80 GB: make bench-gpu PEER=... [CELLS="sd15-256"]
	@test -d "$(PEER)" || { echo "error: PEER must name diffusers' examples/instruct_pix2pix, such as make bench-gpu PEER=../diffusers/examples/instruct_pix2pix"; exit 2; }
	$(BIN)/python benchmarks/training.py --peer $(PEER) --cells $(or $(CELLS),sd15-256 sd15-512 sdxl-1024)
	$(BIN)/python benchmarks/optimizer.py
	$(BIN)/python benchmarks/performance_page.py

clean: ## Remove the environment and what the demo made
	rm -rf $(VENV) demo-output
