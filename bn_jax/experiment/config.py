"""Finding experiments: `configs/NAME.py` beside the code, or the copy that the wheel carries."""

import ast
import difflib
import importlib.util
import math
import os
import pathlib
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict

from bn_jax import optim
from bn_jax.errors import ConfigError
from bn_jax.models import ACTIVATIONS, PRECISIONS
from bn_jax.models.inception import TABLE, VARIANTS

PACKAGE = pathlib.Path(__file__).resolve().parents[1]


def configs_folder() -> pathlib.Path:
    """The folder of the experiments: the checkout's, or the installed wheel's."""
    beside = PACKAGE.parent / "configs"
    return beside if (beside / "inception.py").is_file() else PACKAGE / "_bundled" / "configs"


def experiment_names() -> list[str]:
    """The experiments that can be trained, sorted by name."""
    return sorted(path.stem for path in configs_folder().glob("*.py") if path.stem != "__init__")


def experiments() -> str:
    """One line an experiment: its name and what its file says first; then the scales."""
    lines = []
    for name in experiment_names():
        doc = ast.get_docstring(ast.parse((configs_folder() / f"{name}.py").read_text())) or ""
        lines.append(f"{name:24} {' '.join(doc.split(chr(10) * 2)[0].split())}")
    return "\n".join(
        [
            *lines,
            "",
            "Scales: imagenet (default), digits, folder, synthetic, pod;",
            "        of mnist*: mnist (default), digits, synthetic.",
            "Train one: python -m bn_jax.main --config=configs/bn_x30.py:digits",
        ]
    )


def run_name(config: ConfigDict) -> str:
    """Folder name of a run: the experiment's, with the scale unless it is the default one."""
    default = {"inception": "imagenet", "mlp": "mnist"}[config.model.name]
    return config.name if config.scale == default else f"{config.name}_{config.scale}"


def check_fields(config: Any) -> None:
    """Raises ConfigError for a config of somebody's own that is not like the root experiments':
    a field is missing, or of another type."""
    remedy = "begin with a config of this package, as configs/bn_x5.py does, and change its fields"
    if not isinstance(config, ConfigDict):
        raise ConfigError(f"get_config() gives a {type(config).__name__}, no ConfigDict: {remedy}")
    own = dict(_fields(config))
    name = own.get("model.name", "inception")
    if name not in ("inception", "mlp"):
        return  # `validate.check` names those there are
    root = "mnist" if name == "mlp" else "inception"
    spec = importlib.util.spec_from_file_location(root, configs_folder() / f"{root}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    wanted = dict(_fields(module.get_config()))
    if missing := [field for field in wanted if field not in own]:
        more = f" and {len(missing) - 4} more" if len(missing) > 4 else ""
        raise ConfigError(f"the config has no {', '.join(missing[:4])}{more}: {remedy}")
    if extra := [field for field in own if field not in wanted]:
        close = difflib.get_close_matches(extra[0], wanted, n=1)
        hint = f"did you mean {close[0]!r}?" if close else "nothing reads it: take it out"
        raise ConfigError(f"there is no field {extra[0]!r}: {hint}")
    for field, value in wanted.items():
        kinds: tuple[type, ...] = {
            float: (float, int),
            tuple: (tuple, list),
            int: (int, type(None)) if field == "bn.group_size" else (int,),
        }.get(type(value), (type(value),))
        found = own[field]
        if not isinstance(found, kinds) or (isinstance(found, bool) and bool not in kinds):
            raise ConfigError(f"{field}={found!r}: not of type {kinds[0].__name__}; correct it")
        element = type(value[0]) if isinstance(value, tuple) and value else str
        if isinstance(found, (tuple, list)) and not all(type(x) is element for x in found):
            raise ConfigError(f"{field}={found!r}: not of {element.__name__} alone; correct it")


def _fields(tree: Mapping[str, Any] | ConfigDict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, (Mapping, ConfigDict)):
            yield from _fields(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def resolve(argv: list[str]) -> list[str]:
    """The command line with `--config`'s file found: a path, or the bare name of an experiment.

    Raises ConfigError, naming what comes closest, if there is no such file. The folder above the
    file's is made importable, because experiments build on each other (`from configs import ...`).
    """
    argv = list(argv)
    if any(word.lstrip("-") in ("help", "helpshort", "helpfull", "h", "?") for word in argv[1:]):
        print(f"{experiments()}\n")  # what --config may be; the flags' own help follows
    for i, word in enumerate(argv):
        if word in ("--config", "-config") and i + 1 < len(argv):
            argv[i + 1] = _file(argv[i + 1])
        elif word.startswith(("--config=", "-config=")):
            flag, value = word.split("=", 1)
            argv[i] = f"{flag}={_file(value)}"
    return argv


def _file(value: str) -> str:
    name, colon, scale = value.partition(":")
    path = pathlib.Path(name)
    if not path.is_file() and path.suffix in ("", ".py") and path.parent in _KNOWN_PARENTS:
        path = configs_folder() / f"{path.stem}.py"
    if not path.is_file():
        close = difflib.get_close_matches(path.stem, experiment_names(), n=1, cutoff=0.5)
        hint = f"did you mean configs/{close[0]}.py? " if close else ""
        raise ConfigError(f"there is no config {name}: {hint}`--list` names them all")
    parent = str(path.resolve().parent.parent)
    if parent not in sys.path:
        sys.path.append(parent)
    return f"{path}{colon}{scale}"


_KNOWN_PARENTS = (pathlib.Path(), pathlib.Path("configs"))


# Whether a config can be trained, decided from its values alone: no device, data set or disk.
#
# What needs more is checked where it is known: the number of devices in `mesh.check_batch`, the
# data set in `data.pipeline`, the paths of activations in `activations.Taps`.


MODELS = ("inception", "mlp")
NORMS = ("none", "batch_norm")
DTYPES = ("float32", "bfloat16", "float64")
SHUFFLES = ("none", "within_shard", "global")
LARGEST = 2**31 - 1  # steps and seeds are int32 on the device
INF = math.inf


def check(config: ConfigDict) -> None:
    """Raises ConfigError with the field, its value, the limit and the remedy, or returns None."""
    _optimization(config)
    _network(config)
    _normalization(config)
    _data(config)
    _records(config)
    _reproducible(config)


def _optimization(config: ConfigDict) -> None:
    _number(
        config, "learning_rate", 0, INF, low_open=True, hint="the paper's rates: 0.0015 to 0.045"
    )
    _number(config, "momentum", 0, 1, high_open=True, hint="0.9 is usual, 0 for plain SGD")
    _number(config, "decay_rate", 0, 1, low_open=True, hint="0.96 in the paper, 1 for none")
    _number(config, "decay_examples", 0, INF, low_open=True, hint="8 epochs in the paper")
    _number(config, "l2", 0, INF, hint="0.001 or 0.0002, 0 for none")
    _choice(config, "learning_rate_scaling", optim.SCALINGS)
    _number(config, "warmup_examples", 0, INF, hint="0 for none, 5 epochs are usual")
    scaling = config.learning_rate_scaling
    if scaling != "none" and config.bn.group_size is None:
        raise _error(
            config,
            "learning_rate_scaling",
            "bn.group_size=None does not say for how many examples learning_rate is",
            "set bn.group_size=32",
        )
    if scaling == "none" and config.warmup_examples:
        raise _error(
            config,
            "warmup_examples",
            "goes from the unscaled rate to the scaled, and learning_rate_scaling='none'",
            "set that to linear or sqrt",
        )
    _integer(config, "batch_size", 1, hint="32 in the paper")
    _integer(config, "batch_per_device", 0, hint="0 to use batch_size as it stands")
    _integer(config, "total_steps", 1, hint="train for at least one step")
    _integer(config, "seed", 0, hint="any number from 0 on")
    _integer(config, "steps_per_dispatch", 1, hint="above 1 for small networks on data in memory")


def _network(config: ConfigDict) -> None:
    _choice(config, "activation", tuple(ACTIVATIONS))
    _choice(config, "norm", NORMS)
    _choice(config, "dtype", DTYPES)
    _choice(config, "precision", tuple(PRECISIONS))
    _number(config, "dropout", 0, 1, high_open=True, hint="0.4 in Inception, 0 for none")
    _choice(config, "model.name", MODELS)
    if config.model.name == "mlp":
        _integer(config, "image_size", 1, 4096, hint="28 for MNIST")
        _number(config, "model.init_std", 0, INF, low_open=True, hint="a small number such as 0.1")
        _number(config, "model.threshold", 0, 1, high_open=True, hint="0.5 is usual")
        if not config.model.widths or min(config.model.widths) < 1:
            raise _error(
                config,
                "model.widths",
                "not one or more positive numbers of units",
                "(100, 100, 100)",
            )
        if config.lrn:
            raise _error(config, "lrn", "not an option of model.name='mlp'", "set it to False")
        return
    _integer(config, "image_size", 16, 4096, hint="224 in the paper, 28 for digits")
    _choice(config, "model.variant", tuple(VARIANTS))
    _number(config, "model.width", 0, 16, low_open=True, hint="1 is the paper's network")
    _number(config, "model.init_scale", 0, INF, low_open=True, hint="1 is Glorot's")
    modules = [f"inception_{row.name}" for row in TABLE]
    for name in config.bn.per_activation:
        if name not in modules:
            raise _error(
                config,
                "bn.per_activation",
                f"{name!r} is no module",
                f"choose from {', '.join(modules)}",
            )
    if config.bn.per_activation and config.norm == "none":
        raise _error(config, "bn.per_activation", "there is no BN (norm='none')", "set it to ()")


def _normalization(config: ConfigDict) -> None:
    _number(config, "bn.epsilon", 0, INF, hint="1e-3 is usual")
    _number(
        config, "bn.momentum", 0, 1, high_open=True, hint="0.99 is usual: the share that is kept"
    )
    group = config.bn.group_size
    if group is None:
        smallest = config.batch_per_device or config.batch_size
        if config.norm == "batch_norm" and smallest < 2:
            raise _error(config, "batch_size", "BN needs at least 2 examples", "set batch_size=32")
        return
    _integer(config, "bn.group_size", 2, hint="32 in the paper; batch_size for the whole batch")
    if config.norm == "none":
        return
    for field in ("batch_size", "record.activation_examples"):
        value = _get(config, field)
        if value % group:
            near = max(group, value // group * group)
            raise _error(
                config,
                field,
                f"not divisible by bn.group_size={group}",
                f"use a multiple, such as {near}",
            )


def _reproducible(config: ConfigDict) -> None:
    """A batch of 2^k groups, of which every device gets as many (reproducible.py)."""
    if not config.reproducible:
        return
    group = config.bn.group_size
    if group is None:
        raise _error(
            config, "bn.group_size", "reproducible=True needs groups of fixed size", "set it to 32"
        )
    field = "batch_per_device" if config.batch_per_device else "batch_size"
    size = _get(config, field)
    groups = size // group
    if size % group or groups & (groups - 1):
        near = group << max(0, groups.bit_length() - 1)
        raise _error(
            config,
            field,
            f"reproducible=True needs bn.group_size={group} times a power of two",
            f"use {near} or {2 * near}",
        )
    if config.steps_per_dispatch > 1:
        raise _error(
            config, "steps_per_dispatch", "reproducible=True takes single steps", "set it to 1"
        )


def _data(config: ConfigDict) -> None:
    data = config.data
    if not data.name:
        raise _error(config, "data.name", "empty", "name a data set, such as digits")
    _choice(config, "data.shuffle", SHUFFLES)
    _number(config, "data.crop", 0, 1, low_open=True, hint="0.08 in GoogLeNet, 1 for no crop")
    _integer(config, "data.shift", 0, config.image_size // 2, hint="a few pixels, 0 for none")
    _number(config, "data.distortion", 0, 1, hint="0 for none")
    _number(config, "data.holdout", 0, 1, high_open=True, hint="0 evaluates the test split")


def _records(config: ConfigDict) -> None:
    for field in ("eval_every", "checkpoint_every", "log_every", "record.activation_every"):
        _integer(config, field, 1, hint="a number of steps; total_steps for once, at the end")
    _number(config, "checkpoint_wait", 0, INF, hint="0.04 is usual, 1e9 to wait for every save")
    for field in (
        "eval_batch_size",
        "statistics_batches",
        "record.activation_examples",
        "keep_last",
    ):
        _integer(config, field, 1, hint="at least one")
    _integer(config, "keep_best", 0, hint="0 keeps the last ones only")
    for path in config.record.activations:
        if not path.endswith(("/input", "/pre_bn")):
            raise _error(
                config, "record.activations", f"{path!r} is no tap", "end it with /input or /pre_bn"
            )
        if path.endswith("/pre_bn") and config.norm == "none":
            raise _error(
                config,
                "record.activations",
                f"{path!r} needs BN (norm='none')",
                "record /input instead",
            )


def _get(config: ConfigDict, field: str) -> Any:
    for name in field.split("."):
        config = config[name]
    return config


def _error(config: ConfigDict, field: str, limit: str, remedy: str) -> ConfigError:
    return ConfigError(f"{field}={_get(config, field)!r}: {limit}; {remedy}")


def _number(
    config: ConfigDict,
    field: str,
    low: float,
    high: float,
    *,
    low_open: bool = False,
    high_open: bool = False,
    hint: str,
) -> None:
    """A finite number between the limits."""
    value = _get(config, field)
    above = value > low if low_open else value >= low
    below = value < high if high_open else value <= high
    if not (math.isfinite(value) and above and below):  # comparisons with NaN are False
        start, end = "(" if low_open else "[", ")" if high_open or high == INF else "]"
        raise _error(config, field, f"not in {start}{low:g}, {high:g}{end}", hint)


def _integer(config: ConfigDict, field: str, low: int, high: int = LARGEST, *, hint: str) -> None:
    value = _get(config, field)
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise _error(config, field, f"not a whole number from {low} to {high}", hint)


def _choice(config: ConfigDict, field: str, choices: tuple[str, ...]) -> None:
    if _get(config, field) not in choices:
        raise _error(config, field, "unknown", f"choose from {', '.join(choices)}")


# BN_JAX_SMOKE=1: documented commands in seconds, to see that they run; results mean nothing.


def shorten(config: ConfigDict) -> ConfigDict:
    """The config cut to two dispatches and one evaluation if BN_JAX_SMOKE=1, else as it is."""
    if os.environ.get("BN_JAX_SMOKE") != "1":
        return config
    print("BN_JAX_SMOKE=1: a shortened run, its results mean nothing", flush=True)
    short = ConfigDict(config.to_dict())
    steps = 2 * config.steps_per_dispatch
    short.total_steps = min(config.total_steps, steps)
    for name in ("eval_every", "checkpoint_every", "log_every"):
        short[name] = min(config[name], steps)
    short.record.activation_every = min(config.record.activation_every, steps)
    short.statistics_batches = 1
    short.scale = f"{config.scale}_smoke"  # the default workdir is not the real run's
    return short.lock()
