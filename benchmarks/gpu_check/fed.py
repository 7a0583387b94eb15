"""The training step fed from JPEG files, beside the files alone and the step alone."""

import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax

from benchmarks import input as reading
from benchmarks.gpu_check.speed import Side
from bn_jax.data import folder, pipeline
from bn_jax.data.distort import Augmentation

FILES = 64  # different pictures, of 500 x 375 px; a class has 8


def write_pictures(place: pathlib.Path, copies: int) -> None:
    """Made-up photographs as train/CLASS/*.jpg and val/CLASS/*.jpg, `copies` links of each."""
    for number, content in enumerate(reading.made_up(FILES)):
        for split, times in (("train", copies), ("val", 1)):
            target = place / split / f"class_{number // 8}"
            target.mkdir(parents=True, exist_ok=True)
            first = target / f"{number}.jpg"
            first.write_bytes(content)
            for copy in range(1, times):
                (target / f"{number}_{copy}.jpg").hardlink_to(first)


def measure(side: Side, place: pathlib.Path, size: int, until: float) -> dict[str, Any]:
    """Images/s of the files alone, of the step alone, and of the step that takes its batches.

    Random crops, mirrored and distorted as BN-x30 has them. The batches of a run of training are
    prepared by a thread for each core while the step runs.
    """
    copies = max(2, 2 * side.images // FILES)
    write_pictures(place, copies)
    augmentation = Augmentation(size, crop=0.08, mirror=True, distortion=0.5)
    source = folder.source(str(place))
    data = pipeline.Data(source, augmentation, shuffle="within_shard")

    def batches() -> Any:
        return data.train(0, 10**6, side.images, slice(0, side.images), seed=0)

    third = max(0.5, (until - time.monotonic()) / 3.5)
    read = batches()
    files = _rate(read.__next__, side.images, third)
    del read

    step = _rate(lambda: side.take(1), side.images, third)

    feed = batches()
    _, *numbers = side.rest
    pending: list[Any] = []

    def take_fed() -> None:
        batch = jax.device_put(next(feed))
        side.state, metrics = side.program(side.state, batch, *numbers)
        pending.append(metrics)
        if len(pending) > 1:
            jax.block_until_ready(pending.pop(0))  # of the step before: this one runs meanwhile

    fed = _rate(take_fed, side.images, third)
    return {"files": files, "step": step, "fed": fed, "pictures": copies * FILES}


def _rate(call: Callable[[], Any], images: int, seconds: float) -> float:
    """Images/s over some seconds. Calls of the first fifth do not count: batches were ready."""
    start = time.monotonic()
    while time.monotonic() < start + seconds / 5:
        call()

    begun = time.perf_counter()
    count = 0
    while count < 2 or time.monotonic() < start + seconds:
        call()
        count += 1
    return count * images / (time.perf_counter() - begun)


def rows(result: dict[str, Any]) -> list[list[str]]:
    """The rows of the table."""
    return [
        ["crops of JPEG files alone", f"{result['files']:,.0f} images/s"],
        ["the step alone", f"{result['step']:,.0f} images/s"],
        ["the step fed from JPEG files", f"{result['fed']:,.0f} images/s"],
    ]
