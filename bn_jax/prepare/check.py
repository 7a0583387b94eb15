"""Checks a data set: reads and decodes every record, and ends with a verdict."""

import concurrent.futures
import hashlib
import pathlib
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice

import numpy as np

from bn_jax.data import decode, folder, tfds
from bn_jax.data.load import BadRecordError, Readable, Record, checked_label
from bn_jax.errors import ConfigError, DataError, printable, reading
from bn_jax.prepare import imagenet

_SHOWN = 10  # problems of each split that are printed
_CHUNK = 64  # records that a thread takes at a time
_UNLABELLED = -1  # the label of all records of a split that has no labels


@dataclass
class Report:
    """The findings in one split."""

    labels: Counter = field(default_factory=Counter)
    kinds: Counter = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    doubtful: list[str] = field(default_factory=list)
    digests: dict[bytes, str] = field(default_factory=dict)
    duplicates: list[str] = field(default_factory=list)
    sides: list[int] = field(default_factory=list)
    examples: int = 0
    decoded: int = 0

    @property
    def is_unlabelled(self) -> bool:
        """Whether no record has a label, as in the test split of TFDS' imagenet2012."""
        return self.examples > 0 and self.labels[_UNLABELLED] == self.examples


@dataclass
class Part:
    """One split to be checked.

    Attributes:
      expected: how many records it should have, if that is known.
      problems: what is wrong with its shards.
      skipped: files in its folder that are not pictures.
    """

    name: str
    records: Readable
    classes: int
    expected: int | None = None
    problems: list[str] = field(default_factory=list)
    skipped: int = 0


def check(directory: pathlib.Path, name: str, *, threads: int) -> None:
    """Prints what is in a set and whether it can be used.

    Duplicates are printed but do not count as problems, nor does a split without any labels. A JPEG
    that libjpeg decodes with a warning is printed and counted as doubtful. Raises ConfigError if
    there is no set, and DataError, with the number of problems, if it is damaged or incomplete.
    """
    problems = 0
    doubtful = 0
    seen: dict[bytes, str] = {}
    with reading(directory):
        parts = list(_parts(directory, name))
    for part in parts:
        began = time.perf_counter()
        report = _examine(part, threads)
        seconds = time.perf_counter() - began
        _judge(part, report)
        _print(part, report, seconds)

        across = [f"{report.digests[d]} = {seen[d]}" for d in report.digests.keys() & seen.keys()]
        if across:
            print(f"  {len(across)} also in another split, such as {across[0]}")
        seen |= report.digests
        problems += len(report.problems)
        doubtful += len(report.doubtful)
    shown = printable(directory)
    if problems:
        raise DataError(f"verdict: {shown} is NOT sound, {problems} problems (see above)")
    if doubtful:
        print(
            f"verdict: {shown} is sound but for {doubtful} doubtful pictures (see above): they are "
            "decoded, and their pixels may be wrong"
        )
    else:
        print(f"verdict: {shown} is sound")


def _parts(directory: pathlib.Path, name: str) -> Iterator[Part]:
    """Yields the splits of a TFDS set or a folder of pictures, with the readable records."""
    found = tfds.find(name, str(directory))
    if found is None:
        if not (directory / "train").is_dir():
            raise ConfigError(
                f"{directory} holds neither the TFDS set {name!r} (--name) nor pictures in "
                "train/CLASS/*"
            )
        train, evaluation = folder.open_splits(directory)
        yield Part("train", train, train.num_classes, skipped=train.skipped)
        yield Part("evaluation", evaluation, train.num_classes, skipped=evaluation.skipped)
        return

    meta = tfds.metadata(found)
    for split, files in meta.splits.items():
        shards = []
        damaged = []
        for file in files:
            try:
                shards.append(tfds.open_split(tfds.only(meta, split, [file]), split))
            except DataError as e:
                damaged.append(str(e))
        expected = sum(length for _, length in files)
        if meta.name == imagenet.NAME and split in imagenet.COUNTS:
            expected = imagenet.COUNTS[split]
        yield Part(split, Joined(shards), meta.num_classes, expected, damaged)


def _judge(part: Part, report: Report) -> None:
    """Adds to a split's problems what is wrong with it as a whole."""
    report.problems[:0] = part.problems
    if part.expected is not None and report.examples != part.expected:
        report.problems.append(f"{report.examples:,} readable images, {part.expected:,} expected")
    without = report.labels[_UNLABELLED]
    if without and not report.is_unlabelled:
        report.problems.append(f"{without:,} of {report.examples:,} records have no label (-1)")


class Joined:
    """The records of the shards that could be opened."""

    def __init__(self, parts: list[tfds.Shards]):
        self.parts = parts
        self.starts = np.cumsum([0] + [len(p) for p in parts])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, index: int) -> Record:
        part = int(np.searchsorted(self.starts, index, side="right")) - 1
        return self.parts[part][index - int(self.starts[part])]


def _examine(part: Part, threads: int) -> Report:
    """Reads and decodes all records, a bounded number at a time."""
    report = Report()
    count = len(part.records)
    ranges = iter(range(k, min(k + _CHUNK, count)) for k in range(0, count, _CHUNK))
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:

        def start(more: int) -> set[concurrent.futures.Future[list[Checked]]]:
            """Starts up to `more` jobs."""
            return {
                pool.submit(_check_records, part.records, indices, part.classes)
                for indices in islice(ranges, more)
            }

        jobs = start(2 * threads)
        while jobs:
            done, jobs = concurrent.futures.wait(jobs, return_when="FIRST_COMPLETED")
            jobs |= start(len(done))
            for job in done:
                for checked in job.result():
                    _add(report, checked)
    return report


@dataclass
class Checked:
    """The findings about one record.

    Without a problem, `problem` is empty. A record that cannot be read has no label, header and
    digest. `warnings` are the decoder's.
    """

    name: str
    problem: str = ""
    warnings: list[str] = field(default_factory=list)
    label: int | None = None
    header: decode.Frame | None = None
    digest: bytes = b""


def _check_records(records: Readable, indices: range, classes: int) -> list[Checked]:
    """Reads and decodes some records."""
    return [_check_record(records, index, classes) for index in indices]


def _check_record(records: Readable, index: int, classes: int) -> Checked:
    try:
        record = records[index]
    except BadRecordError as e:
        return Checked(e.name, e.reason)

    digest = hashlib.blake2b(record.data, digest_size=16).digest()
    checked = Checked(record.name, label=record.label, digest=digest)
    try:
        if record.label != _UNLABELLED:  # that is judged when all records are known
            checked_label(record, classes)
        checked.header = decode.frame(record.data)
        decode.pixels(record.data, checked.header, warnings=checked.warnings)
    except (DataError, decode.BadImageError) as e:
        checked.problem = str(e)
    return checked


def _add(report: Report, checked: Checked) -> None:
    """Counts one record."""
    name = checked.name
    if checked.problem:
        said = checked.problem if name in checked.problem else f"{name}: {checked.problem}"
        report.problems.append(said)
    elif checked.warnings:
        report.doubtful.append(f"{name}: {checked.warnings[0]}")
    if checked.label is None:
        return

    report.examples += 1
    report.decoded += not checked.problem
    report.labels[checked.label] += 1
    if checked.digest in report.digests:
        report.duplicates.append(f"{name} = {report.digests[checked.digest]}")
    report.digests.setdefault(checked.digest, name)
    if checked.header:
        colours = {1: ", grey", 4: ", CMYK"}.get(checked.header.components, "")
        report.kinds[checked.header.kind + colours] += 1
        report.sides.append(min(checked.header.height, checked.header.width))


def _print(part: Part, report: Report, seconds: float) -> None:
    rate = report.examples / max(seconds, 1e-9)
    print(
        f"{part.name}: {report.examples:,} images read, {report.decoded:,} decoded, {rate:,.0f}/s"
    )
    if part.skipped:
        print(f"  {part.skipped:,} other files skipped")
    if report.is_unlabelled:
        print("  labels: none (-1)")
    else:
        _print_labels([report.labels[k] for k in range(part.classes)])
    kinds = ", ".join(f"{n:,} {kind}" for kind, n in report.kinds.most_common())
    sides = f"; shorter sides {min(report.sides)} to {max(report.sides)}" if report.sides else ""
    print(f"  kinds: {kinds}{sides}")
    if report.duplicates:
        print(f"  {len(report.duplicates)} duplicates, such as {report.duplicates[0]}")
    for warning in report.doubtful[:_SHOWN]:
        print(f"  DOUBTFUL: {warning}")
    if len(report.doubtful) > _SHOWN:
        print(f"  ... and {len(report.doubtful) - _SHOWN} more that are doubtful")
    for problem in report.problems[:_SHOWN]:
        print(f"  PROBLEM: {problem}")
    if len(report.problems) > _SHOWN:
        print(f"  ... and {len(report.problems) - _SHOWN} more")


def _print_labels(counts: list[int]) -> None:
    """Prints how many images the classes have."""
    print(
        f"  labels: {sum(n > 0 for n in counts)} of {len(counts)} classes have images, "
        f"{min(counts, default=0)} to {max(counts, default=0)} each"
    )
    if max(counts, default=0):
        print(f"  histogram: {_histogram(counts)}")


def _histogram(counts: list[int]) -> str:
    """Says how many classes have how many images, in at most eight bins."""
    heights, edges = np.histogram(counts, bins=min(8, max(counts) - min(counts) + 1))
    return ", ".join(
        f"{n} classes with {int(np.ceil(a))}-{int(np.floor(b))}"
        for n, a, b in zip(heights, edges, edges[1:], strict=False)
        if n
    )
