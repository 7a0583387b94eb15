"""The accelerator's name, and how fast its memory is: what stands beside every figure."""

import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def measure(*, smoke: bool) -> dict[str, Any]:
    """Name, and bytes/s of a large copy in the device's memory, read and written both counted.

    The copy flips bits of random numbers, so that no byte is left out. Median of 10.
    """
    device = jax.devices()[0]
    count = 2**22 if smoke else 2**30  # of 4 bytes each
    block = np.random.default_rng(0).integers(0, 2**32, 2**20, dtype=np.uint32)
    numbers = jnp.tile(jnp.asarray(block), count // len(block))
    copy = jax.jit(lambda x: x ^ jnp.uint32(0x5A5A5A5A))
    copy(numbers).block_until_ready()

    seconds = []
    for _ in range(10):
        start = time.perf_counter()
        copy(numbers).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return {
        "name": device.device_kind,
        "platform": device.platform,
        "bytes_a_second": 2 * numbers.nbytes / statistics.median(seconds),
        "copied_bytes": numbers.nbytes,
    }
