"""pipeline.py: batches are pure functions of (seed, step), nothing is lost, and waiting is
measured."""

import hashlib
import itertools
import os
import pathlib
import subprocess
import sys
import time

import numpy as np
import pytest

from bn_jax.data import distort, load, memory, pipeline, sources
from bn_jax.errors import ConfigError, DataError
from configs import bn_x5, mnist
from tests.support import small_sets

ALL = slice(0, 32)


@pytest.fixture(scope="module")
def digits() -> pipeline.Data:
    config = bn_x5.get_config("digits")
    config.data.holdout = 0.0
    return pipeline.open_data(config)


class Pictures(sources.Records):
    """Encoded records: pictures that differ, some of them bad."""

    def __init__(self, n: int, broken: tuple[int, ...] = ()):
        super().__init__(n, num_classes=7)
        self.broken = broken
        self.files = [small_sets.encode(small_sets.photo(40, 50, k)) for k in range(5)]

    def __getitem__(self, index: int) -> load.Record:
        data = b"bad" if index in self.broken else self.files[index % 5]
        return load.Record(data, index % 7, f"picture {index}")


def pictures(n: int = 70, bad: tuple[int, ...] = (), **view) -> pipeline.Data:
    source = sources.Source(Pictures(n, bad), Pictures(19), 7, 3, "pictures")
    seen = {"image_size": 16, "crop": 0.08, "mirror": True, "distortion": 0.5, **view}
    return pipeline.Data(source, distort.Augmentation(**seen), shuffle="within_shard")


def digest(batch: pipeline.Batch) -> str:
    parts = [batch[k].tobytes() for k in ("image", "label", "mask") if k in batch]
    return hashlib.sha256(b"".join(parts)).hexdigest()


def test_digits(digits):
    assert (digits.num_train, digits.num_eval, digits.num_classes) == (4000, 1000, 10)
    assert digits.image_shape == (28, 28, 1)
    train, evaluation = digits.resident(), digits.resident("evaluation")
    assert np.bincount(train[1]).tolist() == [400] * 10
    assert np.bincount(evaluation[1]).tolist() == [100] * 10
    rows = [{i.tobytes() for i in images} for images, _ in (train, evaluation)]
    assert not rows[0] & rows[1]  # nothing of the test in training
    # The split is part of published numbers: it never changes.
    assert hashlib.sha256(evaluation[0].tobytes()).hexdigest()[:16] == "bf9506a50108ab34"
    assert "4,000 to train on and 1,000 to test on" in digits.description


def test_absent_digits_say_how_to_install(monkeypatch):
    monkeypatch.setattr(memory.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install"):
        memory.digits()


@pytest.mark.parametrize("data", ["digits", "pictures"])
def test_batches_are_functions_of_seed_and_step(data, digits):
    data = digits if data == "digits" else pictures()
    threads = [digest(b) for b in data.train(0, 9, 32, ALL, seed=3)]
    assert threads == [digest(data.train_batch(k, 32, ALL, 3)) for k in range(9)]
    resumed = [digest(b) for b in data.train(4, 9, 32, ALL, seed=3)]
    assert resumed == threads[4:]
    assert len(set(threads)) == 9
    other = [digest(b) for b in data.train(0, 9, 32, ALL, seed=4)]
    assert not set(other) & set(threads)


@pytest.mark.parametrize("hosts", [2, 4, 8])
def test_hosts_hold_rows_of_one_batch(hosts, digits):
    share = 32 // hosts
    rows = [slice(h * share, (h + 1) * share) for h in range(hosts)]
    for data in (digits, pictures()):
        whole = data.train_batch(2, 32, ALL, 0)
        parts = [data.train_batch(2, 32, r, 0) for r in rows]
        for name, values in whole.items():
            assert np.array_equal(np.concatenate([p[name] for p in parts]), values)


def test_batch_types(digits):
    for data in (digits, pictures()):
        batch = data.train_batch(0, 32, ALL, 0)
        assert batch["image"].shape == (32, *data.image_shape) and batch["image"].dtype == np.uint8
        assert batch["label"].dtype == np.int32
        # No record of a set in memory can be bad.
        assert data.masked == ("mask" in batch) == (data is not digits)
        assert not data.masked or (batch["mask"].dtype == bool and batch["mask"].all())
        assert next(data.evaluation(32, ALL))["mask"].dtype == bool


@pytest.mark.parametrize("batch_size", [1, 7, 19, 32])
def test_evaluation_counts_every_example_once(batch_size):
    data = pictures()
    batches = list(data.evaluation(batch_size, slice(0, batch_size)))
    assert len(batches) == -(-19 // batch_size)
    labels = np.concatenate([b["label"][b["mask"]] for b in batches])
    assert labels.tolist() == [k % 7 for k in range(19)]
    last = batches[-1]
    assert not last["image"][~last["mask"]].any()


def test_evaluation_over_two_hosts(digits):
    both = [
        np.concatenate([b["label"][b["mask"]] for b in digits.evaluation(300, rows)])
        for rows in (slice(0, 150), slice(150, 300))
    ]
    assert len(both[0]) + len(both[1]) == 1000
    assert np.bincount(np.concatenate(both)).tolist() == [100] * 10


def test_bad_training_records_leave_masked_rows():
    """The count of an epoch is asserted, and the other rows are what they are without bad
    records."""
    bad = (3, 40, 69)
    whole, broken = pictures(64 + 6), pictures(64 + 6, bad)
    masked = 0
    for step in range(whole.steps_per_epoch(10)):
        a, b = (d.train_batch(step, 10, slice(0, 10), 0) for d in (whole, broken))
        masked += int((~b["mask"]).sum())
        assert np.array_equal(a["image"][b["mask"]], b["image"][b["mask"]])
        assert not b["image"][~b["mask"]].any()
    assert masked == 3
    assert broken._train.bad.names == {f"picture {k}" for k in bad}


def test_too_many_bad_records_stop_training_and_one_stops_evaluation():
    data = pictures(70, tuple(range(30)))
    with pytest.raises(DataError, match=f"limit is {load.BAD_LEAST}"):
        list(data.train(0, 2, 35, slice(0, 35), seed=0))
    source = sources.Source(Pictures(70), Pictures(19, (5,)), 7, 3, "pictures")
    data = pipeline.Data(source, distort.Augmentation(16), shuffle="none")
    with pytest.raises(DataError, match="picture 5"):
        list(data.evaluation(4, slice(0, 4)))


def test_statistics_batches_are_fixed_and_their_own():
    data = pictures()
    first, again = ([digest(b) for b in data.statistics(3, 10, slice(0, 10), 0)] for _ in range(2))
    assert first == again
    assert not set(first) & {digest(data.train_batch(k, 10, slice(0, 10), 0)) for k in range(3)}
    # Where training is shuffled in the same way, too.
    source = sources.Source(Pictures(70), Pictures(19), 7, 3, "pictures")
    data = pipeline.Data(source, distort.Augmentation(16, crop=0.08), shuffle="global")
    own = {digest(b) for b in data.statistics(3, 10, slice(0, 10), 0)}
    assert not own & {digest(data.train_batch(k, 10, slice(0, 10), 0)) for k in range(3)}


@pytest.mark.parametrize("rows", [slice(0, 30), slice(4, 17), slice(10, 20)])
def test_statistics_batches_may_come_side_by_side(rows):
    """The same pictures, distorted in the same way."""
    data = pictures()
    plain = list(data.statistics(6, 10, slice(0, 10), 0))
    together = list(data.statistics(6, 10, rows, 0, together=3))
    assert len(together) == 2
    for k, batch in enumerate(together):
        for name, values in batch.items():
            whole = np.concatenate([part[name] for part in plain[3 * k : 3 * k + 3]])
            np.testing.assert_array_equal(values, whole[rows])


@pytest.mark.parametrize("shuffle", ["none", "global"])
def test_statistics_do_not_depend_on_the_order_of_training(shuffle):
    digests = []
    for mode in (shuffle, "within_shard"):
        source = sources.Source(Pictures(70), Pictures(19), 7, 3, "pictures")
        data = pipeline.Data(source, distort.Augmentation(image_size=16), shuffle=mode)
        digests.append([digest(batch) for batch in data.statistics(3, 16, slice(0, 16), 0)])
    assert digests[0] == digests[1]


def test_what_is_dropped_of_an_epoch_is_said(caplog):
    data = pictures(70)
    with caplog.at_level("INFO", logger="absl"):
        data.train(0, 1, 32, ALL, seed=0)
    assert "the last 6 of 70 examples of an epoch are dropped" in caplog.text


def test_holdout_is_part_of_training_only(digits):
    config = bn_x5.get_config("digits")
    config.data.holdout = 0.2
    held = pipeline.open_data(config)
    assert (held.num_train, held.num_eval) == (3200, 800)
    parts = [held.resident(s)[0] for s in ("train", "evaluation")]
    rows = [i.tobytes() for part in parts for i in part]
    assert sorted(rows) == sorted(i.tobytes() for i in digits.resident()[0])
    assert "800 held-out" in held.description

    # The test split is still there, for the end.
    tested = held.tested()
    assert (tested.num_train, tested.num_eval, tested.split) == (3200, 1000, "test")
    for mine, whole in zip(*(d.resident("evaluation") for d in (tested, digits)), strict=True):
        np.testing.assert_array_equal(mine, whole)
    assert tested.description == digits.description and held.num_eval == 800
    assert digits.tested() is digits

    config.data.holdout = 1.5
    with pytest.raises(ConfigError, match="holdout"):
        pipeline.open_data(config)
    whole = sources.Source(Pictures(70), Pictures(1), 7, 3, "")
    part = pipeline.hold_out(whole, 2 / 7)
    assert (len(part.train), len(part.evaluation), len(whole.train)) == (50, 20, 70)


def test_synthetic_sets_have_the_shapes_of_the_real_ones():
    large = pipeline.open_data(bn_x5.get_config("synthetic"))
    assert large.image_shape == (224, 224, 3) and large.num_classes == 1000
    assert large.num_train == 1_281_167 and "accuracies mean nothing" in large.description
    batch = large.train_batch(0, 32, ALL, 0)
    assert batch["image"].shape == (32, 224, 224, 3) and batch["image"].std() > 70
    small = pipeline.open_data(mnist.get_config("synthetic"))
    assert small.resident()[0].shape == (60_000, 28, 28, 1)
    with pytest.raises(ConfigError, match="not kept in memory"):
        large.resident()


def test_impossible_requests():
    with pytest.raises(ConfigError, match="exceeds the 70 training examples"):
        pictures().train(0, 1, 71, slice(0, 71), seed=0)
    config = bn_x5.get_config("digits")
    config.image_size = 32
    with pytest.raises(ConfigError, match="image_size=28"):
        pipeline.open_data(config)
    config.image_size, config.data.crop = 28, 0.08
    with pytest.raises(ConfigError, match=r"set data\.crop=1"):
        pipeline.open_data(config)
    with pytest.raises(ConfigError, match="within_shard"):
        pipeline.Data(
            sources.Source(Pictures(1), Pictures(1), 7, 3, ""), distort.Augmentation(8), shuffle="x"
        )
    with pytest.raises(ConfigError, match="empty"):
        pipeline.Data(
            sources.Source(Pictures(1), Pictures(0), 7, 3, ""),
            distort.Augmentation(8),
            shuffle="none",
        )
    with pytest.raises(ConfigError, match="not held in memory"):
        pictures().resident()


def test_the_view_is_obeyed():
    plain = pictures(crop=1.0, mirror=False, distortion=0.0)
    batches = [plain.train_batch(k, 35, slice(0, 35), 0) for k in range(2)]
    exact = {b["image"][0].tobytes() for b in plain.evaluation(1, slice(0, 1))}
    images = {i.tobytes() for b in batches for i in b["image"]}
    assert len(images) == 5 == len(exact)  # five files, each always the same
    mirrored = pictures(crop=1.0, mirror=True, distortion=0.0)
    images = {
        i.tobytes() for k in range(2) for i in mirrored.train_batch(k, 35, slice(0, 35), 0)["image"]
    }
    assert len(images) == 10
    assert not np.array_equal(
        pictures(shift=2).train_batch(0, 8, slice(0, 8), 0)["image"],
        pictures().train_batch(0, 8, slice(0, 8), 0)["image"],
    )


def test_waiting_is_measured(digits):
    batches = digits.train(0, 60, 32, ALL, seed=0)
    next(batches)
    time.sleep(0.3)  # as long as a slow step: batches are ready meanwhile
    before = batches.waited
    for _ in itertools.islice(batches, 20):
        pass
    assert batches.waited - before < 0.1  # 20 batches that were ready: measured 0.002 s
    assert batches.alive > 0.3 and len(batches) == 60


def test_cheap_in_memory_batches(digits):
    """Below 1.5 ms for a batch of 32 (measured 0.3); the fastest of 20, the machine may be busy."""
    seconds = []
    for step in range(20):
        began = time.perf_counter()
        digits.train_batch(step, 32, ALL, 0)
        seconds.append(time.perf_counter() - began)
    assert min(seconds) < 1.5e-3


def test_draws_have_room():
    assert max(distort.Draw) + 4 == distort.DRAWS


def test_importing_changes_nothing_in_the_host_program():
    """OpenCV's threads are switched off where batches are made, not where a module is imported."""
    code = (
        "import pkgutil, os, cv2\n"
        "before = cv2.getNumThreads(), dict(os.environ)\n"
        "import bn_jax.data, bn_jax.prepare\n"
        "for package in (bn_jax.data, bn_jax.prepare):\n"
        "    for module in pkgutil.iter_modules(package.__path__):\n"
        "        __import__(f'{package.__name__}.{module.name}')\n"
        "assert (cv2.getNumThreads(), dict(os.environ)) == before\n"
        "import sys\n"
        "heavy = {'matplotlib', 'tensorflow_datasets', 'grain', 'PIL', 'pyarrow', 'jax'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    root = pathlib.Path(__file__).resolve().parents[2]
    environ = {**os.environ, "OPENCV_FOR_THREADS_NUM": "3"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=root,
        env=environ,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("bad", [(), (3, 11)])
def test_rows_that_threads_share_are_those_of_one(bad, monkeypatch):
    """In training, with bad records, and in evaluation; for numbers that do not divide."""
    found = {}
    for tasks in (1, 3, 8):
        monkeypatch.setattr(sources, "tasks", lambda rows, tasks=tasks: min(tasks, rows))
        data = pictures(70, bad)
        batches = [data.train_batch(k, 17, slice(0, 17), 0) for k in range(4)]
        batches += list(data.evaluation(10, slice(0, 10)))
        found[tasks] = [digest(batch) for batch in batches]
        assert sum(int(batch["mask"].sum()) for batch in batches[:4]) == 68 - len(bad)
    assert found[1] == found[3] == found[8]


def test_the_first_bad_record_of_an_evaluation_is_named(monkeypatch):
    monkeypatch.setattr(sources, "tasks", lambda rows: 5)
    held = Pictures(30, broken=(7, 21))
    with pytest.raises(DataError, match="picture 7: "):
        held.rows(np.arange(30), distort.Augmentation(image_size=16))


@pytest.mark.parametrize(
    ("cpus", "rows", "busy"), [(1, 32, 1), (2, 32, 2), (13, 32, 8), (208, 1024, 208), (208, 2, 1)]
)
def test_a_batch_is_shared_out_over_the_cpus(cpus, rows, busy, monkeypatch):
    monkeypatch.setattr(sources, "usable_cpus", lambda: cpus)
    assert sources.tasks(rows) == busy
