"""Ablation (4.2.1, "Reduce the photometric distortions"): BN-x5 with Inception's full distortions.

    python -m bn_jax.main --config=configs/bn_x5_full_distortion.py:digits    # 2 CPU cores, minutes

Expected: no number in the paper.
Digits: 98.1%, the mean of 3 seeds (results/digits, from Glorot weights).
"""

from ml_collections import ConfigDict

from configs import bn_x5


def get_config(scale: str = "imagenet") -> ConfigDict:
    config = bn_x5.get_config(scale)
    config.name = "bn_x5_full_distortion"
    config.data.distortion = 1.0
    return config
