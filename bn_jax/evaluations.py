"""What evaluations were made of a run: WORKDIR/evaluations.jsonl, a JSON object a line.

Separate from metrics.jsonl, whose lines come from training alone and are the same at every resume.
"""

import datetime
import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from bn_jax import disk, jsonl, shelf
from bn_jax.errors import DiskError

NAME = "evaluations.jsonl"
FIELDS = frozenset(
    (
        "time",
        "members",
        "member_scores",
        "crops",
        "views",
        "statistics",
        "top1",
        "top5",
        "cross_entropy",
        "examples",
        "data",
        "description",
        "split",
        "holdout",
        "image_size",
    )
)


def append(folder: pathlib.Path, line: Mapping[str, Any]) -> None:
    """Adds a line and its `time` (UTC); where the disk cannot be written, stderr says so."""
    path = folder / NAME
    now = datetime.datetime.now(datetime.UTC).isoformat()
    data = json.dumps(jsonl.plain({"time": now, **line})).encode() + b"\n"
    try:
        with disk.reported(path, "cannot write"), path.open("ab+") as file:
            if file.tell():
                file.seek(-1, 2)
                if file.read() != b"\n":  # a line that was cut off stays apart, and is skipped
                    data = b"\n" + data
            file.write(data)
    except DiskError as error:
        shelf.say(f"evaluation not recorded: {error}")


def read(folder: pathlib.Path) -> Iterator[dict[str, Any]]:
    """The lines of one folder; damaged ones are skipped and said."""
    path = folder / NAME
    for number, text in enumerate(path.read_text(errors="replace").splitlines(), start=1):
        try:
            line = json.loads(text)
            whole = line.keys() >= FIELDS
        except (ValueError, AttributeError):
            whole = False
        if whole:
            yield line
        elif text:
            shelf.say(f"{path}: line {number} is damaged and skipped")


def find(folder: pathlib.Path) -> list[pathlib.Path]:
    """The folders below `folder`, itself included, that hold evaluations."""
    return sorted(path.parent for path in folder.rglob(NAME))
