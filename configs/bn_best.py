"""BN-Baseline at the best rate, L2 and dropout of a grid on held-out examples.

It is not in the paper. It differs from inception_best, which is tuned on the same grid with as many
runs (docs/results.md), in BN and in what is best with BN.

    python -m bn_jax.main --config=configs/bn_best.py:digits    # 2 CPU cores, minutes

Expected: no number in the paper.
Not tuned yet: the paper's values.
"""

from ml_collections import ConfigDict

from configs import bn_baseline

TUNED: dict[str, dict[str, float]] = {}  # {scale: fields}; not tuned yet: the paper's values


def get_config(scale: str = "imagenet") -> ConfigDict:
    config = bn_baseline.get_config(scale)
    config.name = "bn_best"
    config.update_from_flattened_dict(TUNED.get(scale, {}))
    return config
