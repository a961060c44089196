# make demo    PPO on real text, start to finish, from nothing but python3 and a C++ compiler
# make rlhf    from human ratings to an evaluated policy: language model, reward model, PPO, report
# make test    every test; the Triton kernels on the CPU, in Triton's interpreter
# make verify-all   every Triton launch and every CUDA source compiled for every GPU it is tested for;
#              races in the emulated CUDA kernels
# make gpu-check    on a machine with a GPU: every op tested on it and timed, under 9 minutes
# make bench   every function against torch, on one thread and on all; ARGS="gae --sizes small" to choose
# make lint    ruff, clang-format, mypy
# make test-sanitize   the op tests on C++ and emulated CUDA kernels built with AddressSanitizer and UBSan
# make test-floor      the op tests on the oldest torch and Python supported (a download of gigabytes)
# make test-integrations   our functions against those of TRL, verl, OpenRLHF, torchrl and Stable-Baselines3
# make test-deepspeed      two processes under DeepSpeed train as one does
# make docs    regenerate the tables that come from the code
#
# All of them work in .venv, made on first use. PYTHON chooses the interpreter, TORCH what pip installs as torch.

PYTHON ?= python3
TORCH ?= $(shell grep '^torch' constraints.txt)
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
SOURCES := $(shell git ls-files csrc python_tests 2>/dev/null | grep -E '[.](h|cpp|cuh|cu)$$')

.PHONY: demo rlhf bench test verify-all gpu-check test-sanitize test-floor test-integrations test-deepspeed lint format docs clean

demo: .venv/installed
	$(BIN)/ppo-kernels demo

rlhf: .venv/installed
	$(BIN)/ppo-kernels rlhf $(ARGS)

bench: .venv/installed
	$(BIN)/ppo-kernels bench --threads 1,$$(nproc) $(ARGS)

# A process for each core; OpenMP threads that wait leave theirs to the others.
PROCESSES := -n auto --maxprocesses 8 --dist worksteal
PYTEST := OMP_WAIT_POLICY=passive $(BIN)/python -m pytest $(PROCESSES)

test: .venv/installed
	$(PYTEST)
	TRITON_INTERPRET=1 $(PYTEST) -k triton

verify-all: .venv/installed
	$(BIN)/python python_tests/compile_ladder.py
	$(BIN)/python python_tests/cuda_resources.py
	$(BIN)/python python_tests/cuda_sanitized.py thread

# With the torch and the Triton that are there: a CUDA build of torch is not what .venv installs.
gpu-check:
	$(PYTHON) python_tests/gpu_check.py

OP_TESTS := $(shell ls python_tests/test_*.py | grep -vE 'package|trainer|cartpole|bench|triton|vectorised|gpu_check|test_gpu[.]|test_cuda')

# A second environment on top of .venv, whose ppo_kernels is the sanitized build, for what runs code of it. Leaks are
# Python's own affair.
test-sanitize: .venv/installed
	$(BIN)/python -m venv --without-pip build/sanitize
	$(BIN)/python -c "import site; print(site.getsitepackages()[0])" \
		> "$$(build/sanitize/bin/python -c 'import site; print(site.getsitepackages()[0])')/base.pth"
	$(PIP) --python build/sanitize/bin/python install -q --no-deps --no-build-isolation --force-reinstall . \
		-C cmake.define.PPO_KERNELS_SANITIZE=ON -C cmake.build-type=Debug -C build-dir=build/sanitize/cmake
	cd build/sanitize && PPO_KERNELS_SANITIZED=1 ASAN_OPTIONS=detect_leaks=0 OMP_WAIT_POLICY=passive \
		LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" \
		bin/python -m pytest $(PROCESSES) -p no:cacheprovider -k "not compile and not opcheck and not torch" \
		$(addprefix ../../,$(OP_TESTS))
	$(BIN)/python python_tests/cuda_sanitized.py address,undefined

FLOOR_PYTHON ?= python3.10
test-floor:
	test -d build/floor || $(FLOOR_PYTHON) -m venv build/floor
	build/floor/bin/python -m pip install -q torch==2.6.0 numpy pytest hypothesis
	build/floor/bin/python -m pip install -q --no-deps .
	cd build/floor && bin/python -m pytest -p no:cacheprovider $(addprefix ../../,$(OP_TESTS))

# An environment on top of .venv.
define ON_TOP
$(BIN)/python -m venv --without-pip $(1)
$(BIN)/python -c "import site; print(f'import site; site.addsitedir({site.getsitepackages()[0]!r})')" \
	> "$$($(1)/bin/python -c 'import site; print(site.getsitepackages()[0])')/base.pth"
endef

# The hosts without what they require, and what importing them takes, in an environment on top of .venv.
HOSTS := trl==1.16.0 verl==0.9.1 openrlhf==0.11.2 torchrl==0.14.1 stable-baselines3==2.9.2
HOSTS_NEED := accelerate datasets "tensordict>=0.14.3,<0.15" ray hydra-core codetiming dill gymnasium==1.4.0 pandas rich
test-integrations: .venv/installed
	$(call ON_TOP,build/integrations)
	$(PIP) --python build/integrations/bin/python install -q --no-deps $(HOSTS)
	$(PIP) --python build/integrations/bin/python install -q -c constraints.txt $(HOSTS_NEED)
	OMP_WAIT_POLICY=passive build/integrations/bin/python -m pytest -n auto --maxprocesses 4 --dist loadfile \
		-p no:cacheprovider python_tests/integrations

# Without its operators, which are compiled for GPUs.
DEEPSPEED_NEEDS := einops hjson msgpack ninja psutil py-cpuinfo pydantic
test-deepspeed: .venv/installed
	$(call ON_TOP,build/deepspeed)
	$(PIP) --python build/deepspeed/bin/python install -q -c constraints.txt $(DEEPSPEED_NEEDS)
	DS_BUILD_OPS=0 $(PIP) --python build/deepspeed/bin/python install -q --no-deps deepspeed==0.19.8
	OMP_WAIT_POLICY=passive build/deepspeed/bin/python -m pytest -p no:cacheprovider \
		python_tests/test_trainer_ranks.py -k deepspeed

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(SOURCES)
	$(BIN)/mypy

format: .venv/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(SOURCES)

docs: .venv/installed
	$(BIN)/python python_tests/readme.py --write

# An editable install that rebuilds the C++ part on import after a change.
.venv/installed: pyproject.toml constraints.txt
	test -d .venv || $(PYTHON) -m venv .venv
	$(PIP) install -q "$(TORCH)"
	$(PIP) install -q -c constraints.txt scikit-build-core pybind11 cmake ninja
	$(PIP) install -q -c constraints.txt --no-build-isolation -e ".[trainer,bench,dev]" \
		-C editable.rebuild=true -C editable.verbose=false
	touch $@

clean:
	rm -rf .venv build
