"""PyTorch's side of the comparison, in a process of its own that takes steps when it is told to.

In a process of its own torch.compile and XLA compile at the same time, and what goes wrong on one
side ends that side alone.
"""

import importlib.util
import multiprocessing
import pathlib
import time
import traceback
from typing import Any

import numpy as np

from benchmarks import step

MODES = {
    "torch channels_last AMP": None,
    "torch.compile": "default",
    "torch.compile max-autotune": "max-autotune",
}


def missing() -> str:
    """Which package is missing for these rows, or ""."""
    packages = [
        name for name in ("torch", "pretrainedmodels") if not importlib.util.find_spec(name)
    ]
    return " and ".join(packages) + " not installed" if packages else ""


class Torch:
    """A handle on the process.

    Args:
      folder: where the process writes the weights that all sides start from, weights.npz.
      batch: images and labels, as numpy arrays.
    """

    def __init__(self, folder: pathlib.Path, batch: dict[str, np.ndarray]):
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        arguments = (other, folder, batch)
        self._process = context.Process(target=_serve, args=arguments)
        self._process.start()
        other.close()

    def ask(self, until: float, *request: Any) -> Any:
        """The answer to a request (see `_answer`).

        Args:
          until: time.monotonic() at which the process is killed if it has not answered.

        Raises:
          RuntimeError: what went wrong there, in a line.
          TimeoutError: it did not answer in time.
        """
        try:
            self._pipe.send(request)
            answered = self._pipe.poll(max(0.0, until - time.monotonic()))
            worked, answer = self._pipe.recv() if answered else (False, None)
        except (EOFError, OSError):
            raise RuntimeError("PyTorch's process has ended") from None
        if not answered:
            self.close()
            raise TimeoutError(f"PyTorch has not answered {request[0]!r} in time")
        if not worked:
            raise RuntimeError(answer)
        return answer

    def take(self, name: str, steps: int, until: float) -> None:
        """Takes so many steps of a side, and returns when the device has done them."""
        self.ask(until, "take", name, steps)

    def close(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.join()


def _serve(pipe: Any, folder: pathlib.Path, batch: dict[str, np.ndarray]) -> None:
    """The process: answers requests until the other end is closed."""
    sides: dict[str, Any] = {}
    while True:
        try:
            request = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((True, _answer(sides, folder, batch, *request)))
        except Exception as error:
            traceback.print_exc()
            pipe.send((False, f"{type(error).__name__}: {error}".splitlines()[0][:300]))


def _answer(
    sides: dict[str, Any], folder: pathlib.Path, batch: dict[str, np.ndarray], *request: Any
) -> Any:
    """("weights",) writes them; ("make", name) makes and compiles a side and returns the
    seconds; ("losses", name) takes two steps and returns their losses; ("take", name, steps)."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    verb, *rest = request
    if verb == "weights":
        if "tensors" in sides:
            return torch.__version__
        torch.manual_seed(0)
        tensors = step.bninception(1000).state_dict()
        sides["tensors"] = tensors
        arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
        np.savez(folder / "weights.npz", **arrays)
        return torch.__version__

    name = rest[0]
    if verb == "make":
        # While other programs are compiled, what cuDNN measured would not be worth keeping.
        torch.backends.cudnn.benchmark = False
        options = {"device": device, "amp": True, "mode": MODES[name]}
        start = time.perf_counter()
        side = step.Torch(torch, sides["tensors"], batch, True, **options)
        side.step()
        seconds = time.perf_counter() - start
        side.restart(sides["tensors"])
        sides[name] = side
        return seconds

    torch.backends.cudnn.benchmark = True
    if verb == "losses":
        return [sides[name].step(), sides[name].step()]
    for _ in range(rest[1]):
        sides[name].advance()
    if device == "cuda":
        torch.cuda.synchronize()
    return None
