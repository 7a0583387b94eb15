"""The published studies: tables follow from records, and docs/studies.md has these tables."""

import json
import pathlib
import re
import shutil

import pytest

from bn_jax.experiment import members
from bn_jax.studies import STUDIES, frame
from bn_jax.workdir import reader

ROOT = pathlib.Path(__file__).resolve().parents[2]
PUBLISHED = sorted(path.parent for path in (ROOT / "results/studies").glob("*/study.json"))
SEEDS = 3


def record(folder: pathlib.Path) -> dict:
    """What study.json says: the study, its config and fields."""
    return json.loads((folder / "study.json").read_text())


def section(folder: pathlib.Path) -> str:
    """The part of docs/studies.md about a study."""
    text = (ROOT / "docs/studies.md").read_text()
    _, _, rest = text.partition(f"\n## {record(folder)['study']}\n")
    return rest.partition("\n## ")[0]


def table(folder: pathlib.Path) -> str:
    lines = (folder / f"{record(folder)['study']}.md").read_text().splitlines()
    return "\n".join(line for line in lines if line.startswith("|"))


def test_every_study_is_published():
    assert {record(folder)["study"] for folder in PUBLISHED} == set(STUDIES)


@pytest.mark.parametrize("folder", PUBLISHED, ids=lambda path: path.name)
def test_the_table_follows_from_the_records(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(members, "run", lambda found, jobs: None)
    workdir = tmp_path / folder.name
    shutil.copytree(folder, workdir)
    there = record(folder)
    study = STUDIES[there["study"]]
    text = folder / f"{study.name}.md"
    (workdir / text.name).unlink()
    path, *_ = frame.run(study, workdir, there["config"], there["settings"], SEEDS)
    assert path.read_text() == text.read_text()


@pytest.mark.parametrize("folder", PUBLISHED, ids=lambda path: path.name)
def test_all_runs_are_of_one_commit_and_thread(folder):
    runs = [reader.read_run(path.parent) for path in sorted(folder.glob("**/run.json"))]
    assert {run.config["seed"] for run in runs} == set(range(SEEDS))
    assert {run.status for run in runs} <= {"done", "diverged"}
    assert len({run.origin["source"]["commit"] for run in runs}) == 1
    assert {run.origin["hardware"]["cpu_threads"] for run in runs} == {1}


def numbers(text: str) -> set[str]:
    return set(re.findall(r"\d+(?:,\d{3})*(?:\.\d+)?", text))


@pytest.mark.parametrize("folder", PUBLISHED, ids=lambda path: path.name)
def test_the_page_has_the_table_and_no_other_numbers(folder):
    """Every number of what we find stands in a table of that study, or in what explains it."""
    assert table(folder) in section(folder)
    [found] = re.findall(r"^\* \*\*We find\*\*.*?(?=^\* |\Z)", section(folder), re.M | re.S)
    known: set[str] = set()
    for other in PUBLISHED:
        name = record(other)["study"]
        if name == record(folder)["study"]:
            text, _, _ = (other / f"{name}.md").read_text().partition("\nAll ")
            known |= numbers(text)
    assert numbers(found) <= known
