"""Threads are as many as the CPUs that a process may use, not as the machine has."""

import os
import pathlib

import pytest

from bn_jax.data import pipeline
from bn_jax.distributed.cpus import usable_cpus
from bn_jax.workdir import provenance

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture
def one_cpu():
    """This process may use one CPU only, as a SLURM task with --cpus-per-task=1."""
    if not hasattr(os, "sched_setaffinity"):
        pytest.skip("this system has no CPU affinity")
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    yield
    os.sched_setaffinity(0, before)


def test_a_process_counts_the_cpus_that_it_may_use(one_cpu, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 208)
    monkeypatch.delenv("NPROC", raising=False)
    monkeypatch.setattr(provenance.jax, "local_device_count", lambda: 1)
    assert usable_cpus() == 1
    assert provenance.cpu_threads() == 1


def test_the_reader_has_a_thread_for_each_usable_cpu_and_one_more(one_cpu, monkeypatch):
    """One more, so that the next batch is begun while the last rows of another are made."""
    import grain

    asked = []
    real = grain.ReadOptions
    monkeypatch.setattr(os, "cpu_count", lambda: 208)
    monkeypatch.setattr(
        grain, "ReadOptions", lambda **options: asked.append(options) or real(**options)
    )
    batches = pipeline.Batches(range(3), lambda step: {"x": step}, size=1, one_thread=False)
    assert [batch["x"] for batch in batches] == [0, 1, 2]
    assert [options["num_threads"] for options in asked] == [2]


def test_nothing_else_counts_cpus():
    for file in (ROOT / "bn_jax").rglob("*.py"):
        if file.name != "cpus.py":
            assert "cpu_count" not in file.read_text(), file
