"""Inception at BN-x5's rate: "The same learning rate increase with original Inception caused the
model parameters to reach machine infinity." (4.2.2)

    python -m bn_jax.main --config=configs/inception_x5.py:digits    # 2 CPU cores, minutes

Expected: ends as diverged on ImageNet (not run here).
Digits: 96.0%, the mean of 3 seeds (results/digits, from Glorot weights).
"""

from ml_collections import ConfigDict

from configs import inception


def get_config(scale: str = "imagenet") -> ConfigDict:
    config = inception.get_config(scale)
    config.name = "inception_x5"
    config.learning_rate = 0.0075
    return config
