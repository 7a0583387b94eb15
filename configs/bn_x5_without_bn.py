"""The control: BN-x5 with all its modifications but BN itself, at the best rate of a grid.

It is not in the paper, which changes BN and seven other things at once (4.2.1). Its rate is chosen
on held-out examples among those that inception_best and bn_best try (docs/results.md).

    python -m bn_jax.main --config=configs/bn_x5_without_bn.py:digits    # 2 CPU cores, minutes

Expected: no number in the paper.
Tuned at scale tiny40 (results/tuning/tiny40_without_bn); not yet at the others, where it has
bn_x5's rate.
"""

from ml_collections import ConfigDict

from configs import bn_x5

TUNED: dict[str, dict[str, float]] = {"tiny40": {"learning_rate": 0.004}}  # {scale: fields}


def get_config(scale: str = "imagenet") -> ConfigDict:
    config = bn_x5.get_config(scale)
    config.name = "bn_x5_without_bn"
    config.norm = "none"
    config.update_from_flattened_dict(TUNED.get(scale, {}))
    return config
