# Needs Python 3.11 to 3.13 (with venv and pip), git and make. Another interpreter: make demo PYTHON=python3.13
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# A CPU build of torch is enough: the tests only compare with it. Yours may be named: make test TORCH="torch --index-url ..."
TORCH ?= torch
# One more than there are cores: many tests wait for processes that they have started.
WORKERS ?= $(shell echo $$(( $$(getconf _NPROCESSORS_ONLN) + 1 )))

.PHONY: docs demo real test test-real test-gpu-programs types unit test-browser audit walk clean

demo: $(VENV)/.installed  ## environment, install, main job on the embedded default: runs/organism/report.html
	$(BIN)/python -m icet_jax.main --config=configs/organism_lppo.py --workdir=runs/organism

# make real CAPTIONS=captions.json IMAGES=DIR [FORBIDDEN=RedTeam_2K.csv] [INSTRUCTIONS=FILE]: docs/guides/real_vlm.md
real: $(VENV)/.installed-real  ## a real LLaVA of two pip packages and captioned photographs: runs/real_vlm/vlm
	@test -n "$(CAPTIONS)" -a -n "$(IMAGES)" || { echo "make real CAPTIONS=captions.json IMAGES=DIR"; exit 1; }
	$(BIN)/python examples/real_vlm/build.py --captions="$(CAPTIONS)" --images="$(IMAGES)" --workdir=runs/real_vlm \
	  $(if $(FORBIDDEN),--forbidden="$(FORBIDDEN)") $(if $(INSTRUCTIONS),--instructions="$(INSTRUCTIONS)")

test: $(VENV)/.installed-test  ## environment, install, lint, types, import contracts, tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(MAKE) --jobs=2 types unit

types: $(VENV)/.installed-test
	$(BIN)/mypy

unit: $(VENV)/.installed-test
	$(BIN)/python -m pytest --numprocesses=$(WORKERS) --dist=loadfile --no-loadscope-reorder

# make test-real ICET_REAL_PARTS=DIR ICET_REAL_BUILD=runs/real_vlm, or one of them: make exports both
test-real: $(VENV)/.installed-test  ## chat templates with published vocabularies; the notebook on the model of `make real`
	@test -n "$(ICET_REAL_PARTS)$(ICET_REAL_BUILD)" || \
	  { echo "make test-real ICET_REAL_PARTS=DIR (tests/media/real_tokenizers.py) or ICET_REAL_BUILD=runs/real_vlm"; exit 1; }
	$(BIN)/python -m pytest tests/media/test_real_tokenizers.py tests/examples/test_real_notebook.py

# `make test` skips these tests where the extra is not installed, and runs them where it is.
test-gpu-programs: $(VENV)/.installed-test  ## programs compiled for an H200 without one (the extra plan-gpu, 3 GB)
	$(BIN)/python -m pip install --quiet --editable ".[plan-gpu]"
	$(BIN)/python -m pytest tests/planning/test_gpu_programs.py

# Where npm is missing, the test with axe-core is skipped; where Chromium is missing, all of them are.
test-browser: $(VENV)/.installed-test  ## reports in Chromium, also for barriers (axe-core of npm, in build/axe)
	@if command -v npm > /dev/null; then npm install --silent --no-save --prefix build/axe axe-core@4.14.1; fi
	$(BIN)/python -m pytest tests/report/test_browser.py

audit: $(VENV)/.installed-test  ## known vulnerabilities in what the package and its tests depend on (asks PyPI)
	$(BIN)/python scripts/audit.py

walk: $(VENV)/.installed-test  ## every command of README and docs, on miniatures; `make demo` comes first
	$(BIN)/python scripts/walk.py

docs: $(VENV)/.installed-test  ## the documentation site: build/docs/index.html
	$(BIN)/python scripts/config_reference.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --site-dir build/docs

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .import_linter_cache

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || \
	  { echo "icet-jax needs Python 3.11 to 3.13; name one: make demo PYTHON=python3.13"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(BIN)/python pyproject.toml setup.py
	@echo "installing the package and what it needs into $(VENV): a minute or two"
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/.installed-real: $(BIN)/python pyproject.toml setup.py
	@echo "installing the package and what it needs into $(VENV): a minute or two"
	$(BIN)/python -m pip install --quiet --editable ".[real]"
	touch $(VENV)/.installed $@

# The CPU build where pip finds one, else whatever it finds.
$(VENV)/.installed-test: $(BIN)/python pyproject.toml setup.py
	@echo "installing the package, torch and the tools of the tests into $(VENV): some minutes"
	$(BIN)/python -m pip install --quiet "torch==2.13.0+cpu" 2>/dev/null || \
	  $(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet --editable ".[test]"
	touch $(VENV)/.installed $@
