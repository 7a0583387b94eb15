"""Makes the table of Fig. 4 (4.2.3) from recorded evaluations, beside the paper's numbers."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from bn_jax.errors import ConfigError
from bn_jax.figures.origins import made_by
from bn_jax.tables import csv_table, markdown_table
from bn_jax.uncertainty import Interval, counted, wilson
from bn_jax.workdir import files, reader

# Model, resolution, crops, models, top-1 error and top-5 error (%), as printed; "-" is not given.
PAPER = (
    ("GoogLeNet ensemble", "224", "144", "7", "-", "6.67%"),
    ("Deep Image low-res", "256", "-", "1", "-", "7.96%"),
    ("Deep Image high-res", "512", "-", "1", "24.88%", "7.42%"),
    ("Deep Image ensemble", "variable", "-", "-", "-", "5.98%"),
    ("BN-Inception single crop", "224", "1", "1", "25.2%", "7.82%"),
    ("BN-Inception multicrop", "224", "144", "1", "21.99%", "5.82%"),
    ("BN-Inception ensemble", "224", "144", "6", "20.1%", "4.9% (test server 4.82%)"),
)
HEAD = [
    "model",
    "resolution",
    "crops",
    "models",
    "paper: top-1 error",
    "paper: top-5 error",
    "ours: models",
    "ours: crops",
    "ours: top-1 error",
    "ours: top-5 error",
]


CONTROL = "ensemble of equal networks"  # that differ in nothing but the seed


class TableLine(NamedTuple):
    """The evaluations behind a line of our table: of single networks, or of one ensemble."""

    label: str
    crops: int
    lines: list[Mapping[str, Any]]


def collect(folder: pathlib.Path) -> list[Mapping[str, Any]]:
    """Collects the evaluations with population statistics that are recorded below `folder`.

    Of the same networks and crops the latest evaluation is taken. The members of an ensemble count
    as evaluated alone, too. Raises ConfigError if there is none, or if they are of different data,
    splits or image sizes.
    """
    recorded: list[Mapping[str, Any]] = []
    for place in reader.find_evaluations(folder):
        recorded += reader.read_evaluations(place)

    # Later evaluations replace earlier ones of the same networks and crops.
    by_time = sorted(recorded, key=lambda line: line["time"])
    found: dict[tuple[Any, ...], Mapping[str, Any]] = {}
    for whole in by_time:
        if whole["statistics"] == "running":
            continue
        for line in (*_alone(whole), whole):
            networks = sorted(_place(member) for member in line["members"])
            found[tuple(networks), line["crops"]] = line

    if not found:
        raise ConfigError(
            f"{folder} holds no evaluation: run bn_jax.evaluate on the workdirs in it first"
        )

    lines = list(found.values())
    for field in ("data", "split", "holdout", "image_size", "examples"):
        values = sorted({str(line[field]) for line in lines})
        if len(values) > 1:
            raise ConfigError(
                f"the evaluations in {folder} cannot be compared: {field} is {', '.join(values)}; "
                "separate them"
            )
    return lines


def _alone(line: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Returns an ensemble's members as evaluations of their own, if each was scored alone."""
    members = line["members"]
    scores = line["member_scores"]
    if len(members) != len(scores):
        return []

    shared = dict(line)
    shared.pop("gain", None)  # only an ensemble has one
    found: list[Mapping[str, Any]] = []
    for member, score in zip(members, scores, strict=True):
        alone = {"members": [member], "member_scores": []}
        found.append({**shared, **score, **alone})
    return found


def _place(member: Mapping[str, Any]) -> str:
    """Returns a network's workdir as an absolute path, in whatever form it was recorded."""
    workdir = pathlib.Path(member["workdir"])
    return str(workdir.resolve())


def rows(lines: Sequence[Mapping[str, Any]]) -> list[TableLine]:
    """Groups evaluations into lines: single networks by crops, then the largest ensembles by crops.

    There are two kinds of ensembles: of different networks, and, as a control, of one network's
    seeds. If there is an ensemble, only its members are shown as single networks.
    """
    all_crops = sorted({line["crops"] for line in lines})
    ensembles = [line for line in lines if _size(line) > 1]
    varied = [line for line in ensembles if not _of_seeds(line)]
    controls = [line for line in ensembles if _of_seeds(line)]

    # The controls' members are shown only if there is no other ensemble.
    averaged: set[str] = set()
    for line in varied or ensembles:
        averaged.update(_place(member) for member in line["members"])

    shown = []
    for line in lines:
        if _size(line) == 1:
            (member,) = line["members"]
            if not averaged or _place(member) in averaged:
                shown.append(line)

    found = []
    for crops in all_crops:
        single = [line for line in shown if line["crops"] == crops]
        if single:
            found.append(TableLine("single", crops, single))

    for crops in all_crops:
        for label, candidates in (("ensemble", varied), (CONTROL, controls)):
            several = [line for line in candidates if line["crops"] == crops]
            if several:
                largest = max(several, key=_size)
                found.append(TableLine(label, crops, [largest]))
    return found


def _size(line: Mapping[str, Any]) -> int:
    """Returns the number of networks that were evaluated together."""
    return len(line["members"])


def _of_seeds(line: Mapping[str, Any]) -> bool:
    """Whether the networks of an ensemble differ only in their seeds.

    They then have one name and lie in folders EXPERIMENT/seed_K.
    """
    experiments = set()
    for member in line["members"]:
        workdir = pathlib.Path(member["workdir"])
        experiments.add((member["name"], workdir.parent.name))
    return len(experiments) == 1


def error(row: TableLine, name: str) -> str:
    """Gives a row's error: of one evaluation with its 95% interval, of several mean and range."""
    if len(row.lines) == 1:
        (line,) = row.lines
        return counted(wrong(line, name), line["examples"])

    percents = [100 * wrong(line, name) for line in row.lines]
    mean = sum(percents) / len(percents)
    smallest = min(percents)
    largest = max(percents)
    return f"{mean:.2f}% [{smallest:.2f} to {largest:.2f}]"


def wrong(line: Mapping[str, Any], name: str) -> float:
    """Returns the share of wrong examples, from their count."""
    n = line["examples"]
    right = round(line[name] * n)
    return (n - right) / n


def interval(line: Mapping[str, Any], name: str) -> Interval:
    """Returns the 95% interval of an error's count, as shares."""
    n = line["examples"]
    count = round(wrong(line, name) * n)
    return wilson(count, n)


def gain(line: Mapping[str, Any]) -> tuple[float, Interval | None]:
    """Returns what an ensemble gains in top-1 on its members' mean, and the interval, as shares.

    Older records have no interval.
    """
    errors = [wrong(score, "top1") for score in line["member_scores"]]
    mean = sum(errors) / len(errors)
    value = mean - wrong(line, "top1")
    if "gain" not in line:
        return value, None
    return value, Interval(line["gain"]["low"], line["gain"]["high"])


def models(row: TableLine) -> str:
    """Says how many networks a row rests on."""
    if row.label != "single":
        (line,) = row.lines
        return f"{_size(line)}, averaged"
    if len(row.lines) == 1:
        return "1"
    return f"1 (mean of {len(row.lines)} networks)"


def _paper_line(row: TableLine) -> int | None:
    """Returns the line of the paper's table that a row of ours is compared with."""
    places = {
        ("single", 1): 4,
        ("single", 144): 5,
        ("ensemble", 144): 6,
    }
    return places.get((row.label, row.crops))


def markdown(folder: pathlib.Path) -> str:
    """Makes the table with its setting and its networks. Raises ConfigError as `collect` does."""
    lines = collect(folder)
    ours = rows(lines)
    parts = [
        "# Single networks, multicrop and ensemble (Fig. 4)",
        _setting(lines),
        _beside_the_paper(ours),
        _gains(ours),
        _networks(ours),
        made_by(lines, "evaluations"),
    ]
    not_empty = [part for part in parts if part]
    return "\n\n".join(not_empty) + "\n"


def _beside_the_paper(ours: Sequence[TableLine]) -> str:
    """Makes the table: the paper's lines with ours beside them, then those of ours alone."""
    compared = {}
    others = []
    for row in ours:
        place = _paper_line(row)
        if place is None:
            others.append(row)
        else:
            compared[place] = row

    table = []
    for k, printed in enumerate(PAPER):
        if k in compared:
            mine = _cells(compared[k])
        elif printed[0].startswith("BN-Inception"):
            mine = ["not yet run"] * 4
        else:
            mine = ["-"] * 4
        table.append([*printed, *mine])

    for row in others:
        what = "single network" if row.label == "single" else row.label
        first = f"{what}, {_crops(row.crops)}, not in the paper"
        not_printed = ["-"] * 5
        table.append([first, *not_printed, *_cells(row)])
    return markdown_table(HEAD, table)


def _crops(number: int) -> str:
    return "single crop" if number == 1 else f"{number} crops"


def _cells(row: TableLine) -> list[str]:
    views = row.lines[0]["views"]
    crops = str(row.crops)
    if views != row.crops:
        crops = f"{views} of {row.crops}, not mirrored"
    return [
        models(row),
        crops,
        error(row, "top1"),
        error(row, "top5"),
    ]


def _setting(lines: Sequence[Mapping[str, Any]]) -> str:
    one = lines[0]
    return (
        f"Ours: {one['description']}; {one['image_size']} px; {one['examples']:,} examples of the "
        f"{one['split']} split, each counted once; statistics of Algorithm 2. Parentheses hold "
        "Wilson's 95% interval of the count, which says what other images would give. Brackets "
        "hold the smallest and largest of several networks. The paper's columns: ImageNet's 50,000 "
        "validation images. The settings differ: compare the order of the lines, not the numbers."
    )


def _gains(ours: Sequence[TableLine]) -> str:
    """Lists what averaging gains over the members alone, with a paired bootstrap's interval."""
    gains = []
    for row in ours:
        if row.label == "single":
            continue
        (line,) = row.lines
        if not line["member_scores"]:
            continue

        value, ends = gain(line)
        if ends is None:
            said = "no interval: evaluate it again"
        else:
            said = f"{100 * ends.low:+.2f} to {100 * ends.high:+.2f}"
        cells = [
            f"{row.label}: {models(row)}",
            str(row.crops),
            f"{100 * value:+.2f} ({said})",
        ]
        gains.append(cells)

    if not gains:
        return ""
    head = ["ensemble", "crops", "gain in top-1 on the members' mean, points"]
    text = (
        "The members and their mean see the same images, so the gain is known better than the "
        "errors themselves. Its 95% interval, in parentheses, is by a paired bootstrap of the "
        "images."
    )
    return f"{text}\n\n{markdown_table(head, gains)}"


def _networks(ours: Sequence[TableLine]) -> str:
    """Lists every network of the table with its own errors."""
    singles = [row for row in ours if row.label == "single"]
    ensembles = [row for row in ours if row.label != "single"]

    head = ["network", "seed", "steps", "crops", "top-1 error", "top-5 error"]
    table = []
    for row in singles:
        for line in row.lines:
            table.append(_network(line, row.crops))

    text = [markdown_table(head, table)]
    for row in ensembles:
        (line,) = row.lines
        names = [f"`{member['name']}` seed {member['seed']}" for member in line["members"]]
        text.append("")
        text.append(f"{row.label.capitalize()}, {_crops(row.crops)}: {', '.join(names)}.")
    return "\n".join(text)


def _network(line: Mapping[str, Any], crops: int) -> list[str]:
    """Makes the cells of one network, evaluated alone."""
    (member,) = line["members"]
    steps = f"{member['step']:,} of {member['total_steps']:,}"
    if "which" in member:
        steps += f", {member['which']}"

    alone = TableLine("single", crops, [line])
    return [
        f"`{member['name']}`",
        str(member["seed"]),
        steps,
        str(crops),
        error(alone, "top1"),
        error(alone, "top5"),
    ]


def as_csv(folder: pathlib.Path) -> str:
    """Lists every evaluation behind the table as CSV; errors are shares of 1."""
    lines = sorted(collect(folder), key=lambda line: (_size(line), line["crops"]))
    return csv_table([_csv_row(line) for line in lines])


def _csv_row(line: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the cells of an evaluation by column; ends of an interval are `low` and `high`."""
    members = line["members"]
    top1 = interval(line, "top1")
    top5 = interval(line, "top5")
    gained = line.get("gain", {})
    return {
        "networks": len(members),
        "names": " ".join(member["name"] for member in members),
        "seeds": " ".join(str(member["seed"]) for member in members),
        "steps": " ".join(str(member["step"]) for member in members),
        "crops": line["crops"],
        "views": line["views"],
        "image_size": line["image_size"],
        "examples": line["examples"],
        "top1_error": wrong(line, "top1"),
        "top1_low": top1.low,
        "top1_high": top1.high,
        "top5_error": wrong(line, "top5"),
        "top5_low": top5.low,
        "top5_high": top5.high,
        "gain": gained.get("top1"),
        "gain_low": gained.get("low"),
        "gain_high": gained.get("high"),
        "cross_entropy": line["cross_entropy"],
    }


def draw_fig4(folder: pathlib.Path, out: pathlib.Path) -> list[pathlib.Path]:
    """Writes and prints the table of Fig. 4 from the evaluations recorded below `folder`.

    Raises ConfigError if they cannot be compared with each other.
    """
    texts = {
        "fig4.md": markdown(folder),
        "fig4.csv": as_csv(folder),
    }
    out.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        files.write_atomic(out / name, text.encode())
    print(texts["fig4.md"])
    return [out / name for name in texts]
