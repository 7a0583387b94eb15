"""Ablation (4.2.1, "Increase learning rate"): BN-x5 and all its modifications at Inception's rate.

    python -m bn_jax.main --config=configs/bn_x1.py:digits    # 2 CPU cores, minutes

Expected: no number in the paper; slower than bn_x5.
Digits: 98.1%, the mean of 3 seeds (results/digits, from Glorot weights).
"""

from ml_collections import ConfigDict

from configs import bn_x5


def get_config(scale: str = "imagenet") -> ConfigDict:
    config = bn_x5.get_config(scale)
    config.name = "bn_x1"
    config.learning_rate = 0.0015
    return config
