"""CRC-32C (Castagnoli, RFC 3720 appendix B.4), the checksum of TFRecord files, in NumPy.

The register is linear over GF(2), so a message need not be walked byte by byte: neighbouring words
are joined in a tree, each left word being advanced over the zeros that its right neighbour
occupies.
"""

import functools

import numpy as np

_POLYNOMIAL = 0x82F63B78  # reflected
_MASK_DELTA = 0xA282EAD8  # of TFRecord's masked checksum (tensorflow/core/lib/hash/crc32c.h)


def _byte_table() -> np.ndarray:
    """uint32 [256]: the register after one more zero byte, for each low byte."""
    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = (table >> 1) ^ np.where(table & 1, np.uint32(_POLYNOMIAL), np.uint32(0))
    return table


@functools.cache
def _advance(level: int) -> np.ndarray:
    """uint32 [2, 65536]: the register after 2**level words of zeros, by its low and its high
    half."""
    if level:
        once = _advance(level - 1)
        return once[0][once & 0xFFFF] ^ once[1][once >> 16]
    half = np.arange(65536, dtype=np.uint32)
    table, byte = np.stack([half, half << 16]), _byte_table()
    for _ in range(4):
        table = (table >> 8) ^ byte[table & 0xFF]
    return table


def crc32c(data: bytes | memoryview) -> int:
    """The checksum of some bytes."""
    n = len(data)
    if n < 4:
        return _short(bytes(data))
    padded = np.zeros(-(-n // 4) * 4, np.uint8)
    padded[-n:] = np.frombuffer(data, np.uint8)
    padded[-n : len(padded) - n + 4] ^= 0xFF  # the register starts with all ones
    words = padded.view("<u4")
    level = 0
    while len(words) > 1:
        if len(words) % 2:
            words = np.concatenate([np.zeros(1, np.uint32), words])
        left, table = words[::2], _advance(level)
        words = table[0].take(left & 0xFFFF) ^ table[1].take(left >> 16) ^ words[1::2]
        level += 1
    table = _advance(0)
    word = int(words[0])
    return int(table[0][word & 0xFFFF] ^ table[1][word >> 16]) ^ 0xFFFFFFFF


def _short(data: bytes) -> int:
    table, register = _byte_table(), 0xFFFFFFFF
    for byte in data:
        register = (register >> 8) ^ int(table[(register ^ byte) & 0xFF])
    return register ^ 0xFFFFFFFF


def masked(data: bytes | memoryview) -> int:
    """The checksum as TFRecord files store it."""
    crc = crc32c(data)
    return (((crc >> 15) | (crc << 17)) + _MASK_DELTA) & 0xFFFFFFFF


def masked_pairs(words: np.ndarray) -> np.ndarray:
    """uint32 [n]: `masked` of each row of uint32 [n, 2] (8 bytes), many at a time."""
    low, high = _advance(0)
    register = words[:, 0] ^ np.uint32(0xFFFFFFFF)
    for place in (0, 1):
        if place:
            register = register ^ words[:, 1]
        register = low[register & 0xFFFF] ^ high[register >> 16]
    register = register ^ np.uint32(0xFFFFFFFF)
    return ((register >> 15) | (register << 17)) + np.uint32(_MASK_DELTA)
