"""Computes class probabilities of trained networks, averaged over the crops of each image.

The paper says in section 4.2.3: "Ensemble prediction was based on the arithmetic average of class
probabilities predicted by the constituent networks", and that multicrop inference is "similar to
(Szegedy et al., 2014)". All networks see the same batches of views in one pass over the data.
predictions.py takes the mean over networks.
"""

import argparse
import functools
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np
from flax import linen as nn

from bn_jax.data import views
from bn_jax.distributed import mesh
from bn_jax.errors import ConfigError, DataError
from bn_jax.evaluate import predictions
from bn_jax.evaluate.members import Member, describe, load_member, workdirs
from bn_jax.evaluate.predictions import Predictions
from bn_jax.experiment import build
from bn_jax.workdir import provenance, reader
from bn_jax.workdir.timing import ImageProgress


def probabilities(params: Any, batch_stats: Any, images: jax.Array, *, model: nn.Module):
    """Computes the inference network's softmax, float32 [N, K]. images: [N, H, W, C] in 0..255."""
    variables = {"params": params, "batch_stats": batch_stats}
    logits: Any = model.apply(variables, images, train=False)
    return jax.nn.softmax(logits.astype(np.float32), axis=-1)


def _silent(_: Any) -> None:
    """Ignores what is not to be printed."""


class Networks:
    """Members compiled for batches of `size` views (rounded up to a multiple of the devices).

    Raises ConfigError if the members do not have the same images and classes.
    """

    def __init__(self, members: Sequence[Member], size: int):
        for other in members[1:]:
            require_same_input(members[0], other)
        self.members = members
        self.mesh = members[0].exp.mesh
        self.size = mesh.rounded_up(self.mesh, size)
        self._programs = [self._compiled(member) for member in members]

    def _compiled(self, member: Member) -> Any:
        forward = jax.jit(
            functools.partial(probabilities, model=member.exp.model),
            out_shardings=mesh.replicated(self.mesh),
        )
        batch = build.abstract_batch(member.exp, self.size, train=False)
        lowered = forward.lower(member.params, member.batch_stats, batch["image"])
        return lowered.compile()

    def average(
        self,
        rows: Iterable[views.Rows],
        examples: int,
        weight: int,
        progress: Callable[[int], None] = _silent,
    ) -> tuple[list[np.ndarray], np.ndarray]:
        """Averages over views: each member's probabilities float32 [examples, K], and the labels.

        weight: of all views of an example together. progress: called with the number of examples
        that each batch begins. Each of several processes has `rows` of its own, and all of them get
        the whole result. Raises DataError unless every example had exactly this weight.
        """
        classes = self.members[0].exp.data.num_classes
        sums = [np.zeros((examples, classes), np.float32) for _ in self.members]
        labels = np.full(examples, -1, np.int32)
        seen = np.zeros(examples, np.float32)

        # Outputs are fetched while the device works on the next batch.
        waiting: tuple[views.Rows, list[jax.Array]] | None = None
        for batch in rows:
            image = mesh.put_batch(self.mesh, batch.image, self.size)
            outputs = []
            for program, member in zip(self._programs, self.members, strict=True):
                outputs.append(program(member.params, member.batch_stats, image))
            if waiting is not None:
                _collect(*waiting, sums, seen)
            waiting = (batch, outputs)

            valid = batch.example >= 0
            places = batch.example[valid]
            begun = labels[np.unique(places)] < 0
            progress(int(np.sum(begun)))
            labels[places] = batch.label[valid]
        if waiting is not None:
            _collect(*waiting, sums, seen)

        sums, labels, seen = _of_all_processes(sums, labels, seen)
        wrong = int(np.sum(seen != weight))
        if wrong:
            raise DataError(
                f"{wrong} of {examples} examples were not evaluated under exactly {weight} views"
            )
        for total in sums:
            total /= np.float32(weight)
        return sums, labels


def _of_all_processes(
    sums: list[np.ndarray],
    labels: np.ndarray,
    seen: np.ndarray,
) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    """Gathers `sums`, `labels` and `seen` of all examples from the processes that have them."""
    if jax.process_count() == 1:
        return sums, labels, seen

    own = np.flatnonzero(seen).astype(np.int32)
    place = mesh.gather(own)
    whole = []
    for mine in (*sums, labels):
        everything = np.zeros_like(mine)
        everything[place] = mesh.gather(mine[own])
        whole.append(everything)
    *all_sums, all_labels = whole

    weights = np.zeros_like(seen)
    np.add.at(weights, place, mesh.gather(seen[own]))  # an example of two processes counts twice
    return all_sums, all_labels, weights


def _collect(
    batch: views.Rows,
    outputs: Sequence[jax.Array],
    sums: list[np.ndarray],
    seen: np.ndarray,
) -> None:
    """Adds a batch's weighted probabilities to its examples, whose views lie side by side."""
    count = int(np.sum(batch.example >= 0))  # padding is at the end
    example = batch.example[:count]
    weight = batch.weight[:count]
    np.add.at(seen, example, weight)

    starts = np.flatnonzero(np.diff(example, prepend=-1))  # of each example's views
    for total, output in zip(sums, outputs, strict=True):
        weighted = np.asarray(output)[:count] * weight[:, None]
        total[example[starts]] += np.add.reduceat(weighted, starts, axis=0)


def require_same_input(one: Member, other: Member) -> None:
    """Raises ConfigError unless both networks can be fed the same batches."""
    predictions.require_same(describe(one, 1), describe(other, 1))
    ours = reader.flat(one.exp.config.to_dict())
    theirs = reader.flat(other.exp.config.to_dict())
    for field in ("image_size", "data.mirror", "data.dir"):
        if ours[field] != theirs[field]:
            raise ConfigError(
                f"{one.about['workdir']} and {other.about['workdir']} cannot be averaged: {field} "
                f"differs ({ours[field]}, {theirs[field]}); evaluate each with --predictions=FILE, "
                "then use --combine"
            )


def predict(
    networks: Networks,
    crops: int,
    progress: Callable[[int], None] = _silent,
) -> list[Predictions]:
    """Computes each member's predictions for the evaluation split, every example counted once.

    Several processes divide the examples. Raises DataError for an example that cannot be read.
    """
    exp = networks.members[0].exp
    data = exp.data
    rows = views.batches(
        data,
        crops,
        networks.size,
        process=jax.process_index(),
        processes=jax.process_count(),
    )
    found, labels = networks.average(
        rows,
        data.num_eval,
        views.total_weight(crops, exp.config.data.mirror),
        progress,
    )

    predicted = []
    for probabilities, member in zip(found, networks.members, strict=True):
        about = describe(member, crops)
        predicted.append(Predictions(probabilities, labels, about))
    return predicted


def evaluate(args: argparse.Namespace) -> tuple[dict[str, Any], list[Predictions]] | None:
    """Scores networks on the evaluation split; returns what is recorded, and their predictions.

    Of several processes the first one prints and records, and the others return None.
    """
    first = jax.process_index() == 0
    say = print if first else _silent

    # All runs are opened, and refused if need be, before anything is compiled.
    runs = workdirs(args.workdir)
    experiments = [build.from_workdir(run, args.data_dir) for run in runs]
    members = []
    for run, exp in zip(runs, experiments, strict=True):
        members.append(load_member(run, args.step, args.statistics, exp, say=say))

    size = args.batch_size or experiments[0].config.eval_batch_size
    networks = Networks(members, size)
    progress = _progress(networks, args.crops) if first else _silent

    began = time.monotonic()
    parts = predict(networks, args.crops, progress)
    seconds = time.monotonic() - began
    if not first:
        return None

    line = predictions.show(parts)
    line["images_per_second"] = line["examples"] / seconds
    line |= provenance.origin()
    folders = runs if args.out is None else [args.out]
    for folder in folders:
        reader.append_evaluation(folder, line)
    return line, parts


def _progress(networks: Networks, crops: int) -> Callable[[int], None]:
    """Makes the function that shows how many of this process's examples are begun."""
    share = views.share(
        networks.members[0].exp.data.num_eval,
        crops,
        networks.size,
        jax.process_index(),
        jax.process_count(),
    )
    return ImageProgress(len(share)).add
