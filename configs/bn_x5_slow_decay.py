"""Ablation (4.2.1, "Accelerate the learning rate decay"): BN-x5 with Inception's slow decay.

    python -m bn_jax.main --config=configs/bn_x5_slow_decay.py:digits    # 2 CPU cores, minutes

Expected: no number in the paper.
Digits: 97.9%, the mean of 3 seeds (results/digits, from Glorot weights).
"""

from ml_collections import ConfigDict

from configs import bn_x5


def get_config(scale: str = "imagenet") -> ConfigDict:
    config = bn_x5.get_config(scale)
    config.name = "bn_x5_slow_decay"
    config.decay_epochs = 8.0  # Inception's, 6 times bn_x5's
    return config
