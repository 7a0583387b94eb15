"""Weak scaling of data parallelism by arithmetic: a ring all-reduce against the computation."""

from typing import NamedTuple

GFLOP_AN_IMAGE = 11.96  # trained at 224 px (benchmarks/step.py)
UTILIZATION = 0.3  # of the peak, while computing: an assumption, not measured
HOP = 1e-6  # seconds a message takes to the next device: an assumption
SIZES = (8, 64, 256, 512)
IMAGENET_VALIDATION = 50_000  # images


class Machine(NamedTuple):
    """Figures of an accelerator: bfloat16 TFLOP/s, GB/s into a ring, largest network.

    Which of them were checked, says `explanation`.
    A TPU's port carries 50 GB/s each way (v5e: 1600 Gbps over 4 ports, v4: 2400 over 6), and a ring
    along one axis uses two ports. An H100 in the usual server has a 400 Gbps adapter of its own,
    which is slower than NVLink inside the server: the ring goes as fast as its slowest part.
    """

    name: str
    tflops: float
    ring: float
    most: int
    source: str


MACHINES = (
    Machine("TPU v5e", 197, 100, 256, "https://cloud.google.com/tpu/docs/v5e"),
    Machine("TPU v4", 275, 100, 4096, "https://cloud.google.com/tpu/docs/v4"),
    Machine(
        "H100, 400 Gbps each", 989, 50, 2**31, "https://www.nvidia.com/en-us/data-center/h100/"
    ),
)


def ring_seconds(payload: int, devices: int, machine: Machine) -> float:
    """A ring all-reduce: 2 (n - 1) messages of payload/n bytes, one after the other."""
    messages = 2 * (devices - 1)
    return messages * (payload / devices / (machine.ring * 1e9) + HOP)


def compute_seconds(examples: int, machine: Machine) -> float:
    """Forward and backward pass of `examples` images of 224 px on one device."""
    return examples * GFLOP_AN_IMAGE / (machine.tflops * 1e3 * UTILIZATION)


def efficiency(payload: int, devices: int, examples: int, machine: Machine) -> float:
    """The share of a step that computes, if nothing overlaps: the worst case."""
    compute = compute_seconds(examples, machine)
    return compute / (compute + ring_seconds(payload, devices, machine))


def explanation() -> str:
    """What the table rests on."""
    return (
        "Time of one flat ring all-reduce of those bytes, and the share of a step that computes if"
        " communication overlaps with nothing. The peaks of v5e and v4 and v5e's links are Google's"
        " published figures (checked); v4's links and the H100's figures were found second-hand"
        " only. That a device"
        f" computes at {UTILIZATION:.0%} of its peak and a message takes {1e6 * HOP:.0f} us are"
        " assumptions. Nothing here was measured on an accelerator; input is not in it."
    )


def table(payload: int, examples: int) -> str:
    """The model as Markdown, for a payload in bytes and `examples` a device."""
    lines = [
        "| | GB/s | step without network | " + " | ".join(f"{n} devices" for n in SIZES) + " |",
        "|---|---|---|" + "---|" * len(SIZES),
    ]
    for m in MACHINES:
        cells = [
            f"{1e3 * ring_seconds(payload, n, m):.2f} ms, "
            f"{100 * efficiency(payload, n, examples, m):.0f}%"
            if n <= m.most
            else "more than one pod"
            for n in SIZES
        ]
        step = f"{1e3 * compute_seconds(examples, m):.1f} ms"
        lines.append(f"| [{m.name}]({m.source}) | {m.ring} | {step} | {' | '.join(cells)} |")
    return "\n".join(lines)


def evaluation_share(devices: int) -> float:
    """Share of a pod run's computing that evaluations take, with population statistics.

    Counted in training steps: the forward pass of as many images a device is a third of one. A
    batch that leaves devices idle costs as much as a full one.
    """
    from bn_jax.experiment import build
    from bn_jax.experiment.evaluator import mini_batch, mini_batches_at_once
    from configs import bn_x30

    config = build.for_devices(bn_x30.get_config("pod"), devices)
    passes = -(-IMAGENET_VALIDATION // config.eval_batch_size)
    scoring = passes * config.eval_batch_size / config.batch_size

    at_once = mini_batches_at_once(config, devices)
    passes = config.statistics_batches // at_once
    statistics = passes * at_once * mini_batch(config) / config.batch_size

    steps = (scoring + statistics) / 3
    return steps / (config.eval_every + steps)


def evaluation_text() -> str:
    """Evaluation's share of a run at scale `pod`, for the page."""
    shares = ", ".join(f"{n} devices {100 * evaluation_share(n):.1f}%" for n in SIZES)
    return (
        f"BN-x30 at scale `pod`: evaluations of {IMAGENET_VALIDATION:,} images and population"
        f" statistics, counted in training steps, take {shares}. Not measured."
    )
