"""Ensemble member 4 of 6 (4.2.3): BN-x30 with per-activation BN in the last hidden layers.

    python -m bn_jax.main --config=configs/ensemble_4.py:digits    # 2 CPU cores, minutes

Expected: 20.1% top-1 and 4.9% top-5 error of all six on ImageNet (Fig. 4; not run here).
Digits: 2.6% top-1 error, 1.2% of all six, one seed, single crop (results/digits/fig4.md).
"""

from ml_collections import ConfigDict

from configs import bn_x30


def get_config(scale: str = "imagenet") -> ConfigDict:
    config = bn_x30.get_config(scale)
    config.name = "ensemble_4"
    config.seed = 400  # its own data order and initial weights; a sweep adds its number
    config.bn.per_activation = ("inception_5b",)  # which layers is not given: the last module
    return config
