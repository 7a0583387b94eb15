"""Compiles programs and keeps their traces, so that a second start does not trace them again.

JAX keeps what XLA has compiled, but finds it by the program's text, which Python must trace first.
That takes seconds for a network of 70 layers. So the text (`jax.export`'s StableHLO) is kept here,
under a digest of all that it depends on: this package's source, the packages' versions, jax's
settings, the config, shapes and devices. XLA gets the same text whether it was kept or traced, so
on CPU a run has the same bits.
"""

import contextlib
import functools
import gc
import hashlib
import json
import os
import pathlib
import platform
import threading
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata
from typing import Any

import jax
import optax
from absl import logging
from jax import export

from bn_jax import ops, optim, step

KEEP = 400  # files; the least recently used are removed first
KEPT = "traced"  # folder within jax's cache of compiled programs
PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")
# Fields of a config that do not change a program's text. They change data, a shape, the length of a
# loop, or how XLA compiles. (l2 = 0 leaves out an argument, which is part of the key anyway.) Any
# other field, including new ones, makes another program.
NOT_TRACED = {
    "name",
    "scale",
    "seed",
    "data",
    "record",
    "deterministic",
    # Shapes, which are part of the key.
    "batch_size",
    "batch_per_device",
    "eval_batch_size",
    "steps_per_dispatch",
    # Numbers of the optimizer, which are arguments.
    "learning_rate",
    "learning_rate_scaling",
    "warmup_examples",
    "decay_rate",
    "decay_epochs",
    "decay_examples",
    "l2",
    "momentum",
    # How long the loop is, and what it does every so many steps.
    "total_steps",
    "log_every",
    "eval_every",
    "eval_early",
    "eval_test",
    "statistics_batches",
    "checkpoint_every",
    "checkpoint_wait",
    "keep_last",
    "keep_best",
    "keep_every",
    "write_seconds",
}
SETTINGS = (
    "jax_enable_x64",
    "jax_default_matmul_precision",
    "jax_numpy_dtype_promotion",
    "jax_numpy_rank_promotion",
    "jax_debug_nans",
    "jax_default_prng_impl",
    "jax_threefry_partitionable",
)

# Programs are traced one after the other. Side by side they would take turns at Python's own lock,
# and the training step, which is usually begun first and takes XLA longest, would be done last.
_TRACING = threading.Lock()

for _type in (step.TrainState, optim.Hyper, optax.TraceState):
    export.register_namedtuple_serialization(
        _type, serialized_name=f"{_type.__module__}.{_type.__name__}"
    )


def compiled(
    name: str,
    function: Callable,
    arguments: tuple,
    config: Mapping[str, Any],
    *,
    jit: Callable = jax.jit,
    made_from: Any = None,
) -> Callable:
    """Compiles `jit(function)` for `arguments`: arrays, or their shapes with shardings.

    Args:
      name: of the program. It, `config` and `made_from` must determine what `function` closes over.
      config: the experiment's, as a dict.
      jit: `jax.jit`, or a `functools.partial` of it with shardings and donated arguments.
      made_from: what else the program is made from, as JSON.

    If jax cannot export the program, it is compiled without that, and nothing is kept.
    """
    leaves, structure = jax.tree.flatten(arguments)
    about = [
        name,
        config,
        made_from,
        [_described(leaf) for leaf in leaves],
        str(structure),
        [jax.default_backend(), jax.device_count()],
        str(getattr(jit, "keywords", {})),
    ]

    def trace() -> bytes:
        # The kept program donates nothing; the program around it does.
        exported = export.export(jit(function, donate_argnums=()))(*arguments)
        return bytes(exported.serialize())

    try:
        with _TRACING:
            text = kept(about, trace)
    except (ValueError, NotImplementedError) as refusal:
        # jax cannot export some operations of this backend. Any other error in `function` is raised
        # again by the next line but one.
        logging.info("the trace of %s cannot be kept: %s", name, refusal)
        return jit(function).lower(*arguments).compile()

    call = export.deserialize(bytearray(text)).call

    def program(*arguments):
        return call(*arguments)

    program.__name__ = name  # in profiles
    return jit(program).lower(*arguments).compile()


def _described(leaf: Any) -> list[str]:
    """Describes an argument: its shape, dtype and sharding."""
    parts = [getattr(leaf, name, None) for name in ("shape", "dtype", "sharding")]
    return [str(part) for part in parts]


def kept(about: list, make: Callable[[], bytes]) -> bytes:
    """Returns what `make` returns, or returned before for the same `about`, source and packages.

    `about` is JSON; fields of a config in it that are NOT_TRACED are ignored. Nothing is kept
    without a cache of compiled programs (`startup.use_compilation_cache`) that can be written.
    """
    folder = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    if not folder:
        with _no_garbage_collection():
            return make()
    place = pathlib.Path(folder) / KEPT
    traced = [_traced(part) if isinstance(part, Mapping) else part for part in about]
    key = json.dumps([traced, _surroundings()], sort_keys=True, default=list)
    file = place / hashlib.sha256(key.encode()).hexdigest()

    try:
        content = file.read_bytes()
        # A file begins with the digest of its content; a damaged file is made again.
        if hashlib.sha256(content[32:]).digest() == content[:32]:
            file.touch()
            return content[32:]
    except OSError:
        pass  # it was not kept

    with _no_garbage_collection():
        made = make()
    try:
        place.mkdir(exist_ok=True)
        scratch = place / f"{file.name}.{os.getpid()}"
        scratch.write_bytes(hashlib.sha256(made).digest() + made)
        scratch.replace(file)
        by_age = sorted(place.iterdir(), key=lambda file: file.stat().st_mtime)
        for old in by_age[:-KEEP]:
            old.unlink()
    except OSError:
        pass  # another process was faster, or the disk is full: only time is lost
    return made


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Turns Python's garbage collector off, which takes a fifth of the time of tracing.

    Tracing makes many objects that stay, through which the collector looks again and again.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _traced(config: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in config.items() if k not in NOT_TRACED}


def _surroundings() -> list:
    """Returns what a trace depends on besides its arguments: source, forms and jax's settings."""
    forms = [form for form in ops.FORMS if ops.hand_tuned(form)]
    settings = [str(getattr(jax.config, name)) for name in SETTINGS]
    return [_source(), forms, *settings]


@functools.cache
def _source() -> str:
    """Returns a digest of this package's files and of the versions of Python and its packages."""
    versions = [platform.python_version()]
    versions += [metadata.version(package) for package in PACKAGES]
    digest = hashlib.sha256(json.dumps(versions).encode())
    root = pathlib.Path(__file__).resolve().parents[1]
    for file in sorted(root.rglob("*.py")):
        digest.update(f"{file.relative_to(root)} {file.stat().st_size}\n".encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()
