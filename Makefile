# make demo    the main job: an SDXL pipeline, offloaded, on whatever this machine has
# make test    lint, types and every test that this machine can run
# make bench   the benchmarks that need no GPU
#
# A GPU machine with torch installed can use its own Python: make test-gpu PY=python3
VENV ?= .venv
INTEROP ?= .venv-interop
PYTHON ?= python3
ifdef PY
ENV :=
INTEROP_PY := $(PY)
else
PY := $(VENV)/bin/python
ENV := $(VENV)/.installed
INTEROP_PY := $(INTEROP)/bin/python
INTEROP_ENV := $(INTEROP)/.installed
endif
PYTEST = $(PY) -m pytest -rs
export HF_HUB_OFFLINE = 1
export TRANSFORMERS_VERBOSITY = error
# The models here are so small that a second thread costs more than it brings.
export OMP_NUM_THREADS ?= 1

.PHONY: demo test lint test-unit test-sim test-interop test-gpu bench bench-gpu env env-interop clean

demo: $(ENV)
	$(PY) -m benchmarks.demo

test: lint test-unit test-sim test-interop

env: $(ENV)
env-interop: $(INTEROP_ENV)

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

# The interop environment is the one above with accelerate and its kin on top.
$(INTEROP)/.installed: $(VENV)/.installed
	$(PYTHON) -m venv $(INTEROP)
	echo "import site; site.addsitedir('$(abspath $(VENV))/lib/$(shell $(PYTHON) -c 'import sys; print(f"python{sys.version_info[0]}.{sys.version_info[1]}")')/site-packages')" \
	  > $$($(INTEROP)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/base.pth
	$(INTEROP)/bin/python -m pip install --quiet --constraint constraints.txt \
	  accelerate peft torchao gguf bitsandbytes psutil
	touch $@

lint: $(ENV)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

test-unit: $(ENV)
	$(PYTEST) tests/unit

# Renaming torch's spare backend is process-wide: the simulator has processes of its own.
test-sim: $(ENV)
	$(PYTEST) tests/sim_device
	$(PYTEST) tests/sim --ignore-glob 'tests/sim/test_stream*.py'
	$(PYTEST) tests/sim/test_stream*.py

test-interop: $(INTEROP_ENV)
	$(INTEROP_PY) -m pytest -rs tests/sim_device/test_pipelines.py
	$(INTEROP_PY) -m pytest -rs tests/interop

test-gpu: $(ENV)
	$(PYTEST) -m gpu tests/gpu

bench: $(INTEROP_ENV)
	$(INTEROP_PY) -m benchmarks

bench-gpu: $(ENV)
	$(PY) -m benchmarks.gpu

clean:
	rm -rf $(VENV) $(INTEROP) out build *.egg-info
