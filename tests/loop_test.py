"""The training loop never waits for the device: what it fetches is a step old."""

import threading
import time

import jax
import pytest
from jax._src.array import ArrayImpl

from bn_jax import train
from bn_jax.experiment.evaluator import Evaluator
from configs import bn_baseline
from tests.train_test import small

TINY = {"model.width": 0.0625, "batch_size": 32, "bn.group_size": 4, "steps_per_dispatch": 1}
ONE = {"steps_per_dispatch": 1}
QUIET = {"total_steps": 12, "eval_every": 12, "checkpoint_every": 12, "log_every": 1}


@pytest.fixture
def watched(monkeypatch):
    """Events: ("step", k) at the k-th dispatch, ("fetch", k) for its metrics, else None."""
    events, made_by, keep = [], {}, []
    real, value = train.compile_step, ArrayImpl._value.fget

    def compile_step(*arguments):
        program = real(*arguments)

        def called(*fed):
            with jax.transfer_guard("disallow"):  # arguments that are not on the devices are errors
                state, metrics = program(*fed)
            events.append(("step", sum(e[0] == "step" for e in events) + 1))
            keep.append(metrics)  # lest an id be used again
            made_by.update({id(m): events[-1][1] for m in jax.tree.leaves(metrics)})
            return state, metrics

        return called

    def fetched(self):
        if threading.current_thread() is threading.main_thread():
            events.append(("fetch", made_by.get(id(self))))
        return value(self)

    monkeypatch.setattr(train, "compile_step", compile_step)
    monkeypatch.setattr(ArrayImpl, "_value", property(fetched))
    return events


def between_steps(events, last):
    """What is fetched between the first dispatch and the last, by the number of the dispatch."""
    found, now = {}, 0
    for kind, k in events:
        if kind == "step":
            now = k
        elif 0 < now < last:
            found.setdefault(now, set()).add(k)
    return found


@pytest.mark.parametrize(
    "root", ["mlp", pytest.param("inception", marks=pytest.mark.slow)], ids=["mlp", "inception"]
)
def test_metrics_are_fetched_a_step_late_and_nothing_else_is(tmp_path, watched, root):
    extra = ONE if root == "mlp" else TINY
    what = {} if root == "mlp" else {"root": bn_baseline}
    train.run(small(**what, **QUIET, **extra, **{"record.activation_every": 12}), tmp_path)
    assert between_steps(watched, 12) == {k: {k - 1} for k in range(2, 12)}


def test_the_watch_sees_a_fetch(tmp_path, watched, monkeypatch):
    real = train.Loop.due

    def hasty(self, *arguments):
        jax.device_get(watched_state[0])
        return real(self, *arguments)

    watched_state = [jax.numpy.ones(())]
    monkeypatch.setattr(train.Loop, "due", hasty)
    settings = {**QUIET, **ONE, "record.activation_every": 12}
    train.run(small(**settings), tmp_path)
    assert None in between_steps(watched, 12)[5]


def test_evaluation_is_compiled_beside_the_first_steps(tmp_path, watched, monkeypatch):
    real, seen = Evaluator.compile, []

    def compile_late(self):
        end = time.monotonic() + 30
        while ("step", 3) not in watched and time.monotonic() < end:
            time.sleep(0.01)  # the third step never comes if the loop waits for this
        seen.append(("step", 3) in watched)
        real(self)

    monkeypatch.setattr(Evaluator, "compile", compile_late)
    scores = train.run(small(**QUIET, **ONE, **{"record.activation_every": 12}), tmp_path)
    assert seen == [True] and scores["examples"] == 1000


def test_what_evaluation_cannot_compile_ends_the_run_before_the_evaluation(tmp_path, monkeypatch):
    def refuse(self):
        raise NotImplementedError("an operation this device has not")

    monkeypatch.setattr(Evaluator, "compile", refuse)
    monkeypatch.setattr(train.Loop, "evaluate", lambda *_: pytest.fail("evaluated"))
    with pytest.raises(NotImplementedError, match="this device has not"):
        train.run(small(**QUIET, **ONE, **{"record.activation_every": 12}), tmp_path)
