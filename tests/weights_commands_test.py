"""The commands of docs/weights.md as typed, and what they refuse."""

import importlib
import json
import pathlib
import re
import shlex
import sys

import cv2
import numpy as np
import pytest
from flax import serialization, traverse_util

from bn_jax import export, import_weights, models
from bn_jax.errors import ConfigError
from bn_jax.experiment import build
from bn_jax.experiment.config import load
from bn_jax.weights import exporting, importing, tensor_files
from configs import mnist_bn
from tests.import_weights_test import cadene_names, reference
from tests.support.small_networks import variables

GUIDE = (pathlib.Path(__file__).parent.parent / "docs" / "weights.md").read_text()
CONFIG = ("--config=mnist_bn:digits",)


def commands() -> list[list[str]]:
    lines = "".join(re.findall(r"^```sh\n(.*?)^```$", GUIDE, re.M | re.S)).splitlines()
    return [shlex.split(line) for line in lines]


def run(words: list[str], monkeypatch, capsys) -> str:
    """`python -m MODULE ...` in this process; what it prints."""
    assert words[:2] == ["python", "-m"]
    monkeypatch.setattr(sys, "argv", words[2:])
    module = importlib.import_module(words[2])
    if hasattr(module, "__path__"):  # a folder: its command is in __main__.py
        module = importlib.import_module(f"{words[2]}.__main__")
    module.main()
    return capsys.readouterr().out


@pytest.fixture(scope="module")
def net():
    """Variables of the network of configs/mnist_bn.py:digits."""
    return variables(mnist_bn.get_config("digits"), 10, (28, 28, 1))


@pytest.fixture
def here(tmp_path, monkeypatch, net):
    """A folder with the small network's file, in which commands are run, as on one device."""
    make = build.mesh.make
    monkeypatch.setattr(build.mesh, "make", lambda devices: make(devices[:1]))
    monkeypatch.chdir(tmp_path)
    flat = traverse_util.flatten_dict(net)
    plain = {path: leaf for path, leaf in flat.items() if path[-1] != "count"}
    tree = traverse_util.unflatten_dict(plain)
    (tmp_path / "net.msgpack").write_bytes(serialization.to_bytes(tree))
    return tmp_path


def imported(workdir="runs/net", *more) -> None:
    import_weights.main(
        [
            "--from=net.msgpack",
            "--variant=flax",
            "--config=mnist_bn:digits",
            f"--workdir={workdir}",
            *more,
        ]
    )


def test_imports_as_typed(here, monkeypatch, capsys):
    found = variables(import_weights_config("caffe"), 7, (224, 224, 3))
    tensors = {name: np.ascontiguousarray(t) for name, t in cadene_names(found).items()}
    data = tensor_files.safetensors_bytes(tensors, {})
    (here / "bninception.safetensors").write_bytes(data)
    np.savez(here / "inception_v2.npz", **reference()[0])
    cv2.imwrite("picture.png", np.zeros((40, 30), np.uint8))
    typed = [words for words in commands() if words[2] != "bn_jax.export"]
    assert len(typed) == 5  # three imports, predict, evaluate
    outs = [run(words, monkeypatch, capsys) for words in typed]
    assert "7 classes, images 224 x 224 x 3" in outs[0]
    assert "11,188,288 parameters, 1,000 classes" in outs[1]
    record = json.loads((here / "runs/inception_v2/run.json").read_text())
    assert record["status"] == "done" and record["config"]["bn"]["epsilon"] == 1e-3
    assert record["config"]["model"]["variant"] == "slim"
    assert record["info"]["imported"]["background"] == "drop"
    assert len(record["info"]["imported"]["sha256"]) == 64
    assert outs[3].startswith("picture.png\n") and outs[3].count("%") == 5
    assert "1,000 examples" in outs[4]


def import_weights_config(variant):
    return importing.published(variant, load(importing.DEFAULT_CONFIG))


def test_exports_as_typed(here, monkeypatch, capsys):
    imported("runs/bn_x30")  # a run of that name; the commands are the same
    typed = [words for words in commands() if words[2] == "bn_jax.export"]
    assert len(typed) == 4
    for words in typed:
        name = next(word for word in words if word.startswith("--format=")).partition("=")[2]
        for package in exporting.formats()[name].packages:
            pytest.importorskip(package)
        out = run(words, monkeypatch, capsys)
        written = re.search(
            r"^(\S+): [\d.]+ MB, newest checkpoint, step 0, running statistics", out, re.M
        )
        assert written and (here / written[1]).is_file(), out
    assert (here / "bn_x30.onnx").is_file()


def test_population_statistics_are_those_of_evaluation_and_kept(here, capsys):
    imported()
    options = ["--workdir=runs/net", "--format=flax"]
    export.main([*options, "--out=running.msgpack"])
    export.main([*options, "--out=population.msgpack", "--statistics=population"])
    assert "population statistics computed" in capsys.readouterr().out
    running, population = (
        serialization.msgpack_restore((here / f"{name}.msgpack").read_bytes())
        for name in ("running", "population")
    )
    np.testing.assert_array_equal(
        running["params"]["dense_0"]["bn"]["scale"], population["params"]["dense_0"]["bn"]["scale"]
    )
    with np.load("runs/net/population/0.npz") as kept:
        for leaf in ("mean", "var"):
            found = population["batch_stats"]["dense_0"]["bn"][leaf]
            np.testing.assert_array_equal(found, kept[f"dense_0/bn/{leaf}"])
            assert not np.array_equal(found, running["batch_stats"]["dense_0"]["bn"][leaf])
    export.main([*options, "--statistics=population"])
    assert "read from the workdir" in capsys.readouterr().out


def test_out_and_in_again(here, net, capsys):
    """safetensors carry their config; what was folded gives the same logits."""
    imported()
    export.main(["--workdir=runs/net", "--format=safetensors", "--out=net.safetensors"])
    import_weights.main(["--from=net.safetensors", "--variant=flax", "--workdir=runs/again"])
    export.main(["--workdir=runs/again", "--format=flax", "--out=again.msgpack"])
    assert "step 0, none statistics" in capsys.readouterr().out
    again = serialization.msgpack_restore((here / "again.msgpack").read_bytes())
    assert again.keys() == {"params"}
    images = np.random.default_rng(0).integers(0, 256, (3, 28, 28, 1), dtype=np.uint8)
    config = mnist_bn.get_config("digits")
    want = models.build(config, 10).apply(net, images, train=False)
    config.norm = "none"
    got = models.build(config, 10).apply(again, images, train=False)
    # float32 sums of 784 terms in another order
    np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())


def test_refusals_come_before_anything_is_written(here, net):
    flat = {k: np.asarray(v) for k, v in traverse_util.flatten_dict(net, sep="/").items()}
    first, last = "params/dense_0/dense/kernel", "params/classifier/kernel"
    nan = np.full_like(flat[first], np.nan)
    negative = {"batch_stats/dense_1/bn/var": -flat["batch_stats/dense_1/bn/var"]}

    def refused(match, tensors=flat, *more):
        np.savez("x.npz", **tensors)
        with pytest.raises(ConfigError, match=match):
            import_weights.main(
                ["--from=x.npz", "--variant=flax", "--workdir=runs/x", *(more or CONFIG)]
            )
        assert not (here / "runs").exists()

    without = {k: v for k, v in flat.items() if k not in (first, last)}
    extra = {"params/dense_9/bias": np.zeros(3), "optimizer/step": np.zeros(())}
    refused(f"2 missing: {last}, {first}$", without)
    many = {f"other/{k:03}": np.zeros(1) for k in range(100)}
    refused("100 extra: " + ", ".join([*many][:5]) + " and 95 more$", flat | many)
    refused("2 extra: optimizer/step, params/dense_9/bias$", flat | extra)
    refused(r"missing: .*; 2 extra: .*; 1 wrong", without | extra | negative)
    shape = rf"1 wrong: {last} has shape \[100, 9\], not \[100, 10\]"
    refused(shape, flat | {last: flat[last][:, :9]})
    refused(f"1 wrong: {first} has values that are not finite", flat | {first: nan})
    refused("bn/var has values .* variances below 0", flat | negative)
    refused("none of the network's .* tensors.*another --variant", {"weight": np.zeros(3)})
    refused("does not say which network it is from", flat, "--background=drop")
    refused("there is no config configs/none.py", flat, "--config=configs/none.py")
    refused("--background=keep is for --variant=slim", flat, "--background=keep", *CONFIG)
    (here / "names.txt").write_text("a\nb\n")
    refused("has 2 lines, but the network has 10 classes", flat, "--classes=names.txt", *CONFIG)


def test_a_workdir_that_exists_is_left_alone(here):
    imported()
    before = (here / "runs/net/run.json").read_bytes()
    with pytest.raises(ConfigError, match="runs/net exists already"):
        imported()
    assert (here / "runs/net/run.json").read_bytes() == before
    (here / "runs/empty").mkdir()
    imported("runs/empty", "--data_dir=digits_here")
    assert [p.name for p in (here / "runs").iterdir() if p.name.startswith(".")] == []
    record = json.loads((here / "runs/empty/run.json").read_text())
    assert record["config"]["data"]["dir"] == "digits_here"


@pytest.mark.parametrize(
    "text", ["a\nb b\né", "a\nb b\né\n", "a\r\nb b\r\né\r\n", "\ufeffa\nb b\né\n\n\n"]
)
def test_names_of_classes_as_editors_leave_them(tmp_path, text):
    """(The mark was part of the first name, and an empty last line was a class too many.)"""
    (tmp_path / "names.txt").write_text(text, encoding="utf-8", newline="")
    assert import_weights._names(tmp_path / "names.txt", 3) == ["a", "b b", "é"]
