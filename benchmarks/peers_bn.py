"""Reproduces where other batch norms go wrong: python -m benchmarks.peers_bn [--smoke]

Prints one JSON object a measurement: peer, what was asked, what is right, what came out; keeps them
with the peers' versions as results/bench/MACHINE/batch_norm_peers.json. Flax is always there;
Haiku, Equinox, Keras (on JAX) and PyTorch are skipped where not installed; a record that has one
which is not installed now is not overwritten: the command then ends with 1 before it measures.
--smoke takes 64 examples and keeps nothing. A minute on 2 cores.
"""

import argparse
import functools
import importlib
import importlib.metadata
import json
import os

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import fair
from bn_jax import batch_norm

measurements: list[dict] = []


def ours(x, mask=None):
    """(y, variance estimate) after one training step, then inference on the same batch."""
    stats = batch_norm.init_stats((1,))
    options = {"epsilon": 1e-5, "momentum": 0.99}
    y, stats = batch_norm.normalize(x, None, None, stats, train=True, mask=mask, **options)
    return y, stats, batch_norm.normalize(x, None, None, stats, train=False, **options)[0]


def flax(x, mask=None, fast=True):
    """The same of flax.linen.BatchNorm; its running mean and variance, 1% each, scaled back.

    fast: its default, the variance as E[x^2] - E[x]^2; False is its best.
    """
    bn = nn.BatchNorm(use_fast_variance=fast)
    variables = bn.init(jax.random.key(0), x, use_running_average=True)
    y, new = bn.apply(variables, x, use_running_average=False, mask=mask, mutable=["batch_stats"])
    s = new["batch_stats"]
    batch = batch_norm.Stats(s["mean"] / 0.01, (s["var"] - 0.99) / 0.01, jnp.float32(1))
    return y, batch, bn.apply({**variables, **new}, x, use_running_average=True)


def haiku(x):
    """y in training, and in inference after one step, of haiku.BatchNorm at decay 0.99."""
    import haiku as hk

    net = hk.transform_with_state(lambda x, t: hk.BatchNorm(True, True, 0.99)(x, t))
    params, state = net.init(None, x, True)
    y, state = net.apply(params, state, None, x, True)
    return y, None, net.apply(params, state, None, x, False)[0]


def equinox(x):
    """The same of equinox.nn.BatchNorm, in its mode `ema`."""
    import equinox as eqx

    bn, state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(1, "batch", mode="ema")
    run = jax.vmap(bn, axis_name="batch", in_axes=(0, None), out_axes=(0, None))
    y, state = run(x, state)
    return y, None, run_inference(eqx, bn, state, x)


def run_inference(eqx, bn, state, x):
    """y by the stored statistics."""
    frozen = eqx.nn.inference_mode(bn)
    return jax.vmap(frozen, axis_name="batch", in_axes=(0, None), out_axes=(0, None))(x, state)[0]


def keras(x):
    """The same of keras.layers.BatchNormalization."""
    os.environ.setdefault("KERAS_BACKEND", "jax")
    import keras as k

    bn = k.layers.BatchNormalization(epsilon=1e-5)
    return bn(x, training=True), None, bn(x, training=False)


def torch(x):
    """The same of torch.nn.BatchNorm1d."""
    import torch as t

    bn = t.nn.BatchNorm1d(1)
    y = bn(t.from_numpy(np.array(x))).detach()
    return y.numpy(), None, bn.eval()(t.from_numpy(np.array(x))).detach().numpy()


def show(peer, question, right, got):
    """One line."""
    measurements.append({"peer": peer, "question": question, "right": right, "got": got})
    print(json.dumps(measurements[-1]), flush=True)


OTHERS = {
    "haiku": ("dm-haiku", haiku),
    "equinox": ("equinox", equinox),
    "keras": ("keras", keras),
    "torch": ("torch", torch),
}


def found_peers():
    """What is measured by name, and the version of each that is a package."""
    exact = functools.partial(flax, fast=False)
    peers = {"bn_jax": ours, "flax": flax, "flax, use_fast_variance=False": exact}
    installed = {"flax": "flax", "jax": "jax"}
    os.environ.setdefault("KERAS_BACKEND", "jax")
    for name, (package, run) in OTHERS.items():
        try:
            importlib.import_module(name)
            peers[name], installed[name] = run, package
        except ImportError:
            print(json.dumps({"peer": name, "skipped": "not installed"}))
    return peers, {n: importlib.metadata.version(p) for n, p in installed.items()}


def require_no_loss(versions):
    """Ends the command if the record on disk has a peer that is not installed now."""
    path = fair.record_path("batch_norm_peers")
    if path.is_file():
        lost = json.loads(path.read_text())["peer_versions"].keys() - versions.keys()
        if lost:
            packages = " ".join(sorted(OTHERS[name][0] for name in lost))
            raise SystemExit(
                f"{path} has peers that are not installed here and would be lost: pip install "
                f"{packages}; or --smoke, which keeps nothing"
            )


def main():
    """All measurements."""
    parser = argparse.ArgumentParser("python -m benchmarks.peers_bn", description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="64 examples; writes nothing")
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    measurements.clear()
    peers, peer_versions = found_peers()
    if not args.smoke:
        require_no_loss(peer_versions)
    few, many = (64, 64) if args.smoke else (512, 4096)
    for name, run in peers.items():
        x = jnp.float32(rng.normal(5, 2, (few, 1)))
        show(name, "std in inference after 1 step on N(5, 2)", 1.0, float(np.std(run(x)[2])))
        for ratio in (1e3, 1e4):
            x = np.float32(rng.normal(ratio, 1, (many, 1)))
            y = np.float64(run(jnp.asarray(x))[0])
            right = float(1 / np.sqrt(np.float64(x).var()))
            slope = float(np.polyfit(np.float64(x[:, 0]) - ratio, y[:, 0], 1)[0])
            show(name, f"1/std as applied in training, mean/std {ratio:.0e}", right, slope)
        x = np.float32(rng.normal(0, 1, (many, 1)))
        x[0] = 1e4
        y = np.float64(run(jnp.asarray(x))[0])
        right = float(1 / np.sqrt(np.float64(x).var()))
        slope = float(y[0, 0] - y[1, 0]) / float(x[0, 0] - x[1, 0])
        show(name, "1/std as applied in training, an outlier of 1e4 first", right, slope)
        y = run(jnp.full((many, 1), 1e4 + 0.1, jnp.float32))[0]
        show(name, "largest |y| of a constant 10000.1", 0.0, float(np.max(np.abs(y))))
    for name, run in (("bn_jax", ours), ("flax", flax)):
        try:
            show(
                name, "y of one example", "an error", np.asarray(run(jnp.ones((1, 1)))[0]).tolist()
            )
        except ValueError as error:
            show(name, "y of one example", "an error", str(error))
        x = jnp.float32([[1.0], [2.0], [np.nan]])
        mask = np.array([1, 1, 0], bool)
        mask = mask if run is ours else mask[:, None]
        grad = jax.grad(lambda x, r=run, k=mask: jnp.sum(jnp.square(r(x, k)[0][:2])))(x)
        show(name, "gradient is finite beside a masked NaN", True, bool(np.isfinite(grad).all()))
    devices_of_unequal_counts()
    record = {"peer_versions": peer_versions, "measurements": measurements}
    fair.write("batch_norm_peers", record, smoke=args.smoke)


def devices_of_unequal_counts():
    """The mean of 8, 8, 8 and 2 (or 0) valid examples on 4 devices, as Flax averages it."""
    x = np.float32(np.concatenate([np.full(8, v) for v in (1.0, 1.0, 1.5, 2.0)]))[:, None]
    for last in (2, 0):
        valid = np.arange(32) % 8 < np.repeat([8, 8, 8, last], 8)
        bn = nn.BatchNorm(axis_name="d")

        def local(x, mask, bn=bn):
            variables = {"params": {"scale": jnp.ones(1), "bias": jnp.zeros(1)}}
            variables["batch_stats"] = {"mean": jnp.zeros(1), "var": jnp.ones(1)}
            _, new = bn.apply(
                variables, x, use_running_average=False, mask=mask[:, None], mutable=["batch_stats"]
            )
            return new["batch_stats"]["mean"] / 0.01

        parts = (x.reshape(4, 8, 1), valid.reshape(4, 8))
        got = float(jax.vmap(local, axis_name="d")(*parts)[0, 0])
        question = f"mean over 4 devices of 8, 8, 8, {last} valid examples"
        show("flax", question, float(x[valid].mean()), got)
        show("bn_jax", question, float(x[valid].mean()), float(ours(x, valid)[1].mean[0]))


if __name__ == "__main__":
    main()
