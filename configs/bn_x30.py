"""BN-x30: "Like BN-x5, but with the initial learning rate 0.045 (30 times that of Inception)."

    python -m bn_jax.main --config=configs/bn_x30.py:digits    # 2 CPU cores, minutes

Expected: 72.2% after 2.7e6 steps on ImageNet, 74.8% after 6e6 (4.2.2; not run here).
Digits: 97.7%, the mean of 3 seeds (results/digits, from Glorot weights).
"""

from ml_collections import ConfigDict

from configs import bn_x5


def get_config(scale: str = "imagenet") -> ConfigDict:
    config = bn_x5.get_config(scale)
    config.name = "bn_x30"
    config.learning_rate = 0.045
    return config
