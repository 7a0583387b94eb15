"""The places of files inside a tar (POSIX ustar, GNU), found without unpacking anything.

Nothing is ever written under a member's name, so a hostile name cannot reach the disk; all that is
not a plain file is refused. Only headers are read: 512 bytes a member.
"""

import os
from collections.abc import Iterator
from typing import NamedTuple

from bn_jax.errors import DataError

BLOCK = 512
_FILES, _DIRECTORY, _COMMENTS = b"0\0", b"5", b"xg"  # types of members (POSIX 1003.1, pax)


class Member(NamedTuple):
    """A plain file: name, place of its first byte in the outermost tar, size in bytes."""

    name: str
    place: int
    size: int


def members(descriptor: int, start: int, stop: int, tar: str) -> Iterator[Member]:
    """The plain files of the tar that occupies bytes start..stop of an open file.

    Directories and pax comments are skipped. `tar` names it in messages. Raises DataError for a
    tar that is cut or damaged, and for links, devices and sparse files.
    """
    at = start
    while at < stop:
        header = os.pread(descriptor, BLOCK, at)
        if len(header) < BLOCK or at + BLOCK > stop:
            raise DataError(f"{tar} is cut at byte {at - start}: fetch it again")
        if not any(header):  # the end; a second block of zeros follows in whole tars
            return
        stored = _number(header[148:156], tar)
        if stored != sum(header[:148]) + 8 * 32 + sum(header[156:]):
            raise DataError(f"{tar} is damaged: the header at byte {at - start} fails its checksum")
        name = header[:100].split(b"\0")[0].decode("utf-8", "backslashreplace")
        size, kind = _number(header[124:136], tar), header[156:157]
        place = at + BLOCK
        if place + size > stop:
            raise DataError(f"{tar} is cut within {name!r} at byte {at - start}: fetch it again")
        if kind in _FILES:
            yield Member(name, place, size)
        elif kind != _DIRECTORY and kind not in _COMMENTS:
            raise DataError(
                f"{tar} has a member {name!r} of type {kind!r}: only plain files are expected in it"
            )
        at = place + -(-size // BLOCK) * BLOCK
    raise DataError(f"{tar} is cut: its end mark is missing; fetch it again")


def _number(field: bytes, tar: str) -> int:
    """An octal number, or GNU's binary form for sizes above 8 GiB."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    try:
        return int(field.strip(b" \0") or b"0", 8)
    except ValueError:
        raise DataError(f"{tar} is damaged: {field!r} is not a number in a header") from None
