"""Writes report.html: the verdicts, curves, tables and activations of recorded runs on one page.

The page is one file and needs no network. Bokeh draws its charts; its scripts are copied from the
installed package into the page. Every number comes from the records, or from the tables that `draw`
has made of them.
"""

import html
import math
import pathlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from bn_jax.figures import claims
from bn_jax.figures.curves import changes
from bn_jax.figures.fig1 import Percentiles, percentiles, typical_unit
from bn_jax.figures.origins import fact_names, facts, made_by
from bn_jax.figures.plotting import BLACK, BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, VERMILION
from bn_jax.uncertainty import counted
from bn_jax.workdir import files, reader
from bn_jax.workdir.reader import Run, flat

NAME = "report.html"
POINTS = 50  # a training curve has at most so many: single batches vary more than networks do
FEW = 6  # the table of more runs than this is folded
Row = dict[str, Any]  # one point of a chart

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 64rem; margin: 0 auto; padding: 0 1rem;
  color: #111; background: #fff; }
h1, h2, h3 { line-height: 1.2; }
table { border-collapse: collapse; font-size: .85rem; }
th, td { border-bottom: 1px solid #bbb; padding: .25rem .6rem; text-align: left;
  vertical-align: top; }
th { border-bottom: 2px solid #111; }
.wide { overflow-x: auto; margin: 1rem 0; }
.chart { width: 100%; }
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
    charts = _charts(groups)
    scripts, places = _embedded(charts)

    heading = title(groups)
    body = [f"<h1>{html.escape(heading)}</h1>", _overview(runs)]
    verdicts = _verdicts(workdir)
    if verdicts:
        body += ["<h2>The paper's claims</h2>", verdicts]

    for name in charts:
        note = NOTES[name]
        if len(runs) > FEW:
            note += " At first, only the runs with the first seed are shown."
        body.append(f"<h2>{HEADINGS[name]}</h2><p>{note}</p>")
        body.append(f'<div class="chart">{places[name]}</div>')

    tables = [path for path in drawn if path.suffix == ".md"]
    if tables:
        body.append("<h2>Tables</h2>")
    for path in tables:
        body.append(markdown(path.read_text(encoding="utf-8"), below=2))
    body += ["<h2>What the networks change</h2>", _differences(groups)]
    body += ["<h2>How the runs were made</h2>", _provenance(runs)]

    page = _page(heading, "\n".join(body), scripts)
    path = out / NAME
    files.write_atomic(path, page.encode())
    return path


def _charts(groups: Mapping[str, Sequence[Run]]) -> dict[str, Any]:
    """Returns the charts of what was recorded, in the order of the page."""
    charts = {}
    rows = accuracies(groups)
    if rows:
        charts["accuracy"] = curve_chart(rows, "accuracy (%)")

    rows = losses(groups)
    if rows:
        axis = "training cross-entropy (nats)"
        charts["loss"] = curve_chart(rows, axis, logarithmic=True)

    rows = activations(groups)
    if rows:
        charts["activations"] = activation_chart(rows)
    return charts


HEADINGS = {
    "accuracy": "Accuracy",
    "loss": "Training loss",
    "activations": "Activations",
}
_SWITCH = (
    "Point at a marker to read its numbers. Click on a network or a seed below the chart to hide "
    "or show it."
)
NOTES = {
    "accuracy": "This is the accuracy on the evaluated split, with population statistics. "
    f"{_SWITCH}",
    "loss": f"The training is cut into up to {POINTS} parts; each point is the mean over the "
    f"recorded batches of a part. {_SWITCH}",
    "activations": "The line is the median, and the band reaches from the 15th to the 85th "
    "percentile, of the layer's typical unit on one fixed batch. A unit is typical if its median "
    "drifts as much as that of the layer's median unit. Choose the layer above the chart. "
    f"{_SWITCH}",
}


def grouped(workdir: pathlib.Path) -> dict[str, list[Run]]:
    """Returns the runs of `workdir` by experiment; `workdir` may also be one run.

    If the folder has evaluations but no runs, the result is empty.

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

    first = groups[names[0]]
    data = first[0].data["name"]
    listed = ", ".join(names[:4])
    if len(names) > 4:
        listed += " and others"
    return f"{listed} on {data}"


# The numbers of the charts. Each point of a chart is one row.


def accuracies(groups: Mapping[str, Sequence[Run]]) -> list[Row]:
    """Returns a row for every recorded evaluation: `value` is the accuracy in percent."""
    rows = []
    for name, run in _runs(groups):
        for line in run.lines["eval"]:
            rows.append(
                {
                    "network": name,
                    "seed": _seed(run),
                    "step": line["step"],
                    "value": round(100 * line["top1"], 4),
                    "text": counted(line["top1"], line["examples"]),
                }
            )
    return rows


def _runs(groups: Mapping[str, Sequence[Run]]) -> Iterator[tuple[str, Run]]:
    """Yields every run with the name of its experiment."""
    for name, group in groups.items():
        for run in group:
            yield name, run


def losses(groups: Mapping[str, Sequence[Run]]) -> list[Row]:
    """Returns up to POINTS rows for each run: `value` is the mean cross-entropy of a part, in nats.

    Batches whose cross-entropy is not finite are left out.
    """
    rows = []
    for name, run in _runs(groups):
        # What is not finite was recorded as a word.
        lines = [line for line in run.lines["train"] if isinstance(line["cross_entropy"], float)]
        size = max(1, math.ceil(len(lines) / POINTS))
        for first in range(0, len(lines), size):
            part = lines[first : first + size]
            mean = np.mean([line["cross_entropy"] for line in part])
            value = _short(mean)
            rows.append(
                {
                    "network": name,
                    "seed": _seed(run),
                    "step": part[-1]["step"],
                    "value": value,
                    "text": f"{value:g}",
                }
            )
    return rows


def activations(groups: Mapping[str, Sequence[Run]]) -> list[Row]:
    """Returns the typical unit's percentiles, a row for each step of each layer that has some."""
    rows = []
    for name, run in _runs(groups):
        for curves in _layers(run):
            unit = typical_unit(curves)
            of_unit = curves.values[:, :, unit]
            for step, (low, middle, high) in zip(curves.steps, of_unit, strict=True):
                rows.append(
                    {
                        "network": name,
                        "seed": _seed(run),
                        "layer": curves.layer,
                        "step": int(step),
                        "unit": unit,
                        "p15": _short(low),
                        "p50": _short(middle),
                        "p85": _short(high),
                    }
                )
    return rows


def _short(value: float) -> float:
    """Rounds to five digits, which keeps the page small."""
    return float(f"{value:.5g}")


def _layers(run: Run) -> list[Percentiles]:
    """Returns what bn_jax.activations measured and, for other layers, what training recorded."""
    found = {}
    for line in run.lines["activation"]:
        layer = line["layer"]
        if layer not in found:
            found[layer] = percentiles(run, layer)

    folder = run.workdir / "activations"
    if folder.is_dir():
        from bn_jax.activations import measure  # imports jax, which takes a second
        from bn_jax.figures.activations import Shown, series

        shown = Shown(run.config["name"], run.workdir, measure.read(folder))
        if shown.steps:
            found |= {path: series(shown, path) for path in shown.paths()}
    return list(found.values())


def _seed(run: Run) -> str:
    return str(run.config.get("seed", 0))


# The charts, drawn with Bokeh. It is imported here, because other commands have no use for it.

# Each network has its own colour, dashes and marker.
_COLOURS = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, BLACK, GREY)
_DASHES = ("solid", "6 3", "2 2", "8 3 2 3", "12 4", "4 4 1 4")
_MARKERS = ("circle", "triangle", "square", "x", "diamond", "plus", "inverted_triangle", "star")
_LETTERS = "13px"


def _by_run(rows: Sequence[Row]) -> dict[tuple[str, str], list[Row]]:
    """Returns the rows of each network and seed."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        run = (row["network"], row["seed"])
        found.setdefault(run, []).append(row)
    return found


def _columns(rows: Sequence[Row], names: Sequence[str]) -> dict[str, list[Any]]:
    return {name: [row[name] for row in rows] for name in names}


def _looks(networks: Iterable[str]) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """Returns how the line and the markers of each network look."""
    looks = {}
    for k, name in enumerate(dict.fromkeys(networks)):
        colour = _COLOURS[k % len(_COLOURS)]
        line = {
            "line_color": colour,
            "line_dash": _DASHES[k % len(_DASHES)],
            "line_width": 2,
        }
        marker = {
            "marker": _MARKERS[k % len(_MARKERS)],
            "size": 7,
            "line_color": colour,
            "fill_color": colour,
        }
        looks[name] = (line, marker)
    return looks


def _chart(axis: str, **options: Any) -> Any:
    """Returns an empty chart over steps. `axis` is the title of its vertical axis."""
    from bokeh.models import NumeralTickFormatter
    from bokeh.plotting import figure

    chart = figure(
        height=340,
        sizing_mode="stretch_width",
        tools="pan,box_zoom,reset",
        toolbar_location="above",
        active_drag=None,  # a finger moves the page
        x_axis_label="step",
        y_axis_label=axis,
        **options,
    )
    chart.toolbar.logo = None
    chart.xaxis.formatter = NumeralTickFormatter(format="0,0")
    chart.axis.axis_label_text_font_size = _LETTERS
    chart.axis.major_label_text_font_size = _LETTERS
    return chart


def _add_hover(chart: Any, markers: Sequence[Any], fields: Mapping[str, str]) -> None:
    """Shows `fields` (the label and the column of each) of the marker that is pointed at."""
    from bokeh.models import HoverTool

    tooltips = [("run", "$name")]
    for label, column in fields.items():
        tooltips.append((label, f"@{column}"))
    hover = HoverTool(
        renderers=list(markers),
        tooltips=tooltips,
        muted_policy="ignore",
        limit=1,  # of a run: its markers may touch
    )
    chart.add_tools(hover)


def _add_legends(chart: Any, drawn: Mapping[tuple[str, str], Sequence[Any]]) -> None:
    """Adds a legend of networks and, if there are several, one of seeds; clicks hide and show.

    A network is hidden by not being visible and a seed by being muted, so that the two legends do
    not undo each other. Of more than FEW runs, only those with the first seed are shown at first.

    drawn: what is drawn of each network and seed.
    """
    networks: dict[str, list[Any]] = {}
    seeds: dict[str, list[Any]] = {}
    for (network, seed), parts in drawn.items():
        networks.setdefault(network, []).extend(parts)
        seeds.setdefault(seed, []).extend(parts)

    if len(drawn) > FEW:
        for name in list(seeds)[1:]:
            for part in seeds[name]:
                part.muted = True

    narrow = max(map(len, networks)) <= 12  # two such names stand side by side on a phone
    columns = 2 if narrow else 1
    legends = [_legend(networks, ncols=columns, glyph_width=40, click_policy="hide")]
    if len(seeds) > 1:
        named = {f"seed {name}": parts for name, parts in seeds.items()}
        legends.append(_legend(named, ncols=4, glyph_width=0, click_policy="mute"))
    for legend in legends:
        chart.add_layout(legend, "below")
        lines = math.ceil(len(legend.items) / legend.ncols)
        chart.height += 26 * lines


def _legend(parts: Mapping[str, Sequence[Any]], **options: Any) -> Any:
    from bokeh.models.annotations import Legend, LegendItem

    # Not as a keyword, since Bokeh's types do not know it.
    options["items"] = [LegendItem(label=name, renderers=list(own)) for name, own in parts.items()]
    return Legend(
        location="top_left",
        label_text_font_size=_LETTERS,
        border_line_color=None,
        **options,
    )


def curve_chart(rows: Sequence[Row], axis: str, *, logarithmic: bool = False) -> Any:
    """Returns a chart of `value` against `step` with a line for each network and seed.

    rows: as `accuracies` and `losses` return them.
    axis: the title of the vertical axis.
    """
    from bokeh.models import CDSView, ColumnDataSource, Line, Scatter

    chart = _chart(axis, y_axis_type="log" if logarithmic else "linear")
    place: dict[str, Any] = {"x": "step", "y": "value"}
    runs = _by_run(rows)

    # Runs share what they can: Bokeh takes about a millisecond for each of its objects.
    glyphs = {}
    for network, (line, marker) in _looks(network for network, _ in runs).items():
        glyphs[network] = (Line(**place, **line), Scatter(**place, **marker))
    hidden = (
        Line(**place, line_alpha=0),
        Scatter(**place, line_alpha=0, fill_alpha=0),
    )

    drawn = {}
    for (network, seed), own in runs.items():
        source = ColumnDataSource(_columns(own, ("step", "value", "text")))
        view = CDSView()
        name = f"{network}, seed {seed}"
        drawn[network, seed] = [
            chart.add_glyph(source, glyph, muted_glyph=muted, view=view, name=name)
            for glyph, muted in zip(glyphs[network], hidden, strict=True)
        ]

    markers = [parts[-1] for parts in drawn.values()]
    _add_hover(chart, markers, {"step": "step", axis: "text"})
    _add_legends(chart, drawn)
    return chart


def activation_chart(rows: Sequence[Row]) -> Any:
    """Returns a chart with a line at p50 and a band from p15 to p85 for a chosen layer.

    rows: as `activations` returns them.
    """
    from bokeh.layouts import column
    from bokeh.models import CDSView, ColumnDataSource, GroupFilter, MultiLine, Patches, Scatter
    from bokeh.models.widgets import Select

    layers = sorted({row["layer"] for row in rows})
    select = Select(title="Layer", options=layers, value=layers[-1], sizing_mode="stretch_width")
    shown = GroupFilter(column_name="layer", group=select.value)
    select.js_link("value", shown, "group")

    chart = _chart("activation")
    band_at: dict[str, Any] = {"xs": "around", "ys": "band"}
    line_at: dict[str, Any] = {"xs": "steps", "ys": "middle"}
    marker_at: dict[str, Any] = {"x": "step", "y": "p50"}
    runs = _by_run(rows)

    glyphs = {}
    for network, (line, marker) in _looks(network for network, _ in runs).items():
        band: dict[str, Any] = {
            "fill_color": line["line_color"],
            "fill_alpha": 0.15,
            "line_color": None,
        }
        glyphs[network] = (
            Patches(**band_at, **band),
            MultiLine(**line_at, **line),
            Scatter(**marker_at, **marker),
        )
    hidden = (
        Patches(**band_at, line_alpha=0, fill_alpha=0),
        MultiLine(**line_at, line_alpha=0),
        Scatter(**marker_at, line_alpha=0, fill_alpha=0),
    )

    columns = ("layer", "unit", "step", "p15", "p50", "p85")
    drawn = {}
    for (network, seed), own in runs.items():
        # A line of many layers has to be several lines, or it could not be filtered.
        curves = ColumnDataSource(_curves(own))
        points = ColumnDataSource(_columns(own, columns))
        of_curves = CDSView(filter=shown)
        of_points = CDSView(filter=shown)
        sources = [(curves, of_curves), (curves, of_curves), (points, of_points)]
        name = f"{network}, seed {seed}"
        drawn[network, seed] = [
            chart.add_glyph(source, glyph, muted_glyph=muted, view=view, name=name)
            for (source, view), glyph, muted in zip(sources, glyphs[network], hidden, strict=True)
        ]

    markers = [parts[-1] for parts in drawn.values()]
    _add_hover(chart, markers, {name: name for name in columns})
    _add_legends(chart, drawn)
    return column(select, chart, sizing_mode="stretch_width")


def _curves(rows: Sequence[Row]) -> dict[str, list[Any]]:
    """Returns the median's line and the band's outline of each layer of one run."""
    found: dict[str, list[Any]] = {}
    for layer in dict.fromkeys(row["layer"] for row in rows):
        own = [row for row in rows if row["layer"] == layer]
        steps = [row["step"] for row in own]
        low = [row["p15"] for row in own]
        high = [row["p85"] for row in own]
        curve = {
            "layer": layer,
            "steps": steps,
            "middle": [row["p50"] for row in own],
            "around": steps + steps[::-1],
            "band": low + high[::-1],
        }
        for name, value in curve.items():
            found.setdefault(name, []).append(value)
    return found


def _embedded(charts: Mapping[str, Any]) -> tuple[str, dict[str, str]]:
    """Returns Bokeh's scripts with those of the charts, and the element of each chart."""
    if not charts:
        return "", {}
    from bokeh.embed import components
    from bokeh.resources import Resources

    needed: list[Any] = ["bokeh"]
    if "activations" in charts:
        needed.append("bokeh-widgets")  # the list of layers
    scripts = Resources(mode="inline", components=needed, log_level="error").render()
    script, places = components(dict(charts))
    return f"{scripts}\n{script}", places


# The text and the tables.


def _overview(runs: Sequence[Run]) -> str:
    head = ["run", "status", "seed", "steps", "last evaluation", "test split"]
    rows = []
    for run in runs:
        evaluations = run.lines["eval"]
        rows.append(
            [
                str(run.workdir),
                run.status,
                _seed(run),
                f"{evaluations[-1]['step']:,}" if evaluations else "-",
                _score(evaluations),
                _score(run.lines["test"]),
            ]
        )
    if not rows:
        return ""

    data = html.escape(runs[0].data["description"])
    table = f"{_table(head, rows)}<p>Parentheses hold the 95% interval of the count.</p>"
    if len(rows) > FEW:
        table = f"<details><summary>The {len(rows)} runs</summary>{table}</details>"
    return f"<p>{data}.</p>{table}"


def _score(lines: Sequence[Any]) -> str:
    if not lines:
        return "-"
    last = lines[-1]
    return counted(last["top1"], last["examples"])


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
        rows.append(
            [
                f"{question.claim}. {claims.CLAIMS[question.claim]}",
                verdict,
                question.ours,
                question.control or question.baseline or "-",
                question.what,
                "-" if decides is None else decides.text,
            ]
        )
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
    rows = []
    for name in others:
        other = flat(groups[name][0].config)
        rows.append([name, changes(other, config) or "nothing"])

    fields = [[name, str(value)] for name, value in config.items()]
    whole = _table(["field", "value"], fields)
    text = f"<details><summary>All fields of {html.escape(first)}</summary>{whole}</details>"
    if rows:
        text = _table(["network", f"fields that differ from {first}"], rows) + text
    return text


def _provenance(runs: Sequence[Run]) -> str:
    if not runs:
        return ""
    said = markdown(made_by(run.origin for run in runs))
    known = [facts(run.origin) for run in runs]
    columns = fact_names(known)
    rows = []
    for run, found in zip(runs, known, strict=True):
        cells = [found.get(name, "-") for name in columns]
        rows.append([str(run.workdir), *cells])
    each = _table(["run", *columns], rows)
    return f"{said}<details><summary>Of each run</summary>{each}</details>"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns an HTML table; its cells may contain `code`, **bold** and links in Markdown."""
    lines = ["<div class=wide><table>", _row("th", head)]
    for row in rows:
        lines.append(_row("td", row))
    lines.append("</table></div>")
    return "\n".join(lines)


def _row(tag: str, cells: Sequence[str]) -> str:
    inner = [f"<{tag}>{_inline(cell)}</{tag}>" for cell in cells]
    return f"<tr>{''.join(inner)}</tr>"


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

        table = []
        words = []
        for line in lines:
            if line.startswith("|"):
                cells = line.strip("|").split("|")
                table.append([cell.strip() for cell in cells])
            else:
                words.append(line)
        if table:
            head, _, *rows = table
            parts.append(_table(head, rows))
        if words:
            parts.append(f"<p>{_inline(' '.join(words))}</p>")
    return "\n".join(parts)


def _page(name: str, body: str, scripts: str) -> str:
    """Returns the whole file. Its scripts come last so that text and tables are shown at once."""
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{html.escape(name)}</title>\n<style>{STYLE}</style>\n</head>\n<body>",
            body,
            scripts,
            "</body>\n</html>\n",
        ]
    )
