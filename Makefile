# Every target does its own set-up on a fresh machine with Python 3.11 or newer.
#
#   make demo      compress the bundled model, write a report, let the result go on with a story
#   make test      all tests but the full crash suite
#   make lint      ruff, pyright, import-linter
#   make crash     kill or fail a run at every system call that writes (needs strace; long)
#   make bench     the benchmarks' own README says what each script needs
#   make gpu-test, make gpu-bench
#                  kernels on a GPU: no environment is made and nothing installed; $(PYTHON) must have torch, triton,
#                  numpy, safetensors and pytest. One JSON each in $(GPU_OUT)
#
# On Linux the package index serves the CUDA build of torch. For the CPU build name its index:
#   make demo TORCH_INDEX=…

PYTHON      ?= python3
VENV        ?= .venv
PY          := $(VENV)/bin/python
TORCH_INDEX ?=
WORKERS     ?= 2
DEMO        ?= runs/demo-w4
GPU_OUT     ?= runs

.PHONY: setup demo test lint crash bench gpu-test gpu-bench

$(VENV)/.ready: pyproject.toml constraints.txt compress/__init__.py
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) -c constraints.txt torch
	$(PY) -m pip install -q -c constraints.txt -e '.[test]'
	touch $@

setup: $(VENV)/.ready

demo: setup
	$(PY) -m compress run --recipe demo-w4 --output $(DEMO) --fresh
	$(PY) -m compress generate $(DEMO) "One day a little fox found a red ball in the snow."

test: setup
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n $(WORKERS) --dist worksteal

lint: setup
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m pyright
	$(VENV)/bin/lint-imports

crash: setup
	OMP_NUM_THREADS=1 COMPRESS_CRASH_POINTS=all $(PY) -m pytest -q --timeout 0 tests/crash

bench: setup
	@cat benchmarks/README.md

gpu-test:
	PYTHONPATH=. $(PYTHON) -m pytest -c tests/gpu/pytest.ini tests/gpu --json $(GPU_OUT)/gpu-test.json

gpu-bench:
	PYTHONPATH=. $(PYTHON) benchmarks/gpu.py --out $(GPU_OUT)/gpu-bench.json
