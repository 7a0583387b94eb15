"""What happens before the first device is used: joining the other processes, the program cache,
XLA's flags."""

import contextlib
import functools
import os
import pathlib
import re
import sys
from collections.abc import Mapping
from typing import Any

import jax

from bn_jax.batch_norm import SAFE_SUMS, sums_may_be_wrong
from bn_jax.errors import ConfigError, expand_path

HEARTBEAT = 15  # seconds without a heartbeat after which jax considers a process lost

# Seconds that a process which is done waits for the others. Process 0 is the last one: it still
# saves and draws.
SHUTDOWN = 1800

# Every operation of a GPU adds in a fixed order, and XLA chooses algorithms without timing them.
DETERMINISTIC = "--xla_gpu_deterministic_ops=true"


def initialize() -> None:
    """Joins the other processes of this run, if there are any.

    SLURM, Open MPI, GKE's TPUs and Cloud TPU multislice are recognised by their own variables.
    Anywhere else JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID name the processes.
    The environment of a Cloud TPU slice of several hosts shows nothing: its hosts are joined only
    if BN_JAX_CLUSTER has a value (launch/tpu_host.sh sets it), by jax, which asks the metadata
    server.

    Raises ConfigError if a variable is missing or wrong.
    """
    if jax.distributed.is_initialized():
        return
    join = functools.partial(
        jax.distributed.initialize,
        heartbeat_timeout_seconds=HEARTBEAT,
        shutdown_timeout_seconds=SHUTDOWN,
    )
    if "JAX_COORDINATOR_ADDRESS" in os.environ:
        address, processes, process = _named_cluster(os.environ)
        join(address, processes, process)
    elif cluster_has_many_hosts(os.environ):
        join()


def _named_cluster(env: Mapping[str, str]) -> tuple[str, int, int]:
    """Returns the coordinator's address, the number of processes and this process's number."""
    missing = {"JAX_NUM_PROCESSES", "JAX_PROCESS_ID"} - env.keys()
    if missing:
        raise ConfigError(
            f"JAX_COORDINATOR_ADDRESS is set but not {' and '.join(sorted(missing))}: "
            "set all three, or none for a single process"
        )

    processes = _whole(env, "JAX_NUM_PROCESSES", 1)
    process = _whole(env, "JAX_PROCESS_ID", 0)
    if process >= processes:
        raise ConfigError(
            f"JAX_PROCESS_ID={process} must be below JAX_NUM_PROCESSES={processes}; "
            "processes are numbered from 0"
        )

    address = env["JAX_COORDINATOR_ADDRESS"]
    if not re.fullmatch(r".+:\d+", address):
        raise ConfigError(
            f"JAX_COORDINATOR_ADDRESS={address} must be HOST:PORT; "
            "give a free port on the host of process 0"
        )
    return address, processes, process


def cluster_has_many_hosts(env: Mapping[str, str]) -> bool:
    """Whether the environment is that of a multi-process job which jax can detect by itself."""
    tpu_hosts = env.get("TPU_WORKER_HOSTNAMES", "").split(",")
    # Without SLURM_PROCID this is a shell of salloc, not a task of srun.
    in_task = "SLURM_PROCID" in env and "SLURM_NTASKS" in env
    slurm_tasks = _whole(env, "SLURM_NTASKS", 1) if in_task else 1
    mpi_size = _whole(env, "OMPI_COMM_WORLD_SIZE", 1) if "OMPI_COMM_WORLD_SIZE" in env else 1
    multislice = "MEGASCALE_COORDINATOR_ADDRESS" in env
    asked_for = "BN_JAX_CLUSTER" in env  # a Cloud TPU VM's environment says nothing
    return len(tpu_hosts) > 1 or slurm_tasks > 1 or mpi_size > 1 or multislice or asked_for


def _whole(env: Mapping[str, str], name: str, least: int) -> int:
    """Returns a variable as a whole number. Raises ConfigError if it is not one from `least`."""
    text = env[name]
    if not text.isascii() or not text.isdecimal() or int(text) < least:
        raise ConfigError(
            f"{name}={text} must be a whole number of at least {least}; correct or unset it"
        )
    return int(text)


def make_gpus_deterministic() -> None:
    """Makes every later start of a program on GPUs give the same bits.

    Call it before jax's backend starts, and `use_compilation_cache(deterministic=True)` with it. It
    changes XLA_FLAGS of this process; on CPUs and TPUs it changes no result.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} {DETERMINISTIC}".strip()


def gpus_are_deterministic() -> bool:
    """Whether XLA_FLAGS says so, by `make_gpus_deterministic` or in the environment."""
    return DETERMINISTIC in os.environ.get("XLA_FLAGS", "").split()


def use_safe_sums(recorded: Mapping[str, Any] | None = None) -> None:
    """Sets SAFE_SUMS for this process where its jaxlib needs it, before jax's backend starts.

    recorded: run.json of the run that is resumed. One that began without the flag is resumed
    without it, since the flag changes last digits. A value of the user's own stays.
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

    An empty JAX_COMPILATION_CACHE_DIR turns the cache off. Nothing is kept without a folder that
    can be written, or without a home directory. In a folder within it, jax keeps the algorithms
    that XLA has chosen for a GPU. `deterministic` takes a cache of its own, so that it does not
    meet algorithms that other runs have chosen by timing.
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
