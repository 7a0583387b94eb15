"""MNIST's download, from a server on this machine: whole, cut, wrong, absent, slow."""

import hashlib
import http.server
import threading
import time

import numpy as np
import pytest

from bn_jax.data import memory, pipeline
from bn_jax.errors import ConfigError, DiskError
from bn_jax.prepare import __main__ as prepare
from bn_jax.prepare import mnist

FILES = {f"{name}.gz": np.random.default_rng(k).bytes(200_000 + k) for k, name in enumerate("abcd")}
ORIGINALS = {
    name: mnist.Original(len(data), hashlib.sha256(data).hexdigest())
    for name, data in FILES.items()
}


class Mirror(http.server.ThreadingHTTPServer):
    """A mirror that behaves as `mode` says; `asked`: (file, range) of every request."""

    daemon_threads = True

    def __init__(self, mode: str):
        super().__init__(("127.0.0.1", 0), Answer)
        self.mode = mode
        self.asked: list[tuple[str, str | None]] = []
        self.ended = threading.Event()
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}).start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/"


class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        name, asked, mode = self.path.strip("/"), self.headers.get("Range"), self.server.mode
        self.server.asked.append((name, asked))
        if mode == "silent":
            self.server.ended.wait(20)
            return
        if mode == "absent":
            self.send_error(404)
            return
        data = FILES[name] if mode != "wrong" else bytes(len(FILES[name]))
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked and mode != "whole" else 0
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(data) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.end_headers()
        data = data[start:]
        if mode == "cut":
            data = data[: len(data) // 2]
        if mode == "drip":
            for k in range(200):
                self.wfile.write(data[k : k + 1])
                if self.server.ended.wait(0.05):
                    return
            return
        self.wfile.write(data)

    def log_message(self, *arguments):
        """Says nothing."""


@pytest.fixture
def mirror():
    started = []

    def start(mode: str) -> Mirror:
        started.append(Mirror(mode))
        return started[-1]

    yield start
    for server in started:
        server.ended.set()
        server.shutdown()
        server.server_close()


@pytest.fixture(autouse=True)
def online(monkeypatch):
    monkeypatch.delenv(mnist.OFFLINE, raising=False)


def locate(folder, *mirrors, patience=5.0):
    addresses = [m if isinstance(m, str) else m.address for m in mirrors]
    return mnist.locate(folder, mirrors=addresses, originals=ORIGINALS, patience=patience)


def contents(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_good_mirror_is_asked_once_for_each_file(tmp_path, mirror):
    good = mirror("good")
    other = mirror("good")
    assert locate(tmp_path / "new", good, other) == tmp_path / "new"
    assert contents(tmp_path / "new") == FILES
    assert good.asked == [(name, None) for name in FILES] and other.asked == []
    locate(tmp_path / "new", good)  # all there: nobody is asked
    assert len(good.asked) == len(FILES)


def test_what_was_cut_is_resumed_from_the_next_mirror(tmp_path, mirror):
    good = mirror("good")
    locate(tmp_path, mirror("cut"), good)
    assert contents(tmp_path) == FILES
    assert good.asked == [(n, f"bytes={len(data) // 2}-") for n, data in FILES.items()]


def test_a_later_call_resumes_what_an_earlier_one_left(tmp_path, mirror):
    with pytest.raises(ConfigError, match=r"ended a\.gz too early.*resumes what has come"):
        locate(tmp_path, mirror("cut"))
    assert contents(tmp_path) == {"a.gz.part": FILES["a.gz"][:100_000]}
    good = mirror("good")
    locate(tmp_path, good)
    assert good.asked[0] == ("a.gz", "bytes=100000-") and contents(tmp_path) == FILES


def test_a_mirror_that_sends_all_again_is_understood(tmp_path, mirror):
    (tmp_path / "a.gz.part").write_bytes(FILES["a.gz"][:1000])
    locate(tmp_path, mirror("whole"))
    assert contents(tmp_path) == FILES


def test_a_damaged_part_is_fetched_anew(tmp_path, mirror):
    (tmp_path / "a.gz.part").write_bytes(b"<html>log in first</html>")
    good = mirror("good")
    locate(tmp_path, good)
    assert contents(tmp_path) == FILES
    assert good.asked[:2] == [("a.gz", "bytes=25-"), ("a.gz", None)]


def test_wrong_bytes_are_never_kept(tmp_path, mirror):
    with pytest.raises(ConfigError, match=r"has another a\.gz") as caught:
        locate(tmp_path, mirror("wrong"))
    assert contents(tmp_path) == {} and "\n" not in str(caught.value)
    locate(tmp_path, mirror("wrong"), mirror("good"))
    assert contents(tmp_path) == FILES


def test_absent_mirrors_are_passed_over(tmp_path, mirror):
    closed = mirror("good")
    closed.shutdown()
    closed.server_close()
    locate(tmp_path / "a", closed.address, mirror("absent"), mirror("good"))
    assert contents(tmp_path / "a") == FILES
    with pytest.raises(ConfigError, match="Not Found"):
        locate(tmp_path / "b", closed.address, mirror("absent"))


@pytest.mark.parametrize("mode", ["silent", "drip"])
def test_it_gives_up_when_nothing_comes(tmp_path, mirror, mode):
    """Over all mirrors together, and a byte now and then is nothing."""
    began = time.monotonic()
    with pytest.raises(ConfigError, match=r"nothing came for 1 s.*folder of its four files"):
        locate(tmp_path, mirror(mode), mirror(mode), mirror(mode), patience=1.0)
    assert 0.9 < time.monotonic() - began < 3


def test_offline_is_not_tried(tmp_path, mirror, monkeypatch):
    monkeypatch.setenv(mnist.OFFLINE, "1")
    good = mirror("good")
    with pytest.raises(ConfigError, match="BN_JAX_OFFLINE forbids"):
        locate(tmp_path / "new", good)
    assert good.asked == [] and not (tmp_path / "new").exists()


def test_a_folder_that_cannot_be_written_is_one_line(mirror):
    with pytest.raises(DiskError, match="cannot write /proc"):
        locate(mnist.pathlib.Path("/proc/no"), mirror("good"))


def test_the_originals_are_mnists(test_data):
    assert set(mnist.ORIGINALS) == {f"{s}.gz" for pair in memory.IDX_FILES.values() for s in pair}
    for name, original in mnist.ORIGINALS.items():
        data = (test_data / "mnist" / name).read_bytes()
        assert original == (len(data), hashlib.sha256(data).hexdigest())


def test_the_command_prints_the_folder_where_training_finds_it(
    test_data, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("BN_JAX_CACHE", str(tmp_path))
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "none"))
    monkeypatch.setenv(mnist.OFFLINE, "1")
    monkeypatch.setattr("sys.argv", ["prepare", "mnist"])
    with pytest.raises(ConfigError, match=f"MNIST is not in {tmp_path / 'mnist'}"):
        prepare.main()
    (tmp_path / "mnist").mkdir()
    for name in mnist.ORIGINALS:
        (tmp_path / "mnist" / name).symlink_to(test_data / "mnist" / name)
    prepare.main()
    assert capsys.readouterr().out == f"{tmp_path / 'mnist'}\n"
    # An empty data.dir finds it, too.
    assert len(pipeline.open_source("mnist", "", 28).train) == 60_000


def test_tfds_own_set_is_found_first(tmp_path, monkeypatch):
    version = tmp_path / "mnist" / "3.0.1"
    version.mkdir(parents=True)
    (version / "dataset_info.json").write_text("{}")
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    assert mnist.locate() == version
