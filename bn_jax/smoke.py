"""BN_JAX_SMOKE=1: documented commands in seconds, to see that they run; results mean nothing."""

import os

from ml_collections import ConfigDict


def shorten(config: ConfigDict) -> ConfigDict:
    """The config cut to two dispatches and one evaluation if BN_JAX_SMOKE=1, else as it is."""
    if os.environ.get("BN_JAX_SMOKE") != "1":
        return config
    print("BN_JAX_SMOKE=1: a shortened run, its results mean nothing", flush=True)
    short = ConfigDict(config.to_dict())
    steps = 2 * config.steps_per_dispatch
    short.total_steps = min(config.total_steps, steps)
    for name in ("eval_every", "checkpoint_every", "log_every"):
        short[name] = min(config[name], steps)
    short.record.activation_every = min(config.record.activation_every, steps)
    short.statistics_batches = 1
    short.scale = f"{config.scale}_smoke"  # the default workdir is not the real run's
    return short.lock()
