"""Ablation (4.2.1, "Remove Dropout"): BN-x5 with Inception's 40% dropout put back.

    python -m bn_jax.main --config=configs/bn_x5_with_dropout.py:digits    # 2 CPU cores, minutes

Expected: no number in the paper; removing it speeds up training, without overfitting.
Digits: 98.3%, the mean of 3 seeds (results/digits, from Glorot weights).
"""

from ml_collections import ConfigDict

from configs import bn_x5


def get_config(scale: str = "imagenet") -> ConfigDict:
    config = bn_x5.get_config(scale)
    config.name = "bn_x5_with_dropout"
    config.dropout = 0.4
    return config
