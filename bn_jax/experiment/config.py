"""Makes a checked config from the command line: finds the file, reads it, sets and checks fields.

Nothing here imports jax before a config is checked, so that `--help`, or the error of a mistyped
name, appears at once.
"""

import ast
import contextlib
import difflib
import importlib.machinery
import importlib.util
import math
import os
import pathlib
import sys
import textwrap
import traceback
from collections.abc import Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any

from ml_collections import ConfigDict

from bn_jax.errors import ConfigError

PACKAGE = pathlib.Path(__file__).resolve().parents[1]

# 1. Which experiments there are.


def configs_folder() -> pathlib.Path:
    """Returns the folder of the experiments: the checkout's, or that of the installed wheel."""
    beside = PACKAGE.parent / "configs"
    return beside if (beside / "inception.py").is_file() else PACKAGE / "_bundled" / "configs"


def experiment_names() -> list[str]:
    """Lists the experiments that can be trained, sorted by name."""
    return sorted(path.stem for path in configs_folder().glob("*.py") if path.stem != "__init__")


def experiments() -> str:
    """Lists the experiments, each with the first sentence of its file, and the scales."""
    lines = []
    for name in experiment_names():
        doc = ast.get_docstring(ast.parse((configs_folder() / f"{name}.py").read_text())) or ""
        first = " ".join(doc.partition("\n\n")[0].split())
        lines.append(f"{name:24} {first}")
    scales = """
Scales: imagenet (default), digits, mnist, tiny40, folder, synthetic, pod;
        of mnist*: mnist (default), digits, synthetic.
Train one: python -m bn_jax.main --config=configs/bn_x30.py:digits"""
    return "\n".join([*lines, scales])


def run_name(config: ConfigDict) -> str:
    """Returns a run's folder name: the experiment's, with the scale unless it is the default."""
    default = {"inception": "imagenet", "mlp": "mnist"}[config.model.name]
    return config.name if config.scale == default else f"{config.name}_{config.scale}"


# 2. Reading a config.


def read(file: str, settings: Sequence[str] = ()) -> ConfigDict:
    """Reads the config of a command line, checks and locks it.

    Args:
      file: NAME or PATH of a config, with a scale after a colon: configs/bn_x30.py:digits.
      settings: FIELD=VALUE, as it follows `--config.` on the command line.

    With BN_JAX_SMOKE=1 the config is shortened (`shorten`).

    Raises ConfigError with the field, its value, the limit and the remedy. What depends on devices
    or on the data set is not checked yet (see `check`).
    """
    config = load(file)
    for setting in settings:
        field, equals, text = setting.partition("=")
        if not equals:
            raise ConfigError(f"--config.{setting}: write --config.{field}=VALUE")
        set_field(config, field, text)
    check(config)
    return shorten(config).lock()


def load(file: str) -> ConfigDict:
    """Loads the config of NAME or PATH[:SCALE]. Raises ConfigError, also for errors in the file.

    The folder above the file's is made importable, because experiments build on each other.
    `from configs import ...` also finds the experiments of this package (see `_configs_of`).
    """
    name, _, scale = file.partition(":")
    path = _find(name)
    above = str(path.resolve().parents[1])
    if above not in sys.path:
        sys.path.append(above)

    config = _get_config(path, scale)
    if not isinstance(config, ConfigDict):
        raise ConfigError(
            f"get_config() of {name} returns a {type(config).__name__}, not a ConfigDict: {REMEDY}"
        )
    return config


@contextlib.contextmanager
def _configs_of(path: pathlib.Path) -> Iterator[None]:
    """Makes the package `configs` the config file's folder followed by ours, while the file runs.

    A project may have a folder `configs` of its own, and Python would find only one of the two.
    Then our experiments would miss those that they build on, or a user's would miss ours.
    """
    folder = path.resolve().parent
    folders = [folder] if folder.name == "configs" else []
    if configs_folder() not in folders:
        folders.append(configs_folder())

    init = folders[0] / "__init__.py"
    spec = importlib.util.spec_from_file_location(
        "configs", init, submodule_search_locations=[str(place) for place in folders]
    )
    assert spec is not None and spec.loader is not None
    package = importlib.util.module_from_spec(spec)

    before = _configs_modules()
    for name in before:
        del sys.modules[name]
    sys.modules["configs"] = package
    try:
        if init.is_file():
            spec.loader.exec_module(package)
        yield
    finally:
        for name in _configs_modules():
            del sys.modules[name]
        sys.modules.update(before)


def _configs_modules() -> dict[str, ModuleType]:
    """Returns the modules of the package `configs` that are imported, by name."""
    return {name: m for name, m in sys.modules.items() if name.partition(".")[0] == "configs"}


def _get_config(path: pathlib.Path, scale: str = "") -> Any:
    """Runs a config file and calls its get_config(scale)."""
    # The loader is given, so that the error of a file without .py is that it is not Python.
    loader = importlib.machinery.SourceFileLoader(path.stem, str(path))
    spec = importlib.util.spec_from_file_location(path.stem, path, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    try:
        with _configs_of(path):
            loader.exec_module(module)
            get_config = getattr(module, "get_config", None)
            if get_config is not None:
                return get_config(scale) if scale else get_config()
    except SyntaxError as error:
        raise ConfigError(f"--config: {error}; it must be a Python file") from None
    except Exception as error:
        raise ConfigError(_mistake(error, path)) from error
    raise ConfigError(f"{path} has no function get_config(): `--list` names the experiments")


REMEDY = "begin with a config of this package, as configs/bn_x5.py does, and change its fields"


def _find(name: str) -> pathlib.Path:
    """Finds the file of a config from a path or the name of an experiment.

    Raises ConfigError, naming what comes closest, if there is no such file.
    """
    path = pathlib.Path(name)
    own = path.suffix in ("", ".py") and path.parent in (pathlib.Path(), pathlib.Path("configs"))
    if not path.is_file() and own:
        path = configs_folder() / f"{path.stem}.py"
    if not path.is_file():
        close = difflib.get_close_matches(path.stem, experiment_names(), n=1, cutoff=0.5)
        hint = f"did you mean configs/{close[0]}.py? " if close else ""
        raise ConfigError(f"there is no config {name}: {hint}`--list` names them all")
    return path


def _mistake(error: Exception, path: pathlib.Path) -> str:
    """Says in one line where in a config file an error is, and what Python says of it."""
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(path)]
    where = f"{path}, line {lines[-1]}: " if lines else f"{path}: "
    if isinstance(error, ValueError):
        return f"{where}{error}"  # such as that of an unknown scale, which is a whole sentence
    # After a misspelt field, ml_collections lists all fields of a locked config.
    return where + textwrap.shorten(f"{type(error).__name__}: {error}", 200, placeholder=" ...")


# Fields that may be None, and their type if they are not.
OPTIONAL: dict[str, type] = {"bn.group_size": int}


def set_field(config: ConfigDict, field: str, text: str) -> None:
    """Sets a field to a value from the command line, converted to the type of the old value.

    Numbers and tuples are written as in Python, booleans as true, false, 1 or 0. Raises
    ConfigError for an unknown field, naming what comes closest, and for a value of another type.
    """
    known = dict(fields(config))
    if field not in known:
        close = difflib.get_close_matches(field, known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else "--dry_run prints them all"
        raise ConfigError(f"the config has no field {field!r}: {hint}")

    kind = OPTIONAL.get(field, type(known[field]))
    try:
        value = None if text == "None" and field in OPTIONAL else _parse(text, kind)
    except (ValueError, SyntaxError):
        raise ConfigError(f"{field}={text}: must be of type {kind.__name__}; correct it") from None

    *groups, name = field.split(".")
    for group in groups:
        config = config[group]
    config[name] = value


def _parse(text: str, kind: type) -> Any:
    """Parses a value of the command line. Raises ValueError or SyntaxError."""
    if kind is bool:
        if text.lower() not in ("true", "false", "1", "0"):
            raise ValueError(text)
        return text.lower() in ("true", "1")
    if kind is tuple:
        value = ast.literal_eval(text)
        return tuple(value) if isinstance(value, (tuple, list)) else (value,)
    return kind(text)


def fields(tree: Mapping[str, Any] | ConfigDict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields all fields with their values; `model.width` is a field, `model` is not."""
    for name, value in tree.items():
        if isinstance(value, (Mapping, ConfigDict)):
            yield from fields(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def shorten(config: ConfigDict) -> ConfigDict:
    """Shortens a config to two dispatches and one evaluation if BN_JAX_SMOKE=1.

    Documented commands then end in seconds, which shows that they run; their results mean nothing.
    """
    if not smoke():
        return config

    short = ConfigDict(config.to_dict())
    steps = 2 * config.steps_per_dispatch
    short.total_steps = min(config.total_steps, steps)
    for name in ("eval_every", "checkpoint_every", "log_every"):
        short[name] = min(config[name], steps)
    short.record.activation_every = min(config.record.activation_every, steps)
    short.statistics_batches = 1
    short.scale = f"{config.scale}_smoke"  # the default workdir is not the real run's
    return short


def smoke() -> bool:
    """Whether BN_JAX_SMOKE=1 asks for shortened runs."""
    return os.environ.get("BN_JAX_SMOKE") == "1"


# 3. Checking a config.

MODELS = ("inception", "mlp")
NORMS = ("none", "batch_norm")
DTYPES = ("float32", "bfloat16", "float64")
SHUFFLES = ("none", "within_shard", "global")
LARGEST = 2**31 - 1  # steps and seeds are int32 on the device
# Linear scaling of the rate is known to work up to these (Goyal et al. 2017, arXiv:1706.02677: a
# batch of 8,192 at the rate 3.2).
LARGEST_LINEAR_BATCH = 8192  # examples
LARGEST_LINEAR_RATE = 3.0


def check(
    config: ConfigDict, devices: Sequence[Any] | None = None, *, training: bool = True
) -> None:
    """Raises ConfigError with the field, its value, the limit and the remedy, or returns None.

    Args:
      config: of a run; if devices are given, as `build.for_devices` makes it for them.
      devices: those of the run; None if they are not known yet, as on the command line.
      training: False if a trained network is only evaluated.

    What depends on the data set is checked later, by `check_data`, because a set is opened with a
    checked config.
    """
    _check_fields(config)
    rules = _Rules(config)
    _check_optimization(config, rules)
    _check_network(config, rules)
    _check_input(config, rules)
    _check_records(config, rules)
    _check_groups(config, rules)
    _check_scaling(config, rules)
    if devices is not None:
        _check_devices(config, rules, devices, training)


def settled(config: ConfigDict, train_examples: int) -> ConfigDict:
    """Replaces what the command line leaves open by the values that run.json records.

    `decay_epochs` becomes `decay_examples`, for a set of `train_examples`, and `model.init` becomes
    the rule that "auto" stands for.
    """
    from bn_jax.models import init_rule

    config = ConfigDict(config.to_dict())
    if config.decay_epochs:
        config.decay_examples = config.decay_epochs * train_examples
        config.decay_epochs = 0.0
    if config.model.name == "inception":
        config.model.init = init_rule(config)
    return config.lock()


def check_data(config: ConfigDict, data: Any) -> None:
    """Raises ConfigError for a config that does not fit its data set (`data.pipeline.Data`)."""
    data.steps_per_epoch(config.batch_size)  # raises if there is not one full batch
    examples = config.record.activation_examples
    if config.record.activations and examples > data.num_train:
        raise ConfigError(
            f"record.activation_examples={examples} exceeds the {data.num_train} training examples"
        )
    if config.steps_per_dispatch > 1:
        data.resident()  # raises if the set is not held in memory


def _check_fields(config: ConfigDict) -> None:
    """Checks that a config has the fields of its root experiment, with values of the same types."""
    own = dict(fields(config))
    name = own.get("model.name", "inception")
    if name not in MODELS:
        return  # _check_network says which there are
    root = "mnist" if name == "mlp" else "inception"
    wanted = dict(fields(_get_config(configs_folder() / f"{root}.py")))

    if missing := [field for field in wanted if field not in own]:
        more = f" and {len(missing) - 4} more" if len(missing) > 4 else ""
        raise ConfigError(f"the config has no {', '.join(missing[:4])}{more}: {REMEDY}")
    if extra := [field for field in own if field not in wanted]:
        close = difflib.get_close_matches(extra[0], wanted, n=1)
        hint = f"did you mean {close[0]!r}?" if close else "nothing reads it: take it out"
        raise ConfigError(f"there is no field {extra[0]!r}: {hint}")

    for field, value in wanted.items():
        _check_type(field, own[field], value)


def _check_type(field: str, found: Any, example: Any) -> None:
    """Checks that `found` has the type of `example`, the field's value in the root experiment."""
    if found is None and field in OPTIONAL:
        return
    kind = type(example)
    # A float may be a whole number, and a tuple a list, as in run.json.
    also = {float: int, tuple: list}.get(kind, kind)
    if type(found) not in (kind, also):
        raise ConfigError(f"{field}={found!r}: must be of type {kind.__name__}; correct it")

    if kind is tuple:
        element = type(example[0]) if example else str
        if any(type(x) is not element for x in found):
            raise ConfigError(
                f"{field}={found!r}: all elements must be of type {element.__name__}; correct it"
            )


class _Rules:
    """Checks the fields of one config against the common kinds of rules."""

    def __init__(self, config: ConfigDict):
        self._values = dict(fields(config))

    def error(self, field: str, limit: str, remedy: str) -> ConfigError:
        """Makes the error of a field: value, limit and remedy in one line."""
        return ConfigError(f"{field}={self._values[field]!r}: {limit}; {remedy}")

    def number(
        self,
        field: str,
        hint: str,
        *,
        above: float | None = None,
        at_least: float = 0,
        below: float = math.inf,
        at_most: float | None = None,
    ) -> None:
        """Checks for a finite number within limits; `above` and `below` are excluded."""
        value = self._values[field]
        high = value < below if at_most is None else value <= at_most
        low = value >= at_least if above is None else value > above
        if math.isfinite(value) and low and high:
            return
        start = f"[{at_least:g}" if above is None else f"({above:g}"
        end = f"{below:g})" if at_most is None else f"{at_most:g}]"
        raise self.error(field, f"must be in {start}, {end}", hint)

    def whole(self, field: str, hint: str, *, at_least: int = 1, at_most: int = LARGEST) -> None:
        """Checks for a whole number within limits, which are included."""
        if not at_least <= self._values[field] <= at_most:
            limit = f"must be a whole number from {at_least} to {at_most}"
            raise self.error(field, limit, hint)

    def choice(self, field: str, choices: Sequence[str]) -> None:
        """Checks for one of a few words."""
        if self._values[field] not in choices:
            raise self.error(field, "unknown", f"choose from {', '.join(choices)}")


def _check_optimization(config: ConfigDict, rules: _Rules) -> None:
    rules.number("learning_rate", "the paper's rates are 0.0015 to 0.045", above=0)
    rules.number("momentum", "0.9 is usual, 0 for plain SGD", below=1)
    rules.number("decay_rate", "0.96 in the paper, 1 for none", above=0, at_most=1)
    rules.number("decay_epochs", "8 in GoogLeNet, 0 where decay_examples is given")
    rules.number("decay_examples", "0 where decay_epochs is given")
    if bool(config.decay_epochs) == bool(config.decay_examples):
        limit = f"decay_examples={config.decay_examples:g}, and one of the two must be 0, not both"
        raise rules.error("decay_epochs", limit, "set decay_epochs=8 and decay_examples=0")
    rules.number("l2", "0.001 or 0.0002, 0 for none")
    rules.whole("total_steps", "train for at least one step")
    rules.whole("seed", "any number from 0 on", at_least=0)


def _check_scaling(config: ConfigDict, rules: _Rules) -> None:
    """Checks how the rate grows with the batch, whose groups are checked already."""
    rules.choice("learning_rate_scaling", ("none", "linear", "sqrt"))
    rules.number("warmup_examples", "0 for none, 5 epochs are usual")
    if config.learning_rate_scaling != "none" and config.bn.group_size is None:
        raise rules.error(
            "learning_rate_scaling",
            "bn.group_size=None does not say for how many examples learning_rate is",
            "set bn.group_size=32, or this to none and warmup_examples to 0",
        )
    if config.learning_rate_scaling == "linear" and config.batch_size > LARGEST_LINEAR_BATCH:
        scaled = config.learning_rate * config.batch_size / config.bn.group_size
        if scaled > LARGEST_LINEAR_RATE:
            raise rules.error(
                "learning_rate_scaling",
                f"a batch of {config.batch_size:,} would have the rate {scaled:.3g}, and above "
                f"{LARGEST_LINEAR_BATCH:,} examples {LARGEST_LINEAR_RATE:g} is the limit (Goyal et "
                "al. 2017; methods such as LARS, which go further, are not implemented)",
                "set it to sqrt, or to none with warmup_examples=0 and a learning_rate of your "
                "choice",
            )
    if config.learning_rate_scaling == "none" and config.warmup_examples:
        raise rules.error(
            "warmup_examples",
            "warms up from the unscaled rate to the scaled one, but learning_rate_scaling='none'",
            "set warmup_examples=0, or learning_rate_scaling to linear or sqrt",
        )


def _check_network(config: ConfigDict, rules: _Rules) -> None:
    # Imported here because flax takes a second.
    from bn_jax.models import ACTIVATIONS, PRECISIONS
    from bn_jax.models.inception import TABLE, VARIANTS
    from bn_jax.models.initializers import INITS

    rules.choice("activation", tuple(ACTIVATIONS))
    rules.choice("norm", NORMS)
    rules.choice("dtype", DTYPES)
    rules.choice("precision", tuple(PRECISIONS))
    rules.number("dropout", "0.4 in Inception, 0 for none", below=1)
    rules.number("bn.epsilon", "1e-3 is usual")
    rules.number("bn.momentum", "0.99 is usual: the share that is kept", below=1)
    rules.number("bn.noise", "0 for none, 1 is much", at_most=10)
    rules.whole("bn.freeze_after", "0 for never", at_least=0)
    rules.choice("model.name", MODELS)

    if config.model.name == "mlp":
        rules.whole("image_size", "28 for MNIST", at_most=4096)
        rules.number("model.init_std", "a small number such as 0.1", above=0)
        rules.number("model.threshold", "0.5 is usual", below=1)
        if not config.model.widths or min(config.model.widths) < 1:
            limit = "not one or more positive numbers of units"
            raise rules.error("model.widths", limit, "(100, 100, 100)")
        if config.lrn:
            raise rules.error("lrn", "not an option of model.name='mlp'", "set it to False")
        return

    rules.whole("image_size", "224 in the paper, 28 for digits", at_least=16, at_most=4096)
    rules.choice("model.variant", tuple(VARIANTS))
    rules.number("model.width", "1 is the paper's network", above=0, at_most=16)
    rules.choice("model.init", INITS)
    rules.number("model.init_scale", "1 leaves the weights of model.init as they are", above=0)
    modules = [f"inception_{row.name}" for row in TABLE]
    for name in config.bn.per_activation:
        if name not in modules:
            known = f"choose from {', '.join(modules)}"
            raise rules.error("bn.per_activation", f"{name!r} is not a module", known)
    if config.bn.per_activation and config.norm == "none":
        raise rules.error("bn.per_activation", "there is no BN (norm='none')", "set it to ()")


def _check_input(config: ConfigDict, rules: _Rules) -> None:
    if not config.data.name:
        raise rules.error("data.name", "empty", "name a data set, such as digits")
    rules.choice("data.shuffle", SHUFFLES)
    rules.number("data.crop", "0.08 in GoogLeNet, 1 for no crop", above=0, at_most=1)
    half = config.image_size // 2
    rules.whole("data.shift", "a few pixels, 0 for none", at_least=0, at_most=half)
    rules.number("data.distortion", "0 for none", at_most=1)
    rules.number("data.holdout", "0 evaluates the test split", below=1)

    rules.whole("steps_per_dispatch", "above 1 for small networks on data in memory")
    distorted = config.data.mirror or config.data.shift or config.data.distortion
    if config.steps_per_dispatch > 1 and (distorted or config.data.crop < 1):
        raise rules.error(
            "steps_per_dispatch",
            "needs undistorted data",
            "set it to 1, or data.mirror=False, data.shift=0, data.distortion=0 and data.crop=1",
        )


def _check_records(config: ConfigDict, rules: _Rules) -> None:
    rules.whole("eval_early", "the first step of early evaluations, 0 for none", at_least=0)
    for field in ("eval_every", "checkpoint_every", "log_every", "record.activation_every"):
        rules.whole(field, "a number of steps; total_steps for once, at the end")
    for field in ("eval_batch_size", "statistics_batches", "keep_last"):
        rules.whole(field, "at least one")
    rules.whole("record.activation_examples", "at least one")
    rules.whole("keep_best", "0 keeps the last ones only", at_least=0)
    rules.whole("keep_every", "0 keeps no others", at_least=0)
    if config.keep_every % config.checkpoint_every:
        limit = f"only steps that checkpoint_every={config.checkpoint_every} divides are saved"
        raise rules.error("keep_every", limit, "choose a multiple of it")
    rules.number("checkpoint_wait", "0.04 is usual, 1e9 to wait for every save")
    rules.number("write_seconds", "30 for a bucket, 0 for no limit")

    for path in config.record.activations:
        field = "record.activations"
        if not path.endswith(("/input", "/pre_bn")):
            limit = f"{path!r} does not say what to record of the layer"
            raise rules.error(field, limit, "end it with /input or /pre_bn")
        if path.endswith("/pre_bn") and config.norm == "none":
            raise rules.error(field, f"{path!r} needs BN (norm='none')", "record /input instead")


def _check_groups(config: ConfigDict, rules: _Rules) -> None:
    """Checks the batch, and the statistic groups of bn.group_size examples in it."""
    rules.whole("batch_size", "32 in the paper")
    rules.whole("batch_per_device", "0 to use batch_size as it stands", at_least=0)
    group = config.bn.group_size
    if group is not None:
        rules.whole("bn.group_size", "32 in the paper; None for the whole batch", at_least=2)

    if config.norm == "batch_norm":
        if group is None and (config.batch_per_device or config.batch_size) < 2:
            raise rules.error("batch_size", "BN needs at least 2 examples", "set batch_size=32")
        sizes = {
            "batch_size": config.batch_size,
            "record.activation_examples": config.record.activation_examples,
        }
        for field, size in sizes.items():
            if group is not None and size % group:
                near = max(group, size // group * group)
                limit = f"not divisible by bn.group_size={group}"
                raise rules.error(field, limit, f"use a multiple, such as {near}")

    if not config.reproducible:
        return
    # The sum over the groups is a binary tree (reproducible.py).
    if group is None:
        limit = "reproducible=True needs groups of fixed size"
        raise rules.error("bn.group_size", limit, "set it to 32")
    field = "batch_per_device" if config.batch_per_device else "batch_size"
    size = config.batch_per_device or config.batch_size
    if size % group or not _power_of_two(size // group):
        near = group << max(0, (size // group).bit_length() - 1)
        limit = f"reproducible=True needs bn.group_size={group} times a power of two"
        raise rules.error(field, limit, f"use {near} or {2 * near}")
    if config.steps_per_dispatch > 1:
        limit = "reproducible=True takes single steps"
        raise rules.error("steps_per_dispatch", limit, "set it to 1")


def _check_devices(
    config: ConfigDict, rules: _Rules, devices: Sequence[Any], training: bool
) -> None:
    """Checks that in training all devices get the same number of examples, at least one.

    Evaluation pads its batches, so it runs on any number of devices.
    """
    if config.dtype == "float64":
        import jax

        if not jax.config.read("jax_enable_x64"):
            raise ConfigError("dtype=float64 needs JAX_ENABLE_X64=1 in the environment")
    if not training:
        return

    count = len(devices)
    batch = config.batch_size
    group = config.bn.group_size
    if batch < count:
        raise ConfigError(
            f"batch_size={batch} is smaller than the {count} devices: use the scale `:pod` "
            "(ImageNet, 32 examples a device), a larger batch or fewer devices"
        )
    if batch % count:
        multiple = math.lcm(count, group or 1)  # the batch also consists of whole groups
        near = max(multiple, batch // multiple * multiple)
        raise ConfigError(
            f"batch_size={batch} is not divisible by the {count} devices: "
            f"use a multiple of {multiple}, such as {near}, or fewer devices"
        )

    from bn_jax.distributed import startup

    promised = config.deterministic or config.reproducible
    if promised and devices[0].platform == "gpu" and not startup.gpus_are_deterministic():
        field = "deterministic" if config.deterministic else "reproducible"
        limit = f"a GPU needs {startup.DETERMINISTIC} in XLA_FLAGS before jax starts"
        raise rules.error(field, limit, "bn_jax.main sets it; elsewhere set it in the environment")
    if config.reproducible and (count > batch // group or not _power_of_two(count)):
        raise ConfigError(
            f"reproducible=True on {count} devices: batch_size={batch} in groups of "
            f"bn.group_size={group} needs a power of two of at most {batch // group} "
            "devices; use fewer, a larger batch_size, or reproducible=False"
        )
    convolutions = config.model.name != "mlp"
    if config.steps_per_dispatch > 1 and convolutions and devices[0].platform == "cpu":
        raise rules.error(
            "steps_per_dispatch",
            "is only for the MLP on a CPU, where convolutions in a loop are several times slower",
            "set it to 1",
        )


def _power_of_two(n: int) -> bool:
    return n > 0 and n & (n - 1) == 0
