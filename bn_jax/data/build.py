"""Writes the shards of a prepared ImageNet: resumable, each shard whole or absent, metadata last.

The folder becomes a data set at the moment its dataset_info.json appears.
"""

import concurrent.futures
import hashlib
import os
import pathlib
import shutil
import sys
import threading
import time
from dataclasses import dataclass

from bn_jax.data import imagenet
from bn_jax.errors import ConfigError, DataError, DiskError

_OVERHEAD = 1.02  # ArrayRecord files against the pictures in them (measured 1.002 to 1.01)
_PLAN = "plan.sha256"  # of the tars' content as listed: shards of other tars are not mixed in


@dataclass(frozen=True)
class Shard:
    """One file to write."""

    path: pathlib.Path
    tar: pathlib.Path
    split: str
    images: list[imagenet.Image]


def build(
    tars: pathlib.Path, data_dir: pathlib.Path, *, partial: bool, threads: int
) -> pathlib.Path:
    """Prepares both splits; returns the set's folder. Shards that are there already are kept.

    Raises ConfigError (no tars, or another set in the folder), DataError (tars damaged or
    incomplete), DiskError (too little space).
    """
    folder = data_dir / imagenet.NAME / imagenet.VERSION
    shards, digest = _plan(tars, folder, partial)
    plan = folder / _PLAN
    finished = (folder / "dataset_info.json").is_file()
    if (finished or plan.is_file()) and not (plan.is_file() and plan.read_text() == digest):
        raise ConfigError(
            f"{folder} holds a set of other tars: choose another --data_dir or remove it"
        )
    if finished:
        print(f"{folder} is complete already")
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    plan.write_text(digest)
    for left in folder.glob("*.part"):
        left.unlink()
    todo = [s for s in shards if not s.path.exists()]
    _check_space(folder, todo)
    progress = Progress(sum(len(s.images) for s in todo))
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        jobs = [pool.submit(_write, shard, progress) for shard in todo]
        try:
            for job in concurrent.futures.as_completed(jobs):
                job.result()
        except BaseException:
            progress.stopped = True
            pool.shutdown(cancel_futures=True)
            raise
    _finish(folder, shards)
    return folder


def _plan(tars: pathlib.Path, folder: pathlib.Path, partial: bool) -> tuple[list[Shard], str]:
    """All shards to write and a digest of what they will hold."""
    # Imported here: half a second. TFDS' own rules for the number and the bounds of shards.
    from tensorflow_datasets.core.utils import shard_utils

    shards, digest = [], hashlib.sha256()
    for split, file in imagenet.TARS.items():
        tar = tars / file
        if not tar.is_file():
            raise ConfigError(f"no {tar}: --tars must hold {' and '.join(imagenet.TARS.values())}")
        print(f"listing {tar}", flush=True)
        images = imagenet.list_images(split, tar)
        imagenet.check_complete(split, images, tar, partial)
        digest.update(repr((split, [(i.name, i.size, i.label) for i in images])).encode())
        total = sum(image.serialized_size for image in images)
        count = shard_utils.ShardConfig.calculate_number_shards(total, len(images))
        start = 0
        for k, stop in enumerate(shard_utils.get_shard_boundaries(len(images), count)):
            name = f"{imagenet.NAME}-{split}.array_record-{k:05d}-of-{count:05d}"
            shards.append(Shard(folder / name, tar, split, images[start:stop]))
            start = stop
    return shards, digest.hexdigest()


def _check_space(folder: pathlib.Path, todo: list[Shard]) -> None:
    need = int(_OVERHEAD * sum(i.size for s in todo for i in s.images))
    free = shutil.disk_usage(folder).free
    if need > free:
        raise DiskError(
            f"{folder} needs {need / 2**30:.1f} GiB and its disk has {free / 2**30:.1f} GiB free: "
            "make room or choose another --data_dir"
        )


def _write(shard: Shard, progress: "Progress") -> None:
    """Writes one shard under another name and renames it when it is whole and on the disk."""
    from array_record.python import array_record_module

    part = shard.path.with_name(shard.path.name + ".part")
    descriptor = os.open(shard.tar, os.O_RDONLY)
    # One record a chunk, as TFDS: random access then reads one record only.
    writer = array_record_module.ArrayRecordWriter(str(part), "group_size:1")
    try:
        for image in shard.images:
            if progress.stopped:
                raise DataError("preparation was stopped")
            writer.write(imagenet.record(descriptor, image))
            progress.add(1)
    except OSError as e:
        raise DiskError(f"{part} cannot be written: {e}; the same command resumes") from None
    finally:
        os.close(descriptor)
        writer.close()
    with part.open("rb+") as f:
        os.fsync(f.fileno())
    part.replace(shard.path)


def _finish(folder: pathlib.Path, shards: list[Shard]) -> None:
    """Counts every shard's records once more and writes the metadata, dataset_info.json last."""
    from array_record.python import array_record_module

    splits: dict[str, dict] = {}
    for shard in shards:
        reader = array_record_module.ArrayRecordReader(str(shard.path))
        if reader.num_records() != len(shard.images):
            raise DataError(
                f"{shard.path} holds {reader.num_records()} records, {len(shard.images)} were "
                "written: remove it and run the command again"
            )
        reader.close()
        entry = splits.setdefault(
            shard.split, {"name": shard.split, "numBytes": "0", "shardLengths": []}
        )
        entry["shardLengths"].append(str(len(shard.images)))
        entry["numBytes"] = str(
            int(entry["numBytes"]) + sum(i.serialized_size for i in shard.images)
        )
    (folder / "label.labels.txt").write_text("\n".join(imagenet.label_files()[0]) + "\n")
    (folder / "features.json").write_text(imagenet.dump(imagenet.features()))
    part = folder / "dataset_info.json.part"
    part.write_text(imagenet.dump(imagenet.dataset_info(list(splits.values()))))
    part.replace(folder / "dataset_info.json")


class Progress:
    """A line with images, images/s and the time left: on a terminal in place, else every 10 s."""

    def __init__(self, total: int):
        self.total, self.done, self.stopped = total, 0, False
        self._began = self._shown = time.monotonic()
        self._every = 0.2 if sys.stderr.isatty() else 10.0
        self._lock = threading.Lock()

    def add(self, n: int) -> None:
        """Counts images; shows the line when it is due, and at the end."""
        with self._lock:
            self.done += n
            now = time.monotonic()
            if now - self._shown < self._every and self.done < self.total:
                return
            self._shown = now
            rate = self.done / max(now - self._began, 1e-9)
            left = (self.total - self.done) / rate
            end = "\n" if self.done == self.total or not sys.stderr.isatty() else ""
            start = "\r" if sys.stderr.isatty() else ""
            print(
                f"{start}{self.done:,} of {self.total:,} images, {rate:,.0f} images/s, "
                f"{left // 3600:.0f}:{left % 3600 // 60:02.0f}:{left % 60:02.0f} left",
                end=end,
                file=sys.stderr,
                flush=True,
            )
