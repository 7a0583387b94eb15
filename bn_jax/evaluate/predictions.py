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
from collections import Counter
from collections.abc import Mapping, Sequence
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
    labels = found.labels
    examples = np.arange(len(labels))
    of_labels = found.probabilities[examples, labels].astype(np.float64)
    with np.errstate(divide="ignore"):
        losses = -np.log(of_labels)

    rank = ranks(found)
    return {
        "top1": float(np.mean(rank < 1)),
        "top5": float(np.mean(rank < 5)),
        "cross_entropy": float(np.mean(losses)),
        "examples": len(labels),
    }


def ranks(found: Predictions) -> np.ndarray:
    """Returns how many classes are ranked above the true one, int32 [N]; 0 is right."""
    probabilities = jnp.asarray(found.probabilities)
    labels = jnp.asarray(found.labels)
    rank = step.label_rank(probabilities, labels)
    return np.asarray(rank)


def gain(whole: Predictions, parts: Sequence[Predictions]) -> dict[str, Any]:
    """Returns the accuracy of a mean of networks minus the mean accuracy of its parts.

    Returns `top1` (a share), the ends `low` and `high` of its 95% interval, and how the interval
    was made: by a bootstrap of the images, paired because all networks see the same images. It
    holds for other images, not for other networks.
    """
    right_alone = np.mean([ranks(part) < 1 for part in parts], axis=0)
    right_together = ranks(whole) < 1
    gains = right_together - right_alone

    draws = 10_000
    seed = 0
    low, high = paired_bootstrap(gains, draws=draws, seed=seed)
    return {
        "top1": float(np.mean(gains)),
        "low": low,
        "high": high,
        "draws": draws,
        "seed": seed,
    }


def mean(parts: Sequence[Predictions]) -> Predictions:
    """Averages class probabilities over all networks (section 4.2.3), in float32.

    A part that is itself a mean of k networks has the weight k. Raises ConfigError if the
    parts are not predictions for the same examples, or if a network occurs twice.
    """
    first, *others = parts
    for other in others:
        require_same(first.about, other.about)
        if not np.array_equal(first.labels, other.labels):
            raise ConfigError(
                f"{who(first.about)} and {who(other.about)} were not evaluated on the same "
                "examples: their true labels differ"
            )
    if not others:
        return first

    members = [member for part in parts for member in part.about["members"]]
    _require_different(members)

    total = np.zeros_like(first.probabilities)
    for part in parts:
        weight = len(part.about["members"])
        total += np.float32(weight) * part.probabilities
    total /= np.float32(len(members))

    about = {**first.about, "members": members}
    return Predictions(total, first.labels, about)


def _require_different(members: Sequence[Mapping[str, Any]]) -> None:
    """Raises ConfigError if a network occurs twice."""
    number = Counter(member["checkpoint"] for member in members)
    twice = [member["workdir"] for member in members if number[member["checkpoint"]] > 1]
    if twice:
        raise ConfigError(
            f"{' and '.join(twice)} are the same network (step and weights): name it once"
        )


def require_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Raises ConfigError if predictions with these `about` cannot be averaged."""
    for field in SAME:
        ours = one[field]
        theirs = other[field]
        if ours == theirs:
            continue

        # Of two data sets their numbers of classes say more than the names.
        if field == "class_names" and len(ours) != len(theirs):
            field = "classes"
            ours = len(ours)
            theirs = len(theirs)
        raise ConfigError(
            f"{who(one)} and {who(other)} cannot be averaged: {field} differs "
            f"({_short(ours)}, {_short(theirs)})"
        )


def checkpoint_name(member: dict[str, Any]) -> str:
    """Says which checkpoint a member is, such as 'newest checkpoint, step 1,200'.

    Older records do not say whether it was the newest or the best.
    """
    step = f"step {member['step']:,}"
    if "which" not in member:
        return step
    return f"{member['which']} checkpoint, {step}"


def who(about: dict[str, Any]) -> str:
    """Names the workdirs behind predictions."""
    return ", ".join(str(member["workdir"]) for member in about["members"])


def _short(value: Any) -> str:
    text = str(value)
    if len(text) > 60:
        text = text[:57] + "..."
    return text


def check_path(path: pathlib.Path) -> None:
    """Raises ConfigError unless predictions can be saved under this name."""
    if path.suffix not in (".npz", ".csv"):
        raise ConfigError(f"predictions {path}: the name must end with .npz or .csv")
    if not path.parent.is_dir():
        raise ConfigError(f"predictions {path}: the folder {path.parent} does not exist")


def save(path: pathlib.Path, found: Predictions) -> None:
    """Writes predictions as .npz or .csv. Raises DiskError."""
    data = _as_npz(found) if path.suffix == ".npz" else _as_csv(found)
    files.write_atomic(path, data)


def _as_npz(found: Predictions) -> bytes:
    about = json.dumps(found.about).encode()
    packed = io.BytesIO()
    np.savez_compressed(
        packed,
        probabilities=found.probabilities,
        labels=found.labels,
        about=np.frombuffer(about, np.uint8),
    )
    return packed.getvalue()


def _as_csv(found: Predictions) -> bytes:
    classes = found.probabilities.shape[1]
    head = [f"p{k}" for k in range(classes)]

    text = io.StringIO()
    text.write(f"# {json.dumps(found.about)}\n")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["example", "label", *head])
    for k, label in enumerate(found.labels):
        row = found.probabilities[k].tolist()  # as float64, which reads back the same bits
        writer.writerow([k, label, *row])
    return text.getvalue().encode()


def load(path: pathlib.Path) -> Predictions:
    """Reads what `save` wrote. Raises ConfigError if it is absent, DataError if damaged."""
    if path.suffix not in (".npz", ".csv") or not path.is_file():
        raise ConfigError(f"{path} is not a file of predictions (.npz or .csv)")
    try:
        found = _from_npz(path) if path.suffix == ".npz" else _from_csv(path)
        _check(found)
    except _DAMAGE as error:
        raise DataError(f"predictions {path} are damaged ({error}): save them again") from None
    return found


# What reading a damaged file raises.
_DAMAGE = (
    OSError,
    EOFError,
    KeyError,
    TypeError,
    ValueError,
    zipfile.BadZipFile,
    zlib.error,
)


def _check(found: Predictions) -> None:
    """Raises ValueError unless the file was read as it was written."""
    probabilities, labels, about = found
    if {*SAME, "description", "image_size", "examples"} - about.keys():
        raise ValueError("its origin is incomplete")
    if probabilities.ndim != 2 or probabilities.dtype != np.float32 or not about["members"]:
        raise ValueError("shapes or types are wrong")

    examples, classes = probabilities.shape
    if examples == 0 or labels.shape != (examples,):
        raise ValueError("shapes or types are wrong")
    if examples != about["examples"]:
        raise ValueError(f"{examples} rows, but {about['examples']} were written")
    if labels.min() < 0 or labels.max() >= classes:
        raise ValueError("a label is out of range")


def _from_npz(path: pathlib.Path) -> Predictions:
    with np.load(path, allow_pickle=False) as file:
        about = json.loads(file["about"].tobytes())
        return Predictions(file["probabilities"], file["labels"], about)


def _from_csv(path: pathlib.Path) -> Predictions:
    first, _, rest = path.read_text().partition("\n")
    about = json.loads(first.removeprefix("#"))

    _, *rows = csv.reader(rest.splitlines())
    numbers = [int(row[0]) for row in rows]
    if numbers != list(range(len(rows))):
        raise ValueError("rows are missing")

    labels = np.array([row[1] for row in rows])
    probabilities = np.array([row[2:] for row in rows])
    return Predictions(probabilities.astype(np.float32), labels.astype(np.int32), about)


# What an evaluation prints: errors with counts and intervals, and the ensemble's gain.


def errors(scores: dict[str, Any]) -> str:
    """Gives errors as in Fig. 4, each with its count and the 95% interval of the count."""
    n = scores["examples"]
    top1 = 1 - scores["top1"]
    top5 = 1 - scores["top5"]
    return (
        f"top-1 error {counted(top1, n)}, {round(top1 * n):,}; "
        f"top-5 error {counted(top5, n)}, {round(top5 * n):,} of {n:,} examples"
    )


def show(parts: Sequence[Predictions]) -> dict[str, Any]:
    """Prints each part's errors and those of their mean. Returns the line of evaluations.jsonl.

    Raises ConfigError if the parts cannot be averaged.
    """
    whole = mean(parts)
    about = whole.about
    scored = [scores(part) for part in parts]
    result = scores(whole)

    views = about["views"]
    seen = f"{views} views" if views > 1 else "single crop"
    print(f"{about['split']} split, {seen}, {about['statistics']} statistics")

    line = {"kind": "evaluation", **result, **about, "member_scores": []}
    del line["class_names"]
    if len(parts) == 1:
        print(f"{_checkpoints(whole)}: {errors(result)}")
    else:
        for part, score in zip(parts, scored, strict=True):
            print(f"  {who(part.about)}, {_checkpoints(part)}: {errors(score)}")
        print(f"mean of {len(about['members'])} networks: {errors(result)}")

        gained = gain(whole, parts)
        best = max(score["top1"] for score in scored)
        points = {name: 100 * gained[name] for name in ("top1", "low", "high")}
        print(
            f"gain in top-1: {points['top1']:+.2f} points on the members' mean (95%: "
            f"{points['low']:+.2f} to {points['high']:+.2f}, bootstrap of the images), "
            f"{100 * (result['top1'] - best):+.2f} on the best of them"
        )
        line |= {"member_scores": scored, "gain": gained}

    print(about["description"])
    return line


def _checkpoints(part: Predictions) -> str:
    names = [checkpoint_name(member) for member in part.about["members"]]
    return ", ".join(names)
