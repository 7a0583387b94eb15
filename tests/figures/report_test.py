"""The page of `bn_jax.figures --html`: its numbers are those of the records, and it is whole."""

import html
import json
import pathlib
import re
import shutil
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from bokeh.document import Document
from bokeh.models import GlyphRenderer, LogScale, Scatter

from bn_jax.activations import measure
from bn_jax.figures import __main__ as command
from bn_jax.figures import report
from bn_jax.figures.fig1 import percentiles, typical_unit
from bn_jax.uncertainty import counted
from bn_jax.workdir import reader

RESULTS = pathlib.Path(__file__).resolve().parents[2] / "results"
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")

# In a browser: writes where every marker was drawn, as numbers of the axes, at the page's end.
# The layer is chosen as a reader would choose it.
READ = """
<script>
function drawn(doc) {
  const found = [];
  for (const model of doc._all_models.values()) {
    if (model.type !== "GlyphRenderer" || model.glyph.type !== "Scatter") continue;
    const view = Bokeh.index.find_one(model);
    const {x_scale, y_scale} = view.coordinates;
    found.push({
      name: model.name,
      x: Array.from(view.glyph.sx, (x) => x_scale.invert(x)),
      y: Array.from(view.glyph.sy, (y) => y_scale.invert(y)),
    });
  }
  return found;
}
const wait = setInterval(() => {
  const doc = Bokeh.documents[0];
  if (!doc?.is_idle) return;
  clearInterval(wait);
  const first = drawn(doc);
  for (const model of doc._all_models.values())
    if (model.type === "Select") model.value = "dense_0/input";
  setTimeout(() => {
    const element = document.createElement("pre");
    element.id = "drawn";
    element.textContent = JSON.stringify([first, drawn(doc)]);
    document.body.append(element);
  }, 1000);
}, 50);
</script>
"""


def make(folder, out, monkeypatch) -> str:
    words = ["figures", f"--workdir={folder}", f"--out={out}", "--html"]
    monkeypatch.setattr(sys, "argv", words)
    command.main()
    return (out / report.NAME).read_text(encoding="utf-8")


def charts(page: str) -> dict:
    """The charts of a page that has all three, as Bokeh reads them."""
    [text] = re.findall(r"const docs_json = '(.*)';$", page, re.M)
    [document] = json.loads(html.unescape(text.replace(r"\\", "\\"))).values()
    roots = Document.from_json(document).roots
    return dict(zip(("accuracy", "loss", "activations"), roots, strict=True))


def markers(chart) -> dict:
    """The columns behind the markers of each run, by 'NETWORK, seed SEED'."""
    found = [x for x in chart.select({"type": GlyphRenderer}) if isinstance(x.glyph, Scatter)]
    assert len({x.name for x in found}) == len(found)
    return {x.name: x.data_source.data for x in found}


def without_scripts(page: str) -> str:
    return re.sub(r"<script.*?</script>", "", page, flags=re.S)


def add_measured(run: pathlib.Path) -> None:
    """Adds measured percentiles of dense_0/input: p50 is the step."""
    for step in (0, 1, 2):
        values = np.linspace(-1, 1, 101, dtype=np.float32)[:, None] + step
        found = {"dense_0/input": measure.summary(jnp.asarray(values))}
        measure._save(run / "activations" / f"{step}.npz", {}, found)


def test_fig1s_page(tmp_path, monkeypatch):
    """results/mnist: two runs with recorded activations."""
    page = make(RESULTS / "mnist", tmp_path, monkeypatch)
    found = charts(page)
    runs = {name: reader.read_run(RESULTS / "mnist" / name) for name in ("mnist", "mnist_bn")}

    for name, run in runs.items():
        own = markers(found["accuracy"])[f"{name}, seed 0"]
        assert own["step"] == [line["step"] for line in run.lines["eval"]]
        assert own["value"] == [round(100 * line["top1"], 4) for line in run.lines["eval"]]
        curves = percentiles(run, "dense_2/input")
        unit = typical_unit(curves)
        own = markers(found["activations"])[f"{name}, seed 0"]
        assert set(own["unit"]) == {unit}
        for k, p in enumerate(("p15", "p50", "p85")):
            assert own[p] == pytest.approx(curves.values[:, k, unit], rel=1e-4)

    # The lines and the bands have the numbers of the markers.
    for own in found["accuracy"].renderers:
        assert own.data_source.data == markers(found["accuracy"])[own.name]
    bands, lines, points = (found["activations"].children[1].renderers[k::3] for k in range(3))
    for band, line, point in zip(bands, lines, points, strict=True):
        own = point.data_source.data
        assert line.data_source.data["middle"] == [own["p50"]]
        assert line.data_source.data["steps"] == [own["step"]]
        assert band.data_source.data["band"] == [own["p15"] + own["p85"][::-1]]
        assert band.data_source.data["around"] == [own["step"] + own["step"][::-1]]

    words = without_scripts(page)
    last = runs["mnist_bn"].lines["eval"][-1]["top1"]
    assert f"{100 * last:.2f}% (" in words
    assert "norm none -&gt; batch_norm" in words and "+0.94 points" in words
    assert "<table>" in words and "report.html" not in words
    assert not re.search(r"<(?:link|img|iframe)|(?:src|href)=|url\(|@import", words)
    assert not re.search(r"<script[^>]* src", page)  # nothing is loaded
    assert 'name="viewport"' in words


def test_measured_activations_stand_beside_recorded_ones(tmp_path):
    """A layer that was measured afterwards, with one unit that moves by 1 a step."""
    shutil.copytree(RESULTS / "mnist" / "mnist_bn", tmp_path / "run")
    add_measured(tmp_path / "run")
    rows = report.activations({"x": [reader.read_run(tmp_path / "run")]})
    assert {row["layer"] for row in rows} == {"dense_0/input", "dense_2/input"}
    own = [row for row in rows if row["layer"] == "dense_0/input"]
    assert [row["step"] for row in own] == [0, 1, 2]
    assert [row["p50"] for row in own] == pytest.approx([0, 1, 2], abs=1e-6)
    assert [row["p85"] for row in own] == pytest.approx([0.7, 1.7, 2.7], rel=1e-4)


def test_a_sweeps_page_is_small_and_has_all_runs(tmp_path, monkeypatch):
    page = make(RESULTS / "digits", tmp_path, monkeypatch)
    assert len(page.encode()) < 5e6
    chart = charts(page)["accuracy"]
    groups = reader.read_groups(RESULTS / "digits")
    runs = {f"{name}, seed {r.config['seed']}": r for name, g in groups.items() for r in g}
    found = markers(chart)
    assert found.keys() == runs.keys()
    for name, run in runs.items():
        assert found[name]["step"] == [line["step"] for line in run.lines["eval"]]
        assert found[name]["value"] == [round(100 * x["top1"], 4) for x in run.lines["eval"]]

    networks, seeds = chart.below[1:]  # after the axis
    assert [item.label.value for item in networks.items] == list(groups)
    assert [item.label.value for item in seeds.items] == ["seed 0", "seed 1", "seed 2"]
    looks = set()
    for item in networks.items:
        line, points = item.renderers[:2]
        looks.add((str(line.glyph.line_dash), str(points.glyph.marker)))
    assert len(looks) == len(groups)  # no colour is needed to tell them apart

    # A network is hidden and a seed is muted, so that one does not undo the other. Of so many runs
    # only those of the first seed are shown.
    assert (networks.click_policy, seeds.click_policy) == ("hide", "mute")
    assert all(own.visible for own in chart.renderers)
    assert {own.muted for own in chart.renderers if own.name.endswith("seed 0")} == {False}
    assert {own.muted for own in chart.renderers if not own.name.endswith("seed 0")} == {True}
    assert not isinstance(chart.y_scale, LogScale)
    assert isinstance(charts(page)["loss"].y_scale, LogScale)
    words = without_scripts(page)
    assert "Steps to the accuracy of the network without BN (Fig. 3)" in words
    assert "One change at a time" in words and "Single networks, multicrop" in words


def test_the_test_split_has_a_column_beside_the_last_evaluation(tmp_path):
    lines = [{"step": 5, "top1": 0.1, "examples": 10}, {"step": 9, "top1": 0.5, "examples": 10}]
    test = [{"step": 9, "top1": 0.25, "examples": 20}]
    kinds = {"train": [], "eval": lines, "test": test, "activation": []}
    run = reader.Run(tmp_path, {"seed": 3}, {"description": "x"}, kinds, "done", "", {})
    cells = f"<td>9</td><td>{counted(0.5, 10)}</td><td>{counted(0.25, 20)}</td></tr>"
    assert cells in report._overview([run])


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
    shutil.copytree(RESULTS / "mnist", tmp_path / "runs")
    for name in ("mnist", "mnist_bn"):
        add_measured(tmp_path / "runs" / name)
    page = make(tmp_path / "runs", tmp_path, monkeypatch)
    (tmp_path / "read.html").write_text(page + READ)
    # Through --dump-dom the page comes back as it is after the charts were drawn.
    done = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=10000",
         "--enable-logging=stderr", "--host-resolver-rules=MAP * ~NOTFOUND", "--dump-dom",
         (tmp_path / "read.html").as_uri()],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0
    said = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert len(said) == 1 and "setting log level to: 'error'" in said[0], done.stderr
    [text] = re.findall(r'<pre id="drawn">(.*)</pre>', done.stdout)
    first, then = json.loads(text)

    # Of the markers' places: two networks in each of three charts.
    assert [x["name"] for x in first] == ["mnist, seed 0", "mnist_bn, seed 0"] * 3
    for k, name in enumerate(("mnist", "mnist_bn")):
        lines = reader.read_run(RESULTS / "mnist" / name).lines["eval"]
        assert first[k]["x"] == pytest.approx([line["step"] for line in lines], abs=1)
        assert first[k]["y"] == pytest.approx([100 * x["top1"] for x in lines], abs=0.01)
        curves = percentiles(reader.read_run(RESULTS / "mnist" / name), "dense_2/input")
        median = curves.values[:, 1, typical_unit(curves)]
        assert first[4 + k]["y"] == pytest.approx(median, abs=0.01)
        assert then[4 + k]["x"] == pytest.approx([0, 1, 2], abs=0.01)
        assert then[4 + k]["y"] == pytest.approx([0, 1, 2], abs=0.01)
