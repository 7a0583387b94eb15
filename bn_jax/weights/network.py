"""The inference network of a run: the one that evaluation applies, without the data set."""

import json
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import linen as nn
from ml_collections import ConfigDict

from bn_jax import layers, models
from bn_jax.evaluate import members
from bn_jax.experiment import build
from bn_jax.models.inception import VARIANTS
from bn_jax.workdir.reader import read_record


class Network(NamedTuple):
    """A trained or imported network.

    config: its own. model, variables: in float32 of the highest precision, with `batch_stats` where
    it has BN.
    image_shape: [H, W, C] of uint8 pixels in 0..255. statistics: where `batch_stats` come from
    (population, running, none). about: run, step and origin, as texts.
    """

    config: ConfigDict
    model: nn.Module
    variables: dict[str, Any]
    image_shape: tuple[int, int, int]
    classes: int
    statistics: str
    about: dict[str, str]

    def logits(self, images: Any) -> Any:
        """Inference: images [N, H, W, C] to logits float32 [N, classes]. For `jax.jit`."""
        return self.model.apply(self.variables, images, train=False)

    def preprocessing(self) -> str:
        """What the network does to the pixels first, in words."""
        shape = " x ".join(map(str, self.image_shape))
        if self.config.model.name == "mlp":
            threshold = self.config.model.threshold * 255
            how = f"a pixel above {threshold:g} is 1, any other 0"
        else:
            variant = VARIANTS[self.config.model.variant]
            mean = ", ".join(f"{m:g}" for m in variant.mean)
            how = f"(pixel - ({mean})) / {variant.scale:g}"
        order = "RGB" if self.image_shape[-1] == 3 else "grey"
        return f"images uint8 [batch, {shape}] in 0..255, {order}; inside the network: {how}"

    def texts(self) -> dict[str, str]:
        """What a file says of the network in it."""
        return {
            "preprocessing": self.preprocessing(),
            "statistics": self.statistics,
            "config": json.dumps(self.config.to_dict(), sort_keys=True),
            **self.about,
        }


def load(
    workdir: pathlib.Path,
    at_step: int | None,
    statistics: str | None,
    say: Callable[[str], None] = print,
    data_dir: str | None = None,
) -> Network:
    """The network of a workdir's newest checkpoint, or of one step.

    Args:
      statistics: population (Algorithm 2: kept beside the checkpoint, or computed, for which the
        data set must be there), or running. None: population, except that imported weights use
        their own.
      data_dir: where that data set lies now.
      say: called with a line about what was found.

    Raises ConfigError if the run or its data set is missing, CheckpointError if a checkpoint is.
    """
    exp = build.without_data(workdir, data_dir)
    run = read_record(workdir)
    origin = run["info"].get("imported") if run is not None else None
    if statistics is None:
        statistics = "population" if origin is None else "running"
    member = members.load_member(workdir, at_step, statistics, exp, say=say)
    about = {
        "experiment": exp.config.name,
        "step": str(member.about["step"]),
        "which": member.about["which"],
    }
    if origin is not None:
        about |= {f"imported_{name}": value for name, value in origin.items()}
    # A TPU and a GPU would otherwise round the factors to fewer digits than the file's readers do.
    config = _changed(exp.config, dtype="float32", precision="highest")
    variables = {"params": member.params}
    if member.batch_stats:
        variables["batch_stats"] = member.batch_stats
    classes = int(exp.data.num_classes)
    return Network(
        config,
        models.build(config, classes),
        jax.tree.map(np.asarray, jax.device_get(variables)),
        exp.data.image_shape,
        classes,
        member.statistics,
        about,
    )


def folded(network: Network) -> Network:
    """The same network without BN: one affine layer each (Algorithm 2, line 12).

    A network with per-activation BN (bn.per_activation) comes back as it is: such a BN has a pair
    of numbers for each place of the map, which no convolution has.
    """
    config = network.config
    if "batch_stats" not in network.variables:
        return network
    if config.model.name == "inception" and config.bn.per_activation:
        return network
    variables = layers.fold_variables(network.variables, epsilon=config.bn.epsilon)
    config = _changed(config, norm="none")
    model = models.build(config, network.classes)
    return network._replace(
        config=config, model=model, variables=jax.tree.map(np.asarray, variables)
    )


def _changed(config: ConfigDict, **changes: Any) -> ConfigDict:
    config = config.copy_and_resolve_references().unlock()
    for name, value in changes.items():
        config[name] = value
    config.record.activations = ()  # what training records may be BN's
    return config.lock()


def examples(network: Network, number: int) -> np.ndarray:
    """Images uint8 [number, H, W, C] to compare networks on: noise over soft patterns."""
    random = np.random.default_rng(0)
    height, width, channels = network.image_shape
    coarse = random.uniform(0, 255, (number, 4, 4, channels))
    soft = np.asarray(jax.image.resize(coarse, (number, height, width, channels), "linear"))
    noise = random.normal(0, 40, soft.shape)
    return np.clip(soft + noise, 0, 255).astype(np.uint8)
