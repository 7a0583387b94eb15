"""BN-Baseline: "Same as Inception with Batch Normalization before each nonlinearity." (4.2.2)

    python -m bn_jax.main --config=configs/bn_baseline.py:digits    # 2 CPU cores, minutes

Expected: 72.2% after 13.3e6 steps on ImageNet, 72.7% at most (not run here).
Digits: 97.4%, the mean of 3 seeds (results/digits, from Glorot weights).
"""

from ml_collections import ConfigDict

from configs import inception


def get_config(scale: str = "imagenet") -> ConfigDict:
    config = inception.get_config(scale)
    config.name = "bn_baseline"
    config.norm = "batch_norm"
    return config
