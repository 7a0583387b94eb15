"""Reads from the environment which processes a job has. Nothing here imports jax."""

import os
import re
from collections.abc import Mapping

from bn_jax.errors import ConfigError


def require_one_process(command: str) -> None:
    """Raises ConfigError if the environment starts `command` as one of several processes.

    It is for commands that do not divide their work: several copies would overwrite files.
    """
    if "JAX_COORDINATOR_ADDRESS" in os.environ:
        _, processes, _ = named(os.environ)
        several = processes > 1
    else:
        several = has_many_hosts(os.environ)
    if several:
        raise ConfigError(
            f"{command} runs in one process, but this job has several: start it on one host "
            "without the launcher's variables (training and bn_jax.evaluate use all hosts)"
        )


def named(env: Mapping[str, str]) -> tuple[str, int, int]:
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


def has_many_hosts(env: Mapping[str, str]) -> bool:
    """Whether the environment is that of a job of several processes that jax can detect itself."""
    # GKE has named a pod's hosts by either of these; jax looks at the first one first.
    tpu_hosts = env.get("TPU_PROCESS_ADDRESSES", env.get("TPU_WORKER_HOSTNAMES", "")).split(",")
    # Without SLURM_PROCID this is a shell of salloc, not a task of srun.
    in_task = "SLURM_PROCID" in env and "SLURM_NTASKS" in env
    slurm_tasks = _whole(env, "SLURM_NTASKS", 1) if in_task else 1
    mpi_size = _whole(env, "OMPI_COMM_WORLD_SIZE", 1) if "OMPI_COMM_WORLD_SIZE" in env else 1
    multislice = "MEGASCALE_COORDINATOR_ADDRESS" in env
    asked_for = "BN_JAX_CLUSTER" in env  # for Cloud TPU VMs, whose environment shows no processes
    return len(tpu_hosts) > 1 or slurm_tasks > 1 or mpi_size > 1 or multislice or asked_for


def _whole(env: Mapping[str, str], name: str, least: int) -> int:
    """Returns a variable as a whole number. Raises ConfigError if it is not one from `least`."""
    text = env[name]
    if not text.isascii() or not text.isdecimal() or int(text) < least:
        raise ConfigError(
            f"{name}={text} must be a whole number of at least {least}; correct or unset it"
        )
    return int(text)
