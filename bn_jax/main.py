"""Trains one experiment: `python -m bn_jax.main --config=configs/bn_x30.py:digits`.

The same command again resumes the run. Any field can be changed: --config.learning_rate=0.01
"""

import pathlib

from absl import app, flags, logging
from ml_collections import config_flags

from bn_jax import errors
from bn_jax.errors import ConfigError
from bn_jax.experiment.config import check_fields, experiments, resolve, run_name

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Experiment file, with a scale after a colon: configs/bn_x30.py:digits"
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder of the run's records and checkpoints. Default: runs/NAME[_SCALE]."
)
_LIST = flags.DEFINE_bool("list", False, "Print the experiments and scales, and end.")
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Check the config, print it, and end.")


def main(argv: list[str]) -> None:
    """Everything after the command line has been read."""
    logging.set_verbosity(logging.WARNING)
    if len(argv) > 1:
        raise ConfigError(f"unexpected argument {argv[1]!r}: options are written --name=value")
    if _LIST.value:
        print(experiments())
        return
    config = _CONFIG.value
    if config is None:
        raise ConfigError("--config=configs/NAME.py[:SCALE] is needed; --list names them")
    check_fields(config)
    from bn_jax.experiment.config import (  # later imports take seconds: are they needed?
        check,
        shorten,
    )

    check(config)
    config = shorten(config)
    workdir = pathlib.Path(_WORKDIR.value or f"runs/{run_name(config)}")
    if _DRY_RUN.value:
        print(f"{config}\nworkdir: {workdir}")
        if config.batch_per_device:
            each = config.batch_per_device
            print(f"on N devices batch_size is {each} x N, and there are fewer steps by as much")
        return
    from bn_jax import train
    from bn_jax.distributed import startup
    from bn_jax.distributed.watchdog import Watchdog

    def draw(folder: pathlib.Path) -> None:
        from bn_jax.figures import run  # with matplotlib: at the end, not before the first step

        for path in run.draw_run(folder, folder / "figures"):
            print(path)

    startup.use_compilation_cache()
    startup.initialize()
    with Watchdog() as watch:
        train.run(config, workdir, watch, draw)


def parse(argv: list[str]) -> list[str]:
    """absl's parsing, with one line and exit code 2 for everything that can be wrong in it."""
    try:
        return flags.FLAGS(resolve(argv))
    except SystemExit:  # --help has been printed; absl ends with 1
        raise SystemExit(0) from None
    except SyntaxError as error:  # of a --config that is no Python
        errors.fail(f"--config: {error}", ConfigError.exit_code)
    except flags.UnrecognizedFlagError as error:
        errors.fail(f"{str(error).rstrip(' ?')}; --help names the options", ConfigError.exit_code)
    except (flags.Error, ConfigError, ValueError, TypeError, LookupError, AttributeError) as error:
        errors.fail(errors.reason(error), ConfigError.exit_code)


if __name__ == "__main__":
    app.define_help_flags()
    errors.run_command(lambda: app.run(main, flags_parser=parse))
