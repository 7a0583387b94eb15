"""The documentation: every page is reached, every link leads somewhere, the site builds."""

import json
import os
import pathlib
import re
import subprocess
import sys
import tomllib

import pytest
import yaml

import bn_jax

ROOT = pathlib.Path(__file__).resolve().parent.parent
EXPERIMENTS = (ROOT / "docs" / "experiments.md").read_text()
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *ROOT.glob("*/README.md")])


def nav(entries=None) -> list[str]:
    """The pages of mkdocs.yml's navigation."""
    if entries is None:
        entries = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    pages = []
    for entry in entries:
        [target] = entry.values()
        pages += nav(target) if isinstance(target, list) else [target]
    return pages


def anchors(path: pathlib.Path) -> set[str]:
    """Names of a page's headings, as GitHub and Python-Markdown make them."""
    text = re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.M | re.S)
    names = set()
    for heading in re.findall(r"^#+ (.+)$", text, re.M):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").lower()
        names.add(re.sub(r"\s", "-", re.sub(r"[^\w\s-]", "", plain).strip()))
    return names


@pytest.mark.parametrize("path", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_and_anchors(path):
    text = re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.M | re.S)
    for target, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]+))?\)", text):
        if "://" in target:
            continue
        place = (path.parent / target).resolve() if target else path
        assert place.exists(), f"{path.name}: {target}"
        if anchor:
            assert place.suffix == ".md" and anchor in anchors(place), f"{path.name}: #{anchor}"


def test_links_of_notebooks():
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        for cell in json.loads(path.read_text())["cells"]:
            for target in re.findall(r"\]\(([^)#]+)", "".join(cell["source"])):
                if cell["cell_type"] == "markdown":
                    assert "://" in target or (path.parent / target).exists(), target


def test_every_page_is_in_the_navigation():
    pages = nav()
    assert len(pages) == len(set(pages)) and pages[0] == "index.md"
    assert {path.name for path in (ROOT / "docs").glob("*.md")} <= set(pages)


def test_every_notebook_has_a_row():
    rows = set(re.findall(r"^\| `(\w+)` \|", (ROOT / "docs" / "notebooks.md").read_text(), re.M))
    assert rows == {path.stem for path in (ROOT / "notebooks").glob("*.ipynb")}


def test_the_figure_is_at_the_top_of_the_readme():
    readme = (ROOT / "README.md").read_text()
    [picture] = re.findall(r"^!\[.+\]\((.+)\)$", readme, re.M)
    assert (ROOT / picture).is_file()
    assert readme.index(picture) < readme.index("\n## ")


def is_module(name: str) -> bool:
    place = ROOT / name.replace(".", "/")
    return place.with_suffix(".py").is_file() or (place / "__init__.py").is_file()


def test_the_api_page_has_what_guides_and_notebooks_import():
    on_page = re.findall(r"^::: ([\w.]+)$", (ROOT / "docs" / "api.md").read_text(), re.M)
    for name in on_page:
        assert is_module(name), name
    texts = [re.sub(r"^```sh\n.*?^```$", "", p.read_text(), flags=re.M | re.S) for p in PAGES]
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        cells = json.loads(path.read_text())["cells"]
        texts += ["".join(c["source"]) for c in cells if c["cell_type"] == "code"]
    used = set()
    for module, names in re.findall(
        r"^from (bn_jax[\w.]*) import ([\w, ]+)", "\n".join(texts), re.M
    ):
        for name in names.split(","):
            inside = f"{module}.{name.strip()}"
            used.add(inside if is_module(inside) else module)
    assert len(used) >= 5 and used <= set(on_page)


def test_site_builds_without_a_warning(tmp_path):
    for module in ("mkdocs", "material", "mkdocstrings"):
        pytest.importorskip(module, reason="needs the extra [docs]")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", f"--site-dir={tmp_path}"]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    start, api = ((tmp_path / p).read_text() for p in ("index.html", "api/index.html"))
    assert "results/tiny40/fig2.png" in start and (tmp_path / "results/tiny40/fig2.png").is_file()
    assert "Algorithm 1 (<code>train=True</code>)" in api  # of the docstring of normalize
    assert not re.search(r'(?:src|<link[^>]*href)="https?://', start)


def test_license_and_citation():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text and "Version 2.0, January 2004" in text
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["license"] == project["license"] == "Apache-2.0"
    assert str(citation["version"]) == bn_jax.__version__
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()


def test_differences_are_up_to_date(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    import differences

    assert differences.sentences(
        '"""A. Differs from the paper: one\n    two. No.\n\n    More."""\n'
        "# Differs from the paper: three\n# four\n"
    ) == ["one two.", "three four."]
    assert differences.updated(EXPERIMENTS) == EXPERIMENTS, (
        "run: python docs/differences.py --write"
    )


def test_every_config_has_a_row_and_only_results_are_claimed():
    rows = dict(re.findall(r"^\| `(\w+)` \|.*\| ([^|]+) \|$", EXPERIMENTS, re.M))
    configs = {path.stem for path in (ROOT / "configs").glob("*.py")} - {"__init__"}
    assert configs <= rows.keys()
    for name in configs:
        # A row names an existing file under results/, or says that there is none.
        file = re.search(r"results/[\w./-]+", rows[name])
        assert rows[name] == "not yet run" or (file and (ROOT / file[0]).exists()), name
