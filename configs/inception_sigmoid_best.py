"""The control: sigmoid Inception without BN at the best initial gain and rate of a grid.

It is not in the paper. Under Glorot weights a sigmoid network of 30 layers carries no signal at
all, so that chance (inception_sigmoid) may be a statement about its initial weights. Gain and rate
are chosen on held-out examples (docs/results.md).

    python -m bn_jax.main --config=configs/inception_sigmoid_best.py:digits  # 2 CPU cores, minutes

Expected: no number in the paper.
Not tuned yet: the paper's values, and Glorot's weights.
"""

from ml_collections import ConfigDict

from configs import inception_sigmoid

TUNED: dict[str, dict[str, float]] = {}  # {scale: fields}; not tuned yet: the paper's values


def get_config(scale: str = "imagenet") -> ConfigDict:
    config = inception_sigmoid.get_config(scale)
    config.name = "inception_sigmoid_best"
    config.update_from_flattened_dict(TUNED.get(scale, {}))
    return config
