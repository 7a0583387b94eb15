"""Loads the inference network of a run, as evaluation applies it, without the data set."""

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

    Attributes:
      config: its own, with float32 and the highest precision.
      model, variables: of that config; `variables` have `batch_stats` if the network has BN.
      image_shape: [H, W, C] of its images, which are uint8 in 0..255.
      statistics: where `batch_stats` come from (population, running, none).
      about: run, step and origin, as texts.
    """

    config: ConfigDict
    model: nn.Module
    variables: dict[str, Any]
    image_shape: tuple[int, int, int]
    classes: int
    statistics: str
    about: dict[str, str]

    def logits(self, images: Any) -> Any:
        """Runs inference: images [N, H, W, C] to logits float32 [N, classes]; for `jax.jit`."""
        return self.model.apply(self.variables, images, train=False)

    def preprocessing(self) -> str:
        """Says in words what the network does to the pixels first."""
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
        """Returns the texts that a file holds about its network."""
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
    """Loads the network of a workdir's newest checkpoint, or of one step.

    Args:
      statistics: population (of Algorithm 2: read from beside the checkpoint, or computed, which
        needs the data set) or running. None: population, but imported weights use their own.
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
    # Otherwise a TPU or GPU would round factors to fewer digits than the readers of the file do.
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
    """Folds each BN into the layer before it (Algorithm 2, line 12).

    A network with per-activation BN (bn.per_activation) is returned unchanged: such a BN has its
    own scale and offset at each position of the map, which a convolution cannot have.
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
    config.record.activations = ()  # they may be inputs of a BN that is gone
    return config.lock()


def examples(network: Network, number: int) -> np.ndarray:
    """Makes images, uint8 [number, H, W, C], to compare networks on: noise over soft patterns."""
    random = np.random.default_rng(0)
    height, width, channels = network.image_shape
    coarse = random.uniform(0, 255, (number, 4, 4, channels))
    soft = np.asarray(jax.image.resize(coarse, (number, height, width, channels), "linear"))
    noise = random.normal(0, 40, soft.shape)
    return np.clip(soft + noise, 0, 255).astype(np.uint8)
