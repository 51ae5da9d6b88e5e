# In a fresh checkout, `make demo` and `make test` set everything up themselves.
PYTHON ?= python3
VENV   ?= .venv
# torch from PyPI brings gigabytes of CUDA: constraints.txt pins it for machines without a GPU. To use another
# torch, run with `make CONSTRAINTS=/dev/null`, or point VENV at an environment that has one already.
CONSTRAINTS ?= constraints.txt
OUT    ?= out
# Figures of a GPU are kept with the others.
GPU_OUT ?= benchmarks/results
# How many processes run the tests; each takes a core, and a GB or two of memory.
JOBS   ?= 2
# Which part of a long sweep to run: i/n with i from 0; and the minutes after which `make zoo` stops, to be resumed by the next call.
SHARD ?= 0/1
MINUTES ?= 20

BIN   := $(VENV)/bin
READY := $(VENV)/.ready
export OMP_NUM_THREADS ?= 2
# Threads that spin starve their neighbours on a busy machine.
export OMP_WAIT_POLICY ?= passive
export MPLBACKEND := Agg
export HF_HUB_OFFLINE := 1

.PHONY: help demo check test test-long test-all test-dist test-kernels test-scaling test-gpu-script mutants lint format gate fuzz kinds zoo zoo-exact reach opinfo opinfo-table bench precision bench-quality bench-goes-wrong bench-differences scaling plan-table wheels gpu dump docs clean
.DEFAULT_GOAL := help

help:
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 16

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) torch
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable ".[trainer,bench,dev]"
	touch $@

demo: $(READY)  ## distil a diffusion transformer on handwritten digits: out/demo/samples.png, metrics.json
	$(BIN)/python -m jvpgraph.trainer.demo --out $(OUT)/demo

# One thread each; a file stays in one process, whose graphs it shares; the long files come first, see tests/conftest.py.
# Kernels in the interpreter share nothing, and are dealt out one by one.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q
PARALLEL := -n $(JOBS) --dist loadfile --no-loadscope-reorder
KERNELS := $(addprefix tests/test_,attention_triton.py backward_triton.py block_mask_triton.py triton_models.py)

check: lint  ## before each commit, in five minutes: lint, types, and the fast tests
	$(PYTEST) $(PARALLEL) -m "not slow and not kernels and not ranks and not timing and not matrix and not fuzz" tests

test: lint  ## in a quarter of an hour: those of make check, kernels in the interpreter, processes, the rest
	$(PYTEST) $(PARALLEL) --durations=15 -m "not kernels and not timing and not matrix and not long" tests
	TRITON_INTERPRET=1 $(PYTEST) -n $(JOBS) --durations=5 -m "kernels and not matrix" $(KERNELS)
	$(PYTEST) -m timing tests/test_regions.py tests/test_data.py tests/test_checkpoint.py

test-long: $(READY)  ## what takes more than three seconds of a core each: whole runs, kills, whole networks; .ci/run has it too
	$(PYTEST) $(PARALLEL) --durations=15 -m "long and not matrix" tests

test-all: test test-long  ## those of both, then every case of which they run one in several: before a release
	$(PYTEST) $(PARALLEL) --durations=15 -m "matrix and not kernels" tests
	TRITON_INTERPRET=1 $(PYTEST) $(PARALLEL) --durations=15 -m "matrix and kernels" $(KERNELS)

test-dist: $(READY)  ## every combination of parallelism on real process groups, with a table of errors
	$(PYTEST) --durations=15 tests/distributed

test-kernels: $(READY)  ## every combination of the attention kernels' options, interpreted and assembled
	TRITON_INTERPRET=1 $(PYTEST) $(PARALLEL) --durations=15 -m kernels $(KERNELS)
	$(PYTEST) $(PARALLEL) --durations=15 -m "not kernels" $(KERNELS) $(addprefix tests/test_,attention.py attention_gluon.py kernel_gate.py)

test-scaling: $(READY)  ## all that benchmarks/scaling.py models, on a small block
	$(PYTEST) tests/test_scaling.py

test-gpu-script: $(READY)  ## make gpu from end to end on a processor, with tiny sizes
	$(PYTEST) tests/test_gpu_script.py

mutants: $(READY)  ## which mutants of FILE its nearest tests let live: make mutants FILE=jvpgraph/verify.py
	OMP_NUM_THREADS=1 $(BIN)/python -W ignore -m tests.mutate $(FILE)

lint: $(READY)  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)  ## let ruff rewrite the files
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

gate: $(READY)  ## every kernel that is launched, compiled for six GPUs without having them: memory, registers, instructions
	OMP_NUM_THREADS=1 $(BIN)/python -W ignore -m jvpgraph.kernels.gate

fuzz: $(READY)  ## 10,000 random programs on four backends: make fuzz SHARD=0/4 runs a quarter of them
	HYPOTHESIS_PROFILE=fuzz SHARD=$(SHARD) $(BIN)/python -m pytest -q -m fuzz tests

opinfo: $(READY)  ## PyTorch's operator database through every backend, resumable: make opinfo SHARD=0/4
	$(BIN)/python -W ignore -m tests.opinfo.run --shard $(SHARD) --out $(OUT)/opinfo

opinfo-table: $(READY)  ## docs/opinfo.md from what make opinfo found
	$(BIN)/python -W ignore -m tests.opinfo.run --out $(OUT)/opinfo --table docs/opinfo.md

kinds: $(READY)  ## programs that bug reports were about, on every backend: right, or refused with the line; resumable
	$(BIN)/python -W ignore -m tests.kinds.run --out $(OUT)/kinds

zoo: $(READY)  ## every transformer of diffusers on the default backend, resumable: make zoo SHARD=0/16
	TORCHINDUCTOR_COMPILE_THREADS=$(OMP_NUM_THREADS) $(BIN)/python -m tests.zoo.sweep --shard $(SHARD) --minutes $(MINUTES) --out $(OUT)/zoo

reach: $(READY)  ## small networks with the constructs of other repositories, each as one graph on the default backend
	TORCHINDUCTOR_COMPILE_THREADS=$(OMP_NUM_THREADS) $(BIN)/python -m tests.reach.run --minutes $(MINUTES) --out $(OUT)/reach

zoo-exact: $(READY)  ## the same models in float64 without Inductor, compared with independent oracles
	$(BIN)/python -m tests.zoo.run

bench: $(READY)  ## time compared with torch.func.jvp and finite differences; compile time against depth
	$(BIN)/python -m benchmarks.dit --out $(OUT)/bench
	$(BIN)/python -m benchmarks.several_tangents --out $(OUT)/bench
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.compile_time --regions-only --out $(OUT)/bench

precision: $(READY)  ## errors of tangents in bfloat16 by how they are computed, for docs/precision.md: a quarter of an hour
	OMP_NUM_THREADS=1 $(BIN)/python -W ignore -m benchmarks.precision --times --out $(OUT)/precision

bench-quality: $(READY)  ## what every recipe gives on the digits, three seeds: three hours on two cores
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.quality --out $(OUT)/quality

bench-goes-wrong: $(READY)  ## what the watch shows of runs that are made to go wrong, for docs/training_goes_wrong.md: half an hour
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.goes_wrong --jobs 2 --out $(OUT)/goes_wrong

bench-differences: $(READY)  ## exact derivative and finite differences in MeanFlow and flow_map, on the teacher of bench-quality: half an hour
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.finite_difference --out $(OUT)/quality

scaling: $(READY)  ## FLOPs, traffic and memory per rank of a Wan 14B block on up to 512 imagined ranks: docs/scaling.md
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.scaling --table docs/scaling.md

plan-table: $(READY)  ## what jvpgraph plan says of Wan, Flux and Qwen-Image on 1, 8 and 64 GPUs: docs/plan.md; half an hour
	OMP_NUM_THREADS=1 $(BIN)/python -W ignore -m benchmarks.plan_table --table docs/plan.md

wheels:  ## download what `make gpu` needs on a machine without a network, into benchmarks/.wheels
	rm -rf benchmarks/.wheels
	$(PYTHON) -m pip download --quiet --no-deps --only-binary=:all: --dest benchmarks/.wheels setuptools 'jvp_flash_attention==0.14.*'

gpu:  ## on a CUDA GPU, in under nine minutes: the kernels' tests, tiles, attention compared with peers; see benchmarks/
	$(or $(wildcard $(BIN)/python),$(PYTHON)) -m benchmarks.gpu --out $(GPU_OUT)

dump: $(READY)  ## the graph of a small Wan transformer after every pass, in out/dump
	rm -rf $(OUT)/dump
	JVPGRAPH_DUMP=$(OUT)/dump $(BIN)/python -W ignore examples/explain_wan.py --layers 1
	@ls $(OUT)/dump/*

$(VENV)/.docs: $(READY)
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable ".[docs]"
	touch $@

docs: $(VENV)/.docs  ## the documentation with the reference, as a site: out/docs/index.html
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict --site-dir $(abspath $(OUT))/docs

clean:
	rm -rf $(VENV) $(OUT)
