"""A workdir in a bucket mounted by gcsfuse: what the lock, the records and checkpoints do there."""

import json
import shutil
import socket
import threading

import pytest

from bn_jax.errors import LockedError
from bn_jax.workdir import guard
from tests.support.object_store import Killed, Store
from tests.support.small_runs import open_run, train
from tests.support.small_states import is_state_of, open_checkpoints, save_three, state_at


@pytest.fixture
def store(tmp_path, monkeypatch):
    return Store(tmp_path / "bucket", monkeypatch)


def test_the_store_is_one(store, tmp_path):
    """Of what is written, other hosts see what was synced or closed, and half of a rename."""
    (store.folder / "d").mkdir()
    for name in "ba":
        (store.folder / "d" / name).write_text(name)
    with (store.folder / "log").open("a") as log:
        log.write("1\n")
        log.flush()
        assert not (store.mount(tmp_path / "1") / "log").exists()
    assert (store.mount(tmp_path / "2") / "log").read_text() == "1\n"
    store.kill_after(2)
    with pytest.raises(Killed):
        (store.folder / "d").rename(store.folder / "e")
    seen = store.mount(tmp_path / "3")
    assert [sorted(p.name for p in (seen / d).iterdir()) for d in "de"] == [["a"], ["b"]]


def test_the_lock_is_seen_by_other_hosts_and_its_heartbeat_decides(store, tmp_path, monkeypatch):
    monkeypatch.setattr(guard, "BEAT", 0.05)
    monkeypatch.setattr(socket, "gethostname", lambda: "one")
    held = guard.WorkdirLock(store.folder)
    other, stop = store.mount(tmp_path / "other"), threading.Event()
    assert json.loads((other / "lock").read_text())["host"] == "one"

    def follow():  # the bucket, as the other host's mount shows it
        while not stop.wait(0.02):
            store.mount(other)

    follower = threading.Thread(target=follow)
    follower.start()
    monkeypatch.setattr(socket, "gethostname", lambda: "two")
    try:
        with pytest.raises(LockedError, match="host one"):
            guard.WorkdirLock(other, watch=10)
    finally:
        stop.set()
        follower.join()
    held._stop.set()  # killed: no more heartbeats, and nobody removes the file
    held._beat.join()
    dead = store.mount(tmp_path / "dead")
    taken = guard.WorkdirLock(dead, watch=0.4)
    assert "host one" in taken.taken_over
    taken.release()


def test_lines_after_the_last_checkpoint_are_lost_and_written_again(store, tmp_path):
    with open_run(tmp_path / "whole") as recorder:
        recorder.begin(0)
        train(recorder, 1, 20)
    recorder = open_run(store.folder / "run")
    recorder.begin(0)
    train(recorder, 1, 10)
    recorder.sync()  # as before a checkpoint
    train(recorder, 11, 14)
    after = store.mount(tmp_path / "after") / "run"  # killed here
    lines = [json.loads(line) for line in (after / "metrics.jsonl").read_text().splitlines()]
    assert max(line["step"] for line in lines) == 10
    (after / "lock").unlink()  # of this very process
    with open_run(after) as again:
        again.begin(10)
        train(again, 11, 20)
    whole = (tmp_path / "whole" / "metrics.jsonl").read_bytes()
    assert (after / "metrics.jsonl").read_bytes() == whole
    recorder.finish("failed")


def restored(folder):
    with open_checkpoints(folder) as checkpoints:
        step, state, meta = checkpoints.restore(state_at(0)) or pytest.fail()
    assert is_state_of(step, state) and meta == {"step": step}
    return step


def test_a_commit_that_is_cut_off_anywhere_falls_back_to_the_step_before(store, tmp_path, measured):
    saved = save_three(store.folder / "checkpoints")
    good = store.mount(tmp_path / "good") / "checkpoints"
    found, cut = [], 0
    while True:
        shutil.rmtree(saved)
        shutil.copytree(good, saved)
        checkpoints = open_checkpoints(saved)
        store.kill_after(cut)  # of what is written in another thread, from the first of it on
        checkpoints.save(40, state_at(40), meta={"step": 40})
        try:
            checkpoints.wait()
        except Killed:
            pass
        else:
            break
        finally:
            store.kill_after(-1)
            checkpoints.close()
        after = store.mount(tmp_path / f"cut{cut}") / "checkpoints"
        found.append(restored(after))
        names = {path.name for path in after.iterdir()}
        assert not any(name.startswith("tmp.") for name in names)
        assert ("40" in names) is (found[-1] == 40)
        cut += 1
    # 40 is there once its last file is; before that, 30 is, and nothing else at any time. (Not
    # always after as many operations: orbax writes from several threads.)
    assert set(found) == {30, 40} and (found[0], found[-1]) == (30, 40)
    assert len(found) > 10
    measured("commits cut off in an object store", injected=cut, detected=cut, lost=0)


@pytest.mark.parametrize("cut", [0, 1, 5])
def test_a_quarantine_that_is_cut_off_is_done_again(store, cut):
    saved = save_three(store.folder / "checkpoints")
    (saved / "30" / "manifest.json").write_text("{}")
    store.kill_after(cut)
    with pytest.raises(Killed), open_checkpoints(saved) as checkpoints:
        checkpoints.restore(state_at(0))
    store.kill_after(-1)
    assert restored(saved) == 20
    assert not (saved / "30").exists() and (saved / "quarantine").is_dir()


def test_a_removal_that_is_cut_off_hides_no_good_step(store, tmp_path):
    saved = save_three(store.folder / "checkpoints")
    good = store.mount(tmp_path / "good") / "checkpoints"
    files = sum(p.is_file() for p in (saved / "30").rglob("*"))
    # orbax writes from several threads, and not always in as many operations: after how many a part
    # of step 10 is gone, which goes when 40 comes, is found by trying.
    for cut in range(2 * files, 5 * files):
        shutil.rmtree(saved)
        shutil.copytree(good, saved)
        checkpoints = open_checkpoints(saved)  # keeps three
        store.kill_after(cut)
        checkpoints.save(40, state_at(40), meta={"step": 40})
        with pytest.raises(Killed):
            checkpoints.wait()
        store.kill_after(-1)
        checkpoints.close()
        if (saved / "10").exists() and (saved / "tmp.delete.10").exists():
            break
    else:
        pytest.fail("no removal was cut off")
    assert restored(saved) == 40
    assert restored(saved) == 40
