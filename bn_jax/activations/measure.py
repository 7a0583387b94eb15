"""Activations of a run's kept checkpoints, measured afterwards and kept in the workdir.

WORKDIR/activations/STEP.npz holds a `Measured` for every path that was asked for so far. The images
are the same for all steps, so that only the network changes. A file is made again if it cannot be
read, or if it is of another checkpoint or number of images.
"""

import difflib
import fnmatch
import functools
import io
import json
import pathlib
import zipfile
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bn_jax.activations import (
    abstract_arguments,
    activations,
    by_unit,
    fixed_images,
    known_paths,
    percentiles,
)
from bn_jax.distributed import mesh
from bn_jax.errors import ConfigError
from bn_jax.experiment import build
from bn_jax.experiment.build import Experiment
from bn_jax.workdir import checkpoint, files
from bn_jax.workdir.checkpoint import Steps

FOLDER = "activations"
BINS = 64  # of a histogram, from the least to the greatest value
SATURATED = 4.0  # beyond this the slope of a sigmoid is below 0.018
_HEADER = "header"


class Measured(NamedTuple):
    """One activation at one step, over all images and positions of a fixed batch, as arrays.

    Attributes:
      percentiles: the 15th, 50th and 85th of each unit (channel), float32 [3, units].
      mean, std: of each unit, float32 [units].
      counts: the number of values, of all units, in each bin, int32 [BINS].
      edges: of the bins, which are equally wide, float32 [BINS + 1].
      dead: share of units that are never above 0, so that a ReLU never passes them.
      saturated: share of values beyond +-SATURATED, where a sigmoid is flat.
    """

    percentiles: Any
    mean: Any
    std: Any
    counts: Any
    edges: Any
    dead: Any
    saturated: Any


def summary(x: jax.Array) -> Measured:
    """Computes what is kept of an activation [N, ..., units]; it works under jit."""
    values = by_unit(x)
    low = jnp.min(values)
    high = jnp.max(values)
    # A constant activation gets bins that are wider than 0.
    above = low + jnp.maximum(jnp.abs(low), 1) * 1e-3
    high = jnp.where(high > low, high, above)

    place = jnp.floor((values - low) / (high - low) * BINS).astype(jnp.int32)
    bins = jnp.clip(place, 0, BINS - 1).ravel()
    counts = jnp.zeros(BINS, jnp.int32).at[bins].add(1)

    return Measured(
        percentiles=percentiles(values),
        mean=jnp.mean(values, axis=0),
        std=jnp.std(values, axis=0),
        counts=counts,
        edges=jnp.linspace(low, high, BINS + 1),
        dead=jnp.mean(jnp.all(values <= 0, axis=0), dtype=jnp.float32),
        saturated=jnp.mean(jnp.abs(values) > SATURATED, dtype=jnp.float32),
    )


class Observer:
    """Measures chosen activations of one run, at any of its steps.

    Args:
      exp: the run's experiment, with its data set.
      workdir: the run.
      paths: the activations to measure, out of `known_paths`.
      examples: images of the batch; a multiple of `bn.group_size` where that is given.
      out: folder of the files (WORKDIR/activations).
    """

    def __init__(
        self,
        exp: Experiment,
        workdir: pathlib.Path,
        paths: Sequence[str],
        *,
        examples: int,
        out: pathlib.Path | None = None,
    ):
        check_examples(exp, examples)
        self.exp = exp
        self.workdir = workdir
        self.paths = tuple(paths)
        self.examples = examples
        self.folder = out or workdir / FOLDER
        self._program: Any = None
        self._images: Any = None

    @property
    def memory(self) -> int:
        """Bytes that the program needs besides network and images; 0 if it was not compiled."""
        if self._program is None:
            return 0
        return self._program.memory_analysis().temp_size_in_bytes

    def at(self, step: int) -> tuple[dict[str, Measured], bool]:
        """Returns the measurements at a step, by path, and whether all were read from the file.

        Step 0 is the initial network, made from the run's seed. Raises CheckpointError for a
        checkpoint that cannot be restored, DiskError if the file cannot be written.
        """
        file = self.folder / f"{step}.npz"
        origin = self._origin(step)
        found = _load(file, origin)
        if set(self.paths) <= found.keys():
            return {path: found[path] for path in self.paths}, True

        state = build.state_at(self.exp, self.workdir, step)
        self._compile()
        if self._images is None:
            self._images = fixed_images(self.exp, self.examples)
        new = jax.device_get(self._program(state.params, state.batch_stats, self._images))
        _save(file, origin, found | new)
        return {path: new[path] for path in self.paths}, False

    def _compile(self) -> None:
        if self._program is not None:
            return

        def chosen(params, batch_stats, images):
            found = activations(self.exp, params, batch_stats, images)
            return {path: summary(found[path]) for path in self.paths}

        jitted = jax.jit(chosen, out_shardings=mesh.replicated(self.exp.mesh))
        self._program = jitted.lower(*abstract_arguments(self.exp, self.examples)).compile()

    def _origin(self, step: int) -> dict[str, Any]:
        manifest = self.workdir / "checkpoints" / str(step) / checkpoint.MANIFEST
        digest = f"seed {self.exp.config.seed}"
        if step:
            with files.readable(manifest):
                digest = checkpoint.digest(manifest.read_bytes())
        return {"step": step, "checkpoint": digest, "examples": self.examples, "bins": BINS}


def _save(file: pathlib.Path, origin: dict[str, Any], found: dict[str, Measured]) -> None:
    arrays = {_HEADER: np.frombuffer(json.dumps(origin).encode(), np.uint8)}
    for path, measured in found.items():
        for field, value in measured._asdict().items():
            arrays[f"{path}:{field}"] = np.asarray(value)

    out = io.BytesIO()
    np.savez_compressed(out, **arrays)  # type: ignore[arg-type]
    with files.reported(file, "cannot write"):
        file.parent.mkdir(parents=True, exist_ok=True)
    files.write_atomic(file, out.getvalue())


def _load(file: pathlib.Path, origin: dict[str, Any] | None) -> dict[str, Measured]:
    """Reads a file; returns {} if it is absent, damaged or of another origin (None: of any)."""
    if not file.exists():
        return {}
    try:
        with np.load(file, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
        its_origin = json.loads(arrays.pop(_HEADER).tobytes())

        found = {}
        for path in dict.fromkeys(name.rpartition(":")[0] for name in arrays):
            fields = [arrays[f"{path}:{field}"] for field in Measured._fields]
            found[path] = Measured(*fields)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        files.warn(f"{file} cannot be read ({error}); it is made again")
        return {}

    if origin is not None and its_origin != origin:
        return {}
    return found


def read(folder: pathlib.Path) -> dict[int, dict[str, Measured]]:
    """Reads all measurements in a folder (WORKDIR/activations): step -> path -> Measured."""
    steps = sorted(int(file.stem) for file in folder.glob("*.npz") if file.stem.isdecimal())
    return {step: _load(folder / f"{step}.npz", None) for step in steps}


# What the command line asks for.


def check_examples(exp: Experiment, examples: int) -> None:
    """Raises ConfigError for a number of images that does not fit the network or the data set."""
    group = exp.config.bn.group_size
    most = exp.data.num_train
    if not 2 <= examples <= most or (group and examples % group):
        whole = f", a multiple of bn.group_size={group}" if group else ""
        raise ConfigError(
            f"--examples={examples} must be a number from 2 to the {most} training examples{whole}"
        )


def choose_paths(exp: Experiment, globs: str, examples: int) -> list[str]:
    """Returns the paths that match a list of patterns, such as `inception_5b/*,dense_2`.

    A pattern matches paths or whole layers. Raises ConfigError for a pattern without a match, with
    the ten nearest names.
    """
    known = known_paths(exp, examples)
    chosen = []
    for glob in globs.split(","):
        found = [path for path in known if _matches(path, glob)]
        if not found:
            near = sorted(known, key=functools.partial(_distance, glob))[:10]
            raise ConfigError(
                f"--layers={glob} matches none of the {len(known)} activations of "
                f"{exp.config.name}; the nearest are {', '.join(near)}"
            )
        chosen += found
    return [path for path in known if path in chosen]


def _matches(path: str, glob: str) -> bool:
    """Whether a pattern matches the path, or a layer that contains it."""
    parts = path.split("/")
    above = ["/".join(parts[:n]) for n in range(1, len(parts) + 1)]
    return any(fnmatch.fnmatchcase(name, glob) for name in above)


def _distance(glob: str, path: str) -> float:
    return -difflib.SequenceMatcher(None, glob, path).ratio()


def kept_steps(workdir: pathlib.Path) -> list[int]:
    """Returns the steps that can be measured: 0, and those with a checkpoint."""
    return [0, *Steps(workdir / "checkpoints", read_only=True).numbers()]


def choose_steps(workdir: pathlib.Path, asked: str) -> list[int]:
    """Parses `all`, `newest` or steps with commas; ConfigError for a step without checkpoint."""
    kept = kept_steps(workdir)
    if asked == "all":
        return kept
    if asked == "newest":
        return kept[-1:]
    steps = []
    for text in asked.split(","):
        if not text.isdecimal() or int(text) not in kept:
            raise ConfigError(
                f"--steps={text}: {workdir} has no checkpoint of that step; it has "
                f"{', '.join(map(str, kept))} (keep_every=N keeps more while training)"
            )
        steps.append(int(text))
    return sorted(set(steps))


def require_comparable(one: Experiment, other: Experiment, examples: int) -> None:
    """Raises ConfigError unless both networks have the same layers (one may lack BN)."""

    def layers(exp: Experiment) -> list[str]:
        return [path for path in known_paths(exp, examples) if path.endswith("/input")]

    ours = layers(one)
    theirs = layers(other)
    if ours != theirs:
        common = set(ours) & set(theirs)
        raise ConfigError(
            f"{one.config.name} and {other.config.name} are different networks: they have "
            f"{len(ours)} and {len(theirs)} layers, of which {len(common)} have the same names; "
            "measure each alone"
        )
