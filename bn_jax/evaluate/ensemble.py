"""Computes class probabilities of trained networks, averaged over the crops of each image.

The paper says in section 4.2.3: "Ensemble prediction was based on the arithmetic average of class
probabilities predicted by the constituent networks", and that multicrop inference is "similar to
(Szegedy et al., 2014)". All networks see the same batches of views in one pass over the data.
predictions.py takes the mean over networks.
"""

import argparse
import functools
import math
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from flax import traverse_util

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
    logits: Any = model.apply({"params": params, "batch_stats": batch_stats}, images, train=False)
    return jax.nn.softmax(logits.astype(np.float32), axis=-1)


class Networks:
    """Members compiled for batches of `size` views (rounded up to a multiple of the devices).

    Raises ConfigError if the members do not have the same images and classes.
    """

    def __init__(self, members: Sequence[Member], size: int):
        for other in members[1:]:
            require_same_input(members[0], other)
        self.members = members
        self.mesh = members[0].exp.mesh
        self.size = math.ceil(size / self.mesh.size) * self.mesh.size
        self._programs = [self._compiled(member) for member in members]

    def _compiled(self, member: Member) -> Any:
        forward = jax.jit(
            functools.partial(probabilities, model=member.exp.model),
            out_shardings=mesh.replicated(self.mesh),
        )
        batch = build.abstract_batch(member.exp, self.size, train=False)
        return forward.lower(member.params, member.batch_stats, batch["image"]).compile()

    def average(
        self,
        rows: Iterable[views.Rows],
        examples: int,
        weight: int,
        progress: Callable[[int], None] = lambda done: None,
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
        waiting: tuple[views.Rows, list[jax.Array]] | None = None
        for batch in rows:
            image = mesh.put_batch(self.mesh, batch.image, self.size)
            outputs = [
                program(member.params, member.batch_stats, image)
                for program, member in zip(self._programs, self.members, strict=True)
            ]
            if waiting is not None:  # fetched while the device works on the next batch
                _collect(*waiting, sums, seen)
            valid = batch.example >= 0
            progress(int(np.sum(labels[np.unique(batch.example[valid])] < 0)))
            labels[batch.example[valid]] = batch.label[valid]
            waiting = batch, outputs
        if waiting is not None:
            _collect(*waiting, sums, seen)
        sums, labels, seen = _of_all_processes(sums, labels, seen)
        if not np.array_equal(seen, np.full(examples, weight, np.float32)):
            wrong = int(np.sum(seen != weight))
            raise DataError(
                f"{wrong} of {examples} examples were not evaluated under exactly {weight} views"
            )
        for total in sums:
            total /= np.float32(weight)
        return sums, labels


def _of_all_processes(
    sums: list[np.ndarray], labels: np.ndarray, seen: np.ndarray
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
    weights = np.zeros_like(seen)
    np.add.at(weights, place, mesh.gather(seen[own]))  # an example of two processes counts twice
    return whole[:-1], whole[-1], weights


def _collect(
    batch: views.Rows, outputs: Sequence[jax.Array], sums: list[np.ndarray], seen: np.ndarray
) -> None:
    """Adds a batch's weighted probabilities to its examples, whose views lie side by side."""
    count = int(np.sum(batch.example >= 0))  # padding is at the end
    example = batch.example[:count]
    weight = batch.weight[:count]
    starts = np.flatnonzero(np.diff(example, prepend=-1))
    np.add.at(seen, example, weight)
    for total, output in zip(sums, outputs, strict=True):
        weighted = np.asarray(output)[:count] * weight[:, None]
        total[example[starts]] += np.add.reduceat(weighted, starts, axis=0)


def require_same_input(one: Member, other: Member) -> None:
    """Raises ConfigError unless both networks can be fed the same batches."""
    predictions.require_same(describe(one, 1), describe(other, 1))
    fields = [traverse_util.flatten_dict(m.exp.config.to_dict(), sep=".") for m in (one, other)]
    for field in ("image_size", "data.mirror", "data.dir"):
        a = fields[0][field]
        b = fields[1][field]
        if a != b:
            raise ConfigError(
                f"{one.about['workdir']} and {other.about['workdir']} cannot be averaged: {field} "
                f"differs ({a}, {b}); evaluate each with --predictions=FILE, then use --combine"
            )


def predict(
    networks: Networks, crops: int, progress: Callable[[int], None] = lambda done: None
) -> list[Predictions]:
    """Computes each member's predictions for the evaluation split, every example counted once.

    Several processes divide the examples. Raises DataError for an example that cannot be read.
    """
    data = networks.members[0].exp.data
    config = networks.members[0].exp.config
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
        views.total_weight(crops, config.data.mirror),
        progress,
    )
    return [
        Predictions(p, labels, describe(member, crops))
        for p, member in zip(found, networks.members, strict=True)
    ]


def evaluate(args: argparse.Namespace) -> tuple[dict[str, Any], list[Predictions]] | None:
    """Scores networks on the evaluation split; returns what is recorded, and their predictions.

    Of several processes the first one prints and records, and the others return None.
    """
    first = jax.process_index() == 0
    runs = workdirs(args.workdir)
    # All runs are opened, and refused if need be, before anything is compiled.
    experiments = [build.from_workdir(run, args.data_dir) for run in runs]
    members = [
        load_member(run, args.step, args.statistics, exp, say=print if first else _silent)
        for run, exp in zip(runs, experiments, strict=True)
    ]
    networks = Networks(members, args.batch_size or members[0].exp.config.eval_batch_size)
    began = time.monotonic()
    parts = predict(networks, args.crops, _progress(networks, args.crops) if first else _silent)
    seconds = time.monotonic() - began
    if not first:
        return None

    line = predictions.show(parts)
    line["images_per_second"] = line["examples"] / seconds
    line |= provenance.origin()
    for folder in runs if args.out is None else [args.out]:
        reader.append_evaluation(folder, line)
    return line, parts


def _progress(networks: Networks, crops: int) -> Callable[[int], None]:
    """Makes the function that shows how many of this process's examples are begun."""
    count = networks.members[0].exp.data.num_eval
    share = views.share(count, crops, networks.size, jax.process_index(), jax.process_count())
    return ImageProgress(len(share)).add


def _silent(_: Any) -> None:
    """Ignores what only the first process prints."""
