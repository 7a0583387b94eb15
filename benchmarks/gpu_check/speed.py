"""Images/s of the training step: this repository's, plain Flax, PyTorch; all programs at once.

All sides start from the same weights and take the same batch: 32 random images, repeated until the
batch is full. Statistics of a group of 32 are then those of the whole batch, and sides that
normalize groups (ours, as the paper) compute the same as sides that normalize the batch. The losses
of the first two steps are compared before anything is timed: TOLERANCE. Plain Flax has its own
convolutions, BN and pooling, and no mask for missing rows.
"""

import concurrent.futures
import contextlib
import functools
import json
import pathlib
import time
from collections.abc import Iterator, Mapping
from typing import Any
from unittest import mock

import jax
import numpy as np
from flax import linen as nn

from benchmarks import fair, hlo, step
from benchmarks.gpu_check.torch_side import MODES, Torch, missing
from bn_jax import ops
from bn_jax.ops import mixed
from bn_jax.step import init_state, train_step
from bn_jax.weights import mapping

OURS = "bn_jax"
FLAX = "plain Flax"
GROUP = 32  # examples of a statistic group
TOLERANCE = (0.01, 0.02)  # relative, of the losses of steps 1 and 2: bfloat16 through 69 layers
ROUNDS = 9  # in which all sides take their turn
# What XLA puts into command buffers (CUDA graphs) by itself, and convolutions.
WITH_CONVOLUTIONS = "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,DYNAMIC_SLICE_FUSION,CONVOLUTION"


class Sizes:
    """What a call times: images of `size` px, width of the network, images of the main batch."""

    def __init__(self, *, smoke: bool):
        self.size = 32 if smoke else 224
        self.width = 1 / 16 if smoke else 1.0
        self.batch = 32 if smoke else 256
        self.small = 32
        self.others = (64,) if smoke else (128, 512)
        self.steps = 1 if smoke else 10  # between two looks at the clock
        self.rounds = 2 if smoke else ROUNDS


def make_batch(size: int, images: int) -> dict[str, np.ndarray]:
    """Images, labels and the mask of valid rows; the first 32, again and again."""
    random = np.random.default_rng(0)
    few = random.integers(0, 256, (GROUP, size, size, 3), dtype=np.uint8)
    labels = (np.arange(GROUP) * 31 % 1000).astype(np.int32)
    repeats = images // GROUP
    return {
        "image": np.tile(few, (repeats, 1, 1, 1)),
        "label": np.tile(labels, repeats),
        "mask": np.ones(images, bool),
    }


@contextlib.contextmanager
def flax_layers() -> Iterator[None]:
    """What is traced inside has Flax's own convolutions and dense layers, and XLA's pooling."""
    with (
        ops.plain(),
        mock.patch.object(mixed, "Conv", nn.Conv),
        mock.patch.object(mixed, "Dense", nn.Dense),
    ):
        yield


def random_weights(like: Any) -> Any:
    """Parameters of these shapes: kernels of variance 2 / fan-in, BN's scales 1, biases 0."""
    random = np.random.default_rng(0)

    def fill(path: Any, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        name = path[-1].key
        if name != "kernel":
            return np.full(leaf.shape, float(name == "scale"), np.float32)
        fan_in = leaf.size // leaf.shape[-1]
        return random.normal(0, (2 / fan_in) ** 0.5, leaf.shape).astype(np.float32)

    return jax.tree_util.tree_map_with_path(fill, like)


class Side:
    """A training step under jax: traced, then compiled (in any thread), then given a state.

    Args:
      sizes: of images and network.
      images: of the batch.
      plain: whether it is plain Flax, else this repository's.
      options: XLA's for this program.
    """

    def __init__(
        self,
        sizes: Sizes,
        images: int,
        *,
        plain: bool = False,
        options: Mapping[str, str] | None = None,
    ):
        self.images = images
        self.plain = plain
        self.options = dict(options or {})
        self.model = step.network(
            sizes.width, plain=plain, dtype="bfloat16", group_size=None if plain else GROUP
        )
        batch = make_batch(sizes.size, images)
        if plain:
            del batch["mask"]
        shape = (sizes.size, sizes.size, 3)
        state = jax.eval_shape(lambda: init_state(self.model, 0, shape))
        self.rest = jax.device_put((batch, step.hyper(), np.uint32(1)))
        function = jax.jit(functools.partial(train_step, model=self.model), donate_argnums=0)
        with flax_layers() if plain else contextlib.nullcontext():
            self._lowered = function.lower(state, *self.rest)
        self.program: Any = None
        self.state: Any = None
        self.compile_seconds = 0.0

    def compile(self) -> None:
        """Compiles it; called from a thread."""
        start = time.perf_counter()
        self.program = self._lowered.compile(compiler_options=self.options)
        self.compile_seconds = time.perf_counter() - start

    def begin(self, variables: Any) -> None:
        """Starts from these weights."""
        self.state = jax.device_put(step.first_state(variables, plain=self.plain))

    def advance(self) -> dict[str, jax.Array]:
        """Begins one step and returns its metrics, which the device may not have computed yet."""
        self.state, metrics = self.program(self.state, *self.rest)
        return metrics

    def losses(self) -> list[float]:
        """Cross-entropies of two steps."""
        return [float(self.advance()["cross_entropy"]) for _ in range(2)]

    def take(self, steps: int) -> None:
        """Takes so many steps, and returns when the device has done them."""
        for _ in range(steps):
            metrics = self.advance()
        jax.block_until_ready((self.state, metrics))

    def release(self) -> None:
        """Gives its state back to the device."""
        self.state = None

    def compiled_for(self) -> dict[str, Any]:
        """What the compiled program launches and moves, by its HLO, and its temporary memory."""
        found = hlo.summary(self.program.as_text(), self.images)
        return {
            "kernels": found["kernels"],
            "bytes_an_image": found["bytes_an_image"],
            "temporary_bytes": self.program.memory_analysis().temp_size_in_bytes,
            "compile_seconds": round(self.compile_seconds, 1),
        }


class Speed:
    """The sides of call 1, and what its parts need of them.

    `begin` starts PyTorch's process and traces; `compile` compiles everything; then the parts time.
    """

    def __init__(self, folder: pathlib.Path, sizes: Sizes):
        self.sizes = sizes
        self.folder = folder
        self.jax_sides: dict[str, Side] = {}
        self.failed: dict[str, str] = {}
        self.compiling: list[str] = []  # what was too late is compiled to its end all the same
        self.torch: Torch | None = None
        self.torch_seconds: dict[str, float] = {}
        self.variables: Any = None
        self._pool = concurrent.futures.ThreadPoolExecutor(16)
        self._torch_making: concurrent.futures.Future | None = None

    def begin(self, until: float, *, extras: bool) -> None:
        """Starts PyTorch's process, which compiles by itself, and traces jax's programs.

        extras: whether the programs of the optional parts are made, too.
        """
        sizes = self.sizes
        said = missing()
        # PyTorch's network has one width, and nothing is said by its speed at another.
        if not said and sizes.width != 1:
            said = "left out of a smoke run"
        if said:
            self.failed |= dict.fromkeys(list(MODES)[:2], said)
        else:
            self.torch = Torch(self.folder, make_batch(sizes.size, sizes.batch))
            self._torch_making = self._pool.submit(self._make_torch, until)

        programs: dict[str, dict[str, Any]] = {
            OURS: {"images": sizes.batch},
            FLAX: {"images": sizes.batch, "plain": True},
        }
        if extras:
            buffers = {"xla_gpu_enable_command_buffer": WITH_CONVOLUTIONS}
            small = {"images": sizes.small}
            programs[f"batch {sizes.small}"] = small
            if jax.default_backend() == "gpu":
                name = f"batch {sizes.small}, convolutions in command buffers"
                programs[name] = small | {"options": buffers}
            for images in sizes.others:
                programs[f"batch {images}"] = {"images": images}
        for name, options in programs.items():
            if time.monotonic() > until:
                self.failed[name] = "not traced in time"
                continue
            self.jax_sides[name] = Side(sizes, **options)

    def _make_torch(self, until: float) -> None:
        assert self.torch is not None
        for name in list(MODES)[:2]:
            try:
                self.torch.ask(until, "weights")
                self.torch_seconds[name] = self.torch.ask(until, "make", name)
            except (RuntimeError, TimeoutError) as error:
                self.failed[name] = str(error)

    def extras(self) -> list[str]:
        """The programs of the optional parts."""
        return [name for name in self.jax_sides if name not in (OURS, FLAX)]

    def compile(self, until: float) -> dict[str, Any]:
        """Compiles all programs at once, in threads; what is not ready at `until` is left out."""
        futures = {name: self._pool.submit(side.compile) for name, side in self.jax_sides.items()}
        if self._torch_making is not None:
            futures["PyTorch"] = self._torch_making
        concurrent.futures.wait(futures.values(), max(0.0, until - time.monotonic()))
        for name, future in futures.items():
            if not future.done():
                if not future.cancel():
                    self.compiling.append(name)
                self.failed[name] = "not compiled in time"
            elif future.exception() is not None:
                self.failed[name] = f"{future.exception()}".splitlines()[0][:300]
        self.variables = self._weights()
        seconds = {
            name: round(side.compile_seconds, 1)
            for name, side in self.jax_sides.items()
            if side.program is not None
        }
        seconds |= {name: round(found, 1) for name, found in self.torch_seconds.items()}
        rows = [[name, f"compiled in {found:.0f} s"] for name, found in seconds.items()]
        return {"compile_seconds": seconds, "not_compiled": self.failed, "rows": rows}

    def _weights(self) -> Any:
        """The variables that all sides start from: PyTorch's where it takes part."""
        model, size = step.network(self.sizes.width, plain=False), self.sizes.size
        like = jax.eval_shape(lambda: init_state(model, 0, (size, size, 3)))
        place = self.folder / "weights.npz"
        if place.is_file():
            with np.load(place) as arrays:
                tensors = dict(arrays)
            return mapping.caffe(tensors, {"params": like.params, "batch_stats": like.batch_stats})

        return {"params": random_weights(like.params), "batch_stats": like.batch_stats}

    def ready(self, name: str) -> Side:
        """A side whose program is compiled. Raises RuntimeError saying why it is not."""
        side = self.jax_sides.get(name)
        if side is None or side.program is None or name in self.failed:
            raise RuntimeError(self.failed.get(name, f"{name}: not compiled"))
        side.begin(self.variables)
        return side

    def measure(self, until: float) -> dict[str, Any]:
        """The main comparison: losses, then seconds of all sides in turn."""
        sizes = self.sizes
        losses: dict[str, list[float]] = {}
        calls: dict[str, Any] = {}
        for name in (OURS, FLAX):
            try:
                side = self.ready(name)
                losses[name] = side.losses()
                calls[name] = functools.partial(side.take, sizes.steps)
            except RuntimeError as error:
                self.failed[name] = str(error)
        for name in self.torch_seconds:
            assert self.torch is not None
            try:
                losses[name] = self.torch.ask(until, "losses", name)
                calls[name] = functools.partial(self.torch.take, name, sizes.steps, until)
            except (RuntimeError, TimeoutError) as error:
                self.failed[name] = str(error)
        if OURS not in calls:
            raise RuntimeError(f"{OURS}: {self.failed[OURS]}")

        seconds = self._rounds(calls, until)
        compared = fair.compare(seconds, OURS)
        for side in compared.values():
            side["images_a_second"] = sizes.batch * sizes.steps / side["median"]
        return {
            "image_size": sizes.size,
            "batch": sizes.batch,
            "steps_a_round": sizes.steps,
            "losses": losses,
            "losses_agree": self._agree(losses),
            "sides": compared,
            "not_run": self.failed,
            "compiling_meanwhile": self.compiling,
            "torch_compile_seconds": self.torch_seconds,
            "compiled": {name: self.jax_sides[name].compiled_for() for name in (OURS,)},
        }

    def _rounds(self, calls: dict[str, Any], until: float) -> dict[str, list[float]]:
        """Seconds of each side in each round. Fewer rounds where time is short, at least one."""
        start = time.monotonic()
        fair.interleave(calls, 0, warmup=2)  # cuDNN's search for PyTorch is in the first
        left = until - time.monotonic()
        a_round = (time.monotonic() - start) / 2
        rounds = max(1, min(self.sizes.rounds, int(0.8 * left / max(a_round, 1e-9))))
        return fair.interleave(calls, rounds, warmup=0)

    def _agree(self, losses: dict[str, list[float]]) -> bool:
        """Whether all losses are within TOLERANCE of ours."""
        return all(
            abs(value - reference) <= tolerance * abs(reference)
            for values in losses.values()
            for value, reference, tolerance in zip(values, losses[OURS], TOLERANCE, strict=True)
        )

    def alone(self, name: str, until: float) -> dict[str, Any]:
        """One program by itself: median seconds of a step, images/s, kernels and bytes."""
        side = self.ready(name)
        seconds = self._rounds({name: functools.partial(side.take, self.sizes.steps)}, until)
        side.release()
        step_seconds = fair.compare(seconds, name)[name]["median"] / self.sizes.steps
        return {
            "batch": side.images,
            "step_seconds": step_seconds,
            "images_a_second": side.images / step_seconds,
            **side.compiled_for(),
        }

    def max_autotune(self, until: float) -> dict[str, Any]:
        """PyTorch's longest search for fast kernels, beside ours once more."""
        if self.torch is None:
            said = self.failed["torch.compile"]
            return {"left_out": said, "rows": [["torch.compile max-autotune", said]]}

        name = list(MODES)[2]
        seconds = self.torch.ask(until, "make", name)
        ours = self.ready(OURS)
        steps, images = self.sizes.steps, self.sizes.batch
        calls = {
            OURS: functools.partial(ours.take, steps),
            name: functools.partial(self.torch.take, name, steps, until),
        }
        compared = fair.compare(self._rounds(calls, until), OURS)
        rate = images * steps / compared[name]["median"]
        figure = f"{rate:,.0f} images/s; {compared[name]['ratio']:.2f} of our time"
        row = [f"{name}, batch {images}", f"{figure}; compiled in {seconds:.0f} s"]
        return {"sides": compared, "torch_compile_seconds": seconds, "rows": [row]}

    def close(self) -> None:
        """Ends PyTorch's process."""
        if self.torch is not None:
            self.torch.close()


def row(name: str, result: Mapping[str, Any]) -> list[list[str]]:
    """A program by itself as a row of the table."""
    milliseconds = 1e3 * result["step_seconds"]
    figure = f"{result['images_a_second']:,.0f} images/s, {milliseconds:.2f} ms a step"
    return [[name, f"{figure}, {result['kernels']:,} kernels"]]


def write_record(result: Mapping[str, Any], call: Any, out: pathlib.Path) -> None:
    """Writes step_gpu.json, which `benchmarks.report` reads, with the card in its name's place."""
    machine = {**fair.machine(), "hardware": call.card["name"], "card": call.card}
    record = {"benchmark": "step_gpu", "smoke": call.smoke, "machine": machine, **result}
    (out / "step_gpu.json").write_text(json.dumps(record, indent=1) + "\n")


def rows(result: Mapping[str, Any], bandwidth: float) -> list[list[str]]:
    """The main comparison as rows of the table."""
    found = []
    for name, side in result["sides"].items():
        figure = f"{side['images_a_second']:,.0f} images/s"
        if name != OURS:
            figure += f"; {side['ratio']:.2f} of our time"
        found.append([f"{name}, batch {result['batch']}", figure])
    found += [[name, said] for name, said in result["not_run"].items()]
    ours = result["sides"][OURS]
    counted = {"compiled here": result["compiled"][OURS]["bytes_an_image"]}
    counted |= result.get("counted", {})
    for where, amount in counted.items():
        moved = amount * ours["images_a_second"]
        share = 100 * moved / bandwidth
        figure = f"{moved / 1e12:.2f} TB/s, {share:.0f}% of the copy's ({amount / 1e6:.0f} MB)"
        found.append([f"bytes of {OURS}, {where}", figure])
    if result["compiling_meanwhile"]:
        found.append(["meanwhile", f"still compiling: {', '.join(result['compiling_meanwhile'])}"])
    if not result["losses_agree"]:
        found.append(["losses of the first steps", f"DIFFER: {result['losses']}"])
    return found


def read_count(file: pathlib.Path, batch: int) -> dict[str, int]:
    """Bytes an image that `benchmarks.cuda` has counted for this batch on one GPU, if it has.

    file: what its --json wrote, or results/bench/cuda.json, which has several of these. Raises
    ValueError for another file.
    """
    content = json.loads(file.read_text())
    records = [content] if "bytes_an_image" in content else list(content.values())
    asked = {"batch": batch, "dtype": "bfloat16", "group": GROUP, "devices": 1, "ops": "gpu"}
    asked |= {"filter_gradients": "float32"}
    for record in records:
        if not isinstance(record, dict) or not {*asked, "bytes_an_image"} <= record.keys():
            raise ValueError(f"{file} is not what benchmarks.cuda --json writes")
        if all(record[name] == value for name, value in asked.items()):
            return {f"compiled without a GPU ({file.name})": int(record["bytes_an_image"])}
    return {}
