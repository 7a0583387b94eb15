"""The command that launch/gpu_check.sh runs: one call of the check.

python -m benchmarks.gpu_check 1 --out=DIR [--pack=DIR] [--budget=S] [--counted=FILE] [--smoke]
python -m benchmarks.gpu_check 2 --out=DIR --pack=DIR [--budget=S] [--smoke]
"""

import argparse
import functools
import os
import pathlib
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from typing import Any

BUDGETS = {1: 290.0, 2: 470.0}  # seconds
COUNTED = pathlib.Path(__file__).resolve().parents[2] / "results" / "bench" / "cuda.json"
RESERVE = 8.0  # seconds at the end of a call for writing and ending


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser("python -m benchmarks.gpu_check", description=__doc__)
    parser.add_argument("call", type=int, choices=sorted(BUDGETS))
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder of the results")
    parser.add_argument("--pack", type=pathlib.Path, help="what gpu_check.sh --pack has made")
    parser.add_argument("--budget", type=float, help="seconds of the call (290, 470)")
    parser.add_argument("--counted", type=pathlib.Path, help="of benchmarks.cuda (its page's)")
    parser.add_argument("--smoke", action="store_true", help="tiny: that it runs, no figures")
    args = parser.parse_args()
    args.budget = args.budget or BUDGETS[args.call]
    if args.counted is None and COUNTED.is_file() and not args.smoke:
        args.counted = COUNTED
    if args.counted is not None and not args.counted.is_file():
        parser.error(f"--counted={args.counted} is not a file")
    if args.call == 2 and not args.smoke and args.pack is None:
        parser.error("call 2 needs --pack=DIR, whose pictures it trains on")
    return args


def with_rows(
    measure: Callable[[float], dict[str, Any]], rows: Callable[[dict[str, Any]], list[list[str]]]
) -> Callable[[float], Mapping[str, Any]]:
    """A part: what `measure` gives, with the rows that are made of it."""

    def part(until: float) -> Mapping[str, Any]:
        result = measure(until)
        return {**result, "rows": rows(result)}

    return part


def call_1(call: Any, args: argparse.Namespace, folder: pathlib.Path) -> None:
    """Correctness and speed."""
    from benchmarks.gpu_check import correctness, fed, profile, speed

    checks = correctness.Correctness(folder, args.out, call.card["platform"], smoke=call.smoke)
    sizes = speed.Sizes(smoke=call.smoke)
    sides = speed.Speed(folder, sizes)
    bandwidth = call.card["bytes_a_second"]

    # The children compute while this process traces: only compiling needs the device for itself.
    checks.begin()
    start = time.monotonic()
    until_compiled = start + min(170.0, 0.62 * call.left())
    sides.begin(until_compiled, extras=call.left() > 200 or call.smoke)
    limit = 600.0 if call.smoke else 60.0 - (time.monotonic() - start)
    call.part("correctness", max(limit, 1.0), 0, checks.finish)
    call.part("compile", until_compiled - time.monotonic(), 0, sides.compile)

    def main_comparison(until: float) -> dict[str, Any]:
        result = sides.measure(until)
        if args.counted is not None:
            result["counted"] = speed.read_count(args.counted, sizes.batch)
        return result

    rows = functools.partial(speed.rows, bandwidth=bandwidth)
    result = call.part("speed", 60, 5, with_rows(main_comparison, rows))
    if "sides" in result:
        speed.write_record(result, call, args.out)

    for name in sides.extras():
        measure = functools.partial(sides.alone, name)
        call.part(name, 15, 5, with_rows(measure, functools.partial(speed.row, name)))

    def profiled(until: float) -> dict[str, Any]:
        side = sides.ready(speed.OURS)
        side.take(1)
        return profile.trace(side.take, 3, folder / "profile")

    call.part("profile", 25, 12, with_rows(profiled, profile.rows))

    def fed_from_files(until: float) -> dict[str, Any]:
        return fed.measure(sides.ready(speed.OURS), folder / "jpeg", sizes.size, until)

    limit = 4 if call.smoke else 30
    call.part("fed", limit, 4 if call.smoke else 20, with_rows(fed_from_files, fed.rows))
    call.part("max-autotune", 200, 5 if call.smoke else 60, sides.max_autotune)
    sides.close()


def call_2(call: Any, args: argparse.Namespace, folder: pathlib.Path) -> None:
    """Science."""
    from benchmarks.gpu_check import pack, science

    if args.smoke and args.pack is None:
        pictures = science.made_up_pictures(folder / "pictures")
    else:
        pictures = pack.unpack(args.pack, folder / "pictures")
    study = science.Science(pictures, folder / "runs", args.out, smoke=call.smoke)
    with science.shared(anywhere=call.smoke):
        compiled = call.part("compile", 0.5 * call.left(), 0, study.compile)
        if "failed" in compiled:
            return
        measured = call.part("times", 60, 0, study.measure)
        if "failed" in measured:
            return
        call.part("steps", 5, 0, lambda until: study.plan(call.left()))
        call.part("science", call.left(), 0, study.train)


def main() -> None:
    """Runs one call; ends with 0 when its parts have been gone through, whatever they found."""
    args = parse()
    folder = pathlib.Path(tempfile.mkdtemp(prefix="gpu_check_"))

    # In call 1 PyTorch and the tests need their share of the GPU's memory.
    if args.call == 1:
        os.environ.setdefault("XLA_CLIENT_MEM_FRACTION", "0.5")
    if args.smoke:
        # Its networks are not the real ones: programs of theirs must not be found later.
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder / "cache")

    import jax

    from benchmarks.gpu_check import card, small
    from benchmarks.gpu_check.call import Call
    from bn_jax.distributed import startup

    if jax.default_backend() == "cpu" and not args.smoke:
        print("gpu_check: jax finds no accelerator here; --smoke runs on a CPU", file=sys.stderr)
        raise SystemExit(2)
    call = Call(args.call, args.out, args.budget - RESERVE, smoke=args.smoke, pack=args.pack)
    if args.smoke:
        small.make_shallow()
    try:
        startup.use_compilation_cache()
        call.card = card.measure(smoke=args.smoke)
        print(f"card: {call.card}", flush=True)
        {1: call_1, 2: call_2}[args.call](call, args, folder)
        print((args.out / f"call_{args.call}.md").read_text())
        code = 0
    except Exception as error:
        import traceback

        traceback.print_exc()
        print(f"gpu_check: {type(error).__name__}: {error}".splitlines()[0], file=sys.stderr)
        code = 1
    shutil.rmtree(folder, ignore_errors=True)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # a thread may still compile


if __name__ == "__main__":
    main()
