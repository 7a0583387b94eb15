"""Classifies pictures: `python -m bn_jax.predict --workdir=DIR IMAGE...`.

Prints the five most probable classes of each picture with names and probabilities. The data set is
not needed: run.json has its classes, and bn_jax.evaluate has kept the population statistics beside
the checkpoint. If it has not run, give `--statistics=running`.

A picture is preprocessed as in evaluation: the network sees its centre crop, or probabilities are
averaged over 10 or 144 crops. For networks of small grey images (the digits are white on black) the
centre square is converted to grey.
"""

import json
import pathlib
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import cv2
import numpy as np

from bn_jax import errors
from bn_jax.data import decode, views
from bn_jax.distributed import cluster, startup
from bn_jax.errors import ConfigError, DataError, printable
from bn_jax.evaluate import ensemble
from bn_jax.evaluate.members import Member, add_place, load_member, workdirs
from bn_jax.experiment import build
from bn_jax.experiment.build import Experiment
from bn_jax.workdir import files

TOP = 5
_AT_ONCE = 64  # pictures that are held in memory


class Picture(NamedTuple):
    """The views of a picture: uint8 [views, H, W, C], with weights float32 [views]."""

    name: str
    image: np.ndarray
    weight: np.ndarray


def read(name: str, exp: Experiment, crops: int) -> Picture:
    """Reads a picture file and makes its views. Raises DataError, with the name, if it cannot."""
    size, _, channels = exp.data.image_shape
    mirror = exp.config.data.mirror
    warnings: list[str] = []
    try:
        data = pathlib.Path(name).read_bytes()
        if channels == 3:
            found = views.of_file(data, crops, size, mirror, warnings)
        else:
            found = views.of_array(_grey(data, size, warnings), crops, mirror)
    except OSError as error:
        raise DataError(f"{name} cannot be read: {error.strerror}") from None
    except decode.BadImageError as error:
        raise DataError(f"{name} is not a picture that can be read: {error}") from None
    if warnings:
        files.warn(f"{printable(name)}: decoded, but its pixels may be wrong: {warnings[0]}")
    return Picture(name, *found)


def _grey(data: bytes, size: int, warnings: list[str]) -> np.ndarray:
    """Returns the centre square's luminance, uint8 [size, size, 1], resized if need be."""
    pixels = decode.pixels(data, decode.frame(data), warnings=warnings)
    height, width, _ = pixels.shape
    side = min(height, width)
    top = (height - side) // 2
    left = (width - side) // 2
    square = pixels[top : top + side, left : left + side]
    grey = cv2.cvtColor(np.ascontiguousarray(square), cv2.COLOR_RGB2GRAY)
    how = cv2.INTER_AREA if side > size else cv2.INTER_LINEAR
    return cv2.resize(grey, (size, size), interpolation=how).reshape(size, size, 1)


def rows(pictures: list[Picture], size: int) -> Iterator[views.Rows]:
    """Yields batches of `size` views, as `data.views.batches` does for a split."""
    examples = []
    for place, picture in enumerate(pictures):
        example = {
            "image": picture.image,
            "weight": picture.weight,
            "label": np.zeros((), np.int32),  # it is not known
            "example": np.asarray(place),
        }
        examples.append(example)
    return views.in_batches(examples, size)


def top(probabilities: np.ndarray, names: tuple[str, ...]) -> list[dict[str, Any]]:
    """Returns the most probable classes: class, name, probability; of equals the lower first."""
    descending = np.argsort(-probabilities, kind="stable")
    found = []
    for k in descending[:TOP].tolist():
        found.append({"class": k, "name": names[k], "probability": float(probabilities[k])})
    return found


def show(name: str, found: list[dict[str, Any]], as_json: bool) -> None:
    """Prints a picture's classes as text or as one line of JSON."""
    if as_json:
        print(json.dumps({"image": name, "top": found}), flush=True)
        return
    print(name)
    for entry in found:
        print(f"  {100 * entry['probability']:6.2f}%  {entry['name']}", flush=True)


def load(run: pathlib.Path, statistics: str, data_dir: str | None = None) -> Member:
    """Loads a trained network, without its data set unless that is needed.

    Raises ConfigError for a folder without a run, CheckpointError for a run without a checkpoint.
    """
    exp = build.without_data(run, data_dir)
    try:
        return load_member(run, None, statistics, exp, say=_say)
    except ConfigError as error:  # the statistics need the data set, which is absent
        raise ConfigError(
            f"{error}; or run bn_jax.evaluate once where the data are, or use --statistics=running"
        ) from None


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _readable(names: list[str], exp: Experiment, crops: int) -> list[Picture]:
    """Reads the pictures that can be read, and says which cannot."""
    pictures = []
    for name in names:
        try:
            pictures.append(read(name, exp, crops))
        except DataError as error:
            _say(f"bn_jax: {error}")
    return pictures


def _parser() -> errors.Parser:
    parser = errors.Parser("python -m bn_jax.predict", description=__doc__)
    parser.add_argument("--workdir", required=True, help="a run; several are an ensemble")
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="pictures of any common format")
    parser.add_argument("--json", action="store_true", help="one JSON object a picture")
    parser.add_argument("--crops", type=int, default=1, help="1, 10 or 144 crops, averaged (1)")
    parser.add_argument(
        "--statistics",
        choices=("population", "running"),
        default="population",
        help="statistics of BN: Algorithm 2 over fixed training batches, or the moving average",
    )
    add_place(parser)
    return parser


def main() -> None:
    """Reads the command line and classifies the pictures."""
    args = _parser().parse_args()
    cluster.require_one_process("bn_jax.predict")
    views.check_crops(args.crops)
    startup.use_safe_sums()
    startup.use_compilation_cache()

    members = [load(run, args.statistics, args.data_dir) for run in workdirs(args.workdir)]
    exp = members[0].exp
    weight = views.total_weight(args.crops, exp.config.data.mirror)
    networks: ensemble.Networks | None = None
    unreadable = 0
    for start in range(0, len(args.images), _AT_ONCE):
        names = args.images[start : start + _AT_ONCE]
        pictures = _readable(names, exp, args.crops)
        unreadable += len(names) - len(pictures)
        if not pictures:
            continue

        if networks is None:
            needed = sum(len(picture.weight) for picture in pictures)
            limit = args.batch_size or exp.config.eval_batch_size
            networks = ensemble.Networks(members, min(needed, limit))
        found, _ = networks.average(rows(pictures, networks.size), len(pictures), weight)

        mean = np.mean(found, axis=0)
        for picture, probabilities in zip(pictures, mean, strict=True):
            show(picture.name, top(probabilities, exp.data.class_names), args.json)
    if unreadable:
        raise SystemExit(DataError.exit_code)


if __name__ == "__main__":
    errors.run_command(main)
