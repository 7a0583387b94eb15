"""Says which form of an operation of `ops` runs on which backend; nothing else decides it.

The choice is made while tracing. The table in `bn_jax/ops/__init__.py` says what each form is.
"""

import contextlib
import contextvars
from collections.abc import Iterator

import jax

FORMS = {
    "max_pool": ("cpu", "gpu"),
    "stride_1_pool": ("tpu",),
    "max_places": ("cpu",),
    "conv_1x1": ("cpu",),
    "kernel_gradient": ("cpu",),
    "products": ("cpu", "gpu"),
    "filter_gradient": ("gpu",),
    "vectors": ("gpu",),
}

_plain: contextvars.ContextVar[bool] = contextvars.ContextVar("plain", default=False)
_backend: contextvars.ContextVar[str | None] = contextvars.ContextVar("backend", default=None)


@contextlib.contextmanager
def plain() -> Iterator[None]:
    """Makes what is traced inside use XLA's own operations and their derivatives."""
    token = _plain.set(True)
    try:
        yield
    finally:
        _plain.reset(token)


@contextlib.contextmanager
def tracing_for(backend: str) -> Iterator[None]:
    """Makes what is traced inside use the forms of this backend ("cpu", "gpu" or "tpu")."""
    token = _backend.set(backend)
    try:
        yield
    finally:
        _backend.reset(token)


def backend() -> str:
    """Returns the backend whose forms are used: that of `tracing_for`, else jax's default."""
    return _backend.get() or jax.default_backend()


def hand_tuned(form: str) -> bool:
    """Whether the hand-tuned form of one of FORMS is used: on its backends, unless `plain()`."""
    return backend() in FORMS[form] and not _plain.get()
