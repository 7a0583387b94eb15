"""Makes the table of Fig. 4 (4.2.3) from recorded evaluations, beside the paper's numbers."""

import csv
import io
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from bn_jax.errors import ConfigError
from bn_jax.figures.origins import made_by
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
HEAD = ["model", "resolution", "crops", "models", "paper: top-1 error", "paper: top-5 error"]
HEAD += ["ours: models", "ours: crops", "ours: top-1 error", "ours: top-5 error"]


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

    found: dict[tuple[Any, ...], Mapping[str, Any]] = {}
    for whole in sorted(recorded, key=lambda line: line["time"]):
        if whole["statistics"] == "running":
            continue
        for line in (*_alone(whole), whole):
            where = tuple(sorted(_place(member) for member in line["members"]))
            found[where, line["crops"]] = line

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
    whole = {key: value for key, value in line.items() if key != "gain"}
    pairs = zip(members, scores, strict=True)
    return [{**whole, **s, "members": [m], "member_scores": []} for m, s in pairs]


def _place(member: Mapping[str, Any]) -> str:
    """Returns a network's workdir as an absolute path, in whatever form it was recorded."""
    return str(pathlib.Path(member["workdir"]).resolve())


def rows(lines: Sequence[Mapping[str, Any]]) -> list[TableLine]:
    """Groups evaluations into lines: single networks by crops, then the largest ensembles by crops.

    There are two kinds of ensembles: of different networks, and, as a control, of one network's
    seeds. If there is an ensemble, only its members are shown as single networks.
    """
    found = []
    ensembles = [x for x in lines if len(x["members"]) > 1]
    varied = [x for x in ensembles if not _of_seeds(x)]
    averaged = {_place(m) for x in varied or ensembles for m in x["members"]}
    for crops in sorted({line["crops"] for line in lines}):
        single = [x for x in lines if x["crops"] == crops and len(x["members"]) == 1]
        single = [x for x in single if not averaged or _place(x["members"][0]) in averaged]
        if single:
            found.append(TableLine("single", crops, single))
    for crops in sorted({line["crops"] for line in lines}):
        for label, of_seeds in (("ensemble", False), (CONTROL, True)):
            several = [x for x in ensembles if x["crops"] == crops and _of_seeds(x) == of_seeds]
            if several:
                largest = max(several, key=lambda x: len(x["members"]))
                found.append(TableLine(label, crops, [largest]))
    return found


def _of_seeds(line: Mapping[str, Any]) -> bool:
    """Whether the networks of an ensemble differ only in their seeds.

    They then have one name and lie in folders EXPERIMENT/seed_K.
    """
    experiments = {
        (member["name"], pathlib.Path(member["workdir"]).parent.name) for member in line["members"]
    }
    return len(experiments) == 1


def error(row: TableLine, name: str) -> str:
    """Gives a row's error: of one evaluation with its 95% interval, of several mean and range."""
    shares = [100 * wrong(line, name) for line in row.lines]
    if len(shares) == 1:
        return counted(wrong(row.lines[0], name), row.lines[0]["examples"])
    mean = sum(shares) / len(shares)
    return f"{mean:.2f}% [{min(shares):.2f} to {max(shares):.2f}]"


def wrong(line: Mapping[str, Any], name: str) -> float:
    """Returns the share of wrong examples, from their count."""
    n = line["examples"]
    return (n - round(line[name] * n)) / n


def interval(line: Mapping[str, Any], name: str) -> Interval:
    """Returns the 95% interval of an error's count, as shares."""
    return wilson(round(wrong(line, name) * line["examples"]), line["examples"])


def models(row: TableLine) -> str:
    """Says how many networks a row rests on."""
    if row.label != "single":
        return f"{len(row.lines[0]['members'])}, averaged"
    return "1" if len(row.lines) == 1 else f"1 (mean of {len(row.lines)} networks)"


def _paper_line(row: TableLine) -> int | None:
    """Returns the line of the paper's table that a row of ours is compared with."""
    places = {("single", 1): 4, ("single", 144): 5, ("ensemble", 144): 6}
    return places.get((row.label, row.crops))


def markdown(folder: pathlib.Path) -> str:
    """Makes the table with its setting and its networks. Raises ConfigError as `collect` does."""
    lines = collect(folder)
    ours = rows(lines)
    beside = {place: row for row in ours if (place := _paper_line(row)) is not None}
    table = []
    for k, printed in enumerate(PAPER):
        row = beside.get(k)
        mine = ["-"] * 4 if row is None else _cells(row)
        if row is None and printed[0].startswith("BN-Inception"):
            mine = ["not yet run"] * 4
        table.append([*printed, *mine])
    for row in ours:
        if _paper_line(row) is None:
            what = "single network" if row.label == "single" else row.label
            table.append([f"{what}, {_crops(row.crops)}, not in the paper"])
            table[-1] += ["-"] * 5 + _cells(row)
    text = [f"| {' | '.join(cells)} |" for cells in ([HEAD, *table])]
    text.insert(1, "|---" * len(HEAD) + "|")
    parts = ["# Single networks, multicrop and ensemble (Fig. 4)", _setting(lines)]
    parts += ["\n".join(text), _gains(ours), _networks(ours), made_by(lines, "evaluations")]
    return "\n\n".join(part for part in parts if part) + "\n"


def _crops(number: int) -> str:
    return "single crop" if number == 1 else f"{number} crops"


def _cells(row: TableLine) -> list[str]:
    views = row.lines[0]["views"]
    crops = str(row.crops) if views == row.crops else f"{views} of {row.crops}, not mirrored"
    return [models(row), crops, error(row, "top1"), error(row, "top5")]


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
    said = ["| ensemble | crops | gain in top-1 on the members' mean, points |", "|---" * 3 + "|"]
    for row in ours:
        if row.label == "single" or not row.lines[0]["member_scores"]:
            continue
        (line,) = row.lines
        scores = line["member_scores"]
        alone = sum(wrong(one, "top1") for one in scores) / len(scores)
        cell = f"{100 * (alone - wrong(line, 'top1')):+.2f}"
        if "gain" in line:
            ends = (line["gain"]["low"], line["gain"]["high"])
            cell += f" ({100 * ends[0]:+.2f} to {100 * ends[1]:+.2f})"
        else:
            cell += " (no interval: evaluate it again)"
        said.append(f"| {row.label}: {models(row)} | {row.crops} | {cell} |")
    if len(said) == 2:
        return ""
    text = (
        "The members and their mean see the same images, so the gain is known better than the "
        "errors themselves. Its 95% interval, in parentheses, is by a paired bootstrap of the "
        "images.\n\n"
    )
    return text + "\n".join(said)


def _networks(ours: Sequence[TableLine]) -> str:
    """Lists every network of the table with its own errors."""
    text = ["| network | seed | steps | crops | top-1 error | top-5 error |", "|---" * 6 + "|"]
    for row in ours:
        for line in row.lines if row.label == "single" else ():
            (m,) = line["members"]
            alone = TableLine("single", row.crops, [line])
            which = f", {m['which']}" if "which" in m else ""
            steps = f"{m['step']:,} of {m['total_steps']:,}{which}"
            cells = [f"`{m['name']}`", str(m["seed"]), steps, str(row.crops)]
            cells += [error(alone, "top1"), error(alone, "top5")]
            text.append(f"| {' | '.join(cells)} |")
    for row in ours:
        for line in row.lines if row.label != "single" else ():
            names = ", ".join(f"`{m['name']}` seed {m['seed']}" for m in line["members"])
            text.append("")
            text.append(f"{row.label.capitalize()}, {_crops(row.crops)}: {names}.")
    return "\n".join(text)


def as_csv(folder: pathlib.Path) -> str:
    """Lists every evaluation behind the table as CSV; errors are shares of 1."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    head = ["networks", "names", "seeds", "steps", "crops", "views", "image_size", "examples"]
    head += ["top1_error", "top1_low", "top1_high", "top5_error", "top5_low", "top5_high"]
    writer.writerow([*head, "gain", "gain_low", "gain_high", "cross_entropy"])
    for line in sorted(collect(folder), key=lambda x: (len(x["members"]), x["crops"])):
        several = [" ".join(str(m[k]) for m in line["members"]) for k in ("name", "seed", "step")]
        fields = [line[k] for k in ("crops", "views", "image_size", "examples")]
        numbers = []
        for name in ("top1", "top5"):
            numbers += [wrong(line, name), *interval(line, name)]
        numbers += [line.get("gain", {}).get(key, "") for key in ("top1", "low", "high")]
        writer.writerow([len(line["members"]), *several, *fields, *numbers, line["cross_entropy"]])
    return out.getvalue()


def draw_fig4(folder: pathlib.Path, out: pathlib.Path) -> list[pathlib.Path]:
    """Writes and prints the table of Fig. 4 from the evaluations recorded below `folder`.

    Raises ConfigError if they cannot be compared with each other.
    """
    texts = {"fig4.md": markdown(folder), "fig4.csv": as_csv(folder)}
    out.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        files.write_atomic(out / name, text.encode())
    print(texts["fig4.md"])
    return [out / name for name in texts]
