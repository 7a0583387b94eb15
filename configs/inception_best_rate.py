"""The control: plain Inception at its best rate, so that BN is not credited with a higher rate.

It is not in the paper. Its rate is the best of 0.0015, 0.0075, 0.015, 0.03 on a fifth of the
training split (--config.data.holdout=0.2; docs/results.md has the command), digits, seed 0: 84.0%,
93.6%, 9.4% and 9.4% of 800 held-out digits after 5,000 steps (results/grid).

    python -m bn_jax.main --config=configs/inception_best_rate.py:digits    # 2 CPU cores, minutes

Expected: no number in the paper.
Digits: 96.4%, the mean of 3 seeds (results/digits, from Glorot weights).
"""

from ml_collections import ConfigDict

from configs import inception


def get_config(scale: str = "imagenet") -> ConfigDict:
    config = inception.get_config(scale)
    config.name = "inception_best_rate"
    config.learning_rate = 0.0075
    return config
