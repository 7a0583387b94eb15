"""Joining the other processes of a run, and the cache of compiled programs."""

import contextlib
import os
import pathlib
import re
import sys

import jax

from bn_jax.errors import ConfigError, expand_path

HEARTBEAT = 15  # seconds after which jax takes a process that gives no sign of life for lost

# Seconds that a process which is done waits for the others. Process 0 is the last: it still saves
# and draws.
SHUTDOWN = 1800


def initialize() -> None:
    """Joins the other processes of this run, if there are any.

    Recognised are SLURM, Open MPI, GKE's TPUs and Cloud TPU multislice by their own variables; any
    processes are named by JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID. A Cloud TPU
    slice of several hosts shows nothing in the environment: only where BN_JAX_CLUSTER is set (by
    launch/tpu_host.sh to 1; any value) are they joined, by jax, which asks the metadata server.
    """
    if jax.distributed.is_initialized():
        return
    env = os.environ
    if "JAX_COORDINATOR_ADDRESS" in env:
        missing = {"JAX_NUM_PROCESSES", "JAX_PROCESS_ID"} - env.keys()
        if missing:
            raise ConfigError(
                f"JAX_COORDINATOR_ADDRESS is set but not {' and '.join(sorted(missing))}: "
                "set all three, or none for a single process"
            )
        processes, process = _whole(env, "JAX_NUM_PROCESSES", 1), _whole(env, "JAX_PROCESS_ID", 0)
        if process >= processes:
            raise ConfigError(
                f"JAX_PROCESS_ID={process}: not below JAX_NUM_PROCESSES={processes}; "
                "processes are numbered from 0"
            )
        if not re.fullmatch(r".+:\d+", env["JAX_COORDINATOR_ADDRESS"]):
            raise ConfigError(
                f"JAX_COORDINATOR_ADDRESS={env['JAX_COORDINATOR_ADDRESS']}: not HOST:PORT; "
                "name a free port of the host of process 0"
            )
        jax.distributed.initialize(
            env["JAX_COORDINATOR_ADDRESS"],
            num_processes=processes,
            process_id=process,
            heartbeat_timeout_seconds=HEARTBEAT,
            shutdown_timeout_seconds=SHUTDOWN,
        )
    elif cluster_has_many_hosts(env):
        jax.distributed.initialize(
            heartbeat_timeout_seconds=HEARTBEAT,
            shutdown_timeout_seconds=SHUTDOWN,
        )


def use_compilation_cache() -> None:
    """Keeps compiled programs between processes, in JAX_COMPILATION_CACHE_DIR or ~/.cache/bn_jax.

    An empty JAX_COMPILATION_CACHE_DIR turns it off. Nothing is kept without a folder that can be
    written, or without a home directory.
    """
    folder = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    if folder is None:
        try:
            base = expand_path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
        except ConfigError:
            print("bn_jax: no home directory: compiled programs are not kept", file=sys.stderr)
            return
        folder = str(base / "bn_jax" / "xla")
    if folder:
        with contextlib.suppress(OSError):
            pathlib.Path(folder).mkdir(parents=True, exist_ok=True)
            jax.config.update("jax_compilation_cache_dir", folder)
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def cluster_has_many_hosts(env) -> bool:
    """Whether the environment is that of a multi-process job which jax can detect by itself."""
    hosts = env["TPU_WORKER_HOSTNAMES"].split(",") if "TPU_WORKER_HOSTNAMES" in env else []
    in_task = "SLURM_PROCID" in env and "SLURM_NTASKS" in env
    slurm_tasks = _whole(env, "SLURM_NTASKS", 1) if in_task else 1
    mpi_size = _whole(env, "OMPI_COMM_WORLD_SIZE", 1) if "OMPI_COMM_WORLD_SIZE" in env else 1
    # A Cloud TPU VM's environment says nothing: jax asks the metadata server (launch/tpu_host.sh).
    named = "MEGASCALE_COORDINATOR_ADDRESS" in env or "BN_JAX_CLUSTER" in env
    return len(hosts) > 1 or slurm_tasks > 1 or mpi_size > 1 or named


def _whole(env, name: str, low: int) -> int:
    """A variable of the environment as a number. Raises ConfigError if it is none from `low` on."""
    text = env[name]
    if not text.isascii() or not text.isdecimal() or int(text) < low:
        raise ConfigError(f"{name}={text}: not a whole number from {low}; correct the environment")
    return int(text)
