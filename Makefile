# Every target is a few commands that a person could type. `make help` lists them.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
PEERS := .venv/.peers
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.DEFAULT_GOAL := help
.PHONY: help book live pdf serve test lint unit losses notebooks pages links bench experiments mutants compat \
  picture release-check gpu fresh gettext lock clean

help: ## list the targets
	@awk -F':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(READY): requirements.lock pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "There is no $(PYTHON) here. Install Python 3.11 or newer, or name one that" \
	  "you have: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -m tools.install

# Without their own dependencies, which the benchmarks do not touch and which may ask for another torch.
$(PEERS): benchmarks/requirements.txt $(READY)
	@rm -f $(PEERS)
	@$(BIN)/python -m pip install --quiet --no-deps -r benchmarks/requirements.txt || \
	  { echo "pip could not install everything that benchmarks/requirements.txt names; its reason stands above." >&2; exit 1; }
	@touch $(PEERS)

book: $(READY) ## build the pages; chapters whose code changed are executed first
	@$(BIN)/python -m tools.book

live: $(READY) ## execute every chapter on this machine's best device, then build the pages
	@OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m tools.execute --all --jobs 2
	@$(BIN)/python -m tools.book

pdf: book ## print the book to one PDF (needs Chromium)
	@$(BIN)/python -m tools.pdf

PORT ?= 8000
serve: book ## show the pages at http://localhost:8000
	@$(BIN)/python -c "import socket; socket.create_server(('127.0.0.1', $(PORT)))" 2>/dev/null || \
	  { echo "Another program has port $(PORT). Take another one: make serve PORT=8001" >&2; exit 1; }
	@$(BIN)/python -m http.server --bind 127.0.0.1 --directory _build/html $(PORT)

test: lint unit notebooks pages ## everything that CI runs

lint: $(READY) ## style, types, dependencies, workflows
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/deptry .
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows $(wildcard .github/workflows/*.yml)
	$(BIN)/check-jsonschema --builtin-schema vendor.dependabot .github/dependabot.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.github-issue-config .github/ISSUE_TEMPLATE/config.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.github-issue-forms \
	  $(filter-out %/config.yml, $(wildcard .github/ISSUE_TEMPLATE/*.yml))
	$(BIN)/check-jsonschema --builtin-schema vendor.citation-file-format CITATION.cff
	$(BIN)/zizmor --offline --quiet .github

unit: $(PEERS) ## unit tests and the examples in docstrings, on all cores
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --cov=lossbook --cov-report=term-missing:skip-covered \
	  --ignore=tests/test_book.py tests lossbook README.md

# Without progress bars: nbval reads the messages of a cell when it has ended, and the queue holds a few thousand.
notebooks: $(READY) ## run the chapters again and compare their outputs with the stored ones
	TQDM_DISABLE=1 $(BIN)/python -m pytest -q --nbval --nbval-current-env --nbval-cell-timeout=600 -p no:cacheprovider chapters

LOSSES := multilabel_softmax soft_labels focal am_softmax accuracy emo spans common compiled metrics
# On whatever Python and torch PYTHON has: CI runs it on other systems and versions, where the lock does not fit.
losses: ## unit tests of the losses with $(PYTHON), into which it installs what they need
	$(PYTHON) -m pip install --quiet ".[losses]"
	$(PYTHON) -m pytest -q -n auto $(LOSSES:%=tests/test_%.py)

# Those on the pages, and the files of public data, which are compared with their digests.
links: $(READY) ## ask for every address outside the book (needs a network)
	@$(BIN)/python -c "import requests; requests.head('https://arxiv.org', timeout=60)" 2>/dev/null || \
	  { echo "arxiv.org cannot be reached, to which most links lead. Is the network on?" >&2; exit 1; }
	$(BIN)/jupyter-book build . --builder linkcheck --path-output _build/links -q
	$(BIN)/python -m lossbook.data fetch all

pages: $(READY) ## build the book from nothing with warnings as errors and read it in a browser
	$(BIN)/python -m pytest -q tests/test_book.py

bench: $(PEERS) ## time and memory beside other implementations, into data/results
	@missed=0; for module in $(basename $(notdir $(filter-out %__init__.py %harness.py, $(wildcard benchmarks/*.py)))); do \
	  $(BIN)/python -m benchmarks.$$module || missed=1; done; exit $$missed

# PROCESSES=8 uses more cores or all GPUs, SCALE=gpu is the full form. Killed, it goes on where it was.
SCALE ?= cpu
PROCESSES ?= 2
experiments: $(READY) ## the losses on public data, into data/results (SCALE=cpu: three hours on two cores)
	@$(BIN)/python -m lossbook.data fetch all
	@for module in $(basename $(notdir $(filter-out %__init__.py %harness.py %advice.py, $(wildcard experiments/*.py)))); do \
	  OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m torch.distributed.run --standalone --nproc-per-node $(PROCESSES) \
	    -m experiments.$$module --scale $(SCALE) || exit 1; done

mutants: $(PEERS) ## change the losses a little and see which changes no test notices (hours)
	$(BIN)/python -m pip install --quiet "cosmic-ray==8.7.0"
	$(BIN)/python -m tools.mutants

compat: $(READY) ## the losses' tests under the oldest, a middle and the newest torch, into data/results (half an hour)
	@$(BIN)/python -m tools.compat

gettext: $(READY) ## collect the texts of the pages, renew the translations, tell what they lack
	@$(BIN)/python -m tools.catalogues

picture: book ## draw the front page for README.md (needs Chromium)
	@$(BIN)/python -m tools.picture

# With .venv where there is one and PYTHON is not named: where a GPU is, a Python with CUDA often is, and no network.
MINUTES ?= 8
gpu: ## what only a GPU can show, in slices of MINUTES; the same command goes on
	@$(if $(and $(wildcard $(READY)),$(findstring file,$(origin PYTHON))),$(BIN)/python,$(PYTHON)) -m tools.gpu \
	  --minutes $(MINUTES)

fresh: $(READY) ## README's commands with everything downloaded anew, under each Python that is here (half an hour)
	$(BIN)/python -m pytest -q -m fresh tests/test_first_minutes.py

release-check: $(READY) ## try what a release would publish, step by step
	@$(BIN)/python -m tools.release

lock: ## renew requirements.lock from pyproject.toml in a fresh environment
	@$(PYTHON) -m tools.lock

clean: ## remove what can be made again, the environment included
	rm -rf _build .venv .compat dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
