"""Ablation (4.2.1, "Shuffle training examples more thoroughly"): BN-x5, equal batches each epoch.

    python -m bn_jax.main --config=configs/bn_x5_unshuffled.py:digits    # 2 CPU cores, minutes

Expected: about 1% less validation accuracy than bn_x5 on ImageNet (not run here).
Digits: 97.8%, the mean of 3 seeds (results/digits, from Glorot weights).
"""

from ml_collections import ConfigDict

from configs import bn_x5


def get_config(scale: str = "imagenet") -> ConfigDict:
    config = bn_x5.get_config(scale)
    config.name = "bn_x5_unshuffled"
    config.data.shuffle = "none"
    return config
