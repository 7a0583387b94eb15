"""The shape of the source: folders import downwards, no circles, nothing imports a command."""

import ast
import pathlib
import re

ROOT = pathlib.Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "bn_jax"

# From top to bottom: files and folders at the package's root. Each imports only what stands below.
FLOORS = (
    "main sweep study predict export import_weights",
    "studies",
    "figures prepare",
    "weights",
    "evaluate",
    "train",
    "activations",
    "experiment",
    "data",
    "workdir",
    "distributed",
    "step",
    "optim",
    "models",
    "layers nnx",
    "ops",
    "batch_norm errors tables uncertainty",
)
COMMANDS = FLOORS[0].split()


def modules() -> dict[str, pathlib.Path]:
    """Every module of the package by its dotted name."""
    dotted = {".".join(f.relative_to(ROOT).with_suffix("").parts): f for f in PACKAGE.rglob("*.py")}
    return {name.removesuffix(".__init__"): file for name, file in dotted.items()}


def imports(source: str, known) -> set[str]:
    """The modules among `known` that a source imports anywhere, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name in known}
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                found.add(submodule if submodule in known else node.module)
    return {name for name in found if name in known}


def room(module: str) -> str:
    """The file or folder at the package's root that holds a module."""
    return module.split(".")[1]


def upward(graph: dict[str, set[str]]) -> list[str]:
    """Imports that do not lead to a lower floor, or that reach a command."""
    floor = {name: k for k, names in enumerate(FLOORS) for name in names.split()}
    wrong = []
    for module, targets in graph.items():
        above = -1 if module.endswith("__main__") else floor[room(module)]  # a command
        for target in targets - {"bn_jax"}:
            command = room(target) in COMMANDS or target.endswith("__main__")
            inside = room(module) == room(target)
            if command or (not inside and above >= floor[room(target)]):
                wrong.append(f"{module} imports {target}")
    return wrong


def graph() -> dict[str, set[str]]:
    """What every module but the package itself imports."""
    files = modules()
    return {n: imports(f.read_text(), files) for n, f in files.items() if n != "bn_jax"}


def test_folders_import_downwards_and_nothing_imports_a_command():
    assert upward(graph()) == []


def test_every_file_and_folder_has_a_floor():
    listed = {name for names in FLOORS for name in names.split()}
    assert {room(module) for module in graph()} <= listed


def test_an_upward_import_is_noticed():
    known = {"bn_jax.step", "bn_jax.train", "bn_jax.main", "bn_jax.figures.__main__"}
    assert imports("from bn_jax import train", known) == {"bn_jax.train"}
    assert upward({"bn_jax.step": {"bn_jax.train"}}) == ["bn_jax.step imports bn_jax.train"]
    assert upward({"bn_jax.main": {"bn_jax.sweep"}}) == ["bn_jax.main imports bn_jax.sweep"]
    inside = {"bn_jax.figures.run": {"bn_jax.figures.__main__"}}
    assert upward(inside) == ["bn_jax.figures.run imports bn_jax.figures.__main__"]
    assert upward({"bn_jax.train": {"bn_jax.step"}}) == []
    assert upward({"bn_jax.activations.__main__": {"bn_jax.figures.run"}}) == []


def test_imports_have_no_circle():
    edges = graph()
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...] = ()) -> None:
        assert name not in above, f"a circle of imports: {(*above, name)}"
        if name in done:
            return
        for target in edges.get(name, ()):
            visit(target, (*above, name))
        done.add(name)

    for name in edges:
        visit(name)


def test_batch_norm_imports_jax_alone():
    found = re.findall(r"^(?:from|import) (\w+)", (PACKAGE / "batch_norm.py").read_text(), re.M)
    standard = {"functools", "math", "os", "warnings", "collections", "typing"}
    assert set(found) <= {*standard, "jax", "jaxlib"}


def test_no_private_part_of_jax_is_used():
    private = {name for name, file in modules().items() if "jax._src" in file.read_text()}
    assert private == set()
