"""What runs were made with, and the warning where they differ."""

from bn_jax.figures.origins import differing, facts, made_by


def origin(commit="a" * 40, threads=2, **source) -> dict:
    return {
        "source": {"commit": commit, "dirty": False, **source},
        "versions": {"python": "3.12.1", "jax": "0.12.0", "numpy": "2.4.6"},
        "hardware": {
            "platform": "cpu",
            "devices": 1,
            "device_kind": "cpu",
            "cpu": "EPYC",
            "cpu_threads": threads,
        },
    }


def test_runs_of_one_kind_have_one_sentence():
    text = made_by([origin(), origin()])
    assert text.startswith("All 2 runs were made by: commit aaaaaaaaaa, python 3.12.1, jax 0.12.0,")
    assert "processor EPYC, CPU threads 2." in text and "differ" not in text
    assert made_by([origin()]).startswith("Made by: commit aaaaaaaaaa,")


def test_each_difference_is_named_with_its_number_of_runs():
    text = made_by([origin(), origin(threads=1), origin("b" * 40, dirty=True)], "members")
    same, warning = text.split("\n\n")
    assert "jax 0.12.0" in same and "commit" not in same and "threads" not in same
    assert warning.startswith("**The members differ**")
    assert "commit: aaaaaaaaaa (2), bbbbbbbbbb with uncommitted changes (1)" in warning
    assert "CPU threads: 1 (1), 2 (2)." in warning


def test_two_groups_are_alike_only_if_all_their_runs_are():
    assert differing([origin(), origin()]) == ""
    assert differing([origin(), origin(threads=1)]) == "CPU threads"
    assert differing([origin(), origin("b" * 40)]) == "commit"


def test_what_was_not_recorded_is_said():
    found = facts({"hardware": {"platform": "gpu", "devices": 8, "device_kind": "H100"}})
    assert found["commit"] == found["jax"] == "not recorded"
    assert found["devices"] == "8 H100" and "CPU threads" not in found
