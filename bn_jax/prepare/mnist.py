"""Finds MNIST's four files on this machine, or downloads them from public mirrors.

Every file is compared with the SHA-256 of the original before it gets its name. A download that
was cut off is resumed, from the next mirror that answers.
"""

import hashlib
import http.client
import os
import pathlib
import ssl
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from typing import NamedTuple

from bn_jax.data import memory, tfds
from bn_jax.errors import ConfigError
from bn_jax.workdir.files import reported

OFFLINE = "BN_JAX_OFFLINE"  # 1: nothing is downloaded
PATIENCE = 10.0  # seconds in which at least one block must arrive, over all mirrors together
BLOCK = 2**16  # bytes

MIRRORS = (
    "https://ossci-datasets.s3.amazonaws.com/mnist/",  # torchvision's
    "https://storage.googleapis.com/cvdf-datasets/mnist/",  # TFDS'
    "https://raw.githubusercontent.com/fgnt/mnist/master/",
)

# The errors of a mirror, as opposed to those of the disk.
_NETWORK = (
    urllib.error.URLError,
    http.client.HTTPException,
    ssl.SSLError,
    TimeoutError,
    ConnectionError,
)


class Original(NamedTuple):
    """Size in bytes and SHA-256 of a file as Yann LeCun published it."""

    size: int
    sha256: str


ORIGINALS = {
    "train-images-idx3-ubyte.gz": Original(
        9_912_422, "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609"
    ),
    "train-labels-idx1-ubyte.gz": Original(
        28_881, "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c"
    ),
    "t10k-images-idx3-ubyte.gz": Original(
        1_648_877, "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6"
    ),
    "t10k-labels-idx1-ubyte.gz": Original(
        4_542, "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6"
    ),
}


def locate(
    data_dir: pathlib.Path | None = None,
    *,
    mirrors: Sequence[str] = MIRRORS,
    originals: dict[str, Original] = ORIGINALS,
    patience: float = PATIENCE,
) -> pathlib.Path:
    """Returns the folder of MNIST: TFDS' own, or one with the four files, downloaded if need be.

    Args:
      data_dir: where the files are or go; by default `memory.mnist_cache`.
      mirrors: addresses of folders, each with all four files.
      originals: what the files must be.
      patience: seconds in which at least one block must arrive.

    Raises:
      ConfigError: no mirror has answered, or none had the original; or BN_JAX_OFFLINE=1.
      DiskError: the folder cannot be written.
    """
    if data_dir is None:
        found = tfds.find("mnist", "")
        if found is not None:
            return found
        data_dir = memory.mnist_cache()
    if data_dir is None:
        raise ConfigError("this user has no home directory: choose a folder with --data_dir=FOLDER")
    if all((data_dir / name).is_file() for name in originals):
        return data_dir
    if os.environ.get(OFFLINE, "0") not in ("", "0"):
        raise ConfigError(f"MNIST is not in {data_dir}, and {OFFLINE} forbids to download it")

    with reported(data_dir, "cannot write"):
        data_dir.mkdir(parents=True, exist_ok=True)
    total = sum(original.size for original in originals.values())
    print(f"bn_jax: downloading MNIST ({total / 1e6:.1f} MB) to {data_dir}", file=sys.stderr)
    _Download(data_dir, mirrors, originals, patience).wait()
    return data_dir


class _Download:
    """A download in a thread of its own, which is abandoned if it makes no progress.

    A thread is needed because looking up a host's name can take longer than a socket's timeout.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        mirrors: Sequence[str],
        originals: dict[str, Original],
        patience: float,
    ):
        self.folder = folder
        self.mirrors = mirrors
        self.originals = originals
        self.patience = patience
        self.deadline = time.monotonic() + patience
        self.given_up = False
        self.reason = "no answer"  # why the last attempt has failed
        self.error: BaseException | None = None
        self.complete = False
        self.thread = threading.Thread(target=self._run, daemon=True)

    def wait(self) -> None:
        """Waits until all files are there. Raises ConfigError or DiskError."""
        self.thread.start()
        while self.thread.is_alive() and time.monotonic() < self.deadline:
            self.thread.join(max(0.01, min(0.1, self.deadline - time.monotonic())))
        self.given_up = True
        if self.error is not None:
            raise self.error
        if self.complete:
            return

        reason = self.reason
        if self.thread.is_alive():
            reason = f"nothing came for {self.patience:g} s; {reason}"
        kept = ""
        if any(self.folder.glob("*.part")):
            kept = f", which resumes what has come to {self.folder}"
        raise ConfigError(
            f"MNIST was not downloaded ({reason}): give the folder of its four files, or try again "
            f"later{kept}"
        )

    def _run(self) -> None:
        try:
            with reported(self.folder, "cannot write"):
                self.complete = all(self._fetch(name) for name in self.originals)
        except BaseException as error:
            self.error = error  # raised again by `wait`

    def _fetch(self, name: str) -> bool:
        """Fetches a file from one of the mirrors; returns whether it is there in the end."""
        path = self.folder / name
        part = path.with_name(f"{name}.part")
        if path.is_file():
            return True
        for mirror in self.mirrors:
            # A damaged part, or one of a bad mirror, is removed before the second attempt.
            for _ in range(2):
                resumed = part.is_file()
                if self.given_up:
                    return False
                if not self._append(mirror + name, part, self.originals[name].size):
                    break
                if hashlib.sha256(part.read_bytes()).hexdigest() == self.originals[name].sha256:
                    part.replace(path)
                    return True
                self.reason = f"{_host(mirror)} has another {name}"
                part.unlink()
                if not resumed:
                    break
        return False

    def _append(self, url: str, part: pathlib.Path, size: int) -> bool:
        """Fetches missing bytes; returns whether the part has as many as the original, or more."""
        have = part.stat().st_size if part.is_file() else 0
        if have >= size:
            return True
        request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
        try:
            with urllib.request.urlopen(request, timeout=self.patience) as answer:
                # A server that ignores the range sends the whole file.
                partial = answer.status == http.HTTPStatus.PARTIAL_CONTENT
                with part.open("ab" if partial else "wb") as file:
                    self._copy(answer, file, size)
        except _NETWORK as e:
            self.reason = f"{_host(url)}: {getattr(e, 'reason', '') or e}"
            return False

        if part.stat().st_size < size:
            self.reason = f"{_host(url)} ended {part.name.removesuffix('.part')} too early"
            return False
        return True

    def _copy(self, answer, file, size: int) -> None:
        """Writes what arrives, at most a block more than the original has."""
        block = 0
        while not self.given_up and file.tell() <= size:
            data = answer.read1(BLOCK)
            if not data:
                return
            file.write(data)
            block += len(data)
            # Only whole blocks count as progress: a server may send a byte each second.
            if block >= BLOCK or file.tell() >= size:
                block = 0
                self.deadline = time.monotonic() + self.patience


def _host(url: str) -> str:
    return urllib.parse.urlsplit(url).netloc
