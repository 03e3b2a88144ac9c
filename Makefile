# Each target sets the environment up first; that is quick when nothing changed.
#   make repro    the whole pipeline, from the sample data (or your own in data/) to results/; with STUDY=full, that of params.full.yaml
#                 (with MINUTES=10 ten minutes of it; the same call goes on where it ended)
#                 with JOBS=2 two stages at a time, a core each
#   make gpu      on a machine with a GPU: check, time and train for MINUTES (28), to results/gpu/; elsewhere a dry run
#   make test     every notebook as a test, then pytest
#   make slow     the notebook cells and tests that take minutes
#   make lab      JupyterLab on the repository
#   make docs     the book: all chapters and the reference as pages in build/book
#   make lock     remake requirements.lock.txt after a change in settings.ini (UPGRADE=--upgrade takes newer versions)
#   make weights  put the model of the default run into the package, with its card
#   make sample   put what is in data/ into the sample remote that the repository ships
# PYTHON=python3.12 makes .venv with another interpreter.

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
UNPACKING := .dvc/tmp/unpacking

# Stages and notebooks start python by name.
export PATH := $(CURDIR)/$(BIN):$(PATH)
# Threads that wait for each other leave their core to other processes instead of spinning on it.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: help repro test slow gpu lab docs lock weights sample data-present
.DELETE_ON_ERROR:

help:
	@sed -n 's/^#  *\(make .*\)/\1/p' Makefile

ifdef STUDY
repro: $(READY) data-present
	@$(BIN)/python -m glcm.study $(STUDY) $(if $(MINUTES),--minutes $(MINUTES)) $(if $(JOBS),--jobs $(JOBS))
else
repro: $(READY) data-present
	@$(BIN)/python -m glcm.params check
	@$(if $(JOBS),$(BIN)/python -m glcm.jobs $(JOBS),$(BIN)/dvc repro)
endif

# Two notebooks or files of tests at a time, a thread each; memory is kept for the next step, as stages do (nbs/62_stage.ipynb).
test slow: export OMP_NUM_THREADS = 1
test slow: export MALLOC_MMAP_THRESHOLD_ = 4294967296
test slow: export MALLOC_TRIM_THRESHOLD_ = 4294967296
test: $(READY) data-present
	@$(BIN)/nbdev_test --n_workers 2 --do_print --timing
	@$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder

slow: $(READY) data-present
	@$(BIN)/nbdev_test --flags slow --n_workers 1 --do_print --timing
	@$(BIN)/pytest -m slow

gpu: $(READY) data-present
	@$(BIN)/python -m glcm.gpu.run $(if $(MINUTES),--minutes $(MINUTES))

lab: $(READY) data-present
	@$(BIN)/jupyter-lab

# No warning is allowed: a link that leads nowhere is one.
docs: $(READY)
	@$(BIN)/sphinx-build -W --keep-going -q -j 4 -c docs -d build/doctrees . build/book
	@$(BIN)/python docs/links.py build/book
	@echo "Open build/book/index.html"

# All that is locked; where a build of PyTorch for CPUs alone was put into .venv before, no libraries for GPUs.
CPU_ONLY = $(BIN)/python -c 'import sys, torch; sys.exit(torch.version.cuda is not None)' 2>/dev/null
LOCKED = if $(CPU_ONLY); then grep -vE '^(cuda|nvidia|triton)\b' requirements.lock.txt; else cat requirements.lock.txt; fi

$(READY): requirements.lock.txt settings.ini setup.py pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || { \
	    echo "glcm needs Python 3.11, 3.12 or 3.13, and $(PYTHON) is `$(PYTHON) --version 2>&1`." \
	         "Name another interpreter: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@echo "Installing requirements.lock.txt into .venv (the first time 6 GB, some minutes)"
	@[ -x $(BIN)/pip ] || $(PYTHON) -m venv .venv
	@$(LOCKED) > .venv/requirements.txt
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r .venv/requirements.txt
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

# Your own data/ is never touched: the sample is put there only where there is no data/, or where doing so was cut off.
data-present: $(READY)
	@if [ ! -e data ] || [ -e $(UNPACKING) ]; then \
	    $(BIN)/dvc fetch -r sample data.dvc && touch $(UNPACKING) && \
	    $(BIN)/dvc checkout data.dvc && rm $(UNPACKING); fi

lock:
	@[ -x build/uv/bin/uv ] || { $(PYTHON) -m venv build/uv && build/uv/bin/pip install --quiet uv; }
	@build/uv/bin/uv pip compile --quiet setup.py --all-extras --universal --python-version 3.11 \
	    --refresh-package glcm --fork-strategy fewest --no-annotate --no-emit-index-url --no-emit-find-links \
	    --custom-compile-command "make lock" $(UPGRADE) -o requirements.lock.txt

weights: $(READY)
	@rm -rf build/weights
	@$(BIN)/python -m glcm.export artifacts/pretrain/glcm-0 build/weights --half --notes nbs/weights.md
	@rm -rf glcm/weights
	@mv build/weights glcm/weights
	@du -sh glcm/weights

# The remote is emptied first: git must not carry the files of an earlier sample.
sample: $(READY)
	@$(BIN)/dvc add data
	@grep -q 'remote: sample' data.dvc || echo '  remote: sample' >> data.dvc
	@rm -rf sample
	@$(BIN)/dvc push data.dvc -r sample
	@du -sh sample
