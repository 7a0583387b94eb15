"""How fast images are read: `python -m benchmarks.input [--images=DIR] [--smoke]`.

Every contender turns the same JPEG files into batches of random crops of 224 x 224, bilinear
without antialiasing (PIL once more with its own antialiasing). Rounds of all contenders are
interleaved, so that a busy machine slows all of them; printed are medians over the rounds, with the
lowest and highest: images per CPU-second (of all threads) and images per second on all cores.

Without --images (a folder of pictures, any depth) textures of 500 x 375 are made up. tf.data takes
part where TensorFlow is installed, PIL where Pillow is.

Then this pipeline's images/s on 1, 2, ... of this machine's CPUs, and by a model on up to 208,
beside what hosts with H100s and TPUs would take in (`model`, `HOSTS`).
"""

import argparse
import concurrent.futures
import importlib.util
import io
import os
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import simplejpeg

from benchmarks import cost_model, fair
from bn_jax.data import crops, decode, distort, order, pipeline, sources, tfds
from bn_jax.distributed.cpus import usable_cpus
from bn_jax.prepare import imagenet

SIZE, BATCH = 224, 32
Run = Callable[[int], int]  # round -> images read

OURS = "ours, ArrayRecord, end to end"
BARE = "bare decode + crop + resize"
TF_DATA = "tf.data, decode_and_crop + resize"

TINY = 8  # pixels of pictures that take no time to decode
ON_PAPER = (16, 32, 64, 112, 208)  # CPUs


class Host(NamedTuple):
    """A machine that trains. cpus: Google's vCPUs, which are threads of cores."""

    name: str
    cpus: int
    devices: int
    tflops: float  # peak of a device, bfloat16
    processes: int = 1  # as the launchers start them


V5E, _, H100 = cost_model.MACHINES
HOSTS = (
    Host("v5e x 4, ct5lp-hightpu-4t, 1 process", 112, 4, V5E.tflops),
    Host("H100 x 8, a3-highgpu-8g, 1 process", 208, 8, H100.tflops),
    Host("H100 x 8, 208 CPUs, 8 processes", 208, 8, H100.tflops, processes=8),
)


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", help="folder of JPEG files; those near 500 x 375 are taken")
    parser.add_argument("--count", type=int, default=640, help="images a round")
    parser.add_argument("--rounds", type=int, default=9, help="interleaved rounds")
    parser.add_argument("--smoke", action="store_true", help="one round of few images")
    options = parser.parse_args()
    if options.smoke:
        options.count, options.rounds = 64, 1
    files = read_images(pathlib.Path(options.images)) if options.images else made_up(16)
    files = [files[k % len(files)] for k in range(options.count)]
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        contenders = list_contenders(files, folder)
        results = measure(contenders, options.rounds)
        scaling = measure(list_cpus(folder, options.count), options.rounds)
    pixels = statistics.median(np.prod(simplejpeg.decode_jpeg_header(f)[:2]) for f in files)
    kib, source = statistics.median(map(len, files)) / 1024, options.images or "made-up textures"
    print(f"{len(set(files))} files of {source}, median {pixels:,.0f} pixels, {kib:.0f} KiB")
    print(f"{os.cpu_count()} cores, {options.rounds} rounds of {options.count} images, medians")
    print(f"{'':42}{'images/CPU-s':>22}{'images/s':>22}")
    for name, rates in results.items():
        columns = [spread(values) for values in rates]
        print(f"{name:42}{columns[0]:>22}{columns[1]:>22}")
    print()
    print(scaling_table(scaling))

    seconds = {name: [1 / rate for rate in rates] for name, (rates, _) in results.items()}
    record = {
        "clock": "CPU seconds an image, of all threads",
        "source": f"{len(set(files))} files of {source}",
        "images": options.count,
        "sides": fair.compare(seconds, OURS),
    }
    fair.write("input", record, smoke=options.smoke)


def spread(values: list[float]) -> str:
    """The median and, in brackets, the lowest and highest."""
    return f"{statistics.median(values):.0f} ({min(values):.0f}-{max(values):.0f})"


def list_cpus(folder: pathlib.Path, count: int) -> dict[str, Run]:
    """This pipeline on 1, 2, ... CPUs, and on one CPU with pictures that take no time to decode."""
    data = open_set(folder / "array_record", distortion=1.0)
    tiny = write_set([made_up(1, TINY, TINY)[0]] * count, folder / "tiny", "array_record")
    bare = open_set(tiny, distortion=1.0, size=TINY)
    found = {"Python alone": on_cpus(1, bare)}
    n = 1
    while n <= usable_cpus():
        found[str(n)] = on_cpus(n, data)
        n *= 2
    return found


def on_cpus(n: int, data: pipeline.Data) -> Run:
    """Reads epochs with threads that may use n CPUs."""

    def run(k: int) -> int:
        allowed = os.sched_getaffinity(0)
        os.sched_setaffinity(0, set(sorted(allowed)[:n]))  # of this thread and those it starts
        sources._threads.cache_clear()  # the threads of a batch's rows are started again
        try:
            return epoch(data, k)
        finally:
            sources._threads.cache_clear()
            os.sched_setaffinity(0, allowed)

    return run


def model(cpus: float, per_cpu: float, python: float) -> float:
    """Images/s of one process on paper: min(cpus * per_cpu, python).

    Args:
      cpus: that the process may use; none slower than those here.
      per_cpu: images per CPU-second, measured: n times the CPUs decode n times as much.
      python: images/s of what one thread at a time does, because it holds Python's lock. Measured
        with pictures of 8 pixels on one CPU, all of whose CPU time is counted as that; some of it
        is not, so the true limit is higher.

    Storage, memory and the copy to the devices are assumed to be faster.
    """
    return min(cpus * per_cpu, python)


def needed(host: Host) -> float:
    """Images/s that a host's devices take in at `cost_model.UTILIZATION` of their peak: assumed."""
    flops = host.devices * host.tflops * 1e3 * cost_model.UTILIZATION
    return flops / cost_model.GFLOP_AN_IMAGE


def scaling_table(results: dict[str, tuple[list, list]]) -> str:
    """Images/s against CPUs, measured and by the model, and what hosts need."""
    # By CPU-seconds, because a busy machine takes CPUs away. Python alone was measured on one CPU.
    python = statistics.median(results["Python alone"][0])
    measured = {name: rates for name, rates in results.items() if name != "Python alone"}
    per_cpu = statistics.median(results[max(measured, key=int)][0])
    share = f"{cost_model.UTILIZATION:.0%} of the peak"
    lines = [
        f"model of a process: min(CPUs x {per_cpu:.0f}, {python:,.0f}) images/s, from the measured",
        f"{per_cpu:.0f} images per CPU-second and {python:,.0f} images per second of Python alone",
        f"{'CPUs':42}{'images/CPU-s':>22}{'images/s':>22}{'by the model':>14}",
    ]
    for name, (per_second, rates) in measured.items():
        by_model = model(int(name), per_cpu, python)
        lines.append(f"{name:42}{spread(per_second):>22}{spread(rates):>22}{by_model:>14,.0f}")
    for cpus in ON_PAPER:
        lines.append(f"{cpus:<42}{'not measured':>44}{model(cpus, per_cpu, python):>14,.0f}")
    lines.append(f"{'host':42}{f'needs at {share}':>44}{'by the model':>14}")
    for host in HOSTS:
        gives = host.processes * model(host.cpus / host.processes, per_cpu, python)
        lines.append(f"{host.name:42}{needed(host):>44,.0f}{gives:>14,.0f}")
    return "\n".join(lines)


def read_images(folder: pathlib.Path) -> list[bytes]:
    """JPEG files with 0.7 to 1.3 times the pixels of 500 x 375."""
    data = [
        p.read_bytes() for p in sorted(folder.rglob("*")) if p.suffix.lower() in (".jpeg", ".jpg")
    ]
    frames = [decode.frame(d) for d in data]
    usual = [
        d
        for d, f in zip(data, frames, strict=True)
        if 0.7 < f.height * f.width / (500 * 375) < 1.3 and f.components == 3
    ]
    if not usual:
        raise SystemExit(f"no JPEG files of about 500 x 375 pixels in {folder}")
    return usual


def made_up(n: int, height: int = 375, width: int = 500) -> list[bytes]:
    """JPEG files of smooth noise, by default about as large as ImageNet's."""
    rng = np.random.default_rng(0)
    files = []
    for _ in range(n):
        noise = rng.normal(size=(height, width, 3)).cumsum(0).cumsum(1)
        noise = 127 + 60 * noise / noise.std() + rng.normal(scale=12, size=noise.shape)
        pixels = np.clip(noise, 0, 255).astype(np.uint8)
        files.append(simplejpeg.encode_jpeg(pixels, quality=90, colorsubsampling="420"))
    return files


def measure(contenders: dict[str, Run], rounds: int) -> dict[str, tuple[list, list]]:
    """name -> (images per CPU-second, images per second) of each round; a first round warms up."""
    results: dict[str, tuple[list, list]] = {name: ([], []) for name in contenders}
    for k in range(rounds + 1):
        for name, run in contenders.items():
            wall, cpu = time.perf_counter(), time.process_time()
            n = run(k)
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            if k:
                results[name][0].append(n / cpu)
                results[name][1].append(n / wall)
    return results


def list_contenders(files: list[bytes], folder: pathlib.Path) -> dict[str, Run]:
    """All that can run here."""
    ours = {f: write_set(files, folder / f, f) for f in ("array_record", "tfrecord")}
    plain = {f: open_set(place, distortion=0.0) for f, place in ours.items()}
    colours = open_set(ours["array_record"], distortion=1.0)
    contenders: dict[str, Run] = {
        "bare decode": threaded(files, lambda f, _: decode.pixels(f, decode.frame(f), exact=False)),
        BARE: threaded(files, crop_loop()),
        OURS: lambda k: epoch(plain["array_record"], k),
        "ours, TFRecord, end to end": lambda k: epoch(plain["tfrecord"], k),
        "ours, ArrayRecord, colours distorted too": lambda k: epoch(colours, k),
    }
    if importlib.util.find_spec("PIL"):
        contenders["PIL, same filter"] = threaded(files, pil_loop(antialias=False))
        contenders["PIL, antialiased (torchvision)"] = threaded(files, pil_loop(antialias=True))
    if importlib.util.find_spec("tensorflow"):
        contenders[TF_DATA] = tf_data(ours["tfrecord"], len(files))
    return contenders


def write_set(files: list[bytes], folder: pathlib.Path, file_format: str) -> pathlib.Path:
    """The files as a set in TFDS' format; the folder."""
    folder.mkdir()
    records = [
        tfds.serialize({"image": f, "label": k % 1000, "file_name": b"%d" % k})
        for k, f in enumerate(files)
    ]
    for split in ("train", "validation"):
        path = folder / f"imagenet2012-{split}.{file_format}-00000-of-00001"
        if file_format == "tfrecord":
            tfds.write(path, records)
        else:
            from array_record.python import array_record_module

            writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
            for record in records:
                writer.write(record)
            writer.close()
    splits = [
        {"name": s, "numBytes": "0", "shardLengths": [str(len(files))]}
        for s in ("train", "validation")
    ]
    info = {**imagenet.dataset_info(splits), "fileFormat": file_format}
    (folder / "features.json").write_text(imagenet.dump(imagenet.features()))
    (folder / "dataset_info.json").write_text(imagenet.dump(info))
    return folder


def open_set(folder: pathlib.Path, distortion: float, size: int = SIZE) -> pipeline.Data:
    """The set as training sees it."""
    view = distort.Augmentation(size, crop=0.08, mirror=True, distortion=distortion)
    return pipeline.Data(tfds.source("imagenet2012", str(folder)), view, shuffle="within_shard")


def epoch(data: pipeline.Data, k: int) -> int:
    """Reads epoch k."""
    steps = data.steps_per_epoch(BATCH)
    batches = data.train(k * steps, (k + 1) * steps, BATCH, slice(0, BATCH), seed=0)
    return sum(int(batch["mask"].sum()) for batch in batches)


def threaded(files: list[bytes], one: Callable[[bytes, np.ndarray], object]) -> Run:
    """Applies a function to all files, in as many threads as there are cores. It gets the draws of
    the example, too; nothing is collected into batches."""
    threads = os.cpu_count() or 1

    def run(k: int) -> int:
        draws = order.uniforms(k, 0, slice(0, len(files)), distort.DRAWS)

        def part(start: int) -> None:
            for i in range(start, len(files), threads):
                one(files[i], draws[i])

        with concurrent.futures.ThreadPoolExecutor(threads) as pool:
            list(pool.map(part, range(threads)))
        return len(files)

    return run


def box_of(height: int, width: int, draws: np.ndarray) -> crops.Box:
    """The crop that all contenders take."""
    return crops.random_box(height, width, tuple(map(float, draws[:4])), 0.08)


def crop_loop() -> Callable[[bytes, np.ndarray], object]:
    """Decode, crop and resize without a pipeline: the limit of ours."""

    def one(data: bytes, draws: np.ndarray) -> None:
        found = decode.frame(data)
        box = box_of(found.height, found.width, draws)
        reduce = decode.reduction(box, SIZE)
        out = np.empty((SIZE, SIZE, 3), np.uint8)
        decode.resized_crop(
            decode.pixels(data, found, reduce=reduce, exact=False), box, reduce, out
        )

    return one


def pil_loop(antialias: bool) -> Callable[[bytes, np.ndarray], object]:
    """A loader as torchvision's: Image.open, RandomResizedCrop, flip, to an array."""
    from PIL import Image

    def one(data: bytes, draws: np.ndarray) -> np.ndarray:
        image = Image.open(io.BytesIO(data)).convert("RGB")
        top, left, height, width = box_of(image.height, image.width, draws)
        edges = (left, top, left + width, top + height)
        if antialias:
            image = image.crop(edges).resize((SIZE, SIZE), Image.Resampling.BILINEAR)
        else:
            image = image.transform(
                (SIZE, SIZE), Image.Transform.EXTENT, edges, Image.Resampling.BILINEAR
            )
        if draws[distort.Draw.MIRROR] < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return np.asarray(image)

    return one


def tf_data(folder: pathlib.Path, count: int) -> Run:
    """The usual tf.data ImageNet input (as in TensorFlow's own ResNet): decode_and_crop_jpeg,
    bilinear resize, flip, batch."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    import tensorflow as tf

    tf.config.set_visible_devices([], "GPU")
    features = {"image": tf.io.FixedLenFeature([], tf.string)}

    def decode_crop(serialized):
        data = tf.io.parse_single_example(serialized, features)["image"]
        begin, size, _ = tf.image.sample_distorted_bounding_box(
            tf.image.extract_jpeg_shape(data),
            tf.zeros([0, 0, 4], tf.float32),
            aspect_ratio_range=crops.ASPECT,
            area_range=(0.08, 1.0),
            use_image_if_no_bounding_boxes=True,
        )
        window = tf.concat([begin[:2], size[:2]], 0)
        image = tf.image.decode_and_crop_jpeg(data, window, channels=3)
        image = tf.image.resize(image, [SIZE, SIZE])
        return tf.cast(tf.image.random_flip_left_right(image), tf.uint8)

    file = str(next(folder.glob("*train*")))
    dataset = tf.data.TFRecordDataset(file).shuffle(count).map(decode_crop, tf.data.AUTOTUNE)
    dataset = dataset.batch(BATCH, drop_remainder=True).prefetch(tf.data.AUTOTUNE)
    return lambda _: sum(len(batch) for batch in dataset.as_numpy_iterator())


if __name__ == "__main__":
    main()
