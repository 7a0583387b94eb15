"""Builds networks; only this module turns fields of a config into fields of modules."""

from functools import partial
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from ml_collections import ConfigDict

from bn_jax.layers import BatchNorm
from bn_jax.models.inception import Inception
from bn_jax.models.initializers import BY_ACTIVATION, Gaussian
from bn_jax.models.mlp import Mlp
from bn_jax.models.perturbed import PerturbedBatchNorm

ACTIVATIONS = {"relu": nn.relu, "sigmoid": nn.sigmoid}
# The precision of products and convolutions. None leaves it to jax's own setting and to XLA.
PRECISIONS = {
    "default": None,
    "high": lax.Precision.HIGH,
    "highest": lax.Precision.HIGHEST,
}


def build(config: ConfigDict, num_classes: int) -> nn.Module:
    """Builds the network of an experiment's config, which `experiment.config.check` has checked.

    It is called as model.apply(variables, images, train=..., mask=...), and maps images
    [N, H, W, C] in 0..255 to logits [N, num_classes], float32 or wider.
    """
    dtype = jnp.dtype(config.dtype)
    shared: dict[str, Any] = {
        "num_classes": num_classes,
        "norm": _norm(config, dtype) if config.norm == "batch_norm" else None,
        "activation": ACTIVATIONS[config.activation],
        "dropout": config.dropout,
        "dtype": dtype,
        "precision": PRECISIONS[config.precision],
    }
    if config.model.name == "mlp":
        return Mlp(
            widths=tuple(config.model.widths),
            kernel_init=Gaussian(std=config.model.init_std),
            threshold=config.model.threshold,
            **shared,
        )
    return Inception(
        width=config.model.width,
        variant=config.model.variant,
        lrn=config.lrn,
        aux=config.model.aux,
        per_activation=tuple(config.bn.per_activation),
        kernel_init=Gaussian(gain=config.model.init_scale, rule=init_rule(config)),
        **shared,
    )


def init_rule(config: ConfigDict) -> str:
    """Returns the rule of an Inception's initial weights: "he", "glorot" or "glorot_relu".

    The config's "auto" stands for Glorot's rule with the sigmoid, and for sqrt(2) times that with
    ReLU, which halves the variance of what it passes on.
    """
    if config.model.init == "auto":
        return BY_ACTIVATION[config.activation]
    return config.model.init


def _norm(config: ConfigDict, dtype: jnp.dtype):
    options = {
        "momentum": config.bn.momentum,
        "epsilon": config.bn.epsilon,
        "group_size": config.bn.group_size,
        "dtype": dtype,
    }
    if config.bn.noise or config.bn.freeze_after:
        noise = config.bn.noise
        return partial(
            PerturbedBatchNorm, noise=noise, freeze_after=config.bn.freeze_after, **options
        )
    return partial(BatchNorm, **options)
