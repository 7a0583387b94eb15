"""Ablation (4.2.1, "Remove Local Response Normalization"): BN-x5 with Inception's LRN put back.

    python -m bn_jax.main --config=configs/bn_x5_with_lrn.py:digits    # 2 CPU cores, minutes

Expected: no number in the paper, which finds LRN unnecessary with BN.
Digits: 97.9%, the mean of 3 seeds (results/digits, from Glorot weights).
"""

from ml_collections import ConfigDict

from configs import bn_x5


def get_config(scale: str = "imagenet") -> ConfigDict:
    config = bn_x5.get_config(scale)
    config.name = "bn_x5_with_lrn"
    config.lrn = True
    return config
