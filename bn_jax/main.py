"""Trains one experiment: `python -m bn_jax.main --config=configs/bn_x30.py:digits`.

The same command again resumes the run. Any field can be changed: --config.learning_rate=0.01
"""

import argparse
import faulthandler
import pathlib
import sys

from bn_jax import errors
from bn_jax.errors import ConfigError
from bn_jax.experiment import config as configs


def main() -> None:
    """Reads the command line and trains."""
    parser = errors.Parser(
        "python -m bn_jax.main",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--config", metavar="FILE[:SCALE]", help="experiment, by its name or the path of its file")
    add("--config.FIELD", metavar="VALUE", help="changes a field; --dry_run prints them all")
    add("--workdir", help="folder of the run's records and checkpoints (runs/NAME[_SCALE])")
    add("--list", action="store_true", help="print the experiments and scales, and end")
    add("--dry_run", action="store_true", help="check the config, print it, and end")
    if {"-h", "--help"} & {*sys.argv[1:]}:
        parser.epilog = configs.experiments()
    args, settings = parser.parse_with_fields()

    if args.list:
        print(configs.experiments())
        return
    if args.config is None:
        raise ConfigError("--config=configs/NAME.py[:SCALE] is needed; --list names them")

    config = configs.read(args.config, settings)
    if configs.smoke():
        print("BN_JAX_SMOKE=1: this run is shortened, and its results mean nothing", flush=True)
    workdir = pathlib.Path(args.workdir or f"runs/{configs.run_name(config)}")
    if args.dry_run:
        print(f"{config}\nworkdir: {workdir}")
        if config.batch_per_device:
            each = config.batch_per_device
            print(f"on N devices batch_size is {each} x N, and there are fewer steps by as much")
        return

    # Imported here because jax takes seconds, which a mistyped option should not wait for.
    from bn_jax import train
    from bn_jax.distributed import accelerators, startup
    from bn_jax.distributed.watchdog import Watchdog
    from bn_jax.workdir import reader

    faulthandler.enable()  # a crash of compiled code says where in Python it was called
    startup.use_safe_sums(reader.read_record(workdir))
    deterministic = config.deterministic or config.reproducible
    if deterministic:
        startup.make_gpus_deterministic()
    startup.use_compilation_cache(deterministic=deterministic)
    with Watchdog() as watch:
        startup.initialize()
        accelerators.require_used(accelerators.start())
        train.run(config, workdir, watch, draw)


def draw(workdir: pathlib.Path) -> None:
    """Draws a finished run. It imports matplotlib, which training does not need."""
    from bn_jax.figures import run

    for path in run.draw_run(workdir, workdir / "figures"):
        print(path)


if __name__ == "__main__":
    errors.run_command(main)
