# Two commands do everything: `make demo` and `make test`. Each sets up what it needs in .venv, once.
PYTHON ?= python3
BIN := .venv/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)
PACKAGE := settings.ini setup.py constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo test test-all lab docs figures swaps standing benchmark training lstm originality evaluation hooks clean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo
	@echo '  make demo DATA=my.txt           train on a text of your own (a file or a folder)'
	@echo '  make demo SET="KEY=VALUE ..."   change settings of the recipe textgen/recipes/demo.yaml'
	@echo '  PYTHON=python3.12 make demo     use another Python (3.10 or newer)'

demo: .venv/made-base  ## train a small Transformer, draw its loss, let it write
	@$(BIN)/textgen train demo $(if $(DATA),--data "$(DATA)") $(foreach pair,$(SET),--set "$(pair)")

# nbdev_test first, pytest second whatever the first said: its summary line closes the output.
test: .venv/made-dev  ## run every notebook and every test that needs neither GPU, network nor patience
	@$(call run-tests,,)

test-all: .venv/made-dev  ## the same with the slow tests and those that need a GPU or the network
	@$(call run-tests,--flags "slow gpu net",--all)

lab: .venv/made-dev  ## open the notebooks in JupyterLab
	@$(BIN)/jupyter lab --notebook-dir=nbs

docs: .venv/made-dev  ## build the site into _docs: with Quarto where it is installed, else with smalldocs
	@if command -v quarto >/dev/null; \
	then $(BIN)/nbdev_docs && $(BIN)/python .ci/readme.py; else $(BIN)/python .ci/docs.py; fi

RECIPES ?= demo shakespeare shakespeare-fast shakespeare-llama wikitext2 lstm-shakespeare
figures: .venv/made-dev  ## measure anew what README quotes (some minutes; Tiny Shakespeare and WikiText-2 need TEXTGEN_DATA)
	@for recipe in $(RECIPES); do rm -rf runs/figures-$$recipe && \
	  $(BIN)/textgen train $$recipe --out runs/figures-$$recipe && $(BIN)/python .ci/figures.py runs/figures-$$recipe || exit 1; done

swaps: .venv/made-dev  ## train GPT-2 and Llama and what lies between for chapter 05a (half an hour on one core)
	@$(BIN)/python .ci/swaps.py

standing: .venv/made-dev  ## train the LSTM and the decoder side by side for chapter 10d (half an hour on one core; needs TEXTGEN_DATA)
	@$(BIN)/python .ci/standing.py

benchmark: .venv/made-dev  ## measure the data pipeline beside datasets, tiktoken and torch's DataLoader (needs TEXTGEN_DATA and 4 GB of disk)
	@$(BIN)/textgen benchmark data --output nbs/results && rm nbs/results/data.png

training: .venv/made-dev  ## measure training beside nanoGPT's settings (three quarters of an hour on one quiet core; needs TEXTGEN_DATA)
	@$(BIN)/textgen benchmark train --output nbs/results && rm nbs/results/train.png

lstm: .venv/made-dev  ## measure recurrent models beside the ways that tutorials teach (some minutes on one quiet core)
	@$(BIN)/textgen benchmark lstm --output nbs/results && rm nbs/results/lstm.png

originality: .venv/made-dev  ## measure the search for copied text beside other ways (some minutes; needs TEXTGEN_DATA and 2 GB)
	@$(BIN)/python .ci/originality.py

evaluation: .venv/made-dev  ## evaluate a known model under every protocol, beside lm-eval (some minutes; needs TEXTGEN_DATA)
	@$(BIN)/python .ci/evaluation.py

hooks: .venv/made-dev  ## let git merge notebooks cell by cell in this clone (nbdev's merge driver)
	@git config merge.nbdev-merge.name "merge notebooks cell by cell"
	@git config merge.nbdev-merge.driver "$(CURDIR)/$(BIN)/nbdev_merge %O %A %B %P"

clean:  ## remove what was built; .venv, runs/ and data/ stay
	@rm -rf _docs _proc build dist *.egg-info .pytest_cache .hypothesis nbs/nbdev.yml
	@find . -name .venv -prune -o \( -name __pycache__ -o -name .ipynb_checkpoints \) -type d -prune -exec rm -rf {} +

# Two notebooks at a time, then two tests, one thread each: that is faster than both fighting over every core (OMP_NUM_THREADS).
# worksteal: each process begins with half of the tests, in their order, so that what a file of them shares is mostly made once.
define run-tests
status=0; \
echo "Notebooks:"; OMP_NUM_THREADS=1 $(BIN)/nbdev_test --n_workers 2 --timing --do_print $(1) || status=1; \
echo "Tests:"; OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal $(2) tests || status=1; \
exit $$status
endef

# Set-up. Each stamp is written last, so what was interrupted is done again. `install` first drops the packages that an
# interrupted pip left half-written, for pip would take them for whole (INSTALLER is the last file but one it writes).
define install
@echo "Installing $(1) into .venv: a minute or two, the first time only ..."
@find .venv -path '*/site-packages/*.dist-info' -prune '!' -exec test -e '{}/INSTALLER' ';' -exec rm -rf '{}' +
@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e "$(2)"
@touch .venv/made-base $@
endef

.venv/made-base: $(PACKAGE) | .venv/made
	$(call install,textgen,.)

.venv/made-dev: $(PACKAGE) | .venv/made
	$(call install,textgen and its development tools,.[dev])

# A .venv that somebody made here by hand is kept if its pip works; one that was moved here from another folder does not.
.venv/made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || \
	  { echo "textgen needs Python 3.10 or newer, and $(PYTHON) is not: try PYTHON=python3.12 make ..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "$(PYTHON) lacks the module venv: install it (Debian, Ubuntu: apt install python3-venv)" >&2; exit 1; }
	@{ grep -qsF '$(CURDIR)/.venv/' .venv/bin/pip && $(BIN)/python -m pip --version >/dev/null 2>&1; } || \
	  { rm -rf .venv && $(PYTHON) -m venv .venv; }
	@echo '$(CURDIR)' > $@

# The stamps of a .venv that has moved, or whose Python is gone, count for nothing.
FORGET := $(shell [ ! -e .venv/made ] || { [ "$$(cat .venv/made)" = '$(CURDIR)' ] && [ -x $(BIN)/python ]; } || rm -f .venv/made*)
