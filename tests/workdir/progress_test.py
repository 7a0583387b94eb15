"""The line one watches while a run goes on."""

import io

import numpy as np

from bn_jax.workdir.timing import Progress, duration


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_shows_step_loss_rate_and_time_left():
    out = io.StringIO()
    progress = Progress(100, out, every=0)
    progress.update(1, 2.5, 32, clock=0.0)
    progress.update(11, np.float32(0.25), 320, clock=5.0)
    first, second = out.getvalue().splitlines()
    assert first == "step 1/100  loss 2.5000"
    assert second == "step 11/100  loss 0.2500  64 images/s  ETA 0:44"  # 89 steps at 0.5 s


def test_a_terminal_gets_one_rewritten_line_and_kept_sentences():
    out = Terminal()
    progress = Progress(10, out, every=0)
    progress.update(1, 12345.0, 32, clock=0.0)
    progress.update(2, 1.0, 32, clock=1.0)
    assert out.getvalue().count("\n") == 0 and out.getvalue().count("\r") == 2
    progress.say("accuracy 0.9")
    assert out.getvalue().endswith("\raccuracy 0.9\n")
    progress.end()
    assert out.getvalue().endswith("\raccuracy 0.9\n")


def test_between_two_lines_the_loss_is_not_fetched():
    class Loss:
        def __float__(self) -> float:
            raise AssertionError

    out = io.StringIO()
    progress = Progress(100, out, every=1000)
    progress.update(1, 1.0, 32)
    progress.update(2, Loss(), 32)
    progress.update(100, 0.5, 32)  # the last step is always shown
    assert len(out.getvalue().splitlines()) == 2


def test_durations():
    assert [duration(x) for x in (0.4, 75, 7500)] == ["0:00", "1:15", "2:05:00"]
