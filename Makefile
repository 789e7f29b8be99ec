# All that a checkout needs, given Python >= 3.11 and make. `make` alone lists the targets.

VENV    ?= .venv
EXTRAS  ?= dev
ARGS    ?=
WORKERS ?= 2
BIN     := $(VENV)/bin
# transformers 4 keeps its parts elsewhere than 5, and an environment holds one of them.
OLDER   := .venv-transformers4
# The oldest packages that pyproject.toml allows, which pip cannot be asked for and uv can.
OLDEST  := .venv-oldest
# The releases that everything was last tried with; LOCK= takes the newest instead.
LOCK    ?= constraints.txt
NEWEST  := .venv-newest

# The first interpreter that is new enough and can make environments. python3 leads: it is the one the user chose.
PYTHON ?= $(shell for p in python3 python python3.14 python3.13 python3.12 python3.11; do \
	"$$p" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 \
	&& { echo "$$p"; break; }; done)

# Two test processes share the cores with torch's own threads. Threads that spin while they wait then make the tests
# several times slower; sleeping ones do not and, unlike OMP_NUM_THREADS=1, leave their number to torch and the tests.
PYTEST := OMP_WAIT_POLICY=PASSIVE $(BIN)/pytest -n $(WORKERS) --dist worksteal

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help venv install bench readme claims downstream soak fuzz mutants sizes docs test test-older test-oldest newest lock test-all check lint types audit packages format dist clean distclean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))
	@echo
	@echo '  ARGS="..."      goes to the benchmark or to pytest:  make test ARGS="tests/test_config.py -k preset"'
	@echo '  EXTRAS=dev,hf   more optional dependencies           PYTHON=python3.12   another interpreter'
	@echo '  WORKERS=8       parallel test processes              VENV=path           another environment'

venv: $(BIN)/python ## create the empty environment (to put a particular torch build in it first)

install: $(VENV)/$(EXTRAS).stamp ## install the package for development

bench: $(VENV)/bench.stamp ## measure this machine: make bench ARGS="--help"
	$(BIN)/xfm-fast bench $(ARGS)

readme: $(VENV)/$(EXTRAS).stamp ## write the README's tables anew from benchmarks/results
	$(BIN)/python -m tools.readme $(ARGS)

claims: $(VENV)/$(EXTRAS).stamp ## train tiny models with and without the paper's method, five seeds (about an hour of a core)
	$(BIN)/xfm-fast reproduce claims $(ARGS)

downstream: $(VENV)/$(EXTRAS).stamp ## fine-tune a tiny model for every task of the paper
	$(BIN)/xfm-fast reproduce downstream $(ARGS)

soak: $(VENV)/$(EXTRAS).stamp ## kill work at every moment and go on (hours in all)
	$(BIN)/python -m tools.injection $(ARGS)

fuzz: $(VENV)/$(EXTRAS).stamp ## give every reader 100,000 damaged files
	$(BIN)/python -m tools.fuzz $(ARGS)

mutants: $(VENV)/$(EXTRAS).stamp ## put faults into kernels, losses and metrics: a test must catch each
	$(BIN)/python -m tools.seeded_faults $(ARGS)

sizes: ## print lines per folder and other figures beside budget.toml
	python3 -m tools.sizes $(ARGS)

docs: $(VENV)/docs.stamp ## build the pages of docs/ with the API into site/; a warning fails it
	$(BIN)/mkdocs build --quiet $(ARGS)

test: $(VENV)/$(EXTRAS).stamp ## run the tests, without the slow ones
	$(PYTEST) -m "not slow" $(ARGS)

test-older: ## run the tests of accelerate with transformers 4, in an environment of its own
	$(MAKE) install VENV=$(OLDER) EXTRAS=dev
	$(OLDER)/bin/python -m pip install --quiet "transformers>=4.57,<5"
	$(MAKE) test VENV=$(OLDER) EXTRAS=dev ARGS="tests/replace $(ARGS)"

test-oldest: ## run the tests of models, kernels and training with the oldest packages that are allowed
	$(MAKE) venv VENV=$(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet uv
	$(OLDEST)/bin/uv pip install --quiet --python $(OLDEST)/bin/python --resolution lowest-direct \
		--editable ".[cli,hf,serve,train,triton]" "hypothesis>=6.100" "pytest>=8.2" "pytest-xdist>=3.6" "httpx>=0.27"
	OMP_WAIT_POLICY=PASSIVE $(OLDEST)/bin/pytest -n $(WORKERS) --dist worksteal -m "not slow" tests/test_config.py \
		tests/test_io.py tests/test_nn.py tests/checkpoint tests/kernels tests/models tests/objectives tests/tasks \
		tests/training tests/replace $(ARGS)

newest: ## run the tests with the newest releases of all packages, whatever the lock says
	rm -rf $(NEWEST)
	$(MAKE) test VENV=$(NEWEST) LOCK=

lock: ## write the lock anew from the newest releases (try them first: make newest)
	$(MAKE) install VENV=$(NEWEST) EXTRAS=dev,docs LOCK=
	$(NEWEST)/bin/python -m pip freeze --exclude-editable | sed -E 's/\+[^ ;]*//; /^triton==/d; / @ /d' > constraints.txt

test-all: $(VENV)/$(EXTRAS).stamp test-older ## run every test
	$(PYTEST) $(ARGS)

check: lint types audit ## run every check that is not a test

lint: $(VENV)/$(EXTRAS).stamp ## check rules and formatting (ruff)
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(VENV)/$(EXTRAS).stamp ## check types (pyright)
	$(BIN)/pyright --pythonpath $(BIN)/python

audit: $(VENV)/$(EXTRAS).stamp ## compile the Triton kernels that changed and compare their machine code with what was accepted
	$(BIN)/xfm-fast audit --changed

packages: $(VENV)/$(EXTRAS).stamp ## list the known faults of the installed packages (with a network)
	$(BIN)/pip-audit --skip-editable --progress-spinner=off $(ARGS)

format: $(VENV)/$(EXTRAS).stamp ## apply the formatting and the safe fixes
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

dist: $(VENV)/$(EXTRAS).stamp ## build the source distribution and the wheel
	rm -rf build dist
	$(BIN)/python -m build

clean: ## remove builds and caches
	rm -rf build dist site *.egg-info .pytest_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean ## remove the environment as well
	rm -rf .venv $(OLDER) $(OLDEST) $(NEWEST) .venv-tritons

$(BIN)/python:
	@test -n "$(PYTHON)" || { \
		echo "xfm-fast needs Python 3.11 or newer with its venv module, and found none."; \
		echo "Install one (on Debian or Ubuntu: apt install python3 python3-venv) or name it: make PYTHON=/path/to/python"; \
		exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/%.stamp: pyproject.toml $(LOCK) | $(BIN)/python
	$(BIN)/python -m pip install $(LOCK:%=--constraint %) --editable ".[$*]"
	@touch $@
