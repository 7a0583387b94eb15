"""Counts the CPUs of a process, on machines that it shares with others, and its threads."""

import os


def usable_cpus() -> int:
    """Returns the number of CPUs that this process may run on.

    SLURM, a container or taskset may restrict it to a few of the machine's CPUs, all of which
    `os.cpu_count` counts.
    """
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1  # macOS


def pool_size(devices: int) -> int:
    """Returns the threads of XLA's CPU backend: $NPROC, or this process's usable CPUs.

    devices: the process's CPU devices. Virtual ones share the pool, which has at least as many
    threads as there are devices.
    """
    text = os.environ.get("NPROC", "")
    if text.isdecimal() and int(text) > 0:
        return max(int(text), devices)
    return max(usable_cpus(), devices)
