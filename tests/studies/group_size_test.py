"""The study `group_size`: one batch in groups of different size."""

import json

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from bn_jax.experiment import build
from bn_jax.experiment.config import load
from bn_jax.layers import BatchNorm
from bn_jax.step import TrainState
from bn_jax.studies import frame, group_size
from bn_jax.workdir import reader
from tests.support.small_studies import cells, run_study
from tests.train_test import small


class OneValue(nn.Module):
    """Class 1 where an image is brighter than the mean of its group, else class 0."""

    group: int

    @nn.compact
    def __call__(self, images, *, train, mask=None):
        x = images.reshape(images.shape[0], -1)[:, :1].astype(jnp.float32)
        x = BatchNorm(group_size=self.group, use_running_average=not train)(x, mask=mask)
        return jnp.concatenate([jnp.zeros_like(x), x], axis=-1)


def test_accuracy_in_groups_is_by_the_mean_of_each_group():
    """Brightness 0 to 7: in pairs the second is brighter, in one group the last four are."""
    exp = build.build(small())
    image = np.arange(8, dtype=np.uint8).reshape(8, 1, 1, 1)
    labels = np.array([0, 1, 0, 1, 0, 1, 0, 0])
    mask = np.array([True] * 6 + [False] * 2)

    def accuracy(group, **more):
        model = OneValue(group)
        variables = model.init(jax.random.key(0), image, train=True)
        state = TrainState(
            jnp.zeros((), jnp.int32), variables["params"], variables["batch_stats"], {}
        )
        batch = {"image": image, "label": labels, **more}
        return group_size.accuracy_in_groups(exp._replace(model=model), state, [batch])

    assert accuracy(2) == 7 / 8
    assert accuracy(8) == 3 / 8  # the mean is 3.5: right are 0, 2 and 5
    assert accuracy(2, mask=mask) == 1
    assert accuracy(8, mask=mask) == 4 / 6  # the mean is 2.5: right are 0, 2, 3 and 5


def test_evaluated_has_every_example_once():
    exp = build.build(small())
    config = exp.config.copy_and_resolve_references()
    config.batch_size = 96
    batches = list(group_size.evaluated(exp._replace(config=config)))
    assert {len(batch["label"]) for batch in batches} == {96}
    assert sum(int(batch["mask"].sum()) for batch in batches) == 1000
    labels = np.concatenate([batch["label"][batch["mask"]] for batch in batches])
    np.testing.assert_array_equal(np.bincount(labels), [100] * 10)
    assert len(set(labels[:96])) == 10  # not class by class


def test_every_size_has_as_many_examples_for_its_statistics():
    parts = {part.name: part.settings for part in group_size.parts(load("bn_x5:digits"))}
    assert list(parts) == [f"group_size={n}" for n in (2, 4, 8, 16, 32)]
    assert {"bn.group_size=4", "statistics_batches=512"} < set(parts["group_size=4"])
    assert {"bn.group_size=32", "statistics_batches=64"} < set(parts["group_size=32"])


def test_a_small_study(tmp_path, monkeypatch):
    text = run_study("group_size", tmp_path, monkeypatch, "batch_size=8", "bn.group_size=None")
    rows = cells(text)
    assert list(rows)[1:] == ["2", "4", "8"]

    run = tmp_path / "group_size=4" / "seed_0"
    measured = json.loads((run / frame.MEASURED).read_text())
    assert rows["4"] == [
        f"{100 * measured[name]:.2f}% (one seed)" for name in group_size.CURVES
    ] + ["-"]
    exp = build.from_workdir(run)
    _, state = build.restore(exp, run)
    trained = exp.data.statistics(256, 8, slice(0, 8), 0)
    own = group_size.accuracy_in_groups(exp, state, trained)
    assert measured["training, own group"] == own != measured["evaluation, own group"]

    # Training itself has scored the network with the same statistics.
    recorded = reader.read_run(run).lines["eval"][-1]["top1"]
    assert measured["evaluation, population"] == recorded
