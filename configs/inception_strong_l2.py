"""Ablation (of the project's brief, not in arXiv v3): Inception without BN and 5 times its L2.

    python -m bn_jax.main --config=configs/inception_strong_l2.py:digits    # 2 CPU cores, minutes

Expected: no number in the paper.
Digits: 52.3%, the mean of 3 seeds (results/digits, from Glorot weights).
"""

from ml_collections import ConfigDict

from configs import inception


def get_config(scale: str = "imagenet") -> ConfigDict:
    config = inception.get_config(scale)
    config.name = "inception_strong_l2"
    config.l2 = 0.005
    return config
