"""Weights & Biases, by a stand-in for its package: what is sent, resumed and survived."""

import sys
from types import SimpleNamespace

import pytest

from bn_jax.errors import ConfigError
from bn_jax.workdir import guard, trackers
from tests.support.small_runs import CONFIG, open_run, train


class Wandb(SimpleNamespace):
    """The package: `init` starts a run, whose calls are noted; `fails` names one that raises."""

    def __init__(self, fails: str = ""):
        super().__init__(Settings=lambda **options: options, started=[], sent=[], ended=[])
        self.fails = fails

    def _call(self, name, notes, what):
        if name == self.fails:
            raise RuntimeError(f"no network\nin {name}")
        notes.append(what)

    def init(self, **options):
        self._call("init", self.started, options)
        return SimpleNamespace(
            log=lambda scalars, step: self._call("log", self.sent, (step, scalars)),
            finish=lambda exit_code: self._call("finish", self.ended, exit_code),
        )


@pytest.fixture
def wandb(monkeypatch):
    def install(fails=""):
        fake = Wandb(fails)
        fake.__spec__ = SimpleNamespace(name="wandb")
        monkeypatch.setitem(sys.modules, "wandb", fake)
        return fake

    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    return install


def test_scalars_are_sent_and_a_resume_continues_the_same_run(wandb, tmp_path):
    fake = wandb()
    for first, last in ((1, 10), (11, 20)):
        with open_run(tmp_path, wandb=True) as recorder:
            recorder.begin(first - 1)
            train(recorder, first, last)
    one, two = fake.started
    assert one == two and one["id"] == (tmp_path / trackers.ID).read_text().strip()
    assert (one["resume"], one["project"], one["config"]) == ("allow", "bn_jax", CONFIG)
    assert (2, {"train/loss": 0.5, "train/rate": 0.2}) in fake.sent
    assert (20, {"eval/top1": pytest.approx(20 / 7), "eval/top5": 0.5, "eval/examples": 1000}) in (
        fake.sent
    )
    assert fake.ended == [0, 0]


def test_other_workdirs_are_other_runs_and_a_failed_one_says_so(wandb, tmp_path, monkeypatch):
    fake = wandb()
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    with open_run(tmp_path / "a", wandb=True) as recorder:
        recorder.begin(0)
    with pytest.raises(ValueError), open_run(tmp_path / "b", wandb=True) as recorder:
        recorder.begin(0)
        raise ValueError
    assert fake.started[0]["id"] != fake.started[1]["id"] and fake.started[1]["project"] == "mine"
    assert fake.ended == [0, 1]


@pytest.mark.parametrize("call", ["init", "log", "finish"])
def test_no_failure_of_it_stops_a_run(wandb, tmp_path, capsys, call):
    wandb(call)
    with open_run(tmp_path / "with", wandb=True) as recorder:
        recorder.begin(0)
        train(recorder, 1, 20)
    with open_run(tmp_path / "without") as recorder:
        recorder.begin(0)
        train(recorder, 1, 20)
    with_it, without = ((tmp_path / n / "metrics.jsonl").read_bytes() for n in ("with", "without"))
    assert with_it == without
    lines = [line for line in capsys.readouterr().out.splitlines() if "Weights & Biases" in line]
    assert len(lines) == 1 and f"RuntimeError: no network in {call}" in lines[0]


def test_only_process_0_writes(wandb, tmp_path):
    fake = wandb()
    with open_run(tmp_path, wandb=True, is_main=False) as recorder:
        recorder.begin(0)
        train(recorder, 1, 20)
    assert not fake.started and not list(tmp_path.iterdir())


def test_without_the_package_it_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="record.wandb=True needs .* pip install wandb"):
        open_run(tmp_path / "new", wandb=True)
    assert not list(tmp_path.iterdir())
    open_run(tmp_path / "new").finish("done")


def test_a_run_may_begin_or_cease_to_log_there(tmp_path):
    with open_run(tmp_path) as recorder:
        recorder.begin(0)
    guard.check_workdir(tmp_path, CONFIG | {"record": {"tensorboard": False, "wandb": True}})


def test_events_after_the_resumed_step_are_replaced(tmp_path, monkeypatch):
    """TensorBoard is told from which step on an earlier attempt's events do not count."""
    told = []
    writer = SimpleNamespace(add_scalar=lambda *values: told.append(values), close=lambda: None)
    package = SimpleNamespace(SummaryWriter=lambda **options: told.append(options) or writer)
    monkeypatch.setitem(sys.modules, "tensorboardX", package)
    board = trackers.TensorBoard(tmp_path, 7)
    board.write(8, {"loss": 0.5})
    board.close("done")
    assert told == [
        {"logdir": str(tmp_path / "tensorboard"), "purge_step": 8},
        ("loss", 0.5, 8),
    ]
