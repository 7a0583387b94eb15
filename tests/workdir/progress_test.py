"""The line that shows how far a loop is: on a terminal one that is rewritten, in a file many."""

import io
import sys

import pytest

from bn_jax.workdir import timing
from bn_jax.workdir.timing import ImageProgress, Progress, duration


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    """Seconds, for tqdm's clock and for ours."""
    seconds = [1000.0]
    monkeypatch.setattr("tqdm.std.time", lambda: seconds[0])
    monkeypatch.setattr(timing.time, "monotonic", lambda: seconds[0])
    return seconds


def test_progress_shows_step_loss_rate_and_time_left(clock):
    out = io.StringIO()
    progress = Progress(100, out, every=0)
    progress.update(1, "step 1/100  loss 2.5000", 32, clock=0.0)
    clock[0] += 20  # of which 5 s of training
    progress.update(11, "step 11/100  loss 0.2500", 320, clock=5.0)
    progress.end()
    first, second = out.getvalue().splitlines()
    assert first == "step 1/100  loss 2.5000"
    assert second == "step 11/100  loss 0.2500  64 images/s  02:58 left"  # 89 steps at 2 s


def test_the_rate_is_that_of_the_last_half_minute(clock):
    out = io.StringIO()
    progress = Progress(10_000, out, every=0)
    for second in range(100):
        clock[0] += 1
        progress.update(second + 1, "", 10 if second < 50 else 100)
    assert out.getvalue().splitlines()[-1].startswith("  100 images/s")


def test_a_terminal_gets_one_rewritten_line_and_sentences_that_stay(clock):
    out = Terminal()
    progress = Progress(10, out, every=0)
    progress.update(1, "step 1/10  loss 12345.0", 32, clock=0.0)
    clock[0] += 1
    progress.update(2, "step 2/10  loss 1.0", 32, clock=1.0)
    assert "\n" not in out.getvalue() and out.getvalue().count("\r") == 2
    progress.say("accuracy 0.9")
    said, after = out.getvalue().split("\n")
    assert said.endswith("\raccuracy 0.9") and after.startswith("\rstep 2/10  loss 1.0")
    progress.end()
    assert out.getvalue().endswith("\n")
    progress.end()  # does nothing
    progress.say("done")
    assert out.getvalue().endswith("\ndone\n")


def test_in_a_file_lines_are_some_seconds_apart_and_the_last_one_is_always_there(clock):
    out = io.StringIO()
    progress = Progress(100, out)
    for step in range(1, 101):
        clock[0] += 0.1
        progress.update(step, f"step {step}/100", 32)
        if step == 50:
            progress.say("step 50: accuracy 0.9")
    progress.end()
    shown = [line.split("/")[0] for line in out.getvalue().splitlines()]
    assert shown == ["step 1", "step 50: accuracy 0.9", "step 51", "step 100"]


def test_images_are_counted_on_stderr(clock, monkeypatch):
    out = io.StringIO()
    monkeypatch.setattr(sys, "stderr", out)
    counted = ImageProgress(3000)
    for _ in range(3):
        counted.add(1000)
        clock[0] += 4
    lines = out.getvalue().splitlines()
    assert lines[0].startswith("1,000 of 3,000 images")
    assert lines[-1] == "3,000 of 3,000 images  250 images/s  00:00 left"


def test_durations():
    assert [duration(x) for x in (0.4, 75, 7500)] == ["0:00", "1:15", "2:05:00"]
