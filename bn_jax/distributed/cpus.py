"""Counts the CPUs of this process, on machines that it shares with others."""

import os


def usable_cpus() -> int:
    """Returns the number of CPUs that this process may run on.

    SLURM, a container or taskset may restrict it to a few of the machine's CPUs, all of which
    `os.cpu_count` counts.
    """
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1  # macOS
