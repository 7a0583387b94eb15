"""Checkpoints: bits, shardings, retention, what is refused. Faults are in damage_test.py."""

import json
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from bn_jax.distributed import mesh
from bn_jax.errors import CheckpointError, DivergedError
from bn_jax.workdir import checkpoint
from bn_jax.workdir.checkpoint import Checkpoints


class State(NamedTuple):
    step: Any
    params: Any
    batch_stats: Any
    opt_state: Any


def make_state(seed: int) -> State:
    """Shaped like a TrainState, with every dtype and the awkward values."""
    rng = np.random.default_rng(seed)
    kernel = rng.normal(size=(3, 3, 4, 8)).astype(np.float32)
    kernel[0, 0, 0, :4] = [-0.0, np.float32(1e-45), np.finfo(np.float32).max, 0.1]
    return State(
        step=jnp.int32(seed),
        params={"conv": {"kernel": jnp.asarray(kernel)}, "empty": {}},
        batch_stats={"bn": {"mean": jnp.ones(8) / 3, "count": jnp.float32(np.inf)}},
        opt_state=({"trace": jnp.full((5,), 1.5, jnp.bfloat16)}, (), jnp.array([True, False])),
    )


def bits(tree: Any) -> list[tuple[str, tuple[int, ...], bytes]]:
    return [(str(x.dtype), x.shape, np.asarray(x).tobytes()) for x in jax.tree.leaves(tree)]


def abstract(tree: Any, sharding: Any = None) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def mesh_of(count: int) -> Mesh:
    devices = np.array(jax.devices()[:count])
    return Mesh(devices, ("data",), axis_types=(AxisType.Auto,))


def test_a_directory_that_never_held_a_step_gives_none(tmp_path: pathlib.Path):
    with Checkpoints(tmp_path / "new", keep_last=1, keep_best=0) as checkpoints:
        assert checkpoints.restore(make_state(0)) is None
        assert checkpoints.steps() == []
    assert not (tmp_path / "new").exists()  # looking writes nothing


def test_restored_bits_are_the_saved_ones(tmp_path: pathlib.Path):
    state, meta = make_state(3), {"scores": {"top1": 0.1 + 0.2}, "note": "é"}
    with Checkpoints(tmp_path, keep_last=2, keep_best=0) as checkpoints:
        checkpoints.save(3, state, meta=meta)
        step, restored, found = checkpoints.restore(abstract(state)) or pytest.fail()
        concrete = checkpoints.restore(make_state(0), step=3) or pytest.fail()
    assert (step, found) == (3, meta)
    assert bits(restored) == bits(concrete[1]) == bits(state)
    assert jax.tree.structure(restored) == jax.tree.structure(state)


def test_a_save_holds_the_state_of_its_moment_although_the_buffer_is_donated(tmp_path):
    update = jax.jit(lambda x: x + 1, donate_argnums=0)
    x = jnp.zeros((256, 1024))
    with Checkpoints(tmp_path, keep_last=1, keep_best=0) as checkpoints:
        checkpoints.save(1, {"x": x})
        for _ in range(20):  # while the save is under way
            x = update(x)
        _, restored, _ = checkpoints.restore({"x": x}) or pytest.fail()
    assert float(x[0, 0]) == 20 and not np.asarray(restored["x"]).any()


@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_a_state_of_8_devices_resumes_on_any_number(tmp_path: pathlib.Path, count: int):
    eight, other = mesh_of(8), mesh_of(count)
    sharded = PartitionSpec("data")
    state = {
        "replicated": jax.device_put(jnp.arange(5.0), NamedSharding(eight, PartitionSpec())),
        "sharded": jax.device_put(jnp.arange(16.0), NamedSharding(eight, sharded)),
    }
    like = {
        "replicated": abstract(state["replicated"], NamedSharding(other, PartitionSpec())),
        "sharded": abstract(state["sharded"], NamedSharding(other, sharded)),
    }
    with Checkpoints(tmp_path, keep_last=1, keep_best=0) as checkpoints:
        checkpoints.save(1, state)
        _, restored, _ = checkpoints.restore(like) or pytest.fail()
    assert bits(restored) == bits(state)
    assert {k: v.sharding for k, v in restored.items()} == {k: v.sharding for k, v in like.items()}


def test_the_newest_and_the_best_are_kept(tmp_path: pathlib.Path):
    metrics = {1: 0.5, 2: 0.9, 3: None, 4: 0.9, 5: float("nan"), 6: 0.1}
    with Checkpoints(tmp_path, keep_last=2, keep_best=1) as checkpoints:
        for step, metric in metrics.items():
            checkpoints.save(step, {"x": jnp.float32(step)}, metric=metric)
        checkpoints.wait()
        assert checkpoints.steps() == [2, 5, 6]
    with Checkpoints(tmp_path, keep_last=1, keep_best=1) as checkpoints:  # found on disk again
        checkpoints.save(7, {"x": jnp.float32(7)}, metric=0.2)
        checkpoints.wait()
        assert checkpoints.steps() == [2, 7]
        _, best, _ = checkpoints.restore({"x": jnp.float32(0)}, step=2) or pytest.fail()
    assert float(best["x"]) == 2
    with Checkpoints(tmp_path, keep_last=1, keep_best=0) as checkpoints:
        checkpoints.save(8, {"x": jnp.float32(8)}, metric=1.0)
        checkpoints.wait()
        assert checkpoints.steps() == [8]


def test_a_step_can_be_saved_again(tmp_path: pathlib.Path):
    with Checkpoints(tmp_path, keep_last=2, keep_best=0) as checkpoints:
        for value in (1.0, 2.0):
            checkpoints.save(4, {"x": jnp.float32(value)})
        _, restored, _ = checkpoints.restore({"x": jnp.float32(0)}) or pytest.fail()
    assert float(restored["x"]) == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["4", "index.json"]


@pytest.mark.parametrize(
    ("like", "message"),
    [
        ({"x": jnp.zeros((3, 3))}, r"x is float32\[2, 3\] in the checkpoint, float32\[3, 3\] in"),
        ({"x": jnp.zeros((2, 3), jnp.bfloat16)}, r"bfloat16\[2, 3\] in this run"),
        ({"x": jnp.zeros((2, 3)), "y": jnp.zeros(())}, "y is absent in the checkpoint"),
        ({}, "absent in this run"),
    ],
)
def test_another_models_state_is_refused_and_not_taken_for_damage(tmp_path, like, message):
    with Checkpoints(tmp_path, keep_last=2, keep_best=0) as checkpoints:
        checkpoints.save(1, {"x": jnp.zeros((2, 3))})
        with pytest.raises(CheckpointError, match=message):
            checkpoints.restore(like)
        assert checkpoints.steps() == [1]


def test_an_absent_step_is_refused_with_those_that_are_there(tmp_path: pathlib.Path):
    with Checkpoints(tmp_path, keep_last=2, keep_best=0) as checkpoints:
        checkpoints.save(1, {"x": jnp.zeros(2)})
        with pytest.raises(CheckpointError, match=r"has no step 9; it has \[1\]"):
            checkpoints.restore({"x": jnp.zeros(2)}, step=9)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_state_that_is_not_finite_is_never_committed(tmp_path, value, dtype):
    with Checkpoints(tmp_path, keep_last=1, keep_best=0) as checkpoints:
        checkpoints.save(1, {"w": jnp.zeros(3, dtype)})
        checkpoints.save(2, {"w": jnp.array([0, value, 0], dtype)})
        with pytest.raises(DivergedError, match="step 2 is not saved: w"):
            checkpoints.wait()
        assert checkpoints.steps() == [1]


def test_check_raises_what_the_save_in_the_background_met(tmp_path: pathlib.Path):
    with Checkpoints(tmp_path, keep_last=1, keep_best=0) as checkpoints:
        checkpoints.check()
        checkpoints.save(1, {"w": jnp.float32(np.nan)})
        with pytest.raises(DivergedError):
            for _ in range(10_000):
                checkpoints.check()
                jnp.zeros(()).block_until_ready()


def test_meta_that_is_not_json_fails_in_the_caller(tmp_path: pathlib.Path):
    with (
        Checkpoints(tmp_path, keep_last=1, keep_best=0) as checkpoints,
        pytest.raises(TypeError),
    ):
        checkpoints.save(1, {"x": jnp.zeros(2)}, meta={"x": object()})


def test_read_only_leaves_a_run_in_progress_alone(tmp_path: pathlib.Path, capsys):
    with Checkpoints(tmp_path, keep_last=2, keep_best=0) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, {"x": jnp.float32(step)})
    (tmp_path / "tmp.3").mkdir()
    (tmp_path / "2" / "manifest.json").write_text("{}")
    before = sorted(p.as_posix() for p in tmp_path.rglob("*"))
    with Checkpoints(tmp_path, keep_last=2, keep_best=0, read_only=True) as checkpoints:
        step, _, _ = checkpoints.restore({"x": jnp.float32(0)}) or pytest.fail()
    assert step == 1 and "2 is not used: manifest.json is damaged" in capsys.readouterr().err
    assert sorted(p.as_posix() for p in tmp_path.rglob("*")) == before


def test_retention_of_nothing_is_refused(tmp_path: pathlib.Path):
    with pytest.raises(ValueError, match="keep_last=0"):
        Checkpoints(tmp_path, keep_last=0, keep_best=0)


def test_the_manifest_names_what_is_stored(tmp_path: pathlib.Path):
    state = make_state(1)
    with Checkpoints(tmp_path, keep_last=1, keep_best=0) as checkpoints:
        checkpoints.save(1, state, metric=0.25)
    body = json.loads((tmp_path / "1" / "manifest.json").read_text())["body"]
    kernel = np.asarray(state.params["conv"]["kernel"])
    assert body["metric"] == 0.25 and body["step"] == 1
    assert body["arrays"]["params/conv/kernel"] == {
        "shape": [3, 3, 4, 8],
        "dtype": "float32",
        "digest": checkpoint.digest(kernel.tobytes()),
    }
    assert body["arrays"]["opt_state/0/trace"]["dtype"] == "bfloat16"


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16, np.int8, np.bool_])
def test_every_array_digest_depends_on_bytes_shape_and_dtype(dtype):
    zeros = np.zeros((2, 3), dtype)
    one = zeros.copy()
    one[1, 2] = 1
    entries = [checkpoint.array_entry(x) for x in (zeros, one, zeros.reshape(3, 2))]
    assert len({json.dumps(entry) for entry in entries}) == 3
    assert checkpoint.array_entry(np.asfortranarray(one)) == checkpoint.array_entry(one)


def test_sealed_json_admits_one_encoding_only():
    data = checkpoint.seal({"a": [1, 2.5, "x"]})
    assert checkpoint.unseal(data, "it") == {"a": [1, 2.5, "x"]}
    for altered in (data + b"\n", data.replace(b":", b": ", 1), data.replace(b"2.5", b"2.50"), b""):
        with pytest.raises(checkpoint.DamagedError):
            checkpoint.unseal(altered, "it")


def test_host_copies_are_private():
    x = jnp.arange(4.0)
    (copy,) = mesh.to_host([x])
    assert not np.shares_memory(copy, np.asarray(x))
    copy[0] = 9  # writable, and the array does not see it
    assert float(x[0]) == 0
