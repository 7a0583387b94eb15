"""The program that imports us stays as it was: backend, flags, threads, logging, plots."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent

# Everything of a process that an import could change, before and after the modules are imported.
UNTOUCHED = """
import faulthandler, gc, importlib, json, locale, logging, multiprocessing, os, pkgutil, random
import signal, sys, threading, warnings
import absl.logging, cv2, jax, matplotlib, numpy as np
# Flax draws a random number, and scipy adds a filter of warnings for a warning of its own.
import flax, scipy.special
from jax._src import xla_bridge

def state():
    return {
        "environment": dict(os.environ),
        "jax's options": {k: repr(v) for k, v in jax.config.values.items()},
        "a backend was started": xla_bridge.backends_are_initialized(),
        "OpenCV's threads": cv2.getNumThreads(),
        "matplotlib's backend": matplotlib.get_backend(),
        "matplotlib's options": repr(matplotlib.rcParams),
        "levels of logging": [logging.root.level, logging.root.manager.disable,
                              absl.logging.get_verbosity(), logging.getLogger("jax").level],
        "handlers of logging": [repr(h) for h in logging.root.handlers],
        "filters of warnings": [repr(f) for f in warnings.filters],
        "signals": [repr(signal.getsignal(s)) for s in signal.valid_signals()],
        "threads": threading.active_count(),
        "start method": multiprocessing.get_start_method(allow_none=True),
        "numpy": [repr(np.geterr()), repr(np.get_printoptions())],
        "random numbers": [repr(random.getstate()), repr(np.random.get_state())],
        "interpreter": [sys.path, sys.getrecursionlimit(), repr(sys.excepthook), repr(sys.stdout),
                        repr(threading.excepthook), gc.get_threshold(), faulthandler.is_enabled()],
        "process": [os.getcwd(), locale.setlocale(locale.LC_ALL), os.getpriority(0, 0)],
    }

before = state()
import bn_jax
names = [m.name for m in pkgutil.walk_packages(bn_jax.__path__, "bn_jax.") if wanted(m.name)]
for name in names:
    importlib.import_module(name)
after = state()
print(json.dumps([len(names), {k: [before[k], after[k]] for k in after if before[k] != after[k]}]))
"""


def python(code: str, **environment: str) -> str:
    """The last line that a fresh process prints."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


def test_importing_every_module_changes_nothing_in_the_host_program():
    """Before, importing the figures switched matplotlib to Agg, importing the data modules took
    OpenCV's threads away from the whole process, and importing the checkpoints (by orbax) gave the
    root logger a handler, so that the host's own logging.basicConfig did nothing."""
    count, changed = json.loads(python("wanted = lambda name: True\n" + UNTOUCHED))
    assert count > 80
    assert changed == {}


@pytest.mark.parametrize("what", ["os.environ['A'] = 'b'", "cv2.setNumThreads(1)"])
def test_a_change_is_noticed(what):
    code = "wanted = lambda name: name == 'bn_jax.errors'\n" + UNTOUCHED
    broken = code.replace("after = state()", f"{what}\nafter = state()")
    _, changed = json.loads(python(broken))
    assert len(changed) == 1


def test_importing_the_package_imports_nothing_heavy():
    """It took 0.02 ms to 3 s, depending on what was imported with it; names come when used."""
    code = (
        "import json, sys, time, jax\n"
        "before = set(sys.modules)\n"
        "began = time.process_time()\n"
        "import bn_jax\n"
        "took = time.process_time() - began\n"
        "print(json.dumps([took, sorted(set(sys.modules) - before)]))"
    )
    took, modules = json.loads(python(code))
    assert modules == ["bn_jax"]
    assert took < 0.1  # of the process alone, not by the clock: 0.4 ms measured


def test_the_core_imports_nothing_but_jax():
    code = (
        "import json, sys, jax, jax.export, jax.extend.core, jax.interpreters.mlir\n"
        "before = set(sys.modules)\n"
        "from bn_jax import batch_norm, normalize\n"
        "print(json.dumps(sorted({m.split('.')[0] for m in set(sys.modules) - before})))"
    )
    assert set(json.loads(python(code))) <= {"bn_jax", "jax"}


def test_batch_norm_layers_import_no_tools_of_training():
    code = (
        "import json, sys, bn_jax, bn_jax.nnx\n"
        "bn_jax.BatchNorm\n"
        "print(json.dumps(sorted({m.split('.')[0] for m in sys.modules})))"
    )
    heavy = {"matplotlib", "cv2", "tensorflow_datasets", "tensorflow", "grain", "simplejpeg"}
    assert not heavy & set(json.loads(python(code)))
