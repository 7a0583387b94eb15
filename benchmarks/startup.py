"""From the start of the process to the first trained step of bn_x30:digits, beside plain Flax.

    python -m benchmarks.startup [--smoke] [--rounds=3]

Four sides in turn, each a process of its own: bn_jax.main and benchmarks/plain_flax.py, with an
empty and with a filled compilation cache. bn_jax's clock stops when the record of step 1 is in
metrics.jsonl, the script's when it has its loss; both are read every 5 ms. The script checks
nothing, records nothing and takes no part in a job; what bn_jax does before its first step
(checking the config, the data and the workdir, run.json) is in its time.
"""

import argparse
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import time

from benchmarks import fair

POLL = 0.005  # seconds
LIMIT = 900.0  # seconds until a side is given up
ROOT = pathlib.Path(__file__).resolve().parent.parent


def first_step(command: list[str], done: pathlib.Path, word: str, cache: pathlib.Path) -> float:
    """Seconds until the file `done` holds `word`; the process is ended then."""
    environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(cache)}
    environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.5"  # as bn_jax sets it
    start = time.perf_counter()
    with subprocess.Popen(
        command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        while not (done.is_file() and word in done.read_text()):
            ended = process.poll() not in (None, 0)
            if ended or time.perf_counter() - start > LIMIT:
                process.kill()
                said = process.stdout.read().decode()[-2000:] if process.stdout else ""
                raise SystemExit(f"{' '.join(command)} took no step: {said}")
            time.sleep(POLL)
        seconds = time.perf_counter() - start
        # The cache's entry of the step is written before the step runs: nothing is lost.
        process.send_signal(signal.SIGKILL)
    return seconds


def ours(folder: pathlib.Path, cache: pathlib.Path) -> float:
    """`python -m bn_jax.main`, in a new workdir."""
    run = folder / "run"
    shutil.rmtree(run, ignore_errors=True)
    command = [sys.executable, "-m", "bn_jax.main", "--config=configs/bn_x30.py:digits"]
    command += [f"--workdir={run}", "--config.log_every=1"]
    return first_step(command, run / "metrics.jsonl", '"kind": "train"', cache)


def theirs(folder: pathlib.Path, cache: pathlib.Path) -> float:
    """The plain Flax script."""
    done = folder / "done"
    done.unlink(missing_ok=True)
    command = [sys.executable, "-m", "benchmarks.plain_flax", str(done)]
    return first_step(command, done, "loss", cache)


def main() -> None:
    """Measures and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="one round: no figures")
    parser.add_argument("--rounds", type=int, default=3, help="processes of each side")
    args = parser.parse_args()
    rounds = 1 if args.smoke else args.rounds
    with tempfile.TemporaryDirectory(prefix="bn_jax_startup_") as temporary:
        folder = pathlib.Path(temporary)
        seconds: dict[str, list[float]] = {}
        for _ in range(rounds):
            for name, run in (("bn_jax", ours), ("plain Flax", theirs)):
                cache = folder / f"cache_{name}"
                shutil.rmtree(cache, ignore_errors=True)
                for state in ("cold", "warm"):
                    seconds.setdefault(f"{name}, {state}", []).append(run(folder, cache))
    record = {
        "cold": fair.compare({k: v for k, v in seconds.items() if "cold" in k}, "bn_jax, cold"),
        "warm": fair.compare({k: v for k, v in seconds.items() if "warm" in k}, "bn_jax, warm"),
        "ours warm, script cold": fair.compare(
            {k: seconds[k] for k in ("bn_jax, warm", "plain Flax, cold")}, "bn_jax, warm"
        ),
    }
    fair.write("startup", record, smoke=args.smoke)


if __name__ == "__main__":
    main()
