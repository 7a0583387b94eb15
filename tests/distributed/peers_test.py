"""Lines between processes: what arrives, what is refused, what a closed connection looks like."""

import json
import socket
import time

import pytest

from bn_jax.distributed.watchdog import Star


class Store(dict):
    """The key-value store of a coordination service."""

    key_value_set = dict.__setitem__

    def blocking_key_value_get(self, key: str, timeout_ms: int) -> str:
        return self[key]


def collect(star: Star, count: int) -> list:
    """At least so many events."""
    found, deadline = [], time.monotonic() + 20
    while len(found) < count:
        assert time.monotonic() < deadline, found
        found += star.poll(0.05)
    return found


@pytest.fixture
def trio():
    store = Store()
    return [Star(store, process, 3, "localhost:1", "key") for process in range(3)], store


def test_lines_go_both_ways_and_an_end_is_seen(trio):
    (zero, one, two), _ = trio
    one.send(step=1)
    two.send(step=2)
    found = collect(zero, 2)
    assert sorted(found, key=str) == [(1, {"step": 1}), (2, {"step": 2})]
    zero.send(fault="x")
    assert collect(one, 1) == collect(two, 1) == [(0, {"fault": "x"})]
    two.send(step=3)
    two.wires[0].close()  # as the kernel does for a process that is killed
    assert collect(zero, 2) == [(2, {"step": 3}), (2, None)]
    assert set(zero.wires) == {1}


@pytest.mark.parametrize(
    "said",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        b'{"token": "guessed", "process": 2}\n{"fault": "x"}\n',
        b"[1]\n",
        b'{"process": 2}\n',
        b"x" * (1 << 17),
    ],
)
def test_a_stranger_is_not_listened_to(said):
    store = Store()
    zero = Star(store, 0, 3, "localhost:1", "key")
    port, token = store["key"].split()
    with socket.create_connection(("localhost", int(port))) as stranger:
        stranger.sendall(said)
        until = time.monotonic() + 0.5
        while time.monotonic() < until:
            assert zero.poll(0.05) == []
    assert zero.poll(0.05) == [] and not zero.wires and not zero._strangers
    with socket.create_connection(("localhost", int(port))) as friend:
        line = {"token": token, "process": 2}
        friend.sendall(json.dumps(line).encode() + b'\n{"step": 5}\n')
        assert collect(zero, 1) == [(2, {"step": 5})]


def test_without_process_0_there_is_an_error(trio):
    _, store = trio
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    store["key"] = f"{port} token"
    with pytest.raises(OSError):
        Star(store, 1, 3, "localhost:1", "key")
