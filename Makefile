# SPDX-License-Identifier: Apache-2.0
# Every target works from nothing: it makes .venv with the pinned versions first.

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin
STAMP := $(VENV)/.installed
INSTALL_INPUTS := pyproject.toml setup.py constraints.txt $(shell find csrc -type f ! -name '*.md')

# The CUDA ops are built wherever nvcc is, GPU or not.
NVCC := $(or $(wildcard $(CUDA_HOME)/bin/nvcc),$(shell command -v nvcc 2>/dev/null),$(wildcard /usr/local/cuda/bin/nvcc))
L0K_BUILD ?= $(if $(NVCC),cuda,cpu)

# The oldest torch, and the triton that comes with it; COMPAT_ARCHS='sm_80 sm_90a sm_100a gfx942'
# compiles the Triton kernels for every architecture, in some minutes more.
COMPAT := .venv-compat
COMPAT_RUN := PYTHONSAFEPATH=1 PYTHONPATH=$(abspath build/compat):$(abspath tests) $(COMPAT)/bin/python
LOADS := 'import sys; from l0kernels import _ext; sys.exit(_ext.load("cpp") or _ext.build_info()["cuda"] and _ext.load("cuda") or None)'
COMPAT_ARCHS := sm_90a
COMPAT_TESTS := 'not harness and not million and not reliability and not bench and not instruction_set and (not python or stand_in)'
COMPAT_INTERPRETED := 'test_shapes or test_dtypes or test_open_lists or test_gradients_within or test_lists_of_all'

# Threads that spin while they wait make step times flip from run to run.
export OMP_WAIT_POLICY := passive

# Real data sets for the tests and recipes that can use them.
L0K_DATA ?= ../shared/data
ifneq ($(wildcard $(L0K_DATA)),)
override L0K_DATA := $(abspath $(L0K_DATA))
export L0K_DATA
endif

.PHONY: help demo test kernels table compat fuzz bench lint gpu clean

help:
	@echo 'make demo     train LeNet-5 on digits, ours beside the masked reference; writes runs/demo'
	@echo 'make test     all tests'
	@echo 'make kernels  compile every GPU kernel, no GPU needed: registers, spills; writes runs/kernels'
	@echo 'make table    after make test kernels: errors of every operator into bench/results and README.md,'
	@echo '              and what bench/results has of make bench into README.md'
	@echo 'make compat   the same libraries and code under torch 2.11 and triton 3.6; makes .venv-compat, 5 GB'
	@echo 'make fuzz     CASES=20000 random networks against an oracle; failing ones go to runs/fuzz'
	@echo 'make bench    operators, steps, memory into runs/bench; BENCH_MODELS="vgg16 wrn-28-10" for others'
	@echo 'make lint     ruff and pyright'
	@echo 'make gpu      build, tests, sanitizers, benchmarks on a CUDA device in under 8 minutes, no network'
	@echo 'make clean    remove .venv, .venv-compat, build and runs'

demo: $(STAMP)
	$(RUN)/l0kernels train lenet5-hc --compare --seeds 0,1,2 --out runs/demo

# One process per core: most tests are Python between small tensors.
test: $(STAMP)
	rm -rf runs/tests
	L0K_TEST_RECORDS=$(abspath runs/tests) $(RUN)/python -m pytest -q -rs --durations=10 -n auto --dist worksteal

kernels: $(STAMP)
	PYTHONPATH=tests $(RUN)/python -m kernels --out runs/kernels

table: $(STAMP)
	PYTHONPATH=tests $(RUN)/python -m error_table runs/tests --kernels runs/kernels/table.json --save bench/results/cpu-tests.json
	PYTHONPATH=tests $(RUN)/python -m error_table bench/results/*-tests.json --readme README.md
	$(RUN)/python -m l0kernels.bench.readme bench/results --readme README.md

# A copy of the package as it is installed, with the libraries that $(VENV) built: nothing is built here.
# PYTHONSAFEPATH keeps the checkout from being found before it.
compat: $(STAMP) $(COMPAT)/.installed
	rm -rf build/compat && mkdir -p build/compat
	cp -R l0kernels build/compat/ && cp -R bench build/compat/l0kernels/bench
	$(COMPAT_RUN) -m l0kernels.cli info
	$(COMPAT_RUN) -c $(LOADS)
	$(COMPAT_RUN) -m pytest -q -rs -p no:cacheprovider tests/ops tests/nn -k $(COMPAT_TESTS)
	TRITON_INTERPRET=1 $(COMPAT_RUN) -m pytest -q -rs -p no:cacheprovider tests/triton_on_cpu -k $(COMPAT_INTERPRETED)
	$(COMPAT_RUN) -m kernels --triton-for $(COMPAT_ARCHS) --out runs/compat-kernels

CASES ?= 20000
fuzz: $(STAMP)
	PYTHONPATH=tests $(RUN)/python -m fuzz --cases $(CASES) --out runs/fuzz

BENCH_MODELS ?= mlp-784-300-100 lenet5
bench: $(STAMP)
	$(RUN)/l0kernels bench ops --out runs/bench/ops
	set -e; for model in $(BENCH_MODELS); do \
		$(RUN)/l0kernels bench step --model $$model --batch 128 --out runs/bench/$$model; \
		$(RUN)/l0kernels bench arm --model $$model --batch 128 --out runs/bench/$$model; \
		$(RUN)/l0kernels bench memory --model $$model --out runs/bench/$$model; \
	done

lint: $(STAMP)
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/pyright --pythonpath $(RUN)/python

# Where the Python at hand has a torch that sees a GPU, nothing is fetched; else .venv is made.
# GPU_OPTIONS: see `PYTHONPATH=tests python -m gpu --help`.
gpu:
	@python=$(PYTHON); \
	$$python -c 'import torch; assert torch.cuda.is_available()' 2>/dev/null \
		|| { $(MAKE) $(STAMP) && python=$(RUN)/python; }; \
	PYTHONPATH=tests $$python -m gpu $(GPU_OPTIONS)

clean:
	rm -rf $(VENV) $(COMPAT) build runs

# torch comes first: the build uses its headers, without the second copy that isolation would fetch.
$(STAMP): $(INSTALL_INPUTS)
	test -x $(RUN)/python || $(PYTHON) -m venv $(VENV)
	$(RUN)/python -m pip install -q -c constraints.txt torch triton numpy setuptools ninja pybind11
	L0K_BUILD=$(L0K_BUILD) $(RUN)/python -m pip install -q -c constraints.txt --no-build-isolation -e '.[train,bench,export,hf,test,dev]'
	touch $@

$(COMPAT)/.installed: constraints-compat.txt
	test -x $(COMPAT)/bin/python || $(PYTHON) -m venv $(COMPAT)
	$(COMPAT)/bin/python -m pip install -q -c constraints-compat.txt torch triton numpy tqdm pytest hypothesis
	touch $@
