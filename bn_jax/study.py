"""Answers a question about batch normalization: `python -m bn_jax.study NAME --workdir=DIR`.

It trains the networks of a study, measures them, and writes a table and a picture; --list says what
each study asks. The same command resumes a study, and draws a finished one again. Fields of all its
networks can be changed: --config.total_steps=1000
"""

import argparse
import pathlib

from bn_jax import errors
from bn_jax.distributed import cluster
from bn_jax.errors import ConfigError


def main() -> None:
    """Reads the command line and runs a study."""
    parser = errors.Parser(
        "python -m bn_jax.study",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("name", nargs="?", metavar="NAME", help="of a study; --list names them")
    add("--workdir", type=pathlib.Path, help="folder of its runs, table and picture")
    add("--config", default="", metavar="FILE[:SCALE]", help="the experiment that is changed")
    add("--config.FIELD", metavar="VALUE", help="changes a field of all its networks")
    add("--seeds", type=int, default=1, help="number of seeds: 0, 1, ... (default: 1)")
    add("--jobs", type=int, help="runs side by side (default: one a GPU, or for 2 CPU cores)")
    add("--list", action="store_true", help="what each study asks, its paper and its time")
    args, settings = parser.parse_with_fields()

    # Imported here because jax and matplotlib take seconds, which --help should not wait for.
    from bn_jax.distributed import startup
    from bn_jax.studies import STUDIES, frame

    if args.list:
        print(listing())
        return
    for field in settings:
        if field.startswith(("seed=", "name=")):
            raise ConfigError(
                f"--config.{field}: the study sets it; --seeds=N, --config=FILE[:SCALE]"
            )
    if args.name not in STUDIES:
        raise ConfigError(f"there is no study {args.name!r}; choose from {', '.join(STUDIES)}")
    if args.workdir is None:
        raise ConfigError(f"--workdir=DIR is needed, such as --workdir=runs/{args.name}")
    for option in ("seeds", "jobs"):
        value = getattr(args, option)
        if value is not None and value < 1:
            raise ConfigError(f"--{option}={value} must be at least 1")
    cluster.require_one_process("bn_jax.study")

    startup.use_safe_sums()
    startup.use_compilation_cache()
    study = STUDIES[args.name]
    for path in frame.run(study, args.workdir, args.config, settings, args.seeds, args.jobs):
        print(path)


def listing() -> str:
    """Describes each study in three lines."""
    from bn_jax.studies import STUDIES

    return "\n".join(
        f"{study.name:12} {study.question}\n"
        f"{'':12} follows {study.follows}\n"
        f"{'':12} {study.config}, about {study.minutes} min a seed on two cores"
        for study in STUDIES.values()
    )


if __name__ == "__main__":
    errors.run_command(main)
