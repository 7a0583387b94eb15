"""The shape of the source: who may import whom, and the list of files."""

import ast
import pathlib
import re

ROOT = pathlib.Path(__file__).resolve().parent.parent


def modules() -> dict[str, pathlib.Path]:
    files = (ROOT / "bn_jax").rglob("*.py")
    dotted = {".".join(f.relative_to(ROOT).with_suffix("").parts): f for f in files}
    return {name.removesuffix(".__init__"): f for name, f in dotted.items()}


def imports(file: pathlib.Path, known) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("bn_jax"):
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                found.add(submodule if submodule in known else node.module)
    return found


def test_architecture_lists_every_file_and_imports_have_no_circle():
    listed = set(re.findall(r"(\w+\.py)`", (ROOT / "docs" / "architecture.md").read_text()))
    files = modules()
    assert {f.name for f in files.values()} - {"__init__.py"} <= listed
    graph = {name: imports(file, files) for name, file in files.items()}
    below: dict[str, set[str]] = {}

    def visit(name: str, above: tuple[str, ...] = ()) -> set[str]:
        assert name not in above, f"a circle of imports: {(*above, name)}"
        if name not in below:
            below[name] = graph[name].union(*(visit(d, (*above, name)) for d in graph[name]))
        return below[name]

    for name in graph:
        visit(name)
    # The ground knows nothing of what stands on it; batch_norm is jax and shapes alone.
    assert below["bn_jax.batch_norm"] <= {"bn_jax.grouping"}
    for name in ("optim", "mesh", "batch_norm", "checkpoint", "record", "data.pipeline"):
        above = {"main", "train", "evaluate", "experiment", "step", "models", "figures", "configs"}
        assert not below[f"bn_jax.{name}"] & {f"bn_jax.{a}" for a in above}, name
