"""How many CPUs this process has, on machines that it shares with others."""

import os


def usable_cpus() -> int:
    """Returns the number of CPUs that this process may run on.

    A SLURM task, a container or taskset may leave it a few of the machine's; `os.cpu_count` counts
    them all.
    """
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1  # macOS
