"""Lines of JSON that survive a kill: what may be a value, and which lines are kept at a restart."""

import json
import math
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from bn_jax import disk


def truncate(path: pathlib.Path, last: int | None) -> list[str]:
    """Drops torn lines and, given `last`, lines of later steps; returns what there is to say."""
    if not path.exists():
        return []
    data = path.read_bytes()
    kept, torn = [], 0
    for line in data.splitlines(keepends=True):
        try:
            step = json.loads(line)["step"]
            whole = line.endswith(b"\n")
        except (ValueError, TypeError, KeyError):
            whole = False
        if not whole:
            torn += 1
        elif last is None or step <= last:
            kept.append(line)
    if b"".join(kept) != data:
        disk.write_atomic(path, b"".join(kept))
    return [f"{path}: dropped {torn} damaged line(s)"] if torn else []


def plain(value: Any) -> Any:
    """JSON's numbers, strings and lists; a float's repr round-trips, float32 through float64."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, (str, bool, int)) or value is None:
        return value
    if not isinstance(value, float):
        return plain(np.asarray(value).tolist())
    return value if math.isfinite(value) else str(value)
