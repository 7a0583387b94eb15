"""tarfiles.py, imagenet.py: hostile and damaged tars."""

import io
import tarfile

import pytest

from bn_jax.errors import DataError
from bn_jax.prepare import imagenet
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


HOSTILE = {
    "a path that climbs": (hostile("../../../evil.tar"), "unexpected member"),
    "an absolute path": (hostile("/etc/passwd"), "unexpected member"),
    "a symbolic link": (hostile("n01440764.tar", tarfile.SYMTYPE, "/etc/passwd"), "plain files"),
    "a hard link": (hostile("n01440764.tar", tarfile.LNKTYPE, "/etc/passwd"), "plain files"),
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
    "no end": (small_sets.tar_bytes({"n01440764.tar": INNER})[: 512 + len(INNER)], "end mark"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_tars_are_refused_and_write_nothing(tmp_path, what):
    data, message = HOSTILE[what]
    tars = small_sets.write_tars(tmp_path / "tars")
    (tars / imagenet.TARS["train"]).write_bytes(data)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(DataError, match=message):
        imagenet.build(tars, tmp_path / "out", partial=True, threads=1)
    assert sorted(tmp_path.rglob("*")) == before
