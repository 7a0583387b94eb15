"""Writes report.html: the verdicts, curves, tables and activations of recorded runs on one page.

The page is one file and needs no network. Vega-Lite draws its charts; its scripts are in `vega/`
beside this module and are copied into the page. Every number comes from the records, or from the
tables that `draw` has made of them.
"""

import html
import json
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bn_jax.figures import claims
from bn_jax.figures.curves import changes
from bn_jax.figures.fig1 import Percentiles, percentiles, typical_unit
from bn_jax.figures.origins import facts, made_by
from bn_jax.uncertainty import counted
from bn_jax.workdir import files, reader
from bn_jax.workdir.reader import Run, flat

NAME = "report.html"
SCRIPTS = ("vega", "vega-lite", "vega-embed")
POINTS = 50  # a training curve has at most so many: single batches vary more than networks do
FEW = 6  # the table of more runs than this is folded
ALL = "all"

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 64rem; margin: 0 auto; padding: 0 1rem;
  color: #111; background: #fff; }
h1, h2, h3 { line-height: 1.2; }
table { border-collapse: collapse; font-size: .85rem; }
th, td { border-bottom: 1px solid #bbb; padding: .25rem .6rem; text-align: left;
  vertical-align: top; }
th { border-bottom: 2px solid #111; }
.wide { overflow-x: auto; margin: 1rem 0; }
.chart { width: 100%; min-height: 22rem; }
.vega-bind { margin-right: 1rem; display: inline-block; }
code { font-size: .9em; overflow-wrap: anywhere; }
td code { overflow-wrap: normal; }
h1, p, li { overflow-wrap: break-word; }
@media (max-width: 40rem) { h1 { font-size: 1.5rem; } }
"""


def write(workdir: pathlib.Path, out: pathlib.Path, drawn: Sequence[pathlib.Path]) -> pathlib.Path:
    """Writes OUT/report.html about the runs in `workdir` and returns its path.

    drawn: the files that `draw` has written for these runs; the page shows the tables (.md).

    Raises ConfigError where `reader.read_groups` does.
    """
    groups = grouped(workdir)
    runs = [run for group in groups.values() for run in group]
    charts = {
        "accuracy": curve_chart(accuracies(groups), "accuracy (%)"),
        "loss": curve_chart(losses(groups), "training cross-entropy (nats)", logarithmic=True),
        "activations": activation_chart(activations(groups)),
    }
    charts = {name: chart for name, chart in charts.items() if chart["data"]["values"]}

    body = [f"<h1>{html.escape(title(groups))}</h1>", _overview(runs)]
    verdicts = _verdicts(workdir)
    if verdicts:
        body += ["<h2>The paper's claims</h2>", verdicts]
    for name, heading in HEADINGS.items():
        if name in charts:
            body.append(f"<h2>{heading}</h2><p>{NOTES[name]}</p>")
            body.append(f'<div class="chart" id="{name}"></div>')
    tables = [path for path in drawn if path.suffix == ".md"]
    body += ["<h2>Tables</h2>"] if tables else []
    body += [markdown(path.read_text(encoding="utf-8"), below=2) for path in tables]
    body += ["<h2>What the networks change</h2>", _differences(groups)]
    body += ["<h2>How the runs were made</h2>", _provenance(runs)]

    page = _page(title(groups), "\n".join(body), charts)
    files.write_atomic(out / NAME, page.encode())
    return out / NAME


HEADINGS = {
    "accuracy": "Accuracy",
    "loss": "Training loss",
    "activations": "Activations",
}
_SWITCH = (
    "Point at a line to read its numbers. Click on a name below the chart to see that network "
    "alone (shift and click for more); choose a seed below the names."
)
NOTES = {
    "accuracy": "This is the accuracy on the evaluated split, with population statistics. "
    f"{_SWITCH}",
    "loss": f"The training is cut into up to {POINTS} parts; each point is the mean over the "
    f"recorded batches of a part. {_SWITCH}",
    "activations": "The line is the median, and the band reaches from the 15th to the 85th "
    "percentile, of the layer's typical unit on one fixed batch. A unit is typical if its median "
    "drifts as much as that of the layer's median unit. Choose layer and seed below.",
}


def grouped(workdir: pathlib.Path) -> dict[str, list[Run]]:
    """Returns the runs of `workdir` by experiment; `workdir` may also be one run.

    Returns {} if it has no run, only evaluations.

    Raises ConfigError where `reader.read_run` and `reader.read_groups` do.
    """
    if reader.is_run(workdir):
        run = reader.read_run(workdir)
        return {run.config["name"]: [run]}
    if not any(reader.find_runs(workdir)):
        return {}
    return reader.read_groups(workdir)


def title(groups: Mapping[str, Sequence[Run]]) -> str:
    """Returns a heading for the page, which names up to 4 experiments and the data set."""
    names = list(groups)
    if not names:
        return "Evaluations"
    data = groups[names[0]][0].data["name"]
    return f"{', '.join(names[:4])}{' and others' if len(names) > 4 else ''} on {data}"


# The numbers of the charts. Each point of a chart is one row.


def accuracies(groups: Mapping[str, Sequence[Run]]) -> list[dict[str, Any]]:
    """Returns a row for every recorded evaluation: `value` is the accuracy in percent."""
    return [
        {
            "network": name,
            "seed": _seed(run),
            "step": line["step"],
            "value": round(100 * line["top1"], 4),
            "text": counted(line["top1"], line["examples"]),
        }
        for name, group in groups.items()
        for run in group
        for line in run.lines["eval"]
    ]


def losses(groups: Mapping[str, Sequence[Run]]) -> list[dict[str, Any]]:
    """Returns up to POINTS rows for each run: `value` is the mean cross-entropy of a part, in nats.

    Batches whose cross-entropy is not finite are left out.
    """
    rows = []
    for name, group in groups.items():
        for run in group:
            lines = [x for x in run.lines["train"] if isinstance(x["cross_entropy"], float)]
            size = max(1, -(-len(lines) // POINTS))
            for first in range(0, len(lines), size):
                part = lines[first : first + size]
                value = float(f"{np.mean([line['cross_entropy'] for line in part]):.5g}")
                row = {"network": name, "seed": _seed(run), "step": part[-1]["step"]}
                rows.append(row | {"value": value, "text": f"{value:g}"})
    return rows


def activations(groups: Mapping[str, Sequence[Run]]) -> list[dict[str, Any]]:
    """Returns the typical unit's percentiles, a row for each step of each layer that has some."""
    rows = []
    for name, group in groups.items():
        for run in group:
            for curves in _layers(run):
                unit = typical_unit(curves)
                for step, values in zip(curves.steps, curves.values[:, :, unit], strict=True):
                    place = {"network": name, "seed": _seed(run), "layer": curves.layer}
                    numbers = [float(f"{value:.5g}") for value in values]
                    rows.append(
                        place
                        | {"step": int(step), "unit": unit}
                        | dict(zip(("p15", "p50", "p85"), numbers, strict=True))
                    )
    return rows


def _layers(run: Run) -> list[Percentiles]:
    """Returns what bn_jax.activations measured and, for other layers, what training recorded."""
    found = {}
    for layer in dict.fromkeys(line["layer"] for line in run.lines["activation"]):
        found[layer] = percentiles(run, layer)
    if (run.workdir / "activations").is_dir():
        from bn_jax.activations import measure  # imports jax, which takes a second
        from bn_jax.figures.activations import Shown, series

        shown = Shown(run.config["name"], run.workdir, measure.read(run.workdir / "activations"))
        if shown.steps:
            found |= {path: series(shown, path) for path in shown.paths()}
    return list(found.values())


def _seed(run: Run) -> str:
    return str(run.config.get("seed", 0))


# The charts, as specifications for Vega-Lite.


def _choice(name: str, values: Sequence[str], first: str) -> dict[str, Any]:
    """Returns a Vega-Lite parameter that the reader of the page chooses from a list."""
    bind = {"input": "select", "options": list(values), "name": f"{name} "}
    return {"name": name, "value": first, "bind": bind}


def _seeds(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return [ALL, *dict.fromkeys(row["seed"] for row in rows)]


def _base(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {
        "$schema": "https://vega.github.io/schema/vega-lite/v6.json",
        "width": "container",
        "height": 320,
        "data": {"values": list(rows)},
        "config": {
            "font": "system-ui, sans-serif",
            "axis": {"labelFontSize": 13, "titleFontSize": 13},
            "legend": {"labelFontSize": 13, "labelLimit": 300},
        },
    }


# Each network has its own dashes and a colour that colour-blind readers can tell from the others
# (Okabe & Ito).
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#777777")
_DASHES = ([1, 0], [6, 3], [2, 2], [8, 3, 2, 3], [12, 4], [4, 4, 1, 4])


def _network(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    names = list(dict.fromkeys(row["network"] for row in rows))
    legend = {
        "orient": "bottom",
        "columns": 2,
        "title": None,
        "symbolType": "stroke",
        "symbolOpacity": 1,
    }
    field = {"field": "network", "type": "nominal", "legend": {**legend, "symbolSize": 400}}
    colours = [_COLOURS[k % len(_COLOURS)] for k in range(len(names))]
    dashes = [_DASHES[k % len(_DASHES)] for k in range(len(names))]
    return {
        "color": {**field, "scale": {"domain": names, "range": colours}},
        "strokeDash": {**field, "scale": {"domain": names, "range": dashes}},
    }


def curve_chart(
    rows: Sequence[Mapping[str, Any]], axis: str, *, logarithmic: bool = False
) -> dict[str, Any]:
    """Returns a chart of `value` against `step` with a line for each network and seed.

    rows: as `accuracies` and `losses` return them.
    axis: the title of the vertical axis.
    """
    scale = {"type": "log"} if logarithmic else {"zero": False}
    tooltip = [{"field": name, "type": "nominal"} for name in ("network", "seed", "step")]
    tooltip.append({"field": "text", "type": "nominal", "title": axis})
    chosen = {
        "name": "shown",
        "select": {"type": "point", "fields": ["network"]},
        "bind": "legend",
    }
    return _base(rows) | {
        "params": [_choice("seed", _seeds(rows), ALL), chosen],
        "transform": [{"filter": f"seed == '{ALL}' || datum.seed == seed"}],
        "mark": {"type": "line", "point": {"size": 30}},
        "encoding": {
            "x": {"field": "step", "type": "quantitative", "title": "step"},
            "y": {"field": "value", "type": "quantitative", "title": axis, "scale": scale},
            "detail": {"field": "seed"},
            "opacity": {"condition": {"param": "shown", "value": 1}, "value": 0.08},
            "tooltip": tooltip,
            **_network(rows),
        },
    }


def activation_chart(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns a chart with a line at p50 and a band from p15 to p85 for a chosen layer.

    rows: as `activations` returns them.
    """
    layers = sorted({row["layer"] for row in rows})
    tooltip = [
        {"field": name, "type": "nominal"}
        for name in ("network", "seed", "layer", "unit", "step", "p15", "p50", "p85")
    ]
    shared = {
        "x": {"field": "step", "type": "quantitative", "title": "step"},
        "detail": {"field": "seed"},
        "tooltip": tooltip,
        **_network(rows),
    }
    low = {"field": "p15", "type": "quantitative", "title": "activation"}
    band = {"y": low, "y2": {"field": "p85"}, **shared}
    del band["strokeDash"]  # an area has no line that could be dashed
    middle = {"y": {"field": "p50", "type": "quantitative"}, **shared}
    first = layers[-1] if layers else ""
    return _base(rows) | {
        "params": [
            _choice("layer", layers, first),
            _choice("seed", _seeds(rows), _seeds(rows)[-1]),
        ],
        "transform": [
            {"filter": f"datum.layer == layer && (seed == '{ALL}' || datum.seed == seed)"}
        ],
        "layer": [
            {"mark": {"type": "area", "opacity": 0.2}, "encoding": band},
            {"mark": {"type": "line", "strokeWidth": 3, "point": True}, "encoding": middle},
        ],
    }


# The text and the tables.


def _overview(runs: Sequence[Run]) -> str:
    head = ["run", "status", "seed", "steps", "last evaluation", "test split"]
    rows = []
    for run in runs:
        evaluations = run.lines["eval"]
        steps = f"{evaluations[-1]['step']:,}" if evaluations else "-"
        scores = [_score(evaluations), _score(run.lines["test"])]
        rows.append([str(run.workdir), run.status, _seed(run), steps, *scores])
    if not rows:
        return ""
    data = html.escape(runs[0].data["description"])
    table = f"{_table(head, rows)}<p>Parentheses hold the 95% interval of the count.</p>"
    if len(rows) > FEW:
        table = f"<details><summary>The {len(rows)} runs</summary>{table}</details>"
    return f"<p>{data}.</p>{table}"


def _score(lines: Sequence[Any]) -> str:
    return counted(lines[-1]["top1"], lines[-1]["examples"]) if lines else "-"


def _verdicts(workdir: pathlib.Path) -> str:
    """Returns a table of those claims of the paper that these runs can test, or '' if none."""
    if reader.is_run(workdir):
        return ""
    found = claims.answered(workdir)
    said = claims.verdicts(found)
    rows = []
    for row, verdict in zip(found, said, strict=True):
        question = row.question
        decides = row.decides
        value = "-" if decides is None else decides.text
        against = question.control or question.baseline or "-"
        claim = f"{question.claim}. {claims.CLAIMS[question.claim]}"
        rows.append([claim, verdict, question.ours, against, question.what, value])
    if not rows:
        return ""
    head = ["claim", "verdict", "network", "against", "quantity", "found, with its 95% interval"]
    return _table(head, rows)


def _differences(groups: Mapping[str, Sequence[Run]]) -> str:
    """Returns the first experiment's config and the fields in which each other one differs."""
    if not groups:
        return ""
    first, *others = groups
    config = flat(groups[first][0].config)
    rows = [[name, changes(flat(groups[name][0].config), config) or "nothing"] for name in others]
    whole = _table(["field", "value"], [[key, str(value)] for key, value in config.items()])
    text = f"<details><summary>All fields of {html.escape(first)}</summary>{whole}</details>"
    if rows:
        text = _table(["network", f"fields that differ from {first}"], rows) + text
    return text


def _provenance(runs: Sequence[Run]) -> str:
    if not runs:
        return ""
    said = markdown(made_by(run.origin for run in runs))
    known = [facts(run.origin) for run in runs]
    names = list(dict.fromkeys(name for found in known for name in found))
    rows = [
        [str(run.workdir), *(found.get(name, "-") for name in names)]
        for run, found in zip(runs, known, strict=True)
    ]
    each = _table(["run", *names], rows)
    return f"{said}<details><summary>Of each run</summary>{each}</details>"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns an HTML table; its cells may contain `code`, **bold** and links in Markdown."""
    lines = ["<div class=wide><table>", _row("th", head), *(_row("td", row) for row in rows)]
    return "\n".join([*lines, "</table></div>"])


def _row(tag: str, cells: Sequence[str]) -> str:
    inner = "".join(f"<{tag}>{_inline(cell)}</{tag}>" for cell in cells)
    return f"<tr>{inner}</tr>"


def _inline(text: str) -> str:
    text = html.escape(text)
    text = re.sub(r"`([^`]+)`", r"<code>\1</code>", text)
    text = re.sub(r"\*\*([^*]+)\*\*", r"<strong>\1</strong>", text)
    return re.sub(r"\[([^\]]+)\]\([^)]+\)", r"\1", text)  # the linked file may be absent


def markdown(text: str, *, below: int = 0) -> str:
    """Returns Markdown as HTML; it knows only headings, tables and paragraphs, as our tables use.

    below: by how many levels to lower the headings.
    """
    parts = []
    for block in re.split(r"\n\s*\n", text.strip()):
        lines = block.splitlines()
        while lines and (heading := re.match(r"(#+) (.*)", lines[0])):
            level = len(heading[1]) + below
            parts.append(f"<h{level}>{_inline(heading[2])}</h{level}>")
            lines = lines[1:]
        table = [line for line in lines if line.startswith("|")]
        if table:
            cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
            parts.append(_table(cells[0], cells[2:]))
        words = " ".join(line for line in lines if not line.startswith("|"))
        if words:
            parts.append(f"<p>{_inline(words)}</p>")
    return "\n".join(parts)


def _page(name: str, body: str, charts: Mapping[str, Any]) -> str:
    """Returns the whole file. Its scripts come last so that text and tables are shown at once."""
    folder = pathlib.Path(__file__).parent / "vega"
    scripts = [(folder / f"{script}.min.js").read_text(encoding="utf-8") for script in SCRIPTS]
    data = json.dumps(charts, allow_nan=False).replace("</", "<\\/")
    scripts.append(
        f"const charts = {data};\n"
        "for (const [id, chart] of Object.entries(charts))\n"
        "  vegaEmbed('#' + id, chart, {actions: false, renderer: 'svg'});"
    )
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{html.escape(name)}</title>\n<style>{STYLE}</style>\n</head>\n<body>",
            body,
            *(f"<script>{script}</script>" for script in scripts if charts),
            "</body>\n</html>\n",
        ]
    )
