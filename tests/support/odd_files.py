"""Picture files as they are found: odd, old, damaged, cut. Made here, byte by byte where no library
writes them."""

import io
import struct
import warnings
import zlib

import cv2
import numpy as np
import simplejpeg
from PIL import Image, PngImagePlugin

from tests.support.small_sets import encode, photo

HEIGHT, WIDTH = 40, 56
RGB = photo(HEIGHT, WIDTH)
GREY = RGB[..., 0]
ALPHA = np.clip(np.arange(HEIGHT * WIDTH).reshape(HEIGHT, WIDTH) // 9, 0, 255).astype(np.uint8)


def files() -> dict[str, bytes]:
    """Name -> file. All are of HEIGHT x WIDTH pixels, if they say so."""
    return {**jpegs(), **pngs(), **bmps(), **webps(), **others()}


# JPEG.


def segment(marker: int, content: bytes, length: int | None = None) -> bytes:
    """A marker segment, whose length may be a wrong one."""
    return (
        struct.pack(">BBH", 0xFF, marker, (len(content) + 2) if length is None else length)
        + content
    )


def after_first_segment(data: bytes, more: bytes) -> bytes:
    at = 4 + struct.unpack(">H", data[4:6])[0]
    return data[:at] + more + data[at:]


def patched(data: bytes, marker: bytes, offset: int, value: bytes) -> bytes:
    """The bytes at `offset` after the last such marker replaced."""
    at = data.rindex(marker) + offset
    return data[:at] + value + data[at + len(value) :]


def without_segments(data: bytes, *markers: int) -> bytes:
    """A JPEG without its segments of these markers, before the scan."""
    out = data[:2]
    at = 2
    while data[at + 1] != 0xDA:
        length = 2 + struct.unpack(">H", data[at + 2 : at + 4])[0]
        if data[at + 1] not in markers:
            out += data[at : at + length]
        at += length
    return out + data[at:]


def jpegs() -> dict[str, bytes]:
    plain = encode(RGB, quality=95)
    progressive = encode(RGB, quality=95, progressive=True)
    grey = encode(GREY, quality=95)
    cmyk = encode(RGB, mode="CMYK", quality=95)
    restarts = encode(RGB, quality=95, restart_marker_blocks=2)
    kept_rgb = encode(RGB, quality=95, keep_rgb=True)
    scan = plain.index(b"\xff\xda") + 60
    first_restart = restarts.index(b"\xff\xd0")
    exif = Image.Exif()
    exif[0x0112] = 6
    last_scan = progressive.rindex(b"\xff\xda")
    return {
        "jpeg": plain,
        "jpeg 4:4:4": encode(RGB, quality=95, subsampling=0),
        "jpeg 4:2:2": encode(RGB, quality=95, subsampling=1),
        "jpeg 4:4:0": simplejpeg.encode_jpeg(RGB, 95, colorsubsampling="440"),
        "jpeg 4:1:1": simplejpeg.encode_jpeg(RGB, 95, colorsubsampling="411"),
        "jpeg of quality 1": encode(RGB, quality=1),
        "jpeg optimized": encode(RGB, quality=95, optimize=True),
        "jpeg progressive": progressive,
        "jpeg grey": grey,
        "jpeg grey, sampling 2 x 2": patched(grey, b"\xff\xc0", 11, b"\x22"),
        "jpeg grey, sampling 2 x 1": patched(grey, b"\xff\xc0", 11, b"\x21"),
        "jpeg, sampling of chroma 2 x 2": patched(
            encode(RGB, quality=95, subsampling=0), b"\xff\xc0", 14, b"\x22"
        ),
        "jpeg grey progressive": encode(GREY, quality=95, progressive=True),
        "jpeg CMYK": cmyk,
        "jpeg CMYK without Adobe marker": without_segments(cmyk, 0xEE),
        "jpeg YCCK": patched(cmyk, b"Adobe", 11, b"\2"),
        "jpeg RGB": kept_rgb,
        "jpeg RGB without Adobe marker": without_segments(kept_rgb, 0xEE),
        "jpeg without JFIF": without_segments(plain, 0xE0),
        "jpeg with JFIF and Adobe": after_first_segment(
            plain, segment(0xEE, b"Adobe\0\x64\0\0\0\0\1")
        ),
        "jpeg, unknown Adobe transform": after_first_segment(
            plain, segment(0xEE, b"Adobe\0\x64\0\0\0\0\7")
        ),
        "jpeg, unknown JFIF version": patched(plain, b"JFIF\0", 5, b"\3\7"),
        "jpeg, EXIF asks for a turn": encode(RGB, quality=95, exif=exif),
        "jpeg, EXIF is garbage": after_first_segment(
            plain, segment(0xE1, b"Exif\0\0MM\0\x2a\xff\xff\xff\xff garbage")
        ),
        "jpeg with an ICC profile": encode(RGB, quality=95, icc_profile=b"not a profile" * 9),
        "jpeg with long segments": after_first_segment(plain, segment(0xED, bytes(65533)) * 3),
        "jpeg, stray bytes between segments": after_first_segment(plain, b"\n" * 7),
        "jpeg, RST0 between segments": after_first_segment(plain, b"\xff\xd0"),
        "jpeg, comment one byte short": after_first_segment(
            plain, segment(0xFE, b"comment", length=8)
        ),
        "jpeg, comment too long": after_first_segment(plain, segment(0xFE, b"short", length=40)),
        "jpeg, fill bytes before a marker": after_first_segment(plain, b"\xff" * 5),
        "jpeg, stray bytes before the end": plain[:-2] + b"\x11\x22\x33" + plain[-2:],
        "jpeg, bytes after the end": plain + bytes(100),
        "jpeg, text after the end": plain + b"<html>" * 20,
        "jpeg, another after the end": plain + encode(RGB[::-1].copy(), quality=95),
        "jpeg, two ends": plain + b"\xff\xd9",
        "jpeg, two beginnings": b"\xff\xd8" + plain,
        "jpeg, a line before the beginning": b"\r\n" + plain,
        "jpeg with restarts": restarts,
        "jpeg, a restart of a wrong number": restarts[:first_restart]
        + b"\xff\xd3"
        + restarts[first_restart + 2 :],
        "jpeg, a restart missing": restarts[:first_restart] + restarts[first_restart + 2 :],
        "jpeg without its last two bytes": plain[:-2],
        "jpeg, cut in the scan": plain[: len(plain) // 2],
        "jpeg, cut and closed": plain[: len(plain) * 3 // 4] + b"\xff\xd9",
        "jpeg, cut in the header": plain[:100],
        "jpeg progressive, cut": progressive[: len(progressive) // 2],
        "jpeg progressive without its last scan": progressive[:last_scan] + b"\xff\xd9",
        "jpeg, a bit of the scan flipped": plain[:scan]
        + bytes([plain[scan] ^ 0x10])
        + plain[scan + 1 :],
        "jpeg, zeros in the scan": plain[:scan] + bytes(30) + plain[scan + 30 :],
        "jpeg of 12 bits": patched(plain, b"\xff\xc0", 4, b"\x0c"),
        "jpeg lossless by its header": patched(plain, b"\xff\xc0", 1, b"\xc3"),
        "jpeg of height 0": patched(plain, b"\xff\xc0", 5, b"\0\0"),
        "jpeg, header twice as high": patched(plain, b"\xff\xc0", 5, struct.pack(">H", 2 * HEIGHT)),
        "jpeg without Huffman tables": without_segments(plain, 0xC4),
        "jpeg without quantization tables": without_segments(plain, 0xDB),
        "jpeg, two pictures (MPO)": mpo(),
    }


def mpo() -> bytes:
    out = io.BytesIO()
    first = Image.fromarray(RGB)
    first.save(out, "MPO", save_all=True, append_images=[first.rotate(180)], quality=95)
    return out.getvalue()


# PNG.


def chunk(kind: bytes, content: bytes, crc: int | None = None) -> bytes:
    checksum = zlib.crc32(kind + content) if crc is None else crc
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)


def png(
    rows: list[bytes],
    *,
    depth: int = 8,
    colour: int = 2,
    interlaced: int = 0,
    before: bytes = b"",
    size: tuple[int, int] = (WIDTH, HEIGHT),
    squeeze=zlib.compress,
) -> bytes:
    """A PNG of these rows (bytes without filters), with other chunks before the pixels."""
    header = struct.pack(">IIBBBBB", *size, depth, colour, 0, 0, interlaced)
    data = squeeze(b"".join(b"\0" + row for row in rows))
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + before
        + chunk(b"IDAT", data)
        + chunk(b"IEND", b"")
    )


def bits(values: np.ndarray, depth: int) -> list[bytes]:
    """Rows of packed pixels of 1, 2 or 4 bits."""
    unpacked = (values[..., None] >> np.arange(depth - 1, -1, -1)) & 1
    return [np.packbits(row.reshape(-1)).tobytes() for row in unpacked]


def adam7(image: np.ndarray) -> list[bytes]:
    """The rows of the seven passes of an interlaced image."""
    passes = [(0, 8, 0, 8), (0, 8, 4, 8), (4, 8, 0, 4), (0, 4, 2, 4), (2, 4, 0, 2), (0, 2, 1, 2)]
    passes.append((1, 2, 0, 1))
    return [row.tobytes() for t, dy, x, dx in passes for row in image[t::dy, x::dx]]


def apng() -> bytes:
    out = io.BytesIO()
    first = Image.fromarray(RGB)
    first.save(out, "PNG", save_all=True, append_images=[first.rotate(180)], duration=100)
    return out.getvalue()


def pngs() -> dict[str, bytes]:
    plain = encode(RGB, "PNG")
    rows = [row.tobytes() for row in RGB]
    wide = RGB.astype(">u2") * 257 + np.arange(WIDTH, dtype=">u2")[None, :, None]
    wide = np.minimum(wide, 65535).astype(">u2")
    palette = np.arange(256, dtype=np.uint8)[:, None] * np.array([1, 3, 7], np.uint8)
    palette_chunk = chunk(b"PLTE", palette.tobytes())
    indices = [row.tobytes() for row in GREY]
    at = plain.index(b"IDAT") + 30
    text = PngImagePlugin.PngInfo()
    text.add_text("Comment", "word " * 2000, zip=True)
    data = zlib.compress(b"".join(b"\0" + row for row in rows))
    split = b"".join(chunk(b"IDAT", data[k : k + 1]) for k in range(len(data)))
    exif = Image.Exif()
    exif[0x0112] = 6
    return {
        "png": plain,
        "png grey": encode(GREY, "PNG"),
        "png grey of 16 bits": png([r.tobytes() for r in wide[..., 0]], depth=16, colour=0),
        "png of 16 bits": png([r.tobytes() for r in wide], depth=16, colour=2),
        "png with alpha": encode(np.dstack([RGB, ALPHA]), "PNG"),
        "png grey with alpha": encode(np.dstack([GREY, ALPHA]), "PNG"),
        "png palette": png(indices, colour=3, before=palette_chunk),
        "png palette with transparency": png(
            indices, colour=3, before=palette_chunk + chunk(b"tRNS", bytes(range(0, 200, 2)))
        ),
        "png palette that is too short": png(
            indices, colour=3, before=chunk(b"PLTE", palette[:50].tobytes())
        ),
        "png palette of 4 bits": png(
            bits(GREY >> 4, 4), depth=4, colour=3, before=chunk(b"PLTE", palette[:16].tobytes())
        ),
        "png of 1 bit": png(bits(GREY >> 7, 1), depth=1, colour=0),
        "png of 2 bits": png(bits(GREY >> 6, 2), depth=2, colour=0),
        "png of 4 bits": png(bits(GREY >> 4, 4), depth=4, colour=0),
        "png interlaced": png(adam7(RGB), interlaced=1),
        "png with a transparent colour": png(
            rows, before=chunk(b"tRNS", struct.pack(">HHH", *map(int, RGB[0, 0])))
        ),
        "png grey with a transparent level": png(
            indices, colour=0, before=chunk(b"tRNS", struct.pack(">H", int(GREY[0, 0])))
        ),
        "png with gamma": png(rows, before=chunk(b"gAMA", struct.pack(">I", 100_000))),
        "png with sBIT": png(rows, before=chunk(b"sBIT", bytes([5, 6, 5]))),
        "png with a background": png(rows, before=chunk(b"bKGD", struct.pack(">HHH", 1, 2, 3))),
        "png with an ICC profile": encode(RGB, "PNG", icc_profile=b"not a profile" * 9),
        "png with text": encode(RGB, "PNG", pnginfo=text),
        "png, EXIF asks for a turn": encode(RGB, "PNG", exif=exif),
        "png in pieces of one byte": b"\x89PNG\r\n\x1a\n" + plain[8:33] + split + plain[-12:],
        "png, 65 bytes after the end": plain + bytes(65),
        "png, another after the end": plain + encode(RGB[::-1].copy(), "PNG"),
        "png, two frames (APNG)": apng(),
        "png without its end": plain[:-12],
        "png, cut in half": plain[: len(plain) // 2],
        "png, cut in the checksum": plain[:-14],
        "png, a byte of the pixels flipped": plain[:at] + bytes([plain[at] ^ 1]) + plain[at + 1 :],
        "png, wrong checksum of the text": png(rows, before=chunk(b"tEXt", b"a\0b", crc=1)),
        "png, wrong checksum of the header": plain[:29] + b"\0\0\0\0" + plain[33:],
        "png, more pixels than it says": png([*rows, *rows[:5]]),
        "png, fewer pixels than it says": png(rows[:-5]),
        "png of width 0": png(rows, size=(0, HEIGHT)),
        "png of 1 x 1": encode(RGB[:1, :1], "PNG"),
    }


# BMP.


def bmp(
    pixels: bytes,
    depth: int,
    *,
    height: int = HEIGHT,
    compression: int = 0,
    palette: bytes = b"",
    more: bytes = b"",
    size: int = 40,
) -> bytes:
    """A BMP with a header of `size` bytes."""
    header = struct.pack(
        "<IiiHHIIiiII",
        size,
        WIDTH,
        height,
        1,
        depth,
        compression,
        len(pixels),
        2835,
        2835,
        len(palette) // 4,
        0,
    )
    offset = 14 + len(header) + len(more) + len(palette)
    start = struct.pack("<2sIHHI", b"BM", offset + len(pixels), 0, 0, offset)
    return start + header + more + palette + pixels


def bmps() -> dict[str, bytes]:
    plain = encode(RGB, "BMP")
    palette = b"".join(struct.pack("<BBBB", k, k * 3 % 256, k * 7 % 256, 0) for k in range(256))
    up = RGB[::-1]
    bgr = up[..., ::-1].tobytes()
    bgrx = np.dstack([up[..., ::-1], np.zeros_like(ALPHA)]).tobytes()
    bgra = np.dstack([up[..., ::-1], ALPHA]).tobytes()
    high = up.astype(np.uint16)
    packed = (high[..., 0] >> 3 << 11 | high[..., 1] >> 2 << 5 | high[..., 2] >> 3).tobytes()
    fifteen = (high[..., 0] >> 3 << 10 | high[..., 1] >> 3 << 5 | high[..., 2] >> 3).tobytes()
    masks = struct.pack("<III", 0xF800, 0x7E0, 0x1F)
    runs = b"".join(b"".join(bytes([1, v]) for v in row.tobytes()) + b"\0\0" for row in GREY[::-1])
    core = struct.pack("<IHHHH", 12, WIDTH, HEIGHT, 1, 24)
    os2 = struct.pack("<2sIHHI", b"BM", 26 + len(bgr), 0, 0, 26) + core + bgr
    long = struct.pack("<IIII", 0xFF0000, 0xFF00, 0xFF, 0xFF000000) + b"BGRs" + bytes(48)
    return {
        "bmp": plain,
        "bmp of 8 bits": bmp(GREY[::-1].tobytes(), 8, palette=palette),
        "bmp grey": encode(GREY, "BMP"),
        "bmp of 1 bit": encode(GREY, "BMP", mode="1"),
        "bmp of 4 bits": bmp(b"".join(bits(GREY[::-1] >> 4, 4)), 4, palette=palette[:64]),
        "bmp of 32 bits": bmp(bgrx, 32),
        "bmp of 32 bits with alpha": bmp(bgra, 32, compression=3, more=long, size=108),
        "bmp of 16 bits": bmp(packed, 16, compression=3, more=masks),
        "bmp of 15 bits": bmp(fifteen, 16),
        "bmp, run lengths": bmp(runs + b"\0\1", 8, compression=1, palette=palette),
        "bmp from the top": bmp(RGB[..., ::-1].tobytes(), 24, height=-HEIGHT),
        "bmp of OS/2": os2,
        "bmp, bytes after the end": plain + bytes(100),
        "bmp, cut": plain[: len(plain) // 2],
        "bmp, cut in the header": plain[:30],
        "bmp of a huge width": plain[:18] + struct.pack("<i", 10**6) + plain[22:],
    }


# WebP.


def webps() -> dict[str, bytes]:
    plain = encode(RGB, "WEBP", quality=95)
    exact = encode(RGB, "WEBP", lossless=True)
    exif = Image.Exif()
    exif[0x0112] = 6
    out = io.BytesIO()
    first = Image.fromarray(RGB)
    first.save(out, "WEBP", save_all=True, append_images=[first.rotate(180)], lossless=True)
    alpha = np.dstack([RGB, ALPHA])
    return {
        "webp": plain,
        "webp lossless": exact,
        "webp grey": encode(GREY, "WEBP", lossless=True),
        "webp with alpha": encode(alpha, "WEBP", lossless=True, exact=True),
        "webp lossy with alpha": encode(alpha, "WEBP", quality=95, exact=True),
        "webp, EXIF asks for a turn": encode(RGB, "WEBP", lossless=True, exif=exif),
        "webp animated": out.getvalue(),
        "webp, bytes after the end": exact + bytes(64),
        "webp, size too small": exact[:4] + struct.pack("<I", 20) + exact[8:],
        "webp, size too large": exact[:4] + struct.pack("<I", 10**6) + exact[8:],
        "webp, cut": plain[: len(plain) // 2],
        "webp, cut in the header": plain[:24],
    }


def others() -> dict[str, bytes]:
    return {
        "gif": encode(GREY, "GIF"),
        "tiff": encode(RGB, "TIFF"),
        "ppm": encode(RGB, "PPM"),
        "gif animated": encode(
            RGB, "GIF", save_all=True, append_images=[Image.fromarray(RGB[::-1].copy())]
        ),
        "tiff of more than 4 GiB (BigTIFF)": encode(RGB, "TIFF", big_tiff=True),
        "tiff, LZW": encode(RGB, "TIFF", compression="tiff_lzw"),
        "tiff CMYK": encode(RGB, "TIFF", mode="CMYK"),
        "tiff palette": encode(RGB, "TIFF", mode="P"),
        "tiff of 1 bit": encode(RGB, "TIFF", mode="1"),
        "tiff with alpha": encode(RGB, "TIFF", mode="RGBA"),
        "tiff of two pages": encode(
            RGB, "TIFF", save_all=True, append_images=[Image.fromarray(RGB[::-1].copy())]
        ),
        "tiff grey of 16 bits": encode(GREY.astype(np.uint16) * 257, "TIFF"),
        "tiff Lab": encode(RGB, "TIFF", mode="LAB"),
        "tiff of floating point": encode(RGB, "TIFF", mode="F"),
        "ppm in text": b"P3\n56 40\n255\n" + b"".join(b"%d\n" % v for v in RGB.reshape(-1)),
        "pgm": encode(GREY, "PPM"),
        "pgm in text": b"P2\n# by hand\n56 40\n255\n"
        + b"".join(b"%d\n" % v for v in GREY.reshape(-1)),
        "pbm": encode(RGB, "PPM", mode="1"),
        "pbm in text": b"P1\n56 40\n"
        + b"\n".join(b" ".join(b"%d" % (v >> 7) for v in row) for row in GREY),
        "jpeg 2000": encode(RGB, "JPEG2000"),
        "jpeg 2000 without its box": encode(RGB, "JPEG2000", no_jp2=True),
        "jpeg 2000 grey": encode(RGB, "JPEG2000", mode="L"),
        "avif": encode(RGB, "AVIF"),
        "tga": encode(RGB, "TGA"),
        "pcx": encode(RGB, "PCX"),
        "ico": encode(RGB, "ICO"),
        "svg": b"<svg xmlns='http://www.w3.org/2000/svg' width='56' height='40'/>",
        "html": b"<!DOCTYPE html><html><body>404 not found</body></html>",
        "empty": b"",
        "zeros": bytes(5000),
    }


# What the two usual decoders make of a file.


def by_pillow(data: bytes) -> np.ndarray | None:
    """RGB pixels by Pillow, or None."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of EXIF and palettes
        try:
            return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
        except Exception:
            return None


def by_opencv(data: bytes) -> np.ndarray | None:
    """RGB pixels by OpenCV, or None."""
    try:
        flags = cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION
        image = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except cv2.error:
        return None
    return None if image is None else cv2.cvtColor(image, cv2.COLOR_BGR2RGB)
