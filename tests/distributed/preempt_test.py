"""SIGTERM and Ctrl-C: every process stops after the same step."""

import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import pytest

from bn_jax.distributed import preempt
from tests.support.processes import spawn, start

ROOT = pathlib.Path(__file__).resolve().parents[2]


PAIR = """
import os, pathlib, signal, sys, threading
import jax, numpy as np
sys.path.insert(0, sys.argv[1])
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from bn_jax.distributed import mesh, preempt, startup
from bn_jax.workdir.checkpoint import Checkpoints
startup.initialize()
me, number, moment = jax.process_index(), getattr(signal, sys.argv[3]), sys.argv[4]
if me == 1 and moment == "before":
    os.kill(os.getpid(), number)
devices = mesh.make()
put = lambda x, s: jax.make_array_from_callback(x.shape, NamedSharding(devices, s), lambda i: x[i])
state = {
    "replicated": put(np.array([-0.0, np.float32(1e-45), 3.5], np.float32), P()),
    "sharded": put(np.arange(6, dtype=np.int32), P("data")),
}
# Process 1 has no disk in common with process 0.
directory = pathlib.Path(sys.argv[2]) if me == 0 else pathlib.Path("/nowhere")
with Checkpoints(directory, keep_last=2, keep_best=0) as checkpoints:
    assert checkpoints.restore(state) is None
    checkpoints.save(1, state, meta={"scores": 0.5})
    spec = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
    like = jax.tree.map(spec, state)
    step, found, meta = checkpoints.restore(like)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(state)):
        for x, y in zip(a.addressable_shards, b.addressable_shards):
            assert np.asarray(x.data).tobytes() == np.asarray(y.data).tobytes()
    print("restored", step, meta["scores"], flush=True)
    if me == 0:
        (directory / "1" / "manifest.json").write_bytes(b"")
    try:
        checkpoints.restore(like)
    except Exception as error:
        print("refused", type(error).__name__, flush=True)
add, x = jax.jit(lambda x: x + 1 + 0 * x.sum()), put(np.zeros(2, np.float32), P("data"))
with preempt.Signals(100, 2) as signals:
    if me == 1 and moment == "in":
        threading.Timer(0.5, os.kill, (os.getpid(), number)).start()
    for step in range(102, 10**6, 2):
        x = add(add(x))
        if me == 0:  # the other one runs ahead
            x.block_until_ready()
        if signals.stop_at(step):
            break
    assert float(x.addressable_shards[0].data[0]) == step - 100
print("stopped at", step, flush=True)
"""


@pytest.mark.parametrize(
    ("name", "moment"),
    [
        ("SIGTERM", "in"),
        pytest.param("SIGTERM", "before", marks=pytest.mark.faults),  # the loop
        pytest.param("SIGINT", "in", marks=pytest.mark.faults),
    ],
)
def test_two_processes_stop_at_the_same_step_and_share_one_disk(tmp_path, name, moment):
    log = tmp_path / "log"
    arguments = ["-c", PAIR, str(ROOT), str(tmp_path / "checkpoints"), name, moment]
    children = spawn(arguments, log, processes=2)
    codes = [child.wait(120) for child in children]
    texts = [log.with_suffix(f".{index}").read_text() for index in range(2)]
    assert codes == [0, 0], texts
    said = [[x for x in t.splitlines() if x.split()[0] in ("restored", "refused", "stopped")]
            for t in texts]  # fmt: skip
    assert said[0] == said[1]
    assert said[0][:2] == ["restored 1 0.5", "refused CheckpointError"]
    assert said[0][2].startswith("stopped at ")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_after_the_step(number: signal.Signals, capfd):
    before = signal.getsignal(number)
    with preempt.Signals(0, 1) as signals:
        assert not signals.stop_at(1)
        os.kill(os.getpid(), number)
        assert signals.stop_at(2) and signals.reason == number.name
    assert signal.getsignal(number) == before
    assert f"bn_jax: {number.name}: stopping after this step" in capfd.readouterr().err


def test_outside_the_main_thread_there_are_no_handlers():
    found = []

    def run() -> None:
        with preempt.Signals(0, 1) as signals:
            found.append(signals.stop_at(1))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [False]


STUCK = """
import ctypes, sys, time
sys.path.insert(0, sys.argv[1])
from bn_jax.distributed import preempt
with preempt.Signals(0, 1) as signals:
    print("ready", flush=True)
    while not signals.requested.is_set():
        time.sleep(0.01)
    ctypes.PyDLL(None).sleep(60)  # holds the interpreter, as a program stuck in XLA may
"""


def test_a_second_ctrl_c_ends_at_once():
    command = [sys.executable, "-c", STUCK, str(ROOT)]
    child = start(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert child.stdout is not None and child.stdout.readline() == b"ready\n"
    child.send_signal(signal.SIGINT)
    assert child.stderr is not None and b"a second Ctrl-C ends at once" in child.stderr.readline()
    time.sleep(0.5)
    assert child.poll() is None
    child.send_signal(signal.SIGINT)
    assert child.wait(5) == -signal.SIGINT
