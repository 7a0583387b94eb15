"""BN-x5-Sigmoid: "Like BN-x5, but with sigmoid nonlinearity g(t) = 1/(1+exp(-t)) instead of ReLU."

    python -m bn_jax.main --config=configs/bn_x5_sigmoid.py:digits    # 2 CPU cores, minutes

Expected: 69.8% at most on ImageNet (4.2.2; not run here).
Digits: 98.5%, the mean of 3 seeds (results/digits, from Glorot weights).
"""

from ml_collections import ConfigDict

from configs import bn_x5


def get_config(scale: str = "imagenet") -> ConfigDict:
    config = bn_x5.get_config(scale)
    config.name = "bn_x5_sigmoid"
    config.activation = "sigmoid"
    return config
