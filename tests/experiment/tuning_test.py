"""The best of a grid: ties, diverged points, several experiments, and the table of all points."""

from bn_jax.experiment import tuning
from bn_jax.experiment.tuning import Point


def point(experiment, rate, first, last=None, status="done"):
    return Point(experiment, {"learning_rate": rate}, first, last, status)


POINTS = {
    "a1": point("a", "0.1", 0.5, 0.7),
    "a2": point("a", "0.2", 0.5, 0.7),
    "a3": point("a", "0.3", 0.6, 0.65),
    "a4": point("a", "0.4", None, status="diverged"),
    "b1": point("b", "0.1", 0.1, 0.2),
    "b2": point("b", "0.2", 0.2),
}


def test_the_best_of_each_experiment_and_of_equals_the_earlier():
    assert tuning.best(POINTS, 2) == ["a3", "a1", "b2", "b1"]
    assert tuning.best(POINTS, 9) == ["a3", "a1", "a2", "b2", "b1"]  # none that diverged


def test_the_winner_is_the_best_at_the_end():
    chosen = tuning.winners([*POINTS.values()])
    assert chosen == {"a": POINTS["a1"], "b": POINTS["b1"]}
    assert tuning.winners([POINTS["a4"]]) == {}


def test_every_point_is_in_the_table(tmp_path):
    paths = tuning.write(tmp_path, [*POINTS.values()], (1000, 4000), "digits. Commit abc.")
    text, table = (path.read_text() for path in paths)
    assert "## `a`: 4 points" in text and "## `b`: 2 points" in text
    assert "| 0.1 | done | 50.00 | **70.00** |" in text
    assert "| 0.4 | diverged | - | - |" in text
    rows = table.splitlines()
    assert rows[0] == "experiment,values,status,top1_1000,top1_4000,chosen"
    assert len(rows) == 7 and sum(row.endswith(",1") for row in rows) == 2
    assert "a,learning_rate=0.4,diverged,,,0" in rows
    assert [row.split(",")[1] for row in rows[1:4]] == [  # by the end, not by the first round
        "learning_rate=0.1", "learning_rate=0.2", "learning_rate=0.3"
    ]  # fmt: skip
    assert "a,learning_rate=0.1,done,0.5,0.7,1" in rows
