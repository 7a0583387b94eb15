"""The page of `bn_jax.figures --html`: its numbers are those of the records, and it is whole."""

import hashlib
import json
import pathlib
import re
import shutil
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from bn_jax.activations import measure
from bn_jax.figures import __main__ as command
from bn_jax.figures import report
from bn_jax.figures.fig1 import percentiles, typical_unit
from bn_jax.workdir import reader

RESULTS = pathlib.Path(__file__).resolve().parents[2] / "results"
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")

# Of the files as npm has them: vega 6.4.0, vega-lite 6.4.3, vega-embed 7.3.0.
DIGESTS = {
    "vega": "8f6a3587cf8d4f42c7e08120e3eb05d067e746d554e39d2dcf52acc0bd5ba28f",
    "vega-lite": "35a9821df838825b05a6a73e9414b58747a1b18321583858ed903c66393a5c7e",
    "vega-embed": "b1455caba2fb1a72fb46025ba0ba1316e2dbc7f0dd40a3f6040172bf9c08ba91",
}


def make(folder, out, monkeypatch) -> str:
    words = ["figures", f"--workdir={folder}", f"--out={out}", "--html"]
    monkeypatch.setattr(sys, "argv", words)
    command.main()
    return (out / report.NAME).read_text(encoding="utf-8")


def charts(page: str) -> dict:
    [text] = re.findall(r"<script>const charts = (.*);$", page, re.M)
    return json.loads(text)


def without_scripts(page: str) -> str:
    return re.sub(r"<script>.*?</script>", "", page, flags=re.S)


def test_the_scripts_are_those_of_the_packages():
    folder = pathlib.Path(report.__file__).parent / "vega"
    for name, digest in DIGESTS.items():
        found = (folder / f"{name}.min.js").read_bytes()
        assert hashlib.sha256(found).hexdigest() == digest
        assert b"</script" not in found
    assert (folder / "LICENSE").read_text().count("Redistribution and use") == 3


def test_fig1s_page(tmp_path, monkeypatch):
    """results/mnist: two runs with recorded activations."""
    page = make(RESULTS / "mnist", tmp_path, monkeypatch)
    found = charts(page)
    runs = {name: reader.read_run(RESULTS / "mnist" / name) for name in ("mnist", "mnist_bn")}

    for name, run in runs.items():
        own = [row for row in found["accuracy"]["data"]["values"] if row["network"] == name]
        assert [(row["step"], row["value"]) for row in own] == [
            (line["step"], round(100 * line["top1"], 4)) for line in run.lines["eval"]
        ]
        curves = percentiles(run, "dense_2/input")
        unit = typical_unit(curves)
        own = [row for row in found["activations"]["data"]["values"] if row["network"] == name]
        assert {row["unit"] for row in own} == {unit}
        for k, p in enumerate(("p15", "p50", "p85")):
            assert [row[p] for row in own] == pytest.approx(curves.values[:, k, unit], rel=1e-4)

    words = without_scripts(page)
    last = runs["mnist_bn"].lines["eval"][-1]["top1"]
    assert f"{100 * last:.2f}% (" in words
    assert "norm none -&gt; batch_norm" in words and "+0.94 points" in words
    assert "<table>" in words and "report.html" not in words
    assert not re.search(r"(?:src|href)=", words)  # nothing is loaded
    assert 'name="viewport"' in words


def test_measured_activations_stand_beside_recorded_ones(tmp_path):
    """A layer that was measured afterwards, with one unit that moves by 1 a step."""
    shutil.copytree(RESULTS / "mnist" / "mnist_bn", tmp_path / "run")
    for step in (0, 1, 2):
        values = np.linspace(-1, 1, 101, dtype=np.float32)[:, None] + step
        found = {"dense_0/input": measure.summary(jnp.asarray(values))}
        measure._save(tmp_path / "run" / "activations" / f"{step}.npz", {}, found)
    rows = report.activations({"x": [reader.read_run(tmp_path / "run")]})
    assert {row["layer"] for row in rows} == {"dense_0/input", "dense_2/input"}
    own = [row for row in rows if row["layer"] == "dense_0/input"]
    assert [row["step"] for row in own] == [0, 1, 2]
    assert [row["p50"] for row in own] == pytest.approx([0, 1, 2], abs=1e-6)
    assert [row["p85"] for row in own] == pytest.approx([0.7, 1.7, 2.7], rel=1e-4)


def test_a_sweeps_page_is_small_and_has_all_runs(tmp_path, monkeypatch):
    page = make(RESULTS / "digits", tmp_path, monkeypatch)
    assert len(page.encode()) < 5e6
    rows = charts(page)["accuracy"]["data"]["values"]
    groups = reader.read_groups(RESULTS / "digits")
    assert len(rows) == sum(len(run.lines["eval"]) for g in groups.values() for run in g)
    for row in rows[:: len(rows) // 50]:
        [run] = [r for r in groups[row["network"]] if str(r.config["seed"]) == row["seed"]]
        [line] = [x for x in run.lines["eval"] if x["step"] == row["step"]]
        assert row["value"] == round(100 * line["top1"], 4)
    words = without_scripts(page)
    assert "Steps to the accuracy of the network without BN (Fig. 3)" in words
    assert "One change at a time" in words and "Single networks, multicrop" in words


def test_the_loss_is_the_mean_of_parts(tmp_path):
    lines = [{"step": k + 1, "kind": "train", "cross_entropy": float(k)} for k in range(120)]
    lines.append({"step": 121, "kind": "train", "cross_entropy": "nan"})
    kinds = {"train": lines, "eval": [], "test": [], "activation": []}
    run = reader.Run(tmp_path, {"name": "x", "seed": 3}, {}, kinds, "diverged", "", {})
    rows = report.losses({"x": [run]})
    assert len(rows) == 40
    assert rows[0]["value"] == 1 and rows[0]["step"] == 3 and rows[0]["seed"] == "3"
    assert rows[-1]["value"] == 118 and rows[-1]["step"] == 120


def test_markdown_is_escaped():
    text = "# A <b>\n\nOne `x` and\n**two** [page](page.md).\n\n| a | b |\n|---|---|\n| <i> | 2 |\n"
    found = report.markdown(text, below=1)
    assert found == (
        "<h2>A &lt;b&gt;</h2>\n<p>One <code>x</code> and <strong>two</strong> page.</p>\n"
        "<div class=wide><table>\n<tr><th>a</th><th>b</th></tr>\n"
        "<tr><td>&lt;i&gt;</td><td>2</td></tr>\n</table></div>"
    )


@pytest.mark.slow  # a browser is started
@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
def test_a_browser_draws_it(tmp_path, monkeypatch):
    page = make(RESULTS / "mnist", tmp_path, monkeypatch)
    # Through --dump-dom the page comes back as it is after the charts were drawn.
    done = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=10000",
         "--enable-logging=stderr", "--host-resolver-rules=MAP * ~NOTFOUND", "--dump-dom",
         (tmp_path / report.NAME).as_uri()],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0
    assert "CONSOLE" not in done.stderr, done.stderr
    drawn = without_scripts(done.stdout)
    assert drawn.count("<svg") == len(charts(page)) == 3
    assert drawn.count("<select") == 4  # a seed for each chart, and a layer
    assert drawn.count('aria-roledescription="line mark"') >= 4
    for name in ("mnist", "mnist_bn"):
        lines = reader.read_run(RESULTS / "mnist" / name).lines["eval"]
        for line in lines:  # every evaluation is a point with its number
            said = f"step: {line['step']}; accuracy (%): {round(100 * line['top1'], 4):g}; "
            assert f'aria-label="{said}network: {name}; seed: 0"' in drawn
