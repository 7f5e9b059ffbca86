# make setup | smoke | demo | test-fast | test | test-all | lint | docs | gpu-check.
# `make setup VENV=DIR` uses another environment.
PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.agvm_d2

# What it is, and lacks: docs/install.md.
D2_WHEEL := sal-detectron2==0.7.2 \
  --hash=sha256:491af0c7f79bdb2d178e46f6cb16a97c4ac968d45c41ea3f6b6435d59bbee561
# Without CUDA's libraries, a tenth of the size; CPU_TORCH= for pip's default.
CPU_TORCH ?= https://download.pytorch.org/whl/cpu
DEMO_CONFIG := configs/Digits-Detection/faster_rcnn_thin_R_50_FPN_bs64_agvm.yaml
GAIN_CONFIG := configs/Digits-Detection/faster_rcnn_thin_R_50_FPN_bs64_gain.yaml

.PHONY: setup smoke demo test-fast test test-all lint docs gpu-check clean
setup: $(STAMP)

# The stamp comes last, so an interrupted set-up starts over. A Detectron2 that $(PYTHON) already
# imports is kept; otherwise the wheel goes in: its Python files are Detectron2's main branch, only
# its compiled part is tied to the CPython 3.10 of its tag.
$(STAMP): setup.cfg pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "agvm_d2 needs Python 3.10 or newer; found: $$($(PYTHON) --version). Try make PYTHON=python3.11"; exit 1; }
	test -x $(PY) || $(PYTHON) -m venv \
	  $$($(PYTHON) -c 'import detectron2' 2>/dev/null && echo --system-site-packages) $(VENV)
	@command -v nvidia-smi >/dev/null || ! $(PY) -c 'from urllib.request import urlopen as get; \
	  get("$(CPU_TORCH)/torch/", timeout=5)' 2>/dev/null || { \
	  echo 'No GPU here: torch comes from $(CPU_TORCH)'; $(PY) -m pip install --quiet \
	  --disable-pip-version-check --index-url $(CPU_TORCH) torch torchvision; }
	$(PY) -m pip install --quiet --disable-pip-version-check \
	  --editable '.[digits,plot,test,dev'$$($(PY) -c 'import detectron2' 2>/dev/null || echo ,detectron2)']'
	$(PY) -c 'import detectron2' 2>/dev/null || echo '$(D2_WHEEL)' | $(PY) -m pip install --quiet \
	  --disable-pip-version-check --no-deps --only-binary=:all: --implementation cp --python-version 3.10 \
	  --target "$$($(PY) -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')" -r /dev/stdin
	$(PY) -c 'import detectron2.engine'
	@touch $@

# Train, evaluate, draw. An older run in the folder goes to output/demo/old-TIME.
demo: setup
	$(PY) train_net.py --config-file $(DEMO_CONFIG) OUTPUT_DIR output/demo
	$(PY) -m agvm_d2.plot output/demo

# A first look at training by the gain, 40 iterations of batch 4 at batch 16: too few to find anything.
smoke: setup
	$(PY) train_net.py --config-file $(GAIN_CONFIG) OUTPUT_DIR output/smoke SOLVER.IMS_PER_BATCH 16 \
	  SOLVER.MICRO_BATCH_SIZE 4 SOLVER.MAX_ITER 40 SOLVER.STEPS '(30,)' SOLVER.WARMUP_ITERS 5 \
	  AGVM.BASE_BATCH_SIZE 4 AGVM.INTERVAL 1 TEST.EXPECTED_RESULTS '[]'
	$(PY) -m agvm_d2.plot output/smoke

# While you work on a change: without the tests that are marked slow or integration.
test-fast: setup
	$(PY) -m pytest -m "not slow and not integration"

test: setup
	$(PY) -m pytest

test-all: setup
	$(PY) -m pytest -m ''

lint: setup
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

# The pages and the API in output/docs; a warning is an error. It needs no torch, so it has an
# environment of its own.
docs: $(VENV)-docs/.stamp
	NO_MKDOCS_2_WARNING=1 $(VENV)-docs/bin/mkdocs build --quiet
	@echo output/docs/index.html

$(VENV)-docs/.stamp: setup.cfg
	$(PYTHON) -m venv $(VENV)-docs
	$(VENV)-docs/bin/python -m pip install --quiet --disable-pip-version-check \
	  'mkdocs-material>=9.5,<10' 'mkdocstrings[python]>=0.26'
	@touch $@

# On a machine with a GPU: tests, cost and a short training, in about ten minutes. The report is for
# an issue.
gpu-check: setup
	$(PY) benchmarks/gpu_check.py

clean:
	rm -rf $(VENV) $(VENV)-docs *.egg-info build output
