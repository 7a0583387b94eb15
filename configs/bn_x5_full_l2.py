"""Ablation (4.2.1, "Reduce the L2 weight regularization"): BN-x5 with Inception's full L2.

    python -m bn_jax.main --config=configs/bn_x5_full_l2.py:digits    # 2 CPU cores, minutes

Expected: no number in the paper; reducing it improves held-out accuracy.
Digits: 97.9%, the mean of 3 seeds (results/digits, from Glorot weights).
"""

from ml_collections import ConfigDict

from configs import bn_x5


def get_config(scale: str = "imagenet") -> ConfigDict:
    config = bn_x5.get_config(scale)
    config.name = "bn_x5_full_l2"
    config.l2 = 0.001  # 5 times bn_x5's
    return config
