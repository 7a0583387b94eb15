"""The data set is known again on resume: its folder may move, its content may not change."""

import pathlib
import shutil

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from bn_jax import train
from bn_jax.data import pipeline, sources
from bn_jax.errors import ConfigError
from configs import mnist_bn


def pictures(folder: pathlib.Path, seed: int = 0) -> pathlib.Path:
    """Two classes of random pictures, 40 to train on and 8 to validate."""
    rng = np.random.default_rng(seed)
    for split, count in (("train", 20), ("val", 4)):
        for name in ("a", "b"):
            (folder / split / name).mkdir(parents=True)
            for index in range(count):
                pixels = rng.integers(0, 256, (28, 28, 3), np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"{index}.png")
    return folder


def config_for(folder: pathlib.Path, **changes) -> ConfigDict:
    config = mnist_bn.get_config("digits")
    settings = {
        "data.name": "folder",
        "data.dir": str(folder),
        "batch_size": 16,
        "bn.group_size": 16,
        "steps_per_dispatch": 1,
        "total_steps": 1,
        "eval_every": 10,
        "checkpoint_every": 10,
        "statistics_batches": 1,
        "record.activations": (),
        "record.tensorboard": False,
    }
    config.update_from_flattened_dict(settings | changes)
    return config


def test_the_folder_may_move_and_its_content_may_not_change(tmp_path):
    first, workdir = pictures(tmp_path / "first"), tmp_path / "run"
    train.run(config_for(first), workdir)
    moved = tmp_path / "elsewhere" / "moved"
    shutil.copytree(first, moved)
    shutil.rmtree(first)
    train.run(config_for(moved, total_steps=2), workdir)
    records = {p.name: p.read_bytes() for p in workdir.iterdir() if p.is_file()}

    other = pictures(tmp_path / "other", seed=1)  # the same names and counts
    with pytest.raises(ConfigError, match=r"was trained on other data: digest \(.*same data set"):
        train.run(config_for(other, total_steps=3), workdir)
    (moved / "train" / "a" / "0.png").unlink()
    with pytest.raises(ConfigError, match=r"train_examples \(40 there, 39 here\)"):
        train.run(config_for(moved, total_steps=3), workdir)
    for split in ("train", "val"):
        (other / split / "b").rename(other / split / "c")
    with pytest.raises(ConfigError, match=r"class_names \(\['a', 'b'\] there, \['a', 'c'\] here\)"):
        train.run(config_for(other, total_steps=3), workdir)
    assert {p.name: p.read_bytes() for p in workdir.iterdir() if p.is_file()} == records


def test_a_set_in_memory_is_read_whole(monkeypatch):
    data = pipeline.open_data(mnist_bn.get_config("digits"))
    once = data.digest()
    assert once == data.digest() and len(once) == 16
    labels = data.held.labels.copy()
    labels[517] ^= 1
    monkeypatch.setattr(data, "held", sources.Arrays(data.held.images, labels))
    assert data.digest() != once
