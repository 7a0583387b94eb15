"""Ablation (4.2.1, "Shuffle training examples more thoroughly"): BN-x30, equal batches each epoch.

    python -m bn_jax.main --config=configs/bn_x30_unshuffled.py:digits    # 2 CPU cores, minutes

Expected: about 1% less validation accuracy than bn_x30 on ImageNet (not run here).
Digits: 96.9%, the mean of 3 seeds (results/digits, from Glorot weights).
"""

from ml_collections import ConfigDict

from configs import bn_x30


def get_config(scale: str = "imagenet") -> ConfigDict:
    config = bn_x30.get_config(scale)
    config.name = "bn_x30_unshuffled"
    config.data.shuffle = "none"
    return config
