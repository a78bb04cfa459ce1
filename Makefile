PYTHON ?= python3
METHOD ?= fastv
MODEL ?= pocket-llava
JOBS ?= 2
OUT ?= runs
BIN := .venv/bin
MEASURED := reports/measured
PYTEST := OMP_NUM_THREADS=1 $(CURDIR)/$(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile

help:  ## show this text
	@sed -n 's/^\([a-z-]*\):.*##/\1\t/p' Makefile | expand -t 12

setup: .venv/.installed  ## make .venv and install the tested versions; does nothing the second time

.venv/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "pruneval needs Python 3.11 or newer, this one is " + sys.version.split()[0])'
	$(PYTHON) -m venv .venv
	sed -n '/^uv==/,/[^\\]$$/p' constraints.txt > .venv/uv.txt && $(BIN)/python -m pip install -q --disable-pip-version-check -r .venv/uv.txt
	$(BIN)/uv pip install -p $(BIN)/python -c constraints.txt -r pyproject.toml --extra dev --extra bench --extra ray setuptools
	$(BIN)/uv pip install -q -p $(BIN)/python --no-deps --no-build-isolation -e .
	touch $@

eval: setup  ## compare METHOD=fastv with vanilla on MODEL=pocket-llava; also SUITE= KEEP= LIMIT= ARGS=
	@$(BIN)/pruneval eval --method '$(METHOD)' --model '$(MODEL)' $(if $(SUITE),--suite '$(SUITE)') \
	  $(if $(KEEP),--set 'keep=$(KEEP)') $(if $(LIMIT),--limit '$(LIMIT)') $(ARGS)

measure: setup  ## what METHOD= costs on MODEL=, from dimensions; also KEEP= ARGS=
	@$(BIN)/pruneval measure --implied --method '$(METHOD)' $(if $(KEEP),--set 'keep=$(KEEP)') $(ARGS) \
	  --model '$(if $(filter pocket-llava,$(MODEL)),tasks/pocket/models/pocket-llava,$(MODEL))'

check: setup  ## prove the engine's promises for every method on every family
	@$(BIN)/pruneval check --all

bench: setup  ## measure speed on this CPU: methods, scoring rows, questions/s beside lmms-eval's wrapper, a sweep
	@$(BIN)/pruneval bench --model llava-1.5-7b --no-weights --width 0.125 --depth 0.5 --device cpu --keep 0.5 0.25 0.1 \
	  $(foreach method,fastv pdrop visionzip sparsevlm random,--method $(method)) --out $(MEASURED)/cpu.json $(ARGS)
	@$(BIN)/python tests/bench_scoring.py --tokens 4096 8192 --out $(MEASURED)/cpu-scoring.json
	@$(BIN)/python tests/bench_throughput.py --out $(MEASURED)/throughput.json
	@$(BIN)/python tests/bench_sweep.py --out $(MEASURED)/sweep.json

GPU_BENCH := $(BIN)/pruneval bench --no-weights --device cuda --dtype bfloat16 --keep 0.5 0.25 0.1 --batch 1 8

bench-gpu: setup  ## measure every method on a GPU, unattended: three 7-8B models with random weights; also ARGS=
	-$(GPU_BENCH) --model llava-1.5-7b --out $(MEASURED)/gpu-llava-1.5-7b.json $(ARGS)
	-$(GPU_BENCH) --model llava-ov-7b --visual-tokens 4500 7000 --out $(MEASURED)/gpu-llava-ov-7b.json $(ARGS)
	-$(GPU_BENCH) --model internvl2-8b --out $(MEASURED)/gpu-internvl2-8b.json $(ARGS)

report: setup  ## print every table of runs/
	@$(BIN)/pruneval report

tables: setup  ## the comparison of runs/ as Markdown, LaTeX, HTML and CSV; also OUT=
	@$(BIN)/pruneval report --out '$(OUT)' --format all

pocket: setup  ## train pocket-llava again, from nothing, and pocket-onevision from it
	$(BIN)/python -m pruneval.tasks.pocket.train
	$(BIN)/python -m pruneval.tasks.pocket.onevision.train

types: setup  ## check the types
	@mkdir -p .types/pruneval && for room in harness methods tasks reports; do ln -sfn ../../$$room .types/pruneval/$$room; done
	$(BIN)/mypy -p pruneval

test: setup  ## lint, then all tests, once from the checkout and once from the built wheel
	$(BIN)/ruff check .
	$(PYTEST) tests
	@$(MAKE) --no-print-directory wheel-test

wheel-test: setup  ## the tests against the wheel, in an environment of its own
	rm -rf build dist .venv-wheel && $(PYTHON) -m venv --without-pip .venv-wheel
	$(BIN)/uv build -q --wheel --no-build-isolation -p $(BIN)/python -o dist .
	$(BIN)/uv pip install -q -p .venv-wheel/bin/python --no-deps dist/*.whl
	(cd .venv/lib/python3*/site-packages && pwd) > $$(echo .venv-wheel/lib/python3*/site-packages)/shared.pth
	cd dist && PRUNEVAL_WHEEL=1 $(subst $(BIN),.venv-wheel/bin,$(PYTEST)) $(CURDIR)/tests

.PHONY: help setup eval measure check bench bench-gpu report tables pocket types test wheel-test
