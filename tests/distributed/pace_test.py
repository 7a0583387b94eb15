"""Who of several processes is to blame, from what they said and when: no sockets, no clock."""

import pytest

from bn_jax.distributed.watchdog import ASIDE, FACTOR, FIRST, SILENCE, STUCK, Dispatches, Pace, Peer


def pace_of(count: int, now: float = 0.0) -> Pace:
    pace = Pace(STUCK)
    pace.peers = {process: Peer(process, now) for process in range(count)}
    return pace


def seen(pace: Pace, process: int, step: int, part: str, now: float, *, ended: bool = False):
    about = {"host": "h", "pid": 10 + process, "step": step, "part": part, "ended": ended}
    pace.seen(process, about, now)


def test_a_process_that_is_silent_is_named():
    pace = pace_of(3)
    for process in range(3):
        seen(pace, process, 1, "step", 0.0)
    for process in (0, 2):
        seen(pace, process, 1, "step", SILENCE)
    assert pace.blame(SILENCE, stuck=False) == ""
    said = pace.blame(SILENCE + 0.1, stuck=False)
    assert said.startswith("process 1 (host h, pid 11) has given no sign of life for 15 s")
    seen(pace, 1, 1, "step", SILENCE + 0.2, ended=True)
    assert pace.blame(10 * SILENCE, stuck=False).startswith("process 0 ")  # who has ended may rest


@pytest.mark.parametrize("part", ["input", "other", "save", "evaluate"])
def test_the_last_one_is_to_blame_and_may_stay_as_long_as_its_work_takes(part):
    pace = pace_of(2)
    pace.slowest = 0.5
    seen(pace, 0, 7, "step", 100.0)  # waits for process 1
    seen(pace, 1, 6, part, 100.0)
    limit = pace.limit(part)
    assert limit == (STUCK if part == "input" else ASIDE)
    for now in (100.0 + limit, 100.1 + limit):
        for process, place in ((0, (7, "step")), (1, (6, part))):
            seen(pace, process, *place, now)
    assert pace.blame(100.0 + limit, stuck=True) == ""
    said = pace.blame(100.1 + limit, stuck=True)
    assert said.startswith(f"process 1 (host h, pid 11) has been in {part!r} of step 6 for")
    assert pace.blame(100.1 + limit, stuck=False) == ""  # process 0 decides


def test_all_waiting_for_each_other_is_nobodys_fault_in_particular():
    pace = pace_of(2)
    pace.slowest = 0.5
    for process, since in ((0, 100.0), (1, 110.0)):
        seen(pace, process, 7, "step", since)
    for now in (110.0 + STUCK, 110.1 + STUCK):
        for process in range(2):
            seen(pace, process, 7, "step", now)
    assert pace.blame(110.0 + STUCK, stuck=True) == ""
    assert pace.blame(110.1 + STUCK, stuck=True).startswith("all processes have waited for each")


def test_slow_dispatches_are_given_time_and_the_first_one_more():
    pace = pace_of(2)
    assert pace.limit("step") == FIRST
    pace.slowest = 4.0
    assert pace.limit("step") == pace.limit("input") == FACTOR * 4.0
    assert pace.limit("compile") == ASIDE


def test_the_first_dispatch_counts_until_there_is_another():
    dispatches = Dispatches()
    assert dispatches.slowest() is None
    for total, slowest in ((30.0, 30.0), (31.0, 1.0), (33.0, 2.0), (33.5, 2.0)):
        dispatches.through(total)
        assert dispatches.slowest() == slowest
    for total in range(40, 60):
        dispatches.through(total)
    assert dispatches.slowest() == 6.5
    dispatches.through(60)
    assert dispatches.slowest() == 1.0  # the last 20


def test_a_process_that_was_frozen_itself_blames_nobody():
    pace = pace_of(2)
    for process in range(2):
        seen(pace, process, 1, "step", 0.0)
    pace.forgive(1000.0)
    assert pace.blame(1000.0 + SILENCE, stuck=True) == ""
    assert pace.blame(1000.1 + SILENCE, stuck=True) != ""
