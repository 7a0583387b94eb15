"""Decides which pictures and tables are made from a folder of records."""

import pathlib

from bn_jax.figures import ablations, fig1, fig2, fig3
from bn_jax.figures.fig4 import draw_fig4
from bn_jax.figures.run import draw_run
from bn_jax.workdir import files, reader


def draw(workdir: pathlib.Path, out: pathlib.Path) -> list[pathlib.Path]:
    """Draws what a folder holds: a run, the pair of Fig. 1 or a sweep; and its evaluations."""
    scored = reader.find_evaluations(workdir) if workdir.is_dir() else []
    paths = []
    if not scored or any(reader.find_runs(workdir)):
        paths += draw_runs(workdir, out)
    if scored:
        paths += draw_fig4(workdir, out)
    return paths


def draw_runs(workdir: pathlib.Path, out: pathlib.Path) -> list[pathlib.Path]:
    """Draws the runs of a folder: Fig. 1's pair, one run, or all of a sweep."""
    if all(reader.is_run(workdir / name) for name in ("mnist", "mnist_bn")):
        return fig1.draw_fig1(workdir, out)

    # In a folder without runs draw_run says what is missing.
    if reader.is_run(workdir) or not any(reader.find_runs(workdir)):
        return draw_run(workdir, out)
    return draw_sweep(workdir, out)


def draw_sweep(folder: pathlib.Path, out: pathlib.Path) -> list[pathlib.Path]:
    """Draws Fig. 2, Fig. 3's table and the ablations from the runs in `folder`; prints the table.

    Raises ConfigError if there are none, or if they cannot be compared with each other.
    """
    groups = reader.read_groups(folder)
    paths = []
    if {"mnist", "mnist_bn"} <= groups.keys():
        paths += fig1.draw_pair(groups["mnist"], groups["mnist_bn"], out)
    paths += fig2.draw_fig2(groups, out)
    compared = ablations.draw_ablations(groups, out)
    paths += compared

    table = fig3.fig3(groups)
    texts = {
        "fig3.md": table,
        "fig3.csv": fig3.fig3_csv(groups),
        "fig2.csv": fig2.curves_csv(groups),
    }
    if compared:
        texts["ablations.md"] = ablations.ablations_markdown(groups)
        texts["ablations.csv"] = ablations.ablations_csv(groups)
    for name, text in texts.items():
        path = out / name
        files.write_atomic(path, text.encode())
        paths.append(path)

    print(table)
    return paths
