"""The Batch Normalization paper's experiments in JAX and Flax, and its batch norm as a library.

    from bn_jax import BatchNorm          # a drop-in for flax.linen.BatchNorm
    from bn_jax import batch_norm         # the pure functions: Algorithms 1 and 2

Public names are imported when they are first used, so that a command starts at once.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bn_jax.batch_norm import Stats, fold, init_stats, merge, normalize
    from bn_jax.errors import UserError
    from bn_jax.layers import (
        BatchNorm,
        ConvBN,
        LocalResponseNorm,
        adopt_stats,
        flax_stats,
        fold_variables,
        population_stats,
    )
    from bn_jax.models.inception import Inception
    from bn_jax.models.mlp import Mlp

__version__ = "0.1.0"

__all__ = [
    "BatchNorm",
    "ConvBN",
    "Inception",
    "LocalResponseNorm",
    "Mlp",
    "Stats",
    "UserError",
    "adopt_stats",
    "flax_stats",
    "fold",
    "fold_variables",
    "init_stats",
    "merge",
    "normalize",
    "population_stats",
]

_HOMES = {
    "bn_jax.batch_norm": ("Stats", "fold", "init_stats", "merge", "normalize"),
    "bn_jax.errors": ("UserError",),
    "bn_jax.layers": (
        "BatchNorm",
        "ConvBN",
        "LocalResponseNorm",
        "adopt_stats",
        "flax_stats",
        "fold_variables",
        "population_stats",
    ),
    "bn_jax.models.inception": ("Inception",),
    "bn_jax.models.mlp": ("Mlp",),
}


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(home), name)
    raise AttributeError(f"module 'bn_jax' has no attribute {name!r}")
