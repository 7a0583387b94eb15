"""Ablation (of the project's brief, not in arXiv v3): BN-x5 without L2, which does not help there.

    python -m bn_jax.main --config=configs/bn_x5_no_l2.py:digits    # 2 CPU cores, minutes

Expected: no better than bn_x5.
Digits: 98.1%, the mean of 3 seeds (results/digits, from Glorot weights).
"""

from ml_collections import ConfigDict

from configs import bn_x5


def get_config(scale: str = "imagenet") -> ConfigDict:
    config = bn_x5.get_config(scale)
    config.name = "bn_x5_no_l2"
    config.l2 = 0.0
    return config
