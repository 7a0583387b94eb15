"""Sigmoid Inception without BN: "We also attempted to train the original Inception with sigmoid,
but the model remained at the accuracy equivalent to chance." (4.2.2)

    python -m bn_jax.main --config=configs/inception_sigmoid.py:digits    # 2 CPU cores, minutes

Expected: chance, 0.1%, on ImageNet (not run here).
Digits: 10.0%, the mean of 3 seeds (results/digits, from Glorot weights).
"""

from ml_collections import ConfigDict

from configs import inception


def get_config(scale: str = "imagenet") -> ConfigDict:
    config = inception.get_config(scale)
    config.name = "inception_sigmoid"
    config.activation = "sigmoid"
    return config
