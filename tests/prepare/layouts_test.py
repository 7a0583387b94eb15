"""The forms in which people have ImageNet; hostile and damaged ones."""

import hashlib
import io
import pathlib
import shutil
import tarfile

import pyarrow
import pyarrow.parquet
import pytest

from bn_jax.data import tfds
from bn_jax.errors import ConfigError, DataError
from bn_jax.prepare import imagenet, layouts
from tests.support import small_sets

JPEG = small_sets.encode(small_sets.photo())


def hostile(name: str = "x", kind: bytes = tarfile.REGTYPE, link: str = "") -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        info = tarfile.TarInfo(name)
        info.type, info.linkname = kind, link
        tar.addfile(info)
    return out.getvalue()


def flipped(data: bytes) -> bytes:
    return data[:20] + bytes([data[20] ^ 1]) + data[21:]


INNER = small_sets.tar_bytes({"n01440764_1.JPEG": JPEG})


MEMBER = INNER[: 512 + -(-len(JPEG) // 512) * 512]  # header and padded picture


# Two tars in a tar, and the place of the second one's header.
INNER_TAR = small_sets.tar_bytes(
    {"n01440764.tar": INNER, "n01443537.tar": small_sets.tar_bytes({"n01443537_1.JPEG": JPEG})}
)
AT = 512 + -(-len(INNER) // 512) * 512

HOSTILE = {
    "a path that climbs": (hostile("../../../evil.tar"), "unexpected member"),
    "an absolute path": (hostile("/etc/passwd"), "unexpected member"),
    "a symbolic link": (hostile("n01440764.tar", tarfile.SYMTYPE, "/etc/passwd"), "plain files"),
    "a hard link": (hostile("n01440764.tar", tarfile.LNKTYPE, "/etc/passwd"), "plain files"),
    "a sparse file": (hostile("n01440764.tar", tarfile.GNUTYPE_SPARSE), "plain files"),
    "a device": (hostile("n01440764.tar", tarfile.CHRTYPE), "plain files"),
    "an unknown synset": (small_sets.tar_bytes({"n00000000.tar": INNER}), "unexpected member"),
    "a picture of another synset": (
        small_sets.tar_bytes({"n01443537.tar": INNER}),
        "unexpected member",
    ),
    "a picture twice": (small_sets.tar_bytes({"n01440764.tar": MEMBER * 2 + bytes(1024)}), "twice"),
    "no tar within": (small_sets.tar_bytes({"n01440764.tar": b"text" * 200}), "damaged"),
    "a cut tar": (small_sets.tar_bytes({"n01440764.tar": INNER})[:2000], "cut"),
    "a flipped header": (flipped(small_sets.tar_bytes({"n01440764.tar": INNER})), "checksum"),
    "a flipped header further on": (
        INNER_TAR[:AT] + flipped(INNER_TAR[AT:]),
        "the header at byte",
    ),
    "no end": (small_sets.tar_bytes({"n01440764.tar": INNER})[: 512 + len(INNER)], "end mark"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_tars_are_refused_and_write_nothing(tmp_path, what):
    data, message = HOSTILE[what]
    tars = small_sets.write_tars(tmp_path / "tars")
    (tars / layouts.TARS["train"]).write_bytes(data)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(DataError, match=message):
        imagenet.build(tars, tmp_path / "out", partial=True, threads=1)
    assert sorted(tmp_path.rglob("*")) == before


# The four forms of the same pictures.


def unpack(tars: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
    """Class folders of train and a flat folder of validation pictures, from a pair of tars."""
    with tarfile.open(tars / layouts.TARS["train"]) as tar:
        for synset in tar:
            with tarfile.open(fileobj=tar.extractfile(synset)) as inner:
                inner.extractall(folder / "train" / synset.name[:-4], filter="data")
    with tarfile.open(tars / layouts.TARS["validation"]) as tar:
        tar.extractall(folder / "val", filter="data")
    return folder


def sort_validation(folder: pathlib.Path) -> pathlib.Path:
    """Moves the validation pictures into class folders."""
    for path in sorted((folder / "val").iterdir()):
        _, _, label = layouts.named(path.name)
        place = folder / "val" / layouts.label_files()[0][label]
        place.mkdir(exist_ok=True)
        path.rename(place / path.name)
    return folder


def as_kaggle(folder: pathlib.Path, out: pathlib.Path) -> pathlib.Path:
    """Kaggle's folders, with its table of validation labels."""
    (out / "ILSVRC" / "Data").mkdir(parents=True)
    shutil.copytree(folder, out / "ILSVRC" / "Data" / "CLS-LOC")
    lines = ["ImageId,PredictionString"]
    for path in sorted((folder / "val").iterdir()):
        synset = layouts.label_files()[0][layouts.named(path.name)[2]]
        lines.append(f"{path.stem},{synset} 1 2 3 4 {synset} 5 6 7 8 ")
    (out / "LOC_val_solution.csv").write_text("\n".join(lines) + "\n")
    return out


def as_parquet(folder: pathlib.Path, out: pathlib.Path, files: int = 3) -> pathlib.Path:
    """Parquet files as the hub's copy has them: image (bytes and path) and label."""
    (out / "data").mkdir(parents=True)
    for split, pattern in (("train", "train/*/*"), ("validation", "val/*")):
        rows = []
        for path in sorted(folder.glob(pattern), key=lambda p: p.name[::-1]):
            label = layouts.named(path.name)[2]
            name = f"{path.stem}_{layouts.label_files()[0][label]}.JPEG"
            rows.append({"image": {"bytes": path.read_bytes(), "path": name}, "label": label})
        for k in range(files):
            table = pyarrow.Table.from_pylist(rows[k::files])
            name = f"{split}-{k:05d}-of-{files:05d}.parquet"
            pyarrow.parquet.write_table(table, out / "data" / name, row_group_size=10)
    test = {"image": {"bytes": b"x", "path": "ILSVRC2012_test_00000001.JPEG"}, "label": -1}
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist([test]), out / "data" / "test-00000-of-00001.parquet"
    )
    return out


def built(source: pathlib.Path, out: pathlib.Path) -> dict[str, str]:
    """Prepares a source; the digest of each file of the result."""
    folder = imagenet.build(source, out, partial=True, threads=2)
    assert [p.name for p in folder.parent.iterdir()] == [imagenet.VERSION]  # nothing is left
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


def sources(tars: pathlib.Path, tmp_path: pathlib.Path) -> dict[str, pathlib.Path]:
    """The same pictures in all forms."""
    flat = unpack(tars, tmp_path / "flat")
    kaggle = as_kaggle(flat, tmp_path / "kaggle")
    hub = as_parquet(flat, tmp_path / "hub")
    classes = sort_validation(shutil.copytree(flat, tmp_path / "classes"))
    return {
        "tars": tars,
        "one of the tars": tars / layouts.TARS["validation"],
        "class folders": classes,
        "Kaggle's root": kaggle,
        "Kaggle's CLS-LOC": kaggle / "ILSVRC" / "Data" / "CLS-LOC",
        "the hub's copy": hub,
        "one of its files": hub / "data" / "train-00001-of-00003.parquet",
    }


def test_all_forms_give_the_same_shards(test_data, tmp_path, capsys):
    """Real photographs: the same file names, labels and pictures, in the same bytes."""
    made = {
        what: built(source, tmp_path / "out" / str(k))
        for k, (what, source) in enumerate(sources(test_data / "ilsvrc", tmp_path).items())
    }
    assert len(made["tars"]) == 6
    for what, files in made.items():
        assert files == made["tars"], what
    assert "skipped: 1 pictures of the test split" in capsys.readouterr().out


def test_files_that_are_not_of_the_set_are_counted(tmp_path, capsys):
    """macOS' companions in tars and folders, and ./ before the names of a tar's members. (Such tars
    were refused.)"""
    tars = small_sets.write_tars(tmp_path / "tars")
    expected = built(tars, tmp_path / "out" / "plain")
    flat = unpack(tars, tmp_path / "flat")
    with tarfile.open(tars / layouts.TARS["validation"], "w") as tar:
        for path in sorted((flat / "val").iterdir()):
            tar.add(path, f"./{path.name}")
            tar.add(path, f"./._{path.name}")
            tar.add(path, f"__MACOSX/{path.name}")
    assert built(tars, tmp_path / "out" / "dots") == expected
    assert "skipped: 6 hidden files" in capsys.readouterr().out

    (flat / "train" / "__MACOSX").mkdir()
    (flat / "train" / ".DS_Store").touch()
    (flat / "val" / "._ILSVRC2012_val_00000001.JPEG").touch()
    (flat / "val" / "notes.txt").touch()
    (flat / "train" / "README").touch()
    assert built(flat, tmp_path / "out" / "folders") == expected
    out = capsys.readouterr().out
    assert "skipped: 3 hidden files" in out
    assert "skipped: 1 files that are not pictures" in out
    assert "skipped: 1 files beside the class folders" in out


def test_folders_that_are_not_imagenets(tmp_path):
    tars = small_sets.write_tars(tmp_path / "tars")
    flat = unpack(tars, tmp_path / "flat")
    picture = flat / "train" / "n01440764" / "n01440764_1.JPEG"

    def refused(error, match):
        with pytest.raises(error, match=match) as caught:
            imagenet.build(flat, tmp_path / "out", partial=True, threads=1)
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "out").exists()

    moved = picture.rename(picture.parent.parent / "n01443537" / picture.name)
    refused(DataError, r"n01440764_1.JPEG is of class 0 \(n01440764\) by its name")
    moved.rename(picture)
    other = picture.with_name("holiday.jpg")
    shutil.copy(picture, other)
    refused(DataError, "holiday.jpg is not named as a picture of the train split")
    other.unlink()
    twice = picture.with_name("n01440764_1.jpg")
    shutil.copy(picture, twice)
    refused(DataError, "'n01440764_1.JPEG' twice")
    twice.unlink()
    loop = picture.with_name("n01440764_77.JPEG")
    loop.symlink_to(loop.name)
    refused(ConfigError, "n01440764_77.JPEG cannot be read")
    loop.unlink()
    (flat / "train" / "cats").mkdir()
    refused(DataError, "cats is not the folder of a class")
    (flat / "train" / "cats").rmdir()
    (flat / "val").rename(flat / "elsewhere")
    refused(ConfigError, "lacks the folder val")


def test_tables_that_contradict_the_names_are_refused(tmp_path):
    flat = unpack(small_sets.write_tars(tmp_path / "tars"), tmp_path / "flat")
    kaggle = as_kaggle(flat, tmp_path / "kaggle")
    table = kaggle / "LOC_val_solution.csv"
    number = layouts.label_files()[0][layouts.label_files()[1][1]]
    right = f"ILSVRC2012_val_00000002,{number} "
    assert right in table.read_text()
    table.write_text(table.read_text().replace(right, "ILSVRC2012_val_00000002,n01440764 "))
    with pytest.raises(DataError, match=r"ILSVRC2012_val_00000002.JPEG is of class \d+ .* but of"):
        built(kaggle, tmp_path / "out")

    hub = as_parquet(flat, tmp_path / "hub")
    path = hub / "data" / "train-00000-of-00003.parquet"
    rows = pyarrow.parquet.read_table(path).to_pylist()
    rows[0]["label"] += 1
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    with pytest.raises(DataError, match="the labels belong to another set"):
        built(hub, tmp_path / "out")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match="train-00000-of-00003.parquet cannot be read"):
        built(hub, tmp_path / "out")
    pyarrow.parquet.write_table(pyarrow.table({"x": [1], "label": [2]}), path)
    with pytest.raises(DataError, match="has the columns x, label: one of pictures"):
        built(hub, tmp_path / "out")


def test_interrupted_unpacking_of_parquet_files_resumes(tmp_path, monkeypatch):
    tars = small_sets.write_tars(tmp_path / "tars")
    hub = as_parquet(unpack(tars, tmp_path / "flat"), tmp_path / "hub")
    whole, read = layouts._parquet_rows, []

    def fails(path):
        read.append(path.name)
        if len(read) > 3:
            raise KeyboardInterrupt
        yield from whole(path)

    monkeypatch.setattr(layouts, "_parquet_rows", fails)
    with pytest.raises(KeyboardInterrupt):
        built(hub, tmp_path / "out")
    assert tfds.find("imagenet2012", str(tmp_path / "out")) is None
    again = []
    monkeypatch.setattr(layouts, "_parquet_rows", lambda p: again.append(p.name) or whole(p))
    assert built(hub, tmp_path / "out") == built(tars, tmp_path / "expected")
    assert len(again) == 7 - 3  # the others are kept
    kept = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*-of-*")}
    built(hub, tmp_path / "out")
    assert {p: p.stat().st_mtime_ns for p in kept} == kept


def test_other_tars_beside_the_two(tmp_path):
    """Who has fetched all of ILSVRC2012 has the dogs of task 3 and the test split, too."""
    tars = small_sets.write_tars(tmp_path / "tars")
    expected = built(tars, tmp_path / "out" / "two")
    shutil.copy(tars / layouts.TARS["train"], tars / "ILSVRC2012_img_train_t3.tar")
    test = small_sets.tar_bytes({"ILSVRC2012_test_00000001.JPEG": JPEG})
    (tars / "ILSVRC2012_img_test_v10102019.tar").write_bytes(test)
    assert built(tars, tmp_path / "out" / "more") == expected

    (tars / "ILSVRC2012_img_train_t3.tar").unlink()  # under other names it is found by its content
    (tars / layouts.TARS["train"]).rename(tars / "train.tar")
    assert built(tars, tmp_path / "out" / "renamed") == expected


def test_a_source_that_is_not_there_or_unknown(tmp_path):
    with pytest.raises(ConfigError, match="no file or folder .*: --from takes a folder"):
        built(tmp_path / "none", tmp_path / "out")
    with pytest.raises(ConfigError, match="does not hold ImageNet in a known form"):
        built(tmp_path, tmp_path / "out")
    (tmp_path / "imagenet.zip").write_bytes(b"PK")
    with pytest.raises(ConfigError, match="is not a tar or a parquet file: unpack it"):
        built(tmp_path / "imagenet.zip", tmp_path / "out")
    tars = small_sets.write_tars(tmp_path / "tars")
    (tars / layouts.TARS["validation"]).unlink()
    with pytest.raises(ConfigError, match="no pictures of the validation split"):
        built(tars, tmp_path / "out")


def test_labels_of_validation_pictures():
    """By the official list: number 1 is a sea snake, class 65; a shift by one is noticed."""
    assert layouts.named("ILSVRC2012_val_00000001.JPEG")[2] == 65
    assert layouts.named("ILSVRC2012_val_00000002.JPEG")[2] == 970
    assert layouts.named("ILSVRC2012_val_00000003.JPEG")[2] == 230
    assert layouts.named("ILSVRC2012_val_00050000.JPEG")[2] == 355
    for name in (
        "ILSVRC2012_val_00050001.JPEG",
        "ILSVRC2012_val_00000000.JPEG",
        "n00000000_1.JPEG",
    ):
        assert layouts.named(name) is None
    assert layouts.named("n01440764_18.JPEG") == ("train", "n01440764_18.JPEG", 0)
    assert layouts.named("n15075141_9.JPEG")[2] == 999


# What is left of the tars after a user has unpacked, renamed or made them again.


def found_in(folder: pathlib.Path, tmp_path: pathlib.Path) -> dict[str, list[str]]:
    found = layouts.find(folder, tmp_path / "unpacked")
    for images in found.values():
        assert all(image.read() for image in images)
    return {split: sorted(image.name for image in images) for split, images in found.items()}


@pytest.mark.parametrize("place", ["train", "."])
def test_the_outer_tar_unpacked_and_not_the_inner_ones(tmp_path, place):
    """`tar xf ILSVRC2012_img_train.tar`, and no more. (In train/ the 1,000 tars were counted as
    skipped, and beside the other tar the first of them had an unexpected member.)"""
    tars = small_sets.write_tars(tmp_path / "tars")
    want = found_in(tars, tmp_path)
    with tarfile.open(tars / layouts.TARS["train"]) as tar:
        tar.extractall(tmp_path / "source" / place, filter="data")
    if place == "train":
        with tarfile.open(tars / layouts.TARS["validation"]) as tar:
            tar.extractall(tmp_path / "source" / "val", filter="data")
    else:
        shutil.copy(tars / layouts.TARS["validation"], tmp_path / "source")
    assert found_in(tmp_path / "source", tmp_path) == want


def test_tars_that_were_made_again_from_folders(tmp_path):
    """`tar cf ILSVRC2012_img_val.tar val`, and the same of the class folders. (Refused: the names
    had a folder before them.)"""
    tars = small_sets.write_tars(tmp_path / "tars")
    want = found_in(tars, tmp_path)
    for split, folder in (("train", "train/n01440764"), ("validation", "./val")):
        members = {f"{folder}/{name}": JPEG for name in want[split]}
        (tars / layouts.TARS[split]).write_bytes(small_sets.tar_bytes(members))
    assert found_in(tars, tmp_path) == want


@pytest.mark.parametrize(
    "table",
    [
        b"ImageId,PredictionString\nILSVRC2012_val_00000001,\n",
        b"id,label\nILSVRC2012_val_00000001,n01440764\n",
        b"ImageId,PredictionString\nILSVRC2012_val_00000001,\xe9 1 2 3 4\n",
        b"ImageId,PredictionString\nILSVRC2012_val_00000001",
        b"<!DOCTYPE html><title>Log in</title>\n",
    ],
)
def test_a_damaged_table_of_kaggle_is_refused(tmp_path, table):
    """(An IndexError, a KeyError and a UnicodeDecodeError with tracebacks; a page in place of the
    table was taken for a table of no pictures, and nothing was compared.)"""
    root = tmp_path / "ILSVRC" / "Data" / "CLS-LOC"
    (root / "train" / "n01440764").mkdir(parents=True)
    (root / "train" / "n01440764" / "n01440764_1.JPEG").write_bytes(JPEG)
    (root / "val").mkdir()
    (root / "val" / "ILSVRC2012_val_00000001.JPEG").write_bytes(JPEG)
    (tmp_path / "LOC_val_solution.csv").write_bytes(table)
    with pytest.raises(DataError, match="LOC_val_solution.csv is not Kaggle's table"):
        layouts.find(tmp_path, tmp_path / "unpacked")


def test_a_file_that_is_cut_after_it_was_listed_is_named(tmp_path):
    tars = small_sets.write_tars(tmp_path / "tars")
    image = layouts.find(tars, tmp_path / "unpacked")["validation"][-1]
    data = image.file.read_bytes()
    image.file.write_bytes(data[: image.place + image.size - 1])
    with pytest.raises(DataError, match=r"img_val.tar is cut within ILSVRC2012_val_00050000.JPEG"):
        image.read()


def test_a_table_of_kaggle_that_agrees_is_accepted(tmp_path):
    """Also of the first class, whose number is 0."""
    synsets, labels = layouts.label_files()
    root = tmp_path / "CLS-LOC"
    (root / "train" / "n01440764").mkdir(parents=True)
    (root / "train" / "n01440764" / "n01440764_1.JPEG").write_bytes(JPEG)
    (root / "val").mkdir()
    lines = ["ImageId,PredictionString"]
    for number in (1 + labels.index(0), 1 + labels.index(7)):
        name = f"ILSVRC2012_val_{number:08d}"
        (root / "val" / f"{name}.JPEG").write_bytes(JPEG)
        lines.append(f"{name},{synsets[labels[number - 1]]} 1 2 3 4 ")
    (tmp_path / "LOC_val_solution.csv").write_text("\n".join(lines))
    found = layouts.find(tmp_path, tmp_path / "unpacked")["validation"]
    assert sorted(image.label for image in found) == [0, 7]
