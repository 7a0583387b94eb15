"""Folders of pictures as real disks have them."""

import os
import pathlib
import shutil
import time
import unicodedata

import numpy as np
import pytest

from bn_jax.data import cache, decode, folder, load, pipeline
from bn_jax.errors import ConfigError, DataError
from bn_jax.prepare import check
from configs import bn_x30
from tests.support import small_sets

JPEG = small_sets.encode(small_sets.photo())


@pytest.fixture(autouse=True)
def cached(tmp_path, monkeypatch):
    """Each test's own cache directory."""
    monkeypatch.setenv("BN_JAX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def root(tmp_path) -> pathlib.Path:
    """Three training and two evaluation pictures of a cat and of a dog."""
    place = tmp_path / "pictures"
    for split, n in (("train", 3), ("val", 2)):
        for k, name in enumerate(("cat", "dog")):
            (place / split / name).mkdir(parents=True)
            for i in range(n):
                file = place / split / name / f"{i}.JPEG"
                file.write_bytes(small_sets.encode(small_sets.photo(seed=k)))
    return place


def names(split: folder.Files) -> list[str]:
    return [str(split.path(k).relative_to(split.root)) for k in range(len(split))]


def test_a_folder(root):
    (root / "train" / "cat" / "notes.txt").touch()
    source = folder.source(str(root))
    assert (source.num_classes, len(source.train), len(source.evaluation)) == (2, 6, 4)
    assert [source.train[k].label for k in range(6)] == [0, 0, 0, 1, 1, 1]
    assert "1 other files skipped" in source.description
    (root / "val" / "bird").mkdir()
    with pytest.raises(ConfigError, match="'bird'"):
        folder.source(str(root))
    with pytest.raises(ConfigError, match=r"no folder .*train"):
        folder.source(str(root / "train"))


def test_hidden_files_are_no_pictures_and_no_classes(root):
    """What macOS and others leave behind is counted among the skipped."""
    for split in ("train", "val"):
        (root / split / "__MACOSX" / "cat").mkdir(parents=True)
        (root / split / "__MACOSX" / "cat" / "._0.jpg").touch()
        (root / split / ".ipynb_checkpoints").mkdir()
        (root / split / ".DS_Store").touch()
        for name in ("cat", "dog"):
            (root / split / name / "._0.jpg").write_bytes(b"\0\5\x16\7\0\2\0\0Mac OS X")
            (root / split / name / "Thumbs.db").touch()
        (root / split / "cat" / "__MACOSX").mkdir()
    source = folder.source(str(root))
    assert source.class_names == ("cat", "dog")
    assert names(source.evaluation) == ["cat/0.JPEG", "cat/1.JPEG", "dog/0.JPEG", "dog/1.JPEG"]
    assert "16 other files skipped" in source.description
    for k in range(len(source.evaluation)):
        decode.frame(source.evaluation[k].data)


def test_pictures_in_folders_of_a_class_folder(root):
    """As Tiny ImageNet has them; torchvision reads them, too. (They were left out silently.)"""
    inner = root / "train" / "cat" / "images" / "more"
    inner.mkdir(parents=True)
    (inner / "9.png").write_bytes(JPEG)
    train, _ = folder.open_splits(root)
    assert names(train)[:4] == ["cat/0.JPEG", "cat/1.JPEG", "cat/2.JPEG", "cat/images/more/9.png"]
    assert train[3].label == 0 and train[3].data == JPEG


def test_what_is_named_like_a_picture_is_an_example_or_a_bad_record(root):
    """Links that lead nowhere or in a circle, pipes, formats that are not read: nothing is lost
    without a word. (Broken links, pipes and other formats were left out silently; a circle ended
    with a traceback.)"""
    cat = root / "train" / "cat"
    (cat / "circle.jpg").symlink_to("circle.jpg")
    (cat / "nowhere.png").symlink_to("absent")
    (cat / "phone.heic").write_bytes(b"\0\0\0\x18ftypheic")
    (cat / "good.gif").write_bytes(small_sets.encode(small_sets.photo()[..., 0], "GIF"))
    os.mkfifo(cat / "pipe.jpg")
    train, _ = folder.open_splits(root)
    assert len(train) == 6 + 5
    bad = []
    for k in range(len(train)):
        try:
            decode.frame(train[k].data)
        except load.BadRecordError as e:
            bad.append((pathlib.Path(e.name).name, e.reason))
        except decode.BadImageError:
            bad.append((train.path(k).name, "not decoded"))
    assert bad == [
        ("circle.jpg", "Too many levels of symbolic links"),
        ("nowhere.png", "No such file or directory"),
        ("phone.heic", "not decoded"),
        ("pipe.jpg", "not a file"),
    ]
    (cat / "circle.jpg").replace(root / "val" / "cat" / "circle.jpg")
    _, evaluation = folder.open_splits(root)
    with pytest.raises(DataError, match=r"circle.jpg: Too many levels .*leaves nothing out"):
        load.evaluation_rows(evaluation, range(3), size=16, num_classes=2)


@pytest.mark.parametrize("split", ["train", "val"])
def test_what_cannot_be_a_class_is_refused_in_one_line(root, split):
    """(A broken link and a picture beside the class folders were left out silently; a circle ended
    with a traceback.)"""

    def refused(match):
        with pytest.raises(ConfigError, match=match) as caught:
            folder.source(str(root))
        assert "\n" not in str(caught.value)

    stray = root / split / "loop"
    stray.symlink_to("loop")
    refused(r"loop cannot be read \(Too many levels of symbolic links\): mend or remove it")
    stray.unlink()
    stray.symlink_to("absent")
    refused("loop is a broken link: mend or remove it")
    stray.unlink()
    (root / split / "7.jpg").write_bytes(JPEG)
    refused(r"7.jpg lies beside the class folders: move it into one")
    (root / split / "7.jpg").unlink()
    (root / split / "README.txt").touch()
    assert "1 other files skipped" in folder.source(str(root)).description


def test_a_folder_without_permission_is_refused_in_one_line(root, monkeypatch):
    """(It was a traceback.)"""

    def scandir(path):
        if str(path).endswith("train/dog"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    scan = os.scandir
    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(ConfigError, match=r"train/dog cannot be read \(Permission denied\)"):
        folder.source(str(root))


def test_names_in_no_encoding(root, capsys):
    """File names are bytes. Messages escape what is not UTF-8, so that every stream prints them."""
    strange = os.fsencode(root / "train" / "cat") + b"/caf\xe9.jpg"
    pathlib.Path(os.fsdecode(strange)).write_bytes(b"x")
    named = os.fsencode(root / "train") + b"/\xe9t\xe9"
    pathlib.Path(os.fsdecode(named)).mkdir()
    shutil.copy(root / "train" / "cat" / "0.JPEG", os.fsdecode(named))
    source = folder.source(str(root))
    assert source.class_names == ("cat", "dog", "\\xe9t\\xe9")
    assert source.train[6].data and source.train[7].label == 2
    with pytest.raises(DataError, match="NOT sound, 1 problems"):
        check.check(root, "x", threads=1)
    out = capsys.readouterr().out
    out.encode("ascii")
    assert "caf\\xe9.jpg: not a JPEG" in out


def test_a_class_without_training_pictures_is_said(root):
    """(Nothing was said.)"""
    for k in range(3):
        (root / "train" / "dog" / f"{k}.JPEG").unlink()
    assert "1 of them without training pictures" in folder.source(str(root)).description


def settled(root: pathlib.Path) -> None:
    """Makes all folders as old as those of a set that is not being written."""
    for place in [root, *root.rglob("*")]:
        if place.is_dir():
            os.utime(place, (time.time() - 100, time.time() - 100))


def test_the_listing_of_a_large_folder_is_kept_and_checked(root, cached, monkeypatch):
    monkeypatch.setattr(folder, "KEPT", 3)
    scans = []
    scan = os.scandir
    monkeypatch.setattr(os, "scandir", lambda p: scans.append(str(p)) or scan(p))

    def listed() -> tuple[list[str], list[int], int]:
        scans.clear()
        train, _ = folder.open_splits(root)
        return names(train), train.labels.tolist(), train.skipped

    (root / "train" / "cat" / "notes.txt").touch()
    folder.open_splits(root)
    assert not cached.exists()  # its folders have just changed, and may change again unnoticed
    settled(root)
    first = listed()
    assert any(s.endswith("train/cat") for s in scans) and len(list(cached.iterdir())) == 2
    assert first[2] == 1
    assert listed() == first
    assert not any(s.endswith("cat") for s in scans)  # only train/ and val/ are looked at

    # Every change of the set is noticed: a file more, one less, one renamed, a class more.
    (root / "train" / "dog" / "new.png").write_bytes(JPEG)
    assert listed()[0] == [*first[0], "dog/new.png"]
    settled(root)
    (root / "train" / "dog" / "new.png").unlink()
    assert listed() == first
    (root / "train" / "cat" / "0.JPEG").rename(root / "train" / "cat" / "z.JPEG")
    assert "cat/z.JPEG" in listed()[0]
    (root / "train" / "bird").mkdir()
    (root / "train" / "bird" / "b.png").write_bytes(JPEG)
    assert listed()[0][0] == "bird/b.png"


def test_a_damaged_listing_is_made_again(root, cached, monkeypatch):
    monkeypatch.setattr(folder, "KEPT", 3)
    settled(root)
    expected = names(folder.open_splits(root)[0])
    for kept in cached.iterdir():
        whole = kept.read_bytes()
        for damaged in (b"", whole[:200], whole[:-1], whole.replace(b"JPEG", b"jpeg")):
            kept.write_bytes(damaged)
            assert names(folder.open_splits(root)[0]) == expected
    for kept in cached.iterdir():
        np.savez(kept, names=np.zeros(3, np.uint8), ends=np.ones(2), labels=np.zeros(1), skipped=0)
    assert names(folder.open_splits(root)[0]) == expected


def test_folders_in_class_folders_are_listed_every_time(root, cached, monkeypatch):
    """A change inside them is not seen in the class folder."""
    monkeypatch.setattr(folder, "KEPT", 3)
    (root / "train" / "cat" / "images").mkdir()
    (root / "train" / "cat" / "images" / "a.png").write_bytes(JPEG)
    settled(root)
    assert len(folder.open_splits(root)[0]) == 7
    (root / "train" / "cat" / "images" / "b.png").write_bytes(JPEG)
    assert len(folder.open_splits(root)[0]) == 8


def test_without_a_home_nothing_is_kept(monkeypatch, root):
    monkeypatch.setattr(cache, "directory", lambda: None)
    monkeypatch.setattr(folder, "KEPT", 3)
    settled(root)
    assert len(folder.open_splits(root)[0]) == 6


def test_class_folders_at_the_scale_of_imagenet(root):
    """No copying: the config of the paper's own scale reads class folders."""
    config = bn_x30.get_config()
    config.data.name, config.data.dir = "folder", str(root)
    data = pipeline.open_data(config)
    assert data.image_shape == (224, 224, 3) and data.class_names == ("cat", "dog")
    batch = data.train_batch(0, 4, slice(0, 4), seed=0)
    assert batch["image"].shape == (4, 224, 224, 3) and batch["mask"].all()


def test_names_that_only_look_the_same_are_told_apart(root):
    """One split unpacked on a Mac, the other on Linux. (The message named a class that, to the eye,
    both splits had.)"""
    (root / "train" / "cat").rename(root / "train" / unicodedata.normalize("NFC", "ca\u0301t"))
    (root / "val" / "cat").rename(root / "val" / unicodedata.normalize("NFD", "c\xe1t"))
    with pytest.raises(ConfigError, match=r"'ca\\u0301t' and 'c\\xe1t' look the same but"):
        folder.source(str(root))


@pytest.mark.parametrize("place", ["Train", "pictures/train"])
def test_a_split_nearby_is_named(root, place, tmp_path):
    """Train with a capital, or an archive that unpacks into a folder of its own. (The message said
    only that the folder train was missing.)"""
    found = root / place
    if place == "Train":
        (root / "train").rename(found)
        asked = root
    else:
        asked = tmp_path
    with pytest.raises(
        ConfigError, match=r"no folder \S+/train: .*; \S+/(Train is there|pictures has it)"
    ):
        folder.source(str(asked))


def test_a_name_with_control_characters_stays_one_line(root, capsys):
    """(A line break in a name made two lines, and an escape sequence coloured the terminal.)"""
    (root / "val" / "cat" / "a\n\x1b[31m.jpg").write_bytes(b"bad")
    with pytest.raises(DataError):
        check.check(root, "x", threads=1)
    said = capsys.readouterr().out
    assert r"cat/a\x0a\x1b[31m.jpg: not a JPEG" in said and "\x1b" not in said


def test_suffixes_are_in_capitals_too(root):
    (root / "train" / "cat" / "A.JPG").write_bytes(JPEG)
    assert "cat/A.JPG" in names(folder.open_splits(root)[0])
    (root / "train" / "B.PNG").write_bytes(JPEG)
    with pytest.raises(ConfigError, match="B.PNG lies beside the class folders"):
        folder.open_splits(root)
