"""The sweep as a user types it, with the small networks: skips, resumes, stops, goes on."""

import json
import os
import pathlib
import shlex
import signal
import subprocess
import sys
import time

import pytest

from bn_jax import sweep
from bn_jax.data import pipeline
from bn_jax.errors import ConfigError
from bn_jax.experiment import members
from bn_jax.experiment.config import settled
from bn_jax.experiment.pool import Pool, last_line
from bn_jax.workdir import reader
from tests.support import processes

ROOT = pathlib.Path(__file__).resolve().parent.parent
INFO = {"data": {"train_examples": 3200}}
WORDS = ("--configs=mnist,mnist_bn", "--scale=digits")


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> str:
    return str(tmp_path_factory.mktemp("cache"))


def start(cache, folder, *words, **env) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": "", "BN_JAX_SMOKE": "1"}
    environment |= {"JAX_COMPILATION_CACHE_DIR": cache, **env}
    return processes.start(
        [sys.executable, "-m", "bn_jax.sweep", f"--workdir={folder}", *words],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=folder,
    )  # fmt: skip


def finish(process: subprocess.Popen) -> tuple[int, str]:
    text, _ = process.communicate(timeout=240)
    return process.returncode, text


def statuses(folder) -> dict[str, str]:
    files = sorted(folder.rglob("run.json"))
    return {str(f.parent.relative_to(folder)): json.loads(f.read_text())["status"] for f in files}


def test_members_are_recorded_a_diverged_one_too_and_skipped_the_second_time(tmp_path, cache):
    """At a rate of 3e38 the network without BN diverges: a result, and the sweep goes on."""
    words = ("--configs=mnist", "--scale=digits", "--grid=learning_rate=3e38,0.1")
    words += ("--set=steps_per_dispatch=10",)
    code, text = finish(start(cache, tmp_path, *words))
    assert code == 0, text
    names = {rate: f"mnist/learning_rate={rate}/seed_0" for rate in ("3e38", "0.1")}
    assert statuses(tmp_path) == {names["3e38"]: "diverged", names["0.1"]: "done"}
    assert f"[1/2] {names['3e38']}: diverged (a result)" in text
    assert "diverged at step" in text and "% of 1,000" in text and "data: digits: 5,000" in text
    assert "BN_JAX_SMOKE" in (tmp_path / names["0.1"] / "member.log").read_text()
    code, text = finish(start(cache, tmp_path, *words))
    assert code == 0 and "2 finished before, 0 to run" in text and "started" not in text


def test_ctrl_c_stops_and_the_same_command_goes_on(tmp_path, cache):
    """The terminal's Ctrl-C reaches the sweep; members save and the sweep exits with 75."""
    words = ("--configs=mnist_bn", "--scale=digits", "--seeds=2", "--jobs=1")
    words += ("--set=total_steps=20000", "--set=eval_every=20000", "--set=steps_per_dispatch=10")
    words += ("--set=record.tensorboard=False",)
    running = start(cache, tmp_path, *words, BN_JAX_SMOKE="")
    log = tmp_path / "mnist_bn" / "seed_0" / "member.log"
    deadline = time.monotonic() + 120  # a loaded machine
    while not (log.exists() and "step 1" in log.read_text()) and time.monotonic() < deadline:
        time.sleep(0.1)
    running.send_signal(signal.SIGINT)
    code, text = finish(running)
    assert code == 75, text
    assert statuses(tmp_path) == {"mnist_bn/seed_0": "preempted"}, text  # the second never began
    assert "[1/2] mnist_bn/seed_0: stopped, saved" in text and "Traceback" not in text
    saved = json.loads((tmp_path / "mnist_bn/seed_0/checkpoints/index.json").read_text())
    assert saved
    # The next one resumes from what is saved, for a few steps more to keep the test short.
    done = int(max(p.name for p in log.parent.glob("checkpoints/[0-9]*")))
    shorter = [w.replace("20000", str(done + 10)) for w in words]
    code, text = finish(start(cache, tmp_path, *shorter, "--seeds=1", BN_JAX_SMOKE=""))
    assert code == 0, text
    assert statuses(tmp_path) == {"mnist_bn/seed_0": "done"}
    assert f"resumed from step {done:,}" in log.read_text()


def test_a_failed_member_is_named_with_its_log_and_the_others_run(tmp_path, cache):
    broken = tmp_path / "mnist" / "seed_0"
    (broken / "checkpoints").mkdir(parents=True)
    (broken / "metrics.jsonl").mkdir()  # no file can be written there
    code, text = finish(start(cache, tmp_path, *WORDS))
    assert code == 1, text
    assert f"{broken}/member.log" in text and "failed with exit code" in text
    assert "1 of 2 members failed" in text
    assert statuses(tmp_path)["mnist_bn/seed_0"] == "done"


def test_dry_run_prints_the_commands_of_the_unfinished(tmp_path, cache):
    record = {"config": {}, "info": INFO, "attempts": [], "status": "done", "results": {}}
    found = members.members(["mnist"], "digits", 2, tmp_path, ["data.holdout=0.2"])
    found[0].workdir.mkdir(parents=True)
    record["config"] = settled(found[0].config, 3200).to_dict()
    (found[0].workdir / "run.json").write_text(json.dumps(record))
    words = ("--configs=mnist", "--scale=digits", "--seeds=2", "--set=data.holdout=0.2")
    code, text = finish(start(cache, tmp_path, *words, "--dry_run", BN_JAX_SMOKE=""))
    assert code == 0, text
    (line,) = text.splitlines()
    assert shlex.split(line) == [
        "python", "-m", "bn_jax.main", "--config=configs/mnist.py:digits",
        "--config.data.holdout=0.2", "--config.seed=1", f"--workdir={tmp_path}/mnist/seed_1",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("status", "listed"),
    [
        ("done", False),
        ("diverged", False),  # a result: it would diverge again
        ("failed", True),
        ("preempted", True),
        ("running", True),  # killed without a word
    ],
)
def test_dry_run_lists_what_a_sweep_would_run_again(tmp_path, monkeypatch, capsys, status, listed):
    (found,) = members.members(["mnist"], "digits", 1, tmp_path)
    found.workdir.mkdir(parents=True)
    config = settled(found.config, 3200).to_dict()
    record = {"config": config, "info": INFO, "attempts": [], "status": status}
    (found.workdir / "run.json").write_text(json.dumps(record | {"results": {}}))
    words = ["sweep", "--configs=mnist", "--scale=digits", f"--workdir={tmp_path}", "--dry_run"]
    monkeypatch.setattr("sys.argv", words)
    sweep.main()
    assert bool(capsys.readouterr().out) == listed


def test_members_of_a_grid_are_what_main_would_train(tmp_path):
    grid = {"learning_rate": ["0.1", "0.2"], "batch_size": ["60"]}
    found = members.members(["mnist", "mnist_bn"], "digits", 2, tmp_path, ["l2=0.5"], grid)
    assert len(found) == 8
    assert [m.config.seed for m in found] == [0] * 4 + [1] * 4  # every curve, then more seeds
    assert found[1].name == "mnist/learning_rate=0.2/batch_size=60/seed_0"
    assert (found[1].config.learning_rate, found[1].config.l2) == (0.2, 0.5)
    assert {m.workdir for m in found} == {tmp_path / m.name for m in found}


def test_six_members_of_an_ensemble_see_six_data_orders(tmp_path):
    """A member's seed is its config's plus the sweep's number."""
    names = [f"ensemble_{k}" for k in range(1, 7)]
    found = members.members(names, "digits", 2, tmp_path)
    seeds = [member.config.seed for member in found]
    assert len(set(seeds)) == 12
    assert seeds[6:] == [seed + 1 for seed in seeds[:6]]
    assert (found[0].name, found[6].name) == ("ensemble_1/seed_0", "ensemble_1/seed_1")

    data = pipeline.open_data(found[0].config)
    orders = {tuple(data.train_indices(0, 32, seed=seed)) for seed in seeds[:6]}
    assert len(orders) == 6

    # The control: six seeds of BN-x30, with nothing else changed.
    control = members.members(["bn_x30"], "digits", 6, tmp_path)
    assert [member.config.seed for member in control] == [*range(6)]
    assert len({tuple(data.train_indices(0, 32, seed=m.config.seed)) for m in control}) == 6


def committed(folder, member, status="done", last=None) -> None:
    """The records of a finished member below `folder`, as they are committed: two files."""
    config = settled(member.config, 4000).to_dict()
    place = folder / member.name
    place.mkdir(parents=True)
    run = {"config": config, "info": INFO, "status": status, "attempts": [], "results": {}}
    run |= {"source": {}, "hardware": {"platform": "cpu", "cpu_threads": 2}}
    run["info"] = {"data": {"train_examples": 4000}}
    (place / "run.json").write_text(json.dumps(run))
    line = {"step": last or config["total_steps"], "kind": "eval", "top1": 0.5}
    (place / "metrics.jsonl").write_text(json.dumps(line) + "\n")


def test_committed_records_count_as_done(tmp_path, monkeypatch, capsys):
    found = members.members(["mnist"], "digits", 5, tmp_path / "runs")
    committed(tmp_path / "results", found[0])
    committed(tmp_path / "results", found[4], status="diverged", last=500)
    committed(tmp_path / "results", found[1], status="failed")
    committed(tmp_path / "results", found[2], last=500)  # metrics.jsonl was cut off
    placed = members.finished_in(tmp_path / "results", found)
    assert placed[0].workdir == tmp_path / "results/mnist/seed_0"
    assert [m.workdir for m in placed[1:4]] == [m.workdir for m in found[1:4]]
    assert [members.status(m) for m in placed] == ["done", "new", "new", "new", "diverged"]

    words = ["sweep", "--configs=mnist", "--scale=digits", f"--workdir={tmp_path / 'runs'}"]
    monkeypatch.setattr("sys.argv", [*words, f"--done={tmp_path / 'results'}", "--dry_run"])
    sweep.main()
    assert capsys.readouterr().out == ""

    other = members.members(["mnist"], "digits", 1, tmp_path / "runs", ["learning_rate=0.5"])
    with pytest.raises(ConfigError, match=r"learning_rate \(0.1 there, 0.5 here\)"):
        members.finished_in(tmp_path / "results", other)


def test_all_members_have_the_same_number_of_threads(tmp_path, monkeypatch):
    monkeypatch.delenv("NPROC", raising=False)
    found = members.members(["mnist"], "digits", 3, tmp_path)
    assert members.threads(found) is None
    committed(tmp_path, found[0])
    assert members.threads(found) == 2

    monkeypatch.setenv("NPROC", "1")
    with pytest.raises(ConfigError, match=r"2 in mnist/seed_0, 1 in this process \(NPROC\)"):
        members.threads(found)

    # XLA has at least a thread for each of a process's virtual devices, whatever NPROC is.
    path = found[0].workdir / "run.json"
    alone = path.read_text()
    path.write_text(alone.replace('"cpu_threads": 2', '"cpu_threads": 2, "devices": 2'))
    assert members.threads(found) == 2
    monkeypatch.setenv("NPROC", "3")
    with pytest.raises(ConfigError, match=r"2 in mnist/seed_0, 3 in this process \(NPROC\)"):
        members.threads(found)
    path.write_text(alone)
    monkeypatch.delenv("NPROC")

    committed(tmp_path, found[1])
    path = found[1].workdir / "run.json"
    path.write_text(path.read_text().replace('"cpu_threads": 2', '"cpu_threads": 1'))
    with pytest.raises(ConfigError, match=r"2 in mnist/seed_0, 1 in mnist/seed_1"):
        members.threads(found)
    monkeypatch.setenv("BN_JAX_ANY_THREADS", "1")
    assert members.threads(found) is None


def test_halving_trains_all_points_a_little_and_the_best_in_full(tmp_path, cache):
    words = ("--configs=mnist_bn", "--scale=digits", "--grid=learning_rate=0.0001,0.1,3e38")
    words += ("--set=data.holdout=0.2", "--set=total_steps=40", "--set=steps_per_dispatch=10")
    words += ("--set=eval_every=20", "--set=record.activations=()", "--halving=20,1")
    code, text = finish(start(cache, tmp_path, *words, BN_JAX_SMOKE=""))
    assert code == 0, text
    assert "best of mnist_bn: {'learning_rate': '0.1'}" in text

    steps, counts = {}, set()
    for rate in ("0.0001", "0.1", "3e38"):
        run = json.loads((tmp_path / f"mnist_bn/learning_rate={rate}/seed_0/run.json").read_text())
        steps[rate] = run["config"]["total_steps"]
        counts.add(run["hardware"]["cpu_threads"])
        assert "test" not in run["results"]  # it played no part
    assert steps == {"0.0001": 20, "0.1": 40, "3e38": 20} and len(counts) == 1
    rows = (tmp_path / "tuning.csv").read_text().splitlines()
    assert len(rows) == 4 and rows[1].startswith("mnist_bn,learning_rate=0.1,done,")
    assert rows[1].endswith(",1") and rows[3].startswith("mnist_bn,learning_rate=3e38,diverged,,,0")
    assert "| 0.1 | done | " in (tmp_path / "tuning.md").read_text()

    before = (tmp_path / "tuning.csv").read_bytes()
    code, text = finish(start(cache, tmp_path, *words, BN_JAX_SMOKE=""))
    assert code == 0 and "started" not in text
    assert (tmp_path / "tuning.csv").read_bytes() == before


def test_dry_run_of_halving_lists_the_first_round(tmp_path, monkeypatch, capsys):
    words = ["sweep", "--configs=inception_best,bn_best", "--scale=tiny40", "--halving=1000,3"]
    words += ["--grid=learning_rate=0.0015,0.0075", "--grid=dropout=0,0.4", "--dry_run"]
    monkeypatch.setattr("sys.argv", [*words, f"--workdir={tmp_path}"])
    sweep.main()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 8
    assert all("--config.eval_test=False --config.total_steps=1000" in line for line in lines)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--halving=20", "--grid=l2=0,1"], "--halving=20: write STEPS,N"),
        (["--halving=0,1", "--grid=l2=0,1"], "--halving=0,1: write STEPS,N"),
        (["--halving=20,1"], "--halving=20,1 needs --grid"),
        (["--halving=20,1", "--grid=l2=0,1", "--seeds=2"], "one seed"),
        (["--halving=20,1", "--grid=l2=0,1"], "add --set=data.holdout=0.1"),
        (["--halving=50000,1", "--grid=l2=0,1"], "a whole run has 50,000 steps; choose fewer"),
        (["--halving=20,1", "--grid=l2=0,1", "--done=there"], "leave out --done"),
    ],
)
def test_a_choice_on_the_test_split_and_other_mistakes_are_refused(
    tmp_path, monkeypatch, words, said
):
    start = ["sweep", "--configs=mnist", "--scale=digits", f"--workdir={tmp_path}"]
    monkeypatch.setattr("sys.argv", [*start, *words])
    with pytest.raises(ConfigError, match=said):
        sweep.main()
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("configs", "scale", "settings", "said"),
    [
        (["mnst"], "digits", [], "did you mean configs/mnist.py"),
        (["mnist"], "digit", [], "'digit' is none of"),
        (["mnist"], "digits", ["learning_rat=1"], "learning_rate"),
        (["mnist"], "digits", ["learning_rate=-1"], "learning_rate=-1"),
        (["mnist"], "digits", ["total_steps=many"], "total_steps=many"),
    ],
)
def test_mistakes_are_refused_before_anything_runs(tmp_path, configs, scale, settings, said):
    with pytest.raises(ConfigError, match=said):
        members.members(configs, scale, 1, tmp_path, settings)


def test_status_of_what_is_there(tmp_path):
    (member,) = members.members(["mnist"], "digits", 1, tmp_path)
    assert members.status(member) == "new"
    member.workdir.mkdir(parents=True)

    def record(status, **changes):
        config = settled(member.config, 3200).to_dict() | changes
        run = {"config": config, "info": INFO, "status": status}
        (member.workdir / "run.json").write_text(json.dumps(run))
        return members.status(member)

    assert record("done") == "done" and record("diverged") == "diverged"
    assert record("done", total_steps=10) == "preempted"  # more steps are wanted now
    with pytest.raises(ConfigError, match="learning_rate"):
        record("done", learning_rate=3.0)


def test_a_resumed_member_keeps_its_threads(tmp_path, monkeypatch):
    monkeypatch.delenv("NPROC", raising=False)
    (member,) = members.members(["mnist"], "digits", 1, tmp_path)
    run = {"config": {}, "attempts": [], "hardware": {"platform": "cpu", "cpu_threads": 7}}
    monkeypatch.setattr(reader, "read_record", lambda path: run)
    assert members.environment(member, {"NPROC": "1"})["NPROC"] == "7"


def test_slots_share_the_cores_and_the_gpus(monkeypatch):
    monkeypatch.delenv("NPROC", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert members.slots(4) == [{"NPROC": "2"}] * 4 and members.slots(1) == [{}]
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    assert members.slots(None) == [{}]
    monkeypatch.delenv("JAX_PLATFORMS")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    assert members.slots(None) == [{"CUDA_VISIBLE_DEVICES": "3"}, {"CUDA_VISIBLE_DEVICES": "5"}]
    memory = {slot["XLA_PYTHON_CLIENT_MEM_FRACTION"] for slot in members.slots(4)}
    assert memory == {"0.45"}


def test_the_pool_keeps_every_slot_busy_and_returns_codes(tmp_path, capsys):
    def task(name, code):
        script = f"import os, sys; print(os.environ['SLOT']); sys.exit({code})"
        return name, [sys.executable, "-S", "-c", script], tmp_path / name, lambda slot: dict(slot)

    pool = Pool([{"SLOT": "a"}, {"SLOT": "b"}], total=4)
    codes = pool.run([task("one", 0), task("two", 4), task("three", 3)])
    assert codes == {"one": 0, "two": 4, "three": 3} and not pool.stopped
    assert {last_line(tmp_path / name) for name in codes} <= {"a", "b"}
    said = capsys.readouterr().out
    assert "[4/4]" in said and "failed with exit code 3" in said


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("--set=name=mine", "--set=name=mine: the sweep sets it"),
        ("--set=seed=7", "--set=seed=7: the sweep sets it"),
        ("--grid=name=a,b", "--grid=name=a,b: the sweep sets it"),
        ("--set=l2", "--set=l2: write FIELD=VALUE"),
        ("--configs=mnist,mnist_bn,mnist", "must name experiments, each of them once"),
        ("--configs=,", "must name experiments"),
        ("--seeds=0", "--seeds=0 must be at least 1"),
        ("--jobs=0", "--jobs=0 must be at least 1"),
    ],
)
def test_a_command_line_that_contradicts_itself_is_refused(tmp_path, monkeypatch, word, said):
    start = ["sweep", "--configs=mnist", "--scale=digits", f"--workdir={tmp_path}", "--dry_run"]
    monkeypatch.setattr("sys.argv", [*start, word])
    with pytest.raises(ConfigError, match=said):
        sweep.main()
