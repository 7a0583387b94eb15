"""The control: plain Inception at the best rate, L2 and dropout of a grid on held-out examples.

It is not in the paper. Without it, BN could be credited with what better numbers do alone. bn_best
is the same network with BN, tuned on the same grid with as many runs (docs/results.md).

    python -m bn_jax.main --config=configs/inception_best.py:digits    # 2 CPU cores, minutes

Expected: no number in the paper.
Not tuned yet: the paper's values.
"""

from ml_collections import ConfigDict

from configs import inception

TUNED: dict[str, dict[str, float]] = {}  # {scale: fields}; not tuned yet: the paper's values


def get_config(scale: str = "imagenet") -> ConfigDict:
    config = inception.get_config(scale)
    config.name = "inception_best"
    config.update_from_flattened_dict(TUNED.get(scale, {}))
    return config
