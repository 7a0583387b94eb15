"""Prepares a process before it uses its first device.

It joins the other processes, sets XLA's flags, and turns on the cache of compiled programs.
"""

import contextlib
import functools
import os
import pathlib
import sys
from collections.abc import Mapping
from typing import Any

import jax

from bn_jax.batch_norm import SAFE_SUMS, sums_may_be_wrong
from bn_jax.distributed import cluster
from bn_jax.errors import ConfigError, expand_path

HEARTBEAT = 15  # seconds without a heartbeat after which jax considers a process lost

# Seconds for which a process that is done waits for the others. Process 0 is the last one, because
# it still saves and draws.
SHUTDOWN = 1800

# With this flag GPUs add in a fixed order, and XLA chooses algorithms without timing them.
DETERMINISTIC = "--xla_gpu_deterministic_ops=true"


def initialize() -> None:
    """Joins the other processes of this run, if there are any.

    SLURM, Open MPI, GKE's TPUs and Cloud TPU multislice are recognised by their own variables.
    Anywhere else JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID name the processes.
    The environment of a Cloud TPU slice of several hosts shows nothing: its hosts are joined only
    if BN_JAX_CLUSTER has a value (launch/tpu_host.sh sets it), by jax, which asks the metadata
    server.

    Raises ConfigError if a variable is missing or wrong, or jax finds no other processes.
    """
    if jax.distributed.is_initialized():
        return
    join = functools.partial(
        jax.distributed.initialize,
        heartbeat_timeout_seconds=HEARTBEAT,
        shutdown_timeout_seconds=SHUTDOWN,
    )
    if "JAX_COORDINATOR_ADDRESS" in os.environ:
        join(*cluster.named(os.environ))
    elif cluster.has_many_hosts(os.environ):
        try:
            join()
        except ValueError as error:  # jax detects TPU hosts only where libtpu and chips are
            raise ConfigError(
                f"the environment is that of several processes, but jax finds none ({error}): on "
                "TPUs install jax[tpu]; elsewhere set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES "
                "and JAX_PROCESS_ID, or unset BN_JAX_CLUSTER"
            ) from error


def make_gpus_deterministic() -> None:
    """Sets the flag with which a program on GPUs gives the same bits whenever it runs.

    Call it before jax's backend starts, and `use_compilation_cache(deterministic=True)` with it. It
    changes XLA_FLAGS of this process; on CPUs and TPUs it changes no result.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} {DETERMINISTIC}".strip()


def gpus_are_deterministic() -> bool:
    """Whether XLA_FLAGS has the flag, from `make_gpus_deterministic` or the environment."""
    return DETERMINISTIC in os.environ.get("XLA_FLAGS", "").split()


def use_safe_sums(recorded: Mapping[str, Any] | None = None) -> None:
    """Sets SAFE_SUMS for this process if its jaxlib needs it; call it before jax's backend starts.

    recorded: run.json of the run that is resumed. A run that began without the flag resumes without
    it, since the flag changes last digits. If the user has set the option, it is not changed.
    """
    if not sums_may_be_wrong():
        return
    if recorded is not None:
        variables = recorded["hardware"].get("variables", {})
        if SAFE_SUMS.partition("=")[0] not in variables.get("XLA_FLAGS", ""):
            return
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} {SAFE_SUMS}".strip()


def use_compilation_cache(*, deterministic: bool = False) -> None:
    """Keeps compiled programs between processes, in JAX_COMPILATION_CACHE_DIR or ~/.cache/bn_jax.

    An empty JAX_COMPILATION_CACHE_DIR turns the cache off. Nothing is kept if the folder cannot be
    written, or if there is no home directory. In a folder within it, jax keeps the algorithms that
    XLA has chosen for a GPU. `deterministic` uses a cache of its own, without the algorithms that
    other runs have chosen by timing.
    """
    folder = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    if folder is None:
        try:
            base = expand_path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
        except ConfigError:
            print(
                "bn_jax: there is no home directory, so compiled programs are not kept",
                file=sys.stderr,
            )
            return
        folder = str(base / "bn_jax" / "xla")
    if not folder:
        return
    if deterministic:
        folder = str(pathlib.Path(folder) / "deterministic")

    with contextlib.suppress(OSError):
        pathlib.Path(folder).mkdir(parents=True, exist_ok=True)
        jax.config.update("jax_compilation_cache_dir", folder)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
        kept = "xla_gpu_per_fusion_autotune_cache_dir"
        jax.config.update("jax_persistent_cache_enable_xla_caches", kept)
