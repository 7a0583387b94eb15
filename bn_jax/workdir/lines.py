"""Defines the fields of a run's records: run.json, and the lines of the three .jsonl files.

The recorder writes them and the reader returns them. Strict JSON only has finite numbers, so others
are written as the strings 'nan', 'inf' and '-inf', which `float` reads.
"""

from typing import Any, Literal, NotRequired, TypedDict

PERCENTILES = (15, 50, 85)  # of Fig. 1b, c

Number = float | str


# metrics.jsonl. Nothing in it depends on the clock: on CPU, and on GPUs with `deterministic`, the
# file after a resume is, byte for byte, that of a run that was never interrupted.


class TrainLine(TypedDict):
    """Metrics of the batch of one training step."""

    step: int  # 1-based
    kind: Literal["train"]
    cross_entropy: Number  # nats, mean over the batch
    learning_rate: Number
    loss: Number  # cross-entropy, auxiliary losses and L2
    top1: Number  # share
    gradient_norm: Number  # of all parameters together


class EvalLine(TypedDict):
    """Scores on the whole evaluation split, with population statistics."""

    step: int
    kind: Literal["eval"]
    cross_entropy: Number  # nats, mean over the split
    top1: float  # share
    top5: float  # share
    examples: int  # each counted once
    running_gap: NotRequired[Number]  # with BN: how far the moving average lags behind


class FinalLine(TypedDict):
    """Scores on the test split after the last step, where training examples were held out."""

    step: int
    kind: Literal["test"]
    cross_entropy: Number  # nats, mean over the split
    top1: float  # share
    top5: float  # share
    examples: int  # each counted once


class ActivationLine(TypedDict):
    """Percentiles of one layer's activations on a fixed batch, a value for each unit."""

    step: int
    kind: Literal["activation"]
    layer: str  # for example "dense_2/input"
    p15: list[Number]
    p50: list[Number]
    p85: list[Number]


class MetricLines(TypedDict):
    """The lines of metrics.jsonl by their kind."""

    train: list[TrainLine]
    eval: list[EvalLine]
    test: list[FinalLine]
    activation: list[ActivationLine]


# timing.jsonl: a line at the start of each attempt, after each training line, and at the end.


class TimingLine(TypedDict):
    """How an attempt has spent its time so far, in seconds."""

    attempt: int  # 0-based
    step: int
    wall: float  # since the attempt began
    parts: dict[str, float]  # of the wall time; exclusive, so that they sum to it


# evaluations.jsonl: written by bn_jax.evaluate, never by training.


class Scores(TypedDict):
    """The scores of one network or ensemble on the evaluation split."""

    top1: float  # share
    top5: float  # share
    cross_entropy: Number  # nats, mean
    examples: int


class EvaluationLine(Scores):
    """One evaluation of a network, or of the mean of several."""

    time: str  # UTC
    members: list[dict[str, Any]]  # experiment, seed, workdir, step, ... of each network
    member_scores: list[Scores]  # of each network alone; empty for a single one
    crops: int
    views: int  # crops, with their mirror images
    statistics: str  # population, running or none
    data: str
    description: str  # of the data
    split: str
    holdout: float
    image_size: int
    kind: NotRequired[Literal["evaluation"]]
    gain: NotRequired[dict[str, Any]]  # of several networks: see evaluate/predictions.gain
    images_per_second: NotRequired[float]
    source: NotRequired[dict[str, Any]]
    hardware: NotRequired[dict[str, Any]]
    versions: NotRequired[dict[str, str]]


# run.json


class Attempt(TypedDict):
    """One start of a run, and how it ended."""

    host: str
    pid: int
    started: str
    resume_step: int  # 0: from scratch
    status: str  # as of the run, or "killed"
    finished: NotRequired[str]
    source: NotRequired[dict[str, Any]]  # older records have these three of the run alone
    versions: NotRequired[dict[str, str]]
    hardware: NotRequired[dict[str, Any]]


class RunRecord(TypedDict):
    """run.json as a whole."""

    status: str  # running, done, diverged, preempted, failed
    config: dict[str, Any]
    info: dict[str, Any]  # data, mesh; of imported weights their origin
    source: dict[str, Any]  # of the latest attempt, like versions and hardware
    versions: dict[str, str]
    hardware: dict[str, Any]
    attempts: list[Attempt]
    results: dict[str, Any]
    ledger: dict[str, Any] | None
