"""Figures read recorded files only; their numbers against hand-made records."""

import csv
import json
import subprocess
import sys

import numpy as np
import pytest

from bn_jax import train, uncertainty
from bn_jax.errors import ConfigError, DiskError
from bn_jax.figures import __main__ as command
from bn_jax.figures import ablations, curves, fig1, fig2, fig3
from bn_jax.figures.draw import draw
from bn_jax.workdir import reader
from configs import bn_baseline, bn_x5, inception, inception_x5, mnist, mnist_bn
from tests.train_test import small


def write_run(workdir, values, top1=(0.5, 0.9)):
    """A recorded run of one layer; values [T, 3, units] are its percentiles."""
    workdir.mkdir(parents=True)
    data = {"name": "digits", "split": "test", "description": "hand-made"}
    run = {"config": {"name": workdir.name}, "info": {"data": data}, "status": "done"}
    run |= {"results": {}, "source": {}, "hardware": {}}
    (workdir / "run.json").write_text(json.dumps(run))
    lines = [
        {"step": 10 * t, "kind": "activation", "layer": "dense_2/input"}
        | {f"p{p}": list(map(float, row)) for p, row in zip((15, 50, 85), at, strict=True)}
        for t, at in enumerate(values)
    ]
    lines += [
        {"step": 10 * (k + 1), "kind": "eval", "top1": v, "top5": 1.0, "examples": 1000}
        for k, v in enumerate(top1)
    ]
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_drift_is_the_range_over_the_spread(tmp_path):
    # unit 0 never moves; unit 1's percentiles all rise by 2, their distance stays 4
    values = np.array([[[-1, -2], [0, 0], [1, 2]], [[-1, 0], [0, 2], [1, 4]]], float)
    write_run(tmp_path / "a", values)
    curves = fig1.percentiles(reader.read_run(tmp_path / "a"), "dense_2/input")
    np.testing.assert_allclose(fig1.ranges(curves), [[0, 2]] * 3)
    np.testing.assert_allclose(fig1.drift(curves), [[0, 0.5]] * 3)


def test_the_typical_unit_is_the_median_one():
    values = np.zeros((2, 3, 5))
    values[:, 0], values[:, 2] = -1, 1
    values[1, 1] = [4, 0, 2, 1, 3]  # drift of the medians
    assert fig1.typical_unit(fig1.Percentiles("x", np.arange(2), values)) == 2
    four = fig1.Percentiles("x", np.arange(2), values[:, :, :4])  # drifts of 4, 0, 2 and 1
    assert fig1.typical_unit(four) == 3  # the lower of the two in the middle


def test_fig1_numbers_and_pictures(tmp_path, capsys):
    still = np.tile(np.array([[[-1.0] * 3, [0.0] * 3, [1.0] * 3]]), (4, 1, 1))
    moving = still + np.arange(4.0)[:, None, None]
    write_run(tmp_path / "mnist", moving, top1=(0.4, 0.8))
    write_run(tmp_path / "mnist_bn", still)
    paths = fig1.draw_fig1(tmp_path, tmp_path / "out")
    numbers = json.loads((tmp_path / "out" / "fig1.json").read_text())
    assert numbers["without BN"]["drift"] == {"15": 1.5, "50": 1.5, "85": 1.5}
    assert numbers["with BN"]["layer_drift"] == {"15": 0.0, "50": 0.0, "85": 0.0}
    assert numbers["with BN"]["accuracy"] == 0.9 and numbers["without BN"]["steps"] == 20
    assert numbers["without BN"]["layer_range"] == {"15": 3.0, "50": 3.0, "85": 3.0}
    assert {p.name for p in paths} == {"fig1.png", "fig1.svg", "fig1.json", "fig1.md"}
    assert (tmp_path / "out" / "fig1.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "| with BN | 20 | 90.00% (87.98 to 91.71) of 1,000 |" in printed
    assert "Data: hand-made." in printed and "All 2 runs were made by" in printed
    file = tmp_path / "mnist" / "run.json"
    for key in ("hand-made", '"name": "mnist"'):  # other data, another seed
        other = {"hand-made": "MNIST", '"name": "mnist"': '"name": "mnist", "seed": 1'}[key]
        changed = file.read_text()
        file.write_text(changed.replace(key, other))
        with pytest.raises(ConfigError, match="cannot be compared as a pair: they differ in"):
            fig1.draw_fig1(tmp_path, tmp_path / "out")
        file.write_text(changed)


def test_both_curves_of_fig1_can_be_seen():
    assert fig1.lowest_shown([40.0, 96.0], [88.0, 97.0]) == 86.0
    assert fig1.lowest_shown([95.0, 96.0], [94.0, 97.0]) == 90.0
    assert fig1.lowest_shown([10.0, 70.0], [80.6, 89.8]) == 0.0


def test_fig1_of_several_seeds_has_intervals(tmp_path, capsys):
    """The network with BN wanders half as far in one seed and a quarter as far in the other."""
    still = np.tile(np.array([[[-1.0] * 3, [0.0] * 3, [1.0] * 3]]), (4, 1, 1))
    for seed in (0, 1):
        for name, far in (("mnist", 1.0), ("mnist_bn", 0.5 ** (seed + 1))):
            workdir = tmp_path / name / f"seed_{seed}"
            top1 = (0.5, 0.8 + 0.01 * (name == "mnist_bn") * (seed + 1))
            write_run(workdir, still + far * np.arange(4.0)[:, None, None], top1)
            root = {"mnist": mnist, "mnist_bn": mnist_bn}[name]
            run = json.loads((workdir / "run.json").read_text())
            run["config"] = root.get_config("digits").to_dict() | {"seed": seed}
            run["info"]["data"]["eval_examples"] = 1000
            (workdir / "run.json").write_text(json.dumps(run))
    paths = draw(tmp_path, tmp_path / "out")
    assert {"fig1.md", "fig1.png", "fig3.md", "ablations.md"} <= {path.name for path in paths}
    text = (tmp_path / "out" / "fig1.md").read_text()
    assert "minus that without is +1.50 points (-4.85 to 7.85)." in text
    geometric = np.sqrt(2 * 4)
    assert text.count(f"{geometric:.2f}x (") == 2 and text in capsys.readouterr().out


def test_a_folder_without_records_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="holds no recorded run"):
        reader.read_run(tmp_path)


def test_a_place_for_pictures_that_is_none_is_one_line(tmp_path, monkeypatch):
    write_curve(tmp_path, inception, [0.5, 0.6])
    (tmp_path / "file").touch()
    for out, error in ((tmp_path / "file" / "x", ConfigError), ("/proc/x", DiskError)):
        monkeypatch.setattr(sys, "argv", ["figures", f"--workdir={tmp_path}", f"--out={out}"])
        with pytest.raises(error, match=f"{out}.*(another folder|writable)"):
            command.main()


@pytest.mark.parametrize("seed", [0])
def test_the_claim_of_fig1_on_a_shortened_run(tmp_path, seed):
    """Section 4.1: with BN the network is more accurate and its distributions are more stable."""
    numbers = {
        "total_steps": 2000,
        "eval_every": 500,
        "checkpoint_every": 2000,
        "steps_per_dispatch": 250,
        "batch_size": 64,
        "record.activation_every": 250,
        "seed": seed,
    }
    for name, root in (("mnist", mnist), ("mnist_bn", mnist_bn)):
        train.run(small(root, **numbers), tmp_path / name)
    result = fig1.fig1_numbers(
        reader.read_run(tmp_path / "mnist"), reader.read_run(tmp_path / "mnist_bn")
    )
    without, with_bn = result["without BN"], result["with BN"]
    assert with_bn["examples"] == without["examples"] == 1000
    assert with_bn["accuracy"] > without["accuracy"]
    for percentile in ("15", "50", "85"):
        assert with_bn["layer_drift"][percentile] < without["layer_drift"][percentile]


def write_curve(folder, root, top1, *, seed=0, status="done", error="", **changes):
    """A member of a sweep, evaluated every 250 steps."""
    config = root.get_config("digits")
    config.update_from_flattened_dict({"seed": seed, **changes})
    workdir = folder / config.name / f"seed_{seed}"
    workdir.mkdir(parents=True)
    data = {"name": "digits", "split": "test", "description": "hand-made", "eval_examples": 1000}
    data["classes"] = 10
    run = {"config": config.to_dict(), "info": {"data": data}, "status": status}
    run |= {"results": {"error": error}, "source": {"commit": "0123456789abcdef"}}
    run["hardware"] = {"devices": 1, "device_kind": "cpu"}
    (workdir / "run.json").write_text(json.dumps(run))
    lines = [{"step": 250 * (k + 1), "kind": "eval", "top1": v} for k, v in enumerate(top1)]
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return workdir


def table(path) -> dict[str, dict[str, str]]:
    """The first Markdown table of a file: {name: {column: cell}}."""
    rows = [
        [cell.strip(" `") for cell in line.strip("|").split("|")]
        for line in path.read_text()
        .split("## Against the control")[0]
        .split("## Against plain")[-1]
        .splitlines()
        if line.startswith("| ")
    ]
    return {row[0]: dict(zip(rows[0], row, strict=True)) for row in rows[1:]}


def test_a_sweep_becomes_fig2_the_table_and_the_ablations(tmp_path, capsys):
    for seed in (0, 1):
        write_curve(tmp_path, inception, [0.1, 0.5, 0.7, 0.8], seed=seed)
        curve, free = [0.6, 0.8 + 0.02 * seed, 0.9, 0.9], {"checkpoint_wait": 0.1 * seed}
        write_curve(tmp_path, bn_baseline, curve, seed=seed, **free)
    write_curve(tmp_path, bn_x5, [0.7], status="preempted")
    diverged = "DivergedError: diverged at step 1,234: loss nan"
    write_curve(tmp_path, inception_x5, [0.2], status="diverged", error=diverged)
    paths = draw(tmp_path, tmp_path / "out")
    names = {"fig2.png", "fig2.svg", "fig2.csv", "fig3.md", "fig3.csv"}
    names |= {f"ablations.{kind}" for kind in ("png", "svg", "md", "csv")}
    assert {path.name for path in paths} == names and all(path.stat().st_size for path in paths)
    shown = table(tmp_path / "out" / "fig3.md")
    # Inception's 80% are reached at step 1,000; by BN-Baseline at 500, evaluated every 250.
    assert shown["bn_baseline"]["steps to 100%"] == "489 [477 to 500]"
    assert shown["bn_baseline"]["speed-up to 100%"] == "2.05x (1.50 to 4.00)"
    assert shown["bn_baseline"]["difference, points"] == "+10.00 (10.00 to 10.00)"
    assert shown["bn_baseline"]["paper: speed-up"] == "2.33"
    assert shown["bn_x5"]["steps to 95%"] == "not yet"
    assert shown["bn_x5"]["remarks"] == "seed 0 partial: step 250 of 5,000"
    assert shown["inception_x5"]["final accuracy"] == "diverged"
    assert shown["inception_x5"]["steps to 95%"] == "not reached"
    assert shown["inception_x5"]["remarks"] == "seed 0 diverged at step 1,234"
    text = (tmp_path / "out" / "fig3.md").read_text()
    unknown = "Steps and speed-ups cannot be given because `inception_best` has not been run."
    assert unknown in text and "commit 0123456789" in text
    assert "| `bn_x5` | `bn_x5_without_bn` | not run: `bn_x5_without_bn` |" in text
    assert "settings differ" in text and text in capsys.readouterr().out
    changed = table(tmp_path / "out" / "ablations.md")["bn_baseline"]
    assert changed["change"] == "norm none -> batch_norm" and changed["seeds"] == "2"
    assert changed["difference"] == "+10.00 (10.00 to 10.00)" and changed["says"] == "higher"
    points = list(csv.DictReader((tmp_path / "out" / "fig2.csv").open()))
    assert len(points) == 18 and points[0]["network"] == "inception"


def test_the_test_split_is_scored_once_and_sets_no_level(tmp_path):
    """Levels come from the curve, on held-out examples; final accuracy from the one test line."""
    for root, top1, test in ((inception, [0.5, 0.7, 0.8], 0.9), (bn_baseline, [0.8, 0.8], 0.95)):
        workdir = write_curve(tmp_path, root, top1)
        with (workdir / "metrics.jsonl").open("a") as file:
            line = {"step": 750, "kind": "test", "top1": test, "examples": 500}
            file.write(json.dumps(line) + "\n")
    draw(tmp_path, tmp_path / "out")
    shown = table(tmp_path / "out" / "fig3.md")
    assert shown["inception"]["steps to 100%"] == "750"  # of 80%, not of 90%
    assert shown["inception"]["final accuracy"] == "90.00% (87.06 to 92.33), counted"
    assert shown["bn_baseline"]["difference, points"] == "+5.00 (one seed)"
    text = (tmp_path / "out" / "fig3.md").read_text()
    assert "final accuracy is one score on the 500 test examples, at the end" in text
    (row,) = ablations.ablations(reader.read_groups(tmp_path))
    assert row.counting == pytest.approx(uncertainty.counted_difference(0.95, 0.9, 500))


def test_each_level_has_its_own_speed_up(tmp_path):
    """Three levels that are reached at three different ratios, in the table and in fig3.csv."""
    # Levels 72%, 76% and 80%: the baseline reaches them at steps 750, 1,000 and 1,250.
    write_curve(tmp_path, inception, [0.1, 0.5, 0.72, 0.76, 0.8, 0.8])
    write_curve(tmp_path, bn_baseline, [0.5, 0.72, 0.76, 0.76, 0.8, 0.86])
    draw(tmp_path, tmp_path / "out")

    shown = table(tmp_path / "out" / "fig3.md")["bn_baseline"]
    assert [shown[f"steps to {level}"] for level in ("90%", "95%", "100%")] == [
        "500",
        "750",
        "1,250",
    ]
    assert shown["speed-up to 95%"] == "1.33x (one seed)"
    assert shown["speed-up to 100%"] == "1.00x (one seed)"

    rows = csv.DictReader((tmp_path / "out" / "fig3.csv").open())
    (row,) = (r for r in rows if (r["network"], r["reference"]) == ("bn_baseline", "inception"))
    speed_ups = [float(row[f"speed_up_{level}"]) for level in ("90", "95", "100")]
    assert speed_ups == pytest.approx([750 / 500, 1000 / 750, 1.0])
    assert (row["steps_to_95_low"], row["steps_to_95_high"]) == ("500.0", "750.0")
    # Of 750 to 1,000 steps against 500 to 750.
    assert float(row["speed_up_95_low"]) == 1.0 and float(row["speed_up_95_high"]) == 2.0


def test_runs_that_counted_different_numbers_of_examples_are_refused(tmp_path):
    write_curve(tmp_path, inception, [0.5])
    workdir = write_curve(tmp_path, bn_x5, [0.5])
    run = json.loads((workdir / "run.json").read_text())
    run["info"]["data"]["eval_examples"] = 999
    (workdir / "run.json").write_text(json.dumps(run))
    with pytest.raises(ConfigError, match=r"number of evaluated examples \(999, 1000\)"):
        draw(tmp_path, tmp_path / "out")


def test_importing_the_figures_leaves_the_hosts_backend_alone():
    """As in a notebook, whose inline backend shows its own plots."""
    code = (
        "import matplotlib; matplotlib.use('svg')\n"
        "from bn_jax.figures import draw, plotting\n"
        "import sys; assert 'matplotlib.pyplot' not in sys.modules\n"
        "print(matplotlib.get_backend())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().lower() == "svg"


def test_without_a_baseline_the_columns_say_so(tmp_path):
    write_curve(tmp_path, bn_x5, [0.7, 0.9])
    write_curve(tmp_path, inception, [0.5], status="running")
    draw(tmp_path, tmp_path / "out")
    shown = table(tmp_path / "out" / "fig3.md")
    assert shown["bn_x5"]["speed-up to 100%"] == "no reference"
    assert shown["bn_x5"]["final accuracy"] == "90.00% (87.98 to 91.71), counted"
    text = (tmp_path / "out" / "fig3.md").read_text()
    assert "seed 0: none, seed 0 partial: step 250 of 5,000" in text


def test_a_baseline_at_chance_is_said_and_sets_no_level(tmp_path):
    write_curve(tmp_path, bn_x5, [0.7, 0.9])
    write_curve(tmp_path, inception, [0.1, 0.11])
    draw(tmp_path, tmp_path / "out")
    shown = table(tmp_path / "out" / "fig3.md")
    assert shown["bn_x5"]["speed-up to 95%"] == "reference at chance"
    text = (tmp_path / "out" / "fig3.md").read_text()
    assert "seed 0: none, at chance (11.0% of 10 classes) after all its steps" in text


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"data.name": "folder"}, r"data.name \(folder, digits\)"),
        ({"image_size": 32}, "image_size"),
        ({"data.holdout": 0.2}, "data.holdout"),
    ],
)
def test_runs_of_different_settings_are_refused(tmp_path, changes, said):
    write_curve(tmp_path, inception, [0.5])
    write_curve(tmp_path, bn_x5, [0.5], **changes)
    with pytest.raises(ConfigError, match=f"differ in .*{said}"):
        draw(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_seeds_must_be_of_one_experiment(tmp_path):
    write_curve(tmp_path, inception, [0.5])
    write_curve(tmp_path, inception, [0.5], seed=1, learning_rate=0.1)
    with pytest.raises(ConfigError, match=r"learning_rate \(0.0015, 0.1\)"):
        reader.read_groups(tmp_path)
    with pytest.raises(ConfigError, match="holds no recorded run"):
        reader.read_groups(tmp_path / "nothing")


def test_half_a_line_at_the_end_is_no_damage(tmp_path):
    workdir = write_curve(tmp_path, inception, [0.5, 0.6])
    with (workdir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 750, "ki')
    assert len(reader.read_run(workdir).lines["eval"]) == 2
    (workdir / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(ConfigError, match="damaged"):
        reader.read_run(workdir)


def test_steps_are_of_32_examples(tmp_path):
    write_curve(tmp_path, inception, [0.5], batch_size=64)
    assert "inception,0,500.0,0.5" in fig2.curves_csv(reader.read_groups(tmp_path))


@pytest.fixture
def seeds(tmp_path):
    """Two seeds of a batch of 64, one of them partial or diverged in two networks, and a control:
    no two numbers are alike."""
    for seed, curve in ((0, [0.5, 0.9, 0.8]), (3, [0.4, 0.7, 0.6])):
        write_curve(tmp_path, inception, curve, seed=seed, batch_size=64)
    write_curve(tmp_path, bn_x5, [0.95, 0.85], seed=0, batch_size=64, status="preempted")
    write_curve(tmp_path, bn_x5, [0.3, 0.75, 0.65], seed=3, batch_size=64)
    control = {"name": "inception_best", "learning_rate": 0.003}
    write_curve(tmp_path, inception, [0.45, 0.62, 0.61], batch_size=64, **control)
    error = "DivergedError: diverged at step 250: loss nan"
    write_curve(tmp_path, inception_x5, [0.2], status="diverged", error=error, batch_size=64)
    return tmp_path


def test_every_number_of_the_table_is_in_its_place(seeds):
    draw(seeds, seeds / "out")
    text = (seeds / "out" / "fig3.md").read_text()
    plain = text.split("## Against plain Inception")[1].split("## Against the control")[0]
    rows = [
        [c.strip(" `") for c in r.strip("|").split("|")] for r in plain.splitlines() if "|" in r
    ]
    shown = {row[0]: dict(zip(rows[0], row, strict=True)) for row in rows[2:]}
    assert list(shown) == ["inception", "inception_best", "bn_x5", "inception_x5"]
    # 72% lies between steps 500 (50%) and 1,000 (90%), 54% between 40% and 70%.
    assert shown["inception"]["steps to 90%"] == "754 [733 to 775]"
    assert shown["inception"]["final accuracy"].startswith("70.00% (")
    # Seed 0 has it at its first evaluation: a bound, and so is the mean.
    assert shown["bn_x5"]["steps to 90%"] == "at most 619 [500 to 767]"
    assert shown["bn_x5"]["final accuracy"].startswith("65.00% (")
    assert shown["bn_x5"]["final accuracy"].endswith("not yet 1 of 2")
    assert shown["bn_x5"]["difference, points"] == "+5.00 (one seed)"  # seed 3: 65 against 60
    assert shown["bn_x5"]["remarks"] == "seed 0 partial: step 1,000 of 10,000"
    assert shown["inception_x5"]["remarks"] == "seed 0 diverged at step 500"
    assert "seed 0: 90% 72.0%, 95% 76.0%, 100% 80.0% (77.4 to 82.4)" in plain  # Wilson's
    assert "The levels are of the test split: held-out training data were not evaluated" in plain
    every = 2 * inception.get_config("digits").eval_every
    assert f"every {every:,} steps" in text

    lines = list(csv.DictReader((seeds / "out" / "fig3.csv").open()))
    place = ("bn_x5", "3", "inception")
    (line,) = (r for r in lines if (r["network"], r["seed"], r["reference"]) == place)
    assert (line["step"], line["total_steps"]) == ("1500.0", "10000.0")
    assert (line["final_top1"], line["max_top1"]) == ("0.65", "0.75")
    steps = 500 + 500 * 24 / 45  # 54% lies between 30% and 75%
    assert float(line["steps_to_90"]) == pytest.approx(steps)
    assert float(line["speed_up_90"]) == pytest.approx((500 + 500 * 14 / 30) / steps)
    assert {r["reference"] for r in lines} == {"inception", "inception_best"}

    points = (seeds / "out" / "fig2.csv").read_text().splitlines()
    assert points[1:7] == [
        "inception,0,500.0,0.5", "inception,0,1000.0,0.9", "inception,0,1500.0,0.8",
        "inception,3,500.0,0.4", "inception,3,1000.0,0.7", "inception,3,1500.0,0.6",
    ]  # fmt: skip


def test_what_the_picture_of_fig2_says(seeds, monkeypatch):
    drawn = []
    monkeypatch.setattr(fig2, "save", lambda figure, out, name: drawn.append(figure) or [])
    fig2.draw_fig2(reader.read_groups(seeds), seeds)
    (figure,) = drawn
    left, right = figure.axes
    for axes in (left, right):
        level = "inception's final accuracy, 70.0%"  # the mean of both seeds
        (line,) = (line for line in axes.lines if line.get_label() == level)
        assert list(line.get_ydata()) == [70, 70]
    assert right.get_ylim()[0] == 58
    labels = {line.get_label() for line in left.lines}
    assert {
        "inception (2 seeds)",
        "inception_best (1 seed)",
        "bn_x5 (2 seeds, 1 partial)",
        "inception_x5 (1 seed, 1 diverged)",
    } <= labels


def test_a_headline_counts_the_pairs_of_seeds(tmp_path):
    for seed in (0, 1, 2):
        write_curve(tmp_path, bn_x5, [0.4, 0.8], seed=seed)
    for seed in (1, 2, 5):
        write_curve(tmp_path, bn_x5, [0.3, 0.6], seed=seed, name="bn_x5_without_bn")
    text = fig3.fig3(reader.read_groups(tmp_path))
    (row,) = (line for line in text.splitlines() if line.startswith("| `bn_x5` | `bn_x5_without"))
    assert row.rstrip(" |").endswith("| 2")


def test_a_seed_is_the_number_of_its_folder(tmp_path):
    """Members of the ensemble have seeds of their own: runs are paired by their folders."""
    workdir = write_curve(tmp_path, bn_x5, [0.4], seed=100)
    assert curves.curve(reader.read_run(workdir)).seed == 100
    assert curves.curve(reader.read_run(workdir.rename(workdir.with_name("seed_1")))).seed == 1
    assert (
        curves.curve(reader.read_run(workdir.with_name("seed_1").rename(tmp_path / "x"))).seed
        == 100
    )


@pytest.mark.parametrize(("status", "score"), [("done", 0.7), ("running", None)])
def test_a_test_score_counts_at_the_end_of_a_run(tmp_path, status, score):
    workdir = write_curve(tmp_path, bn_x5, [0.4], status=status)
    with (workdir / "metrics.jsonl").open("a") as file:
        line = {"step": 250, "kind": "test", "top1": 0.7, "top5": 0.9, "examples": 5000}
        file.write(json.dumps(line) + "\n")
    assert curves.curve(reader.read_run(workdir)).test == score
