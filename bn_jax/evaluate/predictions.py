"""Scores class probabilities of a split, averages them over networks, and saves them.

Files are .npz (without pickles) or .csv. Both hold float32 probabilities without loss, true labels,
and a line of JSON that says which networks, data and crops they come from.
"""

import csv
import io
import json
import pathlib
import zipfile
import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from bn_jax import step
from bn_jax.errors import ConfigError, DataError
from bn_jax.uncertainty import counted, paired_bootstrap
from bn_jax.workdir import files

# What predictions must share to be averaged.
SAME = ("data", "split", "holdout", "class_names", "crops", "views", "statistics")


class Predictions(NamedTuple):
    """Class probabilities of N examples.

    Attributes:
      probabilities: float32 [N, K].
      labels: int32 [N], the true classes.
      about: plain JSON with the fields of SAME, `description` (of the data), `image_size`,
        `examples`, and `members`, with an entry for each network.
    """

    probabilities: np.ndarray
    labels: np.ndarray
    about: dict[str, Any]


def scores(found: Predictions) -> dict[str, Any]:
    """Returns `top1`, `top5` (shares), `cross_entropy` (mean, in nats) and `examples`.

    Ties go to the lower class, and a row that is not finite counts as wrong (`step.label_rank`).
    """
    p = found.probabilities
    labels = found.labels
    rank = ranks(found)
    with np.errstate(divide="ignore"):
        losses = -np.log(p[np.arange(len(p)), labels].astype(np.float64))
    return {
        "top1": float(np.mean(rank < 1)),
        "top5": float(np.mean(rank < 5)),
        "cross_entropy": float(np.mean(losses)),
        "examples": len(labels),
    }


def ranks(found: Predictions) -> np.ndarray:
    """Returns how many classes are ranked above the true one, int32 [N]; 0 is right."""
    return np.asarray(step.label_rank(jnp.asarray(found.probabilities), jnp.asarray(found.labels)))


def gain(whole: Predictions, parts: Sequence[Predictions]) -> dict[str, Any]:
    """Returns the accuracy of a mean of networks minus the mean accuracy of its parts.

    Returns `top1` (a share), the ends `low` and `high` of its 95% interval, and how the interval
    was made: by a bootstrap of the images, paired because all networks see the same images. It
    holds for other images, not for other networks.
    """
    alone = np.mean([ranks(part) < 1 for part in parts], axis=0)
    gains = (ranks(whole) < 1) - alone
    draws = 10_000
    low, high = paired_bootstrap(gains, draws=draws, seed=0)
    return {"top1": float(np.mean(gains)), "low": low, "high": high, "draws": draws, "seed": 0}


def mean(parts: Sequence[Predictions]) -> Predictions:
    """Averages class probabilities over all networks (section 4.2.3), in float32.

    A part that is itself a mean of k networks has the weight k. Raises ConfigError if the
    parts are not predictions for the same examples, or if a network occurs twice.
    """
    first = parts[0]
    for other in parts[1:]:
        require_same(first.about, other.about)
        if not np.array_equal(first.labels, other.labels):
            raise ConfigError(
                f"{who(first.about)} and {who(other.about)} were not evaluated on the same "
                "examples: their true labels differ"
            )
    members = [member for part in parts for member in part.about["members"]]
    if len(parts) == 1:
        return first
    keys = [member["checkpoint"] for member in members]
    twice = [m["workdir"] for m in members if keys.count(m["checkpoint"]) > 1]
    if twice:
        raise ConfigError(
            f"{' and '.join(twice)} are the same network (step and weights): name it once"
        )
    total = np.zeros_like(first.probabilities)
    for part in parts:
        total += np.float32(len(part.about["members"])) * part.probabilities
    total /= np.float32(len(members))
    return Predictions(total, first.labels, {**first.about, "members": members})


def require_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Raises ConfigError if predictions with these `about` cannot be averaged."""
    for field in SAME:
        if one[field] != other[field]:
            a = one[field]
            b = other[field]
            if field == "class_names" and len(a) != len(b):
                field = "classes"
                a = len(a)
                b = len(b)
            raise ConfigError(
                f"{who(one)} and {who(other)} cannot be averaged: {field} differs "
                f"({_short(a)}, {_short(b)})"
            )


def checkpoint_name(member: dict[str, Any]) -> str:
    """Says which checkpoint a member is, such as 'newest checkpoint, step 1,200'.

    Older records do not say whether it was the newest or the best.
    """
    which = f"{member['which']} checkpoint, " if "which" in member else ""
    return f"{which}step {member['step']:,}"


def who(about: dict[str, Any]) -> str:
    """Names the workdirs behind predictions."""
    return ", ".join(str(member["workdir"]) for member in about["members"])


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def check_path(path: pathlib.Path) -> None:
    """Raises ConfigError unless predictions can be saved under this name."""
    if path.suffix not in (".npz", ".csv"):
        raise ConfigError(f"predictions {path}: the name must end with .npz or .csv")
    if not path.parent.is_dir():
        raise ConfigError(f"predictions {path}: the folder {path.parent} does not exist")


def save(path: pathlib.Path, found: Predictions) -> None:
    """Writes predictions as .npz or .csv. Raises DiskError."""
    about = json.dumps(found.about)
    if path.suffix == ".npz":
        packed = io.BytesIO()
        np.savez_compressed(
            packed,
            probabilities=found.probabilities,
            labels=found.labels,
            about=np.frombuffer(about.encode(), np.uint8),
        )
        files.write_atomic(path, packed.getvalue())
        return
    text = io.StringIO()
    text.write(f"# {about}\n")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["example", "label", *(f"p{k}" for k in range(found.probabilities.shape[1]))])
    for k, (label, row) in enumerate(zip(found.labels, found.probabilities, strict=True)):
        writer.writerow([k, label, *row.tolist()])  # as float64, which reads back the same bits
    files.write_atomic(path, text.getvalue().encode())


def load(path: pathlib.Path) -> Predictions:
    """Reads what `save` wrote. Raises ConfigError if it is absent, DataError if damaged."""
    if path.suffix not in (".npz", ".csv") or not path.is_file():
        raise ConfigError(f"{path} is not a file of predictions (.npz or .csv)")
    try:
        found = _from_npz(path) if path.suffix == ".npz" else _from_csv(path)
        p, labels, about = found
        whole = p.ndim == 2 and labels.shape == (len(p),) and len(p) > 0
        if not whole or p.dtype != np.float32 or not about["members"]:
            raise ValueError("shapes or types are wrong")
        if not 0 <= labels.min() <= labels.max() < p.shape[1]:
            raise ValueError("a label is out of range")
        if {*SAME, "description", "image_size", "examples"} - about.keys():
            raise ValueError("its origin is incomplete")
        if len(p) != about["examples"]:
            raise ValueError(f"{len(p)} rows, but {about['examples']} were written")
    except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
        raise DataError(f"predictions {path} are damaged ({error}): save them again") from None
    except (zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"predictions {path} are damaged ({error}): save them again") from None
    return found


def _from_npz(path: pathlib.Path) -> Predictions:
    with np.load(path, allow_pickle=False) as file:
        about = json.loads(file["about"].tobytes())
        return Predictions(file["probabilities"], file["labels"], about)


def _from_csv(path: pathlib.Path) -> Predictions:
    first, _, rest = path.read_text().partition("\n")
    rows = list(csv.reader(rest.splitlines()))[1:]
    if [int(row[0]) for row in rows] != list(range(len(rows))):
        raise ValueError("rows are missing")
    labels = np.array([row[1] for row in rows]).astype(np.int32)
    about = json.loads(first.removeprefix("#"))
    return Predictions(np.array([row[2:] for row in rows]).astype(np.float32), labels, about)


# What an evaluation prints: errors with counts and intervals, and the ensemble's gain.


def errors(scores: dict[str, Any]) -> str:
    """Gives errors as in Fig. 4, each with its count and the 95% interval of the count."""
    n = scores["examples"]
    said = []
    for name, share in (("top-1", 1 - scores["top1"]), ("top-5", 1 - scores["top5"])):
        said.append(f"{name} error {counted(share, n)}, {round(share * n):,}")
    return f"{'; '.join(said)} of {n:,} examples"


def show(parts: Sequence[Predictions]) -> dict[str, Any]:
    """Prints each part's errors and those of their mean. Returns the line of evaluations.jsonl.

    Raises ConfigError if the parts cannot be averaged.
    """
    whole = mean(parts)
    scored = [scores(part) for part in parts]
    result = scores(whole)
    seen = f"{whole.about['views']} views" if whole.about["views"] > 1 else "single crop"
    print(f"{whole.about['split']} split, {seen}, {whole.about['statistics']} statistics")
    if len(parts) > 1:
        for part, one in zip(parts, scored, strict=True):
            names = ", ".join(checkpoint_name(member) for member in part.about["members"])
            print(f"  {who(part.about)}, {names}: {errors(one)}")
        gained = gain(whole, parts)
        on_best = result["top1"] - max(one["top1"] for one in scored)
        print(f"mean of {len(whole.about['members'])} networks: {errors(result)}")
        print(
            f"gain in top-1: {100 * gained['top1']:+.2f} points on the members' mean (95%: "
            f"{100 * gained['low']:+.2f} to {100 * gained['high']:+.2f}, bootstrap of the images), "
            f"{100 * on_best:+.2f} on the best of them"
        )
    else:
        names = ", ".join(checkpoint_name(member) for member in whole.about["members"])
        print(f"{names}: {errors(result)}")
    print(whole.about["description"])
    line = {"kind": "evaluation", **result, **whole.about}
    del line["class_names"]
    if len(parts) > 1:
        return line | {"member_scores": scored, "gain": gained}
    return line | {"member_scores": []}
