"""Devices and shardings on 8 virtual CPU devices."""

import jax
import numpy as np
import pytest

from bn_jax.distributed import cluster, mesh, startup
from bn_jax.errors import ConfigError


def test_a_batch_is_cut_along_its_first_axis():
    devices = mesh.make()
    assert devices.size == 8 and mesh.rows(devices, 16) == slice(0, 16)
    x = np.arange(32).reshape(16, 2)
    put = mesh.put_batch(devices, {"x": x}, 16)["x"]
    np.testing.assert_array_equal(put, x)
    assert {s.data.shape for s in put.addressable_shards} == {(2, 2)}
    everywhere = mesh.put_replicated(devices, x)
    assert {s.data.shape for s in everywhere.addressable_shards} == {(16, 2)}


def test_a_mesh_of_some_devices():
    assert mesh.make(jax.devices()[:2]).size == 2


@pytest.mark.parametrize(
    ("env", "many"),
    [
        ({}, False),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, True),
        ({"TPU_PROCESS_ADDRESSES": "a:8471,b:8471"}, True),
        ({"SLURM_NTASKS": "4"}, False),  # inside salloc, not inside srun
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, True),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, True),
        ({"BN_JAX_CLUSTER": "1"}, True),  # a Cloud TPU VM says nothing: launch/tpu_host.sh
    ],
)
def test_a_job_of_several_hosts_is_recognised(env, many):
    assert cluster.has_many_hosts(env) is many


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"JAX_NUM_PROCESSES": "two"},
            "JAX_NUM_PROCESSES=two must be a whole number of at least 1",
        ),
        ({"JAX_NUM_PROCESSES": "0"}, "JAX_NUM_PROCESSES=0 must be a whole number of at least 1"),
        ({"JAX_PROCESS_ID": ""}, "JAX_PROCESS_ID= must be a whole number of at least 0"),
        ({"JAX_PROCESS_ID": "-1"}, "JAX_PROCESS_ID=-1 must be a whole number"),
        ({"JAX_PROCESS_ID": "2"}, "JAX_PROCESS_ID=2 must be below JAX_NUM_PROCESSES=2"),
        ({"JAX_COORDINATOR_ADDRESS": "localhost"}, "=localhost must be HOST:PORT"),
        ({"JAX_COORDINATOR_ADDRESS": "localhost:http"}, "must be HOST:PORT"),
    ],
)
def test_a_wrong_cluster_is_one_line(monkeypatch, changes, said):
    good = {"JAX_COORDINATOR_ADDRESS": "localhost:1234", "JAX_NUM_PROCESSES": "2"}
    for name, value in (good | {"JAX_PROCESS_ID": "0"} | changes).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(jax.distributed, "initialize", lambda *_, **__: pytest.fail("joined"))
    with pytest.raises(ConfigError) as caught:
        startup.initialize()
    assert said in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE"])
def test_a_launcher_s_variable_that_is_no_number_is_one_line(name):
    with pytest.raises(ConfigError, match=f"{name}=many must be a whole number"):
        cluster.has_many_hosts({name: "many", "SLURM_PROCID": "0"})


def test_half_a_coordinator_is_refused(monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "localhost:1234")
    monkeypatch.setenv("JAX_PROCESS_ID", "0")
    monkeypatch.delenv("JAX_NUM_PROCESSES", raising=False)
    with pytest.raises(ConfigError, match="JAX_NUM_PROCESSES"):
        startup.initialize()
