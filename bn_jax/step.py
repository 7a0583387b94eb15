"""The training step and the evaluation step: pure functions of (state, batch).

Neither depends on devices, files or flags. `train.py` compiles them.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from bn_jax import layers, optim
from bn_jax.ops import vectors

AUX_WEIGHT = 0.3  # weight of each auxiliary head's loss (GoogLeNet, section 5)


class TrainState(NamedTuple):
    """The state that a run carries from step to step.

    step: int32 scalar, the number of steps taken. params, batch_stats: the model's trees (float32).
    opt_state: the optimizer's.
    """

    step: jax.Array
    params: Any
    batch_stats: Any
    opt_state: Any


def init_state(
    model: nn.Module, seed: jax.typing.ArrayLike, image_shape: tuple[int, int, int]
) -> TrainState:
    """Makes the state before the first step; initial weights depend only on `seed`.

    image_shape: (height, width, channels).
    """
    # In training mode, so that layers that exist only in training (auxiliary heads) get weights.
    images = jnp.zeros((1, *image_shape), jnp.uint8)
    keys = {"params": jax.random.key(seed), "dropout": jax.random.key(seed)}
    variables = model.init(keys, images, train=True)
    params = variables["params"]
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        batch_stats=variables.get("batch_stats", {}),
        opt_state=optim.init_velocity(params),
    )


def cross_entropy(logits: jax.Array, labels: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Sums -log p(label), in nats, over the valid rows, and divides by the number N of all rows.

    logits: [N, K]. labels, mask: [N]. Without a mask the result is the mean. With one, `gradients`
    multiplies it by N / (number of valid rows), which makes it the mean.
    """
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    if mask is not None:
        # `where`, not a product: a masked row may hold anything, including infinity.
        losses = jnp.where(mask, losses, 0.0)
    return jnp.mean(losses)


def train_step(
    state: TrainState,
    batch: dict[str, jax.Array],
    hyper: optim.Hyper,
    seed: jax.typing.ArrayLike,
    *,
    model: nn.Module,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Takes one step of momentum SGD on one global batch.

    Differs from the paper: updates are synchronous; the paper's workers update asynchronously.

    Args:
      batch: image [N, H, W, C] in 0..255, label int32 [N], and, if rows may be missing, mask bool
        [N]; a row whose mask is False has no influence.
      seed: of the run, an integer.

    Returns:
      The next state and metrics. These are `loss` (with the L2 and auxiliary terms) and
      `cross_entropy`, both in nats, `top1` (a share of the valid rows), `learning_rate`, and
      `gradient_square` [leaves of params], whose sum is the squared norm of the gradient.
    """
    key = dropout_key(seed, state.step)
    grads, means, batch_stats = gradients(
        state.params,
        state.batch_stats,
        batch,
        key,
        model=model,
    )
    batch_size = batch["label"].shape[0]
    return update(state, grads, means, batch_stats, hyper, batch_size)


def gradients(
    params: Any,
    batch_stats: Any,
    batch: dict[str, jax.Array],
    dropout: jax.Array,
    *,
    model: nn.Module,
) -> tuple[Any, dict[str, jax.Array], Any]:
    """Computes (gradient without L2, metrics, updated batch_stats) of a batch.

    Gradient and metrics are means over the valid rows. batch: as for `train_step`. dropout: the key
    of its dropout, and of the noise in BN's statistics (`models.perturbed`). Metrics: `loss` (with
    the auxiliary terms, without L2), `cross_entropy`, `top1`.
    """
    labels = batch["label"]
    mask = batch.get("mask")

    def objective(params):
        variables = {
            "params": params,
            "batch_stats": vectors.gathered(batch_stats),
        }
        outputs, updates = model.apply(
            variables,
            batch["image"],
            train=True,
            mask=mask,
            rngs={"dropout": dropout, "noise": dropout},
            mutable=["batch_stats"],
        )
        logits: jax.Array = outputs
        aux: tuple[jax.Array, ...] = ()
        if isinstance(outputs, tuple):
            logits, aux = outputs

        main = cross_entropy(logits, labels, mask)
        loss = main + AUX_WEIGHT * sum(cross_entropy(a, labels, mask) for a in aux)
        updated = updates.get("batch_stats", {})
        return loss, (main, logits, updated)

    differentiate = jax.value_and_grad(objective, has_aux=True)
    (loss, found), grads = differentiate(params)
    main, logits, updated = found

    correct = label_rank(logits, labels) < 1
    if mask is not None:
        correct = mask & correct
    top1 = jnp.mean(correct, dtype=jnp.float32)
    means = {"loss": loss, "cross_entropy": main, "top1": top1}
    if mask is None:
        return grads, means, updated

    # So far the sums were divided by the number of all rows. The number of valid rows is applied
    # here, at the end, which gives the same since everything is linear. So devices can add it up
    # together with the gradients (in float32, like these), and the backward pass need not wait.
    scale = mask.size / jnp.maximum(jnp.sum(mask, dtype=jnp.float32), 1)
    grads, means = jax.tree.map(lambda x: x * scale, (grads, means))
    return grads, means, updated


def update(
    state: TrainState,
    grads: Any,
    means: dict[str, jax.Array],
    batch_stats: Any,
    hyper: optim.Hyper,
    batch_size: int,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Makes the next state and `train_step`'s metrics from what `gradients` returned; adds L2."""
    params, velocity, grads = vectors.raveled((state.params, state.opt_state, grads))
    if hyper.l2 is not None:
        penalty = optim.l2_penalty(params)
        means = {**means, "loss": means["loss"] + hyper.l2 * penalty}
        grads = optim.add_decay(grads, params, hyper.l2)
    squares = vectors.squares(jax.tree.leaves(grads))

    rate = optim.decayed_rate(hyper, state.step, batch_size)
    # On GPUs all weights must be read before the first is overwritten; otherwise XLA copies them.
    known = jnp.sum(squares) + means["loss"]
    rate, momentum = vectors.after(known, rate, hyper.momentum)
    updated = optim.momentum_step(grads, velocity, params, learning_rate=rate, momentum=momentum)

    def shaped(new: jax.Array, old: jax.Array) -> jax.Array:
        return new.reshape(old.shape)

    before = (state.params, state.opt_state)
    params, opt_state = jax.tree.map(shaped, updated, before)

    metrics = {
        **means,
        "learning_rate": rate,
        "gradient_square": squares,
    }
    return TrainState(state.step + 1, params, batch_stats, opt_state), metrics


def dropout_key(seed: jax.typing.ArrayLike, step: jax.typing.ArrayLike) -> jax.Array:
    """Returns the key of a step's dropout, from another stream than the initial weights."""
    dropout_stream = jax.random.fold_in(jax.random.key(seed), 1)
    return jax.random.fold_in(dropout_stream, step)


def train_steps(
    state: TrainState,
    images: jax.Array,
    labels: jax.Array,
    indices: jax.Array,
    hyper: optim.Hyper,
    seed: jax.typing.ArrayLike,
    *,
    model: nn.Module,
    image_shape: tuple[int, int, int],
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Takes K steps in one dispatch, on a data set that stays on the device.

    images: of `as_words`. labels: [examples]. indices: int32 [K, N], the examples of K batches.
    image_shape: (height, width, channels). The metrics of `train_step` get a leading axis of K. On
    CPU this is for dense networks only, because XLA runs convolutions in a loop 3.5 times slower
    there.
    """

    def body(state, index):
        pixels = jax.lax.bitcast_convert_type(images[index], jnp.uint8)
        image = pixels.reshape(-1, *image_shape)
        batch = {"image": image, "label": labels[index]}
        return train_step(state, batch, hyper, seed, model=model)

    return jax.lax.scan(body, state, indices)


def as_words(images: np.ndarray) -> np.ndarray:
    """Views images uint8 [N, H, W, C] as uint32 [N, H*W*C/4], or as uint8 [N, H*W*C].

    The latter if an image cannot be divided into words of 4 bytes. XLA for CPUs copies a batch of
    words faster than one of bytes: a step of Fig. 1 takes 0.94 of the time.
    """
    rows = images.reshape(len(images), -1)
    if rows.shape[1] % 4:
        return rows
    return rows.view(np.uint32)


def label_rank(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Returns the rank of the true class among the logits, int32 [N]; 0 is the highest.

    logits: [N, K]. labels: [N]. Ties go to the lower class, so a constant network is at chance, not
    at 100%. A row with a logit that is not finite ranks last.
    """
    true = jnp.take_along_axis(logits, labels[:, None], axis=-1)
    classes = jnp.arange(logits.shape[-1])
    higher = logits > true
    tied = logits == true
    lower_class = classes < labels[:, None]
    ahead = higher | (tied & lower_class)
    rank = jnp.sum(ahead, axis=-1)

    last = max(logits.shape[-1], 5)  # not among the first five, even of fewer classes
    finite = jnp.all(jnp.isfinite(logits), axis=-1)
    return jnp.where(finite, rank, last)


def eval_step(
    params: Any, batch_stats: Any, batch: dict[str, jax.Array], *, model: nn.Module
) -> dict[str, jax.Array]:
    """Sums `cross_entropy` (nats), `top1`, `top5` and `examples` over the valid rows of a batch.

    These are sums and counts, not means, so that batches of any size add up to the exact result.
    """
    labels = batch["label"]
    mask = batch["mask"]
    variables = {"params": params, "batch_stats": batch_stats}
    logits: Any = model.apply(variables, batch["image"], train=False)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    rank = label_rank(logits, labels)

    return {
        "cross_entropy": jnp.sum(jnp.where(mask, losses, 0.0)),
        "top1": jnp.sum(mask & (rank < 1)),
        "top5": jnp.sum(mask & (rank < 5)),
        "examples": jnp.sum(mask),
    }


def statistics_step(
    params: Any,
    batch_stats: Any,
    total: Any,
    batch: dict[str, jax.Array],
    seed: jax.typing.ArrayLike,
    *,
    model: nn.Module,
    mini_batches: int = 1,
) -> Any:
    """Adds a training batch to `total`, the population's statistics (Algorithm 2, lines 9 and 10).

    `total` begins as `layers.fresh_stats(batch_stats)`. mini_batches: how many mini-batches the
    batch holds, each of them a statistic group. All batches of a run have the same dropout.
    """
    variables = {
        "params": params,
        "batch_stats": layers.fresh_stats(batch_stats),
    }
    _, updates = model.apply(
        variables,
        batch["image"],
        train=True,
        mask=batch.get("mask"),
        rngs={"dropout": dropout_key(seed, 0)},
        mutable=["batch_stats"],
    )
    found = layers.counted(updates["batch_stats"], mini_batches)
    return layers.merge_stats(total, found)
