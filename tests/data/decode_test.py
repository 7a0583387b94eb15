"""decode.py, crops.py, load.py: every kind of bad image is converted, masked or fatal."""

import io
import pathlib
import re
import struct
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from bn_jax.data import decode, load, order
from bn_jax.data.distort import DRAWS
from bn_jax.errors import DataError
from bn_jax.prepare import check, imagenet, layouts
from tests.support import odd_files, small_sets

SIZE = 32
PHOTO = small_sets.photo(90, 120)
JPEG = small_sets.encode(PHOTO, quality=95)
PNG = small_sets.encode(PHOTO, "PNG")


def rotated() -> bytes:
    """A JPEG whose EXIF data ask for a quarter turn."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return small_sets.encode(PHOTO, quality=95, exif=exif)


def sixteen_bit() -> bytes:
    """A grey PNG of 16 bits a sample."""
    out = io.BytesIO()
    grey = PHOTO[..., 0].astype(np.uint16) * 257
    Image.fromarray(grey).save(out, "PNG")
    return out.getvalue()


def transparent() -> bytes:
    return small_sets.encode(np.dstack([PHOTO, np.full(PHOTO.shape[:2], 9, np.uint8)]), "PNG")


def twelve_bit() -> bytes:
    """A JPEG whose frame header says 12 bits a sample."""
    at = JPEG.index(b"\xff\xc0")
    return JPEG[: at + 4] + b"\x0c" + JPEG[at + 5 :]


def bytes_before_the_end() -> bytes:
    """A JPEG with stray bytes before its end mark, of which ImageNet has some: all pixels are
    there."""
    return JPEG[:-2] + b"\x11\x22\x33\x44" + JPEG[-2:]


GREY = np.repeat(PHOTO[..., :1], 3, axis=-1)

# (what, file, expected pixels or None if it cannot be decoded)
TABLE = [
    ("JPEG", JPEG, PHOTO),
    ("progressive JPEG", small_sets.encode(PHOTO, quality=95, progressive=True), PHOTO),
    ("grey JPEG", small_sets.encode(PHOTO[..., 0], quality=95), GREY),
    ("CMYK JPEG", small_sets.encode(PHOTO, mode="CMYK", quality=95), PHOTO),
    ("PNG named JPEG", PNG, PHOTO),
    ("grey PNG of 16 bits", sixteen_bit(), GREY),
    ("transparent PNG", transparent(), PHOTO),
    ("palette PNG", small_sets.encode(PHOTO[..., 0], "PNG", mode="P"), GREY),
    ("BMP", small_sets.encode(PHOTO, "BMP"), PHOTO),
    ("WebP", small_sets.encode(PHOTO, "WEBP", lossless=True), PHOTO),
    ("EXIF asks for a turn: left as stored", rotated(), PHOTO),
    ("stray bytes before the end", bytes_before_the_end(), PHOTO),
    ("one pixel", small_sets.encode(PHOTO[:1, :1], "PNG"), PHOTO[:1, :1]),
    ("one pixel high", small_sets.encode(PHOTO[:1], "PNG"), PHOTO[:1]),
    ("cut JPEG", JPEG[: len(JPEG) // 2], None),
    ("cut PNG", PNG[: len(PNG) // 2], None),
    ("flipped bits in a PNG", PNG[:300] + b"\0\0\0\0" + PNG[304:], None),
    ("12-bit JPEG", twelve_bit(), None),
    ("header only", JPEG[:20], None),
    ("text", b"<html>404 not found</html>", None),
    ("empty file", b"", None),
    ("bomb", small_sets.png_bomb(16_000), None),
]
ids = [what for what, _, _ in TABLE]


@pytest.mark.parametrize(("what", "data", "expected"), TABLE, ids=ids)
def test_decoding(what, data, expected):
    if expected is None:
        with pytest.raises(decode.BadImageError):
            decode.pixels(data, decode.frame(data))
        return
    found = decode.frame(data)
    assert (found.height, found.width) == expected.shape[:2]
    image = decode.pixels(data, found)
    assert image.shape == expected.shape and image.dtype == np.uint8
    # JPEG at quality 95 with halved chroma is off by 0.8 levels in the mean on this picture.
    assert np.abs(image.astype(int) - expected).mean() < (1.2 if found.kind == "jpeg" else 0.01)


@pytest.mark.parametrize(("what", "data", "expected"), TABLE, ids=ids)
def test_training_masks_and_evaluation_stops(what, data, expected):
    """A bad training image leaves a masked row of zeros in its place and moves no other example; in
    evaluation it ends the run, by name."""
    records = [
        load.Record(JPEG, 1, "a"),
        load.Record(data, 2, "b"),
        load.Record(JPEG, 0, "c"),
    ]
    draws = order.uniforms(0, 0, slice(0, 3), DRAWS)
    options = {"size": SIZE, "num_classes": 3}
    bad = load.BadRecords(10)
    images, labels, mask = load.train_rows(
        records, range(3), draws, min_area=0.5, bad=bad, **options
    )
    good, _, _ = load.train_rows(
        [records[0]] * 3, range(3), draws, min_area=0.5, bad=bad, **options
    )
    assert np.array_equal(images[[0, 2]], good[[0, 2]])
    if expected is not None:
        assert labels.tolist() == [1, 2, 0] and mask.all() and images[1].any() and not bad.names
        assert load.evaluation_rows(records, range(3), **options)[2].all()
        return
    assert labels.tolist() == [1, 0, 0] and mask.tolist() == [True, False, True]
    assert not images[1].any() and bad.names == {"b"}
    with pytest.raises(DataError, match=r"^b: .*leaves nothing out"):
        load.evaluation_rows(records, range(3), **options)


def test_cmyk_agrees_with_pillow():
    data = small_sets.encode(PHOTO, mode="CMYK", quality=95)
    pillow = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    ours = decode.pixels(data, decode.frame(data))
    assert np.abs(ours.astype(int) - pillow).max() <= 1  # rounding of one product


def test_labels_out_of_range_end_the_run():
    for label in (-1, 3):
        records = [load.Record(JPEG, label, "shard 5")]
        with pytest.raises(DataError, match=r"shard 5 has label -?\d, but the set has 3 classes"):
            load.evaluation_rows(records, [0], size=SIZE, num_classes=3)
        with pytest.raises(DataError, match="3 classes"):
            load.train_rows(
                records,
                [0],
                np.zeros((1, DRAWS)),
                size=SIZE,
                num_classes=3,
                min_area=1,
                bad=load.BadRecords(1),
            )


def test_too_many_bad_records_end_the_run():
    bad = load.BadRecords(20_000)
    assert bad.limit == 20  # 0.1%
    for k in range(20):
        bad.add(f"name {k}", "cut")
        bad.add(f"name {k}", "cut")  # met again in the next epoch: counted once
    with pytest.raises(DataError, match=r"21 bad training records, the limit is 20.*name 20: cut"):
        bad.add("name 20", "cut")


MEMORY = """
import pathlib, re, sys
from bn_jax.data import decode

def peak():  # ru_maxrss would start from the parent's
    status = pathlib.Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", status)[1]) // 1024

data = open(sys.argv[1], "rb").read()
found = decode.Frame("png", 16000, 16000) if sys.argv[2] == "unprotected" else None
before = peak()
try:
    decode.pixels(data, found or decode.frame(data))
    print("decoded", end=" ")
except decode.BadImageError as e:
    print("refused" if "unpack to" in str(e) else e, end=" ")
print(peak() - before)
"""


def memory_of(data: bytes, tmp_path: pathlib.Path, how: str) -> tuple[str, int]:
    if not pathlib.Path("/proc/self/status").exists():
        pytest.skip("memory is measured by /proc (Linux)")
    (tmp_path / "image").write_bytes(data)
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path / "image"), how],
        cwd=pathlib.Path(__file__).resolve().parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    verdict, mib = done.stdout.split()
    return verdict, int(mib)


def test_bombs_are_refused_unopened(tmp_path):
    """0.75 MB that unpack to 768 MB: refused by the header (measured: 0 MiB more)."""
    bomb = small_sets.png_bomb(16_000)
    assert len(bomb) < 800_000
    verdict, mib = memory_of(bomb, tmp_path, "protected")
    assert verdict == "refused" and mib < 300


def test_the_largest_accepted_image_stays_within_300_mb(tmp_path):
    """A PNG just below the limit (measured: 222 MiB more)."""
    side = int((decode.MAX_BYTES / 7) ** 0.5)
    verdict, mib = memory_of(small_sets.png_bomb(side), tmp_path, "protected")
    assert verdict == "decoded" and 100 < mib < 300


@pytest.mark.slow
def test_the_bomb_is_a_bomb(tmp_path):
    verdict, mib = memory_of(small_sets.png_bomb(16_000), tmp_path, "unprotected")
    assert verdict == "decoded" and mib > 700


def test_progressive_images_are_charged_for_their_coefficients():
    size = struct.pack(">HH", 8000, 8000)
    large = odd_files.patched(JPEG, b"\xff\xc0", 5, size)
    assert decode.frame(large).bytes_per_pixel == 3
    progressive = small_sets.encode(PHOTO, quality=95, progressive=True)
    two_scans = large[:-2] + large[large.index(b"\xff\xda") :]
    for costly in (odd_files.patched(progressive, b"\xff\xc2", 5, size), two_scans):
        with pytest.raises(decode.BadImageError, match="8000 x 8000 pixels unpack to 549 MiB, but"):
            decode.frame(costly)


@pytest.mark.parametrize("name", odd_files.files())
def test_odd_files_are_decoded_where_pillow_and_opencv_agree(name):
    """(Refused were: an unknown version of JFIF, stray bytes and restarts between segments, a
    comment one byte short, a restart of a wrong number, a scan closed too early, bytes after a PNG,
    OS/2's BMP, GIF, TIFF, BigTIFF, PPM, PBM, those in text, JPEG 2000 with and without its box,
    AVIF. CMYK without Adobe's marker had inverted colours.)"""
    data = odd_files.files()[name]
    pillow = odd_files.by_pillow(data)
    opencv = odd_files.by_opencv(data)
    try:
        ours = decode.pixels(data, decode.frame(data))
    except decode.BadImageError as e:
        assert "\n" not in str(e)
        ours = None

    if pillow is None and opencv is None:
        assert ours is None
    elif name in DIFFER:
        assert not close(pillow, opencv)
        follow = {"OpenCV": opencv, "neither": None}[DIFFER[name]]
        assert (ours is None) == (follow is None) and (ours is None or close(ours, follow))
    else:
        assert close(pillow, opencv) and close(ours, pillow)


def close(a: np.ndarray | None, b: np.ndarray | None) -> bool:
    """Whether both are images that differ by at most two levels."""
    if a is None or b is None or a.shape != b.shape:
        return False
    return int(np.abs(a.astype(int) - b).max()) <= 2


# Files on which Pillow and OpenCV differ, or which one of them refuses: whom we follow. The table
# in docs/data.md says why.
DIFFER = {
    "png grey of 16 bits": "OpenCV",
    "bmp of 16 bits": "OpenCV",
    "bmp of 15 bits": "OpenCV",
    "png, wrong checksum of the text": "OpenCV",
    "png without its end": "neither",
    "png, cut in the checksum": "neither",
    "png, fewer pixels than it says": "neither",
    "ico": "neither",
    "tiff grey of 16 bits": "OpenCV",
    "tiff Lab": "OpenCV",
    "tiff of floating point": "neither",
    "tga": "neither",
    "pcx": "neither",
}


def test_the_corpus_of_odd_files_is_large():
    assert len(odd_files.files()) > 120
    text = (pathlib.Path(__file__).resolve().parents[2] / "docs" / "data.md").read_text()
    assert f"{len(odd_files.files())} odd files" in text


@pytest.mark.parametrize("reduce", [2, 4, 8])
def test_odd_jpegs_are_reduced_as_others(reduce):
    """Those that simplejpeg refuses are decoded whole and reduced."""
    for name in ("jpeg, stray bytes between segments", "jpeg, a restart missing", "jpeg CMYK"):
        data = odd_files.files()[name]
        found = decode.frame(data)
        small = decode.pixels(data, found, reduce=reduce)
        assert small.shape == (-(-found.height // reduce), -(-found.width // reduce), 3)
        whole = decode.pixels(data, found).astype(float)
        assert abs(small.mean() - whole.mean()) < 3


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=64), st.sampled_from([b"", JPEG[:2], PNG[:8], b"BM", b"RIFF1234WEBP"]))
def test_garbage_headers(data, start):
    try:
        found = decode.frame(start + data)
    except decode.BadImageError:
        return
    assert found.height > 0 and found.width > 0


# A JPEG that is damaged inside its scan: decoded, as by Pillow and OpenCV, but not silently.

SCAN = JPEG.index(b"\xff\xda") + 14
DAMAGED = {
    "a block of zeros": JPEG[: SCAN + 900] + bytes(512) + JPEG[SCAN + 1412 :],
    "the second half lost": JPEG[: len(JPEG) // 2] + b"\xff\xd9",
    "a piece lost": JPEG[: SCAN + 1000] + JPEG[SCAN + 1700 :],
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_scan_is_named_wherever_it_is_read(name, tmp_path, caplog, capsys):
    """(All of these were decoded with wrong pixels, and nobody was told: not in training, not in
    evaluation, not by `prepare check`.)"""
    data = DAMAGED[name]
    said = []
    image = decode.pixels(data, decode.frame(data), warnings=said)
    assert image.shape == PHOTO.shape and len(said) == 1 and "Corrupt JPEG data" in said[0]
    assert np.abs(image.astype(int) - PHOTO).max() > 30

    records = [load.Record(JPEG, 0, "good"), load.Record(data, 1, "shard 3, record 7")]
    options = {"size": SIZE, "num_classes": 2}
    for read in (
        lambda found: load.train_rows(
            records,
            range(2),
            order.uniforms(0, 0, slice(0, 2), DRAWS),
            min_area=0.5,
            bad=load.BadRecords(10),
            doubtful=found,
            **options,
        ),
        lambda found: load.evaluation_rows(records, range(2), doubtful=found, **options),
    ):
        caplog.clear()
        found = load.DoubtfulRecords()
        for _ in range(2):  # named once, not in every epoch
            assert read(found)[2].all()
        assert found.names == {"shard 3, record 7"}
        [line] = [r.getMessage() for r in caplog.records]
        assert re.match("record shard 3, record 7: decoded, but.*wrong: Corrupt JPEG data", line)


def test_a_damaged_scan_is_doubtful_in_the_check(tmp_path, capsys):
    for split in ("train", "val"):
        (tmp_path / split / "cat").mkdir(parents=True)
        (tmp_path / split / "cat" / "0.jpg").write_bytes(JPEG)
    check.check(tmp_path, "x", threads=1)
    assert capsys.readouterr().out.endswith("is sound\n")

    (tmp_path / "train" / "cat" / "1.jpg").write_bytes(DAMAGED["a block of zeros"])
    check.check(tmp_path, "x", threads=1)
    said = capsys.readouterr().out
    assert re.search(r"DOUBTFUL: .*train/cat/1\.jpg: Corrupt JPEG data", said)
    assert "is sound but for 1 doubtful pictures" in said


def test_a_damaged_picture_that_is_re_encoded_is_named(tmp_path, capsys):
    """The new file is whole: without a word the damage would be hidden for ever."""
    cmyk = small_sets.encode(PHOTO, mode="CMYK", quality=95)
    scan = cmyk.index(b"\xff\xda") + 900
    damaged = cmyk[:scan] + bytes(512) + cmyk[scan + 512 :]
    (tmp_path / "picture").write_bytes(damaged)
    image = layouts.Image("n01440764_1.JPEG", 0, tmp_path / "picture", 0, len(damaged))
    record = imagenet.record(image)
    assert "n01440764_1.JPEG: re-encoded, but its pixels may be wrong" in capsys.readouterr().err
    assert b"n01440764_1.JPEG" in record


def test_doubtful_records_beyond_twenty_are_not_named_one_by_one(caplog):
    found = load.DoubtfulRecords()
    for k in range(40):
        found.add(f"record {k}", ["Corrupt JPEG data"])
    assert len(found.names) == 40 and len(caplog.records) == found.SHOWN + 1
    assert "prepare check" in caplog.records[-1].getMessage()
