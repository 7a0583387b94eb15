"""Finding experiments: `configs/NAME.py` beside the code, or the copy that the wheel carries."""

import ast
import difflib
import importlib.util
import pathlib
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict

from bn_jax.errors import ConfigError

PACKAGE = pathlib.Path(__file__).resolve().parent


def folder() -> pathlib.Path:
    """The folder of the experiments: the checkout's, or the installed wheel's."""
    beside = PACKAGE.parent / "configs"
    return beside if (beside / "inception.py").is_file() else PACKAGE / "_bundled" / "configs"


def names() -> list[str]:
    """The experiments that can be trained, sorted by name."""
    return sorted(path.stem for path in folder().glob("*.py") if path.stem != "__init__")


def experiments() -> str:
    """One line an experiment: its name and what its file says first; then the scales."""
    lines = []
    for name in names():
        doc = ast.get_docstring(ast.parse((folder() / f"{name}.py").read_text())) or ""
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
    spec = importlib.util.spec_from_file_location(root, folder() / f"{root}.py")
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
        path = folder() / f"{path.stem}.py"
    if not path.is_file():
        close = difflib.get_close_matches(path.stem, names(), n=1, cutoff=0.5)
        hint = f"did you mean configs/{close[0]}.py? " if close else ""
        raise ConfigError(f"there is no config {name}: {hint}`--list` names them all")
    parent = str(path.resolve().parent.parent)
    if parent not in sys.path:
        sys.path.append(parent)
    return f"{path}{colon}{scale}"


_KNOWN_PARENTS = (pathlib.Path(), pathlib.Path("configs"))
