"""The published tables are those that today's code makes of the published runs."""

import json
import pathlib

import pytest

from bn_jax.figures import ablations, fig1, fig3, fig4
from bn_jax.workdir import reader

RESULTS = pathlib.Path(__file__).resolve().parents[2] / "results"


def folders(name: str) -> list[pathlib.Path]:
    return sorted(path.parent for path in RESULTS.glob(f"*/{name}"))


def test_there_are_tables():
    assert folders("fig3.md") and folders("fig1.json") and folders("fig4.md")


@pytest.mark.parametrize("folder", folders("fig3.md"), ids=lambda p: p.name)
def test_tables_of_a_sweep(folder):
    groups = reader.read_groups(folder)
    made = {
        "fig3.md": fig3.fig3(groups),
        "fig3.csv": fig3.fig3_csv(groups),
        "ablations.md": ablations.ablations_markdown(groups),
        "ablations.csv": ablations.ablations_csv(groups),
    }
    for name, text in made.items():
        if (folder / name).is_file():
            assert (folder / name).read_text() == text, f"draw {folder / name} again"


@pytest.mark.parametrize("folder", folders("fig1.json"), ids=lambda p: p.name)
def test_numbers_of_fig1(folder):
    pair = reader.read_pair(folder / "mnist", folder / "mnist_bn")
    assert json.loads((folder / "fig1.json").read_text()) == fig1.fig1_numbers(*pair)


@pytest.mark.parametrize("folder", folders("fig4.md"), ids=lambda p: p.name)
def test_table_of_fig4(folder):
    assert (folder / "fig4.md").read_text() == fig4.markdown(folder)
    assert (folder / "fig4.csv").read_text() == fig4.as_csv(folder)
