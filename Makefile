# The commands of the course. `make help` lists them.

PYTHON  ?= python3
VENV    ?= .venv
PROFILE ?= quick
REPOSITORY ?=

RUN   := $(VENV)/bin/python
STAMP := $(VENV)/.installed

.PHONY: help notebooks test lab soak publish benchmark badges site e2e lint clean
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

help:
	@echo "make notebooks   run the course; results in executed/$(PROFILE)/ and figures/$(PROFILE)/"
	@echo "make lab         open the notebooks in JupyterLab"
	@echo "make test        lint, type check, unit tests and every notebook"
	@echo "make lint        lint and type check only"
	@echo "make soak        kill campaigns at random moments and resume them (minutes)"
	@echo "make e2e         read three notebooks in JupyterLab, in a browser (Chromium must be there)"
	@echo "make publish     run the course and write its outputs into notebooks/, figures/published/ and README.md"
	@echo "make badges      point badges, links and set-up cells at REPOSITORY=owner/name (default: git's origin)"
	@echo "make site        build the site (notebooks as committed, docs/, reference) into build/site/"
	@echo "make benchmark   measure inference, kernel, injection, sweep, training into benchmarks/results/ (on an idle machine)"
	@echo "make clean       remove what runs have made (not $(VENV))"
	@echo
	@echo "Settings: PROFILE=quick|full   PYTHON=python3   VENV=.venv"

# The stamp is written last, so that an installation that stopped half way starts again.
$(STAMP): pyproject.toml
	@echo "Installing the course into $(VENV) (once; about 2 minutes and 6 GB, most of it PyTorch)"
	@rm -f $(STAMP)
	$(PYTHON) -m venv $(VENV)
	@$(RUN) -m pip install --disable-pip-version-check --quiet --quiet --editable ".[lab,test]"
	@touch $(STAMP)

notebooks: $(STAMP)
	@$(RUN) tools/notebooks.py run --profile "$(PROFILE)"

publish: $(STAMP)
	@$(RUN) tools/notebooks.py publish
	@$(RUN) -m tools.networks

benchmark: $(STAMP)
	$(RUN) -m pip install --disable-pip-version-check --quiet --editable ".[benchmark]"
	$(RUN) -m benchmarks.inference
	$(RUN) -m benchmarks.popcount
	$(RUN) -m benchmarks.injection
	$(RUN) -m benchmarks.sweep
	$(RUN) -m benchmarks.training

badges: $(STAMP)
	@$(RUN) tools/notebooks.py badges --repository "$(REPOSITORY)"
	@touch $(STAMP) # the address in pyproject.toml may have changed, but nothing to install has

lab: $(STAMP)
	BNN_PROFILE="$(PROFILE)" $(VENV)/bin/jupyter lab notebooks

site: $(STAMP)
	@$(RUN) -m pip install --disable-pip-version-check --quiet --quiet --editable ".[site]"
	@$(RUN) -m sphinx --quiet --fail-on-warning --keep-going -c docs -d build/doctrees . build/site
	@echo "The site: build/site/index.html"

lint: $(STAMP)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

# Two tests at a time, but the course alone: it takes all cores.
test: lint
	$(RUN) -m pytest -n 2 --dist loadfile -m "not notebooks and not soak and not e2e"
	$(RUN) -m pytest -m notebooks

e2e: $(STAMP)
	@$(RUN) -m pip install --disable-pip-version-check --quiet --editable ".[e2e]"
	$(RUN) -m pytest -m e2e

soak: $(STAMP)
	$(RUN) -m pytest -m soak

clean:
	rm -rf executed figures/quick figures/full build docs/api *.egg-info
	rm -rf .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find bnn_utils notebooks tests tools -name __pycache__ -o -name .ipynb_checkpoints | xargs rm -rf
