"""Ensemble member 6 of 6 (4.2.3): BN-x30 with larger weights, 10% dropout, per-activation BN.

    python -m bn_jax.main --config=configs/ensemble_6.py:digits    # 2 CPU cores, minutes

Expected: 20.1% top-1 and 4.9% top-5 error of all six on ImageNet (Fig. 4; not run here).
Digits: 2.3% top-1 error, 1.2% of all six, one seed, single crop (results/digits/fig4.md).
"""

from ml_collections import ConfigDict

from configs import bn_x30


def get_config(scale: str = "imagenet") -> ConfigDict:
    config = bn_x30.get_config(scale)
    config.name = "ensemble_6"
    config.seed = 600  # its own data order and initial weights; a sweep adds its number
    config.model.init_scale = 1.5  # by how much is not given
    config.dropout = 0.1
    config.bn.per_activation = ("inception_5b",)  # which layers is not given: the last module
    return config
