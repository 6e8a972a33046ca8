# `make demo` and `make test` need nothing but Python 3.10 or newer, a C++17 compiler and a package registry.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
SOURCES := $(shell find csrc -type f) setup.py pyproject.toml constraints.txt

.PHONY: demo test test-interop test-interop-cpu accuracy lint format bench bench-interop bench-gpu parity readme static gpu \
    sanitize release-check clean

demo: $(READY)
	$(BIN)/sslfast train simclr --data mnist5k --out runs/demo --epochs 20 --seed 0 --overwrite

# Two tests at a time. Idle threads sleep, since spinning ones would take the other test's cores; Triton's interpreter
# uses one core.
test: $(READY)
	OMP_WAIT_POLICY=PASSIVE $(BIN)/pytest -n 2 --dist worksteal -m "not accuracy and not interpreted"
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 -m interpreted

# The drop-ins beside the installed originals. Those that need no torchvision go into the environment of the tests; all
# of them, with torchvision and the torch that it wants, into one of its own, which takes gigabytes.
INTEROP := .venv-interop
COMPARED := HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1
test-interop-cpu: $(READY)
	$(BIN)/pip install -q -c constraints.txt pytorch-metric-learning sentence-transformers
	$(COMPARED) $(BIN)/pytest -n 2 --dist worksteal $(foreach name,pytorch_metric_learning cross_batch_memory \
	    sentence_transformers gist transformers patch,tests/test_interop_$(name).py)

test-interop: test-interop-cpu $(INTEROP)/.ready
	SSLFAST_PEERS=all $(COMPARED) $(INTEROP)/bin/pytest -n 2 --dist worksteal tests/test_interop_*.py

# Five methods trained with our ops, with plain PyTorch and with lightly's losses: three quarters of an hour.
parity: $(INTEROP)/.ready
	$(INTEROP)/bin/python benchmarks/parity.py --json-out benchmarks/results

bench-interop: $(INTEROP)/.ready
	HF_HUB_OFFLINE=1 $(INTEROP)/bin/python benchmarks/interop.py --json-out benchmarks/results

$(INTEROP)/.ready: $(SOURCES) constraints-interop.txt
	test -x $(INTEROP)/bin/python || $(PYTHON) -m venv $(INTEROP)
	$(INTEROP)/bin/pip install -q -c constraints-interop.txt -e ".[bench,test,train]" torch torchvision lightly open_clip_torch \
	    pytorch-metric-learning sentence-transformers timm
	$(INTEROP)/bin/pip install -q --no-deps -c constraints-interop.txt solo-learn  # its files; it needs what no longer installs
	touch $@

accuracy: $(READY)
	SSLFAST_RESULTS=$(CURDIR)/benchmarks/results $(BIN)/pytest -m accuracy -s

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' | xargs $(BIN)/clang-format --dry-run -Werror

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' | xargs $(BIN)/clang-format -i

# Ops, batches, views, processes, training steps, beside the libraries that are installed: an hour. With all of them:
# make bench-interop bench MEASURED=.venv-interop/bin
MEASURED := $(BIN)
bench: $(READY)
	$(MEASURED)/sslfast bench --json benchmarks/results
	$(MEASURED)/sslfast bench ntxent_loss --sizes 256 1024 4096 16384 32768 --json benchmarks/results --name scaling
	$(MEASURED)/python benchmarks/augment.py --json-out benchmarks/results
	$(MEASURED)/python benchmarks/distributed.py --json-out benchmarks/results
	$(MEASURED)/python benchmarks/steps.py --json-out benchmarks/results

readme: $(READY)
	$(BIN)/python benchmarks/readme.py
	$(BIN)/python benchmarks/projection.py

# Every shipped configuration of the GPU kernels, compiled without a GPU: registers, spills, occupancy, predicted times.
static: $(READY)
	$(BIN)/python benchmarks/static_gpu.py --json-out benchmarks/results/static.json

# On a machine with a GPU, with the torch and Triton of $(PYTHON); needs no internet, and takes less than nine minutes.
gpu:
	PYTHON=$(PYTHON) bash tests/gpu.sh tests

bench-gpu:
	PYTHON=$(PYTHON) bash tests/gpu.sh benchmarks

# The cases of every op, on every instruction set, with C++ built with AddressSanitizer and UndefinedBehaviorSanitizer.
# torch.compile starts a compiler of its own, which the preloaded runtime disturbs; sums over the largest patches, which this
# build does not vectorise, round a little worse than the tests allow.
SANITIZED := build/sanitize
sanitize: $(READY)
	rm -rf $(SANITIZED)
	CMAKE_ARGS="-DSSLFAST_SANITIZE=address,undefined -DCMAKE_BUILD_TYPE=RelWithDebInfo" $(BIN)/pip install -q \
	    --no-build-isolation --no-deps --target $(SANITIZED) .
	PYTHONPATH=$(SANITIZED) LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" \
	    ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 SSLFAST_EXPECT_IN=$(SANITIZED) \
	    $(BIN)/pytest -k "not compile and not peak_memory and not (large and patches)" tests/test_backends.py tests/test_pair_rows.py \
	    tests/test_similarity_lse.py tests/test_similarity_lse_edges.py tests/test_unusual_tensors.py \
	    tests/test_contrastive.py tests/test_native.py tests/test_ema.py tests/test_patch_mask.py \
	    tests/test_patches.py tests/test_masked_patch_mse.py tests/test_soft_cross_entropy.py \
	    tests/test_head_loss.py tests/test_sinkhorn.py tests/test_similarity_bce.py tests/test_hardest_pairs.py \
	    tests/test_linear_cross_entropy.py tests/test_view_transforms.py tests/test_view_params.py tests/test_view_inputs.py \
	    tests/test_view_errors.py

# An sdist and its wheels, under the first of these torch versions with each Python that there is, and under the oldest
# and newest that we support. It downloads gigabytes.
TORCHES ?= 2.13.0 2.8.0 2.14.1
release-check:
	PYTHON=$(PYTHON) bash tests/release_check.sh $(TORCHES)

$(READY): $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt -e ".[train,bench,test,lint,triton]"
	touch $@

clean:
	rm -rf $(VENV) $(INTEROP) .venv-gpu build dist *.egg-info sslfast/_C*.so
