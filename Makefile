# make demo | test | test-real | bench | gpu | lint     each sets up all that it needs
#
# Without PYTHON, everything runs in .venv, made from python3. With PYTHON=..., that interpreter is used as it is:
# nothing is installed, only the compiled part is built.

TORCH ?= 2.13.0
TRITON ?= 3.7.1

ifeq ($(origin PYTHON),undefined)
  PY := $(CURDIR)/.venv/bin/python
  READY := .venv/ready
else
  PY := $(PYTHON)
  READY :=
endif

export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))
MAX_JOBS ?= 2
export MAX_JOBS

# make gpu: BUDGET=seconds in all, OUT=folder, STAGES=build,test,...; it has the machine to itself, hence all of its cores.
gpu: MAX_JOBS := $(if $(filter file,$(origin MAX_JOBS)),$(shell nproc),$(MAX_JOBS))

.PHONY: demo test test-python test-interpreter test-cuda-host test-pretended test-real bench gpu lint format build clean help

help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile

.venv/ready: .ci/requirements.txt Makefile
	python3 -m venv .venv
	printf 'torch==$(TORCH)\ntriton==$(TRITON)\n' > .venv/constraints.txt
	.venv/bin/python -m pip install --quiet --disable-pip-version-check torch==$(TORCH) triton==$(TRITON)
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -c .venv/constraints.txt -r .ci/requirements.txt
	touch $@

build: $(READY)
	$(PY) setup.py --quiet build_ext --inplace

demo: build
	$(PY) -m dlkernels demo

test: test-python test-interpreter test-cuda-host test-pretended

# Two workers where pytest-xdist is there; the one that is done takes over what waits for the other.
pytest = $(1) -m pytest $$($(1) -c 'import xdist; print("-n 2 --dist worksteal")' 2>/dev/null)
PYTEST = $(call pytest,$(PY))

test-python: build
	$(PYTEST) tests --ignore tests/triton_kernels --ignore tests/cuda_host --ignore tests/real

test-interpreter: build
	TRITON_INTERPRET=1 $(PYTEST) tests/triton_kernels
	TRITON_INTERPRET=1 $(PYTEST) tests/ops -k triton

# The CUDA kernels on the host, under sanitizers, whose reports would be lost with the process that they end.
test-cuda-host: build
	rm -f build/cuda_host/report.*
	twin=$$($(PY) tests/cuda_host/_twin.py --env) && eval "$$twin" && export TRITON_INTERPRET=1 DLKERNELS_REQUIRE=twin,interpreter && \
	  $(PYTEST) tests/cuda_host && $(PYTEST) tests/ops -k cuda || { cat build/cuda_host/report.* 2>/dev/null; exit 1; }

# The tests that touch a device on one that is pretended: what mixes devices, or waits for one, is found without a GPU.
test-pretended: build
	CUDA_VISIBLE_DEVICES= PYTHONPATH=$(CURDIR)/tests:$(PYTHONPATH) TRITON_INTERPRET=1 $(PYTEST) -p pretend_cuda tests --device cuda \
	  --ignore tests/triton_kernels --ignore tests/cuda_host --ignore tests/real

# Models of other people's libraries, in an environment of their own. torch and triton first, then always under their
# constraint: torchvision alone would bring another torch.
.venv-real/ready: .ci/requirements-real.txt Makefile
	python3 -m venv .venv-real
	printf 'torch==$(TORCH)\ntriton==$(TRITON)\n' > .venv-real/constraints.txt
	.venv-real/bin/python -m pip install --quiet --disable-pip-version-check torch==$(TORCH) triton==$(TRITON)
	.venv-real/bin/python -m pip install --quiet --disable-pip-version-check -c .venv-real/constraints.txt -r .ci/requirements-real.txt
	.venv-real/bin/python -m pip install --quiet --disable-pip-version-check --no-deps dynamic-network-architectures==0.4.4
	touch $@

# The compiled part is the one that `build` makes: it is for the same torch.
test-real: build $(if $(READY),.venv-real/ready)
	DLKERNELS_REQUIRE=real,cpp $(call pytest,$(if $(READY),$(CURDIR)/.venv-real/bin/python,$(PY))) tests/real

bench: build
	$(PY) -m pytest benchmarks

gpu: $(READY)
	$(PY) benchmarks/gpu_gate.py $(if $(STAGES),--stages $(STAGES))

lint: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'tests/*.h' 'tests/*.cpp' | xargs $(dir $(PY))clang-format --dry-run --Werror

format: $(READY)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'tests/*.h' 'tests/*.cpp' | xargs $(dir $(PY))clang-format -i

clean:
	rm -rf build dist *.egg-info dlkernels/_C*.so dlkernels/_build_record.json
