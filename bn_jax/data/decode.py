"""Decodes images to RGB pixels: JPEG by simplejpeg (libjpeg-turbo), all others by OpenCV.

The header is read first, so that an image whose decoding would need more than MAX_BYTES is refused
before any of it is unpacked. libjpeg-turbo reads the header of a JPEG, `_png_frame` that of a PNG.
Pillow reads those of other files; it decodes no pixels until it is asked to. A file is decoded if
Pillow and OpenCV agree on it; docs/data.md says what happens to others.

Pixels are as stored: an EXIF orientation is ignored, as tf.io.decode_jpeg and torchvision do. Grey,
palette, 16-bit, CMYK and transparent images become 8-bit RGB.
"""

import contextlib
import functools
import io
import struct
from collections.abc import Callable
from typing import Any, NamedTuple

import cv2
import numpy as np
import simplejpeg

from bn_jax.data.crops import Box

MAX_BYTES = 256 * 2**20  # of pixels and coefficients of one image: 89 megapixels of 8-bit RGB


class BadImageError(ValueError):
    """An image that cannot be decoded; the message says why."""


class Frame(NamedTuple):
    """The contents of a header. `bytes_per_pixel`: the memory that decoding needs."""

    kind: str
    height: int
    width: int
    components: int = 3
    bytes_per_pixel: int = 3


def frame(data: bytes) -> Frame:
    """Reads the header. Raises BadImageError for unknown, damaged and oversized images."""
    found = _jpeg_frame(data) or _png_frame(data) or _pillow_frame(data)
    if found.height < 1 or found.width < 1:
        raise BadImageError(f"it has no pixels: {found.height} x {found.width}")
    need = found.height * found.width * found.bytes_per_pixel
    if need > MAX_BYTES:
        raise BadImageError(
            f"{found.height} x {found.width} pixels unpack to {need >> 20} MiB, but "
            f"the limit is {MAX_BYTES >> 20} MiB"
        )
    return found


def _jpeg_frame(data: bytes) -> Frame | None:
    """Reads the header of a JPEG; returns None for other files.

    It also returns None for a few JPEGs that simplejpeg refuses although libjpeg-turbo decodes
    them.
    """
    if data[:2] != b"\xff\xd8":
        return None
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data, strict=False)
    except (ValueError, KeyError):
        return None
    components = {"Gray": 1, "CMYK": 4, "YCCK": 4}.get(colours, 3)
    return _jpeg(data, height, width, components)


def _jpeg(data: bytes, height: int, width: int, components: int) -> Frame:
    """Makes the Frame of a JPEG.

    A JPEG of several scans needs more memory: two bytes for each coefficient until all scans are
    read. The file is searched for further scans only if the image is so large that it matters.
    """
    least = Frame("jpeg", height, width, components, components)
    if height * width * 3 * components <= MAX_BYTES:
        return least
    progressive = any(bytes([0xFF, marker]) in data for marker in (0xC2, 0xC6, 0xCA, 0xCE))
    if progressive or data.count(b"\xff\xda") > 1:
        return least._replace(bytes_per_pixel=3 * components)
    return least


def _png_frame(data: bytes) -> Frame | None:
    """Reads the header of a PNG, whose numbers have fixed positions; returns None for other files.

    Pillow would check all chunks before the pixels, more strictly than OpenCV's libpng does.
    """
    if data[:8] != b"\x89PNG\r\n\x1a\n":
        return None
    if len(data) < 29 or data[12:16] != b"IHDR":
        raise BadImageError("PNG without a header")
    width, height, depth = struct.unpack_from(">IIB", data, 16)
    return Frame("png", height, width, bytes_per_pixel=11 if depth == 16 else 7)


@functools.cache
def _formats() -> list[tuple[bytes, str, Callable[[io.BytesIO], Any]]]:
    """Returns, for each kind of file: its first bytes, its name, and Pillow's reader of the header.

    Image.open would try all of Pillow's formats, and warn of large images, which are refused here.
    """
    from PIL import (
        BmpImagePlugin,
        GifImagePlugin,
        Jpeg2KImagePlugin,
        JpegImagePlugin,
        PpmImagePlugin,
        TiffImagePlugin,
        WebPImagePlugin,
    )

    tiff = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # also those of more than 4 GiB
    jpeg_2000 = (b"\0\0\0\x0cjP  \r\n\x87\n", b"\xff\x4f\xff\x51")
    formats: list[tuple[bytes, str, Callable[[io.BytesIO], Any]]] = [
        (b"\xff\xd8", "jpeg", JpegImagePlugin.JpegImageFile),
        (b"BM", "bmp", BmpImagePlugin.BmpImageFile),
        (b"RIFF", "webp", WebPImagePlugin.WebPImageFile),
        (b"GIF8", "gif", GifImagePlugin.GifImageFile),
        *((start, "tiff", TiffImagePlugin.TiffImageFile) for start in tiff),
        *((b"P%d" % k, "ppm", PpmImagePlugin.PpmImageFile) for k in range(1, 7)),
        *((start, "jpeg 2000", Jpeg2KImagePlugin.Jpeg2KImageFile) for start in jpeg_2000),
    ]
    with contextlib.suppress(ImportError):  # from Pillow 11.3 on
        from PIL import AvifImagePlugin

        formats.append((b"ftypavif", "avif", AvifImagePlugin.AvifImageFile))  # from byte 4 on
    return formats


def _pillow_frame(data: bytes) -> Frame:
    """Reads the header with Pillow. Raises BadImageError if it is damaged or of an unknown kind."""
    known = next((f for f in _formats() if data.startswith(f[0]) or data[4:12] == f[0]), None)
    if known is None:
        raise BadImageError(
            "not a JPEG, PNG, BMP, WebP, GIF, TIFF, PPM, JPEG 2000 or AVIF image: it starts with "
            f"{bytes(data[:4])!r}"
        )
    _, kind, reader = known
    try:
        image = reader(io.BytesIO(data))
    except Exception as e:  # Pillow raises many kinds: SyntaxError, struct.error, OSError, ...
        reason = " ".join(str(e).split())
        raise BadImageError(f"its header cannot be read as {kind.upper()}: {reason}") from None
    width, height = image.size
    if kind == "jpeg":
        return _jpeg(data, height, width, len(image.getbands()))
    # OpenCV holds the image as stored and as 8-bit RGB, with room for a transparent channel.
    deep = kind in ("tiff", "jpeg 2000")
    return Frame(kind, height, width, bytes_per_pixel=11 if deep else 7)


def pixels(
    data: bytes,
    found: Frame,
    *,
    reduce: int = 1,
    exact: bool = True,
    warnings: list[str] | None = None,
) -> np.ndarray:
    """Decodes an image, uint8 [height / reduce, width / reduce, 3], rounded up.

    Args:
      data: the encoded image.
      found: its `frame`.
      reduce: 1, 2, 4 or 8. A JPEG is reduced while it is decoded, which is cheaper than resizing
        and averages pixels as well.
      exact: whether to use the accurate inverse DCT, which takes 5% longer than the fast one; the
        fast one is off by a level or two.
      warnings: receives libjpeg's warnings of a JPEG that it decodes nevertheless. Pixels may then
        be wrong. They may also be wrong without a warning: JPEG has no checksum, and most flipped
        bits give another valid picture.

    Raises:
      BadImageError: the image is damaged.
    """
    reason = ""
    if found.kind == "jpeg":
        try:
            return _by_simplejpeg(data, found, reduce, exact, warnings)
        except ValueError as e:
            reason = str(e)
        if data.rfind(b"\xff\xd9") < data.rfind(b"\xff\xda"):  # no end mark behind the last scan
            raise BadImageError(f"the JPEG is cut ({reason})")
        # OpenCV uses libjpeg-turbo, too, and decodes some files that simplejpeg refuses.
    image = _by_opencv(data, found, reason)
    if reason and warnings is not None:
        warnings.append(reason)
    if reduce > 1:
        size = (-(-found.width // reduce), -(-found.height // reduce))
        image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    return image


def _by_simplejpeg(
    data: bytes, found: Frame, reduce: int, exact: bool, warnings: list[str] | None
) -> np.ndarray:
    """Decodes a JPEG. Raises ValueError if libjpeg-turbo refuses it, or if it is cut."""
    options = {
        "colorspace": "CMYK" if found.components == 4 else "RGB",
        "fastdct": not exact,
        "min_factor": reduce,
        "min_height": -(-found.height // reduce),
        "min_width": -(-found.width // reduce),
    }
    try:
        image = simplejpeg.decode_jpeg(data, **options)
    except ValueError as e:
        # libjpeg only warns of stray bytes or a missing restart, and decodes the image. Of a file
        # that is cut, the rest of the image would be grey.
        if "Premature end of JPEG" in str(e):
            raise
        image = simplejpeg.decode_jpeg(data, strict=False, **options)
        if warnings is not None:
            warnings.append(str(e))
    return _rgb_from_cmyk(image) if found.components == 4 else image


def _rgb_from_cmyk(cmyk: np.ndarray) -> np.ndarray:
    """Converts ink values to RGB; they are stored inverted, so that 255 means no ink.

    Adobe's files say so in a marker; Pillow and OpenCV assume the same of files without it.
    """
    product = cmyk[..., :3].astype(np.uint16) * cmyk[..., 3:]
    return ((product + 127) // 255).astype(np.uint8)


def _by_opencv(data: bytes, found: Frame, reason: str) -> np.ndarray:
    """Decodes an image of any kind. Raises BadImageError, with another decoder's `reason`."""
    flags = cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except cv2.error as e:
        raise BadImageError(f"OpenCV: {e.err}") from None
    if image is None:
        raise BadImageError(f"damaged {found.kind.upper()}" + (f": {reason}" if reason else ""))
    if image.shape[:2] != (found.height, found.width):
        raise BadImageError(
            f"damaged {found.kind.upper()}: {image.shape[0]} x {image.shape[1]} pixels, its header "
            f"says {found.height} x {found.width}"
        )
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def reduction(box: Box, size: int) -> int:
    """Returns the largest of 1, 2, 4, 8 that reduces a crop to at least `size` pixels."""
    return next((f for f in (8, 4, 2) if min(box[2:]) >= f * size), 1)


def resized_crop(image: np.ndarray, box: Box, reduce: int, out: np.ndarray) -> None:
    """Writes a crop of an image into `out` [S, S, 3]. `box` is in pixels of the unreduced image.

    The resize is bilinear without antialiasing, as in tf.image.resize. After `reduction` the crop
    is less than twice as large as the output (unless it was reduced by 8), so no pixel is skipped.
    """
    top, left, height, width = (round(x / reduce) for x in box)
    # Rounding may leave no pixels, or reach one pixel beyond the edge.
    height = max(height, 1)
    width = max(width, 1)
    top = min(top, image.shape[0] - height)
    left = min(left, image.shape[1] - width)
    part = image[top : top + height, left : left + width]
    cv2.resize(part, out.shape[1::-1], dst=out, interpolation=cv2.INTER_LINEAR)
