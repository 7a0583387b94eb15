"""tiny40 from a zip in Tiny-ImageNet's form: the whole set, or an error and no folder."""

import tarfile
import zipfile

import pytest

from bn_jax.data import folder
from bn_jax.errors import ConfigError, DataError
from bn_jax.prepare import tiny40

ROOT = "tiny-imagenet-200"
SYNSETS = ("n01768244", "n02085620")


@pytest.fixture
def small(monkeypatch):
    """Two classes of 3 + 2 pictures instead of 40 of 500 + 50."""
    monkeypatch.setattr(tiny40, "SYNSETS", SYNSETS)
    monkeypatch.setattr(tiny40, "TRAIN", 3)
    monkeypatch.setattr(tiny40, "VALIDATION", 2)


def write_zip(path, leave_out: str = "", content: bytes = b"picture "):
    """A zip as Stanford's, with the two classes, a third one and the unlabelled test pictures."""
    synsets = [*SYNSETS, "n09999999"]
    files = {f"{ROOT}/test/images/test_0.JPEG": b"test"}
    lines = []
    for k, synset in enumerate(synsets):
        for i in range(3):
            files[f"{ROOT}/train/{synset}/images/{synset}_{i}.JPEG"] = content + b"%d %d" % (k, i)
        for i in (2 * k, 2 * k + 1):
            files[f"{ROOT}/val/images/val_{i}.JPEG"] = content + b"val %d" % i
            lines.append(f"val_{i}.JPEG\t{synset}\t0\t0\t63\t63\n")
    files[f"{ROOT}/val/val_annotations.txt"] = "".join(lines).encode()
    with zipfile.ZipFile(path, "w") as target:
        for name, data in files.items():
            if name != leave_out:
                target.writestr(name, data)
    return path


def build(tmp_path, monkeypatch):
    archive = write_zip(tmp_path / "tiny.zip")
    tiny40.build(archive, tmp_path / "first", other=True)
    monkeypatch.setattr(tiny40, "DIGEST", tiny40.digest(tmp_path / "first"))
    return archive


def test_the_classes_and_pictures_of_the_rule(tmp_path, monkeypatch, small, capsys):
    archive = build(tmp_path, monkeypatch)
    out = tmp_path / "tiny40"
    tiny40.build(archive, out)
    found = sorted(p.relative_to(out).as_posix() for p in out.rglob("*.JPEG"))
    assert found[0] == "train/n01768244/n01768244_0.JPEG" and len(found) == 10
    assert (out / "val/n02085620/val_3.JPEG").read_bytes() == b"picture val 3"
    train, evaluation = folder.open_splits(out)
    assert (len(train), len(evaluation), train.num_classes) == (6, 4, 2)

    tiny40.build(archive, out)
    assert "complete already" in capsys.readouterr().out
    (out / "val/n02085620/val_3.JPEG").write_bytes(b"changed")
    with pytest.raises(ConfigError, match="holds other pictures: choose another --out"):
        tiny40.build(archive, out)


def test_other_pictures_are_refused_unless_accepted(tmp_path, monkeypatch, small):
    build(tmp_path, monkeypatch)
    archive = write_zip(tmp_path / "other.zip", content=b"other ")
    with pytest.raises(DataError, match="other pictures than the published runs .* --other"):
        tiny40.build(archive, tmp_path / "tiny40")
    assert {p.name for p in tmp_path.iterdir()} == {"tiny.zip", "other.zip", "first"}
    tiny40.build(archive, tmp_path / "tiny40", other=True)
    assert (tmp_path / "tiny40").is_dir()


@pytest.mark.parametrize(
    ("leave_out", "said"),
    [
        (
            f"{ROOT}/train/n02085620/images/n02085620_1.JPEG",
            "lacks .*_1.JPEG, expected 10",
        ),
        (f"{ROOT}/val/images/val_2.JPEG", "lacks .*val_2.JPEG"),
        (f"{ROOT}/val/val_annotations.txt", "it is not tiny-imagenet-200.zip, or cut"),
    ],
)
def test_a_zip_that_lacks_something_is_refused(tmp_path, small, leave_out, said):
    archive = write_zip(tmp_path / "tiny.zip", leave_out)
    with pytest.raises(DataError, match=said):
        tiny40.build(archive, tmp_path / "tiny40")
    assert [p.name for p in tmp_path.iterdir()] == ["tiny.zip"]


def test_a_damaged_zip_and_none_at_all(tmp_path, small):
    archive = write_zip(tmp_path / "tiny.zip")
    whole = archive.read_bytes()
    place = whole.index(b"picture 1 1")
    archive.write_bytes(whole[:place] + b"PICTURE" + whole[place + 7 :])  # its CRC is wrong now
    with pytest.raises(DataError, match="cannot be read .*fetch it again"):
        tiny40.build(archive, tmp_path / "tiny40")
    archive.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="cannot be read"):
        tiny40.build(archive, tmp_path / "tiny40")
    with pytest.raises(ConfigError, match="--from takes tiny-imagenet-200.zip"):
        tiny40.build(tmp_path / "absent.zip", tmp_path / "tiny40")
    assert [p.name for p in tmp_path.iterdir()] == ["tiny.zip"]


def test_the_set_of_the_published_runs_has_the_digest(test_data, tmp_path):
    """Its pictures, put into a zip as Stanford's, give the same folder again."""
    source = test_data / "tiny40.tar"
    lines = []
    archive = tmp_path / "tiny-imagenet-200.zip"
    with tarfile.open(source) as tar, zipfile.ZipFile(archive, "w") as target:
        for member in tar:
            parts = member.name.split("/")
            if not member.isfile():
                continue
            _, split, synset, name = parts
            inside = f"train/{synset}/images/{name}" if split == "train" else f"val/images/{name}"
            file = tar.extractfile(member)
            assert file is not None
            target.writestr(f"{ROOT}/{inside}", file.read())
            if split == "val":
                lines.append(f"{name}\t{synset}\t0\t0\t63\t63\n")
        target.writestr(f"{ROOT}/val/val_annotations.txt", "".join(lines))
    tiny40.build(archive, tmp_path / "tiny40")
    train, evaluation = folder.open_splits(tmp_path / "tiny40")
    assert (len(train), len(evaluation), train.num_classes) == (20_000, 2000, 40)
